"""Around every request: an id, a token where one is asked for, one line in the log, and no error that tells too much.

    {"time": "...", "level": "info", "request_id": "...", "method": "POST", "route": "/v1/triage", "status": 200,
     "ms": 812.4, "bytes": 723456}

The line names the route's template, never the path, a file, an id or anything else that came with the request.
"""

from __future__ import annotations

import hmac
import json
import re
import sys
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

OPEN = ("/v2/health/live", "/v2/health/ready", "/", "/page.css", "/page.js")
"""Asked for by whoever has no token: what an orchestrator looks at, and the page, which holds no data."""
SILENT = ("/v2/health/live", "/v2/health/ready", "/metrics")
"""Asked for every few seconds; logged only when they fail."""
HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
)
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

Told = Callable[[str, str, int, float], None]
"""Hears of each request: method, route, status, seconds."""


def log(level: str, **fields: Any) -> None:
    """One line of JSON to stderr."""
    line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "level": level, **fields}
    sys.stderr.write(json.dumps(line, separators=(",", ":")) + "\n")
    sys.stderr.flush()


class Access:
    """ASGI middleware."""

    def __init__(
        self, app: ASGIApp, *, token: str | None = None, quiet: bool = False, told: Told | None = None
    ) -> None:
        """With a `token`, requests must bring it as `Authorization: Bearer`. `quiet`: no line for each request."""
        self._app, self._quiet, self._told = app, quiet, told
        self._token = token.encode() if token else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = given if _ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
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

        try:
            if self._refused(scope["path"], headers):
                await _say(sending, 401, "a token is needed: send Authorization: Bearer TOKEN", request_id)
            else:
                await self._app(scope, receiving, sending)
        except ClientDisconnect:
            status = status or 499
        except Exception as error:
            # Only the kind of error is logged: its text might quote the request.
            log("error", request_id=request_id, error=type(error).__name__)
            if not status:
                await _say(sending, 500, "internal error: please report it", request_id)
        finally:
            seconds, route = time.perf_counter() - started, _template(scope)
            if self._told:
                self._told(scope["method"], route, status, seconds)
            if status >= 400 or route not in SILENT:
                log(
                    "warning" if status >= 500 else "info", request_id=request_id, method=scope["method"], route=route,
                    status=status, ms=round(1000 * seconds, 1), bytes=received,
                )  # fmt: skip

    def _refused(self, path: str, headers: dict[bytes, bytes]) -> bool:
        if self._token is None or path in OPEN:
            return False
        kind, _, token = headers.get(b"authorization", b"").partition(b" ")
        return kind.lower() != b"bearer" or not hmac.compare_digest(token.strip(), self._token)


def _template(scope: Scope) -> str:
    """The path that the endpoint which answered is declared with."""
    routes = getattr(scope.get("app"), "routes", ())
    endpoint = scope.get("endpoint")
    return next((route.path for route in routes if getattr(route, "endpoint", None) is endpoint), "(none)")


async def _say(send: Send, status: int, error: str, request_id: str) -> None:
    body = json.dumps({"error": error, "request_id": request_id}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
