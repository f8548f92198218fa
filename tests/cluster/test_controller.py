"""The double's controllers: what operators, kubelet and scheduler do, shown with real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from double import network
from double.controller import Controller, alive
from double.process import marked
from double.server import Double

from lesionflow.cluster import manifests
from lesionflow.cluster.api import Api
from lesionflow.cluster.settings import Place, Settings

CRDS = Path(os.environ.get("LESIONFLOW_CRDS", Path(__file__).parents[2].parent / "shared" / "crds"))
pytestmark = pytest.mark.skipif(not CRDS.exists(), reason=f"no CRDs at {CRDS}; set LESIONFLOW_CRDS")
Cluster = tuple[Double, Controller]
Make = Callable[..., Cluster]


@pytest.fixture
def make() -> Iterator[Make]:
    """Make a double and its controller; both end with the test."""
    made: list[Cluster] = []

    def build(profile: str = "kubeflow-1.11", **options: Any) -> Cluster:
        double = Double(profile, CRDS).start()
        options = {"netns": False, "grace": 1.0} | options
        made.append((double, Controller(double, **options).__enter__()))
        return made[-1]

    yield build
    for double, controller in made:
        controller.__exit__(None, None, None)
        double.stop()


def until(answer: Callable[[], Any], what: str = "", timeout: float = 10.0) -> Any:
    end = time.monotonic() + timeout
    while not (found := answer()):
        assert time.monotonic() < end, what or "it took too long"
        time.sleep(0.02)
    return found


def place(**settings: Any) -> Place:
    return Place("first", Settings.from_dict({"namespace": "team", **settings}))


def python(code: str) -> list[str]:
    return ["python", "-c", textwrap.dedent(code)]


def submit(double: Double, kind: str, code: str, **job: Any) -> None:
    """A job "first-1" of two nodes that runs the code."""
    where = place(job=job)
    for claim in manifests.claims(where):
        if double.store.get("PersistentVolumeClaim", "team", claim["metadata"]["name"]) is None:
            double.store.create(claim)
    if kind == "TrainJob":
        double.store.create(manifests.training_runtime(where, "first-1"))
        double.store.create(manifests.train_job(where, "first-1", python(code)))
    else:
        double.store.create(manifests.pytorch_job(where, "first-1", python(code)))


def conditions(double: Double, kind: str, name: str = "first-1") -> dict[str, dict[str, Any]]:
    found = double.store.get(kind, "team", name) or {}
    return {c["type"]: c for c in found.get("status", {}).get("conditions", [])}


def has(double: Double, kind: str, condition: str, name: str = "first-1") -> bool:
    return conditions(double, kind, name).get(condition, {}).get("status") == "True"


def pods(double: Double) -> list[dict[str, Any]]:
    return sorted(double.store.list("Pod", "team"), key=lambda p: p["metadata"]["name"])


def log(double: Double, pod: dict[str, Any]) -> str:
    container = pod["spec"]["containers"][0]["name"]
    return double.store.log_path("team", pod["metadata"]["name"], container).read_text()


def events(double: Double, name: str) -> list[tuple[str, str]]:
    found = double.store.list("Event", "team", fields=f"involvedObject.name={name}")
    return [(e["reason"], e["message"]) for e in found]


# The first node ends last: a master's success ends the job, and cleaning up ends what still runs.
SAY = """
    import json, os, pathlib, time
    done = pathlib.Path("/mnt/lesionflow/models/done")
    while os.environ["PET_NODE_RANK"] == "0" and not done.exists():
        time.sleep(0.02)
    print(json.dumps({k: v for k, v in os.environ.items()
                      if k.startswith(("MASTER", "WORLD", "RANK", "PET_", "PYTHON", "JOB_COMPL"))}))
    done.touch()
