"""From a container's spec to a local process: its command, environment and mounts.

Nothing is mounted. A claim's directory takes the place of the path it is mounted at, wherever that path begins
a word in the command, the arguments and the environment; the same holds for secrets and configuration maps
(decoded into files of the pod's own), and for /mnt/models of a container with STORAGE_URI.
"""

from __future__ import annotations

import base64
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from double.objects import Object, name_of, namespace_of

_PASSED_ON = ("PATH", "LANG", "LD_LIBRARY_PATH", "SYSTEMROOT")
# Every process has these, and tests' own paths lie below them: only a whole value is replaced.
_SHARED = ("/tmp", "/dev/shm")


class Waiting(Exception):
    """The container can't start yet (or ever): the reason and message its pod shows, and the event."""

    def __init__(self, reason: str, message: str, event: str = "Failed", event_message: str = "") -> None:
        super().__init__(message)
        self.reason, self.message = reason, message
        self.event, self.event_message = event, event_message or f"Error: {message}"


@dataclass(frozen=True)
class Command:
    argv: list[str]
    environment: dict[str, str]
    folder: str = "/"
    """Where it starts."""


@dataclass(frozen=True)
class Builder:
    """What turning containers into processes depends on."""

    store: Any
    claim: Callable[[str, str], Path | None]
    """Namespace and claim -> its directory; None while it isn't bound."""
    python: str = sys.executable
    environment: Mapping[str, str] | None = None
    """More variables for every process."""

    def build(self, pod: Object, container: Object, scratch: Path) -> Command:
        """Raises `Waiting` when a secret or a key isn't there, `LookupError` when there is no command to run."""
        paths = self._mounts(pod, container, scratch)
        values = self._environment(pod, container)
        if uri := values.get("STORAGE_URI", ""):
            paths["/mnt/models"] = self._storage(pod, uri)
        whole = {path: str(paths.pop(path)) for path in _SHARED if path in paths}
        values = {k: whole.get(v, _replace(v, paths)) for k, v in values.items()}
        if "/tmp" in whole:
            values.setdefault("TMPDIR", whole["/tmp"])
        words = [*container.get("command", []), *container.get("args", [])]
        argv = [_replace(_expand(word, values), paths) for word in words]
        if not container.get("command"):
            raise LookupError("the container names no command, and there is no image here to know one")
        if argv[0] in ("python", "python3"):
            argv[0] = self.python
        passed = {k: os.environ[k] for k in _PASSED_ON if k in os.environ}
        # Shells find the same interpreter.
        passed["PATH"] = f"{Path(self.python).parent}:{passed.get('PATH', os.defpath)}"
        folder = _replace(container.get("workingDir", "/"), paths)
        return Command(argv, passed | dict(self.environment or {}) | values, folder)

    def _environment(self, pod: Object, container: Object) -> dict[str, str]:
        values: dict[str, str] = {}
        for source in container.get("envFrom", []):
            for kind, key in (("Secret", "secretRef"), ("ConfigMap", "configMapRef")):
                if reference := source.get(key):
                    data = self._data(pod, kind, reference["name"], reference.get("optional", False))
                    values |= {source.get("prefix", "") + k: v.decode() for k, v in data.items()}
        for variable in container.get("env", []):
            if "valueFrom" in variable:
                found = self._value_from(pod, variable["valueFrom"])
                if found is None:
                    continue
                values[variable["name"]] = found
            else:
                values[variable["name"]] = _expand(variable.get("value", ""), values)
        return values

    def _value_from(self, pod: Object, source: Object) -> str | None:
        if reference := source.get("fieldRef"):
            return _field(pod, reference["fieldPath"])
        for kind, key in (("Secret", "secretKeyRef"), ("ConfigMap", "configMapKeyRef")):
            if reference := source.get(key):
                optional = reference.get("optional", False)
                data = self._data(pod, kind, reference["name"], optional)
                if reference["key"] in data:
                    return data[reference["key"]].decode()
                if not optional:
                    where = f"{kind} {namespace_of(pod)}/{reference['name']}"
                    raise Waiting("CreateContainerConfigError", f"couldn't find key {reference['key']} in {where}")
        return None

    def _data(self, pod: Object, kind: str, name: str, optional: bool) -> dict[str, bytes]:
        found = self.store.get(kind, namespace_of(pod), name)
        if found is None:
            if optional:
                return {}
            raise Waiting("CreateContainerConfigError", f'{kind.lower()} "{name}" not found')
        return contents(found)

    def _mounts(self, pod: Object, container: Object, scratch: Path) -> dict[str, Path]:
        volumes = {v["name"]: v for v in pod["spec"].get("volumes", [])}
        found = {}
        for mount in container.get("volumeMounts", []):
            folder = self._volume(pod, volumes[mount["name"]], scratch)
            found[mount["mountPath"].rstrip("/")] = folder / mount.get("subPath", "")
        return found

    def _volume(self, pod: Object, volume: Object, scratch: Path) -> Path:
        if claim := volume.get("persistentVolumeClaim"):
            folder = self.claim(namespace_of(pod), claim["claimName"])
            if folder is None:
                raise Waiting("ContainerCreating", "", "FailedMount", f'claim "{claim["claimName"]}" is not bound')
            return folder
        folder = scratch / "volumes" / volume["name"]
        folder.mkdir(parents=True, exist_ok=True)
        for kind, key, name in (("Secret", "secret", "secretName"), ("ConfigMap", "configMap", "name")):
            if source := volume.get(key):
                held = self.store.get(kind, namespace_of(pod), source[name])
                if held is None and not source.get("optional"):
                    text = f'{kind.lower()} "{source[name]}" not found'
                    failed = f'MountVolume.SetUp failed for volume "{volume["name"]}" : {text}'
                    raise Waiting("ContainerCreating", "", "FailedMount", failed)
                data = contents(held or {})
                chosen = {i["key"]: i["path"] for i in source.get("items", [])} or {k: k for k in data}
                for item, path in chosen.items():
                    target = folder / path
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.touch(mode=0o600)
                    target.write_bytes(data[item])
        if host := volume.get("hostPath"):
            return Path(host["path"])
        return folder

    def _storage(self, pod: Object, uri: str) -> Path:
        scheme, _, rest = uri.partition("://")
        claim, _, within = rest.partition("/")
        folder = self.claim(namespace_of(pod), claim) if scheme == "pvc" else None
        if folder is None:
            text = f"storage initializer: nothing at {uri}"
            raise Waiting("PodInitializing", text, "BackOff", text)
        return folder / within


