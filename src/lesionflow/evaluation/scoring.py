"""Score a submission file against the truth, as the competition does, with an interval.

    lesionflow score submission.csv train-metadata.csv

Rows are joined on `isic_id`, never by position. Missing, extra and duplicate ids and scores that are not
finite numbers are refused by name and count. Only the columns needed are read, and no torch is imported:
401,059 rows take about a second, start of the process included.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lesionflow.errors import DataError
from lesionflow.evaluation import metrics
from lesionflow.evaluation.grouping import describe
from lesionflow.evaluation.intervals import bootstrap_areas

if TYPE_CHECKING:
    import polars as pl

SCORE_COLUMNS = ("logit", "target")
"""Where a score is looked for: an oof.parquet's `logit` first, as its `target` is the truth."""


def score_files(
    submission: Path,
    truth: Path,
    *,
    min_tpr: float = metrics.MIN_TPR,
    replicates: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Any]:
    """pAUC and AUC of `submission` (isic_id and target, or an oof.parquet) against `truth` (isic_id, target).

    Both may be CSV or parquet. Where the truth has `patient_id`, intervals draw patients. `replicates=0` leaves
    the intervals out. The result is JSON-able. Raises `DataError` with the first offending ids and the remedy.
    """
    answers, column = _submission(submission)
    lesions = _truth(truth)
    joined = _join(answers, lesions, submission, truth)
    y, s = joined["target"].to_numpy(), joined["score"].to_numpy()
    result: dict[str, Any] = {
        "pauc": metrics.pauc(y, s, min_tpr),
        "auc": metrics.auc(y, s),
        "min_tpr": min_tpr,
        "maximum": round(1 - min_tpr, 12),
        "chance": round((1 - min_tpr) ** 2 / 2, 12),
        "score_column": column,
        "count": len(y),
        "malignant": int(y.sum()),
        "benign": int((y == 0).sum()),
    }
    known = joined["patient_id"].drop_nulls()
    grouping = describe(known.n_unique(), len(known), len(y) - len(known))
    result |= {"patients": grouping.patients, "groups": grouping.to_dict(), "interval": None, "auc_interval": None}
    if replicates:
        intervals = bootstrap_areas(
            y, s, _groups(joined), (min_tpr, 0.0), replicates=replicates, seed=seed, level=level
        )
        result["interval"], result["auc_interval"] = (one.to_dict() for one in intervals)
    return result


def _groups(joined: pl.DataFrame) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Whole numbers per lesion: known patients in the order of their ids, then every other lesion on its own."""
    import polars as pl

    names = joined["patient_id"].drop_nulls().unique().sort()
    patient = joined["patient_id"].cast(pl.Enum(names)).to_physical().cast(pl.Int64).fill_null(-1).to_numpy()
    alone = patient < 0
    return np.where(alone, patient.max(initial=-1) + np.cumsum(alone), patient).astype(np.int64)


def _submission(path: Path) -> tuple[pl.DataFrame, str]:
    import polars as pl

    table = _read(path, ("isic_id", *SCORE_COLUMNS))
    column = next((name for name in SCORE_COLUMNS if name in table.columns), None)
    if column is None:
        raise DataError(f"{path}: no column 'target' (nor 'logit'); a submission has isic_id,target")
    scores = table[column].cast(pl.Float64, strict=False)
    bad = table["isic_id"].filter(~scores.is_finite().fill_null(False))
    if len(bad):
        raise DataError(
            f"{path}: {column} is empty, not a number, NaN or infinite for {_some(bad)}; "
            "give every lesion a finite score"
        )
    return pl.DataFrame({"isic_id": table["isic_id"], "score": scores}), column


def _truth(path: Path) -> pl.DataFrame:
    import polars as pl

    table = _read(path, ("isic_id", "target", "patient_id"))
    if "target" not in table.columns:
        raise DataError(f"{path}: no column 'target'; the truth is train-metadata.csv or a table isic_id,target")
    target = table["target"].cast(pl.Float64, strict=False)
    bad = table["isic_id"].filter(~target.is_in([0.0, 1.0]).fill_null(False))
    if len(bad):
        raise DataError(f"{path}: target is neither 0 nor 1 for {_some(bad)}; leave lesions of unknown truth out")
    patient = table["patient_id"] if "patient_id" in table.columns else pl.Series([None] * len(table), dtype=pl.String)
    patient = patient.cast(pl.String).replace({"": None, "NA": None})
    return pl.DataFrame({"isic_id": table["isic_id"], "target": target.cast(pl.Int8), "patient_id": patient})


def _join(answers: pl.DataFrame, lesions: pl.DataFrame, submission: Path, truth: Path) -> pl.DataFrame:
    for table, path in ((answers, submission), (lesions, truth)):
        if table["isic_id"].n_unique() != len(table):
            repeated = table["isic_id"].filter(table["isic_id"].is_duplicated()).unique(maintain_order=True)
            raise DataError(f"{path}: more than one row for {_some(repeated)}; keep one row per isic_id")
    joined = lesions.join(answers, on="isic_id", how="inner")
    if len(joined) == len(lesions) == len(answers):
        return joined
    missing = lesions.join(answers, on="isic_id", how="anti")["isic_id"]
    extra = answers.join(lesions, on="isic_id", how="anti")["isic_id"]
    parts = [f"no row for {_some(missing)} of {truth}"] * bool(len(missing))
    parts += [f"{_some(extra)} not in {truth}"] * bool(len(extra))
    raise DataError(f"{submission}: {'; '.join(parts)}; score exactly the lesions of the truth")


def _read(path: Path, columns: Sequence[str]) -> pl.DataFrame:
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


def _some(ids: pl.Series) -> str:
    """'3 lesions (ISIC_1, ISIC_2, ...)': the count and the first five."""
    first = ", ".join(ids.head(5).to_list()) + (", ..." if len(ids) > 5 else "")
    return f"{len(ids)} lesion{'s' * (len(ids) != 1)} ({first})"
