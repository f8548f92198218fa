"""Figures at a stated prevalence, and their patient-clustered intervals without drawing a replicate.

Data for training are rarely as malignant as the people a model is used on: benign lesions are thinned, or few
were photographed. So each class is averaged by itself and the two are mixed as the stated prevalence says:
malignant lesions weigh prevalence / P each, benign ones (1 - prevalence) / N. That undoes thinning as long as
the benign lesions that were kept are a fair sample of their kind. A stated prevalence is a number without error;
that of the data (0) is an estimate, and the chance in the malignant count is then part of every interval.

A figure made of such means moves with each lesion's *pull* (its empirical influence). Summed over a patient's
lesions and squared, the pulls give the variance as if patients were a sample: no replicate, so it costs the
same for 1,042 patients and for 401,059 lone lesions. Interval: Student's t on the figure's natural scale.
The degrees of freedom are Satterthwaite's: few, where few patients carry the variance.
"""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from lesionflow.errors import UsageError
from lesionflow.evaluation.intervals import FEWEST_GROUPS, FEWEST_MALIGNANT, NOT_ASKED, Figure, Interval
from lesionflow.evaluation.metrics import Floats, Ints
from lesionflow.evaluation.quantiles import beta_quantile, satterthwaite, student_quantile

METHOD = "patient-clustered, linearised, t"


def stated(malignant: NDArray[np.bool_], prevalence: float) -> float:
    """The prevalence to state: the one that is given, or for 0 that of the data. 0 < result < 1."""
    if not 0 <= prevalence < 1:
        raise UsageError(f"prevalence must be at least 0 (as in the data) and below 1, got {prevalence}")
    return prevalence or float(malignant.mean())


def log_odds(share: float) -> float:
    """Natural logarithm of share / (1 - share)."""
    return float(np.log(share) - np.log1p(-share))


def weights(malignant: NDArray[np.bool_], prevalence: float) -> Floats:
    """Each lesion's weight so that the malignant ones [n] are `prevalence` of the whole: float64 [n], sum 1."""
    share = stated(malignant, prevalence)
    result: Floats = np.where(malignant, share / malignant.sum(), (1 - share) / (~malignant).sum())
    return result


def pulls(malignant: NDArray[np.bool_], weight: Floats, score: Floats, *, drawn: bool) -> Floats:
    """How much each lesion moves the mixed mean of `score` [n]: weight x (score - mean of its class).

    `drawn`: the prevalence is that of the data, so the malignant count is chance too, and the mean is that of all.
    """
    if drawn:
        inside: Floats = np.full(len(score), float(weight @ score))
    else:
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
    reason: str | None = None,
    scale: str = "real",
) -> Figure:
    """`value` with its interval, from each lesion's `pull` [n] and its group 0..G-1 [n].

    `scale`: `real` (anything), `positive` (log). `reason`: why there is to be no interval (see `refusal`).
    """
    groups = int(owner.max()) + 1
    squares = np.bincount(owner, pull, groups) ** 2
    total, method = float(squares.sum()), METHOD if scale == "real" else f"{METHOD}, log scale"

    def refused(reason: str) -> Figure:
        return Figure(value, Interval(None, None, level, method, 0, 0, groups, malignant, reason))

    if reason:
        return refused(reason)
    if groups < 2 or not total > 0 or (scale == "positive" and value <= 0):
        return refused("the figure does not vary between patients")
    freedom = satterthwaite(total, float((squares**2).sum()), groups)
    error = student_quantile((1 + level) / 2, freedom) * (total * groups / (groups - 1)) ** 0.5
    low, high = value - error, value + error
    if scale == "positive":
        low, high = value * float(np.exp(-error / value)), value * float(np.exp(min(error / value, 700)))
    return Figure(value, Interval(low, high, level, method, 0, 0, groups, malignant))


def shares(cell: Ints, owner: Ints, cells: int) -> tuple[Floats, Floats]:
    """For each c = 0..cells-1 the share of lesions with `cell` >= c, and how many independent lesions say as much.

    cell, owner int64 [n]; both results float64 [cells]. The size is Korn & Graubard's, as in `rates.proportion`;
    where a share is 0 or 1 it is that of the share nearest to it, as if the lesions were as clustered there.
    """
    _, cluster, size = np.unique(owner, return_inverse=True, return_counts=True)
    count, clusters = len(cell), len(size)
    several = size > 1
    # Lone lesions need no table: each is found or not, and its square is itself.
    row = (np.cumsum(several) - 1)[cluster]
    lone = ~several[cluster]
    alone = np.bincount(cell[lone], minlength=cells)[::-1].cumsum()[::-1].astype(np.float64)
    table = np.bincount(row[~lone] * cells + cell[~lone], minlength=int(several.sum()) * cells)
    above = table.reshape(-1, cells)[:, ::-1].cumsum(axis=1)[:, ::-1].astype(np.float64)
    members = size[several].astype(np.float64)
    share = (alone + above.sum(axis=0)) / count
    # The sum over clusters of (found - share * members) squared, multiplied out.
    squares = np.einsum("gc,gc->c", above, above) + alone - 2 * share * (members @ above + alone)
    squares += share**2 * (float(members @ members) + float(lone.sum()))
    variance = squares / count**2 * clusters / max(clusters - 1, 1)
    inside = (share > 0) & (share < 1) & (variance > 0)
    if clusters < 2 or not inside.any():
        return share, np.full(cells, float(clusters))
    certainty = student_quantile(0.975, count - 1) / student_quantile(0.975, clusters - 1)
    known = np.minimum(count, share[inside] * (1 - share[inside]) / variance[inside] * certainty**2)
    return share, known[np.argmin(np.abs(np.arange(cells)[:, None] - np.nonzero(inside)[0]), axis=1)]


def share_interval(share: float, size: float, level: float) -> tuple[float, float]:
    """Clopper and Pearson's two-sided interval of a share of `size` independent lesions; of very many, Wilson's."""
    tail = (1 - level) / 2
    if share * (1 - share) * size > 400:
        z = NormalDist().inv_cdf(1 - tail)
        middle, half = share + z**2 / (2 * size), z * (share * (1 - share) / size + z**2 / (4 * size**2)) ** 0.5
        return (middle - half) / (1 + z**2 / size), (middle + half) / (1 + z**2 / size)
    hits, misses = share * size, (1 - share) * size
    low = beta_quantile(hits, misses + 1, tail) if share > 0 else 0.0
    high = beta_quantile(hits + 1, misses, 1 - tail) if share < 1 else 1.0
    return low, high


def refusal(malignant: NDArray[np.bool_], owner: Ints, replicates: int) -> str | None:
    """Why no interval of these lesions [n] is printed, or None: not asked for, or too few."""
    count, patients = int(malignant.sum()), len(np.unique(owner[malignant]))
    if not replicates:
        return NOT_ASKED
    if count < FEWEST_MALIGNANT:
        return f"{count} malignant lesions: under {FEWEST_MALIGNANT}, no interval is worth printing"
    if patients < FEWEST_GROUPS:
        return f"malignant lesions of {patients} patients: under {FEWEST_GROUPS}, no interval is worth printing"
    return None
