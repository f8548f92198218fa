"""Training, top to bottom: the folds of a prepared run, one after the other, on this process's rank.

    python -m lesionflow.training.run RUN --folds 0,1

RUN holds `recipe.toml`, `store/` and `folds.parquet`. Each fold leaves `fold-<k>/model-<m>/` with the
final weights, and `fold-<k>/oof.parquet` with the scores of its held-out lesions. The schedule is
fixed and the final moving average is scored: no epoch is picked on the fold that is scored.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import polars as pl
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file

from lesionflow.data.augment import normalise
from lesionflow.data.datamodule import LesionData, batches
from lesionflow.data.folds import Folds
from lesionflow.data.images import PreprocessSpec
from lesionflow.data.sampler import Sampler
from lesionflow.data.store import Store
from lesionflow.errors import DataError, LesionflowError, Preempted, UsageError
from lesionflow.evaluation.metrics import auc, pauc
from lesionflow.keys import atomic
from lesionflow.models.image import LesionModule, build, preprocess_spec
from lesionflow.recipe import Recipe
from lesionflow.training import resume
from lesionflow.training.conduct import Conductor
from lesionflow.training.status import Progress, report

Show = Callable[[Progress], None]


def train_folds(run: Path, wanted: Sequence[int], *, show: Show | None = None) -> None:
    """Train and score the wanted folds of a prepared run, continuing whatever was begun.

    Raises `DataError` for data that changed or can't be decoded, `Preempted` after a clean save.
    """
    recipe, store, folds = (
        Recipe.load(run / "recipe.toml"),
        Store.open(run / "store"),
        Folds.load(run / "folds.parquet"),
    )
    folds.check(store.hash)
    for fold in wanted:
        if not 0 <= fold < folds.count:
            raise UsageError(f"--fold {fold}: the run has folds 0 to {folds.count - 1}")
        with _locked(run / f"fold-{fold}"):
            _train_fold(run, recipe, store, folds, fold, show)


def _train_fold(run: Path, recipe: Recipe, store: Store, folds: Folds, fold: int, show: Show | None) -> None:
    """All models of one fold, then the mean of their logits on its held-out lesions."""
    out = run / f"fold-{fold}"
    rows, held_out = folds.train_rows(fold), folds.held_out_rows(fold)
    logits = np.zeros(len(held_out))
    for number in range(recipe.model.per_fold):
        seed = recipe.seed * 10_000 + fold * 100 + number
        name = resume.identity(recipe.to_dict(), store.hash, folds.hash, fold, seed)
        weights = _train_model(run, recipe, store, rows, held_out, fold, number, seed, name, show)
        network = load_network(weights, recipe).to(_device())
        logits += score(network, store, held_out, preprocess_spec(recipe), recipe.training.tta)
    if _rank() == 0:
        table = pl.DataFrame(
            {
                "isic_id": [store.ids[r] for r in held_out],
                "patient_group": [store.groups[r] for r in held_out],
                "target": store.targets[held_out],
                "fold": np.full(len(held_out), fold, np.int8),
                "logit": logits / recipe.model.per_fold,
                "fold_hash": folds.hash,
            }
        )
        with atomic(out / "oof.parquet") as file:
            table.write_parquet(file)


def _train_model(
    run: Path,
    recipe: Recipe,
    store: Store,
    rows: NDArray[np.int64],
    held_out: NDArray[np.int64],
    fold: int,
    number: int,
    seed: int,
    identity: str,
    show: Show | None,
) -> Path:
    """Train one network to the end of its schedule; returns its weights' path, at once if they are there."""
    out = run / f"fold-{fold}" / f"model-{number}"
    weights = out / "weights.safetensors"
    if weights.exists() and _weights_identity(weights) == identity:
        return weights
    state = resume.load(out / "last.ckpt", identity)
    _barrier()  # Every rank has looked before rank 0 removes or writes anything.
    if state is None and _rank() == 0:
        shutil.rmtree(out, ignore_errors=True)
    spec, options = preprocess_spec(recipe), recipe.training
    sampler = Sampler(
        rows, store.targets[rows], recipe.sampling, epochs=options.epochs, batch_size=options.batch_size, seed=seed
    )
    module = LesionModule(recipe, spec, sampler, seed=seed)
    if state is not None:
        resume.restore(module, state)

    def validate(module: LesionModule) -> dict[str, float]:
        logits = score(module.final, store, held_out, spec, options.tta)
        module.train()
        return {"pauc": pauc(store.targets[held_out], logits), "auc": auc(store.targets[held_out], logits)}

    events = run / "events" / f"fold-{fold}-model-{number}"
    conductor = Conductor(
        out, events, fold=fold, model=number, identity=identity, state=state, validate=validate, show=show
    )
    if module.step < sampler.steps:
        data = LesionData(store, spec, sampler, start=module.step, workers=_workers())
        _trainer(recipe, conductor).fit(module, data)
    if conductor.preempted:
        raise Preempted(f"fold {fold}: stopped at step {module.step} of {sampler.steps}, saved; run again to go on")
    if _rank() == 0:
        tensors = {k: v.detach().cpu().contiguous() for k, v in module.final.state_dict().items()}
        out.mkdir(parents=True, exist_ok=True)
        # One entry only: with more, their order and so the file's hash would be random.
        save_file(tensors, out / "weights.tmp", metadata={"identity": identity})
        (out / "weights.tmp").replace(weights)
        (out / "last.ckpt").unlink(missing_ok=True)
    _barrier()
    return weights


