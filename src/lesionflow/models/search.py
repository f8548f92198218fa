"""A search for the boosted trees' settings: the recipe's `[tabular]` by patient-grouped cross-validation.

    found = search(matrix, y, groups, recipe, trials=30)
    found.recipe.tabular

Each trial trains on the recipe's own folds and is judged by the pAUC above 80 % sensitivity of all lesions that were
held out, ranked within their fold and pooled, as evaluation does. The hold-out takes no part, so what is vouched for
later was not chosen on it. The out-of-fold figure of the settings that win *is* chosen: it is the best of many, and
a little better than it will be elsewhere. `Found.other_folds` deals the same patients to other folds, where the
settings are the winner's but the luck isn't.

Only the trees' own settings are searched. Which features are used, and how many models of which kind, stay as the
recipe says: the former is a question for an ablation, and more models are always a little better.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray

from lesionflow.data import missingness
from lesionflow.data.features import Matrix, features
from lesionflow.data.folds import HOLDOUT, make_folds
from lesionflow.data.source import open_source
from lesionflow.errors import DataError, UsageError
from lesionflow.evaluation.metrics import fold_rank, pauc
from lesionflow.evaluation.paired import paired_difference
from lesionflow.keys import atomic, digest
from lesionflow.models.boosters import KINDS, Floats, cores, library
from lesionflow.models.tabular import Boosted
from lesionflow.progress import track
from lesionflow.recipe import Recipe, Tabular

SPACE: dict[str, tuple[float, float]] = {
    "rounds": (50, 800),
    "learning_rate": (0.01, 0.1),
    "leaves": (4, 64),
    "min_leaf": (5, 200),
    "columns": (0.05, 1.0),
    "rows": (0.4, 1.0),
    "l2": (0.3, 100.0),
}
"""Fields of `Tabular` and between which values they are tried, on a logarithmic scale."""
NEGATIVES = (0.0, 5.0, 20.0, 100.0)
"""Benign lesions per malignant one that are tried, where there are more than that."""


@dataclass(frozen=True)
class Found:
    """What a search came to."""

    recipe: Recipe
    """As given, with the best trial's `[tabular]`."""
    value: float
    """Pooled out-of-fold pAUC of that trial: the best of all trials, so a little too good."""
    start: float
    """The same for the recipe's own settings."""
    other_folds: dict[str, Any]
    """`paired.paired_difference` of the winner (a) and the recipe's own settings (b) on other folds of the patients."""
    trials: list[dict[str, Any]]
    """Each trial's settings and `value`, in their order; the recipe's own settings come first."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; `trials` is how many beside the recipe's own settings, `history` is all of them."""
        return {
            "tabular": dataclasses.asdict(self.recipe.tabular),
            "value": self.value,
            "before": self.start,
            "other_folds": self.other_folds,
            "trials": len(self.trials) - 1,
            "history": self.trials,
        }


def tune(
    recipe: Recipe,
    data: Path,
    out: Path,
    *,
    trials: int = 30,
    timeout: float | None = None,
    progress: bool = True,
    storage: Path | None = None,
    threads: int | None = None,
) -> dict[str, Any]:
    """`search` over the metadata in `data`, a data set directory; writes the tuned recipe to `out` as TOML.

    Images aren't looked at. Returns `Found.to_dict()`. Raises `DataError` for metadata that can't be used, or whose
    empty cells tell malignant from benign lesions (`tabular.missing`), `UsageError` as `search` does.
    """
    library("optuna", "tune")  # Before anything is computed.
    with open_source(data) as source:
        table = source.metadata
    if table is None or "target" not in table.columns:
        raise DataError(f"{data}: no train-metadata.csv with the column target; the trees learn from metadata alone")
    table = table.filter(pl.col("target").is_not_null())
    y = table["target"].to_numpy()
    if recipe.tabular.missing == "refuse":
        missingness.refuse(table, y, ids=table["isic_id"].to_list())
    matrix = features(table, blocks(recipe.tabular), threads=threads)
    owner = pl.coalesce("patient_id", "isic_id") if "patient_id" in table.columns else pl.col("isic_id")
    groups = table.select(owner.alias("group"))["group"].to_list()
    found = search(
        matrix, y, groups, recipe,
        trials=trials, timeout=timeout, progress=progress, storage=storage, threads=threads,
    )  # fmt: skip
    with atomic(out) as file:
        file.write(found.recipe.to_toml().encode())
    return found.to_dict()


