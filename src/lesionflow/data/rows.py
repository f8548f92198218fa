"""Rows of a store in four bytes each.

numpy finds and takes rows by way of 64-bit indices, whatever type they are kept in. Here that happens for a stretch
of rows at a time, so that millions of rows cost what the result holds and no more.
"""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.signedinteger[Any]]
"""Rows of a store: int32, or int64 where a store has more rows than that can count."""

_STRETCH = 1 << 16
_Cell = TypeVar("_Cell", bound=np.generic)


def row_type(count: int) -> type[np.int32] | type[np.int64]:
    """The smallest type for the rows of a store that has `count`."""
    return np.int32 if count <= 2**31 else np.int64


def where(flags: NDArray[np.bool_]) -> Rows:
    """The rows whose flag [N] is set, ascending; as `np.flatnonzero`."""
    found: Rows = np.empty(np.count_nonzero(flags), row_type(len(flags)))
    at = 0
    for start in range(0, len(flags), _STRETCH):
        here = np.flatnonzero(flags[start : start + _STRETCH])
        np.add(here, start, out=found[at : at + len(here)], casting="same_kind")
        at += len(here)
    return found


def take(values: NDArray[_Cell], rows: Rows) -> NDArray[_Cell]:
    """The values [N] of some rows [n], in their order; as `values[rows]`."""
    taken = np.empty(len(rows), values.dtype)
    for start in range(0, len(rows), _STRETCH):
        taken[start : start + _STRETCH] = values[rows[start : start + _STRETCH]]
    return taken
