"""Kubeflow Trainer 2.1 to 2.3 and the JobSet controller below it: TrainJob -> JobSet -> Jobs -> pods.

Of a TrainJob's fields, the initializers and the releases' ways to patch a runtime's pods (podTemplateOverrides,
runtimePatches) are not followed.
"""

from __future__ import annotations

import copy
import hashlib
from typing import Any

from double.objects import Object, age, child, condition, holds, name_of, namespace_of, set_condition, set_variable
from double.operator import Denied, Operator
from double.schemas import quantity

_SET = "jobset.sigs.k8s.io"
_ATTEMPT = f"{_SET}/restart-attempt"
_STEP = "trainer.kubeflow.org/trainjob-ancestor-step"
_INDEX = "metadata.annotations['batch.kubernetes.io/job-completion-index']"


class TrainJobs(Operator):
    """Fills in the runtime, makes a JobSet of it and copies its status. A missing runtime is an event, no condition.

    Releases until late 2026 forget a failure once its JobSet is gone (by its ttlSecondsAfterFinished, say) and
    make a new one, with all its restarts before it; release 2.1 even for a job that was complete. So does this.
    """

    def __init__(self, store: object, denied: Denied, release: tuple[int, int]) -> None:
        super().__init__(store, denied)
        self.release = release

    def reconcile(self) -> None:
        for job in self.objects("TrainJob"):
            self._reconcile(job)

    def _reconcile(self, job: Object) -> None:
        status = copy.deepcopy(job.get("status") or {})
        suspended = bool(job["spec"].get("suspend"))
        made = self.store.get("JobSet", namespace_of(job), name_of(job))
        if made is None and not (holds(status, "Complete") and self.release > (2, 1)):
            reference = job["spec"]["runtimeRef"]
            kind = reference.get("kind", "ClusterTrainingRuntime")
            where = "" if kind == "ClusterTrainingRuntime" else namespace_of(job)
            runtime = self.store.get(kind, where, reference["name"])
            if runtime is None:
                lost = f'{kind}.trainer.kubeflow.org "{reference["name"]}" not found'
                text = f"TrainJob resources reconciliation failed: not found specified {kind}: {lost}"
                self.say(job, "TrainJobResourcesCreationFailed", text, "Warning")
                return
            body = {"spec": job_set_spec(job, runtime)}
            extra = runtime["spec"]["template"].get("metadata", {}).get("labels", {})
            labels = extra | job["spec"].get("labels", {})
            made = self.make(job, child(job, "JobSet", "jobset.x-k8s.io/v1alpha2", name_of(job), body, labels))
            status["conditions"] = [c for c in status.get("conditions", []) if c["type"] != "Failed"]
        elif made is not None and bool(made["spec"].get("suspend")) != suspended:
            made = self.store.update(made | {"spec": made["spec"] | {"suspend": suspended}})
        if suspended:
            set_condition(status, "Suspended", "True", "Suspended", "TrainJob is suspended")
        elif holds(status, "Suspended"):
            set_condition(status, "Suspended", "False", "Resumed", "TrainJob is resumed")
        if made is not None:
            below = made.get("status", {})
            for theirs, ours in (("Completed", "Complete"), ("Failed", "Failed")):
                if holds(below, theirs):
                    found: Any = condition(below, theirs)
                    set_condition(status, ours, "True", found["reason"], found["message"])
            status["jobsStatus"] = copy.deepcopy(below.get("replicatedJobsStatus", []))
        self.put(job, status)


