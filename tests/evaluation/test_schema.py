"""metrics.json is what docs/metrics.schema.json says, and no figure in it stands without an interval or a reason."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import polars as pl
import pytest

from lesionflow.errors import DataError
from lesionflow.evaluation.evaluate import COLUMNS, evaluate
from lesionflow.evaluation.modes import MODES
from lesionflow.recipe import Evaluation

SCHEMA = json.loads((Path(__file__).parents[2] / "docs" / "metrics.schema.json").read_text())
OPTIONS = Evaluation(replicates=200)
# Numbers that describe or set something; whatever else is a number must be a figure's value or its interval's.
DESCRIBING = {
    "schema", "settings", "counts", "groups", "split", "min_tpr", "maximum", "chance", "fold", "lesions", "malignant",
    "k", "patients", "patients_with_k_lesions_or_fewer", "prevalence", "data_prevalence", "sd", "probability",
    "low", "high", "checked", "count", "pairs", "patients_in_two_folds", "fold_hash_checked", "level", "treat_all",
    # The point or the target that a figure is for, and what a bin or band holds.
    "sensitivity", "score", "target", "predicted", "logit", "malignant_clusters",
    "subgroup_threshold", "thresholds", "benign", "reached", "a", "b", "share", "p_better",
}  # fmt: skip


def tables(
    seed: int = 0, lesions: int = 2400, malignant: int = 240, known: float = 1.0, patients: int = 160
) -> tuple[pl.DataFrame, ...]:
    """Out-of-fold table of three folds and a hold-out of about a quarter, with what subgroups are made of."""
    rng = np.random.default_rng(seed)
    y = np.zeros(lesions, np.int8)
    y[rng.choice(lesions, malignant, replace=False)] = 1
    owner = rng.integers(0, patients, lesions)
    has = rng.random(lesions) < known
    ids = np.array([f"ISIC_{i:07}" for i in range(lesions)])
    side = np.where(has, owner, np.arange(lesions)) % 4 - 1
    patient = np.where(has, np.char.add("IP_", owner.astype(str)), ids)
    folds = rng.normal(size=(lesions, 3)) * 0.5 + (rng.normal(size=lesions) + 2.5 * y - 3)[:, None]
    whole = pl.DataFrame({
        "isic_id": ids, "patient_group": patient, "target": y, "fold": side.astype(np.int8),
        "logit": np.where(side < 0, folds.mean(1), folds[:, 0]), "fold_hash": ["abc"] * lesions,
        "sex": np.where(owner % 2, "male", "female"), "age_approx": (owner % 9) * 10.0,
        "anatom_site_general": np.where(rng.random(lesions) < 0.5, "head/neck", "anterior torso"),
        "attribution": np.where(owner % 3, "A", "B"), "tbp_tile_type": ["3D: XP"] * lesions,
        "clin_size_long_diam_mm": rng.uniform(1, 9, lesions), "tbp_lv_Lext": rng.uniform(30, 80, lesions),
        "tbp_lv_Bext": rng.uniform(5, 25, lesions),
    })  # fmt: skip
    held = whole.filter(pl.col("fold") < 0).with_columns(doubts=pl.lit([], pl.List(pl.String)))
    return whole.filter(pl.col("fold") >= 0), held


def with_modes(table: pl.DataFrame) -> pl.DataFrame:
    """The same lesions scored in every way, each a little differently."""
    rows = np.random.default_rng(len(table)).normal(size=(len(table), len(MODES)))
    return table.with_columns(
        pl.col("logit").add(pl.Series(0.3 * rows[:, i])).alias(f"{mode}_logit") for i, mode in enumerate(MODES)
    )


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return evaluate(*tables(), OPTIONS)


CASES = {
    "with a hold-out": lambda: evaluate(*tables(), OPTIONS),
    "no hold-out": lambda: evaluate(tables()[0], None, OPTIONS),
    "few malignant": lambda: evaluate(*tables(malignant=24, lesions=900), OPTIONS),
    "no patient known": lambda: evaluate(*tables(known=0.0), OPTIONS),
    "one class in a fold": lambda: evaluate(
        tables()[0].filter((pl.col("fold") != 1) | (pl.col("target") == 0)), None, OPTIONS
    ),
    "several modes": lambda: evaluate(*(with_modes(t) for t in tables()), OPTIONS),
    "several modes, no hold-out, few malignant": lambda: evaluate(
        with_modes(tables(malignant=24, lesions=900)[0]), None, OPTIONS
    ),
    "only what every table has": lambda: evaluate(tables()[0].select(COLUMNS), None, OPTIONS),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_every_figure_has_an_interval_or_a_reason(case: str) -> None:
    metrics = CASES[case]()
    jsonschema.validate(metrics, SCHEMA)
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics
    loose = [place for place in numbers(metrics) if not described(place)]
    assert not loose, "numbers that are neither a figure nor described as something else"


def test_a_figure_without_its_interval_would_be_seen(found: dict[str, Any]) -> None:
    bare = json.loads(json.dumps(found))
    bare["auc"]["pooled"] = {"value": 0.9}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(bare, SCHEMA)
    bare = json.loads(json.dumps(found))
    bare["auc"]["pooled"]["interval"] |= {"low": None, "high": None}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(bare, SCHEMA)
    bare["served"]["f1"] = 0.7
    assert [place for place in numbers(bare) if not described(place)] == [("served", "f1")]


def test_the_order_of_rows_never_matters(found: dict[str, Any]) -> None:
    oof, holdout = tables()
    mixed = evaluate(oof.sample(fraction=1, shuffle=True, seed=3), holdout.reverse(), OPTIONS)
    assert mixed == found


def test_a_picture_that_cannot_be_judged_counts_as_missed() -> None:
    oof, holdout = tables(malignant=480, patients=600)
    sure = evaluate(oof, holdout, OPTIONS)["served"]
    surest = holdout.filter(pl.col("target") == 1).sort("logit", descending=True)["isic_id"].head(3)
    doubts = [["much darker"] if name in surest else [] for name in holdout["isic_id"]]
    doubted = evaluate(oof, holdout.with_columns(doubts=pl.Series(doubts, dtype=pl.List(pl.String))), OPTIONS)["served"]
    assert doubted["bands"]["cannot judge"]["malignant"] == 3
    assert doubted["thresholds"]["refer"]["logit"] <= sure["thresholds"]["refer"]["logit"]
    found, total = doubted["bands"]["refer"]["malignant"], doubted["counts"]["malignant"]
    assert doubted["thresholds"]["refer"]["sensitivity"] == pytest.approx(found / total)


def test_a_patient_in_a_fold_and_the_holdout_is_refused() -> None:
    oof, holdout = tables()
    moved = holdout.with_columns(patient_group=pl.lit(oof["patient_group"][0]))
    with pytest.raises(DataError, match=oof["patient_group"][0]):
        evaluate(oof, moved, OPTIONS)


def numbers(node: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Where numbers stand that aren't inside a figure with its interval."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "value" and "interval" in node:
                continue
            if key != "interval":
                yield from numbers(value, (*place, key))
    elif isinstance(node, list):
        for value in node:
            yield from numbers(value, place)
    elif isinstance(node, int | float) and not isinstance(node, bool):
        yield place


def described(place: tuple[str, ...]) -> bool:
    curve = "decision_curve" in place  # Its band is three lists beside each other.
    return curve or bool(set(place) & DESCRIBING)


def test_a_split_by_institution_is_not_ranked_within_folds_of_different_prevalence() -> None:
    """A perfect model of folds with 1 in 3 and 1 in 30 malignant: ranks within folds would give less than 0.2."""
    parts = []
    for fold, (malignant, benign) in enumerate([(60, 120), (60, 1800)]):
        y = np.repeat([1, 0], [malignant, benign]).astype(np.int8)
        ids = [f"ISIC_{fold}_{i}" for i in range(len(y))]
        parts.append(pl.DataFrame({
            "isic_id": ids, "patient_group": ids, "target": y, "fold": np.full(len(y), fold, np.int8),
            "logit": y * 5.0 + np.arange(len(y)) / len(y), "fold_hash": "abc",
        }))  # fmt: skip
    oof = pl.concat(parts)
    patient = evaluate(oof, None, OPTIONS)
    clinic = evaluate(oof, None, OPTIONS, split={"kind": "institution", "names": ["A", "B"], "holdout": 0})
    jsonschema.validate(clinic, SCHEMA)
    assert patient["pauc"]["rank_pooled"]["value"] < 0.19
    assert patient["headline"] == "rank_pooled"
    assert clinic["headline"] == "mean_of_folds"
    assert clinic["pauc"]["mean_of_folds"]["value"] == pytest.approx(0.2)
    assert clinic["operating"][0]["specificity"]["value"] == 1.0, "places among the benign, whatever their number"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.with_columns(fold=pl.lit(0, pl.Int8)), "fold is -1"),
        (lambda t: t.with_columns(fold_hash=pl.lit("other")), "another split"),
    ],
)
def test_a_hold_out_of_something_else_is_refused(change: Any, message: str) -> None:
    oof, holdout = tables()
    with pytest.raises(DataError, match=message):
        evaluate(oof, change(holdout), OPTIONS)


def test_where_no_lesion_can_be_missed_retrieval_is_no_figure() -> None:
    oof, holdout = tables(lesions=600, malignant=200, patients=160)
    found = evaluate(oof, holdout, OPTIONS)["retrieval"]
    assert found["value"] is None
    assert "none can be missed" in found["interval"]["reason"]
