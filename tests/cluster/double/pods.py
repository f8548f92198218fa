"""The kubelet: pods in the store become processes, and their ends become statuses.

`step` is called often and does whatever is due for every pod: start it, notice its end, restart it,
stop it. A pod that can't run stays Pending with the conditions, waiting reasons and events of a real cluster.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from double import scheduler
from double.containers import Builder, Waiting
from double.network import Address, Bridge, Loopback
from double.objects import Object, controller_of, name_of, namespace_of, now, set_condition
from double.process import Process
from double.store import Refused

_BACKOFF = (0.2, 0.5, 1.0, 2.0)

DEFAULT_SCHEDULER = "default-scheduler"
"""Pods that name another are left to it."""


@dataclass
class Instance:
    """A placed pod and its processes."""

    uid: str
    address: Address
    scratch: Path
    processes: dict[str, Process] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)
    """Init containers that ended well."""
    restarts: dict[str, int] = field(default_factory=dict)
    last: dict[str, Object] = field(default_factory=dict)
    not_before: dict[str, float] = field(default_factory=dict)
    kill_at: float | None = None
    probe: Future[bool] | None = None
    next_probe: float = 0.0
    ready: bool = False
    evicted: str = ""


class Kubelet:
    """Runs the store's pods. `blocked(pod)` may give a planted reason why one stays Pending."""

    def __init__(
        self,
        store: Any,
        builder: Builder,
        network: Bridge | Loopback,
        blocked: Callable[[Object], Waiting | None],
        grace: float,
    ) -> None:
        self.store, self.builder, self.network, self.blocked = store, builder, network, blocked
        self.grace = grace
        self.instances: dict[str, Instance] = {}
        self._scratch = Path(tempfile.mkdtemp(prefix="lesionflow-pods-"))
        self._loopback = Loopback()
        self._probes = ThreadPoolExecutor(4, thread_name_prefix="probe")
        self._told: dict[str, set[str]] = {}

    def step(self) -> None:
        """Do what is due for every pod."""
        pods = {p["metadata"]["uid"]: p for p in self.store.list("Pod")}
        for uid in [u for u in self.instances if u not in pods]:
            self._remove(self.instances[uid])
        for pod in pods.values():
            try:
                self._sync(pod)
            except Refused as refused:
                if refused.status not in (404, 409):  # gone or changed meanwhile
                    raise

    def close(self) -> None:
        """End every process and remove all directories."""
        self._probes.shutdown(wait=False, cancel_futures=True)
        for instance in list(self.instances.values()):
            self._remove(instance)
        shutil.rmtree(self._scratch, ignore_errors=True)

    def instance(self, namespace: str, name: str) -> Instance:
        """A pod's instance. Raises `LookupError` if it isn't running here."""
        pod = self.store.get("Pod", namespace, name)
        if pod is None or pod["metadata"]["uid"] not in self.instances:
            raise LookupError(f"no running pod {namespace}/{name}")
        return self.instances[pod["metadata"]["uid"]]

    def _sync(self, pod: Object) -> None:
        instance = self.instances.get(pod["metadata"]["uid"])
        if pod["metadata"].get("deletionTimestamp"):
            self._terminate(pod, instance)
        elif pod.get("status", {}).get("phase") in ("Succeeded", "Failed"):
            if instance:
                self._remove(instance)
        elif instance:
            self._observe(pod, instance)
        elif pod["spec"].get("schedulerName", DEFAULT_SCHEDULER) == DEFAULT_SCHEDULER:
            self._admit(pod)

    def _admit(self, pod: Object) -> None:
        if (
            waiting := scheduler.unscheduled(self.store, pod)
            or self.blocked(pod)
            or scheduler.awaits_master(self.store, pod)
        ):
            self._pend(pod, waiting)
            return
        pod = self.store.update({**pod, "spec": pod["spec"] | {"nodeName": scheduler.NODE}}, part="main")
        job = controller_of(pod)
        isolated = job is not None and job["kind"] in ("PyTorchJob", "Job")
        network = self.network if isolated else self._loopback
        hostname = pod["spec"].get("hostname") or name_of(pod)
        service = pod["spec"].get("subdomain")
        names = [f"{hostname}.{service}"] if service else [name_of(pod)]
        uid = pod["metadata"]["uid"]
        scratch = self._scratch / uid
        scratch.mkdir()
        instance = Instance(uid, network.attach(namespace_of(pod), hostname[:63], names), scratch)
        self.instances[uid] = instance
        self._say(pod, "Scheduled", f"Successfully assigned {namespace_of(pod)}/{name_of(pod)} to {scheduler.NODE}")
        self._observe(pod, instance)

    def _pend(self, pod: Object, waiting: Waiting) -> None:
        old = [dict(c) for c in pod.get("status", {}).get("conditions", [])]
        status: Object = {"phase": "Pending", "qosClass": "Burstable", "conditions": old}
        if waiting.reason == "Unschedulable":
            set_condition(status, "PodScheduled", "False", waiting.reason, waiting.message)
        else:
            set_condition(status, "PodScheduled", "True")
            self._say(pod, "Scheduled", f"Successfully assigned {namespace_of(pod)}/{name_of(pod)} to {scheduler.NODE}")
            state: Object = {"reason": waiting.reason} | ({"message": waiting.message} if waiting.message else {})
            waits = [_container_status(c, {"waiting": state}) for c in pod["spec"]["containers"]]
            status |= {"hostIP": "127.0.0.1", "containerStatuses": waits}
        self._put(pod, status)
        if waiting.event:
            self._say(pod, waiting.event, waiting.event_message, "Warning")

    def _observe(self, pod: Object, instance: Instance) -> None:
        """Start what is due, notice what ended, and write the status."""
        inits = [c for c in pod["spec"].get("initContainers", []) if c["name"] != scheduler.INIT_WAIT]
        for container in inits:
            if container["name"] in instance.done:
                continue
            process = self._keep_running(pod, instance, container)
            if process and process.ended and process.exit_code == 0:
                instance.done.add(container["name"])
                continue
            self._report(pod, instance)
            return
        for container in pod["spec"]["containers"]:
            self._keep_running(pod, instance, container)
        self._probe(pod, instance)
        self._report(pod, instance)

    def _keep_running(self, pod: Object, instance: Instance, container: Object) -> Process | None:
        name, policy = container["name"], pod["spec"].get("restartPolicy", "Always")
        process = instance.processes.get(name)
        if process and not process.ended:
            return process
        if process:
            again = policy == "Always" or (policy == "OnFailure" and process.exit_code != 0)
            if not again or instance.evicted:
                return process
            if name not in instance.not_before:
                count = instance.restarts.get(name, 0)
                instance.not_before[name] = time.monotonic() + _BACKOFF[min(count, len(_BACKOFF) - 1)]
                text = f"Back-off restarting failed container {name} in pod {name_of(pod)}"
                self._say(pod, "BackOff", text, "Warning", again=True)
            if time.monotonic() < instance.not_before[name]:
                return process
            instance.last[name] = {"terminated": self._ended(container, process)}
            instance.restarts[name] = instance.restarts.get(name, 0) + 1
            del instance.not_before[name], instance.processes[name]
            self.store.rotate_log(namespace_of(pod), name_of(pod), name)
        try:
            command = self.builder.build(pod, container, instance.scratch)
            environment = command.environment | instance.address.environment
            command.environment.update(environment | self.network.translate(namespace_of(pod), environment))
            log = self.store.log_path(namespace_of(pod), name_of(pod), name)
            mark = f"{instance.uid}/{name}"
            started = Process(command, log, mark, instance.address.wrap)
        except Waiting as waiting:
            self._pend(pod, waiting)
            return None
        except (OSError, LookupError) as error:
            self._cannot_start(pod, container, str(error))
            return None
        instance.processes[name] = started
        pulled = f'Container image "{container.get("image", "")}" already present on machine'
        self._say(pod, "Pulled", pulled, again=True)
        self._say(pod, "Created", f"Created container {name}", again=True)
        self._say(pod, "Started", f"Started container {name}", again=True)
        return started

    def _cannot_start(self, pod: Object, container: Object, why: str) -> None:
        text = f"failed to create containerd task: failed to create shim task: OCI runtime create failed: {why}"
        state = {"exitCode": 128, "reason": "StartError", "message": text, "startedAt": now(), "finishedAt": now()}
        self._say(pod, "Failed", f"Error: {text}", "Warning")
        statuses = [_container_status(container, {"terminated": state})]
        self._put(pod, {"phase": "Failed", "conditions": [], "containerStatuses": statuses})

    def _report(self, pod: Object, instance: Instance) -> None:
        containers = pod["spec"]["containers"]
        processes = [instance.processes.get(c["name"]) for c in containers]
        if not instance.processes:
            return  # Waiting for a secret: its status says so already.
        policy = pod["spec"].get("restartPolicy", "Always")
        ended = [p for p in processes if p and p.ended]
        phase = "Running" if all(processes) else "Pending"
        if len(ended) == len(containers):
            if policy == "Never" or instance.evicted:
                phase = "Failed" if any(p.exit_code for p in ended) else "Succeeded"
            elif policy == "OnFailure" and not any(p.exit_code for p in ended):
                phase = "Succeeded"
        elif policy == "Never" and not all(processes):
            inits = [instance.processes.get(c["name"]) for c in pod["spec"].get("initContainers", [])]
            if any(p and p.ended and p.exit_code for p in inits):
                phase = "Failed"
        old = pod.get("status", {})
        status: Object = {"conditions": [dict(c) for c in old.get("conditions", [])]}
        status["startTime"] = old.get("startTime") or now()
        status |= {"phase": "Failed" if instance.evicted else phase, "hostIP": "127.0.0.1", "qosClass": "Burstable"}
        status |= {"podIP": instance.address.ip, "podIPs": [{"ip": instance.address.ip}]}
        if instance.evicted:
            status |= {"reason": "Evicted", "message": instance.evicted}
        statuses = [self._status_of(pod, instance, c) for c in containers]
        status["containerStatuses"] = statuses
        ready = phase == "Running" and all(s["ready"] for s in statuses)
        why = {} if ready else {"reason": "PodCompleted" if phase == "Succeeded" else "ContainersNotReady"}
        set_condition(status, "PodScheduled", "True")
        set_condition(status, "Initialized", "True" if all(processes) else "False")
        set_condition(status, "ContainersReady", str(ready), **why)
        set_condition(status, "Ready", str(ready), **why)
        self._put(pod, status)

    def _status_of(self, pod: Object, instance: Instance, container: Object) -> Object:
        name = container["name"]
        process = instance.processes.get(name)
        state: Object = {"waiting": {"reason": "PodInitializing"}}
        ready = False
        if process and name in instance.not_before:
            who = f"{name_of(pod)}_{namespace_of(pod)}({instance.uid})"
            text = f"back-off 10s restarting failed container={name} pod={who}"
            state = {"waiting": {"reason": "CrashLoopBackOff", "message": text}}
        elif process and process.ended:
            state = {"terminated": self._ended(container, process)}
        elif process:
            state = {"running": {"startedAt": process.started}}
            ready = instance.ready or not container.get("readinessProbe")
        made = _container_status(container, state, ready, instance.restarts.get(name, 0))
        last = {"terminated": self._ended(container, process)} if "waiting" in state and process else None
        if last := last or instance.last.get(name):
            made["lastState"] = last
        return made

    def _ended(self, container: Object, process: Process) -> Object:
        return process.terminated(with_log=container.get("terminationMessagePolicy") == "FallbackToLogsOnError")

    def _terminate(self, pod: Object, instance: Instance | None) -> None:
        if instance is None:
            self.store.finalize("Pod", namespace_of(pod), name_of(pod))
            return
        if instance.kill_at is None:
            asked = pod["spec"].get("terminationGracePeriodSeconds", 30)
            instance.kill_at = time.monotonic() + min(asked, self.grace)
            for name, process in instance.processes.items():
                if not process.ended:
                    self._say(pod, "Killing", f"Stopping container {name}")
                    process.signal(signal.SIGTERM)
        elif time.monotonic() > instance.kill_at:
            for process in instance.processes.values():
                process.signal(signal.SIGKILL)
        if all(p.ended for p in instance.processes.values()):
            instance.not_before.clear()
            with contextlib.suppress(Exception):  # It may be gone by force meanwhile.
                self._report({**pod, "spec": pod["spec"] | {"restartPolicy": "Never"}}, instance)
            self._remove(instance)
            self.store.finalize("Pod", namespace_of(pod), name_of(pod))

    def _remove(self, instance: Instance) -> None:
        for process in instance.processes.values():
            process.signal(signal.SIGKILL)
            process.popen.wait()
            process.kill_all()
        self.network.detach(instance.address)
        shutil.rmtree(instance.scratch, ignore_errors=True)
        self.instances.pop(instance.uid, None)

    def _probe(self, pod: Object, instance: Instance) -> None:
        probe = next((c["readinessProbe"] for c in pod["spec"]["containers"] if c.get("readinessProbe")), None)
        if probe is None:
            return
        if instance.probe and instance.probe.done():
            instance.ready = instance.probe.result()
            instance.probe = None
            instance.next_probe = time.monotonic() + (0.5 if instance.ready else 0.1)
        if instance.probe is None and time.monotonic() >= instance.next_probe:
            instance.probe = self._probes.submit(_answers, instance.address.ip, probe)

    def _put(self, pod: Object, status: Object) -> None:
        if status != pod.get("status"):
            self.store.set_status("Pod", namespace_of(pod), name_of(pod), status)
            pod["status"] = status

    def _say(self, pod: Object, reason: str, message: str, type_: str = "Normal", *, again: bool = False) -> None:
        """An event, once per pod and message unless it may come `again`."""
        told = self._told.setdefault(pod["metadata"]["uid"], set())
        if again or reason + message not in told:
            told.add(reason + message)
            self.store.event(pod, reason, message, type_)


def _container_status(container: Object, state: Object, ready: bool = False, restarts: int = 0) -> Object:
    image = container.get("image", "")
    started = "running" in state
    return {
        "name": container["name"],
        "image": image,
        "imageID": image,
        "ready": ready,
        "started": started,
        "restartCount": restarts,
        "state": state,
    }


def _answers(ip: str, probe: Object) -> bool:
    timeout = probe.get("timeoutSeconds", 1)
    try:
        if request := probe.get("httpGet"):
            url = f"http://{ip}:{request['port']}{request.get('path', '/')}"
            with urllib.request.urlopen(url, timeout=timeout) as response:
                return bool(response.status < 400)
        if request := probe.get("tcpSocket"):
            socket.create_connection((ip, request["port"]), timeout).close()
    except (OSError, urllib.error.HTTPError):
        return False
    return True
