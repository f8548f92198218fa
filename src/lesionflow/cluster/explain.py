"""Why pods don't start, or ended before they could say so themselves: one line per cause, with the remedy.

    for line in explain(api, pods).splitlines(): ...

Reads pod statuses first, then the events about the pods, their claims and their owners. What the
cluster says is quoted where it says something exact (counts of nodes, the quota's figures).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lesionflow.cluster.api import Api

Object = dict[str, Any]
Objects = list[Object]

SOON = 45.0
"""Seconds a cause may last that only a changed setting cures (a misspelt image, a missing secret)."""
SLOW = 300.0
"""Seconds for what the cluster may still sort out alone: a volume, a busy registry."""
LONG = 600.0
"""Seconds for a place to run: other jobs end, autoscalers bring nodes."""

TRAINERS = ("pytorch", "node")
"""The training container, as the Training Operator and Trainer want it to be called."""


@dataclass(frozen=True)
class Cause:
    """Why a pod, or the whole job, doesn't get on."""

    about: str
    """The pods or the job it concerns."""
    what: str
    remedy: str
    patience: float = SOON
    """Seconds to wait before it counts as final."""

    @property
    def text(self) -> str:
        return f"{self.about}: {self.what}; {self.remedy}"


def explain(api: Api, pods: Sequence[Object], owners: Sequence[Object] = ()) -> str:
    """The causes of trouble with these pods, a line each; empty if there is none to be seen."""
    return "\n".join(cause.text for cause in find_causes(api, pods, owners))


def find_causes(api: Api, pods: Sequence[Object], owners: Sequence[Object] = ()) -> list[Cause]:
    """The same as data. `owners` are the jobs whose pods are missing: their events say who refused them."""
    found = [cause for pod in pods if (cause := cause_of(api, pod))]
    for owner in owners:
        refusals = [e for e in api.events(owner["metadata"]["name"]) if _about(e, owner) and _is_refusal(e)]
        found += [_refusal(owner["metadata"]["name"], refusals[-1]["message"])] if refusals else []
    merged: dict[tuple[str, str, float], list[str]] = {}
    for cause in found:
        merged.setdefault((cause.what, cause.remedy, cause.patience), []).append(cause.about)
    return [Cause(_join(sorted(set(about))), *rest) for rest, about in merged.items()]


def cause_of(api: Api, pod: Object) -> Cause | None:
    """What is wrong with one pod; None if nothing is, or only its own program failed."""
    return next(
        (cause for look in (_pod_reason, _containers, _unschedulable, _volumes, _sidecar) for cause in look(api, pod)),
        None,
    )


def pulling(api: Api, pod: Object) -> str:
    """The image a pod's node is fetching at the moment, which may take minutes; empty if none."""
    states = [c.get("state", {}).get("waiting", {}) for c in pod.get("status", {}).get("containerStatuses", [])]
    if not any(state.get("reason") in ("ContainerCreating", "PodInitializing") for state in states):
        return ""
    last = next((e for e in reversed(_events(api, pod)) if e.get("reason") in ("Pulling", "Pulled")), {})
    found = re.match(r'Pulling image "(.+)"', last.get("message", ""))
    return found[1] if found else ""


def _pod_reason(api: Api, pod: Object) -> Iterator[Cause]:
    """Ends that the kubelet or the scheduler decided, not the program."""
    name, status = pod["metadata"]["name"], pod.get("status", {})
    reason, message = status.get("reason", ""), _line(status.get("message", ""))
    if reason == "Evicted":
        what = "memory" if "memory" in message else "disk space"
        yield Cause(name, f"evicted: {message}", f"the node ran out of {what}: request more, or wait until it has some")
    elif reason == "DeadlineExceeded":
        yield Cause(name, "ran longer than its deadline", "raise job.deadline (0: none); finished work is kept")
    elif reason.startswith("OutOf") or reason in ("UnexpectedAdmissionError", "NodeAffinity"):
        yield Cause(name, f"its node refused it ({reason}: {message})", "run again; the scheduler will choose anew")
    for condition in status.get("conditions", []):
        if condition["type"] == "DisruptionTarget" and condition["status"] == "True":
            why = condition.get("reason", "")
            remedy = {
                "PreemptionByScheduler": "a pod of higher priority took its place: set job.priority_class",
                "DeletionByPodGC": "its node is lost: look at it with `kubectl get nodes`",
            }.get(why, "its node is being emptied or repaired: it restarts elsewhere")
            yield Cause(name, f"disrupted ({why}: {_line(condition.get('message', ''))})", remedy, SLOW)


