"""A score above which a lesion is referred, chosen for a sensitivity that can be vouched for.

The bound is one-sided, 95 %: Clopper and Pearson's with the sample size that the patients' clustering leaves
(Korn and Graubard's method). A patient's lesions are found or missed together, so twenty of one patient say
less than one each of twenty. Without clustering, choosing the threshold on the same lesions costs nothing: the
bound is then the exact distribution of the true sensitivity at an order statistic of the malignant scores.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import lgamma
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lesionflow.errors import UsageError
from lesionflow.evaluation.metrics import Floats, Groups, Ints, checked, codes

METHOD = "one-sided Clopper-Pearson, effective sample size by patient"


@dataclass(frozen=True)
class Threshold:
    """Refer a lesion whose score is at least `value`."""

    value: float
    target: float
    """Sensitivity that was asked for."""
    reached: bool
    """Whether `lower_bound` reaches it; if not, `value` is the lowest malignant score, and `reason` says why."""
    sensitivity: float
    lower_bound: float
    specificity: float
    referred: float
    """Share of all lesions at or above the threshold."""
    level: float
    method: str
    malignant: int
    malignant_clusters: int
    """Patients (or lesions, where unknown) with a malignant lesion."""
    reason: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def sensitivity_lower_bound(
    y: ArrayLike, s: ArrayLike, groups: Groups, threshold: float, *, level: float = 0.95
) -> float:
    """Lower bound of the share of malignant lesions that score at least `threshold`, 0 to 1.

    y [n] 0/1, s [n], groups [n]: patient of each lesion. Raises `DataError` as `metrics.pauc` does.
    """
    malignant, scores = checked(y, s)
    return _bound(scores[malignant] >= threshold, codes(groups, len(scores))[malignant], level)


def choose_threshold(
    y: ArrayLike, s: ArrayLike, groups: Groups, sensitivity: float, *, level: float = 0.95
) -> Threshold:
    """The highest malignant score at which the sensitivity's lower bound reaches `sensitivity`.

    With too few malignant lesions no threshold does: the lowest malignant score is returned, `reached` false.
    """
    if not 0 < sensitivity < 1:
        raise UsageError(f"sensitivity must be between 0 and 1, got {sensitivity}")
    malignant, scores = checked(y, s)
    ours, owner = scores[malignant], codes(groups, len(scores))[malignant]
    value, bound = float(ours.min()), 0.0
    for value in np.unique(ours)[::-1].tolist():
        # The bound never exceeds the sensitivity itself, so most candidates need no more than this.
        if np.mean(ours >= value) > sensitivity and (bound := _bound(ours >= value, owner, level)) >= sensitivity:
            break
    reached, clusters = bound >= sensitivity, len(np.unique(owner))
    return Threshold(
        value=value,
        target=sensitivity,
        reached=reached,
        sensitivity=float(np.mean(ours >= value)),
        lower_bound=bound,
        specificity=float(np.mean(scores[~malignant] < value)),
        referred=float(np.mean(scores >= value)),
        level=level,
        method=METHOD,
        malignant=len(ours),
        malignant_clusters=clusters,
        reason=None if reached else _why(bound, sensitivity, clusters, level),
    )


def _why(bound: float, sensitivity: float, clusters: int, level: float) -> str:
    needed = int(np.ceil(np.log(1 - level) / np.log(sensitivity)))
    return (
        f"finding every malignant lesion of {clusters} patients vouches for a sensitivity of {bound:.3f} at most; "
        f"{sensitivity:g} takes at least {needed}"
    )


def _bound(found: NDArray[np.bool_], owner: Ints, level: float) -> float:
    """Lower bound of the mean of `found` [P], whose clusters are `owner` [P]."""
    share = float(found.mean())
    _, cluster, size = np.unique(owner, return_inverse=True, return_counts=True)
    count = len(size)
    if share == 1.0:
        return float((1 - level) ** (1 / count))
    if share == 0.0 or count < 2:
        return 0.0
    surplus = np.bincount(cluster, found - share)
    variance = float((surplus**2).sum()) / len(found) ** 2 * count / (count - 1)
    effective = min(len(found), share * (1 - share) / variance) if variance > 0 else len(found)
    return _beta_quantile(share * effective, (1 - share) * effective + 1, 1 - level)


def _beta_quantile(a: float, b: float, probability: float) -> float:
    """The quantile of the Beta(a, b) distribution, b >= 1, to about 1e-6; 0 for a < 1, where it is tiny."""
    if a < 1:
        return 0.0
    x: Floats = np.linspace(0.0, 1.0, 20_001)[1:-1]
    density = np.exp((a - 1) * np.log(x) + (b - 1) * np.log1p(-x) + lgamma(a + b) - lgamma(a) - lgamma(b))
    cumulative = np.cumsum((density + np.concatenate([[0.0], density[:-1]])) / 2)
    return float(np.interp(probability, cumulative / cumulative[-1], x))
