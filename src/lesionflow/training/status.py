"""How a training process tells its parent what became of it, and how far it is.

torchrun turns every failure of a worker into exit code 1, so each process that was started with
`LESIONFLOW_STATUS=DIR` writes `DIR/<rank>.json` with its own exit code and message on its way out,
and `progress` files while it works.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lesionflow.keys import write_json

VARIABLE = "LESIONFLOW_STATUS"
OPERATED = "LESIONFLOW_OPERATED"
"""Set where an operator started the job, and starts it again."""
JOINED = "joined"
"""File that appears once all ranks have found each other."""


@dataclass(frozen=True)
class Outcome:
    """How one process ended."""

    code: int
    message: str = ""


def report(code: int, message: str = "") -> None:
    """Leave this process's outcome for the parent, if one asked for it."""
    if directory := os.environ.get(VARIABLE):
        rank = os.environ.get("RANK", "0")
        # A full disk must not hide the real reason, which goes to stderr as well.
        with contextlib.suppress(OSError):
            write_json(Path(directory) / f"{rank}.json", {**asdict(Outcome(code, message)), "time": time.time()})


def tell_joined() -> None:
    """Say that all ranks of this process's training have found each other."""
    if directory := os.environ.get(VARIABLE):
        with contextlib.suppress(OSError):
            (Path(directory) / JOINED).touch()


def collect(directory: Path, exit_code: int) -> Outcome:
    """The outcome of a group of processes whose launcher ended with `exit_code`.

    The first rank that failed by itself decides; ranks that were then told to stop say 143, which
    counts only where nobody failed. Without any report the launcher's own code stands (0, or 1: a bug).
    """
    reports = []
    for path in directory.glob("*.json"):
        with contextlib.suppress(OSError, json.JSONDecodeError):
            reports.append(json.loads(path.read_text()))
    failed = sorted((r for r in reports if r["code"] not in (0, 143)), key=lambda r: r["time"])
    preempted = [r for r in reports if r["code"] == 143]
    for chosen in (*failed, *preempted):
        return Outcome(chosen["code"], chosen["message"])
    return Outcome(exit_code)


@dataclass(frozen=True)
class Progress:
    """Where a training is; written as JSON about once a second."""

    fold: int
    model: int
    step: int
    steps: int
    loss: float
    images_per_second: float
    remaining_seconds: float
    note: str = ""


def write_progress(path: Path, progress: Progress) -> None:
    with contextlib.suppress(OSError):
        write_json(path, asdict(progress))


def read_progress(path: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, json.JSONDecodeError):
        return None
