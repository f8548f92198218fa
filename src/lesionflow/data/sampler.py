"""Which lesions each optimiser step sees: one global order, f(seed, epoch), of which a rank takes its slice.

Nothing here has state. Any process that knows the seed and the step knows the batch, so a run can
be resumed at any step, by any number of processes, and still show every drawn lesion exactly once.

Which rows may be drawn is a bit each; to draw from them takes four bytes each, for the moment with `balanced`
sampling and for as long as the epoch lasts with `shuffle`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lesionflow.data.rows import Rows, row_type, where
from lesionflow.recipe import Sampling

DRAWS = 10
"""Random numbers that augmentation may use for one drawn lesion. An even number: the generator makes two at a time."""

_STRETCH = 1 << 16


@dataclass(frozen=True)
class Draws:
    """The lesions drawn for one step, or one rank's part of them."""

    rows: NDArray[np.int64]
    """Rows of the store, int64 [b]."""
    randoms: NDArray[np.float32]
    """Uniform in [0, 1), float32 [b, DRAWS]; they belong to the place in the global order, whoever draws it."""

    def __len__(self) -> int:
        return len(self.rows)


class Sampler:
    """The global order of a whole training: `epochs` passes over `rows`, cut into steps.

    `rows` integers [n] are the store rows that may be drawn, `targets` int8 [n] their labels. With
    `balanced` sampling an epoch shows every malignant lesion once and `negatives` times as many
    others; those come from seeded passes over all negatives, so none repeats before all were seen.
    """

    def __init__(
        self,
        rows: Rows,
        targets: NDArray[np.int8],
        sampling: Sampling,
        *,
        epochs: int,
        batch_size: int,
        seed: int,
    ) -> None:
        self.epochs = epochs
        self.seed = seed
        size = int(rows.max()) + 1
        malignant = targets == 1
        self._malignant = np.sort(rows[malignant]).astype(row_type(size))
        self._other_bits = _bits(rows, ~malignant, size)
        self._count = len(rows)
        self._held: tuple[int, Rows, Any] | None = None
        self._bits = np.random.PCG64(0)
        self._numbers = np.random.Generator(self._bits)
        self._balanced = sampling.kind == "balanced"
        # Enough negatives to fill the last batch: no step is smaller than the others.
        wanted = len(self._malignant) * (1 + sampling.negatives)
        self._drawn = min(math.ceil(wanted / batch_size) * batch_size, len(rows)) if self._balanced else len(rows)
        self.steps_per_epoch = max(1, math.ceil(self._drawn / batch_size))
        self.steps = self.steps_per_epoch * epochs

    @property
    def lesions_per_epoch(self) -> int:
        return self._drawn

    @property
    def _others(self) -> Rows:
        """All rows that aren't malignant, ascending."""
        return where(np.unpackbits(self._other_bits).view(bool))

    def order(self, epoch: int) -> Rows:
        """The store rows of one epoch in the order they are shown, [lesions_per_epoch]."""
        if self._balanced:
            rows = np.concatenate([self._malignant, self._negatives(epoch)])
        else:
            flags = np.unpackbits(self._other_bits).view(bool)
            flags[self._malignant] = True
            rows = where(flags)
        np.random.default_rng([self.seed, epoch, 1]).shuffle(rows)
        return rows

    def _negatives(self, epoch: int) -> Rows:
        """This epoch's stretch of the endless sequence of shuffled passes over the negatives."""
        count, total = self._drawn - len(self._malignant), self._count - len(self._malignant)
        start = epoch * count
        taken = [self._malignant[:0]]
        while count > 0:
            number, at = divmod(start, total)
            others = self._others
            np.random.default_rng([self.seed, number, 2]).shuffle(others)
            taken.append(others[at : at + count].copy())  # A view would keep all of them.
            start, count = start + len(taken[-1]), count - len(taken[-1])
        return np.concatenate(taken)

    def _step(self, step: int) -> tuple[Rows, NDArray[np.float32]]:
        """The rows of a global step and their random numbers, float32 [b, DRAWS]."""
        epoch, at = divmod(step, self.steps_per_epoch)
        if self._held is None or self._held[0] != epoch:
            self._held = None  # Not two orders at once.
            begin = np.random.PCG64(np.random.SeedSequence([self.seed, epoch, 3])).state
            self._held = epoch, self.order(epoch), begin
        # Near-equal parts instead of a small last one, which would be noisy and could starve a rank.
        first = at * (self._drawn // self.steps_per_epoch) + min(at, self._drawn % self.steps_per_epoch)
        rows = self._held[1][first : first + self.batch_size(step)]
        # The epoch's random numbers from the first lesion of the step on, without making those before it.
        self._bits.state = self._held[2]
        self._bits.advance(first * DRAWS // 2)
        return rows, self._numbers.random((len(rows), DRAWS), np.float32)

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Draws:
        """What rank `rank` of `world` shows at a global step; the ranks' slices together are the batch."""
        rows, randoms = self._step(step)
        # Copies: nothing that is done to a batch may reach the epoch's order, which is kept.
        return Draws(rows[rank::world].astype(np.int64), randoms[rank::world].copy())

    def batch_size(self, step: int) -> int:
        """Lesions of a global step over all ranks."""
        drawn, steps = self._drawn, self.steps_per_epoch
        return drawn // steps + (step % steps < drawn % steps)


def _bits(rows: Rows, flags: NDArray[np.bool_], size: int) -> NDArray[np.uint8]:
    """The rows [n] whose flag [n] is set, as a bit for each of `size` rows."""
    set_bits = np.zeros(size, bool)
    for start in range(0, len(rows), _STRETCH):
        here = slice(start, start + _STRETCH)
        set_bits[rows[here]] = flags[here]
    return np.packbits(set_bits)


class StepSampler:
    """The batches of one rank from step `start` to the end; what a DataLoader takes as `sampler`."""

    def __init__(self, sampler: Sampler, start: int, rank: int, world: int) -> None:
        self._sampler, self._start, self._rank, self._world = sampler, start, rank, world

    def __len__(self) -> int:
        return self._sampler.steps - self._start

    def __iter__(self) -> Iterator[Draws]:
        for step in range(self._start, self._sampler.steps):
            yield self._sampler.batch(step, self._rank, self._world)
