"""Cells hold the right lesions, show a figure only where its interval has earned it, and differences are right."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import polars as pl
import pytest

from lesionflow.evaluation import intervals, metrics
from lesionflow.evaluation.ranking import ranking
from lesionflow.evaluation.rates import proportion
from lesionflow.evaluation.subgroups import MOST_CELLS, OTHERS, UNKNOWN, subgroups, typology_angle

OPTIONS = {"replicates": 200, "seed": 1}


def lesions(seed: int = 0, count: int = 3000, malignant: int = 240) -> tuple[pl.DataFrame, Any, Any, Any]:
    rng = np.random.default_rng(seed)
    y = np.zeros(count, np.int64)
    y[rng.choice(count, malignant, replace=False)] = 1
    owner = rng.integers(0, 150, count)
    s = rng.normal(size=count) + 2 * y + 0.4 * rng.normal(size=150)[owner]
    table = pl.DataFrame({
        "sex": np.array(["male", "female", None], object)[np.minimum(owner % 5, 2)].tolist(),
        "age_approx": (owner % 18) * 5.0, "anatom_site_general": rng.choice(["head/neck", "torso"], count),
        "attribution": np.where(owner % 3, "A", "B"), "tbp_tile_type": ["3D: XP"] * count,
        "clin_size_long_diam_mm": rng.uniform(1, 9, count), "tbp_lv_Lext": rng.uniform(20, 90, count),
        "tbp_lv_Bext": rng.uniform(5, 30, count),
    })  # fmt: skip
    return table, y, s, owner


def cells_of(found: list[dict[str, Any]], name: str) -> dict[str, dict[str, Any]]:
    (part,) = [one for one in found if one["name"] == name]
    return {cell["label"]: cell for cell in part["cells"]}


@pytest.fixture(scope="module")
def whole() -> list[dict[str, Any]]:
    return subgroups(*lesions(), 1.0, **OPTIONS)


def test_every_partition_has_all_lesions_once(whole: list[dict[str, Any]]) -> None:
    table, y, _, _ = lesions()
    assert [part["name"] for part in whole] == ["sex", "age", "site", "tile", "institution", "size", "tone"]
    for part in whole:
        assert sum(cell["lesions"] for cell in part["cells"]) == len(table)
        assert sum(cell["malignant"] for cell in part["cells"]) == y.sum()
    assert list(cells_of(whole, "sex")) == ["female", "male", UNKNOWN]
    assert cells_of(whole, "sex")[UNKNOWN]["lesions"] == table["sex"].null_count()


def test_a_cell_has_the_figures_of_its_own_lesions(whole: list[dict[str, Any]]) -> None:
    table, y, s, owner = lesions()
    here = (table["attribution"] == "B").to_numpy()
    cell = cells_of(whole, "institution")["B"]
    alone = ranking(y[here], s[here], owner[here], **OPTIONS)
    assert cell["pauc"] == alone["pauc"].to_dict()
    assert cell["auc"] == alone["auc"].to_dict()
    found = s[here & (y == 1)] >= 1.0
    assert cell["sensitivity"] == proportion(found, owner[here & (y == 1)]).to_dict()
    assert cell["specificity"]["value"] == pytest.approx(np.mean(s[here & (y == 0)] < 1.0))
    assert cell["specificity"]["interval"]["low"] < cell["specificity"]["value"]
    assert cell["groups"] == len(np.unique(owner[here]))
    others = metrics.pauc(y[here], s[here]) - metrics.pauc(y[~here], s[~here])
    assert cell["difference"]["value"] == pytest.approx(others, abs=1e-12)
    assert cell["difference"]["interval"]["low"] < others < cell["difference"]["interval"]["high"]
    other = cells_of(whole, "institution")["A"]["difference"]
    assert other["value"] == pytest.approx(-others, abs=1e-12)


@pytest.mark.parametrize(
    ("column", "partition", "values"),
    [
        ("age_approx", "age", {0.0: "under 40", 39.9: "under 40", 40.0: "40-59", 60.0: "60-74", 74.9: "60-74",
                               75.0: "75 and over", 85.0: "75 and over", None: UNKNOWN, math.nan: UNKNOWN}),
        ("clin_size_long_diam_mm", "size", {2.99: "under 3 mm", 3.0: "3 to under 6 mm", 5.99: "3 to under 6 mm",
                                            6.0: "6 mm and over", None: UNKNOWN}),
    ],
)  # fmt: skip
def test_a_limit_belongs_to_the_band_above_it(column: str, partition: str, values: dict[Any, str]) -> None:
    y = np.zeros(len(values), int)
    y[0] = 1
    table = pl.DataFrame({column: list(values)}, schema={column: pl.Float64}, strict=False)
    cells = cells_of(subgroups(table, y, y, np.arange(len(y)), 0.5, **OPTIONS), partition)
    counted = {label: list(values.values()).count(label) for label in values.values()}
    assert {label: cell["lesions"] for label, cell in cells.items() if cell["lesions"]} == counted


def test_skin_tone_is_the_published_angle_and_named_a_proxy(whole: list[dict[str, Any]]) -> None:
    table = pl.DataFrame({"tbp_lv_Lext": [70.0, 50.0, 30.0, 70.0], "tbp_lv_Bext": [20.0, 20.0, 20.0, -1.0]})
    angle = table.select(a=typology_angle())["a"]
    assert angle.to_list() == [pytest.approx(45.0), pytest.approx(0.0), pytest.approx(-45.0), None]
    # b* = 10 puts the six published classes at these values of L*.
    limits = [50 + 10 * math.tan(math.radians(a)) for a in (-30, 10, 28, 41, 55)]
    lightness = [limit + step for limit in limits for step in (-0.01, 0.01)]
    y = np.array([1] + [0] * (len(lightness) - 1))
    table = pl.DataFrame({"tbp_lv_Lext": lightness, "tbp_lv_Bext": 10.0})
    cells = cells_of(subgroups(table, y, y, np.arange(len(y)), 0.5, **OPTIONS), "tone")
    assert [(label, cell["lesions"]) for label, cell in cells.items()] == [
        ("dark", 1), ("brown", 2), ("tan", 2), ("intermediate", 2), ("light", 2), ("very light", 1)
    ]  # fmt: skip
    tone = next(part for part in whole if part["name"] == "tone")
    assert "proxy" in tone["title"] and "not a person's skin type" in tone["note"] and "lighting" in tone["note"]


def test_a_cell_of_too_few_malignant_lesions_shows_counts_and_reasons_only() -> None:
    table, y, s, owner = lesions()
    fewest = intervals.FEWEST_MALIGNANT
    rows = np.flatnonzero(y == 1)[: 2 * fewest - 1]
    sex = np.full(len(y), "male", object)
    sex[rows[:fewest]], sex[rows[fewest:]] = "a", "b"
    sex[np.flatnonzero(y == 0)[:800:2]], sex[np.flatnonzero(y == 0)[1:800:2]] = "a", "b"
    cells = cells_of(subgroups(table.with_columns(sex=pl.Series(sex.tolist())), y, s, owner, 1.0, **OPTIONS), "sex")
    assert (cells["a"]["malignant"], cells["b"]["malignant"]) == (fewest, fewest - 1)
    for name in ("pauc", "auc", "sensitivity", "difference"):
        assert cells["a"][name]["value"] is not None and cells["a"][name]["interval"]["low"] is not None
        few = cells["b"][name]
        assert few["value"] is None and few["interval"]["low"] is None
        assert f"{fewest - 1} malignant lesions" in few["interval"]["reason"]
    assert cells["b"]["specificity"]["value"] is not None  # Benign lesions are enough for it.


def test_malignant_lesions_of_a_few_patients_are_no_cell_either() -> None:
    table, y, s, owner = lesions()
    sex = np.where(np.arange(len(y)) % 2, "male", "female")
    few = (y == 1) & (sex == "female")
    owner = np.where(few, owner % 5, owner)
    cells = cells_of(subgroups(table.with_columns(sex=pl.Series(sex)), y, s, owner, 1.0, **OPTIONS), "sex")
    assert cells["female"]["malignant"] >= intervals.FEWEST_MALIGNANT
    assert cells["female"]["pauc"]["value"] is None
    assert "5 patients" in cells["female"]["pauc"]["interval"]["reason"]
    assert "all others: malignant lesions of 5 patients" in cells["male"]["difference"]["interval"]["reason"]


def test_a_figure_that_has_no_interval_is_not_shown() -> None:
    table, y, s, owner = lesions()
    sex = pl.Series(np.where(owner < 5, "a", "b"))
    cells = cells_of(subgroups(table.with_columns(sex=sex), y, s, owner, 1.0, **OPTIONS), "sex")
    assert (
        cells["a"]["specificity"]["value"] is None and "5 patients" in cells["a"]["specificity"]["interval"]["reason"]
    )
    cells = cells_of(subgroups(table, y, -y, owner, 1.0, **OPTIONS), "institution")
    for name in ("pauc", "auc", "difference"):  # All malignant lesions rank last: 0 in every draw of patients.
        assert cells["A"][name]["value"] is None and "does not vary" in cells["A"][name]["interval"]["reason"]


def test_what_is_absent_is_said(whole: list[dict[str, Any]]) -> None:
    table, y, s, owner = lesions()
    table = table.drop("sex").with_columns(anatom_site_general=pl.lit(None, pl.String), tbp_tile_type=pl.lit(" "))
    found = {part["name"]: part for part in subgroups(table.drop("tbp_lv_Bext"), y, s, owner, 1.0, **OPTIONS)}
    assert (found["sex"]["cells"], found["sex"]["reason"]) == ([], "no column sex")
    assert found["tone"]["reason"] == "no column tbp_lv_Bext"
    assert found["site"]["reason"] == "anatom_site_general: unknown for every lesion"
    assert found["tile"]["reason"] == "tbp_tile_type: unknown for every lesion"
    assert "reason" not in found["age"]
    only = cells_of(whole, "tile")["3D: XP"]["difference"]
    assert only["value"] is None and only["interval"]["reason"] == "all others: no other lesions"


def test_cells_of_one_class_and_no_threshold_are_said() -> None:
    table, y, s, owner = lesions()
    sex = pl.Series(np.where(y == 1, "male", "female"))
    cells = cells_of(subgroups(table.with_columns(sex=sex), y, s, owner, None, **OPTIONS), "sex")
    assert cells["male"]["pauc"]["interval"]["reason"] == "no benign lesions"
    assert cells["female"]["pauc"]["interval"]["reason"].startswith("0 malignant")
    for cell in cells.values():
        assert cell["sensitivity"]["interval"]["reason"] == cell["specificity"]["interval"]["reason"] == "no threshold"
    cells = cells_of(subgroups(table.with_columns(sex=sex), y, s, owner, 1.0, **OPTIONS), "sex")
    assert cells["male"]["specificity"]["interval"]["reason"] == "no benign lesions"
    assert cells["male"]["sensitivity"]["value"] is not None


def test_intervals_can_be_left_out() -> None:
    table, y, s, owner = lesions()
    cell = cells_of(subgroups(table, y, s, owner, 1.0, replicates=0), "institution")["A"]
    for name in ("pauc", "auc", "sensitivity", "specificity", "difference"):
        assert cell[name]["value"] is not None
        assert cell[name]["interval"]["reason"] == intervals.NOT_ASKED


def test_comparisons_are_counted(whole: list[dict[str, Any]]) -> None:
    shown = [sum(c["difference"]["interval"]["low"] is not None for c in part["cells"]) for part in whole]
    for part, here in zip(whole, shown, strict=True):
        said = f"{here} of {sum(shown)} comparisons over all partitions"
        assert (said in part["note"]) == (here > 0)
    assert shown[3] == 0 < shown[0]
    assert f"about {sum(shown) * 0.05:.1f} of {sum(shown)} intervals" in whole[0]["note"]


def test_rare_values_of_an_open_column_are_one_cell() -> None:
    table, y, s, owner = lesions()
    clinic = pl.Series([f"clinic {i % 40:02d}" if i < 1500 else "clinic 00" for i in range(len(y))])
    cells = cells_of(subgroups(table.with_columns(attribution=clinic), y, s, owner, 1.0, **OPTIONS), "institution")
    assert len(cells) == MOST_CELLS + 1
    assert list(cells)[-1] == OTHERS
    assert cells[OTHERS]["lesions"] == sum(clinic.value_counts(sort=True)["count"][MOST_CELLS:])


def test_the_order_of_rows_does_not_matter(whole: list[dict[str, Any]]) -> None:
    table, y, s, owner = lesions()
    order = np.random.default_rng(3).permutation(len(y))
    assert subgroups(table[order], y[order], s[order], owner[order], 1.0, **OPTIONS) == whole


def test_lone_lesions_and_a_table_of_patients_agree(
    monkeypatch: pytest.MonkeyPatch, whole: list[dict[str, Any]]
) -> None:
    monkeypatch.setattr("lesionflow.evaluation.subgroups._DENSE", 0)
    for ours, theirs in zip(subgroups(*lesions(), 1.0, **OPTIONS), whole, strict=True):
        for a, b in zip(ours["cells"], theirs["cells"], strict=True):
            assert a["difference"]["value"] == b["difference"]["value"]
            low, other = a["difference"]["interval"]["low"], b["difference"]["interval"]["low"]
            assert low == (None if other is None else pytest.approx(other, abs=1e-9))


def test_shared_patients_make_a_difference_surer() -> None:
    """Every patient has a lesion of each cell with nearly the same score: the cells' figures rise and fall together."""
    rng = np.random.default_rng(0)
    patients = 400
    y = np.tile((np.arange(patients) < 120).astype(int), 2)
    own = rng.normal(size=patients) + 1.5 * y[:patients]
    s = np.r_[own, own] + 0.05 * rng.normal(size=2 * patients)
    table = pl.DataFrame({"sex": ["a"] * patients + ["b"] * patients})

    def width(owner: np.ndarray) -> float:
        interval = cells_of(subgroups(table, y, s, owner, 1.0, **OPTIONS), "sex")["a"]["difference"]["interval"]
        return interval["high"] - interval["low"]

    assert width(np.tile(np.arange(patients), 2)) < 0.4 * width(np.arange(2 * patients))