class JobSets(Operator):
    def reconcile(self) -> None:
        for job_set in self.objects("JobSet"):
            self._reconcile(job_set)

    def _reconcile(self, job_set: Object) -> None:
        status = copy.deepcopy(job_set.get("status") or {"restarts": 0})
        restarts = status.get("restarts", 0)
        jobs = self.children("Job", job_set)
        current = [j for j in jobs if int(j["metadata"]["labels"][_ATTEMPT]) == restarts]
        for job in jobs:
            if job not in current:
                self.store.delete("Job", namespace_of(job), name_of(job))
        failed = [j for j in current if holds(j.get("status", {}), "Failed")]
        done = [j for j in current if holds(j.get("status", {}), "Complete")]
        active = [j for j in current if j not in failed and j not in done]
        kinds = job_set["spec"]["replicatedJobs"]
        status["replicatedJobsStatus"] = [_counts(k["name"], active, done, failed) for k in kinds]
        wanted = sum(k.get("replicas", 1) for k in kinds)
        if holds(status, "Completed") or holds(status, "Failed"):
            for job in active:
                self.store.delete("Job", namespace_of(job), name_of(job))
            self._expire(job_set, status)
        elif failed:
            self._failed(job_set, status, failed)
        elif len(done) >= wanted:
            text = "jobset completed successfully"
            set_condition(status, "Completed", "True", "AllJobsCompleted", text)
            status["terminalState"] = "Completed"
            self.say(job_set, "AllJobsCompleted", text)
        else:
            self._run(job_set, status, jobs)
        self.put(job_set, status)

    def _run(self, job_set: Object, status: Object, jobs: list[Object]) -> None:
        suspended = bool(job_set["spec"].get("suspend"))
        name = name_of(job_set)
        spec = {"clusterIP": "None", "selector": {f"{_SET}/jobset-name": name}, "publishNotReadyAddresses": True}
        self.make(job_set, child(job_set, "Service", "v1", name, {"spec": spec}))
        pods = self.store.list("Pod", namespace_of(job_set), f"{_SET}/jobset-name={name}")
        # Jobs go in the foreground: a name is free again once the last pod of its previous job is gone.
        uids = {j["metadata"]["uid"] for j in jobs}
        labels = [p["metadata"]["labels"] for p in pods]
        busy = {own["job-name"] for own in labels if own["controller-uid"] not in uids}
        existing = {name_of(j): j for j in jobs}
        for kind in job_set["spec"]["replicatedJobs"]:
            for index in range(kind.get("replicas", 1)):
                job = self._job(job_set, kind, index, status.get("restarts", 0))
                found = existing.get(name_of(job))
                if found is None and name_of(job) not in busy:
                    self.make(job_set, job)
                elif found and bool(found["spec"].get("suspend")) != suspended:
                    self.store.update(found | {"spec": found["spec"] | {"suspend": suspended}})
        if suspended:
            set_condition(status, "Suspended", "True", "SuspendedJobs", "jobset is suspended")
        elif holds(status, "Suspended"):
            set_condition(status, "Suspended", "False", "ResumeJobs", "jobset is resumed")

    def _job(self, job_set: Object, kind: Object, index: int, attempt: int) -> Object:
        name = f"{name_of(job_set)}-{kind['name']}-{index}"
        labels = {
            f"{_SET}/jobset-name": name_of(job_set),
            f"{_SET}/replicatedjob-name": kind["name"],
            f"{_SET}/replicatedjob-replicas": str(kind.get("replicas", 1)),
            f"{_SET}/job-index": str(index),
            f"{_SET}/job-key": hashlib.sha1(f"{namespace_of(job_set)}/{name}".encode()).hexdigest(),
            _ATTEMPT: str(attempt),
        }
        spec = copy.deepcopy(kind["template"]["spec"])
        spec.setdefault("completionMode", "Indexed")
        spec["suspend"] = bool(job_set["spec"].get("suspend"))
        metadata = spec["template"].setdefault("metadata", {})
        metadata["labels"] = metadata.get("labels", {}) | labels
        spec["template"]["spec"].setdefault("restartPolicy", "OnFailure")
        spec["template"]["spec"]["subdomain"] = name_of(job_set)
        own = kind["template"].get("metadata", {}).get("labels", {})
        return child(job_set, "Job", "batch/v1", name, {"spec": spec}, own | labels)

    def _failed(self, job_set: Object, status: Object, failed: list[Object]) -> None:
        policy = job_set["spec"].get("failurePolicy")
        reasons = {name_of(j): condition(j["status"], "Failed")["reason"] for j in failed}  # type: ignore[index]
        first, action = name_of(failed[0]), "RestartJobSet"
        for rule in (policy or {}).get("rules", []):
            fits = [
                name_of(j)
                for j in failed
                if reasons[name_of(j)] in (rule.get("onJobFailureReasons") or reasons.values())
                and j["metadata"]["labels"][f"{_SET}/replicatedjob-name"]
                in (rule.get("targetReplicatedJobs") or j["metadata"]["labels"].values())
            ]
            if fits:
                first, action = fits[0], rule["action"]
                break
        counted = status.get("restartsCountTowardsMax", 0)
        if policy is None:
            reason, text = "FailedJobs", "jobset failed due to one or more job failures"
        elif action == "FailJobSet":
            reason, text = "FailJobSetFailurePolicyAction", "applying FailJobSet failure policy action"
        elif action == "RestartJobSet" and counted >= policy.get("maxRestarts", 0):
            reason, text = "ReachedMaxRestarts", "jobset failed due to reaching max number of restarts"
        else:
            status["restarts"] = status.get("restarts", 0) + 1
            status["restartsCountTowardsMax"] = counted + (action == "RestartJobSet")
            text = f"applying {action} failure policy action (first failed job: {first})"
            self.say(job_set, f"{action}FailurePolicyAction", text, "Warning", again=True)
            return
        text = f"{text} (first failed job: {first})"
        set_condition(status, "Failed", "True", reason, text)
        status["terminalState"] = "Failed"
        self.say(job_set, reason, text, "Warning")

    def _expire(self, job_set: Object, status: Object) -> None:
        ttl = job_set["spec"].get("ttlSecondsAfterFinished")
        ended = condition(status, status["terminalState"])
        if ttl is not None and ended and age(ended["lastTransitionTime"]) > ttl:
            self.store.delete("JobSet", namespace_of(job_set), name_of(job_set))


