"""What a run shows to people: the report, the card, the gallery, and how it compares with an earlier run.

    report.html     every figure; holds no picture of a patient, so that it can be handed on
    gallery.html    the most telling errors, with pictures; for this machine, as its first line says
    explain.json    whether the model's maps point at what it uses

`report.html` is written when the gate has spoken, whatever it said, and again once there is a bundle to explain.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lesionflow import keys
from lesionflow.errors import DataError
from lesionflow.pack import licences
from lesionflow.plan import data_of, recipe_of

if TYPE_CHECKING:
    from lesionflow.data.store import Store
    from lesionflow.serving.predictor import Predictor

EXPLAINED_LESIONS = 64
"""Lesions on which the maps are tried."""


def report(run: Path, out: Path | None = None, *, include_images: bool = False) -> Path:
    """Write the report of an evaluated run to `out` (`report.html`); pictures are in it only if asked for.

    Raises `DataError` if the run isn't evaluated, or has no bundle to explain its pictures.
    """
    import polars as pl

    from lesionflow.reporting.report import write_report

    out = out or run / "report.html"
    keys.require(run, "evaluate")
    if include_images:
        keys.require(run, "export")
    metrics, context = keys.read_json(run / "metrics.json"), _context(run)
    holdout = pl.read_parquet(run / "holdout.parquet") if (run / "holdout.parquet").exists() else None
    gallery = _gallery(run) if include_images else None
    write_report(out, metrics, pl.read_parquet(run / "oof.parquet"), context, holdout=holdout, gallery=gallery)
    return out


def card(run: Path) -> None:
    """Write `MODEL_CARD.md`."""
    from lesionflow.reporting.card import write_card

    write_card(run / "MODEL_CARD.md", keys.read_json(run / "metrics.json"), _context(run))


def explain(run: Path) -> list[str]:
    """Try the bundle's maps and show its errors: `explain.json`, `gallery.html` and `report.html`, as far as written.

    Lesions are those of the hold-out, which no model saw; without one, those of the folds.
    """
    import numpy as np
    import polars as pl

    from lesionflow.data.images import to_pixels
    from lesionflow.evaluation.metrics import codes
    from lesionflow.reporting.gallery import write_gallery
    from lesionflow.serving.explain import deletion
    from lesionflow.serving.graph import cam_shape
    from lesionflow.serving.predictor import Predictor

    store, _ = data_of(run)
    (run / "explain.json").unlink(missing_ok=True)
    if not store.pictures:
        report(run)
        return ["report.html"]
    predictor = Predictor(run / "bundle")
    written = ["gallery.html", "report.html"]
    if cam_shape(predictor.bundle):
        # The most suspicious of the malignant lesions: only a raised logit can fall.
        table = pl.read_parquet(_unseen(run)).filter(pl.col("target") == 1)
        by = "image_logit" if "image_logit" in table.columns else "logit"
        table = table.sort(by, "isic_id", descending=True).head(EXPLAINED_LESIONS)
        place = {name: row for row, name in enumerate(store.ids)}
        pixels = np.stack([to_pixels(store.jpeg(place[name]), predictor.spec) for name in table["isic_id"]])
        tried = deletion(
            predictor.graph, pixels,
            groups=codes(table["patient_group"].to_list(), len(table)), malignant=len(table),
            seed=recipe_of(run).evaluation.seed,
        )  # fmt: skip
        keys.write_json(run / "explain.json", tried)
        written.append("explain.json")
    write_gallery(run / "gallery.html", _gallery(run), _context(run))
    report(run)
    return written


def paired(run: Path, incumbent: Path) -> dict[str, Any]:
    """The paired difference to the run that the incumbent bundle came from, on the lesions both scored."""
    import polars as pl

    from lesionflow.evaluation.metrics import fold_rank
    from lesionflow.evaluation.paired import paired_difference

    other = incumbent.parent / "oof.parquet"
    if (incumbent.parent / "run.json").exists():
        keys.require(incumbent.parent, "export")  # Else its scores may be of a later training than its bundle.
    both = pl.read_parquet(run / "oof.parquet").join(pl.read_parquet(other), on="isic_id", suffix="_b")
    if len(both) == 0:
        raise DataError(f"{other}: shares no lesion with this run, so there is nothing to compare")
    if set(both["fold_hash"]) != set(both["fold_hash_b"]):
        raise DataError(f"{other}: another split than this run's; a paired comparison needs the same folds")
    fold, options = both["fold"].to_numpy(), recipe_of(run).evaluation
    ours, theirs = (fold_rank(both[column].to_numpy(), fold) for column in ("logit", "logit_b"))
    return paired_difference(
        both["target"].to_numpy(), ours, theirs, both["patient_group"].to_list(),
        replicates=options.replicates, seed=options.seed,
    )  # fmt: skip


def _unseen(run: Path) -> Path:
    held_out = run / "holdout.parquet"
    return held_out if held_out.exists() else run / "oof.parquet"


def _gallery(run: Path) -> list[dict[str, Any]]:
    import polars as pl

    from lesionflow.reporting.gallery import gallery
    from lesionflow.serving.predictor import Predictor

    if not (run / "bundle").exists():
        raise DataError(f"{run}: has no bundle, which pictures are explained by; export it first (`lesionflow export`)")
    store, _ = data_of(run)
    predictor = Predictor(run / "bundle")
    return gallery(store, pl.read_parquet(_unseen(run)), predictor, reasons=lambda ids: _reasons(store, ids, predictor))


def _reasons(store: Store, ids: Sequence[str], predictor: Predictor) -> dict[str, tuple[str, ...]]:
    """What in these lesions' metadata moves their scores, in words; empty where the bundle knows pictures alone."""
    if not predictor.bundle.info.get("visit"):
        return {}
    import polars as pl

    from lesionflow.serving.visit import Visits

    # Whole patients, since a lesion is compared with the patient's others.
    table = store.table.with_columns(group=pl.Series(store.groups))
    patients = table.filter(pl.col("isic_id").is_in(list(ids)))["group"].unique()
    table = table.filter(pl.col("group").is_in(patients.implode())).drop("group")
    return dict(zip(table["isic_id"], Visits(predictor).explain(table), strict=True))


