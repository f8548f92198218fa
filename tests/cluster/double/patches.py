"""The four kinds of patch: JSON patch, merge patch, strategic merge, and server-side apply.

Lists with keys (`x-kubernetes-list-type: map` in the schema) are merged item by item where an API server does so.
Server-side apply remembers which fields each manager applied: a field it no longer applies, and nobody else does,
goes. Conflicts are found between appliers; fields that others wrote without applying are taken over.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

from double.schemas import Schema

Path = tuple[Any, ...]
"""Keys and, for items of keyed lists, the item's key as a tuple of (name, value) pairs."""


def merge(old: Any, patch: Any) -> Any:
    """RFC 7386: None removes."""
    if not isinstance(patch, dict):
        return copy.deepcopy(patch)
    made = dict(old) if isinstance(old, dict) else {}
    for key, value in patch.items():
        if value is None:
            made.pop(key, None)
        else:
            made[key] = merge(made.get(key), value)
    return made


def json_patch(old: Any, operations: list[dict[str, Any]]) -> Any:
    """RFC 6902. Raises `ValueError` saying which operation does not fit."""
    made = copy.deepcopy(old)
    for operation in operations:
        try:
            made = _operate(made, operation)
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(f"{operation.get('op')} of {operation.get('path')}: {error}") from None
    return made


def strategic(old: Any, patch: Any, schema: Schema | None) -> Any:
    """Kubernetes' strategic merge: as `merge`, with keyed lists merged by key and `$patch` directives."""
    schema = schema or {}
    if isinstance(patch, dict):
        if patch.get("$patch") == "replace":
            return {k: copy.deepcopy(v) for k, v in patch.items() if k != "$patch"}
        made = dict(old) if isinstance(old, dict) else {}
        for key, value in patch.items():
            if key.startswith("$"):
                continue
            if value is None:
                made.pop(key, None)
            else:
                made[key] = strategic(made.get(key), value, _inner(schema, key))
        return made
    keys = _keys(schema)
    if isinstance(patch, list) and keys and isinstance(old, list):
        rest = [p for p in patch if p.get("$patch") != "replace"]
        if len(rest) < len(patch):
            return rest
        made_list = list(old)
        for item in patch:
            at = next((i for i, o in enumerate(made_list) if _same(o, item, keys)), None)
            if item.get("$patch") == "delete":
                if at is not None:
                    del made_list[at]
            elif at is None:
                made_list.append(copy.deepcopy(item))
            else:
                made_list[at] = strategic(made_list[at], item, schema.get("items"))
        return made_list
    return copy.deepcopy(patch)


def apply(old: Any, applied: Any, schema: Schema | None) -> Any:
    """The object with the applied fields in it."""
    schema = schema or {}
    if schema.get("x-kubernetes-map-type") == "atomic":
        return copy.deepcopy(applied)
    if isinstance(applied, dict):
        made = dict(old) if isinstance(old, dict) else {}
        for key, value in applied.items():
            if value is not None:
                made[key] = apply(made.get(key), value, _inner(schema, key))
        return made
    keys = _keys(schema)
    if isinstance(applied, list) and keys and isinstance(old, list):
        made_list = list(old)
        for item in applied:
            at = next((i for i, o in enumerate(made_list) if _same(o, item, keys)), None)
            if at is None:
                made_list.append(copy.deepcopy(item))
            else:
                made_list[at] = apply(made_list[at], item, schema.get("items"))
        return made_list
    if isinstance(applied, list) and schema.get("x-kubernetes-list-type") == "set" and isinstance(old, list):
        return old + [item for item in applied if item not in old]
    return copy.deepcopy(applied)


