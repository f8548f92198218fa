"""Around every request: an id, a token where one is asked for, one line in the log, and no error that tells too much.

    {"time": "...", "level": "info", "request_id": "...", "method": "POST", "route": "/v1/triage", "status": 200,
     "ms": 812.4, "lesions": 241, "bytes": 723456}

The line names the route's template, never the path, a file, an id or anything else that came with the request. What the
server itself logs becomes such a line too, without tracebacks: an error's text might quote a request. Health checks and
scrapes that went well are too many to be worth a line.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import hmac
import json
import logging
import os
import re
import threading
import time
import traceback
import uuid
from collections import deque
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

OPEN = ("/v2/health/live", "/v2/health/ready", "/", "/page.css", "/page.js")
"""Asked for by whoever has no token: what an orchestrator looks at, and the page, which holds no data."""
HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"cache-control", b"no-store"),
)
"""Of every answer that has none of its own by that name."""
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
"""Named in logs and metrics; any other is `other`, so that no client can make up names."""
OFTEN = re.compile(r"/v2/health/\w+|/v2/models/\{name\}(/versions/\{version\})?/ready|/metrics")
"""Routes that are asked all the time."""
MOST_LINES = 10_000
"""Of the log, that wait to be written."""
PIPE = 4096
"""Bytes that a pipe takes as a whole: other workers' lines don't get in between."""
GATHER = 0.05
"""Seconds after a line in which others are gathered: waking a thread for each one costs as much as making it."""
NOWHERE = "(none)"
"""The route of a request that no endpoint answered."""
GONE = 499
"""Status in the log of a request whose client left before the answer."""
_encode = json.JSONEncoder(separators=(",", ":")).encode
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class _Lines:
    """Lines to stderr from a thread of their own: whoever doesn't read them must not hold up the answers."""

    def __init__(self) -> None:
        self._waiting: deque[bytes] = deque()
        self._some = threading.Event()
        self._busy = False
        self._lost = 0
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def put(self, line: dict[str, Any]) -> None:
        if self._thread is None:
            with self._lock:
                if self._thread is None:
                    self._thread = threading.Thread(target=self._write, daemon=True, name="log")
                    self._thread.start()
                    atexit.register(self.flush)
        if len(self._waiting) >= MOST_LINES:
            self._lost += 1
            return
        if self._lost:
            line, self._lost = line | {"lines_lost": self._lost}, 0
        self._waiting.append(_encode(line).encode() + b"\n")
        if not self._some.is_set():
            self._some.set()

    def flush(self, seconds: float = 1.0) -> None:
        until = time.monotonic() + seconds
        while (self._waiting or self._busy) and time.monotonic() < until:
            time.sleep(0.005)

    def _write(self) -> None:
        while True:
            self._some.wait()
            self._busy = True  # Before lines are taken, so that `flush` sees them either here or there.
            self._some.clear()  # Before too: a line that comes from here on wakes again.
            while self._waiting:
                text = self._waiting.popleft()
                # What a pipe takes as a whole isn't torn apart by what other workers write.
                while self._waiting and len(text) + len(self._waiting[0]) <= PIPE:
                    text += self._waiting.popleft()
                # Not through sys.stderr, whose lock would be held at the interpreter's end.
                with contextlib.suppress(OSError):
                    while text:
                        text = text[os.write(2, text) :]
            self._busy = False
            time.sleep(GATHER)


_lines = _Lines()


def log(level: str, **fields: Any) -> None:
    """One line of JSON to stderr, soon; lost, but counted, if thousands wait there already."""
    _lines.put({"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "level": level, **fields})


def flush() -> None:
    """Wait, for a second at most, until what was logged is written."""
    _lines.flush()


class JsonLines(logging.Handler):
    """What libraries log, as lines like the requests'; of an exception only its type."""

    def emit(self, record: logging.LogRecord) -> None:
        error = {"error": record.exc_info[0].__name__} if record.exc_info and record.exc_info[0] else {}
        log(record.levelname.lower(), message=record.getMessage().strip(), **error)


class Access:
    """ASGI middleware of a Starlette application.

    What endpoints leave in the request's state goes into the line and the metrics: `lesions`, how many were answered;
    `limit`, which one refused it. The application's own state may hold a `telemetry`, which hears of each request.
    """

    def __init__(self, app: ASGIApp, *, token: str | None = None, quiet: bool = False) -> None:
        """With a `token`, requests must bring it as `Authorization: Bearer`. `quiet`: no line for each request."""
        self._app, self._quiet = app, quiet
        self._token = token.encode() if token else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = given if _ID.fullmatch(given) else uuid.uuid4().hex
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        telemetry = getattr(scope["app"].state, "telemetry", None) if "app" in scope else None
        started, status, received = time.perf_counter(), 0, 0

        async def receiving() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            return message

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = {name.lower() for name, _ in message["headers"]}
                extra = [(b"x-request-id", request_id.encode()), *HEADERS]
                message["headers"] = [*message["headers"], *(one for one in extra if one[0] not in own)]
            await send(message)

        if telemetry is not None:
            telemetry.began()
        try:
            if self._refused(scope["path"], headers):
                state["limit"] = "token"
                await _say(sending, 401, "a token is needed: send Authorization: Bearer TOKEN", request_id)
            else:
                await self._app(scope, receiving, sending)
        except (ClientDisconnect, asyncio.CancelledError) as error:
            status = status or GONE
            if isinstance(error, asyncio.CancelledError):
                raise
        except Exception as error:
            # Only the kind of error and its place are logged: its text might quote the request.
            log("error", request_id=request_id, error=type(error).__name__, where=_place(error))
            if not status:
                await _say(sending, 500, "internal error: please report it", request_id)
        finally:
            seconds, route = time.perf_counter() - started, template(scope)
            method = scope["method"] if scope["method"] in METHODS else "other"
            # A server that gave up on a request says with which status.
            status = state.get("ended", status) or GONE
            if telemetry is not None:
                telemetry.ended(method, route, status, seconds, state.get("limit"))
            if not self._quiet and not (status in (200, 503) and OFTEN.fullmatch(route)):
                extra = {name: state[name] for name in ("lesions", "limit") if state.get(name) is not None}
                log(
                    "warning" if status >= 500 else "info", request_id=request_id, method=method, route=route,
                    status=status, ms=round(1000 * seconds, 1), bytes=received, **extra,
                )  # fmt: skip

    def _refused(self, path: str, headers: dict[bytes, bytes]) -> bool:
        if self._token is None or path in OPEN:
            return False
        kind, _, token = headers.get(b"authorization", b"").partition(b" ")
        return kind.lower() != b"bearer" or not hmac.compare_digest(token.strip(), self._token)


def template(scope: Scope) -> str:
    """The path that the endpoint which answered is declared with."""
    routes = getattr(scope.get("app"), "routes", ())
    endpoint = scope.get("endpoint")
    return next((route.path for route in routes if getattr(route, "endpoint", None) is endpoint), NOWHERE)


def _place(error: Exception) -> str:
    """The last lines of code it came through, innermost first: files and numbers, no values."""
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    return ", ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(frames))


async def _say(send: Send, status: int, error: str, request_id: str) -> None:
    body = json.dumps({"error": error, "request_id": request_id}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
