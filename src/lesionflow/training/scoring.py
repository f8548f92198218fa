"""Scoring stored lesions with a trained network; the ranks share the work."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file

from lesionflow.data.augment import normalise
from lesionflow.data.images import PreprocessSpec
from lesionflow.data.lesions import gather
from lesionflow.data.pixelcache import PixelCache
from lesionflow.data.rows import Rows
from lesionflow.data.store import Store
from lesionflow.errors import DataError
from lesionflow.keys import model_identity, planned_keys
from lesionflow.models.image import build
from lesionflow.recipe import Recipe

BATCH = 64
"""Lesions scored at a time."""


class Interrupted(Exception):
    """A rank was told to stop while lesions were scored."""


def rank() -> int:
    """This process's place among all of the training's, 0 if it is alone."""
    return int(os.environ.get("RANK", "0"))


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def any_rank(flag: bool) -> bool:
    """Whether the flag is up on any rank; the same answer on all."""
    if not dist.is_initialized():
        return flag
    return True in everyone(flag)


def everyone(value: Any) -> set[Any]:
    """The values that the ranks have, the same set on all."""
    if not dist.is_initialized():
        return {value}
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return set(values)


def load_network(weights: Path, recipe: Recipe) -> torch.nn.Module:
    """The trained network in evaluation mode, on the CPU."""
    network = build(recipe.model, pretrained=False)
    network.load_state_dict(load_file(weights))
    return network.eval()


def weights_identity(path: Path) -> str | None:
    """The identity that weights carry, None for a file that isn't there or can't be read."""
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("identity")
    except Exception:  # safetensors raises its own kinds for damaged files; they are trained again.
        return None


def fold_weights(run: Path, recipe: Recipe, count: int) -> list[list[Path]]:
    """Paths of the final weights, by fold and model; raises `DataError` for missing ones and another training's."""
    key = planned_keys(run)["train"]
    paths = [
        [run / f"fold-{fold}" / f"model-{number}" / "weights.safetensors" for number in range(recipe.model.per_fold)]
        for fold in range(count)
    ]
    if missing := [p for fold in paths for p in fold if not p.exists()]:
        raise DataError(f"{missing[0]}: no such weights; train this fold first (`lesionflow train`)")
    for fold, members in enumerate(paths):
        for number, path in enumerate(members):
            if weights_identity(path) != model_identity(key, fold, number):
                raise DataError(f"{path}: weights of another recipe, data set or code; train fold {fold} again")
    return paths


@torch.inference_mode()
def score(
    network: torch.nn.Module,
    store: Store,
    rows: Rows,
    spec: PreprocessSpec,
    tta: str,
    cache: PixelCache | None = None,
    asked: Callable[[], bool] | None = None,
) -> NDArray[np.float64]:
    """Logits of store rows, float64 [len(rows)], in order; the ranks share the work and all get the result.

    Whole batches are dealt out, the same ones whatever the number of ranks: the last bit of a logit can depend on
    what is computed beside it.

    `asked` says whether this process was told to stop: if any was, all ranks raise `Interrupted` after a batch.

    In whole float32 on a GPU too (no TF32): thresholds are chosen on these, and the exported graph must agree.
    """
    network.eval()
    where = next(network.parameters()).device
    world = int(os.environ.get("WORLD_SIZE", "1")) if dist.is_initialized() else 1
    starts = range(0, len(rows), BATCH)
    common = len(starts) // world  # Batches that every rank has.
    own: dict[int, NDArray[np.float32]] = {}
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for number, start in enumerate(starts[rank() :: world] if world > 1 else starts):
            if asked is not None and number < common and _any(asked(), where):
                raise Interrupted
            images = torch.from_numpy(gather(store, rows[start : start + BATCH], spec, cache))
            x = normalise(images.to(where), spec).contiguous(memory_format=torch.channels_last)
            views = [x, x.flip(3), x.flip(2), x.flip((2, 3))] if tta == "flips" else [x]
            own[start] = torch.stack([network(v)[:, 0].float() for v in views]).mean(0).cpu().numpy()
    gathered: list[Any] = [own]
    if world > 1:
        gathered *= world
        dist.all_gather_object(gathered, own)
    logits = np.empty(len(rows))
    for part in gathered:
        for start, values in part.items():
            logits[start : start + len(values)] = values
    return logits


def _any(flag: bool, where: torch.device) -> bool:
    """`any_rank` as a tensor: it is asked for every batch."""
    if not dist.is_initialized():
        return flag
    shared = torch.tensor(float(flag), device=where)
    dist.all_reduce(shared)
    return shared.item() > 0


def device() -> torch.device:
    """This rank's GPU, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")
