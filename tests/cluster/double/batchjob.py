"""Kubernetes' Job controller: indexed and plain jobs, their pods' failures, backoff and failure policy."""

from __future__ import annotations

import copy
import uuid

from double.objects import Object, age, child, holds, name_of, namespace_of, now, set_condition, set_variable
from double.operator import Operator

INDEX = "batch.kubernetes.io/job-completion-index"


class Jobs(Operator):
    """batch/v1 Jobs. A failed job is Failed once its last pod has ended (as from Kubernetes 1.31 on)."""

    def reconcile(self) -> None:
        for job in self.objects("Job"):
            self._reconcile(job)

    def _reconcile(self, job: Object) -> None:
        spec, status = job["spec"], copy.deepcopy(job.get("status") or {})
        pods = self.children("Pod", job)
        if holds(status, "Complete") or holds(status, "Failed"):
            self._expire(job, status)
            return
        if spec.get("suspend"):
            for pod in pods:
                self._stop(pod)
            set_condition(status, "Suspended", "True", "JobSuspended", "Job suspended", lastProbeTime=now())
            gone = ("active", "ready", "terminating", "startTime")
            self.put(job, {k: v for k, v in status.items() if k not in gone})
            return
        if holds(status, "Suspended"):
            set_condition(status, "Suspended", "False", "JobResumed", "Job resumed", lastProbeTime=now())
        if not status.get("startTime"):
            status["startTime"] = now()
        # Pods that are being deleted count once they are gone or have ended.
        active = [p for p in pods if _phase(p) not in ("Succeeded", "Failed")]
        counted = [p for p in active if "deletionTimestamp" not in p["metadata"]]
        failed = [p for p in pods if _phase(p) == "Failed"]
        succeeded = {_index(p) for p in pods if _phase(p) == "Succeeded"}
        status["failed"] = max(len(failed), status.get("failed", 0))
        status |= {"active": len(counted), "succeeded": len(succeeded)}
        status["ready"] = sum(1 for p in counted if holds(p.get("status", {}), "Ready"))
        status |= {"terminating": len(active) - len(counted), "uncountedTerminatedPods": {}}
        completions = spec.get("completions", spec.get("parallelism", 1))
        if why := self._failure(job, status, failed):
            set_condition(status, "FailureTarget", "True", *why, lastProbeTime=now())
        if holds(status, "FailureTarget"):
            self._fail(job, status, active)
        elif len(succeeded) >= completions:
            status["completionTime"] = now()
            set_condition(status, "SuccessCriteriaMet", "True", "CompletionsReached", lastProbeTime=now())
            set_condition(status, "Complete", "True", "CompletionsReached", lastProbeTime=now())
            self.say(job, "Completed", "Job completed")
        else:
            self._start(job, counted, active, succeeded, completions)
        self.put(job, {k: v for k, v in status.items() if v not in (0, None) or k in ("ready", "terminating")})

    def _start(
        self, job: Object, counted: list[Object], active: list[Object], succeeded: set[str], completions: int
    ) -> None:
        spec = job["spec"]
        room = min(spec.get("parallelism", 1), completions - len(succeeded)) - len(counted)
        if spec.get("completionMode") == "Indexed":
            taken = succeeded | {_index(p) for p in active}
            wanted = [str(i) for i in range(completions) if str(i) not in taken]
        else:
            wanted = [""] * max(0, room)
        for index in wanted[: max(0, room)]:
            pod = self._pod(job, index)
            self.make_pod(job, pod, done="SuccessfulCreate", failed="FailedCreate")

    def _pod(self, job: Object, index: str) -> Object:
        template = copy.deepcopy(job["spec"]["template"])
        name, uid = name_of(job), job["metadata"]["uid"]
        own = {"job-name": name, "controller-uid": uid}
        labels = template.get("metadata", {}).get("labels", {}) | own
        labels |= {f"batch.kubernetes.io/{key}": value for key, value in own.items()}
        annotations = dict(template.get("metadata", {}).get("annotations", {}))
        stem = name
        if index:
            stem = f"{name}-{index}"
            labels[INDEX] = annotations[INDEX] = index
            template["spec"]["hostname"] = stem
            for container in template["spec"]["containers"]:
                reference = {"fieldRef": {"fieldPath": f"metadata.annotations['{INDEX}']"}}
                set_variable(container, "JOB_COMPLETION_INDEX", reference)
        pod = child(job, "Pod", "v1", f"{stem}-{uuid.uuid4().hex[:5]}", {"spec": template["spec"]}, labels)
        pod["metadata"]["annotations"] = annotations
        return pod

    def _failure(self, job: Object, status: Object, failed: list[Object]) -> tuple[str, str] | None:
        """Reason and message of a failure, if there is one."""
        spec = job["spec"]
        ignored = 0
        for pod in failed:
            action, message = _policy(spec.get("podFailurePolicy", {}).get("rules", []), pod)
            if action == "FailJob":
                return "PodFailurePolicy", message
            ignored += action == "Ignore"
        restarts = sum(
            s.get("restartCount", 0)
            for p in self.children("Pod", job)
            for s in p.get("status", {}).get("containerStatuses", [])
        )
        limit = spec.get("backoffLimit", 6)
        if status.get("failed", 0) - ignored > limit or restarts > limit:
            return "BackoffLimitExceeded", "Job has reached the specified backoff limit"
        deadline = spec.get("activeDeadlineSeconds")
        if deadline is not None and age(status["startTime"]) > deadline:
            return "DeadlineExceeded", "Job was active longer than specified deadline"
        return None

    def _fail(self, job: Object, status: Object, active: list[Object]) -> None:
        for pod in active:
            self._stop(pod)
        target = next(c for c in status["conditions"] if c["type"] == "FailureTarget")
        if not active:
            reason, message = target["reason"], target["message"]
            set_condition(status, "Failed", "True", reason, message, lastProbeTime=now())
            self.say(job, reason, message, "Warning")

    def _stop(self, pod: Object) -> None:
        if "deletionTimestamp" not in pod["metadata"]:
            self.store.delete("Pod", namespace_of(pod), name_of(pod))

    def _expire(self, job: Object, status: Object) -> None:
        ttl = job["spec"].get("ttlSecondsAfterFinished")
        ended = next(c for c in status["conditions"] if c["type"] in ("Complete", "Failed"))
        if ttl is not None and age(ended["lastTransitionTime"]) > ttl:
            self.store.delete("Job", namespace_of(job), name_of(job))


