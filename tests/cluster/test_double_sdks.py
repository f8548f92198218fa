"""The SDKs that Kubeflow's users have, against the double: each in an environment of its own.

They bring clients of other versions than ours, so each runs as a process in a virtual environment that is
made once and kept. What an operator would do, the test does itself.
"""

from __future__ import annotations

import os
import re
import subprocess
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from double.answers import timestamp
from double.server import Double

from lesionflow.cluster import manifests
from lesionflow.cluster.settings import Place, Settings

pytestmark = pytest.mark.slow

Object = dict[str, Any]
Run = Callable[..., str]


@pytest.fixture
def sdk(double: Double, tmp_path: Path, environment_with) -> Run:
    """Run a script with a package that isn't ours; what it prints."""

    def run(requirements: str, script: str) -> str:
        name = re.sub(r"[^a-z0-9.]+", "-", requirements).strip("-")
        python = environment_with(name, *requirements.split()) / "bin" / "python"
        # The SDKs read the source of the functions they are given, so the script is a file.
        file = tmp_path / "script.py"
        file.write_text(textwrap.dedent(script))
        environment = {
            "HOME": str(tmp_path),
            "PATH": os.environ["PATH"],
            "KUBECONFIG": str(double.kubeconfig(tmp_path / "kubeconfig")),
            "PYTHONWARNINGS": "ignore",
        }
        ended = subprocess.run([python, file], env=environment, capture_output=True, text=True, timeout=120)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout

    return run


def condition(type_: str, status: str = "True") -> Object:
    return {"type": type_, "status": status, "reason": type_, "message": "", "lastTransitionTime": timestamp()}


def play_pod(double: Double, owner: Object, name: str, container: str, labels: dict[str, str], text: str) -> None:
    """A pod that ran, said something and ended well."""
    about = {k: owner["metadata"][k] for k in ("name", "uid")}
    metadata = {"name": name, "labels": labels}
    metadata["ownerReferences"] = [{"apiVersion": owner["apiVersion"], "kind": owner["kind"], **about}]
    spec = {"containers": [{"name": container, "image": "busybox"}]}
    double.store.create({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}, "team")
    double.store.log_path("team", name, container).write_text(text)
    double.store.set_status("Pod", "team", name, {"phase": "Succeeded"})


@pytest.mark.parametrize("double", ["kubeflow-1.8", "kubeflow-1.11"], indirect=True)
def test_training_client(double: Double, sdk: Run) -> None:
    """kubeflow-training 1.9: create, read, wait, logs, delete; and it reads the jobs that we make."""
    store = double.store

    def operator(type_: str, obj: Object) -> None:
        if (type_, obj["kind"]) != ("ADDED", "PyTorchJob"):
            return
        name = obj["metadata"]["name"]
        for role in ("master", "worker"):
            labels = {
                "training.kubeflow.org/job-name": name,
                "training.kubeflow.org/replica-type": role,
                "training.kubeflow.org/replica-index": "0",
            }
            labels |= {"training.kubeflow.org/job-role": "master"} if role == "master" else {}
            play_pod(double, obj, f"{name}-{role}-0", "pytorch", labels, f"{role} has learned\n")
        store.event(obj, "SuccessfulCreatePod", f"Created pod: {name}-master-0")
        done = [condition("Created"), condition("Running", "False"), condition("Succeeded")]
        store.set_status(
            "PyTorchJob", "team", name, {"conditions": done, "replicaStatuses": {"Master": {"succeeded": 1}}}
        )

    store.subscribe(operator)
    place = Place("ours", Settings.load(overrides=["job.tolerations=gpu:NoSchedule"]))
    store.create(manifests.pytorch_job(place, "ours", ["python", "-m", "lesionflow"]), "team")
    told = sdk(
        "kubeflow-training==1.9.*",
        """
        from kubeflow.training import TrainingClient

        def learn():
            print("learning")

        client = TrainingClient(namespace="team", job_kind="PyTorchJob")
        client.create_job(name="theirs", base_image="busybox", train_func=learn, num_workers=2, num_procs_per_worker=1)
        for name in ("ours", "theirs"):
            job = client.wait_for_job_conditions(name, wait_timeout=20, polling_interval=1)
            print(name, sorted(job.spec.pytorch_replica_specs), client.is_job_succeeded(name))
            logs, events = client.get_job_logs(name, is_master=False, verbose=True)
            print(sorted(logs.items()), len(events))
            client.get_job_logs(name, follow=True)
        print([job.metadata.name for job in client.list_jobs()])
        client.update_job({"metadata": {"labels": {"seen": "yes"}}}, "ours")
        client.delete_job("ours")
        client.delete_job("theirs")
        print([job.metadata.name for job in client.list_jobs()])
        """,
    )
    assert told.splitlines() == [
        "ours ['Master', 'Worker'] True",
        "[('ours-master-0', 'master has learned\\n'), ('ours-worker-0', 'worker has learned\\n')] 1",
        "[Pod ours-master-0]: master has learned",
        "theirs ['Master', 'Worker'] True",
        "[('theirs-master-0', 'master has learned\\n'), ('theirs-worker-0', 'worker has learned\\n')] 1",
        "[Pod theirs-master-0]: master has learned",
        "['ours', 'theirs']",
        "[]",
    ]
    assert not store.list("Pod", "team")


