"""Logits to probabilities of a stated prevalence, and whether those probabilities are right.

The model is trained on balanced batches and often on thinned benign lesions, so the sigmoid of its logit is not
a probability. `fit` finds the line a * logit + b whose sigmoid is one (Platt 1999, with his smoothed targets),
then moves b by the difference of the log-odds of the stated and the data's prevalence (Elkan 2001; Saerens and
others 2002). `cross_fitted` does so on other patients than it is applied to; `assess` measures the result.

The stated prevalence is assumed, not tested; slope, shape and ECE are what is tested. E/O and the intercept compare
with the very prevalence that was stated, so they can't reveal a wrong one.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lesionflow.errors import DataError
from lesionflow.evaluation.intervals import Figure
from lesionflow.evaluation.metrics import Floats, Groups, Ints, checked, codes
from lesionflow.evaluation.prevalence import linearised, log_odds, pulls, refusal, stated, weights
from lesionflow.evaluation.reliability import binned

NOTE = (
    "The stated prevalence is assumed, not tested; slope, shape and ECE are what is tested. Expected / observed and "
    "the intercept compare with the stated prevalence itself."
)
"""Beside figures at a stated prevalence."""
LEAST_SLOPE = 1e-6
"""Per standard deviation of the logit. Scores that rank the wrong way keep their order and say nothing."""
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
    covariance: tuple[tuple[float, float], tuple[float, float]] | None = None
    """Of a and b, as if patients were a sample; None where nobody asked, or lesions or scores say too little."""

    def probability(self, logit: ArrayLike) -> Floats:
        """Probabilities float64, same shape, of finite logits."""
        return sigmoid(self.a * np.asarray(logit, np.float64) + self.b)

    def to_dict(self) -> dict[str, Any]:
        rows = None if self.covariance is None else [list(row) for row in self.covariance]
        return {"kind": "logistic"} | asdict(self) | {"covariance": rows}


def fit(logit: ArrayLike, y: ArrayLike, *, prevalence: float, groups: Groups | None = None) -> Calibration:
    """The calibration of `logit` [n] for targets y [n] 0/1, for a population of `prevalence` (0: as in the data).

    With the patient of each lesion (`groups` [n]) it has a `covariance`, so that a probability can have an interval.
    Raises `DataError` for NaN, infinities or a single class, as `metrics.pauc` does.
    """
    malignant, scores = checked(y, logit)
    fitted = _fit(malignant, scores, prevalence)
    if groups is None or fitted.a * float(scores.std()) <= LEAST_SLOPE * 1.01:
        return fitted
    return replace(
        fitted, covariance=_covariance(malignant, scores, codes(groups, len(scores)), fitted, drawn=not prevalence)
    )


def _covariance(
    malignant: NDArray[np.bool_], scores: Floats, owner: Ints, fitted: Calibration, *, drawn: bool
) -> tuple[tuple[float, float], tuple[float, float]] | None:
    """The sandwich estimate of (a, b), clustered by patient (Liang & Zeger 1986).

    Where the prevalence is stated, `b` holds the difference of its log-odds to those of the data, and the data's are an
    estimate too: each lesion's share in that chance is taken off its pull.
    """
    if refusal(malignant, owner, replicates=1):
        return None
    count, patients = len(scores), int(owner.max()) + 1
    centre, spread = float(scores.mean()), float(scores.std())
    x, data = (scores - centre) / spread, fitted.data_prevalence
    shift = 0.0 if drawn else log_odds(fitted.prevalence) - log_odds(data)
    p = sigmoid(fitted.a * scores + fitted.b - shift)
    curvature = p * (1 - p)
    mixed = float(curvature @ x)
    bread = np.linalg.pinv(np.array([[curvature @ (x * x), mixed], [mixed, curvature.sum()]]))
    pull = np.stack([(malignant - p) * x, malignant - p], axis=1) @ bread
    if not drawn:
        pull[:, 1] -= (malignant - data) / (count * data * (1 - data))
    summed = np.stack([np.bincount(owner, column, patients) for column in pull.T], axis=1)
    of_x = summed.T @ summed * patients / (patients - 1)
    # From the line in x = (logit - centre) / spread to the one in the logit itself.
    turn = np.array([[1 / spread, 0.0], [-centre / spread, 1.0]])
    (aa, ab), (_, bb) = (turn @ of_x @ turn.T).tolist()
    return (aa, ab), (ab, bb)  # Both off the diagonal are one number, whatever the last digit of the product says.


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
        raise DataError(
            "parts: one part only; calibration is measured on other patients than it was fitted on, so ask for more "
            "folds (folds.count) or for more patients in the hold-out (folds.holdout)"
        )
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

    groups [n]: the patient of each lesion. `note`: what a stated prevalence leaves untested, None for that of the
    data. Raises `DataError` as `metrics.brier` and `metrics.pauc` do.
    """
    malignant, probability = checked(y, p)
    if (odd := np.nonzero((probability < 0) | (probability > 1))[0]).size:
        raise DataError(f"probabilities: row {odd[0]} is {probability[odd[0]]:g}; expected 0 to 1, so not a logit")
    owner, share = codes(groups, len(probability)), stated(malignant, prevalence)
    # Sums of fractions depend on their order, in the last digit; nothing may depend on the order of rows.
    order = np.lexsort((malignant, probability, owner))
    malignant, probability, owner = malignant[order], probability[order], owner[order]
    weight, drawn = weights(malignant, prevalence), prevalence == 0
    reason = refusal(malignant, owner, replicates)
    common: dict[str, Any] = {"malignant": int(malignant.sum()), "level": level, "reason": reason}
    safe = np.clip(probability, _TINY, 1 - _TINY)
    x, truth = np.log(safe) - np.log1p(-safe), malignant.astype(np.float64)

    def mean(score: Floats) -> Figure:
        pull = pulls(malignant, weight, score, drawn=drawn)
        return linearised(float(weight @ score), pull, owner, scale="positive", **common)

    intercept, intercept_pull = _shift(malignant, weight, x, drawn)
    slope = Figure.missing(
        "all probabilities are equal", level=level, clusters=int(owner.max()) + 1, malignant=common["malignant"]
    )
    if np.ptp(x) > 0:
        slope = linearised(*_slope(malignant, weight, x, drawn), owner, **common)
    expected = mean(probability).value or 0.0
    # Within a class the truth doesn't vary, so with a stated prevalence only what is expected does.
    ratio_pull = pulls(malignant, weight, probability - expected / share * truth, drawn=drawn) / share
    return {
        "prevalence": share,
        "data_prevalence": float(malignant.mean()),
        "intercept": linearised(intercept, intercept_pull, owner, **common).to_dict(),
        "slope": slope.to_dict(),
        **binned(malignant, probability, weight, owner, share, common, replicates, seed, drawn),
        "brier": mean((probability - truth) ** 2).to_dict(),
        "log_loss": mean(-np.where(malignant, np.log(safe), np.log1p(-safe))).to_dict(),
        "expected_observed": linearised(expected / share, ratio_pull, owner, scale="positive", **common).to_dict(),
        "reason": reason,
        "note": None if drawn else NOTE,
    }


