"""What the server says of itself: kinds and versions, OpenAPI as far as kubectl reads it, access reviews."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from double.core import VERSIONS, Kind
from double.store import Object

if TYPE_CHECKING:
    from double.server import Double

_ALL_VERBS = ["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"]
_EMPTY_SWAGGER = b"\x0a\x032.0"
"""A Swagger document with nothing but its version, as a protocol buffer: kubectl asks for no other form."""


def answer(double: Double, path: list[str], accept: str) -> tuple[bytes, str] | None:
    """The body and type for a path that is no object's; None for one that is."""
    if path in (["healthz"], ["livez"], ["readyz"]):
        return b"ok", "text/plain"
    found: Any = None
    if path == ["version"]:
        version = VERSIONS[double.profile]
        major, minor, _ = version[1:].split(".")
        found = {"major": major, "minor": minor, "gitVersion": version, "platform": "linux/amd64"}
    elif path == ["api"]:
        found = {"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []}
    elif path == ["apis"]:
        groups = sorted({k.group for k in _served(double) if k.group})
        found = {"kind": "APIGroupList", "apiVersion": "v1", "groups": [_group(double, g) for g in groups]}
    elif path[:2] == ["api", "v1"] and len(path) == 2:
        found = _resources(double, "", "v1")
    elif path[:1] == ["apis"] and len(path) == 2 and path[1] in {k.group for k in _served(double)}:
        found = {"kind": "APIGroup", "apiVersion": "v1", **_group(double, path[1])}
    elif path[:1] == ["apis"] and len(path) == 3:
        found = _resources(double, path[1], path[2])
        if not found["resources"]:
            return None
    elif path == ["openapi", "v2"]:
        if "protobuf" in accept:
            return _EMPTY_SWAGGER, "application/com.github.proto-openapi.spec.v2.v1.0+protobuf"
        found = {"swagger": "2.0", "info": {"title": "double", "version": "1"}, "paths": {}, "definitions": {}}
    elif path == ["openapi", "v3"]:
        versions = sorted({_prefix(k.group, v) for k in _served(double) for v in k.schemas})
        found = {"paths": {v: {"serverRelativeURL": f"/openapi/v3/{v}"} for v in versions}}
    elif path[:2] == ["openapi", "v3"]:
        found = _openapi(double, "/".join(path[2:]))
    return (json.dumps(found).encode(), "application/json") if found is not None else None


def find(double: Double, group: str, version: str, plural: str) -> Kind | None:
    fits = (k for k in _served(double) if (k.group, k.plural) == (group, plural) and version in k.schemas)
    return next(fits, None)


def allowed(double: Double, verb: str, plural: str) -> bool:
    denied = double.faults.get("deny", ())
    return not any((v, p) in denied for v in (verb, "*") for p in (plural, "*"))


def review(double: Double, body: Object, spec: Object) -> Object:
    """The answer to "may I?"."""
    asked = spec.get("resourceAttributes") or {}
    plural = asked.get("resource", "")
    if asked.get("subresource"):
        plural += f"/{asked['subresource']}"
    yes = allowed(double, asked.get("verb", ""), plural)
    return {**body, "status": {"allowed": yes} | ({} if yes else {"reason": "planted: no role allows it"})}


def _served(double: Double) -> list[Kind]:
    return [k for k in double.store.kinds.values() if double.serves(k.kind)]


def _group(double: Double, group: str) -> Object:
    found: list[str] = []
    for kind in (k for k in _served(double) if k.group == group):
        found += [v for v in kind.schemas if v not in found]
    versions = [{"groupVersion": f"{group}/{v}", "version": v} for v in found]
    return {"name": group, "versions": versions, "preferredVersion": versions[0]}


def _resources(double: Double, group: str, version: str) -> Object:
    listed: list[Object] = []
    for kind in _served(double):
        if kind.group != group or version not in kind.schemas:
            continue
        base = {"singularName": kind.kind.lower(), "namespaced": kind.namespaced, "kind": kind.kind}
        verbs = ["create"] if kind.kind == "SelfSubjectAccessReview" else _ALL_VERBS
        short: Object = {"shortNames": list(kind.short)} if kind.short else {}
        short |= {"categories": list(kind.categories)} if kind.categories else {}
        listed.append({"name": kind.plural, **base, "verbs": verbs, **short, "storageVersionHash": ""})
        if kind.status:
            listed.append({"name": f"{kind.plural}/status", **base, "verbs": ["get", "patch", "update"]})
        if kind.kind == "Pod":
            listed.append({"name": "pods/log", **base, "verbs": ["get"]})
    name = f"{group}/{version}" if group else version
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": name, "resources": listed}


def _openapi(double: Double, prefix: str) -> Object:
    """Only what kubectl looks for: that the server takes fieldValidation and dryRun with patches."""
    parameters = [{"name": name, "in": "query", "schema": {"type": "string"}} for name in ("dryRun", "fieldValidation")]
    paths: Object = {}
    for kind in _served(double):
        for version in kind.schemas:
            if _prefix(kind.group, version) != prefix:
                continue
            where = "/namespaces/{namespace}" if kind.namespaced else ""
            named = {"group": kind.group, "version": version, "kind": kind.kind}
            patch = {
                "x-kubernetes-action": "patch",
                "x-kubernetes-group-version-kind": named,
                "parameters": parameters,
                "responses": {"200": {"description": "OK"}},
            }
            paths[f"/{prefix}{where}/{kind.plural}/{{name}}"] = {"patch": patch}
    return {"openapi": "3.0.0", "info": {"title": "double", "version": "1"}, "paths": paths}


def _prefix(group: str, version: str) -> str:
    return f"apis/{group}/{version}" if group else f"api/{version}"
