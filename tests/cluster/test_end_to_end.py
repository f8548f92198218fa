"""The whole job on the double: our command, kfp's client, a job of several real processes, a served model.

What runs here is real but for the cluster: the API server and its controllers are doubles (they have no
CEL, webhooks or RBAC), and Kubeflow Pipelines is a stand-in that runs what was submitted.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from double.controller import Controller
from double.pipelines import Pipelines
from double.server import Double

from lesionflow import steps
from lesionflow.recipe import Recipe

CANARY = "KGAT_canary0123456789abcdef0123456789"


@dataclass
class Cluster:
    """A double with everything running, and a user's shell on it."""

    double: Double
    controller: Controller
    pipelines: Pipelines
    mount: Path
    settings: Path
    environment: dict[str, str]

    @property
    def run(self) -> Path:
        return self.mount / "models" / "runs" / "first"

    def command(self, *arguments: str, timeout: float = 400) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "lesionflow", *arguments],
            capture_output=True,
            text=True,
            timeout=timeout,
            env=self.environment,
        )

    def start(self, recipe: Path, *options: str) -> subprocess.CompletedProcess[str]:
        settings = ("--cluster", str(self.settings))
        return self.command(
            "cluster", "run", str(recipe), "--name", "first", "--source", "synthetic", *settings, *options
        )

    def jobs(self) -> list[str]:
        return [j["metadata"]["name"] for kind in ("TrainJob", "PyTorchJob") for j in self.double.store.list(kind)]


@contextlib.contextmanager
def running(tmp: Path, crds: Path, profile: str, **job: int) -> Iterator[Cluster]:
    mount = tmp / "volumes"
    volumes = {f"first-{volume}": mount / volume for volume in ("data", "logs", "models")}
    for folder in volumes.values():
        folder.mkdir(parents=True)
    with (
        Double(profile, crds) as double,
        Controller(double, volumes=volumes, environment={"OMP_NUM_THREADS": "1"}) as controller,
    ):
        environment = {**os.environ, "KUBECONFIG": str(double.kubeconfig(tmp / "kubeconfig"))}
        with Pipelines(double, environment=environment) as pipelines:
            settings = tmp / "cluster.toml"
            lines = [f'kfp = "{pipelines.url}"', "[volumes]", f'mount = "{mount}"', "[image]", "packaged = true"]
            lines += ["[job]", 'cpu = "500m"', 'memory = "1Gi"', *(f"{key} = {value}" for key, value in job.items())]
            settings.write_text("\n".join(lines))
            yield Cluster(double, controller, pipelines, mount, settings, environment)


def write(recipe: Recipe, path: Path, **training: object) -> Path:
    # A network that starts from nothing ends with large logits: their parity is tested elsewhere.
    values = {**recipe.to_dict(), "gate": {"pauc_floor": 0.0, "parity": 0.01}}
    path.write_text(Recipe.from_dict({**values, "training": {**values["training"], **training}}).to_toml())
    return path


def copy_data(synthetic: Path, cluster: Cluster) -> None:
    import shutil

    shutil.copytree(synthetic, cluster.mount / "data" / "synthetic")


def answers(cluster: Cluster) -> float:
    deployed = json.loads((cluster.run / "deploy.json").read_text())
    return float(steps.smoke(cluster.run, deployed["url"])["max_abs"])


