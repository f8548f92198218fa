"""The objects of one cluster, kept in memory and guarded as an API server and its garbage collector would.

    store = Store("kubeflow-1.11", crds, folder)
    store.create({"apiVersion": "v1", "kind": "Pod", ...}, "team")
    store.set_status("Pod", "team", "first", {"phase": "Running"})

Objects go in and out as copies. `Refused` carries what the API would answer.
"""

from __future__ import annotations

import copy
import itertools
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from double import admission, answers, patches
from double.admission import CLAIM_GUARD
from double.answers import Refused, matcher, timestamp
from double.core import Kind, kinds

Object = dict[str, Any]
Key = tuple[str, str, str]
Callback = Callable[[str, Object], None]

_APPLIED = ("name", "namespace", "labels", "annotations", "finalizers", "ownerReferences")


@dataclass(frozen=True)
class Change:
    """One line of the store's history, which watches read."""

    version: int
    type: str
    key: Key
    obj: Object
    old: Object | None


class Store:
    """Thread-safe. Kinds are named "Pod", "PyTorchJob", ...; cluster-wide objects have the namespace ""."""

    def __init__(self, profile: str, crds: Path, folder: Path) -> None:
        self.kinds: dict[str, Kind] = kinds(profile, crds)
        self.folder = folder
        self.held: set[str] = set()
        """Kinds whose deletion waits for `finalize`: a controller that stops their processes first adds them."""
        self.history: list[Change] = []
        self.changed = threading.Condition(threading.RLock())
        """Held during every change, notified after it."""
        self._objects: dict[Key, Object] = {}
        self._applied: dict[str, dict[str, dict[patches.Path, Any]]] = {}
        self._version = itertools.count(1000)
        self._callbacks: list[Callback] = []
        self._pending: list[tuple[str, Object]] = []
        self._dead: set[str] = set()

    @property
    def version(self) -> str:
        """The resourceVersion of the last change."""
        return str(self.history[-1].version if self.history else 0)

    def kind(self, name: str) -> Kind:
        """Raises `Refused` (404) for a kind the cluster does not have."""
        if name not in self.kinds:
            raise Refused(404, "NotFound", "the server could not find the requested resource")
        return self.kinds[name]

    def get(self, kind: str, namespace: str | None, name: str) -> Object | None:
        with self.changed:
            found = self._objects.get(self._key(kind, namespace, name))
            return copy.deepcopy(found)

    def list(self, kind: str, namespace: str | None = None, labels: str = "", fields: str = "") -> list[Object]:
        """All objects that match, oldest first. Raises `Refused` (400) for a bad selector."""
        fits = matcher(labels, fields)
        with self.changed:
            return [
                copy.deepcopy(obj)
                for (k, ns, _), obj in self._objects.items()
                if k == kind and (not namespace or ns == namespace) and fits(obj)
            ]

    def create(self, obj: Object, namespace: str | None = None, *, dry_run: bool = False, loose: str = "") -> Object:
        """Store a new object. Raises `Refused` if it is invalid, exists already or finds no namespace."""
        kind = self.kind(str(obj.get("kind")))
        obj = copy.deepcopy(obj)
        metadata = obj.setdefault("metadata", {})
        if kind.namespaced:
            metadata["namespace"] = namespace or metadata.get("namespace") or "default"
        else:
            metadata.pop("namespace", None)
        if not metadata.get("name") and metadata.get("generateName"):
            metadata["name"] = f"{metadata['generateName']}{uuid.uuid4().hex[:5]}"
        with self._change():
            obj = admission.checked(kind, obj, loose)
            metadata = obj["metadata"]
            where = metadata.get("namespace", "")
            if where and ("Namespace", "", where) not in self._objects:
                raise Refused(404, "NotFound", f'namespaces "{where}" not found', {"name": where, "kind": "namespaces"})
            key = (kind.kind, where, metadata["name"])
            if key in self._objects:
                raise answers.exists(kind, key[2])
            around = [o for (k, ns, _), o in self._objects.items() if ns == where or k == "StorageClass"]
            admission.admit(kind, obj, self._objects.get(("Namespace", "", where)), around)
            metadata |= {"uid": str(uuid.uuid4()), "creationTimestamp": timestamp(), "generation": 1}
            if not dry_run:
                self._put(key, obj, "ADDED")
                owners = {o["uid"] for o in metadata.get("ownerReferences") or []}
                if owners and owners <= self._dead:
                    self._delete(key)
            return copy.deepcopy(obj)

    def update(self, obj: Object, *, part: str = "", dry_run: bool = False, loose: str = "") -> Object:
        """Replace an object; `part` limits it to "status" or, with "main", to all but the status.

        Raises `Refused`: 404, 409 if its resourceVersion is an old one, 422 if it is invalid.
        """
        kind = self.kind(str(obj.get("kind")))
        with self._change():
            metadata = obj.get("metadata", {})
            key = self._key(kind.kind, metadata.get("namespace"), metadata.get("name", ""))
            old = self._existing(key)
            stale = metadata.get("resourceVersion")
            if stale and stale != old["metadata"]["resourceVersion"]:
                raise answers.stale(kind, key[2])
            new = copy.deepcopy(obj)
            if part == "status":
                new = {**copy.deepcopy(old), "status": new.get("status", {})}
            elif part == "main" and kind.status:
                new.pop("status", None)
                if "status" in old:
                    new["status"] = copy.deepcopy(old["status"])
            fixed = ("uid", "creationTimestamp", "generation", "resourceVersion", "deletionTimestamp", "namespace")
            kept = {k: old["metadata"][k] for k in fixed if k in old["metadata"]}
            new["metadata"] = {**new.get("metadata", {}), **kept}
            new = admission.checked(kind, new, loose, old)
            if new == old:
                return copy.deepcopy(old)
            main = {k: v for k, v in new.items() if k not in ("metadata", "status")}
            if main != {k: v for k, v in old.items() if k not in ("metadata", "status")}:
                new["metadata"]["generation"] = old["metadata"].get("generation", 1) + 1
            if not dry_run:
                self._put(key, new, "MODIFIED", old)
                self._settle(key)
            return copy.deepcopy(new)

    def apply(
        self, obj: Object, namespace: str | None, manager: str, *, force: bool, dry_run: bool = False, loose: str = ""
    ) -> tuple[Object, bool]:
        """Server-side apply; also says whether the object is new. Raises `Refused` (409) for a conflict."""
        kind = self.kind(str(obj.get("kind")))
        schema = kind.schemas[kind.version]
        obj = copy.deepcopy(obj)
        metadata = obj.setdefault("metadata", {})
        with self._change():
            key = self._key(kind.kind, namespace or metadata.get("namespace"), metadata.get("name", ""))
            old = self._objects.get(key)
            given = admission.shaped(kind, obj, loose)
            body = {k: v for k, v in given.items() if k not in ("apiVersion", "kind")}
            body["metadata"] = {k: v for k, v in body["metadata"].items() if k in _APPLIED}
            mine = dict(patches.fields(body, schema))
            others = self._applied.get(old["metadata"]["uid"], {}) if old else {}
            owned = dict(others)
            for other, fields in others.items():
                if other == manager:
                    continue
                clash = [p for p, v in mine.items() if p in fields and fields[p] != v]
                if clash and not force:
                    raise answers.conflict(kind, key[2], other, clash)
                owned[other] = {p: v for p, v in fields.items() if p not in clash}
            owned[manager] = mine
            made = patches.apply(old, body, schema) if old else {**obj, **body}
            made |= {"apiVersion": kind.api_version, "kind": kind.kind}
            elsewhere = {p for other, fields in owned.items() if other != manager for p in fields}
            made = copy.deepcopy(made)
            patches.remove(made, set(others.get(manager, {})) - set(mine) - elsewhere)
            if old is None:
                stored = self.create(made, namespace, dry_run=dry_run, loose=loose)
            else:
                stored = self.update(made, part="main", dry_run=dry_run, loose=loose)
            if not dry_run:
                self._applied[stored["metadata"]["uid"]] = owned
            return stored, old is None

    def set_status(self, kind: str, namespace: str | None, name: str, status: Object) -> Object:
        """Replace an object's status, as its controller would."""
        with self._change():
            obj = self._existing(self._key(kind, namespace, name))
            return self.update({**obj, "status": status}, part="status")

    def delete(self, kind: str, namespace: str | None, name: str, *, orphan: bool = False, now: bool = False) -> bool:
        """Delete an object and what it owns; False if it isn't there.

        A kind in `held`, or an object with finalizers, only gets its deletionTimestamp; `now` does not wait for
        `held`. Foreground deletion is not told apart from background deletion.
        """
        with self._change():
            key = self._key(kind, namespace, name)
            if key not in self._objects:
                return False
            self._delete(key, orphan=orphan, now=now)
            return True

    def finalize(self, kind: str, namespace: str | None, name: str) -> None:
        """Let go of an object of a `held` kind that is being deleted."""
        with self._change():
            key = self._key(kind, namespace, name)
            if key in self._objects and not self._objects[key]["metadata"].get("finalizers"):
                self._drop(key)

    def subscribe(self, callback: Callback) -> None:
        """Call back with ("ADDED" | "MODIFIED" | "DELETED", object) after each change, from the changing thread.

        The store is not locked meanwhile, so the order across threads is that of the resourceVersions only.
        """
        self._callbacks.append(callback)

    def event(self, obj: Object, reason: str, message: str, type: str = "Normal") -> Object:
        """Record an Event about an object."""
        metadata = obj["metadata"]
        where = metadata.get("namespace", "default")
        about = {k: metadata[k] for k in ("name", "namespace", "uid", "resourceVersion") if k in metadata}
        return self.create(
            {
                "apiVersion": "v1",
                "kind": "Event",
                "metadata": {"name": f"{metadata['name'][:200]}.{uuid.uuid4().hex[:16]}", "namespace": where},
                "involvedObject": {"apiVersion": obj["apiVersion"], "kind": obj["kind"], **about},
                "reason": reason,
                "message": message,
                "type": type,
                "count": 1,
                "firstTimestamp": timestamp(),
                "lastTimestamp": timestamp(),
                "source": {"component": "double"},
            },
            where,
        )

    def log_path(self, namespace: str, pod: str, container: str, *, previous: bool = False) -> Path:
        """The file that holds a container's raw log lines; whoever runs the container appends to it."""
        folder = self.folder / "logs" / namespace / pod
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{container}{'.previous' if previous else ''}.log"

    def rotate_log(self, namespace: str, pod: str, container: str) -> None:
        """A container was restarted in its pod: its log so far becomes the previous one."""
        path = self.log_path(namespace, pod, container)
        if path.exists():
            path.replace(self.log_path(namespace, pod, container, previous=True))

    def _existing(self, key: Key) -> Object:
        if key not in self._objects:
            raise answers.not_found(self.kinds[key[0]], key[2])
        return self._objects[key]

    def _key(self, kind: str, namespace: str | None, name: str) -> Key:
        return (kind, (namespace or "default") if self.kind(kind).namespaced else "", name)

    def _put(self, key: Key, obj: Object, type: str, old: Object | None = None) -> None:
        obj["metadata"]["resourceVersion"] = str(next(self._version))
        self._objects[key] = obj
        self._tell(key, type, obj, old)

    def _tell(self, key: Key, type: str, obj: Object, old: Object | None) -> None:
        snapshot = copy.deepcopy(obj)
        self.history.append(Change(int(obj["metadata"]["resourceVersion"]), type, key, snapshot, old))
        self._pending.append((type, snapshot))

    def _delete(self, key: Key, *, orphan: bool = False, now: bool = False) -> None:
        obj = self._objects[key]
        waits = (key[0] in self.held and not now) or obj["metadata"].get("finalizers")
        if waits and "deletionTimestamp" not in obj["metadata"]:
            old, obj = obj, copy.deepcopy(obj)
            obj["metadata"] |= {"deletionTimestamp": timestamp(), "deletionGracePeriodSeconds": 30}
            self._put(key, obj, "MODIFIED", old)
        if not orphan:
            self._collect(obj["metadata"]["uid"])
        if not waits:
            self._drop(key)
        else:
            self._settle(key)

    def _collect(self, uid: str) -> None:
        """Delete what an object owns alone."""
        for key, obj in list(self._objects.items()):
            owners = obj["metadata"].get("ownerReferences") or []
            if key in self._objects and any(o["uid"] == uid for o in owners):
                if any(o["uid"] != uid and o["uid"] not in self._dead for o in owners):
                    continue
                if "deletionTimestamp" not in obj["metadata"]:
                    self._delete(key)

    def _drop(self, key: Key) -> None:
        obj = self._objects.pop(key)
        self._dead.add(obj["metadata"]["uid"])
        self._applied.pop(obj["metadata"]["uid"], None)
        obj = copy.deepcopy(obj)
        obj["metadata"]["resourceVersion"] = str(next(self._version))
        self._tell(key, "DELETED", obj, obj)
        if key[0] == "Pod":
            shutil.rmtree(self.folder / "logs" / key[1] / key[2], ignore_errors=True)
            for claim in [k for k in self._objects if k[:2] == ("PersistentVolumeClaim", key[1])]:
                self._settle(claim)
        if key[0] == "Namespace":
            for inner in [k for k in self._objects if k[1] == key[2]]:
                if inner in self._objects:
                    self._delete(inner, now=True)

    def _settle(self, key: Key) -> None:
        """An object that waits for nothing more than its last finalizer goes."""
        obj = self._objects.get(key)
        if obj is None or "deletionTimestamp" not in obj["metadata"]:
            return
        guards = obj["metadata"].get("finalizers") or []
        if key[0] == "PersistentVolumeClaim" and guards == [CLAIM_GUARD] and not self._mounted(key):
            guards = []
        if not guards and key[0] not in self.held:
            self._drop(key)

    def _mounted(self, claim: Key) -> bool:
        pods = (o for (k, ns, _), o in self._objects.items() if k == "Pod" and ns == claim[1])
        return any(admission.mounts(pod, claim[2]) for pod in pods)

    @contextmanager
    def _change(self) -> Iterator[None]:
        """Hold the lock; afterwards wake the watches and tell the subscribers, in order and unlocked."""
        with self.changed:
            self._depth = getattr(self, "_depth", 0) + 1
            try:
                yield
            finally:
                self._depth -= 1
                self.changed.notify_all()
                told, outermost = self._pending, self._depth == 0
                if outermost:
                    self._pending = []
        if outermost:
            for type, obj in told:
                for callback in self._callbacks:
                    callback(type, copy.deepcopy(obj))
