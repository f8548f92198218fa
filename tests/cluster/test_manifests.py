"""Every object lesionflow puts on a cluster, against the schemas of every cluster it is meant for.

The schemas are the upstream CRDs with unknown fields refused; what they don't hold (CEL rules, webhooks) only a real
cluster can check. A planted mistake in each kind of place shows that the check is not empty.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from double import admission, patches
from double.answers import Refused
from double.core import PROFILES, kinds, runtimes

from lesionflow.cluster import manifests
from lesionflow.cluster.settings import Place, Settings

Object = dict[str, Any]

COMMAND = ["python", "-m", "lesionflow", "train", "--out", "/mnt/lesionflow/models/runs/first", "--processes", "2"]
CANARY = b"canary-6f1d2c"
VARIANTS = {
    "plain": [],
    "named": ["namespace=team"],
    "gpus": ["job.gpus=2", "job.processes=2"],
    "other-gpus": ["job.gpus=1", "job.gpu_resource=amd.com/gpu"],
    "one-node": ["job.nodes=1"],
    "many-nodes": ["job.nodes=8", "job.cpu=1500m", "job.memory=12.5Gi", "job.shm=512Mi"],
    "placed": ["job.node_selector=gpu=a100,zone=b", "job.tolerations=gpu=yes:NoSchedule,spot:NoExecute"],
    "urgent": ["job.priority_class=high", "job.deadline=3600", "job.ttl=0", "job.retries=0"],
    "istio": ["istio=true", "user=2000", "service_account=pipeline-runner"],
    "claims-there": ["volumes.data_claim=lesions", "volumes.logs_claim=events", "volumes.models_claim=bundles"],
    "one-writer": ["volumes.access=ReadWriteOnce", "volumes.storage_class=longhorn", "volumes.mount=/data/"],
    "packaged": ["image.packaged=true", "image.train=example/train:1", "image.serve=example/serve:1"],
    "pulled": ["image.pull_secret=registry", "image.index=http://index/simple"],
    "serverless": ["serving.mode=serverless", "serving.replicas=0"],
    "canary": ["serving.mode=serverless", "serving.canary=10"],
    "triton": ["serving.form=triton"],
    "triton-gpu": ["serving.form=triton", "serving.gpus=1", "image.packaged=true"],
    "triton-canary": ["serving.form=triton", "serving.mode=serverless", "serving.canary=20"],
}


def place(*overrides: str) -> Place:
    return Place("first", Settings.load(overrides=overrides))


def objects(where: Place) -> list[Object]:
    """All that a run can put on a cluster."""
    return [
        *manifests.claims(where),
        manifests.secret(where, "kaggle", {"KAGGLE_KEY": CANARY}, of_run=False),
        manifests.secret(where, where.wheel_secret, {"lesionflow-0-py3-none-any.whl": b"PK\x03\x04"}),
        manifests.network_policy(where),
        manifests.pytorch_job(where, where.job_name("0" * 64), COMMAND),
        manifests.pytorch_job(where, "probe", ["true"], nodes=1),
        manifests.training_runtime(where, where.job_name("0" * 64)),
        manifests.train_job(where, where.job_name("0" * 64), COMMAND),
        manifests.inference_service(where),
        manifests.inference_service(where, name="skin-cancer-detection-next"),
        manifests.tensorboard(where),
    ]


@functools.cache
def checkers(profile: str, crds: Path) -> Any:
    return kinds(profile, crds)


def check(profile: str, crds: Path, obj: Object) -> Object:
    return admission.checked(checkers(profile, crds)[obj["kind"]], obj)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_object_is_valid(profile: str, variant: str, crds: Path) -> None:
    known = checkers(profile, crds)
    seen = set()
    for obj in objects(place(*VARIANTS[variant])):
        if obj["kind"] in known:
            assert obj["apiVersion"] == known[obj["kind"]].api_version
            check(profile, crds, obj)
            seen.add(obj["kind"])
    job = {"kubeflow-1.8": {"PyTorchJob"}, "trainer-2.3": {"TrainJob", "TrainingRuntime"}}
    wanted = job.get(profile, {"PyTorchJob", "TrainJob", "TrainingRuntime"})
    assert seen >= wanted | {"InferenceService", "Tensorboard", "Secret", "NetworkPolicy"}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_pod_is_restricted(variant: str, crds: Path) -> None:
    where = place(*VARIANTS[variant])
    found = 0
    for obj in objects(where):
        for spec in pod_specs(obj):
            assert not admission.restricted(spec), obj["kind"]
            assert all(c["securityContext"]["readOnlyRootFilesystem"] for c in spec["containers"])
            found += 1
    assert found == (6 if where.settings.job.nodes > 1 else 5)
    predictor = manifests.inference_service(where)["spec"]["predictor"]
    if "model" in predictor:
        for profile in PROFILES:
            # As KServe does it: the model's fields over the runtime's container, the pod's beside them.
            runtime = next(r for r in runtimes(profile, crds) if r["metadata"]["name"] == "kserve-tritonserver")
            container = patches.merge(runtime["spec"]["containers"][0], predictor["model"])
            assert not admission.restricted({**predictor, "containers": [container]}), profile


def test_restricted_names_what_a_pod_lacks() -> None:
    spec = manifests.pytorch_job(place(), "j", COMMAND)["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]
    container = ("containers", 0, "securityContext")
    for way, value, told in (
        (("hostNetwork",), True, "hostNetwork"),
        (("volumes", 0), {"name": "v", "hostPath": {"path": "/"}}, "restricted type hostPath"),
        ((*container, "privileged"), True, "privileged"),
        ((*container, "allowPrivilegeEscalation"), True, "allowPrivilegeEscalation=false"),
        ((*container, "capabilities"), {"drop": ["NET_RAW"]}, "capabilities.drop"),
        ((*container, "capabilities"), {"drop": ["ALL"], "add": ["SYS_ADMIN"]}, "add capabilities"),
        ((*container, "runAsNonRoot"), False, "runAsNonRoot"),
        ((*container, "runAsUser"), 0, "runAsUser=0"),
        ((*container, "seccompProfile"), {"type": "Unconfined"}, "seccompProfile"),
        (("containers", 0, "ports"), [{"containerPort": 1, "hostPort": 1}], "hostPorts"),
    ):
        worse = copy.deepcopy(spec)
        put(worse, way, value)
        assert told in "; ".join(admission.restricted(worse)), told


def test_secrets_stay_in_secrets() -> None:
    for variant in VARIANTS.values():
        for obj in objects(place(*variant)):
            if obj["kind"] == "Secret":
                obj = {k: v for k, v in obj.items() if k != "data"}
            text = json.dumps(obj)
            assert CANARY.decode() not in text
            assert manifests.secret(place(), "x", {"k": CANARY})["data"]["k"] not in text


def test_everything_can_be_found_again() -> None:
    for obj in objects(place()):
        labels = obj["metadata"]["labels"]
        assert labels[manifests.MANAGED_BY] == "lesionflow"
        assert labels.get(manifests.RUN) == ("first" if obj["metadata"]["name"] != "kaggle" else None)


def test_no_job_set_has_a_time_to_live() -> None:
    """Trainer makes a JobSet that its TTL removed anew, and would train again every day."""
    for variant in VARIANTS.values():
        assert "ttlSecondsAfterFinished" not in json.dumps(manifests.training_runtime(place(*variant), "first"))


# --- Planted mistakes

DROP = object()
OLD, NEW, V23 = PROFILES
CLAIM, SERVICE, JOB, RUNTIME = "PersistentVolumeClaim", "InferenceService", "PyTorchJob", "TrainingRuntime"
MASTER = ("spec", "pytorchReplicaSpecs", "Master")
POD = (*MASTER, "template", "spec")
NODE = (*POD, "containers", 0)
JOBS = ("spec", "template", "spec", "replicatedJobs", 0, "template")
RUNTIME_POD = (*JOBS, "spec", "template", "spec")
PREDICTOR = ("spec", "predictor")

# Profile, kind, where, what, and what the refusal says. A tuple (old, new) as the last step renames a field.
MISTAKES: dict[str, tuple[str, str, tuple[Any, ...], Any, str]] = {
    "job: typo in a field": (
        OLD, JOB, ("spec", ("nprocPerNode", "nProcPerNode")), ..., 'unknown field "spec.nProcPerNode"',
    ),
    "job: number for a string": (
        OLD, JOB, ("spec", "nprocPerNode"), 2, "spec.nprocPerNode in body must be of type string",
    ),
    "job: string for a number": (
        NEW, JOB, (*MASTER, "replicas"), "1", "spec.pytorchReplicaSpecs.Master.replicas",
    ),
    "job: no replicas at all": (
        NEW, JOB, ("spec", "pytorchReplicaSpecs"), DROP, "spec.pytorchReplicaSpecs: Required value",
    ),
    "job: restart policy in the template": (
        OLD, JOB, (*MASTER, "template", "restartPolicy"), "OnFailure",
        'unknown field "spec.pytorchReplicaSpecs.Master.template.restartPolicy"',
    ),
    "job: ttl outside the run policy": (
        NEW, JOB, ("spec", "ttlSecondsAfterFinished"), 10, 'unknown field "spec.ttlSecondsAfterFinished"',
    ),
    "job: backoff as text": (
        NEW, JOB, ("spec", "runPolicy", "backoffLimit"), "5", "spec.runPolicy.backoffLimit",
    ),
    "job: backoff beyond int32": (
        NEW, JOB, ("spec", "runPolicy", "backoffLimit"), 2**31, "must fit in int32",
    ),
    "job: image misspelt": (
        OLD, JOB, (*NODE, ("image", "img")), ..., "Master.template.spec.containers[0].img",
    ),
    "job: container without a name": (
        NEW, JOB, (*NODE, "name"), DROP, "containers[0].name: Required value",
    ),
    "job: two containers of a name": (
        OLD, JOB, (*POD, "containers", 1), {"name": "pytorch", "image": "x"},
        "containers[1].name: Duplicate value",
    ),
    "job: container name with a capital": (
        NEW, JOB, (*NODE, "name"), "PyTorch", 'containers[0].name: Invalid value: "PyTorch"',
    ),
    "job: mount without a volume": (
        OLD, JOB, (*NODE, "volumeMounts", 0, "name"), "dta",
        'Master.template.spec.containers[0].volumeMounts[0].name: Not found: "dta"',
    ),
    "job: two mounts at one path": (
        NEW, JOB, (*NODE, "volumeMounts", 1, "mountPath"), "/mnt/lesionflow/data",
        "volumeMounts[1]: Duplicate value",
    ),
    "job: mount without a path": (
        NEW, JOB, (*NODE, "volumeMounts", 0, "mountPath"), DROP,
        "volumeMounts[0].mountPath: Required value",
    ),
    "job: volume of two kinds": (
        OLD, JOB, (*POD, "volumes", 0, "emptyDir"), {}, "may not specify more than 1 volume type",
    ),
    "job: volume of no kind": (
        OLD, JOB, (*POD, "volumes", 0, "persistentVolumeClaim"), DROP, "must specify a volume type",
    ),
    "job: claim misspelt": (
        NEW, JOB, (*POD, "volumes", 0, "persistentVolumeClaim", ("claimName", "name")), ...,
        "volumes[0].persistentVolumeClaim.name",
    ),
    "job: unit of memory": (
        OLD, JOB, (*NODE, "resources", "limits", "memory"), "8GB", "resources.limits.memory",
    ),
    "job: request over the limit": (
        OLD, JOB, (*NODE, "resources", "requests", "cpu"), "4",
        "resources.requests.cpu: Invalid value: \"4\": must be less than or equal to cpu limit of 2",
    ),
    "job: half a GPU": (
        NEW, JOB, (*NODE, "resources", "limits", "nvidia.com/gpu"), "500m",
        "resources.limits[nvidia.com/gpu]: Invalid value",
    ),
    "job: environment as a mapping": (
        OLD, JOB, (*NODE, "env"), {"HOME": "/tmp"}, "containers[0].env in body must be of type array",
    ),
    "job: environment value as a number": (
        NEW, JOB, (*NODE, "env", 0, "value"), 1, "containers[0].env[0].value",
    ),
    "job: label with a space": (
        NEW, JOB, ("metadata", "labels", manifests.RUN), "my run", 'metadata.labels: Invalid value: "my run"',
    ),
    "job: pod label too long": (
        OLD, JOB, (*MASTER, "template", "metadata", "labels", manifests.RUN), "x" * 64,
        "Master.template.metadata.labels: Invalid value",
    ),
    "job: boolean as an annotation": (
        OLD, JOB, (*MASTER, "template", "metadata", "annotations", "sidecar.istio.io/inject"), False,
        "template.metadata.annotations[sidecar.istio.io/inject]",
    ),
    "job: name with a capital": (
        OLD, JOB, ("metadata", "name"), "First", 'metadata.name: Invalid value: "First"',
    ),
    "job: toleration effect as a list": (
        NEW, JOB, (*POD, "tolerations"), [{"key": "gpu", "effect": ["NoSchedule"]}],
        "tolerations[0].effect",
    ),
    "runtime: job template misplaced": (
        NEW, RUNTIME, ("spec", "replicatedJobs"), [], 'unknown field "spec.replicatedJobs"',
    ),
    "runtime: two machine-learning policies at once": (
        V23, RUNTIME, ("spec", "mlPolicy", "pytorch"), {}, 'unknown field "spec.mlPolicy.pytorch"',
    ),
    "runtime: no job's name": (
        V23, RUNTIME, ("spec", "template", "spec", "replicatedJobs", 0, "name"), DROP,
        "spec.template.spec.replicatedJobs[0].name: Required value",
    ),
    "runtime: failure action": (
        V23, RUNTIME, ("spec", "template", "spec", "failurePolicy", "rules", 0, "action"), "Fail",
        'failurePolicy.rules[0].action: Unsupported value: "Fail"',
    ),
    "runtime: exit codes as text": (
        NEW, RUNTIME, (*JOBS, "spec", "podFailurePolicy", "rules", 0, "onExitCodes", "values", 0), "1",
        "podFailurePolicy.rules[0].onExitCodes.values[0]",
    ),
    "runtime: mount without a volume": (
        V23, RUNTIME, (*RUNTIME_POD, "volumes", 0, "name"), "other",
        'replicatedJobs[0].template.spec.template.spec.containers[0].volumeMounts[0].name: Not found: "data"',
    ),
    "runtime: size of shared memory": (
        V23, RUNTIME, (*RUNTIME_POD, "volumes", 3, "emptyDir", "sizeLimit"), "1 GiB", "emptyDir.sizeLimit",
    ),
    "trainjob: nodes misspelt": (
        NEW, "TrainJob", ("spec", "trainer", ("numNodes", "nodes")), ..., 'unknown field "spec.trainer.nodes"',
    ),
    "trainjob: overrides of 2.1 on 2.3": (
        V23, "TrainJob", ("spec", "podTemplateOverrides"), [], 'unknown field "spec.podTemplateOverrides"',
    ),
    "trainjob: patches of 2.3 on 2.1": (
        NEW, "TrainJob", ("spec", "runtimePatches"), [], 'unknown field "spec.runtimePatches"',
    ),
    "trainjob: auto processes on 2.3": (
        V23, "TrainJob", ("spec", "trainer", "numProcPerNode"), "auto", "spec.trainer.numProcPerNode",
    ),
    "trainjob: volumes beside the trainer": (
        V23, "TrainJob", ("spec", "trainer", "volumeMounts"), [], 'unknown field "spec.trainer.volumeMounts"',
    ),
    "trainjob: no runtime": (
        NEW, "TrainJob", ("spec", "runtimeRef"), DROP, "spec.runtimeRef: Required value",
    ),
    "trainjob: runtime without a name": (
        V23, "TrainJob", ("spec", "runtimeRef", "name"), DROP, "spec.runtimeRef.name: Required value",
    ),
    "trainjob: command as one string": (
        NEW, "TrainJob", ("spec", "trainer", "command"), "python train.py", "spec.trainer.command",
    ),
    "service: predictor misspelt": (
        OLD, SERVICE, ("spec", ("predictor", "predictors")), ..., 'unknown field "spec.predictors"',
    ),
    "service: canary beside the predictor": (
        NEW, SERVICE, ("spec", "canaryTrafficPercent"), 10, 'unknown field "spec.canaryTrafficPercent"',
    ),
    "service: port as text": (
        OLD, SERVICE, (*PREDICTOR, "containers", 0, "ports", 0, "containerPort"), "8080",
        "spec.predictor.containers[0].ports[0].containerPort",
    ),
    "service: port out of range": (
        NEW, SERVICE, (*PREDICTOR, "containers", 0, "ports", 0, "containerPort"), 80800,
        "ports[0].containerPort: Invalid value: 80800",
    ),
    "service: probe misspelt": (
        NEW, SERVICE, (*PREDICTOR, "containers", 0, "readinessProbe", "httpGet", "url"), "/",
        "readinessProbe.httpGet.url",
    ),
    "service: model without a format": (
        OLD, SERVICE, (*PREDICTOR, "model"), {"modelFormat": {}},
        "spec.predictor.model.modelFormat.name: Required value",
    ),
    "claim: no access mode": (
        OLD, CLAIM, ("spec", "accessModes"), DROP, "spec.accessModes: Required value",
    ),
    "claim: unknown access mode": (
        OLD, CLAIM, ("spec", "accessModes", 0), "ReadWriteAll", "spec.accessModes[0]: Unsupported",
    ),
    "claim: size": (
        OLD, CLAIM, ("spec", "resources", "requests", "storage"), "8 gigs",
        "spec.resources.requests.storage: Invalid value",
    ),
    "claim: storage class misspelt": (
        OLD, CLAIM, ("spec", "storageClass"), "longhorn", 'unknown field "spec.storageClass"',
    ),
    "secret: plain text": (OLD, "Secret", ("data", "KAGGLE_KEY"), "plain text!", "data.KAGGLE_KEY: Invalid"),
    "secret: key with a slash": (OLD, "Secret", ("data", "a/b"), "", "data[a/b]: Invalid value"),
    "policy: type": (
        OLD, "NetworkPolicy", ("spec", "policyTypes", 0), "ingress", "spec.policyTypes[0]: Unsupported value",
    ),
    "policy: no pod selector": (
        OLD, "NetworkPolicy", ("spec", ("podSelector", "selector")), ..., 'unknown field "spec.selector"',
    ),
    "tensorboard: path misspelt": (
        OLD, "Tensorboard", ("spec", ("logspath", "logsPath")), ..., 'unknown field "spec.logsPath"',
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_refused_by_its_path(mistake: str, crds: Path) -> None:
    profile, kind, way, value, told = MISTAKES[mistake]
    good = next(o for o in objects(place()) if o["kind"] == kind)
    check(profile, crds, good)
    bad = copy.deepcopy(good)
    put(bad, way, value)
    with pytest.raises(Refused) as caught:
        check(profile, crds, bad)
    assert told in caught.value.message
    assert caught.value.status in (400, 422)


def put(obj: Any, way: tuple[Any, ...], value: Any) -> None:
    *steps, last = way
    for step in steps:
        obj = obj[step]
    if isinstance(last, tuple):
        obj[last[1]] = obj.pop(last[0])
    elif value is DROP:
        del obj[last]
    elif isinstance(obj, list) and last == len(obj):
        obj.append(value)
    else:
        obj[last] = value


def pod_specs(value: Any) -> Iterator[Object]:
    if isinstance(value, dict):
        if isinstance(value.get("containers"), list):
            yield value
        for inner in value.values():
            yield from pod_specs(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from pod_specs(inner)


def test_apply_of_the_same_object_owns_its_fields() -> None:
    """What we apply has no two ways to say one field, or server-side apply would fight itself."""
    for obj in objects(place()):
        listed = [path for path, _ in patches.fields(obj, {})]
        assert len(listed) == len(set(listed))