def _trainer(recipe: Recipe, conductor: Conductor) -> L.Trainer:
    """Lightning with everything off that `Conductor` does: one "epoch" is the whole schedule."""
    cuda = torch.cuda.is_available()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    precision = recipe.training.precision
    bf16 = precision == "bf16" or (precision == "auto" and cuda)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return L.Trainer(
            accelerator="cuda" if cuda else "cpu",
            devices=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
            num_nodes=int(os.environ.get("GROUP_WORLD_SIZE", "1")),
            strategy="ddp" if world > 1 else "auto",
            precision="bf16-mixed" if bf16 else "32-true",
            gradient_clip_val=recipe.optimizer.clip or None,
            max_epochs=1,
            limit_val_batches=0,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            logger=False,
            callbacks=[conductor],
        )


def load_network(weights: Path, recipe: Recipe) -> torch.nn.Module:
    """The trained network in evaluation mode, on the CPU."""
    from safetensors.torch import load_file

    network = build(recipe.model, pretrained=False)
    network.load_state_dict(load_file(weights))
    return network.eval()


def fold_weights(run: Path, recipe: Recipe, count: int) -> list[list[Path]]:
    """Paths of the final weights, by fold and model; raises `DataError` naming what is missing."""
    paths = [
        [run / f"fold-{fold}" / f"model-{number}" / "weights.safetensors" for number in range(recipe.model.per_fold)]
        for fold in range(count)
    ]
    if missing := [p for fold in paths for p in fold if not p.exists()]:
        raise DataError(f"{missing[0]}: no such weights; train this fold first (`lesionflow train`)")
    return paths


@torch.inference_mode()
def score(
    network: torch.nn.Module, store: Store, rows: NDArray[np.int64], spec: PreprocessSpec, tta: str
) -> NDArray[np.float64]:
    """Logits of store rows, float64 [len(rows)], in order; the ranks share the work and all get the result."""
    network.eval()
    device = next(network.parameters()).device
    world = int(os.environ.get("WORLD_SIZE", "1")) if dist.is_initialized() else 1
    mine = rows[_rank() :: world] if world > 1 else rows
    parts = []
    for images in batches(store, mine, spec, 64):
        x = normalise(images.to(device), spec).contiguous(memory_format=torch.channels_last)
        views = [x, x.flip(3), x.flip(2), x.flip((2, 3))] if tta == "flips" else [x]
        parts.append(torch.stack([network(v)[:, 0].float() for v in views]).mean(0).cpu())
    own = torch.cat(parts).double().numpy() if parts else np.zeros(0)
    if world == 1:
        return own
    gathered: list[Any] = [None] * world
    dist.all_gather_object(gathered, own)
    logits = np.empty(len(rows))
    for rank, part in enumerate(gathered):
        logits[rank::world] = part
    return logits


def _device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def _workers() -> int:
    """Loader processes: decoding is 1 % of a step on a CPU, and what starves a GPU without them."""
    return min(8, max(1, (os.cpu_count() or 1) - 1)) if torch.cuda.is_available() else 0


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def _weights_identity(path: Path) -> str | None:
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("identity")
    except Exception:  # safetensors raises its own kinds for damaged files; they are trained again.
        return None


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Only one training writes into a fold at a time; the kernel frees the lock of a killed one."""
    folder.mkdir(parents=True, exist_ok=True)
    if _rank() != 0:
        yield
        return
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"{folder}: another process is training here; wait for it, or stop it") from None
        yield


def main(argv: Sequence[str] | None = None) -> int:
    """Worker entry: exit code as in `lesionflow.errors`, reported to the parent through `status`."""
    parser = argparse.ArgumentParser(prog="lesionflow.training.run", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--folds", required=True, type=lambda text: [int(k) for k in text.split(",")])
    options = parser.parse_args(argv)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    try:
        train_folds(options.run, options.folds)
    except LesionflowError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201 - the worker's own log
        report(error.exit_code, str(error))
        return error.exit_code
    except BaseException as error:
        report(1, f"{type(error).__name__}: {error}")
        raise
    report(0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
