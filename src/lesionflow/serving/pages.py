"""The triage page at `/`: three files of this package, sent as they are.

The page asks nobody but this server and keeps nothing: its Content-Security-Policy has the browser see to that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Scripts and styles of this server alone; pictures from the visitor's own disk (blob:) and in answers (data:)."""
FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
}
"""Address to (file, type)."""


def routes() -> list[BaseRoute]:
    """A route for each of `FILES`, which are read once."""
    folder = files("lesionflow.serving") / "page"
    return [
        Route(path, _sender((folder / name).read_bytes(), kind), methods=["GET"], name=name)
        for path, (name, kind) in FILES.items()
    ]


def _sender(content: bytes, kind: str) -> Callable[[Request], Awaitable[Response]]:
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    # Asked again each time: after a rolling restart the three files must be of one version.
    headers = {
        "ETag": tag, "Cache-Control": "no-cache", "Content-Security-Policy": POLICY,
        "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
    }  # fmt: skip

    async def send(request: Request) -> Response:
        known = {one.strip().removeprefix("W/") for one in request.headers.get("if-none-match", "").split(",")}
        if tag in known:
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=kind, headers=headers)

    return send
