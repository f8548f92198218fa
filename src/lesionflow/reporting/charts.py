"""The report's charts as inline SVG: no script, no file, coloured by the page's own style sheet.

Each chart is about 420 units wide, so that its text stays readable on a phone, and carries a title and a
description for those who can't see it. What differs in colour differs in position, dash or label too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from lesionflow.evaluation.metrics import Floats

Scale = Callable[[float], float]
WIDTH = 420


def roc(fpr: Floats, tpr: Floats, min_tpr: float, name: str) -> str:
    """The ROC curve with the partial area shaded: right of the curve and above `min_tpr`."""
    side, left, top = 330, 56, 14
    x: Scale = lambda v: left + side * v  # noqa: E731
    y: Scale = lambda v: top + side * (1 - v)  # noqa: E731
    fpr, tpr = _corners(fpr, tpr)
    cut = float(np.interp(min_tpr, tpr, fpr)) if (tpr == min_tpr).sum() != 1 else float(fpr[tpr == min_tpr][0])
    above = tpr >= min_tpr
    edge = [(cut, min_tpr), *zip(fpr[above].tolist(), tpr[above].tolist(), strict=True), (1.0, min_tpr)]
    body = [
        f'<path class="shade" d="{line(edge, x, y)}Z"/>',
        *axes(x, y, _fifths(), _fifths(), "False-positive rate", "Sensitivity (true-positive rate)"),
        f'<path class="chance" d="{line([(0, 0), (1, 1)], x, y)}"/>',
        f'<path class="guide" d="{line([(0, min_tpr), (1, min_tpr)], x, y)}"/>',
        f'<path class="curve" d="{line(zip(fpr.tolist(), tpr.tolist(), strict=True), x, y)}"/>',
        f'<text class="note" x="{x(0.99)}" y="{y(0.04):.1f}" text-anchor="end">'
        f"shaded: above {min_tpr:.0%} sensitivity</text>",
    ]
    at = float(np.interp(min_tpr, tpr, fpr))
    text = f"ROC curve. At {min_tpr:.0%} sensitivity the false-positive rate is {at:.1%}. Shaded area: the pAUC."
    return svg(name, "ROC curve", text, top + side + 48, body)


def histogram(malignant: Floats, benign: Floats, threshold: float | None, name: str, label: str) -> str:
    """Score distributions as shares of each class, malignant upwards and benign downwards."""
    left, width, half, middle = 56, 348, 105, 130
    low, high = float(min(malignant.min(), benign.min())), float(max(malignant.max(), benign.max()))
    high = high if high > low else low + 1
    edges = np.linspace(low, high, 37)
    shares = [np.histogram(v, edges)[0] / len(v) for v in (malignant, benign)]
    peak = max(float(s.max()) for s in shares)
    x: Scale = lambda v: left + width * (v - low) / (high - low)  # noqa: E731
    body = []
    for share, kind, sign in zip(shares, ("malignant", "benign"), (-1, 1), strict=True):
        for i, value in enumerate(share.tolist()):
            tall = half * value / peak
            start = middle - tall if sign < 0 else middle
            if tall > 0:
                body.append(
                    f'<rect class="{kind}" x="{x(edges[i]):.1f}" y="{start:.1f}" '
                    f'width="{width / 36 - 1:.1f}" height="{max(tall, 0.7):.1f}"/>'
                )
        body.append(
            f'<text class="{kind}-text" x="{left}" y="{middle + sign * half - (4 if sign < 0 else -10):.0f}">'
            f"{kind}</text>"
        )
    body.append(f'<path class="axis" d="M{left} {middle}H{left + width}"/>')
    for value in nice(low, high):
        body.append(f'<path class="axis" d="M{x(value):.1f} {2 * middle - 8}v5"/>')
        body.append(f'<text x="{x(value):.1f}" y="{2 * middle + 10}" text-anchor="middle">{value:g}</text>')
    body.append(f'<path class="axis" d="M{left} {2 * middle - 8}H{left + width}"/>')
    body.append(f'<text x="{left + width / 2}" y="{2 * middle + 30}" text-anchor="middle">{escape(label)}</text>')
    body.append(f'<text transform="translate(16 {middle}) rotate(-90)" text-anchor="middle">share of its class</text>')
    said = ""
    if threshold is not None and low <= threshold <= high:
        near_end = x(threshold) > left + width * 0.7
        place = (
            f'x="{x(threshold) + (-5 if near_end else 5):.1f}" y="12" text-anchor="{"end" if near_end else "start"}"'
        )
        body.append(f'<path class="guide" d="M{x(threshold):.1f} 2V{2 * middle - 8}"/><text {place}>refer</text>')
        said = f" The refer threshold is {threshold:.2f}."
    text = (
        f"Distribution of scores: malignant median {np.median(malignant):.2f}, "
        f"benign median {np.median(benign):.2f}.{said}"
    )
    return svg(name, "Score distributions", text, 2 * middle + 40, body)


def forest(rows: Sequence[Mapping[str, Any]], chance: float, maximum: float, name: str) -> str:
    """Figures with their intervals, one row each ({label, value, low, high}), on 0..maximum."""
    left, width, step = 150, 254, 26
    bottom = 10 + step * len(rows)
    x: Scale = lambda v: left + width * v / maximum  # noqa: E731
    body = [f'<path class="chance" d="M{x(chance):.1f} 4V{bottom}"/>']
    for i, row in enumerate(rows):
        at = 10 + step * (i + 0.5)
        strong = ' class="strong"' if i == 0 else ""
        body.append(f'<text{strong} x="{left - 12}" y="{at + 4}" text-anchor="end">{escape(row["label"])}</text>')
        if row["low"] is not None:
            body.append(f'<path class="whisker" d="M{x(row["low"]):.1f} {at}H{x(row["high"]):.1f}"/>')
        if row["value"] is None:
            body.append(f'<text class="note" x="{left}" y="{at + 4}">no value</text>')
        else:
            body.append(f'<circle class="dot" cx="{x(row["value"]):.1f}" cy="{at}" r="{5 if i == 0 else 4}"/>')
    for value in np.linspace(0, maximum, 5).tolist():
        body.append(f'<path class="axis" d="M{x(value):.1f} {bottom}v5"/>')
        body.append(f'<text x="{x(value):.1f}" y="{bottom + 20}" text-anchor="middle">{value:.2f}</text>')
    body.append(f'<path class="axis" d="M{left} {bottom}H{left + width}"/>')
    body.append(f'<text x="{left + width / 2}" y="{bottom + 38}" text-anchor="middle">pAUC (dotted: chance)</text>')
    return svg(name, "pAUC with intervals", "The same figures as in the table beside this chart.", bottom + 46, body)


def strip(figure: Mapping[str, Any], low: float, high: float, reference: float | None) -> str:
    """A figure's interval as a small picture beside its numbers (so hidden from screen readers), on low..high."""
    width, height, middle = 104, 18, 9
    x: Scale = lambda v: 6 + (width - 12) * (min(max(v, low), high) - low) / ((high - low) or 1)  # noqa: E731
    body = [f'<path class="grid" d="M{x(low):.1f} {middle}H{x(high):.1f}"/>']
    if reference is not None:
        body.append(f'<path class="chance" d="M{x(reference):.1f} 0V{height}"/>')
    interval = figure.get("interval") or {}
    if interval.get("low") is not None:
        body.append(f'<path class="whisker" d="M{x(interval["low"]):.1f} {middle}H{x(interval["high"]):.1f}"/>')
    if figure["value"] is not None:
        body.append(f'<circle class="dot" cx="{x(figure["value"]):.1f}" cy="{middle}" r="4"/>')
    return (
        f'<svg class="strip" viewBox="0 0 {width} {height}" aria-hidden="true" focusable="false">{"".join(body)}</svg>'
    )


