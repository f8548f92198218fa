"""What the service's addresses share: a predictor, its limits, its batches, and whether it may be asked."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from lesionflow.data.images import Pixels, check_limits, inspect, to_pixels
from lesionflow.errors import ImageError, LesionflowError
from lesionflow.serving.access import log
from lesionflow.serving.batching import MEMORY, Batcher
from lesionflow.serving.graph import TOGETHER, Floats, Graph, available_cpus, lesions
from lesionflow.serving.predictor import Answer, Predictor
from lesionflow.serving.protocol import InferRequest, RequestError, ServiceLimits, parse

if TYPE_CHECKING:
    from types import TracebackType

    from starlette.requests import Request

    from lesionflow.serving.drift import Drift
    from lesionflow.serving.inputs import Doubles
    from lesionflow.serving.visit import Visits

VERSION = "1"
SMALL = 16_384
"""Bytes of a body that is read at once: less work than handing it to a thread."""
PIECE = 64
"""Pictures decoded before the graph gets them: it works on these while the next are decoded."""
PIECE_PIXELS = 4_000_000
"""Pixels decoded at a time, unless one picture has more: nobody waits long behind another's large photographs."""
PATIENCE = 0.5
"""How long a request may wait while too many come, of the time that one alone takes."""
PICTURE = 10_000
"""Pixels that a picture takes the time of beside its own."""


class Place:
    """A request that has begun, and what its body takes."""

    def __init__(self, service: Service) -> None:
        self.service, self.bytes, self._decoding, self.waits = service, 0, False, False
        self._alone: float | None = None
        """When the body was there, if nobody else's was."""

    def received(self) -> None:
        """The body is there, so it waits for the model now: who sends slowly takes nobody's place.

        Raises `RequestError` if too many wait already.
        """
        service = self.service
        service.check_room()
        if not service.pending:
            self._alone = time.perf_counter()
        with service.lock:
            service.decoding += 1
        service.pending += 1
        self._decoding = self.waits = True

    def answered(self) -> None:
        """The request took as long as one takes, if it still is alone."""
        if self._alone is not None and self.service.pending == 1:
            self.service.took(time.perf_counter() - self._alone)

    def decoded(self) -> None:
        """The graph has its pictures, or never will. From any thread."""
        with self.service.lock:
            self.service.decoding -= self._decoding
            self._decoding = False

    def hold(self, count: int) -> None:
        """Raise `RequestError` if so many bytes more are too much beside all other requests'."""
        self.bytes += count
        self.service.held += count
        if self.service.held > self.service.limits.memory:
            raise RequestError("busy: too much is being received at one time", status=503, limit="memory", retry=1)


class _Mail:
    """Outcomes from any thread to those who await them on an event loop, which is woken once for all that are there."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._sent: deque[tuple[asyncio.Future[Any], Any, BaseException | None]] = deque()
        self._called = False

    def send(self, waiter: asyncio.Future[Any], result: Any, error: BaseException | None = None) -> None:
        self._sent.append((waiter, result, error))
        if not self._called:
            self._called = True
            with contextlib.suppress(RuntimeError):  # The loop has ended, and with it whoever waited.
                self.loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._called = False  # First, so that what is sent from here on calls again.
        while self._sent:
            waiter, result, error = self._sent.popleft()
            if waiter.done():
                continue  # Who waited has left.
            if error is None:
                waiter.set_result(result)
            else:
                waiter.set_exception(error)


class _Asked:
    """A request's pictures on their way to answers: one thread decodes them, and runs the graph too if it is free."""

    def __init__(self, service: Service, place: Place, mail: _Mail) -> None:
        self._service, self._place, self._mail = service, place, mail
        self.waiter: asyncio.Future[list[Answer]] = mail.loop.create_future()
        self.waiter.add_done_callback(self._left)
        self._future: Future[tuple[Floats, Floats]] | None = None

    def decode(self, images: Sequence[bytes], area: int) -> None:
        """From the pictures to the end; `area` as the service counted it."""
        service = self._service
        try:
            pixels = None if self.waiter.cancelled() else service.first_error(images, 0, *service._try(images, area))
        except BaseException as error:
            self._mail.send(self.waiter, None, error)
            return
        finally:
            service.queue(-area)
            self._place.decoded()
        if pixels is not None:
            self.run(pixels)

    def run(self, pixels: Pixels) -> None:
        """From pixels to the end."""
        service = self._service
        try:
            # What the crops look like has nothing to do with the logits, so it doesn't hold up who waits for these.
            seen = service.predictor.look(pixels) if service.looks else None
            self._future = future = service.batcher.give(pixels, here=True)
        except BaseException as error:
            self._mail.send(self.waiter, None, error)
            return
        if self.waiter.cancelled():
            future.cancel()
        future.add_done_callback(lambda done: self._answer(done, pixels, seen))

    def _answer(self, done: Future[tuple[Floats, Floats]], pixels: Pixels, seen: Mapping[str, Doubles] | None) -> None:
        if done.cancelled():
            return
        try:
            self._mail.send(self.waiter, self._service.answer(pixels, *done.result(), seen))
        except BaseException as error:
            self._mail.send(self.waiter, None, error)

    def _left(self, waiter: asyncio.Future[list[Answer]]) -> None:
        if waiter.cancelled() and self._future is not None:
            self._future.cancel()


