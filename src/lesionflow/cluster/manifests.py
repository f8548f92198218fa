"""Kubernetes objects as data: what a run puts on a cluster, as plain dicts and without a client.

Everything carries two labels, by which `cluster clean` finds it again:

    app.kubernetes.io/managed-by: lesionflow     lesionflow/run: <name>

Pods meet the "restricted" pod security standard: not root, nothing writable but volumes and /tmp, no
capabilities. The two kinds of job differ only in their wrapping: the pod inside is the same.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

from lesionflow.cluster.settings import Place, parse_selector, parse_tolerations

Object = dict[str, Any]

MANAGED_BY = "app.kubernetes.io/managed-by"
RUN = "lesionflow/run"
PORT = 8080
"""Where the service listens in its pod."""
RENDEZVOUS = 29500
"""Where the job's first pod waits for the others."""
PERMANENT = (1, 2, 3, 4, 5, 126, 127)
"""Exit codes that no restart helps: a bug, and the table in `lesionflow.errors`; 143 and signals are retried."""
VOLUMES = ("data", "logs", "models")
KAGGLE_SECRET = "/var/run/secrets/kaggle"  # noqa: S105 - where the download finds the token
SHARED = {"HOME": "/tmp", "PYTHONUNBUFFERED": "1", "LESIONFLOW_UMASK": "000"}  # noqa: S108
"""Environment of every pod on the volumes. The pipeline's pods run as whatever their image says, the job's as our
user, and storage drivers don't all honour fsGroup: so what one writes, all of the namespace's may change."""

_WRITABLE = {"name": "tmp", "emptyDir": {}}
_CONTAINER_SECURITY = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "readOnlyRootFilesystem": True,
    "runAsNonRoot": True,
    "seccompProfile": {"type": "RuntimeDefault"},
}


def labels(run: str) -> dict[str, str]:
    return {MANAGED_BY: "lesionflow", RUN: run}


def selector(run: str = "") -> str:
    """The label selector of a run's objects; of all runs' without a name."""
    return f"{MANAGED_BY}=lesionflow" + (f",{RUN}={run}" if run else "")


def claims(place: Place) -> list[Object]:
    """The volume claims to make: none for a volume whose existing claim is named."""
    volumes = place.settings.volumes
    made = []
    for volume in VOLUMES:
        if getattr(volumes, f"{volume}_claim"):
            continue
        spec: Object = {
            "accessModes": [volumes.access],
            "resources": {"requests": {"storage": getattr(volumes, volume)}},
        }
        if volumes.storage_class:
            spec["storageClassName"] = volumes.storage_class
        made.append(_object("v1", "PersistentVolumeClaim", place, place.claim(volume), {"spec": spec}))
    return made


def secret(place: Place, name: str, values: Mapping[str, bytes], *, of_run: bool = True) -> Object:
    """A secret; one that is not `of_run` (the Kaggle token) outlives the run and is cleaned by name only."""
    data = {key: base64.b64encode(value).decode() for key, value in values.items()}
    made = _object("v1", "Secret", place, name, {"type": "Opaque", "data": data})
    if not of_run:
        del made["metadata"]["labels"][RUN]
    return made


def network_policy(place: Place) -> Object:
    """Only pods of the same run may reach the job's pods; what these reach themselves stays open."""
    return _object(
        "networking.k8s.io/v1",
        "NetworkPolicy",
        place,
        f"{place.name}-train",
        {
            "spec": {
                "podSelector": {"matchLabels": {RUN: place.name, "lesionflow/part": "train"}},
                "policyTypes": ["Ingress"],
                "ingress": [{"from": [{"podSelector": {"matchLabels": {RUN: place.name}}}]}],
            }
        },
    )


def pytorch_job(place: Place, name: str, command: Sequence[str], *, nodes: int | None = None) -> Object:
    """A PyTorchJob of the Training Operator 1.7 to 1.9: one master, the other nodes are workers.

    The ExitCode policy restarts a pod that ended with 128 or more (preempted, killed) and fails the job for less.
    """
    job = place.settings.job
    nodes = nodes or job.nodes

    def replica(count: int) -> Object:
        # The operator wants the container to be called "pytorch" and sets the pod's restart policy itself.
        return {"replicas": count, "restartPolicy": "ExitCode", "template": _pod(place, "pytorch", command, True)}

    policy: Object = {"cleanPodPolicy": "Running", "backoffLimit": job.retries, "ttlSecondsAfterFinished": job.ttl}
    if job.deadline:
        policy["activeDeadlineSeconds"] = job.deadline
    replicas = {"Master": replica(1)} | ({"Worker": replica(nodes - 1)} if nodes > 1 else {})
    spec = {"nprocPerNode": str(job.processes), "runPolicy": policy, "pytorchReplicaSpecs": replicas}
    return _object("kubeflow.org/v1", "PyTorchJob", place, name, {"spec": spec})


