"""Probabilities: a planted prevalence comes back, figures equal their definitions, intervals hold the truth."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from lesionflow.bundle import _is_calibration
from lesionflow.errors import DataError, UsageError
from lesionflow.evaluation import calibration, metrics

PREVALENCE = 0.002


def cohort(seed, malignant, benign, patients=200, distance=2.0):
    """Normal scores with a patient effect, spread 1 in either class; the log-odds are linear in them."""
    rng = np.random.default_rng(seed)
    y = np.r_[np.ones(malignant, int), np.zeros(benign, int)]
    patient = rng.integers(0, patients, len(y))
    s = 0.92 * rng.normal(size=len(y)) + distance * y + 0.39 * rng.normal(size=patients)[patient]
    return y, 3 * s - 1, patient


def true_line(prevalence, distance=2.0):
    """a and b of `Calibration` for `cohort`'s logits."""
    return distance / 3, distance / 3 - distance**2 / 2 + np.log(prevalence / (1 - prevalence))


def test_the_line_is_logistic_regression_of_platt_s_targets():
    y, logit, _ = cohort(0, 300, 2000)
    ours = calibration.fit(logit, y, prevalence=0)
    high, low = 301 / 302, 1 / 2002
    x, target = np.r_[logit, logit][:, None], np.r_[np.ones(2300), np.zeros(2300)]
    weight = np.r_[np.where(y, high, low), np.where(y, 1 - high, 1 - low)]
    theirs = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(x, target, sample_weight=weight)
    assert ours.a == pytest.approx(theirs.coef_[0, 0], abs=1e-5)
    assert ours.b == pytest.approx(theirs.intercept_[0], abs=1e-5)


def test_a_prevalence_that_thinning_hid_is_recovered():
    y, logit, _ = cohort(1, 400, 4000)
    fitted = calibration.fit(logit, y, prevalence=PREVALENCE)
    assert fitted.data_prevalence == pytest.approx(1 / 11)
    a, b = true_line(PREVALENCE)
    assert fitted.a == pytest.approx(a, rel=0.1)
    assert fitted.b == pytest.approx(b, abs=0.35)
    # Other lesions of the same kind, not thinned.
    y, logit, patient = cohort(2, 600, 299_400, patients=2000)
    found = calibration.assess(fitted.probability(logit), y, patient, prevalence=0)
    assert found["data_prevalence"] == found["prevalence"] == pytest.approx(PREVALENCE)
    assert found["expected_observed"]["value"] == pytest.approx(1, abs=0.15)
    assert found["intercept"]["value"] == pytest.approx(0, abs=0.17)
    assert found["slope"]["value"] == pytest.approx(1, abs=0.1)
    # Without the shift every probability is about fifty times too high.
    naive = calibration.fit(*cohort(1, 400, 4000)[1::-1], prevalence=0)
    assert calibration.assess(naive.probability(logit), y, patient, prevalence=0)["expected_observed"]["value"] > 20


def test_weights_stand_for_the_lesions_that_were_thinned():
    y, logit, patient = cohort(3, 200, 40_000, patients=500)
    p = calibration.fit(logit, y, prevalence=0).probability(logit)
    kept = np.r_[np.arange(200), np.arange(200, len(y), 10)]
    whole = calibration.assess(p, y, patient, prevalence=0)
    thinned = calibration.assess(p[kept], y[kept], patient[kept], prevalence=200 / 40_200)
    for name in ("intercept", "slope", "expected_observed", "brier", "log_loss"):
        interval = thinned[name]["interval"]
        assert interval["low"] <= whole[name]["value"] <= interval["high"], name
        assert thinned[name]["value"] == pytest.approx(whole[name]["value"], rel=0.1, abs=0.15), name


