"""Paired differences: the same draws for both models, and intervals that hold what they promise."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from lesionflow.errors import DataError
from lesionflow.evaluation import intervals, metrics
from lesionflow.evaluation.paired import (
    METHOD,
    METHOD_ALIKE,
    _estimate,
    compare_scores,
    mean_difference,
    paired_difference,
)
from lesionflow.evaluation.ranking import MEASURES
from lesionflow.evaluation.resample import AVERAGE_PRECISION, Patients, partial_area


def cohort(seed, malignant=100, patients=50, benign=1500, effect=0.5, separation=2.2):
    rng = np.random.default_rng(seed)
    y = np.r_[np.ones(malignant, int), np.zeros(benign, int)]
    patient = rng.integers(0, patients, len(y))
    s = rng.normal(size=len(y)) + separation * y + effect * rng.normal(size=patients)[patient]
    return y, s, s + rng.normal(size=len(y)), patient


@pytest.fixture
def power():
    """benchmarks/power.py, whose cohorts have a known difference; small products, which threads only slow down."""
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "power.py"
    spec = importlib.util.spec_from_file_location("power", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["power"] = module  # Its dataclasses look their module up.
    spec.loader.exec_module(module)
    with threadpool_limits(1):
        yield module


def test_a_difference_is_that_of_the_two_figures_and_turns_with_them():
    y, s, worse, g = cohort(12)
    pair = paired_difference(y, s, worse, g, replicates=300)
    assert (pair["a"], pair["b"]) == pytest.approx((metrics.pauc(y, s), metrics.pauc(y, worse)), abs=1e-12)
    assert pair["difference"] == pair["a"] - pair["b"]
    assert 0 < pair["low"] < pair["difference"] < pair["high"]
    assert pair["p_better"] > 0.97
    assert (pair["method"], pair["replicates"], pair["clusters"], pair["malignant"]) == (METHOD, 300, 50, 100)
    turned = paired_difference(y, worse, s, g, replicates=300)
    assert (turned["low"], turned["high"]) == pytest.approx((-pair["high"], -pair["low"]), abs=1e-12)
    assert turned["p_better"] == pytest.approx(1 - pair["p_better"])


def test_what_two_models_have_in_common_cancels():
    y, s, worse, g = cohort(12)
    nearly = paired_difference(y, s, s + 1e-3 * np.random.default_rng(0).normal(size=len(s)), g, replicates=300)
    assert nearly["high"] - nearly["low"] < 0.002
    apart = paired_difference(y, s, worse, g, replicates=300)
    alone = intervals.bootstrap_pauc(y, worse, g, replicates=300)
    assert apart["high"] - apart["low"] < 1.5 * (alone.high - alone.low)


def test_every_measure_comes_from_the_same_draws_whatever_the_order_of_rows():
    y, s, worse, g = cohort(5)
    measures = list(MEASURES.values())
    together = compare_scores(y, s, worse, g, measures, replicates=200)
    assert together[0] == compare_scores(y, s, worse, g, measures[:1], replicates=200)[0]
    assert together[2].a == pytest.approx(metrics.auc(y, s), abs=1e-12)
    assert together[3].b == pytest.approx(metrics.average_precision(y, worse), abs=1e-12)
    order = np.random.default_rng(1).permutation(len(y))
    assert compare_scores(y[order], s[order], worse[order], g[order], measures, replicates=200) == together


@pytest.mark.parametrize("measure", [partial_area(0.8), AVERAGE_PRECISION], ids=["pauc", "average_precision"])
def test_the_standard_error_is_the_derivative_by_each_patient_s_weight(measure):
    y, s, worse, g = cohort(3, malignant=43, patients=25, benign=300)  # No rise of the curve ends at 80 %, a kink.
    patients = Patients(y, [s, worse], g)

    def gap(weights):
        a, b = (measure.influence(*t.times(weights))[0] for t in patients.tables)
        return (a - b)[0]

    step, pulls = 1e-6, []
    for i in range(len(patients.multiplicity)):
        up = patients.everyone()
        up[0, i] += step
        pulls.append((gap(up) - gap(patients.everyone())) / step)
    ((_, _, error),) = _estimate(patients, patients.everyone(), [measure])
    assert error[0] == pytest.approx(np.sqrt(np.sum(np.square(pulls))), rel=1e-3)


@pytest.mark.parametrize("seed", range(8))
def test_being_surely_better_and_an_interval_above_zero_are_the_same_thing(seed):
    y, s, _, g = cohort(seed, malignant=60)
    other = s + np.random.default_rng(seed).normal(size=len(s)) * (0.5 + seed / 10)
    pair = paired_difference(y, s, other, g, replicates=400)
    assert (pair["p_better"] > 0.975) == (pair["low"] > 0)
    assert (pair["p_better"] < 0.025) == (pair["high"] < 0)
    assert (pair["p_better"] > 0.5) == (pair["difference"] > 0)


def test_scores_that_order_the_lesions_alike_differ_by_nothing():
    y, s, _, g = cohort(1)
    same = paired_difference(y, s, np.exp(s / 3) - 7, g, replicates=300)
    assert (same["difference"], same["low"], same["high"], same["p_better"]) == (0, 0, 0, 0.5)
    assert same["method"] == METHOD_ALIKE


def test_there_is_no_interval_where_it_would_mean_nothing():
    y, s, worse, g = cohort(13, malignant=intervals.FEWEST_MALIGNANT - 1)
    few = paired_difference(y, s, worse, g, replicates=300)
    assert (few["low"], few["high"], few["p_better"]) == (None, None, None)
    assert f"under {intervals.FEWEST_MALIGNANT}" in few["reason"]
    assert paired_difference(*cohort(13), replicates=0)["reason"] == intervals.NOT_ASKED
    y, s, _, g = cohort(14, malignant=40)
    # Both separate the classes, so no draw of patients tells them apart, though they order lesions differently.
    apart = paired_difference(y, s + 100 * y, 100 * y - s, g, replicates=300)
    assert (apart["difference"], apart["low"], apart["p_better"]) == (0, None, None)
    assert "no draw of patients" in apart["reason"]
    # One benign lesion alone makes the difference: most replicates without it or its patient say nothing.
    one = np.where((y == 0) & (np.cumsum(y == 0) == 1), 200.0, s + 100 * y)
    rare = paired_difference(y, s + 100 * y, one, np.arange(len(y)), replicates=300)
    assert (rare["low"], rare["p_better"]) == (None, None)
    assert "replicates no patient tells the two apart" in rare["reason"]


def test_an_interval_keeps_to_what_is_possible_and_bad_scores_are_refused():
    y, s, _, g = cohort(2, malignant=20, patients=15)
    pair = paired_difference(y, s, -s, g, replicates=200)
    assert pair["low"] >= -0.2
    assert pair["high"] <= 0.2
    with pytest.raises(DataError, match="NaN"):
        paired_difference(y, s, np.full(len(y), np.nan), g)


def test_the_interval_excludes_zero_as_often_as_foretold(power):
    same, apart = power.DESIGNS[0], power.DESIGNS[0].apart(0.010)
    assert apart.truth() == pytest.approx(0.010, abs=1e-6)
    above, below = power.excludes(power.pairs(same, 80, 200, 200))
    assert 0.01 <= above + below <= 0.10  # 5 % but for the simulation's own error.
    found = power.pairs(apart, 170, 100, 200)
    above, below = power.excludes(found)
    assert below <= 0.02
    assert above == pytest.approx(np.median([power.foretold(pair, 0.010) for pair in found]), abs=0.15)


def test_intervals_hold_the_true_difference_where_percentile_intervals_do_not(power):
    design = power.Design("strong, alike", 3.2, 3.0)
    truth, ours, theirs = design.truth(), [], []
    for seed in range(200):
        data = design.cohort(np.random.default_rng(seed), 30, 200, 2000)
        pair = paired_difference(*data, replicates=200, seed=seed)
        low, high = power.percentile(*data, 200, seed)
        ours.append(pair["low"] <= truth <= pair["high"])
        theirs.append(low <= truth <= high)
    assert np.mean(ours) >= 0.92
    assert np.mean(theirs) < np.mean(ours) - 0.03


def test_malignant_lesions_of_few_patients_get_no_interval():
    rng = np.random.default_rng(0)
    y = np.repeat([1, 0], [40, 800])
    patient = np.where(y == 1, 0, np.arange(len(y)) % 200)
    a, b = (rng.normal(size=len(y)) + 2 * y for _ in range(2))
    found = paired_difference(y, a, b, patient, replicates=200)
    assert found["low"] is None and found["p_better"] is None
    assert "1 patients" in found["reason"]


def test_seeds_are_compared_as_one_on_the_same_draws_of_patients():
    y, s, worse, patient = cohort(5)
    rng = np.random.default_rng(1)
    ours, theirs = ([one + 0.3 * rng.normal(size=len(y)) for _ in range(3)] for one in (s, worse))
    found = mean_difference(y, ours, theirs, patient, replicates=500)
    each = [metrics.pauc(y, a) - metrics.pauc(y, b) for a, b in zip(ours, theirs, strict=True)]
    assert found.difference.value == pytest.approx(np.mean(each), abs=1e-12)
    alone = mean_difference(y, ours[:1], theirs[:1], patient, replicates=500)
    one = compare_scores(y, ours[0], theirs[0], patient, [partial_area(0.8)], replicates=500)[0]
    assert alone == one, "one seed is an ordinary comparison"
    assert found.error < alone.error, "noise of single trainings averages out"
    with pytest.raises(ValueError, match="3 and 2 trainings"):
        mean_difference(y, ours, theirs[:2], patient)
