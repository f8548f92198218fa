"""Features: right to the last place, the same for a visit as for a table, and defined where there is little to see."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from lesionflow.data import context, derived
from lesionflow.data.features import (
    BLOCKS,
    Matrix,
    catalogue,
    check_inputs,
    check_local,
    features,
    has_record,
    lesions_of_patient,
)
from lesionflow.data.schema import BY_NAME, LOCATIONS, LOCATIONS_SIMPLE, SITES, TEST_COLUMNS, TRAIN_ONLY
from lesionflow.data.table import read_metadata
from lesionflow.errors import DataError, UsageError

ROOT = Path(__file__).parents[2]


def made(sizes, seed: int = 0, blank: float = 0.02) -> pl.DataFrame:
    """A table of patients with so many lesions each, rows shuffled, some cells empty."""
    rng = np.random.default_rng(seed)
    patient = np.repeat(np.arange(len(sizes)), sizes)
    count = len(patient)
    columns: dict[str, object] = {
        "isic_id": [f"ISIC_{i:07}" for i in rng.permutation(count)],
        "patient_id": [f"IP_{p:07}" for p in patient],
        "sex": rng.choice(["male", "female"], len(sizes))[patient],
        "anatom_site_general": rng.choice(SITES, count),
        "tbp_tile_type": "3D: XP",
        "tbp_lv_location": rng.choice(LOCATIONS, count),
        "tbp_lv_location_simple": rng.choice(LOCATIONS_SIMPLE, count),
    }
    for name in derived.NUMBERS:
        low, high = BY_NAME[name].low or 0.0, BY_NAME[name].high or 30.0
        values = low + (high - low) * rng.beta(2, 5, count)
        # Half of the columns in steps, so that there are ties.
        columns[name] = np.round(values, 0 if len(name) % 2 else 6)
    table = pl.DataFrame(columns).sample(fraction=1.0, shuffle=True, seed=seed)
    drop = rng.random((count, len(table.columns))) < blank
    return table.with_columns(
        pl.when(pl.Series(drop[:, i])).then(None).otherwise(pl.col(name)).alias(name)
        for i, name in enumerate(table.columns)
        if not name.endswith("_id")
    )


def column(matrix: Matrix, name: str) -> np.ndarray:
    return matrix.values[:, matrix.names.index(name)]


def of(values: dict[str, list], **more) -> Matrix:
    return features(pl.DataFrame(values | more, strict=False))


# ---------------------------------------------------------------- the catalogue


def test_catalogue_names_every_column_once_in_order() -> None:
    table = made([3, 1])
    everything = catalogue()
    assert len(everything) >= 150
    assert features(table).names == tuple(f.name for f in everything)
    assert len({f.name for f in everything}) == len(everything)
    for f in everything:
        assert f.formula and f.unit and f.why and f.concept, f.name
        assert f.against in ("", "patient", "site", "neighbours")
        assert bool(f.higher) == bool(f.lower), f.name
        assert (f.against != "") == (f.block in ("context", "neighbours")), f.name


def test_blocks_are_parts_of_the_whole_whatever_their_order() -> None:
    table = made([6, 2])
    whole = features(table)
    for block in BLOCKS:
        part = features(table, (block,))
        assert part.names == tuple(f.name for f in catalogue((block,)))
        assert np.array_equal(part.values, whole.values[:, [whole.names.index(n) for n in part.names]], equal_nan=True)
    assert features(table, ("derived", "plain")).names == features(table, ("plain", "derived")).names
    with pytest.raises(UsageError, match=r"no block 'picture'.*plain, derived, context, neighbours"):
        features(table, ("picture",))


def test_the_matrix_is_what_boosters_take() -> None:
    matrix = features(made([4, 3]))
    assert matrix.values.dtype == np.float64
    assert matrix.values.flags.c_contiguous
    assert not np.isinf(matrix.values).any()


def test_the_page_lists_the_catalogue() -> None:
    done = subprocess.run([sys.executable, str(ROOT / "docs" / "write_features.py"), "--check"], check=False)
    assert done.returncode == 0, "run: python docs/write_features.py"


# ---------------------------------------------------------------- a lesion's own features


def test_numbers_that_cannot_be_true_are_unknown() -> None:
    m = of(
        {
            "isic_id": ["a", "b", "c", "d", "e"],
            "age_approx": [50.0, -5.0, 130.0, float("nan"), None],
            "tbp_lv_x": [1.0, float("inf"), -1e9, 0.0, None],
        }
    )
    assert np.array_equal(column(m, "age_approx"), [50, *[np.nan] * 4], equal_nan=True)
    assert np.array_equal(column(m, "tbp_lv_x"), [1, np.nan, -1e9, 0, np.nan], equal_nan=True)
    assert np.isnan(column(m, "tbp_lv_A")).all(), "a column that isn't there is unknown"


def test_unknown_categories() -> None:
    m = of(
        {
            "sex": ["male", "Female ", "diverse", None],
            "tbp_tile_type": ["3D: white", "3D: XP", "", None],
            "anatom_site_general": ["head/neck", "Posterior torso", "palms/soles", None],
            "tbp_lv_location": ["Left Arm - Lower", "Torso Back Top Third", "Tail", None],
            "tbp_lv_location_simple": ["Left Arm", "Torso Back", "Tail", None],
        }
    )
    nan = np.nan
    assert np.array_equal(column(m, "male"), [1, 0, nan, nan], equal_nan=True)
    assert np.array_equal(column(m, "tile_white"), [1, 0, nan, nan], equal_nan=True)
    for name, expected in (
        ("site_head_neck", [1, 0, 0, 0]),
        ("site_posterior_torso", [0, 1, 0, 0]),
        ("part_arm_lower", [1, 0, 0, 0]),
        ("part_back_top", [0, 1, 0, 0]),
        ("side_left", [1, 0, 0, 0]),
        ("side_right", [0, 0, 0, 0]),
    ):
        assert column(m, name).tolist() == expected, name


def test_derived_features_by_hand() -> None:
    row = {
        "clin_size_long_diam_mm": 5.0, "age_approx": 50.0, "tbp_lv_L": 30.0, "tbp_lv_Lext": 42.0, "tbp_lv_A": 20.0,
        "tbp_lv_Aext": 16.0, "tbp_lv_B": 25.0, "tbp_lv_Bext": 28.0, "tbp_lv_H": -170.0, "tbp_lv_Hext": 170.0,
        "tbp_lv_areaMM2": 12.0, "tbp_lv_perimeterMM": 14.0, "tbp_lv_minorAxisMM": 3.0, "tbp_lv_norm_border": 4.0,
        "tbp_lv_symm_2axis": 0.5, "tbp_lv_color_std_mean": 1.0, "tbp_lv_radial_color_std_max": 0.0,
        "tbp_lv_x": 3.0, "tbp_lv_y": 12.0, "tbp_lv_z": 4.0,
    }  # fmt: skip
    m = features(pl.DataFrame([row]))
    for name, expected in (
        ("contrast_L", 12.0),
        ("contrast_Lab", 13.0),
        ("contrast_hue", 20.0),  # Over the back of the circle.
        ("circularity", 4 * np.pi * 12 / 196),
        ("axis_ratio", 0.6),
        ("size_to_area", 5 / 12**0.5),
        ("border_by_asymmetry", 2.0),
        ("size_by_age", 250.0),
        ("distance_from_origin", 13.0),
        ("distance_from_axis", 5.0),
    ):
        assert column(m, name)[0] == pytest.approx(expected, rel=1e-14), name
    assert np.isnan(column(m, "colour_evenness")[0]), "a division by zero is unknown"
    assert np.isnan(column(m, "lightness_spread_to_skin")[0]), "and so is what is made of something unknown"


def test_zeros_everywhere_give_no_infinity() -> None:
    m = features(pl.DataFrame({name: [0.0, 0.0, 0.0] for name in derived.NUMBERS} | {"patient_id": ["p"] * 3}))
    assert not np.isinf(m.values).any()
    assert np.isnan(column(m, "circularity")).all()


# ---------------------------------------------------------------- the patient's other lesions


def visit(values: list[float | None], site: str | list[str | None] = "head/neck") -> Matrix:
    sites = [site] * len(values) if isinstance(site, str) else site
    return of(
        {
            "isic_id": [f"i{n}" for n in range(len(values))],
            "patient_id": ["p"] * len(values),
            "clin_size_long_diam_mm": values,
            "anatom_site_general": sites,
        },
    )


def compared(matrix: Matrix, scope: str = "patient") -> dict[str, list[float]]:
    return {
        s: column(matrix, f"clin_size_long_diam_mm_{scope}_{s}").tolist()
        for s in ("diff", "z", "robust_z", "rank", *(["share"] if scope == "patient" else []))
    }


def test_one_lesion_has_no_context() -> None:
    m = visit([4.0])
    for f in catalogue(("context", "neighbours")):
        value = column(m, f.name)[0]
        assert value == 1 if f.name in ("patient_lesions", "site_lesions") else np.isnan(value), f.name


def test_two_lesions_have_differences_but_no_spread() -> None:
    found = compared(visit([4.0, 6.0]))
    assert found["diff"] == [-2.0, 2.0]
    assert found["rank"] == [0.0, 1.0]
    assert found["share"] == [4 / 6, 1.0]
    assert np.isnan(found["z"] + found["robust_z"]).all()


def test_four_lesions_by_hand() -> None:
    found = compared(visit([1.0, 2.0, 4.0, 9.0]))
    assert found["diff"] == pytest.approx([-4.0, 2 - 14 / 3, 0.0, 9 - 7 / 3], abs=1e-14)
    sd = (np.array([9, 4, 0, 25]).sum() / 3) ** 0.5
    assert found["z"] == pytest.approx([-3 / sd, -2 / sd, 0, 5 / sd], abs=1e-14)
    # Median 3, deviations 2, 1, 1, 6: their median is 1.5.
    assert found["robust_z"] == pytest.approx(np.array([-2, -1, 1, 6]) / (1.482602218505602 * 1.5), abs=1e-14)
    assert found["rank"] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert found["share"] == pytest.approx([1 / 9, 2 / 9, 4 / 9, 1])


@pytest.mark.parametrize("value", [0.0, 0.1, 4.7])
def test_equal_lesions_are_unremarkable(value: float) -> None:
    found = compared(visit([value] * 7))
    assert found["diff"] == found["z"] == found["robust_z"] == [0.0] * 7, "exactly, without rounding"
    assert found["rank"] == [0.5] * 7
    assert np.isnan(found["share"]).all() if value == 0 else found["share"] == [1.0] * 7


def test_one_odd_among_equal_is_as_odd_as_a_tenth_of_the_spread_allows() -> None:
    found = compared(visit([2.0, 2.0, 2.0, 2.0, 5.0]))
    assert found["robust_z"][:4] == [0.0] * 4
    assert found["robust_z"][4] == pytest.approx(10 * 3 / (9 / 5) ** 0.5), "(5 - 2) in tenths of the SD"
    assert found["z"][4] == pytest.approx(4 / 5**0.5)
    assert found["rank"] == [0.375] * 4 + [1.0]


def test_nearly_equal_values_make_no_huge_score() -> None:
    found = compared(visit([2.0, 2.0 + 1e-9, 2.0, 2.0 - 1e-9, 2.0, 5.0]))
    assert abs(found["robust_z"][5]) < 30


def test_a_share_of_nothing_or_less_is_unknown() -> None:
    rows = {"patient_id": ["p"] * 3, "isic_id": ["a", "b", "c"]}
    for values in ([-3.0, -2.0, -1.0], [-1.0, 0.0, 0.0]):
        m = of(rows, tbp_lv_deltaLBnorm=values)
        assert np.isnan(column(m, "tbp_lv_deltaLBnorm_patient_share")).all()
    assert column(of(rows, tbp_lv_deltaLBnorm=[-1.0, 1.0, 2.0]), "tbp_lv_deltaLBnorm_patient_share")[0] == -0.5


def test_lesions_without_a_value_do_not_count() -> None:
    found = compared(visit([None, 1.0, 2.0, None]))
    assert found["diff"][1:3] == [-1.0, 1.0]
    assert np.isnan(found["z"][1]), "two lesions with a value have no spread"
    assert all(np.isnan(found[s][i]) for s in found for i in (0, 3))
    assert all(np.isnan(compared(visit([None, 3.0]))[s]).all() for s in ("diff", "z", "robust_z", "rank", "share"))


def test_body_sites_are_compared_apart_and_an_unknown_one_not_at_all() -> None:
    m = visit([1.0, 3.0, 10.0, 14.0, 5.0, 6.0], ["head/neck", "head/neck", SITES[0], SITES[0], None, "tail"])
    found = compared(m, "site")
    assert found["diff"][:4] == [-2.0, 2.0, -4.0, 4.0]
    assert np.isnan(found["diff"][4:]).all()
    assert np.array_equal(column(m, "site_lesions"), [2, 2, 2, 2, np.nan, np.nan], equal_nan=True)
    assert column(m, "patient_lesions").tolist() == [6] * 6


def test_lesions_of_no_known_patient_stand_alone() -> None:
    table = made([5]).with_columns(patient_id=pl.Series([None, "", "x", "x", None]))
    assert lesions_of_patient(table).tolist() == [1, 1, 2, 2, 1]
    alone = features(table)
    assert column(alone, "patient_lesions").tolist() == [1, 1, 2, 2, 1]
    assert lesions_of_patient(table.drop("patient_id")).tolist() == [1] * 5
    assert np.array_equal(features(table[:1]).values, alone.values[:1], equal_nan=True)


def test_comparisons_are_those_of_pandas() -> None:
    pandas = pytest.importorskip("pandas")
    table = made([1, 2, 3, 4, 7, 40, 200], seed=4, blank=0.1)
    m = features(table, ("plain", "derived", "context"))
    frame = pandas.DataFrame({n: column(m, n) for n in m.names})
    frame["patient"], frame["site"] = table["patient_id"].to_list(), table["anatom_site_general"].to_list()
    for scope, keys in (("patient", ["patient"]), ("site", ["patient", "site"])):
        for name in context.BASES:
            by, x = frame.groupby(keys)[name], frame[name]
            n, middle = by.transform("count"), by.transform("median")
            mad = (x - middle).abs().groupby([frame[k] for k in keys]).transform("median")
            wide = np.maximum(1.482602218505602 * mad, 0.1 * by.transform("std"))
            expected = {
                "diff": ((x - by.transform("mean")) * n / (n - 1)).where(n > 1),
                "z": ((x - by.transform("mean")) / by.transform("std")).where(n > 2),
                "robust_z": ((x - middle) / wide).where(n > 2),
                "rank": ((by.rank() - 1) / (n - 1)).where(n > 1),
            }
            for suffix, values in expected.items():
                ours, theirs = column(m, f"{name}_{scope}_{suffix}"), values.to_numpy()
                theirs = np.where(np.isinf(theirs), np.nan, theirs)
                zero_spread = np.isnan(theirs) & (ours == 0)  # 0 / 0 is 0 here.
                close = np.isclose(ours, theirs, rtol=1e-9, atol=1e-9, equal_nan=True)
                assert (close | zero_spread).all(), (name, scope, suffix)


# ---------------------------------------------------------------- one function for a table and a visit


@pytest.mark.parametrize("count", [120, pytest.param(1000, marks=pytest.mark.slow)])
def test_patients_one_visit_at_a_time_equal_the_table_to_the_bit(count: int) -> None:
    rng = np.random.default_rng(5)
    table = made(np.minimum(1 + rng.geometric(0.12, count), 60), seed=5)
    whole = features(table)
    rows = table.with_row_index("row").group_by("patient_id", maintain_order=True).agg("row")["row"]
    assert len(rows) == count
    for row in rows.to_list():
        alone = features(table[row])
        assert np.array_equal(alone.values, whole.values[row], equal_nan=True)


def test_row_order_and_threads_change_no_bit(monkeypatch) -> None:
    monkeypatch.setattr(context, "FEW", 0)
    monkeypatch.setattr("lesionflow.data.neighbours.FEW", 0)
    table = made([30, 1, 2, 170, 9, 5], seed=6)
    shuffled = np.random.default_rng(0).permutation(table.height)
    one = features(table, threads=1).values
    assert np.array_equal(one, features(table, threads=3).values, equal_nan=True)
    assert np.array_equal(one[shuffled], features(table[shuffled], threads=2).values, equal_nan=True)


def test_an_empty_table_and_one_without_anything() -> None:
    assert features(made([3])[:0]).values.shape == (0, len(catalogue()))
    assert features(pl.DataFrame({"isic_id": ["a", "b"]})).values.shape == (2, len(catalogue()))


def test_real_metadata(real_data: Path) -> None:
    table = read_metadata(real_data / "isic2024-tabular" / "train-metadata.csv")
    m = features(table)
    share = np.isfinite(m.values).mean(axis=0)
    assert not np.isinf(m.values).any()
    assert share[[f.block in ("plain", "derived") for f in catalogue()]].min() > 0.9, (
        "but colour_evenness, where radial is 0"
    )
    assert share.min() > 0.3, m.names[int(share.argmin())]
    assert has_record(table).all()
    check_local(features, table, patients=30)
    images = read_metadata(real_data / "isic2024-images" / "train-metadata.csv")
    assert has_record(images).sum() == 346


# ---------------------------------------------------------------- leaks


def test_what_is_known_only_at_training_time_is_never_read() -> None:
    table = made([4, 3, 1])
    leaking = table.with_columns(pl.lit(99.0).alias(name) for name in TRAIN_ONLY)
    assert np.array_equal(features(leaking).values, features(table).values, equal_nan=True)
    assert not set(TRAIN_ONLY) & set(features(leaking).names)
    for name in TRAIN_ONLY:
        with pytest.raises(DataError, match=name):
            check_inputs(["tbp_lv_A", name])
    with pytest.raises(DataError, match="attribution, patient_id"):
        check_inputs(["attribution", "patient_id", "sex"])
    check_inputs(set(TEST_COLUMNS) - {"isic_id", "patient_id", "attribution", "copyright_license", "image_type"})


def test_institution_and_ids_change_nothing() -> None:
    table = made([4, 3, 1])
    other = table.with_columns(
        attribution=pl.lit("elsewhere"), copyright_license=pl.lit("CC-0"), image_type=pl.lit("x")
    )
    assert np.array_equal(features(other).values, features(table).values, equal_nan=True)
    renamed = table.with_columns(
        pl.format("IP_9{}", "patient_id").alias("patient_id"), pl.format("ISIC_9{}", "isic_id").alias("isic_id")
    )
    assert np.array_equal(features(renamed).values, features(table).values, equal_nan=True)


def test_statistics_over_other_patients_are_refused_by_name() -> None:
    table = made([5, 1, 8, 3])
    check_local(features, table)

    def fitted(rows: pl.DataFrame) -> Matrix:
        own = features(rows, ("plain",))
        values = own.values.copy()
        age = own.names.index("age_approx")
        values[:, age] -= np.nanmean(values[:, age])
        return Matrix(own.names, values)

    with pytest.raises(DataError, match=r"feature age_approx: .*own rows"):
        check_local(fitted, table)

    def changing(rows: pl.DataFrame) -> Matrix:
        return Matrix((f"of {rows.height}",), np.zeros((rows.height, 1)))

    with pytest.raises(DataError, match="other columns"):
        check_local(changing, table)


def test_has_record_wants_half_of_the_numbers() -> None:
    half = (len(derived.NUMBERS) + 1) // 2
    names = derived.NUMBERS
    row = {n: [1.0 if i < half else None, 1.0 if i < half - 1 else None] for i, n in enumerate(names)}
    row["tbp_lv_eccentricity"] = [0.5, 0.5] if names.index("tbp_lv_eccentricity") < half else row["tbp_lv_eccentricity"]
    schema = dict.fromkeys(names, pl.Float64)
    assert has_record(pl.DataFrame(row, schema=schema)).tolist() == [True, False]
    assert not has_record(pl.DataFrame({"isic_id": ["a"]})).any()


def test_companions_are_lesions_with_a_record() -> None:
    table = made([4, 2])
    blank = [name for name in table.columns if name not in ("isic_id", "patient_id")]
    first = table["patient_id"] == table["patient_id"][0]
    mine = np.flatnonzero(first.to_numpy())
    empty = pl.Series(np.isin(np.arange(table.height), mine[1:]))
    sparse = table.with_columns(pl.when(empty).then(None).otherwise(pl.col(name)).alias(name) for name in blank)
    counts = lesions_of_patient(sparse)
    assert counts[mine[0]] == 1, "nothing that it could be compared with"
    assert (counts[mine[1:]] == 2).all() and (counts[~first.to_numpy()] == 2).all()
