"""Write the objects under deploy/kustomize: the same ones that lesionflow itself puts on a cluster.

    python deploy/render.py            # after a change of cluster/manifests.py or deploy/settings
    python deploy/render.py --check    # exit 1, naming the files, if there is something to write

The base and the jobs follow the default settings; `components/cpu`, `components/gpu` and those for
the service are the differences that another settings file makes, as patches. Only the wiring
(overlays, `components/site`, `components/restricted`) is written by hand.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from lesionflow.cluster import manifests
from lesionflow.cluster.api import KINDS
from lesionflow.cluster.settings import Place, Settings

Object = dict[str, Any]

HERE = Path(__file__).parent
KUSTOMIZE = HERE / "kustomize"
HEADER = "# Written by deploy/render.py from lesionflow.cluster.manifests; a test compares.\n"
RUN = "first"
"""The run the objects belong to: `lesionflow cluster run RECIPE --name first` finds them there."""
IMAGES = ["image.train=lesionflow-train", "image.serve=lesionflow-serve", "image.packaged=true"]
"""Names that components/site replaces with those of a registry."""
ALL = ("get", "list", "watch", "create", "patch", "delete")
CLEAR = ("get", "list", "watch", "delete")
READ = ("get", "list", "watch")
RIGHTS: dict[str, tuple[str, ...]] = {
    "PersistentVolumeClaim": ALL,
    "Secret": ALL,
    "NetworkPolicy": ALL,
    "PyTorchJob": ALL,
    "TrainJob": ALL,
    "TrainingRuntime": ALL,
    "InferenceService": ALL,
    "Tensorboard": ALL,
    "Pod": ALL,
    # Made by controllers from ours, with our labels; a clean-up makes sure that they went too.
    **dict.fromkeys(("JobSet", "Job", "Deployment", "Service", "ConfigMap", "ServingRuntime", "Notebook"), CLEAR),
    **dict.fromkeys(("Event", "ResourceQuota", "LimitRange", "ServiceAccount"), READ),
}
"""What a pipeline's pod, which trains and deploys, may do in its namespace."""
SERVICE_PORTS = (manifests.PORT, 8012, 8013, 9000, 9090, 9091)
"""The service itself; Knative's queue proxy (HTTP, h2c) and its figures; Triton's gRPC."""
FORMS = {
    "triton": ["serving.form=triton"],
    "serverless": ["serving.mode=serverless"],
    "triton-serverless": ["serving.form=triton", "serving.mode=serverless"],
}
"""Components that change the service, one at a time, and the settings that say the same."""


def place(settings: str = "", *more: str) -> Place:
    """The run with one of deploy/settings (the default settings without a name) and images of its own."""
    path = HERE / "settings" / f"{settings}.toml" if settings else None
    return Place(RUN, Settings.load(path, [*IMAGES, *more]))


def base(run: Place) -> dict[str, list[Object]]:
    """File name -> objects that any version of Kubeflow takes."""
    return {"claims": manifests.claims(run), "access": access(run), "network": network(run)}


def job(run: Place, launcher: str) -> list[Object]:
    """The distributed job that trains what was begun in the run directory, for one of the launchers."""
    processes = str(run.settings.job.processes)
    command = [run.python, "-m", "lesionflow", "train", "--out", run.run, "--processes", processes]
    if launcher == "pytorchjob":
        return [manifests.pytorch_job(run, run.name, command)]
    return [manifests.training_runtime(run, run.name), manifests.train_job(run, run.name, command)]


def access(run: Place) -> list[Object]:
    """A role for the pods' account: Kubeflow's `default-editor` mostly has these rights, other accounts don't."""
    kinds: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for kind, verbs in RIGHTS.items():
        version, plural = KINDS[kind]
        kinds.setdefault((version.rpartition("/")[0], verbs), []).append(plural)
    rules: list[Object] = [
        {"apiGroups": [group], "resources": plurals, "verbs": list(verbs)} for (group, verbs), plurals in kinds.items()
    ]
    rules.append({"apiGroups": [""], "resources": ["pods/log"], "verbs": ["get"]})
    reference = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "lesionflow"}
    # `components/site` puts the namespace in; without one the API server refuses the binding.
    subject = {"kind": "ServiceAccount", "name": run.settings.service_account, "namespace": "default"}
    return [
        _standing("rbac.authorization.k8s.io/v1", "Role", "lesionflow", {"rules": rules}),
        _standing(
            "rbac.authorization.k8s.io/v1", "RoleBinding", "lesionflow", {"roleRef": reference, "subjects": [subject]}
        ),
    ]


