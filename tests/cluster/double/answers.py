"""What an API server says when it refuses, and which objects a selector means."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Any

from double.core import Kind
from double.patches import Path, dotted
from double.schemas import Found

Object = dict[str, Any]


class Refused(Exception):
    """What an API server answers instead of an object."""

    def __init__(self, status: int, reason: str, message: str, details: Object | None = None) -> None:
        super().__init__(f"{status} {reason}: {message}")
        self.status, self.reason, self.message, self.details = status, reason, message, details or {}

    def body(self) -> Object:
        """The Status object that clients read."""
        return {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": self.message,
            "reason": self.reason,
            "details": self.details,
            "code": self.status,
        }


def not_found(kind: Kind, name: str) -> Refused:
    return Refused(404, "NotFound", f'{kind.resource} "{name}" not found', _details(kind, name))


def exists(kind: Kind, name: str) -> Refused:
    return Refused(409, "AlreadyExists", f'{kind.resource} "{name}" already exists', _details(kind, name))


def stale(kind: Kind, name: str) -> Refused:
    message = (
        f'Operation cannot be fulfilled on {kind.resource} "{name}": the object has been modified; please apply your '
        "changes to the latest version and try again"
    )
    return Refused(409, "Conflict", message, _details(kind, name))


def conflict(kind: Kind, name: str, manager: str, fields: Iterable[Path]) -> Refused:
    listed = sorted(map(dotted, fields))
    plural = "conflict" if len(listed) == 1 else "conflicts"
    message = f'Apply failed with {len(listed)} {plural}: conflicts with "{manager}": ' + ", ".join(listed)
    causes = [{"reason": "FieldManagerConflict", "message": f'conflict with "{manager}"', "field": f} for f in listed]
    return Refused(409, "Conflict", message, {**_details(kind, name), "causes": causes})


def forbidden(kind: Kind, name: str, why: str) -> Refused:
    return Refused(403, "Forbidden", f'{kind.resource} "{name}" is forbidden: {why}', _details(kind, name))


def strict(kind: Kind, unknown: Iterable[str]) -> Refused:
    listed = ", ".join(f'unknown field "{path}"' for path in unknown)
    return Refused(
        400,
        "BadRequest",
        f'{kind.kind} in version "{kind.version}" cannot be handled as a {kind.kind}: strict decoding error: {listed}',
    )


def invalid(kind: Kind, obj: Object, found: Found) -> Refused:
    name = obj.get("metadata", {}).get("name", "")
    texts = [str(fault) for fault in found.faults]
    listed = texts[0] if len(texts) == 1 else "[" + ", ".join(texts) + "]"
    full = f"{kind.kind}.{kind.group}" if kind.group else kind.kind
    causes = [{"reason": f.reason, "message": f.text, "field": f.path} for f in found.faults]
    return Refused(422, "Invalid", f'{full} "{name}" is invalid: {listed}', {**_details(kind, name), "causes": causes})


def timestamp() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def matcher(labels: str, fields: str) -> Callable[[Object], bool]:
    """Whether an object fits a label and a field selector. Raises `Refused` (400) for one that can't be read."""
    tests = [_label_test(part) for part in _parts(labels)] + [_field_test(part) for part in fields.split(",") if part]
    return lambda obj: all(test(obj) for test in tests)


def _parts(selector: str) -> list[str]:
    return [p.strip() for p in re.split(r",(?![^(]*\))", selector) if p.strip()]


def _label_test(part: str) -> Callable[[Object], bool]:
    def value(obj: Object, key: str) -> str | None:
        found: str | None = (obj["metadata"].get("labels") or {}).get(key)
        return found

    if match := re.fullmatch(r"(\S+)\s+(in|notin)\s*\(([^)]*)\)", part):
        key, operator, listed = match[1], match[2], {v.strip() for v in match[3].split(",")}
        return lambda obj: (value(obj, key) in listed) == (operator == "in")
    if match := re.fullmatch(r"([^\s=!]+)\s*(==|=|!=)\s*(\S*)", part):
        key, operator, wanted = match.groups()
        return lambda obj: (value(obj, key) == wanted) == (operator != "!=")
    if match := re.fullmatch(r"(!?)\s*([A-Za-z0-9][-A-Za-z0-9_./]*)", part):
        negated, key = match.groups()
        return lambda obj: (value(obj, key) is None) == bool(negated)
    raise Refused(400, "BadRequest", f'unable to parse requirement: "{part}"')


def _field_test(part: str) -> Callable[[Object], bool]:
    match = re.fullmatch(r"([A-Za-z.]+)(==|=|!=)(.*)", part)
    if not match:
        raise Refused(400, "BadRequest", f'invalid field selector: "{part}"')
    path, operator, wanted = match.groups()

    def test(obj: Object) -> bool:
        value: Any = obj
        for step in path.split("."):
            value = value.get(step) if isinstance(value, dict) else None
        return (str(value if value is not None else "") == wanted) == (operator != "!=")

    return test


def _details(kind: Kind, name: str) -> Object:
    return {"name": name, "group": kind.group, "kind": kind.plural}
