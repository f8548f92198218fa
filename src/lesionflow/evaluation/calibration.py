"""Logits to probabilities of a stated prevalence, and whether those probabilities are right.

The model is trained on balanced batches and often on thinned benign lesions, so the sigmoid of its logit is not
a probability. `fit` finds the line a * logit + b whose sigmoid is one (Platt 1999, with his smoothed targets),
then moves b by the difference of the log-odds of the stated and the data's prevalence (Elkan 2001; Saerens and
others 2002). `cross_fitted` does so on other patients than it is applied to; `assess` measures the result.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lesionflow.errors import DataError
from lesionflow.evaluation.intervals import FEWEST_MALIGNANT, NOT_ASKED, Figure, Interval
from lesionflow.evaluation.metrics import Floats, Groups, Ints, checked, codes
from lesionflow.evaluation.prevalence import linearised, pulls, share_interval, shares, stated, too_few, weights

LEAST_SLOPE = 1e-6
"""Per standard deviation of the logit. Scores that rank the wrong way keep their order and say nothing."""
BINS = 10
METHOD_BIN = "Clopper-Pearson, effective sample size by patient"
METHOD_ECE = "patient-clustered, normal bin errors, triangle inequality"
_CELLS = 4096
_TINY = 1e-12
"""Probabilities are kept this far from 0 and 1 where their logarithm is needed."""


@dataclass(frozen=True)
class Calibration:
    """Probability = sigmoid(a * logit + b)."""

    a: float
    """Above 0, so that no order changes."""
    b: float
    prevalence: float
    """Share of malignant lesions that the probabilities are meant for."""
    data_prevalence: float
    """The share in the lesions it was fitted on."""
    lesions: int
    malignant: int

    def probability(self, logit: ArrayLike) -> Floats:
        """Probabilities float64, same shape, of finite logits."""
        return sigmoid(self.a * np.asarray(logit, np.float64) + self.b)

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "logistic"} | asdict(self)


def fit(logit: ArrayLike, y: ArrayLike, *, prevalence: float) -> Calibration:
    """The calibration of `logit` [n] for targets y [n] 0/1, for a population of `prevalence` (0: as in the data).

    Raises `DataError` for NaN, infinities or a single class, as `metrics.pauc` does.
    """
    malignant, scores = checked(y, logit)
    return _fit(malignant, scores, prevalence)


def cross_fitted(logit: ArrayLike, y: ArrayLike, parts: ArrayLike, *, prevalence: float) -> Floats:
    """Probabilities float64 [n]: those of each part (`parts` [n], folds or `patient_parts`) from a fit on all others.

    Where the others are of one class only there is nothing to fit: the part gets the prevalence itself.
    """
    malignant, scores = checked(y, logit)
    part = np.asarray(parts)
    if part.shape != scores.shape:
        raise DataError(f"parts: {part.size} values for {scores.size} lesions; they must match row by row")
    distinct = np.unique(part)
    if len(distinct) < 2:
        raise DataError("parts: one part only; calibration is measured on others than it was fitted on, so give two")
    result = np.empty_like(scores)
    for one in distinct:
        here = part == one
        rest = malignant[~here]
        if rest.all() or not rest.any():
            result[here] = stated(malignant, prevalence)
        else:
            result[here] = _fit(rest, scores[~here], prevalence).probability(scores[here])
    return result


def patient_parts(groups: Groups, count: int = 5, seed: int = 0, *, y: ArrayLike | None = None) -> Ints:
    """Patient-disjoint parts 0..count-1 of about the same number of lesions, int64 [n], whatever the order of rows.

    With targets y [n] the patients with most malignant lesions are dealt first, so that each part gets its share.
    """
    owner = codes(groups, len(groups))
    size = np.bincount(owner)
    ill = np.zeros(len(size)) if y is None else np.bincount(owner, np.asarray(y, np.float64), len(size))
    shuffled = np.random.default_rng(seed).permutation(len(size))
    order = shuffled[np.lexsort((-size[shuffled], -ill[shuffled]))]
    turn, seat = np.divmod(np.arange(len(size)), count)
    part = np.empty(len(size), np.int64)
    part[order] = np.where(turn % 2 == 0, seat, count - 1 - seat)
    return part[owner]


def assess(
    p: ArrayLike,
    y: ArrayLike,
    groups: Groups,
    *,
    prevalence: float,
    replicates: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Any]:
    """How right the probabilities p [n] are for targets y [n], lesions weighted to `prevalence` (0: as in the data).

    groups [n]: the patient of each lesion. Raises `DataError` as `metrics.brier` and `metrics.pauc` do.
    """
    malignant, probability = checked(y, p)
    if (odd := np.nonzero((probability < 0) | (probability > 1))[0]).size:
        raise DataError(f"probabilities: row {odd[0]} is {probability[odd[0]]:g}; expected 0 to 1, so not a logit")
    owner, share, weight = (
        codes(groups, len(probability)),
        stated(malignant, prevalence),
        weights(malignant, prevalence),
    )
    common: dict[str, Any] = {"malignant": int(malignant.sum()), "level": level, "replicates": replicates}
    safe = np.clip(probability, _TINY, 1 - _TINY)
    x, truth = np.log(safe) - np.log1p(-safe), malignant.astype(np.float64)

    def mean(score: Floats) -> Figure:
        return linearised(float(weight @ score), pulls(malignant, weight, score), owner, scale="positive", **common)

    intercept, intercept_pull = _shift(malignant, weight, x)
    slope, slope_pull = _slope(malignant, weight, x)
    expected = mean(probability).value or 0.0
    ratio_pull = pulls(malignant, weight, probability) / share
    return {
        "prevalence": share,
        "data_prevalence": float(malignant.mean()),
        "intercept": linearised(intercept, intercept_pull, owner, **common).to_dict(),
        "slope": linearised(slope, slope_pull, owner, **common).to_dict(),
        **_binned(malignant, probability, weight, owner, share, common, seed),
        "brier": mean((probability - truth) ** 2).to_dict(),
        "log_loss": mean(-np.where(malignant, np.log(safe), np.log1p(-safe))).to_dict(),
        "expected_observed": linearised(expected / share, ratio_pull, owner, scale="positive", **common).to_dict(),
        "reason": None,
    }


def sigmoid(x: Floats) -> Floats:
    """1 / (1 + exp(-x)) without overflow."""
    small = np.exp(-np.abs(x))
    result: Floats = np.where(x >= 0, 1.0, small) / (1 + small)
    return result


def _fit(malignant: NDArray[np.bool_], scores: Floats, prevalence: float) -> Calibration:
    count, ill = len(scores), int(malignant.sum())
    target = np.where(malignant, (ill + 1) / (ill + 2), 1 / (count - ill + 2))
    centre, spread = float(scores.mean()), float(scores.std())
    if not spread > 0 or not np.isfinite(spread):
        spread = float(np.abs(scores).max()) or 1.0
    x = (scores - centre) / spread
    slope, intercept = _logistic(x, target, np.full(count, 1 / count))
    data = ill / count
    if slope < LEAST_SLOPE:
        slope, intercept = LEAST_SLOPE, _log_odds(data)
    share = stated(malignant, prevalence)
    b = intercept - slope * centre / spread + _log_odds(share) - _log_odds(data)
    return Calibration(slope / spread, b, share, data, count, ill)


def _log_odds(p: float) -> float:
    return float(np.log(p) - np.log1p(-p))


def _logistic(x: Floats, target: Floats, weight: Floats) -> tuple[float, float]:
    """Slope and intercept of the weighted logistic regression of `target` [n] in 0..1 on a standardised x [n]."""
    start = 0.0, _log_odds(float(weight @ target / weight.sum()))
    if len(x) > 10 * _CELLS:
        # A coarse sum over cells of x finds the neighbourhood; two steps over all lesions then do.
        cell = np.clip((x * (_CELLS / 40)).astype(np.int64) + _CELLS // 2, 0, _CELLS)
        sums = np.stack([np.bincount(cell, one) for one in (weight, weight * target, weight * x)]).astype(np.float64)
        mass, hits, middle = sums[:, sums[0] > 0]
        start = _newton(middle / mass, hits / mass, mass, *start)
    return _newton(x, target, weight, *start)


def _newton(x: Floats, target: Floats, weight: Floats, slope: float, intercept: float) -> tuple[float, float]:
    """Newton's method from a start, with halved steps wherever the likelihood would fall."""

    def loss(slope: float, intercept: float) -> float:
        z = slope * x + intercept
        return float(weight @ (np.maximum(z, 0) + np.log1p(np.exp(-np.abs(z))) - target * z))

    now = np.inf
    for _ in range(100):
        p = sigmoid(slope * x + intercept)
        residual, curvature = weight * (target - p), weight * p * (1 - p)
        gradient = np.array([residual @ x, residual.sum()])
        mixed = curvature @ x
        hessian = np.array([[(curvature * x) @ x, mixed], [mixed, curvature.sum()]])
        hessian += np.eye(2) * 1e-12 * np.trace(hessian)
        step = np.linalg.solve(hessian, gradient)
        if np.abs(step).max() > 0.01:
            # Far from the optimum a full step may go wrong; near it, it is the best there is.
            now = loss(slope, intercept) if np.isinf(now) else now
            while (new := loss(slope + step[0], intercept + step[1])) > now and np.abs(step).max() > 1e-9:
                step = step / 2
            now = new
        slope, intercept = slope + float(step[0]), intercept + float(step[1])
        if np.abs(step).max() < 1e-7:
            break
    return slope, intercept


