"""Validation on a sample: what is looked at, and how far its figure may be off."""

from __future__ import annotations

import numpy as np

from lesionflow.evaluation.metrics import pauc
from lesionflow.training.validation import FEWEST_BENIGN, sample, sampling_error


def cohort(seed: int, benign: int = 8000, malignant: int = 60) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    y = (np.arange(benign + malignant) < malignant).astype(np.int8)
    return y, rng.normal(size=len(y)) + 2.0 * y


def test_all_malignant_lesions_and_a_fixed_draw_of_the_others() -> None:
    y, _ = cohort(0)
    rows = np.random.default_rng(1).permutation(20_000)[: len(y)]
    chosen = sample(rows, y, 1000, seed=3)
    assert len(chosen.rows) == 1000 and chosen.targets.sum() == 60
    assert set(rows[y == 1]) <= set(chosen.rows) and len(set(chosen.rows)) == 1000
    assert np.array_equal(chosen.targets, y[[rows.tolist().index(row) for row in chosen.rows]])
    assert chosen.share == 940 / 8000
    assert np.array_equal(chosen.rows, sample(rows, y, 1000, seed=3).rows)
    assert not np.array_equal(chosen.rows, sample(rows, y, 1000, seed=4).rows)
    assert (sample(rows, y, 30, seed=3).targets == 0).sum() == FEWEST_BENIGN, "malignant ones leave room for others"


def test_nothing_is_drawn_where_all_are_asked_for() -> None:
    y, s = cohort(0)
    rows = np.arange(len(y))
    for most in (0, len(y), len(y) + 5):
        whole = sample(rows, y, most, seed=0)
        assert np.array_equal(whole.rows, rows) and whole.share == 1
        assert whole.figures(s) == {"pauc": pauc(y, s), "auc": pauc(y, s, 0.0), "pauc_error": 0.0}


def test_the_error_that_is_told_holds_in_nineteen_of_twenty_draws() -> None:
    y, s = cohort(2)
    truth, rows = pauc(y, s), np.arange(len(y))
    for most in (700, 4000):
        off, told = [], []
        for seed in range(600):
            chosen = sample(rows, y, most, seed)
            figures = chosen.figures(s[chosen.rows])
            off.append(abs(figures["pauc"] - truth))
            told.append(figures["pauc_error"])
        covered = np.mean(np.array(off) <= np.array(told))
        assert 0.92 < covered < 0.98, (most, covered)
        assert np.quantile(off, 0.95) > 0.8 * np.mean(told), "nor is it far too wide"


def test_ties_are_no_trouble() -> None:
    y = np.array([1, 1, 0, 0, 0, 0], np.int8)
    assert sampling_error(y, np.zeros(6), 0.5) == 0.0
    assert sampling_error(y, np.array([3.0, 1, 3, 1, 0, 0]), 0.5) > 0
