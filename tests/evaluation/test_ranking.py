"""Four figures from one pass: each equals its metric, in every replicate, and its interval holds the truth."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from lesionflow.evaluation import intervals, metrics, ranking, resample

KEYS = ["pauc", "pauc_88", "auc", "average_precision"]


def cohort(seed, malignant=60, patients=50, benign=1500, separation=2.2, effect=0.5):
    rng = np.random.default_rng(seed)
    y = np.r_[np.ones(malignant, int), np.zeros(benign, int)]
    patient = rng.integers(0, patients, len(y))
    return y, rng.normal(size=len(y)) + separation * y + effect * rng.normal(size=patients)[patient], patient


def expected(y, s):
    return [metrics.pauc(y, s), metrics.pauc(y, s, 0.88), metrics.auc(y, s), metrics.average_precision(y, s)]


@pytest.mark.parametrize("digits", [1, 9])
def test_each_value_is_the_metric_s_with_and_without_ties(digits):
    y, s, g = cohort(1)
    found = ranking.ranking(y, s.round(digits), g, replicates=100)
    assert list(found) == KEYS
    np.testing.assert_allclose([f.value for f in found.values()], expected(y, s.round(digits)), atol=1e-12)
    assert all(f.interval.low < f.value < f.interval.high for f in found.values())
    other = ranking.ranking(y, s, g, replicates=100, min_tpr=0.5)
    assert other["pauc"].value == pytest.approx(metrics.pauc(y, s, 0.5))


@pytest.mark.parametrize("digits", [0, 9])
def test_average_precision_of_replicates_equals_scikit_learn_with_patient_weights(digits):
    y, s, g = cohort(2, malignant=30, patients=20, benign=300)
    s = s.round(digits)
    patients = resample.Patients(y, [s], g)
    (weights,) = patients.draws(20, seed=3)
    ((values, _),) = patients.tables[0].estimate(weights, [resample.AVERAGE_PRECISION])
    theirs = [average_precision_score(y, s, sample_weight=w[g]) for w in weights]
    np.testing.assert_allclose(values, theirs, atol=1e-12)


def test_the_influence_of_average_precision_is_its_derivative():
    rng = np.random.default_rng(0)
    benign, malignant = rng.integers(0, 5, (3, 21)).astype(float), rng.integers(1, 4, (3, 10)).astype(float)
    _, exact = resample.precision_influence(benign, malignant)
    step = 1e-6
    for column in range(31):
        change = np.zeros(31)
        change[column] = step
        up = resample.precision_influence(benign + change[:21], malignant + change[21:])[0]
        down = resample.precision_influence(benign - change[:21], malignant - change[21:])[0]
        np.testing.assert_allclose(exact[:, column], (up - down) / (2 * step), atol=1e-8)


def test_scores_of_folds_are_ranked_within_them_first():
    y, s, g = cohort(3)
    fold = g % 3
    ranked = ranking.ranking(y, s + 50 * fold, g, folds=fold, replicates=100)
    assert ranked == ranking.ranking(y, metrics.fold_rank(s, fold), g, replicates=100)
    assert ranked["pauc"].value > 1.2 * ranking.ranking(y, s + 50 * fold, g, replicates=0)["pauc"].value


def test_each_fold_and_the_mean_come_from_the_same_replicates():
    y, s, g = cohort(4, malignant=150, patients=100)
    fold = g % 3
    each, mean = ranking.by_fold(y, s, g, fold, replicates=200)
    for f in range(3):
        here = fold == f
        np.testing.assert_allclose([one.value for one in each[f].values()], expected(y[here], s[here]), atol=1e-12)
        assert each[f]["pauc"].interval.clusters == len(np.unique(g[here]))
    for name in KEYS:
        assert mean[name].value == pytest.approx(np.mean([one[name].value for one in each]))
        assert mean[name].interval.low < mean[name].value < mean[name].interval.high
        width = mean[name].interval.high - mean[name].interval.low
        assert width < each[0][name].interval.high - each[0][name].interval.low
    assert ranking.mean_of_folds(y, s, g, fold, replicates=200) == mean
    alone = intervals.bootstrap_mean_of_folds(y, s, g, fold, replicates=200)
    assert alone == mean["pauc"].interval


def test_a_fold_of_one_class_leaves_no_mean_but_the_reason():
    y, s, g = cohort(5, malignant=90)
    fold = np.where(y == 1, g % 2, g % 3)  # Fold 2 has no malignant lesion.
    each, mean = ranking.by_fold(y, s, g, fold, replicates=100)
    assert mean["auc"].value is None
    assert mean["auc"].interval.reason == "1 of 3 folds have one class only"
    assert (each[2]["pauc"].value, each[2]["pauc"].interval.reason) == (None, "all its lesions are benign")
    assert each[0]["pauc"].interval.low is not None


def test_folds_of_few_malignant_lesions_have_values_without_intervals():
    y, s, g = cohort(6, malignant=33, patients=60)
    fold = g % 3
    each, mean = ranking.by_fold(y, s, g, fold, replicates=100)
    assert all("under 20" in one["pauc"].interval.reason and one["pauc"].value is not None for one in each)
    assert mean["pauc"].interval.low is not None
    few = np.where((y == 1) & (fold == 2), 0, fold)
    few[np.nonzero((y == 1) & (fold == 2))[0][:3]] = 2
    _, mean = ranking.by_fold(y, s, np.where(y == 1, np.arange(len(y)) + 99, g), few, replicates=100)
    assert "3 malignant lesions in a fold: under 5" in mean["pauc"].interval.reason


def test_no_replicates_no_intervals_and_the_order_of_rows_never_matters():
    y, s, g = cohort(7)
    assert {f.interval.reason for f in ranking.ranking(y, s, g, replicates=0).values()} == {"not asked for"}
    order = np.random.default_rng(0).permutation(len(y))
    first = ranking.by_fold(y, s, g, g % 2, replicates=100), ranking.ranking(y, s, g, replicates=100)
    y, s, g = y[order], s[order], g[order]
    assert first == (ranking.by_fold(y, s, g, g % 2, replicates=100), ranking.ranking(y, s, g, replicates=100))


def test_complete_separation_has_a_lower_bound_for_every_figure():
    y, s, g = cohort(8, malignant=40, separation=50)
    found = ranking.ranking(y, s, g, replicates=100)
    for figure in found.values():
        assert figure.interval.method == intervals.METHOD_SEPARATED
        assert 0 < figure.interval.low < figure.value == pytest.approx(figure.interval.high)
    patients = len(np.unique(g[y == 1]))
    missed, raised = (1 - 0.025 ** (1 / n) for n in (patients, 50))
    # Misplaced benign lesions come first: the precision is then that of all of them and every malignant one found.
    precision = 40 / (40 + raised * 1500)
    assert found["average_precision"].interval.low == pytest.approx((1 - missed) * precision)


def test_coverage_at_the_fewest_malignant_lesions_and_the_strongest_signal():
    y, s, g = cohort(0, malignant=100_000, patients=200_000, benign=300_000, separation=3.2)
    truth = metrics.pauc(y, s)
    held = []
    for seed in range(120):
        y, s, g = cohort(seed + 1, malignant=intervals.FEWEST_MALIGNANT, patients=200, benign=1000, separation=3.2)
        one = intervals.bootstrap_pauc(y, s, g, replicates=200, seed=seed)
        held.append(one.low <= truth <= one.high)
    assert np.mean(held) > 0.83
