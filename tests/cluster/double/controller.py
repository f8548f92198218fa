"""What makes the double a cluster: kubelet, scheduler and operators, in one thread beside the API server.

    with Double(...) as double, Controller(double, volumes={"first-data": folder}) as controller:
        Api(...).create(manifests.pytorch_job(...))          # becomes processes, statuses, events and logs
        controller.kill("team", "first-0-worker-0")          # as the kernel would
        controller.fail_scheduling("1 Insufficient nvidia.com/gpu")

PyTorchJobs, TrainJobs, Jobs, bare pods and InferenceServices run as local processes, in network namespaces
where that is permitted. What it can't show is said in its modules: images, real mounts, storage, GPUs, users,
admission webhooks and the mesh are not here.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from double.batchjob import Jobs
from double.containers import Builder, Waiting
from double.network import connect
from double.objects import Object, name_of, namespace_of
from double.operator import Operator
from double.pods import Instance, Kubelet
from double.pytorchjob import PyTorchJobs
from double.scheduler import unschedulable
from double.serving import InferenceServices, Triton
from double.store import Refused
from double.trainjob import JobSets, TrainJobs

_IDLE, _RESYNC = 0.05, 0.5
# What runs there; of profiles not named, Training Operator 1.9, Trainer 2.1 and KServe 0.20.
_OPERATOR_RELEASE = {"kubeflow-1.8": (1, 7)}
_TRAINER_RELEASE = {"trainer-2.3": (2, 3)}
_KSERVE_RELEASE = {"kubeflow-1.8": (0, 11)}


@dataclass(frozen=True)
class Fault:
    """Something planted: for pods (or claims) whose name contains `match`."""

    kind: str
    match: str
    message: str


class Controller:
    """Runs a store's workloads until it is left; then ends every process and removes every network device.

    `volumes` maps claims (or namespace/claim) to directories; others get one of their own. `grace` caps the
    seconds between SIGTERM and SIGKILL. `environment` is added to every process, `netns` says whether job pods
    get network namespaces (None: where permitted), `triton_command` what serves a model repository.
    An error within the controller is raised on leaving.
    """

    def __init__(
        self,
        double: Any,
        volumes: Mapping[str, Path] | None = None,
        *,
        python: str = sys.executable,
        netns: bool | None = None,
        grace: float = 10.0,
        environment: Mapping[str, str] | None = None,
        triton_command: Triton | None = None,
    ) -> None:
        self.store = double.store
        self.volumes: dict[str, Path] = dict(volumes or {})
        self.errors: list[str] = []
        self.network = connect(netns)
        self._root = Path(tempfile.mkdtemp(prefix="lesionflow-claims-"))
        self._faults: list[Fault] = []
        builder = Builder(self.store, self.claim, python, environment)
        self.kubelet = Kubelet(self.store, builder, self.network, self._blocked, grace)
        release = _OPERATOR_RELEASE.get(double.profile, (1, 9))
        kserve = _KSERVE_RELEASE.get(double.profile, (0, 20))
        self._serving = InferenceServices(self.store, self._denied, kserve, triton_command)
        self.operators: list[Operator] = [
            PyTorchJobs(self.store, self._denied, release),
            TrainJobs(self.store, self._denied, _TRAINER_RELEASE.get(double.profile, (2, 1))),
            JobSets(self.store, self._denied),
            Jobs(self.store, self._denied),
            self._serving,
        ]
        self._wake, self._stop = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="controller", daemon=True)

    def __enter__(self) -> Controller:
        self.store.held.add("Pod")
        self.store.subscribe(self._changed)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._wake.set()
        self._thread.join()
        self.store.held.discard("Pod")
        self._serving.close()
        self.kubelet.close()
        self.network.close()
        shutil.rmtree(self._root, ignore_errors=True)
        if self.errors and kind is None:
            raise AssertionError("the controller failed:\n" + "\n".join(self.errors))

    def claim(self, namespace: str, name: str) -> Path | None:
        """The directory behind a bound claim."""
        found = self.store.get("PersistentVolumeClaim", namespace, name)
        if found is None or found.get("status", {}).get("phase") != "Bound":
            return None
        folder = self.volumes.get(f"{namespace}/{name}") or self.volumes.get(name) or self._root / namespace / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def kill(self, namespace: str, pod: str, number: int = signal.SIGKILL) -> None:
        """Signal a pod's processes. Raises `LookupError` if it doesn't run."""
        for process in self.kubelet.instance(namespace, pod).processes.values():
            process.signal(number)

    def out_of_memory(self, namespace: str, pod: str) -> None:
        """Kill a pod's processes as the kernel does for memory over the limit."""
        for process in self.kubelet.instance(namespace, pod).processes.values():
            process.out_of_memory = True
            process.signal(signal.SIGKILL)

    def evict(self, namespace: str, pod: str, resource: str = "ephemeral-storage") -> None:
        """Evict a pod from its node, as the kubelet does under pressure."""
        text = f"The node was low on resource: {resource}. Threshold quantity: 1Gi, available: 512Mi. "
        instance = self.kubelet.instance(namespace, pod)
        instance.evicted = text
        self.store.event(self.store.get("Pod", namespace, pod), "Evicted", text, "Warning")
        self.kill(namespace, pod)

    def processes(self, namespace: str, pod: str) -> dict[str, int]:
        """Process ids of a running pod's containers."""
        instance: Instance = self.kubelet.instance(namespace, pod)
        return {name: p.popen.pid for name, p in instance.processes.items()}

    def fail_scheduling(self, why: str = "1 Insufficient nvidia.com/gpu", *, match: str = "") -> None:
        """Pods stay Pending: no node fits."""
        self._plant("schedule", match, why)

    def fail_image_pull(self, *, match: str = "") -> None:
        """Pods stay Pending: their image can't be pulled."""
        self._plant("image", match, "")

    def pend_claims(self, *, match: str = "", storage_class: str = "") -> None:
        """New claims stay Pending: waiting for a first consumer, or for a storage class that doesn't exist."""
        self._plant("claim", match, storage_class)

    def refuse_pods(self, why: str, *, match: str = "") -> None:
        """Admission refuses pods: `why` is what follows 'pods "x" is forbidden: '."""
        self._plant("admission", match, why)

    def exceed_quota(self, *, match: str = "", resource: str = "requests.nvidia.com/gpu") -> None:
        """Admission refuses pods: the namespace's quota is used up."""
        amounts = f"requested: {resource}=1, used: {resource}=2, limited: {resource}=2"
        self.refuse_pods(f"exceeded quota: kf-resource-quota, {amounts}", match=match)

    def enforce_pod_security(self, *, match: str = "") -> None:
        """Admission refuses pods as one that isn't restricted enough."""
        container = 'container "node" must set'
        self.refuse_pods(
            f'violates PodSecurity "restricted:latest": allowPrivilegeEscalation != false ({container} '
            f"securityContext.allowPrivilegeEscalation=false), runAsNonRoot != true (pod or {container} "
            "securityContext.runAsNonRoot=true)",
            match=match,
        )

    def heal(self) -> None:
        """Take back every planted fault; what waited goes on."""
        self._faults.clear()
        self._wake.set()

    def _plant(self, kind: str, match: str, message: str) -> None:
        self._faults.append(Fault(kind, match, message))

    def _planted(self, kind: str, name: str) -> Fault | None:
        return next((f for f in self._faults if f.kind == kind and f.match in name), None)

    def _blocked(self, pod: Object) -> Waiting | None:
        if fault := self._planted("schedule", name_of(pod)):
            return unschedulable(fault.message)
        if self._planted("image", name_of(pod)):
            image = pod["spec"]["containers"][0].get("image", "")
            waits = pod.get("status", {}).get("containerStatuses", [{}])[0].get("state", {}).get("waiting", {})
            pulled = f'rpc error: code = NotFound desc = failed to pull and unpack image "{image}": not found'
            text = f'Failed to pull image "{image}": {pulled}'
            if waits.get("reason") not in ("ErrImagePull", "ImagePullBackOff"):
                return Waiting("ErrImagePull", pulled, "Failed", text)
            backing_off = f'Back-off pulling image "{image}"'
            return Waiting("ImagePullBackOff", backing_off, "BackOff", backing_off)
        return None

    def _denied(self, pod: Object) -> str:
        fault = self._planted("admission", name_of(pod))
        return f'pods "{name_of(pod)}" is forbidden: {fault.message}' if fault else ""

    def _changed(self, kind: str, obj: Object) -> None:
        if obj["kind"] != "Event":
            self._wake.set()

    def _run(self) -> None:
        quiet = 0.0
        while not self._stop.is_set():
            woken = self._wake.wait(_IDLE)
            self._wake.clear()
            if self._stop.is_set():
                return
            quiet = 0.0 if woken else quiet + _IDLE
            work = [self._bind_claims, self.kubelet.step]
            if woken or quiet >= _RESYNC:
                quiet = 0.0
                work = [self._bind_claims, *(o.reconcile for o in self.operators), self.kubelet.step]
            for step in work:
                try:
                    step()
                except Refused as refused:
                    # An object that went or changed meanwhile: the next round sees it.
                    if refused.status not in (404, 409):
                        self.errors.append(traceback.format_exc())
                except Exception:
                    self.errors.append(traceback.format_exc())

    def _bind_claims(self) -> None:
        for claim in self.store.list("PersistentVolumeClaim"):
            status = claim.get("status", {})
            if status.get("phase") == "Bound" or "deletionTimestamp" in claim["metadata"]:
                continue
            if fault := self._planted("claim", name_of(claim)):
                self._tell_pending(claim, fault.message)
                continue
            spec = claim["spec"]
            bound = {"phase": "Bound", "accessModes": spec["accessModes"], "capacity": spec["resources"]["requests"]}
            self.store.set_status("PersistentVolumeClaim", namespace_of(claim), name_of(claim), bound)

    def _tell_pending(self, claim: Object, storage_class: str) -> None:
        told = self.store.list("Event", namespace_of(claim), fields=f"involvedObject.name={name_of(claim)}")
        if told:
            return
        if storage_class:
            text = f'storageclass.storage.k8s.io "{storage_class}" not found'
            self.store.event(claim, "ProvisioningFailed", text, "Warning")
        else:
            text = "waiting for first consumer to be created before binding"
            self.store.event(claim, "WaitForFirstConsumer", text)


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie doesn't)."""
    with contextlib.suppress(OSError):
        os.kill(pid, 0)
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    return False
