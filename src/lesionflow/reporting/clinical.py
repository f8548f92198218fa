"""The report's clinical part: what is served, its probabilities, the work it makes, and for whom it holds.

Each function takes the content of metrics.json and gives what its section of report.html shows, as plain text
and numbers. A part that is missing has a `reason` instead.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lesionflow.reporting import charts, charts_clinical
from lesionflow.reporting.wording import LABELS, Notes, cell, plain

View = dict[str, Any]
NO_PART = "not in these metrics"
BAND_MEANING = {
    "refer": "look at these first",
    "routine": "look at these as usual",
    "low": "unlikely, never excluded",
    "cannot judge": "the picture is unlike what the model knows",
}
_COUNTED = re.compile(r"\s*\d+ of (\d+ comparisons over all partitions.*)$")
CALIBRATION = (
    ("intercept", "Intercept", "ratio", "0", "calibration in the large, slope fixed at 1; above 0: too low throughout"),
    ("slope", "Slope", "ratio", "1", "under 1: too extreme, over 1: too timid"),
    ("expected_observed", "Expected / observed", "ratio", "1", "malignant lesions expected, over those found"),
    ("ece", "Expected calibration error", "small", "0", "mean distance of predicted and found over the bins"),
    ("brier", "Brier score", "small", "0", "mean squared error of the probability"),
    ("log_loss", "Log loss", "small", "0", "in nats"),
)


def served(found: Mapping[str, Any]) -> View:
    """The hold-out: lesions of patients that no fold's model has seen, scored by the mean of all of them."""
    part = found.get("served") or {"reason": NO_PART}
    if "pauc" not in part:
        return {"reason": part.get("reason") or NO_PART}
    notes, counts = Notes(), part["counts"]
    rows = []
    for name in ("pauc", "pauc_88", "auc", "average_precision"):
        label = f"{LABELS[name]} above {found[name]['min_tpr']:.0%}" if name.startswith("pauc") else LABELS[name]
        cells = [cell(part.get(name), "area", notes), cell(found[name]["rank_pooled"], "area", notes)]
        rows.append({"label": label, "cells": cells})
    if "retrieval" in part:
        cells = [cell(part["retrieval"], "area", notes), cell(found["retrieval"], "area", notes)]
        rows.append({"label": f"Top-{part['retrieval']['k']} retrieval, known patients", "cells": cells})
    kept, specific = part.get("bands") or {}, Notes()
    return {
        "reason": None,
        "counts": f"{counts['lesions']:,} lesions, {counts['malignant']:,} of them malignant. {part['groups']['note']}",
        "rows": rows,
        "notes": notes.lines(),
        "thresholds": [_threshold(name, one, specific) for name, one in (part.get("thresholds") or {}).items() if one],
        "threshold_notes": specific.lines(),
        "bands": _bands(kept) if kept else None,
        "chart": charts_clinical.bands(kept, "bands") if kept else "",
    }


def _threshold(name: str, one: Mapping[str, Any], notes: Notes) -> View:
    label = "refer" if name == "refer" else "refer or routine"
    return {
        "label": f"logit ≥ {one['logit']:.4f}" if one["reached"] else "not reached",
        "band": label,
        "target": f"{one['target']:.0%}",
        "sensitivity": f"{one['sensitivity']:.1%}",
        "bound": f"{one['lower_bound']:.1%}",
        "specificity": cell(one.get("specificity"), "percent", notes),
        "level": f"{one['level']:.0%}",
        "clusters": f"{one['malignant']:,} / {one['malignant_clusters']:,}",
        "reason": one.get("reason"),
    }


def _bands(kept: Mapping[str, Mapping[str, Any]]) -> View:
    notes, rows = Notes(), []
    for name in [n for n in charts_clinical.BAND_ORDER if n in kept]:
        one = kept[name]
        rows.append({
            "label": name, "meaning": BAND_MEANING.get(name, ""),
            "malignant": f"{one['malignant']:,}", "lesions": f"{one['lesions']:,}",
            "share": cell(one.get("share"), "percent", notes),
            "weighted": cell(one.get("share_at_prevalence"), "percent", notes),
        })  # fmt: skip
    return {"rows": rows, "notes": notes.lines()}


