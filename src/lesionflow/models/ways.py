"""Ways to join a picture's and the metadata's log-odds: what they compute, how a line is fitted, how they are kept.

Everything is elementwise, so a lesion's score is the same, to the last bit, in any company.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lesionflow.errors import DataError
from lesionflow.models.tabular import Boosted

Floats = NDArray[np.float64]

INDEX = "stack.json"
METHODS = ("linear", "rank", "trees")
"""The simplest first: it wins a tie."""
REMEDY = "restore the file, or train and export again"
RIDGE = 0.1
"""Penalty on half the squared slope, per standard deviation of the input: it only keeps separated classes finite."""
LEAST_SLOPE = 1e-6
"""Per standard deviation, where an input ranks the wrong way: its order is kept, and it says nothing."""
MOST_SLOPE = 1e6
"""Per unit of log-odds: beyond it, what is weighed is rounding."""
_NOISE = 1e-9
"""A spread under this, beside the largest score (or 1), is rounding: the scores are all equal."""
_KNOTS = 1001
_STEPS = 100
_TOLERANCE = 1e-10


@dataclass(frozen=True)
class Line:
    """Log-odds = intercept + sum of slope x input: a logistic regression. No slope is under 0."""

    slopes: tuple[float, ...]
    intercept: float

    def __call__(self, *columns: Floats) -> Floats:
        # Term by term: a matrix product may add up in another order for another number of rows.
        result = np.full(columns[0].shape, self.intercept)
        for slope, column in zip(self.slopes, columns, strict=True):
            result += slope * column
        return result

    def to_dict(self) -> dict[str, Any]:
        return {"slopes": list(self.slopes), "intercept": self.intercept}

    @classmethod
    def from_dict(cls, value: Any, where: str, inputs: int) -> Line:
        entry = an_object(value, where)
        slopes = numbers(entry.get("slopes"), f"{where}.slopes")
        if len(slopes) != inputs or min(slopes) < 0 or max(slopes) > MOST_SLOPE:
            raise damaged(f"{where}.slopes", f"expected {inputs} numbers, none under 0 or over {MOST_SLOPE:,.0f}")
        return cls(tuple(slopes), number(entry.get("intercept"), f"{where}.intercept"))


@dataclass(frozen=True)
class Reference:
    """Where a score ranks among those of a reference: shares 0..1 at distinct, ascending scores."""

    at: tuple[float, ...]
    share: tuple[float, ...]

    @classmethod
    def of(cls, scores: Floats) -> Reference:
        """Of scores [n]: at most 1,001 quantiles; equal ones are one, at the mean of their shares."""
        shares = np.linspace(0, 1, min(_KNOTS, len(scores)))
        # Scores themselves: interpolated quantiles of equal scores differ in their last digit.
        chosen = np.sort(scores)[np.rint(shares * (len(scores) - 1)).astype(np.int64)]
        at, which, count = np.unique(chosen, return_inverse=True, return_counts=True)
        return cls(tuple(at.tolist()), tuple((np.bincount(which, shares) / count).tolist()))

    def __call__(self, scores: Floats) -> Floats:
        """Shares of scores [B], interpolated; what lies outside ranks as the lowest or the highest known."""
        return np.interp(scores, self.at, self.share)

    def to_dict(self) -> dict[str, Any]:
        return {"at": list(self.at), "share": list(self.share)}

    @classmethod
    def from_dict(cls, value: Any, where: str) -> Reference:
        entry = an_object(value, where)
        at, share = (numbers(entry.get(name), f"{where}.{name}") for name in ("at", "share"))
        if not (1 <= len(at) == len(share) <= _KNOTS):
            raise damaged(where, f"expected as many shares as scores, 1 to {_KNOTS}")
        if np.any(np.diff(at) <= 0) or np.any(np.diff(share) < 0) or not 0 <= share[0] <= share[-1] <= 1:
            raise damaged(where, "expected ascending scores, and shares ascending within 0..1")
        return cls(tuple(at), tuple(share))


class Way(Protocol):
    """How one fold joins a picture's log-odds [B], the trees' log-odds [B] and features [B, F] to log-odds [B]."""

    def join(self, image: Floats, trees: Floats, values: Floats) -> Floats: ...
    def to_dict(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Linear:
    """Two log-odds, weighed."""

    line: Line

    def join(self, image: Floats, trees: Floats, values: Floats) -> Floats:
        return self.line(image, trees)

    def to_dict(self) -> dict[str, Any]:
        return {"method": "linear", "line": self.line.to_dict()}


@dataclass(frozen=True)
class Rank:
    """The mean of two ranks, as log-odds, on one line."""

    image: Reference
    trees: Reference
    edge: float
    """Ranks are kept this far from 0 and 1, where log-odds end."""
    line: Line

    def mean_rank(self, image: Floats, trees: Floats) -> Floats:
        """Log-odds of the mean rank, float64 [B]."""
        share = np.clip(0.5 * (self.image(image) + self.trees(trees)), self.edge, 1 - self.edge)
        return np.asarray(np.log(share) - np.log1p(-share))

    def join(self, image: Floats, trees: Floats, values: Floats) -> Floats:
        return self.line(self.mean_rank(image, trees))

    def to_dict(self) -> dict[str, Any]:
        return {
            "method": "rank", "image": self.image.to_dict(), "trees": self.trees.to_dict(), "edge": self.edge,
            "line": self.line.to_dict(),
        }  # fmt: skip


@dataclass(frozen=True)
class Trees:
    """Trees that know the features and the picture's log-odds, on one line."""

    trees: Boosted
    line: Line

    def margin(self, image: Floats, values: Floats) -> Floats:
        """The trees' own log-odds, float64 [B]."""
        return self.trees.logits(np.column_stack([values, image]))

    def join(self, image: Floats, trees: Floats, values: Floats) -> Floats:
        return self.line(self.margin(image, values))

    def to_dict(self) -> dict[str, Any]:
        return {"method": "trees", "line": self.line.to_dict()}


