"""The synthetic set: the competition's layout, columns that agree with the pixels, and a truth that is true."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import polars as pl
import pytest

from lesionflow.data import schema, synthetic
from lesionflow.data.audit import audit
from lesionflow.data.bounds import INFORMATION, best_pauc, posterior, weighted_pauc
from lesionflow.data.cohort import GENERATOR_VERSION, TRAIT_WEIGHTS, Cohort, draw_cohort, true_log_odds
from lesionflow.data.images import decode
from lesionflow.data.source import open_source
from lesionflow.data.synthetic import synthesize
from lesionflow.errors import UsageError

FILES = {
    "train-image.hdf5", "train-metadata.csv", "test-image.hdf5", "test-metadata.csv", "sample_submission.csv",
    "truth.json",
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("synthetic") / "set"
    synthesize(out, patients=12, lesions=600, seed=5, prevalence=0.1, workers=1, progress=False)
    return out


@pytest.fixture(scope="module")
def rows(made: Path) -> pl.DataFrame:
    return pl.read_csv(made / "train-metadata.csv", infer_schema_length=None)


@pytest.fixture(scope="module")
def large() -> Cohort:
    """Many patients with few lesions each, so that no one's age sways the averages."""
    return draw_cohort(patients=8000, lesions=60_000, seed=2, prevalence=0.05)


def truth_of(out: Path) -> dict:
    return json.loads((out / "truth.json").read_text())


def images_of(path: Path) -> dict[str, bytes]:
    with h5py.File(path) as file:
        return {name: file[name][()].tobytes() for name in file}


def small(out: Path, **options) -> dict:
    return synthesize(out, **{"patients": 3, "lesions": 30, "workers": 1, "progress": False, **options})


def test_the_files_are_the_competitions(made: Path, rows: pl.DataFrame) -> None:
    test = pl.read_csv(made / "test-metadata.csv")
    submission = pl.read_csv(made / "sample_submission.csv")
    assert {p.name for p in made.iterdir()} == FILES
    assert rows.columns == list(schema.TRAIN_COLUMNS)
    assert test.columns == list(schema.TEST_COLUMNS)
    assert submission.columns == ["isic_id", "target"]
    assert submission["isic_id"].to_list() == test["isic_id"].to_list()
    assert submission["target"].unique().to_list() == [0.3]
    assert (len(rows), len(test)) == (600, 30)
    with h5py.File(made / "train-image.hdf5") as file:
        assert all(file[name].shape == () and file[name].dtype.kind == "S" for name in file)


def test_every_row_has_its_image_and_no_other(made: Path, rows: pl.DataFrame) -> None:
    assert list(images_of(made / "train-image.hdf5")) == rows["isic_id"].to_list()
    test = pl.read_csv(made / "test-metadata.csv")
    assert list(images_of(made / "test-image.hdf5")) == test["isic_id"].to_list()
    assert not set(rows["patient_id"]) & set(test["patient_id"])
    ids = pl.concat([rows["isic_id"], test["isic_id"]])
    assert ids.n_unique() == 630
    assert ids.str.contains(r"^ISIC_\d{7}$").all()
    assert rows["patient_id"].str.contains(r"^IP_\d{7}$").all()


def test_cells_hold_what_the_schema_allows(rows: pl.DataFrame) -> None:
    for column in schema.COLUMNS:
        cells = rows[column.name].drop_nulls()
        if column.values:
            assert set(cells) <= set(column.values), column.name
        if column.kind == "number" and len(cells):
            assert cells.dtype.is_numeric(), column.name
            assert column.low is None or cells.min() >= column.low, column.name
            assert column.high is None or cells.max() <= column.high, column.name


def test_the_audit_finds_no_error(made: Path) -> None:
    assert [f for f in audit(made) if f.severity == "error"] == []


def test_columns_keep_the_real_sets_formulas(rows: pl.DataFrame) -> None:
    v = {name.removeprefix("tbp_lv_"): rows[name].to_numpy() for name in rows.columns if name.startswith("tbp_lv_")}
    for left, right in (
        (v["C"], np.hypot(v["A"], v["B"])),
        (v["Hext"], np.degrees(np.arctan2(v["Bext"], v["Aext"]))),
        (v["deltaL"], v["L"] - v["Lext"]),
        (v["deltaA"], v["A"] - v["Aext"]),
        (v["deltaB"], v["B"] - v["Bext"]),
        (v["area_perim_ratio"], v["perimeterMM"] ** 2 / v["areaMM2"]),
    ):
        np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-5)
    assert v["area_perim_ratio"].min() > 4 * np.pi  # Nothing is rounder than a circle.


