"""KServe's InferenceService, in both forms and both modes.

A service has one address for its lifetime (`status.url`), behind which revisions come and go: a changed spec
starts a new one beside the old, which serves until the new one is ready. Serverless mode also splits traffic
(canaryTrafficPercent) and gives the revisions addresses of their own in `status.components.predictor.traffic`.

Raw mode's Ready follows the release: until 0.15 it stays True all through a rollout, because the old pods keep
the Deployment available; later it is Unknown until the new pods are ready.
"""

from __future__ import annotations

import copy
import json
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from double.core import model
from double.front import Front
from double.network import free_port
from double.objects import Object, child, holds, name_of, namespace_of, set_condition
from double.operator import Denied, Operator

Triton = Callable[[str, int], Sequence[str]]
"""Model repository and HTTP port -> the command that serves it."""
_MODE = "serving.kserve.io/deploymentMode"
_TAGS = "serving.kserve.io/enable-tag-routing"
_SPLIT = ("canaryTrafficPercent", "minReplicas", "maxReplicas")
_CONTAINER = "kserve-container"
_DRAIN = 1.0
"""Seconds an old revision's pods stay after their last new connection."""


@dataclass
class Revision:
    """One spec of a service and its pods."""

    number: int
    spec: str
    predictor: int
    """Port of the predictor; 0 if there is nothing to run it."""
    transformer: int = 0
    pods: dict[str, str] = field(default_factory=dict)
    """Component -> pod."""
    left: float = 0.0
    """When traffic left it, by the monotonic clock; 0 while it has some."""

    @property
    def port(self) -> int:
        return self.transformer or self.predictor


Shares = list[tuple[Revision, int]]
"""Revisions and their percent of the traffic."""


@dataclass
class Service:
    """What is known of an InferenceService beyond its object."""

    front: Front = field(default_factory=Front)
    revisions: list[Revision] = field(default_factory=list)
    ready: set[int] = field(default_factory=set)
    """Numbers of revisions that were ready once."""
    rolled_out: int = 0
    previous: int = 0

    def revision(self, number: int) -> Revision | None:
        return next((r for r in self.revisions if r.number == number), None)


