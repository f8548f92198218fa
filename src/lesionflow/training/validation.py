"""How good a model in training is, at a price that is bounded and with an error that is told.

Scoring all held-out lesions costs more than training on the few that balanced sampling draws. So validation looks at
all malignant ones and at a fixed, seeded sample of the benign ones. Given the malignant lesions, the pAUC is a mean
over benign lesions (of the share of the curve's upper part that outranks each), so the sample's error is a mean's.

The figures draw curves. They decide nothing: the fold is scored whole once training has ended.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from lesionflow.data.rows import Rows, where
from lesionflow.evaluation.metrics import MIN_TPR, auc, checked, order_of, pauc
from lesionflow.evaluation.resample import influence

FEWEST_BENIGN = 500
"""Benign lesions that are looked at where there are as many, however many malignant ones there are."""
LEVEL = 0.95
"""Of the error's interval."""


@dataclass(frozen=True)
class Sample:
    """Which held-out lesions are looked at."""

    rows: Rows
    """Rows of the store, in their order, [n]."""
    targets: NDArray[np.int8]
    """Theirs, int8 [n]."""
    share: float
    """Of all held-out benign lesions; 1: all of them."""

    def figures(self, logits: NDArray[np.float64]) -> dict[str, float]:
        """`pauc` and `auc` of the sample's logits, float64 [n], and `pauc_error`: see `sampling_error`."""
        return {
            "pauc": pauc(self.targets, logits),
            "auc": auc(self.targets, logits),
            "pauc_error": sampling_error(self.targets, logits, self.share),
        }


def sample(rows: Rows, targets: NDArray[np.int8], most: int, seed: int) -> Sample:
    """About `most` of the held-out `rows` (0: all), [N], with their `targets`, int8 [N]."""
    benign = where(targets != 1)
    wanted = max(most - (len(rows) - len(benign)), FEWEST_BENIGN) if most else len(benign)
    if wanted >= len(benign):
        return Sample(rows, targets, 1.0)
    drawn = np.random.default_rng([seed, 4]).choice(benign, wanted, replace=False)
    chosen = np.sort(np.concatenate([np.flatnonzero(targets == 1), drawn]))
    return Sample(rows[chosen], targets[chosen], wanted / len(benign))


def sampling_error(y: NDArray[np.int8], s: NDArray[np.float64], share: float, min_tpr: float = MIN_TPR) -> float:
    """How far the pAUC may lie from that of all benign lesions, of which `share` was drawn: half a 95 % interval.

    A mean's standard error with the correction for a finite population (Cochran, Sampling Techniques, 2.6), from the
    infinitesimal jackknife of the pAUC. That the malignant lesions are a sample too is not in it.
    """
    truth, values = checked(y, s)
    order = order_of(truth, values)
    benign = np.bincount(order.benign_cell, minlength=2 * order.size + 1)[None].astype(np.float64)
    malignant = np.bincount(order.malignant_at, minlength=order.size)[None].astype(np.float64)
    _, pull = influence(benign, malignant, min_tpr)
    of_benign = pull[0][order.benign_cell]
    count = len(of_benign)
    variance = float(of_benign @ of_benign) * count / max(1, count - 1) * (1 - share)
    return NormalDist().inv_cdf(0.5 + LEVEL / 2) * math.sqrt(max(0.0, variance))
