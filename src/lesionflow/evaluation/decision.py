"""Is acting on the probability better than treating everybody, or nobody? Net benefit (Vickers & Elkin 2006).

At a threshold probability t a reader holds a missed cancer to be (1 - t) / t times as bad as a needless excision.
Net benefit is in cancers found per lesion, needless excisions taken off at that rate:

    prevalence * sensitivity - (1 - prevalence) * (1 - specificity) * t / (1 - t)

Treating nobody is 0. Bands are pointwise: intervals of the sensitivity and of the false-positive rate (Clopper and
Pearson's with the sample size that clustering by patient leaves), joined as Zou & Donner (2008, MOVER) do.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from lesionflow.errors import DataError
from lesionflow.evaluation.intervals import FEWEST_MALIGNANT
from lesionflow.evaluation.metrics import Groups, checked, codes
from lesionflow.evaluation.prevalence import stated, too_few
from lesionflow.evaluation.quantiles import beta_quantile
from lesionflow.evaluation.rates import effective_size

METHOD = "patient-clustered Clopper-Pearson of both classes, joined by MOVER, pointwise"


def decision_curve(
    p: ArrayLike,
    y: ArrayLike,
    groups: Groups,
    *,
    prevalence: float,
    replicates: int = 2000,
    seed: int = 0,
    level: float = 0.95,
    points: int = 41,
) -> dict[str, Any]:
    """Net benefit per lesion of acting from each threshold probability up, at the stated `prevalence`.

    p [n] probabilities, y [n] 0/1, groups [n]: the patient of each lesion. {prevalence, probability, net_benefit,
    low, high, treat_all: lists of `points` floats, level, method, reason}; low and high are None with a `reason`.
    """
    malignant, probability = checked(y, p)
    if (odd := np.nonzero((probability < 0) | (probability > 1))[0]).size:
        raise DataError(f"probabilities: row {odd[0]} is {probability[odd[0]]:g}; expected 0 to 1, so not a logit")
    share, owner = stated(malignant, prevalence), codes(groups, len(probability))
    threshold = np.geomspace(share / 20, min(share * 50, 0.5), points)
    odds = threshold / (1 - threshold)
    reason = too_few(int(malignant.sum())) if malignant.sum() < FEWEST_MALIGNANT else None
    net, low, high = np.empty(points), np.empty(points), np.empty(points)
    for i, t in enumerate(threshold):
        rates = [_share(probability[kind] >= t, owner[kind], level, reason is None) for kind in (malignant, ~malignant)]
        (found, found_low, found_high), (passed, passed_low, passed_high) = rates
        net[i] = share * found - (1 - share) * odds[i] * passed
        gain, cost = share, (1 - share) * odds[i]
        low[i] = net[i] - np.hypot(gain * (found - found_low), cost * (passed_high - passed))
        high[i] = net[i] + np.hypot(gain * (found_high - found), cost * (passed - passed_low))
    return {
        "prevalence": share,
        "probability": threshold.tolist(),
        "net_benefit": net.tolist(),
        "low": None if reason else low.tolist(),
        "high": None if reason else high.tolist(),
        "treat_all": (share - (1 - share) * odds).tolist(),
        "level": level,
        "method": METHOD,
        "reason": reason,
    }


def _share(flagged: ArrayLike, owner: ArrayLike, level: float, wanted: bool) -> tuple[float, float, float]:
    """Share of flagged lesions [n] with its interval."""
    hit = np.asarray(flagged).astype(np.float64)
    value = float(hit.mean())
    if not wanted:
        return value, value, value
    cluster = np.unique(np.asarray(owner), return_inverse=True)[1].astype(np.int64)
    size, tail = effective_size(hit, cluster), (1 - level) / 2
    low = beta_quantile(value * size, (1 - value) * size + 1, tail) if value > 0 else 0.0
    high = beta_quantile(value * size + 1, (1 - value) * size, 1 - tail) if value < 1 else 1.0
    return value, low, high
