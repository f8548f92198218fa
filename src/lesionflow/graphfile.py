"""Does an ONNX file stand alone? Answered from its bytes, without the onnx package.

A tensor in an ONNX file may name another file that holds its data (`data_location` EXTERNAL). A
runtime that loads such a graph opens whatever path it names, so a bundle's graph must have none.

An ONNX file is one protobuf message. We walk only the fields that can lead to a tensor; field
numbers are those of onnx.proto (onnx.ai, IR version 13 and before).
"""

from __future__ import annotations

from collections.abc import Iterator

from lesionflow.errors import DataError

_DATA_LOCATION, _EXTERNAL_DATA = 14, 13

# Message -> field number -> the message that the field holds.
_CHILDREN: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {},
}
_MAX_DEPTH = 64


def check_self_contained(data: bytes, where: str) -> None:
    """Raise `DataError` if the ONNX file `data` isn't readable or keeps a tensor in another file."""
    try:
        external = _is_external(memoryview(data), "model", 0)
    except (IndexError, ValueError):
        raise DataError(f"{where}: not a readable ONNX file: export the bundle again") from None
    if external:
        raise DataError(f"{where}: keeps tensors in another file: export it with its data inside")


def _is_external(message: memoryview, kind: str, depth: int) -> bool:
    if depth > _MAX_DEPTH:
        raise ValueError("nested too deeply")
    children = _CHILDREN[kind]
    for number, value in _fields(message):
        if kind == "tensor":
            if number == _EXTERNAL_DATA or (number == _DATA_LOCATION and value != 0):
                return True
        elif number in children and isinstance(value, memoryview) and _is_external(value, children[number], depth + 1):
            return True
    return False


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(field number, varint or length-delimited bytes) in file order."""
    at, end = 0, len(message)
    while at < end:
        tag, at = _varint(message, at)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, at = _varint(message, at)
            yield number, value
            continue
        if wire == 2:
            length, at = _varint(message, at)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError("unknown wire type")
        if at + length > end:
            raise ValueError("truncated")
        if wire == 2:
            yield number, message[at : at + length]
        at += length


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("varint too long")
