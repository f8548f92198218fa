"""A stand-in for Kaggle on the loopback: the API's one call, and the storage it redirects to.

The API answers POST .../DownloadDataFile with a redirect to a signed storage address, as the real
one does. `faults` are taken from the front, one per storage request: `("break", n)` closes the
connection after n bytes of the body, `("status", code)` answers with that code, `("flip", n)`
inverts byte n. Every request is kept in `log`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SIGNATURE = "signed-5e1f"


@dataclass
class Stand:
    files: dict[str, bytes]
    authorization: str = ""
    """The exact header that is let in; empty lets nobody in."""
    rules_accepted: bool = True
    etag: str = '"v1"'
    hashes: bool = True
    faults: list[tuple[str, int]] = field(default_factory=list)
    log: list[dict[str, str]] = field(default_factory=list)
    url: str = ""

    def storage(self) -> list[dict[str, str]]:
        return [entry for entry in self.log if entry["method"] == "GET"]


class _Server(ThreadingHTTPServer):
    stand: Stand

    def handle_error(self, *args: object) -> None:
        """A client that hangs up early is part of the play."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def log_message(self, *args: object) -> None:
        pass

    def _note(self) -> None:
        headers = {k: self.headers.get(k, "") for k in ("Authorization", "Range", "If-Range", "Accept-Encoding")}
        self.server.stand.log.append({"method": self.command, "path": self.path, **headers})

    def _answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    def _refuse(self, status: int) -> None:
        body = json.dumps({"code": status, "message": f"refused {SIGNATURE}"}).encode()
        self._answer(status, body, {"Content-Type": "application/json"})

    def do_POST(self) -> None:
        stand = self.server.stand
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
        self._note()
        if not self.path.endswith("/competitions.CompetitionApiService/DownloadDataFile"):
            return self._refuse(404)
        if not stand.authorization or self.headers.get("Authorization") != stand.authorization:
            return self._refuse(401)
        if not stand.rules_accepted:
            return self._refuse(403)
        if body.get("competitionName") != "isic-2024-challenge" or body.get("fileName") not in stand.files:
            return self._refuse(404)
        # Another host name than the API's, so that the client must not send the token along.
        place = stand.url.replace("127.0.0.1", "localhost")
        return self._answer(302, b"", {"Location": f"{place}/storage/{body['fileName']}?signature={SIGNATURE}"})

    def do_GET(self) -> None:
        stand = self.server.stand
        self._note()
        kind, value = stand.faults.pop(0) if stand.faults else ("", 0)
        if kind == "status":
            return self._refuse(value)
        data = stand.files[self.path.split("/storage/")[1].split("?")[0]]
        headers = {"Accept-Ranges": "bytes", "ETag": stand.etag, "Content-Type": "application/octet-stream"}
        if stand.hashes:
            headers["x-goog-hash"] = "crc32c=AAAAAA==,md5=" + base64.b64encode(hashlib.md5(data).digest()).decode()
        status, start = 200, 0
        if self.headers.get("Range") and self.headers.get("If-Range") == stand.etag:
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            status = 206
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        body = data[start:]
        if kind == "flip":
            body = body[:value] + bytes([body[value] ^ 255]) + body[value + 1 :]
        headers["Content-Length"] = str(len(body))
        if kind == "break":
            body, self.close_connection = body[:value], True
        return self._answer(status, body, headers)


class StandIn:
    """Context manager: the server runs while it is open."""

    def __init__(self, files: dict[str, bytes], **settings: object) -> None:
        self.stand = Stand(files, **settings)  # type: ignore[arg-type]

    def __enter__(self) -> Stand:
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.stand = self.stand
        self.stand.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        return self.stand

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