def _containers(api: Api, pod: Object) -> Iterator[Cause]:
    name, status = pod["metadata"]["name"], pod.get("status", {})
    for container in [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]:
        state = container.get("state", {})
        if waiting := state.get("waiting"):
            reason, message = waiting.get("reason", ""), _line(waiting.get("message", ""))
            if reason in _IMAGE_REASONS:
                yield _image(api, pod, container.get("image", ""), message)
            elif reason == "CreateContainerConfigError":
                yield _missing(name, message)
            elif reason in ("CreateContainerError", "RunContainerError"):
                yield _not_started(name, message)
            elif reason == "CrashLoopBackOff":
                last = container.get("lastState", {}).get("terminated", {})
                yield from _ended(pod, container["name"], last)
                code = last.get("exitCode", "unknown")
                yield Cause(name, f"{container['name']} crashes again and again (exit code {code})", _SEE_LOG)
        elif ended := state.get("terminated"):
            yield from _ended(pod, container["name"], ended)


_IMAGE_REASONS = (
    "ErrImagePull",
    "ImagePullBackOff",
    "InvalidImageName",
    "ErrImageNeverPull",
    "ImageInspectError",
    "RegistryUnavailable",
)
_SEE_LOG = "`lesionflow cluster logs` shows what it said"


def _ended(pod: Object, container: str, ended: Object) -> Iterator[Cause]:
    """Ends of a container that name a cause outside the program."""
    name, code, message = pod["metadata"]["name"], ended.get("exitCode"), ended.get("message", "")
    if ended.get("reason") == "OOMKilled":
        limit = _limit(pod, container)
        yield Cause(
            name,
            f"out of memory (limit {limit})",
            "raise job.memory, or lower training.batch_size; loader processes and job.shm count too",
        )
    elif ended.get("reason") in ("StartError", "ContainerCannotRun"):
        yield _not_started(name, _line(message))
    elif ended.get("reason") == "DeadlineExceeded":
        yield Cause(name, "ran longer than its deadline", "raise job.deadline (0: none); finished work is kept")
    elif code and re.search(r"No module named '?lesionflow'?", message):
        remedy = "build the image from deploy/, or leave image.packaged off so that the pipeline installs the package"
        yield Cause(name, "the image has no lesionflow", remedy)
    elif code in (126, 127):
        yield _not_started(name, _line(message) or f"exit code {code}")
    elif code == 135 or (code and "insufficient shared memory" in message):
        yield Cause(name, "out of shared memory (/dev/shm)", "raise job.shm, or lower the loader's processes")


def _not_started(name: str, message: str) -> Cause:
    if "/environments/" in message:
        remedy = "the pipeline's install step makes the environment on the models volume: run the pipeline, not the job"
    else:
        remedy = "the image lacks the program, or can't run it: check image.train (a PyTorch image with `python`)"
    return Cause(name, f"the container can't start ({message})", remedy)


def _image(api: Api, pod: Object, image: str, message: str) -> Cause:
    # A back-off only says that it waits; the pull's own error is in an earlier event.
    pulls = [e["message"] for e in _events(api, pod) if "pull" in e.get("message", "") and e.get("type") == "Warning"]
    said = next((_line(m) for m in [message, *reversed(pulls)] if re.search(r"desc = |rror: ", m)), message)
    lower = " ".join([message, *pulls]).lower()
    if re.search(r"unauthori[sz]ed|denied|no basic auth|\b40[13]\b|authenticat", lower):
        remedy = "check its name in image.train; for a private one set image.pull_secret to a secret with credentials"
        return Cause(_name(pod), f"image {image} isn't given to this cluster ({said})", remedy)
    if re.search(r"toomanyrequests|\b429\b|rate limit", lower):
        remedy = "wait, or set image.pull_secret to an account with a higher limit"
        return Cause(_name(pod), f"the registry limits pulls of {image} ({said})", remedy, SLOW)
    if re.search(r"no match for platform|exec format", lower):
        return Cause(_name(pod), f"image {image} isn't built for these nodes' processors", "choose another image.train")
    if re.search(r"not ?found|manifest unknown|invalid reference|invalid image|couldn't parse|neverpull", lower):
        return Cause(_name(pod), f"there is no image {image} ({said})", "check its name and tag in image.train")
    remedy = "check that the nodes reach the registry; `kubectl describe pod` has the pull's history"
    return Cause(_name(pod), f"image {image} can't be pulled ({said})", remedy, SLOW)


