"""Training jobs as they stand on a cluster, in one shape for both kinds.

A PyTorchJob tells its phase in conditions; a TrainJob only how it ended, the rest its pods and its JobSet tell.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lesionflow.cluster import manifests
from lesionflow.cluster.api import Api
from lesionflow.cluster.explain import TRAINERS, find_causes
from lesionflow.cluster.settings import Place, Settings
from lesionflow.errors import ClusterError

Object = dict[str, Any]
Objects = list[Object]

KINDS = {"trainjob": "TrainJob", "pytorchjob": "PyTorchJob"}
"""Launcher -> kind, in the order in which `auto` looks for them."""
ENDED = ("Succeeded", "Failed")
RUNTIME_PATIENCE = 30.0
"""Seconds until Trainer's webhook must have seen a new runtime."""


@dataclass(frozen=True)
class JobState:
    """One training job; times are RFC 3339, empty where there is none yet."""

    name: str
    kind: str
    phase: str
    """Created, Running, Restarting, Succeeded, Failed or Suspended."""
    nodes: int
    ready: int
    """Nodes whose training runs, or is done."""
    restarts: int
    """As far as the cluster remembers: it forgets events after an hour."""
    started: str
    ended: str
    reason: str
    """Why it failed, or what keeps it from starting."""


def launcher(api: Api, settings: Settings) -> str:
    """Which launcher trains on this cluster: `trainjob`, `pytorchjob`, or `local` if the settings say so.

    Raises `ClusterError` if the cluster knows no such job.
    """
    chosen = settings.job.launcher
    if chosen == "local":
        return chosen
    if chosen != "auto":
        if not api.serves(KINDS[chosen]):
            others = [name for name, kind in KINDS.items() if name != chosen and api.serves(kind)]
            instead = f"set job.launcher to auto or {others[0]}" if others else "ask its administrator to install it"
            raise ClusterError(f"job.launcher is {chosen}, but this cluster knows no {KINDS[chosen]}: {instead}")
        return chosen
    for name, kind in KINDS.items():
        if api.serves(kind):
            return name
    raise ClusterError(
        "this cluster knows neither TrainJob nor PyTorchJob: ask its administrator to install Kubeflow Trainer or the "
        "Training Operator, or train inside the pipeline's own pod with job.launcher = local"
    )


def states(api: Api, place: Place) -> list[JobState]:
    """The run's training jobs of both kinds, oldest first."""
    jobs = [job for kind in KINDS.values() for job in api.list(kind, manifests.selector(place.name))]
    jobs.sort(key=lambda job: str(job["metadata"].get("creationTimestamp", "")))
    return [state_of(api, job, pods_of(api, job)) for job in jobs]


def phase_of(job: Object) -> str:
    """The phase that a job's own status tells; Created if it tells none."""
    true = {c["type"] for c in job.get("status", {}).get("conditions", []) if c.get("status") == "True"}
    for condition, phase in (("Failed", "Failed"), ("Succeeded", "Succeeded"), ("Complete", "Succeeded")):
        if condition in true:
            return phase
    return next((phase for phase in ("Suspended", "Restarting", "Running") if phase in true), "Created")


def state_of(api: Api, job: Object, pods: Objects) -> JobState:
    """One job's state, from its object and its pods."""
    status, phase = job.get("status", {}), phase_of(job)
    nodes = nodes_of(job)
    # A job that is done may have lost its pods.
    ready = nodes if phase == "Succeeded" else sum(_is_ready(pod) for pod in pods)
    restarts = restarts_of(api, job)
    if phase == "Created" and job["kind"] == "TrainJob":
        running = len(pods) == nodes and all(pod.get("status", {}).get("phase") == "Running" for pod in pods)
        phase = "Running" if running else "Restarting" if restarts else "Created"
    starts = [pod["status"]["startTime"] for pod in pods if pod.get("status", {}).get("startTime")]
    last = verdict(job)
    reason = last.get("message", "") if phase == "Failed" else ""
    if phase in ("Created", "Restarting"):
        reason = next((cause.text for cause in find_causes(api, pods, missing_owners(api, job, pods))), "")
    return JobState(
        name=job["metadata"]["name"],
        kind=job["kind"],
        phase=phase,
        nodes=nodes,
        ready=ready,
        restarts=restarts,
        started=status.get("startTime") or min(starts, default=""),
        ended=(status.get("completionTime") or last.get("lastTransitionTime", "")) if phase in ENDED else "",
        reason=reason,
    )


def nodes_of(job: Object) -> int:
    spec = job["spec"]
    if job["kind"] == "TrainJob":
        return int(spec.get("trainer", {}).get("numNodes", 1))
    return sum(int(replica.get("replicas", 1)) for replica in spec["pytorchReplicaSpecs"].values())


def verdict(job: Object) -> Object:
    """The condition that says how a job ended; empty while it hasn't."""
    conditions = job.get("status", {}).get("conditions", [])
    ends = ("Failed", "Succeeded", "Complete")
    return next((c for c in conditions if c["type"] in ends and c.get("status") == "True"), {})


