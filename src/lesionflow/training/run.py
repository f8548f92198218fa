"""Training, top to bottom: the folds of a prepared run, one after the other, on this process's rank.

RUN holds `recipe.toml`, `store/` and `folds.parquet`. Each fold leaves `fold-<k>/model-<m>/` with the
final weights, `fold-<k>/oof.parquet` with the scores of its held-out lesions, and, where the split sets
lesions aside from every fold, `fold-<k>/holdout.parquet` with theirs. The schedule is fixed and the final
moving average is scored: no epoch is picked on the fold that is scored.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import lightning as L
import numpy as np
import polars as pl
import torch
from safetensors.torch import save as to_safetensors

from lesionflow.data.datamodule import LesionData
from lesionflow.data.diagnosis import kinds
from lesionflow.data.folds import Folds
from lesionflow.data.pixelcache import PixelCache, obtain
from lesionflow.data.rows import Rows, take
from lesionflow.data.sampler import Sampler
from lesionflow.data.store import Store
from lesionflow.errors import DataError, Preempted, UsageError
from lesionflow.keys import atomic, fold_identity, model_identity, planned_keys
from lesionflow.models.image import LesionModule, build, preprocess_spec
from lesionflow.recipe import Recipe
from lesionflow.training import resume
from lesionflow.training.conduct import Conductor, Stop
from lesionflow.training.lock import locked
from lesionflow.training.ranks import any_rank, barrier, by_rank_0, device, joined, rank, share
from lesionflow.training.scores import write_scores
from lesionflow.training.scoring import Interrupted, load_network, score, weights_identity
from lesionflow.training.status import Progress
from lesionflow.training.validation import sample

Show = Callable[[Progress], None]

LOADERS = "LESIONFLOW_LOADERS"
"""Environment variable: loader processes of each training process, where the usual number doesn't fit."""

logger = logging.getLogger(__name__)


def train_folds(run: Path, wanted: Sequence[int], *, anew: bool = False, show: Show | None = None) -> None:
    """Train and score the wanted folds of a prepared run, continuing whatever was begun.

    `anew` starts a model again whose checkpoint is of another training, instead of refusing it.
    Raises `DataError` for data that changed or can't be decoded, `Preempted` after a clean save.
    """
    recipe, store, folds = (
        Recipe.load(run / "recipe.toml"),
        Store.open(run / "store"),
        Folds.load(run / "folds.parquet"),
    )
    folds.check(store)
    key = planned_keys(run)["train"]
    if wrong := [fold for fold in wanted if not 0 <= fold < folds.count]:
        raise UsageError(f"--fold {wrong[0]}: the run has folds 0 to {folds.count - 1}")
    if recipe.training.batch_size < (world := int(os.environ.get("WORLD_SIZE", "1"))):
        raise UsageError(f"recipe: training.batch_size {recipe.training.batch_size} is less than {world} processes")
    _hush_lightning()
    with Stop.listening() as stop:
        left = [fold for fold in wanted if not _is_scored(run / f"fold-{fold}", fold_identity(key, fold))]
        if not left:
            return
        cache = _cache(recipe, store, folds, stop, show)
        if stop.asked:
            raise Preempted("stopped before training began; run again to go on")
        with joined():
            for fold in left:
                with locked(run / f"fold-{fold}"):
                    _train_fold(_Fold(run, key, recipe, store, folds, fold, stop, show, anew, cache))


def _cache(recipe: Recipe, store: Store, folds: Folds, stop: Stop, show: Show | None) -> PixelCache | None:
    """The decoded pictures that all ranks, folds and models share: whichever process comes first makes them.

    The ranks haven't joined yet, so they wait for its lock instead of at a barrier.
    """
    options = recipe.training
    drawn = 0
    for fold in range(folds.count):
        drawn += options.epochs * _sampler(recipe, store, folds, fold, 0).lesions_per_epoch * recipe.model.per_fold
    return obtain(
        store,
        preprocess_spec(recipe),
        options.cache,
        reads=drawn,
        progress=show is not None or sys.stderr.isatty(),
        asked=lambda: stop.asked,
    )


def _sampler(recipe: Recipe, store: Store, folds: Folds, fold: int, seed: int) -> Sampler:
    rows, options = folds.train_rows(fold), recipe.training
    return Sampler(
        rows, take(store.targets, rows), recipe.sampling,
        epochs=options.epochs, batch_size=options.batch_size, seed=seed,
    )  # fmt: skip


@dataclass(frozen=True)
class _Fold:
    """One fold to train and score, and all that this needs."""

    run: Path
    key: str
    """The train step's content key, which covers data, split, recipe and code."""
    recipe: Recipe
    store: Store
    folds: Folds
    number: int
    stop: Stop
    show: Show | None
    anew: bool = False
    cache: PixelCache | None = None

    @property
    def out(self) -> Path:
        return self.run / f"fold-{self.number}"

    @property
    def held_out(self) -> Rows:
        return self.folds.held_out_rows(self.number)

    def seed(self, model: int) -> int:
        return self.recipe.seed * 10_000 + self.number * 100 + model

    def identity(self, model: int) -> str:
        return model_identity(self.key, self.number, model)


