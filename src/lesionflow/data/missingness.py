"""Whether empty cells alone tell malignant from benign lesions.

Trees learn from "unknown" as from any value. Where the metadata of biopsied lesions was collected and that of the
others wasn't, a model scores the collecting: splendid figures, worth nothing in service. So what is as strong as that
is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray

from lesionflow.data.schema import TEST_COLUMNS
from lesionflow.errors import DataError

DIFFERENCE = 0.1
"""Smallest difference between the shares of empty cells that counts: an AUC of 0.55 from the emptiness alone."""
CHANCE = 1e-6
"""Largest probability, by Fisher's exact test, of such a difference by chance, over all columns together."""
_NOT_VALUES = ("", "unknown")


@dataclass(frozen=True)
class Missing:
    """A column whose empty cells tell of the label."""

    column: str
    empty_malignant: float
    """Share of malignant lesions with an empty cell."""
    empty_benign: float
    auc: float
    """Of the better of the two rankings, empty first or filled first: 0.5 tells nothing, 1 everything."""
    probability: float
    """Fisher's exact test, two-sided: of a difference as unlikely by chance."""

    def __str__(self) -> str:
        return (
            f"{self.column} (empty: {self.empty_benign:.0%} of benign, {self.empty_malignant:.0%} of malignant, "
            f"AUC {self.auc:.2f})"
        )


def check_missing(table: pl.DataFrame, targets: ArrayLike) -> list[Missing]:
    """The columns of metadata [N], typed or as text, whose emptiness tells of `targets` [N] 0/1, strongest first.

    Empty is null, NaN, an empty text or "Unknown". A column is reported if the shares of empty cells differ by
    `DIFFERENCE` or more, and Fisher's exact test gives that a probability of `CHANCE` at most, divided by the number
    of columns. `patient_id` is looked at too: a lesion without one has no context. Columns known only at training
    time and `isic_id` are no inputs and aren't. Blanks at random, whatever their share, are not reported.
    Raises `DataError` if the lengths differ.
    """
    truth = np.asarray(targets)
    if len(truth) != table.height:
        raise DataError(f"missing cells: {len(truth):,} targets for {table.height:,} lesions: give one for each")
    malignant, benign = truth == 1, truth == 0
    names = [name for name in table.columns if name in TEST_COLUMNS and name != "isic_id"]
    if not names or not malignant.any() or not benign.any():
        return []
    sizes = (int(malignant.sum()), int(benign.sum()))
    logs = np.append(0.0, np.cumsum(np.log(np.arange(1, sum(sizes) + 1))))
    found = []
    for name in names:
        empty = _empty(table[name])
        counts = (int(empty[malignant].sum()), int(empty[benign].sum()))
        shares = (counts[0] / sizes[0], counts[1] / sizes[1])
        apart = abs(shares[0] - shares[1])
        if apart < DIFFERENCE:
            continue
        probability = fisher(counts[0], counts[1], *sizes, logs)
        if probability <= CHANCE / len(names):
            found.append(Missing(name, *shares, 0.5 + apart / 2, probability))
    return sorted(found, key=lambda one: -one.auc)


def refuse(table: pl.DataFrame, targets: ArrayLike, *, ids: Sequence[str] | None = None) -> None:
    """Raise `DataError`, naming columns and figures, where `check_missing` reports any.

    `ids` [N]: the lesions, of which the first empty ones are named.
    """
    found = check_missing(table, targets)
    if not found:
        return
    shown = "; ".join(map(str, found[:4])) + ("; ..." if len(found) > 4 else "")
    empty = np.flatnonzero(_empty(table[found[0].column]))[:3]
    named = f", empty e.g. in {', '.join(str(ids[i]) for i in empty)}" if ids is not None else ""
    raise DataError(
        f"metadata: whether {len(found):,} column{'s are' if len(found) > 1 else ' is'} filled gives the label away: "
        f"{shown}{named}. A model would learn that, and its figures would not hold: use rows that were filled alike, "
        'train on pictures alone, or say that it is meant (tabular.missing = "allow")'
    )


def _empty(cells: pl.Series) -> NDArray[np.bool_]:
    empty = cells.is_null()
    if cells.dtype == pl.String:
        empty |= cells.str.strip_chars().str.to_lowercase().is_in(list(_NOT_VALUES)).fill_null(True)
    elif cells.dtype.is_float():
        empty |= cells.is_nan().fill_null(True)
    return empty.to_numpy()


def fisher(a: int, b: int, size_a: int, size_b: int, logs: NDArray[np.float64]) -> float:
    """Fisher's exact test of a of size_a against b of size_b, two-sided.

    The sum of all outcomes with the same total that are no likelier than this one. `logs` are ln(0!), ln(1!), ...
    """
    total = a + b
    first = np.arange(max(0, total - size_b), min(total, size_a) + 1)
    ways = _choices(size_a, first, logs) + _choices(size_b, total - first, logs)
    chance = np.exp(ways - _choices(size_a + size_b, np.array(total), logs))
    # A touch more than this one's, as equal outcomes may differ in rounding.
    return float(min(chance[chance <= chance[a - first[0]] * (1 + 1e-7)].sum(), 1.0))


def _choices(n: int, k: NDArray[np.int64], logs: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(logs[n] - logs[k] - logs[n - k])
