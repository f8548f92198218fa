"""The CEL rules that can be read without CEL: "this never changes", "one of these", "the name looks so".

    self == oldSelf      self in ['a', 'b']      self.metadata.name.matches('...')      size(self.metadata.name) <= 63

Every other rule of a CRD is left to a real cluster.
"""

from __future__ import annotations

import re
from typing import Any

from double.schemas import Found, Schema, below

_ONE_OF = re.compile(r"self in \[(.*)\]")
_NAME = re.compile(r"self\.metadata\.name\.matches\('(.*)'\)")
_LENGTH = re.compile(r"size\(self\.metadata\.name\) <= (\d+)")


def check(schema: Schema, value: Any, old: Any, path: str, found: Found) -> None:
    """Add the rules that a value breaks; `old` is what it replaces, or None."""
    for rule in schema.get("x-kubernetes-validations") or ():
        if not _holds(rule["rule"], value, old):
            found.invalid(path or "<root>", _short(value), rule.get("message") or f"failed rule: {rule['rule']}")
    if isinstance(value, dict):
        properties = schema.get("properties") or {}
        extra = schema.get("additionalProperties")
        for key, inner in value.items():
            within = properties.get(key) or (extra if isinstance(extra, dict) else None)
            if within:
                before = old.get(key) if isinstance(old, dict) else None
                check(within, inner, before, below(path, key), found)
    elif isinstance(value, list) and isinstance(schema.get("items"), dict):
        keys = schema.get("x-kubernetes-list-map-keys") or ()
        for i, inner in enumerate(value):
            same = (o for o in old or () if keys and all(o.get(k) == inner.get(k) for k in keys))
            check(schema["items"], inner, next(same, None), f"{path}[{i}]", found)


def _holds(rule: str, value: Any, old: Any) -> bool:
    if rule == "self == oldSelf":
        return old is None or value == old
    if match := _ONE_OF.fullmatch(rule):
        return str(value) in [v.strip(" '\"") for v in match[1].split(",")]
    if match := _NAME.fullmatch(rule):
        return re.search(match[1], value["metadata"].get("name", "")) is not None
    if match := _LENGTH.fullmatch(rule):
        return len(value["metadata"].get("name", "")) <= int(match[1])
    return True


def _short(value: Any) -> Any:
    return "object" if isinstance(value, (dict, list)) else value
