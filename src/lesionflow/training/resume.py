"""Checkpoints: which one wins, and what makes one unusable.

A checkpoint holds the step, the weights, their average and the optimiser; schedule, sampler position and every
random number are functions of the step. It carries the identity of its training (data, split, recipe, code, fold,
model) and the SHA-256 of its content. Each is written whole or not at all as `step-<n>.ckpt`, and the two newest stay.

The rule: the highest step wins whose checksum and identity hold. A damaged one is passed over with a warning that
names it; training never begins again by itself where there was something to go on from.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
from pathlib import Path
from typing import Any

import torch

from lesionflow.errors import DataError
from lesionflow.keys import atomic
from lesionflow.models.image import LesionModule

KEEP = 2
"""Checkpoints of a model that stay: should the newest be damaged, the other one costs an epoch."""

_MAGIC = b"lesionflow checkpoint 1\n"
_HEAD = len(_MAGIC) + 65

logger = logging.getLogger(__name__)


class Damaged(Exception):
    """A checkpoint that can't be used, and why."""


def save(folder: Path, module: LesionModule, optimizer: torch.optim.Optimizer, identity: str) -> Path:
    """Write the module's state into `folder`, whole or not at all. Call on rank 0, between steps.

    Raises `OSError` where it can't be written (a full disk); the earlier ones then stay.
    """
    state = {
        "identity": identity,
        "step": module.step,
        "network": module.network.state_dict(),
        "average": module.average.module.state_dict(),
        "auxiliary": module.auxiliary.state_dict() if module.auxiliary is not None else None,
        "optimizer": optimizer.state_dict(),
    }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getbuffer()
    path = folder / f"step-{module.step:09d}.ckpt"
    with atomic(path) as file:
        file.write(_MAGIC + hashlib.sha256(content).hexdigest().encode() + b"\n")
        file.write(content)
    own = [p for p in checkpoints(folder) if p.name <= path.name]
    for old in {*checkpoints(folder)} - {*own[:KEEP]}:
        old.unlink(missing_ok=True)
    for left in folder.glob(".step-*"):  # Of a process that was killed as it wrote; the fold's lock is ours now.
        left.unlink(missing_ok=True)
    return path


def checkpoints(folder: Path) -> list[Path]:
    """A model's checkpoints, newest first, whatever they are worth."""
    return sorted(folder.glob("step-*.ckpt"), reverse=True)


def load(folder: Path, identity: str, *, anew: bool = False) -> dict[str, Any] | None:
    """The state to continue from, or None where there is none.

    Raises `DataError` where all checkpoints are damaged or of another training; with `anew` that is None as well.
    """
    strangers: list[Path] = []
    tell = logger.warning if os.environ.get("RANK", "0") == "0" else logger.debug  # Once, not by every rank.
    for path in (found := checkpoints(folder)):
        try:
            state = read(path)
        except Damaged as damage:
            tell("%s: damaged (%s), passed over", path, damage)
            continue
        if state["identity"] == identity:
            return state
        strangers.append(path)
    if not found:
        return None
    if anew:
        tell("%s: damaged, or of another recipe, data set or version of the code; starting this model anew", folder)
        return None
    if strangers:
        raise DataError(
            f"{strangers[0]}: checkpoint of another data set, split, recipe or version of the code; use a new run "
            "directory, or start this model again with `lesionflow train --anew`"
        )
    raise DataError(
        f"{found[0]}: damaged, and so is every other checkpoint of this model; restore one, or start this model again "
        "with `lesionflow train --anew`"
    )


def restore(module: LesionModule, state: dict[str, Any]) -> None:
    """Put weights, average and step back; the optimiser's part is restored once Lightning has made it."""
    module.network.load_state_dict(state["network"])
    module.average.module.load_state_dict(state["average"])
    if module.auxiliary is not None:
        module.auxiliary.load_state_dict(state["auxiliary"])
    module.step = int(state["step"])


def read(path: Path) -> dict[str, Any]:
    """A checkpoint's content. Raises `Damaged`."""
    try:
        data = memoryview(path.read_bytes())
    except OSError as error:
        raise Damaged(error.strerror) from None
    if data[: len(_MAGIC)] != _MAGIC:
        raise Damaged("not a checkpoint")
    if data[len(_MAGIC) : _HEAD].tobytes() != hashlib.sha256(data[_HEAD:]).hexdigest().encode() + b"\n":
        raise Damaged("its checksum is another one")
    state: dict[str, Any] = torch.load(io.BytesIO(data[_HEAD:]), map_location="cpu", weights_only=True)
    return state
