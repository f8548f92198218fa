"""Neighbours: distances computed directly, ties and missing cells by policy, outlyingness as scikit-learn has it."""

from __future__ import annotations

import sys

import numpy as np
import polars as pl
import pytest

from lesionflow.data import neighbours
from lesionflow.data.features import Matrix, features
from lesionflow.data.neighbours import LOOKS, NEAREST
from lesionflow.errors import UsageError


def looks(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    centre = {"clin_size_long_diam_mm": 4.0, "tbp_lv_symm_2axis": 0.5}
    return {
        n: np.clip(centre.get(n, 5.0) + 0.3 * unit * rng.normal(size=count), 0.01, None) for n, unit in LOOKS.items()
    }


def table(count: int, seed: int = 0, **columns) -> pl.DataFrame:
    rng = np.random.default_rng([seed, 1])
    place = {name: rng.normal(0, 60, count) for name in ("tbp_lv_x", "tbp_lv_y", "tbp_lv_z")}
    ids = {"isic_id": [f"ISIC_{i:05}" for i in range(count)], "patient_id": ["p"] * count}
    return pl.DataFrame(ids | place | looks(count, seed) | {"tbp_lv_nevi_confidence": rng.random(count)} | columns)


def of(rows: pl.DataFrame) -> Matrix:
    return features(rows, ("neighbours",))


def column(matrix: Matrix, name: str) -> np.ndarray:
    return matrix.values[:, matrix.names.index(name)]


def point(rows: pl.DataFrame) -> np.ndarray:
    """Looks [n, 8] as the module's text says."""
    columns = [np.log(rows[n].to_numpy()) if n.startswith("clin") else rows[n].to_numpy() for n in LOOKS]
    return np.stack([c / unit for c, unit in zip(columns, LOOKS.values(), strict=True)], axis=1)


def apart(points: np.ndarray) -> np.ndarray:
    return np.sqrt(((points[:, None] - points[None]) ** 2).sum(axis=2))


@pytest.mark.parametrize("count", [2, 3, 4, 5, 6, 7, 90])
def test_distances_are_those_of_every_pair(count: int) -> None:
    rows = table(count, seed=count)
    m, k = of(rows), min(NEAREST, count - 1)
    place = rows.select("tbp_lv_x", "tbp_lv_y", "tbp_lv_z").to_numpy()
    on_body, alike = apart(place), apart(point(rows))
    for pairs, first, mean in ((on_body, "nearest_mm", "nearest5_mm"), (alike, "look_nearest", "look_nearest5")):
        ordered = np.sort(pairs, axis=1)[:, 1:]
        assert np.allclose(column(m, first), ordered[:, 0], rtol=1e-13)
        assert np.allclose(column(m, mean), ordered[:, :k].mean(axis=1), rtol=1e-13)
    for radius in neighbours.RADII:
        assert np.array_equal(column(m, f"within_{radius}mm"), (on_body <= radius).sum(axis=1) - 1)
    near = np.argsort(on_body, axis=1)[:, 1 : k + 1]
    assert np.allclose(column(m, "look_from_near"), np.take_along_axis(alike, near, 1).mean(axis=1), rtol=1e-12)
    light = rows["tbp_lv_L"].to_numpy()
    assert np.allclose(column(m, "tbp_lv_L_near_diff"), light - light[near].mean(axis=1), rtol=1e-12)
    median = np.median(point(rows), axis=0)
    away = np.sqrt(((point(rows) - median) ** 2).sum(axis=1))
    assert np.allclose(column(m, "look_to_median"), away, rtol=1e-12)


def test_two_lesions_have_no_outlier_factor_and_three_do() -> None:
    for name in ("look_lof", "look_own_spreads"):
        assert np.isnan(column(of(table(2)), name)).all()
        assert np.isfinite(column(of(table(3)), name)).all()


def test_outlier_factor_is_scikit_learns() -> None:
    forest = pytest.importorskip("sklearn.neighbors")
    rows = table(120, seed=3)
    theirs = forest.LocalOutlierFactor(n_neighbors=NEAREST).fit(point(rows)).negative_outlier_factor_
    # Theirs adds 1e-10 to densities' denominators.
    assert np.allclose(column(of(rows), "look_lof"), -theirs, rtol=1e-7)


def test_the_odd_lesion_is_found() -> None:
    rows = table(40, seed=1)
    dark = rows.with_columns(
        pl.when(pl.col("isic_id") == "ISIC_00007").then(60.0).otherwise("tbp_lv_L").alias("tbp_lv_L")
    )
    m = of(dark)
    for name in ("look_nearest", "look_nearest5", "look_lof", "look_to_median", "look_own_spreads", "look_from_near"):
        assert column(m, name).argmax() == 7, name
    assert column(m, "look_to_median_rank")[7] == 1


def test_near_points_far_from_the_origin_keep_their_distance() -> None:
    # |a|^2 + |b|^2 - 2ab loses all of it: 1e8^2 has no place for 1e-4^2.
    m = of(table(3, tbp_lv_x=[1e8, 1e8, 1e8], tbp_lv_y=[0.0, 1e-4, 1.0], tbp_lv_z=[0.0, 0.0, 0.0]))
    assert column(m, "nearest_mm")[:2] == pytest.approx([1e-4, 1e-4], rel=1e-12)


def test_many_lesions_in_one_place() -> None:
    count = 20
    same = {name: [5.0] * count for name in (*LOOKS, "tbp_lv_x", "tbp_lv_y", "tbp_lv_z")} | {
        "tbp_lv_symm_2axis": [0.5] * count
    }
    m = of(table(count, **same))
    for name in ("nearest_mm", "nearest5_mm", "look_nearest", "look_nearest5", "look_to_median", "look_from_near"):
        assert (column(m, name) == 0).all(), name
    assert (column(m, "look_lof") == 1).all()
    assert (column(m, "within_20mm") == count - 1).all()
    assert (column(m, "look_to_median_rank") == 0.5).all()
    assert np.isnan(column(m, "look_own_spreads")).all(), "no axis has a spread"


def test_next_to_lesions_in_one_place_the_outlier_factor_is_unknown() -> None:
    light = [5.0] * 8 + [9.0]
    same = {name: [5.0] * 9 for name in LOOKS} | {"tbp_lv_symm_2axis": [0.5] * 9, "tbp_lv_L": light}
    found = column(of(table(9, **same)), "look_lof")
    assert (found[:8] == 1).all()
    assert np.isnan(found[8])


def test_ties_go_by_id_whatever_the_order_of_rows() -> None:
    grid = np.stack(np.meshgrid(*[np.arange(5.0)] * 3), -1).reshape(-1, 3)
    rows = table(125, tbp_lv_x=grid[:, 0], tbp_lv_y=grid[:, 1], tbp_lv_z=grid[:, 2])
    expected, shuffled = of(rows), np.random.default_rng(2).permutation(125)
    assert np.array_equal(of(rows[shuffled]).values, expected.values[shuffled], equal_nan=True)


def test_missing_cells_leave_a_lesion_out_of_that_space_only() -> None:
    rows = table(12)
    blind = rows.with_columns(
        pl.when(pl.col("isic_id") == "ISIC_00003").then(None).otherwise("tbp_lv_z").alias("tbp_lv_z"),
        pl.when(pl.col("isic_id") == "ISIC_00005").then(None).otherwise("tbp_lv_norm_color").alias("tbp_lv_norm_color"),
    )
    m = of(blind)
    on_body = [n for n in m.names if n.endswith(("mm", "near_diff")) or n == "look_from_near"]
    seen = [n for n in m.names if n not in on_body]
    assert all(np.isnan(column(m, n)[3]) for n in on_body)
    assert all(np.isfinite(column(m, n)[3]) for n in seen)
    assert all(np.isnan(column(m, n)[5]) for n in (*seen, "look_from_near", "tbp_lv_norm_color_near_diff"))
    assert np.isfinite(column(m, "nearest_mm")[5])
    without = of(rows.filter(pl.col("isic_id") != "ISIC_00003"))
    others = np.arange(12) != 3
    assert np.array_equal(column(m, "nearest5_mm")[others], column(without, "nearest5_mm"))


def test_patients_are_no_neighbours_of_each_other() -> None:
    one, other = (
        table(6, seed=1),
        table(5, seed=2).with_columns(patient_id=pl.lit("q"), isic_id=pl.format("J{}", "isic_id")),
    )
    both = of(pl.concat([one, other]))
    assert np.array_equal(both.values, np.vstack([of(one).values, of(other).values]), equal_nan=True)


def test_without_scipy_the_remedy_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.spatial", None)
    assert np.isnan(of(table(1)).values).all(), "one lesion has no neighbours and needs none"
    with pytest.raises(UsageError, match=r"scipy.*lesionflow\[train\]"):
        of(table(2))
