"""The Training Operator's PyTorchJob controller, releases 1.7 to 1.9.

Habits of it that a client must know are kept:

- With restartPolicy ExitCode, `backoffLimit` (unless 0) does not bound restarts: the pod is made anew, so its
  restart count stays 0, and the operator counts nothing else.
- It sets PYTHONUNBUFFERED over the job's own value, release 1.7 to 0, which buffers.
- Release 1.7 leaves a job whose pod ended with a permanent exit code in Restarting, for ever; since 1.8 it is Failed.
- A job failed by a permanent exit code has no completionTime, so its ttlSecondsAfterFinished never removes it.
"""

from __future__ import annotations

import copy

from double.objects import Object, age, child, holds, name_of, namespace_of, now, set_condition, set_variable
from double.operator import Denied, Operator
from double.scheduler import INIT_WAIT

_LABEL = "training.kubeflow.org"
_PORT_NAME, _PORT = "pytorchjob-port", 23456


class PyTorchJobs(Operator):
    def __init__(self, store: object, denied: Denied, release: tuple[int, int] = (1, 9)) -> None:
        super().__init__(store, denied)
        self.release = release
        self._ended: set[str] = set()

    def reconcile(self) -> None:
        for job in self.objects("PyTorchJob"):
            self._reconcile(job)

    def _reconcile(self, job: Object) -> None:
        status = copy.deepcopy(job.get("status") or {})
        policy = job["spec"].get("runPolicy", {})
        name = name_of(job)
        status.setdefault("conditions", [])
        status.setdefault("replicaStatuses", {})
        self._mark(job, status, "Created", f"PyTorchJob {name} is created.")
        pods = self.children("Pod", job)
        if holds(status, "Succeeded") or holds(status, "Failed"):
            self._clean(job, status, policy, pods)
            self.put(job, status)
            return
        if policy.get("suspend"):
            self._suspend(job, status, pods)
            return
        if holds(status, "Suspended"):
            self._mark(job, status, "Suspended", f"PyTorchJob {name} is resumed.", "False", "Resumed")
            status["startTime"] = now()
        if why := self._over(job, status, policy, pods):
            status.setdefault("completionTime", now())
            for pod in pods:
                self._delete(pod)
            self._tell(job, "Failed", why)
            self._mark(job, status, "Failed", why)
            self.put(job, status)
            return
        for kind, spec in _replicas(job):
            self._pods(job, status, kind, spec, pods)
        self._update(job, status)
        self.put(job, status)

    def _pods(self, job: Object, status: Object, kind: str, spec: Object, pods: list[Object]) -> None:
        counts = {"active": 0, "succeeded": 0, "failed": 0}
        mine = {p["metadata"]["labels"].get(f"{_LABEL}/replica-index"): p for p in pods if _type(p) == kind.lower()}
        policy = spec.get("restartPolicy", "Never")
        for index in range(spec.get("replicas", 1)):
            pod = mine.get(str(index))
            if pod is None:
                self._create(job, kind, index, spec)
                continue
            phase = pod.get("status", {}).get("phase")
            code = _exit_code(pod)
            if code is not None:
                where = f"{namespace_of(pod)}.{name_of(pod)}"
                fresh = pod["metadata"]["uid"] not in self._ended
                self._ended.add(pod["metadata"]["uid"])
                if fresh:
                    self.say(job, "ExitedWithCode", f"Pod: {where} exited with code {code}", again=True)
            if phase == "Failed" and "deletionTimestamp" not in pod["metadata"]:
                retried = code is None or code >= 128
                if policy in ("OnFailure", "Always") or (policy == "ExitCode" and retried):
                    text = f"job {name_of(job)} is restarting because {kind} replica(s) failed."
                    self._delete(pod)
                    self._tell(job, "Restarting", text, "Warning", again=True)
                    self._mark(job, status, "Restarting", text)
                elif policy == "ExitCode" and self.release >= (1, 8):
                    text = f'job "{name_of(job)}" is failing because "{kind}" replica(s) failed.'
                    self._tell(job, "Failed", text, "Warning")
                    self._mark(job, status, "Failed", text)
            counts["active"] += phase == "Running"
            counts["succeeded"] += phase == "Succeeded"
            counts["failed"] += phase == "Failed"
        selector = f"{_LABEL}/job-name={name_of(job)},{_LABEL}/operator-name=pytorchjob-controller"
        selector += f",{_LABEL}/replica-type={kind.lower()}"
        shown = {k: v for k, v in counts.items() if v}
        status["replicaStatuses"][kind] = {**shown, "selector": selector}

    def _update(self, job: Object, status: Object) -> None:
        """The job's conditions from its replicas' counts."""
        status.setdefault("startTime", now())
        replicas = dict(_replicas(job))
        leading = "Master" if "Master" in replicas else "Worker"
        for kind, spec in replicas.items():
            counts = status["replicaStatuses"][kind]
            running, failed = counts.get("active", 0), counts.get("failed", 0)
            wanted, succeeded = spec.get("replicas", 1), counts.get("succeeded", 0)
            where = name_of(job)
            if kind == leading:
                if running:
                    self._mark(job, status, "Running", f"PyTorchJob {where} is running.")
                if succeeded == wanted and not holds(status, "Failed"):
                    text = f"PyTorchJob {where} is successfully completed."
                    status.setdefault("completionTime", now())
                    self._tell(job, "Succeeded", text)
                    self._mark(job, status, "Succeeded", text)
                    return
            if failed and wanted > succeeded + running:
                if spec.get("restartPolicy", "Never") != "Never":
                    text = f"PyTorchJob {where} is restarting because {failed} {kind} replica(s) failed."
                    self._mark(job, status, "Restarting", text)
                else:
                    text = f"PyTorchJob {where} is failed because {failed} {kind} replica(s) failed."
                    self._tell(job, "Failed", text)
                    status.setdefault("completionTime", now())
                    self._mark(job, status, "Failed", text)

    def _create(self, job: Object, kind: str, index: int, spec: Object) -> None:
        name = f"{name_of(job)}-{kind.lower()}-{index}"
        labels = {
            f"{_LABEL}/job-name": name_of(job),
            f"{_LABEL}/operator-name": "pytorchjob-controller",
            f"{_LABEL}/replica-type": kind.lower(),
            f"{_LABEL}/replica-index": str(index),
        }
        if kind == "Master":
            labels[f"{_LABEL}/job-role"] = "master"
        template = copy.deepcopy(spec["template"])
        policy = spec.get("restartPolicy", "Never")
        template["spec"]["restartPolicy"] = "Never" if policy == "ExitCode" else policy
        for container in template["spec"]["containers"]:
            for key, value in environment(job, kind, index, self.release).items():
                set_variable(container, key, value)
            ports = container.get("ports", [])
            if container["name"] == "pytorch" and not any(p.get("name") == _PORT_NAME for p in ports):
                container["ports"] = [*ports, {"name": _PORT_NAME, "containerPort": _PORT}]
        if kind == "Worker" and "Master" in job["spec"]["pytorchReplicaSpecs"]:
            look = f"until nslookup {name_of(job)}-master-0; do echo waiting for master; sleep 2; done"
            wait = {"name": INIT_WAIT, "image": "alpine:3.10", "command": ["sh", "-c", look]}
            template["spec"]["initContainers"] = [*template["spec"].get("initContainers", []), wait]
        metadata = template.get("metadata", {})
        pod = child(job, "Pod", "v1", name, {"spec": template["spec"]}, metadata.get("labels", {}) | labels)
        pod["metadata"]["annotations"] = dict(metadata.get("annotations", {}))
        self.make_pod(job, pod, done="SuccessfulCreatePod", failed="FailedCreatePod")
        port = {"name": _PORT_NAME, "port": _PORT, "targetPort": _PORT}
        service = {"spec": {"clusterIP": "None", "selector": labels, "ports": [port]}}
        if self.make(job, child(job, "Service", "v1", name, service, labels)):
            self.say(job, "SuccessfulCreateService", f"Created service: {name}")

    def _over(self, job: Object, status: Object, policy: Object, pods: list[Object]) -> str:
        """Why the job may go on no longer."""
        limit, deadline = policy.get("backoffLimit"), policy.get("activeDeadlineSeconds")
        if limit is not None:
            restarts = sum(
                s.get("restartCount", 0)
                for p in pods
                if p.get("status", {}).get("phase") == "Running"
                for s in p["status"].get("containerStatuses", [])
            )
            failed = sum(1 for p in pods if p.get("status", {}).get("phase") == "Failed")
            known = sum(s.get("failed", 0) for s in status["replicaStatuses"].values())
            if (restarts >= limit if limit else restarts > 0) or (failed > known and limit < 1):
                return f"Job {name_of(job)} has failed because it has reached the specified backoff limit"
        if deadline is not None and "startTime" in status and age(status["startTime"]) >= deadline:
            return f"Job {name_of(job)} has failed because it was active longer than specified deadline"
        return ""

    def _clean(self, job: Object, status: Object, policy: Object, pods: list[Object]) -> None:
        clean = policy.get("cleanPodPolicy", "None")
        for pod in pods:
            alive = pod.get("status", {}).get("phase") in (None, "Pending", "Running")
            if clean == "All" or (clean == "Running" and alive):
                self._delete(pod)
                self.store.delete("Service", namespace_of(pod), name_of(pod))
        if holds(status, "Succeeded"):
            for counts in status["replicaStatuses"].values():
                if active := counts.pop("active", 0):
                    counts["succeeded"] = counts.get("succeeded", 0) + active
        ttl, ended = policy.get("ttlSecondsAfterFinished"), status.get("completionTime")
        if ttl is not None and ended and age(ended) > ttl:
            self.store.delete("PyTorchJob", namespace_of(job), name_of(job))

    def _suspend(self, job: Object, status: Object, pods: list[Object]) -> None:
        text = f"PyTorchJob {name_of(job)} is suspended."
        for pod in pods:
            self._delete(pod)
        for counts in status["replicaStatuses"].values():
            counts.pop("active", None)
        if holds(status, "Running"):
            self._mark(job, status, "Running", text, "False", "Suspended")
        self._mark(job, status, "Suspended", text)
        self._tell(job, "Suspended", text)
        self.put(job, status)

    def _delete(self, pod: Object) -> None:
        if "deletionTimestamp" not in pod["metadata"]:
            self.store.delete("Pod", namespace_of(pod), name_of(pod))

    def _tell(self, job: Object, kind: str, text: str, type_: str = "Normal", *, again: bool = False) -> None:
        self.say(job, f"PyTorchJob{kind}", text, type_, again=again)

    def _mark(self, job: Object, status: Object, kind: str, text: str, value: str = "True", reason: str = "") -> None:
        """Put a condition as the operator does: Running and Restarting replace each other, an end ends Running."""
        if holds(status, "Failed"):
            return
        other = {"Running": "Restarting", "Restarting": "Running"}.get(kind)
        status["conditions"] = [c for c in status["conditions"] if c["type"] != other]
        reason = f"PyTorchJob{reason or kind}"
        old = next((c for c in status["conditions"] if c["type"] == kind), None)
        if old and (old["status"], old["reason"]) == (value, reason):
            return
        if kind in ("Succeeded", "Failed"):
            for one in status["conditions"]:
                if one["type"] == "Running":
                    one["status"] = "False"
        set_condition(status, kind, value, reason, text, lastUpdateTime=now())


