"""Paired differences: the same draws for both models."""

from __future__ import annotations

import numpy as np
import pytest

from lesionflow.evaluation import metrics
from lesionflow.evaluation.paired import paired_difference


def cohort(seed, malignant=60, patients=50, benign=1500, effect=0.5, separation=2.2):
    rng = np.random.default_rng(seed)
    y = np.r_[np.ones(malignant, int), np.zeros(benign, int)]
    patient = rng.integers(0, patients, len(y))
    return y, rng.normal(size=len(y)) + separation * y + effect * rng.normal(size=patients)[patient], patient


def test_paired_differences_use_the_same_replicates():
    y, s, g = cohort(12, malignant=100)
    rng = np.random.default_rng(0)
    worse = s + rng.normal(size=len(s)) * 1.5
    same = paired_difference(y, s, s, g, replicates=300)
    assert (same["difference"], same["low"], same["high"], same["p_better"]) == (0, 0, 0, 0.5)
    pair = paired_difference(y, s, worse, g, replicates=300)
    assert pair["difference"] == pytest.approx(metrics.pauc(y, s) - metrics.pauc(y, worse))
    assert 0 < pair["low"] < pair["difference"] < pair["high"]
    assert pair["p_better"] > 0.97
    turned = paired_difference(y, worse, s, g, replicates=300)
    assert turned["low"] == pytest.approx(-pair["high"])
    nearly = paired_difference(y, s, s + 1e-3 * rng.normal(size=len(s)), g, replicates=300)
    assert nearly["high"] - nearly["low"] < 0.002
    few = paired_difference(*cohort(13, malignant=10)[:2], cohort(13, malignant=10)[1], np.arange(1510))
    assert few["p_better"] is None
    assert "under 20" in few["reason"]
