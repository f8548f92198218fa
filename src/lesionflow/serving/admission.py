"""Who is let in: what waits and is held now, and whether one more request would wait too long."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lesionflow.serving.batching import MEMORY, Batcher
from lesionflow.serving.protocol import RequestError, ServiceLimits

if TYPE_CHECKING:
    from starlette.requests import Request

PATIENCE = 0.75
"""How long a request may wait while too many come, of the time that one alone takes."""


class Admission:
    """The counts that limits are held against, and the limits."""

    def __init__(self, limits: ServiceLimits, batcher: Batcher, decoders: int) -> None:
        """`decoders`: threads that decode at one time."""
        self.limits, self._batcher, self._decoders = limits, batcher, decoders
        self.lock = threading.Lock()
        """For the counts that threads change."""
        self.pending = self.held = self.decoding = 0
        """Requests that were received, bytes held of all, and requests whose pictures the graph hasn't got yet."""
        self._queued = 0
        """Pixels that wait to be decoded."""
        self._decoded, self._decoding_took = 1.0, 0.0
        """Pixels that were, as of late, and the seconds that it took: one large picture tells more than many small."""
        self._size, self._alone = 1.0, 0.0
        """Lesions that a request means, at most a batch, and seconds that an inference alone takes, as of late."""
        self._waiting = self._done = 0.0
        """Lesions of those who were let in, and of those who have left since `_refused` was counted."""
        self._refused = self._asked = self._counted = 0.0
        """Lesions that would wait too if nobody had been refused; all that would, by how fast the graph has been; and
        when both were counted."""

    @contextmanager
    def admitted(self) -> Iterator[Place]:
        """A request's place among those that have begun. Raises `RequestError` where there is none."""
        size = self._size
        self._ask(size)
        try:
            self.check_room()
            self._check_wait()
        except RequestError:
            # It may be twice a burst, so that it takes no longer than that to forget.
            self._refused = min(self._refused + size, 2.0 * self.limits.burst)
            raise
        place = Place(self, size)
        self._waiting += size
        try:
            yield place
        finally:
            self._waiting -= place.lesions
            if place.works:
                self._done += place.lesions
            else:
                # Nothing that the model could do came of it, and less is to be expected of the next one.
                self._asked = max(self._asked - place.lesions, 0.0)
                self._size *= MEMORY
            self.pending -= place.waits
            self.held -= place.bytes
            place.decoded()

    def check_room(self) -> None:
        """Raise `RequestError` if as many requests wait as may."""
        if self.pending >= self.limits.requests:
            raise self._busy(f"{self.pending} requests are waiting", "requests")

    def _check_wait(self) -> None:
        """Raise `RequestError` if so much waits that another request would wait too long."""
        batcher, decoding = self._batcher, self._queued * self._decoding_took / self._decoded / self._decoders
        # Of those that are being decoded at least one lesion each will come first.
        if (wait := batcher.wait(1) + batcher.seconds * self.decoding + decoding) > self.limits.wait:
            raise self._busy(f"about {wait:.1f} s of work are waiting", "wait")
        # A queue helps over a burst. If more comes than can be answered, it only makes everybody wait.
        if min(self._asked, self._waiting + self._refused + self._size) > self.limits.burst:
            each = batcher.seconds * self._size / batcher.parallel
            wait = batcher.soon(max(1, round(self._size))) + each * self.decoding + decoding
            if wait > PATIENCE * (self._alone or each):
                raise self._busy("more is asked than can be answered", "wait")

    def _ask(self, lesions: float) -> None:
        """So many lesions more are asked for; meanwhile others have been answered, or could have been."""
        now = time.perf_counter()
        if self._batcher.seconds:
            could = (now - self._counted) * self._batcher.parallel / self._batcher.seconds
            self._asked = max(self._asked - could, 0.0)
            self._refused = max(self._refused - max(could - self._done, 0.0), 0.0)
        self._asked = min(self._asked + lesions, 2.0 * self.limits.burst)
        self._counted, self._done = now, 0.0

    def sized(self, lesions: int, expected: float) -> float:
        """An inference request has so many lesions; what it counts for, as requests take turns a batch at most."""
        counts = min(lesions, self._batcher.batch)
        self._waiting += counts - expected
        self._asked += counts - expected
        self._size += (1 - MEMORY) * (counts - self._size)
        return counts

    def took(self, seconds: float) -> None:
        """A request that was alone took so long."""
        self._alone = MEMORY * self._alone + (1 - MEMORY) * seconds if self._alone else seconds

    def queue(self, area: int) -> None:
        """So many pixels more wait to be decoded. From any thread."""
        with self.lock:
            self._queued += area

    def decoded(self, area: int, seconds: float) -> None:
        """So many pixels took so long to decode."""
        with self.lock:
            self._decoded = MEMORY * self._decoded + area
            self._decoding_took = MEMORY * self._decoding_took + seconds

    def _busy(self, why: str, limit: str) -> RequestError:
        return RequestError(f"busy, {why}: try again later", status=503, limit=limit, retry=self._batcher.wait(1))


class Place:
    """A request that has begun, and what its body takes."""

    def __init__(self, admission: Admission, lesions: float) -> None:
        """`lesions`: as many as a request usually has."""
        self.admission, self.bytes, self._decoding, self.waits = admission, 0, False, False
        self.lesions, self.works = lesions, False
        """What it counts for, and whether the model gets anything of it."""
        self._alone: float | None = None
        """When the body was there, if nobody else's was."""

    def received(self) -> None:
        """The body is there, so it waits for the model now: who sends slowly takes nobody's place.

        Raises `RequestError` if too many wait already.
        """
        admission = self.admission
        admission.check_room()
        if not admission.pending:
            self._alone = time.perf_counter()
        with admission.lock:
            admission.decoding += 1
        admission.pending += 1
        self._decoding = self.waits = True

    def has(self, lesions: int) -> None:
        """It turned out to be an inference request of so many lesions."""
        self.lesions, self.works = self.admission.sized(lesions, self.lesions), True

    def answered(self) -> None:
        """The request took as long as one takes, if it still is alone."""
        if self._alone is not None and self.admission.pending == 1:
            self.admission.took(time.perf_counter() - self._alone)

    def decoded(self) -> None:
        """The graph has its pictures, or never will. From any thread."""
        with self.admission.lock:
            self.admission.decoding -= self._decoding
            self._decoding = False

    def hold(self, count: int) -> None:
        """Raise `RequestError` if so many bytes more are too much beside all other requests'."""
        self.bytes += count
        self.admission.held += count
        if self.admission.held > self.admission.limits.memory:
            raise RequestError("busy: too much is being received at one time", status=503, limit="memory", retry=1)


async def read_body(request: Request, place: Place, limit: int, name: str) -> bytes:
    """The body, refused as soon as it is known to be larger than `limit` (called `name`), or too much beside others."""
    if request.headers.get("content-encoding", "identity") != "identity":
        raise RequestError("compressed bodies aren't read: send it plain, images are compressed already", status=415)
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced[:20]) > limit:
        raise _too_large(limit, name)
    chunks = list[bytes]()
    async for chunk in request.stream():
        place.hold(len(chunk))
        if place.bytes > limit:
            raise _too_large(limit, name)
        chunks.append(chunk)
    place.received()
    return b"".join(chunks)


def _too_large(limit: int, name: str) -> RequestError:
    return RequestError(
        f"the body is larger than the limit of {limit:,} bytes: send fewer images at a time", status=413, limit=name
    )
