"""The Open Inference Protocol v2 over HTTP: a request's bytes to images, answers to a response's bytes.

Two forms, as in the protocol's REST definition and its binary tensor extension. In JSON a BYTES
tensor is a list of base64 strings. In the binary form the body is that JSON without the data,
`Inference-Header-Content-Length` bytes of it, followed by the tensors' bytes in order: a BYTES
element is a 4-byte little-endian length and so many bytes.

Everything here is pure: no server, no model. Whatever is wrong with a request is a `RequestError`.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lesionflow.data.images import DEFAULT_LIMITS, Limits, Pixels
from lesionflow.errors import LesionflowError
from lesionflow.serving.predictor import Answer

OUTPUTS = {"fold_logits": "FP32", "logit": "FP32", "probability": "FP64", "band": "BYTES"}
"""What a request may ask for; `band` is empty where the bundle has no thresholds."""


@dataclass(frozen=True)
class ServiceLimits:
    """Bounds a request is held to; each error names the one that was broken."""

    body: int = 32 * 1024 * 1024
    """Bytes of an inference request's body."""
    images: int = 64
    """Images of an inference request."""
    visit_body: int = 256 * 1024 * 1024
    """Bytes of a triage request's body."""
    visit: int = 10_000
    """Lesions of a triage request; the most that SLICE-3D has of one patient are 9,184."""
    heatmaps: int = 64
    """Heat maps of a triage request."""
    requests: int = 128
    """Requests that were received and wait for the model at one time."""
    memory: int = 1024 * 1024 * 1024
    """Bytes of all bodies and decoded pictures that are held at one time."""
    wait: float = 1.0
    """Seconds that a request may be expected to wait for the model before it is refused at once."""
    burst: int = 64
    """Lesions that may come at one time; where more come than can be answered, only what hardly waits is taken."""
    time: float = 300.0
    """Seconds that a request may take in all, from its last byte on."""
    headers: int = 32 * 1024
    """Bytes of a request's first line and headers."""
    head_time: float = 10.0
    """Seconds that these may take."""
    rate: int = 1024
    """Bytes of a body that must come, and of an answer that must be taken, each second on average."""
    idle: float = 30.0
    """Seconds that a connection is kept without a request."""
    connections: int = 512
    """Open at one time."""
    image: Limits = DEFAULT_LIMITS
    """Of each image, before it is decoded."""


_write = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


class RequestError(LesionflowError):
    """A request that can't be answered.

    `limit` names the bound it broke, `image` the image's position from 0, `retry` after how many seconds to ask again,
    `details` what else the answer says.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        limit: str | None = None,
        image: int | None = None,
        retry: float | None = None,
        details: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.http_status = status
        self.limit, self.image, self.retry, self.details = limit, image, retry, details or {}

    @property
    def headers(self) -> dict[str, str]:
        """The response's own headers."""
        return {} if self.retry is None else {"Retry-After": str(max(1, math.ceil(self.retry)))}

    def to_dict(self) -> dict[str, Any]:
        """The response's JSON."""
        extra = {"limit": self.limit, "image": self.image}
        return {"error": str(self), **{k: v for k, v in extra.items() if v is not None}, **self.details}


@dataclass(frozen=True)
class InferRequest:
    """A request that was understood. Either `images` or `pixels` is there."""

    id: str | None
    images: list[bytes] | None
    """Encoded JPEG or PNG, as sent."""
    pixels: Pixels | None
    """uint8 [B, S, S, 3]."""
    outputs: list[tuple[str, bool]]
    """(name, whether as binary)."""


