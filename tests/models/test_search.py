"""The search for the trees' settings: judged on patients that weren't learned from, the hold-out left alone."""

from __future__ import annotations

import dataclasses
import importlib
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import polars as pl
import pytest

from lesionflow.data.features import Matrix
from lesionflow.data.folds import HOLDOUT, make_folds
from lesionflow.errors import DataError, UsageError
from lesionflow.evaluation.metrics import fold_rank, pauc
from lesionflow.models.search import NEGATIVES, SPACE, blocks, out_of_fold, search, tune
from lesionflow.models.tabular import Boosted
from lesionflow.recipe import Evaluation, Folds, Recipe, Tabular

pytest.importorskip("optuna")
SMALL = Recipe(
    "tiny",
    folds=Folds(count=3, holdout=0.2),
    tabular=Tabular(lightgbm=1, rounds=60, learning_rate=0.05, min_leaf=10),
    evaluation=Evaluation(replicates=100),
)
# One tree that knows a single split: nearly anything is better.
POOR = dataclasses.replace(SMALL, tabular=Tabular(lightgbm=1, rounds=1, leaves=2, columns=0.01))


def cohort(seed: int = 0) -> tuple[Matrix, np.ndarray, list[str]]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(900, 6))
    owner = rng.integers(0, 150, 900)
    y = (x[:, 0] + 0.6 * x[:, 1] + rng.normal(size=900) + 0.3 * rng.normal(size=150)[owner] > 2).astype(np.int8)
    return Matrix(tuple("abcdef"), x), y, [f"P{i}" for i in owner]


def folds(y: np.ndarray, groups: list[str], recipe: Recipe) -> np.ndarray:
    ids = [f"lesion {i}" for i in range(len(y))]
    return make_folds(ids, y, groups, count=recipe.folds.count, holdout=recipe.folds.holdout).fold


def csv(folder: Path, y: np.ndarray, groups: list[str], x: np.ndarray, *, blank: bool = False) -> Path:
    folder.mkdir(exist_ok=True)
    size: list[float | None] = (4 + x[:, 0]).tolist()
    if blank:
        size = [value if target else None for value, target in zip(size, y, strict=True)]
    pl.DataFrame({
        "isic_id": [f"ISIC_{i:07d}" for i in range(len(y))],
        "target": y, "patient_id": groups, "clin_size_long_diam_mm": size,
        "tbp_lv_deltaLBnorm": 6 + x[:, 1], "tbp_lv_x": x[:, 2], "tbp_lv_y": x[:, 3], "tbp_lv_z": x[:, 4],
    }).write_csv(folder / "train-metadata.csv")  # fmt: skip
    return folder


def test_out_of_fold_is_the_folds_own_model_and_leaves_the_hold_out_alone() -> None:
    matrix, y, groups = cohort()
    fold = folds(y, groups, SMALL)
    logits = out_of_fold(matrix, y, fold, SMALL.tabular, seed=5, threads=2)
    assert np.array_equal(np.isnan(logits), fold == HOLDOUT)
    learn = (fold != 1) & (fold != HOLDOUT)
    own = Boosted.fit(Matrix(matrix.names, matrix.values[learn]), y[learn], SMALL.tabular, seed=5)
    assert np.array_equal(logits[fold == 1], own.logits(matrix.values[fold == 1]))
    one = out_of_fold(matrix, y, fold, SMALL.tabular, seed=5, threads=1)
    assert np.array_equal(logits, one, equal_nan=True)


def test_a_search_beats_poor_settings_and_says_by_how_much() -> None:
    matrix, y, groups = cohort()
    found = search(matrix, y, groups, POOR, trials=6, progress=False)
    fold = folds(y, groups, POOR)
    judged = fold != HOLDOUT

    def figure(options: Tabular) -> float:
        logits = out_of_fold(matrix, y, fold, options, seed=POOR.seed)
        return pauc(y[judged], fold_rank(logits[judged], fold[judged]))

    assert found.start == pytest.approx(figure(POOR.tabular), abs=1e-12)
    assert found.value == pytest.approx(figure(found.recipe.tabular), abs=1e-12)
    assert found.value == max(one["value"] for one in found.trials) > found.start + 0.03
    assert len(found.trials) == 7 and found.trials[0]["rounds"] == 1
    assert found.other_folds["difference"] > 0.03
    assert found.other_folds["low"] < found.other_folds["difference"] < found.other_folds["high"]
    # Nothing but the trees' own settings has changed, and they are such as a recipe may have.
    same = dataclasses.replace(found.recipe, tabular=POOR.tabular)
    assert same == POOR
    assert Recipe.from_dict(found.recipe.to_dict()) == found.recipe
    changed = {
        f.name for f in dataclasses.fields(Tabular)
        if getattr(found.recipe.tabular, f.name) != getattr(POOR.tabular, f.name)
    }  # fmt: skip
    assert changed <= {*SPACE, "negatives"}
    for one in found.trials[1:]:
        assert all(low <= one[name] <= high for name, (low, high) in SPACE.items())
        assert one.get("negatives", 0.0) in NEGATIVES


def test_a_search_repeats_itself_and_never_falls_behind_the_recipe() -> None:
    matrix, y, groups = cohort()
    first, second = (search(matrix, y, groups, SMALL, trials=2, progress=False) for _ in range(2))
    assert first == second
    assert first.value >= first.start
    other = search(matrix, y, groups, dataclasses.replace(SMALL, seed=1), trials=2, progress=False)
    assert other.trials[1:] != first.trials[1:]


