"""Batches over concurrent requests: whatever waits is taken as soon as the graph is free.

So an idle service adds no delay, and a busy one works in full batches. Requests take turns, in the order in which they
came, and a turn is half a batch at most while others wait: a visit of thousands of lesions doesn't hold up a single
picture. How long a new request would have to wait is known from what lies before it and from how fast the graph has
been; who would wait too long is refused at once.

There is one thread more than the graph can use: it tells those who asked while the next batch already runs. And who
comes with `here` while the graph is free runs the batch itself, for waking another thread costs time and CPU.
"""

from __future__ import annotations

import math
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
    failure: BaseException | None = None


CALL = 0.06
"""Seconds that a call should take at most: whoever comes next waits for it to end."""
NOTHING: tuple[int, list[tuple[_Job, slice]]] = 0, []


class Batcher:
    """Pixels of any number of lesions in, their logits out, from any thread."""

    def __init__(
        self,
        graph: Runs,
        models: int,
        batch: int,
        told: Callable[[int, float], None] | None = None,
        *,
        least: int | None = None,
    ) -> None:
        """`graph` takes up to `batch` lesions at a time; `told` hears of each batch: lesions, seconds.

        So few as `least` aren't spread over several calls that could run at one time, nor over several one after the
        other so that each takes no longer than `CALL`; by default no batch is.
        """
        self._graph, self._models, self.parallel = graph, models, graph.parallel
        self.batch = max(1, batch)
        self._turn = max(1, self.batch // 2)
        self._least = self.batch if least is None else least
        self._told = told
        self._jobs: deque[_Job] = deque()
        self._running: dict[int, tuple[float, int]] = {}
        """Batches that the graph works on, by a number of their own: since when, and how many lesions."""
        self._number = 0
        self._ended: deque[list[_Job]] = deque()
        """Jobs, by batch, whose askers are still to be told."""
        self._change = threading.Condition()
        self._closed = False
        self.seconds = 0.0
        """Per lesion, as of late; 0 before the first."""
        many = graph.parallel + 1
        self._threads = [threading.Thread(target=self._work, daemon=True, name="graph") for _ in range(many)]
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
            # Requests take turns, so of each only about as many lesions come first as there are to come.
            ahead = sum(min(len(job.pixels) - job.done, max(count, self.batch)) for job in self._jobs)
        return self.seconds * ahead / self.parallel

    def soon(self, count: int) -> float:
        """The same if `count` lesions would take turns with all the others, less what the graph has done by now."""
        with self._change:
            ahead = sum(min(len(job.pixels) - job.done, count) for job in self._jobs)
            done = sum(many for _, many in self._running.values()) - self._unfinished()
        return self.seconds * max(ahead - done, 0.0) / self.parallel

    def give(self, pixels: Pixels, *, here: bool = False) -> Future[tuple[Floats, Floats]]:
        """uint8 [B, S, S, 3] to a future of (`fold_logits` [B, K], `logit` [B]).

        With `here` the caller's thread works on the next batch if the graph is free, and returns once that is done.
        """
        count = len(pixels)
        job = _Job(pixels, np.empty((count, self._models), np.float32), np.empty(count, np.float32), Future())
        if not count:
            job.future.set_result((job.fold_logits, job.logit))
            return job.future
        with self._change:
            if self._closed:
                raise RuntimeError("the batcher is closed")
            self._jobs.append(job)
            number, pieces = self._deal() if here else NOTHING
            if not pieces and len(self._running) < self.parallel:
                self._change.notify()
        if pieces:
            ended = self._run(number, pieces)
            with self._change:
                if any(one.given < len(one.pixels) for one in self._jobs):
                    self._change.notify()
            self._tell(ended)
        return job.future

    def close(self) -> None:
        """Finish what was given, then end the threads."""
        with self._change:
            self._closed = True
            self._change.notify_all()
        for thread in self._threads:
            thread.join()

    def _deal(self) -> tuple[int, list[tuple[_Job, slice]]]:
        """The next batch and its number, a share of each job that waits; empty if none does or the graph is busy.

        Under the lock.
        """
        for job in [job for job in self._jobs if job.future.cancelled()]:
            job.failed, job.given = True, len(job.pixels)  # Who asked has left: nobody waits for the answer.
            self._jobs.remove(job)
        ready = [job for job in self._jobs if job.given < len(job.pixels)]
        if not ready or len(self._running) == self.parallel:
            return NOTHING
        left = sum(len(job.pixels) - job.given for job in ready)
        # Calls that run at one time share what there is to do, or one would still work when the others are done.
        share = math.ceil((left + self._unfinished()) / self.parallel)
        if self.seconds:
            share = min(share, round(CALL / self.seconds))
        pieces, room = [], min(self.batch, max(self._least, share))
        for position, job in enumerate(ready):
            # A small one as a whole: if all were done a little at a time, all would be late.
            count = min(max(self._turn, room // (len(ready) - position)), len(job.pixels) - job.given, room)
            pieces.append((job, slice(job.given, job.given + count)))
            job.given += count
            room -= count
            if not room:
                break
        self._jobs.rotate(-1)
        if left > self._count(pieces) and len(self._running) + 1 < self.parallel:
            self._change.notify()  # There is more, and the graph can take it.
        self._number += 1
        self._running[self._number] = time.perf_counter(), self._count(pieces)
        return self._number, pieces

    def _unfinished(self) -> float:
        """Lesions that the graph works on and can't have done yet, as far as can be known. Under the lock."""
        now = time.perf_counter()
        return sum(
            max(many - (now - since) / (self.seconds or math.inf), 0.0) for since, many in self._running.values()
        )

    @staticmethod
    def _count(pieces: list[tuple[_Job, slice]]) -> int:
        return sum(rows.stop - rows.start for _, rows in pieces)

    def _work(self) -> None:
        ended: list[_Job] = []
        while True:
            with self._change:
                while not (dealt := self._deal())[1] and not ended:
                    if self._ended:
                        ended = self._ended.popleft()
                    elif self._closed and not self._jobs:
                        return
                    else:
                        self._change.wait()
                number, pieces = dealt
                if pieces and ended:
                    # The graph comes first; another thread tells them.
                    self._ended.append(ended)
                    self._change.notify()
            if pieces:
                ended = self._run(number, pieces)
            else:
                self._tell(ended)
                ended = []

    def _run(self, number: int, pieces: list[tuple[_Job, slice]]) -> list[_Job]:
        """Have the graph work on a batch; the jobs that are done with it."""
        pixels = [job.pixels[rows] for job, rows in pieces]
        found, failure, started = None, None, time.perf_counter()
        try:
            found = self._graph.logits(pixels[0] if len(pixels) == 1 else np.concatenate(pixels))
        except BaseException as error:
            failure = error
        else:
            count, seconds = len(found[1]), time.perf_counter() - started
            self.seconds = MEMORY * self.seconds + (1 - MEMORY) * seconds / count if self.seconds else seconds / count
            if self._told:
                self._told(count, seconds)
            at = 0
            for job, rows in pieces:
                end = at + rows.stop - rows.start
                job.fold_logits[rows], job.logit[rows] = found[0][at:end], found[1][at:end]
                at = end
        ended = []
        with self._change:
            del self._running[number]
            for job, rows in pieces:
                if job.failed:
                    continue  # Another thread's piece of it was the one that failed, or who asked has left.
                if failure is not None:
                    job.failed, job.failure, job.given = True, failure, len(job.pixels)
                else:
                    job.done += rows.stop - rows.start
                if job.failed or job.done == len(job.pixels):
                    self._jobs.remove(job)
                    ended.append(job)
            if self._closed:
                self._change.notify_all()
        return ended

    def _tell(self, ended: list[_Job]) -> None:
        for job in ended:
            # Who asked may have left just now; from here on nobody can, and a future that was cancelled takes nothing.
            if not job.future.set_running_or_notify_cancel():
                continue
            if job.failure is None:
                job.future.set_result((job.fold_logits, job.logit))
            else:
                job.future.set_exception(job.failure)