class InferenceServices(Operator):
    def __init__(self, store: object, denied: Denied, release: tuple[int, int], triton: Triton | None) -> None:
        super().__init__(store, denied)
        self.release, self.triton = release, triton
        self._services: dict[str, Service] = {}

    def reconcile(self) -> None:
        found = {o["metadata"]["uid"]: o for o in self.objects("InferenceService")}
        for uid in [u for u in self._services if u not in found]:
            self._services.pop(uid).front.close()
        for uid, obj in found.items():
            if uid not in self._services:
                self._services[uid] = Service()
            self._reconcile(obj, self._services[uid])

    def close(self) -> None:
        for service in self._services.values():
            service.front.close()

    def _reconcile(self, obj: Object, service: Service) -> None:
        spec = json.dumps(_essence(obj["spec"]), sort_keys=True)
        if not service.revisions or service.revisions[-1].spec != spec:
            number = service.revisions[-1].number + 1 if service.revisions else 1
            service.revisions.append(self._start(obj, number, spec))
        latest = service.revisions[-1]
        pods = {name_of(p): p for p in self.children("Pod", obj)}
        if self._is_ready(latest, pods):
            service.ready.add(latest.number)
        serverless = obj["metadata"].get("annotations", {}).get(_MODE, "Serverless") == "Serverless"
        shares = self._shares(obj, service, serverless)
        service.front.route([(r.port, percent) for r, percent in shares])
        kept = {latest.number, *(r.number for r, _ in shares)}
        for revision in service.revisions:
            if revision.number in kept:
                revision.left = 0.0
            elif not revision.left:
                revision.left = time.monotonic()
            elif time.monotonic() - revision.left > _DRAIN:
                for pod in revision.pods.values():
                    self.store.delete("Pod", namespace_of(obj), pod)
        service.revisions = [r for r in service.revisions if not r.left or time.monotonic() - r.left <= _DRAIN]
        for component, pod in latest.pods.items():
            if pod not in pods:  # A deployment replaces a lost pod.
                self._pod(obj, latest, component, pod)
        self.put(obj, self._status(obj, service, shares, pods, serverless))

    def _shares(self, obj: Object, service: Service, serverless: bool) -> Shares:
        """Who gets how many percent: the newest revision that is ready, and the one rolled out before it."""
        latest = service.revisions[-1]
        canary = obj["spec"]["predictor"].get("canaryTrafficPercent") if serverless else None
        before = service.revision(service.rolled_out)
        if latest.number not in service.ready:
            return [(before, 100)] if before else []
        if canary is not None and canary < 100:
            if before is latest:
                # Rolled out in full and then asked to share: the one before it comes back, if it still runs.
                before = service.revision(service.previous)
            if before is not None and before is not latest:
                return [(latest, canary), (before, 100 - canary)]
        if service.rolled_out != latest.number:
            service.previous, service.rolled_out = service.rolled_out, latest.number
        return [(latest, 100)]

    def _is_ready(self, revision: Revision, pods: dict[str, Object]) -> bool:
        return bool(revision.predictor) and all(
            pod in pods and holds(pods[pod].get("status", {}), "Ready") for pod in revision.pods.values()
        )

    def _start(self, obj: Object, number: int, spec: str) -> Revision:
        triton = "model" in obj["spec"]["predictor"]
        revision = Revision(number, spec, 0 if triton and self.triton is None else free_port())
        if "transformer" in obj["spec"]:
            revision.transformer = free_port()
        for component in ("predictor", "transformer"):
            if component in obj["spec"] and (component == "transformer" or revision.predictor):
                pod = f"{name_of(obj)}-{component}-{number:05}-deployment-{uuid.uuid4().hex[:5]}"
                revision.pods[component] = pod
                self._pod(obj, revision, component, pod)
        return revision

    def _pod(self, obj: Object, revision: Revision, component: str, name: str) -> None:
        part = copy.deepcopy(obj["spec"][component])
        port = revision.transformer if component == "transformer" else revision.predictor
        if "model" in part:
            spec = self._triton_pod(part["model"], port)
        else:
            container = part["containers"][0]
            container["name"] = container.get("name") or _CONTAINER
            if component == "transformer":
                host = f"127.0.0.1:{revision.predictor}"
                added = ["--model_name", name_of(obj), "--predictor_host", host, "--http_port", str(port)]
                container["args"] = [*container.get("args", []), *added]
            _move(container, port)
            fields = model("V1PodSpec")["properties"]
            spec = {k: v for k, v in part.items() if k in fields} | {"containers": [container]}
        labels = {
            "serving.kserve.io/inferenceservice": name_of(obj),
            "component": component,
            "app": f"isvc.{name_of(obj)}-{component}",
            "serving.knative.dev/revision": f"{name_of(obj)}-{component}-{revision.number:05}",
        }
        pod = child(obj, "Pod", "v1", name, {"spec": spec}, obj["metadata"].get("labels", {}) | labels)
        self.make_pod(obj, pod, done="Created", failed="InternalError")

    def _triton_pod(self, part: Object, port: int) -> Object:
        assert self.triton is not None
        container = {
            "name": _CONTAINER,
            "image": "tritonserver",
            "command": list(self.triton("/mnt/models", port)),
            "env": [*part.get("env", []), {"name": "STORAGE_URI", "value": part["storageUri"]}],
            "ports": [{"containerPort": port}],
            "readinessProbe": {"httpGet": {"path": "/v2/health/ready", "port": port}},
            "resources": part.get("resources", {}),
        }
        return {"containers": [container]}

    def _status(
        self, obj: Object, service: Service, shares: Shares, pods: dict[str, Object], serverless: bool
    ) -> Object:
        status = copy.deepcopy(obj.get("status") or {})
        latest = service.revisions[-1]
        up_to_date = self._is_ready(latest, pods)
        value, reason, message = self._readiness(obj, service, pods, serverless)
        for component in ("predictor", "transformer"):
            if component in obj["spec"]:
                set_condition(status, f"{component.title()}Ready", value, reason, message)
        served = bool(shares)
        ingress = "Predictor ingress not created"
        set_condition(status, "IngressReady", "True" if served else "False", *(() if served else (ingress,)))
        set_condition(status, "Ready", value, reason, message)
        status["observedGeneration"] = obj["metadata"]["generation"]
        status["components"] = {c: self._component(obj, service, shares, c, serverless) for c in latest.pods}
        if serverless:
            for kind in ("PredictorConfigurationReady", "LatestDeploymentReady"):
                set_condition(status, kind, value, reason, message, severity="Info")
            for kind in ("PredictorRouteReady", "RoutesReady"):
                set_condition(status, kind, "True" if served else "Unknown", severity="Info")
        if served:
            status["url"] = service.front.url
            status["address"] = {"url": service.front.url}
        failure = None if up_to_date else _failure(latest, pods)
        target = "Loaded" if up_to_date else "FailedToLoad" if failure else "Pending"
        active = {"activeModelState": "Loaded"} if served else {}
        moving = {"Loaded": "UpToDate", "FailedToLoad": "BlockedByFailedLoad", "Pending": "InProgress"}
        states = {"activeModelState": "Pending", **active, "targetModelState": target}
        status["modelStatus"] = {"transitionStatus": moving[target], "states": states}
        status["modelStatus"]["copies"] = {"failedCopies": 0, "totalCopies": len(shares)}
        if failure:
            status["modelStatus"]["lastFailureInfo"] = failure
        return status

    def _readiness(
        self, obj: Object, service: Service, pods: dict[str, Object], serverless: bool
    ) -> tuple[str, str, str]:
        """Ready's status, reason and message."""
        latest = service.revisions[-1]
        if not latest.predictor:
            runtime = obj["spec"]["predictor"]["model"].get("runtime", "")
            return "False", "MinimumReplicasUnavailable", f"runtime {runtime}: this double was given no Triton to run"
        if self._is_ready(latest, pods):
            return "True", "", ""
        name = f"{name_of(obj)}-predictor"
        if serverless:
            revision = f"{name}-{latest.number:05}"
            if failure := _failure(latest, pods):
                text = f'Revision "{revision}" failed with message: Container failed with: {failure["message"]}.'
                return "False", "RevisionFailed", text
            return "Unknown", "", f'Configuration "{name}" is waiting for a Revision to become ready.'
        if not service.rolled_out:
            return "False", "MinimumReplicasUnavailable", "Deployment does not have minimum availability."
        if self.release < (0, 16):
            return "True", "", ""
        return "Unknown", "ReplicaSetUpdated", f'ReplicaSet "{name}-{latest.number:05}" is progressing.'

    def _component(self, obj: Object, service: Service, shares: Shares, component: str, serverless: bool) -> Object:
        def named(number: int) -> str:
            return f"{name_of(obj)}-{component}-{number:05}"

        latest = service.revisions[-1]
        made: Object = {}
        if shares:
            newest = shares[0][0]
            made["url"] = f"http://127.0.0.1:{newest.transformer if component == 'transformer' else newest.predictor}"
        if not serverless:
            return made
        made["latestCreatedRevision"] = named(latest.number)
        for key, number in (
            ("latestReadyRevision", max(service.ready, default=0)),
            ("latestRolledoutRevision", service.rolled_out),
            ("previousRolledoutRevision", service.previous),
        ):
            if number:
                made[key] = named(number)
        tags = obj["metadata"].get("annotations", {}).get(_TAGS) == "true"
        made["traffic"] = []
        for position, (revision, percent) in enumerate(shares):
            target = {"revisionName": named(revision.number), "percent": percent, "latestRevision": position == 0}
            if position or tags:
                target |= {"tag": "prev" if position else "latest", "url": f"http://127.0.0.1:{revision.port}"}
            made["traffic"].append(target)
        return made