def test_figures_equal_their_definitions_where_nothing_is_thinned():
    y, logit, patient = cohort(4, 150, 1350)
    p = 1 / (1 + np.exp(-(0.5 * logit - 1)))
    found = calibration.assess(p, y, patient, prevalence=0)
    assert found["brier"]["value"] == pytest.approx(metrics.brier(y, p), abs=1e-12)
    assert found["log_loss"]["value"] == pytest.approx(metrics.log_loss(y, p), abs=1e-12)
    assert found["expected_observed"]["value"] == pytest.approx(p.mean() / y.mean(), abs=1e-12)
    line = LogisticRegression(C=np.inf, tol=1e-10).fit((0.5 * logit - 1)[:, None], y)
    assert found["slope"]["value"] == pytest.approx(line.coef_[0, 0], abs=1e-4)
    shifted = 1 / (1 + np.exp(-(0.5 * logit - 1 + found["intercept"]["value"])))
    assert shifted.mean() == pytest.approx(y.mean(), abs=1e-9)
    error = 0.0
    for one in found["bins"]:
        here = (p >= one["low"]) & (p <= one["high"])
        assert (one["lesions"], one["malignant"]) == (here.sum(), y[here].sum())
        assert one["predicted"] == pytest.approx(p[here].mean(), abs=1e-12)
        assert one["observed"]["value"] == pytest.approx(y[here].mean(), abs=1e-12)
        assert one["observed"]["interval"]["low"] <= y[here].mean() <= one["observed"]["interval"]["high"]
        error += here.mean() * abs(p[here].mean() - y[here].mean())
    assert sum(one["lesions"] for one in found["bins"]) == len(y)
    assert found["ece_plain"]["value"] == pytest.approx(error, abs=1e-12)
    assert found["ece"]["value"] <= error


def test_bins_hold_malignant_lesions_even_where_one_in_a_thousand_is():
    y, logit, patient = cohort(5, 200, 200_000, patients=800)
    bins = calibration.assess(calibration.fit(logit, y, prevalence=0).probability(logit), y, patient, prevalence=0)[
        "bins"
    ]
    assert len(bins) == 10
    assert sum(one["malignant"] >= 10 for one in bins) >= 6
    assert max(one["lesions"] for one in bins) < 0.25 * len(y)


def test_equal_probabilities_share_a_bin():
    y, logit, patient = cohort(6, 200, 1800)
    p = np.clip(np.round(1 / (1 + np.exp(-logit)), 1), 0.05, 0.95)
    bins = calibration.assess(p, y, patient, prevalence=0)["bins"]
    assert all(before["high"] < after["low"] for before, after in itertools.pairwise(bins))
    constant = calibration.assess(np.full(len(y), 0.1), y, patient, prevalence=0)
    assert len(constant["bins"]) == 1
    assert constant["ece"]["value"] < 1e-12
    assert constant["slope"]["value"] is None
    assert "equal" in constant["slope"]["interval"]["reason"]


def test_each_part_is_scored_by_a_line_that_never_saw_it():
    y, logit, _ = cohort(7, 120, 1080)
    parts = np.arange(len(y)) % 3
    p = calibration.cross_fitted(logit, y, parts, prevalence=0.01)
    expected = calibration.fit(logit[parts != 1], y[parts != 1], prevalence=0.01).probability(logit[parts == 1])
    assert np.array_equal(p[parts == 1], expected)
    changed = y.copy()
    changed[parts == 1] = 1 - changed[parts == 1]
    assert np.array_equal(calibration.cross_fitted(logit, changed, parts, prevalence=0.01)[parts == 1], expected)


def test_parts_without_malignant_lesions_do_not_break_it():
    y, logit, _ = cohort(8, 60, 600)
    parts = np.where(y == 1, np.arange(len(y)) % 2, np.arange(len(y)) % 3)
    assert np.isfinite(calibration.cross_fitted(logit, y, parts, prevalence=0.01)).all()
    # All malignant lesions in one part: nothing to fit on for it, so it gets the prevalence.
    lumped = np.where(y == 1, 0, np.arange(len(y)) % 3)
    p = calibration.cross_fitted(logit, y, lumped, prevalence=0.01)
    assert np.all(p[lumped == 0] == 0.01)
    with pytest.raises(DataError, match=r"folds\.count.*folds\.holdout"):
        calibration.cross_fitted(logit, y, np.zeros(len(y)), prevalence=0.01)


def test_parts_hold_whole_patients_and_about_as_much_each():
    y, _, patient = cohort(9, 60, 3000, patients=150)
    parts = calibration.patient_parts(patient, seed=3, y=y)
    assert all(len(np.unique(parts[patient == one])) == 1 for one in np.unique(patient))
    assert np.ptp(np.bincount(parts)) < 0.1 * len(y)
    assert np.bincount(parts, y).min() >= 9
    order = np.random.default_rng(0).permutation(len(y))
    assert np.array_equal(calibration.patient_parts(patient[order], seed=3, y=y[order]), parts[order])
    assert not np.array_equal(calibration.patient_parts(patient, seed=4), calibration.patient_parts(patient, seed=5))