def parse(body: bytes, header_length: str | None, size: int, limits: ServiceLimits) -> InferRequest:
    """Read a request for a model that takes `size` pixels. Raises `RequestError`."""
    head, tail = _split(body, header_length)
    try:
        request = json.loads(head, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise RequestError(
            f"the request isn't valid JSON ({str(error)[:100]}): see the protocol's inference request"
        ) from None
    request = _object(request, "the request")
    request_id = request.get("id")
    if request_id is not None and not isinstance(request_id, str):
        raise RequestError("id must be a string")
    inputs = request.get("inputs")
    if not isinstance(inputs, list) or len(inputs) != 1:
        raise RequestError("inputs must be a list of one tensor, `image`")
    tensor = _object(inputs[0], "inputs[0]")
    if tensor.get("name") != "image":
        raise RequestError(f"unknown input {str(tensor.get('name'))[:64]!r}: the model takes one tensor, `image`")
    shape = _shape(tensor.get("shape"))
    if shape[0] > limits.images:
        raise RequestError(
            f"{shape[0]:,} images in one request, the limit is {limits.images}: send several requests", limit="images"
        )
    raw = _binary_part(tensor, tail)
    outputs = _outputs(request)
    kind = tensor.get("datatype")
    if kind == "BYTES":
        if len(shape) != 1 and shape[1:] != [1]:
            raise RequestError(f"shape {shape} of BYTES must be [B], one element per image")
        images = _elements(raw, shape[0]) if raw is not None else _base64(tensor, shape[0])
        return InferRequest(request_id, images, None, outputs)
    if kind == "UINT8":
        if shape[1:] != [size, size, 3]:
            raise RequestError(
                f"shape {shape} of UINT8 must be [B, {size}, {size}, 3], or send encoded images as BYTES"
            )
        pixels = np.frombuffer(raw, dtype=np.uint8) if raw is not None else _integers(tensor.get("data"))
        if pixels.size != np.prod(shape):
            raise RequestError(f"image has {pixels.size:,} values, its shape {shape} needs {int(np.prod(shape)):,}")
        return InferRequest(request_id, None, pixels.reshape(shape), outputs)
    raise RequestError(f"datatype {str(kind)[:64]!r} can't be read: send BYTES (JPEG or PNG) or UINT8 (pixels)")


def render(request: InferRequest, answers: Sequence[Answer], name: str, version: str) -> tuple[bytes, int | None]:
    """The response's body, and the length of its JSON part if tensors follow it (else None)."""
    count = len(answers)
    head: dict[str, Any] = {"model_name": name, "model_version": version, "outputs": []}
    if request.id is not None:
        head["id"] = request.id
    tail = b""
    for output, binary in request.outputs:
        values = [getattr(answer, output) for answer in answers]
        kind = OUTPUTS[output]
        shape = [count, len(values[0])] if output == "fold_logits" else [count]
        tensor: dict[str, Any] = {"name": output, "datatype": kind, "shape": shape}
        if kind == "BYTES":
            values = [value or "" for value in values]
        if binary:
            data = _encode(values, kind)
            tensor["parameters"] = {"binary_data_size": len(data)}
            tail += data
        else:
            tensor["data"] = [v for row in values for v in row] if output == "fold_logits" else values
        head["outputs"].append(tensor)
    text = _write(head).encode()
    return text + tail, len(text) if tail else None


def _split(body: bytes, header_length: str | None) -> tuple[bytes, bytes]:
    if header_length is None:
        return body, b""
    if not (header_length.isascii() and header_length.isdigit() and len(header_length) < 16):
        raise RequestError("Inference-Header-Content-Length must be a whole number of bytes")
    length = int(header_length)
    if length > len(body):
        raise RequestError(f"Inference-Header-Content-Length is {length:,}, but the body has {len(body):,} bytes")
    return body[:length], body[length:]


def _shape(value: Any) -> list[int]:
    if not isinstance(value, list) or not 1 <= len(value) <= 4 or not all(type(v) is int and v > 0 for v in value):
        raise RequestError("shape must be a list of positive whole numbers, the number of images first")
    return list(value)


def _binary_part(tensor: dict[str, Any], tail: bytes) -> bytes | None:
    """The tensor's bytes after the JSON, None if its data is in the JSON."""
    size = _parameters(tensor, "inputs[0]").get("binary_data_size")
    if size is None:
        if tail:
            raise RequestError("bytes follow the JSON, but image has no parameters.binary_data_size")
        return None
    if type(size) is not int or size != len(tail):
        raise RequestError(f"binary_data_size is {str(size)[:20]}, but {len(tail):,} bytes follow the JSON")
    if "data" in tensor:
        raise RequestError("image has both data and binary_data_size: send one of them")
    return tail


def _elements(raw: bytes, count: int) -> list[bytes]:
    elements: list[bytes] = []
    at = 0
    for _ in range(count):
        if at + 4 > len(raw):
            raise RequestError(f"image has {len(elements)} elements, its shape says {count}")
        (length,) = struct.unpack_from("<I", raw, at)
        if at + 4 + length > len(raw):
            raise RequestError(f"element {len(elements)} claims {length:,} bytes, {len(raw) - at - 4:,} are left")
        elements.append(raw[at + 4 : at + 4 + length])
        at += 4 + length
    if at != len(raw):
        raise RequestError(f"{len(raw) - at:,} bytes follow the last of {count} elements")
    return elements


def _base64(tensor: dict[str, Any], count: int) -> list[bytes]:
    content = _parameters(tensor, "inputs[0]").get("content_type", "base64")
    if content != "base64":
        raise RequestError(f"content_type {str(content)[:64]!r} can't be read: base64 is the one that can carry images")
    data = tensor.get("data")
    if not isinstance(data, list) or len(data) != count or not all(isinstance(item, str) for item in data):
        raise RequestError(f"data must be a list of {count} base64 strings, as the shape says")
    try:
        return [base64.b64decode(item, validate=True) for item in data]
    except (binascii.Error, ValueError):
        raise RequestError("data isn't valid base64") from None


def _integers(data: Any) -> Pixels:
    try:
        values = np.asarray(data)
    except (ValueError, OverflowError, RecursionError):
        values = np.empty(0)
    if values.dtype.kind not in "iu" or not values.size or values.min() < 0 or values.max() > 255:
        raise RequestError("data of UINT8 must be whole numbers in 0..255, flat or nested as the shape")
    return values.astype(np.uint8).ravel()


def _outputs(request: dict[str, Any]) -> list[tuple[str, bool]]:
    everything_binary = _parameters(request, "the request").get("binary_data_output") is True
    wanted = request.get("outputs")
    if wanted is None or wanted == []:
        return [(name, everything_binary) for name in OUTPUTS]
    if not isinstance(wanted, list) or len(wanted) > len(OUTPUTS):
        raise RequestError(f"outputs must be a list of up to {len(OUTPUTS)} tensors")
    outputs: list[tuple[str, bool]] = []
    for entry in wanted:
        entry = _object(entry, "outputs[]")
        name = entry.get("name")
        if not isinstance(name, str) or name not in OUTPUTS or name in dict(outputs):
            raise RequestError(
                f"output {str(name)[:64]!r} is unknown or asked for twice; there are {', '.join(OUTPUTS)}"
            )
        outputs.append((name, _parameters(entry, f"output {name}").get("binary_data", everything_binary) is True))
    return outputs


def _encode(values: Sequence[Any], kind: str) -> bytes:
    if kind == "BYTES":
        encoded = [value.encode() for value in values]
        return b"".join(struct.pack("<I", len(value)) + value for value in encoded)
    return np.asarray(values, dtype="<f4" if kind == "FP32" else "<f8").tobytes()


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RequestError(f"{what} must be a JSON object")
    return value


def _parameters(of: dict[str, Any], what: str) -> dict[str, Any]:
    return _object(of.get("parameters") or {}, f"parameters of {what}")


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON number")
