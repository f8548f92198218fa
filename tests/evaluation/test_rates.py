"""Ratios of sums over lesions: values exact, intervals clustered by patient and honest about few of them."""

from __future__ import annotations

import time

import numpy as np
import pytest
from scipy.stats import beta, norm
from scipy.stats import t as student

from lesionflow.errors import DataError, UsageError
from lesionflow.evaluation import quantiles, rates


def patients(seed, count=60, size=12, spread=1.0):
    """Lesions whose share of ones differs between patients."""
    rng = np.random.default_rng(seed)
    owner = rng.integers(0, count, count * size)
    own = spread * rng.normal(size=count)
    return (rng.normal(size=len(owner)) + own[owner] > 0.8).astype(float), owner


@pytest.mark.parametrize(
    ("a", "b", "p"), [(54, 7, 0.05), (0.5, 0.5, 0.3), (4e5, 1e3, 0.025), (1, 1e5, 0.975), (9, 0.5, 0.025)]
)
def test_quantiles_equal_scipy_s(a, b, p):
    assert quantiles.beta_quantile(a, b, p) == pytest.approx(beta.ppf(p, a, b), abs=1e-10)
    assert quantiles.student_quantile(0.975, a) == pytest.approx(student.ppf(0.975, a), rel=1e-8)


def test_a_rate_is_the_ratio_of_the_sums_with_a_cluster_robust_t_interval():
    hit, owner = patients(1)
    below = np.random.default_rng(0).random(len(hit)) + 0.5
    figure = rates.rate(hit * below, below, owner, malignant=50, kind="real")
    value = (hit * below).sum() / below.sum()
    assert figure.value == pytest.approx(value, abs=1e-15)
    residual = np.array([((hit - value) * below)[owner == g].sum() for g in np.unique(owner)]) / below.sum()
    squares, n = (residual**2).sum(), len(residual)
    freedom = min(n - 1, 2 * squares**2 / ((residual**4).sum() - squares**2 / n))
    reach = student.ppf(0.975, freedom) * np.sqrt(squares * n / (n - 1))
    assert figure.interval.low == pytest.approx(value - reach, rel=1e-6)
    assert figure.interval.high == pytest.approx(value + reach, rel=1e-6)
    assert (figure.interval.clusters, figure.interval.malignant, figure.interval.replicates) == (n, 50, 0)
    share = rates.rate(hit, np.ones(len(hit)), owner, malignant=50)
    assert share.value - share.interval.low < share.interval.high - share.value  # Under one half: the logit's skew.
    positive = rates.rate(hit, np.ones(len(hit)), owner, malignant=50, kind="positive").interval
    assert positive.low * positive.high == pytest.approx(share.value**2)


def test_clustering_widens_and_level_narrows():
    hit, owner = patients(2, spread=2.0)
    ones = np.ones(len(hit))
    by_patient = rates.rate(hit, ones, owner, malignant=50).interval
    by_lesion = rates.rate(hit, ones, np.arange(len(hit)), malignant=50).interval
    assert by_patient.high - by_patient.low > 1.5 * (by_lesion.high - by_lesion.low)
    sure = rates.rate(hit, ones, owner, malignant=50, level=0.99).interval
    assert sure.low < by_patient.low < by_patient.high < sure.high


def test_neither_rows_nor_lesions_without_a_part_change_a_bit():
    rng = np.random.default_rng(3)
    values, owner = rng.lognormal(sigma=8, size=5000), rng.integers(0, 70, 5000)
    ones = np.ones(5000)
    first = rates.rate(values, ones, owner, malignant=50, kind="positive")
    order = rng.permutation(5000)
    assert rates.rate(values[order], ones, owner[order], malignant=50, kind="positive") == first
    longer = np.r_[ones, np.zeros(30)]
    more = rates.rate(
        np.r_[values, np.zeros(30)], longer, np.r_[owner, np.arange(100, 130)], malignant=50, kind="positive"
    )
    assert more == first
    assert first.value == pytest.approx(values.mean(), rel=1e-14)


def test_shares_of_none_and_all_have_a_bound_that_grows_with_patients():
    ones = np.ones(400)
    owner = np.arange(400) % 40
    every = rates.rate(ones, ones, owner, malignant=400)
    assert (every.value, every.interval.high) == (1.0, 1.0)
    assert every.interval.low == pytest.approx(0.025 ** (1 / 40))
    none = rates.rate(0 * ones, ones, owner, malignant=400)
    assert (none.interval.low, none.interval.high) == (0.0, pytest.approx(1 - 0.025 ** (1 / 40)))
    constant = rates.rate(2 * ones, ones, owner, malignant=400, kind="positive")
    assert (constant.interval.low, constant.interval.reason) == (None, "the figure does not vary")


