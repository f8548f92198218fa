"""What goes into a run's bundle: its models, what was measured of them, and lesions to prove it by."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lesionflow import keys
from lesionflow.plan import data_of, recipe_of

if TYPE_CHECKING:
    from lesionflow.data.store import Store

PARITY_LESIONS = 64
"""Stored lesions, drawn at random, on which the exported graph must agree with torch before a bundle is written."""
DECISIVE_LESIONS = 128
"""At most so many malignant lesions of the hold-out, on which it must also agree with what was evaluated."""
REFERENCE_LESIONS = 8
"""Synthetic lesions whose answers travel in the bundle."""


def pack(run: Path) -> None:
    """Write `bundle/`. Raises `GateRefused` if the exported graph doesn't say what was evaluated."""
    import numpy as np

    from lesionflow.data.datamodule import pixels
    from lesionflow.export.onnx import export_bundle
    from lesionflow.models.image import Members, preprocess_spec
    from lesionflow.training.scoring import fold_weights, load_network

    recipe, (store, folds) = recipe_of(run), data_of(run)
    metrics = keys.read_json(run / "metrics.json")
    models = [
        Members([load_network(path, recipe) for path in paths]) for paths in fold_weights(run, recipe, folds.count)
    ]
    spec = preprocess_spec(recipe)
    thresholds = _thresholds(metrics["served"])
    served = _decisive(run, store, [one["logit"] for one in thresholds.values()])
    drawn = np.random.default_rng(0).choice(len(store), min(PARITY_LESIONS, len(store)), replace=False)
    rows = [*served, *(row for row in drawn.tolist() if row not in served)]
    info = {
        "name": recipe.name,
        "metrics": metrics,
        "calibration": metrics["probability"],
        "thresholds": thresholds,
        "inputs": keys.read_json(run / "inputs.json") if folds.holdout else _unknown(spec.size),
        "recipe": recipe.to_dict(),
        "data_hash": store.hash,
        "fold_hash": folds.hash,
        "data_licence": licences(store),
        "synthetic": store.info["synthetic"],
    }
    export_bundle(
        models,
        run / "bundle",
        spec=spec,
        info=info,
        parity_images=np.stack([pixels(store, int(row), spec) for row in rows]),
        tolerance=recipe.gate.parity,
        evaluated=np.array(list(served.values())),
        reference=_reference_lesions(),
        card=(run / "MODEL_CARD.md").read_text(),
        tta=recipe.training.tta,
    )


def _thresholds(served: dict[str, Any]) -> dict[str, Any]:
    """The bands that could be vouched for."""
    bands = served.get("thresholds", {})
    return {name: one for name, one in bands.items() if one["reached"] and bands["refer"]["reached"]}


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
    gaps = [(pl.col("logit") - one).abs() for one in thresholds] or [pl.col("logit")]
    table = table.sort(pl.min_horizontal(gaps), "isic_id").head(DECISIVE_LESIONS)
    return {place[name]: logit for name, logit in table.select("isic_id", "logit").iter_rows()}


def _reference_lesions() -> list[tuple[str, bytes]]:
    """Synthetic lesions for the bundle: never a patient's."""
    import tempfile

    from lesionflow.data.source import open_source
    from lesionflow.data.synthetic import synthesize

    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "reference"
        synthesize(made, patients=4, lesions=REFERENCE_LESIONS, seed=7, prevalence=0.25, workers=1, progress=False)
        with open_source(made) as source:
            return [(f"{name}.jpg", data) for name, data in source.images(source.ids)]


def licences(store: Store) -> str:
    """The licences of the images, with counts."""
    if store.info["synthetic"]:
        return "synthetic, made by lesionflow: no licence applies"
    if "copyright_license" not in store.table.columns:
        return "unknown: the metadata has no copyright_license column"
    counts = store.table["copyright_license"].drop_nulls().value_counts(sort=True)
    return ", ".join(f"{name} ({count:,} lesions)" for name, count in counts.iter_rows()) or "unknown"