def curves(series: Mapping[str, Sequence[tuple[float, float]]], label: str, name: str, chance: float | None) -> str:
    """Lines over epochs, one per fold; the last point of each is marked."""
    left, width, top, height = 56, 348, 14, 190
    every = [p for points in series.values() for p in points]
    right = max(p[0] for p in every) or 1.0
    values = [p[1] for p in every] + ([chance] if chance is not None else [])
    low, high = min(0.0, *values), max(values)
    high = high if high > low else low + 1
    x: Scale = lambda v: left + width * v / right  # noqa: E731
    y: Scale = lambda v: top + height * (1 - (v - low) / (high - low))  # noqa: E731
    x_ticks, y_ticks = ({a: "", b: ""} | labels(nice(a, b)) for a, b in ((0.0, right), (low, high)))
    body = axes(x, y, x_ticks, y_ticks, "epoch", label)
    if chance is not None:
        body.append(f'<path class="chance" d="{line([(0, chance), (right, chance)], x, y)}"/>')
    for i, points in enumerate(series.values()):
        body.append(f'<path class="series s{i % 6}" d="{line(points, x, y)}"/>')
        body.append(f'<circle class="end s{i % 6}" cx="{x(points[-1][0]):.1f}" cy="{y(points[-1][1]):.1f}" r="3"/>')
    ends = "; ".join(f"{key} ends at {points[-1][1]:.4g}" for key, points in series.items())
    return svg(name, f"{label} during training", f"{label} over epochs: {ends}.", top + height + 48, body)


