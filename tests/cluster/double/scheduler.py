"""The scheduler, as far as one node needs one: claims, extended resources (GPUs) and node selectors."""

from __future__ import annotations

from typing import Any

from double.containers import Waiting
from double.objects import Object, namespace_of
from double.schemas import quantity

NODE = "node-1"
INIT_WAIT = "init-pytorch"
"""The Training Operator's init container: it waits until the master's name resolves."""


def unscheduled(store: Any, pod: Object) -> Waiting | None:
    """Why no node takes a pod; None if one does. CPU and memory are not counted."""
    nodes = store.list("Node")
    for container in pod["spec"]["containers"]:
        for resource, amount in container.get("resources", {}).get("limits", {}).items():
            there = [quantity(n.get("status", {}).get("allocatable", {}).get(resource, 0)) for n in nodes]
            if "/" in resource and quantity(amount) > max(there, default=0):
                return unschedulable(f"1 Insufficient {resource}")
    wanted = pod["spec"].get("nodeSelector", {}).items()
    if wanted and not any(wanted <= n["metadata"].get("labels", {}).items() for n in nodes):
        return unschedulable("1 node(s) didn't match Pod's node affinity/selector")
    for volume in pod["spec"].get("volumes", []):
        if claim := volume.get("persistentVolumeClaim"):
            found = store.get("PersistentVolumeClaim", namespace_of(pod), claim["claimName"])
            if found is None:
                return unschedulable(f'persistentvolumeclaim "{claim["claimName"]}" not found')
            if found.get("status", {}).get("phase") != "Bound":
                return unschedulable("pod has unbound immediate PersistentVolumeClaims")
    return None


def unschedulable(text: str) -> Waiting:
    """What the scheduler says of a pod that fits nowhere."""
    helpless = "preemption: 0/1 nodes are available: 1 Preemption is not helpful for scheduling."
    message = f"0/1 nodes are available: {text}. {helpless}"
    return Waiting("Unschedulable", message, "FailedScheduling", message)


def awaits_master(store: Any, pod: Object) -> Waiting | None:
    """What a worker waits for in its init container; None once the master runs."""
    if not any(c["name"] == INIT_WAIT for c in pod["spec"].get("initContainers", [])):
        return None
    environment = {v["name"]: v.get("value", "") for v in pod["spec"]["containers"][0].get("env", [])}
    master = store.get("Pod", namespace_of(pod), environment.get("MASTER_ADDR", ""))
    running = master is not None and master.get("status", {}).get("phase") == "Running"
    return None if running else Waiting("PodInitializing", "", "")
