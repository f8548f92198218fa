"""The metric against its published test vectors, scikit-learn, and its own definition."""

from __future__ import annotations

import math
from bisect import bisect_left

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score, roc_curve
from sklearn.metrics import log_loss as sklearn_log_loss

from lesionflow.errors import DataError, UsageError
from lesionflow.evaluation import metrics

I = np.arange(1000)  # noqa: E741
V6_Y = (I % 50 == 0).astype(int)
V6_S = (((7919 * I) % 1009) / 1009 + 0.6 * V6_Y * ((31 * I) % 97) / 97) / 1.6

VECTORS = {
    "V1": ([0, 0, 0, 1, 1], [0.1, 0.2, 0.3, 0.8, 0.9], 0.2),
    "V2": ([0, 0, 0, 1, 1], [0.5] * 5, 0.02),
    "V3": ([0, 0, 0, 1, 1], [0.9, 0.8, 0.7, 0.2, 0.1], 0.0),
    "V4": ([1, 0] * 5, [0.95, 0.90, 0.85, 0.80, 0.75, 0.60, 0.55, 0.40, 0.35, 0.10], 0.04),
    "V5": (
        [1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 1, 0],
        [0.9, 0.8, 0.8, 0.5, 0.5, 0.5, 0.3, 0.3, 0.2, 0.1, 0.3, 0.05],
        0.1142857142857,
    ),
    "V6": (V6_Y, V6_S, 0.079744897959184),
    "V6b": (V6_Y, 10 * V6_S, 0.079744897959184),
    "V7": ([0] * 4 + [1] * 5, np.array([1, 2, 3, 8, 5, 6, 7, 9, 10]) * 1e-20, 0.15),
    "V11": ([0, 0, 0, 0, 1], [0.1, 0.2, 0.3, 0.9, 0.5], 0.15),
    "V12": ([1, 0, 1, 0, 0, 1, 0], [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3], 0.05),
    "V13": ([1] * 4 + [0] * 4, [0.9, 0.8, 0.4, 0.4, 0.4, 0.3, 0.2, 0.1], 0.16),
    "V14": (
        [1] * 5 + [0] * 5,
        np.array([0.9, 0.8, 0.7, 3e-9, 2e-9, 1e-9, 5e-10, 2.5e-9, 1e-10, 1e-11], np.float32),
        0.16,
    ),
}


def by_sklearn(y, s, min_tpr=0.8):
    """scikit-learn's value with its McClish correction undone."""
    y, s = np.asarray(y), np.asarray(s, np.float64)
    low, high = 0.5 * (1 - min_tpr) ** 2, 1 - min_tpr
    return low + (high - low) * (roc_auc_score(1 - y, -s, max_fpr=1 - min_tpr) - 0.5) / 0.5


@pytest.mark.parametrize("name", VECTORS)
def test_published_vectors(name):
    y, s, expected = VECTORS[name]
    assert metrics.pauc(y, s) == pytest.approx(expected, abs=1e-9)


def by_definition(y, s, min_tpr=0.8):
    """The published definition word by word: each distinct score is a point, straight lines between, the area above."""
    scores = [float(v) for v in s]
    ill = sorted(v for v, kind in zip(scores, y, strict=True) if kind)
    well = sorted(v for v, kind in zip(scores, y, strict=True) if not kind)
    tpr, fpr, pieces = 0.0, 0.0, []
    for t in sorted(set(scores), reverse=True):
        next_tpr = (len(ill) - bisect_left(ill, t)) / len(ill)
        next_fpr = (len(well) - bisect_left(well, t)) / len(well)
        if next_tpr > max(tpr, min_tpr):
            start = max(tpr, min_tpr)
            cut = fpr + (next_fpr - fpr) * (start - tpr) / (next_tpr - tpr)
            pieces.append((next_tpr - start) * (1 - (cut + next_fpr) / 2))
        tpr, fpr = next_tpr, next_fpr
    return math.fsum(pieces)


def random_case(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 400))
    y = (rng.random(n) < rng.choice([0.01, 0.1, 0.5, 0.9])).astype(int)
    y[rng.integers(n)] = 1  # At least one malignant, often just one.
    if y.all():
        y[rng.integers(n)] = 0
    s = rng.normal(size=n) + y * rng.choice([0, 1, 3])
    shape = seed % 6
    if shape == 0:
        s = np.round(s)
    elif shape == 1:
        s = s * 1e-300
    elif shape == 2:
        s = s * 1e300
    elif shape == 3:
        s = (1 / (1 + np.exp(-s * 12))).astype(np.float32)
    elif shape == 4:
        s = rng.choice(s, n)
    return y, s


def test_a_thousand_random_cases_equal_the_definition_whatever_the_order_of_rows():
    worst, one_malignant, tied = 0.0, 0, 0
    for seed in range(1000):
        y, s = random_case(seed)
        min_tpr = 0.8 if seed % 3 else 0.88
        value = metrics.pauc(y, s, min_tpr)
        worst = max(worst, abs(value - by_definition(y, s, min_tpr)))
        if seed % 7 == 0:
            worst = max(worst, abs(value - by_sklearn(y, s, min_tpr)))
        turned = np.random.default_rng(seed).permutation(len(y))
        assert metrics.pauc(y[turned], s[turned], min_tpr) == value
        one_malignant += int(y.sum() == 1)
        tied += int(len(np.unique(s)) < len(s))
    assert worst < 1e-12
    assert one_malignant > 20
    assert tied > 200


