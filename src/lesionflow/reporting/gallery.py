"""The most telling errors, with pictures: malignant lesions that rank low, benign ones that rank high.

    items = gallery(store, holdout, Predictor(run / "bundle"))
    write_gallery(run / "gallery.html", items, context)

These are patients' images. The page is for the machine that holds the data: `report.html` has none of it unless it
was asked for, and nothing here goes into a log.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from lesionflow.bundle import band
from lesionflow.data.images import Pixels, decode, to_pixels
from lesionflow.errors import DataError, missing_extra
from lesionflow.evaluation.metrics import fold_rank
from lesionflow.keys import write_text
from lesionflow.reporting.wording import MODES
from lesionflow.serving.explain import cams
from lesionflow.serving.graph import NoGraph
from lesionflow.serving.heat import LEGEND, overlay
from lesionflow.serving.predictor import CANNOT_JUDGE, Predictor, sigmoid

if TYPE_CHECKING:
    import polars as pl

    from lesionflow.data.store import Store

MISSED, ALARM = "missed", "false alarm"
KINDS = {
    MISSED: "Malignant lesions that rank low",
    ALARM: "Benign lesions that rank high",
}
LARGEST = 384
"""Longest side of a picture, pixels: crops of 3D total-body photographs are smaller."""


def gallery(
    store: Store,
    table: pl.DataFrame,
    predictor: Predictor,
    *,
    size: int = 6,
    reasons: Callable[[Sequence[str]], Mapping[str, Sequence[str]]] | None = None,
) -> list[dict[str, Any]]:
    """At most `size` malignant lesions with the lowest and `size` benign ones with the highest scores, worst first.

    table: scores of lesions that their model didn't see (oof.parquet, or holdout.parquet with fold -1): isic_id,
    target, fold, logit, and where it has them attribution, copyright_license, doubts. Logits are ranked within their
    fold, as folds' scales differ.

    Each item: `isic_id`; `kind` ("missed" or "false alarm"); `sentence` (how it ranks); `logit`; `probability`;
    `band` (None without thresholds); `doubts`; `origin` ("hold-out" or "out of fold"); `attribution`; `licence`;
    `scores`, of each way that the run scored it {"mode", "logit", "probability"}, empty where pictures are all there
    is; `reasons`, what in its metadata moves its score, which the argument `reasons` gives for the chosen ids;
    `image`, a JPEG as a data URI; `overlay`, the same with the served graph's map, None where it gives none.
    Raises `DataError` for a lesion that the store doesn't hold.
    """
    if not len(table):
        return []
    rows = table.sort("isic_id")
    y, fold, logit = (rows[name].to_numpy() for name in ("target", "fold", "logit"))
    rank = fold_rank(logit, fold)
    place = {name: row for row, name in enumerate(store.ids)}
    if lost := [name for name in rows["isic_id"] if name not in place]:
        raise DataError(f"{store.path}: holds no lesion {lost[0]} ({len(lost)} such): use the store of this run")
    malignant, benign = np.flatnonzero(y == 1), np.flatnonzero(y == 0)
    missed = malignant[np.argsort(rank[malignant], kind="stable")][:size]
    alarms = benign[np.argsort(-rank[benign], kind="stable")][:size]
    said = reasons([rows["isic_id"][number] for number in (*missed.tolist(), *alarms.tolist())]) if reasons else {}
    items = []
    for kind, chosen, others in ((MISSED, missed, benign), (ALARM, alarms, malignant)):
        for number in chosen.tolist():
            row, data = rows.row(number, named=True), store.jpeg(place[rows["isic_id"][number]])
            worse = int(np.sum(rank[others] > rank[number] if kind == MISSED else rank[others] < rank[number]))
            doubts = list(row.get("doubts") or [])
            probability, thresholds = _calibrated(row, predictor)
            named = band(row["logit"], thresholds)
            items.append(
                {
                    "isic_id": row["isic_id"],
                    "kind": kind,
                    "sentence": _sentence(kind, worse, len(others)),
                    "logit": float(row["logit"]),
                    "probability": probability,
                    "band": CANNOT_JUDGE if doubts and named else named,
                    "doubts": doubts,
                    "scores": _scores(row, predictor),
                    "reasons": list(said.get(row["isic_id"], ())),
                    "origin": "hold-out" if row["fold"] == -1 else "out of fold",
                    "attribution": row.get("attribution"),
                    "licence": row.get("copyright_license"),
                    "image": _uri(_shown(decode(data))),
                    "overlay": _mapped(predictor, data),
                }
            )
    return items


def write_gallery(path: Path, items: Sequence[Mapping[str, Any]], context: Mapping[str, Any]) -> None:
    """Write the page to `path`: one file, no network, with a notice that it isn't for sharing.

    context: `recipe` (dict), `synthetic` (bool) and `versions` as for the report; any may be missing. Raises
    `UsageError` where jinja2 isn't installed.
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
    bare = {"sentence": "", "doubts": [], "origin": "out of fold", "scores": [], "reasons": []}
    full = [bare | dict(item) for item in items]
    sections = [
        {"kind": kind, "title": title, "items": [item for item in full if item["kind"] == kind]}
        for kind, title in KINDS.items()
    ]
    view = {
        "title": (context.get("recipe") or {}).get("name") or "unnamed run",
        "version": (context.get("versions") or {}).get("lesionflow"),
        "synthetic": bool(context.get("synthetic")),
        "sections": sections,
        "mapped": any(item["overlay"] for item in full),
        "unseen": all(item["origin"] == "hold-out" for item in full),
        "legend": LEGEND,
    }
    write_text(path, environment.get_template("gallery.html").render(view))


