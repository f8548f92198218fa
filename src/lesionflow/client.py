"""Ask a running service about pictures of lesions. One file of the standard library, so it can be copied anywhere.

    with Client("http://127.0.0.1:8080") as service:
        visit = service.triage(pictures([Path("crops/")]), Path("visit.csv"))
        for lesion in visit["lesions"]:
            print(lesion["rank"], lesion["id"], lesion["probability"], lesion["band"])

Pictures go as the files they are: no base64, no pixels. `infer` scores pictures one by one, by the Open Inference
Protocol v2 in its binary form; `triage` ranks one patient's visit, with metadata where there is any.
"""

from __future__ import annotations

import contextlib
import csv
import http.client
import io
import json
import random
import secrets
import selectors
import socket
import struct
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

try:
    from lesionflow.errors import ClusterError, DataError, LesionflowError, UsageError
except ModuleNotFoundError:  # Copied elsewhere, without the package.

    class LesionflowError(Exception):  # type: ignore[no-redef]
        """Base of this file's errors: a wrong argument, what the service refused, a service that fails or is away."""

    UsageError = DataError = ClusterError = LesionflowError  # type: ignore[misc,assignment]

BATCH_IMAGES = 32
BATCH_BYTES = 8 * 1024 * 1024
"""A request of `infer` ends at so many images or bytes, well inside the service's limits."""
TIMEOUT = 330.0
"""Seconds; longer than a service may take for a request, so that it is the service that says what took too long."""
CONNECT_SECONDS = 10.0
PATIENCE = 60.0
"""Seconds that a request is tried again for while the service is busy."""

SUFFIXES = (".jpg", ".jpeg", ".png")
_SHOWN = 5
_Reply = tuple[int, str | None, bytes]
"""Status, Retry-After and body."""

Picture = tuple[str, bytes]
"""A file's name or an id, and the encoded JPEG or PNG."""


def ask(
    url: str, images: Sequence[Path], *, timeout: float = TIMEOUT, model: str | None = None, token: str | None = None
) -> list[dict[str, Any]]:
    """Score image files, folders of them or HDF5 files, in the order given: see `pictures` and `Client.infer`."""
    with Client(url, token=token, timeout=timeout) as service:
        return service.infer(pictures(images), model)