def pods_of(api: Api, job: Object) -> Objects:
    """A job's pods, in the order of its nodes."""
    name = job["metadata"]["name"]
    run = job["metadata"].get("labels", {}).get(manifests.RUN, "")
    owned = ("training.kubeflow.org/job-name", "jobset.sigs.k8s.io/jobset-name")
    listed = api.list("Pod", f"{manifests.selector(run)},lesionflow/part=train")
    mine = [pod for pod in listed if name in (pod["metadata"].get("labels", {}).get(label) for label in owned)]
    return sorted(mine, key=lambda pod: (node_of(pod), pod["metadata"].get("creationTimestamp", "")))


def node_of(pod: Object) -> int:
    """Which of the job's nodes a pod is, as torchrun counts them."""
    metadata = pod["metadata"]
    labels = {**metadata.get("annotations", {}), **metadata.get("labels", {})}
    if "training.kubeflow.org/replica-type" in labels:
        index = int(labels.get("training.kubeflow.org/replica-index", 0))
        return index if labels["training.kubeflow.org/replica-type"].lower() == "master" else index + 1
    return int(labels.get("batch.kubernetes.io/job-completion-index", 0))


def trainer_of(pod: Object) -> Object:
    """The status of a pod's training container, init containers and sidecars aside; empty before there is one."""
    statuses: Objects = pod.get("status", {}).get("containerStatuses", [])
    return next((s for s in statuses if s["name"] in TRAINERS), {})


def ended_of(pod: Object) -> Object:
    """How a pod's training container ended (exitCode, reason, message, finishedAt); empty while it hasn't."""
    return dict(trainer_of(pod).get("state", {}).get("terminated", {}))


def condemned(pods: Objects, codes: Sequence[int] = ()) -> Objects:
    """The pods whose training failed (with one of `codes`, if given), the likeliest cause first.

    When one node fails the others follow, within the second and with codes of their own: 1 from a broken
    connection, 143 and 137 from being stopped. A code of our table says more than these, and so does a pod out
    of memory.
    """
    failed = [
        pod for pod in pods if ended_of(pod).get("exitCode") and (not codes or ended_of(pod)["exitCode"] in codes)
    ]

    def rank(pod: Object) -> tuple[int, str, int]:
        ended = ended_of(pod)
        said = ended["exitCode"] in (2, 3, 4, 5) or ended.get("reason") == "OOMKilled"
        stopped = ended["exitCode"] in (137, 143)
        return (0 if said else 2 if stopped else 1, ended.get("finishedAt", ""), node_of(pod))

    return sorted(failed, key=rank)


def has_begun(pod: Object) -> bool:
    """Whether a pod's training container runs, or ran."""
    return bool(trainer_of(pod).get("state", {}).keys() & {"running", "terminated"})


def missing_owners(api: Api, job: Object, pods: Objects) -> Objects:
    """Whoever should have made the pods that aren't there: the job, and what stands between it and its pods."""
    if len(pods) >= nodes_of(job):
        return []
    name = job["metadata"]["name"]
    between = [("JobSet", name), ("Job", f"{name}-node-0")] if job["kind"] == "TrainJob" else []
    return [job, *(found for kind, called in between if (found := _may_get(api, kind, called)))]


def _is_ready(pod: Object) -> bool:
    container = trainer_of(pod)
    return bool(container.get("ready")) or ended_of(pod).get("exitCode") == 0


def restarts_of(api: Api, job: Object) -> int:
    """How often a job's pods were made again, as far as the cluster remembers."""
    name = job["metadata"]["name"]
    if job["kind"] == "TrainJob":
        return int((_may_get(api, "JobSet", name) or {}).get("status", {}).get("restarts", 0))
    # The operator doesn't count, but it says so whenever it creates a pod.
    created: dict[str, int] = {}
    for event in api.events(name):
        if (
            event.get("reason") == "SuccessfulCreatePod"
            and event["involvedObject"].get("uid") == job["metadata"]["uid"]
        ):
            pod = re.sub(r".*: ", "", event["message"])
            created[pod] = created.get(pod, 0) + int(event.get("count") or 1)
    return max((count - 1 for count in created.values()), default=0)


def _may_get(api: Api, kind: str, name: str) -> Object | None:
    """An object that a contributor of the namespace may not be allowed to see."""
    try:
        return api.get(kind, name)
    except ClusterError:
        return None


def error_line(text: str) -> str:
    """What a program's log says ended it: its last "error: ..." line, without that word; empty if there is none."""
    lines = [line.removeprefix("error: ") for line in text.splitlines() if line.startswith("error: ")]
    return lines[-1] if lines else ""


def create_job(api: Api, job: Object) -> Object:
    """Create a job. Trainer's webhook may not know the runtime yet that was made a moment before: then again."""
    deadline = time.monotonic() + RUNTIME_PATIENCE
    while True:
        try:
            return api.create(job)
        except ClusterError as error:
            if "must be created before" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.5)
