"""The bundle's graph, running elsewhere: pixels go to a predictor (Triton), logits come back.

    predictor = Predictor(bundle, graph=Remote(bundle, "skin-cancer-detection-predictor.team"))

Decoding, calibration and bands stay here, so the answers are those of the bundle alone. The wire is the
Open Inference Protocol v2 with binary tensors, over connections that are kept open: a 128-pixel lesion is
48 KiB, as it is in memory. Whatever keeps the predictor from answering is a `PredictorError` that names it.
"""

from __future__ import annotations

import http.client
import json
import queue
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, urlsplit

import numpy as np

from lesionflow.bundle import Bundle
from lesionflow.data.images import Pixels
from lesionflow.errors import ClusterError, UsageError
from lesionflow.serving.graph import Floats, check_pixels

BATCH = 64
"""Most lesions per request: Triton's max_batch_size, and a lesionflow service's own limit."""
BATCH_BYTES = 16 * 1024 * 1024
CONNECT_SECONDS = 5.0
TIMEOUT = 30.0
"""Seconds without a byte from the predictor after which a request is given up."""
PORTS = (80, 8080)
"""Tried in order where no port is named: a service's, and a pod's behind a headless service."""


class PredictorError(ClusterError):
    """The predictor can't be reached (503), is too slow (504) or answers what it shouldn't (502)."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.http_status = status


class Remote:
    """A predictor at an address. Safe to call from several threads."""

    parallel = 8
    """Calls that may run at one time: the predictor makes batches of them."""
    has_cam = False
    """Class-activation maps are asked of the bundle's own graph only."""

    def __init__(self, bundle: Bundle, address: str, *, tls: bool = False, timeout: float = TIMEOUT) -> None:
        """`address` is HOST, HOST:PORT or a URL; nothing is sent yet. Raises `UsageError` for what is none."""
        parts = urlsplit(address if "://" in address else f"{'https' if tls else 'http'}://{address}")
        try:
            host, port = parts.hostname, parts.port
        except ValueError:
            host, port = None, None
        if parts.scheme not in ("http", "https") or not host or parts.query or parts.fragment:
            raise UsageError(f"--predictor-host {address}: give HOST, HOST:PORT or a URL")
        self._tls, self._host, self._path = parts.scheme == "https", host, parts.path.rstrip("/")
        self._ports = (port,) if port else (443,) if self._tls else PORTS
        self.where = f"{parts.scheme}://{parts.netloc}{self._path}"
        self._timeout = timeout
        self._size, self._models = bundle.spec.size, bundle.models
        self._batch = max(1, min(BATCH, BATCH_BYTES // (3 * self._size**2)))
        self._infer = f"{self._path}/v2/models/{quote(bundle.name, safe='')}/infer"
        # The last one used is the likeliest to be open still.
        self._idle: queue.LifoQueue[http.client.HTTPConnection] = queue.LifoQueue()

    def logits(self, pixels: Pixels) -> tuple[Floats, Floats]:
        """uint8 [B, S, S, 3] to (`fold_logits` float32 [B, K], `logit` float32 [B]); B may be 0.

        Raises `PredictorError`, or `DataError` for any other shape or type.
        """
        check_pixels(pixels, self._size)
        fold_logits = np.empty((len(pixels), self._models), dtype=np.float32)
        logit = np.empty(len(pixels), dtype=np.float32)
        for start in range(0, len(pixels), self._batch):
            rows = slice(start, start + self._batch)
            fold_logits[rows], logit[rows] = self._ask(np.ascontiguousarray(pixels[rows]))
        return fold_logits, logit

    def close(self) -> None:
        while not self._idle.empty():
            self._idle.get_nowait().close()

    def _ask(self, pixels: Pixels) -> tuple[Floats, Floats]:
        tensor = {
            "name": "image",
            "datatype": "UINT8",
            "shape": list(pixels.shape),
            "parameters": {"binary_data_size": pixels.nbytes},
        }
        wanted = [{"name": name, "parameters": {"binary_data": True}} for name in ("fold_logits", "logit")]
        head = json.dumps({"inputs": [tensor], "outputs": wanted}, separators=(",", ":")).encode()
        headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(head))}
        status, found, body = self._post(head + pixels.tobytes(), headers)
        if status != 200:
            raise PredictorError(
                f"the predictor {self.where} answered {status}: {_reason(body)}", 503 if status == 503 else 502
            )
        count = len(pixels)
        try:
            outputs = _tensors(body, found.get("inference-header-content-length"))
            # Triton gives `logit` as [B, 1], lesionflow as [B].
            return outputs["fold_logits"].reshape(count, self._models), outputs["logit"].reshape(count)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise PredictorError(
                f"the predictor {self.where} answered what isn't this model's output "
                f"({type(error).__name__}: {str(error)[:100]}): does it serve this very bundle?",
                502,
            ) from None

    def _post(self, body: bytes, headers: dict[str, str]) -> tuple[int, Mapping[str, str], bytes]:
        """(status, headers in lower case, body)."""
        while True:
            try:
                connection, fresh = self._idle.get_nowait(), False
            except queue.Empty:
                connection, fresh = self._connect(), True
            try:
                connection.request("POST", self._infer, body, headers)
                response = connection.getresponse()
                data = response.read()
            except TimeoutError:
                connection.close()
                raise PredictorError(
                    f"the predictor {self.where} gave no answer within {self._timeout:g} s: is it overloaded?", 504
                ) from None
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                if fresh:
                    raise self._unreachable(error) from None
                continue  # It was closed while idle, by a predictor that may be well: ask again on another.
            except BaseException:
                connection.close()
                raise
            if response.will_close:
                connection.close()
            else:
                self._idle.put(connection)
            return response.status, {k.lower(): v for k, v in response.getheaders()}, data

    def _connect(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self._tls else http.client.HTTPConnection
        failed: OSError | None = None
        for port in self._ports:
            connection = kind(self._host, port, timeout=CONNECT_SECONDS)
            try:
                connection.connect()
            except OSError as error:
                failed = failed or error
                continue
            self._ports = (port,)
            connection.sock.settimeout(self._timeout)
            return connection
        assert failed is not None
        raise self._unreachable(failed)

    def _unreachable(self, error: Exception) -> PredictorError:
        return PredictorError(
            f"the predictor {self.where} can't be reached ({error or type(error).__name__}): is it running?", 503
        )


def _tensors(body: bytes, header_length: str | None) -> dict[str, Floats]:
    """The response's FP32 tensors by name, binary or in the JSON."""
    length = int(header_length) if header_length else len(body)
    outputs: dict[str, Floats] = {}
    at = length
    for tensor in json.loads(body[:length])["outputs"]:
        size = tensor.get("parameters", {}).get("binary_data_size")
        if tensor["datatype"] != "FP32":
            raise ValueError(f"{tensor['name']} is {tensor['datatype']}")
        if size is None:
            outputs[tensor["name"]] = np.asarray(tensor["data"], dtype=np.float32)
        else:
            outputs[tensor["name"]] = np.frombuffer(body[at : at + size], dtype="<f4")
            at += size
    return outputs


def _reason(body: bytes) -> str:
    try:
        answer: Any = json.loads(body)
        return str(answer["error"])[:300]
    except (ValueError, KeyError, TypeError):
        return body[:100].decode(errors="replace")
