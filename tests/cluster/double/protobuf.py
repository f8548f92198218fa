"""Reads the few protocol buffers kubectl sends where it builds an object itself: `create secret`, `auth can-i`, ...

Manifests and custom objects come as JSON. A kind that isn't listed here is refused as an unsupported media type.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

from double.answers import Refused

MEDIA_TYPE = "application/vnd.kubernetes.protobuf"

Shape = dict[int, tuple[str, Any]]
"""Field number -> (JSON name, "string" | "bytes" | ("map", value) | a message's shape)."""

_METADATA: Shape = {
    1: ("name", "string"),
    2: ("generateName", "string"),
    3: ("namespace", "string"),
    11: ("labels", ("map", "string")),
    12: ("annotations", ("map", "string")),
}
_ATTRIBUTES: Shape = {
    1: ("namespace", "string"),
    2: ("verb", "string"),
    3: ("group", "string"),
    4: ("version", "string"),
    5: ("resource", "string"),
    6: ("subresource", "string"),
    7: ("name", "string"),
}
_HEAD: Shape = {1: ("metadata", _METADATA)}
_QUANTITY: Shape = {1: ("string", "string")}
_KINDS: dict[str, Shape] = {
    "Namespace": _HEAD,
    "ServiceAccount": _HEAD,
    "ConfigMap": {**_HEAD, 2: ("data", ("map", "string")), 3: ("binaryData", ("map", "bytes"))},
    "Secret": {**_HEAD, 2: ("data", ("map", "bytes")), 3: ("type", "string"), 4: ("stringData", ("map", "string"))},
    "ResourceQuota": {**_HEAD, 2: ("spec", {1: ("hard", ("map", _QUANTITY))})},
    "SelfSubjectAccessReview": {**_HEAD, 2: ("spec", {1: ("resourceAttributes", _ATTRIBUTES)})},
}


def decode(raw: bytes) -> dict[str, Any]:
    """The object in a request's body. Raises `Refused` (415) for a kind that isn't known here."""
    unknown = dict(_fields(raw.removeprefix(b"k8s\x00")))
    about = {number: value.decode() for number, value in _fields(unknown[1])}
    shape = _KINDS.get(about[2])
    if shape is None:
        raise Refused(415, "UnsupportedMediaType", f"the double reads no protocol buffer of a {about[2]}")
    made = {"apiVersion": about[1], "kind": about[2], **_message(unknown[2], shape)}
    hard = made.get("spec", {}).get("hard", {})
    hard.update({name: value["string"] for name, value in hard.items()})
    return made


def _message(raw: bytes, shape: Shape) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for number, value in _fields(raw):
        name, type_ = shape.get(number, ("", None))
        if not name:
            continue
        if isinstance(type_, tuple):
            entry = _message(value, {1: ("key", "string"), 2: ("value", type_[1])})
            made.setdefault(name, {})[entry.get("key", "")] = entry.get("value", "")
        else:
            read = _value(value, type_)
            if read != "":
                made[name] = read
    return made


def _value(value: Any, type_: Any) -> Any:
    if isinstance(type_, dict):
        return _message(value, type_)
    return value.decode() if type_ == "string" else base64.b64encode(value).decode()


def _fields(raw: bytes) -> Iterator[tuple[int, Any]]:
    at = 0
    while at < len(raw):
        tag, at = _varint(raw, at)
        wire = tag & 7
        if wire == 0:
            value, at = _varint(raw, at)
            yield tag >> 3, value
        else:
            size = {1: 8, 5: 4}.get(wire)
            if size is None:
                size, at = _varint(raw, at)
            yield tag >> 3, raw[at : at + size]
            at += size


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = raw[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
