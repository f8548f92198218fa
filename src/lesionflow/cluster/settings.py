"""How a run lies on a cluster: volumes, images, the distributed job, the service.

    settings = Settings.load("cluster.toml", overrides=["job.nodes=2", "job.gpus=1"])
    place = Place("first", settings)          # names and paths of one run

A recipe says what is trained, and decides the result; these say where and with how much, and don't.
Every field has a default that fits a plain Kubeflow profile, so no file is needed.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from lesionflow.errors import UsageError
from lesionflow.fields import bound, build, override_all, read_toml
from lesionflow.keys import code_version, digest

LAUNCHERS = ("auto", "trainjob", "pytorchjob", "local")
# The whole package: another version of it gets another environment.
_ROOMS = ("", "cluster", "cluster/doctor", "data", "evaluation", "export", "models", "serving", "training")
_SIZE = re.compile(r"(0\.\d*[1-9]|[1-9]\d*(\.\d+)?)(m|k|M|G|T|Ki|Mi|Gi|Ti)?")
_LABEL = re.compile(r"[a-z]([a-z0-9-]*[a-z0-9])?")


@dataclass(frozen=True)
class Volumes:
    """Three claims, made outside the pipeline and shared by all of its pods."""

    data: str = "8Gi"
    """Size of the claim for the data set."""
    logs: str = "2Gi"
    """Size of the claim for TensorBoard's events."""
    models: str = "4Gi"
    """Size of the claim for runs (store, weights, bundle) and the Python environment."""
    data_claim: str = ""
    """An existing claim to use for the data; it is never deleted. Empty: one named after the run is made."""
    logs_claim: str = ""
    models_claim: str = ""
    storage_class: str = ""
    """Storage class of new claims; empty: the cluster's default."""
    access: str = bound("ReadWriteMany", choices=("ReadWriteMany", "ReadWriteOnce"))
    """Access mode of new claims. ReadWriteOnce works where every pod lands on one node."""
    mount: str = "/mnt/lesionflow"
    """Where pods see them: data, logs and models below this path."""


@dataclass(frozen=True)
class Image:
    """What the pods run. By default a public PyTorch image, and this package from the models volume."""

    train: str = "pytorch/pytorch:2.8.0-cuda12.8-cudnn9-runtime"
    """Image of the pipeline's and the job's pods."""
    serve: str = ""
    """Image of the service; empty: the same one."""
    packaged: bool = False
    """The images hold lesionflow already (built from deploy/): nothing is installed."""
    index: str = ""
    """Package index that pip installs from in the cluster; empty: pip's own default there."""
    pull_secret: str = ""
    """Name of an image pull secret."""


@dataclass(frozen=True)
class Job:
    """The distributed training job."""

    launcher: str = bound("auto", choices=LAUNCHERS)
    """`trainjob` (Trainer v2), `pytorchjob` (Training Operator); `auto`: what the cluster has, Trainer first."""
    nodes: int = bound(2, 1, 256)
    """Pods: one master and its workers."""
    processes: int = bound(1, 1, 64)
    """Training processes per pod; with GPUs, as many as GPUs."""
    gpus: int = bound(0, 0, 64)
    """GPUs per pod; 0 trains on the CPU."""
    gpu_resource: str = "nvidia.com/gpu"
    cpu: str = "2"
    """CPUs requested, and allowed, per pod."""
    memory: str = "8Gi"
    shm: str = "1Gi"
    """Size of /dev/shm, which loader processes and NCCL use; it counts as memory."""
    node_selector: str = ""
    """Labels a node must have: `key=value,key=value`."""
    tolerations: str = ""
    """Taints to tolerate: `key=value:Effect` or `key:Effect`, comma-separated."""
    priority_class: str = ""
    retries: int = bound(5, 0, 100)
    """Restarts after a preemption or a lost pod; refused data or a failed gate is never retried."""
    ttl: int = bound(86_400, 0)
    """Seconds after its end until the cluster removes a PyTorchJob and its pods; a TrainJob stays until `clean`."""
    deadline: int = bound(0, 0)
    """Seconds the job may run; 0: no limit."""


@dataclass(frozen=True)
class Serving:
    """The InferenceService."""

    name: str = "skin-cancer-detection"
    form: str = bound("lesionflow", choices=("lesionflow", "triton"))
    """`lesionflow`: this package alone (ONNX Runtime); `triton`: Triton predicts, this package decodes before it."""
    mode: str = bound("raw", choices=("raw", "serverless"))
    """KServe's deployment mode; `serverless` needs Knative and can split traffic."""
    canary: int = bound(0, 0, 99)
    """Percent of traffic the new model gets before it is promoted (serverless); 0: all, after it proved itself."""
    replicas: int = bound(1, 0, 100)
    """Least number of replicas; 0 scales to zero (serverless)."""
    cpu: str = "1"
    memory: str = "2Gi"
    gpus: int = bound(0, 0, 8)
    """GPUs of the Triton predictor."""
    timeout: int = bound(600, 1)
    """Seconds to wait for Ready."""


