"""Quantiles of the beta and of Student's distribution, without scipy, which a service doesn't carry."""

from __future__ import annotations

from functools import lru_cache
from math import exp, lgamma, log, log1p, sqrt


def beta_quantile(a: float, b: float, probability: float) -> float:
    """The quantile of the Beta(a, b) distribution, to 1e-12: Newton's steps where they stay between the bounds."""
    low, high, x = 0.0, 1.0, a / (a + b)
    scale = lgamma(a + b) - lgamma(a) - lgamma(b)
    for _ in range(100):
        gap = beta_cdf(a, b, x) - probability
        low, high = (x, high) if gap < 0 else (low, x)
        density = exp(min(scale + (a - 1) * log(x) + (b - 1) * log1p(-x), 700.0))
        step = gap / density if density > 1e-200 else 1.0
        new = x - step if low < x - step < high else (low + high) / 2
        if abs(new - x) < 1e-13 * max(new, 1e-3) or not 0 < new < 1:
            return new
        x = new
    return x


def beta_cdf(a: float, b: float, x: float) -> float:
    """The regularised incomplete beta function I_x(a, b), by Lentz's continued fraction, to about 1e-12."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - beta_cdf(b, a, 1 - x)
    front = exp(lgamma(a + b) - lgamma(a) - lgamma(b) + a * log(x) + b * log1p(-x)) / a
    c, d = 1.0, 1 / _away(1 - (a + b) * x / (a + 1))
    fraction = d
    for m in range(1, 10_000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        d, c = 1 / _away(1 + even * d), _away(1 + even / c)
        fraction *= d * c
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        d, c = 1 / _away(1 + odd * d), _away(1 + odd / c)
        fraction *= d * c
        if abs(d * c - 1) < 1e-14:
            break
    return front * fraction


def _away(value: float) -> float:
    """The value, or something tiny in place of zero."""
    return value if abs(value) > 1e-300 else 1e-300


@lru_cache(maxsize=4096)
def student_quantile(probability: float, freedom: float) -> float:
    """The quantile of Student's t, for a probability above one half; 1.96 at 0.975 and many degrees of freedom."""
    x = beta_quantile(freedom / 2, 0.5, 2 * (1 - probability))
    return sqrt(freedom * (1 - x) / x)


def satterthwaite(squares: float, fourths: float, clusters: int) -> float:
    """Degrees of freedom of a variance that is the sum of `clusters` squared residuals: `squares`, and their squares.

    As many as there are clusters where residuals are normal, few where few residuals make up the sum; at least 2.
    """
    freedom = clusters - 1.0
    if (uneven := fourths - squares**2 / clusters) > 0:
        freedom = min(freedom, max(2.0, 2 * squares**2 / uneven))
    return freedom