@pytest.mark.parametrize("scores", ["separated", "reversed", "constant", "huge"])
def test_odd_scores_give_a_line_that_a_bundle_takes(scores):
    y = np.r_[np.ones(30, int), np.zeros(300, int)]
    s = np.random.default_rng(0).normal(size=330)
    s = {"separated": s / 100 + 5 * y, "reversed": s - 3 * y, "constant": np.ones(330), "huge": (s + 2 * y) * 1e150}[
        scores
    ]
    fitted = calibration.fit(s, y, prevalence=0.01)
    assert _is_calibration(fitted.to_dict())
    p = fitted.probability(s)
    assert np.isfinite(p).all()
    if scores in ("reversed", "constant"):
        assert p.mean() == pytest.approx(0.01, rel=0.01)


def test_nothing_depends_on_the_order_of_rows():
    y, logit, patient = cohort(10, 90, 1500)
    order = np.random.default_rng(1).permutation(len(y))
    assert calibration.fit(logit, y, prevalence=0.01) == calibration.fit(logit[order], y[order], prevalence=0.01)
    p = calibration.fit(logit, y, prevalence=0.01).probability(logit)
    one, other = (calibration.assess(p[o], y[o], patient[o], prevalence=0.01) for o in (np.arange(len(y)), order))
    assert one == other


def test_intervals_hold_the_truth_and_few_malignant_lesions_get_none():
    a, b = true_line(PREVALENCE)
    held = {"intercept": 0, "slope": 0, "expected_observed": 0, "ece": 0}
    for seed in range(100):
        y, logit, patient = cohort(100 + seed, 60, 2000, patients=100)
        p = 1 / (1 + np.exp(-(a * logit + b)))
        found = calibration.assess(p, y, patient, prevalence=PREVALENCE, replicates=200)
        for name, truth in {"intercept": 0, "slope": 1, "expected_observed": 1, "ece": 0}.items():
            interval = found[name]["interval"]
            held[name] += interval["low"] <= truth <= interval["high"]
    assert min(held.values()) >= 87, held
    few = calibration.assess(p[40:], y[40:], patient[40:], prevalence=PREVALENCE)
    assert few["slope"]["interval"]["low"] is not None
    y[:41] = 0
    few = calibration.assess(p, y, patient, prevalence=PREVALENCE)
    for name in (*held, "brier", "log_loss", "ece_plain"):
        assert "19 malignant" in few[name]["interval"]["reason"], name
    unasked = calibration.assess(p, y, patient, prevalence=PREVALENCE, replicates=0)
    assert unasked["brier"]["interval"]["reason"] == "not asked for"


def test_intervals_know_that_the_malignant_count_of_the_data_is_chance():
    rng, names, spans = np.random.default_rng(0), ("intercept", "expected_observed", "brier", "log_loss"), []
    for _ in range(200):
        y = (rng.random(2000) < 0.05).astype(int)
        x = 2 * (rng.normal(size=2000) + 2 * y) - 2 + np.log(0.05 / 0.95)
        found = calibration.assess(1 / (1 + np.exp(-x)), y, np.arange(2000), prevalence=0, replicates=1)
        assert found["note"] is None
        spans.append([[found[n]["value"], found[n]["interval"]["low"], found[n]["interval"]["high"]] for n in names])
    value, low, high = np.moveaxis(np.array(spans), 2, 0)
    truth = np.r_[0, 1, value.mean(axis=0)[2:]]
    held = ((low <= truth) & (truth <= high)).mean(axis=0)
    assert held.min() >= 0.91, held
    assert (
        "assumed, not tested" in calibration.assess(1 / (1 + np.exp(-x)), y, np.arange(2000), prevalence=0.01)["note"]
    )