def job_set_spec(job: Object, runtime: Object) -> Object:
    """The JobSet of a TrainJob: the runtime's template with the job's image, command, nodes and variables."""
    spec: Object = copy.deepcopy(runtime["spec"]["template"]["spec"])
    trainer, policy = job["spec"].get("trainer", {}), runtime["spec"].get("mlPolicy", {})
    nodes = trainer.get("numNodes", policy.get("numNodes", 1))
    for kind in spec["replicatedJobs"]:
        if kind["template"].get("metadata", {}).get("labels", {}).get(_STEP) != "trainer":
            continue
        kind["template"]["spec"] |= {"parallelism": nodes, "completions": nodes}
        for container in kind["template"]["spec"]["template"]["spec"]["containers"]:
            if container["name"] == "node":
                _fill(container, job, trainer, policy, nodes)
    if job["spec"].get("suspend"):
        spec["suspend"] = True
    return spec


def _fill(container: Object, job: Object, trainer: Object, policy: Object, nodes: int) -> None:
    for field in ("image", "command", "args"):
        if trainer.get(field):
            container[field] = trainer[field]
    if trainer.get("resourcesPerNode"):
        container["resources"] = trainer["resourcesPerNode"]
    for variable in trainer.get("env", []):
        set_variable(container, variable["name"], variable.get("value") or variable.get("valueFrom") or "")
    if "torch" not in policy:
        return
    asked = trainer.get("numProcPerNode", policy["torch"].get("numProcPerNode", "auto"))
    name = name_of(job)
    for key, value in {
        "PET_NNODES": str(nodes),
        "PET_NPROC_PER_NODE": str(_processes(asked, trainer.get("resourcesPerNode"))),
        "PET_NODE_RANK": {"fieldRef": {"fieldPath": _INDEX}},
        "PET_MASTER_ADDR": f"{name}-node-0-0.{name}",
        "PET_MASTER_PORT": "29500",
    }.items():
        set_variable(container, key, value)
    container["ports"] = [*container.get("ports", []), {"containerPort": 29500}]


def _processes(asked: int | str, resources: Object | None) -> int | str:
    """As Trainer counts: "auto" is one per CPU where no GPU is asked for, "cpu" always one per CPU."""
    if not resources or asked not in ("auto", "cpu"):
        return asked
    for amounts in (resources.get("limits"), resources.get("requests")):
        if amounts and (asked == "cpu" or not any("gpu" in name.lower() for name in amounts)):
            return max(1, int(-(-quantity(amounts.get("cpu", "1")) // 1)))
    return asked if asked == "auto" else 1


def _counts(name: str, active: list[Object], done: list[Object], failed: list[Object]) -> Object:
    def mine(jobs: list[Object]) -> list[Object]:
        return [j for j in jobs if j["metadata"]["labels"][f"{_SET}/replicatedjob-name"] == name]

    def ready(job: Object) -> bool:
        status = job.get("status", {})
        return bool(status.get("ready", 0) + status.get("succeeded", 0) >= job["spec"].get("parallelism", 1))

    return {
        "name": name,
        "ready": sum(map(ready, mine(active))),
        "succeeded": len(mine(done)),
        "failed": len(mine(failed)),
        "active": sum(1 for j in mine(active) if j.get("status", {}).get("active")),
        "suspended": sum(1 for j in mine(active) if j["spec"].get("suspend")),
    }