def svg(name: str, title: str, text: str, height: float, body: Iterable[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-labelledby="{name}-t {name}-d">'
        f'<title id="{name}-t">{escape(title)}</title><desc id="{name}-d">{escape(text)}</desc>{"".join(body)}</svg>'
    )


def axes(
    x: Scale, y: Scale, x_ticks: Mapping[float, str], y_ticks: Mapping[float, str], x_label: str, y_label: str
) -> list[str]:
    # A tick without a text only says how far its axis reaches.
    left, right = x(min(x_ticks)), x(max(x_ticks))
    bottom, top = y(min(y_ticks)), y(max(y_ticks))
    out = [f'<path class="axis" d="M{left:.1f} {top:.1f}V{bottom:.1f}H{right:.1f}"/>']
    for value, text in ((v, t) for v, t in x_ticks.items() if t):
        out.append(f'<text x="{x(value):.1f}" y="{bottom + 18:.1f}" text-anchor="middle">{text}</text>')
    for value, text in ((v, t) for v, t in y_ticks.items() if t):
        out.append(f'<path class="grid" d="M{left:.1f} {y(value):.1f}H{right:.1f}"/>')
        out.append(f'<text x="{left - 7:.1f}" y="{y(value) + 4:.1f}" text-anchor="end">{text}</text>')
    middle = (top + bottom) / 2
    out.append(
        f'<text x="{(left + right) / 2:.1f}" y="{bottom + 38:.1f}" text-anchor="middle">{escape(x_label)}</text>'
    )
    out.append(
        f'<text transform="translate(14 {middle:.1f}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>'
    )
    return out


def line(points: Iterable[tuple[float, float]], x: Scale, y: Scale) -> str:
    return "M" + "L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in points)


def _corners(fpr: Floats, tpr: Floats) -> tuple[Floats, Floats]:
    """The same curve without the points that lie on a straight line between their neighbours."""
    step = np.diff(np.stack([fpr, tpr]), axis=1)
    turn = step[0, 1:] * step[1, :-1] - step[0, :-1] * step[1, 1:]
    keep = np.concatenate([[True], np.abs(turn) > 1e-15, [True]])
    return fpr[keep], tpr[keep]


def _fifths() -> dict[float, str]:
    return {i / 5: f"{i / 5:g}" for i in range(6)}


def nice(low: float, high: float) -> list[float]:
    """About five round numbers within low..high, at least two."""
    raw = (high - low) / 5
    unit = 10.0 ** np.floor(np.log10(raw))
    step = next(float(unit * m) for m in (1, 2, 2.5, 5, 10) if unit * m >= raw)
    return [round(step * i, 12) for i in range(int(np.ceil(low / step)), int(np.floor(high / step)) + 1)]


def labels(values: Iterable[float]) -> dict[float, str]:
    return {v: f"{v:g}" for v in values}
