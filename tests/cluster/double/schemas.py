"""Checks objects against structural schemas, as an API server does before it stores them.

    found = examine(schema, obj)
    found.value      # pruned of unknown fields and with the schema's defaults
    found.unknown    # paths of fields the schema does not have
    found.faults     # what is wrong, each with its path

Types, enums, patterns, bounds, required fields, list and map types, int-or-string, nullable and formats are
checked. Of the CEL rules only the plainest are (see `cel`); webhooks and RBAC only a real cluster has.
"""

from __future__ import annotations

import base64
import binascii
import copy
import re
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

Schema = dict[str, Any]

QUANTITY = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([KMGTPE]i|[numkMGTPE]|[eE][+-]?\d+)?")
_SCALE = {"n": 1e-9, "u": 1e-6, "m": 1e-3, "": 1.0, "k": 1e3} | {
    letter + suffix: base**power
    for suffix, base in (("", 1e3), ("i", 1024.0))
    for power, letter in enumerate("KMGTPE", 1)
    if suffix or letter != "K"
}
_PLAIN_KEY = re.compile(r"[A-Za-z0-9_-]+")
_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
}
_NAMES = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array", dict: "object"}


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong, in the words of an API server."""

    path: str
    reason: str
    """FieldValueInvalid, FieldValueRequired, FieldValueNotSupported, ... as in a Status' causes."""
    text: str

    def __str__(self) -> str:
        return f"{self.path}: {self.text}"


@dataclass
class Found:
    defaults: bool = True
    value: Any = None
    unknown: list[str] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)

    def invalid(self, path: str, value: Any, why: str) -> None:
        self.faults.append(Fault(path, "FieldValueInvalid", f"Invalid value: {_shown(value)}: {why}"))

    def required(self, path: str, why: str = "") -> None:
        self.faults.append(Fault(path, "FieldValueRequired", "Required value" + (f": {why}" if why else "")))

    def unsupported(self, path: str, value: Any, allowed: Any) -> None:
        names = ", ".join(_shown(v) for v in allowed)
        self.faults.append(
            Fault(path, "FieldValueNotSupported", f"Unsupported value: {_shown(value)}: supported values: {names}")
        )

    def duplicate(self, path: str, value: Any) -> None:
        self.faults.append(Fault(path, "FieldValueDuplicate", f"Duplicate value: {_shown(value)}"))


def examine(schema: Schema, value: Any, path: str = "", *, defaults: bool = True) -> Found:
    """Prune, fill in defaults, and say what is wrong."""
    found = Found(defaults=defaults)
    found.value = _walk(schema, copy.deepcopy(value), path, found)
    return found


def below(path: str, key: str) -> str:
    """The path of a field: dots where the key is plain, brackets where it isn't."""
    if not path:
        return key
    return f"{path}.{key}" if _PLAIN_KEY.fullmatch(key) else f"{path}[{key}]"


def quantity(text: str | int | float) -> float:
    """A quantity's amount: 500m -> 0.5, 2Gi -> 2147483648. Raises `ValueError`."""
    if isinstance(text, (int, float)):
        return float(text)
    if not QUANTITY.fullmatch(text):
        raise ValueError(f"{text!r} is no quantity")
    number, unit = re.fullmatch(r"([+-]?[\d.]+(?:[eE][+-]?\d+)?)([A-Za-z]*)", text).groups()  # type: ignore[union-attr]
    return float(number) * _SCALE[unit]


def _walk(schema: Schema, value: Any, path: str, found: Found) -> Any:
    if value is None:
        if not schema.get("nullable") and schema.get("type"):
            found.invalid(path, None, f'{path} in body must be of type {schema["type"]}: "null"')
        return None
    kind = schema.get("type")
    if schema.get("x-kubernetes-int-or-string"):
        if isinstance(value, bool) or not isinstance(value, (int, str)):
            found.invalid(path, value, f"{path} in body must be of type integer or string: {_type(value)}")
            return value
    elif kind and not _is(kind, value):
        found.invalid(path, _type(value), f"{path} in body must be of type {kind}: {_type(value)}")
        return value
    if isinstance(value, dict):
        _object(schema, value, path, found)
    elif isinstance(value, list):
        _array(schema, value, path, found)
    else:
        _scalar(schema, value, path, found)
    if "enum" in schema and value not in schema["enum"]:
        found.unsupported(path, value, schema["enum"])
    _combined(schema, value, path, found)
    return value


def _object(schema: Schema, value: dict[str, Any], path: str, found: Found) -> None:
    properties: dict[str, Schema] = schema.get("properties") or {}
    extra = schema.get("additionalProperties")
    keep = schema.get("x-kubernetes-preserve-unknown-fields") or extra is True
    if schema.get("x-kubernetes-embedded-resource"):
        properties = {"apiVersion": {"type": "string"}, "kind": {"type": "string"}, "metadata": _OPEN, **properties}
    for key in list(value):
        if key in properties:
            within = properties[key]
            # A null for a field that has a default, or of a core object, is as good as no field.
            dropped = "default" in within or schema.get("x-nulls-dropped")
            if value[key] is None and not within.get("nullable") and dropped:
                del value[key]
        elif isinstance(extra, dict):
            value[key] = _walk(extra, value[key], below(path, key), found)
        elif not keep and not ("type" not in schema and not properties):
            found.unknown.append(below(path, key))
            del value[key]
    for key, within in properties.items():
        if key in value:
            value[key] = _walk(within, value[key], below(path, key), found)
        elif "default" in within and found.defaults:
            value[key] = _walk(within, copy.deepcopy(within["default"]), below(path, key), found)
    for key in schema.get("required") or ():
        if key not in value:
            found.required(below(path, key))
    size = len(value)
    if size < schema.get("minProperties", 0) or size > schema.get("maxProperties", size):
        low, high = schema.get("minProperties", 0), schema.get("maxProperties", "any number of")
        found.invalid(path, size, f"{path} in body should have {low} to {high} properties")


