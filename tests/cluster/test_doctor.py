"""Every planted fault of a cluster is named by the check whose business it is, with its remedy."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import StringIO
from typing import Any

import pytest
from double import admission, answers, discovery
from double.requests import Handler
from double.server import Double
from rich.console import Console

from lesionflow.cluster import doctor, kfp_api, manifests
from lesionflow.cluster.api import Api
from lesionflow.cluster.doctor.capacity import number
from lesionflow.cluster.doctor.scene import Check
from lesionflow.cluster.settings import Place, Settings
from lesionflow.errors import ClusterError

SMALL = ("job.cpu=500m", "job.memory=1Gi")
"""The double's only node has two CPUs and 8 GiB."""
TOKEN = {"KAGGLE_API_TOKEN": b"KGAT_0123456789abcdef"}


class Pipelines(BaseHTTPRequestHandler):
    """A Pipelines API that knows only how it is."""

    def do_GET(self) -> None:
        server: Any = self.server
        server.asked.append((self.path, self.headers.get("Authorization", "")))
        status, body = server.answers.get(self.path, server.answers.get("", (404, b"{}")))
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def kfp_server() -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Pipelines)
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def kfp(kfp_server: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pipelines 2.15, known by KFP_ENDPOINT."""
    healthy = json.dumps({"commit_sha": "x", "tag_name": "2.15.0", "multi_user": True}).encode()
    kfp_server.asked, kfp_server.answers = [], {"/apis/v2beta1/healthz": (200, healthy)}
    for name in (*kfp_api.VARIABLES, "KF_PIPELINES_SA_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("KFP_ENDPOINT", kfp_server.url)
    return kfp_server


@pytest.fixture
def cluster(double: Double, api: Api, kfp: Any) -> Double:
    """A healthy Kubeflow, with the Kaggle secret."""
    api.create(manifests.secret(Place("kaggle"), "kaggle", TOKEN, of_run=False))
    return double


def examine(*overrides: str, **options: Any) -> dict[str, Check]:
    found = doctor.examine(Settings.load(None, [*SMALL, *overrides]), **options)
    return {check.name: check for check in found}


def status(found: dict[str, Check], *wanted: str) -> set[str]:
    return {name for name, check in found.items() if check.status in wanted}


PROFILES = ("kubeflow-1.8", "kubeflow-1.11", "trainer-2.3")


@pytest.mark.parametrize("double", PROFILES, indirect=True)
def test_a_healthy_cluster_has_no_fault(cluster):
    found = examine()
    assert status(found, "ok") == {"api", *doctor.CHECKS}, [c for c in found.values() if c.status != "ok"]
    assert cluster.url in found["api"].text


@pytest.mark.parametrize("double", PROFILES, indirect=True)
def test_a_healthy_cluster_is_healthy_in_every_form(cluster):
    assert not status(examine("serving.form=triton", "volumes.storage_class=longhorn", run="first"), "warn", "fail")


def test_nothing_is_left_on_the_cluster(cluster):
    def objects():
        kinds = [k for k in cluster.store.kinds if k not in ("Event",) and not k.startswith("SelfSubject")]
        return {(o["kind"], o["metadata"]["name"], o["metadata"]["resourceVersion"]) for k in kinds for o in store(k)}

    store = cluster.store.list
    before = objects()
    examine(run="first")
    assert objects() == before


@pytest.mark.parametrize(
    ("double", "tag", "release"),
    [
        ("kubeflow-1.8", "2.0.3", "1.8:"),
        ("kubeflow-1.8", "2.5.0", "1.9 or 1.10:"),
        ("kubeflow-1.8", "", "1.8 to 1.10:"),
        ("kubeflow-1.11", "2.15.0", "1.11 or later:"),
        ("kubeflow-1.11", "", "1.11 or later:"),
    ],
    indirect=["double"],
)
def test_the_release_is_told_by_kinds_and_versions(cluster, kfp, tag, release):
    kfp.answers = {"": (200, json.dumps({"multi_user": True, "tag_name": tag}).encode())}
    text = examine()["kubeflow"].text
    assert f"Kubeflow {release}" in text and tag in text


@pytest.mark.parametrize(
    ("double", "launcher"),
    [
        ("kubeflow-1.8", "PyTorchJob (auto)"),
        ("kubeflow-1.11", "TrainJob (auto), Trainer 2.1 or earlier"),
        ("trainer-2.3", "TrainJob (auto), Trainer 2.2 or later"),
    ],
    indirect=["double"],
)
def test_what_auto_chooses_is_said(cluster, launcher):
    assert examine()["launcher"].text == f"trains as {launcher}"


# --- faults -------------------------------------------------------------------------------------


@dataclass
class Plant:
    """What a fault may change."""

    cluster: Double
    kfp: Any
    patch: pytest.MonkeyPatch

    @property
    def store(self) -> Any:
        return self.cluster.store

    def node(self, name: str = "node-1", **changes: Any) -> None:
        """A new node like the first, or the first changed."""
        node = self.store.get("Node", None, name) or self.store.get("Node", None, "node-1")
        node["metadata"] = {"name": name, "labels": {"kubernetes.io/hostname": name}}
        node["spec"] = changes.get("spec", {})
        allocatable = node["status"]["allocatable"] | changes.get("allocatable", {})
        conditions = changes.get("conditions", node["status"]["conditions"])
        node["status"] = {**node["status"], "allocatable": allocatable, "conditions": conditions}
        self.store.delete("Node", None, name)
        self.store.create(node)

    def storage_class(self, provisioner: str, name: str = "longhorn", default: bool = True) -> None:
        self.store.delete("StorageClass", None, name)
        notes = {"storageclass.kubernetes.io/is-default-class": "true"} if default else {}
        self.put("storage.k8s.io/v1", "StorageClass", name, annotations=notes, provisioner=provisioner)

    def namespace(self, **changes: Any) -> None:
        namespace = self.store.get("Namespace", None, "team")
        for key, value in changes.items():
            namespace[key] |= value
        self.store.update(namespace)
        if "status" in changes:
            self.store.set_status("Namespace", None, "team", namespace["status"])

    def claim(self, name: str, phase: str = "Bound", mode: str = "ReadWriteMany", event: str = "") -> None:
        spec = {"accessModes": [mode], "resources": {"requests": {"storage": "1Gi"}}}
        made = self.put("v1", "PersistentVolumeClaim", name, spec=spec)
        self.store.set_status("PersistentVolumeClaim", "team", name, {"phase": phase})
        if event:
            self.store.event(made, "ProvisioningFailed", event, "Warning")

    def quota(self, used: dict[str, str], **hard: str) -> None:
        hard = {name.replace("__", "/").replace("_", "."): amount for name, amount in hard.items()}
        self.put("v1", "ResourceQuota", "kf-resource-quota", spec={"hard": hard})
        self.store.set_status("ResourceQuota", "team", "kf-resource-quota", {"hard": hard, "used": used})

    def limit(self, kind: str, **bounds: dict[str, str]) -> None:
        self.put("v1", "LimitRange", "bounds", spec={"limits": [{"type": kind, **bounds}]})

    def secret(self, name: str, type_: str = "Opaque", **data: str) -> None:
        self.store.delete("Secret", "team", name)
        self.put("v1", "Secret", name, type=type_, data=data)

    def put(self, version: str, kind: str, name: str, annotations: dict[str, str] | None = None, **rest: Any) -> Any:
        metadata = {"name": name, "annotations": annotations or {}}
        return self.store.create({"apiVersion": version, "kind": kind, "metadata": metadata, **rest}, "team")

    def refuse(self, kind: str, status: int, message: str) -> None:
        """Admission as webhooks and plugins do it, which the double hasn't got."""
        admit = admission.admit

        def webhook(known: Any, *rest: Any) -> None:
            if known.kind == kind:
                raise answers.Refused(status, "Forbidden" if status == 403 else "BadRequest", message)
            admit(known, *rest)

        self.patch.setattr(admission, "admit", webhook)


@dataclass
class Fault:
    about: str
    check: str
    status: str
    text: str
    """A part of what is said."""
    remedy: str
    """A part of what is to be done."""
    plant: Callable[[Plant], object] = lambda plant: None
    settings: tuple[str, ...] = ()
    profile: str = "kubeflow-1.11"
    also: set[str] = field(default_factory=set)
    """Other checks that the same fault concerns."""
    run: str = ""


def missing(*kinds: str) -> Callable[[Plant], object]:
    return lambda p: p.cluster.faults.update(missing_kinds=set(kinds))


def denied(*pairs: tuple[str, str]) -> Callable[[Plant], object]:
    return lambda p: p.cluster.faults.update(deny=set(pairs))


def late(seconds: int) -> Callable[[Plant], object]:
    original = Handler.date_time_string
    return lambda p: p.patch.setattr(
        Handler, "date_time_string", lambda self, stamp=None: original(self, time.time() + seconds)
    )


TAINT = {"spec": {"taints": [{"key": "gpu", "value": "only", "effect": "NoSchedule"}]}}
PENDING = "failed to provision volume: no space left in pool"
WEBHOOK = 'admission webhook "policy.example" denied the request: images must come from our registry'
FAULTS = [
    Fault(
        "old Kubernetes",
        "kubernetes",
        "warn",
        "v1.22.17 is older than 1.25",
        "upgrade",
        lambda p: p.patch.setitem(discovery.VERSIONS, "kubeflow-1.11", "v1.22.17"),
    ),
    Fault(
        "old for Trainer",
        "kubernetes",
        "warn",
        "v1.26.1 is older than the 1.27",
        "job.launcher=pytorchjob",
        lambda p: p.patch.setitem(discovery.VERSIONS, "kubeflow-1.11", "v1.26.1"),
    ),
    Fault("server ahead", "clock", "warn", "s apart: tokens", "NTP", late(121)),
    Fault("server an hour behind", "clock", "fail", "s apart: tokens", "NTP", late(-3600)),
    Fault(
        "no namespace",
        "namespace",
        "fail",
        "no namespace nowhere",
        "log in to Kubeflow once",
        settings=("namespace=nowhere",),
        also={"account", "pod", "objects", "secret"},
    ),
    Fault(
        "namespace going",
        "namespace",
        "fail",
        "team is being deleted",
        "another profile",
        lambda p: p.namespace(status={"phase": "Terminating"}),
    ),
    Fault(
        "no profile",
        "namespace",
        "warn",
        "no Kubeflow profile",
        "pipeline-runner",
        lambda p: p.namespace(metadata={"labels": {}}),
    ),
    Fault("sidecars kept", "istio", "warn", "never ends", "istio=false", settings=("istio=true",)),
    Fault(
        "no Kubeflow",
        "kubeflow",
        "fail",
        "none of Kubeflow's kinds",
        "install Kubeflow",
        lambda p: (
            missing("TrainJob", "TrainingRuntime", "PyTorchJob", "InferenceService", "Notebook", "Tensorboard")(p),
            p.kfp.answers.clear(),
        ),
        also={"launcher", "serving", "boards", "pipelines"},
    ),
    Fault(
        "no job kind",
        "launcher",
        "fail",
        "neither TrainJob nor PyTorchJob",
        "install Kubeflow Trainer",
        missing("PyTorchJob"),
        profile="kubeflow-1.8",
    ),
    Fault(
        "wrong launcher",
        "launcher",
        "fail",
        "no TrainJob",
        "pytorchjob",
        settings=("job.launcher=trainjob",),
        profile="kubeflow-1.8",
    ),
    Fault("local launcher", "launcher", "warn", "one node", "job.launcher=auto", settings=("job.launcher=local",)),
    Fault("no JobSet", "launcher", "fail", "JobSet", "install JobSet", missing("JobSet")),
    Fault("no KServe", "serving", "fail", "no InferenceService", "install KServe", missing("InferenceService")),
    Fault(
        "no Triton runtime",
        "serving",
        "fail",
        "kserve-tritonserver",
        "serving.form=lesionflow",
        lambda p: p.store.delete("ClusterServingRuntime", None, "kserve-tritonserver"),
        settings=("serving.form=triton",),
    ),
    Fault("no Knative", "serving", "fail", "no Knative", "serving.mode=raw", settings=("serving.mode=serverless",)),
    Fault("canary in vain", "serving", "warn", "serving.canary", "serverless", settings=("serving.canary=10",)),
    Fault("no Tensorboard", "boards", "warn", "no Tensorboard", "tensorboard --logdir", missing("Tensorboard")),
    Fault(
        "Pipelines silent",
        "pipelines",
        "fail",
        "doesn't answer",
        "kubectl port-forward",
        lambda p: p.patch.setenv("KFP_ENDPOINT", "http://127.0.0.1:9"),
    ),
    Fault(
        "Pipelines behind a login",
        "pipelines",
        "fail",
        "login page",
        "--audience pipelines.kubeflow.org",
        lambda p: p.kfp.answers.update({"/apis/v2beta1/healthz": (200, b"<!doctype html><title>Sign in</title>")}),
    ),
    Fault(
        "Pipelines unknown",
        "pipelines",
        "warn",
        "no address",
        "KFP_ENDPOINT",
        lambda p: p.patch.delenv("KFP_ENDPOINT"),
    ),
    Fault(
        "no service account",
        "account",
        "fail",
        "no service account pipeline-runner; it has: default, default-editor",
        "service_account",
        settings=("service_account=pipeline-runner",),
    ),
    Fault(
        "runtimes read-only",
        "permissions",
        "fail",
        "create, patch, delete trainingruntimes.trainer.kubeflow.org",
        "--resource=trainingruntimes.trainer.kubeflow.org && kubectl -n team create rolebinding lesionflow "
        "--role=lesionflow --serviceaccount=team:default-editor; or set job.launcher=pytorchjob",
        denied(*((verb, "trainingruntimes") for verb in ("create", "patch", "delete"))),
    ),
    Fault("no logs", "permissions", "fail", "get pods/log", "--resource=pods/log", denied(("get", "pods/log"))),
    Fault(
        "no boards of one's own",
        "permissions",
        "warn",
        "create tensorboards.tensorboard.kubeflow.org",
        "`cluster tensorboard` fails",
        denied(("create", "tensorboards")),
    ),
    Fault(
        "no default class",
        "storage",
        "fail",
        "no default storage class",
        "volumes.storage_class to one of longhorn",
        lambda p: p.storage_class("driver.longhorn.io", default=False),
    ),
    Fault(
        "no such class",
        "storage",
        "fail",
        "no storage class fast; the cluster has: longhorn",
        "volumes.storage_class",
        settings=("volumes.storage_class=fast",),
    ),
    Fault(
        "local volumes",
        "storage",
        "fail",
        "rancher.io/local-path) has no ReadWriteMany",
        "volumes.access=ReadWriteOnce",
        lambda p: p.storage_class("rancher.io/local-path"),
    ),
    Fault(
        "block volumes",
        "storage",
        "fail",
        "rook-ceph.rbd.csi.ceph.com) has no ReadWriteMany",
        "CephFS",
        lambda p: p.storage_class("rook-ceph.rbd.csi.ceph.com"),
    ),
    Fault(
        "unknown volumes",
        "storage",
        "warn",
        "isn't known",
        "documentation",
        lambda p: p.storage_class("storage.example/new"),
    ),
    Fault(
        "a volume for each node",
        "storage",
        "fail",
        "each node a volume of its own",
        "volumes.storage_class",
        lambda p: (p.storage_class("k8s.io/minikube-hostpath"), p.node("node-2")),
    ),
    Fault(
        "a volume for the only node",
        "storage",
        "warn",
        "only on a single node",
        "volumes.storage_class",
        lambda p: p.storage_class("k8s.io/minikube-hostpath"),
    ),
    Fault(
        "two defaults",
        "storage",
        "warn",
        "longhorn, other",
        "unmark",
        lambda p: p.storage_class("driver.longhorn.io", name="other"),
    ),
    Fault(
        "one writer, two nodes",
        "storage",
        "warn",
        "nothing keeps them together",
        "job.node_selector",
        lambda p: p.node("node-2"),
        settings=("volumes.access=ReadWriteOnce",),
    ),
    Fault(
        "no such claim",
        "claims",
        "fail",
        "no claim mine",
        "volumes.data_claim empty",
        settings=("volumes.data_claim=mine",),
    ),
    Fault(
        "claim pending",
        "claims",
        "fail",
        f"first-data is Pending, not Bound ({PENDING})",
        "kubectl -n team describe pvc first-data",
        lambda p: p.claim("first-data", "Pending", event=PENDING),
        run="first",
    ),
    Fault(
        "claim pending in silence",
        "claims",
        "fail",
        "claim mine is Lost, not Bound",
        "describe pvc mine",
        lambda p: p.claim("mine", "Lost"),
        settings=("volumes.data_claim=mine",),
    ),
    Fault(
        "claim waits",
        "claims",
        "warn",
        "waits for its first pod",
        "nothing",
        lambda p: p.claim("first-data", "Pending", event="waiting for first consumer to be created before binding"),
        run="first",
    ),
    Fault(
        "claim of one node",
        "claims",
        "fail",
        "mine isn't ReadWriteMany, and 2 pods need it",
        "job.node_selector",
        lambda p: (p.claim("mine", mode="ReadWriteOnce"), p.node("node-2")),
        settings=("volumes.data_claim=mine",),
    ),
    Fault(
        "CPU quota",
        "quota",
        "fail",
        "requests.cpu: 1 needed, 0.5 of 4 free",
        "job.nodes, job.cpu",
        lambda p: p.quota({"requests.cpu": "3500m"}, requests_cpu="4"),
    ),
    Fault(
        "pod quota", "quota", "fail", "pods: 2 needed, 1 of 3", "job.nodes", lambda p: p.quota({"pods": "2"}, pods="3")
    ),
    Fault(
        "GPU quota",
        "quota",
        "fail",
        "requests.nvidia.com/gpu: 2 needed, 1 of 1",
        "job.gpus",
        lambda p: (
            p.quota({}, **{"requests.nvidia.com/gpu".replace(".", "_").replace("/", "__"): "1"}),
            p.node(allocatable={"nvidia.com/gpu": "2"}),
        ),
        settings=("job.gpus=1",),
    ),
    Fault(
        "storage quota",
        "quota",
        "fail",
        "requests.storage: 14Gi needed, 2Gi of 10Gi free",
        "volumes.data",
        lambda p: p.quota({"requests.storage": "8Gi"}, requests_storage="10Gi"),
    ),
    Fault(
        "pods too big",
        "limits",
        "fail",
        "job.memory is 1Gi, limit range bounds allows at most 512Mi",
        "job.memory=512Mi",
        lambda p: p.limit("Container", max={"memory": "512Mi"}),
    ),
    Fault(
        "claims too small",
        "limits",
        "fail",
        "volumes.logs is 2Gi, limit range bounds allows no less than 3Gi",
        "volumes.logs=3Gi",
        lambda p: p.limit("PersistentVolumeClaim", min={"storage": "3Gi"}),
    ),
    Fault(
        "no node so labelled",
        "nodes",
        "fail",
        "job.node_selector=disk=ssd",
        "label a node",
        settings=("job.node_selector=disk=ssd",),
    ),
    Fault("taint", "nodes", "fail", "by a taint", "job.tolerations=gpu=only:NoSchedule", lambda p: p.node(**TAINT)),
    Fault(
        "taint without a value",
        "nodes",
        "fail",
        "by a taint",
        "job.tolerations=gpu:NoExecute",
        lambda p: p.node(spec={"taints": [{"key": "gpu", "effect": "NoExecute"}]}),
        settings=("job.tolerations=gpu:NoSchedule",),
    ),
    Fault(
        "another value's taint",
        "nodes",
        "fail",
        "by a taint",
        "job.tolerations=gpu=only:NoSchedule",
        lambda p: p.node(**TAINT),
        settings=("job.tolerations=gpu=some:NoSchedule",),
    ),
    Fault("node closed", "nodes", "fail", "ready and open", "uncordon", lambda p: p.node(spec={"unschedulable": True})),
    Fault(
        "no node that big",
        "nodes",
        "fail",
        "4 cpu, 1Gi memory; the most a node has: 2 cpu",
        "job.cpu, or add a node",
        settings=("job.cpu=4",),
    ),
    Fault(
        "nodes for half the job",
        "nodes",
        "fail",
        "1 of the job's 2 pods (1.5 cpu",
        "job.nodes=1",
        settings=("job.cpu=1500m",),
    ),
    Fault(
        "one node for all",
        "nodes",
        "fail",
        "1 of the job's 2 pods",
        "job.nodes=1",
        lambda p: p.node("node-2"),
        settings=("job.cpu=1500m", "volumes.access=ReadWriteOnce"),
        also={"storage"},
    ),
    Fault(
        "disk full",
        "node-health",
        "warn",
        "node node-2: DiskPressure",
        "unused images",
        lambda p: p.node(
            "node-2", conditions=[{"type": "Ready", "status": "True"}, {"type": "DiskPressure", "status": "True"}]
        ),
    ),
    Fault(
        "node away",
        "node-health",
        "warn",
        "node node-2: NotReady",
        "describe node",
        lambda p: p.node("node-2", conditions=[{"type": "Ready", "status": "Unknown"}]),
    ),
    Fault("no GPU", "gpus", "fail", "the cluster has 0", "device plugin", settings=("job.gpus=1",), also={"nodes"}),
    Fault(
        "another maker's GPU",
        "gpus",
        "fail",
        "the cluster has 0",
        "job.gpu_resource=amd.com/gpu",
        lambda p: p.node(allocatable={"amd.com/gpu": "4"}),
        settings=("job.gpus=1",),
        also={"nodes"},
    ),
    Fault(
        "GPUs unused",
        "gpus",
        "warn",
        "8 nvidia.com/gpu, but the job asks for none",
        "job.gpus=1",
        lambda p: p.node(allocatable={"nvidia.com/gpu": "8"}),
    ),
    Fault(
        "GPUs idle",
        "gpus",
        "warn",
        "1 processes per pod for 2 GPUs",
        "job.processes=2",
        lambda p: p.node(allocatable={"nvidia.com/gpu": "8"}),
        settings=("job.gpus=2",),
    ),
    Fault(
        "not packaged",
        "image",
        "fail",
        "doesn't hold lesionflow",
        "deploy/",
        settings=("image.packaged=true",),
    ),
    Fault(
        "moving image",
        "image",
        "warn",
        "image.train=ours.example:5000/train",
        "digest",
        settings=("image.train=ours.example:5000/train",),
    ),
    Fault(
        "no pull secret",
        "image",
        "fail",
        "no secret pull",
        "create secret docker-registry pull",
        settings=("image.pull_secret=pull",),
    ),
    Fault(
        "wrong pull secret",
        "image",
        "fail",
        "of type Opaque",
        "create secret docker-registry pull",
        lambda p: p.secret("pull", login="eA=="),
        settings=("image.pull_secret=pull",),
    ),
    Fault(
        "no Kaggle secret",
        "secret",
        "warn",
        "no secret kaggle",
        "lesionflow cluster secret",
        lambda p: p.store.delete("Secret", "team", "kaggle"),
    ),
    Fault(
        "half a Kaggle secret",
        "secret",
        "fail",
        "keys KAGGLE_USERNAME, but",
        "lesionflow cluster secret",
        lambda p: p.secret("kaggle", KAGGLE_USERNAME="eA==", KAGGLE_KEY=""),
    ),
    Fault(
        "pod security",
        "pod",
        "fail",
        'violates PodSecurity "restricted:latest": container "istio-init"',
        "mutating webhook",
        lambda p: (
            # As if a webhook had put a container in.
            p.namespace(metadata={"labels": {**PROFILE, "pod-security.kubernetes.io/enforce": "restricted"}}),
            p.patch.setattr(admission, "restricted", lambda spec: ['container "istio-init" must not add capabilities']),
        ),
    ),
    Fault(
        "priority class",
        "pod",
        "fail",
        "no PriorityClass with name urgent",
        "job.priority_class",
        lambda p: p.refuse("Pod", 403, 'pods "x" is forbidden: no PriorityClass with name urgent was found'),
        settings=("job.priority_class=urgent",),
    ),
    Fault(
        "webhook",
        "objects",
        "fail",
        WEBHOOK,
        "owner of the named webhook",
        lambda p: p.refuse("TrainJob", 403, WEBHOOK),
    ),
    Fault(
        "an older kind",
        "objects",
        "fail",
        'unknown field "spec.predictor.minReplicas"',
        "docs/cluster.md",
        lambda p: p.refuse(
            "InferenceService", 400, 'strict decoding error: unknown field "spec.predictor.minReplicas"'
        ),
    ),
    Fault(
        "claims over quota",
        "objects",
        "fail",
        "exceeded quota",
        "cluster clean",
        lambda p: p.cluster.faults.update(quota={"persistentvolumeclaims": "exceeded quota: kf-resource-quota"}),
    ),
]
PROFILE = {"app.kubernetes.io/part-of": "kubeflow-profile"}


@pytest.mark.parametrize(
    ("double", "fault"), [(f.profile, f) for f in FAULTS], ids=[f.about for f in FAULTS], indirect=["double"]
)
def test_a_fault_is_named_with_its_remedy(cluster, kfp, monkeypatch, fault):
    fault.plant(Plant(cluster, kfp, monkeypatch))
    found = examine(*fault.settings, run=fault.run)
    check = found[fault.check]
    assert check.status == fault.status, check
    assert fault.text in check.text
    assert fault.remedy in check.remedy
    assert_can_be_done(check.remedy)
    others = status(found, "warn", "fail") - {fault.check}
    # Quota and limits refuse in dry runs too, which is as it should be.
    assert others <= fault.also | ({"pod", "objects"} if fault.check in ("quota", "limits") else set()), found
    assert fault.also <= others


def assert_can_be_done(remedy: str) -> None:
    """What a remedy tells to set is a setting, and takes that value."""
    for section, name in re.findall(r"\b(job|volumes|serving|image)\.(\w+)", remedy):
        assert hasattr(getattr(Settings(), section), name), remedy
    for change in re.findall(r"\b(?:set|or|with) ([a-z_.]+=[^\s,;]+)", remedy):
        if not change[0].isupper():
            Settings.load(None, [change])


def test_as_many_faults_as_promised_are_planted():
    assert len({f.check for f in FAULTS}) == len(doctor.CHECKS)
    assert len([f for f in FAULTS if f.status == "fail"]) >= 30


@pytest.mark.parametrize("tolerations", ["gpu=only:NoSchedule", "gpu:NoSchedule"])
def test_a_tolerated_taint_is_no_fault(cluster, monkeypatch, tolerations):
    Plant(cluster, None, monkeypatch).node(**TAINT)
    assert examine(f"job.tolerations={tolerations}")["nodes"].status == "ok"


def test_a_node_that_only_prefers_not_to_is_no_fault(cluster, monkeypatch):
    taint = {"key": "gpu", "value": "only", "effect": "PreferNoSchedule"}
    Plant(cluster, None, monkeypatch).node(spec={"taints": [taint]})
    assert examine()["nodes"].status == "ok"


def test_quotas_for_other_pods_are_passed_over(cluster, monkeypatch):
    plant = Plant(cluster, None, monkeypatch)
    plant.put("v1", "ResourceQuota", "short-lived", spec={"hard": {"pods": "0"}, "scopes": ["Terminating"]})
    assert examine()["quota"].status == "ok"


@pytest.mark.parametrize("together", [(), ("job.nodes=1",), ("job.node_selector=kubernetes.io/hostname=node-1",)])
def test_volumes_of_one_node_are_no_fault_where_pods_stay_together(cluster, monkeypatch, together):
    if together:
        Plant(cluster, None, monkeypatch).node("node-2")
    assert examine("volumes.access=ReadWriteOnce", *together)["storage"].status == "ok"


def test_claims_that_are_there_need_no_quota(cluster, monkeypatch):
    plant = Plant(cluster, None, monkeypatch)
    for volume in manifests.VOLUMES:
        plant.claim(f"first-{volume}")
    plant.quota({"persistentvolumeclaims": "3"}, persistentvolumeclaims="3")
    assert examine(run="first")["quota"].status == "ok"
    assert "persistentvolumeclaims: 3 needed, 0 of 3 free" in examine()["quota"].text


@pytest.mark.parametrize("labels", [{"istio-injection": "enabled"}, {"istio.io/rev": "canary"}, {}])
def test_whether_sidecars_come_is_said(cluster, labels):
    namespace = cluster.store.get("Namespace", None, "team")
    namespace["metadata"]["labels"] = {**PROFILE, **labels}
    cluster.store.update(namespace)
    assert ("opt out" if labels else "no sidecars") in examine()["istio"].text


def reviews(cluster, monkeypatch, me, lacking):
    """Reviews of accounts, which the double doesn't do: whoever is asked about lacks the rights in `lacking`."""
    kinds, post, asked = cluster.store.kinds, Handler._post, []
    like = kinds["SelfSubjectAccessReview"]
    local = {"kind": "LocalSubjectAccessReview", "plural": "localsubjectaccessreviews", "namespaced": True}
    kinds[local["kind"]] = dataclasses.replace(like, **local)
    who = {"kind": "SelfSubjectReview", "plural": "selfsubjectreviews", "group": "authentication.k8s.io"}
    kinds[who["kind"]] = dataclasses.replace(like, **who)

    def reviewing(self):
        if self.kind.kind not in (local["kind"], who["kind"]):
            return post(self)
        body = self._body()
        status = {"userInfo": {"username": me}}
        if self.kind.kind == local["kind"]:
            asked.append((body["spec"]["user"], body["spec"]["groups"]))
            wanted = body["spec"]["resourceAttributes"]
            status = {"allowed": (wanted["verb"], wanted["resource"]) not in lacking}
        return self._send({**body, "status": status}, 201)

    monkeypatch.setattr(Handler, "_post", reviewing)
    return asked


def test_an_administrator_learns_what_the_pods_may_not(cluster, monkeypatch):
    asked = reviews(cluster, monkeypatch, "root@example.com", {("create", "trainjobs"), ("create", "secrets")})
    found = examine()
    assert "as root@example.com" in found["api"].text
    check = found["permissions"]
    assert check.status == "fail"
    assert check.text == "the pods' account default-editor may not create trainjobs.trainer.kubeflow.org"
    assert "--serviceaccount=team:default-editor" in check.remedy
    groups = ["system:serviceaccounts", "system:serviceaccounts:team", "system:authenticated"]
    assert {user for user, _ in asked} == {"system:serviceaccount:team:default-editor"} and asked[0][1] == groups


def test_whoever_lacks_a_right_is_named_in_the_remedy(cluster, monkeypatch):
    cluster.faults["deny"] = {("create", "inferenceservices")}
    reviews(cluster, monkeypatch, "someone@example.com", set())
    assert "--user=someone@example.com" in examine()["permissions"].remedy


def test_a_notebook_asks_for_its_own_account_only(cluster, monkeypatch):
    cluster.faults["deny"] = {("create", "inferenceservices")}
    asked = reviews(cluster, monkeypatch, "system:serviceaccount:team:default-editor", set())
    assert "--serviceaccount=team:default-editor" in examine()["permissions"].remedy
    assert not asked


# --- inside a pod -------------------------------------------------------------------------------


@pytest.mark.parametrize("held", [False, True])
def test_a_notebook_without_a_token_for_pipelines_is_told_of_the_pod_default(cluster, kfp, tmp_path, monkeypatch, held):
    monkeypatch.setattr("lesionflow.cluster.doctor.general.in_cluster", lambda: True)
    monkeypatch.setenv("KF_PIPELINES_SA_TOKEN_PATH", str(tmp_path / "token"))
    if held:
        (tmp_path / "token").write_text("sa-token\n")
    kfp.answers = {"": (403, b"RBAC: access denied")}
    check = examine()["pipelines"]
    assert check.status == "fail" and "refuses this account (403)" in check.text
    assert ("access-ml-pipeline" in check.remedy) is not held
    assert kfp.asked[0][1] == ("Bearer sa-token" if held else "")


def test_inside_a_cluster_pipelines_has_an_address(monkeypatch):
    monkeypatch.setattr(kfp_api, "in_cluster", lambda: True)
    for name in kfp_api.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert kfp_api.endpoint(Settings()) == kfp_api.IN_CLUSTER
    monkeypatch.setenv("KF_PIPELINES_ENDPOINT", "pipelines.example/")
    assert kfp_api.endpoint(Settings()) == "https://pipelines.example"
    assert kfp_api.endpoint(Settings.load(None, ["kfp=http://named:1/"])) == "http://named:1"


# --- what can't be answered ---------------------------------------------------------------------


def test_a_user_who_sees_only_a_namespace_gets_no_faults(cluster):
    hidden = ("nodes", "storageclasses", "namespaces", "clusterservingruntimes")
    cluster.faults["deny"] = {(verb, plural) for plural in hidden for verb in ("get", "list")}
    found = examine("serving.form=triton")
    assert status(found, "skip") == {"nodes", "node-health", "gpus", "storage", "namespace", "istio"}
    assert not status(found, "warn", "fail")
    assert "may not list nodes" in found["nodes"].text
    assert "may not look at namespace team" in found["istio"].text


def test_a_user_who_may_only_look_gets_the_missing_rights_and_no_riddles(cluster):
    cluster.faults["deny"] = {(verb, "*") for verb in ("create", "patch", "delete")} - {("create", "*")}
    kinds = ("pods", "secrets", "persistentvolumeclaims", "networkpolicies", "inferenceservices", "tensorboards")
    cluster.faults["deny"] |= {("create", k) for k in (*kinds, "trainjobs", "trainingruntimes")}
    found = examine()
    assert status(found, "fail") == {"permissions"}
    assert status(found, "skip") == {"pod", "objects"}


@pytest.mark.parametrize(
    ("status_", "message"),
    [
        (403, "trainingRuntime not found: specified trainingRuntime must be created before the TrainJob is created"),
        (400, 'admission webhook "x" does not support dry run'),
    ],
)
def test_what_only_a_dry_run_meets_is_no_fault(cluster, monkeypatch, status_, message):
    Plant(cluster, None, monkeypatch).refuse("TrainJob", status_, message)
    assert examine()["objects"].status == "ok"


@pytest.mark.parametrize("code", [401, 500, 503])
def test_a_cluster_that_answers_errors_ends_with_one_fault(cluster, code):
    cluster.faults["status"] = code
    found = examine()
    assert status(found, "fail") == {"api"} and status(found, "skip") == set(doctor.CHECKS)
    assert str(code) in found["api"].text and "kubectl" in found["api"].remedy


def test_no_cluster_at_all(tmp_path, monkeypatch):
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    found = examine()
    assert status(found, "fail") == {"api"}
    assert "KUBECONFIG" in found["api"].text


def test_a_cluster_that_is_away(cluster, tmp_path, monkeypatch):
    config = (tmp_path / "kubeconfig").read_text().replace(cluster.url, "http://127.0.0.1:9")
    (tmp_path / "kubeconfig").write_text(config)
    assert "doesn't answer" in examine()["api"].text


def test_one_kind_that_fails_leaves_the_other_checks_alone(cluster):
    cluster.faults["status"] = {("list", "resourcequotas"): 500, ("list", "limitranges"): 500}
    found = examine()
    assert status(found, "skip") == {"quota", "limits"} and not status(found, "fail", "warn")
    assert "500" in found["quota"].text


def test_a_check_that_breaks_leaves_the_others_alone(cluster, monkeypatch):
    def broken(scene):
        raise KeyError("spec")

    monkeypatch.setitem(doctor.CHECKS, "quota", broken)
    found = examine()
    assert found["quota"].status == "skip" and "KeyError: 'spec'" in found["quota"].text
    assert len(status(found, "ok")) == len(doctor.CHECKS)


# --- the tiny job -------------------------------------------------------------------------------

NODE = {"python": "3.11.9", "torch": "2.8.0", "lesionflow": None, "gpus": [], "host": "x", "waited": 0.1}


def test_the_tiny_job_is_asked_for(cluster, monkeypatch):
    seen = []

    def probe(api, place, *, timeout):
        seen.append(place.name)
        nodes = [{"node": n, **NODE} for n in (0, 1)]
        return {"seconds": 9.5, "launcher": "trainjob", "volumes": ["data", "logs"], "nodes": nodes}

    monkeypatch.setattr("lesionflow.cluster.jobs.probe", probe)
    assert "probe" not in examine()
    found = examine(job=True, run="first")
    assert list(found)[-1] == "probe" and seen == ["first"]
    assert found["probe"].status == "ok"
    assert "9.5 s, both wrote to data, logs; node-0: Python 3.11.9, torch 2.8.0, 0 GPUs" in found["probe"].text


def test_the_tiny_job_fails_with_its_cause(cluster, monkeypatch):
    def probe(api, place, *, timeout):
        raise ClusterError("the probe job failed: image nowhere/x can't be pulled")

    monkeypatch.setattr("lesionflow.cluster.jobs.probe", probe)
    check = examine(job=True)["probe"]
    assert check.status == "fail" and "can't be pulled" in check.text


def test_an_image_without_torch_is_found_out(cluster, monkeypatch):
    answer = {"seconds": 1, "launcher": "trainjob", "volumes": [], "nodes": [{"node": 0, **NODE, "torch": None}]}
    monkeypatch.setattr("lesionflow.cluster.jobs.probe", lambda api, place, *, timeout: answer)
    check = examine(job=True)["probe"]
    assert check.status == "fail" and "torch missing" in check.text and "image.train" in check.remedy


# --- form ---------------------------------------------------------------------------------------


def test_json_goes_round(cluster):
    cluster.faults["missing_kinds"] = {"Tensorboard"}
    found = doctor.examine(Settings.load(None, SMALL))
    value = json.loads(doctor.to_json(found))
    assert [Check(**check) for check in value["checks"]] == found
    assert (value["ok"], value["warn"], value["fail"], value["skip"]) == (len(doctor.CHECKS), 1, 0, 0)


def test_each_check_is_told_as_it_comes(cluster):
    told = []
    found = doctor.examine(Settings.load(None, SMALL), tell=told.append)
    assert told == found and [c.name for c in found] == ["api", *doctor.CHECKS]


def test_the_terminal_shows_marks_remedies_and_counts():
    found = [Check("quota", "fail", "pods: 2 needed, [1 of 3] free", "lower job.nodes"), Check("api", "ok", "there")]
    out = StringIO()
    Console(file=out, width=100).print(doctor.render(found))
    shown = out.getvalue()
    assert "fail quota       pods: 2 needed, [1 of 3] free" in shown and "→ lower job.nodes" in shown
    assert "1 ok, 0 warn, 1 fail, 0 skip" in shown
    Console(file=(alone := StringIO()), width=100).print(doctor.render(found[:1]))
    assert alone.getvalue().splitlines() == shown.splitlines()[:2]


def test_the_secret_is_looked_at_and_not_shown(cluster, caplog):
    with caplog.at_level(logging.DEBUG):
        text = doctor.to_json(doctor.examine(Settings.load(None, SMALL)))
    secret = TOKEN["KAGGLE_API_TOKEN"].decode()
    assert '"secret"' in text and secret not in text + caplog.text


@pytest.mark.parametrize(
    ("text", "value"),
    [("2", 2), ("500m", 0.5), ("8Gi", 8 * 2**30), ("1e3", 1000), ("1E", 1e18), ("128M", 128e6), ("1.5Gi", 1.5 * 2**30)],
)
def test_quantities(text, value):
    assert number(text) == pytest.approx(value)
