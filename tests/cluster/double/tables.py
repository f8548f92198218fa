"""Objects as the tables `kubectl get` prints."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from double.core import Kind
from double.store import Object


def wanted(accept: str) -> bool:
    """Whether the client would rather have a table."""
    return "as=Table" in accept.partition(",")[0]


def table(kind: Kind, items: list[Object], version: str, *, head: bool = True) -> Object:
    columns = [("Name", ".metadata.name", "string")]
    columns += [(c["name"], c["jsonPath"], c["type"]) for c in kind.columns if not c.get("priority")]
    if kind.kind == "Pod":
        columns += [("Status", ".status.phase", "string")]
    if not any(path == ".metadata.creationTimestamp" for _, path, _ in columns):
        columns.append(("Age", ".metadata.creationTimestamp", "date"))
    plain = {"type": "string", "format": "", "description": "", "priority": 0}
    definitions = [{"name": name, **plain} for name, _, _ in columns]
    rows = []
    for item in items:
        cells = [_age(_at(item, path)) if type_ == "date" else _at(item, path) for _, path, type_ in columns]
        about = {"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": item["metadata"]}
        rows.append({"cells": cells, "object": about})
    return {
        "kind": "Table",
        "apiVersion": "meta.k8s.io/v1",
        "metadata": {"resourceVersion": version},
        "columnDefinitions": definitions if head else None,
        "rows": rows,
    }


def _at(obj: Any, path: str) -> Any:
    """A CRD column's value: plain steps, and the one filter in use, [-1:] or [?(@.type=='Ready')]."""
    for step in path.replace("['", ".").replace("']", "").strip(".").split(".") if "?(" not in path else _steps(path):
        name, bracket, rest = step.partition("[")
        obj = obj.get(name) if isinstance(obj, dict) else None
        if bracket and isinstance(obj, list):
            if rest.startswith("?(@"):
                key, _, value = rest[3:].rstrip(")]").lstrip(".").partition("==")
                obj = next((o for o in obj if o.get(key) == value.strip("'\"")), None)
            else:
                obj = obj[-1] if obj else None
        if obj is None:
            return ""
    return obj


def _steps(path: str) -> list[str]:
    """Split at the dots outside of brackets."""
    steps, depth = [""], 0
    for letter in path.lstrip("."):
        depth += (letter == "[") - (letter == "]")
        if letter == "." and not depth:
            steps.append("")
        else:
            steps[-1] += letter
    return steps


def _age(text: str) -> str:
    seconds = int((datetime.now(UTC) - datetime.fromisoformat(text)).total_seconds()) if text else 0
    return f"{seconds}s" if seconds < 120 else f"{seconds // 60}m"