def test_differences_hold_the_truth_and_a_real_one_is_seen() -> None:
    """120 cohorts: the interval leaves 0 out in about one of twenty where there is no difference, else mostly."""

    def excluded(gap: float) -> float:
        hits = 0
        for seed in range(120):
            rng = np.random.default_rng(seed)
            y = np.repeat([1, 0], [160, 1500])
            inside = rng.random(len(y)) < 0.4
            owner = rng.integers(0, 120, len(y))
            s = rng.normal(size=len(y)) + (2.0 - gap * inside) * y + 0.4 * rng.normal(size=120)[owner]
            table = pl.DataFrame({"sex": np.where(inside, "in", "out")})
            found = subgroups(table, y, s, owner, None, replicates=150, seed=seed)
            interval = cells_of(found, "sex")["in"]["difference"]["interval"]
            hits += not interval["low"] <= 0 <= interval["high"]
        return hits / 120

    assert excluded(0.0) <= 0.11
    assert excluded(1.5) > 0.8


@pytest.mark.slow
def test_full_size_is_quick() -> None:
    """All partitions of the competition's size; the bound is in processor time, as machines are shared."""
    rng = np.random.default_rng(0)
    count, patients = 401_059, 1042
    owner = rng.integers(0, patients, count)
    y = np.zeros(count, int)
    y[rng.choice(count, 393, replace=False)] = 1
    s = rng.normal(size=count) + 2 * y
    table = pl.DataFrame({
        "sex": rng.choice(["female", "male"], count), "age_approx": rng.uniform(20, 90, count),
        "anatom_site_general": rng.choice(list("abcde"), count), "attribution": rng.choice(list("abcdefg"), count),
        "tbp_tile_type": rng.choice(["x", "y"], count), "clin_size_long_diam_mm": rng.uniform(1, 9, count),
        "tbp_lv_Lext": rng.uniform(20, 90, count), "tbp_lv_Bext": rng.uniform(5, 30, count),
    })  # fmt: skip
    start = time.process_time()
    found = subgroups(table, y, s, owner, 1.0)
    assert time.process_time() - start < 15
    assert sum(len(part["cells"]) for part in found) == 2 + 4 + 5 + 2 + 7 + 3 + 6