def test_places_agree(rows: pl.DataFrame) -> None:
    known = rows.filter(pl.col("anatom_site_general").is_not_null())
    site = {
        "Torso Back": "posterior torso", "Torso Front": "anterior torso", "Head & Neck": "head/neck",
        "Left Leg": "lower extremity", "Right Leg": "lower extremity",
        "Left Arm": "upper extremity", "Right Arm": "upper extremity",
    }  # fmt: skip
    assert known["tbp_lv_location_simple"].replace_strict(site).to_list() == known["anatom_site_general"].to_list()
    assert all(a.startswith(b) for a, b in known["tbp_lv_location", "tbp_lv_location_simple"].iter_rows())
    blank = rows.filter(pl.col("anatom_site_general").is_null())
    assert set(blank["tbp_lv_location"]) <= {"Unknown"}
    assert rows.group_by("attribution").agg(pl.col("copyright_license").n_unique())["copyright_license"].max() == 1


def test_train_only_columns_agree_with_the_target(rows: pl.DataFrame) -> None:
    malignant = rows["target"] == 1
    assert ((rows["iddx_1"] == "Malignant") == malignant).all()
    assert rows["iddx_full"].str.starts_with("Malignant::").equals(malignant)
    assert rows.filter(malignant)["lesion_id"].null_count() == 0
    thick = rows.filter(pl.col("mel_thick_mm").is_not_null())
    assert len(thick) > 0
    assert thick["iddx_3"].unique().to_list() == ["Melanoma Invasive"]


def lab(pixels: np.ndarray) -> np.ndarray:
    """sRGB to CIELAB (D65), straight from the standard."""
    c = pixels / 255
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    to_xyz = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    x = linear @ np.array(to_xyz).T / [0.95047, 1, 1.08883]
    f = np.where(x > (6 / 29) ** 3, np.cbrt(x), x / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], -1)


def test_pixels_agree_with_the_columns(made: Path, rows: pl.DataFrame) -> None:
    """Measured on decoded crops with nothing but the columns' scale: 15 mm across."""
    measured = []
    table = rows.select("isic_id", "tbp_lv_areaMM2", "tbp_lv_L", "tbp_lv_Lext").iter_rows()
    crops = images_of(made / "train-image.hdf5")
    for isic_id, area, lightness, skin_lightness in table:
        crop = lab(decode(crops[isic_id]).astype(float))
        side = len(crop)
        axis = (np.arange(side) + 0.5) * 15 / side - 7.5
        away = np.hypot(axis[:, None], axis[None, :])
        radius = np.sqrt(area / np.pi)
        core = crop[away < 0.5 * radius].mean(axis=0)
        ring = np.median(crop[(away > 2.2 * radius) & (away < 7.5)], axis=0) if radius < 3 else np.full(3, np.nan)
        near = away < min(3 * radius, 7.5)
        dark = (crop[..., 0] < (lightness + skin_lightness) / 2) & near
        measured.append([*core, *ring, dark.sum() * (15 / side) ** 2])
    values = np.array(measured)
    for position, name in enumerate(("L", "A", "B", "Lext", "Aext", "Bext")):
        column = rows[f"tbp_lv_{name}"].to_numpy()
        seen = ~np.isnan(values[:, position])
        # The middle of a lesion is not its mean: the pixel-only structure shifts A and B there on purpose.
        least = 0.95 if name in ("L", "Lext", "Aext", "Bext") else 0.5
        assert np.corrcoef(values[seen, position], column[seen])[0, 1] > least, name
    # Hair and dark skin texture count as lesion here, so only clear lesions are compared.
    clear = rows["tbp_lv_deltaL"].to_numpy() < -8
    area = rows["tbp_lv_areaMM2"].to_numpy()
    assert np.corrcoef(np.log(values[clear, 6]), np.log(area[clear]))[0, 1] > 0.9
    assert 0.8 < np.median(values[clear, 6] / area[clear]) < 1.25


