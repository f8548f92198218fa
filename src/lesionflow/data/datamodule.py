"""From the store to batches: what training and scoring iterate over."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lesionflow.data.images import Pixels, PreprocessSpec, to_pixels
from lesionflow.data.sampler import Draw, Sampler, StepSampler
from lesionflow.data.store import Store
from lesionflow.errors import DataError, ImageError


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

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        return Batch(*(t.to(device, non_blocking=non_blocking) for t in self._tensors()))

    def pin_memory(self) -> Batch:
        return Batch(*(t.pin_memory() for t in self._tensors()))

    def _tensors(self) -> tuple[Tensor, ...]:
        return self.image, self.target, self.randoms, self.row


class Lesions(Dataset[tuple[Pixels, Draw]]):
    """Decodes drawn lesions; safe to pickle into workers, each of which maps the store anew."""

    def __init__(self, store: Store, spec: PreprocessSpec) -> None:
        self.store, self.spec = store, spec

    def __getitem__(self, draw: Draw) -> tuple[Pixels, Draw]:
        return pixels(self.store, draw.row, self.spec), draw

    def collate(self, drawn: list[tuple[Pixels, Draw]]) -> Batch:
        rows = np.array([d.row for _, d in drawn])
        return Batch(
            torch.from_numpy(np.stack([p for p, _ in drawn])),
            torch.from_numpy(self.store.targets[rows].astype(np.float32)),
            torch.from_numpy(np.stack([d.randoms for _, d in drawn])),
            torch.from_numpy(rows),
        )


def pixels(store: Store, row: int, spec: PreprocessSpec) -> Pixels:
    """One stored lesion as uint8 [S, S, 3]; raises `DataError` naming its id if it can't be decoded."""
    try:
        return to_pixels(store.jpeg(row), spec)
    except ImageError as error:
        raise DataError(
            f"image {store.ids[row]}: {error}; or leave such images out (--set image.skip_corrupt=true)"
        ) from None


def batches(store: Store, rows: Sequence[int] | NDArray[np.int64], spec: PreprocessSpec, size: int) -> Iterator[Tensor]:
    """Rows in order as uint8 [<=size, S, S, 3] batches."""
    for start in range(0, len(rows), size):
        chosen = [int(r) for r in rows[start : start + size]]
        yield torch.from_numpy(np.stack([pixels(store, row, spec) for row in chosen]))


class LesionData(L.LightningDataModule):
    """The training loader of one fold, from any step on, for this rank."""

    def __init__(
        self, store: Store, spec: PreprocessSpec, sampler: Sampler, *, start: int = 0, workers: int = 0
    ) -> None:
        super().__init__()
        self.lesions = Lesions(store, spec)
        self.sampler, self.start, self.workers = sampler, start, workers

    def train_dataloader(self) -> DataLoader[tuple[Pixels, Draw]]:
        trainer = self.trainer
        assert trainer is not None
        steps = StepSampler(self.sampler, self.start, trainer.global_rank, trainer.world_size)
        return DataLoader(
            self.lesions,
            batch_sampler=steps,
            collate_fn=self.lesions.collate,
            num_workers=self.workers,
            pin_memory=trainer.strategy.root_device.type == "cuda",
            # Workers start clean: a forked one would share the parent's threads and locks.
            multiprocessing_context="spawn" if self.workers else None,
            persistent_workers=False,
        )
