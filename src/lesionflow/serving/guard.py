"""What a connection may do before the application sees it: how large its head, how slow its body, how many at a time.

The web server's own protocol reads heads of any size for as long as a client likes, and bodies at any pace. Here each
such limit is answered in the service's own form, `{"error": ..., "limit": ...}`, and the connection ended so that the
answer arrives: what the client still sends is read and thrown away for a moment, for closing at once would make the
client's system discard the answer together with the connection. An answer that comes before the body was read (too
large, busy) ends the connection the same way, so nobody uploads 32 MiB to be told that they needn't have.

A server that drains answers what still comes on open connections, says `Connection: close` with it, and ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from lesionflow.serving.access import NOWHERE, log
from lesionflow.serving.protocol import ServiceLimits

LINGER = 2.0
"""Seconds that what a refused client still sends is thrown away, before the connection is closed."""
GRACE = 5.0
"""Seconds before a body's or an answer's pace counts."""
MOST_HEADERS = 100
MOST_PIPELINED = 8
"""Requests sent before the first is answered."""
SWEEP = 0.5
"""Seconds between two looks at every connection."""

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]


@dataclass
class Guard:
    """What all connections of a server share."""

    limits: ServiceLimits
    refused: Callable[[str], None] = lambda limit: None
    """Hears of each limit that a connection met."""
    draining: bool = False
    open: set[GuardedProtocol] = field(default_factory=set)
    """Connections not yet lost, also those being closed."""

    def protocol(self) -> type[GuardedProtocol]:
        """What uvicorn takes as `http`."""
        return type("Protocol", (GuardedProtocol,), {"guard": self})

    async def watch(self) -> None:
        """End what is too slow; for as long as the server runs."""
        while True:
            await asyncio.sleep(SWEEP)
            now = time.monotonic()
            for connection in list(self.open):
                connection.look(now)

    async def drain(self, seconds: float) -> None:
        """Answer what still comes on open connections for so long, then close those that are idle."""
        self.draining = True
        until = time.monotonic() + seconds
        while self.open and time.monotonic() < until:
            await asyncio.sleep(0.02)


class GuardedProtocol(HttpToolsProtocol):
    """One connection."""

    guard: Guard

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._refusal: tuple[int, str, str | None] | None = None
        self._ending: asyncio.TimerHandle | None = None
        self._in_head, self._head_bytes, self._head_count = False, 0, 0
        self._since = time.monotonic()
        """When the head, the body or the pause between two requests began."""
        self._came, self._paused = 0, 0.0
        """Bytes of this body, and seconds in which none were read because earlier ones hadn't been taken."""
        self._looked = self._since
        self._written: tuple[int, float] | None = None
        """Bytes that the client hasn't taken when looked at, and the time they were last seen to get fewer."""

    @property
    def _is_ending(self) -> bool:
        return self._ending is not None

    @property
    def _running(self) -> RequestResponseCycle | None:
        """The latest request, None before the first."""
        return self.cycle

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.guard.open.add(self)
        most = self.guard.limits.connections
        if len(self.guard.open) > 2 * most:
            transport.abort()  # Not even a word for each of so many.
        elif len(self.guard.open) > most:
            self.refuse(503, f"busy, {most} connections are open: try again later", "connections")

    def connection_lost(self, exc: Exception | None) -> None:
        self.guard.open.discard(self)
        self._unset_keepalive_if_required()
        if self._ending is not None:
            self._ending.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_ending:
            return  # Thrown away.
        head_began = self._in_head
        if not head_began and (self._running is None or self._running.response_complete):
            self._in_head, self._since = True, time.monotonic()
        super().data_received(data)
        # Names and values reach the callbacks whole or not at all, so an unfinished one is counted by what came.
        self._head_bytes = self._head_bytes + len(data) if head_began and self._in_head else 0
        if self._head_bytes > self.guard.limits.headers and not self._is_ending:
            self.refuse(*self._too_much_head())

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._head_count = True, 0

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._count(len(name) + len(value) + 4)
        if len(self.headers) > MOST_HEADERS:
            self._refusal = (431, f"more than {MOST_HEADERS} headers", "headers")
            raise ValueError

    def _count(self, size: int) -> None:
        self._head_count += size
        if self._head_count > self.guard.limits.headers:
            self._refusal = self._too_much_head()
            raise ValueError

    def _too_much_head(self) -> tuple[int, str, str]:
        return 431, f"the headers are larger than the limit of {self.guard.limits.headers:,} bytes", "headers"

    def on_headers_complete(self) -> None:
        if len(self.pipeline) >= MOST_PIPELINED:
            self._refusal = (503, f"more than {MOST_PIPELINED} requests were sent before an answer", "pipelined")
            raise ValueError
        super().on_headers_complete()
        self._in_head, self._head_bytes = False, 0
        self._since = self._looked = time.monotonic()
        self._came, self._paused = 0, 0.0

    def on_body(self, body: bytes) -> None:
        self._came += len(body)
        super().on_body(body)

    def on_response_complete(self) -> None:
        self._since = time.monotonic()
        super().on_response_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        cycle.transport = _Ends(self, cycle)  # type: ignore[assignment]

        async def guarded(scope: Any, receive: Any, send: Send) -> None:
            async def sending(message: Message) -> None:
                if message["type"] == "http.response.start" and (cycle.more_body or self.guard.draining):
                    # The rest of the body isn't read, so no other request can follow it.
                    cycle.keep_alive = cycle.keep_alive and bool(self.pipeline) and not cycle.more_body
                await send(message)

            await app(scope, receive, sending)

        super()._start_asgi_task(cycle, guarded)  # type: ignore[arg-type]

    def _unsupported_upgrade_warning(self) -> None:
        """Asked for another protocol, this one goes on: nothing to warn of."""

    def send_400_response(self, msg: str) -> None:
        refusal, self._refusal = self._refusal, None
        self.refuse(*(refusal or (400, "not valid HTTP: the request can't be read", None)))

    def refuse(self, status: int, error: str, limit: str | None) -> None:
        """Answer, unless an answer has begun, and end the connection."""
        if self._ending is not None or self.transport.is_closing():
            return
        request_id = uuid.uuid4().hex
        cycle, said = self._running, True
        if cycle is not None and not cycle.response_complete:
            state: dict[str, Any] = cycle.scope.get("state") or {}
            request_id, said = state.get("request_id", request_id), False
            state["ended"], state["limit"] = status, limit
            if cycle.response_started:
                self.transport.abort()
                return
            # The application hears that the client is gone, and what it answers goes nowhere.
            cycle.disconnected = True
            cycle.message_event.set()
        body = json.dumps({"error": error, "limit": limit, "request_id": request_id} if limit else {
            "error": error, "request_id": request_id,
        }).encode()  # fmt: skip
        lines = [
            STATUS_LINE[status],
            b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n" % len(body),
            b"x-request-id: " + request_id.encode() + b"\r\n",
            b"retry-after: 1\r\n" if status == 503 else b"",
            b"\r\n",
            body,
        ]
        if said:  # Else the application's own line says so.
            log("warning", request_id=request_id, route=NOWHERE, status=status, **({"limit": limit} if limit else {}))
            self.guard.refused(limit or "http")
        self.transport.write(b"".join(lines))
        self.linger()

    def linger(self) -> None:
        """Say that nothing more will come, and throw away what does, until the client closes or a moment is over."""
        if self._ending is not None or self.transport.is_closing():
            return
        self._unset_keepalive_if_required()
        self._ending = self.loop.call_later(LINGER, self.transport.close)
        self.flow.resume_reading()
        with contextlib.suppress(OSError, RuntimeError):
            self.transport.write_eof()

    def look(self, now: float) -> None:
        """End the connection if it is too slow. Called regularly."""
        limits, transport = self.guard.limits, self.transport
        passed, self._looked = now - self._looked, now
        left = transport.get_write_buffer_size()
        if left:
            if self._written is None or left < self._written[0] - limits.rate * GRACE:
                self._written = (left, now)
            elif now - self._written[1] > 2 * GRACE:
                self.guard.refused("rate")
                transport.abort()
                return
        else:
            self._written = None
        if self._ending is not None or transport.is_closing():
            return
        cycle = self._running
        if self._in_head and (cycle is None or cycle.response_complete):
            if now - self._since > limits.head_time:
                self.refuse(408, f"the headers took more than {limits.head_time:g} s", "head_time")
        elif cycle is None:
            if now - self._since > min(limits.head_time, limits.idle):
                transport.close()  # Never asked anything.
        elif cycle.more_body and not cycle.response_complete:
            if self.flow.read_paused or cycle.waiting_for_100_continue:
                self._paused += passed
            took = now - self._since - self._paused
            if took > GRACE and self._came < limits.rate * took:
                self.refuse(408, f"the body came slower than {limits.rate:,} bytes a second", "rate")

    def shutdown(self) -> None:
        """The server has drained: idle connections end, others after their answer."""
        if self._running is not None and not self._running.response_complete:
            self._running.keep_alive = False
        elif not self._is_ending:
            self.transport.close()


class _Ends:
    """A transport whose closing lets the answer arrive."""

    def __init__(self, connection: GuardedProtocol, cycle: RequestResponseCycle) -> None:
        self._connection, self._cycle = connection, cycle
        self._transport = connection.transport

    def close(self) -> None:
        if self._cycle.more_body:
            self._connection.linger()
        else:
            self._transport.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)
