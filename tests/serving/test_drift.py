"""Drift is named where it was planted, hardly ever where there is none, and a bundle knows its own hold-out."""

from __future__ import annotations

import json
import re
import shutil
import threading
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from scipy import stats
from typer.testing import CliRunner

from lesionflow import keys
from lesionflow.bundle import Bundle, write_manifest
from lesionflow.cli import app
from lesionflow.data.store import Store
from lesionflow.errors import DataError, UsageError
from lesionflow.serving import driftreference
from lesionflow.serving.drift import ALPHA, Drift, Shift, Sums, adjusted, student_p
from lesionflow.serving.driftfigures import Figures, Population, observed, populations
from lesionflow.serving.driftreference import grouped, intraclass, reference, served_modes, visit_sizes
from lesionflow.serving.driftreport import OWN, WHOLE, drift_files, render
from lesionflow.serving.predictor import CANNOT_JUDGE, Predictor
from lesionflow.serving.visit import Visits

PICTURE = ("brightness", "contrast", "red_green", "flat")


def cohort(rng: np.random.Generator, patients: int, clinic: str | None = "A") -> tuple[list[str], dict]:
    """Lesions whose figures are alike within a patient: intraclass correlations of 0.5, 0.2, 0.05; some tied."""
    size = np.maximum(1, np.round(10 * rng.lognormal(0, 0.8, patients))).astype(int)
    patient = np.repeat(np.arange(patients), size)
    n = len(patient)

    def alike(correlation: float) -> np.ndarray:
        return correlation**0.5 * rng.normal(size=patients)[patient] + (1 - correlation) ** 0.5 * rng.normal(size=n)

    seen = {name: alike(r) for name, r in zip(PICTURE, (0.5, 0.2, 0.05, 0.3), strict=True)}
    seen["flat"] = np.maximum(seen["flat"], 0)
    score, unknown = alike(0.3), (rng.random(patients) < 0.05)[patient]
    table = pl.DataFrame({
        "isic_id": [f"ISIC_{one:04d}_{row}" for row, one in enumerate(patient)],
        "patient_id": [f"IP_{one:05d}" for one in patient],
        "attribution": pl.Series([clinic] * n, dtype=pl.String),
        "age_approx": 5 * np.round(11 + 3 * rng.normal(size=patients))[patient],
        "tbp_lv_A": pl.Series(np.where(unknown, np.nan, np.exp(alike(0.4)))).fill_nan(None),
        "tbp_tile_type": rng.choice(["3D: XP", "3D: white"], patients, p=[0.7, 0.3])[patient],
        "anatom_site_general": rng.choice(["torso", "head/neck", "leg"], n),
    })  # fmt: skip
    return table["patient_id"].to_list(), {
        "statistics": seen,
        "logits": {"image": score},
        "bands": ["refer" if one > 1.5 else "low" for one in score],
        "metadata": table,
    }


def known_of(patients: int = 150, seed: int = 0, **changes) -> dict:
    groups, of = cohort(np.random.default_rng(seed), patients)
    return reference(groups, changes.pop("table", of["metadata"].drop("attribution")), **(of | changes))


def held(known: dict, groups: list[str], of: dict) -> list[Shift]:
    figures, tests = populations(known)
    owner, count = grouped(groups)
    sizes = visit_sizes(owner, np.ones(len(owner), bool))
    sums = Sums(tests[""])
    sums.add(figures.codes(observed(of["statistics"], of["logits"], of["bands"], of["metadata"], sizes), len(owner)),
             owner, count)  # fmt: skip
    return adjusted(sums.shifts())


def named(shifts: list[Shift]) -> set[str]:
    return {one.figure for one in shifts if one.shifted}


@pytest.fixture(scope="module")
def known() -> dict:
    return known_of()


def test_nothing_is_named_where_nothing_changed() -> None:
    # 200 hold-outs, each with new patients of the same kind. Lesions taken for independent would be named in most.
    rejected, p = 0, []
    for seed in range(200):
        rng = np.random.default_rng([seed, 1])
        groups, of = cohort(rng, 60)
        known = reference(groups, of["metadata"].drop("attribution"), **of)
        shifts = held(known, *cohort(rng, (15, 60)[seed % 2]))
        p += [one.p for one in shifts if one.p is not None]
        rejected += any(one.adjusted <= ALPHA for one in shifts if one.adjusted is not None)
    # By chance up to 17 of 200 at 5 % (99 %); the p-values are those of a test, and not of one that never speaks.
    assert rejected <= 17
    assert 0.02 < np.mean(np.array(p) < 0.05) < 0.06
    assert 0.3 < np.median(p) < 0.7


