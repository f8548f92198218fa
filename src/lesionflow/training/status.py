"""How a training process tells its parent what became of it, and how far it is.

torchrun turns every failure of a worker into exit code 1, so each process that was started with
`LESIONFLOW_STATUS=DIR` writes `DIR/<rank>.json` with its own exit code and message on its way out,
and `progress` files while it works.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
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


_SEEN = "seen-"
_KILLED = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def report(code: int, message: str = "") -> None:
    """Leave this process's outcome for the parent, if one asked for it."""
    _leave(os.environ.get("RANK", "0"), Outcome(code, message))


def report_seen(rank: int, code: int) -> None:
    """Leave what a rank's exit code, as `subprocess` has it, says of its end where it couldn't say so itself."""
    if outcome := ended_by_signal(code, f"rank {rank}"):
        _leave(f"{_SEEN}{rank}", outcome)


def _leave(name: str, outcome: Outcome) -> None:
    if directory := os.environ.get(VARIABLE):
        # A full disk must not hide the real reason, which goes to stderr as well.
        with contextlib.suppress(OSError):
            write_json(Path(directory) / f"{name}.json", {**asdict(outcome), "time": time.time()})


def ended_by_signal(code: int, who: str) -> Outcome | None:
    """What a process that a signal ended has to say, by its exit code as `subprocess` has it; None if none did.

    Killed from outside is a preemption: it can be started again. A crash is a bug, and would come back.
    """
    if code >= 0:
        return None
    name = signal.Signals(-code).name
    if -code in _KILLED:
        return Outcome(
            143, f"{who} was killed ({name}; is memory short?): start again to go on from the last checkpoint"
        )
    return Outcome(1, f"{who} crashed ({name})")


def tell_joined() -> None:
    """Say that all ranks of this process's training have found each other."""
    if directory := os.environ.get(VARIABLE):
        with contextlib.suppress(OSError):
            (Path(directory) / JOINED).touch()


def collect(directory: Path, exit_code: int, *, told: bool = False) -> Outcome:
    """The outcome of a group of processes whose launcher ended with `exit_code`, perhaps because it was `told` to.

    The first rank that failed by itself decides; ranks that were then told to stop say 143, which
    counts only where nobody failed. Without any report the launcher's own code stands (0, or 1: a bug).
    Where it is 0 all is done: ranks of an elastic job that were restarted before may have said something else.
    """
    if exit_code == 0:
        return Outcome(0)
    reports = []
    for path in directory.glob("*.json"):
        with contextlib.suppress(OSError, json.JSONDecodeError):
            reports.append(json.loads(path.read_text()) | {"seen": path.stem.startswith(_SEEN)})
    # What a rank said itself goes before what was seen of it: it may have been ended by force on its way out.
    reports.sort(key=lambda r: (r["seen"], r["time"]))
    failed = [r for r in reports if r["code"] not in (0, 143)]
    preempted = [r for r in reports if r["code"] == 143]
    for chosen in (*failed, *preempted):
        return Outcome(chosen["code"], chosen["message"])
    if told and exit_code < 0:
        return Outcome(143)
    return ended_by_signal(exit_code, "training") or Outcome(exit_code)


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