def environment(job: Object, kind: str, index: int, release: tuple[int, int]) -> dict[str, str]:
    """The variables of one replica; WORLD_SIZE counts processes, RANK counts pods."""
    replicas = dict(_replicas(job))
    total = sum(spec.get("replicas", 1) for spec in replicas.values())
    processes = str(job["spec"].get("nprocPerNode", "auto"))
    found = {"PYTHONUNBUFFERED": "1" if release >= (1, 8) else "0"}
    if "Master" in replicas:
        rank = str(index + (kind == "Worker"))
        containers = replicas["Master"]["template"]["spec"]["containers"]
        ports = [p for c in containers if c["name"] == "pytorch" for p in c.get("ports", [])]
        port = next((p["containerPort"] for p in ports if p.get("name") == _PORT_NAME), _PORT)
        found |= {
            "MASTER_PORT": str(port),
            "MASTER_ADDR": f"{name_of(job)}-master-0",
            "WORLD_SIZE": str(total * (int(processes) if processes.isdigit() else 1)),
            "RANK": rank,
            "PET_NPROC_PER_NODE": processes,
            "PET_NODE_RANK": rank,
        }
    return found | {"PET_NNODES": str(total)}


def _replicas(job: Object) -> list[tuple[str, Object]]:
    return sorted(job["spec"]["pytorchReplicaSpecs"].items())


def _type(pod: Object) -> str:
    return str(pod["metadata"].get("labels", {}).get(f"{_LABEL}/replica-type"))


def _exit_code(pod: Object) -> int | None:
    for status in pod.get("status", {}).get("containerStatuses", []):
        if status["name"] == "pytorch" and "terminated" in status["state"]:
            return int(status["state"]["terminated"]["exitCode"])
    return None
