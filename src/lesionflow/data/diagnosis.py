"""Kinds of diagnosis: what an image model may be taught beside malignant or not, and is never shown.

A melanoma, a basal cell and a squamous cell carcinoma look unlike each other; one label for all three hides that. The
columns `iddx_*` are known only after a biopsy, so they are targets of an auxiliary loss and nothing else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from lesionflow.data.rows import Rows
from lesionflow.errors import UsageError

FEWEST = 10
"""Lesions of a kind to learn from; rarer kinds teach nothing."""
UNKNOWN = -1
_BENIGN = "Benign"


@dataclass(frozen=True)
class Kinds:
    """The kinds that a training learns to tell apart."""

    names: tuple[str, ...]
    codes: NDArray[np.int16]
    """Place in `names` for every row of the store, int16 [N]; `UNKNOWN` where nothing is known, or the kind is rare."""


def kinds(tables: Callable[..., Iterable[pl.DataFrame]], train_rows: Rows) -> Kinds:
    """The kinds of diagnosis that have at least `FEWEST` lesions among `train_rows`, ascending rows of the store.

    `tables(*columns)` gives those of the columns that there are, in pieces (`Store.tables`).
    A lesion's kind is its `iddx_2`; without one it is benign where `iddx_1` (or, without that column, `target`) says
    so, else unknown. Raises `UsageError` where the metadata tells fewer than two malignant kinds apart.
    """
    lesions: Counter[str] = Counter()
    start = 0
    for kind in _kind(tables):
        here = slice(*np.searchsorted(train_rows, np.array([start, start + len(kind)], train_rows.dtype)))
        counted = kind[train_rows[here] - start].drop_nulls().value_counts(name="lesions")
        lesions.update(dict(counted.iter_rows()))
        start += len(kind)
    names = tuple(sorted(name for name, count in lesions.items() if count >= FEWEST))
    if len(set(names) - {_BENIGN}) < 2:
        found = ", ".join(names) or "none"
        raise UsageError(
            f"recipe: training.auxiliary needs at least two malignant kinds with {FEWEST} lesions each in the training "
            f"folds' iddx_2, found: {found}; set training.auxiliary=0"
        )
    codes = {name: code for code, name in enumerate(names)}
    coded = (kind.replace_strict(codes, default=UNKNOWN, return_dtype=pl.Int16).to_numpy() for kind in _kind(tables))
    return Kinds(names, np.concatenate(list(coded)))


def _kind(tables: Callable[..., Iterable[pl.DataFrame]]) -> Iterator[pl.Series]:
    """Each lesion's kind, null where it is unknown, in pieces."""
    for table in tables("target", "iddx_1", "iddx_2"):
        given = pl.col("iddx_2") if "iddx_2" in table.columns else pl.lit(None, pl.String)
        benign = pl.col("iddx_1") == _BENIGN if "iddx_1" in table.columns else pl.col("target") == 0
        # A benign lesion with its histology is still of the benign kind: there are too few of those to tell apart.
        yield table.select(pl.when(benign).then(pl.lit(_BENIGN)).otherwise(given).alias("kind"))["kind"]
