"""Scores above which a lesion is referred, chosen for a sensitivity that can be vouched for.

The bound is one-sided, 95 %: Clopper and Pearson's with the sample size that the patients' clustering leaves, less
what so few patients leave uncertain about that (Korn and Graubard's factor). A patient's lesions are found or
missed together, so twenty of one patient say less than one each of twenty.

How alike they are is read off *all* malignant scores: the correlation of two malignant lesions of one patient, on
the normal scores of their ranks. What is found or missed at the threshold itself says too little about it (Korn and
Graubard estimate it there): where some patients have ten or more malignant lesions and none of them happens to be
missed, the bound would be far too high, and in simulations the true sensitivity was under it in up to 23 % of
cohorts instead of 5 % (benchmarks/clinical.py). The correlation of "found" is no larger than that of the scores, so
the bound errs to the safe side. The sample size doesn't depend on the threshold; so the bound rises as the threshold
falls, and choosing on the same lesions costs nothing.

Two thresholds make three bands: `refer` at or above the one that vouches for the wanted sensitivity, `low` under
the one that vouches for a higher one, `routine` between. Each of the two bounds holds with 95 % confidence on its own;
both together with at least 90 %.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lesionflow.errors import DataError, UsageError
from lesionflow.evaluation.metrics import Floats, Groups, Ints, checked, codes
from lesionflow.evaluation.quantiles import beta_cdf, beta_quantile, student_quantile

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
    ours = scores[malignant]
    size = independent_lesions(ours, codes(groups, len(scores))[malignant])
    return _bound(float(np.mean(ours >= threshold)), size, level)


def choose_threshold(
    y: ArrayLike,
    s: ArrayLike,
    groups: Groups,
    sensitivity: float,
    *,
    level: float = 0.95,
    judged: ArrayLike | None = None,
) -> Threshold:
    """The highest malignant score at which the sensitivity's lower bound reaches `sensitivity`.

    y [n] 0/1, s [n], groups [n]: patient of each lesion. `judged` bool [n]: whether the model gave an answer at
    all; a lesion without one is neither found nor referred, whatever its score. With too few malignant lesions no
    threshold reaches: the lowest malignant score is returned, `reached` false.
    """
    if not 0 < sensitivity < 1:
        raise UsageError(f"sensitivity must be between 0 and 1, got {sensitivity}")
    malignant, scores = checked(y, s)
    answered = _answered(judged, len(scores))
    owner = codes(groups, len(scores))[malignant]
    # What was not judged lies below every threshold.
    ours = np.where(answered, scores, -np.inf)[malignant]
    candidates = np.unique(ours[np.isfinite(ours)])
    if not len(candidates):
        raise DataError("judged: no malignant lesion was, so no threshold finds any; look at what makes them unusual")
    size = independent_lesions(ours, owner)
    found = 1 - np.searchsorted(np.sort(ours), candidates, "left") / len(ours)
    # The bound rises as the threshold falls, so the first from above that is vouched for is the highest.
    enough = (i for i in range(len(candidates) - 1, -1, -1) if _vouched(float(found[i]), size, level, sensitivity))
    at = next(enough, None)
    reached, at = at is not None, at or 0
    value, share, clusters = float(candidates[at]), float(found[at]), len(np.unique(owner))
    bound = _bound(share, size, level)
    return Threshold(
        value=value,
        target=sensitivity,
        reached=reached,
        sensitivity=share,
        lower_bound=bound,
        specificity=1 - float(np.mean((answered & (scores >= value))[~malignant])),
        referred=float(np.mean(answered & (scores >= value))),
        level=level,
        method=METHOD,
        malignant=len(ours),
        malignant_clusters=clusters,
        reason=None if reached else _why(bound, share, sensitivity, clusters, level),
    )


def choose_bands(
    y: ArrayLike,
    logit: ArrayLike,
    groups: Groups,
    *,
    sensitivity: float = 0.9,
    low_sensitivity: float = 0.95,
    prevalence: float = 0.0,
    level: float = 0.95,
    judged: ArrayLike | None = None,
) -> dict[str, dict[str, Any]]:
    """The thresholds `refer` and `low` of the three bands, as dicts.

    A lesion is referred from `refer`.logit up, and called low under `low`.logit, which is never above it. Each has
    logit, target, reached, sensitivity, lower_bound, specificity, referred (share of lesions at or above it, at the
    stated `prevalence`; 0: as in the data), level, method, malignant, malignant_clusters, reason. Arguments as in
    `choose_threshold`.
    """
    if low_sensitivity < sensitivity:
        raise UsageError(
            f"low_sensitivity ({low_sensitivity:g}) is under sensitivity ({sensitivity:g}); lesions called low must "
            "miss fewer cancers than those not referred, so raise it"
        )
    share = prevalence or float(np.mean(np.asarray(y, np.float64)))
    found = {}
    for name, target in (("refer", sensitivity), ("low", low_sensitivity)):
        one = choose_threshold(y, logit, groups, target, level=level, judged=judged).to_dict()
        referred = share * one["sensitivity"] + (1 - share) * (1 - one["specificity"])
        found[name] = {"logit": one.pop("value"), **one, "referred": referred}
    return found


def band_of(logit: ArrayLike, bands: Mapping[str, Mapping[str, Any]]) -> NDArray[np.str_] | None:
    """`refer`, `routine` or `low` for each logit [n] by `choose_bands`' result; None if `refer` was not reached.

    Where only `low` was not reached, every lesion that isn't referred is `routine`.
    """
    refer, low = bands["refer"], bands["low"]
    if not refer["reached"]:
        return None
    scores = np.asarray(logit, np.float64)
    below = np.where(scores < low["logit"], "low", "routine") if low["reached"] else "routine"
    return np.where(scores >= refer["logit"], "refer", below)


def _answered(judged: ArrayLike | None, count: int) -> NDArray[np.bool_]:
    if judged is None:
        return np.ones(count, bool)
    answered = np.asarray(judged, bool)
    if answered.shape != (count,):
        raise DataError(f"judged: {answered.size} values for {count} lesions; they must match row by row")
    return answered


def _why(bound: float, share: float, sensitivity: float, clusters: int, level: float) -> str:
    needed = int(np.ceil(np.log(1 - level) / np.log(sensitivity)))
    found = "every malignant lesion" if share == 1 else f"{share:.1%} of the malignant lesions"
    return (
        f"finding {found} of {clusters} patients vouches for a sensitivity of {bound:.3f} at most; "
        f"{sensitivity:g} takes at least {needed} patients with a malignant lesion"
    )


def independent_lesions(ours: Floats, owner: Ints) -> float:
    """How many malignant lesions of different patients say as much as these [P], whose patients are `owner` [P].

    n / (1 + (m - 1) * r), with m the mean number of malignant lesions of a malignant lesion's patient, and r the
    correlation of two of them (Kish; Korn & Graubard's factor for few patients).
    """
    _, cluster, size = np.unique(owner, return_inverse=True, return_counts=True)
    count, clusters = len(ours), len(size)
    if clusters == count:
        return float(count)
    if clusters < 2:
        return 0.0
    _, at, ties = np.unique(ours, return_inverse=True, return_counts=True)
    middle = (np.cumsum(ties) - ties / 2) / count
    normal = np.array([NormalDist().inv_cdf(float(rank)) for rank in middle])[at]
    normal -= normal.mean()
    total, square = np.bincount(cluster, normal), float(normal @ normal)
    pairs = float((size * (size - 1)).sum())
    alike = (float(total @ total) - square) / pairs / (square / count) if square > 0 else 1.0
    if alike <= 0:
        return float(count)
    certainty = (student_quantile(0.975, count - 1) / student_quantile(0.975, clusters - 1)) ** 2
    return count * certainty / (1 + min(alike, 1.0) * pairs / count)


def _bound(share: float, size: float, level: float) -> float:
    """Lower bound of a share of `size` independent lesions."""
    return beta_quantile(share * size, (1 - share) * size + 1, 1 - level) if share > 0 and size > 0 else 0.0


def _vouched(share: float, size: float, level: float, sensitivity: float) -> bool:
    """Whether that bound is at least `sensitivity`; quicker than the bound itself."""
    if share < sensitivity or size <= 0:
        return False
    return beta_cdf(share * size, (1 - share) * size + 1, sensitivity) <= 1 - level
