"""The report's charts of probabilities and what they are good for: reliability, decision curve, bands."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from lesionflow.reporting.charts import WIDTH, Scale, axes, line, nice, svg

LEFT, SIDE, TOP = 72, 326, 14
BAND_ORDER = ("refer", "routine", "low", "cannot judge")


def reliability(bins: Sequence[Mapping[str, Any]], prevalence: float, name: str) -> str:
    """Predicted probability against the share found malignant, both logarithmic, with intervals.

    A bin in which nothing malignant was found has no place on a logarithmic scale: it stands as a triangle on
    the lower edge, its interval reaching up from there.
    """
    shown = [one for one in bins if one["observed"]["value"] is not None and one["predicted"] > 0]
    if not shown:
        return ""
    seen = [one["predicted"] for one in shown]
    seen += [v for one in shown for v in _ends(one["observed"]) if v > 0] + [prevalence]
    low, high = _decades(min(seen), max(seen))
    x: Scale = lambda v: LEFT + SIDE * _share(v, low, high)  # noqa: E731
    y: Scale = lambda v: TOP + SIDE * (1 - _share(v, low, high))  # noqa: E731
    ticks = {v: percent(v) for v in _powers(low, high)}
    # Side by side there is room for six labels.
    across = {v: text if len(ticks) <= 6 or i % 2 == 0 else "" for i, (v, text) in enumerate(ticks.items())}
    body = [
        *axes(x, y, across, ticks, "predicted probability", "share found malignant"),
        f'<path class="chance" d="{line([(low, low), (high, high)], x, y)}"/>',
        f'<path class="guide thin" d="M{x(prevalence):.1f} {TOP}V{TOP + SIDE}"/>',
        f'<text class="note" x="{x(prevalence) + 5:.1f}" y="{TOP + 11}">prevalence {percent(prevalence)}</text>',
    ]
    for one in shown:
        at, value = x(one["predicted"]), one["observed"]["value"]
        ends = _ends(one["observed"])
        if len(ends) > 1:
            body.append(f'<path class="whisker" d="M{at:.1f} {y(max(ends[1], low)):.1f}V{y(max(ends[2], low)):.1f}"/>')
        if value <= 0:
            foot = y(low)
            body.append(f'<path class="none-found" d="M{at - 5:.1f} {foot:.1f}h10l-5 -9z"/>')
        else:
            body.append(f'<circle class="dot" cx="{at:.1f}" cy="{y(max(value, low)):.1f}" r="4.5"/>')
    text = "; ".join(
        f"predicted {percent(one['predicted'])}, found {percent(one['observed']['value'])}" for one in shown
    )
    return svg(name, "Reliability of the probabilities", f"{len(shown)} bins: {text}.", TOP + SIDE + 48, body)


def decision(curve: Mapping[str, Any], name: str) -> str:
    """Net benefit per 10,000 lesions over the threshold probability, beside referring all and none."""
    at = np.asarray(curve["probability"], float)
    if not len(at):
        return ""
    scale = 10_000
    model, everyone = (scale * np.asarray(curve[key], float) for key in ("net_benefit", "treat_all"))
    banded = curve["low"] is not None and curve["high"] is not None
    lower, upper = (scale * np.asarray(curve[key], float) if banded else model for key in ("low", "high"))
    top = max(float(model.max()), float(everyone.max()), float(upper.max()))
    top = top if top > 0 else 1.0
    floor = -0.12 * top
    height = 230
    low, high = float(at[0]), float(at[-1])
    x: Scale = lambda v: LEFT + SIDE * _share(v, low, high)  # noqa: E731
    y: Scale = lambda v: TOP + height * (top - v) / (top - floor)  # noqa: E731
    body = axes(
        x, y, {low: "", high: ""}, {floor: "", top: ""} | {v: f"{v:g}" for v in nice(floor, top)},
        "threshold probability", "net benefit per 10,000 lesions",
    )  # fmt: skip
    for value in _powers(low, high, inside=True):
        body.append(f'<path class="axis" d="M{x(value):.1f} {y(floor):.1f}v5"/>')
        body.append(f'<text x="{x(value):.1f}" y="{y(floor) + 18:.1f}" text-anchor="middle">{percent(value)}</text>')
    if banded:
        edge = [*zip(at, np.maximum(upper, floor), strict=True)]
        edge += [*zip(at[::-1], np.maximum(lower, floor)[::-1], strict=True)]
        body.append(f'<path class="shade" d="{line(edge, x, y)}Z"/>')
    everywhere = _cut(at.tolist(), everyone.tolist(), floor)
    body.append(f'<path class="all" d="{line(everywhere, x, y)}"/>')
    body.append(f'<path class="chance" d="{line([(low, 0.0), (high, 0.0)], x, y)}"/>')
    body.append(f'<path class="curve" d="{line(_cut(at.tolist(), model.tolist(), floor), x, y)}"/>')
    foot = everywhere[-1]
    at_foot = f'x="{x(foot[0]) - 6:.1f}" y="{y(floor) - 6:.1f}"'
    body.append(f'<text class="note" {at_foot} text-anchor="end">refer all</text>')
    body.append(f'<text class="note" x="{x(low) + 6:.1f}" y="{y(0.0) - 5:.1f}">refer none</text>')
    middle = int(np.argmin(np.abs(np.log(at) - np.log(low) - 0.62 * np.log(high / low))))
    above = y(max(float(upper[middle]), 0.0)) - 7
    body.append(f'<text class="strong" x="{x(at[middle]):.1f}" y="{above:.1f}">this model</text>')
    best = int(np.argmin(np.abs(at - curve["prevalence"])))
    text = (
        f"At the threshold probability {percent(float(at[best]))}: net benefit of the model {model[best]:.2f} per "
        f"10,000 lesions, of referring every lesion {everyone[best]:.2f}, of referring none 0."
    )
    return svg(name, "Decision curve", text, TOP + height + 48, body)


def bands(found: Mapping[str, Mapping[str, Any]], name: str) -> str:
    """Where malignant and benign lesions go: one bar each, cut into the bands."""
    order = [band for band in BAND_ORDER if band in found]
    rows = {
        "malignant": [found[band]["malignant"] for band in order],
        "benign": [found[band]["lesions"] - found[band]["malignant"] for band in order],
    }
    left, width, tall, step = 84, WIDTH - 84 - 6, 30, 62
    body, said = [_hatch(name)], []
    for row, (label, counts) in enumerate(rows.items()):
        total, at = sum(counts) or 1, float(left)
        top = 20 + row * step
        body.append(f'<text class="strong" x="{left - 10}" y="{top + 20}" text-anchor="end">{label}</text>')
        for i, (band, count) in enumerate(zip(order, counts, strict=True)):
            wide = width * count / total
            fill = f' fill="url(#{name}-hatch)"' if i == 1 else ""
            body.append(
                f'<rect class="band b{i}"{fill} x="{at:.1f}" y="{top}" width="{max(wide, 0.0):.1f}" height="{tall}"/>'
            )
            if wide >= 40:
                body.append(
                    f'<text class="note" x="{at + wide / 2:.1f}" y="{top + tall + 14}" text-anchor="middle">'
                    f"{count / total:.0%} {escape(band) if wide >= 78 else ''}</text>"
                )
            at += wide
            said.append(f"{count:,} of {sum(counts):,} {label} lesions are {band}")
    return svg(name, "Bands", "; ".join(said) + ".", 20 + step * len(rows), body)


def percent(value: float) -> str:
    """A probability as a short percentage: 0.001%, 0.1%, 10%."""
    return f"{np.format_float_positional(100 * value, precision=2, unique=False, fractional=False, trim='-')}%"


def _hatch(name: str) -> str:
    return (
        f'<defs><pattern id="{name}-hatch" width="6" height="6" patternUnits="userSpaceOnUse" '
        'patternTransform="rotate(45)"><rect class="hatch-back" width="6" height="6"/>'
        '<path class="hatch-line" d="M0 0V6"/></pattern></defs>'
    )


def _ends(figure: Mapping[str, Any]) -> list[float]:
    interval = figure.get("interval") or {}
    ends = [figure["value"]]
    return ends if interval.get("low") is None else [*ends, interval["low"], interval["high"]]


def _share(value: float, low: float, high: float) -> float:
    return float(np.log(value / low) / np.log(high / low))


def _decades(low: float, high: float) -> tuple[float, float]:
    """The whole powers of ten around low..high, at least one decade; never above 1."""
    first, last = int(np.floor(np.log10(low))), min(0, int(np.ceil(np.log10(high) - 1e-9)))
    return 10.0 ** min(first, last - 1), 10.0**last


def _powers(low: float, high: float, inside: bool = False) -> list[float]:
    first, last = np.log10(low), np.log10(high)
    return [10.0**k for k in range(int(np.ceil(first - 1e-9)), int(np.floor(last + 1e-9)) + 1)] or (
        [] if inside else [low, high]
    )


def _cut(at: Iterable[float], values: Iterable[float], floor: float) -> list[tuple[float, float]]:
    """The curve's points until it first falls under `floor`, where it ends."""
    out: list[tuple[float, float]] = []
    for point in zip(at, values, strict=True):
        if point[1] < floor:
            if out:
                (a, u), (b, v) = out[-1], point
                out.append((a + (b - a) * (u - floor) / (u - v), floor))
            break
        out.append(point)
    return out