@dataclass(frozen=True)
class Settings:
    """Everything about a cluster that a run needs to know."""

    namespace: str = ""
    """The profile's namespace; empty: that of this pod, or of the kubeconfig's context."""
    context: str = ""
    """The kubeconfig's context; empty: the current one."""
    service_account: str = "default-editor"
    """Account of the pods; `default-editor` is what a Kubeflow profile has, `pipeline-runner` standalone KFP."""
    kaggle_secret: str = "kaggle"  # noqa: S105 - a secret's name
    """Secret with the Kaggle token, made by `lesionflow cluster secret`."""
    kfp: str = ""
    """URL of the Kubeflow Pipelines API; empty: found from inside a cluster, or set KFP_ENDPOINT."""
    experiment: str = "lesionflow"
    istio: bool = False
    """Keep istio's sidecar in the job's pods; off, because a sidecar never lets a job's pod end."""
    user: int = bound(1000, 1)
    """User and group id of the pods; never root."""
    volumes: Volumes = Volumes()
    image: Image = Image()
    job: Job = Job()
    serving: Serving = Serving()

    @classmethod
    def load(cls, path: str | Path | None = None, overrides: Iterable[str] = ()) -> Settings:
        """Read settings from TOML; `overrides` are `section.field=value`. Raises `UsageError` naming the field."""
        values = read_toml(Path(path), "settings") if path else {}
        override_all(values, overrides, "--on")
        return cls.from_dict(values, str(path or "settings"))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "settings") -> Settings:
        settings = build(cls, _with_quantities(values), where)
        volumes, job, serving = settings.volumes, settings.job, settings.serving
        for field, size in (
            ("volumes.data", volumes.data),
            ("volumes.logs", volumes.logs),
            ("volumes.models", volumes.models),
            ("job.cpu", job.cpu),
            ("job.memory", job.memory),
            ("job.shm", job.shm),
            ("serving.cpu", serving.cpu),
            ("serving.memory", serving.memory),
        ):
            if not _SIZE.fullmatch(size):
                raise UsageError(f"{where}: {field} must be a quantity like 8Gi or 500m, got {size!r}")
        _check_label(settings.kaggle_secret, f"{where}: kaggle_secret", 50)
        # "-candidate" and KServe's "-transformer" follow it, and the whole may have 63 letters.
        _check_label(serving.name, f"{where}: serving.name", 40)
        for field, url in (("image.index", settings.image.index), ("kfp", settings.kfp)):
            if "@" in url.partition("://")[2].partition("/")[0]:
                # Settings are parameters of the pipeline: everybody who sees its page would read them.
                raise UsageError(
                    f"{where}: {field} carries a login; give one without, or build images with what it needs"
                )
        if not volumes.mount.startswith("/"):
            raise UsageError(f"{where}: volumes.mount must be an absolute path, got {volumes.mount!r}")
        parse_selector(job.node_selector, f"{where}: job.node_selector")
        parse_tolerations(job.tolerations, f"{where}: job.tolerations")
        return settings

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def to_toml(self) -> str:
        return tomli_w.dumps(self.to_dict())


@dataclass(frozen=True)
class Place:
    """One run on a cluster: what its objects are called and where its pods find things."""

    name: str
    settings: Settings = Settings()

    def __post_init__(self) -> None:
        _check_label(self.name, "run name", 30)

    def claim(self, volume: str) -> str:
        """The claim behind `data`, `logs` or `models`."""
        return getattr(self.settings.volumes, f"{volume}_claim") or f"{self.name}-{volume}"

    def path(self, volume: str) -> str:
        """Where pods see that volume."""
        return f"{self.settings.volumes.mount.rstrip('/')}/{volume}"

    @property
    def run_in_claim(self) -> str:
        """The run directory, relative to the models volume."""
        return f"runs/{self.name}"

    @property
    def run(self) -> str:
        """The run directory as pods see it."""
        return f"{self.path('models')}/{self.run_in_claim}"

    @property
    def wheel_secret(self) -> str:
        """The secret that carries this package's wheel into the cluster (a wheel is well under its 1 MiB)."""
        return f"{self.name}-wheel"

    @property
    def python(self) -> str:
        """The interpreter that has lesionflow, in the training image."""
        return "python" if self.settings.image.packaged else f"{self.environment}/bin/python"

    @property
    def environment(self) -> str:
        """The virtual environment on the models volume that stands on the image's own packages."""
        image = self.settings.image
        parts = [image.train, image.index, code_version(_ROOMS)]
        return f"{self.path('models')}/environments/{digest(parts)[:12]}"

    def job_name(self, key: str) -> str:
        """The training job's name: another recipe or data set gives another job."""
        return f"{self.name}-{key[:8]}"


def parse_selector(text: str, where: str = "node_selector") -> dict[str, str]:
    """`key=value,key=value` -> a mapping. Raises `UsageError`."""
    found = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        key, equals, value = part.partition("=")
        if not equals or not key:
            raise UsageError(f"{where}: expected key=value,key=value, got {text!r}")
        found[key] = value
    return found


def parse_tolerations(text: str, where: str = "tolerations") -> list[dict[str, str]]:
    """`key=value:Effect,key:Effect` -> Kubernetes' tolerations. Raises `UsageError`."""
    found = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        taint, _, effect = part.rpartition(":")
        key, equals, value = taint.partition("=")
        if not key or effect not in ("NoSchedule", "PreferNoSchedule", "NoExecute"):
            raise UsageError(f"{where}: expected key=value:NoSchedule or key:NoExecute, got {part!r}")
        found.append(
            {"key": key, "operator": "Equal", "value": value, "effect": effect}
            if equals
            else {"key": key, "operator": "Exists", "effect": effect}
        )
    return found


def _with_quantities(values: Mapping[str, Any]) -> dict[str, Any]:
    """`job.cpu=4` means the quantity "4", as in a manifest."""
    return {
        section: {
            name: str(value) if name in ("cpu", "memory") and type(value) in (int, float) else value
            for name, value in fields.items()
        }
        if isinstance(fields, Mapping)
        else fields
        for section, fields in values.items()
    }


def _check_label(name: str, what: str, longest: int) -> None:
    if not _LABEL.fullmatch(name) or len(name) > longest:
        raise UsageError(
            f"{what} must be of lower-case letters, digits and dashes, start with a letter and be at most "
            f"{longest} long, got {name!r}"
        )
