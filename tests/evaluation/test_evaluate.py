"""metrics.json: every figure with an interval or a reason, whatever the groups and folds."""

from __future__ import annotations

import json

import numpy as np
import polars as pl
import pytest

from lesionflow.errors import DataError
from lesionflow.evaluation import metrics
from lesionflow.evaluation.evaluate import evaluate
from lesionflow.recipe import Evaluation


def table(seed=0, lesions=1500, malignant=120, patients=90, known=1.0, folds=3, shift=0.0):
    rng = np.random.default_rng(seed)
    y = np.zeros(lesions, int)
    y[rng.choice(lesions, malignant, replace=False)] = 1
    owner = rng.integers(0, patients, lesions)
    ids = np.array([f"ISIC_{i:07}" for i in range(lesions)])
    patient = np.array([f"IP_{p:03}" for p in owner])
    has = rng.random(lesions) < known
    fold = np.where(has, owner % folds, rng.integers(0, folds, lesions))
    s = rng.normal(size=lesions) + 2.5 * y + 0.4 * rng.normal(size=patients)[owner] + shift * fold - 3
    return pl.DataFrame(
        {
            "isic_id": ids,
            "patient_group": np.where(has, patient, ids),
            "target": y.astype(np.int8),
            "fold": fold.astype(np.int8),
            "logit": s,
            "fold_hash": ["abc"] * lesions,
        }
    )


def evaluate_oof(oof):
    return evaluate(oof, None, Evaluation(replicates=100))


def test_all_four_figures_are_the_metric_s_own_with_intervals_around_them():
    oof = table()
    result = evaluate_oof(oof)
    y, s, fold = oof["target"].to_numpy(), oof["logit"].to_numpy(), oof["fold"].to_numpy()
    pauc = result["pauc"]
    each = [metrics.pauc(y[fold == f], s[fold == f]) for f in range(3)]
    assert pauc["pooled"]["value"] == metrics.pauc(y, s)
    assert pauc["rank_pooled"]["value"] == metrics.pauc(y, metrics.fold_rank(s, fold))
    assert [f["value"] for f in pauc["folds"]] == each
    assert pauc["mean_of_folds"]["value"] == pytest.approx(np.mean(each))
    for one in (pauc["pooled"], pauc["rank_pooled"], pauc["mean_of_folds"], *pauc["folds"], result["auc"]["pooled"]):
        assert one["interval"]["low"] < one["value"] < one["interval"]["high"]
    assert result["counts"] == {"lesions": 1500, "malignant": 120, "benign": 1380, "folds": 3, "prevalence": 0.08}
    assert sum(f["malignant"] for f in pauc["folds"]) == 120
    assert result["fold_hash"] == "abc"
    json.dumps(result, allow_nan=False)


def test_the_headline_forgives_a_shift_between_folds_and_pooling_shows_it():
    plain, shifted = evaluate_oof(table()), evaluate_oof(table(shift=4.0))
    assert shifted["pauc"]["rank_pooled"] == plain["pauc"]["rank_pooled"]
    assert shifted["pauc"]["mean_of_folds"] == plain["pauc"]["mean_of_folds"]
    assert shifted["pauc"]["pooled"]["value"] < plain["pauc"]["pooled"]["value"] - 0.02


def test_the_same_predictions_in_another_order_give_the_same_file():
    oof = table(known=0.5)
    again = oof.sample(fraction=1.0, shuffle=True, seed=1)
    assert evaluate_oof(oof) == evaluate_oof(again)


def test_the_note_says_what_was_drawn():
    patient = evaluate_oof(table())["groups"]
    mixed = evaluate_oof(table(known=0.3))
    lesion = evaluate_oof(table(known=0.0))
    assert (patient["kind"], patient["clusters"]) == ("patient", 90)
    assert mixed["groups"]["kind"] == "mixed"
    assert f"known for {mixed['groups']['lesions_with_patient']:,} of 1,500" in mixed["groups"]["note"]
    assert lesion["groups"]["kind"] == "lesion"
    assert lesion["pauc"]["pooled"]["interval"]["clusters"] == 1500


def test_retrieval_counts_known_patients_only():
    oof = table(known=0.5, patients=12)
    result = evaluate_oof(oof)["retrieval"]
    known = oof.filter(oof["patient_group"].str.starts_with("IP_"))
    ranks = metrics.fold_rank(oof["logit"], oof["fold"])[oof["patient_group"].str.starts_with("IP_").to_numpy()]
    assert result["value"] == metrics.top_k_retrieval(known["target"], ranks, known["patient_group"].to_list())
    assert result["malignant"] == known["target"].sum()
    unknown = evaluate_oof(table(known=0.0))["retrieval"]
    assert unknown["value"] is None
    assert unknown["interval"]["reason"]


def test_few_malignant_lesions_get_figures_with_reasons_instead_of_intervals():
    result = evaluate_oof(table(malignant=9, folds=2))
    assert result["pauc"]["pooled"]["value"] > 0
    assert "9 malignant" in result["pauc"]["pooled"]["interval"]["reason"]
    assert result["thresholds"]["refer"]["reached"] is False
    json.dumps(result, allow_nan=False)


def test_a_fold_of_one_class_has_no_value_and_neither_has_the_mean():
    oof = table(malignant=60)
    oof = oof.filter((pl.col("fold") != 2) | (pl.col("target") == 0))
    result = evaluate_oof(oof)["pauc"]
    assert result["folds"][2]["value"] is None
    assert result["folds"][2]["interval"]["reason"] == "all its lesions are benign"
    assert result["mean_of_folds"]["value"] is None
    assert "1 of 3 folds" in result["mean_of_folds"]["interval"]["reason"]
    assert result["pooled"]["value"] is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop("fold"), "no column fold"),
        (lambda t: pl.concat([t, t.head(2)]), r"more than one row for 4 lesions \(ISIC_"),
        (lambda t: t.with_columns(logit=pl.lit(float("nan"))), "NaN or infinite for 1500 lesions"),
        (lambda t: t.with_columns(fold_hash=pl.col("isic_id")), "different fold hashes"),
        (
            lambda t: t.with_columns(fold=pl.int_range(pl.len()).cast(pl.Int8, wrap_numerical=True)),
            "more than one fold",
        ),
        (lambda t: t.with_columns(target=pl.lit(None, pl.Int8)), "target is empty for 1500 lesions"),
    ],
)
def test_a_table_that_can_t_be_pooled_is_refused(change, message):
    with pytest.raises(DataError, match=message):
        evaluate_oof(change(table()))
