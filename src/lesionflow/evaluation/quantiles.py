"""Quantiles of the beta and of Student's distribution, without scipy, which a service doesn't carry."""

from __future__ import annotations

from functools import lru_cache
from math import exp, lgamma, log, log1p, sqrt


def beta_quantile(a: float, b: float, probability: float) -> float:
    """The quantile of the Beta(a, b) distribution to about 1e-12, by Newton's steps kept within a bracket."""
    low, high = 0.0, 1.0
    x, scale = a / (a + b), lgamma(a + b) - lgamma(a) - lgamma(b)
    for _ in range(200):
        excess = beta_cdf(a, b, x) - probability
        low, high = (low, x) if excess > 0 else (x, high)
        density = exp(scale + (a - 1) * log(x) + (b - 1) * log1p(-x)) if 0 < x < 1 else 0.0
        step = x - excess / density if density > 0 else low
        previous, x = x, step if low < step < high else (low + high) / 2
        if abs(x - previous) <= 1e-14 * x or high - low < 1e-15:
            break
    return x


def beta_cdf(a: float, b: float, x: float) -> float:
    """The regularised incomplete beta function I_x(a, b), by Lentz's continued fraction, to about 1e-12."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - beta_cdf(b, a, 1 - x)
    front = exp(lgamma(a + b) - lgamma(a) - lgamma(b) + a * log(x) + b * log1p(-x)) / a
    # Denominators that vanish are replaced by something tiny.
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1) or 1e-300)
    fraction = d
    for m in range(1, 10_000):
        twice = a + 2 * m
        factor = m * (b - m) * x / ((twice - 1) * twice)
        d, c = 1 / (1 + factor * d or 1e-300), 1 + factor / c or 1e-300
        fraction *= d * c
        factor = -(a + m) * (a + b + m) * x / (twice * (twice + 1))
        d, c = 1 / (1 + factor * d or 1e-300), 1 + factor / c or 1e-300
        fraction *= d * c
        if abs(d * c - 1) < 1e-14:
            break
    return front * fraction


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
