"""The scores of all folds as two tables: what each lesion got from a model that never saw its patient.

    oof.parquet       every lesion of the folds once, scored by the fold that held it out
    holdout.parquet   the patients set aside from every fold, with all folds' logits and their mean: what is served
    inputs.json       what pictures the hold-out holds, so that the service knows those it can't judge

Scores carry the identity of the training they came from; those of another recipe, data set or split are refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lesionflow import keys
from lesionflow.errors import DataError
from lesionflow.plan import data_of, recipe_of
from lesionflow.progress import track

if TYPE_CHECKING:
    import polars as pl

    from lesionflow.data.folds import Folds
    from lesionflow.data.store import Store

TABLES = ("oof.parquet", "holdout.parquet", "inputs.json")
DESCRIBED = (
    "patient_id", "sex", "age_approx", "anatom_site_general", "attribution", "copyright_license", "tbp_tile_type",
    "clin_size_long_diam_mm", "tbp_lv_Lext", "tbp_lv_Bext",
)  # fmt: skip
"""Columns that go with the scores where the data has them: what subgroups and credits are made of."""


def gather(run: Path, *, progress: bool = False) -> None:
    """Write `TABLES` (without a hold-out only the first). Raises `DataError` for scores that don't belong here."""
    import polars as pl

    store, folds = data_of(run)
    parts = {name: [_scores(run, folds, k, name) for k in range(folds.count)] for name in ("oof", "holdout")}
    for k, part in enumerate(parts["oof"]):
        if (part["fold"] != k).any():
            raise DataError(f"{run}/fold-{k}/oof.parquet: scores of another fold; delete the folder and train again")
    _write_scores(run / "oof.parquet", pl.concat(parts["oof"]), store, len(store) - len(folds.holdout_rows()))
    if not folds.holdout:
        for name in ("holdout.parquet", "inputs.json"):
            (run / name).unlink(missing_ok=True)
        return
    # What is served is the mean of the folds' models, and none of them has seen these patients.
    logit = pl.col("logit")
    served = pl.concat(parts["holdout"]).group_by("isic_id").agg(fold_logits=logit, logit=logit.mean())
    table = _judged(run, parts["holdout"][0].drop("logit").join(served, on="isic_id"), store, progress)
    _write_scores(run / "holdout.parquet", table, store, len(folds.holdout_rows()))


def _scores(run: Path, folds: Folds, k: int, name: str) -> pl.DataFrame:
    """The scores that fold k's training wrote, if they are of this very recipe, data and split."""
    import polars as pl

    path = run / f"fold-{k}" / f"{name}.parquet"
    if not path.exists():
        raise DataError(f"{path}: fold {k} has no scores; train it first (`lesionflow train --fold {k}`)")
    part = pl.read_parquet(path)
    if pl.read_parquet_metadata(path).get("identity") != keys.fold_identity(keys.planned_keys(run)["train"], k):
        raise DataError(f"{path}: scores of another recipe, data set or code; train fold {k} again")
    if set(part["fold_hash"]) - {folds.hash}:
        raise DataError(f"{path}: scores of another split; delete {path.parent} and train fold {k} again")
    return part


def _judged(run: Path, table: pl.DataFrame, store: Store, progress: bool) -> pl.DataFrame:
    """The table with `doubts`, why a picture can't be judged; writes what that is held against to `inputs.json`."""
    import numpy as np
    import polars as pl

    from lesionflow.data.images import to_pixels
    from lesionflow.models.image import preprocess_spec
    from lesionflow.serving.inputs import reference, statistics, unusual

    spec, place = preprocess_spec(recipe_of(run)), {name: row for row, name in enumerate(store.ids)}
    found = [
        statistics(to_pixels(store.jpeg(place[name]), spec)[None])
        for name in track(table["isic_id"], "pictures", total=len(table), show=progress)
    ]
    stats = {name: np.concatenate([one[name] for one in found]) for name in found[0]}
    fold_logits = np.array(table["fold_logits"].to_list())
    known = reference(stats, fold_logits)
    keys.write_json(run / "inputs.json", known)
    return table.with_columns(doubts=pl.Series(unusual(stats, fold_logits, known), dtype=pl.List(pl.String)))


def _write_scores(out: Path, table: pl.DataFrame, store: Store, expected: int) -> None:
    """Scores with what subgroups are made of, one row per lesion, in the order of their ids."""
    extra = [name for name in DESCRIBED if name in store.table.columns]
    table = table.join(store.table.select("isic_id", *extra), on="isic_id", how="left").sort("isic_id")
    if len(table) != expected or table["isic_id"].n_unique() != expected:
        raise DataError(f"{out}: {len(table)} scores for {expected} lesions; train every fold again")
    with keys.atomic(out) as file:
        table.write_parquet(file)
