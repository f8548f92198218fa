"""The scores that a fold's training leaves: one Parquet file, written a stretch of lesions at a time."""

from __future__ import annotations

from typing import BinaryIO

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from lesionflow.data.folds import Folds
from lesionflow.data.rows import Rows
from lesionflow.data.store import Store

_STRETCH = 1 << 14
_COLUMNS = {
    "isic_id": pa.large_string(),
    "patient_group": pa.large_string(),
    "target": pa.int8(),
    "fold": pa.int8(),
    "logit": pa.float64(),
    "fold_hash": pa.large_string(),
}


def write_scores(
    file: BinaryIO, store: Store, folds: Folds, rows: Rows, logits: NDArray[np.float64], identity: str
) -> None:
    """Write the logits, float64 [n], of some of the store's rows [n], with whose they are and what they are of."""
    columns = pa.schema(list(_COLUMNS.items()), {"identity": identity})
    with pq.ParquetWriter(file, columns, compression="zstd") as writer:
        for start in range(0, len(rows), _STRETCH):
            here = rows[start : start + _STRETCH]
            table = pl.DataFrame(
                {
                    "isic_id": store.ids.take(here),
                    "patient_group": store.groups.take(here),
                    "target": store.targets[here],
                    "fold": folds.fold[here],
                    "logit": logits[start : start + _STRETCH],
                    "fold_hash": folds.hash,
                }
            )
            writer.write_table(table.to_arrow(compat_level=pl.CompatLevel.oldest()).cast(columns))
