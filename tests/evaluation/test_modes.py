"""Modes: each way to score a lesion has its own figures and thresholds; what a part adds is measured in pairs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import polars as pl
import pytest

from lesionflow import recipe
from lesionflow.errors import DataError
from lesionflow.evaluation import calibration, paired
from lesionflow.evaluation.evaluate import evaluate
from lesionflow.evaluation.metrics import fold_rank, pauc
from lesionflow.evaluation.paired import compare_scores, compare_several
from lesionflow.evaluation.ranking import MEASURES, ranking
from lesionflow.recipe import Evaluation

MODES = tuple(recipe.MODES)

SCHEMA = json.loads((Path(__file__).parents[2] / "docs" / "metrics.schema.json").read_text())
OPTIONS = Evaluation(replicates=200)
STRENGTH = {"image": 1.6, "record": 1.8, "visit": 2.2, "image_record": 2.5, "image_visit": 3.0}


def tables(modes: tuple[str, ...] = MODES, seed: int = 0, lesions: int = 2400) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Three folds and a hold-out; each mode finds malignant lesions a little better than the one before."""
    rng = np.random.default_rng(seed)
    y = (rng.random(lesions) < 0.1).astype(np.int8)
    owner = rng.integers(0, 300, lesions)
    side = owner % 4 - 1
    common = rng.normal(size=lesions)
    scores = {m: common + rng.normal(size=lesions) * 0.6 + STRENGTH[m] * y - 3 for m in modes}
    columns = {f"{m}_logit": s + 0.3 * np.maximum(side, 0) for m, s in scores.items()}
    whole = pl.DataFrame({
        "isic_id": [f"ISIC_{i:07}" for i in range(lesions)], "patient_group": [f"IP_{i}" for i in owner],
        "target": y, "fold": side.astype(np.int8), "fold_hash": ["abc"] * lesions, **columns,
        "logit": columns[f"{modes[-1]}_logit"],
    })  # fmt: skip
    held = whole.filter(pl.col("fold") < 0).with_columns(doubts=pl.lit([], pl.List(pl.String)))
    return whole.filter(pl.col("fold") >= 0), held


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return evaluate(*tables(), OPTIONS, margin=0.001)


def test_every_mode_has_its_figures_and_what_is_served_is_the_headline(found: dict[str, Any]) -> None:
    oof, holdout = tables()
    modes = found["modes"]
    assert modes["served"] == "image_visit"
    assert tuple(modes["each"]) == MODES
    for name, one in modes["each"].items():
        ranks = fold_rank(oof[f"{name}_logit"], oof["fold"])
        assert one["out_of_fold"]["pauc"]["value"] == pytest.approx(pauc(oof["target"], ranks), abs=1e-12)
        assert one["holdout"]["pauc"]["value"] == pytest.approx(
            pauc(holdout["target"], holdout[f"{name}_logit"]), abs=1e-12
        )
        assert one["out_of_fold"]["auc"]["interval"]["low"] is not None
    served = modes["each"]["image_visit"]
    assert served["difference"] is None
    assert served["out_of_fold"] == {name: found[name]["rank_pooled"] for name in ("pauc", "auc")}
    assert served["holdout"] == {name: found["served"][name] for name in ("pauc", "auc")}
    assert served["thresholds"] == found["served"]["thresholds"]
    assert served["probability"] == found["probability"]


def test_a_degraded_mode_has_its_own_line_and_thresholds(found: dict[str, Any]) -> None:
    _, holdout = tables()
    for name, one in found["modes"]["each"].items():
        y, s = holdout["target"].to_numpy(), holdout[f"{name}_logit"].to_numpy()
        fitted = calibration.fit(s, y, prevalence=OPTIONS.prevalence)
        assert (one["probability"]["a"], one["probability"]["b"]) == pytest.approx((fitted.a, fitted.b))
        refer = one["thresholds"]["refer"]
        assert refer["logit"] == pytest.approx(s[y == 1][np.abs(s[y == 1] - refer["logit"] - 0.001).argmin()] - 0.001)
        assert refer["sensitivity"] == pytest.approx(np.mean(s[y == 1] >= refer["logit"]))
        assert refer["specificity"]["value"] == pytest.approx(np.mean(s[y == 0] < refer["logit"]))
    refers = [one["thresholds"]["refer"]["logit"] for one in found["modes"]["each"].values()]
    assert len(set(refers)) == len(MODES)