def sigmoid(x: Floats) -> Floats:
    """1 / (1 + exp(-x)) without overflow."""
    small = np.exp(-np.abs(x))
    result: Floats = np.where(x >= 0, 1.0, small) / (1 + small)
    return result


def _fit(malignant: NDArray[np.bool_], scores: Floats, prevalence: float) -> Calibration:
    # Sums depend on their order, in the last digit; nothing may depend on the order of rows.
    order = np.lexsort((malignant, scores))
    malignant, scores = malignant[order], scores[order]
    count, ill = len(scores), int(malignant.sum())
    target = np.where(malignant, (ill + 1) / (ill + 2), 1 / (count - ill + 2))
    centre, spread = float(scores.mean()), float(scores.std())
    if not spread > 0 or not np.isfinite(spread):
        spread = float(np.abs(scores).max()) or 1.0
    x = (scores - centre) / spread
    slope, intercept = _logistic(x, target, np.full(count, 1 / count))
    data = ill / count
    if slope < LEAST_SLOPE:
        slope, intercept = LEAST_SLOPE, log_odds(data)
    share = stated(malignant, prevalence)
    b = intercept - slope * centre / spread + log_odds(share) - log_odds(data)
    return Calibration(slope / spread, b, share, data, count, ill)


def _logistic(x: Floats, target: Floats, weight: Floats) -> tuple[float, float]:
    """Slope and intercept of the weighted logistic regression of `target` [n] in 0..1 on a standardised x [n]."""
    start = 0.0, log_odds(float(weight @ target / weight.sum()))
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


def _shift(malignant: NDArray[np.bool_], weight: Floats, x: Floats, drawn: bool) -> tuple[float, Floats]:
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
        shift, moved = new, abs(new - shift)
        if moved < 1e-10:
            break
    p = sigmoid(x + shift)
    return shift, pulls(malignant, weight, malignant - p, drawn=drawn) / float(weight @ (p * (1 - p)))


def _slope(malignant: NDArray[np.bool_], weight: Floats, x: Floats, drawn: bool) -> tuple[float, Floats]:
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
    score = bread[0, 0] * residual * z + bread[0, 1] * residual
    pull = pulls(malignant, weight, score, drawn=drawn)
    return slope / spread, pull / spread
