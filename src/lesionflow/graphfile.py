"""Is an ONNX file what a bundle may hold? Answered from its bytes, before a runtime sees them, without onnx itself.

A tensor in an ONNX file may name another file that holds its data; a runtime opens whatever path it names. A few bytes
may declare a tensor of terabytes, a graph that repeats itself, or an operator that makes gigabytes of a number. So a
graph must have its data inside, as much as it declares, no operators but ONNX's own, none that loops or makes random
numbers, and no constant that could be the shape of something enormous.

An ONNX file is one protobuf message. We walk only the fields that can lead to a tensor or a node; field numbers are
those of onnx.proto (onnx.ai, IR version 13 and before).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lesionflow.errors import DataError

MOST_NODES = 50_000
MOST_ELEMENTS = 1 << 26
"""Of what a constant may be the shape of: 256 MiB of floats."""
REFUSED = frozenset(
    ("If", "Loop", "Scan", "SequenceMap", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike",
     "Multinomial", "Bernoulli", "StringNormalizer", "StringConcat", "StringSplit", "RegexFullMatch", "TfIdfVectorizer",
     "ImageDecoder")
)  # fmt: skip
"""What no network of pictures needs: control flow, chance and texts."""
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
}
_MAX_DEPTH = 64
# TensorProto: bytes of an element in raw_data, by data_type.
_BYTES = {1: 4, 2: 1, 3: 1, 4: 2, 5: 2, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 12: 4, 13: 8, 14: 8, 15: 16, 16: 2}
_DIMS, _TYPE, _RAW, _INT64 = 1, 2, 9, 7
_VALUES = (4, 5, 6, 7, 10, 11)
_HALF = 1 << 63


class _Refused(Exception):
    """Why the file can't be in a bundle."""


@dataclass
class _Seen:
    nodes: int = 0


def check_graph(data: bytes, where: str) -> None:
    """Raise `DataError` saying why, if the ONNX file `data` isn't readable or isn't what a bundle may hold."""
    try:
        _check(memoryview(data), "model", 0, _Seen())
    except (IndexError, ValueError):
        raise DataError(f"{where}: not a readable ONNX file: export the bundle again") from None
    except _Refused as why:
        raise DataError(f"{where}: {why}") from None


def _check(message: memoryview, kind: str, depth: int, seen: _Seen) -> None:
    if depth > _MAX_DEPTH:
        raise ValueError("nested too deeply")
    if kind == "tensor":
        _check_tensor(message)
        return
    if kind == "function":
        raise _Refused("has functions of its own: export it without, so that what runs is what is seen")
    children = _CHILDREN[kind]
    for number, value in _fields(message):
        if kind == "node":
            _check_node(number, value, seen)
        if number in children and isinstance(value, memoryview):
            _check(value, children[number], depth + 1, seen)


def _check_node(number: int, value: int | memoryview, seen: _Seen) -> None:
    if number == 4:  # op_type
        seen.nodes += 1
        if seen.nodes > MOST_NODES:
            raise _Refused(f"more than {MOST_NODES:,} nodes: no network of pictures needs so many")
        name = _text(value)
        if name in REFUSED:
            raise _Refused(f"has a node {name}, which no network of pictures needs: export it without")
    elif number == 7 and (domain := _text(value)) not in ("", "ai.onnx"):
        raise _Refused(f"has a node of {domain[:64]!r}, not of ONNX itself: export it without")


def _check_tensor(message: memoryview) -> None:
    dims, kind, raw, values, integers = list[int](), 0, None, 0, list[int]()
    for number, value in _fields(message):
        if number == _EXTERNAL_DATA or (number == _DATA_LOCATION and value != 0):
            raise _Refused("keeps tensors in another file: export it with its data inside")
        if number == _DIMS:
            dims += [value] if isinstance(value, int) else list(_varints(value))
        elif number == _TYPE and isinstance(value, int):
            kind = value
        elif number == _RAW and isinstance(value, memoryview):
            raw = value
        elif number in _VALUES:
            values += 10 if isinstance(value, int) else max(1, len(value))
            if number == _INT64 and len(integers) <= 8:
                integers += [value] if isinstance(value, int) else list(_varints(value[:160]))
    elements = 1
    for size in dims:
        if size >= _HALF:
            raise _Refused("has a tensor of negative size: export the bundle again")
        elements *= size
        if elements > len(message):  # Each element takes a byte at least.
            break
    if elements > (len(raw) if raw is not None else values):
        raise _Refused("declares a tensor larger than its data: export the bundle again")
    if raw is not None and len(raw) != elements * _BYTES.get(kind, len(raw) // max(1, elements)):
        raise _Refused("has a tensor whose data isn't of the size that it declares: export the bundle again")
    if kind == 7 and 0 < elements <= 8:
        if raw is not None:
            integers = [int.from_bytes(raw[at : at + 8], "little") for at in range(0, len(raw), 8)]
        _check_shape(integers)


def _check_shape(integers: list[int]) -> None:
    """Whole numbers that may be a shape, a repetition or a limit; -1 and "to the end", 2^63 - 1, are neither."""
    product = 1
    for value in integers:
        if 0 < value < (1 << 31):
            product *= value
        elif (1 << 31) <= value < _HALF - (1 << 32):
            raise _Refused(f"has a constant of {value:,}, which could be a size: export the bundle again")
    if product > MOST_ELEMENTS:
        raise _Refused(f"has a constant shape of {product:,} elements: export the bundle again")


def _text(value: int | memoryview) -> str:
    return bytes(value).decode("utf-8", "replace") if isinstance(value, memoryview) else ""


def _varints(message: memoryview) -> Iterator[int]:
    at = 0
    while at < len(message):
        value, at = _varint(message, at)
        yield value


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
        # A number of fixed size counts as its bytes: tensors may hold values so.
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