@pytest.mark.parametrize(
    ("change", "figure"),
    [
        (lambda of: of["statistics"].update(brightness=of["statistics"]["brightness"] + 1), "picture brightness"),
        (lambda of: of["statistics"].update(contrast=of["statistics"]["contrast"] * 1.7), "picture contrast"),
        (lambda of: of["logits"].update(image=of["logits"]["image"] - 1), "score image"),
        (lambda of: of.update(bands=["low" if row % 3 else "refer" for row in range(len(of["bands"]))]), "band"),
        (lambda of: of.update(metadata=of["metadata"].with_columns(tbp_tile_type=pl.lit("3D: new"))),
         "metadata tbp_tile_type"),
        (lambda of: of.update(metadata=of["metadata"].with_columns(tbp_tile_type=pl.lit("3D: white"))),
         "metadata tbp_tile_type"),
        (lambda of: of.update(metadata=of["metadata"].drop("age_approx")), "missing age_approx"),
        (lambda of: of.update(metadata=of["metadata"].with_columns(pl.col("tbp_lv_A") * 3)), "metadata tbp_lv_A"),
    ],
)  # fmt: skip
def test_what_was_planted_is_named_and_nothing_else(known, change, figure) -> None:
    for seed in (1, 2, 3):
        groups, of = cohort(np.random.default_rng([seed, 2]), 100)
        change(of)
        assert named(held(known, groups, of)) == {figure}


def test_few_patients_and_trifles_name_nothing(known) -> None:
    groups, of = cohort(np.random.default_rng(3), 9)
    of["statistics"]["red_green"] += 3
    assert all(one.p is None and not one.shifted for one in held(known, groups, of))
    # Beyond doubt, but a twentieth of a standard deviation is no news.
    clear = [Shift("picture x", "level", 0.5, 0.515, 900, 9e4, 1e-30), Shift("band", "low", 0.5, 0.52, 900, 9e4, 1e-30)]
    assert [one.adjusted <= 1e-29 and not one.shifted for one in adjusted(clear)] == [True, True]


def test_a_lesion_more_of_a_known_patient_is_worth_less_than_a_patient(known) -> None:
    figures, tests = populations(known)
    place = tests[""].names.index(("picture brightness", "level"))
    worth = []
    for owner in (np.zeros(100, np.int64), np.arange(100)):
        sums = Sums(tests[""])
        x = {name: np.random.default_rng(0).normal(size=100) for name in PICTURE}
        sums.add(figures.codes(observed(x), 100), owner, owner.max() + 1)
        worth.append(sums.w[place])
    assert worth[0] == pytest.approx(100 / (1 + 99 * tests[""].alike[place]))
    assert worth[1] == pytest.approx(100)


def test_level_and_effective_number_are_those_of_the_textbook(known) -> None:
    groups, of = cohort(np.random.default_rng(8), 60)
    of["statistics"]["red_green"] += np.random.default_rng(9).normal(0, 2, 60)[grouped(groups)[0]]
    figures, tests = populations(known)
    (one,) = (s for s in held(known, groups, of) if (s.figure, s.test) == ("picture red_green", "level"))
    place = tests[""].names.index(("picture red_green", "level"))
    # The probability to lie above a lesion of the hold-out, ties counted half, lesion by lesion of the bins.
    edges = figures.edges["picture red_green"]
    shares = np.array(known["whole"]["figures"]["picture red_green"]["shares"])
    bins = np.searchsorted(edges, of["statistics"]["red_green"], side="right")
    above = np.array([shares[:b].sum() + shares[b] / 2 for b in bins])
    owner = grouped(groups)[0]
    n = np.bincount(owner)
    y = np.bincount(owner, above) / n
    w = n / (1 + (n - 1) * tests[""].alike[place])
    mean = (w * y).sum() / w.sum()
    variance = (w**2 * (y - mean) ** 2).sum() / w.sum() ** 2 * 60 / 59
    assert one.usual == pytest.approx(0.5, abs=1e-4) and one.value == pytest.approx(mean)
    assert one.effective == pytest.approx(tests[""].variance[place] / variance)
    assert one.effective < w.sum() / 2  # These patients vary more among each other than the hold-out's.


