"""A request's pictures on their way to answers, by as few threads and wake-ups as can be."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from lesionflow.data.images import Pixels
from lesionflow.serving.admission import Place
from lesionflow.serving.graph import Floats
from lesionflow.serving.predictor import Answer

if TYPE_CHECKING:
    from lesionflow.serving.inputs import Doubles
    from lesionflow.serving.service import Service


class Mail:
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


class Asking:
    """A request's pictures on their way to answers: one thread decodes them, and runs the graph too if it is free."""

    def __init__(self, service: Service, place: Place, mail: Mail) -> None:
        self._service, self._place, self._mail = service, place, mail
        self.waiter: asyncio.Future[list[Answer]] = mail.loop.create_future()
        self.waiter.add_done_callback(self._left)
        self._future: Future[tuple[Floats, Floats]] | None = None

    def decode(self, images: Sequence[bytes], area: int) -> None:
        """From the pictures to the end; `area` as the service counted it."""
        service = self._service
        try:
            pixels = (
                None if self.waiter.cancelled() else service.first_error(images, 0, *service.try_each(images, area))
            )
        except BaseException as error:
            self._mail.send(self.waiter, None, error)
            return
        finally:
            service.admission.queue(-area)
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