def test_from_an_empty_cluster_to_a_served_model_and_away_again(
    tmp_path: Path, crds: Path, synthetic: Path, tiny_recipe: Recipe
) -> None:
    """Two nodes by TrainJob; an identical run is recognised, a changed recipe retrains, clean leaves nothing."""
    with running(tmp_path, crds, "kubeflow-1.11", nodes=2) as cluster:
        copy_data(synthetic, cluster)
        token = tmp_path / "token"
        token.write_text(CANARY)
        stored = cluster.command("cluster", "secret", "--from", str(token))
        assert stored.returncode == 0, stored.stderr
        recipe = write(tiny_recipe, tmp_path / "recipe.toml")
        first = cluster.start(recipe)
        assert first.returncode == 0, first.stdout + first.stderr + "".join(cluster.pipelines.outputs.values())[-6000:]
        assert "smoke: succeeded" in first.stdout and "[node-1]" in first.stdout
        assert answers(cluster) < 1e-4
        (job,) = cluster.jobs()
        log = next(iter(cluster.pipelines.outputs.values()))
        assert "[node-0]" in log and "[node-1]" in log, "both ranks' logs are in the step's"
        assert any((cluster.mount / "logs" / "first").rglob("events.out.tfevents.*")), "TensorBoard's own volume"
        assert json.loads((cluster.run / "pipeline.json").read_text())["state"] == "SUCCEEDED"

        trained = (cluster.run / "steps" / "train.json").read_text()
        again = cluster.start(recipe)
        assert again.returncode == 0, again.stderr
        assert cluster.jobs() == [job], "no second job"
        assert "[node-" not in again.stdout, "and not the first one's lines again"
        assert (cluster.run / "steps" / "train.json").read_text() == trained
        once, twice = (tickets(spec, cluster, run) for run, spec in cluster.pipelines.specs.items())
        assert once == twice, "the same parameters, so that KFP's own cache would skip the steps"

        changed = cluster.start(write(tiny_recipe, tmp_path / "other.toml", epochs=1))
        assert changed.returncode == 0, changed.stderr
        assert len(set(cluster.jobs()) | {job}) == 2, "another recipe is another job"
        assert (cluster.run / "steps" / "train.json").read_text() != trained

        status = cluster.command("cluster", "status", "first")
        assert "Succeeded, 2 of 2 nodes" in status.stdout, status.stdout + status.stderr
        assert no_canary(cluster, tmp_path, token, [stored, first, again, changed, status]) == []
        board = cluster.command("cluster", "tensorboard", "first")
        assert "/tensorboard/team/first/" in board.stdout, board.stderr
        would = cluster.command("cluster", "clean", "first")
        assert "would remove InferenceService" in would.stdout
        gone = cluster.command("cluster", "clean", "--yes")
        assert gone.returncode == 0, gone.stderr
        left = cluster.command("cluster", "clean")
        assert left.stdout.strip() == "nothing to remove", left.stdout


def tickets(spec: dict, cluster: Cluster, run: str) -> list[str]:
    return re.findall(r'"ticket": "(\w+\.\w+)"', cluster.pipelines.outputs[run])


def no_canary(cluster: Cluster, tmp: Path, token: Path, done: list[subprocess.CompletedProcess[str]]) -> list[str]:
    """Everywhere the planted token was found, but in its own file and its own secret's data."""
    import base64

    found = [str(d.args) for d in done if CANARY in d.stdout + d.stderr]
    found += [run for run, text in cluster.pipelines.outputs.items() if CANARY in text]
    found += [run for run, spec in cluster.pipelines.specs.items() if CANARY in json.dumps(spec)]
    shapes = (CANARY, base64.b64encode(CANARY.encode()).decode())
    for kind in ("TrainJob", "TrainingRuntime", "InferenceService", "Pod", "PersistentVolumeClaim", "Event", "Secret"):
        for obj in cluster.double.store.list(kind):
            if kind == "Secret" and obj["metadata"]["name"] == "kaggle":
                assert any(shape in json.dumps(obj["data"]) for shape in shapes), "the secret itself holds it"
            elif any(shape in json.dumps(obj) for shape in shapes):
                found.append(f"{kind} {obj['metadata']['name']}")
    for path in tmp.rglob("*"):
        if path.is_file() and path != token and any(shape.encode() in path.read_bytes() for shape in shapes):
            found.append(str(path))
    return found