def search(
    matrix: Matrix,
    y: ArrayLike,
    groups: Sequence[str],
    recipe: Recipe,
    *,
    trials: int = 30,
    timeout: float | None = None,
    progress: bool = True,
    storage: Path | None = None,
    threads: int | None = None,
) -> Found:
    """Try `trials` settings of the trees (TPE, seeded by `recipe.seed`) and keep the best.

    matrix [N, F], y [N] 0/1, groups [N]: the patient of each lesion. The recipe's own settings are judged first, so the
    result is never behind them. A recipe without any model is given three of LightGBM. No trial starts after `timeout`
    seconds. With `storage`, an SQLite file, a search that was broken off goes on where it stood; trials
    of other data, folds or numbers of models aren't mixed with it.

    Raises `UsageError` without optuna, or for fewer than one trial; `DataError` as `data.folds.make_folds` does.
    """
    optuna = library("optuna", "tune")
    if trials < 1:
        raise UsageError(f"trials must be at least 1, got {trials}")
    began = time.monotonic()
    truth, options = np.asarray(y).astype(np.int8), recipe.tabular
    if not any(getattr(options, kind) for kind in KINDS):
        options = dataclasses.replace(options, lightgbm=3)
    fold = _folds(truth, groups, recipe, recipe.folds.seed)
    ratios = _ratios(truth, fold)
    study = _study(optuna, matrix, truth, fold, recipe, options, storage)

    def judge(settings: Tabular) -> float:
        return _pooled(truth, out_of_fold(matrix, truth, fold, settings, seed=recipe.seed, threads=threads), fold)

    start = judge(options)
    left = max(trials - len(_complete(optuna, study)), 0)
    for _ in track(range(left), "tuning", total=left, show=progress and left > 0):
        if timeout is not None and time.monotonic() - began > timeout:
            break
        trial = study.ask()
        study.tell(trial, judge(dataclasses.replace(options, **_suggest(trial, options, ratios))))
    own = {name: getattr(options, name) for name in (*SPACE, "negatives")}
    done = [own | {"value": start}] + [one.params | {"value": one.value} for one in _complete(optuna, study)]
    best = max(done, key=lambda one: one["value"])
    tuned = dataclasses.replace(options, **{name: value for name, value in best.items() if name != "value"})
    return Found(
        recipe=dataclasses.replace(recipe, tabular=tuned),
        value=best["value"],
        start=start,
        other_folds=_elsewhere(matrix, truth, groups, recipe, tuned, options, threads),
        trials=done,
    )


def out_of_fold(
    matrix: Matrix,
    y: ArrayLike,
    fold: NDArray[np.integer[Any]],
    options: Tabular,
    *,
    seed: int,
    threads: int | None = None,
) -> Floats:
    """Log-odds of each lesion from trees that learned from the other folds: float64 [N], NaN in the hold-out (-1).

    matrix [N, F], y [N] 0/1, fold [N]. Folds are trained side by side on `threads` (by default all cores).
    """
    values, truth = matrix.values, np.asarray(y)
    result = np.full(len(truth), np.nan)

    def one(k: int) -> None:
        learn, held = (fold != k) & (fold != HOLDOUT), fold == k
        part = dataclasses.replace(matrix, values=values[learn])
        trees = Boosted.fit(part, truth[learn], options, seed=seed, threads=1)
        result[held] = trees.logits(values[held])

    with ThreadPoolExecutor(threads or cores()) as pool:
        list(pool.map(one, sorted(set(fold.tolist()) - {HOLDOUT})))
    return result


