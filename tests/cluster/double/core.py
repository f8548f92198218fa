"""The core kinds' schemas, read off the kubernetes client's model classes, and the profiles' kinds.

Core kinds (Pod, Secret, Job, ...) have no CRD. The client's models know their fields, types and required fields;
what they don't know (enums, quantities, list keys) is added here for the fields that matter. The custom kinds
whose CRD isn't at hand (ServingRuntime, JobSet, PodDefault) are kept as they come.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from double.schemas import Schema

PROFILES = {
    "kubeflow-1.8": ("kf-1.8", "kserve-0.11.1", "kf-master"),
    "kubeflow-1.11": ("kf-1.11", "kserve-0.20.0", "kf-master"),
    "trainer-2.3": ("trainer-2.3.0", "kserve-0.20.0", "kf-master"),
}
"""Profile -> folders of CRDs and of runtimes that such a cluster comes with."""
VERSIONS = {"kubeflow-1.8": "v1.27.16", "kubeflow-1.11": "v1.33.5", "trainer-2.3": "v1.33.5"}
_FROM_MASTER = ("tensorboards", "notebooks")


@dataclass(frozen=True)
class Kind:
    """A kind the server knows."""

    kind: str
    group: str
    version: str
    """The one objects are stored in."""
    plural: str
    namespaced: bool = True
    short: tuple[str, ...] = ()
    status: bool = False
    """Whether status is a subresource: then only /status writes it."""
    schemas: dict[str, Schema] = field(default_factory=dict, hash=False, compare=False)
    """By served version."""
    columns: tuple[dict[str, Any], ...] = field(default=(), hash=False, compare=False)
    core: bool = False
    categories: tuple[str, ...] = ()

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def resource(self) -> str:
        """As in messages: pytorchjobs.kubeflow.org."""
        return f"{self.plural}.{self.group}" if self.group else self.plural


_CORE = """
Pod V1Pod v1 pods po +
Service V1Service v1 services svc +
Secret V1Secret v1 secrets
ConfigMap V1ConfigMap v1 configmaps cm
Event CoreV1Event v1 events ev
PersistentVolumeClaim V1PersistentVolumeClaim v1 persistentvolumeclaims pvc +
PersistentVolume V1PersistentVolume v1 persistentvolumes pv + -
ResourceQuota V1ResourceQuota v1 resourcequotas quota +
LimitRange V1LimitRange v1 limitranges limits
ServiceAccount V1ServiceAccount v1 serviceaccounts sa
Endpoints V1Endpoints v1 endpoints ep
Node V1Node v1 nodes no + -
Namespace V1Namespace v1 namespaces ns + -
Deployment V1Deployment apps/v1 deployments deploy +
ReplicaSet V1ReplicaSet apps/v1 replicasets rs +
StatefulSet V1StatefulSet apps/v1 statefulsets sts +
DaemonSet V1DaemonSet apps/v1 daemonsets ds +
Job V1Job batch/v1 jobs +
CronJob V1CronJob batch/v1 cronjobs cj +
NetworkPolicy V1NetworkPolicy networking.k8s.io/v1 networkpolicies netpol
Ingress V1Ingress networking.k8s.io/v1 ingresses ing +
StorageClass V1StorageClass storage.k8s.io/v1 storageclasses sc -
Role V1Role rbac.authorization.k8s.io/v1 roles
RoleBinding V1RoleBinding rbac.authorization.k8s.io/v1 rolebindings
ClusterRole V1ClusterRole rbac.authorization.k8s.io/v1 clusterroles -
ClusterRoleBinding V1ClusterRoleBinding rbac.authorization.k8s.io/v1 clusterrolebindings -
PriorityClass V1PriorityClass scheduling.k8s.io/v1 priorityclasses pc -
PodDisruptionBudget V1PodDisruptionBudget policy/v1 poddisruptionbudgets pdb +
HorizontalPodAutoscaler V2HorizontalPodAutoscaler autoscaling/v2 horizontalpodautoscalers hpa +
SelfSubjectAccessReview V1SelfSubjectAccessReview authorization.k8s.io/v1 selfsubjectaccessreviews -
"""
"""Kind, model, apiVersion, plural, short name, `+` with a status subresource, `-` cluster-wide."""
_ALL = ("Pod", "Service", "Deployment", "ReplicaSet", "StatefulSet", "DaemonSet", "Job", "CronJob")
"""What `kubectl get all` means."""
_UNSCHEMED = (
    Kind("ServingRuntime", "serving.kserve.io", "v1alpha1", "servingruntimes"),
    Kind("ClusterServingRuntime", "serving.kserve.io", "v1alpha1", "clusterservingruntimes", namespaced=False),
    Kind("PodDefault", "kubeflow.org", "v1alpha1", "poddefaults"),
)
_JOBSET = Kind("JobSet", "jobset.x-k8s.io", "v1alpha2", "jobsets", status=True)

_ENUMS: dict[str, tuple[str, ...]] = {
    "V1Container.imagePullPolicy": ("Always", "IfNotPresent", "Never"),
    "V1Container.terminationMessagePolicy": ("File", "FallbackToLogsOnError"),
    "V1ContainerPort.protocol": ("TCP", "UDP", "SCTP"),
    "V1ServicePort.protocol": ("TCP", "UDP", "SCTP"),
    "V1NetworkPolicyPort.protocol": ("TCP", "UDP", "SCTP"),
    "V1NetworkPolicySpec.policyTypes": ("Ingress", "Egress"),
    "V1PersistentVolumeClaimSpec.accessModes": (
        "ReadWriteOnce",
        "ReadOnlyMany",
        "ReadWriteMany",
        "ReadWriteOncePod",
    ),
    "V1PersistentVolumeClaimSpec.volumeMode": ("Filesystem", "Block"),
    "V1PodSecurityContext.fsGroupChangePolicy": ("OnRootMismatch", "Always"),
    "V1PodSpec.dnsPolicy": ("ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"),
    "V1PodSpec.restartPolicy": ("Always", "OnFailure", "Never"),
    "V1SeccompProfile.type": ("RuntimeDefault", "Unconfined", "Localhost"),
    "V1ServiceSpec.type": ("ClusterIP", "NodePort", "LoadBalancer", "ExternalName"),
    "V1Toleration.effect": ("NoSchedule", "PreferNoSchedule", "NoExecute", ""),
    "V1Toleration.operator": ("Exists", "Equal", ""),
    "V1LabelSelectorRequirement.operator": ("In", "NotIn", "Exists", "DoesNotExist"),
    "V1EmptyDirVolumeSource.medium": ("", "Memory", "HugePages"),
    "V1HTTPGetAction.scheme": ("HTTP", "HTTPS"),
    "V1PodFailurePolicyRule.action": ("FailJob", "FailIndex", "Ignore", "Count"),
    "V1PodFailurePolicyOnExitCodesRequirement.operator": ("In", "NotIn"),
    "V1JobSpec.completionMode": ("NonIndexed", "Indexed"),
    "V1StorageClass.reclaimPolicy": ("Delete", "Retain"),
    "V1StorageClass.volumeBindingMode": ("Immediate", "WaitForFirstConsumer"),
}
_QUANTITIES = {
    "V1ResourceRequirements.limits",
    "V1ResourceRequirements.requests",
    "V1VolumeResourceRequirements.limits",
    "V1VolumeResourceRequirements.requests",
    "V1ResourceQuotaSpec.hard",
    "V1ResourceQuotaStatus.hard",
    "V1ResourceQuotaStatus.used",
    "V1NodeStatus.allocatable",
    "V1NodeStatus.capacity",
    "V1PersistentVolumeClaimStatus.capacity",
    "V1EmptyDirVolumeSource.sizeLimit",
    "V1PodSpec.overhead",
}
_BYTES = {"V1Secret.data", "V1ConfigMap.binaryData"}
_LIST_KEYS: dict[str, tuple[str, ...]] = {
    "V1PodSpec.containers": ("name",),
    "V1PodSpec.initContainers": ("name",),
    "V1PodSpec.volumes": ("name",),
    "V1PodSpec.imagePullSecrets": ("name",),
    "V1Container.env": ("name",),
    "V1Container.ports": ("containerPort", "protocol"),
    "V1Container.volumeMounts": ("mountPath",),
    "V1ServiceSpec.ports": ("port", "protocol"),
    "V1ServiceAccount.secrets": ("name",),
    "V1ServiceAccount.imagePullSecrets": ("name",),
    "V1ObjectMeta.ownerReferences": ("uid",),
    "V1PodStatus.conditions": ("type",),
    "V1NodeStatus.conditions": ("type",),
    "V1DeploymentStatus.conditions": ("type",),
    "V1JobStatus.conditions": ("type",),
}
_DEFAULTS: dict[str, Any] = {
    "V1ContainerPort.protocol": "TCP",
    "V1ServicePort.protocol": "TCP",
    "V1ServiceSpec.type": "ClusterIP",
    "V1PodSpec.restartPolicy": "Always",
    "V1Secret.type": "Opaque",
    "V1PersistentVolumeClaimSpec.volumeMode": "Filesystem",
    "V1StorageClass.reclaimPolicy": "Delete",
    "V1StorageClass.volumeBindingMode": "Immediate",
}
_ANY: Schema = {"x-kubernetes-preserve-unknown-fields": True}


@functools.cache
def model(name: str) -> Schema:
    """The schema of one of the client's models."""
    from kubernetes import client

    made: Schema = {"type": "object", "properties": {}, "x-nulls-dropped": True}
    _MADE[name] = made
    cls = getattr(client, name)
    loose, strict = client.Configuration(), client.Configuration()
    loose.client_side_validation, strict.client_side_validation = False, True
    blank = cls(local_vars_configuration=loose)
    blank.local_vars_configuration = strict
    required = []
    for attribute, type_ in cls.openapi_types.items():
        key = cls.attribute_map[attribute]
        made["properties"][key] = _field(f"{name}.{key}", type_)
        try:
            setattr(blank, attribute, None)
        except ValueError:
            required.append(key)
    made["required"] = required
    return made