@pytest.mark.parametrize("double", ["kubeflow-1.11", "trainer-2.3"], indirect=True)
def test_trainer_client(double: Double, sdk: Run) -> None:
    """The kubeflow SDK: runtimes, ours among them, train, read, wait, logs, delete; and it reads the jobs we make."""
    store = double.store

    def operator(type_: str, obj: Object) -> None:
        if (type_, obj["kind"]) != ("ADDED", "TrainJob"):
            return
        name = obj["metadata"]["name"]
        for index in ("0", "1"):
            labels = {
                "jobset.sigs.k8s.io/jobset-name": name,
                "jobset.sigs.k8s.io/replicatedjob-name": "node",
                "batch.kubernetes.io/job-completion-index": index,
            }
            play_pod(double, obj, f"{name}-node-0-{index}", "node", labels, f"node {index} has learned\n")
        store.event(obj, "JobCreated", "the job set was made")
        store.set_status("TrainJob", "team", name, {"conditions": [condition("Complete")]})

    store.subscribe(operator)
    place = Place("ours", Settings.load(overrides=["job.gpus=1"]))
    store.create(manifests.training_runtime(place, "ours"), "team")
    store.create(manifests.train_job(place, "ours", ["python", "-m", "lesionflow"]), "team")
    told = sdk(
        "kubeflow==0.5.*",
        """
        from kubeflow.common.types import KubernetesBackendConfig
        from kubeflow.trainer import CustomTrainer, TrainerClient

        def learn():
            print("learning")

        client = TrainerClient(KubernetesBackendConfig(namespace="team"))
        runtime = client.get_runtime("ours")
        names = [r.name for r in client.list_runtimes()]
        print(runtime.name in names, runtime.trainer.framework, runtime.trainer.num_nodes)
        name = client.train(runtime=runtime, trainer=CustomTrainer(func=learn, num_nodes=2))
        for job in ("ours", name):
            found = client.wait_for_job_status(job, timeout=20, polling_interval=1)
            print(found.status, found.num_nodes, [(s.name, s.status) for s in found.steps])
            print(list(client.get_job_logs(job, step="node-1")), list(client.get_job_logs(job, follow=True)))
            print([event.reason for event in client.get_job_events(job)])
        print(len(client.list_jobs()))
        client.delete_job("ours")
        client.delete_job(name)
        print(client.list_jobs())
        """,
    )
    seen = [
        "Complete 2 [('node-0', 'Succeeded'), ('node-1', 'Succeeded')]",
        "['node 1 has learned'] ['node 0 has learned']",
        "['JobCreated']",
    ]
    assert told.splitlines() == ["True torch 2", *seen, *seen, "2", "[]"]


@pytest.mark.parametrize("double", ["kubeflow-1.8", "kubeflow-1.11"], indirect=True)
@pytest.mark.parametrize("form", ["lesionflow", "triton"])
def test_kserve_client(double: Double, sdk: Run, form: str) -> None:
    """KServe's client: create, get, wait for Ready, patch, delete, with the services that we make."""
    store = double.store

    def operator(type_: str, obj: Object) -> None:
        if (type_, obj["kind"]) == ("ADDED", "InferenceService"):
            ready = [{k: v for k, v in condition(t).items() if k != "message"} for t in ("PredictorReady", "Ready")]
            url = f"http://{obj['metadata']['name']}.team.example.com"
            store.set_status("InferenceService", "team", obj["metadata"]["name"], {"conditions": ready, "url": url})

    store.subscribe(operator)
    service = manifests.inference_service(
        Place("ours", Settings.load(overrides=[f"serving.form={form}"])), name="theirs"
    )
    told = sdk(
        # Newer kubernetes clients refuse the model objects that KServe's own client gives them.
        "kserve==0.21.* kubernetes<36",
        f"""
        from kserve import KServeClient, V1beta1InferenceService
        body = {service!r}
        client = KServeClient()
        made = V1beta1InferenceService(
            api_version=body["apiVersion"], kind=body["kind"], metadata=body["metadata"], spec=body["spec"]
        )
        client.create(made, namespace="team")
        client.wait_isvc_ready("theirs", namespace="team", timeout_seconds=20, polling_interval=1)
        found = client.get("theirs", namespace="team")
        print(found["status"]["url"], client.is_isvc_ready("theirs", namespace="team"))
        made.metadata["labels"]["seen"] = "yes"
        print(client.patch("theirs", made, namespace="team")["metadata"]["labels"]["seen"])
        client.get("theirs", namespace="team", watch=True, timeout_seconds=5)
        client.delete("theirs", namespace="team")
        print(client.get(namespace="team")["items"])
        """,
    )
    lines = told.splitlines()
    assert lines[:2] == ["http://theirs.team.example.com True", "yes"]
    assert lines[-1] == "[]"
