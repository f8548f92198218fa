"""Scoring stored lesions with a trained network; the ranks share the work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
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
from lesionflow.training.ranks import any_rank_at, gathered, rank, world_size

BATCH = 64
"""Lesions scored at a time."""


class Interrupted(Exception):
    """A rank was told to stop while lesions were scored."""


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
    world = world_size()
    starts = range(0, len(rows), BATCH)
    common = len(starts) // world  # Batches that every rank has.
    own: dict[int, NDArray[np.float32]] = {}
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for number, start in enumerate(starts[rank() :: world] if world > 1 else starts):
            if asked is not None and number < common and any_rank_at(where, asked()):
                raise Interrupted
            images = torch.from_numpy(gather(store, rows[start : start + BATCH], spec, cache))
            x = normalise(images.to(where), spec).contiguous(memory_format=torch.channels_last)
            views = [x, x.flip(3), x.flip(2), x.flip((2, 3))] if tta == "flips" else [x]
            own[start] = torch.stack([network(v)[:, 0].float() for v in views]).mean(0).cpu().numpy()
    logits = np.empty(len(rows))
    for part in gathered(own):
        for start, values in part.items():
            logits[start : start + len(values)] = values
    return logits