def calibration(found: Mapping[str, Any]) -> View:
    """Both assessments side by side: what is served, and the folds' models on what they were not trained on."""
    parts = [("What is served (hold-out)", "served", (found.get("served") or {}).get("calibration"))]
    parts += [("Out of fold (cross-fitted)", "oof", found.get("calibration"))]
    present = [(title, name, one) for title, name, one in parts if one]
    if not present:
        return {"reason": NO_PART}
    notes = Notes()
    rows = [
        {"label": label, "ideal": ideal, "meaning": meaning,
         "cells": [cell(one.get(key), style, notes) for _, _, one in present]}
        for key, label, style, ideal, meaning in CALIBRATION
    ]  # fmt: skip
    return {
        "reason": None,
        "titles": [title for title, _, _ in present],
        "rows": rows,
        "notes": notes.lines(),
        "prevalence": charts_clinical.percent(present[0][2]["prevalence"]),
        "data_prevalence": charts_clinical.percent(present[0][2]["data_prevalence"]),
        "figures": [_reliability(*one) for one in present],
        "formula": _formula(found.get("probability")),
    }


def _formula(fitted: Mapping[str, Any] | None) -> str | None:
    if not fitted:
        return None
    where = {"holdout": "the hold-out", "out-of-fold": "out-of-fold logits of single folds' models"}
    on = where.get(fitted.get("fitted_on", ""), "held-out lesions")
    return (
        f"Served: probability = sigmoid({fitted['a']:.4g} × logit {fitted['b']:+.4g}), fitted on {on} "
        f"({fitted['lesions']:,} lesions, {fitted['malignant']:,} malignant)."
    )


def _reliability(title: str, name: str, one: Mapping[str, Any]) -> View:
    bins = one.get("bins") or []
    rows = [
        {"range": f"{charts_clinical.percent(b['low'])} to {charts_clinical.percent(b['high'])}",
         "predicted": charts_clinical.percent(b["predicted"]), "observed": _observed(b["observed"]),
         "counts": f"{b['malignant']:,} / {b['lesions']:,}"}
        for b in bins
    ]  # fmt: skip
    svg = charts_clinical.reliability(bins, one["prevalence"], f"reliability-{name}") if bins else ""
    return {"title": title, "svg": svg, "rows": rows, "reason": one.get("reason")}


def _observed(figure: Mapping[str, Any]) -> str:
    if figure["value"] is None:
        return plain(figure)
    interval = figure.get("interval") or {}
    if interval.get("low") is None:
        return plain(figure, "percent")
    low, high = (charts_clinical.percent(interval[end]) for end in ("low", "high"))
    return f"{charts_clinical.percent(figure['value'])} ({low} to {high})"


def workload(found: Mapping[str, Any]) -> View:
    """Lesions reviewed per cancer found at each sensitivity, overall and within each patient."""
    parts = [("What is served (hold-out)", (found.get("served") or {}).get("operating"))]
    parts += [("Out of fold, ranked and pooled", found.get("operating"))]
    tables = [_workload(title, rows) for title, rows in parts if rows]
    return {"reason": None if tables else NO_PART, "tables": tables}


def _workload(title: str, rows: Sequence[Mapping[str, Any]]) -> View:
    notes = Notes()
    out = []
    for one in rows:
        within = one.get("within_patient") or {}
        out.append({
            "sensitivity": f"{one['sensitivity']:.0%}",
            "cells": [
                cell(one.get("specificity"), "percent", notes),
                cell(one.get("reviewed_per_cancer"), "rate", notes),
                cell(one.get("flagged_per_patient"), "rate", notes),
            ],
            "k": "none" if within.get("k") is None else f"{within['k']:,}",
            "within": cell(within.get("reviewed_per_cancer"), "rate", notes),
        })  # fmt: skip
    return {"title": title, "rows": out, "notes": notes.lines()}


