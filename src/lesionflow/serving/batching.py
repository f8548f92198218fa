"""Batches over concurrent requests: whatever waits is taken as soon as the graph is free.

So an idle service adds no delay, and a busy one works in full batches. A batch is dealt out evenly among the requests
that wait: a visit of thousands of lesions doesn't hold up a single picture. How long a new request would have to wait
is known from what lies before it and from how fast the graph has been; who would wait too long is refused at once.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from lesionflow.data.images import Pixels
from lesionflow.serving.graph import Floats

MEMORY = 0.9
"""Weight of what was known of the speed before a batch."""


class Runs(Protocol):
    """A graph, here or elsewhere."""

    parallel: int

    def logits(self, pixels: Pixels) -> tuple[Floats, Floats]: ...


@dataclass(eq=False)
class _Job:
    pixels: Pixels
    fold_logits: Floats
    logit: Floats
    future: Future[tuple[Floats, Floats]]
    given: int = 0
    done: int = 0
    failed: bool = False


class Batcher:
    """Pixels of any number of lesions in, their logits out, from any thread."""

    def __init__(self, graph: Runs, models: int, batch: int, told: Callable[[int, float], None] | None = None) -> None:
        """`graph` takes up to `batch` lesions at a time; `told` hears of each batch: lesions, seconds."""
        self._graph, self._models, self._batch = graph, models, max(1, batch)
        self._told = told
        self._jobs: deque[_Job] = deque()
        self._change = threading.Condition()
        self._closed = False
        self.seconds = 0.0
        """Per lesion, as of late; 0 before the first."""
        self._threads = [threading.Thread(target=self._work, daemon=True, name="graph") for _ in range(graph.parallel)]
        for thread in self._threads:
            thread.start()

    @property
    def waiting(self) -> int:
        """Lesions that have no answer yet."""
        with self._change:
            return sum(len(job.pixels) - job.done for job in self._jobs)

    def wait(self, count: int) -> float:
        """Seconds that `count` more lesions would wait until the graph is free for them, as far as can be known."""
        with self._change:
            # Lesions are dealt out evenly, so of each job only about as many come first as there are to come.
            ahead = sum(min(len(job.pixels) - job.done, max(count, self._batch)) for job in self._jobs)
        return self.seconds * ahead / self._graph.parallel

    def give(self, pixels: Pixels) -> Future[tuple[Floats, Floats]]:
        """uint8 [B, S, S, 3] to a future of (`fold_logits` [B, K], `logit` [B])."""
        count = len(pixels)
        job = _Job(pixels, np.empty((count, self._models), np.float32), np.empty(count, np.float32), Future())
        if not count:
            job.future.set_result((job.fold_logits, job.logit))
            return job.future
        with self._change:
            if self._closed:
                raise RuntimeError("the batcher is closed")
            self._jobs.append(job)
            self._change.notify()
        return job.future

    def close(self) -> None:
        """Finish what was given, then end the threads."""
        with self._change:
            self._closed = True
            self._change.notify_all()
        for thread in self._threads:
            thread.join()

    def _take(self) -> list[tuple[_Job, slice]]:
        """The next batch, a share of each job that waits; empty when closed and done."""
        with self._change:
            self._drop()
            while not (ready := [job for job in self._jobs if job.given < len(job.pixels)]):
                if self._closed:
                    return []
                self._change.wait()
                self._drop()
            pieces, room = [], self._batch
            for position, job in enumerate(ready):
                # What is left of the batch, dealt out among those still to come.
                share = max(1, room // (len(ready) - position))
                count = min(share, len(job.pixels) - job.given, room)
                pieces.append((job, slice(job.given, job.given + count)))
                job.given += count
                room -= count
                if not room:
                    break
            self._jobs.rotate(-1)
            return pieces

    def _drop(self) -> None:
        """Forget jobs whose askers have left: nobody waits for their answers."""
        for job in [job for job in self._jobs if job.future.cancelled()]:
            job.failed, job.given = True, len(job.pixels)
            self._jobs.remove(job)

    def _work(self) -> None:
        while pieces := self._take():
            pixels = [job.pixels[rows] for job, rows in pieces]
            started = time.perf_counter()
            try:
                found = self._graph.logits(pixels[0] if len(pixels) == 1 else np.concatenate(pixels))
            except BaseException as error:
                self._finish(pieces, error)
                continue
            count, seconds = len(found[1]), time.perf_counter() - started
            self.seconds = MEMORY * self.seconds + (1 - MEMORY) * seconds / count if self.seconds else seconds / count
            if self._told:
                self._told(count, seconds)
            at = 0
            for job, rows in pieces:
                end = at + rows.stop - rows.start
                job.fold_logits[rows], job.logit[rows] = found[0][at:end], found[1][at:end]
                at = end
            self._finish(pieces, None)

    def _finish(self, pieces: list[tuple[_Job, slice]], error: BaseException | None) -> None:
        ended = []
        with self._change:
            for job, rows in pieces:
                if job.failed:
                    continue  # Another thread's piece of it was the one that failed.
                if error is not None:
                    job.failed, job.given = True, len(job.pixels)
                else:
                    job.done += rows.stop - rows.start
                if job.failed or job.done == len(job.pixels):
                    self._jobs.remove(job)
                    ended.append(job)
        for job in ended:
            # Who asked may have left just now; from here on nobody can, and a future that was cancelled takes nothing.
            if not job.future.set_running_or_notify_cancel():
                continue
            if error is None:
                job.future.set_result((job.fold_logits, job.logit))
            else:
                job.future.set_exception(error)