def test_what_is_held_out_takes_no_part() -> None:
    """Its targets and features may be anything."""
    matrix, y, groups = cohort()
    hidden = folds(y, groups, SMALL) == HOLDOUT
    values, truth = matrix.values.copy(), y.copy()
    values[hidden] *= -1
    # Targets decide the split, so each patient keeps as many of each: they only change places.
    for name in {g for g, h in zip(groups, hidden, strict=True) if h}:
        rows = np.flatnonzero(np.array(groups) == name)
        truth[rows] = truth[rows][::-1]
    assert (truth != y).any() and np.array_equal(folds(truth, groups, SMALL), folds(y, groups, SMALL))
    a = search(matrix, y, groups, SMALL, trials=1, progress=False)
    b = search(Matrix(matrix.names, values), truth, groups, SMALL, trials=1, progress=False)
    assert a == b


def test_a_search_that_broke_off_goes_on(tmp_path: Path) -> None:
    matrix, y, groups = cohort()
    file = tmp_path / "new" / "search.sqlite"
    three = search(matrix, y, groups, SMALL, trials=3, progress=False, storage=file)
    five = search(matrix, y, groups, SMALL, trials=5, progress=False, storage=file)
    assert five.trials[:4] == three.trials and len(five.trials) == 6
    assert len({one["learning_rate"] for one in five.trials}) == 6, "it doesn't repeat its first draws"
    # Of other data nothing is taken over.
    other, y2, groups2 = cohort(seed=1)
    fresh = search(other, y2, groups2, SMALL, trials=1, progress=False, storage=file)
    assert len(fresh.trials) == 2


def test_time_runs_out_between_trials() -> None:
    matrix, y, groups = cohort()
    began = time.monotonic()
    found = search(matrix, y, groups, SMALL, trials=10_000, timeout=0.5, progress=False)
    assert 1 <= len(found.trials) < 500
    assert time.monotonic() - began < 20


def test_a_recipe_without_models_is_given_some() -> None:
    matrix, y, groups = cohort()
    image_only = dataclasses.replace(SMALL, tabular=dataclasses.replace(SMALL.tabular, lightgbm=0))
    found = search(matrix, y, groups, image_only, trials=1, timeout=0, progress=False)
    assert (found.recipe.tabular.lightgbm, found.recipe.tabular.catboost) == (3, 0)


def test_blocks_are_what_the_recipe_asks_for() -> None:
    assert blocks(Tabular(derived=True, context=True, neighbours=True)) == (
        "plain", "derived", "context", "neighbours",
    )  # fmt: skip
    assert blocks(Tabular(derived=False, context=True, neighbours=False)) == ("plain", "context")


def test_tune_writes_a_recipe_that_can_be_read(tmp_path: Path) -> None:
    matrix, y, groups = cohort()
    data, out = csv(tmp_path / "data", y, groups, matrix.values), tmp_path / "deep" / "tuned.toml"
    recipe = dataclasses.replace(POOR, tabular=dataclasses.replace(POOR.tabular, neighbours=False))
    found = tune(recipe, data, out, trials=2, progress=False)
    tuned = Recipe.load(out)
    assert dataclasses.asdict(tuned.tabular) == found["tabular"]
    assert found["trials"] == 2 == len(found["history"]) - 1
    assert found["value"] == max(one["value"] for one in found["history"]) >= found["before"]
    assert dataclasses.replace(tuned, tabular=recipe.tabular) == recipe
    assert [p.name for p in out.parent.iterdir()] == ["tuned.toml"]


def test_tune_refuses_what_it_cannot_learn_from(tmp_path: Path) -> None:
    matrix, y, groups = cohort()
    with pytest.raises(UsageError, match="trials must be at least 1"):
        search(matrix, y, groups, SMALL, trials=0, progress=False)
    data = csv(tmp_path / "data", y, groups, matrix.values)
    pl.read_csv(data / "train-metadata.csv").drop("target").write_csv(data / "train-metadata.csv")
    with pytest.raises(DataError, match="column target"):
        tune(SMALL, data, tmp_path / "out.toml", progress=False)
    assert not (tmp_path / "out.toml").exists()


def test_tune_refuses_gaps_that_tell(tmp_path: Path) -> None:
    matrix, y, groups = cohort()
    data = csv(tmp_path / "data", y, groups, matrix.values, blank=True)
    plain = dataclasses.replace(SMALL, tabular=dataclasses.replace(SMALL.tabular, context=False, neighbours=False))
    with pytest.raises(DataError, match="clin_size_long_diam_mm"):
        tune(plain, data, tmp_path / "out.toml", trials=1, progress=False)
    allowed = dataclasses.replace(plain, tabular=dataclasses.replace(plain.tabular, missing="allow"))
    assert tune(allowed, data, tmp_path / "out.toml", trials=1, timeout=0, progress=False)["value"] > 0.1


def test_without_optuna_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def without(name: str, package: str | None = None) -> ModuleType:
        if name == "optuna":
            raise ModuleNotFoundError(name, name=name)
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", without)
    matrix, y, groups = cohort()
    with pytest.raises(UsageError, match=r"lesionflow\[tune\]"):
        search(matrix, y, groups, SMALL, progress=False)
    assert "optuna" in sys.modules
