"""Patients drawn with replacement, thousands of times at once, without touching a lesion again.

A metric that depends on order alone needs, per replicate, only how many benign and malignant lesions lie in
each cell of an `Order`. So the lesions become one small table, patients x cells, and a replicate is a row of
patient counts times that table: exact, and for 401,059 lesions a matrix product of a fraction of a second.

Patients who contribute one lesion each, in the same cell, are exchangeable: only how many of them are drawn
matters. They share one row, an *atom* with a multiplicity, which keeps the table small even where every lesion
is its own group. Several score vectors of the same lesions share the atoms, hence the replicates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lesionflow.evaluation.metrics import Floats, Groups, Ints, area, checked, codes, order_of, segments

_CHUNK_BYTES = 1 << 22  # A replicate's tables then stay in the processor's cache.
_DENSE_BYTES = 1 << 28
_COUNTED = 1 << 22  # Up to so many cells counting is quicker than sorting.
_EXACT_FLOAT32 = 1 << 24  # Whole numbers below this are exact in float32, which multiplies twice as fast.


class Table:
    """Lesions per atom and column of one score vector; columns are 2K+1 benign cells, then K malignant scores.

    Dense where that is small or well filled, else sorted triples, so that memory stays bounded either way.
    """

    def __init__(self, atom: Ints, column: Ints, atoms: int, size: int) -> None:
        self.size, self.atoms, self.columns = size, atoms, 3 * size + 1
        pair, count = _counted(column * atoms + atom, atoms * self.columns)
        self._column, self._atom = np.divmod(pair, atoms)
        self._count = count.astype(np.float64)
        self._total = np.bincount(self._atom, self._count, atoms)
        self._dense: NDArray[np.float32] | None = None
        cells = atoms * self.columns
        if cells * 4 <= _DENSE_BYTES and cells <= max(40 * len(pair), 1 << 22):
            self._dense = np.zeros((atoms, self.columns), np.float32)
            self._dense[self._atom, self._column] = self._count
        self.width = self.columns if self._dense is not None else max(self.columns, len(pair))

    def times(self, weights: Floats) -> tuple[Floats, Floats]:
        """Weights [r, A] -> benign [r, 2K+1] and malignant [r, K] counts."""
        if self._dense is None:
            cells = np.zeros((len(weights), self.columns))
            present, start = np.unique(self._column, return_index=True)
            cells[:, present] = np.add.reduceat(weights[:, self._atom] * self._count, start, axis=1)
        elif (weights @ self._total).max(initial=0) < _EXACT_FLOAT32 and np.array_equal(weights, np.rint(weights)):
            cells = (weights.astype(np.float32) @ self._dense).astype(np.float64)
        else:
            cells = weights @ self._dense.astype(np.float64)
        return cells[:, : 2 * self.size + 1], cells[:, 2 * self.size + 1 :]

    def spread(self, values: Floats) -> Floats:
        """Values per column [r, 3K+1] summed over the lesions of each atom: float64 [r, A]."""
        if self._dense is not None:
            return (values.astype(np.float32) @ self._dense.T).astype(np.float64)
        result = np.zeros((len(values), self.atoms))
        by_atom = np.argsort(self._atom, kind="stable")
        present, start = np.unique(self._atom[by_atom], return_index=True)
        terms = values[:, self._column[by_atom]] * self._count[by_atom]
        result[:, present] = np.add.reduceat(terms, start, axis=1)
        return result

    def value(self, weights: Floats, min_tpr: float) -> Floats:
        """pAUC [r] of each weighting of the atoms [r, A]."""
        return area(*self.times(weights), min_tpr)

    def estimate(self, weights: Floats, measures: Sequence[Measure]) -> list[tuple[Floats, Floats]]:
        """For each measure: its value [r], and its standard error [r] if the groups were a sample."""
        cells, result = self.times(weights), []
        for measure in measures:
            value, per_lesion = measure.influence(*cells)
            result.append((value, np.sqrt(np.einsum("ra,ra->r", weights, self.spread(per_lesion) ** 2))))
        return result


@dataclass(frozen=True)
class Measure:
    """A figure that depends on the order of scores alone."""

    maximum: float
    """Its largest value; the least is 0."""
    influence: Callable[[Floats, Floats], tuple[Floats, Floats]]
    """Benign [R, 2K+1] and malignant [R, K] weights -> value [R] and what one more lesion per column changes."""
    bound: Callable[[float, float, float], float]
    """The least value if these shares of the malignant and of the benign lesions were misplaced; prevalence."""


def partial_area(min_tpr: float) -> Measure:
    """The pAUC above `min_tpr`, or with 0 the AUC."""
    maximum = 1 - min_tpr
    return Measure(
        maximum,
        lambda benign, malignant: influence(benign, malignant, min_tpr),
        lambda missed, raised, _: max(0.0, maximum - missed) * (1 - raised),
    )


def influence(benign: Floats, malignant: Floats, min_tpr: float) -> tuple[Floats, Floats]:
    """The pAUC [R], and how much one more lesion in each column would move it [R, 3K+1], columns as in `Table`.

    The infinitesimal jackknife. A benign lesion counts by the share of the curve's upper part whose malignant
    scores outrank it; a malignant one by the specificity at its score, no better than that at `min_tpr`.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        curve = segments(benign, malignant, min_tpr)
        value: Floats = (curve.width * curve.specificity).sum(axis=1)
        half = curve.kept / 2
        above = np.cumsum(curve.width, axis=1)
        gain = np.zeros(benign.shape)
        gain[:, 2::2], gain[:, 1::2] = above, above - curve.width * (1 - half)
        benign_part = (gain - value[:, None]) / benign.sum(axis=1)[:, None]
        tied = curve.fpr_end - curve.fpr_start
        start = np.where(curve.cut, 1 - curve.fpr_end + curve.kept * tied, 0.0).max(axis=1)[:, None]
        # Malignant lesions tied with benign ones lie evenly along the diagonal, of which the cut keeps the end.
        within = 1 - curve.fpr_end + tied * curve.kept * (1 - half)
        specificity = np.where(curve.kept > 0, within, start)
        found, total = malignant[:, ::-1], malignant.sum(axis=1)[:, None]
        malignant_part = (specificity - (specificity * found).sum(axis=1)[:, None] / total) / total
    return value, np.concatenate([benign_part[:, ::-1], malignant_part[:, ::-1]], axis=1)