def decision(found: Mapping[str, Any]) -> View:
    """The decision curve of what is served, or of the folds where nothing was held out."""
    kept = (found.get("served") or {}).get("decision_curve")
    curve, of = (kept, "what is served (hold-out)") if kept else (found.get("decision_curve"), "the folds' models")
    if not curve:
        return {"reason": NO_PART}
    if curve.get("reason") and not curve.get("net_benefit"):
        return {"reason": curve["reason"]}
    return {
        "reason": None,
        "of": of,
        "no_band": curve.get("reason"),
        "svg": charts_clinical.decision(curve, "decision"),
        "prevalence": charts_clinical.percent(curve["prevalence"]),
        "level": f"{curve['level']:.0%}",
        "method": curve.get("method"),
        "rows": _benefits(curve),
    }


def _benefits(curve: Mapping[str, Any]) -> list[View]:
    """The curve in a few numbers, for those who don't see it: every fifth point, per 10,000 lesions."""
    rows = []
    for i in range(0, len(curve["probability"]), 5):
        between = "none"
        if curve["low"] is not None and curve["high"] is not None:
            between = f"{1e4 * curve['low'][i]:.2f} to {1e4 * curve['high'][i]:.2f}"
        rows.append({
            "at": charts_clinical.percent(curve["probability"][i]), "value": f"{1e4 * curve['net_benefit'][i]:.2f}",
            "span": between, "all": f"{1e4 * curve['treat_all'][i]:.2f}",
        })  # fmt: skip
    return rows


def subgroups(found: Mapping[str, Any]) -> View:
    """One table per partition; a strip beside each pAUC shows it against that of all lesions."""
    parts = found.get("subgroups") or []
    if not parts:
        return {"reason": NO_PART}
    pauc = found["pauc"]
    overall = pauc[found["headline"]]
    ends = [end for part in parts for one in part["cells"] for end in _ends(one["pauc"])] + _ends(overall)
    # One scale for all tables, so that strips compare across them.
    low, high = (math.floor(50 * min(ends)) / 50, math.ceil(50 * max(ends)) / 50) if ends else (0.0, pauc["maximum"])
    tables = []
    # What the notes of all partitions say of the number of comparisons is said once.
    counted = {match[1] for part in parts if (match := _COUNTED.search(part.get("note") or ""))}
    said = counted.pop() if len(counted) == 1 else None
    for part in parts:
        notes = Notes()
        rows = [_cell(one, (low, high), overall["value"], notes) for one in part["cells"]]
        tables.append({
            "title": part["title"], "name": part["name"], "rows": rows,
            "note": _COUNTED.sub("", part.get("note") or "") if said else part.get("note") or "",
            "notes": notes.lines(),
            "reason": None if rows else part.get("reason") or part.get("note") or "the data lacks the column",
        })  # fmt: skip
    return {"reason": None, "tables": tables, "overall": plain(overall), "strip": f"{low:g} to {high:g}", "said": said}


def _ends(figure: Mapping[str, Any]) -> list[float]:
    interval = figure.get("interval") or {}
    return [v for v in (figure["value"], interval.get("low"), interval.get("high")) if v is not None]


def _cell(one: Mapping[str, Any], scale: tuple[float, float], overall: float | None, notes: Notes) -> View:
    return {
        "label": one["label"],
        "counts": f"{one['malignant']:,} / {one['lesions']:,}",
        "strip": charts.strip(one["pauc"], *scale, overall) if one["pauc"]["value"] is not None else "",
        "cells": [
            cell(one["pauc"], "area", notes),
            cell(one["difference"], "signed", notes),
            cell(one["auc"], "area", notes),
            cell(one["sensitivity"], "percent", notes),
            cell(one["specificity"], "percent", notes),
        ],
    }