def test_a_category_that_was_never_seen_is_no_known_one(known) -> None:
    groups, of = cohort(np.random.default_rng(7), 100)
    tile = of["metadata"]["tbp_tile_type"]
    of["metadata"] = of["metadata"].with_columns(tbp_tile_type=tile.replace("3D: XP", "dermatoscope"))
    found = {one.test: one for one in held(known, groups, of) if one.figure == "metadata tbp_tile_type"}
    assert found["other"].shifted and found["other"].usual == 0 and found["other"].value > 0.5
    assert found["3D: XP"].shifted and found["3D: XP"].value == 0
    assert found["other"].words.startswith("other: ")


def test_likeness_is_the_intraclass_correlation() -> None:
    rng = np.random.default_rng(4)
    size = rng.integers(1, 30, 80)
    patient = np.repeat(np.arange(80), size)
    code = (rng.integers(0, 6, 80)[patient] + rng.integers(0, 3, len(patient))) % 6
    shares = np.array([np.bincount(code[patient == one], minlength=6) / size[one] for one in range(80)])
    score = rng.normal(size=6)
    y = score[code]
    means = np.array([y[patient == one].mean() for one in range(80)])
    between = (size * (means - y.mean()) ** 2).sum() / 79
    within = ((y - means[patient]) ** 2).sum() / (len(y) - 80)
    each = (len(y) - (size**2).sum() / len(y)) / 79
    assert intraclass(size.astype(float), shares, score) == pytest.approx(
        (between - within) / (between + (each - 1) * within)
    )
    assert intraclass(np.ones(9), shares[:9], score) == 1.0  # Single lesions say nothing of likeness.


def test_p_values_are_students_and_holms() -> None:
    for t, freedom in ((0.0, 5), (1.3, 2.5), (-4.2, 40), (9.0, 300)):
        assert student_p(t, freedom) == pytest.approx(2 * stats.t.sf(abs(t), freedom), rel=1e-9)
    shifts = [Shift("x", "level", 0.5, 0.9, 50, 50, p) for p in (0.01, 0.04, 0.03, None, 0.005)]
    assert [one.adjusted for one in adjusted(shifts)] == pytest.approx([0.03, 0.06, 0.06, None, 0.02])
    assert [one.shifted for one in adjusted(shifts)] == [True, False, False, False, True]


def test_the_reference_names_no_one(known) -> None:
    of = cohort(np.random.default_rng(0), 150)[1]
    text = json.dumps(known, allow_nan=False)
    assert not re.search(r"ISIC_|IP_", text)
    # No value of one lesion: a number has its quantiles from 5 to 95 %, and shares are of many.
    edges = known["figures"]["metadata tbp_lv_A"]["edges"]
    values = of["metadata"]["tbp_lv_A"].drop_nulls().to_numpy()
    assert len(edges) == 19 and values.min() < edges[0] and edges[-1] < values.max()
    assert len(text) < 40_000


def test_a_small_holdout_says_why_it_is_none() -> None:
    groups, of = cohort(np.random.default_rng(0), 19)
    known = reference(groups, of["metadata"], **of)
    assert "of 19 patients" in known["reason"]
    with pytest.raises(DataError, match=r"no reference .* of 19 patients.* folds.holdout"):
        Drift(known)


def test_malignant_lesions_are_as_rare_as_in_service() -> None:
    y = np.r_[np.ones(100), np.zeros(900)]
    rows = driftreference.usual_rows(y, 0.01)
    assert (y[rows] == 0).sum() == 900 and y[rows].sum() == 9 and (np.diff(rows) > 0).all()
    assert len(driftreference.usual_rows(y, 0.5)) == len(driftreference.usual_rows(y, None)) == 1000


def test_pictures_of_every_patient_are_looked_at() -> None:
    groups = ["big"] * 500 + [f"P{one // 2}" for one in range(100)]
    drawn = driftreference.draw_pictures(groups, each=20, most=1000)
    assert len(drawn) == 120 and (drawn < 500).sum() == 20 and (np.diff(drawn) > 0).all()
    assert len({groups[row] for row in driftreference.draw_pictures(groups, each=20, most=51)}) == 51


