"""Small things every controller needs: times, owners, conditions, selectors."""

from __future__ import annotations

import copy
from datetime import UTC, datetime
from typing import Any

Object = dict[str, Any]


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def age(time: str) -> float:
    """Seconds since a timestamp."""
    return (datetime.now(UTC) - datetime.fromisoformat(time)).total_seconds()


def name_of(obj: Object) -> str:
    return str(obj["metadata"]["name"])


def namespace_of(obj: Object) -> str:
    return str(obj["metadata"].get("namespace", ""))


def owned(obj: Object, owner: Object) -> bool:
    """Whether `owner` controls the object."""
    return any(r["uid"] == owner["metadata"]["uid"] for r in obj["metadata"].get("ownerReferences", []))


def controller_of(obj: Object) -> Object | None:
    """The owner reference of what controls the object."""
    return next((r for r in obj["metadata"].get("ownerReferences", []) if r.get("controller")), None)


def owner_reference(owner: Object) -> Object:
    return {
        "apiVersion": owner["apiVersion"],
        "kind": owner["kind"],
        "name": owner["metadata"]["name"],
        "uid": owner["metadata"]["uid"],
        "controller": True,
        "blockOwnerDeletion": True,
    }


def child(owner: Object, kind: str, version: str, name: str, body: Object, labels: Object | None = None) -> Object:
    """An object that goes when its owner goes."""
    metadata = {
        "name": name,
        "namespace": namespace_of(owner),
        "labels": dict(labels or {}),
        "ownerReferences": [owner_reference(owner)],
    }
    return {"apiVersion": version, "kind": kind, "metadata": metadata, **copy.deepcopy(body)}


def condition(status: Object, kind: str) -> Object | None:
    return next((c for c in status.get("conditions", []) if c["type"] == kind), None)


def holds(status: Object, kind: str) -> bool:
    found = condition(status, kind)
    return bool(found) and found["status"] == "True"


def set_condition(status: Object, kind: str, value: str, reason: str = "", message: str = "", **more: Any) -> bool:
    """Put a condition; its time changes with its value only. Says whether the value changed."""
    conditions = status.setdefault("conditions", [])
    old = condition(status, kind)
    new = {"type": kind, "status": value, "lastTransitionTime": now(), **more}
    new |= {key: text for key, text in (("reason", reason), ("message", message)) if text}
    if old is None:
        conditions.append(new)
        return True
    changed = bool(old["status"] != value)
    if not changed:
        new["lastTransitionTime"] = old["lastTransitionTime"]
        new |= {key: old[key] for key in more if key in old}
    conditions[conditions.index(old)] = new
    return changed


def set_variable(container: Object, name: str, value: str | Object) -> None:
    """Set an environment variable of a container, in place of one of that name."""
    environment = [v for v in container.get("env", []) if v["name"] != name]
    field = {"value": value} if isinstance(value, str) else {"valueFrom": value}
    container["env"] = [*environment, {"name": name, **field}]