def training_runtime(place: Place, name: str) -> Object:
    """The TrainingRuntime our TrainJobs refer to: all that differs between Trainer 2.1 and 2.3 stays out of them.

    A pod that ends with a permanent code fails its job, and so the whole set, as does the deadline; any other end
    restarts the set. It has no time to live: Trainer (2.1, and 2.3 after a failure) makes a set that its TTL removed
    anew and trains again, so the TrainJob stays until `cluster clean` takes it.
    """
    job = place.settings.job
    template = _pod(place, "node", [], False)
    template["spec"]["restartPolicy"] = "Never"
    job_spec: Object = {
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [
                {
                    "action": "FailJob",
                    "onExitCodes": {"containerName": "node", "operator": "In", "values": list(PERMANENT)},
                }
            ]
        },
        "template": template,
    }
    if job.deadline:
        job_spec["activeDeadlineSeconds"] = job.deadline
    spec = {
        "mlPolicy": {"numNodes": job.nodes, "torch": {}},
        "template": {
            "spec": {
                "failurePolicy": {
                    "maxRestarts": job.retries,
                    "rules": [
                        {
                            "name": "permanent",
                            "action": "FailJobSet",
                            "onJobFailureReasons": ["PodFailurePolicy", "DeadlineExceeded"],
                        }
                    ],
                },
                "replicatedJobs": [
                    {
                        "name": "node",
                        "template": {
                            "metadata": {
                                "labels": {
                                    **labels(place.name),
                                    # Trainer puts the TrainJob's command and nodes into the job with this label.
                                    "trainer.kubeflow.org/trainjob-ancestor-step": "trainer",
                                }
                            },
                            "spec": job_spec,
                        },
                    }
                ],
            }
        },
    }
    runtime = _object("trainer.kubeflow.org/v1alpha1", "TrainingRuntime", place, name, {"spec": spec})
    runtime["metadata"]["labels"]["trainer.kubeflow.org/framework"] = "torch"
    return runtime


def train_job(place: Place, name: str, command: Sequence[str], *, nodes: int | None = None) -> Object:
    """A TrainJob on our own runtime, with only those fields that Trainer 2.1 and 2.3 share."""
    job = place.settings.job
    spec = {
        "runtimeRef": {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": name},
        "trainer": {
            "image": place.settings.image.train,
            "command": list(command),
            "numNodes": nodes or job.nodes,
            "numProcPerNode": job.processes,
            "resourcesPerNode": _resources(job.cpu, job.memory, job.gpus, job.gpu_resource),
        },
    }
    return _object("trainer.kubeflow.org/v1alpha1", "TrainJob", place, name, {"spec": spec})


def inference_service(place: Place, *, name: str = "", version: str = "") -> Object:
    """The KServe service of a run, in the form its settings ask for.

    Everything it reads lies in the run's `serving/<version>` folder on the models volume, which KServe's
    storage initialiser makes visible under /mnt/models: that works in both modes and needs no Knative flag.
    A folder for each version, because only a changed spec makes new pods, and old pods may start again.
    """
    serving, image = place.settings.serving, place.settings.image
    folder = f"pvc://{place.claim('models')}/{place.run_in_claim}/serving" + (f"/{version}" if version else "")
    environment = {"STORAGE_URI": folder, "HOME": "/tmp", "PYTHONUNBUFFERED": "1"}  # noqa: S108
    if not image.packaged:
        environment["PYTHONPATH"] = "/mnt/models/packages"
    container: Object = {
        "name": "kserve-container",
        "image": image.serve or image.train,
        "command": ["python", "-m", "lesionflow", "serve", "/mnt/models/bundle"],
        "args": ["--host", "0.0.0.0", "--port", str(PORT)],  # noqa: S104 - inside its pod
        "env": [{"name": key, "value": value} for key, value in environment.items()],
        "ports": [{"containerPort": PORT, "protocol": "TCP"}],
        "readinessProbe": {"httpGet": {"path": "/v2/health/ready", "port": PORT}, "periodSeconds": 2},
        "resources": _resources(serving.cpu, serving.memory),
        "securityContext": _CONTAINER_SECURITY,
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],  # noqa: S108
    }
    ours: Object = {
        "containers": [container],
        "minReplicas": serving.replicas,
        "volumes": [_WRITABLE],
    }
    if serving.mode == "raw":
        ours["securityContext"] = _pod_security(place)
    else:
        # Knative refuses a pod's security context, unless a flag is set; the container's own says enough.
        container["securityContext"] = {**_CONTAINER_SECURITY, "runAsUser": place.settings.user}
    if image.pull_secret:
        ours["imagePullSecrets"] = [{"name": image.pull_secret}]
    if serving.form == "lesionflow":
        spec: Object = {"predictor": ours}
    else:
        # Older KServe's runtime says nothing of security; Triton itself wants a writable root file system.
        secured: Object = {k: v for k, v in _CONTAINER_SECURITY.items() if k != "readOnlyRootFilesystem"}
        triton = {
            "modelFormat": {"name": "triton", "version": "2"},
            "runtime": "kserve-tritonserver",
            "protocolVersion": "v2",
            "storageUri": f"{folder}/triton",
            "resources": _resources(serving.cpu, serving.memory, serving.gpus),
            "securityContext": secured,
        }
        # KServe adds --predictor_host, --model_name and --http_port to a transformer's arguments.
        predictor: Object = {"model": triton, "minReplicas": serving.replicas}
        if serving.mode == "raw":
            predictor["securityContext"] = _pod_security(place)
        else:
            secured["runAsUser"] = place.settings.user
        spec = {"predictor": predictor, "transformer": ours}
    if serving.canary and serving.mode == "serverless":
        spec["predictor"]["canaryTrafficPercent"] = serving.canary
    made = _object("serving.kserve.io/v1beta1", "InferenceService", place, name or serving.name, {"spec": spec})
    mode = "RawDeployment" if serving.mode == "raw" else "Serverless"
    made["metadata"]["annotations"] = {
        "serving.kserve.io/deploymentMode": mode,
        # With one, a profile's own policy denies what comes through Knative's gateway without a login.
        "sidecar.istio.io/inject": "false",
    }
    if serving.mode == "serverless":
        made["metadata"]["annotations"]["serving.kserve.io/enable-tag-routing"] = "true"
    return made


