"""How predicted and observed shares of malignant lesions agree, bin by bin, and the error that sums it up.

Expected calibration error: the mean over lesions, weighted to the stated prevalence, of |observed - predicted| in
the lesion's bin. Noise alone makes it larger than 0, the more so the fewer malignant lesions there are: so what a
normal error of the size measured adds to each bin on average is taken off (`ece`), and the plain figure is given
beside it (`ece_plain`). Some of the excess remains: near 0 no estimate of an absolute value is unbiased. Their common
interval is that of the true error over the same bins and doesn't need either to be unbiased.
"""

from __future__ import annotations

from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lesionflow.evaluation.intervals import Figure, Interval
from lesionflow.evaluation.metrics import Floats, Ints
from lesionflow.evaluation.prevalence import log_odds, share_interval, shares

BINS = 10
METHOD_BIN = "Clopper-Pearson, effective sample size by patient"
METHOD_ECE = "patient-clustered, normal bin errors, triangle inequality"


def binned(
    malignant: NDArray[np.bool_],
    p: Floats,
    weight: Floats,
    owner: Ints,
    share: float,
    common: dict[str, Any],
    replicates: int,
    seed: int,
    drawn: bool,
) -> dict[str, Any]:
    """The reliability bins, and the expected calibration error over them.

    A bin holds a tenth of the mean of the two classes' distributions. By lesions alone, all but one bin would hold
    hardly a malignant lesion; by malignant lesions alone, one bin would hold nearly all benign ones.
    """
    at = np.unique(p, return_inverse=True)[1]
    ill, well = int(malignant.sum()), int((~malignant).sum())
    mass = np.bincount(at, np.where(malignant, 0.5 / ill, 0.5 / well))
    # Equal probabilities stay together: in the bin where the middle of their mass falls.
    place = np.minimum(((np.cumsum(mass) - mass / 2) * BINS).astype(np.int64), BINS - 1)
    bin_of = np.unique(place, return_inverse=True)[1][at]
    count, odds_shift = int(bin_of.max()) + 1, log_odds(share) - log_odds(ill / len(p))
    wrong = weight * (malignant - p)
    gaps, held, lesions, found, predicted = (
        np.bincount(bin_of, one, count).astype(np.float64)
        for one in (wrong, weight, np.ones(len(p)), malignant, weight * p)
    )
    ends = np.searchsorted(bin_of[np.argsort(p, kind="stable")], np.arange(count + 1), "left")
    ordered = np.sort(p)
    # Independent lesions per lesion, for bins without a malignant one.
    alike = shares(malignant.astype(np.int64), owner, 2)[1][1] / len(p)
    bins: list[dict[str, Any]] = []
    for one in range(count):
        here = bin_of == one
        bins.append(
            {
                "low": float(ordered[ends[one]]),
                "high": float(ordered[ends[one + 1] - 1]),
                "lesions": int(lesions[one]),
                "malignant": int(found[one]),
                "share": float(held[one]),
                "predicted": float(predicted[one] / held[one]),
                "observed": _observed(malignant[here], owner[here], alike, odds_shift, common).to_dict(),
            }
        )
    plain, corrected, interval = _error(gaps, malignant, p, weight, owner, bin_of, common, replicates, seed, drawn)
    return {
        "ece": Figure(corrected, interval).to_dict(),
        "ece_plain": Figure(plain, interval).to_dict(),
        "bins": bins,
    }


def _error(
    gaps: Floats,
    malignant: NDArray[np.bool_],
    p: Floats,
    weight: Floats,
    owner: Ints,
    bin_of: Ints,
    common: dict[str, Any],
    replicates: int,
    seed: int,
    drawn: bool,
) -> tuple[float, float, Interval]:
    """Expected calibration error: as it is, less what noise adds to it, and the interval of the true one.

    With gaps = truth + Z, Z normal: | sum |gaps| - sum |truth| | <= sum |Z|, which bounds it from below; and
    sum |truth| <= sum |gaps| - sum of sign(truth) Z, from above.
    """
    count, groups, level = len(gaps), int(owner.max()) + 1, common["level"]
    # Each lesion's pull on each bin's gap: its own part, less its class's mean in every bin (see `prevalence.pulls`).
    table = np.bincount(owner * count + bin_of, weight * (malignant - p), groups * count).reshape(groups, count)
    for kind in (np.ones_like(malignant),) if drawn else (malignant, ~malignant):
        mean = np.bincount(bin_of[kind], (malignant - p)[kind], count) / kind.sum()
        table -= np.bincount(owner[kind], weight[kind], groups)[:, None] * mean
    covariance = table.T @ table * groups / max(groups - 1, 1)
    errors = np.sqrt(np.diag(covariance))
    plain = float(np.abs(gaps).sum())
    z = np.divide(np.abs(gaps), errors, out=np.full(count, 40.0), where=errors > 0)
    normal = NormalDist()
    # How much larger |gap + noise| is than |gap|, on average.
    excess = np.array([2 * (normal.pdf(one) - one * normal.cdf(-one)) for one in z])
    corrected = max(0.0, plain - float(errors @ excess))
    about = (level, METHOD_ECE, replicates, 0, groups, common["malignant"])
    if common["reason"]:
        return plain, corrected, Interval(None, None, *about, common["reason"])
    values, vectors = np.linalg.eigh(covariance)
    noise = np.random.default_rng([seed, 2]).standard_normal((replicates, count))
    noise = noise @ (vectors * np.sqrt(np.maximum(values, 0))).T
    low = plain - float(np.quantile(np.abs(noise).sum(axis=1), (1 + level) / 2))
    sign = np.sign(gaps)
    high = plain + normal.inv_cdf((1 + level) / 2) * float(np.sqrt(sign @ covariance @ sign))
    return plain, corrected, Interval(min(max(0.0, low), corrected), high, *about)


def _observed(found: NDArray[np.bool_], owner: Ints, alike: float, odds_shift: float, common: dict[str, Any]) -> Figure:
    """The share of malignant lesions in a bin at the stated prevalence: share and interval in the data, odds moved."""
    share, size = (float(one[1]) for one in shares(found.astype(np.int64), owner, 2))
    if not 0 < share < 1:
        size = len(found) * alike
    low, high = share_interval(share, size, common["level"])
    value, low, high = (q / (q + (1 - q) * float(np.exp(-odds_shift))) for q in (share, low, high))
    about = (common["level"], METHOD_BIN, 0, 0, len(np.unique(owner)), int(found.sum()))
    if common["reason"]:
        return Figure(value, Interval(None, None, *about, common["reason"]))
    return Figure(value, Interval(low, high, *about))
