"""Checkpoints: which one wins, and what makes one unusable.

A checkpoint holds the step, the weights, their average and the optimiser; all else is a function of
the step. It carries the identity of its training (data, split, recipe, code, fold, model) and is
refused under another one. `last.ckpt` is replaced atomically and is the only one, so it always wins.
"""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import Any

import torch

from lesionflow.errors import DataError
from lesionflow.keys import atomic
from lesionflow.models.image import LesionModule

logger = logging.getLogger(__name__)


def save(path: Path, module: LesionModule, optimizer: torch.optim.Optimizer, identity: str) -> None:
    """Write the module's state under `path`, whole or not at all. Call on rank 0, between steps."""
    state = {
        "identity": identity,
        "step": module.step,
        "network": module.network.state_dict(),
        "average": module.average.module.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with atomic(path) as file:
        file.write(buffer.getbuffer())


def load(path: Path, identity: str, *, anew: bool = False) -> dict[str, Any] | None:
    """The state to continue from, or None where there is none.

    A file that can't be read is passed over with a warning: training starts again, which costs
    time but never a wrong result. So is, with `anew`, a checkpoint of another training, which raises
    `DataError` otherwise.
    """
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        found = state["identity"]
    except Exception as error:  # torch raises anything from EOFError to UnpicklingError on damaged files.
        logger.warning("%s: unreadable checkpoint (%s), starting this model again", path, type(error).__name__)
        return None
    if found != identity and anew:
        logger.warning("%s: of another recipe, data set or version of the code; starting this model anew", path)
        return None
    if found != identity:
        raise DataError(
            f"{path}: checkpoint of another data set, split, recipe or version of the code; use a new run "
            "directory, or delete the checkpoint to start this model again"
        )
    return state


def restore(module: LesionModule, state: dict[str, Any]) -> None:
    """Put weights, average and step back; the optimiser's part is restored once Lightning has made it."""
    module.network.load_state_dict(state["network"])
    module.average.module.load_state_dict(state["average"])
    module.step = int(state["step"])