def _phase(pod: Object) -> str:
    return str(pod.get("status", {}).get("phase", "Pending"))


def _index(pod: Object) -> str:
    return str(pod["metadata"].get("annotations", {}).get(INDEX) or name_of(pod))


def _policy(rules: list[Object], pod: Object) -> tuple[str, str]:
    """The first rule of a pod failure policy that a failed pod matches: its action, and FailJob's message."""
    ended = {
        s["name"]: s["state"]["terminated"]["exitCode"]
        for s in pod["status"].get("containerStatuses", [])
        if "terminated" in s["state"]
    }
    who = f"{namespace_of(pod)}/{name_of(pod)}"
    for number, rule in enumerate(rules):
        if codes := rule.get("onExitCodes"):
            for name, code in ended.items():
                if code == 0 or codes.get("containerName", name) != name:
                    continue
                if (code in codes["values"]) == (codes["operator"] == "In"):
                    text = f"Container {name} for pod {who} failed with exit code {code} matching"
                    return rule["action"], f"{text} {rule['action']} rule at index {number}"
        for wanted in rule.get("onPodConditions", []):
            if holds(pod["status"], wanted["type"]):
                text = f"Pod {who} has condition {wanted['type']} matching"
                return rule["action"], f"{text} {rule['action']} rule at index {number}"
    return "", ""
