"""From the store to batches: what training and scoring iterate over. Without Lightning, for the loader's workers."""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from lesionflow.data.diagnosis import UNKNOWN
from lesionflow.data.images import Pixels, PreprocessSpec
from lesionflow.data.pixelcache import PixelCache, pixels
from lesionflow.data.rows import Rows
from lesionflow.data.sampler import Draws
from lesionflow.data.store import Store

__all__ = ["Batch", "Lesions", "as_it_is", "gather", "pixels"]


@dataclass
class Batch:
    """One rank's part of a step."""

    image: Tensor
    """uint8 [b, S, S, 3]."""
    target: Tensor
    """float32 [b], 0 or 1."""
    randoms: Tensor
    """float32 [b, DRAWS], what augmentation draws from."""
    row: Tensor
    """int64 [b], rows of the store."""
    kind: Tensor
    """int64 [b], the kind of diagnosis, -1 where it is unknown or nobody asked (`data.diagnosis`)."""

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        return Batch(*(t.to(device, non_blocking=non_blocking) for t in self._tensors()))

    def pin_memory(self) -> Batch:
        return Batch(*(t.pin_memory() for t in self._tensors()))

    def __getstate__(self) -> tuple[Tensor | NDArray[Any], ...]:
        # On the way out of a loader's worker a tensor costs a file and a message of its own: only pixels are worth it.
        image, *small = self._tensors()
        return image, *(t.numpy() for t in small)

    def __setstate__(self, state: tuple[Tensor | NDArray[Any], ...]) -> None:
        self.image, self.target, self.randoms, self.row, self.kind = map(torch.as_tensor, state)

    def _tensors(self) -> tuple[Tensor, ...]:
        return self.image, self.target, self.randoms, self.row, self.kind


class Lesions(Dataset[Batch]):
    """Drawn lesions as whole batches, decoded or from the cache; safe to pickle into workers, which map files anew."""

    def __init__(
        self,
        store: Store,
        spec: PreprocessSpec,
        cache: PixelCache | None = None,
        kinds: NDArray[np.int16] | None = None,
    ) -> None:
        self.store, self.spec, self.cache, self.kinds = store, spec, cache, kinds
        # Read here: a forked worker that asked the table first would wait for threads that only the parent has.
        self.targets = store.targets

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, draws: Draws) -> Batch:
        """All of a batch at once, so that no lesion is copied twice."""
        rows = draws.rows
        return Batch(
            torch.from_numpy(gather(self.store, rows, self.spec, self.cache)),
            torch.from_numpy(self.targets[rows].astype(np.float32)),
            torch.from_numpy(draws.randoms),
            torch.from_numpy(rows),
            torch.from_numpy(np.full(len(rows), UNKNOWN) if self.kinds is None else self.kinds[rows].astype(np.int64)),
        )


def as_it_is(batch: Any) -> Any:
    """For a loader's `collate_fn`: `Lesions` gives whole batches."""
    return batch


def gather(store: Store, rows: Rows, spec: PreprocessSpec, cache: PixelCache | None = None) -> Pixels:
    """Rows [b] as one array uint8 [b, S, S, 3]; raises `DataError` naming a lesion that can't be decoded."""
    batch = _room(len(rows), spec.size)
    if cache is not None:
        cache.take(rows, batch)
        return batch
    for at, row in enumerate(rows.tolist()):
        batch[at] = pixels(store, row, spec)
    return batch


def _room(count: int, size: int) -> Pixels:
    """Memory for a batch, uint8 [count, size, size, 3], that begins where a page does, as the cache does.

    Memory of this size usually begins 16 bytes later, and copying to there takes some processors twice the time.
    """
    length = count * size**2 * 3
    whole = np.empty(length + mmap.PAGESIZE, np.uint8)
    start = -whole.ctypes.data % mmap.PAGESIZE
    return whole[start : start + length].reshape(count, size, size, 3)
