"""A submission is joined on ids, refused by name, and scored as the competition would."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import numpy as np
import polars as pl
import pytest
from rich.console import Console

from lesionflow.errors import DataError, UsageError
from lesionflow.evaluation import metrics, scoring
from lesionflow.evaluation.scoring import score_files


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


def test_every_figure_is_the_metric_s_and_has_an_interval_around_it(cohort):
    folder, table, submission = cohort
    result = score(folder, submission)
    y, s = table["target"], submission["target"]
    expected = {
        "pauc": metrics.pauc(y, s), "pauc_88": metrics.pauc(y, s, 0.88), "auc": metrics.auc(y, s),
        "average_precision": metrics.average_precision(y, s),
    }  # fmt: skip
    assert result["headline"] == "pooled"
    for name, value in expected.items():
        figure = result[name]["pooled"]
        assert figure["value"] == pytest.approx(value, abs=1e-12)
        assert figure["interval"]["low"] < value < figure["interval"]["high"]
        assert figure["interval"]["clusters"] == 60
        assert set(result[name]).isdisjoint({"rank_pooled", "mean_of_folds"})
    assert result["retrieval"]["value"] == metrics.top_k_retrieval(y, s, table["patient_id"])
    assert result["retrieval"]["interval"]["low"] < result["retrieval"]["value"]
    malignant = int(y.sum())
    assert result["counts"] == {"lesions": 800, "malignant": malignant, "benign": 800 - malignant, "folds": 1}
    assert (result["groups"]["kind"], result["groups"]["patients"]) == ("patient", 60)
    assert (result["pauc"]["min_tpr"], result["pauc"]["maximum"], result["pauc"]["chance"]) == (0.8, 0.2, 0.02)
    json.dumps(result, allow_nan=False)


def test_losses_are_of_probabilities_only(cohort):
    folder, table, submission = cohort
    logits = score(folder, submission)
    assert logits["brier"]["value"] is logits["log_loss"]["value"] is None
    assert "not probabilities" in logits["brier"]["interval"]["reason"]
    probability = 1 / (1 + np.exp(-(submission["target"].to_numpy() - 4)))
    result = score(folder, submission.with_columns(target=pl.Series(probability)))
    assert result["brier"]["value"] == pytest.approx(metrics.brier(table["target"], probability), abs=1e-12)
    assert result["log_loss"]["value"] == pytest.approx(metrics.log_loss(table["target"], probability), abs=1e-12)
    assert result["brier"]["interval"]["low"] < result["brier"]["value"] < result["brier"]["interval"]["high"]


def test_folds_give_three_figures_side_by_side(cohort):
    folder, table, submission = cohort
    y, s = table["target"].to_numpy(), submission["target"].to_numpy()
    fold = np.array([int(p[-1]) % 2 for p in table["patient_id"]])
    oof = table.select("isic_id", "target").with_columns(logit=pl.Series(s + 9 * fold), fold=pl.Series(fold))
    result = score(folder, oof, "oof.parquet")
    ranks = metrics.fold_rank(s, fold)
    mean = np.mean([metrics.pauc(y[fold == f], s[fold == f]) for f in (0, 1)])
    assert (result["headline"], result["counts"]["folds"]) == ("rank_pooled", 2)
    assert result["pauc"]["pooled"]["value"] == pytest.approx(metrics.pauc(y, s + 9 * fold), abs=1e-12)
    assert result["pauc"]["rank_pooled"]["value"] == pytest.approx(metrics.pauc(y, ranks), abs=1e-12)
    assert result["pauc"]["mean_of_folds"]["value"] == pytest.approx(mean, abs=1e-12)
    assert result["pauc"]["pooled"]["value"] < result["pauc"]["rank_pooled"]["value"] - 0.02
    text = shown(result)
    assert all(words in text for words in ("by rank in fold", "as they are", "mean of folds"))
    with pytest.raises(DataError, match=r"fold is empty or not a whole number for 800 lesions"):
        score(folder, oof.with_columns(fold=pl.lit(None, pl.Int8)), "oof.parquet")


def shown(result):
    console = Console(width=120, file=io.StringIO())
    console.print(scoring.render(result))
    return console.file.getvalue()


def test_what_is_shown_has_every_figure_with_its_interval_or_the_reason(cohort):
    folder, _, submission = cohort
    result = score(folder, submission)
    text = shown(result)
    for name in ("pauc", "pauc_88", "auc", "average_precision"):
        figure = result[name]["pooled"]
        assert f"{figure['value']:.4f}" in text
        assert f"[{figure['interval']['low']:.4f}, {figure['interval']['high']:.4f}]" in text
    assert "not probabilities" in text
    assert result["groups"]["note"] in " ".join(text.split())
    few = scoring.score_files(folder / "submission.csv", folder / "train-metadata.csv", replicates=0)
    assert "No interval: not asked for." in shown(few)


def test_the_sample_s_bound_is_offered(cohort):
    folder, _, submission = cohort
    result = score(folder, submission, min_tpr=0.88)
    assert result["pauc"]["pooled"] == result["pauc_88"]["pooled"]
    assert result["pauc"]["maximum"] == 0.12


def test_rows_are_joined_by_id_whatever_their_order(cohort):
    folder, _, submission = cohort
    assert score(folder, submission) == score(folder, submission.sample(fraction=1.0, shuffle=True, seed=3))


def test_an_out_of_fold_file_is_scored_by_its_logits_not_its_targets(cohort):
    folder, table, submission = cohort
    oof = table.select("isic_id", "target").with_columns(logit=submission["target"])
    result = score(folder, oof, "oof.parquet")
    assert result["score_column"] == "logit"
    assert result["pauc"] == score(folder, submission)["pauc"]
    assert result["pauc"]["pooled"]["value"] < 0.2


def test_unknown_patients_are_their_own_groups_and_the_note_says_so(cohort):
    folder, table, submission = cohort
    keep = np.arange(800) < 100
    table.with_columns(patient_id=pl.when(pl.Series(keep)).then("patient_id")).write_csv(folder / "train-metadata.csv")
    result = score(folder, submission)
    assert result["groups"]["kind"] == "mixed"
    assert "known for 100 of 800" in result["groups"]["note"]
    assert result["pauc"]["pooled"]["interval"]["clusters"] == 700 + result["groups"]["patients"]
    assert result["retrieval"]["lesions"] == 100
    table.select("isic_id", "target").write_csv(folder / "train-metadata.csv")
    alone = score(folder, submission)
    assert (alone["groups"]["kind"], alone["pauc"]["pooled"]["interval"]["clusters"]) == ("lesion", 800)
    assert "not patient-clustered" in alone["groups"]["note"]
    assert "the patient of no lesion is known" in alone["retrieval"]["interval"]["reason"]


def test_without_replicates_there_is_no_interval(cohort):
    folder, _, submission = cohort
    submission.with_columns(pl.col("target") / 100 + 0.5).write_csv(folder / "submission.csv")
    result = scoring.score_files(folder / "submission.csv", folder / "train-metadata.csv", replicates=0)
    for figure in (result["pauc"]["pooled"], result["auc"]["pooled"], result["retrieval"], result["brier"]):
        assert figure["value"] is not None
        assert (figure["interval"]["low"], figure["interval"]["reason"]) == (None, "not asked for")


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


def test_a_run_s_own_table_holds_the_truth_and_a_submission_does_not(tmp_path):
    rng = np.random.default_rng(0)
    y = np.repeat([1, 0], [40, 400])
    names = [f"ISIC_{i}" for i in range(len(y))]
    table = pl.DataFrame({"isic_id": names, "target": y, "logit": rng.normal(size=len(y)) + 2 * y})
    table.write_parquet(tmp_path / "oof.parquet")
    table.select("isic_id", target="logit").write_csv(tmp_path / "submission.csv")
    table.select("isic_id", "target").write_csv(tmp_path / "truth.csv")
    alone = score_files(tmp_path / "oof.parquet", replicates=0)
    both = score_files(tmp_path / "submission.csv", tmp_path / "truth.csv", replicates=0)
    assert alone["pauc"] == both["pauc"]
    with pytest.raises(UsageError, match="doesn't hold the truth"):
        score_files(tmp_path / "submission.csv")
