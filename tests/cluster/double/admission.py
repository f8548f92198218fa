"""What happens to an object between the request and the store: schema, rules, defaults, quota, pod security."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

from double import answers, cel, rules
from double.core import Kind
from double.schemas import examine, quantity

Object = dict[str, Any]

CLAIM_GUARD = "kubernetes.io/pvc-protection"
_DEFAULT_CLASS = "storageclass.kubernetes.io/is-default-class"
_SOURCES = {
    "name",
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
}
"""What a volume of a restricted pod may be made of."""


def checked(kind: Kind, obj: Object, loose: str = "", old: Object | None = None) -> Object:
    """The object, pruned and with defaults. Raises `Refused` naming every fault's path.

    `loose` is the request's fieldValidation: "Warn" and "Ignore" prune unknown fields, anything else refuses them.
    """
    obj = shaped(kind, obj, loose)
    found = examine(_schema(kind, obj), obj)
    value: Object = found.value
    if not found.faults:
        rules.check(kind, value, found)
        cel.check(_schema(kind, obj), value, old, "", found)
    if not found.faults and old is not None:
        rules.changed(kind, old, value, found)
    if found.faults:
        raise answers.invalid(kind, value, found)
    return value


def shaped(kind: Kind, obj: Object, loose: str = "") -> Object:
    """The object without unknown fields, which `checked` refuses or not, and with nothing added."""
    if kind.kind == "Secret" and isinstance(obj.get("stringData"), dict):
        coded = {k: base64.b64encode(str(v).encode()).decode() for k, v in obj["stringData"].items()}
        obj = {k: v for k, v in obj.items() if k != "stringData"} | {"data": {**(obj.get("data") or {}), **coded}}
    found = examine(_schema(kind, obj), obj, defaults=False)
    if found.unknown and loose not in ("Warn", "Ignore"):
        raise answers.strict(kind, found.unknown)
    value: Object = found.value
    return value


def unknown(kind: Kind, obj: Object) -> list[str]:
    """The fields a lenient request loses: what its warnings name."""
    return examine(_schema(kind, obj), obj, defaults=False).unknown


def admit(kind: Kind, obj: Object, namespace: Object | None, around: Sequence[Object]) -> None:
    """Complete a new object, or raise `Refused` (403); `around` are the namespace's objects and the classes."""
    if kind.kind == "PersistentVolumeClaim":
        classes = [o for o in around if o["kind"] == "StorageClass"]
        default = [c for c in classes if (c["metadata"].get("annotations") or {}).get(_DEFAULT_CLASS) == "true"]
        if default and obj["spec"].get("storageClassName") is None:
            obj["spec"]["storageClassName"] = default[0]["metadata"]["name"]
        obj["metadata"].setdefault("finalizers", []).append(CLAIM_GUARD)
    if kind.kind in ("Pod", "PersistentVolumeClaim"):
        obj.setdefault("status", {"phase": "Pending"})
        if why := _over_quota(kind, obj, around):
            raise answers.forbidden(kind, obj["metadata"]["name"], why)
    if kind.kind == "ResourceQuota":
        hard = obj.get("spec", {}).get("hard", {})
        obj.setdefault("status", {"hard": hard, "used": dict.fromkeys(hard, "0")})
    if kind.kind == "Namespace":
        obj["metadata"].setdefault("labels", {})["kubernetes.io/metadata.name"] = obj["metadata"]["name"]
        obj.setdefault("status", {"phase": "Active"})
    enforced = ((namespace or {}).get("metadata", {}).get("labels") or {}).get("pod-security.kubernetes.io/enforce")
    if kind.kind == "Pod" and enforced == "restricted" and (faults := restricted(obj["spec"])):
        why = f'violates PodSecurity "restricted:latest": {", ".join(faults)}'
        raise answers.forbidden(kind, obj["metadata"]["name"], why)


def mounts(pod: Object, claim: str) -> bool:
    """Whether a pod that has not ended uses a claim."""
    if (pod.get("status") or {}).get("phase") in ("Succeeded", "Failed"):
        return False
    volumes = pod["spec"].get("volumes") or []
    return any((v.get("persistentVolumeClaim") or {}).get("claimName") == claim for v in volumes)


