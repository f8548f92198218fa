"""Figures in words: every value with its interval, or with the reason why it has none. For the report and the card."""

from __future__ import annotations

from collections.abc import Mapping
from string import ascii_lowercase
from typing import Any

import numpy as np

from lesionflow import recipe

LABELS = {
    "pauc": "pAUC",
    "pauc_88": "pAUC",
    "auc": "AUC",
    "average_precision": "Average precision",
    "rank_pooled": "Ranked and pooled",
    "pooled": "Pooled logits",
    "mean_of_folds": "Mean of folds",
}
MODES = {name: words[0].upper() + words[1:] for name, words in recipe.MODES.items()}
"""The ways to score a lesion, from least to most."""


def number(value: float, style: str = "area") -> str:
    """`value` as text: area 0.1234, percent 12.3%, rate 1,234.5, ratio 1.23, signed +0.1234, small 0.0000123."""
    if style == "small":
        return str(np.format_float_positional(value, precision=3, unique=False, fractional=False, trim="-"))
    spec = {"area": ".4f", "percent": ".1%", "rate": ",.1f", "ratio": ".2f", "signed": "+.4f"}[style]
    return format(value, spec)


def span(figure: Mapping[str, Any], style: str = "area") -> str | None:
    """Both ends of a figure's interval, or None where it has none (see `reason`)."""
    interval = figure.get("interval") or {}
    if interval.get("low") is None or interval.get("high") is None:
        return None
    return f"{number(interval['low'], style)} to {number(interval['high'], style)}"


def reason(figure: Mapping[str, Any]) -> str:
    """Why a figure has no interval, or no value."""
    interval = figure.get("interval") or {}
    return str(interval.get("reason") or figure.get("reason") or "no interval was computed")


def plain(figure: Mapping[str, Any] | None, style: str = "area") -> str:
    """One line: `0.1234 (0.1123 to 0.1345)`, `0.1234 (no interval: reason)` or `none: reason`."""
    if figure is None:
        return "none: not in these metrics"
    if figure.get("value") is None:
        return f"none: {reason(figure)}"
    between = span(figure, style)
    return f"{number(figure['value'], style)} ({between or f'no interval: {reason(figure)}'})"


class Notes:
    """The reasons that one table gives under itself, each once, under a letter."""

    def __init__(self) -> None:
        self._letters: dict[str, str] = {}

    def mark(self, text: str) -> str:
        if text not in self._letters:
            at = len(self._letters)
            self._letters[text] = ascii_lowercase[at % 26] * (at // 26 + 1)
        return self._letters[text]

    def lines(self) -> list[tuple[str, str]]:
        return [(letter, text) for text, letter in self._letters.items()]


def cell(figure: Mapping[str, Any] | None, style: str, notes: Notes) -> dict[str, str | None]:
    """What a table shows of a figure: {value, span, mark}; `mark` is the letter of its reason in `notes`."""
    if figure is None:
        return {"value": None, "span": None, "mark": notes.mark("not in these metrics")}
    value = None if figure.get("value") is None else number(figure["value"], style)
    between = None if value is None else span(figure, style)
    return {"value": value, "span": between, "mark": None if between else notes.mark(reason(figure))}
