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

from lesionflow.data.schema import BY_NAME, TEST_COLUMNS
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

    Empty is whatever the features take for unknown: null, NaN, an empty text, "Unknown", a number outside the schema's
    range, a word outside its vocabulary. A column is reported if the shares of empty cells differ by
    `DIFFERENCE` or more, and Fisher's exact test gives that a probability of `CHANCE` at most, divided by the number
    of comparisons. So is how many cells of a lesion are empty ("5 or more columns"), as blanks here and there add up.
    `patient_id` is looked at too: a lesion without one has no context. Columns known only at training
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
    for name, empty in _looked_at(table, names).items():
        counts = (int(empty[malignant].sum()), int(empty[benign].sum()))
        shares = (counts[0] / sizes[0], counts[1] / sizes[1])
        apart = abs(shares[0] - shares[1])
        if apart < DIFFERENCE:
            continue
        probability = fisher(counts[0], counts[1], *sizes, logs)
        if probability <= CHANCE / (2 * len(names)):
            found.append(Missing(name, *shares, 0.5 + apart / 2, probability))
    found.sort(key=lambda one: -one.auc)
    # Where columns tell by themselves, that they tell together is no news.
    return [one for one in found if one.column in table.columns] or found[:1]


def _looked_at(table: pl.DataFrame, names: Sequence[str]) -> dict[str, NDArray[np.bool_]]:
    """Which lesions [N] are empty in each column, and in so many columns that it tells most or more."""
    empty = {name: _empty(table[name]) for name in names}
    count = np.sum(list(empty.values()), axis=0)
    return empty | {f"{least} or more columns": count >= least for least in range(2, len(names) + 1)}


def refuse(table: pl.DataFrame, targets: ArrayLike, *, ids: Sequence[str] | None = None) -> None:
    """Raise `DataError`, naming columns and figures, where `check_missing` reports any.

    `ids` [N]: the lesions, of which the first empty ones are named.
    """
    found = check_missing(table, targets)
    if not found:
        return
    shown = "; ".join(map(str, found[:4])) + ("; ..." if len(found) > 4 else "")
    names = [name for name in table.columns if name in TEST_COLUMNS and name != "isic_id"]
    empty = np.flatnonzero(_looked_at(table, names)[found[0].column])[:3]
    named = f", empty e.g. in {', '.join(str(ids[i]) for i in empty)}" if ids is not None else ""
    raise DataError(
        f"metadata: whether {_counted(found)} filled gives the label away: "
        f"{shown}{named}. A model would learn that, and its figures would not hold: use rows that were filled alike, "
        'train on pictures alone, or say that it is meant (tabular.missing = "allow")'
    )


def _counted(found: Sequence[Missing]) -> str:
    return (
        f"{len(found):,} columns are"
        if len(found) > 1
        else "1 column is"
        if " " not in found[0].column
        else "cells are"
    )


def _empty(cells: pl.Series) -> NDArray[np.bool_]:
    column, empty = BY_NAME[cells.name], cells.is_null()
    if cells.dtype == pl.String and column.kind != "number":
        words = cells.str.strip_chars().str.to_lowercase()
        empty |= words.is_in(list(_NOT_VALUES)).fill_null(True)
        if column.values:
            empty |= ~words.is_in([value.lower() for value in column.values]).fill_null(False)
        return empty.to_numpy()
    numbers = cells.cast(pl.Float64, strict=False)
    empty |= ~numbers.is_finite().fill_null(False)
    for off in (
        None if column.low is None else numbers < column.low,
        None if column.high is None else numbers > column.high,
    ):
        empty |= False if off is None else off.fill_null(True)
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