def test_the_structure_is_in_the_pixels_and_in_no_column(made: Path, rows: pl.DataFrame) -> None:
    cohort = draw_cohort(patients=12, lesions=600, seed=5, prevalence=0.1)
    structure = cohort.structure[~cohort.test]
    tint = []
    crops = images_of(made / "train-image.hdf5")
    for isic_id, area in rows.select("isic_id", "tbp_lv_areaMM2").iter_rows():
        crop = lab(decode(crops[isic_id]).astype(float))
        axis = (np.arange(len(crop)) + 0.5) * 15 / len(crop) - 7.5
        away = np.hypot(axis[:, None], axis[None, :]) / np.sqrt(area / np.pi)
        tint.append(crop[(away > 0.7) & (away < 1)].mean(axis=0)[2] - crop[away < 0.5].mean(axis=0)[2])
    assert np.corrcoef(tint, structure)[0, 1] > 0.75
    for name in schema.TRAIN_COLUMNS:
        # One leaks through the label, which the structure helps to make.
        if schema.BY_NAME[name].kind == "number" and name not in schema.TRAIN_ONLY:
            known = rows[name].is_not_null().to_numpy()
            assert abs(np.corrcoef(rows[name].to_numpy()[known], structure[known])[0, 1]) < 0.2, name


def test_crops_have_the_real_ones_sizes(made: Path) -> None:
    crops = list(images_of(made / "train-image.hdf5").values())
    sides = [decode(crop).shape for crop in crops]
    assert all(height == width and 61 <= height <= 239 for height, width, _ in sides)
    assert 120 < np.median([s[0] for s in sides]) < 137
    assert 1500 < np.mean([len(c) for c in crops]) < 4500