def _train_fold(fold: _Fold) -> None:
    """All models of one fold, then the mean of their logits on its held-out lesions and on the hold-out."""
    members = range(fold.recipe.model.per_fold)
    identity = fold_identity(fold.key, fold.number)
    if by_rank_0(_is_scored(fold.out, identity)):
        return
    spec, tta = preprocess_spec(fold.recipe), fold.recipe.training.tta
    rows = np.concatenate([fold.held_out, fold.folds.holdout_rows()])
    logits = np.zeros(len(rows))
    for model in members:
        weights = _train_model(fold, model)
        if any_rank(fold.stop.asked):
            raise Preempted(f"fold {fold.number}: stopped after model {model} was saved; run again to go on")
        # Not each rank from the file: on a shared volume a new one can take a minute to be seen everywhere.
        network = load_network(weights, fold.recipe) if rank() == 0 else build(fold.recipe.model, pretrained=False)
        share(network.to(device()))
        try:
            logits += score(network, fold.store, rows, spec, tta, fold.cache, lambda: fold.stop.asked)
        except Interrupted:
            raise Preempted(
                f"fold {fold.number}: stopped while scoring, model {model} is saved; run again to go on"
            ) from None
    if rank() == 0:
        logits, own = logits / len(members), len(fold.held_out)
        # The second file says that the fold is done, so it is written last.
        for name, part in (("holdout", slice(own, None)), ("oof", slice(own))):
            with _written(fold.out / f"{name}.parquet") as file:
                write_scores(file, fold.store, fold.folds, rows[part], logits[part], identity)
    barrier()


def _train_model(fold: _Fold, model: int) -> Path:
    """Train one network to the end of its schedule; returns its weights' path, at once if they are there."""
    recipe, store, identity, seed = fold.recipe, fold.store, fold.identity(model), fold.seed(model)
    out = fold.out / f"model-{model}"
    weights = out / "weights.safetensors"
    if by_rank_0(weights_identity(weights) == identity):
        return weights
    state = resume.load(out, identity, anew=fold.anew)
    barrier()  # Every rank has looked before rank 0 removes or writes anything.
    if state is None and rank() == 0:
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(fold.run / "events" / f"fold-{fold.number}-model-{model}", ignore_errors=True)
    spec, options = preprocess_spec(recipe), recipe.training
    sampler = _sampler(recipe, store, fold.folds, fold.number, seed)
    known = kinds(store.tables, fold.folds.train_rows(fold.number)) if options.auxiliary else None
    module = LesionModule(recipe, spec, sampler, seed=seed, kinds=len(known.names) if known else 0)
    if state is not None:
        resume.restore(module, state)

    looked_at = sample(fold.held_out, take(store.targets, fold.held_out), options.validate_lesions, seed)

    def validate(module: LesionModule) -> dict[str, float]:
        try:
            logits = score(module.final, store, looked_at.rows, spec, options.tta, fold.cache, lambda: fold.stop.asked)
        finally:
            module.train()
        return looked_at.figures(logits)

    conductor = Conductor(
        out,
        fold.run / "events" / f"fold-{fold.number}-model-{model}",
        fold=fold.number,
        model=model,
        identity=identity,
        state=state,
        validate=validate,
        stop=fold.stop,
        names=store.ids,
        show=fold.show,
    )
    if module.step < sampler.steps:
        data = LesionData(
            store, spec, sampler, start=module.step, workers=_workers(), cache=fold.cache,
            kinds=known.codes if known else None,
        )  # fmt: skip
        _trainer(recipe, conductor).fit(module, data)
    if conductor.preempted:
        where = f"step {module.step} of {sampler.steps}"
        saved = "saved" if conductor.saved == module.step else f"not saved, see above; step {conductor.saved} is"
        raise Preempted(f"fold {fold.number}: stopped at {where}, {saved}; run again to go on")
    if rank() == 0:
        tensors = {k: v.detach().cpu().contiguous() for k, v in module.final.state_dict().items()}
        with _written(weights) as file:
            # One entry only: with more, their order and so the file's hash would be random.
            file.write(to_safetensors(tensors, metadata={"identity": identity}))
        for path in resume.checkpoints(out):
            path.unlink()
    barrier()
    return weights


def _trainer(recipe: Recipe, conductor: Conductor) -> L.Trainer:
    """Lightning with everything off that `Conductor` does: one "epoch" is the whole schedule."""
    cuda = torch.cuda.is_available()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    precision = recipe.training.precision
    bf16 = precision == "bf16" or (precision == "auto" and cuda)
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


def _hush_lightning() -> None:
    """Its advice is about the checkpoints, loops and devices that we don't leave to it."""
    for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")


def _workers() -> int:
    """Loader processes: decoding is 1 % of a step on a CPU, and what starves a GPU without them."""
    if (asked := os.environ.get(LOADERS, "")).isdigit():
        return int(asked)
    return min(8, max(1, (os.cpu_count() or 1) - 1)) if torch.cuda.is_available() else 0


@contextlib.contextmanager
def _written(path: Path) -> Iterator[BinaryIO]:
    """`atomic`, for what training must not end without. Raises `DataError` where it can't be written."""
    try:
        with atomic(path) as file:
            yield file
    except OSError as error:
        raise DataError(
            f"{path}: can't be written ({error.strerror}): free some space and run again; what was trained is kept"
        ) from None


def _is_scored(out: Path, identity: str) -> bool:
    return all(_scored(out / f"{name}.parquet") == identity for name in ("oof", "holdout"))


def _scored(path: Path) -> str | None:
    try:
        return pl.read_parquet_metadata(path).get("identity")
    except (OSError, pl.exceptions.PolarsError):
        return None  # Not there, or not readable: the fold is scored again.
