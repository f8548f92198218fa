"""A submission is joined on ids, refused by name, and scored as the competition would."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import polars as pl
import pytest

from lesionflow.errors import DataError
from lesionflow.evaluation import metrics, scoring


@pytest.fixture
def cohort(tmp_path):
    rng = np.random.default_rng(0)
    y = (rng.random(800) < 0.06).astype(int)
    table = pl.DataFrame(
        {
            "isic_id": [f"ISIC_{i:07}" for i in rng.permutation(9000)[:800]],
            "target": y,
            "patient_id": [f"IP_{i:03}" for i in rng.integers(0, 60, 800)],
            "attribution": ['somewhere, "else"'] * 800,
        }
    )
    scores = rng.normal(size=800) + 2 * y
    table.write_csv(tmp_path / "train-metadata.csv")
    submission = table.select("isic_id").with_columns(target=pl.Series(scores))
    submission.write_csv(tmp_path / "submission.csv")
    return tmp_path, table, submission


def score(folder, submission, name="submission.csv", **options):
    if name.endswith(".csv"):
        submission.write_csv(folder / name)
    else:
        submission.write_parquet(folder / name)
    return scoring.score_files(folder / name, folder / "train-metadata.csv", replicates=200, **options)


def test_the_score_is_the_metric_s_and_comes_with_intervals_and_counts(cohort):
    folder, table, submission = cohort
    result = score(folder, submission)
    assert result["pauc"] == metrics.pauc(table["target"], submission["target"])
    assert result["auc"] == metrics.auc(table["target"], submission["target"])
    assert (result["count"], result["malignant"], result["patients"]) == (800, int(table["target"].sum()), 60)
    assert result["benign"] == 800 - result["malignant"]
    assert result["interval"]["low"] < result["pauc"] < result["interval"]["high"]
    assert result["auc_interval"]["low"] < result["auc"] < result["auc_interval"]["high"]
    assert result["interval"]["clusters"] == 60
    assert result["groups"]["kind"] == "patient"
    assert result["min_tpr"] == 0.8
    json.dumps(result, allow_nan=False)


def test_the_sample_s_bound_is_offered(cohort):
    folder, table, submission = cohort
    result = score(folder, submission, min_tpr=0.88)
    assert result["pauc"] == metrics.pauc(table["target"], submission["target"], 0.88)
    assert result["maximum"] == 0.12


def test_rows_are_joined_by_id_whatever_their_order(cohort):
    folder, _, submission = cohort
    assert score(folder, submission) == score(folder, submission.sample(fraction=1.0, shuffle=True, seed=3))


def test_an_out_of_fold_file_is_scored_by_its_logits_not_its_targets(cohort):
    folder, table, submission = cohort
    oof = table.select("isic_id", "target").with_columns(logit=submission["target"])
    result = score(folder, oof, "oof.parquet")
    assert result["score_column"] == "logit"
    assert result["pauc"] == score(folder, submission)["pauc"] < 0.2


def test_unknown_patients_are_their_own_groups_and_the_note_says_so(cohort):
    folder, table, submission = cohort
    keep = np.arange(800) < 100
    table.with_columns(patient_id=pl.when(pl.Series(keep)).then("patient_id")).write_csv(folder / "train-metadata.csv")
    result = score(folder, submission)
    assert result["groups"]["kind"] == "mixed"
    assert "known for 100 of 800" in result["groups"]["note"]
    assert result["interval"]["clusters"] == 700 + result["patients"]
    table.select("isic_id", "target").write_csv(folder / "train-metadata.csv")
    alone = score(folder, submission)
    assert (alone["groups"]["kind"], alone["patients"], alone["interval"]["clusters"]) == ("lesion", 0, 800)
    assert "not patient-clustered" in alone["groups"]["note"]


def test_without_replicates_there_is_no_interval(cohort):
    folder, _, _ = cohort
    result = scoring.score_files(folder / "submission.csv", folder / "train-metadata.csv", replicates=0)
    assert result["interval"] is None


def broken(submission, how):
    ids, scores = submission["isic_id"].to_list(), [str(s) for s in submission["target"]]
    if how == "missing":
        ids, scores = ids[7:], scores[7:]
    elif how == "extra":
        ids, scores = [*ids, "ISIC_9999999"], [*scores, "0.5"]
    elif how == "duplicate":
        ids, scores = [*ids, ids[3]], [*scores, "0.5"]
    else:
        scores[2] = how
    return pl.DataFrame({"isic_id": ids, "target": scores})


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", r"no row for 7 lesions \(ISIC_\d+.*\.\.\.\) of .*score exactly the lesions"),
        ("extra", r"1 lesion \(ISIC_9999999\) not in"),
        ("duplicate", r"more than one row for 1 lesion \(ISIC_\d+\); keep one row"),
        ("nan", r"NaN or infinite for 1 lesion"),
        ("-inf", r"NaN or infinite for 1 lesion"),
        ("high", r"not a number.* for 1 lesion \(ISIC_\d+\); give every lesion"),
        ("", r"target is empty.* for 1 lesion"),
    ],
)
def test_an_unusable_submission_is_refused_by_name_and_count(cohort, how, message):
    folder, _, submission = cohort
    with pytest.raises(DataError, match=message) as caught:
        score(folder, broken(submission, how))
    assert "submission.csv" in str(caught.value)
    if how not in ("missing", "extra"):
        offender = submission["isic_id"][3 if how == "duplicate" else 2]
        assert offender in str(caught.value)


def test_a_truth_that_is_not_one_is_refused(cohort):
    folder, table, submission = cohort
    with pytest.raises(DataError, match="no column 'target' \\(nor 'logit'\\)"):
        score(folder, submission.rename({"target": "score"}))
    table.with_columns(target=pl.lit(0)).write_csv(folder / "train-metadata.csv")
    with pytest.raises(DataError, match="all 800 lesions are benign"):
        score(folder, submission)
    table.with_columns(target=pl.lit("?")).write_csv(folder / "train-metadata.csv")
    with pytest.raises(DataError, match="neither 0 nor 1 for 800 lesions"):
        score(folder, submission)
    (folder / "train-metadata.csv").unlink()
    with pytest.raises(DataError, match="no such file"):
        score(folder, submission)


def test_scoring_needs_no_heavy_package():
    heavy = ("torch", "sklearn", "scipy", "matplotlib", "pandas", "pyarrow", "jinja2")
    code = f"import sys, lesionflow.evaluation.scoring; print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
