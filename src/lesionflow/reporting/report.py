"""report.html: the whole evaluation on one page that needs no network, for people who weren't there.

The page is a template (report.html beside this file, its style in style.html) filled with text made here,
in `clinical` and in `checks`, and with charts. `context` says where the figures come from; any key
of it may be missing:

    recipe (dict), recipe_toml, data_hash, fold_hash, data (dict), synthetic (bool), data_licence, versions (dict),
    gate (the result of gate.check), curves (rows of fold, model, epoch, loss, pauc),
    tabular (what trees look at and how they were joined: see `modes.features`),
    explain (figures of the deletion test, by name), gallery_path (where the local gallery.html lies)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lesionflow.errors import missing_extra
from lesionflow.evaluation import metrics
from lesionflow.keys import write_text
from lesionflow.reporting import charts, checks, clinical, modes
from lesionflow.reporting.card import write_card
from lesionflow.reporting.wording import LABELS, Notes, cell, number, plain, reason, span

if TYPE_CHECKING:
    import polars as pl

__all__ = ["write_card", "write_report"]

SECTIONS = {
    "summary": "Summary",
    "ranking": "Ranking",
    "served": "What is served",
    "modes": "What each part adds",
    "features": "What the metadata tells",
    "calibration": "Probabilities",
    "workload": "Work per cancer found",
    "decision": "Decision curve",
    "subgroups": "Subgroups",
    "institutions": "Institutions",
    "leaks": "Leaks",
    "explanations": "Explanations",
    "training": "Training",
    "origin": "Data and origin",
    "reading": "How to read this",
    "recipe": "Recipe",
}
WAYS = ("rank_pooled", "pooled", "mean_of_folds")


def write_report(
    path: Path,
    metrics: Mapping[str, Any],
    oof: pl.DataFrame,
    context: Mapping[str, Any],
    *,
    holdout: pl.DataFrame | None = None,
    gallery: Sequence[Mapping[str, Any]] | None = None,
) -> None:
    """Write the page to `path`, from the content of metrics.json and the out-of-fold (and hold-out) table.

    `gallery` puts the pictures of `gallery.gallery` into the page; without it the page holds no patient's image.
    Raises `UsageError` where jinja2 isn't installed.
    """
    try:
        import jinja2
    except ImportError:
        raise missing_extra("jinja2", "train") from None
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    view = _view(metrics, oof, context, holdout, gallery)
    write_text(path, environment.get_template("report.html").render(view))


def _view(
    found: Mapping[str, Any],
    oof: pl.DataFrame,
    context: Mapping[str, Any],
    holdout: pl.DataFrame | None,
    gallery: Sequence[Mapping[str, Any]] | None,
) -> dict[str, Any]:
    recipe, versions = context.get("recipe") or {}, context.get("versions") or {}
    training = _training(found["pauc"], context.get("curves") or [])
    parts, features = modes.modes(found), modes.features(context.get("tabular"))
    absent = {
        "training": not training["figures"],
        "recipe": not context.get("recipe_toml"),
        "modes": parts is None,
        "features": features is None,
    }
    return {
        "title": recipe.get("name") or "unnamed run",
        "description": recipe.get("description"),
        "version": versions.get("lesionflow"),
        "synthetic": context.get("synthetic"),
        "sections": {name: title for name, title in SECTIONS.items() if not absent.get(name)},
        "groups": found["groups"],
        "level": f"{found['settings']['level']:.0%}",
        "gate": context.get("gate"),
        "summary": _summary(found),
        "ranking": _ranking(found, oof),
        "served": clinical.served(found) | {"histogram": _held_out(found, holdout)},
        "modes": parts,
        "features": features,
        "calibration": clinical.calibration(found),
        "workload": clinical.workload(found),
        "decision": clinical.decision(found),
        "subgroups": clinical.subgroups(found),
        "institutions": checks.institutions(found),
        "leaks": checks.leaks(found),
        "explain": checks.explain(context.get("explain")),
        "gallery": checks.gallery(gallery),
        "legend": _legend(gallery),
        "gallery_path": context.get("gallery_path") or "gallery.html",
        "training": training,
        "origin": _origin(found, context, versions),
        "recipe_toml": context.get("recipe_toml"),
    }


def _legend(gallery: Sequence[Mapping[str, Any]] | None) -> str | None:
    if not any(item.get("overlay") for item in gallery or []):
        return None
    from lesionflow.serving.heat import LEGEND

    return LEGEND


def _summary(found: Mapping[str, Any]) -> dict[str, Any]:
    pauc = found["pauc"]
    figure = pauc[found["headline"]]
    interval = figure.get("interval") or {}
    between = span(figure)
    level = f"{found['settings']['level']:.0%}"
    meaning = f"{reason(figure)}."
    if between:
        meaning = (
            f"Folds ranked and pooled: {interval['malignant']:,} malignant lesions, {interval['clusters']:,} groups. "
            f"Method: {interval['method']}"
        ) + (f", {interval['replicates']:,} replicates." if interval["replicates"] else ".")
    return {
        "min_tpr": f"{pauc['min_tpr']:.0%}",
        "maximum": f"{pauc['maximum']:g}",
        "chance": f"{pauc['chance']:g}",
        "value": "none" if figure["value"] is None else number(figure["value"]),
        "span": f"{level} interval {between}" if between else "no interval",
        "meaning": meaning[:1].upper() + meaning[1:],
        "tiles": _tiles(found),
    }


def _tiles(found: Mapping[str, Any]) -> list[dict[str, str]]:
    """A few figures for those who read no further: of what is served where there is a hold-out."""
    kept = found.get("served") or {}
    held = "pauc" in kept
    of, source = (kept, "served, hold-out") if held else (found, "out of fold")
    tiles = []

    def add(label: str, figure: Mapping[str, Any] | None, style: str) -> None:
        if figure is not None:
            value = "none" if figure["value"] is None else number(figure["value"], style)
            tiles.append({
                "label": label, "value": value, "source": source,
                "span": span(figure, style) or f"no interval: {reason(figure)}",
            })  # fmt: skip

    add("AUC", of["auc"] if held else of["auc"]["rank_pooled"], "area")
    for one in (of.get("operating") or [])[:1]:
        add(f"Reviewed per cancer at {one['sensitivity']:.0%} sensitivity", one.get("reviewed_per_cancer"), "rate")
    refer = (kept.get("thresholds") or {}).get("refer") or (found.get("thresholds") or {}).get("refer")
    if refer:
        tiles.append({
            "label": "Sensitivity of the band refer", "value": number(refer["sensitivity"], "percent"),
            "span": f"at least {refer['lower_bound']:.1%} (one-sided, {refer['level']:.0%})",
            "source": source if refer["reached"] else f"{source}; target {refer['target']:.0%} not reached",
        })  # fmt: skip
    add("Expected / observed malignant", (of.get("calibration") or {}).get("expected_observed"), "ratio")
    return tiles


def _ranking(found: Mapping[str, Any], oof: pl.DataFrame) -> dict[str, Any]:
    pauc, notes = found["pauc"], Notes()
    rows = []
    for name in ("pauc", "pauc_88", "auc", "average_precision"):
        part = found[name]
        label = f"pAUC above {part['min_tpr']:.0%}" if name.startswith("pauc") else LABELS[name]
        meaning = f"0 to {part['maximum']:g}, " if "maximum" in part else ""
        meaning += f"chance {part.get('chance', 0.5):.2g}"
        rows.append({"label": label, "meaning": meaning, "cells": [cell(part[w], "area", notes) for w in WAYS]})
    y, s = oof["target"].to_numpy() == 1, oof["logit"].to_numpy().astype(float)
    fpr, tpr = metrics.roc_points(y, metrics.fold_rank(s, oof["fold"].to_numpy()))
    folds = [checks.fold_row(one, notes) for one in pauc["folds"]]
    forest = [_line(LABELS[w], pauc[w]) for w in WAYS] + [
        _line(f"Fold {one['fold']}", one) for one in pauc["folds"]
    ]  # fmt: skip
    retrieval = found["retrieval"]
    refer = found["thresholds"]["refer"]
    return {
        "ways": [LABELS[w] for w in WAYS],
        "rows": rows,
        "folds": folds,
        "notes": notes.lines(),
        "sd": pauc["mean_of_folds"].get("sd"),
        "retrieval": {
            "k": retrieval["k"],
            "text": plain(retrieval),
            "meaning": _retrieved(retrieval),
        },
        "forest": charts.forest(forest, pauc["chance"], pauc["maximum"], "forest"),
        "roc": charts.roc(fpr, tpr, pauc["min_tpr"], "roc"),
        "histogram": charts.histogram(s[y], s[~y], refer["value"], "scores", "pooled logit"),
        "refer": _refer(refer),
    }


def _retrieved(part: Mapping[str, Any]) -> str:
    k, easy = part["k"], part.get("patients_with_k_lesions_or_fewer") or 0
    return (
        f"of {part['malignant']:,} malignant lesions of {part['patients']:,} known patients, the share among their "
        f"patient's {k} highest scores; {easy:,} known patients have {k} lesions or fewer, where nothing can be missed"
    )


def _line(label: str, one: Mapping[str, Any]) -> dict[str, Any]:
    interval = one.get("interval") or {}
    return {"label": label, "value": one["value"], "low": interval.get("low"), "high": interval.get("high")}


def _refer(refer: Mapping[str, Any]) -> str:
    text = (
        f"The threshold of the folds' own models, chosen for a sensitivity of {refer['target']:.0%}: logit "
        f"{refer['value']:.4f} finds {refer['sensitivity']:.1%} of {refer['malignant']:,} malignant lesions, at least "
        f"{refer['lower_bound']:.1%} (one-sided bound, {refer['level']:.0%}, {refer['malignant_clusters']:,} groups). "
        f"Specificity there: {plain(refer['specificity'], 'percent')}."
    )
    return text if refer["reached"] else f"{text} The target is not reached: {refer['reason']}."


def _held_out(found: Mapping[str, Any], holdout: pl.DataFrame | None) -> str:
    if holdout is None or "pauc" not in (found.get("served") or {}):
        return ""
    y, s = holdout["target"].to_numpy() == 1, holdout["logit"].to_numpy().astype(float)
    if y.all() or not y.any():
        return ""
    refer = (found["served"].get("thresholds") or {}).get("refer") or {}
    threshold = refer.get("logit") if refer.get("reached") else None
    return charts.histogram(s[y], s[~y], threshold, "served-scores", "logit, mean of the folds' models")


def _training(pauc: Mapping[str, Any], curves: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    figures = []
    for key, label, caption in (
        (
            "pauc",
            "pAUC",
            "Exact pAUC of the held-out fold; dotted: chance. For the curves only, nothing is picked by it.",
        ),
        ("loss", "loss", "Training loss."),
    ):
        if series := _series(curves, key):
            chance = pauc["chance"] if key == "pauc" else None
            figures.append({"svg": charts.curves(series, label, f"training-{key}", chance), "caption": caption})
    # The template takes these as they are: `charts` escapes every text it is given.
    return {"figures": figures, "lines": list(_series(curves, "loss") or _series(curves, "pauc"))}


def _series(curves: Sequence[Mapping[str, Any]], key: str) -> dict[str, list[tuple[float, float]]]:
    """Points (epoch, value) per fold and model, in order; rows without the value are left out."""
    several = len({row.get("model", 0) for row in curves}) > 1
    result: dict[str, list[tuple[float, float]]] = {}
    for row in curves:
        epoch, value = row.get("epoch", row.get("step")), row.get(key)
        if epoch is None or value is None:
            continue
        name = f"fold {row.get('fold', 0)}" + (f", model {row['model']}" if several else "")
        result.setdefault(name, []).append((float(epoch), float(value)))
    return {name: _thinned(sorted(line)) for name, line in sorted(result.items())}


def _thinned(line: list[tuple[float, float]], most: int = 60) -> list[tuple[float, float]]:
    """At most about `most` points, each the mean of its neighbours; the last epoch is kept."""
    size = -(-len(line) // most)
    parts = [line[i : i + size] for i in range(0, len(line), size)]
    return [(part[-1][0], sum(v for _, v in part) / len(part)) for part in parts]


def _origin(
    found: Mapping[str, Any], context: Mapping[str, Any], versions: Mapping[str, Any]
) -> list[tuple[str, str, bool]]:
    counts, groups, settings = found["counts"], found["groups"], found["settings"]
    split = found.get("split") or {}
    share = counts["malignant"] / counts["lesions"]
    patients = f"{groups['patients']:,} known"
    if groups["lesions_without_patient"]:
        patients += f"; unknown for {groups['lesions_without_patient']:,} lesions"
    by = "one institution each" if split.get("kind") == "institution" else "by patient"
    rows = [
        ("Lesions in folds", f"{counts['lesions']:,}, of them {counts['malignant']:,} malignant ({share:.2%})", False),
        ("Patients", patients, False),
        ("Folds", f"{counts['folds']}, {by}; no patient on both sides", False),
        ("Held out", f"{split['holdout']:,} lesions in no fold" if split.get("holdout") else "none", False),
        ("Stated prevalence", _prevalence(settings), False),
        ("Data licence", context.get("data_licence") or "unknown", False),
        ("Data hash", context.get("data_hash") or "unknown", True),
        ("Fold hash", context.get("fold_hash") or found["fold_hash"], True),
        ("Bootstrap", f"{settings['replicates']:,} replicates, seed {settings['seed']}", False),
    ]
    if versions:
        rows.append(("Versions", ", ".join(f"{name} {version}" for name, version in versions.items()), False))
    return rows


def _prevalence(settings: Mapping[str, Any]) -> str:
    prevalence = settings.get("prevalence") or 0
    return f"{prevalence:.3%} of lesions malignant (1 in {1 / prevalence:,.0f})" if prevalence else "as in the data"