def _shift(malignant: NDArray[np.bool_], weight: Floats, x: Floats) -> tuple[float, Floats]:
    """Calibration-in-the-large: what to add to the log-odds x so that the mean is right; and each lesion's pull."""
    observed = float(weight[malignant].sum())
    shift = 0.0
    low, high = -60.0, 60.0
    for _ in range(100):
        p = sigmoid(x + shift)
        gap, slope = observed - float(weight @ p), float(weight @ (p * (1 - p)))
        low, high = (shift, high) if gap > 0 else (low, shift)
        step = gap / slope if slope > 0 else np.inf
        new = shift + step if low < shift + step < high else (low + high) / 2
        if abs(new - shift) < 1e-10:
            break
        shift = new
    p = sigmoid(x + shift)
    return shift, pulls(malignant, weight, malignant - p) / float(weight @ (p * (1 - p)))


def _slope(malignant: NDArray[np.bool_], weight: Floats, x: Floats) -> tuple[float, Floats]:
    """Slope of the logistic regression of the truth on the log-odds x, and each lesion's pull on it."""
    centre = float(weight @ x)
    spread = float(np.sqrt(weight @ (x - centre) ** 2)) or 1.0
    z = (x - centre) / spread
    slope, intercept = _logistic(z, malignant.astype(np.float64), weight)
    p = sigmoid(slope * z + intercept)
    curvature = weight * p * (1 - p)
    mixed = curvature @ z
    bread = np.linalg.pinv(np.array([[curvature @ (z * z), mixed], [mixed, curvature.sum()]]))
    residual = malignant - p
    pull = bread[0, 0] * pulls(malignant, weight, residual * z) + bread[0, 1] * pulls(malignant, weight, residual)
    return slope / spread, pull / spread