def _essence(spec: Object) -> Object:
    """What makes another revision if it changes."""
    return {k: {n: v for n, v in part.items() if n not in _SPLIT} for k, part in spec.items() if isinstance(part, dict)}


def _move(container: Object, port: int) -> None:
    """Let a container listen on another port: all of this cluster's pods share one address."""
    ports = [p["containerPort"] for p in container.get("ports", [])] or [8080]
    for key in ("command", "args"):
        words = container.get(key, [])
        for i, word in enumerate(words[:-1]):
            if word in ("--port", "--http_port"):
                words[i + 1] = str(port)
    for variable in container.get("env", []):
        if variable["name"] == "PORT":
            variable["value"] = str(port)
    container["ports"] = [{"containerPort": port, "protocol": "TCP"}]
    probe = container.setdefault("readinessProbe", {"tcpSocket": {"port": ports[0]}})
    for action in probe.values():
        if isinstance(action, dict) and "port" in action:
            action["port"] = port


def _failure(revision: Revision, pods: dict[str, Object]) -> Object | None:
    """What ended the revision's containers, as in modelStatus.lastFailureInfo."""
    for name in revision.pods.values():
        for status in pods.get(name, {}).get("status", {}).get("containerStatuses", []):
            ended = status["state"].get("terminated") or status.get("lastState", {}).get("terminated")
            if ended and ended["exitCode"]:
                code = ended["exitCode"]
                message = ended.get("message", "").strip() or f"exit code {code}"
                return {"reason": "ModelLoadFailed", "message": message, "exitCode": code, "location": name}
    return None