def _calibrated(row: Mapping[str, Any], predictor: Predictor) -> tuple[float, Mapping[str, Any]]:
    """The probability of what is served of this lesion, and the thresholds that go with it."""
    logit, visit = float(row["logit"]), predictor.bundle.info.get("visit")
    if not visit:
        return predictor.probability(logit), predictor.bundle.info["thresholds"]
    # A lesion without metadata has its picture's score.
    mode = "image" if row.get(f"{visit['served']}_logit") != logit == row.get("image_logit") else visit["served"]
    of = visit["modes"][mode]
    return _probability(of, logit), of["thresholds"]


def _scores(row: Mapping[str, Any], predictor: Predictor) -> list[dict[str, Any]]:
    """What each way to score it says of this lesion."""
    modes = (predictor.bundle.info.get("visit") or {}).get("modes") or {}
    return [
        {
            "mode": MODES[name],
            "logit": float(row[f"{name}_logit"]),
            "probability": _probability(of, row[f"{name}_logit"]),
        }
        for name, of in modes.items()
        if row.get(f"{name}_logit") is not None
    ]


def _probability(mode: Mapping[str, Any], logit: float) -> float:
    return sigmoid(float(mode["calibration"]["a"]) * logit + float(mode["calibration"]["b"]))


def _sentence(kind: str, worse: int, others: int) -> str:
    if kind == MISSED:
        return f"Malignant, yet {worse:,} of {others:,} benign lesions score higher."
    return f"Benign, yet {worse:,} of {others:,} malignant lesions score lower."


def _mapped(predictor: Predictor, data: bytes) -> str | None:
    if isinstance(predictor.graph, NoGraph) or not predictor.graph.has_cam:
        return None
    pixels = to_pixels(data, predictor.spec)
    return _uri(overlay(pixels, cams(predictor.graph, pixels[None])[0]))


def _shown(pixels: Pixels) -> Pixels:
    longest = max(pixels.shape[:2])
    if longest <= LARGEST:
        return pixels
    high, wide = (max(1, round(side * LARGEST / longest)) for side in pixels.shape[:2])
    return np.asarray(Image.fromarray(pixels).resize((wide, high), Image.Resampling.LANCZOS))


def _uri(pixels: Pixels) -> str:
    """Encoded anew, so that nothing but pixels goes along: a camera's file may name the patient."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
