"""A cluster's API, as much of it as lesionflow needs: plain dicts in and out, errors with a remedy.

    api = Api.connect(settings)                   # this pod's account, or the kubeconfig
    api.apply(manifests.claims(place)[0])
    for pod in api.list("Pod", selector(place.name)): ...

The kubernetes package makes the connection (certificates, tokens, proxies); objects stay dicts,
because model classes of one client version lose the fields of another cluster's.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lesionflow.cluster.settings import Settings
from lesionflow.errors import ClusterError, UsageError, missing_extra

Object = dict[str, Any]
Objects = list[Object]

KINDS: dict[str, tuple[str, str]] = {
    "Pod": ("v1", "pods"),
    "Service": ("v1", "services"),
    "Secret": ("v1", "secrets"),
    "ConfigMap": ("v1", "configmaps"),
    "Event": ("v1", "events"),
    "PersistentVolumeClaim": ("v1", "persistentvolumeclaims"),
    "ResourceQuota": ("v1", "resourcequotas"),
    "LimitRange": ("v1", "limitranges"),
    "ServiceAccount": ("v1", "serviceaccounts"),
    "Node": ("v1", "nodes"),
    "Namespace": ("v1", "namespaces"),
    "Deployment": ("apps/v1", "deployments"),
    "Job": ("batch/v1", "jobs"),
    "JobSet": ("jobset.x-k8s.io/v1alpha2", "jobsets"),
    "NetworkPolicy": ("networking.k8s.io/v1", "networkpolicies"),
    "StorageClass": ("storage.k8s.io/v1", "storageclasses"),
    "PyTorchJob": ("kubeflow.org/v1", "pytorchjobs"),
    "Notebook": ("kubeflow.org/v1", "notebooks"),
    "TrainJob": ("trainer.kubeflow.org/v1alpha1", "trainjobs"),
    "TrainingRuntime": ("trainer.kubeflow.org/v1alpha1", "trainingruntimes"),
    "InferenceService": ("serving.kserve.io/v1beta1", "inferenceservices"),
    "ServingRuntime": ("serving.kserve.io/v1alpha1", "servingruntimes"),
    "ClusterServingRuntime": ("serving.kserve.io/v1alpha1", "clusterservingruntimes"),
    "Tensorboard": ("tensorboard.kubeflow.org/v1alpha1", "tensorboards"),
    "PodDefault": ("kubeflow.org/v1alpha1", "poddefaults"),
    "SelfSubjectAccessReview": ("authorization.k8s.io/v1", "selfsubjectaccessreviews"),
    "LocalSubjectAccessReview": ("authorization.k8s.io/v1", "localsubjectaccessreviews"),
    "SelfSubjectReview": ("authentication.k8s.io/v1", "selfsubjectreviews"),
}
"""Kind -> (apiVersion, plural)."""
CLUSTER_WIDE = {
    "Node",
    "Namespace",
    "StorageClass",
    "ClusterServingRuntime",
    "SelfSubjectAccessReview",
    "SelfSubjectReview",
}
TIMEOUT = 30.0
"""Seconds a single request may take."""
IDLE = 300.0
"""Seconds a log may be silent until its connection counts as dead."""
_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


class Api:
    """One namespace of one cluster."""

    def __init__(self, client: Any, namespace: str) -> None:
        self.client = client
        """A `kubernetes.client.ApiClient`."""
        self.namespace = namespace

    @classmethod
    def connect(cls, settings: Settings) -> Api:
        """Connect with this pod's account, else the kubeconfig. Raises `ClusterError` if there is neither."""
        try:
            from kubernetes import client, config
        except ImportError:
            raise missing_extra("kubernetes", "cluster") from None
        from kubernetes.config import ConfigException

        loaded = client.Configuration()
        try:
            if not settings.context and in_cluster():
                config.load_incluster_config(client_configuration=loaded)
                found = _NAMESPACE.read_text().strip()
            else:
                context = settings.context or None
                # The client reads KUBECONFIG once, when it is imported; a notebook may set it later.
                file = os.environ.get("KUBECONFIG")
                config.load_kube_config(config_file=file, context=context, client_configuration=loaded)
                contexts, active = config.list_kube_config_contexts(config_file=file)
                chosen = next((c for c in contexts if c["name"] == settings.context), active)
                found = chosen["context"].get("namespace", "default")
        except (ConfigException, OSError) as error:
            raise ClusterError(
                f"no cluster to talk to ({str(error).splitlines()[0]}): run this in a Kubeflow notebook, or point "
                "KUBECONFIG to a file whose context reaches the cluster"
            ) from None
        loaded.retries = 2
        loaded.connection_pool_maxsize = 300  # A log stream for each of a job's nodes.
        return cls(client.ApiClient(loaded), settings.namespace or found)

    def serves(self, kind: str) -> bool:
        """Whether the cluster knows this kind, by discovery."""
        version, plural = KINDS[kind]
        found = self._call("GET", _prefix(version), missing=None)
        return found is not None and any(r["name"] == plural for r in found["resources"])

    def groups(self) -> dict[str, list[str]]:
        """The API groups the cluster has, each with its versions."""
        found = self._call("GET", "/apis")["groups"]
        return {group["name"]: [v["version"] for v in group["versions"]] for group in found}

    def version(self) -> str:
        """The server's version, like v1.29.3."""
        return str(self._call("GET", "/version")["gitVersion"])

    def clock(self) -> str:
        """The server's clock, as its Date header says it; empty if it sends none."""
        response = self._call("GET", "/version", stream=True)
        response.read()
        return str(response.headers.get("Date", ""))

    def get(self, kind: str, name: str) -> Object | None:
        """An object, or None if there is none of that name (or kind)."""
        found: Object | None = self._call("GET", self._path(kind, name), missing=None)
        return found

    def list(self, kind: str, labels: str = "", fields: str = "") -> Objects:
        """All objects of a kind in the namespace that match a label (and field) selector; empty for unknown kinds."""
        query = [(k, v) for k, v in (("labelSelector", labels), ("fieldSelector", fields)) if v]
        found = self._call("GET", self._path(kind), query=query, missing={"items": []})
        version, _ = KINDS[kind]
        return [{"apiVersion": version, "kind": kind, **item} for item in found.get("items", [])]

    def watch(self, kind: str, labels: str = "", *, seconds: int = 60) -> Iterator[Object]:
        """Objects of a kind as they are, then each whenever it changes or goes, for so many seconds.

        Lists taken one after the other miss what happens between them. Raises `ClusterError` if it isn't allowed.
        """
        query = [("watch", "true"), ("timeoutSeconds", str(seconds))] + ([("labelSelector", labels)] if labels else [])
        response = self._call("GET", self._path(kind), query=query, stream=True)
        try:
            for line in _lines(response):
                told = json.loads(line)
                if told["type"] in ("ADDED", "MODIFIED", "DELETED"):
                    yield told["object"]
        finally:
            response.release_conn()

    def create(self, obj: Object, *, dry_run: bool = False) -> Object:
        """Create an object. Raises `ClusterError` saying why it was refused, or that it exists."""
        query = [("fieldValidation", "Strict")] + ([("dryRun", "All")] if dry_run else [])
        made: Object = self._call("POST", self._path(obj["kind"]), body=obj, query=query)
        return made

    def apply(self, obj: Object, *, dry_run: bool = False) -> Object:
        """Create an object, or make an existing one like it (server-side apply: fields of others stay)."""
        query = [("fieldManager", "lesionflow"), ("force", "true"), ("fieldValidation", "Strict")]
        query += [("dryRun", "All")] if dry_run else []
        made: Object = self._call(
            "PATCH",
            self._path(obj["kind"], obj["metadata"]["name"]),
            body=obj,
            query=query,
            content_type="application/apply-patch+yaml",
        )
        return made

    def patch(self, kind: str, name: str, body: Object) -> Object:
        """Merge-patch an object: None removes a field."""
        made: Object = self._call(
            "PATCH", self._path(kind, name), body=body, content_type="application/merge-patch+json"
        )
        return made

    def delete(self, kind: str, name: str) -> bool:
        """Delete an object and, in the background, what it owns; False if it wasn't there."""
        gone = self._call(
            "DELETE",
            self._path(kind, name),
            body={"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": "Background"},
            missing=False,
        )
        return gone is not False

    def logs(self, pod: str, *, container: str = "", since: str = "") -> Iterator[str]:
        """A pod's log lines as they are written (with their timestamps), until its container ends.

        `since` (RFC 3339) skips what was read before a broken connection. Raises `ClusterError` if there is no log yet.
        """
        query = [("follow", "true"), ("timestamps", "true")]
        query += [("container", container)] if container else []
        query += [("sinceTime", since)] if since else []
        response = self._call("GET", f"{self._path('Pod', pod)}/log", query=query, stream=True)
        try:
            yield from _lines(response)
        finally:
            response.release_conn()

    def tail(self, pod: str, lines: int = 20, *, container: str = "", previous: bool = False) -> str:
        """The end of a pod's log; empty if there is none."""
        query = [("tailLines", str(lines))] + ([("container", container)] if container else [])
        query += [("previous", "true")] if previous else []
        try:
            response = self._call("GET", f"{self._path('Pod', pod)}/log", query=query, stream=True)
            return bytes(response.read()).decode(errors="replace")
        except ClusterError:
            return ""

    def events(self, name: str) -> Objects:
        """The events about an object, oldest first."""
        found = self.list("Event", fields=f"involvedObject.name={name}")
        return sorted(found, key=lambda e: e.get("lastTimestamp") or e.get("eventTime") or "")

    def allowed(self, verb: str, kind: str, subresource: str = "", *, pods: str = "") -> bool:
        """Whether this account, or that of `pods`, may do that in the namespace.

        For kinds without a namespace: in the whole cluster. Asking for another account is itself a right.
        """
        version, plural = KINDS[kind]
        group = version.partition("/")[0] if "/" in version else ""
        attributes = {"namespace": self.namespace, "verb": verb, "group": group, "resource": plural}
        if kind in CLUSTER_WIDE:
            del attributes["namespace"]
        if subresource:
            attributes["subresource"] = subresource
        review: Object = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "LocalSubjectAccessReview" if pods else "SelfSubjectAccessReview",
            "spec": {"resourceAttributes": attributes},
        }
        if pods:
            groups = ["system:serviceaccounts", f"system:serviceaccounts:{self.namespace}", "system:authenticated"]
            review["spec"] |= {"user": f"system:serviceaccount:{self.namespace}:{pods}", "groups": groups}
            review["metadata"] = {"namespace": self.namespace}
        return bool(self.create(review)["status"]["allowed"])

    def wait(self, until: Callable[[], Any], *, timeout: float, what: str, every: float = 0.5) -> Any:
        """Ask until the answer is true and return it. Raises `ClusterError` naming `what` after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while not (answer := until()):
            if time.monotonic() > deadline:
                raise ClusterError(f"{what} took longer than {timeout:.0f} s")
            time.sleep(every)
        return answer

    def _path(self, kind: str, name: str = "") -> str:
        version, plural = KINDS[kind]
        within = "" if kind in CLUSTER_WIDE else f"/namespaces/{self.namespace}"
        return f"{_prefix(version)}{within}/{plural}" + (f"/{name}" if name else "")

    def _call(
        self,
        method: str,
        path: str,
        *,
        body: Object | None = None,
        query: Sequence[tuple[str, str]] | None = None,
        content_type: str = "application/json",
        stream: bool = False,
        missing: Any = ...,
    ) -> Any:
        """One request; `missing` is what a 404 gives instead of an error."""
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        headers = {"Accept": "application/json, */*"} | ({"Content-Type": content_type} if body is not None else {})
        try:
            response = self.client.call_api(
                path,
                method,
                query_params=list(query or []),
                header_params=headers,
                # The client turns only JSON types it knows into bytes, so apply patches go as bytes already.
                body=body,
                auth_settings=["BearerToken"],
                _preload_content=False,
                _return_http_data_only=True,
                # A connection that died unseen would wait for ever.
                _request_timeout=(TIMEOUT, IDLE) if stream else TIMEOUT,
            )
            return response if stream else json.loads(response.data)
        except ApiException as error:
            if error.status == 404 and missing is not ...:
                return missing
            raise _explained(error, method, path) from None
        except (HTTPError, OSError) as error:
            host = self.client.configuration.host
            raise ClusterError(
                f"the cluster's API at {host} doesn't answer ({type(error).__name__}): check the network, the VPN "
                "and KUBECONFIG; `lesionflow cluster doctor` looks further"
            ) from None


def in_cluster() -> bool:
    """Whether this process runs in a pod that has an account."""
    return _NAMESPACE.exists()


def _lines(response: Any) -> Iterator[str]:
    """The lines of a streamed answer, as they come."""
    rest = b""
    for chunk in response.stream(4096, decode_content=True):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line.decode(errors="replace")
    if rest:
        yield rest.decode(errors="replace")


def _prefix(version: str) -> str:
    return f"/apis/{version}" if "/" in version else f"/api/{version}"


def _explained(error: Any, method: str, path: str) -> ClusterError | UsageError:
    try:
        message = json.loads(error.body)["message"]
    except (TypeError, ValueError, KeyError):
        message = str(error.reason)
    what = f"{method} {path.rpartition('/namespaces/')[2] or path}"
    if error.status == 401:
        return ClusterError(f"{what}: the cluster doesn't know this account (401): log in again, or renew the token")
    if error.status == 403:
        if "quota" in message:
            return ClusterError(f"{what}: over the namespace's quota: {message}; ask for less, or clean up first")
        if " cannot " not in message:  # Admission (pod security, limits, webhooks) refuses with 403 too.
            return ClusterError(f"{what}: the cluster refuses the object: {message}")
        return ClusterError(
            f"{what}: not allowed (403): {message}; in Kubeflow use a namespace whose contributor you are"
        )
    if error.status == 404:
        return ClusterError(f"{what}: not found (404): {message}; `lesionflow cluster doctor` says what is missing")
    if error.status in (400, 422):
        return ClusterError(f"{what}: the cluster refuses the object: {message}")
    return ClusterError(f"{what}: the cluster answered {error.status}: {message}")