def _tabular(run: Path) -> dict[str, Any] | None:
    """What the boosted trees look at, and how they were joined with the pictures; None without metadata."""
    if not (run / "stack").exists():
        return None
    from lesionflow.data.features import catalogue
    from lesionflow.models.stack import Joined

    recipe, joined = recipe_of(run), Joined.load(lambda name: (run / "stack" / name).read_bytes())
    shares = joined.importances()
    return {
        "importances": [
            {"name": one.name, "block": one.block, "why": one.why, "share": shares[one.name]}
            for one in catalogue(joined.blocks)
            if one.name in shares
        ],
        "choices": joined.choices,
        "members": {kind: getattr(recipe.tabular, kind) for kind in ("lightgbm", "catboost", "xgboost")},
        "blocks": list(joined.blocks),
        "missing": recipe.tabular.missing,
    }


def _context(run: Path) -> dict[str, Any]:
    """Where the figures come from, as the report and the card say it."""
    import polars as pl

    recipe, (store, folds) = recipe_of(run), data_of(run)
    curves = (run / "metrics.csv").read_text() if (run / "metrics.csv").exists() else ""
    return {
        "recipe": recipe.to_dict(),
        "recipe_toml": recipe.to_toml(),
        "data_hash": store.hash,
        "fold_hash": folds.hash,
        "data": store.info,
        "synthetic": store.info["synthetic"],
        "data_licence": licences(store),
        "versions": keys.read_json(run / "run.json")["versions"],
        "gate": keys.read_json(run / "gate.json") if (run / "gate.json").exists() else None,
        "curves": pl.read_csv(run / "metrics.csv", infer_schema_length=None).to_dicts() if curves else [],
        "tabular": _tabular(run),
        "explain": keys.read_json(run / "explain.json") if (run / "explain.json").exists() else None,
    }
