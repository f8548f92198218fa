"""The report's part about trust: other institutions, leaks, what the model looks at, the pictures of its errors.

Each function gives what its section of report.html shows. A part that is missing has a `reason` instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lesionflow.reporting import charts
from lesionflow.reporting.wording import Notes, cell

View = dict[str, Any]
EXPLAINED = {
    "highest": "where the map is highest",
    "random": "a connected region of the same size, at random",
    "lowest": "where the map is lowest",
    "another": "where the map of another lesion is highest",
    "difference": "highest minus random, paired",
    "difference_lowest": "highest minus lowest, paired",
    "difference_another": "highest minus another's, paired",
}


def fold_row(one: Mapping[str, Any], notes: Notes) -> View:
    """A fold's pAUC under its name: that of an institution where the split is by institution."""
    counts = f"{one['malignant']:,} / {one['lesions']:,}"
    return {"label": one.get("name") or f"Fold {one['fold']}", "cell": cell(one, "area", notes), "counts": counts}


def institutions(found: Mapping[str, Any]) -> View:
    split = found.get("split") or {"kind": "patient"}
    if split["kind"] != "institution":
        return {"rows": []}
    notes, pauc = Notes(), found["pauc"]
    rows = []
    for one in pauc["folds"]:
        strip = charts.strip(one, 0.0, pauc["maximum"], pauc["chance"]) if one["value"] is not None else ""
        rows.append(fold_row(one, notes) | {"strip": strip})
    return {"rows": rows, "notes": notes.lines(), "maximum": f"{pauc['maximum']:g}"}


def leaks(found: Mapping[str, Any]) -> View:
    leaks = found.get("leaks")
    if not leaks or "patients_in_two_folds" not in leaks:
        return {"reason": (leaks or {}).get("reason") or "not in these metrics"}
    overlap = leaks["patients_in_two_folds"]
    kinds = [_duplicates(name, leaks.get(f"{name}_duplicates") or {}) for name in ("exact", "near")]
    return {
        "reason": None,
        "overlap": overlap,
        "fold_hash_checked": leaks["fold_hash_checked"],
        "kinds": kinds,
    }


def _duplicates(name: str, part: Mapping[str, Any]) -> View:
    rows = []
    for pair in part.get("pairs") or []:
        same = pair.get("same_patient")
        rows.append({
            "ids": pair["ids"],
            "folds": " and ".join("hold-out" if f < 0 else f"{f}" for f in pair["folds"]),
            "truth": " and ".join("malignant" if t else "benign" for t in pair["targets"]),
            "patient": "unknown" if same is None else "same" if same else "different",
        })  # fmt: skip
    count, checked = part.get("count"), part.get("checked")
    what = "identical bytes" if name == "exact" else "nearly the same picture"
    if count is None:
        text = f"Lesions of {what} on both sides of a split: not checked ({part.get('reason') or 'no reason given'})."
    else:
        among = f" among {checked:,} lesions" if checked else ""
        text = f"Pairs of {what} on both sides of a split: {count:,}{among}."
        if part.get("reason"):
            text += f" {part['reason']}."
    return {"name": name, "count": count, "text": text, "rows": rows, "shown": len(rows)}


def explain(part: Mapping[str, Any] | None) -> View:
    if not part:
        return {"reason": "no maps were checked for this run"}
    figures = {name: one for name, one in part.items() if isinstance(one, Mapping) and "interval" in one}
    if not figures:
        return {"reason": part.get("reason") or "no maps were checked for this run"}
    notes = Notes()
    rows = [
        {"label": EXPLAINED.get(name, name.replace("_", " ")), "cell": cell(one, "ratio", notes)}
        for name, one in figures.items()
    ]
    share = f"{part['share']:.0%}" if "share" in part else "a share"
    lesions = f"{part['lesions']:,} lesions" if "lesions" in part else "a sample of lesions"
    return {"reason": None, "rows": rows, "notes": notes.lines(), "share": share, "lesions": lesions}


def gallery(items: Sequence[Mapping[str, Any]] | None) -> list[View]:
    names = ("isic_id", "kind", "sentence", "image", "overlay", "attribution", "licence", "band", "logit", "doubts")
    return [{name: item.get(name) for name in names} for item in items or []]
