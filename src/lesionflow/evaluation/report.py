"""report.html: the whole evaluation on one page that needs no network, for people who weren't there.

The page is a template (report.html beside this file) filled with text made here and charts from `charts`.
`context` says where the figures come from; every key of it may be missing:

    recipe (dict), recipe_toml, data_hash, fold_hash, data (dict), synthetic (bool), data_licence, versions (dict),
    gate (the result of gate.check), curves (rows of fold, model, epoch, loss, pauc)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lesionflow.errors import missing_extra
from lesionflow.evaluation import charts, metrics
from lesionflow.evaluation.card import write_card
from lesionflow.keys import write_text

if TYPE_CHECKING:
    import polars as pl

__all__ = ["write_card", "write_report"]


def write_report(path: Path, metrics: Mapping[str, Any], oof: pl.DataFrame, context: Mapping[str, Any]) -> None:
    """Write the page to `path`, from the content of metrics.json and the out-of-fold table.

    Raises `UsageError` where jinja2 isn't installed.
    """
    try:
        import jinja2
    except ImportError:
        raise missing_extra("jinja2", "train") from None
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
    write_text(path, template.render(_view(metrics, oof, context)))


def _view(found: Mapping[str, Any], oof: pl.DataFrame, context: Mapping[str, Any]) -> dict[str, Any]:
    pauc, recipe = found["pauc"], context.get("recipe") or {}
    rows = _figures(pauc)
    headline = pauc[found["headline"]]
    versions = context.get("versions") or {}
    return {
        "title": recipe.get("name") or "unnamed run",
        "description": recipe.get("description"),
        "version": versions.get("lesionflow"),
        "synthetic": context.get("synthetic"),
        "groups": found["groups"],
        "gate": context.get("gate"),
        "min_tpr": f"{pauc['min_tpr']:.0%}",
        "maximum": f"{pauc['maximum']:g}",
        "chance": f"{pauc['chance']:g}",
        "level": f"{found['settings']['level']:.0%}",
        "headline": _headline(headline, found["settings"]["level"]),
        "figures": rows,
        "no_interval": (headline["interval"] or {}).get("reason"),
        "others": _others(found),
        "refer": _refer(found["thresholds"]["refer"]),
        "charts": _charts(found, oof, rows, context.get("curves") or []),
        "origin": _origin(found, context, versions),
        "recipe_toml": context.get("recipe_toml"),
    }


def _headline(figure: Mapping[str, Any], level: float) -> dict[str, str]:
    interval = figure["interval"] or {}
    value = f"{figure['value']:.4f}"
    if interval.get("low") is None:
        return {"value": value, "span": "no interval", "meaning": f"{interval.get('reason') or 'None was computed'}."}
    span = f"{level:.0%} interval {interval['low']:.4f} to {interval['high']:.4f}"
    meaning = (
        f"Folds ranked and pooled: {interval['malignant']:,} malignant lesions, {interval['clusters']:,} groups. "
        f"Method: {interval['method']}"
    )
    return {
        "value": value,
        "span": span,
        "meaning": meaning + (f", {interval['replicates']:,} replicates." if interval["replicates"] else "."),
    }


def _figures(pauc: Mapping[str, Any]) -> list[dict[str, Any]]:
    folds = pauc["folds"]
    malignant, lesions = sum(f["malignant"] for f in folds), sum(f["lesions"] for f in folds)
    named = [("Ranked and pooled", pauc["rank_pooled"]), ("Pooled logits", pauc["pooled"])]
    named += [("Mean of folds", pauc["mean_of_folds"])]
    rows = [_row(label, one, malignant, lesions) for label, one in named]
    return rows + [_row(f"Fold {one['fold']}", one, one["malignant"], one["lesions"]) for one in folds]


def _row(label: str, one: Mapping[str, Any], malignant: int, lesions: int) -> dict[str, Any]:
    interval = one["interval"] or {}
    low, high = interval.get("low"), interval.get("high")
    return {
        "label": label,
        "value": one["value"],
        "low": low,
        "high": high,
        "text": "none" if one["value"] is None else f"{one['value']:.4f}",
        "span": "none" if low is None else f"{low:.4f} to {high:.4f}",
        "counts": f"{malignant:,} / {lesions:,}",
    }


def _others(found: Mapping[str, Any]) -> list[dict[str, str]]:
    area, retrieval, probability = found["auc"]["rank_pooled"], found["retrieval"], found["probabilities"]
    interval = area["interval"] or {}
    span = "" if interval.get("low") is None else f" Interval {interval['low']:.3f} to {interval['high']:.3f}."
    if retrieval["value"] is None:
        hits, meaning = "none", f"Not computed: {retrieval['reason']}."
    else:
        hits = f"{retrieval['value']:.3f}"
        meaning = (
            f"Share of {retrieval['malignant']:,} malignant lesions of {retrieval['patients']:,} known patients among "
            f"their patient's {retrieval['k']} highest scores. {retrieval['patients_with_k_lesions_or_fewer']:,} known "
            f"patients have {retrieval['k']} lesions or fewer, where nothing can be missed."
        )
    precision = found["average_precision"]["rank_pooled"]
    share = found["counts"]["malignant"] / found["counts"]["lesions"]
    texts = [
        ("AUC", f"{area['value']:.4f}", f"Area under the whole ROC curve; a coin gives 0.5.{span}"),
        ("Average precision", f"{precision:.4f}", f"A random order gives about {share:.4f}, the share of malignant."),
        (f"Top-{retrieval['k']} retrieval", hits, meaning),
        ("Log loss", f"{probability['log_loss']:.4f}", "Of uncalibrated probabilities, in nats."),
        ("Brier score", f"{probability['brier']:.4f}", "Of uncalibrated probabilities."),
    ]
    return [{"label": label, "text": text, "meaning": meaning} for label, text, meaning in texts]


def _refer(refer: Mapping[str, Any]) -> dict[str, Any]:
    rows = [
        ("Logit at least", f"{refer['value']:.4f}"),
        ("Sensitivity", f"{refer['sensitivity']:.1%}"),
        (f"Its lower bound (one-sided, {refer['level']:.0%})", f"{refer['lower_bound']:.1%}"),
        ("Specificity", f"{refer['specificity']:.1%}"),
        ("Share of all lesions referred", f"{refer['referred']:.1%}"),
        ("Patients or groups with a malignant lesion", f"{refer['malignant_clusters']:,}"),
    ]
    return {"target": f"{refer['target']:.0%}", "rows": rows, "reason": refer["reason"]}


def _charts(
    found: Mapping[str, Any], oof: pl.DataFrame, rows: Sequence[Mapping[str, Any]], curves: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    y, s = oof["target"].to_numpy() == 1, oof["logit"].to_numpy().astype(float)
    pauc = found["pauc"]
    fpr, tpr = metrics.roc_points(y, metrics.fold_rank(s, oof["fold"].to_numpy()))
    refer = found["thresholds"]["refer"]["value"]
    training = []
    for key, label, caption in (
        (
            "pauc",
            "pAUC",
            "Exact pAUC of the held-out fold; dashed: chance. For the curves only, nothing is picked by it.",
        ),
        ("loss", "loss", "Training loss."),
    ):
        if series := _series(curves, key):
            chance = pauc["chance"] if key == "pauc" else None
            svg = charts.curves(series, label, f"training-{key}", chance)
            training.append({"svg": svg, "caption": caption})
    # The template takes these as they are: `charts` escapes every text it is given.
    return {
        "forest": charts.forest(rows, pauc["chance"], pauc["maximum"], "forest"),
        "roc": charts.roc(fpr, tpr, pauc["min_tpr"], "roc"),
        "histogram": charts.histogram(s[y], s[~y], refer, "scores", "pooled logit"),
        "training": training,
        "lines": list(_series(curves, "loss") or _series(curves, "pauc")),
    }


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


def _thinned(line: list[tuple[float, float]], most: int = 200) -> list[tuple[float, float]]:
    """At most about `most` points, each the mean of its neighbours; the last epoch is kept."""
    size = -(-len(line) // most)
    parts = [line[i : i + size] for i in range(0, len(line), size)]
    return [(part[-1][0], sum(v for _, v in part) / len(part)) for part in parts]


def _origin(
    found: Mapping[str, Any], context: Mapping[str, Any], versions: Mapping[str, Any]
) -> list[tuple[str, str, bool]]:
    counts, groups, settings = found["counts"], found["groups"], found["settings"]
    share = counts["malignant"] / counts["lesions"]
    patients = f"{groups['patients']:,} known"
    if groups["lesions_without_patient"]:
        patients += f"; unknown for {groups['lesions_without_patient']:,} lesions"
    rows = [
        ("Lesions", f"{counts['lesions']:,}, of them {counts['malignant']:,} malignant ({share:.2%})", False),
        ("Patients", patients, False),
        ("Folds", f"{counts['folds']}, no patient on both sides", False),
        ("Data licence", context.get("data_licence") or "unknown", False),
        ("Data hash", context.get("data_hash") or "unknown", True),
        ("Fold hash", context.get("fold_hash") or found["fold_hash"], True),
        ("Bootstrap", f"{settings['replicates']:,} replicates, seed {settings['seed']}", False),
    ]
    if versions:
        rows.append(("Versions", ", ".join(f"{name} {version}" for name, version in versions.items()), False))
    return rows
