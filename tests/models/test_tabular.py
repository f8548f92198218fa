"""Boosted trees: text that predicts bit for bit, log-odds that share a scale, contributions that add up."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lesionflow.data.features import Matrix
from lesionflow.errors import DataError, UsageError
from lesionflow.evaluation.metrics import auc
from lesionflow.models import boosters
from lesionflow.models.boosters import KINDS
from lesionflow.models.tabular import Boosted, draw
from lesionflow.recipe import Tabular

NONE = Tabular(lightgbm=0, catboost=0, xgboost=0, rounds=40, learning_rate=0.1, leaves=8)
ALL = dataclasses.replace(NONE, lightgbm=2, catboost=1, xgboost=1)
SAVED = ["p-lightgbm-0.txt", "p-lightgbm-1.txt", "p-catboost-0.json", "p-xgboost-0.json"]


def only(kind: str, **changes: object) -> Tabular:
    return dataclasses.replace(NONE, **({kind: 1} | changes))  # type: ignore[arg-type]


def lesions(count: int = 1500, seed: int = 0) -> tuple[Matrix, np.ndarray]:
    """The first feature tells, the second a little; the third is a coin, and the last is never known."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, 4))
    y = (2 * x[:, 0] + 0.5 * x[:, 1] + rng.normal(size=count) > 3).astype(np.int8)
    x[rng.random(count) < 0.1, 1] = np.nan
    x[:, 3] = np.nan
    return Matrix(("size: mm", "contrast", "a coin", "unknown"), x), y


@pytest.fixture(scope="module")
def fitted() -> tuple[Boosted, Matrix, np.ndarray]:
    matrix, y = lesions()
    return Boosted.fit(matrix, y, ALL, seed=0), matrix, y


def load(files: dict[str, bytes], names: tuple[str, ...]) -> Boosted:
    return Boosted.load(files.__getitem__, list(files), names)


def saved(trees: Boosted, folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in trees.save(folder, "p")}


def test_members_learn_and_rank(fitted: tuple[Boosted, Matrix, np.ndarray]) -> None:
    trees, matrix, _ = fitted
    other, y = lesions(seed=1)
    assert [kind for kind, _ in trees.members] == ["lightgbm", "lightgbm", "catboost", "xgboost"]
    assert auc(y, trees.logits(other.values)) > 0.93
    for kind, model in trees.members:
        assert auc(y, model.margins(other.values)) > 0.9, kind
    mean = np.mean([model.margins(matrix.values) for _, model in trees.members], axis=0)
    assert trees.logits(matrix.values) == pytest.approx(mean, abs=1e-12)


def test_what_is_saved_predicts_bit_for_bit(fitted: tuple[Boosted, Matrix, np.ndarray], tmp_path: Path) -> None:
    trees, matrix, _ = fitted
    files = saved(trees, tmp_path)
    assert sorted(files) == sorted(p.name for p in tmp_path.iterdir()) == sorted(SAVED)
    for text in files.values():
        text.decode("ascii")
    again = load(files, matrix.names)
    assert np.array_equal(again.logits(matrix.values), trees.logits(matrix.values))
    assert np.array_equal(again.contributions(matrix.values), trees.contributions(matrix.values))
    assert again.importances() == trees.importances()
    assert saved(again, tmp_path / "again") == files


def test_a_lesion_scores_the_same_alone_and_among_others(fitted: tuple[Boosted, Matrix, np.ndarray]) -> None:
    trees, matrix, _ = fitted
    whole = trees.logits(matrix.values)  # More rows than are scored on one thread.
    alone = np.concatenate([trees.logits(matrix.values[i : i + 1]) for i in range(50)])
    assert np.array_equal(whole[:50], alone)
    assert trees.logits(matrix.values[:0]).shape == (0,)
    assert trees.contributions(matrix.values[:0]).shape == (0, 5)