def test_what_each_part_adds_is_the_difference_of_the_two(found: dict[str, Any]) -> None:
    modes = found["modes"]
    value = {name: one["out_of_fold"]["pauc"]["value"] for name, one in modes["each"].items()}
    steps = [(one["block"], one["from"], one["to"]) for one in modes["adds"]]
    assert steps == [
        ("record", "image", "image_record"), ("context", "image_record", "image_visit"),
        ("image", "visit", "image_visit"), ("context", "record", "visit"), ("stack", "visit", "image_visit"),
    ]  # fmt: skip
    for one in modes["adds"]:
        assert one["out_of_fold"]["value"] == pytest.approx(value[one["to"]] - value[one["from"]], abs=1e-12)
        assert one["holdout"]["interval"]["low"] is not None
    record = modes["adds"][0]["out_of_fold"]
    assert record["interval"]["low"] > 0
    assert record["p_better"] > 0.975
    for name in MODES[:-1]:
        gap = modes["each"][name]["difference"]["out_of_fold"]
        assert gap["value"] == pytest.approx(value[name] - value["image_visit"], abs=1e-12)
        assert gap["interval"]["high"] < 0
        assert gap["p_better"] < 0.025


@pytest.mark.parametrize(
    ("modes", "steps"),
    [
        (
            ("image", "record", "image_record"),
            [("record", "image"), ("image", "record"), ("stack", "record")],
        ),
        (("record", "visit"), [("context", "record")]),
    ],
)
def test_fewer_modes_have_fewer_steps(modes: tuple[str, ...], steps: list[tuple[str, str]]) -> None:
    made = evaluate(*tables(modes), OPTIONS)
    jsonschema.validate(made, SCHEMA)
    assert made["modes"]["served"] == modes[-1]
    assert [(one["block"], one["from"]) for one in made["modes"]["adds"]] == steps


def test_pictures_alone_have_no_modes() -> None:
    assert "modes" not in evaluate(*tables(("image",)), OPTIONS)
    oof, holdout = (t.drop("image_logit") for t in tables(("image",)))
    assert "modes" not in evaluate(oof, holdout, OPTIONS)


def test_without_a_hold_out_each_figure_there_is_the_reason() -> None:
    made = evaluate(tables()[0], None, OPTIONS)
    jsonschema.validate(made, SCHEMA)
    one = made["modes"]["each"]["record"]
    assert "set aside" in one["holdout"]["reason"]
    assert one["thresholds"] is None
    assert one["probability"]["fitted_on"] == "out-of-fold"
    assert one["difference"]["holdout"] == one["holdout"]


def test_a_picture_that_cannot_be_judged_is_missed_only_where_pictures_are_looked_at(found: dict[str, Any]) -> None:
    oof, holdout = tables()
    surest = set(holdout.filter(pl.col("target") == 1).sort("record_logit")["isic_id"].tail(3))
    doubts = pl.Series([["much darker"] if name in surest else [] for name in holdout["isic_id"]])
    doubted = evaluate(oof, holdout.with_columns(doubts=doubts), OPTIONS, margin=0.001)["modes"]["each"]
    assert doubted["record"] == found["modes"]["each"]["record"]
    assert (
        doubted["image"]["thresholds"]["refer"]["logit"]
        < found["modes"]["each"]["image"]["thresholds"]["refer"]["logit"]
    )