@pytest.mark.slow
def test_a_killed_pod_restarts_and_resumes(tmp_path: Path, crds: Path, synthetic: Path, tiny_recipe: Recipe) -> None:
    """Two nodes of two processes by PyTorchJob on Kubeflow 1.8; one pod is killed while training."""
    with running(tmp_path, crds, "kubeflow-1.8", nodes=2, processes=2) as cluster:
        copy_data(synthetic, cluster)
        recipe = write(tiny_recipe, tmp_path / "recipe.toml", epochs=12, validate_every=0)
        killed: list[str] = []

        def kill() -> None:
            # After the first checkpoint of the first fold, so that there is something to go on from.
            deadline = time.monotonic() + 200
            while time.monotonic() < deadline and not list((cluster.run / "fold-0/model-0").glob("step-*.ckpt")):
                time.sleep(0.05)
            worker = next(p for p in cluster.double.store.list("Pod") if "-worker-" in p["metadata"]["name"])
            killed.append(worker["metadata"]["name"])
            cluster.controller.kill("team", worker["metadata"]["name"])

        thread = threading.Thread(target=kill)
        thread.start()
        done = cluster.start(recipe)
        thread.join()
        log = "".join(cluster.pipelines.outputs.values())
        assert done.returncode == 0, done.stderr + log[-6000:]
        assert killed and "restarted (exit code" in log
        curve = (cluster.run / "metrics.csv").read_text()
        assert curve.count("\n") > 12
        assert answers(cluster) < 1e-4
        begun = [int(step) for step in re.findall(r"fold 0: step (\d+)/", log)]
        assert any(step > 1 for step in begun)


def test_a_failing_job_fails_the_pipeline_with_its_cause(
    tmp_path: Path, crds: Path, synthetic: Path, tiny_recipe: Recipe
) -> None:
    """A batch too small for its ranks ends the job with exit code 2 and the reason, in all the places one looks."""
    with running(tmp_path, crds, "kubeflow-1.11", nodes=2) as cluster:
        copy_data(synthetic, cluster)
        recipe = write(tiny_recipe, tmp_path / "recipe.toml", batch_size=1)
        ended: list[float] = []

        def watch(kind: str, obj: dict) -> None:
            statuses = obj.get("status", {}).get("containerStatuses", [])
            if obj["kind"] == "Pod" and any("terminated" in s.get("state", {}) for s in statuses) and not ended:
                ended.append(time.monotonic())

        cluster.double.store.subscribe(watch)
        done = cluster.start(recipe)
        seconds = time.monotonic() - ended[0]
        assert done.returncode == 2, done.stdout + done.stderr
        assert "training.batch_size 1 is less than 2 processes" in done.stderr
        assert "train: failed" in done.stdout and "stack" not in done.stdout
        failure = json.loads((cluster.run / "pipeline.json").read_text())["failure"]
        assert failure["step"] == "train" and failure["exit_code"] == 2
        print(f"{seconds:.1f} s from the first pod's end to the command's")
        assert seconds < 10
        assert cluster.double.store.list("InferenceService") == []


def test_clean_ends_a_pipeline_that_still_goes(
    tmp_path: Path, crds: Path, synthetic: Path, tiny_recipe: Recipe
) -> None:
    with running(tmp_path, crds, "kubeflow-1.11", nodes=2) as cluster:
        copy_data(synthetic, cluster)
        started = cluster.start(write(tiny_recipe, tmp_path / "recipe.toml", epochs=500), "--no-wait")
        assert started.returncode == 0, started.stderr
        (run,) = cluster.pipelines.runs.values()
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not cluster.jobs():
            time.sleep(0.2)
        assert cluster.jobs()
        gone = cluster.command("cluster", "clean", "first", "--yes", "--cluster", str(cluster.settings))
        assert gone.returncode == 0, gone.stderr
        assert f"terminated the pipeline run {run['run_id']}" in gone.stdout
        assert run["state"] == "CANCELED"
        again = cluster.command("cluster", "clean", "first")
        assert again.stdout.strip() == "nothing to remove"