def blocks(options: Tabular) -> tuple[str, ...]:
    """The blocks of features that a recipe's `[tabular]` asks for."""
    return ("plain", *(name for name in ("derived", "context", "neighbours") if getattr(options, name)))


def _pooled(y: NDArray[np.int8], logits: Floats, fold: NDArray[np.int8]) -> float:
    judged = fold != HOLDOUT
    return pauc(y[judged], fold_rank(logits[judged], fold[judged]))


def _folds(y: NDArray[np.int8], groups: Sequence[str], recipe: Recipe, seed: int) -> NDArray[np.int8]:
    """The recipe's folds [N]; always by patient."""
    ids = [str(i) for i in range(len(y))]
    return make_folds(ids, y, groups, count=recipe.folds.count, seed=seed, holdout=recipe.folds.holdout).fold


def _elsewhere(
    matrix: Matrix,
    y: NDArray[np.int8],
    groups: Sequence[str],
    recipe: Recipe,
    tuned: Tabular,
    own: Tabular,
    threads: int | None,
) -> dict[str, Any]:
    """Tuned and own settings with another seed, on other folds of the patients that aren't in the hold-out."""
    here = np.flatnonzero(_folds(y, groups, recipe, recipe.folds.seed) != HOLDOUT)
    part, truth = dataclasses.replace(matrix, values=matrix.values[here]), y[here]
    owner = [groups[i] for i in here.tolist()]
    whole = dataclasses.replace(recipe, folds=dataclasses.replace(recipe.folds, holdout=0.0))
    fold = _folds(truth, owner, whole, recipe.folds.seed + 1)
    a, b = (
        fold_rank(out_of_fold(part, truth, fold, one, seed=recipe.seed + 1, threads=threads), fold)
        for one in (tuned, own)
    )
    settings = recipe.evaluation
    return paired_difference(truth, a, b, owner, replicates=settings.replicates, seed=settings.seed)


def _ratios(y: NDArray[np.int8], fold: NDArray[np.int8]) -> list[float]:
    """The numbers of negatives that differ from taking all of them."""
    learn = y[fold != HOLDOUT]
    return [n for n in NEGATIVES if n * (learn == 1).sum() < (learn == 0).sum()]


def _suggest(trial: Any, options: Tabular, ratios: Sequence[float]) -> dict[str, Any]:
    chosen: dict[str, Any] = {}
    for name, (low, high) in SPACE.items():
        if isinstance(getattr(options, name), int):
            chosen[name] = trial.suggest_int(name, int(low), int(high), log=True)
        else:
            chosen[name] = trial.suggest_float(name, low, high, log=True)
    if len(ratios) > 1:
        chosen["negatives"] = trial.suggest_categorical("negatives", ratios)
    return chosen


def _study(
    optuna: Any,
    matrix: Matrix,
    y: NDArray[np.int8],
    fold: NDArray[np.int8],
    recipe: Recipe,
    options: Tabular,
    storage: Path | None,
) -> Any:
    """A new study, or the one in `storage` that was of the same task."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    task = {
        "names": list(matrix.names),
        "content": [hashlib.sha256(np.ascontiguousarray(a).tobytes()).hexdigest() for a in (matrix.values, y, fold)],
        "seed": recipe.seed,
        "tabular": dataclasses.asdict(options),
    }
    if storage is not None:
        storage.parent.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        storage=f"sqlite:///{storage}" if storage is not None else None,
        study_name=f"lesionflow-{digest(task)[:16]}",
        direction="maximize",
        load_if_exists=True,
    )
    # A sampler starts over with every process: after a break it must not repeat its first draws.
    study.sampler = optuna.samplers.TPESampler(seed=recipe.seed + len(study.trials))
    return study


def _complete(optuna: Any, study: Any) -> list[Any]:
    """Trials with a value, in their order."""
    return [one for one in study.trials if one.state == optuna.trial.TrialState.COMPLETE]