def test_threads_change_no_bit(tmp_path: Path) -> None:
    matrix, y = lesions()
    options = dataclasses.replace(ALL, negatives=2.0)
    one, four = (saved(Boosted.fit(matrix, y, options, seed=3, threads=n), tmp_path / str(n)) for n in (1, 4))
    assert one == four
    other = saved(Boosted.fit(matrix, y, options, seed=4), tmp_path / "other")
    assert all(other[name] != one[name] for name in one)


def test_each_member_has_its_own_seed(fitted: tuple[Boosted, Matrix, np.ndarray]) -> None:
    trees, matrix, _ = fitted
    first, second = (model.margins(matrix.values) for kind, model in trees.members if kind == "lightgbm")
    assert not np.array_equal(first, second)
    # More members don't change those that were there.
    more = Boosted.fit(matrix, lesions()[1], only("lightgbm"), seed=0)
    assert np.array_equal(more.logits(matrix.values), first)


@pytest.mark.parametrize("kind", KINDS)
def test_contributions_sum_to_the_log_odds(kind: str) -> None:
    matrix, y = lesions()
    trees = Boosted.fit(matrix, y, only(kind, negatives=3.0), seed=0)
    parts = trees.contributions(matrix.values)
    assert parts.shape == (len(y), 5)
    assert np.abs(parts.sum(axis=1) - trees.logits(matrix.values)).max() < 1e-6
    # The base is the same for every lesion, but for XGBoost's single precision.
    assert np.ptp(parts[:, -1]) < 1e-4
    assert (parts[:, 3] == 0).all(), "a feature that is never known adds nothing"
    assert np.abs(parts[:, 0]).mean() > 3 * np.abs(parts[:, 2]).mean()
    share = trees.importances()
    assert sum(share.values()) == pytest.approx(1)
    assert list(share) == list(matrix.names)
    assert share["size: mm"] > 0.5 > share["contrast"] > share["a coin"] > share["unknown"] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_log_odds_are_of_the_whole_although_few_benign_lesions_were_drawn(kind: str) -> None:
    """Without correction one benign lesion per malignant one would add log(all / drawn), here about 2.6."""
    matrix, y = lesions(6000)
    every = Boosted.fit(matrix, y, only(kind), seed=0).logits(matrix.values)
    few = Boosted.fit(matrix, y, only(kind, negatives=1.0), seed=0).logits(matrix.values)
    assert abs(np.median(few - every)) < 0.7
    # Where nothing can be learned, the log-odds are the prevalence's.
    blank = Matrix(("nothing",), np.full((len(y), 1), np.nan))
    flat = Boosted.fit(blank, y, only(kind, negatives=2.0), seed=0)
    assert flat.logits(blank.values[:3]) == pytest.approx(np.log(y.mean() / (1 - y.mean())), abs=0.03)
    assert flat.importances() == {"nothing": 0}


def test_a_draw_has_all_malignant_lesions_and_says_what_it_left_out() -> None:
    y = np.repeat([1, 0], [10, 90]).astype(np.int8)
    rows, shift = draw(y, 3.0, np.random.default_rng(0))
    assert y[rows].sum() == 10 and len(rows) == len(set(rows.tolist())) == 40
    assert (np.diff(rows) > 0).all()
    assert shift == pytest.approx(np.log(30 / 90))
    other, _ = draw(y, 3.0, np.random.default_rng(1))
    assert set(other.tolist()) != set(rows.tolist())
    for everything in (0.0, 9.0, 50.0):
        rows, shift = draw(y, everything, np.random.default_rng(0))
        assert len(rows) == 100 and shift == 0


def test_what_is_not_finite_is_refused(fitted: tuple[Boosted, Matrix, np.ndarray]) -> None:
    trees, matrix, _ = fitted

    class Odd:
        text, names = b"", matrix.names

        def margins(self, values: np.ndarray) -> np.ndarray:
            return np.where(np.arange(len(values)) == 2, np.inf, 0.0)

        def contributions(self, values: np.ndarray) -> np.ndarray:
            return np.full((len(values), 5), np.nan)

        def gains(self) -> np.ndarray:
            return np.array([1.0, np.inf, 0.0, 0.0])

    odd = Boosted(matrix.names, [*trees.members, ("lightgbm", Odd())])
    with pytest.raises(DataError, match="log-odds of row 2 is NaN or infinite"):
        odd.logits(matrix.values)
    with pytest.raises(DataError, match="contributions to row 0 is NaN"):
        odd.contributions(matrix.values)
    with pytest.raises(DataError, match="gain of feature 1 is NaN"):
        odd.importances()
    assert np.isfinite(odd.logits(matrix.values[:2])).all()


