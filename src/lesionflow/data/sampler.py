"""Which lesions each optimiser step sees: one global order, f(seed, epoch), of which a rank takes its slice.

Nothing here has state. Any process that knows the seed and the step knows the batch, so a run can
be resumed at any step, by any number of processes, and still show every drawn lesion exactly once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from lesionflow.recipe import Sampling

DRAWS = 10
"""Random numbers that augmentation may use for one drawn lesion."""


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

    `rows` int64 [n] are the store rows that may be drawn, `targets` int8 [n] their labels. With
    `balanced` sampling an epoch shows every malignant lesion once and `negatives` times as many
    others; those come from seeded passes over all negatives, so none repeats before all were seen.
    """

    def __init__(
        self,
        rows: NDArray[np.int64],
        targets: NDArray[np.int8],
        sampling: Sampling,
        *,
        epochs: int,
        batch_size: int,
        seed: int,
    ) -> None:
        self.epochs = epochs
        self.seed = seed
        self._rows = np.sort(rows)
        sorted_targets = targets[np.argsort(rows)]
        self._malignant = self._rows[sorted_targets == 1]
        self._others = self._rows[sorted_targets != 1]
        self._balanced = sampling.kind == "balanced"
        # Enough negatives to fill the last batch: no step is smaller than the others.
        wanted = len(self._malignant) * (1 + sampling.negatives)
        self._drawn = min(math.ceil(wanted / batch_size) * batch_size, len(rows)) if self._balanced else len(rows)
        self.steps_per_epoch = max(1, math.ceil(self._drawn / batch_size))
        self.steps = self.steps_per_epoch * epochs

    @property
    def lesions_per_epoch(self) -> int:
        return self._drawn

    def order(self, epoch: int) -> NDArray[np.int64]:
        """The store rows of one epoch in the order they are shown, int64 [lesions_per_epoch]."""
        rows = np.concatenate([self._malignant, self._negatives(epoch)]) if self._balanced else self._rows
        return np.random.default_rng([self.seed, epoch, 1]).permutation(rows)

    def _negatives(self, epoch: int) -> NDArray[np.int64]:
        """This epoch's stretch of the endless sequence of shuffled passes over the negatives."""
        count, total = self._drawn - len(self._malignant), len(self._others)
        start = epoch * count
        taken: list[NDArray[np.int64]] = []
        while count > 0:
            number, at = divmod(start, total)
            piece = np.random.default_rng([self.seed, number, 2]).permutation(self._others)[at : at + count]
            taken.append(piece)
            start, count = start + len(piece), count - len(piece)
        return np.concatenate(taken) if taken else self._others[:0]

    @lru_cache(maxsize=2)  # noqa: B019 - one sampler lives as long as its training
    def _epoch(self, epoch: int) -> tuple[list[NDArray[np.int64]], list[NDArray[np.float32]]]:
        order = self.order(epoch)
        randoms = np.random.default_rng([self.seed, epoch, 3]).random((len(order), DRAWS), np.float32)
        # Near-equal parts instead of a small last one, which would be noisy and could starve a rank.
        return np.array_split(order, self.steps_per_epoch), np.array_split(randoms, self.steps_per_epoch)

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Draws:
        """What rank `rank` of `world` shows at a global step; the ranks' slices together are the batch."""
        epoch, at = divmod(step, self.steps_per_epoch)
        orders, randoms = self._epoch(epoch)
        # Copies: nothing that is done to a batch may reach the epoch's order, which is kept.
        return Draws(orders[at][rank::world].copy(), randoms[at][rank::world].copy())

    def batch_size(self, step: int) -> int:
        """Lesions of a global step over all ranks."""
        drawn, steps = self._drawn, self.steps_per_epoch
        return drawn // steps + (step % steps < drawn % steps)


class StepSampler:
    """The batches of one rank from step `start` to the end; what a DataLoader takes as `sampler`."""

    def __init__(self, sampler: Sampler, start: int, rank: int, world: int) -> None:
        self._sampler, self._start, self._rank, self._world = sampler, start, rank, world

    def __len__(self) -> int:
        return self._sampler.steps - self._start

    def __iter__(self) -> Iterator[Draws]:
        for step in range(self._start, self._sampler.steps):
            yield self._sampler.batch(step, self._rank, self._world)
