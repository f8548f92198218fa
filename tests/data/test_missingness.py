"""Empty cells that give the label away are found and refused; blanks at random never are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from lesionflow.data.cohort import BLANK_AGE, BLANK_SEX, BLANK_SITE
from lesionflow.data.missingness import check_missing, fisher, refuse
from lesionflow.data.schema import COLUMNS, TRAIN_ONLY
from lesionflow.data.table import read_cells, read_metadata
from lesionflow.errors import DataError

INPUTS = [c for c in COLUMNS if not c.train_only]


def table(count: int, blank: dict[str, np.ndarray] | None = None) -> pl.DataFrame:
    columns = {c.name: [1.0 if c.kind == "number" else "x"] * count for c in INPUTS}
    columns["isic_id"] = [f"ISIC_{i}" for i in range(count)]
    filled = pl.DataFrame(columns)
    return filled.with_columns(
        pl.when(pl.Series(hidden)).then(None).otherwise(pl.col(name)).alias(name)
        for name, hidden in (blank or {}).items()
    )


def test_fisher_is_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    logs = np.append(0.0, np.cumsum(np.log(np.arange(1, 5001))))
    for _ in range(200):
        size_a, size_b = rng.integers(1, 200), rng.integers(1, 2000)
        a, b = rng.integers(0, size_a + 1), int(rng.binomial(size_b, rng.random()))
        expected = stats.fisher_exact([[a, size_a - a], [b, size_b - b]]).pvalue
        assert fisher(int(a), b, int(size_a), int(size_b), logs) == pytest.approx(expected, rel=1e-6, abs=1e-300)


def test_metadata_of_biopsied_lesions_only_is_refused_with_figures_and_remedy() -> None:
    y = np.zeros(1000, np.int8)
    y[:30] = 1
    rng = np.random.default_rng(1)
    hidden = (y == 0) & (rng.random(1000) < 0.9)
    rows = table(1000, {"age_approx": hidden, "patient_id": hidden, "sex": np.zeros(1000, bool)})
    found = check_missing(rows, y)
    assert {f.column for f in found} == {"age_approx", "patient_id"}
    assert found[0].empty_malignant == 0
    assert found[0].empty_benign == pytest.approx(hidden.sum() / 970)
    assert found[0].auc == pytest.approx(0.5 + hidden.sum() / 970 / 2)
    assert found[0].probability < 1e-20
    with pytest.raises(
        DataError, match=r'2 columns.*patient_id.*89% of benign, 0% of malignant.*missing = "allow"'
    ) as e:
        refuse(rows, y, ids=rows["isic_id"].to_list())
    assert rows["isic_id"][int(np.flatnonzero(hidden)[0])] in str(e.value)


@pytest.mark.parametrize("kind", ["text", "nan", "blank", "unknown"])
def test_every_way_to_write_nothing_is_empty(kind: str) -> None:
    y = np.repeat(np.array([0, 1], np.int8), 100)
    nothing = {"text": None, "nan": float("nan"), "blank": " ", "unknown": "Unknown"}[kind]
    value: object = 1.0 if kind == "nan" else "Torso Back"
    column = "tbp_lv_A" if kind == "nan" else "tbp_lv_location"
    rows = pl.DataFrame({column: [nothing if i % 2 and t else value for i, t in enumerate(y)]}, strict=False)
    assert [f.column for f in check_missing(rows, y)] == [column]


def test_few_lesions_prove_nothing() -> None:
    y = np.array([1, 1, 1] + [0] * 20, np.int8)
    assert check_missing(table(23, {"sex": y == 1}), y) == []


@pytest.mark.parametrize("share", [BLANK_AGE, BLANK_SITE, BLANK_SEX, 0.3])
def test_blanks_at_random_are_fine(share: float) -> None:
    rng = np.random.default_rng(int(1000 * share))
    for _ in range(20):
        count, malignant = int(rng.integers(300, 3000)), int(rng.integers(3, 60))
        y = np.zeros(count, np.int8)
        y[:malignant] = 1
        # All of a patient's cells at once, as age and sex are blank in the full set.
        patient = rng.integers(0, count // 5, count)
        hidden = (rng.random(count // 5) < share)[patient]
        assert check_missing(table(count, dict.fromkeys(("age_approx", "sex", "tbp_lv_x"), hidden)), y) == []
        # Each cell for itself: then lesions differ in how many of theirs are blank.
        each = {c.name: rng.random(count) < share for c in INPUTS if c.kind == "number"}
        assert check_missing(table(count, each), y) == []


def test_what_is_no_input_is_not_looked_at() -> None:
    y = np.repeat(np.array([0, 1], np.int8), 100)
    leaks = {name: [None if t == 0 else "x" for t in y] for name in TRAIN_ONLY}
    assert check_missing(pl.DataFrame(leaks | {"note": leaks["iddx_2"]}), y) == []
    assert check_missing(table(200), y) == []
    assert check_missing(table(5), np.zeros(5)) == []
    with pytest.raises(DataError, match="3 targets for 5 lesions"):
        check_missing(table(5), np.zeros(3))


def test_real_and_synthetic_sets(real_data: Path, synthetic: Path) -> None:
    images = read_metadata(real_data / "isic2024-images" / "train-metadata.csv")
    with pytest.raises(DataError, match=r"41 columns.*AUC 0.99"):
        refuse(images, images["target"].to_numpy())
    for path in (real_data / "isic2024-tabular", synthetic):
        rows = read_metadata(path / "train-metadata.csv")
        refuse(rows, rows["target"].to_numpy())
        assert check_missing(read_cells(path / "train-metadata.csv"), rows["target"].to_numpy()) == []


def test_what_features_take_for_unknown_is_empty() -> None:
    rng = np.random.default_rng(0)
    y = np.arange(2000) < 200
    off = np.where(y, rng.random(2000) < 0.6, rng.random(2000) < 0.05)
    wrong = {"age_approx": -1.0, "sex": "divers", "tbp_lv_L": 1e6}
    for name, value in wrong.items():
        usual = "male" if name == "sex" else 50.0
        made = table(2000).with_columns(
            pl.when(pl.Series(off)).then(pl.lit(value)).otherwise(pl.lit(usual)).alias(name)
        )
        assert [one.column for one in check_missing(made, y)] == [name]


def test_blanks_here_and_there_add_up() -> None:
    rng = np.random.default_rng(1)
    y = np.arange(4000) < 400
    names = [c.name for c in INPUTS if c.kind == "number"]
    share = np.where(y, 0.05, 0.02)
    made = table(4000, {name: rng.random(4000) < share for name in names})
    found = check_missing(made, y)
    assert found and all("or more columns" in one.column for one in found), "no column alone is reason enough"
    with pytest.raises(DataError, match=r"or more columns \(empty: .* empty e\.g\. in ISIC_"):
        refuse(made, y, ids=made["isic_id"].to_list())
