"""Batches for Lightning: the training loader of one fold."""

from __future__ import annotations

import lightning as L
import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from lesionflow.data.images import PreprocessSpec
from lesionflow.data.lesions import Batch, Lesions, as_it_is
from lesionflow.data.pixelcache import PixelCache
from lesionflow.data.sampler import Sampler, StepSampler
from lesionflow.data.store import Store


class LesionData(L.LightningDataModule):
    """The training loader of one fold, from any step on, for this rank."""

    def __init__(
        self,
        store: Store,
        spec: PreprocessSpec,
        sampler: Sampler,
        *,
        start: int = 0,
        workers: int = 0,
        cache: PixelCache | None = None,
        kinds: NDArray[np.int16] | None = None,
    ) -> None:
        super().__init__()
        self.lesions = Lesions(store, spec, cache, kinds)
        self.sampler, self.start, self.workers = sampler, start, workers

    def train_dataloader(self) -> DataLoader[Batch]:
        trainer = self.trainer
        assert trainer is not None
        steps = StepSampler(self.sampler, self.start, trainer.global_rank, trainer.world_size)
        return DataLoader(
            self.lesions,
            sampler=steps,
            batch_size=None,  # An item is a batch.
            collate_fn=as_it_is,
            num_workers=self.workers,
            pin_memory=trainer.strategy.root_device.type == "cuda",
            # Workers start clean: a forked one would share the parent's threads and locks.
            multiprocessing_context="spawn" if self.workers else None,
            persistent_workers=False,
        )
