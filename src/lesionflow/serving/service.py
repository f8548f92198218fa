"""What the service's addresses share: a predictor, its limits, its batches, and whether it may be asked."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from lesionflow.data.images import Pixels, check_limits, inspect, to_pixels
from lesionflow.errors import ImageError, LesionflowError
from lesionflow.serving.access import log
from lesionflow.serving.admission import Admission, Place
from lesionflow.serving.asking import Asking, Mail
from lesionflow.serving.batching import Batcher
from lesionflow.serving.graph import TOGETHER, Floats, Graph, available_cpus, lesions
from lesionflow.serving.predictor import Answer, Predictor
from lesionflow.serving.protocol import InferRequest, RequestError, ServiceLimits, parse

if TYPE_CHECKING:
    from types import TracebackType

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
PICTURE = 10_000
"""Pixels that a picture takes the time of beside its own."""


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
        threads = max(2, available_cpus())
        # A thread that has decoded may run the graph, and another takes its place; not more decode.
        self._pool = ThreadPoolExecutor(threads + predictor.graph.parallel, "service")
        self._decoders = threading.Semaphore(threads)
        self.admission = Admission(limits, self.batcher, threads)
        self._mail: Mail | None = None

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
        with self.admission.admitted() as place:
            yield place

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
            self._mail = Mail(loop)
        job = Asking(self, place, self._mail)
        images, pixels = asked.images or [], asked.pixels
        place.has(len(images) if pixels is None else len(pixels))
        if pixels is None:
            small = sum(map(len, images)) <= SMALL
            pieces = self._pieces(images) if small else await self.in_thread(self._pieces, images)
            if len(pieces) == 1:
                area = pieces[0][1]
                self.admission.queue(area)
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
        place.works = True
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
        self.admission.queue(area)
        try:
            return await self.in_thread(self.try_each, images, area)  # type: ignore[no-any-return]
        finally:
            self.admission.queue(-area)

    def try_each(self, images: Sequence[bytes], area: int) -> tuple[Pixels, dict[int, ImageError]]:
        """The pixels of pictures that can be used, and why the others can't, by place; waits for a decoder's turn."""
        with self._decoders:
            return self._try(images, area)

    def _try(self, images: Sequence[bytes], area: int) -> tuple[Pixels, dict[int, ImageError]]:
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
            self.admission.decoded(area, time.perf_counter() - started)
        return pixels[:used], errors


def _area(data: bytes, limits: ServiceLimits) -> int:
    """Pixels that a picture takes the time of; none if its header is enough to refuse it."""
    try:
        info = inspect(data)
        check_limits(info, len(data), limits.image)
    except ImageError:
        return 0
    return PICTURE + info.width * info.height