def restricted(spec: Object) -> list[str]:
    """What a pod spec has against the "restricted" pod security standard; empty if it meets it."""
    faults = [f"{key}=true" for key in ("hostNetwork", "hostPID", "hostIPC") if spec.get(key)]
    whole = spec.get("securityContext") or {}
    for volume in spec.get("volumes") or []:
        faults += [f'volume "{volume["name"]}" uses restricted type {key}' for key in set(volume) - _SOURCES]
    faults += [f"sysctl {s['name']}" for s in whole.get("sysctls") or []]
    for container in [*(spec.get("initContainers") or []), *(spec.get("containers") or [])]:
        who, own = f'container "{container.get("name", "")}"', container.get("securityContext") or {}
        capabilities = own.get("capabilities") or {}
        seccomp = (own.get("seccompProfile") or whole.get("seccompProfile") or {}).get("type")
        user = own.get("runAsUser", whole.get("runAsUser"))
        faults += [
            f"{who} {text}"
            for wrong, text in (
                (own.get("privileged"), "must not be privileged"),
                (own.get("allowPrivilegeEscalation") is not False, "must set allowPrivilegeEscalation=false"),
                ("ALL" not in (capabilities.get("drop") or []), 'must set capabilities.drop=["ALL"]'),
                (set(capabilities.get("add") or []) - {"NET_BIND_SERVICE"}, "must not add capabilities"),
                (own.get("runAsNonRoot", whole.get("runAsNonRoot")) is not True, "must set runAsNonRoot=true"),
                (user == 0, "must not set runAsUser=0"),
                (seccomp not in ("RuntimeDefault", "Localhost"), "must set seccompProfile.type to RuntimeDefault"),
                (own.get("procMount", "Default") != "Default", "must not set procMount"),
                (any(p.get("hostPort") for p in container.get("ports") or []), "must not use hostPorts"),
            )
            if wrong
        ]
    return faults


def _over_quota(kind: Kind, obj: Object, around: Sequence[Object]) -> str:
    asked = _usage(obj)
    for quota in (o for o in around if o["kind"] == "ResourceQuota"):
        hard, name = quota["spec"].get("hard") or {}, quota["metadata"]["name"]
        if kind.kind == "Pod":
            missing = [r for r in hard if r.split(".")[0] in ("cpu", "memory", "requests", "limits") and r not in asked]
            missing = [r for r in missing if r != "requests.storage" and "/" not in r]
            if missing:
                return f"failed quota: {name}: must specify {','.join(missing)} for: {_container(obj)}"
        used: dict[str, float] = dict.fromkeys(hard, 0.0)
        for other in around:
            if other["kind"] == kind.kind and (other.get("status") or {}).get("phase") not in ("Succeeded", "Failed"):
                for resource, amount in _usage(other).items():
                    used[resource] = used.get(resource, 0.0) + amount
        over = [r for r, most in hard.items() if asked.get(r, 0.0) and used[r] + asked[r] > quantity(most)]
        if over:
            parts = [
                ",".join(f"{r}={_shown(r, values[r])}" for r in over)
                for values in (asked, used, {r: quantity(hard[r]) for r in over})
            ]
            return f"exceeded quota: {name}, requested: {parts[0]}, used: {parts[1]}, limited: {parts[2]}"
    return ""


def _usage(obj: Object) -> dict[str, float]:
    """What an object counts for, by the names quotas use."""
    if obj["kind"] == "PersistentVolumeClaim":
        size = quantity(obj["spec"]["resources"]["requests"]["storage"])
        return {"requests.storage": size, "persistentvolumeclaims": 1.0, "count/persistentvolumeclaims": 1.0}
    used: dict[str, float] = {"pods": 1.0, "count/pods": 1.0}
    for container in (obj.get("spec") or {}).get("containers") or []:
        resources = container.get("resources") or {}
        limits = resources.get("limits") or {}
        for prefix, amounts in (("requests", {**limits, **(resources.get("requests") or {})}), ("limits", limits)):
            for resource, amount in amounts.items():
                names = [f"{prefix}.{resource}"] + ([resource] if prefix == "requests" else [])
                for name in names:
                    used[name] = used.get(name, 0.0) + quantity(amount)
    return used


def _shown(resource: str, amount: float) -> str:
    if "memory" in resource or "storage" in resource:
        whole = amount / 2**30
        return f"{whole:.0f}Gi" if whole == int(whole) else f"{amount:.0f}"
    return f"{amount:.0f}" if amount == int(amount) else f"{amount * 1000:.0f}m"


def _container(obj: Object) -> str:
    containers = obj["spec"].get("containers") or [{}]
    return str(containers[0].get("name", ""))


def _schema(kind: Kind, obj: Object) -> Object:
    version = str(obj.get("apiVersion", "")).rpartition("/")[2]
    return kind.schemas[version if version in kind.schemas else kind.version]
