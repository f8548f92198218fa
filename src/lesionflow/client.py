"""Ask a running service about images. Standard library only, so it can be copied anywhere.

    for answer in ask("http://127.0.0.1:8080", [Path("crops/")]):
        print(answer["image"], answer["probability"])

Images go as they are, in the protocol's binary form: no base64, four bytes more than the file.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from lesionflow.errors import ClusterError, DataError, LesionflowError, UsageError

BATCH_IMAGES = 32
BATCH_BYTES = 8 * 1024 * 1024
"""A request ends at so many images or bytes, well inside the service's limits."""

SUFFIXES = (".jpg", ".jpeg", ".png")


def ask(url: str, images: Sequence[Path], *, timeout: float = 30.0, model: str | None = None) -> list[dict[str, Any]]:
    """Score image files, folders of them (by name) or HDF5 files (by id), in the order given.

    Returns `image` (file name or id), `probability`, `logit` and `band` (None without thresholds)
    for each. `model` is only needed where a server has several. `timeout` is for each request, seconds.

    Raises `ClusterError` if the service can't be reached or fails, `DataError` naming an image that
    is missing or that the service refused.
    """
    with _Connection(url, timeout) as service:
        model = model or service.only_model()
        return [answer for batch in _batches(_read(images)) for answer in _ask_batch(service, model, batch)]


class _Connection:
    """One connection, kept open between requests."""

    def __init__(self, url: str, timeout: float) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"{url}: not a URL: give one like http://127.0.0.1:8080")
        self.url, self.path = url, parts.path.rstrip("/")
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        try:
            self._http = kind(parts.hostname, parts.port, timeout=timeout)
        except ValueError:
            raise UsageError(f"{url}: the port isn't one: give a URL like http://127.0.0.1:8080") from None

    def __enter__(self) -> _Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def post(self, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, Any]:
        """(status, decoded JSON). Raises `ClusterError` when no answer comes."""
        try:
            # A service that refuses a body early closes while we still send: its answer says why.
            with contextlib.suppress(BrokenPipeError):
                self._http.request("POST", self.path + path, body, headers)
            response = self._http.getresponse()
            data = response.read()
        except TimeoutError:
            raise ClusterError(f"{self.url}: no answer within {self._http.timeout:g} s: is it overloaded?") from None
        except ConnectionRefusedError:
            raise ClusterError(
                f"{self.url}: connection refused: start the service with `lesionflow serve BUNDLE`, or check the port"
            ) from None
        except (OSError, http.client.HTTPException) as error:
            reason = str(error) or type(error).__name__
            raise ClusterError(
                f"{self.url}: can't be reached ({reason}): check the URL and that it is running"
            ) from None
        try:
            return response.status, json.loads(data)
        except ValueError:
            raise ClusterError(
                f"{self.url}: status {response.status}, and not the inference protocol: is it a lesionflow service?"
            ) from None

    def only_model(self) -> str:
        """The name of the server's one model."""
        status, listed = self.post("/v2/repository/index", b"{}", {"Content-Type": "application/json"})
        if status != 200 or not isinstance(listed, list):
            raise ClusterError(f"{self.url}: status {status} on asking for its models: is it a lesionflow service?")
        names = sorted({str(entry["name"]) for entry in listed})
        if len(names) != 1:
            raise UsageError(f"{self.url} has the models {', '.join(names) or '(none)'}: name one of them")
        return names[0]


def _ask_batch(service: _Connection, model: str, batch: Sequence[tuple[str, bytes]]) -> list[dict[str, Any]]:
    data = b"".join(struct.pack("<I", len(image)) + image for _, image in batch)
    tensor = {
        "name": "image",
        "datatype": "BYTES",
        "shape": [len(batch)],
        "parameters": {"binary_data_size": len(data)},
    }
    wanted = [{"name": "logit"}, {"name": "probability"}, {"name": "band"}]
    head = json.dumps({"inputs": [tensor], "outputs": wanted}, separators=(",", ":")).encode()
    headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(head))}
    status, answer = service.post(f"/v2/models/{quote(model, safe='')}/infer", head + data, headers)
    if status != 200:
        raise _refusal(service.url, status, answer, batch)
    columns = {output["name"]: output["data"] for output in answer["outputs"]}
    rows = zip(batch, columns["probability"], columns["logit"], columns["band"], strict=True)
    return [
        {"image": name, "probability": probability, "logit": logit, "band": band or None}
        for (name, _), probability, logit, band in rows
    ]


def _refusal(url: str, status: int, answer: Any, batch: Sequence[tuple[str, bytes]]) -> LesionflowError:
    reason = answer.get("error", answer) if isinstance(answer, dict) else answer
    position = answer.get("image") if isinstance(answer, dict) else None
    if isinstance(position, int) and 0 <= position < len(batch):
        return DataError(f"{batch[position][0]}: refused by {url}: {reason}")
    if status in (400, 413, 415, 422):
        return DataError(f"{url} refused {batch[0][0]} and {len(batch) - 1} more: {reason}")
    return ClusterError(f"{url}: status {status}: {reason}")


def _batches(images: Iterator[tuple[str, bytes]]) -> Iterator[list[tuple[str, bytes]]]:
    batch: list[tuple[str, bytes]] = []
    size = 0
    for name, data in images:
        if batch and (len(batch) == BATCH_IMAGES or size + len(data) > BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append((name, data))
        size += len(data)
    if batch:
        yield batch


def _read(paths: Sequence[Path]) -> Iterator[tuple[str, bytes]]:
    for path in map(Path, paths):
        if path.suffix.lower() in (".hdf5", ".h5"):
            yield from _read_hdf5(path)
        elif path.is_dir():
            found = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
            if not found:
                raise DataError(f"{path}: no images ({', '.join(SUFFIXES)}) in this folder: check the path")
            yield from ((p.name, p.read_bytes()) for p in found)
        else:
            try:
                yield path.name, path.read_bytes()
            except OSError as error:
                raise DataError(f"{path}: can't be read ({error.strerror}): check the path") from None


def _read_hdf5(path: Path) -> Iterator[tuple[str, bytes]]:
    from lesionflow.data.source import open_source

    with open_source(path) as source:
        yield from source.images(source.ids)
