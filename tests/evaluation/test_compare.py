"""Two models are compared on exactly the same lesions, or not at all."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import numpy as np
import polars as pl
import pytest
from rich.console import Console

from lesionflow.errors import DataError
from lesionflow.evaluation import metrics
from lesionflow.evaluation.compare import compare_files, malignant_for, power, render
from lesionflow.evaluation.intervals import Figure, Interval
from lesionflow.evaluation.paired import Pair

N = 900


@pytest.fixture
def files(tmp_path):
    """Truth, two submissions and two runs of one split, the second model noisier; and what they hold."""
    rng = np.random.default_rng(0)
    y = (rng.random(N) < 0.08).astype(int)
    ids = [f"ISIC_{i:07}" for i in rng.permutation(9000)[:N]]
    patient = [f"IP_{i:03}" for i in rng.integers(0, 70, N)]
    group = [p if i % 10 else n for i, (p, n) in enumerate(zip(patient, ids, strict=True))]
    fold = np.array([int(g[-1]) % 3 for g in group], np.int8)
    good = rng.normal(size=N) + 2.2 * y
    scores = {"good": good, "poor": good + 1.5 * rng.normal(size=N)}
    truth = pl.DataFrame({"isic_id": ids, "target": y, "patient_id": [g if g[1] == "P" else None for g in group]})
    truth.write_csv(tmp_path / "truth.csv")
    for name, s in scores.items():
        truth.select("isic_id").with_columns(target=pl.Series(s)).write_csv(tmp_path / f"{name}.csv")
        # Each fold's model has a scale of its own.
        table = truth.select("isic_id", "target").with_columns(
            patient_group=pl.Series(group), fold=pl.Series(fold), logit=pl.Series(s * (1 + fold) + 5.0 * fold),
            fold_hash=pl.lit("abc123"),
        )  # fmt: skip
        (tmp_path / name).mkdir()
        table.write_parquet(tmp_path / name / "oof.parquet")
        table.with_columns(fold=pl.lit(-1, pl.Int8), logit=pl.Series(s)).write_parquet(
            tmp_path / name / "holdout.parquet"
        )
    return tmp_path, truth, scores


def compare(folder, a, b, **options):
    truth = options.pop("truth", None)
    return compare_files(folder / a, folder / b, truth=truth and folder / truth, **{"replicates": 200} | options)


def test_two_runs_are_ranked_within_their_folds_and_every_figure_has_its_interval(files):
    folder, truth, _ = files
    result = compare(folder, "good", "poor")
    oof = pl.read_parquet(folder / "good" / "oof.parquet")
    ranks = metrics.fold_rank(oof["logit"], oof["fold"])
    assert result["pauc"]["a"]["value"] == pytest.approx(metrics.pauc(truth["target"], ranks), abs=1e-12)
    assert result["auc"]["a"]["value"] == pytest.approx(metrics.auc(truth["target"], ranks), abs=1e-12)
    assert (result["a"]["kind"], result["b"]["kind"]) == ("folds", "folds")
    for name in ("pauc", "pauc_88", "auc", "average_precision"):
        one = result[name]
        assert one["difference"]["value"] == pytest.approx(one["a"]["value"] - one["b"]["value"], abs=1e-12)
        for figure in (one["a"], one["b"], one["difference"]):
            assert set(figure) == {"value", "interval"}
            assert figure["interval"]["low"] <= figure["value"] <= figure["interval"]["high"]
    assert result["pauc"]["p_better"] > 0.975
    assert result["verdict"]["better"] == "a"
    assert result["verdict"]["text"].startswith("A is better: A - B is pAUC +0.")
    assert result["groups"]["kind"] == "mixed"
    assert result["counts"] == {
        "lesions": N,
        "malignant": int(truth["target"].sum()),
        "benign": N - int(truth["target"].sum()),
    }
    json.dumps(result, allow_nan=False)


def test_submissions_need_the_truth_and_are_taken_as_they_are(files):
    folder, truth, scores = files
    with pytest.raises(DataError, match="give --truth"):
        compare(folder, "good.csv", "poor.csv")
    result = compare(folder, "good.csv", "poor.csv", truth="truth.csv")
    assert result["pauc"]["b"]["value"] == pytest.approx(metrics.pauc(truth["target"], scores["poor"]), abs=1e-12)
    assert result["groups"]["kind"] == "mixed"
    # The other side's truth will do, and gives the same.
    mixed = compare(folder, "good.csv", "poor/holdout.parquet")
    assert mixed["pauc"] == result["pauc"]
    assert compare(folder, "good", "poor", of="holdout")["pauc"] == result["pauc"]
    plain = truth.drop("patient_id")
    plain.write_csv(folder / "plain.csv")
    assert compare(folder, "good.csv", "poor/holdout.parquet", truth="plain.csv")["pauc"] == result["pauc"]


def test_rows_are_joined_by_id_whatever_their_order(files):
    folder, _, _ = files
    before = compare(folder, "good", "poor.csv")
    oof = folder / "good" / "oof.parquet"
    pl.read_parquet(oof).sample(fraction=1.0, shuffle=True, seed=3).write_parquet(oof)
    pl.read_csv(folder / "poor.csv").sample(fraction=1.0, shuffle=True, seed=4).write_csv(folder / "poor.csv")
    assert compare(folder, "good", "poor.csv") == before


def first_three_missing(table):
    return table.with_columns(logit=pl.when(pl.int_range(pl.len()) < 3).then(float("nan")).otherwise("logit"))


def two_more(table):
    return pl.concat([table, table.head(2).with_columns(isic_id=pl.Series(["X1", "X2"]))])


def other_folds(table):
    return table.drop("fold_hash").with_columns(fold=(pl.col("fold") + 1) % 3)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda t: t.head(N - 7), "no row for 7 lesions"),
        (two_more, r"2 lesions \(X1, X2\) not in"),
        (lambda t: pl.concat([t, t.head(1)]), "more than one row for 1 lesion"),
        (first_three_missing, "NaN or infinite for 3 lesions"),
        (lambda t: t.with_columns(target=1 - pl.col("target")), f"another target than .* for {N} lesions"),
        (lambda t: t.with_columns(fold_hash=pl.lit("zzz")), "folds are not those of"),
        (other_folds, f"another fold than .* for {N} lesions"),
    ],
)
def test_what_is_not_the_same_lesions_and_split_is_refused_by_name_and_count(files, edit, words):
    folder, _, _ = files
    path = folder / "poor" / "oof.parquet"
    edit(pl.read_parquet(path)).write_parquet(path)
    with pytest.raises(DataError, match=words):
        compare(folder, "good", "poor")


def test_a_run_without_such_a_table_says_why(files):
    folder, _, _ = files
    (folder / "poor" / "holdout.parquet").unlink()
    with pytest.raises(DataError, match=r"folds\.holdout"):
        compare(folder, "good", "poor", of="holdout")
    (folder / "empty").mkdir()
    with pytest.raises(DataError, match=r"no oof\.parquet"):
        compare(folder, "empty", "poor")


def test_too_few_malignant_lesions_give_figures_and_the_reason_everywhere(files):
    folder, truth, _ = files
    few = truth.filter((pl.col("target") == 0) | (pl.col("target").cum_sum() <= 12))
    few.write_csv(folder / "truth.csv")
    for name in ("good.csv", "poor.csv"):
        pl.read_csv(folder / name).join(few.select("isic_id"), on="isic_id").write_csv(folder / name)
    result = compare(folder, "good.csv", "poor.csv", truth="truth.csv")
    for figure in result["pauc"]["a"], result["pauc"]["difference"]:
        assert figure["value"] is not None
        assert "12 malignant lesions: under" in figure["interval"]["reason"]
    assert result["power"]["detectable"] is None
    assert "12 malignant lesions" in result["power"]["reason"]
    assert result["verdict"]["better"] is None
    assert shown(result).count("under") == 2


def test_without_replicates_there_are_only_figures(files):
    folder, _, _ = files
    result = compare(folder, "good", "poor", replicates=0)
    assert result["auc"]["difference"]["interval"]["reason"] == "not asked for" == result["power"]["reason"]


def pair_of(difference, error, reach):
    interval = Interval(difference - reach, difference + reach, 0.95, "m", 2000, 0, 100, 80)
    return Pair(0.15 + difference, 0.15, Figure(difference, interval), 0.5, error, reach)


def test_power_is_the_normal_s_and_falls_with_the_root_of_the_lesions():
    pair = pair_of(0.01, 0.005, 1.959964 * 0.005)
    planned = power(pair, 80)
    assert planned["detectable"] == pytest.approx(2.801585 * 0.005, rel=1e-5)
    assert planned["malignant_for_observed"] == planned["malignant_for"]["0.010"]
    assert planned["malignant_for"]["0.010"] == np.ceil(80 * (2.801585 * 0.005 / 0.010) ** 2)
    assert planned["malignant_for"]["0.005"] == pytest.approx(4 * planned["malignant_for"]["0.010"], abs=4)
    # What is detectable here takes just the lesions that are here, however far the interval reaches.
    wide = pair_of(0.01, 0.005, 3.4 * 0.005)
    assert malignant_for(power(wide, 80)["detectable"], wide, 80) in (80, 81)
    assert malignant_for(0.010, wide, 80) > malignant_for(0.010, pair, 80)
    assert power(pair_of(0.0, 0.005, 0.01), 80)["malignant_for_observed"] is None


def test_the_same_model_twice_has_nothing_to_tell_apart(files):
    folder, _, _ = files
    result = compare(folder, "good", "good")
    assert result["pauc"]["difference"]["interval"]["high"] == 0
    assert "order these lesions alike" in result["verdict"]["text"]
    assert result["power"]["reason"]


def shown(result):
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(render(result))
    return console.export_text()


def test_the_table_fits_a_terminal_and_says_how_many_lesions_it_would_take(files):
    folder, truth, scores = files
    near = scores["good"] + 0.3 * np.random.default_rng(5).normal(size=N)
    truth.select("isic_id").with_columns(target=pl.Series(near)).write_csv(folder / "near.csv")
    result = compare(folder, "good.csv", "near.csv", truth="truth.csv")
    text = shown(result)
    assert result["verdict"]["better"] is None
    assert "can't be told apart" in text
    assert "malignant lesions" in result["verdict"]["text"]
    assert "With 80 % power" in text
    low = result["pauc"]["difference"]["interval"]["low"]
    assert f"[{low:+.4f}, " in text
    assert "…" not in text


def test_the_command_prints_json_and_refuses_an_unknown_table(files):
    folder, _, _ = files
    command = [sys.executable, "-m", "lesionflow", "compare", str(folder / "good"), str(folder / "poor")]
    done = subprocess.run([*command, "--json", "--replicates", "100"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["settings"]["replicates"] == 100
    done = subprocess.run([*command, "--of", "both"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "oof or holdout" in done.stderr