def test_the_served_mode_is_scored_as_service_does_it() -> None:
    """A lesion without metadata is served its picture's score, in the column `logit`."""
    oof, holdout = tables()
    without = pl.when(pl.arange(pl.len()) % 3 == 0)
    oof, holdout = (
        t.with_columns(logit=without.then("image_logit").otherwise("image_visit_logit")) for t in (oof, holdout)
    )
    made = evaluate(oof, holdout, OPTIONS)
    assert made["modes"]["each"]["image_visit"]["out_of_fold"]["pauc"] == made["pauc"]["rank_pooled"]
    assert made["modes"]["each"]["image_visit"]["thresholds"] == made["served"]["thresholds"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop("visit_logit"), "no column visit_logit"),
        (lambda t: t.with_columns(visit_logit=pl.lit(float("nan"))), r"visit_logit .* \(such as ISIC_"),
    ],
)
def test_scores_that_are_missing_are_named(change: Any, message: str) -> None:
    oof, holdout = tables()
    with pytest.raises(DataError, match=message):
        evaluate(oof, change(holdout), OPTIONS)


def test_a_split_by_institution_uses_places_among_the_benign(found: dict[str, Any]) -> None:
    split = {"kind": "institution", "names": ["A", "B", "C"], "holdout": 1}
    made = evaluate(*tables(), OPTIONS, split=split)
    assert made["modes"]["each"]["image_visit"]["out_of_fold"]["pauc"] == made["pauc"]["rank_pooled"]


@pytest.mark.parametrize("owners", [300, 2400])
def test_several_at_once_say_what_each_comparison_says_alone(owners: int) -> None:
    """Also where each lesion is of its own patient: patients of one cell are then drawn together."""
    rng = np.random.default_rng(2)
    y = (rng.random(2400) < 0.1).astype(int)
    groups = rng.integers(0, 300, 2400) if owners == 300 else np.arange(2400)
    scores = {m: rng.normal(size=2400) + STRENGTH[m] * y for m in MODES} | {"same": np.zeros(0)}
    scores["same"] = 2 * scores["image"]
    measures = [MEASURES["pauc"], MEASURES["auc"]]
    pairs = [("image", "visit"), ("image_visit", "record"), ("same", "image")]
    options: dict[str, Any] = {"replicates": 300, "seed": 5}
    alone, between = compare_several(y, scores, groups, measures, pairs, **options)
    # Where atoms are merged, more scores split them otherwise, so other patients are drawn: alike, not equal.
    near = {"rel": 1e-6, "abs": 1e-9} if owners == 300 else {"rel": 0.25, "abs": 1e-3}
    for name, (p, a) in alone.items():
        one = ranking(y, scores[name], groups, **options)
        for mine, other in ((p, one["pauc"]), (a, one["auc"])):
            assert mine.value == pytest.approx(other.value)
            assert (mine.interval.low, mine.interval.high) == pytest.approx(
                (other.interval.low, other.interval.high), rel=near["rel"] / 4
            )
    for (a, b), pair in between.items():
        (other,) = compare_scores(y, scores[a], scores[b], groups, measures[:1], **options)
        assert pair.difference.value == pytest.approx(other.difference.value)
        assert pair.difference.interval.method == other.difference.interval.method
        ends = (other.difference.interval.low, other.difference.interval.high)
        assert (pair.difference.interval.low, pair.difference.interval.high) == pytest.approx(ends, **near)
        assert pair.p_better == pytest.approx(other.p_better, abs=1e-9 if owners == 300 else 0.02)
    few, refused = compare_several(y, scores, groups, measures, pairs, replicates=0)
    assert few["image"][0].interval.reason == refused["image", "visit"].difference.interval.reason == "not asked for"


def test_lone_lesions_too_many_to_be_drawn_together_are_compared_two_by_two(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(4)
    y = (rng.random(1500) < 0.1).astype(int)
    scores = {m: rng.normal(size=1500) + STRENGTH[m] * y for m in ("image", "record", "visit")}
    measures = [MEASURES["pauc"], MEASURES["auc"]]
    options: dict[str, Any] = {"replicates": 200, "seed": 1}
    monkeypatch.setattr(paired, "_ATOMS", 100)
    alone, between = compare_several(y, scores, np.arange(1500), measures, [("visit", "image")], **options)
    for name, found in alone.items():
        one = ranking(y, scores[name], np.arange(1500), **options)
        assert found == [one["pauc"], one["auc"]]
    (pair,) = compare_scores(y, scores["visit"], scores["image"], np.arange(1500), measures[:1], **options)
    assert between == {("visit", "image"): pair}