def precision_influence(benign: Floats, malignant: Floats) -> tuple[Floats, Floats]:
    """The average precision [R], and how much one more lesion in each column would move it [R, 3K+1].

    A benign lesion lowers the precision at every malignant score that it isn't under; a malignant one raises it
    there, and brings the precision at its own score into the mean.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        total = malignant.sum(axis=1)[:, None]
        found = np.cumsum(malignant[:, ::-1], axis=1)[:, ::-1]
        passed = np.cumsum(benign[:, :0:-1], axis=1)[:, 1::2][:, ::-1]
        flagged = found + passed
        share = np.divide(malignant / total, flagged, out=np.zeros_like(flagged), where=flagged > 0)
        precision = np.divide(found, flagged, out=np.zeros_like(flagged), where=flagged > 0)
        value: Floats = (malignant / total * precision).sum(axis=1)
        lost = np.cumsum(share * precision, axis=1)
        gained = np.cumsum(share * (1 - precision), axis=1)
    benign_part = np.zeros(benign.shape)
    benign_part[:, 1::2] = benign_part[:, 2::2] = -lost
    value[(total[:, 0] <= 0) | (benign.sum(axis=1) <= 0)] = np.nan
    return value, np.concatenate([benign_part, gained + (precision - value[:, None]) / total], axis=1)


AVERAGE_PRECISION = Measure(
    1.0,
    precision_influence,
    # The misplaced malignant lesions come last, the misplaced benign ones before all others.
    lambda missed, raised, prevalence: (1 - missed) * prevalence / (prevalence + raised * (1 - prevalence)),
)


class Patients:
    """The groups that are drawn, merged into atoms, with one `Table` per score vector."""

    def __init__(self, y: ArrayLike, scores: Sequence[ArrayLike], groups: Groups) -> None:
        truth, columns, sizes = np.zeros(0, bool), [], []
        for s in scores:
            truth, values = checked(y, s)
            order = order_of(truth, values)
            column = np.empty(len(truth), np.int64)
            column[truth], column[~truth] = 2 * order.size + 1 + order.malignant_at, order.benign_cell
            columns.append(column)
            sizes.append(order.size)
        owner = codes(groups, len(truth))
        self.groups = int(owner.max()) + 1
        self.malignant = int(truth.sum())
        self.prevalence = float(truth.mean())
        self.malignant_groups = len(np.unique(owner[truth]))
        self.benign_groups = len(np.unique(owner[~truth]))
        atom, rows, self.multiplicity = _atoms(owner, columns)
        atoms = len(self.multiplicity)
        self.tables = [
            Table(atom[rows], column[rows], atoms, size) for column, size in zip(columns, sizes, strict=True)
        ]

    def everyone(self) -> Floats:
        """The weights of the data itself, each group once: float64 [1, A]."""
        return self.multiplicity[None].astype(np.float64)

    def draws(self, count: int, seed: int) -> Iterator[Floats]:
        """`count` bootstrap samples of the groups, in chunks: how often each atom is drawn, float64 [r, A]."""
        rng = np.random.default_rng(seed)
        atoms = len(self.multiplicity)
        # Drawing group by group costs one number per group, drawing by atom a slow binomial per atom.
        owner = np.repeat(np.arange(atoms), self.multiplicity) if self.groups <= 8 * atoms else None
        widest = max(atoms, 0 if owner is None else self.groups, *(t.width for t in self.tables))
        chunk = max(1, _CHUNK_BYTES // (8 * widest))
        for start in range(0, count, chunk):
            rows = min(chunk, count - start)
            if owner is None:
                drawn: NDArray[Any] = rng.multinomial(self.groups, self.multiplicity / self.groups, size=rows)
            else:
                picks = owner[rng.integers(0, self.groups, size=(rows, self.groups), dtype=np.int32)]
                picks += atoms * np.arange(rows)[:, None]
                drawn = np.bincount(picks.ravel(), minlength=rows * atoms).reshape(rows, atoms)
            yield drawn.astype(np.float64)


def _counted(cells: Ints, limit: int) -> tuple[Ints, Ints]:
    """The distinct numbers of 0..limit-1 among `cells`, ascending, and how often each occurs."""
    if limit > _COUNTED:
        return np.unique(cells, return_counts=True)
    count = np.bincount(cells, minlength=limit)
    present = np.flatnonzero(count)
    return present, count[present]


def _atoms(owner: Ints, columns: list[Ints]) -> tuple[Ints, NDArray[np.bool_], Ints]:
    """Atom of each lesion [n], the lesions that represent their atom [n], and each atom's multiplicity [A]."""
    lone_group = np.bincount(owner) == 1
    alone = lone_group[owner]
    key = columns[0][alone]
    for column in columns[1:]:
        key = np.unique(key * (column.max() + 1) + column[alone], return_inverse=True)[1]
    _, first, merged, lone_count = np.unique(key, return_index=True, return_inverse=True, return_counts=True)
    patient = (np.cumsum(~lone_group) - 1)[owner[~alone]]
    several = int((~lone_group).sum())
    atom = np.empty(len(owner), np.int64)
    atom[alone], atom[~alone] = merged + several, patient
    represents = ~alone
    represents[np.nonzero(alone)[0][first]] = True
    return atom, represents, np.concatenate([np.ones(several, np.int64), lone_count])
