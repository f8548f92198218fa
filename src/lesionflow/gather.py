"""The scores of all folds as two tables: what each lesion got from a model that never saw its patient.

    oof.parquet       every lesion of the folds once, scored by the fold that held it out
    holdout.parquet   the patients set aside from every fold, with all folds' logits and their mean: what is served
    inputs.json       what pictures the hold-out holds, so that the service knows those it can't judge
    stack/            where the recipe uses metadata: boosted trees, and how they and the pictures' scores are joined

Scores carry the identity of the training they came from; those of another recipe, data set or split are refused.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lesionflow import keys
from lesionflow.errors import DataError
from lesionflow.plan import data_of, recipe_of
from lesionflow.progress import track

if TYPE_CHECKING:
    import numpy as np
    import polars as pl
    from numpy.typing import NDArray

    from lesionflow.data.folds import Folds
    from lesionflow.data.store import Store

OUTPUTS = ("oof.parquet", "holdout.parquet", "inputs.json", "stack")
DESCRIBED = (
    "patient_id", "sex", "age_approx", "anatom_site_general", "attribution", "copyright_license", "tbp_tile_type",
    "clin_size_long_diam_mm", "tbp_lv_Lext", "tbp_lv_Bext",
)  # fmt: skip
"""Columns that go with the scores where the data has them: what subgroups and credits are made of."""


def gather(run: Path, *, progress: bool = False) -> None:
    """Write `OUTPUTS`, as far as the recipe has them. Raises `DataError` for scores that don't belong here."""

    store, folds = data_of(run)
    oof, holdout = _pictures(run, store, folds, progress) if store.pictures else _unscored(store, folds)
    shutil.rmtree(run / "stack", ignore_errors=True)
    if recipe_of(run).tabular.members:
        oof, holdout = _joined(run, store, folds, oof, holdout, progress)
    _write_scores(run / "oof.parquet", oof, store, len(store) - len(folds.holdout_rows()))
    if holdout is not None:
        _write_scores(run / "holdout.parquet", holdout, store, len(folds.holdout_rows()))
    else:
        (run / "holdout.parquet").unlink(missing_ok=True)
    if holdout is None or not store.pictures:
        (run / "inputs.json").unlink(missing_ok=True)


def _pictures(run: Path, store: Store, folds: Folds, progress: bool) -> tuple[pl.DataFrame, pl.DataFrame | None]:
    """The pictures' scores, out of fold and of the hold-out, by id; writes `inputs.json`."""
    import polars as pl

    parts = {name: [_scores(run, folds, k, name) for k in range(folds.count)] for name in ("oof", "holdout")}
    for k, part in enumerate(parts["oof"]):
        if (part["fold"] != k).any():
            raise DataError(f"{run}/fold-{k}/oof.parquet: scores of another fold; delete the folder and train again")
    oof = pl.concat(parts["oof"]).sort("isic_id")
    if not folds.holdout:
        return oof, None
    # What is served is the mean of the folds' models, and none of them has seen these patients.
    logit = pl.col("logit")
    mean = pl.concat(parts["holdout"]).group_by("isic_id").agg(fold_logits=logit, logit=logit.mean())
    table = parts["holdout"][0].drop("logit").join(mean, on="isic_id").sort("isic_id")
    return oof, _judged(run, table, store, progress)


def _unscored(store: Store, folds: Folds) -> tuple[pl.DataFrame, pl.DataFrame | None]:
    """The same tables without scores, for data without pictures."""
    import polars as pl

    table = (
        pl.DataFrame({"isic_id": store.ids, "patient_group": store.groups, "target": store.targets, "fold": folds.fold})
        .with_columns(fold_hash=pl.lit(folds.hash))
        .sort("isic_id")
    )
    return table.filter(pl.col("fold") >= 0), table.filter(pl.col("fold") < 0) if folds.holdout else None


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


