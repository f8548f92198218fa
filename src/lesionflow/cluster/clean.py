"""Remove what runs left on a cluster: everything with our label, and nothing without it.

    found = clean(api, "first")                  # what there is
    found = clean(api, "first", remove=True)     # gone, once this returns

Claims that settings name as existing carry no label, so they stay. So does the Kaggle secret, unless
everything is removed: it belongs to no run. Local directories aren't touched.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any

from lesionflow.cluster import manifests
from lesionflow.cluster.api import Api
from lesionflow.errors import ClusterError

logger = logging.getLogger(__name__)

Object = dict[str, Any]

ORDER = (
    # What makes other objects goes first, or it would make them again ...
    ("TrainJob", "PyTorchJob", "InferenceService", "Tensorboard", "Notebook"),
    ("JobSet", "Job", "Deployment"),
    # ... a runtime is held by the jobs that refer to it ...
    ("TrainingRuntime", "ServingRuntime"),
    # ... and a claim by the pods that mount it. Network policies outlive the pods they guard.
    ("Pod", "Service"),
    ("Secret", "ConfigMap", "NetworkPolicy"),
    ("PersistentVolumeClaim",),
)
"""The kinds that are looked for, in the order in which they are removed."""
LIMIT = 240.0
"""Seconds a removal may take: a pod has 90 to save its work, and a volume is let go after that."""
POLL = 0.5


@dataclass(frozen=True)
class Found:
    """One object with our label."""

    kind: str
    name: str
    run: str
    """Empty for what belongs to no run."""
    removed: bool = False


def clean(api: Api, run: str = "", *, remove: bool = False, timeout: float = LIMIT) -> list[Found]:
    """List what a run (or, without a name, every run) has on the cluster, or remove it and wait until it is gone.

    Can be repeated and interrupted. Raises `ClusterError` naming what still stands after `timeout` seconds and why.
    """
    found = [_found(obj) for kinds in ORDER for obj in _labelled(api, kinds, run, warn=True)]
    if not remove or not found:
        return found
    deadline = time.monotonic() + timeout
    while any(_labelled(api, kinds, run) for kinds in ORDER):
        # Again from the start, should a controller have made something after its kind's turn.
        for kinds in ORDER:
            _remove(api, kinds, run, deadline)
    return [Found(f.kind, f.name, f.run, removed=True) for f in found]


def holds(api: Api, obj: Object) -> str:
    """Why an object that was deleted still stands: its finalizers, and for a claim the pods that mount it."""
    kind, name = obj["kind"], obj["metadata"]["name"]
    why = ", ".join(obj["metadata"].get("finalizers", [])) or "nothing but its controller's slowness"
    users = []
    if kind == "PersistentVolumeClaim":
        for pod in api.list("Pod"):
            volumes = pod["spec"].get("volumes", [])
            if any(v.get("persistentVolumeClaim", {}).get("claimName") == name for v in volumes):
                users.append(pod["metadata"]["name"])
    return f"{kind} {name} is held by {why}" + (f" (mounted by {', '.join(users)}: stop that first)" if users else "")


def _remove(api: Api, kinds: tuple[str, ...], run: str, deadline: float) -> None:
    asked: set[str] = set()
    while standing := _labelled(api, kinds, run):
        for obj in standing:
            if obj["metadata"].get("uid") not in asked and "deletionTimestamp" not in obj["metadata"]:
                api.delete(obj["kind"], obj["metadata"]["name"])
            asked.add(obj["metadata"].get("uid"))
        if time.monotonic() > deadline:
            raise ClusterError(
                "not everything could be removed: "
                + "; ".join(holds(api, obj) for obj in standing)
                + ". Run the same again once the cause is gone; a finalizer whose controller no longer runs is "
                "taken off with `kubectl patch`"
            )
        time.sleep(POLL)


def _labelled(api: Api, kinds: tuple[str, ...], run: str, *, warn: bool = False) -> list[Object]:
    """Objects of these kinds with our labels. What this account may not list it can't have made: it is passed over."""
    found = []
    for kind in kinds:
        try:
            listed = api.list(kind, manifests.selector(run))
        except ClusterError as error:
            if "(403)" not in str(error):
                raise
            if warn:
                logger.warning("%s: left aside, this account may not list it", kind)
            continue
        # Labels are looked at once more: what is deleted must not rest on a server's filter alone.
        found += [obj for obj in listed if _is_ours(obj, run)]
    return found


def _is_ours(obj: Object, run: str) -> bool:
    labels = obj["metadata"].get("labels") or {}
    return labels.get(manifests.MANAGED_BY) == "lesionflow" and (not run or labels.get(manifests.RUN) == run)


def _found(obj: Object) -> Found:
    labels = obj["metadata"]["labels"]
    return Found(obj["kind"], obj["metadata"]["name"], labels.get(manifests.RUN, ""))