def fit_line(columns: Sequence[Floats], y: NDArray[np.int8]) -> Line:
    """The logistic regression of y [n] on d columns [n], by Newton's method, with a small ridge on the slopes.

    A column whose slope would be under 0 is left out (slope 0), so that no score is ever turned round; so is one
    whose scores are all equal but for rounding. If none is left, the first keeps a slope that is all but 0.
    """
    means = [float(c.mean()) for c in columns]
    spreads = [float(c.std()) for c in columns]
    active = [i for i, c in enumerate(columns) if spreads[i] > _NOISE * max(1.0, float(np.abs(c).max()))]
    spreads = [spread if i in active else 1.0 for i, spread in enumerate(spreads)]
    scaled = [(c - m) / s for c, m, s in zip(columns, means, spreads, strict=True)]
    while True:
        found = _newton([scaled[i] for i in active], y)
        if len(active) == 0 or (found[1:] >= 0).all():
            break
        active.pop(int(np.argmin(found[1:])))
    slopes = np.zeros(len(columns))
    slopes[active] = found[1:]
    if not slopes.any():
        slopes[0] = LEAST_SLOPE
    slopes = np.minimum(slopes / spreads, MOST_SLOPE)
    intercept = float(found[0]) - sum(s * m for s, m in zip(slopes.tolist(), means, strict=True))
    return Line(tuple(slopes.tolist()), intercept)


def _newton(columns: Sequence[Floats], y: NDArray[np.int8]) -> Floats:
    """Intercept and slopes [1 + d] that are most likely, halving a step that doesn't help."""
    # Sums of products instead of matrix products, whose last digits hang on the number of threads.
    design, d = [np.ones(len(y)), *columns], 1 + len(columns)
    penalty = np.full(d, RIDGE)
    penalty[0] = 0.0
    beta = np.zeros(d)
    beta[0] = np.log(y.mean()) - np.log1p(-y.mean())

    def margin(at: Floats) -> Floats:
        return np.asarray(sum(b * c for b, c in zip(at.tolist(), design, strict=True)))

    def loss(at: Floats) -> float:
        x = margin(at)
        return float(np.sum(np.logaddexp(0, x) - y * x) + 0.5 * np.sum(penalty * at**2))

    now = loss(beta)
    for _ in range(_STEPS):
        p = 0.5 * (1 + np.tanh(0.5 * margin(beta)))
        slope = np.array([np.sum((p - y) * c) for c in design]) + penalty * beta
        weight = p * (1 - p)
        curve = np.array([[np.sum(weight * a * b) for b in design] for a in design]) + np.diag(penalty)
        step = np.linalg.lstsq(curve, slope, rcond=None)[0]
        share, then = 1.0, loss(beta - step)
        while not then <= now and share > 1e-6:
            share /= 2
            then = loss(beta - share * step)
        if not then <= now:
            break
        beta, now = beta - share * step, then
        if np.abs(share * step).max() < _TOLERANCE:
            break
    return np.asarray(beta)


def parsed(data: bytes) -> Any:
    """JSON of finite numbers only. Raises `DataError`."""

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is no JSON number")

    try:
        return json.loads(data, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{INDEX}: not valid JSON ({error}): {REMEDY}") from None


def damaged(where: str, problem: str) -> DataError:
    """The error for a field of the index."""
    return DataError(f"{where if where == INDEX else f'{INDEX}: {where}'}: {problem}: {REMEDY}")


def an_object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise damaged(where, "expected an object")
    return value


def texts(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value) or len(set(value)) < len(value):
        raise damaged(where, "expected a list of texts, each once")
    return tuple(value)


def number(value: Any, where: str) -> float:
    try:
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(found := float(value)):
            return found
    except OverflowError:
        pass
    raise damaged(where, "expected a finite number")


def numbers(value: Any, where: str) -> list[float]:
    if not isinstance(value, list) or not value:
        raise damaged(where, "expected a list of numbers")
    return [number(one, where) for one in value]