def test_rows_are_copied_only_where_some_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, y = lesions(200)
    shared = []
    fit = boosters.LightGBM.fit

    def spy(x: np.ndarray, *args: object, **kwargs: object) -> boosters.LightGBM:
        shared.append((np.shares_memory(x, matrix.values), len(x)))
        return fit(x, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(boosters.LightGBM, "fit", spy)
    for negatives in (0.0, 1e5, 1.0):
        Boosted.fit(matrix, y, only("lightgbm", negatives=negatives), seed=0)
    assert shared == [(True, 200), (True, 200), (False, 2 * int(y.sum()))]


def test_too_few_lesions_for_a_split_give_the_prevalence() -> None:
    matrix, y = lesions(40)
    y[:] = 0
    y[:4] = 1
    trees = Boosted.fit(matrix, y, only("lightgbm", min_leaf=30), seed=0)
    assert trees.logits(matrix.values) == pytest.approx(np.log(4 / 36))


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (np.zeros(40, np.int8), "both of them"),
        (np.full(40, 2), "expected 0 .benign. and 1"),
        (np.ones(39, np.int8), "39 for 40 rows"),
    ],
)
def test_targets_that_cannot_be_learned_from(y: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Boosted.fit(lesions(40)[0], y, only("lightgbm"), seed=0)


def test_no_member_is_refused_by_field() -> None:
    matrix, y = lesions(40)
    y[0] = 1
    with pytest.raises(UsageError, match=r"tabular\.lightgbm, catboost or xgboost"):
        Boosted.fit(matrix, y, NONE, seed=0)


def test_other_features_than_the_trees_know_are_refused(
    fitted: tuple[Boosted, Matrix, np.ndarray], tmp_path: Path
) -> None:
    trees, matrix, _ = fitted
    with pytest.raises(DataError, match=r"shape \(1500, 3\), the trees know 4"):
        trees.logits(matrix.values[:, :3])
    files = saved(trees, tmp_path)
    for name in files:
        with pytest.raises(DataError, match="model is of 4 features, this version makes 5"):
            load({name: files[name]}, (*matrix.names, "new"))


@pytest.mark.parametrize("name", SAVED)
def test_damaged_text_is_refused_by_its_file(
    name: str, fitted: tuple[Boosted, Matrix, np.ndarray], tmp_path: Path
) -> None:
    trees, matrix, _ = fitted
    text = saved(trees, tmp_path)[name]
    for damaged in (b"", b"words", text[: len(text) // 2], b"\xff\x00" + text):
        with pytest.raises(DataError, match=f"{name}: not a"):
            load({name: damaged}, matrix.names)
    with pytest.raises(DataError, match="expected <prefix>-<kind>-<number>"):
        load({"p-forest-0.txt": text}, matrix.names)


def test_a_missing_library_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, y = lesions(200)
    for kind, extra in (("lightgbm", "train"), ("catboost", "boosters"), ("xgboost", "boosters")):
        monkeypatch.setitem(sys.modules, kind, None)
        with pytest.raises(UsageError, match=re.escape(f"pip install 'lesionflow[{extra}]'")):
            Boosted.fit(matrix, y, only(kind), seed=0)
        with pytest.raises(UsageError, match=re.escape(f"pip install 'lesionflow[{extra}]'")):
            boosters.read(kind, b"{}", "a file", matrix.names)


def test_nothing_heavy_is_imported_before_it_is_needed() -> None:
    code = "import sys, lesionflow.models.tabular, lesionflow.models.search; print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "lightgbm", "catboost", "xgboost", "optuna", "scipy", "sklearn"} & set(loaded)
