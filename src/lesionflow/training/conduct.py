"""What happens between steps: agreeing to stop, checkpoints, validation, curves and progress.

Lightning runs the steps (device, precision, gradients over ranks); its own checkpoint, signal and
resume paths are not used, because they repeat or lose samples mid-epoch and hang or exit 0 on SIGTERM.
"""

from __future__ import annotations

import contextlib
import csv
import logging
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
import torch.distributed as dist

from lesionflow.data.lesions import Batch
from lesionflow.errors import Preempted, UsageError
from lesionflow.keys import write_json
from lesionflow.models.image import LesionModule
from lesionflow.training import resume
from lesionflow.training.ranks import any_rank, everyone
from lesionflow.training.scoring import Interrupted
from lesionflow.training.status import Progress, write_progress

CURVE_COLUMNS = (
    "fold",
    "model",
    "epoch",
    "step",
    "lesions",
    "loss",
    "lr",
    "images_per_second",
    "pauc",
    "auc",
    "pauc_error",
)

Validate = Callable[[LesionModule], dict[str, float]]

logger = logging.getLogger(__name__)


class Stop:
    """Whether this process was asked to stop (SIGTERM, or Ctrl-C once; the second one ends it at once)."""

    def __init__(self) -> None:
        self.asked = False

    def listen(self) -> None:
        """Take the signals. Lightning puts handlers of its own in place, so this is called again after it."""
        with contextlib.suppress(ValueError):  # Not the main thread: whoever is there decides.
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._ask)

    def _ask(self, signum: int, frame: FrameType | None) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    @classmethod
    @contextlib.contextmanager
    def listening(cls) -> Iterator[Stop]:
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        stop = cls()
        stop.listen()
        try:
            yield stop
        finally:
            with contextlib.suppress(ValueError):
                for number, handler in before.items():
                    signal.signal(number, handler)