def fields(applied: Any, schema: Schema | None, at: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every field an applied object sets, with its value."""
    schema = schema or {}
    keys = _keys(schema)
    if isinstance(applied, dict) and applied and schema.get("x-kubernetes-map-type") != "atomic":
        for key, value in applied.items():
            if value is not None:
                yield from fields(value, _inner(schema, key), (*at, key))
    elif isinstance(applied, list) and keys and applied:
        for item in applied:
            name = tuple((k, item.get(k)) for k in keys)
            yield from fields(item, schema.get("items"), (*at, name))
    else:
        yield at, applied


def remove(obj: Any, gone: Iterable[Path]) -> None:
    """Take fields out, and what becomes empty above them; a list's item goes with its key, if nothing else is left."""
    for path in sorted(gone, key=lambda path: (-len(path), _is_key(path))):
        *way, last = path
        trail = [obj]
        for step in way:
            trail.append(_step(trail[-1], step))
        if trail[-1] is None or (_is_key(path) and not set(trail[-1]) <= {k for k, _ in path[-2]}):
            continue
        trail[-1].pop(last, None)
        if _is_key(path):
            trail[-1].clear()
        for i in range(len(way) - 1, -1, -1):
            step, holder, inner = way[i], trail[i], trail[i + 1]
            if inner:
                break
            if isinstance(step, tuple):
                holder.remove(inner)
            else:
                del holder[step]


def dotted(path: Path) -> str:
    """.spec.containers[name="node"].image, as conflicts are told."""
    return "".join(
        "[" + ",".join(f'{k}="{v}"' for k, v in step) + "]" if isinstance(step, tuple) else f".{step}" for step in path
    )


def _is_key(path: Path) -> bool:
    return len(path) > 1 and isinstance(path[-2], tuple) and path[-1] in dict(path[-2])


def _step(value: Any, step: Any) -> Any:
    if isinstance(step, tuple):
        matching = (v for v in value if isinstance(v, dict) and all(v.get(k) == x for k, x in step))
        return next(matching, None) if isinstance(value, list) else None
    return value.get(step) if isinstance(value, dict) else None


def _inner(schema: Schema, key: str) -> Schema:
    found: Any = (schema.get("properties") or {}).get(key) or schema.get("additionalProperties")
    return found if isinstance(found, dict) else {}


def _keys(schema: Schema) -> list[str]:
    return list(schema.get("x-kubernetes-list-map-keys") or []) if schema.get("x-kubernetes-list-type") == "map" else []


def _same(one: Any, other: Any, keys: list[str]) -> bool:
    # A missing protocol means TCP; no other key has a default that matters here.
    usual = {"protocol": "TCP"}
    return all(one.get(k, usual.get(k)) == other.get(k, usual.get(k)) for k in keys)


def _operate(doc: Any, operation: dict[str, Any]) -> Any:
    op, path = operation["op"], operation["path"]
    if op in ("move", "copy"):
        value = copy.deepcopy(_resolve(doc, operation["from"]))
        if op == "move":
            doc = _operate(doc, {"op": "remove", "path": operation["from"]})
        return _operate(doc, {"op": "add", "path": path, "value": value})
    if op == "test":
        if _resolve(doc, path) != operation["value"]:
            raise ValueError(f"testing value {path} failed")
        return doc
    if not path:
        return operation["value"]
    head, _, tail = path.rpartition("/")
    holder, key = _resolve(doc, head), _unescaped(tail)
    if isinstance(holder, list):
        at = len(holder) if key == "-" else int(key)
        if op == "add":
            holder.insert(at, operation["value"])
        elif op == "replace":
            holder[at] = operation["value"]
        else:
            del holder[at]
    elif op == "remove":
        del holder[key]
    elif op == "replace" and key not in holder:
        raise KeyError(key)
    else:
        holder[key] = operation["value"]
    return doc


def _resolve(doc: Any, pointer: str) -> Any:
    for part in pointer.split("/")[1:]:
        doc = doc[int(part)] if isinstance(doc, list) else doc[_unescaped(part)]
    return doc


def _unescaped(part: str) -> str:
    return part.replace("~1", "/").replace("~0", "~")