def _missing(name: str, message: str) -> Cause:
    """A secret, config map or account that the pod names and the namespace lacks."""
    if "runAsNonRoot" in message:
        return Cause(name, f"refused: {message}", "the image runs as root: set `user` to an id other than 0")
    remedies = {
        "-wheel": "run the pipeline anew: it makes this one",
        "kaggle": "make it with `lesionflow cluster secret`",
    }
    remedy = next(
        (r for part, r in remedies.items() if part in message), "make it in this namespace, or unset its name"
    )
    return Cause(name, f"needs what isn't there: {message}", remedy)


def _unschedulable(api: Api, pod: Object) -> Iterator[Cause]:
    scheduled = [c for c in pod.get("status", {}).get("conditions", []) if c["type"] == "PodScheduled"]
    if not scheduled or scheduled[0]["status"] == "True":
        return
    message = _line(scheduled[0].get("message", "")).partition(" preemption:")[0].rstrip(".")
    if "persistentvolumeclaim" in message.lower() or "persistent volumes to bind" in message:
        yield from _claims(api, pod)
    if "volume node affinity" in message or "available persistent volumes" in message:
        remedy = "the volume belongs to another node or zone: use a storage class with ReadWriteMany, or one node"
    elif resources := re.findall(r"Insufficient ([\w./-]+)", message):
        remedy = " and ".join(
            _ASK_LESS.get(r.partition("/")[0], f"ask for fewer {r}") for r in dict.fromkeys(resources)
        )
        remedy += ", or wait for other jobs to end" + (", or tolerate the taint" if "taint" in message else "")
    elif "taint" in message:
        remedy = "set job.tolerations to the taint (key=value:Effect)"
    elif "selector" in message or "affinity" in message:
        remedy = "no node has those labels: check job.node_selector"
    else:
        remedy = "`lesionflow cluster doctor` shows what the nodes have"
    yield Cause(_name(pod), f"no node can take it ({message})", remedy, LONG)


_ASK_LESS = {
    "nvidia.com": "ask for fewer GPUs (job.gpus, job.nodes; 0 trains on the CPU)",
    "amd.com": "ask for fewer GPUs (job.gpus, job.nodes; 0 trains on the CPU)",
    "cpu": "lower job.cpu",
    "memory": "lower job.memory",
    "ephemeral-storage": "free the nodes' disks",
    "pods": "free some of the nodes' pod slots",
}


def _claims(api: Api, pod: Object) -> Iterator[Cause]:
    for volume in pod["spec"].get("volumes", []):
        if not (name := volume.get("persistentVolumeClaim", {}).get("claimName")):
            continue
        claim = api.get("PersistentVolumeClaim", name)
        if claim is None:
            remedy = "check its name in volumes, or run the pipeline, which makes the claims"
            yield Cause(_name(pod), f"claim {name} doesn't exist", remedy)
        elif claim.get("status", {}).get("phase") != "Bound":
            events = [e for e in api.events(name) if e.get("type") == "Warning"]
            said = _line(events[-1]["message"]) if events else "no volume yet"
            modes = ", ".join(claim["spec"].get("accessModes", []))
            remedy = f"set volumes.storage_class to one that makes {modes} volumes (`kubectl get storageclass`)"
            if "ReadWriteMany" in modes:
                remedy += ", or volumes.access to ReadWriteOnce on a single node"
            yield Cause(_name(pod), f"claim {name} is pending ({said})", remedy, SLOW)


