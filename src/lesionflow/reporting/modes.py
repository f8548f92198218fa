"""The report's part about metadata: what each way to score is worth, what each part adds, and what trees look at.

Each function gives what its section of report.html shows, as plain text and numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lesionflow.reporting import charts_modes
from lesionflow.reporting.wording import MODES, Notes, cell, plain

View = dict[str, Any]
WHERE = ("out_of_fold", "holdout")
ADDED = {
    # block, from: label, the same for a chart
    ("record", "image"): ("The lesion's metadata, to the picture", "metadata to picture"),
    ("context", "image_record"): ("Comparison with the patient's other lesions, to both", "comparison to both"),
    ("context", "record"): ("Comparison with the patient's other lesions, to metadata", "comparison to metadata"),
    ("image", "visit"): ("The picture, to metadata and comparison", "picture to metadata"),
    ("image", "record"): ("The picture, to the lesion's metadata", "picture to metadata"),
    ("stack", ""): ("Joining picture and metadata, over the better of the two", "joining, over better"),
}
BLOCKS = {
    "plain": "The lesion's own columns",
    "derived": "Made of the lesion's own columns",
    "context": "Compared with the patient's other lesions",
    "neighbours": "Compared with the nearest and most alike of them",
}
METHODS = {
    "trees": "trees learn from the features and the picture's log-odds together",
    "linear": "a line weighs the two log-odds",
    "rank": "the mean of the two ranks",
}
MEMBERS = {"lightgbm": "LightGBM", "catboost": "CatBoost", "xgboost": "XGBoost"}
TOP = 20


def modes(found: Mapping[str, Any]) -> View | None:
    """Each mode's figures and thresholds, and what each part adds; None where pictures are all there is."""
    part = found.get("modes")
    if not part:
        return None
    notes, specific = Notes(), Notes()
    served, each = part["served"], part["each"]
    rows = [
        {
            "label": MODES[name],
            "served": name == served,
            "cells": [cell(_figure(one[where], key), "area", notes) for key in ("pauc", "auc") for where in WHERE],
            "differences": [cell(one["difference"][where], "signed", notes) for where in WHERE]
            if one["difference"]
            else [],
        }
        for name, one in each.items()
    ]
    adds = [
        {"label": added(one)[0], "short": added(one)[1],
         "cells": [cell(one[where], "signed", notes) for where in WHERE],
         "sure": [_sure(one[where]) for where in WHERE]}
        for one in part["adds"]
    ]  # fmt: skip
    chart = [
        {"label": row["short"]} | {where: one[where] for where in WHERE if one[where].get("value") is not None}
        for row, one in zip(adds, part["adds"], strict=True)
    ]
    return {
        "served": MODES[served],
        "rows": rows,
        "adds": adds,
        "svg": charts_modes.differences(chart, "adds"),
        "held": any("holdout" in row for row in chart),
        "notes": notes.lines(),
        "thresholds": [
            _threshold(name, band, one["thresholds"][band], specific)
            for name, one in each.items()
            for band in ("refer", "low")
            if one["thresholds"]
        ],
        "threshold_notes": specific.lines(),
    }


def added(one: Mapping[str, Any]) -> tuple[str, str]:
    """What is added, in words and in fewer."""
    return ADDED.get((one["block"], one["from"])) or ADDED.get((one["block"], "")) or (one["block"], one["block"])


def _figure(part: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A figure, or why there is none of the whole part."""
    figure: Mapping[str, Any] = part.get(key, part)
    return figure


def _sure(figure: Mapping[str, Any]) -> str:
    share = figure.get("p_better")
    if share is None:
        return "none"
    return "over 99.9%" if share > 0.999 else "under 0.1%" if share < 0.001 else f"{share:.1%}"


def _threshold(name: str, band: str, one: Mapping[str, Any], notes: Notes) -> View:
    counted = "refer" if band == "refer" else "refer or routine"
    return {
        "label": MODES[name],
        "band": counted,
        "at": f"logit ≥ {one['logit']:.4f}" if one["reached"] else f"{one['target']:.0%} not reached",
        "sensitivity": f"{one['sensitivity']:.1%}",
        "bound": f"{one['lower_bound']:.1%}",
        "specificity": cell(one["specificity"], "percent", notes),
    }


def features(tabular: Mapping[str, Any] | None) -> View | None:
    """What the trees look at and how their scores were joined with the pictures'; None without metadata."""
    if not tabular:
        return None
    every = sorted(tabular.get("importances") or [], key=lambda one: (-one["share"], one["name"]))
    total = {block: sum(one["share"] for one in every if one["block"] == block) for block in BLOCKS}
    top = [one for one in every[:TOP] if one["share"] > 0]
    groups = [
        (f"{BLOCKS[block]}: {total[block]:.0%} of all", [one for one in top if one["block"] == block])
        for block in BLOCKS
        if total[block] > 0
    ]
    return {
        "svg": charts_modes.importances(groups, "importances"),
        "rows": [
            {"name": one["name"], "block": BLOCKS[one["block"]], "share": f"{one['share']:.1%}", "why": one["why"]}
            for one in top
        ],
        "count": len(every),
        "members": members(tabular),
        "joined": joined(tabular.get("choices") or {}),
        "missing": missing(tabular),
    }


def members(tabular: Mapping[str, Any]) -> str:
    """How many models of which kind each fold has."""
    named = [f"{count} {MEMBERS.get(kind, kind)}" for kind, count in (tabular.get("members") or {}).items() if count]
    return ", ".join(named) or "none"


def joined(choices: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """For each joined mode, which way of joining each fold took, as a sentence."""
    lines = []
    for mode, folds in choices.items():
        by: dict[str, list[str]] = {}
        for one in folds:
            by.setdefault(one["method"], []).append(str(one["fold"]))
        if not by:
            continue
        parts = [
            f"{METHODS.get(method, method)} ({'all folds' if len(by) == 1 else _folds(where)})"
            for method, where in sorted(by.items(), key=lambda item: (-len(item[1]), item[0]))
        ]
        lines.append(f"{MODES.get(mode, mode)}: {'; '.join(parts)}.")
    return lines


def _folds(names: Sequence[str]) -> str:
    return f"fold {names[0]}" if len(names) == 1 else f"folds {', '.join(names[:-1])} and {names[-1]}"


def missing(tabular: Mapping[str, Any]) -> str:
    """What becomes of empty cells."""
    policy = (
        "A column whose empty cells alone tell malignant from benign lesions stops a run; none did."
        if tabular.get("missing") == "refuse"
        else "Columns whose empty cells alone tell malignant from benign lesions were let through (tabular.missing)."
    )
    return f"Empty cells are not filled in: each tree learns which way they go. {policy}"


def table(part: Mapping[str, Any]) -> str:
    """Both tables as Markdown, for the card."""
    lines = ["| scored by | pAUC out of fold | pAUC hold-out |", "|---|---|---|"]
    for name, one in part["each"].items():
        mark = " (served)" if name == part["served"] else ""
        lines.append(f"| {MODES[name]}{mark} | {' | '.join(plain(_figure(one[where], 'pauc')) for where in WHERE)} |")
    lines += ["", "| what is added | pAUC difference out of fold, paired | hold-out, paired |", "|---|---|---|"]
    lines += [
        f"| {added(one)[0]} | {' | '.join(plain(one[where], 'signed') for where in WHERE)} |" for one in part["adds"]
    ]
    return "\n".join(lines)