def test_too_little_to_vouch_for_gets_the_value_and_the_reason():
    hit, owner = patients(4)
    ones = np.ones(len(hit))
    assert "19 malignant lesions: under 20" in rates.rate(hit, ones, owner, malignant=19).interval.reason
    assert rates.rate(hit, ones, owner, malignant=0, fewest=0).interval.low is not None
    assert "lesions of 9 patients: under 10" in rates.rate(hit, ones, owner % 9, malignant=50).interval.reason
    assert rates.rate(hit, ones, owner, malignant=50, replicates=0).interval.reason == "not asked for"
    nothing = rates.rate(0 * hit, 0 * ones, owner, malignant=50)
    assert (nothing.value, nothing.interval.reason) == (None, "no lesions to take a share of")
    assert "12 malignant lesions" in rates.proportion(hit[:12] > 0, owner[:12]).interval.reason
    assert rates.proportion(np.zeros(0, bool), []).value is None
    assert "9 patients" in rates.proportion(hit > 0, owner % 9).interval.reason
    assert rates.proportion(hit > 0, owner, replicates=0).interval.reason == "not asked for"


def test_numbers_that_are_none_are_refused():
    ones = np.ones(30)
    with pytest.raises(DataError, match="row by row"):
        rates.rate(ones, np.ones(29), np.arange(30), malignant=30)
    with pytest.raises(DataError, match="aren't finite"):
        rates.rate(ones * np.nan, ones, np.arange(30), malignant=30)
    with pytest.raises(UsageError, match="kind must be share"):
        rates.rate(ones, ones, np.arange(30), malignant=30, kind="odds")


def test_a_proportion_of_lone_lesions_has_clopper_and_pearson_s_interval():
    found = np.r_[np.ones(54, bool), np.zeros(6, bool)]
    figure = rates.proportion(found, np.arange(60))
    # Korn and Graubard's size is within 1/60 of 60 here, through the n - 1 of the variance.
    assert figure.interval.low == pytest.approx(beta.ppf(0.025, 54, 7), abs=3e-3)
    assert figure.interval.high == pytest.approx(beta.ppf(0.975, 55, 6), abs=3e-3)
    every = rates.proportion(np.ones(60, bool), np.arange(60) % 30).interval
    assert (every.low, every.high) == (pytest.approx(0.025 ** (1 / 30), abs=1e-9), 1.0)
    none = rates.proportion(np.zeros(60, bool), np.arange(60) % 30).interval
    assert (none.low, none.high) == (0.0, pytest.approx(1 - 0.025 ** (1 / 30), abs=1e-9))


def test_lesions_found_together_count_as_one():
    found = np.repeat(np.arange(30) > 4, 5)
    together = rates.proportion(found, np.repeat(np.arange(30), 5)).interval
    alone = rates.proportion(found, np.arange(150)).interval
    assert together.low < alone.low - 0.05
    assert together.low == pytest.approx(beta.ppf(0.025, 25, 6), abs=0.03)
    # Patients who are all alike in their share leave every lesion counted, and no more than that.
    even = np.tile([True, False], 60)
    assert rates.effective_size(even.astype(float), np.repeat(np.arange(60), 2)) == 120


def test_intervals_hold_the_truth_as_often_as_they_say():
    held = {"specificity": [], "brier": [], "sensitivity": []}
    for seed in range(200):
        rng = np.random.default_rng(seed)
        owner = rng.integers(0, 80, 1200)
        own = 0.6 * rng.normal(size=80)
        s = rng.normal(size=1200) + own[owner]
        share = norm.cdf(0.85, scale=1.36**0.5)
        low_high = rates.rate(s < 0.85, np.ones(1200), owner, malignant=0, fewest=0).interval
        held["specificity"].append(low_high.low <= share <= low_high.high)
        squares = rates.rate(s**2, np.ones(1200), owner, malignant=50, kind="positive").interval
        held["brier"].append(squares.low <= 1.36 <= squares.high)
        few = rates.proportion(s[:60] < 0.85, owner[:60]).interval
        held["sensitivity"].append(few.low <= share <= few.high)
    assert all(np.mean(one) > 0.89 for one in held.values()), {k: np.mean(v) for k, v in held.items()}


def test_four_hundred_thousand_lone_lesions_take_a_moment():
    rng = np.random.default_rng(0)
    hit, owner = rng.random(401_059) < 0.9, np.arange(401_059)
    start = time.process_time()
    figure = rates.rate(hit, np.ones(len(hit)), owner, malignant=0, fewest=0)
    assert time.process_time() - start < 1.0
    assert figure.interval.high - figure.interval.low < 0.003
