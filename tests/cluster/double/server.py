"""A Kubernetes API server on loopback, for tests: discovery, objects, patches, watches, logs.

    with Double("kubeflow-1.11", crds) as double:
        api = Api.connect(...)           # with KUBECONFIG=double.kubeconfig(path)
        double.store.set_status("Pod", "team", "first-0", {"phase": "Running"})

It speaks plain HTTP, knows no accounts, runs no webhooks or RBAC and only the plainest CEL; `faults` plays a cluster
that has those against you. A request without fieldValidation is held to "Strict", where a cluster would only warn.
"""

from __future__ import annotations

import tempfile
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

from double.core import runtimes
from double.requests import Handler
from double.store import Object, Store

PROFILE_LABELS = {
    "app.kubernetes.io/part-of": "kubeflow-profile",
    "istio-injection": "enabled",
    "katib.kubeflow.org/metrics-collector-injection": "enabled",
    "pipelines.kubeflow.org/enabled": "true",
    "serving.kubeflow.org/inferenceservice": "enabled",
}


class Double:
    """One cluster. Use it as a context manager, or call `start` and `stop`."""

    def __init__(self, profile: str = "kubeflow-1.11", crds: Path | str = "../shared/crds") -> None:
        self.profile = profile
        self.faults: dict[str, Any] = {}
        """Planted faults, which may change at any time:

        - `deny`: {(verb, plural), ...}: refused with 403, and "no" to an access review; "*" stands for any
        - `missing_kinds`: {"TrainJob", ...}: as if their CRDs weren't installed
        - `status`: 401, 500, 503, ...: the answer to every request; or {(verb, plural): status}
        - `delay`: seconds before each answer
        - `quota`: {"pods": "exceeded quota: ...", ...}: why creating one is refused; real ResourceQuota objects
          are kept to as well
        - `cut_logs`: lines after which a log's connection breaks
        """
        self._scratch = tempfile.TemporaryDirectory(prefix="double-")
        self.store = Store(profile, Path(crds), Path(self._scratch.name))
        self._seed(Path(crds))
        self._server = _Server(("127.0.0.1", 0), Handler)
        self._server.double = self
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self.stopping = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def start(self) -> Double:
        self._thread.start()
        return self

    def stop(self) -> None:
        """Stop answering; open watches and logs end."""
        self.stopping.set()
        with self.store.changed:
            self.store.changed.notify_all()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        self._scratch.cleanup()

    def __enter__(self) -> Double:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def kubeconfig(self, path: Path, namespace: str = "team") -> Path:
        """Write a kubeconfig whose only context is this cluster."""
        context = {"cluster": "double", "user": "tester", "namespace": namespace}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "double", "cluster": {"server": self.url}}],
            "users": [{"name": "tester", "user": {"token": "none"}}],
            "contexts": [{"name": "double", "context": context}],
            "current-context": "double",
        }
        path.write_text(yaml.safe_dump(config))
        return path

    def serves(self, kind: str) -> bool:
        return kind in self.store.kinds and kind not in self.faults.get("missing_kinds", ())

    def _seed(self, crds: Path) -> None:
        """What a new Kubeflow profile on one node without a GPU looks like."""
        node = {"cpu": "2", "memory": "8Gi", "ephemeral-storage": "64Gi", "pods": "110"}
        provisioner = {"provisioner": "driver.longhorn.io", "allowVolumeExpansion": True}
        ready = {"type": "Ready", "status": "True", "reason": "KubeletReady"}
        default = {"storageclass.kubernetes.io/is-default-class": "true"}
        for name in ("default", "kube-system", "kubeflow"):
            self._make("v1", "Namespace", name)
        self._make("v1", "Namespace", "team", labels=PROFILE_LABELS, annotations={"owner": "user@example.com"})
        status = {"allocatable": node, "capacity": node, "conditions": [ready]}
        self._make("v1", "Node", "node-1", labels={"kubernetes.io/hostname": "node-1"}, status=status)
        self._make("storage.k8s.io/v1", "StorageClass", "longhorn", annotations=default, **provisioner)
        for account in ("default", "default-editor", "default-viewer"):
            self._make("v1", "ServiceAccount", account, "team")
        ports = {"ports": [{"name": "http", "port": 8888}], "selector": {"app": "ml-pipeline"}}
        self._make("v1", "Service", "ml-pipeline", "kubeflow", spec=ports)
        for runtime in runtimes(self.profile, crds):
            self.store.create(runtime)

    def _make(
        self,
        version: str,
        kind: str,
        name: str,
        namespace: str = "",
        *,
        labels: dict[str, str] | None = None,
        annotations: dict[str, str] | None = None,
        **rest: Any,
    ) -> Object:
        metadata: Object = {"name": name, "labels": labels or {}, "annotations": annotations or {}}
        return self.store.create({"apiVersion": version, "kind": kind, "metadata": metadata, **rest}, namespace or None)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    # Clients that give up a watch or a log leave a broken connection; that is no error of the server's.
    block_on_close = False
    double: Double

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass
