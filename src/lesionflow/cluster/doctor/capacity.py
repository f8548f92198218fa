"""The doctor's questions about room: quota, limits, nodes, GPUs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lesionflow.cluster import manifests
from lesionflow.cluster.doctor.scene import Answer, Scene, together
from lesionflow.cluster.jobstate import KINDS as JOB_KINDS
from lesionflow.cluster.settings import Place, parse_selector, parse_tolerations

Amounts = Mapping[str, float]

_UNITS = {"n": 1e-9, "u": 1e-6, "m": 1e-3, "": 1.0}
_UNITS |= {unit: 1000.0 ** (n + 1) for n, unit in enumerate("kMGTPE")}
_UNITS |= {f"{unit}i": 1024.0 ** (n + 1) for n, unit in enumerate("KMGTPE")}


def number(text: object) -> float:
    """A Kubernetes quantity (500m, 8Gi, 1e3) as a number; 0 for what is none."""
    match = re.fullmatch(r"([+-]?[\d.]+(?:[eE][+-]?\d+)?)([A-Za-z]{0,2})", str(text))
    return float(match[1]) * _UNITS.get(match[2], 0.0) if match else 0.0


def shown(resource: str, value: float) -> str:
    """A number as people write that resource."""
    if "memory" in resource or "storage" in resource:
        return f"{value / 2**30:.3g}Gi"
    return f"{value:.3g}"


def quota(scene: Scene) -> Answer:
    """Whether the namespace's quota leaves room for the job's pods and the new claims."""
    job, need = scene.settings.job, _demand(scene)
    faults = []
    for found in scene.read("ResourceQuota"):
        spec, status = found.get("spec", {}), found.get("status", {})
        if "scopeSelector" in spec or {"BestEffort", "Terminating"} & set(spec.get("scopes", [])):
            continue  # Not for pods like ours.
        hard, used = status.get("hard") or spec.get("hard", {}), status.get("used") or {}
        for resource, limit in hard.items():
            free = number(limit) - number(used.get(resource, 0))
            if need.get(resource, 0) > free:
                asked, left = shown(resource, need[resource]), shown(resource, max(free, 0))
                where = f"quota {found['metadata']['name']}: {resource}"
                text = f"{where}: {asked} needed, {left} of {limit} free"
                faults.append(Answer("fail", text, _quota_remedy(resource)))
    return together(faults, f"room for {job.nodes} pods and their claims")


def limits(scene: Scene) -> Answer:
    """Whether a limit range refuses the pods or claims; requests equal limits, so none shrinks them."""
    settings = scene.settings
    pods = {
        "job": _pod(scene),
        "serving": {"cpu": number(settings.serving.cpu), "memory": number(settings.serving.memory)},
    }
    sizes = {v: number(getattr(settings.volumes, v)) for v in manifests.VOLUMES}
    new = {v: {"storage": size} for v, size in sizes.items() if not getattr(settings.volumes, f"{v}_claim")}
    faults = []
    for found in scene.read("LimitRange"):
        for limit in found.get("spec", {}).get("limits", []):
            asked = new if limit["type"] == "PersistentVolumeClaim" else pods
            for what, amounts in asked.items():
                for resource, amount in amounts.items():
                    low, high = limit.get("min", {}).get(resource), limit.get("max", {}).get(resource)
                    field = f"volumes.{what}" if resource == "storage" else f"{what}.{resource}"
                    where = f"{field} is {shown(resource, amount)}, limit range {found['metadata']['name']} allows"
                    if high is not None and amount > number(high):
                        faults.append(
                            Answer("fail", f"{where} at most {high}", f"set {field}={high}, or raise the limit")
                        )
                    if low is not None and amount < number(low):
                        faults.append(Answer("fail", f"{where} no less than {low}", f"set {field}={low}"))
    return together(faults, "no limit range is in the way")


def nodes(scene: Scene) -> Answer:
    """Whether the nodes could hold the job's pods if nothing else ran on them."""
    job, pod = scene.settings.job, _pod(scene)
    wanted = parse_selector(job.node_selector)
    matching = [n for n in scene.read("Node") if wanted.items() <= (n["metadata"].get("labels") or {}).items()]
    if not matching:
        remedy = "label a node so, or change job.node_selector; kubectl get nodes --show-labels lists them"
        return Answer("fail", f"no node has the labels job.node_selector={job.node_selector}", remedy)
    ready = [n for n in matching if _condition(n, "Ready") == "True" and not n.get("spec", {}).get("unschedulable")]
    if not ready:
        remedy = "kubectl describe node says why; kubectl uncordon NODE lets pods in again"
        return Answer("fail", "no node that the job may use is ready and open for pods", remedy)
    refusing = {n["metadata"]["name"]: _taints(n, parse_tolerations(job.tolerations)) for n in ready}
    open_nodes = [n for n in ready if not refusing[n["metadata"]["name"]]]
    if not open_nodes:
        taints = ", ".join(dict.fromkeys(t for ts in refusing.values() for t in ts))
        return Answer("fail", f"every node refuses the job by a taint: {taints}", f"set job.tolerations={taints}")
    room = {n["metadata"]["name"]: _slots(n, pod) for n in open_nodes}
    asked = ", ".join(f"{shown(r, a)} {r}" for r, a in pod.items())
    if not any(room.values()):
        best = {r: max(number(_allocatable(n).get(r, 0)) for n in open_nodes) for r in pod}
        most = ", ".join(f"{shown(r, a)} {r}" for r, a in best.items())
        remedy = "ask for less: " + ", ".join(f"job.{_field(r)}" for r in pod if best[r] < pod[r]) + ", or add a node"
        return Answer("fail", f"no node can hold a pod with {asked}; the most a node has: {most}", remedy)
    together_only = scene.settings.volumes.access == "ReadWriteOnce"
    fit = max(room.values()) if together_only else sum(room.values())
    if fit < job.nodes:
        where = "one node, as ReadWriteOnce demands" if together_only else f"{len(open_nodes)} nodes"
        remedy = f"set job.nodes={fit}, or ask for less per pod (job.cpu, job.memory, job.gpus)"
        return Answer("fail", f"{fit} of the job's {job.nodes} pods ({asked}) fit on {where}", remedy)
    return Answer(
        "ok",
        f"room for {job.nodes} pods of {asked} on {len(open_nodes)} of {len(matching)} nodes, when nothing else runs",
    )


def node_health(scene: Scene) -> Answer:
    faults = []
    for node in scene.read("Node"):
        name = node["metadata"]["name"]
        ill = [c for c in ("DiskPressure", "MemoryPressure", "PIDPressure") if _condition(node, c) == "True"]
        ill += ["NotReady"] if _condition(node, "Ready") != "True" else []
        if ill:
            remedy = "kubectl describe node NODE says why; disk pressure ends when unused images are removed"
            faults.append(Answer("warn", f"node {name}: {', '.join(ill)}", remedy))
    return together(faults, f"all {len(scene.read('Node'))} nodes are ready")


def gpus(scene: Scene) -> Answer:
    job = scene.settings.job
    totals: dict[str, float] = {}
    for node in scene.read("Node"):
        for resource, amount in _allocatable(node).items():
            if "/" in resource and re.search(r"gpu|mig-|gaudi|npu", resource):
                totals[resource] = totals.get(resource, 0) + number(amount)
    have = totals.get(job.gpu_resource, 0)
    others = ", ".join(r for r, n in totals.items() if n and r != job.gpu_resource)
    if not job.gpus:
        if any(totals.values()):
            found = ", ".join(f"{n:.0f} {r}" for r, n in totals.items() if n)
            return Answer(
                "warn", f"the cluster has {found}, but the job asks for none", "set job.gpus=1 to train on them"
            )
        return Answer("ok", "no GPUs asked for, none there")
    if have < job.nodes * job.gpus:
        remedy = (
            f"set job.gpu_resource={others.partition(',')[0]}"
            if others
            else (
                "install the GPU's device plugin or operator, without which Kubernetes sees no GPU; or set job.gpus=0"
            )
        )
        if have:
            remedy = f"set job.nodes and job.gpus to {have:.0f} together, or add GPUs"
        text = f"{job.nodes} pods want {job.gpus} {job.gpu_resource} each; the cluster has {have:.0f}"
        return Answer("fail", text, remedy)
    if job.processes != job.gpus:
        remedy = f"set job.processes={job.gpus}"
        return Answer(
            "warn", f"{job.processes} processes per pod for {job.gpus} GPUs: some stay idle or are shared", remedy
        )
    return Answer("ok", f"{have:.0f} {job.gpu_resource} for {job.nodes} x {job.gpus}")


def _pod(scene: Scene) -> dict[str, float]:
    job = scene.settings.job
    amounts = {"cpu": number(job.cpu), "memory": number(job.memory)}
    return amounts | ({job.gpu_resource: float(job.gpus)} if job.gpus else {})


def _demand(scene: Scene) -> dict[str, float]:
    """What the job and the run's new claims add to the namespace, by the names that quotas use."""
    volumes, job = scene.settings.volumes, scene.settings.job
    need = {"pods": float(job.nodes), "count/pods": float(job.nodes)}
    for resource, amount in _pod(scene).items():
        need |= dict.fromkeys((resource, f"requests.{resource}", f"limits.{resource}"), amount * job.nodes)
    there = {c["metadata"]["name"] for c in scene.read("PersistentVolumeClaim")} if scene.run else set()
    place = Place(scene.run, scene.settings) if scene.run else scene.trial
    new = [c for c in manifests.claims(place) if c["metadata"]["name"] not in there]
    size = sum(number(c["spec"]["resources"]["requests"]["storage"]) for c in new)
    need |= {"persistentvolumeclaims": len(new), "count/persistentvolumeclaims": len(new), "requests.storage": size}
    if volumes.storage_class:
        within = f"{volumes.storage_class}.storageclass.storage.k8s.io"
        need |= {f"{within}/requests.storage": size, f"{within}/persistentvolumeclaims": len(new)}
    if kind := JOB_KINDS.get(scene.launcher):
        need[f"count/{kind.lower()}s.{'trainer.' if kind == 'TrainJob' else ''}kubeflow.org"] = 1
    return need


def _quota_remedy(resource: str) -> str:
    if "storage" in resource or "persistentvolumeclaims" in resource:
        fields = "volumes.data, volumes.logs, volumes.models"
    elif resource.removeprefix("count/") == "pods":
        fields = "job.nodes"
    else:
        fields = f"job.nodes, job.{_field(resource.rpartition('.')[2])}"
    return f"lower {fields}, free some (lesionflow cluster clean), or have the profile's quota raised"


def _field(resource: str) -> str:
    return resource if resource in ("cpu", "memory") else "gpus"


def _allocatable(node: dict[str, Any]) -> dict[str, Any]:
    return node.get("status", {}).get("allocatable") or {}


def _condition(node: dict[str, Any], kind: str) -> str:
    conditions = node.get("status", {}).get("conditions") or []
    return next((str(c["status"]) for c in conditions if c["type"] == kind), "")


def _slots(node: dict[str, Any], pod: Amounts) -> int:
    """How many such pods the node holds when it is empty."""
    has = _allocatable(node)
    by_pods = number(has.get("pods", 110))
    return int(min(by_pods, *(number(has.get(r, 0)) // amount for r, amount in pod.items() if amount)))


def _taints(node: dict[str, Any], tolerations: list[dict[str, str]]) -> list[str]:
    """The node's taints that keep the job's pods away, as `job.tolerations` would name them."""
    left = []
    for taint in node.get("spec", {}).get("taints") or []:
        tolerated = any(
            t["key"] == taint["key"]
            and t["effect"] == taint["effect"]
            and (t["operator"] == "Exists" or t.get("value", "") == taint.get("value", ""))
            for t in tolerations
        )
        if taint["effect"] != "PreferNoSchedule" and not tolerated:
            value = f"={taint['value']}" if taint.get("value") else ""
            left.append(f"{taint['key']}{value}:{taint['effect']}")
    return left
