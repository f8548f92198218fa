"""Replicates against a plain loop, intervals against what they promise, bounds against exact values."""

from __future__ import annotations

import time

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from lesionflow.errors import DataError
from lesionflow.evaluation import intervals, metrics, resample


def cohort(seed, malignant=60, patients=50, benign=1500, effect=0.5, separation=2.2, alone=False):
    """Scores with a patient effect and a class effect; every patient has lesions of either kind by chance."""
    rng = np.random.default_rng(seed)
    n = malignant + benign
    y = np.r_[np.ones(malignant, int), np.zeros(benign, int)]
    patient = np.arange(n) if alone else rng.integers(0, patients, n)
    s = rng.normal(size=n) + separation * y + effect * rng.normal(size=patient.max() + 1)[patient]
    return y, s, patient


def naive(y, s, groups, drawn_groups, min_tpr):
    """The metric of a sample of groups, by copying their lesions."""
    rows = np.concatenate([np.nonzero(groups == g)[0] for g in drawn_groups])
    return metrics.pauc(y[rows], s[rows], min_tpr)


@pytest.mark.parametrize("min_tpr", [0.8, 0.0])
@pytest.mark.parametrize("rounded", [False, True])
def test_weighted_cells_equal_copying_the_lesions_of_each_patient(min_tpr, rounded):
    y, s, g = cohort(1, malignant=25, patients=12, benign=200)
    s = np.round(s, 1) if rounded else s
    patients = resample.Patients(y, [s], g)
    rng = np.random.default_rng(0)
    for _ in range(30):
        drawn = rng.integers(0, 12, 12)
        weights = np.bincount(drawn, minlength=12)[None].astype(float)
        value = patients.tables[0].value(weights, min_tpr)[0]
        assert value == pytest.approx(naive(y, s, g, drawn, min_tpr), abs=1e-12)


def test_replicates_equal_scikit_learn_with_patient_weights():
    y, s, g = cohort(2)
    patients = resample.Patients(y, [s], g)
    (weights,) = patients.draws(20, seed=5)
    values = patients.tables[0].value(weights, 0.8)
    for w, value in zip(weights, values, strict=True):
        corrected = roc_auc_score(1 - y, -s, max_fpr=0.2, sample_weight=w[g])
        assert value == pytest.approx(0.02 + 0.18 * (corrected - 0.5) / 0.5, abs=1e-12)


def test_lone_lesions_share_atoms_and_draw_the_same_distribution():
    y, s, g = cohort(3, malignant=40, benign=3000, alone=True)
    merged = resample.Patients(y, [s], g)
    assert merged.groups == 3040
    assert len(merged.multiplicity) < 125
    assert merged.multiplicity.sum() == 3040
    ours = np.concatenate([merged.tables[0].value(w, 0.8) for w in merged.draws(1500, 0)])
    rng = np.random.default_rng(1)
    plain = []
    for _ in range(1500):
        rows = rng.integers(0, 3040, 3040)
        plain.append(metrics.pauc(y[rows], s[rows]))
    assert ours.mean() == pytest.approx(np.mean(plain), abs=4 * np.std(plain) / 1500**0.5 * 2**0.5)
    assert ours.std() == pytest.approx(np.std(plain), rel=0.1)


def test_each_lesion_weighs_the_same_whether_the_table_is_dense_or_sparse(monkeypatch):
    y, s, g = cohort(4)
    dense = resample.Patients(y, [s], g)
    monkeypatch.setattr(resample, "_DENSE_BYTES", 0)
    sparse = resample.Patients(y, [s], g)
    assert sparse.tables[0].width != dense.tables[0].width
    (weights,) = dense.draws(10, 0)
    ((value, error),) = dense.tables[0].estimate(weights, [resample.partial_area(0.8)])
    ((same_value, same_error),) = sparse.tables[0].estimate(weights, [resample.partial_area(0.8)])
    np.testing.assert_allclose(value, same_value, rtol=1e-12)
    np.testing.assert_allclose(error, same_error, rtol=1e-5)
    np.testing.assert_array_equal(dense.tables[0].value(weights, 0.8), sparse.tables[0].value(weights, 0.8))


@pytest.mark.parametrize("min_tpr", [0.0, 0.803, 0.88])
def test_influence_is_the_derivative(min_tpr):
    rng = np.random.default_rng(0)
    benign, malignant = rng.integers(0, 5, (3, 21)).astype(float), rng.integers(1, 4, (3, 10)).astype(float)
    _, exact = resample.influence(benign, malignant, min_tpr)
    step = 1e-6
    for column in range(31):
        change = np.zeros(31)
        change[column] = step
        up = metrics.area(benign + change[:21], malignant + change[21:], min_tpr)
        down = metrics.area(benign - change[:21], malignant - change[21:], min_tpr)
        np.testing.assert_allclose(exact[:, column], (up - down) / (2 * step), atol=1e-8)