def _binned(
    malignant: NDArray[np.bool_],
    p: Floats,
    weight: Floats,
    owner: Ints,
    share: float,
    common: dict[str, Any],
    seed: int,
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
    count, odds_shift = int(bin_of.max()) + 1, _log_odds(share) - _log_odds(ill / len(p))
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
    plain, corrected, interval = _error(gaps, malignant, p, weight, owner, bin_of, common, seed)
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
    seed: int,
) -> tuple[float, float, Interval]:
    """Expected calibration error: as it is, less what noise adds to it, and the interval of the true one.

    With gaps = truth + Z, Z normal: | sum |gaps| - sum |truth| | <= sum |Z|, which bounds it from below; and
    sum |truth| <= sum |gaps| - sum of sign(truth) Z, from above.
    """
    count, groups, level = len(gaps), int(owner.max()) + 1, common["level"]
    # Each lesion's pull on each bin's gap: its own part, less its class's mean in every bin.
    table = np.bincount(owner * count + bin_of, weight * (malignant - p), groups * count).reshape(groups, count)
    for kind in (malignant, ~malignant):
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
    about = (level, METHOD_ECE, common["replicates"], 0, groups, common["malignant"])
    reason = NOT_ASKED if not common["replicates"] else None
    if common["malignant"] < FEWEST_MALIGNANT:
        reason = reason or too_few(common["malignant"])
    if reason:
        return plain, corrected, Interval(None, None, *about, reason)
    values, vectors = np.linalg.eigh(covariance)
    noise = np.random.default_rng([seed, 2]).standard_normal((common["replicates"], count))
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
    if not common["replicates"]:
        return Figure(value, Interval(None, None, *about, NOT_ASKED))
    return Figure(value, Interval(low, high, *about))
