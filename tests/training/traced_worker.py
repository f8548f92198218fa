"""The real training worker, which also writes down the rows each rank shows: `trace-<rank>.csv` in the run.

python traced_worker.py RUN --folds 0 [slowly]
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from lesionflow.models.image import LesionModule
from lesionflow.training import run

if __name__ == "__main__":
    slowly = "slowly" in sys.argv
    arguments = [a for a in sys.argv[1:] if a != "slowly"]
    trace = Path(arguments[0]) / f"trace-{os.environ.get('RANK', '0')}.csv"
    step = LesionModule.training_step

    def traced(self: LesionModule, batch: Any, batch_idx: int) -> Any:
        with trace.open("a") as file:
            file.write(f"{self.step}," + ",".join(map(str, batch.row.tolist())) + "\n")
        if slowly:
            time.sleep(0.05)
        return step(self, batch, batch_idx)

    LesionModule.training_step = traced  # type: ignore[method-assign]
    sys.exit(run.main(arguments))
