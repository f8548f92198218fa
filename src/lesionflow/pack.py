"""What goes into a run's bundle: its models, what was measured of them, and lesions to prove it by."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lesionflow import keys
from lesionflow.data.schema import TEST_COLUMNS
from lesionflow.plan import data_of, recipe_of

if TYPE_CHECKING:
    import polars as pl

    from lesionflow.data.images import PreprocessSpec
    from lesionflow.data.store import Store
    from lesionflow.serving.predictor import Predictor

PARITY_LESIONS = 64
"""Stored lesions, drawn at random, on which the exported graph must agree with torch before a bundle is written."""
DECISIVE_LESIONS = 128
"""At most so many malignant lesions of the hold-out, on which it must also agree with what was evaluated."""
CHECKED_LESIONS = 512
"""About so many of the hold-out, whole patients, on which the answers with metadata must be those evaluated."""
REFERENCE_LESIONS = 8
"""Synthetic lesions whose answers travel in the bundle."""


def pack(run: Path) -> None:
    """Write `bundle/`. Raises `GateRefused` if the exported graph doesn't say what was evaluated."""
    import numpy as np

    from lesionflow.data.lesions import pixels
    from lesionflow.export.onnx import export_bundle
    from lesionflow.models.image import Members, preprocess_spec
    from lesionflow.serving.visit import FOLDER
    from lesionflow.training.scoring import fold_weights, load_network

    recipe, (store, folds) = recipe_of(run), data_of(run)
    metrics = keys.read_json(run / "metrics.json")
    spec = preprocess_spec(recipe)
    models, rows, served = [], list[int](), dict[int, float]()
    # The graph answers for a picture alone; with metadata in the recipe that isn't what is served, but one mode of it.
    joined = metrics.get("modes")
    alone = {"probability": metrics["probability"], **metrics["served"]}
    if joined:
        alone = joined["each"].get("image", {"probability": metrics["probability"]})
    thresholds = _thresholds(alone)
    if store.pictures:
        models = [
            Members([load_network(path, recipe) for path in paths]) for paths in fold_weights(run, recipe, folds.count)
        ]
        served = _decisive(run, store, [one["logit"] for one in thresholds.values()])
        drawn = np.random.default_rng(0).choice(len(store), min(PARITY_LESIONS, len(store)), replace=False)
        rows = [*served, *(row for row in drawn.tolist() if row not in served)]
    info = {
        "name": recipe.name,
        "metrics": metrics,
        "calibration": alone["probability"],
        "thresholds": thresholds,
        "inputs": keys.read_json(run / "inputs.json") if (run / "inputs.json").exists() else _unknown(spec.size),
        "models": folds.count,
        "recipe": recipe.to_dict(),
        "data_hash": store.hash,
        "fold_hash": folds.hash,
        "data_licence": licences(store),
        "synthetic": store.info["synthetic"],
    }
    more: dict[str, Any] = {}
    reference, described = _reference_lesions()
    if joined:
        info["visit"] = _visit(metrics)
        files = {f"{FOLDER}/{path.name}": path.read_bytes() for path in sorted((run / "stack").iterdir())}
        more = {"files": files, "visit": described, "check": lambda predictor: _as_evaluated(run, store, predictor)}
    info["drift"] = _drift(run, store, spec, info)
    export_bundle(
        models,
        run / "bundle",
        spec=spec,
        info=info,
        parity_images=np.stack([pixels(store, row, spec) for row in rows]) if rows else np.zeros((0,), np.uint8),
        tolerance=recipe.gate.parity,
        evaluated=np.array(list(served.values())),
        reference=reference,
        card=(run / "MODEL_CARD.md").read_text(),
        tta=recipe.training.tta,
        **more,
    )


def _thresholds(served: dict[str, Any]) -> dict[str, Any]:
    """The bands that could be vouched for."""
    bands = served.get("thresholds") or {}
    return {name: one for name, one in bands.items() if one["reached"] and bands["refer"]["reached"]}


def _visit(metrics: dict[str, Any]) -> dict[str, Any]:
    """What the bundle says of its modes: how each becomes a probability and a band, and what it is worth.

    Each has its own line and thresholds, measured with every lesion of the hold-out scored that way. Without a picture
    nothing is vouched for, unless the data had none.
    """
    each, served = metrics["modes"]["each"], metrics["modes"]["served"]
    modes = {}
    for name, found in each.items():
        of = metrics["served"] | {"probability": metrics["probability"]} if name == served else found
        vouched = "image" in name or "image" not in each
        worth = {part: found.get(part) for part in ("out_of_fold", "holdout")}
        modes[name] = {"calibration": of["probability"], "thresholds": _thresholds(of) if vouched else {}, **worth}
    return {"served": served, "modes": modes}