"""


def bare(name: str, code: str, **spec: Any) -> dict[str, Any]:
    container = {"name": "main", "image": "python:3.11", "command": python(code), **spec.pop("container", {})}
    spec = {"restartPolicy": "Never", "containers": [container], **spec}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "team"}, "spec": spec}


def phase(double: Double, name: str) -> str:
    return ((double.store.get("Pod", "team", name) or {}).get("status") or {}).get("phase", "")


def state(double: Double, name: str, key: str = "state") -> dict[str, Any]:
    status = (double.store.get("Pod", "team", name) or {}).get("status", {})
    return status.get("containerStatuses", [{}])[0].get(key, {})


# PyTorchJob ----------------------------------------------------------------------------------------------------


def test_a_pytorch_job_runs_with_the_operators_labels_environment_and_conditions(make: Make) -> None:
    double, _ = make("kubeflow-1.8")
    started = time.monotonic()
    submit(double, "PyTorchJob", SAY, processes=2)
    until(lambda: has(double, "PyTorchJob", "Succeeded"))
    assert time.monotonic() - started < 3
    master, worker = pods(double)
    assert (
        master["metadata"]["labels"].items()
        >= {
            "training.kubeflow.org/job-name": "first-1",
            "training.kubeflow.org/replica-type": "master",
            "training.kubeflow.org/replica-index": "0",
            "training.kubeflow.org/job-role": "master",
            "lesionflow/run": "first",
        }.items()
    )
    assert (worker["metadata"]["name"], worker["spec"]["nodeName"]) == ("first-1-worker-0", "node-1")
    assert worker["metadata"]["ownerReferences"][0]["kind"] == "PyTorchJob"
    # As in the pod: the operator's buffering wins over the job's own, WORLD_SIZE counts processes.
    declared = {v["name"]: v.get("value") for v in worker["spec"]["containers"][0]["env"]}
    assert declared["MASTER_ADDR"] == "first-1-master-0"
    expected = {"WORLD_SIZE": "4", "RANK": "1", "PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_NPROC_PER_NODE": "2"}
    assert json.loads(log(double, worker)).items() >= {**expected, "PYTHONUNBUFFERED": "0"}.items()
    found = conditions(double, "PyTorchJob")
    assert [(t, c["status"]) for t, c in found.items()] == [
        ("Created", "True"),
        ("Running", "False"),
        ("Succeeded", "True"),
    ]
    assert found["Succeeded"]["reason"] == "PyTorchJobSucceeded"
    status = double.store.get("PyTorchJob", "team", "first-1")["status"]  # type: ignore[index]
    assert status["replicaStatuses"]["Master"]["succeeded"] == 1
    assert {"Scheduled", "Pulled", "Started"} <= {reason for reason, _ in events(double, "first-1-worker-0")}
    assert ("SuccessfulCreatePod", "Created pod: first-1-master-0") in events(double, "first-1")
    double.store.delete("PyTorchJob", "team", "first-1")
    until(lambda: not pods(double) and not double.store.get("Service", "team", "first-1-master-0"))


def test_a_retryable_end_makes_the_pod_anew_whatever_the_backoff_limit(make: Make) -> None:
    double, _ = make()
    # Worker: three times 143, then well; the master waits for it.
    submit(
        double,
        "PyTorchJob",
        """
        import os, pathlib, sys, time
        marks = pathlib.Path("/mnt/lesionflow/models")
        if os.environ["RANK"] == "1":
            tries = len(list(marks.glob("try*")))
            (marks / f"try{tries}").touch()
            if tries < 3:
                sys.exit(143)
            (marks / "done").touch()
        while not (marks / "done").exists():
            time.sleep(0.02)
        """,
        retries=1,
    )
    until(lambda: has(double, "PyTorchJob", "Succeeded"))
    told = events(double, "first-1")
    restarting = ("PyTorchJobRestarting", "job first-1 is restarting because Worker replica(s) failed.")
    assert told.count(restarting) == 3
    assert ("ExitedWithCode", "Pod: team.first-1-worker-0 exited with code 143") in told
    assert told.count(("SuccessfulCreatePod", "Created pod: first-1-worker-0")) == 4


def test_a_permanent_end_fails_the_job_and_cleans_what_still_runs(make: Make) -> None:
    double, controller = make()
    submit(
        double,
        "PyTorchJob",
        """
        import os, sys, time
        if os.environ["RANK"] == "0":
            time.sleep(60)
        print("column age_approx is missing")
        sys.exit(3)
        """,
    )
    until(lambda: has(double, "PyTorchJob", "Failed"))
    failed = conditions(double, "PyTorchJob")["Failed"]
    assert failed["message"] == 'job "first-1" is failing because "Worker" replica(s) failed.'
    assert "completionTime" not in double.store.get("PyTorchJob", "team", "first-1")["status"]  # type: ignore[index]
    # cleanPodPolicy Running: the master goes, the failed worker stays to be read.
    until(lambda: [p["metadata"]["name"] for p in pods(double)] == ["first-1-worker-0"])
    ended = state(double, "first-1-worker-0")["terminated"]
    assert (ended["exitCode"], ended["reason"]) == (3, "Error")
    assert ended["message"] == "column age_approx is missing\n"
    assert not controller.kubelet.instances


def test_operator_1_7_leaves_a_permanent_end_in_restarting(make: Make) -> None:
    double, _ = make("kubeflow-1.8")
    submit(double, "PyTorchJob", "raise SystemExit(3)", nodes=1)
    until(lambda: has(double, "PyTorchJob", "Restarting"))
    time.sleep(0.5)
    assert "Failed" not in conditions(double, "PyTorchJob")
    assert phase(double, "first-1-master-0") == "Failed"


def test_on_failure_restarts_in_the_pod_up_to_the_backoff_limit(make: Make) -> None:
    double, _ = make()
    where = place(job={"nodes": 1, "retries": 2})
    job = manifests.pytorch_job(where, "first-1", python("print('once more'); raise SystemExit(1)"))
    job["spec"]["pytorchReplicaSpecs"]["Master"]["restartPolicy"] = "OnFailure"
    for claim in manifests.claims(where):
        double.store.create(claim)
    double.store.create(job)
    until(lambda: state(double, "first-1-master-0", "lastState").get("terminated"))
    waits = until(lambda: state(double, "first-1-master-0").get("waiting"))
    assert waits["reason"] == "CrashLoopBackOff"
    assert "BackOff" in {reason for reason, _ in events(double, "first-1-master-0")}
    until(lambda: has(double, "PyTorchJob", "Failed"))
    message = conditions(double, "PyTorchJob")["Failed"]["message"]
    assert message == "Job first-1 has failed because it has reached the specified backoff limit"


def test_a_job_ends_at_its_deadline_and_is_removed_after_its_time(make: Make) -> None:
    double, _ = make()
    submit(double, "PyTorchJob", "import time; time.sleep(60)", nodes=1, deadline=1, ttl=1)
    until(lambda: has(double, "PyTorchJob", "Failed"))
    assert "longer than specified deadline" in conditions(double, "PyTorchJob")["Failed"]["message"]
    until(lambda: double.store.get("PyTorchJob", "team", "first-1") is None)


def test_killed_and_out_of_memory(make: Make) -> None:
    double, controller = make()
    for name in ("killed", "hungry", "evicted"):
        double.store.create(bare(name, "import time; time.sleep(60)"))
        until(lambda name=name: phase(double, name) == "Running")
    process = controller.processes("team", "killed")["main"]
    controller.kill("team", "killed")
    controller.out_of_memory("team", "hungry")
    controller.evict("team", "evicted")
    started = time.monotonic()
    until(lambda: {phase(double, n) for n in ("killed", "hungry", "evicted")} == {"Failed"})
    assert time.monotonic() - started < 1
    assert state(double, "killed")["terminated"]["exitCode"] == 137
    assert state(double, "killed")["terminated"]["reason"] == "Error"
    ended = state(double, "hungry")["terminated"]
    assert (ended["exitCode"], ended["reason"]) == (137, "OOMKilled")
    status = double.store.get("Pod", "team", "evicted")["status"]  # type: ignore[index]
    assert status["reason"] == "Evicted"
    assert "low on resource: ephemeral-storage" in status["message"]
    assert not alive(process)


# TrainJob ------------------------------------------------------------------------------------------------------


def test_a_train_job_runs_with_torchruns_variables_only(make: Make) -> None:
    double, _ = make()
    submit(double, "TrainJob", SAY, processes=2)
    until(lambda: has(double, "TrainJob", "Complete"))
    first, second = pods(double)
    assert first["metadata"]["name"].startswith("first-1-node-0-0-")
    assert (
        second["metadata"]["labels"].items()
        >= {
            "jobset.sigs.k8s.io/jobset-name": "first-1",
            "jobset.sigs.k8s.io/replicatedjob-name": "node",
            "batch.kubernetes.io/job-completion-index": "1",
            "lesionflow/part": "train",
        }.items()
    )
    said = json.loads(log(double, second))
    assert said.items() >= {"PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_NPROC_PER_NODE": "2"}.items()
    assert not {"WORLD_SIZE", "RANK", "MASTER_ADDR"} & set(said)
    declared = {v["name"]: v.get("value") for v in second["spec"]["containers"][0]["env"]}
    assert declared["PET_MASTER_ADDR"] == "first-1-node-0-0.first-1"
    found = double.store.get("TrainJob", "team", "first-1")["status"]  # type: ignore[index]
    counts = {"ready": 0, "succeeded": 1, "failed": 0, "active": 0, "suspended": 0}
    assert found["jobsStatus"] == [{"name": "node", **counts}]
    assert conditions(double, "TrainJob")["Complete"]["reason"] == "AllJobsCompleted"
    double.store.delete("TrainJob", "team", "first-1")
    until(lambda: not pods(double) and not double.store.list("Job") and not double.store.list("JobSet"))


def test_a_permanent_code_fails_the_set_at_once(make: Make) -> None:
    double, _ = make()
    submit(double, "TrainJob", "import os, time; time.sleep(60 * (os.environ['PET_NODE_RANK'] == '0')); os._exit(4)")
    until(lambda: has(double, "TrainJob", "Failed"))
    failed = conditions(double, "TrainJob")["Failed"]
    assert failed["reason"] == "FailJobSetFailurePolicyAction"
    assert failed["message"].endswith("(first failed job: first-1-node-0)")
    why = conditions(double, "Job", "first-1-node-0")["Failed"]
    assert why["reason"] == "PodFailurePolicy"
    assert "failed with exit code 4 matching FailJob rule at index 0" in why["message"]
    until(lambda: [p["status"]["phase"] for p in pods(double)] == ["Failed"])


def test_any_other_end_restarts_the_whole_set_up_to_its_limit(make: Make) -> None:
    double, _ = make(grace=0.4)
    submit(
        double,
        "TrainJob",
        """
        import os, signal, time
        rank = os.environ["PET_NODE_RANK"]
        if rank == "0":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(60)
        time.sleep(0.3)
        os._exit(143)
        """,
        retries=2,
    )
    seen: set[str] = set()
    together: set[frozenset[str]] = set()

    def watch(_: str, obj: dict[str, Any]) -> None:
        if obj["kind"] == "Pod":
            seen.add(obj["metadata"]["name"])
            key = "jobset.sigs.k8s.io/restart-attempt"
            together.add(frozenset(p["metadata"]["labels"][key] for p in pods(double)))

    double.store.subscribe(watch)
    until(lambda: has(double, "TrainJob", "Failed"), timeout=20)
    assert conditions(double, "TrainJob")["Failed"]["reason"] == "ReachedMaxRestarts"
    assert double.store.get("JobSet", "team", "first-1")["status"]["restarts"] == 2  # type: ignore[index]
    # Both nodes started three times, though only one ever failed.
    assert len([n for n in seen if "-node-0-0-" in n]) == 3
    assert len([n for n in seen if "-node-0-1-" in n]) == 3
    # A new attempt waits for the last pod of the one before.
    assert all(len(attempts) < 2 for attempts in together)


@pytest.mark.parametrize(
    ("profile", "code", "end", "again"),
    [
        ("kubeflow-1.11", 3, "Failed", True),
        ("trainer-2.3", 3, "Failed", True),
        ("kubeflow-1.11", 0, "Complete", True),
        ("trainer-2.3", 0, "Complete", False),
    ],
)
def test_a_train_job_begins_again_once_its_job_set_is_gone(
    make: Make, profile: str, code: int, end: str, again: bool
) -> None:
    double, _ = make(profile)
    submit(double, "TrainJob", f"raise SystemExit({code})", nodes=1)
    until(lambda: has(double, "TrainJob", end))
    [first] = pods(double)
    double.store.delete("JobSet", "team", "first-1")
    if again:
        until(lambda: pods(double) and pods(double)[0]["metadata"]["uid"] != first["metadata"]["uid"])
    else:
        until(lambda: not pods(double))
        time.sleep(0.3)
    until(lambda: has(double, "TrainJob", end))
    assert bool(pods(double)) == again


def test_without_its_runtime_a_train_job_makes_nothing_but_an_event(make: Make) -> None:
    double, _ = make()
    double.store.create(manifests.train_job(place(), "first-1", python("pass")))
    until(lambda: events(double, "first-1"))
    [(reason, message)] = events(double, "first-1")
    assert reason == "TrainJobResourcesCreationFailed"
    assert 'TrainingRuntime.trainer.kubeflow.org "first-1" not found' in message
    assert not conditions(double, "TrainJob")
    assert not pods(double)
    submit_runtime = manifests.training_runtime(place(), "first-1")
    double.store.create(submit_runtime)
    for claim in manifests.claims(place()):
        double.store.create(claim)
    until(lambda: has(double, "TrainJob", "Complete"))


def test_a_suspended_train_job_has_no_pods_until_it_is_resumed(make: Make) -> None:
    double, _ = make()
    where = place()
    for made in (*manifests.claims(where), manifests.training_runtime(where, "first-1")):
        double.store.create(made)
    job = manifests.train_job(where, "first-1", python("pass"))
    job["spec"]["suspend"] = True
    double.store.create(job)
    until(lambda: has(double, "TrainJob", "Suspended"))
    until(lambda: double.store.get("Job", "team", "first-1-node-0"))
    time.sleep(0.3)
    assert not pods(double)
    found = double.store.get("TrainJob", "team", "first-1")
    double.store.update(found | {"spec": found["spec"] | {"suspend": False}})  # type: ignore[operator, index]
    until(lambda: has(double, "TrainJob", "Complete"))
    assert conditions(double, "TrainJob")["Suspended"]["reason"] == "Resumed"


# Pods that can't run -------------------------------------------------------------------------------------------


def test_what_keeps_a_pod_pending_is_said_as_a_cluster_says_it(make: Make) -> None:
    double, controller = make()
    gpus = {"resources": {"limits": {"nvidia.com/gpu": "1"}}}
    lost = {"volumes": [{"name": "v", "persistentVolumeClaim": {"claimName": "lost"}}]}
    secret = {"env": [{"name": "K", "valueFrom": {"secretKeyRef": {"name": "none", "key": "k"}}}]}
    mount = {"volumes": [{"name": "v", "secret": {"secretName": "none"}}]}
    mounted = {"volumeMounts": [{"name": "v", "mountPath": "/etc/v"}]}
    controller.fail_image_pull(match="picture")
    controller.fail_scheduling("1 node(s) had untolerated taint {spot: true}", match="tainted")
    nodes = "0/1 nodes are available: "
    expected = {
        "gpu": (bare("gpu", "", container=gpus), "FailedScheduling", nodes + "1 Insufficient nvidia.com/gpu."),
        "tainted": (bare("tainted", ""), "FailedScheduling", nodes + "1 node(s) had untolerated taint {spot: true}."),
        "claimless": (bare("claimless", "", **lost), "FailedScheduling", nodes + 'persistentvolumeclaim "lost" not'),
        "picture": (bare("picture", ""), "Failed", 'Failed to pull image "python:3.11": '),
        "keyless": (bare("keyless", "", container=secret), "Failed", 'Error: secret "none" not found'),
        "bare": (
            bare("bare", "", container=mounted, **mount),
            "FailedMount",
            'MountVolume.SetUp failed for volume "v" : secret "none" not found',
        ),
    }
    for pod, *_ in expected.values():
        double.store.create(pod)
    for name, (_, reason, text) in expected.items():
        told = until(lambda name=name: [e for e in events(double, name) if e[0] not in ("Scheduled", "BackOff")])
        assert told[0][0] == reason, name
        assert told[0][1].startswith(text), name
        assert phase(double, name) == "Pending"
    until(lambda: state(double, "picture").get("waiting", {}).get("reason") == "ImagePullBackOff")
    assert state(double, "keyless")["waiting"]["reason"] == "CreateContainerConfigError"
    [scheduled] = double.store.get("Pod", "team", "gpu")["status"]["conditions"]  # type: ignore[index]
    assert (scheduled["type"], scheduled["status"], scheduled["reason"]) == (
        "PodScheduled",
        "False",
        "Unschedulable",
    )
    controller.heal()
    double.store.create(manifests.secret(place(), "none", {"k": b"v"}))
    until(lambda: {phase(double, n) for n in ("picture", "tainted", "keyless", "bare")} == {"Succeeded"})
    assert phase(double, "gpu") == phase(double, "claimless") == "Pending"


def test_pending_claims(make: Make) -> None:
    double, controller = make()
    controller.pend_claims(match="first-data", storage_class="longhorn")
    submit(double, "PyTorchJob", "pass", nodes=1)
    until(lambda: events(double, "first-data"))
    assert events(double, "first-data") == [("ProvisioningFailed", 'storageclass.storage.k8s.io "longhorn" not found')]
    told = until(lambda: events(double, "first-1-master-0"))
    assert "pod has unbound immediate PersistentVolumeClaims" in told[0][1]
    controller.heal()
    until(lambda: has(double, "PyTorchJob", "Succeeded"))


@pytest.mark.parametrize("kind", ["PyTorchJob", "TrainJob"])
def test_refused_pods_are_told_on_the_job(make: Make, kind: str) -> None:
    double, controller = make()
    controller.exceed_quota()
    submit(double, kind, "pass", nodes=1)
    about = "first-1" if kind == "PyTorchJob" else "first-1-node-0"
    failed = "FailedCreatePod" if kind == "PyTorchJob" else "FailedCreate"
    told = until(lambda: [m for r, m in events(double, about) if r == failed])
    assert "is forbidden: exceeded quota: kf-resource-quota, requested: requests.nvidia.com/gpu=1" in told[0]
    assert not pods(double)
    controller.heal()
    controller.enforce_pod_security()
    told = until(lambda: [m for r, m in events(double, about) if r == failed and "PodSecurity" in m])
    assert 'violates PodSecurity "restricted:latest"' in told[0]
    controller.heal()
    until(lambda: has(double, kind, "Succeeded" if kind == "PyTorchJob" else "Complete"))


def test_an_unknown_service_account_is_refused_as_a_cluster_does(make: Make) -> None:
    double, _ = make()
    job = manifests.pytorch_job(place(service_account="pipeline-runner"), "first-1", python("pass"))
    double.store.create(job)
    told = until(lambda: [m for r, m in events(double, "first-1") if r == "FailedCreatePod"])
    assert told[0].endswith(
        'error looking up service account team/pipeline-runner: serviceaccount "pipeline-runner" not found'
    )


def test_a_command_that_is_not_there_fails_to_start(make: Make) -> None:
    double, _ = make()
    pod = bare("lost", "")
    pod["spec"]["containers"][0]["command"] = ["no-such-command"]
    double.store.create(pod)
    until(lambda: phase(double, "lost") == "Failed")
    ended = state(double, "lost")["terminated"]
    assert (ended["exitCode"], ended["reason"]) == (128, "StartError")
    assert 'exec: "no-such-command": executable file not found in $PATH' in ended["message"]


# Mounts, logs, ends --------------------------------------------------------------------------------------------


def test_claims_secrets_and_variables_reach_the_process(make: Make, tmp_path: Path) -> None:
    double, _ = make(volumes={"first-models": tmp_path})
    for claim in manifests.claims(place()):
        double.store.create(claim)
    double.store.create(manifests.secret(place(), "wheel", {"a.whl": b"\x00wheel", "token": b"t0ken"}))
    code = """
        import os, pathlib, sys
        where = pathlib.Path(sys.argv[1])
        where.joinpath("out.txt").write_text(os.environ["TOKEN"] + os.environ["NAMES"] + os.environ["WHO"])
        where.joinpath("copy").write_bytes(pathlib.Path("/wheels/a.whl").read_bytes())
        where.joinpath("home").write_text(os.environ["HOME"] + "|" + os.environ["MODELS"])
    """
    pod = bare(
        "mounts",
        code,
        container={
            "args": ["/mnt/models/run"],
            "env": [
                {"name": "TOKEN", "valueFrom": {"secretKeyRef": {"name": "wheel", "key": "token"}}},
                {"name": "NAMES", "value": "-$(TOKEN)-$(NOBODY)-"},
                {"name": "WHO", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
                {"name": "HOME", "value": "/tmp"},
                {"name": "MODELS", "value": "--in=/mnt/models:/mnt/models-not/x"},
            ],
            "volumeMounts": [
                {"name": "models", "mountPath": "/mnt/models"},
                {"name": "wheels", "mountPath": "/wheels"},
                {"name": "tmp", "mountPath": "/tmp"},
            ],
        },
        volumes=[
            {"name": "models", "persistentVolumeClaim": {"claimName": "first-models"}},
            {"name": "wheels", "secret": {"secretName": "wheel"}},
            {"name": "tmp", "emptyDir": {}},
        ],
    )
    (tmp_path / "run").mkdir()
    double.store.create(pod)
    until(lambda: phase(double, "mounts") in ("Succeeded", "Failed"))
    assert phase(double, "mounts") == "Succeeded", log(double, pods(double)[0])
    assert (tmp_path / "run/out.txt").read_text() == "t0ken-t0ken-$(NOBODY)-mounts"
    assert (tmp_path / "run/copy").read_bytes() == b"\x00wheel"
    home, models = (tmp_path / "run/home").read_text().split("|")
    assert home != "/tmp"
    until(lambda: not Path(home).exists(), "the pod's own /tmp goes with it")
    assert models == f"--in={tmp_path}:/mnt/models-not/x"


def test_logs_are_followed_through_the_api(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    double, _ = make()
    monkeypatch.setenv("KUBECONFIG", str(double.kubeconfig(tmp_path / "kubeconfig")))
    api = Api.connect(Settings())
    api.create(bare("talker", "import time\nfor i in range(3): print('line', i, flush=True); time.sleep(0.3)"))
    until(lambda: phase(double, "talker") == "Running")
    assert [line.partition(" ")[2] for line in api.logs("talker")] == ["line 0", "line 1", "line 2"]
    until(lambda: phase(double, "talker") == "Succeeded")
    assert api.tail("talker", 1) == "line 2\n"


def test_deleting_a_pod_terminates_and_then_kills(make: Make, tmp_path: Path) -> None:
    double, controller = make(grace=1.5)
    # The child leaves its parent's process group; in a container that saves nobody.
    code = f"""
        import pathlib, signal, subprocess, sys, time
        child = subprocess.Popen(["sleep", "60"], start_new_session=True)
        def stop(*_):
            pathlib.Path({str(tmp_path / "saved")!r}).touch()
            if sys.argv[1:] == ["polite"]:
                sys.exit(143)
        signal.signal(signal.SIGTERM, stop)
        pathlib.Path({str(tmp_path)!r}, sys.argv[1]).write_text(str(child.pid))
        while True:
            time.sleep(0.05)
    """
    for name in ("polite", "stubborn"):
        double.store.create(bare(name, code, container={"args": [name]}))
        child = int(until(lambda name=name: (tmp_path / name).exists() and (tmp_path / name).read_text()))
        process = controller.processes("team", name)["main"]
        started = time.monotonic()
        double.store.delete("Pod", "team", name)
        assert double.store.get("Pod", "team", name)["metadata"]["deletionTimestamp"]  # type: ignore[index]
        until(lambda name=name: double.store.get("Pod", "team", name) is None)
        took = time.monotonic() - started
        assert took < 1.5 if name == "polite" else 1.5 < took < 4, took
        assert (tmp_path / "saved").exists()
        assert not alive(process) and not alive(child)
        assert ("Killing", "Stopping container main") in events(double, name)


def test_leaving_ends_every_process_and_removes_every_device() -> None:
    with Double("kubeflow-1.11", CRDS) as double:
        with Controller(double) as controller:
            submit(double, "TrainJob", "import time; time.sleep(60)")
            double.store.create(bare("host", "import time; time.sleep(60)"))
            until(lambda: [p["status"]["phase"] for p in pods(double)] == ["Running"] * 3)
            uids = list(controller.kubelet.instances)
            assert all(marked(uid) for uid in uids)
            tag = getattr(controller.network, "tag", "loopback")
        assert not any(marked(uid) for uid in uids)
        assert tag not in _devices()


def test_a_cluster_at_rest_is_quiet(make: Make) -> None:
    double, controller = make()
    controller.fail_image_pull(match="picture")
    submit(double, "PyTorchJob", "import time; time.sleep(60)", nodes=1)
    suspended = manifests.train_job(place(), "first-2", python("pass"))
    suspended["spec"]["suspend"] = True
    double.store.create(manifests.training_runtime(place(), "first-2"))
    for made in (suspended, manifests.train_job(place(), "lost", python("pass")), bare("picture", ""), service("one")):
        double.store.create(made)
    until(
        lambda: (
            has(double, "PyTorchJob", "Running")
            and is_ready(double)
            and has(double, "Job", "Suspended", "first-2-node-0")
        )
    )
    time.sleep(1)
    before = len(double.store.history)
    time.sleep(1.2)
    assert [(c.type, c.key) for c in double.store.history[before:]] == []


# Networks ------------------------------------------------------------------------------------------------------

isolated = pytest.mark.skipif(bool(network.why_not()), reason=network.why_not() or "permitted")


def _devices() -> str:
    listed = subprocess.run(["ip", "link"], capture_output=True, text=True, check=False).stdout
    listed += subprocess.run(["ip", "netns"], capture_output=True, text=True, check=False).stdout
    return listed + "".join(p.name for p in Path("/etc/netns").glob("*"))


@isolated
@pytest.mark.parametrize("kind", ["PyTorchJob", "TrainJob"])
def test_pods_are_on_hosts_of_their_own_and_find_the_master_by_name(make: Make, kind: str) -> None:
    double, _ = make(netns=True)
    submit(
        double,
        kind,
        """
        import os, socket, time
        rank = os.environ.get("RANK") or os.environ["PET_NODE_RANK"]
        name = os.environ.get("MASTER_ADDR") or os.environ["PET_MASTER_ADDR"]
        if rank == "0":
            private = socket.create_server(("127.0.0.1", 7001))
            shared = socket.create_server(("", 7002))
            peer, _ = shared.accept()
            print("own", socket.gethostbyname(socket.gethostname()), "peer", peer.getpeername()[0])
        else:
            while True:
                try:
                    there = socket.create_connection((name, 7002), 1)
                    break
                except OSError:
                    time.sleep(0.05)
            for address in ("127.0.0.1", name):
                try:
                    socket.create_connection((address, 7001), 1)
                    print("reached", address)
                except OSError:
                    print("unreachable")
            there.close()
        """,
    )
    until(lambda: has(double, kind, "Succeeded" if kind == "PyTorchJob" else "Complete"))
    first, second = pods(double)
    assert log(double, second).split() == ["unreachable"] * 2
    _, own, _, peer = log(double, first).split()
    assert own == first["status"]["podIP"] != second["status"]["podIP"] == peer


@isolated
def test_what_a_killed_test_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    pod = bare("left", "import time; time.sleep(60)")
    code = f"""
        import os, sys, time
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from double.controller import Controller
        from double.server import Double
        double = Double("kubeflow-1.11", {str(CRDS)!r})
        controller = Controller(double, netns=True).__enter__()
        pod = {pod!r}
        spec = {{"parallelism": 1, "template": {{"spec": pod["spec"]}}}}
        job = {{"apiVersion": "batch/v1", "kind": "Job", "metadata": {{"name": "job"}}, "spec": spec}}
        double.store.create(pod)
        double.store.create(job, "team")
        while sum(len(i.processes) for i in list(controller.kubelet.instances.values())) < 2:
            time.sleep(0.05)
        pids = [str(p.popen.pid) for i in controller.kubelet.instances.values() for p in i.processes.values()]
        print(controller.network.tag, *pids, flush=True)
        os.kill(os.getpid(), 9)
    """
    with (tmp_path / "out").open("w") as out:
        subprocess.run([sys.executable, "-c", textwrap.dedent(code)], stdout=out, stderr=out, check=False)
    tag, *left = (tmp_path / "out").read_text().split()
    assert tag in _devices()
    until(lambda: not any(alive(int(pid)) for pid in left), "killed with their test")
    mine = network.Bridge()
    try:
        assert tag not in _devices()
        other = network.Bridge()
        assert other.subnet != mine.subnet
        other.close()
        assert mine.tag in _devices()
    finally:
        mine.close()
    assert mine.tag not in _devices()


@pytest.mark.parametrize("netns", [pytest.param(True, marks=isolated), pytest.param(False, marks=pytest.mark.slow)])
def test_two_nodes_of_two_processes_reduce_together(make: Make, netns: bool, tmp_path: Path) -> None:
    double, _ = make(netns=netns, environment={"OMP_NUM_THREADS": "1"})
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import torch, torch.distributed as d\n"
        "d.init_process_group('gloo')\n"
        "x = torch.tensor([float(d.get_rank() + 1)])\n"
        "d.all_reduce(x)\n"
        "print(f'sum {x.item()} of {d.get_world_size()}\\n', end='', flush=True)\n"
        "d.destroy_process_group()\n"
    )
    where = place(job={"processes": 2})
    command = ["python", "-m", "torch.distributed.run", str(worker)]
    for made in (*manifests.claims(where), manifests.training_runtime(where, "first-1")):
        double.store.create(made)
    double.store.create(manifests.train_job(where, "first-1", command))
    until(lambda: has(double, "TrainJob", "Complete") or has(double, "TrainJob", "Failed"), timeout=90)
    text = "".join(log(double, pod) for pod in pods(double))
    assert text.count("sum 10.0 of 4") == 4, text


# InferenceService ----------------------------------------------------------------------------------------------

SERVER = """
import argparse, http.server, os, sys
p = argparse.ArgumentParser(); p.add_argument("--port", type=int); p.add_argument("--host")
p.add_argument("--http_port", type=int); p.add_argument("--model_name"); p.add_argument("--predictor_host")
a = p.parse_args()
class H(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = f"{TEXT} {a.model_name} {a.predictor_host}".encode()
        self.send_response(200); self.send_header("Content-Length", str(len(body))); self.end_headers()
        self.wfile.write(body)
    def log_message(self, *a): pass
http.server.ThreadingHTTPServer((a.host or "127.0.0.1", a.port), H).serve_forever()
"""


def service(text: str, **serving: Any) -> dict[str, Any]:
    made = manifests.inference_service(place(serving=serving))
    part = made["spec"].get("transformer") or made["spec"]["predictor"]
    part["containers"][0]["command"] = ["python", "-c", f"TEXT = {text!r}\n{SERVER}"]
    return made


def ask(url: str) -> str:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.read().decode().split()[0]
    except urllib.error.HTTPError as error:
        return str(error.code)


def status(double: Double) -> dict[str, Any]:
    return (double.store.get("InferenceService", "team", "skin-cancer-detection") or {}).get("status", {})


def is_ready(double: Double, value: str = "True") -> bool:
    return conditions(double, "InferenceService", "skin-cancer-detection").get("Ready", {}).get("status") == value


def change(double: Double, made: dict[str, Any]) -> None:
    found = double.store.get("InferenceService", "team", "skin-cancer-detection")
    double.store.update(found | {"spec": made["spec"]})  # type: ignore[operator]


@pytest.fixture
def served(tmp_path: Path) -> Callable[[Double], None]:
    """Give a double the claim that services read."""

    def give(double: Double) -> None:
        for claim in manifests.claims(place()):
            double.store.create(claim)

    return give


def test_a_service_is_served_and_replaced_without_a_gap(make: Make, served: Callable[[Double], None]) -> None:
    double, _ = make()
    served(double)
    double.store.create(service("one"))
    until(lambda: is_ready(double))
    url = status(double)["url"]
    assert ask(url) == "one"
    assert set(conditions(double, "InferenceService", "skin-cancer-detection")) >= {"PredictorReady", "IngressReady"}
    assert status(double)["address"]["url"] == url
    [pod] = pods(double)
    assert pod["metadata"]["labels"]["serving.kserve.io/inferenceservice"] == "skin-cancer-detection"
    change(double, service("two"))
    until(lambda: is_ready(double, "Unknown"))
    answers = set()
    while not is_ready(double):
        answers.add(ask(url))
    assert answers <= {"one", "two"}
    assert status(double)["url"] == url
    until(lambda: ask(url) == "two")
    until(lambda: len(pods(double)) == 1)
    # One that never gets ready leaves the old one at work.
    bad = service("three")
    bad["spec"]["predictor"]["containers"][0]["command"] = ["python", "-c", "raise SystemExit('no bundle')"]
    change(double, bad)
    until(lambda: status(double)["modelStatus"]["transitionStatus"] == "BlockedByFailedLoad")
    assert not is_ready(double)
    assert ask(url) == "two"
    double.store.delete("InferenceService", "team", "skin-cancer-detection")
    until(lambda: not pods(double))
    with pytest.raises(OSError):
        ask(url)


def test_kserve_0_11_calls_a_raw_service_ready_all_through_a_rollout(
    make: Make, served: Callable[[Double], None]
) -> None:
    double, _ = make("kubeflow-1.8")
    served(double)
    double.store.create(service("one"))
    until(lambda: is_ready(double))
    seen = set()
    double.store.subscribe(
        lambda _, o: (
            seen.update(c["status"] for c in o["status"]["conditions"] if c["type"] == "Ready")
            if o["kind"] == "InferenceService"
            else None
        )
    )
    change(double, service("two"))
    until(lambda: ask(status(double)["url"]) == "two")
    assert seen == {"True"}


def test_a_canary_gets_its_share_and_is_promoted_or_rolled_back(make: Make, served: Callable[[Double], None]) -> None:
    double, _ = make()
    served(double)
    double.store.create(service("one", mode="serverless", canary=20))
    until(lambda: is_ready(double))
    url = status(double)["url"]
    assert [t["percent"] for t in status(double)["components"]["predictor"]["traffic"]] == [100]
    change(double, service("two", mode="serverless", canary=20))
    until(lambda: is_ready(double) and len(status(double)["components"]["predictor"]["traffic"]) == 2)
    latest, previous = status(double)["components"]["predictor"]["traffic"]
    assert (latest["tag"], latest["percent"], previous["tag"], previous["percent"]) == ("latest", 20, "prev", 80)
    assert (ask(latest["url"]), ask(previous["url"])) == ("two", "one")
    answers = [ask(url) for _ in range(100)]
    assert (answers.count("two"), answers.count("one")) == (20, 80)
    rolled_back = service("two", mode="serverless")
    rolled_back["spec"]["predictor"]["canaryTrafficPercent"] = 0
    change(double, rolled_back)
    until(lambda: {ask(url) for _ in range(20)} == {"one"})
    change(double, service("two", mode="serverless"))
    until(lambda: {ask(url) for _ in range(20)} == {"two"})
    component = status(double)["components"]["predictor"]
    assert component["latestRolledoutRevision"] == "skin-cancer-detection-predictor-00002"
    assert component["previousRolledoutRevision"] == "skin-cancer-detection-predictor-00001"
    until(lambda: len(pods(double)) == 1)


def test_a_transformer_gets_kserves_arguments_and_needs_a_triton(make: Make, served: Callable[[Double], None]) -> None:
    double, _ = make()
    served(double)
    double.store.create(service("decoded", form="triton"))
    until(lambda: is_ready(double, "False"))
    assert "no Triton" in conditions(double, "InferenceService", "skin-cancer-detection")["Ready"]["message"]
    seen: list[str] = []

    def triton(repository: str, port: int) -> list[str]:
        seen.append(repository)
        return ["python", "-c", f"TEXT = {repository!r}\n{SERVER}", "--port", str(port)]

    with Double("kubeflow-1.11", CRDS) as other, Controller(other, triton_command=triton, netns=False) as controller:
        served(other)
        other.store.create(service("decoded", form="triton"))
        until(lambda: is_ready(other))
        with urllib.request.urlopen(status(other)["url"], timeout=5) as response:
            text, name, host = response.read().decode().split()
        assert (text, name) == ("decoded", "skin-cancer-detection")
        folder = controller.claim("team", "first-models")
        assert ask(f"http://{host}") == f"{folder}/runs/first/serving/triton"
    assert seen == ["/mnt/models"]
