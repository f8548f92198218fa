"""Kinds of diagnosis: what an image model may be taught beside malignant or not, and is never shown.

A melanoma, a basal cell and a squamous cell carcinoma look unlike each other; one label for all three hides that. The
columns `iddx_*` are known only after a biopsy, so they are targets of an auxiliary loss and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from lesionflow.errors import UsageError

FEWEST = 10
"""Lesions of a kind to learn from; rarer kinds teach nothing."""
UNKNOWN = -1
_BENIGN = "Benign"


@dataclass(frozen=True)
class Kinds:
    """The kinds that a training learns to tell apart."""

    names: tuple[str, ...]
    codes: NDArray[np.int64]
    """Place in `names` for every row of the store, int64 [N]; `UNKNOWN` where nothing is known, or the kind is rare."""


def kinds(table: pl.DataFrame, train_rows: NDArray[np.int64]) -> Kinds:
    """The kinds of diagnosis that have at least `FEWEST` lesions among `train_rows`.

    A lesion's kind is its `iddx_2`; without one it is benign where `iddx_1` (or, without that column, `target`) says
    so, else unknown. Raises `UsageError` where the metadata tells fewer than two malignant kinds apart.
    """
    given = pl.col("iddx_2") if "iddx_2" in table.columns else pl.lit(None, pl.String)
    benign = pl.col("iddx_1") == _BENIGN if "iddx_1" in table.columns else pl.col("target") == 0
    # A benign lesion with its histology is still of the benign kind: there are too few of those to tell apart.
    kind = table.select(pl.when(benign).then(pl.lit(_BENIGN)).otherwise(given).alias("kind"))["kind"]
    known = kind[train_rows].drop_nulls().value_counts(name="lesions")
    names = tuple(sorted(known.filter(pl.col("lesions") >= FEWEST)["kind"].to_list()))
    if len(set(names) - {_BENIGN}) < 2:
        found = ", ".join(names) or "none"
        raise UsageError(
            f"recipe: training.auxiliary needs at least two malignant kinds with {FEWEST} lesions each in the training "
            f"folds' iddx_2, found: {found}; set training.auxiliary=0"
        )
    codes = kind.replace_strict({name: code for code, name in enumerate(names)}, default=UNKNOWN, return_dtype=pl.Int64)
    return Kinds(names, codes.to_numpy())