class Conductor(L.Callback):
    """Runs after every step on every rank; writes on rank 0 only."""

    def __init__(
        self,
        out: Path,
        events: Path,
        *,
        fold: int,
        model: int,
        identity: str,
        state: dict[str, Any] | None,
        validate: Validate,
        stop: Stop,
        names: Sequence[str],
        show: Callable[[Progress], None] | None = None,
    ) -> None:
        self.out, self.events, self.fold, self.model = out, events, fold, model
        self.identity, self.validate, self.stop, self.show = identity, validate, stop, show
        self.names = names
        """Of the store's rows."""
        self.preempted = False
        self.saved = int(state["step"]) if state else 0
        """The step of the newest checkpoint that was written or read here."""
        self._state = state
        self._losses: list[torch.Tensor] = []
        self._shown = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        module = _lesion_module(pl_module)
        if self._state is not None:
            trainer.optimizers[0].load_state_dict(self._state["optimizer"])
            self._state = None
        if len(at := everyone(module.step)) > 1:
            steps = ", ".join(map(str, sorted(at)))
            raise Preempted(
                f"fold {self.fold}: the processes found different checkpoints (of steps {steps}): see that all have "
                "the same volume, and start again"
            )
        # In place of Lightning's own handler, which broadcasts from inside the signal and so deadlocks.
        self.stop.listen()
        if trainer.is_global_zero:
            from torch.utils.tensorboard import SummaryWriter  # Takes a while to load, and the other ranks don't write.

            self.out.mkdir(parents=True, exist_ok=True)
            self._writer = SummaryWriter(str(self.events), purge_step=module.step)
        self._started, self._first = time.monotonic(), module.step
        self._saved_at, self._save_seconds = self._started, 0.0
        self._per_epoch = module.sampler.steps_per_epoch
        self._every = 1 if trainer.strategy.root_device.type == "cpu" else 10  # A look at the loss waits for the GPU.

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        module = _lesion_module(pl_module)
        module.advance()
        self._losses.append(outputs["loss"].detach())
        options, step = module.recipe.training, module.step
        last = step == module.sampler.steps
        boundary = last or self._is_time(step, options.checkpoint_every)
        look = bool(options.validate_every) and (last or self._is_time(step, options.validate_every))
        if not (boundary or look or step % self._every == 0):
            return
        loss, stop, due = self._agree(trainer, module, boundary)
        figures: dict[str, float] = {}
        if stop or last or due:
            self._save(trainer, module)
        if look and not stop:
            try:
                figures = self.validate(module)
            except Interrupted:
                stop = True
                self._save(trainer, module)
        self._record(trainer, module, loss, figures)
        if stop and not last:
            self.preempted = True
            trainer.should_stop = True

    def _is_time(self, step: int, epochs: float) -> bool:
        """Whether a step is the last of so many epochs."""
        return step % max(1, round(epochs * self._per_epoch)) == 0

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            self._writer.close()

    def _save(self, trainer: L.Trainer, module: LesionModule) -> None:
        """A checkpoint, on rank 0; one that can't be written leaves those before it, and training goes on."""
        if module.step == self.saved:
            return
        failed, began = False, time.monotonic()
        if trainer.is_global_zero:
            try:
                resume.save(self.out, module, trainer.optimizers[0], self.identity)
            except OSError as error:
                failed = True
                logger.warning(
                    "%s: step %d can't be saved (%s): free some space; the last checkpoint is of %s",
                    self.out, module.step, error.strerror, f"step {self.saved}" if self.saved else "an earlier start",
                )  # fmt: skip
        if not any_rank(failed):
            self.saved = module.step
        self._saved_at = time.monotonic()
        self._save_seconds = self._saved_at - began

    def _agree(self, trainer: L.Trainer, module: LesionModule, boundary: bool) -> tuple[float, bool, bool]:
        """Mean loss since the last look, whether any rank was asked to stop, and whether a checkpoint is due.

        The same on all ranks. Of the clocks only rank 0's counts; at a `boundary` a checkpoint is due if it is cheap.
        """
        losses = torch.stack(self._losses)
        loss = losses.mean()
        self._losses.clear()
        options, since = module.recipe.training, time.monotonic() - self._saved_at
        cheap = self._save_seconds <= options.checkpoint_cost * since
        wants = trainer.is_global_zero and ((boundary and cheap) or since >= 60 * options.checkpoint_minutes)
        shared = torch.stack([loss, loss.new_tensor(float(self.stop.asked)), loss.new_tensor(float(wants))])
        if trainer.world_size > 1:
            dist.all_reduce(shared)
        total, asked, due = shared.tolist()
        if total != total or abs(total) == float("inf"):
            step, path = self._tell_batch(trainer, module, losses)
            raise UsageError(
                f"fold {self.fold}: the loss is not finite at step {step}, see the batch's lesions in {path}; lower "
                "optimizer.lr, raise optimizer.warmup or set optimizer.clip"
            )
        return total / trainer.world_size, asked > 0, due > 0

    def _tell_batch(self, trainer: L.Trainer, module: LesionModule, losses: torch.Tensor) -> tuple[int, Path]:
        """Write the lesions of the first step whose loss is not finite on any rank; returns that step and the file."""
        bad = [at for at, loss in enumerate(losses.tolist()) if not math.isfinite(loss)]
        step = module.step - len(losses) + min(everyone(min(bad, default=len(losses) - 1)))
        path = self.out / "not-finite.json"
        if trainer.is_global_zero:
            lesions = [self.names[row] for row in module.sampler.batch(step).rows]
            write_json(path, {"fold": self.fold, "model": self.model, "step": step + 1, "isic_ids": lesions})
        return step + 1, path

    def _record(self, trainer: L.Trainer, module: LesionModule, loss: float, figures: dict[str, float]) -> None:
        if not trainer.is_global_zero:
            return
        now, steps = time.monotonic(), module.sampler.steps
        done = module.step - self._first
        seconds = max(now - self._started, 1e-9)
        speed = done * module.sampler.lesions_per_epoch / module.sampler.steps_per_epoch / seconds
        row = {
            "fold": self.fold,
            "model": self.model,
            "epoch": round(module.step / module.sampler.steps_per_epoch, 4),
            "step": module.step,
            "lesions": round(module.step * module.sampler.lesions_per_epoch / module.sampler.steps_per_epoch),
            "loss": round(loss, 6),
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
            "images_per_second": round(speed, 1),
            **figures,
        }
        with contextlib.suppress(OSError):  # Curves are not worth a training: a full disk may have room again later.
            _append(self.out / "metrics.csv", row)
            for name in ("loss", "lr", "images_per_second", *figures):
                self._writer.add_scalar(name, row[name], module.step)
        if now - self._shown > 1 or module.step == steps:
            self._shown = now
            remaining = (steps - module.step) * seconds / done
            progress = Progress(self.fold, self.model, module.step, steps, loss, speed, remaining)
            write_progress(self.out.parent / "progress.json", progress)
            if self.show:
                self.show(progress)


def _lesion_module(module: L.LightningModule) -> LesionModule:
    assert isinstance(module, LesionModule)
    return module


def _append(path: Path, row: dict[str, Any]) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, CURVE_COLUMNS)
        if new:
            writer.writeheader()
        writer.writerow(row)