def _as_evaluated(run: Path, store: Store, predictor: Predictor) -> dict[str, float]:
    """Hold a bundle with metadata to the hold-out's scores, on whole patients, those of malignant lesions first.

    A picture's logit differs from torch's in its last digits, which moves a tree's answer only across a split: so
    most lesions must agree as pictures do, and all of them within what the reference lesions may differ by.
    """
    import numpy as np
    import polars as pl

    from lesionflow.data.images import to_pixels
    from lesionflow.errors import GateRefused
    from lesionflow.serving.predictor import SMOKE_TOLERANCE, VISIT_TOLERANCE
    from lesionflow.serving.visit import Visits

    path = run / "holdout.parquet"
    table = pl.read_parquet(path if path.exists() else run / "oof.parquet")
    if not path.exists():
        return {}  # Out of fold each lesion has one pipeline's score, and the bundle gives the mean of all.
    order = (
        table.group_by("patient_group")
        .agg(pl.col("target").max(), pl.len())
        .sort("target", "patient_group", descending=[True, False])
    )
    kept = order.filter(pl.col("len").cum_sum() <= max(CHECKED_LESIONS, order["len"][0]))["patient_group"]
    table = table.filter(pl.col("patient_group").is_in(kept.implode())).sort("isic_id")
    place = {name: row for row, name in enumerate(store.ids)}
    rows = [place[name] for name in table["isic_id"]]
    raw = np.full((len(rows), predictor.bundle.models), np.nan)
    if store.pictures:
        raw, _ = predictor.logits(np.stack([to_pixels(store.jpeg(row), predictor.spec) for row in rows]))
    scores = Visits(predictor).score(raw.astype(np.float64), store.table[rows])
    joined = np.array([mode != "image" for mode in scores.mode], bool)
    expected = np.array(table["fold_logits"].to_list())[joined]
    off = np.abs(scores.fold_logits[joined] - expected).max(1, initial=0.0)
    if not len(off):
        return {}
    worst, usual = float(off.max()), float(np.quantile(off, 0.95))
    if not (usual <= SMOKE_TOLERANCE and worst <= VISIT_TOLERANCE):
        raise GateRefused(
            f"parity: on {len(rows)} lesions with metadata the bundle's logits are {usual:.2g} (95 % of them) to "
            f"{worst:.2g} off those that the thresholds were chosen on, and {SMOKE_TOLERANCE:g} and "
            f"{VISIT_TOLERANCE:g} are allowed: nothing was exported; evaluate again on this machine"
        )
    return {"visit_max_abs": worst, "visit_95_percent": usual, "visit_count": len(rows)}


def _drift(run: Path, store: Store, spec: PreprocessSpec, info: dict[str, Any]) -> dict[str, Any]:
    """What the hold-out looks like, so that lesions in service can be held against it."""
    import numpy as np
    import polars as pl

    from lesionflow.data.images import to_pixels
    from lesionflow.serving import driftreference
    from lesionflow.serving.inputs import statistics

    if not (run / "holdout.parquet").exists():
        return driftreference.nothing("the run set no hold-out aside; train with folds.holdout = 0.2")
    table = pl.read_parquet(run / "holdout.parquet")
    place = {name: row for row, name in enumerate(store.ids)}
    rows = [place[name] for name in table["isic_id"]]
    stats = None
    if store.pictures:
        drawn = driftreference.draw_pictures(table["patient_group"].to_list())
        found = [statistics(to_pixels(store.jpeg(rows[one]), spec)[None]) for one in drawn.tolist()]
        stats = {name: np.full(len(rows), np.nan) for name in found[0]}
        for name, column in stats.items():
            column[drawn] = np.concatenate([one[name] for one in found])
    return driftreference.of_holdout(table, store.table[rows], stats, info)


def _unknown(size: int) -> dict[str, Any]:
    """What `serving.inputs` knows of pictures without a hold-out: flat ones alone are refused."""
    import numpy as np

    from lesionflow.serving.inputs import reference, statistics

    return reference(statistics(np.zeros((0, size, size, 3), np.uint8)))


def _decisive(run: Path, store: Store, thresholds: Sequence[float]) -> dict[int, float]:
    """Store row -> served logit of the hold-out's malignant lesions, those nearest to a threshold first.

    On these the thresholds and their bounds rest.
    """
    import polars as pl

    if not (run / "holdout.parquet").exists():
        return {}
    place = {name: row for row, name in enumerate(store.ids)}
    table = pl.read_parquet(run / "holdout.parquet").filter(pl.col("target") == 1)
    if "image_logit" in table.columns:
        table = table.with_columns(logit=pl.col("image_logit"))
    gaps = [(pl.col("logit") - one).abs() for one in thresholds] or [pl.col("logit")]
    table = table.sort(pl.min_horizontal(gaps), "isic_id").head(DECISIVE_LESIONS)
    return {place[name]: logit for name, logit in table.select("isic_id", "logit").iter_rows()}


def _reference_lesions() -> tuple[list[tuple[str, bytes]], pl.DataFrame | None]:
    """Synthetic lesions for the bundle, pictures and metadata: never a patient's."""
    import tempfile

    from lesionflow.data.source import open_source
    from lesionflow.data.synthetic import synthesize

    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "reference"
        synthesize(made, patients=4, lesions=REFERENCE_LESIONS, seed=7, prevalence=0.25, workers=1, progress=False)
        with open_source(made) as source:
            pictures = [(f"{name}.jpg", data) for name, data in source.images(source.ids)]
            table = source.metadata
            return pictures, None if table is None else table.select(c for c in table.columns if c in TEST_COLUMNS)


def licences(store: Store) -> str:
    """The licences of the images, with counts."""
    if store.info["synthetic"]:
        return "synthetic, made by lesionflow: no licence applies"
    if "copyright_license" not in store.table.columns:
        return "unknown: the metadata has no copyright_license column"
    counts = store.table["copyright_license"].drop_nulls().value_counts(sort=True)
    return ", ".join(f"{name} ({count:,} lesions)" for name, count in counts.iter_rows()) or "unknown"
