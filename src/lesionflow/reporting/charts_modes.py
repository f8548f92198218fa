"""The report's charts of what each part adds and of what the metadata's trees look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from lesionflow.reporting.charts import WIDTH, Scale, nice, svg

Rows = Sequence[Mapping[str, Any]]


def differences(rows: Rows, name: str) -> str:
    """Paired differences of the pAUC, one row each: {label, out_of_fold, holdout}, figures or None; dotted: none.

    Out of fold a filled dot on a solid line, on the hold-out below it an empty one on a dashed line.
    """
    left, width, step = 160, 244, 38
    shown = [(row, key) for row in rows for key in ("out_of_fold", "holdout") if row.get(key)]
    seen = [v for row, key in shown for v in _ends(row[key])] + [0.0]
    low, high = min(seen), max(seen)
    if high <= low:
        return ""
    room = 0.06 * (high - low)
    low, high = low - room, high + room
    x: Scale = lambda v: left + width * (v - low) / (high - low)  # noqa: E731
    bottom = 10 + step * len(rows)
    body = [f'<path class="chance" d="M{x(0):.1f} 4V{bottom}"/>']
    for i, row in enumerate(rows):
        at = 10 + step * (i + 0.5)
        body.append(f'<text x="{left - 12}" y="{at + 4}" text-anchor="end">{escape(row["label"])}</text>')
        for key, down, line, dot in (
            ("out_of_fold", -6, "whisker", "dot"),
            ("holdout", 6, "whisker held", "none-found"),
        ):
            ends = _ends(row[key]) if row.get(key) else []
            if len(ends) > 1:
                body.append(f'<path class="{line}" d="M{x(ends[1]):.1f} {at + down}H{x(ends[2]):.1f}"/>')
            if ends:
                body.append(f'<circle class="{dot}" cx="{x(ends[0]):.1f}" cy="{at + down}" r="4"/>')
    for value in nice(low, high):
        body.append(f'<path class="axis" d="M{x(value):.1f} {bottom}v5"/>')
        body.append(
            f'<text x="{x(value):.1f}" y="{bottom + 20}" text-anchor="middle">{f"{value:+g}" if value else "0"}</text>'
        )
    body.append(f'<path class="axis" d="M{left} {bottom}H{left + width}"/>')
    body.append(f'<text x="{left + width / 2}" y="{bottom + 38}" text-anchor="middle">pAUC difference</text>')
    text = "The same differences as in the table beside this chart."
    return svg(name, "What each part adds to the pAUC", text, bottom + 46, body)


def importances(groups: Sequence[tuple[str, Rows]], name: str) -> str:
    """Bars under their features' names, by block: (title, rows of {name, share})."""
    most = max((row["share"] for _, rows in groups for row in rows), default=0.0)
    if most <= 0:
        return ""
    left, width, at, body = 4, WIDTH - 68, 0.0, []
    for title, rows in groups:
        at += 24
        body.append(f'<text class="strong" x="{left}" y="{at:.0f}">{escape(title)}</text>')
        for row in rows:
            long = max(width * row["share"] / most, 1.0)
            body.append(f'<text x="{left}" y="{at + 17:.0f}">{escape(row["name"])}</text>')
            body.append(f'<rect class="benign" x="{left}" y="{at + 22:.0f}" width="{long:.1f}" height="8"/>')
            body.append(f'<text class="note" x="{left + long + 6:.1f}" y="{at + 30:.0f}">{row["share"]:.1%}</text>')
            at += 31
    text = "; ".join(f"{row['name']} {row['share']:.1%}" for _, rows in groups for row in rows)
    return svg(name, "Share of what the trees' splits gain", f"{text}.", at + 10, body)


def _ends(figure: Mapping[str, Any]) -> list[float]:
    """The value, and where there is one both ends of its interval."""
    interval = figure.get("interval") or {}
    return [v for v in (figure.get("value"), interval.get("low"), interval.get("high")) if v is not None]
