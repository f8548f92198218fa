"""Net benefit against its definition, its band against the truth."""

from __future__ import annotations

import time
from statistics import NormalDist

import numpy as np
import pytest
from scipy.stats import beta

from lesionflow.errors import DataError
from lesionflow.evaluation.decision import decision_curve
from lesionflow.evaluation.prevalence import share_interval, shares
from lesionflow.evaluation.rates import effective_size


def cohort(seed, malignant=60, benign=1500, patients=50, prevalence=0.01):
    rng = np.random.default_rng(seed)
    y = np.r_[np.ones(malignant, int), np.zeros(benign, int)]
    patient = rng.integers(0, patients, len(y))
    s = 0.92 * rng.normal(size=len(y)) + 2 * y + 0.39 * rng.normal(size=patients)[patient]
    return y, 1 / (1 + np.exp(-(2 * s - 2 + np.log(prevalence / (1 - prevalence))))), patient


def test_net_benefit_is_counted_per_lesion_at_the_stated_prevalence():
    y, p, g = cohort(0)
    curve = decision_curve(p, y, g, prevalence=0.01)
    assert len(curve["probability"]) == len(curve["net_benefit"]) == len(curve["low"]) == 41
    assert curve["probability"][0] == pytest.approx(0.0005)
    assert curve["probability"][-1] == pytest.approx(0.5)
    for t, net, everyone in zip(curve["probability"], curve["net_benefit"], curve["treat_all"], strict=True):
        found, passed = (p[y == 1] >= t).mean(), (p[y == 0] >= t).mean()
        assert net == pytest.approx(0.01 * found - 0.99 * passed * t / (1 - t), abs=1e-12)
        assert everyone == pytest.approx(0.01 - 0.99 * t / (1 - t))
    as_it_is = decision_curve(p, y, g, prevalence=0, points=5)
    t = as_it_is["probability"][2]
    flagged = p >= t
    expected = (flagged[y == 1].sum() - flagged[y == 0].sum() * t / (1 - t)) / len(y)
    assert as_it_is["net_benefit"][2] == pytest.approx(expected)


def test_a_probability_that_equals_the_threshold_acts():
    y, _, g = cohort(1)
    at = decision_curve(*cohort(1)[1::-1], g, prevalence=0.01)["probability"][20]
    curve = decision_curve(np.where(y == 1, at, at / 3), y, g, prevalence=0.01)
    assert curve["net_benefit"][20] == pytest.approx(0.01)
    assert curve["net_benefit"][21] == 0


def test_a_perfect_model_has_the_prevalence_as_its_benefit_and_a_band_all_the_same():
    y, _, g = cohort(1)
    curve = decision_curve(np.where(y == 1, 0.99, 0.0), y, g, prevalence=0.01)
    assert curve["net_benefit"] == pytest.approx([0.01] * 41)
    assert all(low < 0.01 for low in curve["low"])


def test_bands_hold_the_truth_point_by_point():
    normal, held = NormalDist(), np.zeros(9)
    for seed in range(120):
        curve = decision_curve(
            *cohort(100 + seed, benign=800)[1::-1], cohort(100 + seed, benign=800)[2], prevalence=0.01, points=9
        )
        for i, t in enumerate(curve["probability"]):
            cut = (np.log(t / (1 - t)) - np.log(0.01 / 0.99) + 2) / 2
            found, passed = 1 - normal.cdf(cut - 2), 1 - normal.cdf(cut)
            held[i] += curve["low"][i] <= 0.01 * found - 0.99 * passed * t / (1 - t) <= curve["high"][i]
    assert held.min() > 0.88 * 120, held


def test_bands_know_that_the_prevalence_of_the_data_is_chance():
    normal, rng, held, prevalence = NormalDist(), np.random.default_rng(0), np.zeros(9), 0.03
    shift = np.log(prevalence / (1 - prevalence)) - 2
    for _ in range(200):
        y = (rng.random(3000) < prevalence).astype(int)
        p = 1 / (1 + np.exp(-(2 * (rng.normal(size=3000) + 2 * y) + shift)))
        curve = decision_curve(p, y, np.arange(3000), prevalence=0, points=9)
        for i, t in enumerate(curve["probability"]):
            cut = (np.log(t / (1 - t)) - shift) / 2
            net = prevalence * (1 - normal.cdf(cut - 2)) - (1 - prevalence) * (1 - normal.cdf(cut)) * t / (1 - t)
            held[i] += curve["low"][i] <= net <= curve["high"][i]
    assert held.min() > 0.91 * 200, held


def test_shares_of_all_thresholds_at_once_equal_one_at_a_time():
    rng = np.random.default_rng(2)
    owner = np.r_[rng.integers(0, 30, 200), 100 + np.arange(50)]
    cell = rng.integers(0, 6, 250)
    share, size = shares(cell, owner, 6)
    cluster = np.unique(owner, return_inverse=True)[1]
    for c in range(1, 6):
        found = (cell >= c).astype(float)
        assert share[c] == pytest.approx(found.mean(), abs=1e-12)
        assert size[c] == pytest.approx(effective_size(found, cluster), rel=1e-9)
    assert share[0] == 1
    assert size[0] == size[1]


@pytest.mark.parametrize(("share", "size"), [(0.0, 40), (1.0, 40), (0.1, 37.5), (0.5, 10_000), (1e-4, 1e7)])
def test_the_interval_of_a_share_is_clopper_and_pearson_s(share, size):
    low, high = share_interval(share, size, 0.95)
    a, b = share * size, (1 - share) * size
    assert low == pytest.approx(beta.ppf(0.025, a, b + 1) if a else 0.0, abs=0.06 * share + 1e-9)
    assert high == pytest.approx(beta.ppf(0.975, a + 1, b) if b else 1.0, rel=0.06)


def test_few_malignant_lesions_get_a_curve_without_a_band():
    y, p, g = cohort(3, malignant=12)
    curve = decision_curve(p, y, g, prevalence=0.01)
    assert (curve["low"], curve["high"]) == (None, None)
    assert "12 malignant" in curve["reason"]
    assert len(curve["net_benefit"]) == 41
    with pytest.raises(DataError, match="not a logit"):
        decision_curve(p * 5, y, g, prevalence=0.01)


def test_nothing_depends_on_the_order_of_rows_and_full_size_is_quick():
    y, p, g = cohort(4)
    order = np.random.default_rng(0).permutation(len(y))
    assert decision_curve(p, y, g, prevalence=0.01) == decision_curve(p[order], y[order], g[order], prevalence=0.01)
    y, p, g = cohort(5, malignant=393, benign=400_666, patients=1042)
    start = time.process_time()
    decision_curve(p, y, g, prevalence=0.01)
    assert time.process_time() - start < 1