def test_an_institution_is_held_against_its_own_part(tmp_path) -> None:
    rng = np.random.default_rng(5)
    (first, a), (second, b) = cohort(rng, 80, "A"), cohort(rng, 80, "B")
    b["statistics"]["red_green"] += 3  # B's camera: so it was in the hold-out, and so it is now.
    merged = {
        "statistics": {name: np.r_[a["statistics"][name], b["statistics"][name]] for name in PICTURE},
        "logits": {"image": np.r_[a["logits"]["image"], b["logits"]["image"]]},
        "bands": a["bands"] + b["bands"],
        "metadata": pl.concat([a["metadata"], b["metadata"]]),
    }
    groups = [f"a{one}" for one in first] + [f"b{one}" for one in second]
    known = reference(groups, merged["metadata"], **merged)
    assert set(known["institutions"]) == {"A", "B"}
    new, of = cohort(rng, 100, "B")
    of["statistics"]["red_green"] += 3
    own = {**known, "whole": known["institutions"]["B"]}
    assert named(held(own, new, of)) == set()
    assert named(held(known, new, of)) == {"picture red_green"}
    # The service does the same, and a name that it doesn't know is no label.
    drift = Drift(known, window=50)
    for name, rows in of["metadata"].with_row_index().group_by("patient_id"):
        at = rows["index"].to_numpy()
        drift.add(
            {k: x[at] for k, x in of["statistics"].items()}, {"image": of["logits"]["image"][at]},
            bands=[of["bands"][i] for i in at], table=of["metadata"][at],
            institution="B" if hash(name) % 3 else "</label> evil",
        )  # fmt: skip
    gauges = drift.gauges()
    assert {one.labels["institution"] for one in gauges} == {"", "A", "B"}
    shifted = {one.labels["institution"]: one.value for one in gauges if one.name == "shifted"}
    assert shifted[""] >= 1 and shifted["B"] == 0 and "A" not in shifted


def test_patient_by_patient_and_thread_by_thread_says_what_all_at_once_does(known) -> None:
    groups, of = cohort(np.random.default_rng(6), 80)
    of["statistics"]["brightness"] += 0.7
    expected = {(one.figure, one.test): one for one in held(known, groups, of)}
    drift = Drift(known, window=80)
    owner, count = grouped(groups)

    def add(patients: range) -> None:
        for one in patients:
            at = np.flatnonzero(owner == one)
            drift.add(
                {k: x[at] for k, x in of["statistics"].items()}, {"image": of["logits"]["image"][at]},
                bands=[of["bands"][i] for i in at], table=of["metadata"][at],
            )  # fmt: skip

    threads = [threading.Thread(target=add, args=(range(start, count, 4),)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gauges = {(one.name, one.labels.get("figure"), one.labels.get("test")): one.value for one in drift.gauges()}
    assert gauges["windows", None, None] == 1 and gauges["patients", None, None] == 0
    assert gauges["shifted", None, None] >= 1
    shifts = {key[1:]: value for key, value in gauges.items() if key[0] == "shift"}
    assert shifts.keys() == expected.keys()
    for key, value in shifts.items():
        assert value == pytest.approx(expected[key].value - expected[key].usual, abs=1e-9), key
    assert "ISIC" not in repr(vars(drift)) and not drift._waiting  # Nothing of a patient stays.


def test_requests_with_pictures_alone_and_odd_numbers_are_taken(known) -> None:
    drift = Drift(known, window=12)
    for value in (0.0, np.nan, np.inf, -np.inf, 1e308) * 3:
        drift.add({name: np.array([value]) for name in PICTURE}, {"image": np.array([value])}, bands=[None])
    drift.add(None, {"image": np.zeros(0)})
    gauges = drift.gauges()
    assert all(np.isfinite(one.value) for one in gauges)
    assert {"windows": 1.0, "patients": 0.0}.items() <= {g.name: g.value for g in gauges if g.name != "shift"}.items()


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        (["figures", "picture flat", "edges"], [2.0, 1.0], "edges must rise"),
        (["figures", "picture flat", "edges"], [float(n) for n in range(200)], "201 bins"),
        (["figures", "picture flat", "kind"], "magic", "no kind 'magic'"),
        (["whole", "figures", "picture flat", "shares"], [1.0], "shares must be"),
        (["whole", "figures", "picture flat", "tests", "level", "alike"], 7.0, "alike"),
        (["whole", "figures", "picture flat", "tests", "level", "mean"], float("nan"), "finite"),
        (["whole", "figures", "picture flat", "tests", "magic"], {}, "magic"),
        (["whole", "patients"], None, "int"),
        (["institutions"], {str(n): {} for n in range(99)}, "64 institutions"),
        (["figures"], {f"f{n}": {"kind": "missing"} for n in range(300)}, "300 figures"),
        (["figures"], None, "NoneType"),
    ],
)
def test_a_damaged_reference_is_refused_by_what_is_wrong(known, path, value, told) -> None:
    known = json.loads(json.dumps(known))
    place = known
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    with pytest.raises(DataError, match=rf"bundle.json: drift can't be used .*{told}.*export the bundle again"):
        Drift(known)


