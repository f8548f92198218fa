"""From metadata to the numbers that trees learn from: one function for a whole table and for one patient's visit.

    matrix = features(read_metadata(path))          # 400,000 lesions, or three
    matrix.names, matrix.values                     # [F], float64 [N, F]

Nothing is fitted: vocabularies and scales are constants, and a row's features depend on the rows of its own patient
only. So nothing can leak from one patient to another, or from a test row into training, and a visit gives what the
whole table gave. `catalogue` says of each feature what it is; docs/features.md lists them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import polars as pl
from numpy.typing import NDArray

from lesionflow.data import context, derived, neighbours
from lesionflow.data.context import Patients
from lesionflow.data.derived import Feature, Floats
from lesionflow.data.schema import BY_NAME, require_inputs
from lesionflow.errors import DataError, UsageError

__all__ = [
    "BLOCKS", "Feature", "Matrix", "catalogue", "check_inputs", "check_local", "features", "has_record",
    "lesions_of_patient",
]  # fmt: skip

BLOCKS = ("plain", "derived", "context", "neighbours")
"""In the order of the matrix's columns."""
_NEVER = ("isic_id", "patient_id", "attribution", "copyright_license", "image_type")
_ROWS = 1024


@dataclass(frozen=True)
class Matrix:
    """Features of lesions: `names` [F] and `values` float64 [N, F], C-contiguous, NaN where unknown."""

    names: tuple[str, ...]
    values: Floats


def catalogue(blocks: Sequence[str] = BLOCKS) -> tuple[Feature, ...]:
    """What each column of `features(table, blocks)` is, in its order. Raises `UsageError` for an unknown block."""
    if unknown := [block for block in blocks if block not in BLOCKS]:
        raise UsageError(f"features: no block {', '.join(map(repr, unknown))}; there are {', '.join(BLOCKS)}")
    return tuple(f for f in _everything() if f.block in blocks)


@cache
def _everything() -> tuple[Feature, ...]:
    return (*derived.plain(), *derived.derived(), *context.features(), *neighbours.features())


def features(table: pl.DataFrame, blocks: Sequence[str] = BLOCKS, *, threads: int | None = None) -> Matrix:
    """The features of every row, in the table's order, whatever that is.

    `table` is typed metadata as `table.read_metadata` gives it; a column that is missing is NaN, one that isn't a
    feature's is not looked at, and so neither is any that is known only at training time. The blocks' order doesn't
    matter. A row without a patient_id is a patient of its own. `threads` (by default, as many as there are cores)
    change no bit. Raises `UsageError` for an unknown block.
    """
    names = derived.names(catalogue(blocks))
    threads = threads or os.cpu_count() or 1
    patients = Patients(table)
    used = table.select(c for c in table.columns if c in BY_NAME and not BY_NAME[c].train_only)[patients.order]
    own = derived.plain_values(used)
    if set(blocks) - {"plain"}:
        own |= derived.derived_values(own)
    if "context" in blocks:
        own |= context.context_values(patients, derived.sites(used), own, threads)
    if "neighbours" in blocks:
        own |= neighbours.neighbour_values(patients, own, threads)
    columns = [own[name] for name in names]
    values = np.empty((table.height, len(names)))

    def place(start: int) -> None:
        # By blocks of rows: a column written as a whole would touch another line of the cache for every cell.
        rows = slice(start, start + _ROWS)
        values[patients.order[rows]] = np.array([column[rows] for column in columns]).T

    context.in_threads(place, range(0, table.height, _ROWS), threads if table.height > context.FEW else 1)
    return Matrix(names, values)


def check_inputs(names: Iterable[str]) -> None:
    """Raise `DataError` for columns that must not be features: known only at training time, or ids and institution."""
    named = list(names)
    require_inputs(named)
    if never := [name for name in named if name in _NEVER]:
        raise DataError(
            f"column {', '.join(never)}: says where a lesion comes from, not what it is, and won't hold elsewhere; "
            "leave it out"
        )


def lesions_of_patient(table: pl.DataFrame) -> NDArray[np.int64]:
    """The row itself and how many other lesions of its patient have a record, int64 [N].

    1: there is nothing to compare it with. Lesions without metadata worth using (`has_record`) are no company.
    """
    patients, known = Patients(table), has_record(table)
    others = np.bincount(patients.code, known[patients.order], len(patients.starts)).astype(np.int64)[patients.code]
    found = np.empty_like(patients.order)
    found[patients.order] = others
    return found - known + 1


def has_record(table: pl.DataFrame) -> NDArray[np.bool_]:
    """Whether a lesion has metadata worth using: at least half of the plain numeric columns filled. bool [N]."""
    own = derived.plain_values(table)
    filled = np.sum([~np.isnan(own[name]) for name in derived.NUMBERS], axis=0)
    return np.asarray(2 * filled >= len(derived.NUMBERS))


def check_local(
    build: Callable[[pl.DataFrame], Matrix], table: pl.DataFrame, *, patients: int = 20, seed: int = 0
) -> None:
    """Raise `DataError`, naming them, if features change when a patient's rows stand alone.

    `build` makes features of a table, and up to `patients` of its patients are drawn. What changes has looked at other
    patients' rows: statistics over a test set, or something fitted on all rows.
    """
    whole = build(table)
    drawn = Patients(table)
    rng = np.random.default_rng(seed)
    picked = rng.choice(len(drawn.starts), min(patients, len(drawn.starts)), replace=False)
    off: set[str] = set()
    for start, count in zip(drawn.starts[picked], drawn.counts[picked], strict=True):
        rows = np.sort(drawn.order[start : start + count])
        alone = build(table[rows])
        if alone.names != whole.names:
            raise DataError("features: a patient's rows alone give other columns than the table; name constant ones")
        same = np.isclose(alone.values, whole.values[rows], rtol=1e-9, atol=1e-9, equal_nan=True)
        off |= {whole.names[i] for i in np.flatnonzero(~same.all(axis=0))}
    if off:
        named = [name for name in whole.names if name in off]
        raise DataError(
            f"feature {', '.join(named[:5])}{', ...' if len(named) > 5 else ''}: changes when a patient's rows stand "
            "alone, so it looks at other patients' rows, which leaks and can't be had in service; make it of the "
            "patient's own rows"
        )
