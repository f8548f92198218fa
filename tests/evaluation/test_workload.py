"""Lesions reviewed per cancer found, against plain counting; intervals against the truth."""

from __future__ import annotations

import time
from statistics import NormalDist

import numpy as np
import pytest

from lesionflow.errors import DataError, UsageError
from lesionflow.evaluation import workload


def cohort(seed, malignant=60, benign=1500, patients=50, distance=2.2, alike=0.4):
    """Normal scores, spread 1 in either class, alike within a patient."""
    rng = np.random.default_rng(seed)
    y = np.r_[np.ones(malignant, int), np.zeros(benign, int)]
    patient = rng.integers(0, patients, len(y))
    s = (1 - alike**2) ** 0.5 * rng.normal(size=len(y)) + distance * y
    return y, s + alike * rng.normal(size=patients)[patient], patient


def known(y):
    return np.ones(len(y), bool)


@pytest.mark.parametrize("rounded", [False, True])
def test_without_thinning_the_figures_are_plain_counts(rounded):
    y, s, g = cohort(0)
    s = np.round(s, 1) if rounded else s
    for one in workload.operating(y, s, g, known(y), prevalence=0):
        share, score = one["sensitivity"], one["score"]
        flagged = s >= score
        assert flagged[y == 1].mean() >= share
        higher = np.unique(s[(y == 1) & (s > score)])
        assert (s[y == 1] >= higher.min()).mean() < share
        assert one["specificity"]["value"] == pytest.approx(1 - flagged[y == 0].mean())
        assert one["reviewed_per_cancer"]["value"] == pytest.approx(flagged.sum() / flagged[y == 1].sum())
        assert one["flagged_per_patient"]["value"] == pytest.approx(flagged.sum() / len(np.unique(g)))


@pytest.mark.parametrize("rounded", [False, True])
def test_each_patient_s_k_highest_are_reviewed_benign_first_among_equals(rounded):
    y, s, g = cohort(1)
    s = np.round(s, 0) if rounded else s

    def review(k):
        found = reviewed = 0
        for one in np.unique(g):
            mine = sorted((-s[i], y[i]) for i in np.nonzero(g == one)[0])[:k]
            found += sum(truth for _, truth in mine)
            reviewed += len(mine)
        return found, reviewed

    for one in workload.operating(y, s, g, known(y), prevalence=0):
        k = one["within_patient"]["k"]
        found, reviewed = review(k)
        assert found >= one["sensitivity"] * 60
        assert review(k - 1)[0] < one["sensitivity"] * 60
        assert one["within_patient"]["reviewed_per_cancer"]["value"] == pytest.approx(reviewed / found)


def test_benign_lesions_count_for_those_that_were_thinned():
    y, s, g = cohort(2, malignant=100, benign=1000)
    repeated = np.r_[np.arange(100), np.repeat(np.arange(100, 1100), 3)]
    whole = workload.operating(y[repeated], s[repeated], g[repeated], known(repeated), prevalence=0)
    thinned = workload.operating(y, s, g, known(y), prevalence=100 / 3100)
    for one, other in zip(thinned, whole, strict=True):
        for name in ("specificity", "reviewed_per_cancer", "flagged_per_patient"):
            assert one[name]["value"] == pytest.approx(other[name]["value"]), name
        assert one["within_patient"]["k"] == other["within_patient"]["k"]
        within = [x["within_patient"]["reviewed_per_cancer"]["value"] for x in (one, other)]
        assert within[0] == pytest.approx(within[1])


def test_where_one_benign_lesion_stands_for_many_no_patient_s_list_is_known():
    y, s, g = cohort(2, malignant=100, benign=1000)
    for one in workload.operating(y, s, g, known(y), prevalence=100 / (100 + 1000 * 2098)):
        for figure in (one["flagged_per_patient"], one["within_patient"]["reviewed_per_cancer"]):
            assert figure["value"] is None
            assert "stands for 2,098 lesions" in figure["interval"]["reason"]
        assert one["within_patient"]["k"] is None
        assert one["reviewed_per_cancer"]["value"] > 1