class _InTime:
    """`asyncio.timeout` that says what to do about it."""

    def __init__(self, service: Service) -> None:
        self._service, self._timeout = service, asyncio.timeout(service.limits.time)

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self._timeout.__aexit__(kind, error, trace)
        except TimeoutError:
            raise RequestError(
                f"not done after {self._service.limits.time:g} s: send fewer images at a time",
                status=503, limit="time", retry=self._service.batcher.wait(1),
            ) from None  # fmt: skip


class Service:
    """A predictor with its limits, and whether it may be asked."""

    def __init__(self, predictor: Predictor, limits: ServiceLimits, name: str | None = None) -> None:
        self.predictor = predictor
        self.visits: Visits | None = None
        """What scores metadata; None where the bundle knows pictures alone."""
        if predictor.bundle.info.get("visit"):
            from lesionflow.serving.visit import Visits

            self.visits = Visits(predictor)
        self.limits = limits
        self.name = name or predictor.bundle.name
        """What the model is served as; the bundle's own name is answered too."""
        self.reason: str | None = "the reference lesions haven't been checked yet"
        """Why the service isn't ready; None once it is."""
        self.lock = threading.Lock()
        """For the counts that threads change."""
        self.pending = self.held = self.decoding = 0
        """Requests that were received, bytes held of all, and requests whose pictures the graph hasn't got yet."""
        self._queued, self._per_pixel = 0, 0.0
        """Pixels that wait to be decoded, and the seconds that one has taken as of late."""
        self._size, self._alone = 1.0, 0.0
        """Lesions of an inference request, at most a batch, and seconds that one alone takes, as of late."""
        self._asked, self._asked_at = 0.0, 0.0
        """Lesions that would wait now if nobody had been refused, and when that was counted."""
        self.bands: Counter[str] = Counter()
        """Lesions answered so far, by band."""
        self.batched: Callable[[int, float], None] = lambda count, seconds: None
        """Hears of each batch."""
        self.batcher = Batcher(
            predictor.graph, predictor.bundle.models, lesions(predictor.bundle),
            lambda count, seconds: self.batched(count, seconds),
            least=TOGETHER if isinstance(predictor.graph, Graph) else None,
        )  # fmt: skip
        self.drift: Drift | None = None
        """What comes, held against the hold-out; None where the bundle says nothing of it."""
        if (known := predictor.bundle.info.get("drift")) and known.get("reason") is None:
            from lesionflow.serving.drift import Drift

            self.drift = Drift(known)
        self.looks = self.drift is not None or bool(predictor.bundle.info.get("inputs"))
        """Whether anybody wants to know what the crops look like."""
        self._threads = max(2, available_cpus())
        # A thread that has decoded may run the graph, and another takes its place; not more decode.
        self._pool = ThreadPoolExecutor(self._threads + predictor.graph.parallel, "service")
        self._decoders = threading.Semaphore(self._threads)
        self._mail: _Mail | None = None

    def check(self) -> None:
        """Become ready if the reference lesions are reproduced, else raise and be unready with the reason."""
        try:
            self.predictor.smoke()
        except LesionflowError as error:
            self.reason = str(error)
            raise
        self.reason = None

    def close(self) -> None:
        self.batcher.close()
        self._pool.shutdown()

    async def in_thread(self, work: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work, *arguments)

    def observe(self, *what: Any, **more: Any) -> None:
        """Let a request count in what is held against the hold-out; see `Drift.add`. Never the request's trouble."""
        if self.drift is None:
            return
        try:
            self.drift.add(*what, **more)
        except Exception as error:
            log("error", message="drift can't take this request in", error=type(error).__name__)

    def in_time(self) -> _InTime:
        """What must be done before the request's time is over. Raises `RequestError` if it isn't."""
        return _InTime(self)

    def answered(self, bands: Sequence[str | None]) -> None:
        """Lesions got these bands."""
        for one in bands:
            self.bands[one or "none"] += 1

    @contextmanager
    def admitted(self) -> Iterator[Place]:
        """A request's place among those that have begun. Raises `RequestError` where there is none."""
        if self.reason is not None:
            raise RequestError(f"not ready: {self.reason}", status=503, retry=2)
        self._count(self._size)
        self.check_room()
        self._check_wait()
        place = Place(self)
        try:
            yield place
        finally:
            self.pending -= place.waits
            self.held -= place.bytes
            place.decoded()

    def check_room(self) -> None:
        """Raise `RequestError` if as many requests wait as may."""
        if self.pending >= self.limits.requests:
            raise self._busy(f"{self.pending} requests are waiting", "requests")

    def _check_wait(self) -> None:
        """Raise `RequestError` if so much waits that another request would wait too long."""
        batcher, decoding = self.batcher, self._queued * self._per_pixel / self._threads
        # Of those that are being decoded at least one lesion each will come first.
        if (wait := batcher.wait(1) + batcher.seconds * self.decoding + decoding) > self.limits.wait:
            raise self._busy(f"about {wait:.1f} s of work are waiting", "wait")
        # A queue helps over a burst. If more comes than can be answered, it only makes everybody wait.
        if self._asked > self.limits.burst:
            each = batcher.seconds * self._size / batcher.parallel
            wait = batcher.soon(round(self._size)) + each * self.decoding + decoding
            if wait > PATIENCE * (self._alone or each):
                raise self._busy("more is asked than can be answered", "wait")

    def _count(self, lesions: float) -> None:
        """Count lesions in what would wait now."""
        now = time.perf_counter()
        if self.batcher.seconds:
            done = (now - self._asked_at) * self.batcher.parallel / self.batcher.seconds
            # It may be twice a burst, so that it takes no longer than that to forget.
            self._asked = min(max(self._asked - done, 0.0) + lesions, 2.0 * self.limits.burst)
        self._asked_at = now

    def _sized(self, lesions: int) -> None:
        """An inference request turned out to have so many lesions."""
        size = min(lesions, self.batcher.batch)
        self._count(size - self._size)
        self._size += (1 - MEMORY) * (size - self._size)

    def took(self, seconds: float) -> None:
        """A request that was alone took so long."""
        self._alone = MEMORY * self._alone + (1 - MEMORY) * seconds if self._alone else seconds

    def _busy(self, why: str, limit: str) -> RequestError:
        return RequestError(f"busy, {why}: try again later", status=503, limit=limit, retry=self.batcher.wait(1))

    async def read(self, body: bytes, header_length: str | None) -> InferRequest:
        """An inference request's body. Raises `RequestError`."""
        given = (body, header_length, self.predictor.spec.size, self.limits)
        return parse(*given) if len(body) <= SMALL else await self.in_thread(parse, *given)

    async def answers(self, asked: InferRequest, place: Place) -> list[Answer]:
        """What the model says, in batches with whatever else waits.

        Raises `RequestError` naming the first picture that can't be used.
        """
        loop = asyncio.get_running_loop()
        if self._mail is None or self._mail.loop is not loop:
            self._mail = _Mail(loop)
        job = _Asked(self, place, self._mail)
        images, pixels = asked.images or [], asked.pixels
        self._sized(len(images) if pixels is None else len(pixels))
        if pixels is None:
            small = sum(map(len, images)) <= SMALL
            pieces = self._pieces(images) if small else await self.in_thread(self._pieces, images)
            if len(pieces) == 1:
                area = pieces[0][1]
                self.queue(area)
                self._pool.submit(job.decode, images, area)
                return await job.waiter
            pixels = np.concatenate([
                self.first_error(images, rows.start, *await self._decoded(images[rows], area)) for rows, area in pieces
            ])  # fmt: skip
        place.decoded()
        self._pool.submit(job.run, pixels)
        return await job.waiter

    def answer(
        self, pixels: Pixels, fold_logits: Floats, logit: Floats, seen: Mapping[str, Doubles] | None
    ) -> list[Answer]:
        """What the logits of a request's pictures mean; `seen`: what these look like. Takes them in for drift, too."""
        answers = self.predictor.answers(pixels, fold_logits, logit, seen)
        if self.drift is not None:
            self.observe(seen, {"image": logit.astype(np.float64)}, bands=[answer.band for answer in answers])
        return answers

    def first_error(self, images: Sequence[bytes], start: int, pixels: Pixels, errors: dict[int, ImageError]) -> Pixels:
        """The pixels of pictures from number `start` on. Raises `RequestError` for the first that can't be used."""
        for place, error in errors.items():
            at = start + place
            limit = f"image.{error.limit}" if error.limit else None
            where = f"image {at + 1} of {len(images)}"
            raise RequestError(f"{where}: {error}", status=422, limit=limit, image=at)
        return pixels

    async def usable(
        self, images: Sequence[bytes], place: Place
    ) -> tuple[dict[int, ImageError], Pixels, Floats, Floats]:
        """Of any number of pictures: why some can't be used, by place; pixels, `fold_logits`, `logit` of the others."""
        errors: dict[int, ImageError] = {}
        pieces, waiting = [], []
        for rows, area in await self.in_thread(self._pieces, images):
            pixels, found = await self._decoded(images[rows], area)
            place.hold(pixels.nbytes)
            errors |= {rows.start + at: error for at, error in found.items()}
            pieces.append(pixels)
            waiting.append(asyncio.wrap_future(self.batcher.give(pixels)))
        size, models = self.predictor.spec.size, self.predictor.bundle.models
        given = [(np.zeros((0, models), np.float32), np.zeros(0, np.float32)), *await asyncio.gather(*waiting)]
        fold_logits, logit = (np.concatenate(parts) for parts in zip(*given, strict=True))
        return errors, np.concatenate([np.zeros((0, size, size, 3), np.uint8), *pieces]), fold_logits, logit

    def _pieces(self, images: Sequence[bytes]) -> list[tuple[slice, int]]:
        """Parts that are decoded at a time, and the pixels of each by the pictures' headers."""
        pieces, start, pixels = [], 0, 0
        for at, data in enumerate(images):
            area = _area(data, self.limits)
            if at > start and (at - start == PIECE or pixels + area > PIECE_PIXELS):
                pieces.append((slice(start, at), pixels))
                start, pixels = at, 0
            pixels += area
        return [*pieces, (slice(start, len(images)), pixels)] if images else []

    async def _decoded(self, images: Sequence[bytes], area: int) -> tuple[Pixels, dict[int, ImageError]]:
        self.queue(area)
        try:
            return await self.in_thread(self._try, images, area)  # type: ignore[no-any-return]
        finally:
            self.queue(-area)

    def queue(self, area: int) -> None:
        """So many pixels more wait to be decoded. From any thread."""
        with self.lock:
            self._queued += area

    def _try(self, images: Sequence[bytes], area: int) -> tuple[Pixels, dict[int, ImageError]]:
        with self._decoders:
            return self._try_now(images, area)

    def _try_now(self, images: Sequence[bytes], area: int) -> tuple[Pixels, dict[int, ImageError]]:
        size, errors, used = self.predictor.spec.size, dict[int, ImageError](), 0
        pixels = np.empty((len(images), size, size, 3), dtype=np.uint8)
        started = time.perf_counter()
        for place, data in enumerate(images):
            try:
                pixels[used] = to_pixels(data, self.predictor.spec, self.limits.image)
                used += 1
            except ImageError as error:
                errors[place] = error
        if area:
            took = (time.perf_counter() - started) / area
            self._per_pixel = MEMORY * self._per_pixel + (1 - MEMORY) * took if self._per_pixel else took
        return pixels[:used], errors


def _area(data: bytes, limits: ServiceLimits) -> int:
    """Pixels that a picture takes the time of; none if its header is enough to refuse it."""
    try:
        info = inspect(data)
        check_limits(info, len(data), limits.image)
    except ImageError:
        return 0
    return PICTURE + info.width * info.height


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
