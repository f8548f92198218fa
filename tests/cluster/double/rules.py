"""The hard rules of core objects that no schema states: names, labels, pods, claims, secrets.

Pods are looked at wherever they are embedded. For custom objects that is stricter than an API server, which would
take the object and leave its pods to fail later; a test wants to know at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from double.core import Kind
from double.schemas import Fault, Found, below, quantity

Object = dict[str, Any]

_LABEL_1123 = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_LABEL_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_VALUE = re.compile(r"(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?")
_KEY = re.compile(r"([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]")
_DATA_KEY = re.compile(r"[-._a-zA-Z0-9]+")
_VARIABLE = re.compile(r"[-._a-zA-Z][-._a-zA-Z0-9]*")
_ENDS = "must start and end with an alphanumeric character"
_WHY_LABEL = f"a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and {_ENDS}"
_WHY_1035 = "a DNS-1035 label must consist of lower case alphanumeric characters or '-' and start with a letter"
_WHY_SUBDOMAIN = (
    f"a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and {_ENDS}"
)
_WHY_VALUE = (
    "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.', be no more than "
    f"63 characters, and {_ENDS}"
)
_WHY_KEY = f"name part must consist of alphanumeric characters, '-', '_' or '.', and {_ENDS}; a DNS prefix may precede"
_WHY_DATA_KEY = "a valid config key must consist of alphanumeric characters, '-', '_' or '.'"
_WHY_VARIABLE = "a valid environment variable name must consist of letters, digits, '_', '-', or '.'"
_PARTIAL = ("podTemplateOverrides", "runtimePatches")
"""Fields that hold parts of a pod, to be laid over another."""
MEBIBYTE = 2**20


def check(kind: Kind, obj: Object, found: Found) -> None:
    """Add what the rules find to `found`; the object has the shape its schema asks for."""
    _metadata(kind, obj.get("metadata", {}), found)
    for path, value in _dicts(obj, ""):
        leaf = path.rpartition(".")[2]
        if leaf in ("labels", "matchLabels", "nodeSelector") and path != "metadata.labels":
            labels(value, path, found)
        if leaf in ("limits", "requests"):
            _amounts(value, path, found)
        if isinstance(value.get("containers"), list) and not any(part in path for part in _PARTIAL):
            pod(value, path, found, whole=kind.core)
    if kind.kind == "PersistentVolumeClaim":
        claim(obj, found)
    if kind.kind in ("Secret", "ConfigMap"):
        _data(obj, found)


def changed(kind: Kind, old: Object, new: Object, found: Found) -> None:
    """Add the changes that an object of this kind does not allow once it is there."""
    was, now = old.get("spec") or {}, new.get("spec") or {}
    if kind.kind == "PersistentVolumeClaim":
        rest = [{k: v for k, v in spec.items() if k not in ("resources", "volumeName")} for spec in (was, now)]
        if rest[0] != rest[1] or was.get("volumeName") not in (None, "", now.get("volumeName")):
            text = (
                "Forbidden: spec is immutable after creation except resources.requests and "
                "volumeAttributesClassName for bound claims"
            )
            found.faults.append(Fault("spec", "FieldValueForbidden", text))
        before, after = (quantity(s["resources"]["requests"]["storage"]) for s in (was, now))
        if after < before:
            text = "Forbidden: field can not be less than status.capacity"
            found.faults.append(Fault("spec.resources.requests.storage", "FieldValueForbidden", text))
    if kind.kind == "Pod":
        loose = ("activeDeadlineSeconds", "tolerations", "terminationGracePeriodSeconds", "nodeName")
        rest = [{k: v for k, v in spec.items() if k not in (*loose, "containers")} for spec in (was, now)]
        rest += [[{k: v for k, v in c.items() if k != "image"} for c in spec["containers"]] for spec in (was, now)]
        if rest[0] != rest[1] or rest[2] != rest[3]:
            text = "Forbidden: pod updates may not change fields other than the image, tolerations and deadlines"
            found.faults.append(Fault("spec", "FieldValueForbidden", text))
    if kind.kind in ("Secret", "ConfigMap") and old.get("immutable") and old.get("data") != new.get("data"):
        text = "Forbidden: field is immutable when `immutable` is set"
        found.faults.append(Fault("data", "FieldValueForbidden", text))
    if kind.kind == "Job" and was.get("template") != now.get("template"):
        found.invalid("spec.template", "...", "field is immutable")


def labels(value: Object, path: str, found: Found) -> None:
    for key, label in value.items():
        _key(key, path, found)
        if isinstance(label, str) and (len(label) > 63 or not _VALUE.fullmatch(label)):
            found.invalid(path, label, _WHY_VALUE)


def pod(spec: Object, path: str, found: Found, *, whole: bool) -> None:
    """A pod spec; one that is not `whole` leaves its image to an operator."""
    volumes = [v for v in spec.get("volumes") or [] if isinstance(v, dict)]
    names = [v.get("name") for v in volumes]
    for i, volume in enumerate(volumes):
        where = f"{below(path, 'volumes')}[{i}]"
        if volume.get("name") in names[:i]:
            found.duplicate(f"{where}.name", volume.get("name"))
        _label(volume.get("name", ""), f"{where}.name", found)
        sources = [key for key in volume if key != "name"]
        if not sources:
            found.required(where, "must specify a volume type")
        for key in sources[1:]:
            text = "Forbidden: may not specify more than 1 volume type"
            found.faults.append(Fault(f"{where}.{key}", "FieldValueForbidden", text))
    seen: list[str] = []
    if whole and not spec["containers"]:
        found.required(below(path, "containers"))
    for group in ("initContainers", "containers"):
        for i, container in enumerate(spec.get(group) or []):
            where = f"{below(path, group)}[{i}]"
            name = container.get("name", "")
            if name in seen:
                found.duplicate(f"{where}.name", name)
            seen.append(name)
            if name or whole:
                _label(name, f"{where}.name", found)
            if whole and not container.get("image"):
                found.required(f"{where}.image")
            _container(container, where, names, found)


def _container(container: Object, path: str, volumes: list[Any], found: Found) -> None:
    mounted: list[str] = []
    for i, mount in enumerate(container.get("volumeMounts") or []):
        where = f"{path}.volumeMounts[{i}]"
        if mount.get("name") not in volumes:
            found.faults.append(Fault(f"{where}.name", "FieldValueNotFound", f'Not found: "{mount.get("name")}"'))
        if mount.get("mountPath") in mounted:
            found.invalid(f"{where}.mountPath", mount["mountPath"], "must be unique")
        mounted.append(mount.get("mountPath", ""))
    for i, variable in enumerate(container.get("env") or []):
        where = f"{path}.env[{i}]"
        if not _VARIABLE.fullmatch(variable.get("name", "")):
            found.invalid(f"{where}.name", variable.get("name", ""), _WHY_VARIABLE)
        if variable.get("value") and variable.get("valueFrom"):
            found.invalid(f"{where}.valueFrom", "", "may not be specified when `value` is not empty")
    for i, port in enumerate(container.get("ports") or []):
        if not 0 < port.get("containerPort", 0) < 65536:
            where = f"{path}.ports[{i}].containerPort"
            found.invalid(where, port.get("containerPort"), "must be between 1 and 65535, inclusive")
    resources = container.get("resources") or {}
    limits, requests = resources.get("limits") or {}, resources.get("requests") or {}
    for name, asked in requests.items():
        try:
            least, most = quantity(asked), quantity(limits.get(name, asked))
        except ValueError:
            continue
        where = below(f"{path}.resources.requests", name)
        if least > most:
            found.invalid(where, asked, f"must be less than or equal to {name} limit of {limits[name]}")
    for name, most in limits.items():
        if "/" in name and requests.get(name, most) != most:
            found.invalid(below(f"{path}.resources.requests", name), requests[name], f"must be equal to {name} limit")
        if "/" in name and isinstance(most, str) and not most.isdigit():
            found.invalid(below(f"{path}.resources.limits", name), most, "must be an integer")


def claim(obj: Object, found: Found) -> None:
    spec = obj.get("spec") or {}
    if not spec.get("accessModes"):
        found.required("spec.accessModes", "at least 1 access mode is required")
    asked = ((spec.get("resources") or {}).get("requests") or {}).get("storage")
    if asked is None:
        found.required("spec.resources[storage]")
    elif _amount(asked) is not None and _amount(asked) <= 0:  # type: ignore[operator]
        found.invalid("spec.resources[storage]", asked, "must be greater than zero")


def _data(obj: Object, found: Found) -> None:
    data = {**(obj.get("data") or {}), **(obj.get("binaryData") or {})}
    for key in data:
        if not _DATA_KEY.fullmatch(key) or len(key) > 253:
            found.invalid(f"data[{key}]", key, _WHY_DATA_KEY)
    size = sum(len(str(v)) for v in data.values())
    if obj["kind"] == "Secret":
        size = size * 3 // 4
    if size > MEBIBYTE:
        found.faults.append(Fault("data", "FieldValueTooLong", f"Too long: must have at most {MEBIBYTE} bytes"))


def _metadata(kind: Kind, metadata: Object, found: Found) -> None:
    name = metadata.get("name") or ""
    if not name:
        if not metadata.get("generateName"):
            found.required("metadata.name", "name or generateName is required")
    elif kind.group == "rbac.authorization.k8s.io":
        if "/" in name or "%" in name:
            found.invalid("metadata.name", name, "may not contain '/' or '%'")
    elif kind.kind == "Service":
        if len(name) > 63 or not _LABEL_1035.fullmatch(name):
            found.invalid("metadata.name", name, _WHY_1035)
    elif kind.kind == "Namespace":
        _label(name, "metadata.name", found)
    elif len(name) > 253 or not _SUBDOMAIN.fullmatch(name):
        found.invalid("metadata.name", name, _WHY_SUBDOMAIN)
    labels(metadata.get("labels") or {}, "metadata.labels", found)
    for key in metadata.get("annotations") or {}:
        _key(key, "metadata.annotations", found)


def _label(name: str, path: str, found: Found) -> None:
    if not name:
        found.required(path)
    elif len(name) > 63 or not _LABEL_1123.fullmatch(name):
        found.invalid(path, name, _WHY_LABEL)


def _key(key: str, path: str, found: Found) -> None:
    prefix, slash, name = key.rpartition("/")
    if len(name) > 63 or not _KEY.fullmatch(name) or (slash and not _SUBDOMAIN.fullmatch(prefix)):
        found.invalid(path, key, _WHY_KEY)


def _amounts(value: Object, path: str, found: Found) -> None:
    for key, text in value.items():
        if isinstance(text, str) and (amount := _amount(text)) is not None and amount < 0:
            found.invalid(below(path, key), text, "must be greater than or equal to 0")


def _amount(text: Any) -> float | None:
    try:
        return quantity(text)
    except (ValueError, TypeError):
        return None


def _dicts(value: Any, path: str) -> Iterator[tuple[str, Object]]:
    """Every mapping within, with its path."""
    if isinstance(value, dict):
        yield path, value
        for key, inner in value.items():
            yield from _dicts(inner, below(path, key))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _dicts(inner, f"{path}[{i}]")