def _array(schema: Schema, value: list[Any], path: str, found: Found) -> None:
    items = schema.get("items") or {}
    value[:] = [_walk(items, item, f"{path}[{i}]", found) for i, item in enumerate(value)]
    if len(value) < schema.get("minItems", 0):
        found.invalid(path, len(value), f"{path} in body should have at least {schema['minItems']} items")
    if len(value) > schema.get("maxItems", len(value)):
        text = f"Too many: {len(value)}: must have at most {schema['maxItems']} items"
        found.faults.append(Fault(path, "FieldValueTooMany", text))
    listed = schema.get("x-kubernetes-list-type")
    if listed == "map":
        keys = schema.get("x-kubernetes-list-map-keys") or []
        identities: list[Any] = [
            {k: item[k] for k in keys if k in item} if isinstance(item, dict) else item for item in value
        ]
    elif listed == "set" or schema.get("uniqueItems"):
        identities = value
    else:
        return
    for i, identity in enumerate(identities):
        if identity in identities[:i]:
            found.duplicate(f"{path}[{i}]", identity)


def _scalar(schema: Schema, value: Any, path: str, found: Found) -> None:
    if isinstance(value, str):
        if "pattern" in schema and not re.search(schema["pattern"], value):
            found.invalid(path, value, f"{path} in body should match '{schema['pattern']}'")
        if len(value) < schema.get("minLength", 0):
            found.invalid(path, value, f"{path} in body should be at least {schema['minLength']} chars long")
        if len(value) > schema.get("maxLength", len(value)):
            text = f"Too long: may not be more than {schema['maxLength']} bytes"
            found.faults.append(Fault(path, "FieldValueTooLong", text))
    elif not isinstance(value, bool):
        if "minimum" in schema and (
            value < schema["minimum"] or (schema.get("exclusiveMinimum") is True and value == schema["minimum"])
        ):
            found.invalid(path, value, f"{path} in body should be greater than or equal to {schema['minimum']}")
        if "maximum" in schema and (
            value > schema["maximum"] or (schema.get("exclusiveMaximum") is True and value == schema["maximum"])
        ):
            found.invalid(path, value, f"{path} in body should be less than or equal to {schema['maximum']}")
        if "multipleOf" in schema and value % schema["multipleOf"]:
            found.invalid(path, value, f"{path} in body should be a multiple of {schema['multipleOf']}")
    if why := _format(schema.get("format"), value):
        found.invalid(path, value, why)


def _format(name: str | None, value: Any) -> str:
    """Why a value does not have the format; empty if it has."""
    if name in ("int32", "int64") and isinstance(value, int):
        bits = int(name[3:]) - 1
        return "" if -(2**bits) <= value < 2**bits else f"must fit in {name}"
    if name == "quantity":
        if isinstance(value, str) and not QUANTITY.fullmatch(value):
            return "quantities must match the regular expression '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'"
        return ""
    if not isinstance(value, str):
        return ""
    if name == "byte":
        try:
            base64.b64decode(value, validate=True)
        except (binascii.Error, ValueError):
            return "illegal base64 data"
    if name == "date-time":
        try:
            datetime.fromisoformat(value)
        except ValueError:
            return "must be a time like 2026-01-31T12:00:00Z"
    return ""


def _combined(schema: Schema, value: Any, path: str, found: Found) -> None:
    def holds(part: Schema) -> bool:
        return not examine({"x-kubernetes-preserve-unknown-fields": True, **part}, value, path).faults

    for part in schema.get("allOf") or ():
        found.faults += examine({"x-kubernetes-preserve-unknown-fields": True, **part}, value, path).faults
    if "anyOf" in schema and not any(map(holds, schema["anyOf"])):
        found.invalid(path, value, f"{path} in body must validate at least one schema (anyOf)")
    if "oneOf" in schema and sum(map(holds, schema["oneOf"])) != 1:
        found.invalid(path, value, f"{path} in body must validate one and only one schema (oneOf)")
    if "not" in schema and holds(schema["not"]):
        found.invalid(path, value, f"{path} in body must not validate the schema (not)")


_OPEN: Schema = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}


def _is(kind: str, value: Any) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    return isinstance(value, _TYPES[kind]) or (kind == "integer" and isinstance(value, float) and value.is_integer())


def _type(value: Any) -> str:
    return f'"{_NAMES.get(type(value), type(value).__name__)}"'


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return f'"{value.strip(chr(34))}"'
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return str(value)