class Client:
    """A service, asked over one connection that is kept open. Not for several threads at one time.

    A request that is refused with Retry-After (the service is busy or restarting) is sent again after that time,
    for up to `patience` seconds; so is, once, a request on a connection that the service had closed meanwhile.
    `timeout` is for the answer to one request, seconds.
    """

    def __init__(self, url: str, *, token: str | None = None, timeout: float = TIMEOUT, patience: float = PATIENCE):
        """`token` is what the service was told to ask for. Raises `UsageError` for what is no URL or no token."""
        parts = urlsplit(url)
        if parts.username or parts.password:
            raise UsageError("the URL holds a user name or password, which the service doesn't know: give a token")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"{url}: not a URL: give one like http://127.0.0.1:8080")
        if token is not None and not (token.isascii() and token.isprintable() and token and " " not in token):
            raise UsageError("the token has characters that no token has: give it as one line, without spaces")
        self.url, self.timeout, self.patience = url, timeout, patience
        self._path = parts.path.rstrip("/")
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._model: str | None = None
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        try:
            self._http = kind(parts.hostname, parts.port, timeout=min(timeout, CONNECT_SECONDS))
        except ValueError:
            raise UsageError(f"{url}: the port isn't one: give a URL like http://127.0.0.1:8080") from None

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connection; the next request opens another."""
        self._http.close()

    def infer(self, images: Iterable[Picture], model: str | None = None) -> list[dict[str, Any]]:
        """Score pictures one by one, by what is seen on them alone; any number, of any patients.

        Returns `image` (the name given), `probability`, `logit` and `band` (None without thresholds) for each, in
        order. `model` is only needed where a server has several.

        Raises `ClusterError` if the service can't be reached or fails, `DataError` naming a picture it refused.
        """
        model = model or self.model()
        return [answer for batch in _batches(images) for answer in self._infer(model, batch)]

    def triage(
        self,
        images: Iterable[Picture] = (),
        metadata: Path | Sequence[Mapping[str, object]] | None = None,
        *,
        heatmaps: bool | Sequence[str] = False,
        reasons: bool | int = 100,
    ) -> dict[str, Any]:
        """Rank the lesions of one patient's visit, most suspicious first.

        `metadata` is a CSV file in the competition's columns, or its rows; `isic_id` is a picture's name, with or
        without suffix. A lesion may have a picture, a row or both. `heatmaps` asks for maps of all lesions or of the
        ids named, `reasons` for how many of the first reasons are wanted.

        Returns the service's answer as it is: `lesions` with `rank`, `id`, `probability`, `interval`, `band`,
        `reasons` and more, `errors` with the pictures that couldn't be used, `summary`, `context`, `notice`.

        Raises `ClusterError` if the service can't be reached or fails, `DataError` if it refused the visit.
        """
        fields = {"options": json.dumps({"heatmaps": heatmaps, "reasons": reasons}).encode()}
        if metadata is not None:
            fields["metadata"] = _read_file(metadata) if isinstance(metadata, Path) else _csv(metadata)
        body, content = _form(fields, images)
        status, answer = self._call("POST", "/v1/triage", body, {"Content-Type": content})
        if status != 200:
            raise self._refused(status, answer, "the visit")
        if not isinstance(answer, dict) or not isinstance(answer.get("lesions"), list):
            raise self._stranger(status)
        return answer

    def about(self) -> dict[str, Any]:
        """What the service knows and takes: modes, thresholds, limits, columns, and what each mode was worth."""
        status, answer = self._call("GET", "/v1/model")
        if status != 200 or not isinstance(answer, dict):
            raise self._refused(status, answer, "the question")
        return answer

    def health(self) -> dict[str, Any]:
        """`live`, whether anything answers; `ready`; and `reason`, why it isn't ready, else None. Waits for nothing."""
        try:
            status, _, data = self._exchange("GET", "/v2/health/ready", None, self._headers)
            reason = None if status == 200 else str(self._refused(status, self._decoded(status, data), "the question"))
        except ClusterError as error:
            return {"live": False, "ready": False, "reason": str(error)}
        return {"live": True, "ready": status == 200, "reason": reason}

    def model(self) -> str:
        """The name of the server's one model. Raises `UsageError` naming them if it has several."""
        if self._model is None:
            status, listed = self._call("POST", "/v2/repository/index", b"{}", {"Content-Type": "application/json"})
            if status != 200:
                raise self._refused(status, listed, "the question for its models")
            if not isinstance(listed, list) or not all(isinstance(e, dict) and "name" in e for e in listed):
                raise self._stranger(status)
            names = sorted({str(entry["name"]) for entry in listed})
            if len(names) != 1:
                raise UsageError(f"{self.url} has the models {', '.join(names) or '(none)'}: name one of them")
            self._model = names[0]
        return self._model

    def _infer(self, model: str, batch: Sequence[Picture]) -> list[dict[str, Any]]:
        data = b"".join(struct.pack("<I", len(image)) + image for _, image in batch)
        size = {"binary_data_size": len(data)}
        tensor = {"name": "image", "datatype": "BYTES", "shape": [len(batch)], "parameters": size}
        wanted = [{"name": name} for name in ("logit", "probability", "band")]
        head = json.dumps({"inputs": [tensor], "outputs": wanted}, separators=(",", ":")).encode()
        headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(head))}
        status, answer = self._call("POST", f"/v2/models/{quote(model, safe='')}/infer", head + data, headers)
        if status != 200:
            position = answer.get("image") if isinstance(answer, dict) else None
            if type(position) is int and 0 <= position < len(batch):
                raise DataError(f"{batch[position][0]}: refused by {self.url}: {answer.get('error')}")
            raise self._refused(status, answer, f"{batch[0][0]} and {len(batch) - 1} more")
        try:
            columns = {output["name"]: output["data"] for output in answer["outputs"]}
            rows = list(zip(batch, columns["probability"], columns["logit"], columns["band"], strict=True))
        except (KeyError, TypeError, ValueError):
            raise self._stranger(status) from None
        return [
            {"image": name, "probability": probability, "logit": logit, "band": band or None}
            for (name, _), probability, logit, band in rows
        ]

    def _call(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, Any]:
        """(status, decoded JSON), once the service isn't busy any more. Raises `ClusterError` when no answer comes."""
        deadline, wait = time.monotonic() + self.patience, 1.0
        while True:
            status, after, data = self._exchange(method, path, body, {**self._headers, **(headers or {})})
            if status not in (429, 503) or (delay := _seconds(after)) is None:
                return status, self._decoded(status, data)
            # Those who were refused together shall not come back together.
            delay, wait = max(delay, 0.1) * wait * random.uniform(1.0, 1.5), wait * 1.5
            if time.monotonic() + delay > deadline:
                return status, self._decoded(status, data)
            time.sleep(delay)

    def _decoded(self, status: int, data: bytes) -> Any:
        try:
            return json.loads(data)
        except (ValueError, RecursionError):
            raise self._stranger(status) from None

    def _exchange(self, method: str, path: str, body: bytes | None, headers: dict[str, str]) -> _Reply:
        """One request, on the open connection if the service still holds it."""
        try:
            if self._http.sock is not None and _readable(self._http.sock):
                self.close()  # The service closed it while nothing was asked: don't send a visit down there.
            if self._http.sock is not None:
                # One that breaks before any answer was closed just as we sent; asking twice does no harm.
                with contextlib.suppress(ConnectionError, http.client.ImproperConnectionState):
                    return self._send(method, path, body, headers)
                self.close()
            self._http.connect()
            self._http.sock.settimeout(self.timeout)
            return self._send(method, path, body, headers)
        except TimeoutError:
            seconds = self.timeout if self._http.sock is not None else self._http.timeout
            self.close()
            raise ClusterError(f"{self.url}: no answer within {seconds:g} s: is it overloaded?") from None
        except ConnectionRefusedError:
            remedy = "start the service with `lesionflow serve BUNDLE`, or check the port"
            raise ClusterError(f"{self.url}: connection refused: {remedy}") from None
        except (OSError, http.client.HTTPException) as error:
            self.close()
            reason = str(error) or type(error).__name__
            raise ClusterError(f"{self.url}: can't be reached ({reason}): check the URL, is it running?") from None

    def _send(self, method: str, path: str, body: bytes | None, headers: dict[str, str]) -> _Reply:
        # A service that refuses a body early closes while we still send: its answer says why.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._http.request(method, self._path + path, body, headers)
        response = self._http.getresponse()
        return response.status, response.headers.get("Retry-After"), response.read()

    def _refused(self, status: int, answer: Any, what: str) -> LesionflowError:
        said = answer if isinstance(answer, dict) else {"error": answer}
        reason = str(said.get("error") or "no reason given")
        if status == 401:
            return UsageError(f"{self.url} asks for a token ({reason}): give the one it was started with")
        named = [e for e in said.get("errors") or () if isinstance(e, dict)]
        reason += "".join(f"; {e.get('file') or e.get('id')}: {e.get('error')}" for e in named[:_SHOWN])
        reason += f"; and {len(named) - _SHOWN} more" if len(named) > _SHOWN else ""
        if status in (400, 413, 415, 422):
            return DataError(f"{self.url} refused {what}: {reason}")
        request = f" (request {said['request_id']})" if said.get("request_id") else ""
        return ClusterError(f"{self.url}: status {status}: {reason}{request}")

    def _stranger(self, status: int) -> ClusterError:
        return ClusterError(f"{self.url}: status {status}, and not what was asked for: is it a lesionflow service?")


