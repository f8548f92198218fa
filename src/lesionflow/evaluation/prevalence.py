"""Figures at a stated prevalence, and their patient-clustered intervals without drawing a replicate.

Data for training are rarely as malignant as the people a model is used on: benign lesions are thinned, or few
were photographed. So each class is averaged by itself and the two are mixed as the stated prevalence says:
malignant lesions weigh prevalence / P each, benign ones (1 - prevalence) / N. That undoes thinning as long as
the benign lesions that were kept are a fair sample of their kind.

A figure made of such means moves with each lesion's *pull* (its empirical influence). Summed over a patient's
lesions and squared, the pulls give the variance as if patients were a sample: no replicate, so it costs the
same for 1,042 patients and for 401,059 lone lesions. Interval: Student's t on the figure's natural scale.
The degrees of freedom are Satterthwaite's: few, where few patients carry the variance.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from lesionflow.errors import UsageError
from lesionflow.evaluation.intervals import FEWEST_MALIGNANT, Figure, Interval
from lesionflow.evaluation.metrics import Floats, Ints
from lesionflow.evaluation.quantiles import student_quantile

METHOD = "patient-clustered, linearised, t"
Scale = tuple[Callable[[float], float], Callable[[float], float], Callable[[float], float]]


def stated(malignant: NDArray[np.bool_], prevalence: float) -> float:
    """The prevalence to state: the one that is given, or for 0 that of the data. 0 < result < 1."""
    if not 0 <= prevalence < 1:
        raise UsageError(f"prevalence must be at least 0 (as in the data) and below 1, got {prevalence}")
    return prevalence or float(malignant.mean())


def weights(malignant: NDArray[np.bool_], prevalence: float) -> Floats:
    """Each lesion's weight so that the malignant ones [n] are `prevalence` of the whole: float64 [n], sum 1."""
    share = stated(malignant, prevalence)
    result: Floats = np.where(malignant, share / malignant.sum(), (1 - share) / (~malignant).sum())
    return result


def pulls(malignant: NDArray[np.bool_], weight: Floats, score: Floats) -> Floats:
    """How much each lesion moves the mixed mean of `score` [n]: weight x (score - mean of its class)."""
    inside = np.where(malignant, score[malignant].mean(), score[~malignant].mean())
    result: Floats = weight * (score - inside)
    return result


def linearised(
    value: float,
    pull: Floats,
    owner: Ints,
    *,
    malignant: int,
    level: float,
    scale: str = "real",
) -> Figure:
    """`value` with its interval, from each lesion's `pull` [n] and its group 0..G-1 [n].

    `scale`: `real` (anything), `positive` (log) or `share` (logit).
    """
    groups = int(owner.max()) + 1
    squares = np.bincount(owner, pull, groups) ** 2
    variance = float(squares.sum()) * groups / max(groups - 1, 1)

    def refused(reason: str) -> Figure:
        return Figure(value, Interval(None, None, level, METHOD, 0, 0, groups, malignant, reason))

    if malignant < FEWEST_MALIGNANT:
        return refused(too_few(malignant))
    if not variance > 0:
        return refused("the figure does not vary between patients")
    spread = float((squares**2).sum()) - float(squares.sum()) ** 2 / groups
    freedom = min(max(2 * float(squares.sum()) ** 2 / spread, 1.0), groups - 1.0) if spread > 0 else groups - 1.0
    error = student_quantile((1 + level) / 2, freedom) * variance**0.5
    if scale == "positive":
        if value <= 0:
            return refused("the figure is 0, so it has no logarithm")
        low, high = value * float(np.exp(-error / value)), value * float(np.exp(error / value))
    elif scale == "share":
        if not 0 < value < 1:
            return refused("the share is 0 or 1, so it does not vary")
        centre, half = np.log(value / (1 - value)), error / (value * (1 - value))
        low, high = (float(1 / (1 + np.exp(-(centre + side * half)))) for side in (-1, 1))
    else:
        low, high = value - error, value + error
    if not np.isfinite(high):
        return refused("the standard error is too large to say anything")
    return Figure(value, Interval(low, high, level, METHOD, 0, 0, groups, malignant))


def too_few(malignant: int) -> str:
    """Why no interval is printed."""
    return f"{malignant} malignant lesions: under {FEWEST_MALIGNANT}, no interval is worth printing"
