"""Is acting on the probability better than treating everybody, or nobody? Net benefit (Vickers & Elkin 2006).

At a threshold probability t a reader holds a missed cancer to be (1 - t) / t times as bad as a needless excision.
Net benefit is in cancers found per lesion, needless excisions taken off at that rate:

    prevalence * sensitivity - (1 - prevalence) * (1 - specificity) * t / (1 - t)

Treating nobody is 0. Bands are pointwise: intervals of the sensitivity and of the false-positive rate (Clopper and
Pearson's with the sample size that clustering by patient leaves), joined as Zou & Donner (2008, MOVER) do. Where the
prevalence is that of the data, its own interval is joined to them; a stated one is a number without error.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from lesionflow.errors import DataError
from lesionflow.evaluation.metrics import Floats, Groups, checked, codes
from lesionflow.evaluation.prevalence import refusal, share_interval, shares, stated

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
    reason = refusal(malignant, owner, replicates)
    gain, cost = share, (1 - share) * odds
    # The number of thresholds that a lesion reaches.
    cell = np.searchsorted(threshold, probability, "right")
    (found, found_size), (passed, passed_size) = (
        [one[1:] for one in shares(cell[kind], owner[kind], points + 1)] for kind in (malignant, ~malignant)
    )
    net = gain * found - cost * passed
    low, high = net.copy(), net.copy()
    if reason is None:
        found_low, found_high = _intervals(found, found_size, level)
        passed_low, passed_high = _intervals(passed, passed_size, level)
        below, above = np.zeros(points), np.zeros(points)
        if not prevalence:
            size = float(shares(malignant.astype(np.int64), owner, 2)[1][1])
            rarest, commonest = share_interval(share, size, level)
            per_cancer = found + passed * odds
            below, above = per_cancer * (share - rarest), per_cancer * (commonest - share)
        low -= np.sqrt((gain * (found - found_low)) ** 2 + (cost * (passed_high - passed)) ** 2 + below**2)
        high += np.sqrt((gain * (found_high - found)) ** 2 + (cost * (passed - passed_low)) ** 2 + above**2)
    return {
        "prevalence": share,
        "probability": threshold.tolist(),
        "net_benefit": net.tolist(),
        "low": None if reason else low.tolist(),
        "high": None if reason else high.tolist(),
        "treat_all": (gain - cost).tolist(),
        "level": level,
        "method": METHOD,
        "reason": reason,
    }


def _intervals(share: Floats, size: Floats, level: float) -> Floats:
    """Lower and upper ends, float64 [2, T]."""
    found = [share_interval(s, n, level) for s, n in zip(share.tolist(), size.tolist(), strict=True)]
    return np.array(found).T
