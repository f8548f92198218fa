"""Thirty faults in a training of two processes, drawn from a seed: it always ends with the weights of one without."""

from __future__ import annotations

import os
from pathlib import Path

from faults import GRACE, inject


def test_thirty_faults_cost_time_and_nothing_else(tmp_path: Path) -> None:
    seed = int(os.environ.get("LESIONFLOW_FAULTS_SEED", "1"))
    result = inject(tmp_path, 30, seed)
    print(f"seed {seed}: {dict(result.faults)}")
    assert sum(result.faults.values()) == 30, "each really happened"
    assert len({what.split(",")[0] for what in result.faults}) == 6, "of every kind"
    assert result.finished and result.slowest < GRACE, "told to stop, it saves and ends within ten seconds"