def network(run: Place) -> list[Object]:
    """Nobody reaches our pods but the job's own pods each other, and everybody the service's ports."""
    serving = {"serving.kserve.io/inferenceservice": run.settings.serving.name}
    ports = [{"protocol": "TCP", "port": port} for port in SERVICE_PORTS]

    def policy(name: str, labels: dict[str, str], ingress: list[Object]) -> Object:
        spec = {"podSelector": {"matchLabels": labels}, "policyTypes": ["Ingress"], "ingress": ingress}
        return _standing("networking.k8s.io/v1", "NetworkPolicy", name, {"spec": spec})

    return [
        policy("lesionflow-default-deny", {manifests.MANAGED_BY: "lesionflow"}, []),
        manifests.network_policy(run),
        policy("lesionflow-serving", serving, [{"ports": ports}]),
    ]


def objects(run: Place, launcher: str) -> list[Object]:
    """Everything an overlay holds for these settings, in one list."""
    return [
        *(obj for part in base(run).values() for obj in part),
        *job(run, launcher),
        manifests.inference_service(run),
    ]


def files() -> dict[Path, str]:
    """Every rendered file and what it must hold."""
    plain = place()
    made: dict[Path, str] = {}

    def write(folder: str, parts: dict[str, list[Object]]) -> None:
        for name, listed in parts.items():
            made[KUSTOMIZE / folder / f"{name}.yaml"] = HEADER + _yaml(*listed)

    write("base", base(plain))
    for launcher in ("pytorchjob", "trainjob"):
        write(f"jobs/{launcher}", {"job": job(plain, launcher)})
    write("service", {"service": [manifests.inference_service(plain)]})
    changed = {name: place(name) for name in ("cpu", "gpu")} | {name: place("", *on) for name, on in FORMS.items()}
    for name, run in changed.items():
        component = {
            "apiVersion": "kustomize.config.k8s.io/v1alpha1",
            "kind": "Component",
            "patches": [*patches(plain, run)],
        }
        made[KUSTOMIZE / "components" / name / "kustomization.yaml"] = HEADER + _yaml(component)
    return made


def patches(plain: Place, changed: Place) -> Iterator[Object]:
    """JSON patches, by object, that turn one place's objects into another's."""
    before, after = ({**_named(run, "pytorchjob"), **_named(run, "trainjob")} for run in (plain, changed))
    for (kind, name), old in before.items():
        steps = [*difference(old, after[kind, name])]
        if steps:
            text = "".join(f"- {yaml.safe_dump(step, default_flow_style=True, width=1e9)}" for step in steps)
            yield {"target": {"kind": kind, "name": name}, "patch": text}


def difference(old: Any, new: Any, path: str = "") -> Iterator[Object]:
    """The JSON patch from one value to another: mappings by key, lists of equal length by position."""
    if old == new:
        return
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(k for k in new if k not in old)]:
            below = f"{path}/{key.replace('~', '~0').replace('/', '~1')}"
            if key not in new:
                yield {"op": "remove", "path": below}
            elif key not in old:
                yield {"op": "add", "path": below, "value": new[key]}
            else:
                yield from difference(old[key], new[key], below)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for position, (one, other) in enumerate(zip(old, new, strict=True)):
            yield from difference(one, other, f"{path}/{position}")
    else:
        yield {"op": "replace", "path": path, "value": new}


def stale() -> list[Path]:
    """Rendered files that are missing or hold something else."""
    return [path for path, text in files().items() if not path.exists() or path.read_text() != text]


def _named(run: Place, launcher: str) -> dict[tuple[str, str], Object]:
    return {(obj["kind"], obj["metadata"]["name"]): obj for obj in objects(run, launcher)}


def _yaml(*documents: Object) -> str:
    text: str = yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False)
    return text


class _Dumper(yaml.SafeDumper):
    """Patches as text over several lines, and no anchors where two objects share a part."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: _Dumper, text: str) -> Any:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def _standing(version: str, kind: str, name: str, body: Object) -> Object:
    """An object of the installation, not of a run: cleaning up a run leaves it."""
    labels = {"app.kubernetes.io/part-of": "lesionflow"}
    return {"apiVersion": version, "kind": kind, "metadata": {"name": name, "labels": labels}, **body}


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the objects under deploy/kustomize.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if something would change")
    check = parser.parse_args().check
    found = stale()
    for path in found:
        print(path.relative_to(HERE.parent))  # noqa: T201
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(files()[path])
    sys.exit(bool(found) and check)


if __name__ == "__main__":
    main()
