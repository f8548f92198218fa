"""What the operators share: writing statuses and events, and making pods that admission may refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from double.objects import Object, name_of, namespace_of, owned
from double.store import Refused

Denied = Callable[[Object], str]
"""Says why admission refuses a pod; empty if it does not."""


class Operator:
    """Base of the controllers; `reconcile` brings every object of their kind a step further."""

    def __init__(self, store: Any, denied: Denied) -> None:
        self.store, self.denied = store, denied
        self._said: set[tuple[str, str, str]] = set()

    def reconcile(self) -> None:
        raise NotImplementedError

    def objects(self, kind: str) -> list[Object]:
        """All objects of a kind that aren't being deleted; none where the cluster has no such kind."""
        if kind not in self.store.kinds:
            return []
        return [o for o in self.store.list(kind) if "deletionTimestamp" not in o["metadata"]]

    def children(self, kind: str, owner: Object) -> list[Object]:
        return [o for o in self.store.list(kind, namespace_of(owner)) if owned(o, owner)]

    def put(self, obj: Object, status: Object) -> None:
        """Write a status if it is another one."""
        if status != obj.get("status"):
            self.store.set_status(obj["kind"], namespace_of(obj), name_of(obj), status)
            obj["status"] = status

    def say(self, obj: Object, reason: str, message: str, type_: str = "Normal", *, again: bool = False) -> None:
        """An event, once per object and message unless it may come `again`."""
        key = (obj["metadata"]["uid"], reason, message)
        if again or key not in self._said:
            self._said.add(key)
            self.store.event(obj, reason, message, type_)

    def make(self, owner: Object, obj: Object) -> Object | None:
        """Create an owned object unless it exists already."""
        try:
            made: Object = self.store.create(obj, namespace_of(owner))
        except Refused as refused:
            if refused.status != 409:
                raise
            return None
        return made

    def make_pod(self, owner: Object, pod: Object, *, done: str, failed: str) -> bool:
        """Create a pod, and tell so (`done`) or why admission refused it (`failed`) by an event on its owner."""
        why = self.denied(pod) or self._no_account(pod)
        if not why:
            try:
                if self.make(owner, pod):
                    self.say(owner, done, f"Created pod: {name_of(pod)}", again=True)
                return True
            except Refused as refused:
                if refused.status not in (403, 422):
                    raise
                why = refused.message
        self.say(owner, failed, f"Error creating: {why}", "Warning")
        return False

    def _no_account(self, pod: Object) -> str:
        name, where = pod["spec"].get("serviceAccountName", "default"), namespace_of(pod)
        if self.store.get("ServiceAccount", where, name) or name == "default":
            return ""
        lost = f'error looking up service account {where}/{name}: serviceaccount "{name}" not found'
        return f'pods "{name_of(pod)}" is forbidden: {lost}'