@pytest.fixture(scope="module")
def referenced(finished: Path, tmp_path_factory) -> tuple[Path, list[str]]:
    """The finished run's bundle with a reference in spite of its few patients, and the ids that it is of."""
    from lesionflow.models.image import preprocess_spec
    from lesionflow.pack import _drift
    from lesionflow.plan import recipe_of

    out = Path(shutil.copytree(finished / "bundle", tmp_path_factory.mktemp("drift") / "bundle"))
    info = keys.read_json(out / "bundle.json")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driftreference, "FEWEST_PATIENTS", 2)
        patch.setattr(driftreference, "FEWEST_LESIONS", 20)
        # Leaving malignant lesions out would leave the others with less company than they were scored in.
        everyone = info | {"calibration": info["calibration"] | {"prevalence": None}}
        info["drift"] = _drift(finished, Store.open(finished / "store"), preprocess_spec(recipe_of(finished)), everyone)
    keys.write_json(out / "bundle.json", info)
    write_manifest(out)
    return out, pl.read_parquet(finished / "holdout.parquet")["isic_id"].to_list()


def test_export_writes_the_reference_and_says_why_there_is_none(finished: Path) -> None:
    drift = Bundle.open(finished / "bundle").info["drift"]
    assert "patients" in drift["reason"] and drift["figures"] == {}


def test_a_bundle_sees_in_its_holdout_what_it_says(referenced, synthetic: Path, tmp_path) -> None:
    """The reference comes from the evaluation's scores, the report from the served graph, trees and bands."""
    bundle, ids = referenced
    table = pl.read_csv(synthetic / "train-metadata.csv", infer_schema=False).filter(pl.col("isic_id").is_in(ids))
    table.write_csv(tmp_path / "held.csv")
    report = drift_files(bundle, synthetic, metadata=tmp_path / "held.csv", part="train", progress=False)
    whole = report["institutions"][0]
    assert (report["lesions"], whole["institution"], whole["against"]) == (len(ids), None, WHOLE)
    assert report["patients"] == report["reference"]["patients"] and report["shifted"] == 0
    kinds = {figure["figure"].split()[0] for figure in whole["figures"]}
    assert kinds == {"picture", "score", "band", "metadata", "missing", "lesions"}
    own = [one for one in report["institutions"] if one["against"] == OWN]
    assert own and whole not in own
    for figure in [figure for one in (whole, *own) for figure in one["figures"]]:
        # A score in its last digits may fall into the next bin.
        assert figure["value"] == pytest.approx(figure["usual"], abs=0.005), figure


def test_lesions_are_scored_the_way_that_visits_choose(referenced, finished: Path) -> None:
    visits = Visits(Predictor(referenced[0]))
    table = Store.open(finished / "store").table[:60]
    some = pl.int_range(60)
    table = table.with_columns(
        pl.when(some % 3 > 0).then(pl.col(name)) for name in table.columns if name.startswith("tbp_lv_")
    ).with_columns(patient_id=pl.when(some < 40).then(pl.col("patient_id")))
    logits = np.where((np.arange(60) % 4 > 0)[:, None], 0.5, np.nan) * np.ones((1, 2))
    scores = visits.score(logits, table)
    modes = served_modes(list(visits.modes), table, np.isfinite(logits[:, 0]))
    assert modes == scores.mode and len(set(modes)) >= 5


def test_what_cannot_be_judged_is_a_band() -> None:
    info = {"thresholds": {"refer": {"logit": 1.0}}}
    logits = {"image": np.array([2.0, 0.0, 2.0, np.nan])}
    bands = driftreference.served_bands(logits, None, [False, False, True, False], info, pictures=True)
    assert bands == ["refer", "routine", CANNOT_JUDGE, None]


