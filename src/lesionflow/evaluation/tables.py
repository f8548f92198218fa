"""Tables of scores and of truth, read strictly: joined on `isic_id`, never by position.

Missing, extra and duplicate ids and scores that are not finite numbers are refused by name and count. Only the
columns needed are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lesionflow.errors import DataError
from lesionflow.evaluation.metrics import Ints

if TYPE_CHECKING:
    import polars as pl

SCORE_COLUMNS = ("logit", "target")
"""Where a score is looked for: an oof.parquet's `logit` first, as its `target` is the truth."""
BESIDE = ("patient_group", "fold", "fold_hash")
"""What an oof.parquet holds besides."""


def scores(path: Path) -> tuple[pl.DataFrame, str]:
    """A submission (isic_id, target) or an out-of-fold table: isic_id, score float64 and, of a table with logits,
    what it has of target, patient_group, fold and fold_hash. With the name of the column the scores come from.
    """
    import polars as pl

    table = read(path, ("isic_id", *SCORE_COLUMNS, *BESIDE))
    column = next((name for name in SCORE_COLUMNS if name in table.columns), None)
    if column is None:
        raise DataError(f"{path}: no column 'target' (nor 'logit'); a submission has isic_id,target")
    score = table[column].cast(pl.Float64, strict=False)
    if len(bad := table["isic_id"].filter(~score.is_finite().fill_null(False))):
        raise DataError(
            f"{path}: {column} is empty, not a number, NaN or infinite for {some(bad)}; "
            "give every lesion a finite score"
        )
    once(table, path)
    own = ("target", *BESIDE) if column == "logit" else ("fold",)
    beside = [name for name in own if name in table.columns]
    return table.select("isic_id", score.alias("score"), *beside), column


def truth(path: Path) -> pl.DataFrame:
    """isic_id, target int8 and patient_id (null where unknown) of a metadata table."""
    import polars as pl

    table = read(path, ("isic_id", "target", "patient_id", "patient_group"))
    if "target" not in table.columns:
        raise DataError(f"{path}: no column 'target'; the truth is train-metadata.csv or a table isic_id,target")
    once(table, path)
    patient = table["patient_id"] if "patient_id" in table.columns else pl.Series([None] * len(table), dtype=pl.String)
    if "patient_group" in table.columns:  # A run's own table: the patient, or the lesion's own id.
        group = table["patient_group"].cast(pl.String)
        patient = group.zip_with(group != table["isic_id"], pl.Series([None], dtype=pl.String))
    patient = patient.cast(pl.String).replace({"": None, "NA": None})
    return pl.DataFrame({"isic_id": table["isic_id"], "target": targets(table, path), "patient_id": patient})


def targets(table: pl.DataFrame, path: Path) -> pl.Series:
    """The column `target` as int8 0 and 1."""
    import polars as pl

    target = table["target"].cast(pl.Float64, strict=False)
    if len(bad := table["isic_id"].filter(~target.is_in([0.0, 1.0]).fill_null(False))):
        raise DataError(f"{path}: target is neither 0 nor 1 for {some(bad)}; leave lesions of unknown truth out")
    return target.cast(pl.Int8)


def join(answers: pl.DataFrame, lesions: pl.DataFrame, path: Path, other: Path, remedy: str) -> pl.DataFrame:
    """`lesions` (of `other`) with the columns of `answers` (of `path`), if both hold exactly the same ids."""
    joined = lesions.join(answers, on="isic_id", how="inner")
    if len(joined) == len(lesions) == len(answers):
        return joined
    missing = lesions.join(answers, on="isic_id", how="anti")["isic_id"]
    extra = answers.join(lesions, on="isic_id", how="anti")["isic_id"]
    parts = [f"no row for {some(missing)} of {other}"] * bool(len(missing))
    parts += [f"{some(extra)} not in {other}"] * bool(len(extra))
    raise DataError(f"{path}: {'; '.join(parts)}; {remedy}")


def groups(patient: pl.Series, lesion: pl.Series) -> Ints:
    """Whole numbers per lesion: known patients in the order of their ids, then all other lesions in that of theirs."""
    import polars as pl

    names = patient.drop_nulls().unique().sort()
    known = patient.cast(pl.Enum(names)).to_physical().cast(pl.Int64).fill_null(-1).to_numpy()
    alone = known < 0
    result = known.astype(np.int64)
    result[alone] = known.max(initial=-1) + lesion.filter(pl.Series(alone)).rank("ordinal").cast(pl.Int64).to_numpy()
    return result


def once(table: pl.DataFrame, path: Path) -> None:
    """Raise `DataError` for an isic_id in more than one row."""
    if table["isic_id"].n_unique() != len(table):
        repeated = table["isic_id"].filter(table["isic_id"].is_duplicated()).unique(maintain_order=True)
        raise DataError(f"{path}: more than one row for {some(repeated)}; keep one row per isic_id")


def read(path: Path, columns: Sequence[str]) -> pl.DataFrame:
    """The wanted columns that exist; of a CSV, as text."""
    import polars as pl

    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        lazy = pl.scan_parquet(path) if path.suffix == ".parquet" else pl.scan_csv(path, infer_schema=False)
        present = lazy.collect_schema().names()
        if "isic_id" not in present:
            raise DataError(f"{path}: no column 'isic_id'; found {', '.join(present[:5])}")
        table = lazy.select([name for name in columns if name in present]).collect()
    except pl.exceptions.PolarsError as error:
        raise DataError(f"{path}: can't be read as a table ({str(error).splitlines()[0]})") from None
    if not len(table):
        raise DataError(f"{path}: has no rows")
    if table["isic_id"].null_count():
        row = int(table["isic_id"].is_null().arg_max() or 0)
        raise DataError(f"{path}: isic_id is empty in {table['isic_id'].null_count()} rows, first in row {row + 1}")
    return table.with_columns(pl.col("isic_id").cast(pl.String))


def some(ids: pl.Series) -> str:
    """'3 lesions (ISIC_1, ISIC_2, ...)': the count and the first five."""
    first = ", ".join(ids.head(5).to_list()) + (", ..." if len(ids) > 5 else "")
    return f"{len(ids)} lesion{'s' * (len(ids) != 1)} ({first})"