_MADE: dict[str, Schema] = {}


def _field(where: str, type_: str) -> Schema:
    if match := re.fullmatch(r"list\[(.*)\]", type_):
        made: Schema = {"type": "array", "items": _field(f"{where}[]", match[1])}
        if where in _ENUMS:
            made["items"]["enum"] = list(_ENUMS[where])
        if where in _LIST_KEYS:
            made |= {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": list(_LIST_KEYS[where])}
        return made
    if match := re.fullmatch(r"dict\(str, (.*)\)", type_):
        inner = _field(where, match[1])
        return {"type": "object", "additionalProperties": inner}
    if where in _QUANTITIES:
        return {"x-kubernetes-int-or-string": True, "format": "quantity"}
    if type_ == "object":
        # Ports, and what only its own kind understands.
        named = re.search(r"(port|targetPort|maxUnavailable|maxSurge|minAvailable)$", where)
        return {"x-kubernetes-int-or-string": True} if named else dict(_ANY)
    simple = {
        "str": {"type": "string"},
        "int": {"type": "integer"},
        "float": {"type": "number"},
        "bool": {"type": "boolean"},
        "datetime": {"type": "string", "format": "date-time"},
    }
    if type_ in simple:
        made = dict(simple[type_])
        if where in _BYTES:
            made["format"] = "byte"
        if where in _ENUMS:
            made["enum"] = list(_ENUMS[where])
        if where in _DEFAULTS:
            made["default"] = _DEFAULTS[where]
        return made
    # Models may contain themselves (JSONSchemaProps does): those get the schema that is still being made.
    return _MADE.get(type_) or model(type_)


def core_kinds() -> list[Kind]:
    made = []
    for line in _CORE.strip().splitlines():
        kind, name, version, plural, *rest = line.split()
        group, _, version = version.rpartition("/")
        made.append(
            Kind(
                kind,
                group,
                version,
                plural,
                "-" not in rest,
                tuple(r for r in rest if r not in "+-"),
                "+" in rest,
                _Lazy(version, name),
                core=True,
                categories=("all",) if kind in _ALL else (),
            )
        )
    return made


class _Lazy(dict[str, Schema]):
    """A core kind's schemas, made when they are first asked for: importing the models takes a second."""

    def __init__(self, version: str, name: str) -> None:
        super().__init__({version: {}})
        self.name = name

    def __getitem__(self, version: str) -> Schema:
        return model(self.name)


@functools.cache
def custom_kind(path: Path) -> Kind:
    """The kind a CRD file defines."""
    spec = yaml.load(path.read_text(), Loader=yaml.CSafeLoader)["spec"]
    served = [v for v in spec["versions"] if v["served"]]
    stored = next(v for v in served if v["storage"])
    schemas = {}
    for version in served:
        schema = version["schema"]["openAPIV3Schema"]
        schema["properties"] |= {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": model("V1ObjectMeta"),
        }
        schemas[version["name"]] = schema
    names = spec["names"]
    return Kind(
        names["kind"],
        spec["group"],
        stored["name"],
        names["plural"],
        spec["scope"] == "Namespaced",
        tuple(names.get("shortNames") or ()),
        "status" in (stored.get("subresources") or {}),
        schemas,
        tuple(stored.get("additionalPrinterColumns") or ()),
        categories=tuple(names.get("categories") or ()),
    )


def kinds(profile: str, crds: Path) -> dict[str, Kind]:
    """All kinds of a profile by name. Raises `KeyError` for an unknown profile."""
    found = {k.kind: k for k in core_kinds()}
    for folder in PROFILES[profile]:
        for path in sorted((crds / folder).glob("*.yaml")):
            if path.name.startswith("runtime_") or (folder == "kf-master" and path.stem not in _FROM_MASTER):
                continue
            made = custom_kind(path)
            found[made.kind] = made
    extra = (*_UNSCHEMED, _JOBSET) if "TrainJob" in found else _UNSCHEMED
    return found | {k.kind: replace(k, schemas={k.version: dict(_ANY)}) for k in extra}


def runtimes(profile: str, crds: Path) -> list[dict[str, Any]]:
    """The runtimes that come with KServe and Trainer."""
    return [
        obj
        for folder in PROFILES[profile]
        for path in sorted((crds / folder).glob("runtime_*.yaml"))
        for obj in yaml.load_all(path.read_text(), Loader=yaml.CSafeLoader)
        if obj
    ]