def contents(obj: Object) -> dict[str, bytes]:
    """A secret's or configuration map's entries."""
    found = {k: v.encode() for k, v in (obj.get("stringData") or {}).items()}
    if obj.get("kind") == "ConfigMap":
        found |= {k: v.encode() for k, v in (obj.get("data") or {}).items()}
        return found | {k: base64.b64decode(v) for k, v in (obj.get("binaryData") or {}).items()}
    return found | {k: base64.b64decode(v) for k, v in (obj.get("data") or {}).items()}


def _field(pod: Object, path: str) -> str:
    if keyed := re.fullmatch(r"metadata\.(labels|annotations)\['(.+)'\]", path):
        return str(pod["metadata"].get(keyed[1], {}).get(keyed[2], ""))
    found: Any = pod
    for key in path.split("."):
        found = (found or {}).get(key)
    return str(found or name_of(pod)) if path == "metadata.name" else str(found or "")


def _expand(text: str, values: Mapping[str, str]) -> str:
    """$(NAME) as Kubernetes reads it; unknown names stay, $$ is one $."""
    return re.sub(
        r"\$\$|\$\(([A-Za-z_][A-Za-z0-9_.-]*)\)",
        lambda m: "$" if m[0] == "$$" else values.get(m[1], m[0]),
        text,
    )


def _replace(text: str, paths: Mapping[str, Path]) -> str:
    if not paths:
        return text
    # Longest first, and in one pass: a claim's directory may itself lie under another mount's path.
    options = "|".join(re.escape(p) for p in sorted(paths, key=len, reverse=True))
    return re.sub(rf"(?<![\w./-])({options})(?![\w.-])", lambda m: str(paths[m[1]]), text)