def test_the_whole_area_and_average_precision_equal_scikit_learn():
    for seed in range(120):
        y, s = random_case(seed)
        assert metrics.auc(y, s) == pytest.approx(roc_auc_score(y, s), abs=1e-12)
        assert metrics.average_precision(y, s) == pytest.approx(average_precision_score(y, s), abs=1e-12)
        fpr, tpr, _ = roc_curve(y, s, drop_intermediate=False)
        np.testing.assert_allclose(np.stack(metrics.roc_points(y, s)), np.stack([fpr, tpr]), atol=1e-12)


LESIONS = st.lists(
    st.tuples(st.booleans(), st.one_of(st.integers(-3, 3).map(float), st.floats(-1e6, 1e6)), st.integers(0, 3)),
    min_size=2,
    max_size=60,
).filter(lambda rows: len({r[0] for r in rows}) == 2)


@given(LESIONS, st.randoms(use_true_random=False))
def test_the_order_of_rows_never_matters(rows, random):
    shuffled = list(rows)
    random.shuffle(shuffled)
    results = []
    for table in (rows, shuffled):
        y, s, patient = zip(*table, strict=True)
        results.append((metrics.pauc(y, s), metrics.auc(y, s), metrics.top_k_retrieval(y, s, patient, k=2)))
    assert results[0] == results[1]


@given(LESIONS)
def test_only_the_ranking_matters(rows):
    y, s, _ = zip(*rows, strict=True)
    rank = np.unique(s, return_inverse=True)[1]
    assert metrics.pauc(y, s) == metrics.pauc(y, rank * 7.0 - 3)
    assert metrics.pauc(y, s) == pytest.approx(metrics.pauc(y, metrics.fold_rank(s, [0] * len(s))), abs=1e-12)


def test_a_shifted_fold_hurts_pooling_but_not_ranked_pooling():
    rng = np.random.default_rng(0)
    y = np.tile([1, 0, 0, 0, 0], 40)
    s = rng.normal(size=200) + 4 * y
    fold = np.arange(200) // 100
    shifted = s + 50 * fold
    assert metrics.pauc(y, shifted) < 0.8 * metrics.pauc(y, s)
    assert metrics.pauc(y, metrics.fold_rank(shifted, fold)) == metrics.pauc(y, metrics.fold_rank(s, fold))
    ranks = metrics.fold_rank(shifted, fold)
    assert 0 < ranks.min() < ranks.max() < 1
    np.testing.assert_array_equal(metrics.fold_rank([1, 1, 2, 9], [0, 0, 0, 1]), [1 / 3, 1 / 3, 2.5 / 3, 0.5])


def test_retrieval_counts_only_the_patient_s_own_lesions_and_gives_ties_to_the_benign():
    patients = ["a"] * 4 + ["b"] * 2
    y = [1, 0, 0, 1, 1, 0]
    s = [0.9, 0.5, 0.1, 0.5, 0.01, 0.02]
    assert metrics.top_k_retrieval(y, s, patients, k=1) == pytest.approx(1 / 3)
    # Second place of patient a is tied between a benign and a malignant lesion: the benign one takes it.
    assert metrics.top_k_retrieval(y, s, patients, k=2) == pytest.approx(2 / 3)
    assert metrics.top_k_retrieval(y, s, patients, k=3) == 1.0
    assert metrics.top_k_retrieval(y[::-1], s[::-1], patients[::-1], k=2) == pytest.approx(2 / 3)
    assert metrics.retrieved(y, s, patients, k=1).tolist() == [True, False, False]
    assert metrics.retrieved(y, s, patients, k=2).tolist() == [True, False, True]


def test_losses_equal_scikit_learn_and_refuse_logits():
    rng = np.random.default_rng(3)
    y, p = (rng.random(500) < 0.2).astype(int), rng.random(500)
    assert metrics.brier(y, p) == pytest.approx(brier_score_loss(y, p), abs=1e-12)
    assert metrics.log_loss(y, p) == pytest.approx(sklearn_log_loss(y, p), abs=1e-12)
    with pytest.raises(DataError, match=r"row 2 is 1\.5"):
        metrics.brier([0, 1, 1], [0.2, 0.3, 1.5])


@pytest.mark.parametrize(
    ("y", "s", "message"),
    [
        ([0, 0, 0], [1, 2, 3], "all 3 lesions are benign"),
        ([1, 1], [1, 2], "all 2 lesions are malignant"),
        ([], [], "no lesions"),
        ([0, 1, 1], [0.1, np.nan, np.inf], "2 of 3 are NaN or infinite, first at row 1, 2"),
        ([0, 1, 2], [0.1, 0.2, 0.3], "row 2 is 2; expected 1"),
        ([0, 1], [0.1, 0.2, 0.3], "2 targets for 3 scores"),
        ([0, 1], ["a", "b"], "not all numbers"),
        ([[0, 1]], [[0.1, 0.2]], "one value per lesion"),
    ],
)
def test_unusable_input_is_named(y, s, message):
    with pytest.raises(DataError, match=message):
        metrics.pauc(y, s)


def test_min_tpr_out_of_range_is_a_usage_error():
    with pytest.raises(UsageError, match=r"min_tpr.*got 1"):
        metrics.pauc([0, 1], [0, 1], min_tpr=1.0)


@pytest.mark.parametrize("groups", [[7, 3, 7, 12], [-1, -5, -1, 2], [7_000_000_000, 3, 7_000_000_000, 9_000_000_000]])
def test_groups_become_whole_numbers_in_their_order(groups):
    assert metrics.codes(np.array(groups), 4).tolist() == [1, 0, 1, 2]
    assert metrics.codes(["b", "a", "b", "c"], 4).tolist() == [1, 0, 1, 2]


def test_groups_must_be_known_and_match():
    with pytest.raises(DataError, match="row 1 has none"):
        metrics.codes(["a", None], 2)
    with pytest.raises(DataError, match="1 values for 2 lesions"):
        metrics.top_k_retrieval([0, 1], [0, 1], ["a"])