def tensorboard(place: Place) -> Object:
    """Kubeflow's Tensorboard on the run's events."""
    spec = {"logspath": f"pvc://{place.claim('logs')}/{place.name}"}
    return _object("tensorboard.kubeflow.org/v1alpha1", "Tensorboard", place, place.name, {"spec": spec})


def _object(version: str, kind: str, place: Place, name: str, body: Object) -> Object:
    metadata: Object = {"name": name, "labels": labels(place.name)}
    if place.settings.namespace:
        metadata["namespace"] = place.settings.namespace
    return {"apiVersion": version, "kind": kind, "metadata": metadata, **body}


def _pod(place: Place, container: str, command: Sequence[str], resources: bool) -> Object:
    """The job's pod template: volumes, shared memory, security, placement."""
    settings, job = place.settings, place.settings.job
    inject = "true" if settings.istio else "false"
    node: Object = {
        "name": container,
        "image": settings.image.train,
        "env": [{"name": key, "value": value} for key, value in SHARED.items()],
        "securityContext": _CONTAINER_SECURITY,
        # The last lines of a failed container's log become its status' message: the cause, without a search.
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [
            *({"name": volume, "mountPath": place.path(volume)} for volume in VOLUMES),
            {"name": "shm", "mountPath": "/dev/shm"},  # noqa: S108
            {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108
        ],
    }
    if command:
        node["command"] = list(command)
    if resources:
        node["resources"] = _resources(job.cpu, job.memory, job.gpus, job.gpu_resource)
    spec: Object = {
        "containers": [node],
        "securityContext": _pod_security(place),
        "serviceAccountName": settings.service_account,
        "automountServiceAccountToken": False,
        # Longer than a worker's save and `launch`'s own patience with it.
        "terminationGracePeriodSeconds": 90,
        "volumes": [
            *({"name": v, "persistentVolumeClaim": {"claimName": place.claim(v)}} for v in VOLUMES),
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": job.shm}},
            _WRITABLE,
        ],
    }
    if chosen := parse_selector(job.node_selector):
        spec["nodeSelector"] = chosen
    if tolerated := parse_tolerations(job.tolerations):
        spec["tolerations"] = tolerated
    if job.priority_class:
        spec["priorityClassName"] = job.priority_class
    if settings.image.pull_secret:
        spec["imagePullSecrets"] = [{"name": settings.image.pull_secret}]
    metadata = {
        # Older istio reads the annotation, newer istio the label.
        "annotations": {"sidecar.istio.io/inject": inject},
        "labels": {**labels(place.name), "lesionflow/part": "train", "sidecar.istio.io/inject": inject},
    }
    return {"metadata": metadata, "spec": spec}


def _pod_security(place: Place) -> Object:
    user = place.settings.user
    return {
        "runAsNonRoot": True,
        "runAsUser": user,
        "runAsGroup": user,
        "fsGroup": user,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def _resources(cpu: str, memory: str, gpus: int = 0, resource: str = "nvidia.com/gpu") -> Object:
    """Requests equal to limits: a pod that got its place keeps it."""
    amount = {"cpu": cpu, "memory": memory} | ({resource: str(gpus)} if gpus else {})
    return {"requests": dict(amount), "limits": dict(amount)}
