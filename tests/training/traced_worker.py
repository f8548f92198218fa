"""The real training worker, which also writes down the rows each rank shows: `trace-<rank>.csv` in the run.

python traced_worker.py RUN --folds 0 [slowly] [slow-scoring] [slow-end] [nan=STEP]

`slow-scoring` takes half a second for each batch that is scored, and leaves a file `scoring` as it begins; `slow-end`
takes a second before the weights are written; `nan` spoils the loss of that step.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import lesionflow.training.worker as worker
from lesionflow.models.image import LesionModule
from lesionflow.training import run, scoring

if __name__ == "__main__":
    slowly = "slowly" in sys.argv
    spoilt = next((int(a.removeprefix("nan=")) for a in sys.argv if a.startswith("nan=")), None)
    arguments = [
        a for a in sys.argv[1:] if a not in ("slowly", "slow-scoring", "slow-end") and not a.startswith("nan=")
    ]
    trace = Path(arguments[0]) / f"trace-{os.environ.get('RANK', '0')}.csv"
    step = LesionModule.training_step

    def traced(self: LesionModule, batch: Any, batch_idx: int) -> Any:
        with trace.open("a") as file:
            file.write(f"{self.step}," + ",".join(map(str, batch.row.tolist())) + "\n")
        if slowly:
            time.sleep(0.05)
        loss = step(self, batch, batch_idx)
        return loss * float("nan") if self.step == spoilt else loss

    LesionModule.training_step = traced  # type: ignore[method-assign]
    if "slow-scoring" in sys.argv:
        plain = scoring.gather

        def slow(*of: Any) -> Any:
            (Path(arguments[0]) / "scoring").touch()
            time.sleep(0.5)
            return plain(*of)

        scoring.gather = slow
    if "slow-end" in sys.argv:
        encode = run.to_safetensors

        def slow_end(*of: Any, **more: Any) -> bytes:
            time.sleep(1)
            return encode(*of, **more)

        run.to_safetensors = slow_end
    sys.exit(worker.main(arguments))