def pictures(paths: Iterable[Path], only: Collection[str] | None = None) -> Iterator[Picture]:
    """(name, bytes) of image files, folders of them (by file name) and HDF5 files (by id, which takes the package).

    With `only`, those whose name or name without suffix is among these. Raises `DataError` naming what can't be read.
    """
    for path in map(Path, paths):
        if path.suffix.lower() in (".hdf5", ".h5"):
            yield from _read_hdf5(path, only)
        elif path.is_dir():
            found = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
            if not found:
                raise DataError(f"{path}: no images ({', '.join(SUFFIXES)}) in this folder: check the path")
            yield from ((p.name, _read_file(p)) for p in found if only is None or not {p.name, p.stem}.isdisjoint(only))
        elif only is None or not {path.name, path.stem}.isdisjoint(only):
            yield path.name, _read_file(path)


def rows_of(metadata: Path, patient: str) -> list[dict[str, str]]:
    """One patient's rows of a metadata file. Raises `DataError` if there are none."""
    text = io.StringIO(_read_file(metadata).decode("utf-8-sig", "replace"), newline="")
    reader = csv.DictReader(text, restkey="")
    if "patient_id" not in (reader.fieldnames or ()):
        raise DataError(f"{metadata}: no column patient_id to find {patient} by: give a file of one patient's lesions")
    rows = [{k: v for k, v in row.items() if k} for row in reader if row["patient_id"] == patient]
    if not rows:
        raise DataError(f"{metadata}: no lesion of patient {patient!r}: check the id")
    return rows


def _batches(images: Iterable[Picture]) -> Iterator[list[Picture]]:
    batch: list[Picture] = []
    size = 0
    for name, data in images:
        if batch and (len(batch) == BATCH_IMAGES or size + len(data) > BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append((name, data))
        size += len(data)
    yield from [batch] if batch else []


def _form(fields: Mapping[str, bytes], images: Iterable[Picture]) -> tuple[bytes, str]:
    """A multipart/form-data body and its content type: RFC 7578, with file names escaped as browsers do."""
    boundary = secrets.token_hex(16)
    parts = [(f'"{name}"', value) for name, value in fields.items()]
    for name, data in images:
        file = name.replace('"', "%22").replace("\r", "%0D").replace("\n", "%0A")
        parts.append((f'"images"; filename="{file}"\r\nContent-Type: application/octet-stream', data))
    start = f"--{boundary}\r\nContent-Disposition: form-data; name="
    body = b"".join(f"{start}{head}\r\n\r\n".encode("utf-8", "replace") + data + b"\r\n" for head, data in parts)
    return body + f"--{boundary}--\r\n".encode(), f"multipart/form-data; boundary={boundary}"


def _csv(rows: Sequence[Mapping[str, object]]) -> bytes:
    columns = dict.fromkeys(name for row in rows for name in row)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(columns), restval="")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _seconds(after: str | None) -> float | None:
    """A Retry-After header's seconds; None for none, or a date, which no lesionflow service sends."""
    return float(after[:9]) if after is not None and after.isascii() and after.isdigit() else None


def _readable(sock: socket.socket) -> bool:
    with selectors.DefaultSelector() as selector:
        selector.register(sock, selectors.EVENT_READ)
        return bool(selector.select(0))


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror}): check the path") from None


def _read_hdf5(path: Path, only: Collection[str] | None) -> Iterator[Picture]:
    from lesionflow.data.source import open_source

    with open_source(path) as source:
        yield from source.images([isic_id for isic_id in source.ids if only is None or isic_id in only])