def _volumes(api: Api, pod: Object) -> Iterator[Cause]:
    """Trouble between the scheduler's choice and the first container: only events tell of it."""
    if pod.get("status", {}).get("phase", "Pending") != "Pending":
        return
    for event in reversed(_events(api, pod)):
        reason, message = event.get("reason", ""), _line(event.get("message", ""))
        if reason == "FailedScheduling" and not pod["spec"].get("nodeName"):
            yield from _unschedulable(
                api,
                {**pod, "status": {"conditions": [{"type": "PodScheduled", "status": "False", "message": message}]}},
            )
        if reason == "FailedAttachVolume" and ("Multi-Attach" in message or "exclusively attached" in message):
            remedy = "the claim is ReadWriteOnce: use ReadWriteMany (volumes.access), or keep all pods on that node"
            yield Cause(_name(pod), f"a volume is in use on another node ({message})", remedy, SLOW)
        elif reason == "FailedMount" and re.search(r"(secret|configmap) \S+ not found|non-existent", message):
            yield _missing(_name(pod), message)
        elif reason in ("FailedMount", "FailedAttachVolume", "FailedMapVolume"):
            remedy = "the storage is slow or broken: look at the claim's and the node's events"
            yield Cause(_name(pod), f"a volume can't be mounted ({message})", remedy, SLOW)
        elif reason == "FailedCreatePodSandBox":
            remedy = "the node's network is broken: ask the administrator, or avoid the node with job.node_selector"
            yield Cause(_name(pod), f"no sandbox ({message})", remedy, SLOW)


def _sidecar(api: Api, pod: Object) -> Iterator[Cause]:
    """A job's pod whose own work is done, but whose proxy never ends."""
    states = {c["name"]: c.get("state", {}) for c in pod.get("status", {}).get("containerStatuses", [])}
    ended = any("terminated" in state for name, state in states.items() if name in TRAINERS)
    others = [name for name, state in states.items() if name not in TRAINERS and "running" in state]
    if ended and others:
        remedy = "a sidecar never lets a job end: set istio = false, and clean up the job"
        yield Cause(_name(pod), f"training ended, but {_join(others)} keeps the pod alive", remedy)


def _is_refusal(event: Object) -> bool:
    return event.get("type") == "Warning" and bool(
        re.search(r"FailedCreate|CreationFailed|FailedDeploy", event.get("reason", ""))
    )


def _refusal(owner: str, message: str) -> Cause:
    """Why a controller could not create a pod, from its own event."""
    said = _line(message)
    if "exceeded quota" in said:
        figures = said[said.index("exceeded quota") :]
        remedy = "ask for less (job.cpu, job.memory, job.gpus, job.nodes), or clean up what else runs"
        return Cause(owner, figures, remedy, LONG)
    remedies = {
        r"violates PodSecurity": "the namespace's pod security level forbids these pods: use another namespace",
        r"service ?account": "set service_account to one this namespace has (`kubectl get serviceaccounts`)",
        r"must specify": "the namespace's quota wants limits that a sidecar doesn't set: ask for a LimitRange",
        r"(max|min)imum \S+ usage": "the namespace's LimitRange forbids the amount: change job.cpu or job.memory",
        r"PriorityClass": "check job.priority_class (`kubectl get priorityclasses`)",
        r"webhook": "a policy of the cluster forbids it: its message says which field, or ask the administrator",
    }
    remedy = next((r for pattern, r in remedies.items() if re.search(pattern, said)), "see `kubectl get events`")
    return Cause(owner, f"its pods are refused ({said})", remedy)


def _events(api: Api, pod: Object) -> Objects:
    return [e for e in api.events(_name(pod)) if _about(e, pod)]


def _about(event: Object, obj: Object) -> bool:
    """Whether an event is about this very object, not about an earlier one of its name."""
    theirs, ours = event.get("involvedObject", {}).get("uid"), obj["metadata"].get("uid")
    return not theirs or not ours or theirs == ours


def _limit(pod: Object, container: str) -> str:
    found: Object = next((c for c in pod["spec"]["containers"] if c["name"] == container), {})
    return str(found.get("resources", {}).get("limits", {}).get("memory", "that of its node"))


def _name(pod: Object) -> str:
    return str(pod["metadata"]["name"])


def _line(text: str) -> str:
    """One line of at most 400 characters."""
    return " ".join(text.split())[:400]


def _join(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