def test_the_command_reports_shifts_and_can_refuse(referenced, synthetic: Path, tmp_path) -> None:
    bundle, _ = referenced
    table = pl.read_csv(synthetic / "train-metadata.csv", infer_schema=False)
    table.with_columns(tbp_lv_L=pl.lit("95"), age_approx=pl.lit(None)).write_csv(tmp_path / "new.csv")
    run, out = CliRunner(), tmp_path / "report.json"
    done = run.invoke(app, ["drift", str(bundle), str(tmp_path / "new.csv"), "--out", str(out), "-q"])
    assert done.exit_code == 0, done.output
    assert "metadata tbp_lv_L: higher, above the usual lesion in" in " ".join(done.output.split())
    report = json.loads(out.read_text())
    assert report["notice"] == "Not a medical device." and report["shifted"] >= 2
    assert report["tested"] == sum(one["tested"] for one in report["institutions"])
    shifted = {f["figure"] for one in report["institutions"] for f in one["figures"] if f["shifted"]}
    assert {"metadata tbp_lv_L", "missing age_approx"} <= shifted
    refused = run.invoke(app, ["drift", str(bundle), str(tmp_path / "new.csv"), "-q", "--strict"])
    assert refused.exit_code != 0 and "have shifted" in str(refused.exception)
    few = [one for one in report["institutions"] if one["patients"] < 10]
    assert few and all(one["tested"] == 0 and "under 10 nothing is tested" in one["reason"] for one in few)


def test_unusable_pictures_are_counted_and_the_rest_is_reported(referenced, encode, tmp_path) -> None:
    for number in range(12):
        (tmp_path / f"L{number}.jpg").write_bytes(encode(number))
    (tmp_path / "broken.jpg").write_bytes(encode(99)[:300])
    report = drift_files(referenced[0], tmp_path, progress=False)
    assert report["lesions"] == 13 and report["lesions_without_patient"] == 13
    assert report["unusable"]["count"] == 1 and "broken" in report["unusable"]["first"]
    figures = {one["figure"]: one for one in report["institutions"][0]["figures"]}
    assert figures["picture brightness"]["patients"] == 12 and figures["metadata age_approx"]["value"] is None
    text = "".join(str(line) for line in render(report).renderables)
    assert "The patient of 13 is unknown" in text and "1 pictures can't be used" in text


def test_what_cannot_be_held_against_anything_is_refused(finished, referenced, bundle_dir, synthetic, tmp_path) -> None:
    with pytest.raises(DataError, match=r"no reference to hold lesions against.*lesionflow export RUN"):
        drift_files(bundle_dir, synthetic, progress=False)
    with pytest.raises(DataError, match=r"no reference .* patients"):
        drift_files(finished / "bundle", synthetic, progress=False)
    with pytest.raises(UsageError, match=r"--part valid: train or test"):
        drift_files(referenced[0], synthetic, part="valid", progress=False)
    with pytest.raises(UsageError, match="alpha = 5"):
        drift_files(referenced[0], synthetic, alpha=5, progress=False)
    for table, told in (("isic_id\nx\n", None), ("isic_id,age_approx\nx,old\n", "age_approx")):
        (tmp_path / "odd.csv").write_text(table)
        if told:
            with pytest.raises(DataError, match=told):
                drift_files(referenced[0], tmp_path / "odd.csv", progress=False)
        else:
            assert drift_files(referenced[0], tmp_path / "odd.csv", progress=False)["shifted"] == 0


def test_a_population_is_tested_of_what_it_knows(known) -> None:
    figures = Figures(known["figures"])
    tests = Population(figures, {**known["whole"], "figures": {"band": known["whole"]["figures"]["band"]}})
    assert {figure for figure, _ in tests.names} == {"band"} and len(tests) == 2


def test_metadata_that_is_no_figure_is_no_metadata(known) -> None:
    _, of = cohort(np.random.default_rng(7), 2)
    count = len(of["metadata"])
    drift = Drift(known)
    for table in (of["metadata"], of["metadata"].select("patient_id"), of["metadata"].select(own=pl.lit("x"))):
        drift.add(None, {"image": of["logits"]["image"][: len(table)]}, bands=of["bands"][: len(table)], table=table)
    assert {one.value for one in drift.gauges() if one.name == "patients" and not one.labels["institution"]} == {3.0}
    assert count > 1