def _joined(
    run: Path, store: Store, folds: Folds, oof: pl.DataFrame, holdout: pl.DataFrame | None, progress: bool
) -> tuple[pl.DataFrame, pl.DataFrame | None]:
    """The tables with every mode's scores, `logit` that of what is served; writes `stack/`.

    Features are made of the whole store at once: a lesion's depend on its own patient alone, who is on one side.
    """
    import numpy as np

    from lesionflow.data.features import Matrix, features, has_record, lesions_of_patient
    from lesionflow.models.stack import fit_stack, save_stack
    from lesionflow.models.ways import fit_line

    recipe = recipe_of(run)
    if recipe.tabular.missing == "refuse":
        from lesionflow.data.missingness import refuse

        refuse(store.table, store.targets, ids=store.ids)
    blocks = recipe.tabular.blocks
    own = tuple(name for name in blocks if name in ("plain", "derived"))
    record = features(store.table, own)
    visit = features(store.table, blocks) if blocks != own else None
    alone, known = lesions_of_patient(store.table) == 1, has_record(store.table)
    place = {name: row for row, name in enumerate(store.ids)}
    rows = np.array([place[name] for name in oof["isic_id"]], np.int64)
    held = np.array([place[name] for name in (holdout["isic_id"] if holdout is not None else [])], np.int64)

    def part(matrix: Matrix, chosen: NDArray[np.int64]) -> Matrix:
        return Matrix(matrix.names, matrix.values[chosen])

    none = np.zeros((0, folds.count))
    picture_logits = none if holdout is None or not store.pictures else np.array(holdout["fold_logits"].to_list())
    stacked = fit_stack(
        oof["logit"].to_numpy() if store.pictures else None,
        picture_logits if store.pictures else None,
        part(record, rows), part(visit, rows) if visit else None,
        part(record, held), part(visit, held) if visit else None, alone[rows], alone[held],
        oof["target"].to_numpy(), oof["fold"].to_numpy(),
        tabular=recipe.tabular, stack=recipe.stack, seed=recipe.seed,
        ids=oof["isic_id"].to_list(), model_fold=oof["fold"].to_numpy(), folds=folds, progress=progress,
    )  # fmt: skip
    save_stack(stacked, run / "stack")
    y, fold = oof["target"].to_numpy(), oof["fold"].to_numpy()
    pictures: dict[str, NDArray[np.float64] | None] = {"oof": None, "holdout": None}
    if store.pictures:
        # On the scale of the joined scores, since lesions with and without metadata are ranked together.
        image, unseen = stacked.oof["image"], stacked.holdout["image"]
        lines = [fit_line([image[fold != k]], y[fold != k]) for k in range(folds.count)]
        pictures["oof"] = np.choose(fold, [line(image) for line in lines])
        pictures["holdout"] = np.column_stack([line(unseen[:, k]) for k, line in enumerate(lines)])
    oof = _with_modes(oof, stacked.oof, known[rows], pictures["oof"])
    if holdout is not None:
        holdout = _with_modes(holdout, stacked.holdout, known[held], pictures["holdout"])
    return oof, holdout


def _with_modes(
    table: pl.DataFrame,
    scores: Mapping[str, NDArray[np.float64]],
    known: NDArray[np.bool_],
    pictures: NDArray[np.float64] | None,
) -> pl.DataFrame:
    """The table with `<mode>_logit` (and, of [n, K] scores, `<mode>_fold_logits`) and `logit`, what is served.

    A lesion without metadata has its picture's log-odds, `pictures`; where there are none, what trees make of nothing.
    """
    import numpy as np
    import polars as pl

    served = list(scores.values())[-1]
    if pictures is not None:
        served = np.where(known if served.ndim == 1 else known[:, None], served, pictures)
    for name, found in {**{f"{mode}_": one for mode, one in scores.items()}, "": served}.items():
        if found.ndim == 2:
            table = table.with_columns(pl.Series(f"{name}fold_logits", found.tolist(), dtype=pl.List(pl.Float64)))
            found = found.mean(1)
        table = table.with_columns(pl.Series(f"{name}logit", found))
    return table


def _write_scores(out: Path, table: pl.DataFrame, store: Store, expected: int) -> None:
    """Scores with what subgroups are made of, one row per lesion, in the order of their ids."""
    extra = [name for name in DESCRIBED if name in store.table.columns]
    table = table.join(store.table.select("isic_id", *extra), on="isic_id", how="left").sort("isic_id")
    if len(table) != expected or table["isic_id"].n_unique() != expected:
        raise DataError(f"{out}: {len(table)} scores for {expected} lesions; train every fold again")
    with keys.atomic(out) as file:
        table.write_parquet(file)