def test_an_interval_is_reproducible_and_independent_of_row_order():
    y, s, g = cohort(5)
    names = np.array([f"IP_{i:03}" for i in g])
    first = intervals.bootstrap_pauc(y, s, names, replicates=300, seed=7)
    order = np.random.default_rng(0).permutation(len(y))
    again = intervals.bootstrap_pauc(y[order], s[order], names[order], replicates=300, seed=7)
    assert first == again
    assert first.low < metrics.pauc(y, s) < first.high
    assert intervals.bootstrap_pauc(y, s, names, replicates=300, seed=8) != first
    assert (first.clusters, first.malignant, first.level, first.replicates) == (50, 60, 0.95, 300)


def test_clustering_widens_the_interval():
    y, s, g = cohort(6, malignant=200, patients=30, effect=2.0)
    by_patient = intervals.bootstrap_pauc(y, s, g, replicates=500)
    by_lesion = intervals.bootstrap_pauc(y, s, np.arange(len(y)), replicates=500)
    assert by_patient.high - by_patient.low > 1.3 * (by_lesion.high - by_lesion.low)


def test_coverage_at_eighty_malignant_lesions_is_near_nominal():
    y, s, g = cohort(0, malignant=100_000, patients=200_000, benign=300_000)
    truth = metrics.pauc(y, s)
    hits = 0
    for seed in range(150):
        y, s, g = cohort(1000 + seed, malignant=80, patients=200, benign=2000)
        one = intervals.bootstrap_pauc(y, s, g, replicates=300, seed=seed)
        hits += one.low <= truth <= one.high
    assert hits / 150 > 0.89


def test_no_interval_under_twenty_malignant_lesions_but_the_reason():
    y, s, g = cohort(7, malignant=19)
    one = intervals.bootstrap_pauc(y, s, g)
    assert (one.low, one.high, one.replicates) == (None, None, 0)
    assert "19 malignant lesions: under 20" in one.reason
    assert intervals.bootstrap_pauc(*cohort(7, malignant=20), replicates=200).low is not None


def test_complete_separation_has_a_lower_bound_that_grows_with_patients():
    lows = []
    for count in (20, 100, 1000):
        y, s, g = cohort(8, malignant=count, benign=5000, separation=50, alone=True)
        one = intervals.bootstrap_pauc(y, s, g, replicates=100)
        assert one.high == pytest.approx(0.2)
        assert one.method == intervals.METHOD_SEPARATED
        lows.append(one.low)
    assert lows == sorted(lows)
    # 97.5 % that no more than 1 - 0.025^(1/100) of patients like these would be missed.
    assert lows[1] == pytest.approx((0.2 - (1 - 0.025**0.01)) * 0.025 ** (1 / 5000))


def test_reversed_scores_get_a_reason():
    y, s, g = cohort(9, separation=50)
    one = intervals.bootstrap_pauc(y, -s, g, replicates=100)
    assert one.low is None
    assert "reversed" in one.reason


def test_replicates_of_one_class_are_dropped_and_counted():
    y, s, g = cohort(10, malignant=40, patients=30, benign=20, separation=1)
    g = np.where(y == 1, g % 10, 999)  # All benign lesions are one patient's.
    one = intervals.bootstrap_pauc(y, s, g, replicates=400)
    assert 0.25 * 400 < one.dropped < 0.6 * 400


def test_malignant_lesions_of_few_patients_get_no_interval():
    y, s, g = cohort(10, malignant=60, patients=30)
    few = intervals.bootstrap_pauc(y, s, np.where(y == 1, g % 9, g + 9), replicates=100)
    assert "malignant lesions of 9 patients: under 10" in few.reason
    assert intervals.bootstrap_pauc(y, s, np.where(y == 1, g % 10, g + 10), replicates=100).low is not None


def test_the_mean_of_folds_has_an_interval_narrower_than_one_fold():
    y, s, g = cohort(11, malignant=150, patients=100)
    fold = g % 3
    mean = intervals.bootstrap_mean_of_folds(y, s, g, fold, replicates=300)
    value = np.mean([metrics.pauc(y[fold == f], s[fold == f]) for f in range(3)])
    here = fold == 0
    one = intervals.bootstrap_pauc(y[here], s[here], g[here], replicates=300)
    assert mean.low < value < mean.high
    assert mean.high - mean.low < one.high - one.low
    assert (mean.clusters, mean.malignant) == (100, 150)


def test_one_class_is_refused_before_anything_is_drawn():
    with pytest.raises(DataError, match="both classes"):
        intervals.bootstrap_pauc(np.zeros(5), np.arange(5), np.arange(5))


def test_the_whole_competition_s_size_takes_about_a_second():
    y, s, g = cohort(16, malignant=393, patients=1042, benign=400_666)
    start = time.process_time()
    one = intervals.bootstrap_pauc(y, s, g, replicates=2000)
    assert time.process_time() - start < 6  # Processor seconds over all cores, so that a busy machine can't fail it.
    assert one.clusters == 1042