def test_the_result_does_not_depend_on_the_workers(made: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    synthesize(again, patients=12, lesions=600, seed=5, prevalence=0.1, workers=2, progress=False)
    for name in FILES:
        assert (made / name).read_bytes() == (again / name).read_bytes(), name


def test_another_seed_is_another_set(made: Path, tmp_path: Path) -> None:
    small(tmp_path / "a", seed=1)
    small(tmp_path / "b", seed=2)
    assert (tmp_path / "a/train-image.hdf5").read_bytes() != (tmp_path / "b/train-image.hdf5").read_bytes()


GOLDEN_CELLS = "12904956d35fa3ba95769a14f1fcb6a3ebf9581c9a9cb239bcc73a06393b632c"
GOLDEN_TONES = [
    [119, 167.4, 121.5, 91.8],
    [153, 176.5, 129.2, 89.1],
    [127, 148.6, 106.6, 79.4],
    [199, 134.1, 97.6, 66.0],
]


def test_the_generator_is_frozen(tmp_path: Path) -> None:
    """Golden for version 1: every cell to 4 significant digits, and side and mean RGB of four crops.

    It covers the random streams, the cohort, all columns and coarsely the drawing; it leaves out the
    JPEG bytes and single pixels, which may differ between builds of numpy and libjpeg. A change here
    means: raise GENERATOR_VERSION, then renew both constants.
    """
    assert GENERATOR_VERSION == 1
    small(tmp_path / "set", lesions=40, seed=11, prevalence=0.2)
    frames = [pl.read_csv(tmp_path / "set" / f"{part}-metadata.csv") for part in ("train", "test")]
    cells = "\n".join(
        ",".join(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row)
        for frame in frames
        for row in frame.iter_rows()
    )
    assert hashlib.sha256(cells.encode()).hexdigest() == GOLDEN_CELLS
    crops = [decode(crop) for crop in images_of(tmp_path / "set/train-image.hdf5").values()][:4]
    tones = [[crop.shape[0], *crop.mean(axis=(0, 1))] for crop in crops]
    np.testing.assert_allclose(tones, GOLDEN_TONES, atol=1.0)


@pytest.mark.parametrize(("prevalence", "expected"), [(0.1, 60), (0.001, 1), (0.5, 300), (0, 0)])
def test_the_number_of_malignant_lesions_is_exact(prevalence: float, expected: int) -> None:
    cohort = draw_cohort(patients=12, lesions=600, seed=0, prevalence=prevalence)
    train = ~cohort.test
    assert cohort.target[train].sum() == expected
    assert cohort.probability[train].sum() == pytest.approx(expected, abs=1e-6)


def test_patients_have_heavy_tailed_counts() -> None:
    cohort = draw_cohort(patients=1042, lesions=401_059, seed=0, prevalence=0.001)
    train = ~cohort.test
    counts = np.bincount(cohort.patient[train])
    assert (train.sum(), len(counts), counts.min() >= 1) == (401_059, 1042, True)
    assert 180 < np.median(counts) < 300
    assert 3000 < counts.max() < 30_000
    assert cohort.target[train].sum() == 401
    assert len(np.unique(cohort.number)) == len(cohort.number)
    assert cohort.number.max() < 10_000_000


def test_labels_follow_the_true_probability(large: Cohort) -> None:
    order = np.argsort(large.probability)
    for part in np.array_split(order, 20):
        expected = large.probability[part].sum()
        spread = np.sqrt((large.probability[part] * (1 - large.probability[part])).sum())
        assert abs(large.target[part].sum() - expected) < 4 * spread + 1
    np.testing.assert_allclose(
        np.log(large.probability / (1 - large.probability)), true_log_odds(large) + large.intercept, rtol=1e-6
    )


def test_every_posterior_is_calibrated(large: Cohort) -> None:
    """What the bounds are computed from is P(y | information): labels agree with it in every twentieth."""
    for information in INFORMATION:
        p = posterior(large, information)
        for part in np.array_split(np.argsort(p), 20):
            spread = np.sqrt((p[part] * (1 - p[part])).sum())
            assert abs(large.probability[part].sum() - p[part].sum()) < 4 * spread + 0.02 * p[part].sum(), information


@pytest.mark.parametrize("seed", range(4))
def test_more_information_ranks_better(seed: int) -> None:
    cohort = draw_cohort(patients=40, lesions=2000, seed=seed, prevalence=0.05)
    best, _ = best_pauc(cohort, ~cohort.test)
    assert best["images"] < best["all"] - 0.02
    assert best["metadata"] < best["patient_context"] - 0.005
    assert best["patient_context"] < best["all"] - 0.01
    assert all(0.11 < value < 0.19 for value in best.values())


def test_no_single_column_does_as_well_as_its_bound(large: Cohort) -> None:
    """The patient's other lesions matter: the true oddness beats the look that a single row shows."""
    p = large.probability
    look, deviation = large.look @ TRAIT_WEIGHTS, large.deviation @ TRAIT_WEIGHTS
    assert weighted_pauc(p, 1 - p, deviation) > weighted_pauc(p, 1 - p, look) + 0.01


def test_expected_pauc_is_the_metric_on_certain_labels() -> None:
    """Vectors of the competition's metric: V1, V2 (ties), V4 and V12."""
    for y, s, expected in (
        ([0, 0, 0, 1, 1], [0.1, 0.2, 0.3, 0.8, 0.9], 0.2),
        ([0, 0, 0, 1, 1], [0.5] * 5, 0.02),
        ([1, 0] * 5, [0.95, 0.90, 0.85, 0.80, 0.75, 0.60, 0.55, 0.40, 0.35, 0.10], 0.04),
        ([1, 0, 1, 0, 0, 1, 0], [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3], 0.05),
    ):
        case = np.array(y, float)
        assert weighted_pauc(case, 1 - case, np.array(s)) == pytest.approx(expected, abs=1e-9)


def test_the_expected_pauc_is_the_mean_over_labels() -> None:
    rng = np.random.default_rng(0)
    score = rng.standard_normal(3000)
    p = 1 / (1 + np.exp(3 - 1.5 * score))
    drawn = [(rng.random(3000) < p).astype(float) for _ in range(200)]
    mean = np.mean([weighted_pauc(y, 1 - y, score) for y in drawn])
    assert weighted_pauc(p, 1 - p, score) == pytest.approx(mean, abs=0.002)


def test_blank_cells_say_nothing_of_the_label(large: Cohort) -> None:
    y = large.target
    age, sex = large.age_blank[large.patient], large.sex_blank[large.patient]
    assert 0.005 < large.site_blank.mean() < 0.03
    assert sex.any()
    for blank in (large.site_blank, sex, age):
        if blank.any():
            # Whole patients are blank, so what is compared is the label with its probability, not with the mean.
            expected = large.probability[blank]
            assert abs(y[blank].sum() - expected.sum()) < 4 * np.sqrt((expected * (1 - expected)).sum())
    rate = y[large.site_blank].mean()
    assert abs(rate - y.mean()) < 4 * np.sqrt(y.mean() / large.site_blank.sum())


def test_the_truth_names_every_lesion(made: Path, rows: pl.DataFrame) -> None:
    truth = truth_of(made)
    test = pl.read_csv(made / "test-metadata.csv")["isic_id"].to_list()
    assert "Synthetic" in truth["about"]
    assert truth["parameters"]["seed"] == 5
    assert truth["parameters"]["generator"] == GENERATOR_VERSION
    assert sorted(truth["probability"]) == sorted([*rows["isic_id"], *test])
    assert set(truth["malignant_in_test"]) <= set(test)
    assert truth["malignant"] == {"train": 60, "test": len(truth["malignant_in_test"])}
    p = np.array([truth["probability"][i] for i in rows["isic_id"]])
    assert p.sum() == pytest.approx(60, abs=0.01)
    assert set(truth["best_pauc"]) == set(truth["best_pauc_of_these_labels"]) == set(INFORMATION)


def test_repeated_images_keep_their_own_metadata(tmp_path: Path) -> None:
    result = small(tmp_path / "set", patients=5, lesions=700, repeat_bytes=True)
    images = images_of(tmp_path / "set/train-image.hdf5")
    rows = pl.read_csv(tmp_path / "set/train-metadata.csv")
    assert len(images) == 700
    assert len(set(images.values())) <= synthetic.POOL
    assert rows["tbp_lv_areaMM2"].n_unique() > 690
    # An image then tells nothing, and the truth says so.
    assert result["best_pauc"]["images"] == pytest.approx(0.02)
    assert result["best_pauc"]["all"] == result["best_pauc"]["patient_context"]


def test_the_same_request_keeps_the_set(tmp_path: Path) -> None:
    out = tmp_path / "set"
    first = small(out)
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    second = small(out)
    assert {p.name: p.stat().st_mtime_ns for p in out.iterdir()} == before
    assert second == {k: v for k, v in first.items() if k != "lesions_per_second"}


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "set"
    small(out)
    with pytest.raises(UsageError, match="another synthetic set"):
        small(out, seed=1)
    with (out / "train-metadata.csv").open("a") as file:
        file.write("x\n")
    with pytest.raises(UsageError, match="changed"):
        small(out)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="not empty"):
        small(tmp_path / "mine")
    with pytest.raises(UsageError, match="a file"):
        small(tmp_path / "mine/thesis.txt")
    assert (tmp_path / "mine/thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("fault", [KeyboardInterrupt, OSError])
def test_an_interrupted_run_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: type[BaseException]
) -> None:
    calls = []

    def stop(*arguments: object) -> None:
        calls.append(arguments)
        raise fault

    monkeypatch.setattr(synthetic, "_truth", stop)
    with pytest.raises(fault):
        small(tmp_path / "set")
    assert len(calls) == 1
    assert list((tmp_path / "set").iterdir()) == []