def test_the_standard_error_is_what_drawing_patients_gives():
    y, logit, patient = cohort(13, 100, 15_000, patients=120)
    p = calibration.fit(logit, y, prevalence=PREVALENCE).probability(logit)
    found = calibration.assess(p, y, patient, prevalence=PREVALENCE)
    rng, drawn = np.random.default_rng(0), []
    rows = [np.nonzero(patient == one)[0] for one in range(120)]
    for _ in range(300):
        some = np.concatenate([rows[i] for i in rng.integers(0, 120, 120)])
        one = calibration.assess(p[some], y[some], patient[some], prevalence=PREVALENCE, replicates=0)
        drawn.append([one[name]["value"] for name in ("intercept", "slope", "expected_observed", "brier")])
    for name, error in zip(("intercept", "slope", "expected_observed", "brier"), np.std(drawn, axis=0), strict=True):
        interval = found[name]["interval"]
        ends = np.array([interval["low"], interval["high"]])
        width = np.diff(np.log(ends))[0] * found[name]["value"] if "log" in interval["method"] else np.diff(ends)[0]
        # Twice a t quantile of some dozen degrees of freedom, 2.0 to 2.2.
        assert width / error == pytest.approx(4.2, rel=0.17), name


def test_the_corrected_error_is_nearer_to_the_truth_than_the_plain_one():
    a, b = true_line(PREVALENCE)
    plain, corrected = [], []
    for seed in range(30):
        y, logit, patient = cohort(300 + seed, 60, 2000, patients=100)
        found = calibration.assess(1 / (1 + np.exp(-(a * logit + b))), y, patient, prevalence=PREVALENCE)
        plain.append(found["ece_plain"]["value"])
        corrected.append(found["ece"]["value"])
    # The truth is 0.
    assert np.mean(corrected) < 0.7 * np.mean(plain)


def test_what_is_no_probability_or_prevalence_is_refused():
    y, logit, patient = cohort(11, 20, 40)
    with pytest.raises(DataError, match="not a logit"):
        calibration.assess(logit, y, patient, prevalence=0.01)
    with pytest.raises(UsageError, match="prevalence"):
        calibration.fit(logit, y, prevalence=1.0)
    with pytest.raises(DataError, match="both classes"):
        calibration.fit(logit, np.zeros(60), prevalence=0.01)


def test_the_whole_competition_s_size_takes_about_a_second():
    y, logit, patient = cohort(12, 393, 400_666, patients=1042)
    start = time.process_time()
    parts = calibration.patient_parts(patient, y=y)
    p = calibration.cross_fitted(logit, y, parts, prevalence=0.00098)
    calibration.assess(p, y, patient, prevalence=0.00098)
    assert time.process_time() - start < 3


@pytest.mark.parametrize("prevalence", [0.0, 0.01])
def test_the_covariance_is_what_repeated_cohorts_show(prevalence):
    # Patients are alike inside, so lesions taken as independent would give far too narrow an interval.
    rng, found, lines = np.random.default_rng(3), [], []
    for _ in range(300):
        owner = np.repeat(np.arange(150), 8)
        s = rng.normal(size=150)[owner] + rng.normal(size=len(owner))
        odds = 0.9 * s - 2.5 + 1.2 * rng.normal(size=150)[owner]
        y = (rng.random(len(s)) < calibration.sigmoid(odds)).astype(int)
        fitted = calibration.fit(s, y, prevalence=prevalence, groups=owner)
        found.append(fitted.covariance)
        lines.append([fitted.a, fitted.b])
    true = np.cov(np.transpose(lines))
    assert np.sqrt(np.diag(np.mean(found, 0))) == pytest.approx(np.sqrt(np.diag(true)), rel=0.12)
    assert np.mean(found, 0)[0, 1] == pytest.approx(true[0, 1], abs=0.3 * np.sqrt(true[0, 0] * true[1, 1]))


def test_the_covariance_is_symmetric_to_the_last_digit():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        s = rng.normal(-2, 4, 300)
        ill = rng.random(300) < calibration.sigmoid(s)
        (_, ab), (ba, _) = calibration.fit(s, ill, prevalence=0.01, groups=np.arange(300) // 3).covariance
        assert ab == ba


def test_too_few_malignant_lesions_give_no_covariance():
    rng = np.random.default_rng(0)
    ill = np.arange(300) < 20
    s = rng.normal(size=300) + ill
    assert (
        calibration.fit(s, ill & (np.arange(300) > 0), prevalence=0.01, groups=np.arange(300)).to_dict()["covariance"]
        is None
    )
    assert calibration.fit(s, ill, prevalence=0.01, groups=np.arange(300)).covariance is not None