def test_only_known_patients_are_counted_per_patient():
    y, s, g = cohort(3)
    some = g < 20
    groups = np.where(some, g, 1000 + np.arange(len(y)))
    mixed = workload.operating(y, s, groups, some, prevalence=0)
    for one in mixed:
        ratio = y.mean() / (1 - y.mean()) * (1 - y[some].mean()) / y[some].mean()
        flagged = (s >= one["score"])[some]
        expected = (flagged[y[some] == 1].sum() + flagged[y[some] == 0].sum() / ratio) / 20
        assert one["flagged_per_patient"]["value"] == pytest.approx(expected)
        assert one["flagged_per_patient"]["interval"]["clusters"] == 20
    none = workload.operating(y, s, np.arange(len(y)), np.zeros(len(y), bool), prevalence=0)
    assert none[0]["specificity"]["interval"]["low"] is not None
    assert none[0]["flagged_per_patient"]["value"] is None
    assert none[0]["within_patient"]["k"] is None
    assert "known" in none[0]["within_patient"]["reviewed_per_cancer"]["interval"]["reason"]


def test_no_interval_where_the_threshold_may_lie_below_every_malignant_score():
    y, s, g = cohort(4, malignant=30, benign=3000, patients=3030)
    at80, at90, at95 = workload.operating(y, s, g, known(y), prevalence=0)
    assert at80["reviewed_per_cancer"]["interval"]["low"] is not None
    for one, needed in ((at90, 36), (at95, 72)):
        for name in ("specificity", "reviewed_per_cancer", "flagged_per_patient"):
            assert f"at least {needed}" in one[name]["interval"]["reason"]
            assert one[name]["value"] > 0
    few = workload.operating(y[12:], s[12:], g[12:], known(y)[12:], prevalence=0.001)
    assert "18 malignant" in few[0]["reviewed_per_cancer"]["interval"]["reason"]
    unasked = workload.operating(y, s, g, known(y), prevalence=0.001, replicates=0)
    assert unasked[0]["specificity"]["interval"]["reason"] == "not asked for"


def test_intervals_hold_the_truth():
    normal, held, asked = NormalDist(), 0, 0
    for seed in range(60):
        y, s, g = cohort(100 + seed, malignant=80, benign=1500, patients=150)
        for one in workload.operating(y, s, g, known(y), prevalence=0.001, sensitivities=(0.8, 0.9)):
            passed = 1 - normal.cdf(2.2 - normal.inv_cdf(one["sensitivity"]))
            truth = 1 + 999 * passed / one["sensitivity"]
            interval = one["reviewed_per_cancer"]["interval"]
            held += interval["low"] <= truth <= interval["high"]
            specificity = one["specificity"]["interval"]
            held += specificity["low"] <= 1 - passed <= specificity["high"]
            asked += 2
    assert held / asked > 0.9


def test_nothing_depends_on_the_order_of_rows():
    y, s, g = cohort(5)
    s = np.round(s, 1)
    order = np.random.default_rng(0).permutation(len(y))
    one = workload.operating(y, s, g, g < 30, prevalence=0.003)
    assert one == workload.operating(y[order], s[order], g[order], (g < 30)[order], prevalence=0.003)


def test_separated_reversed_and_equal_scores_are_no_trouble():
    y, s, g = cohort(6, malignant=100)
    for scores in (y * 10.0 + s / 100, -s - 4 * y, np.zeros(len(y))):
        for one in workload.operating(y, scores, g, known(y), prevalence=0.001):
            for name in ("specificity", "reviewed_per_cancer", "flagged_per_patient"):
                interval = one[name]["interval"]
                assert (interval["low"] is None) == (interval["reason"] is not None)
                if interval["low"] is not None:
                    assert interval["low"] <= one[name]["value"] <= interval["high"]


def test_what_does_not_match_is_refused():
    y, s, g = cohort(7)
    with pytest.raises(DataError, match="patients_known"):
        workload.operating(y, s, g, [True], prevalence=0.001)
    with pytest.raises(UsageError, match="prevalence"):
        workload.operating(y, s, g, known(y), prevalence=1.5)


def test_the_whole_competition_s_size_takes_a_fraction_of_a_second():
    y, s, g = cohort(8, malignant=393, benign=400_666, patients=1042)
    start = time.process_time()
    workload.operating(y, s, g, known(y), prevalence=0.00098)
    assert time.process_time() - start < 1.5