def test_a_killed_run_is_made_anew(tmp_path: Path, made: Path) -> None:
    """Killed between two renames: a partial folder, some files, no truth."""
    out = tmp_path / "set"
    (out / ".lesionflow-partial-x").mkdir(parents=True)
    shutil.copy(made / "train-metadata.csv", out)
    small(out)
    assert {p.name for p in out.iterdir()} == FILES
    assert len(pl.read_csv(out / "train-metadata.csv")) == 30


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"patients": 1}, "patients must be between 2"),
        ({"lesions": 2}, "lesions must be between patients"),
        ({"lesions": 6_000_000}, "5000000"),
        ({"prevalence": 0.6}, "prevalence must be between 0 and 0.5"),
        ({"prevalence": -0.1}, "prevalence"),
        ({"prevalence": float("nan")}, "prevalence"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"workers": 0}, "workers must be at least 1"),
    ],
)
def test_a_bad_argument_is_named_with_its_bound(tmp_path: Path, options: dict, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        small(tmp_path / "set", **options)
    assert not (tmp_path / "set").exists()


def test_the_smallest_set_can_be_read(tmp_path: Path) -> None:
    small(tmp_path / "set", patients=2, lesions=2, prevalence=0.5)
    with open_source(tmp_path / "set") as source:
        assert [name for name, _ in source.images(source.ids)] == source.ids


def test_nobody_has_most_of_a_small_set() -> None:
    shares = []
    for seed in range(300):
        cohort = draw_cohort(patients=5, lesions=500, seed=seed, prevalence=0.1)
        counts = np.bincount(cohort.patient[~cohort.test])
        shares.append(counts.max() / counts.sum())
    assert max(shares) < 0.42
    assert max(shares) > 0.39, "the bound is met, so that it is tested"
