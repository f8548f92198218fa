"""Every usual cause of a pod's trouble is named in one line, with what to do about it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
from double.server import Double

from lesionflow.cluster import manifests
from lesionflow.cluster.api import Api
from lesionflow.cluster.explain import LONG, SLOW, SOON, explain, find_causes, pulling
from lesionflow.cluster.settings import Place, Settings

PLACE = Place("first", Settings.from_dict({"job": {"memory": "8Gi"}}))
NAMES = (f"first-abc-worker-{n}" for n in itertools.count())


@dataclass
class Cluster:
    double: Double
    api: Api


@pytest.fixture(scope="module")
def cluster(crds, tmp_path_factory):
    """One API server for all, without anything that would touch its pods."""
    with Double("kubeflow-1.11", crds) as double, pytest.MonkeyPatch.context() as patch:
        patch.setenv("KUBECONFIG", str(double.kubeconfig(tmp_path_factory.mktemp("explain") / "kubeconfig")))
        yield Cluster(double, Api.connect(Settings()))


@pytest.fixture
def put(cluster):
    """Put a pod with a hand-set status (and events: reason, message) on the cluster and return it."""
    made = []

    def put(status, *events, name=None):
        template = manifests.pytorch_job(PLACE, "x", ["python"])["spec"]["pytorchReplicaSpecs"]["Master"]["template"]
        metadata = {**template["metadata"], "name": name or next(NAMES)}
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}
        pod = cluster.double.store.create(pod, "team")
        for reason, message in events:
            cluster.double.store.event(pod, reason, message, "Warning")
        made.append(pod)
        return cluster.double.store.set_status("Pod", "team", pod["metadata"]["name"], status)

    yield put
    for pod in made:
        cluster.double.store.delete("Pod", "team", pod["metadata"]["name"])


def container(**state):
    return {"name": "pytorch", "image": "registry/train:1", "imageID": "", "ready": False, "restartCount": 0} | {
        "state": state
    }


def waiting(reason, message=""):
    return {"phase": "Pending", "containerStatuses": [container(waiting={"reason": reason, "message": message})]}


def ended(code, reason="Error", message=""):
    state = {"exitCode": code, "reason": reason, "message": message}
    return {"phase": "Failed", "containerStatuses": [container(terminated=state)]}


def unscheduled(message):
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
    return {"phase": "Pending", "conditions": [condition]}


def disrupted(reason, message):
    condition = {"type": "DisruptionTarget", "status": "True", "reason": reason, "message": message}
    return {"phase": "Failed", "conditions": [condition]}


BACK_OFF = 'Back-off pulling image "registry/train:1"'
PULL = 'Failed to pull image "registry/train:1": rpc error: code = '
PENDING = {"phase": "Pending"}
# Status, events, words the line must have, how long it may last.
CAUSES = {
    "misspelt image": (
        waiting("ErrImagePull", 'rpc error: code = NotFound desc = "registry/train:1": not found'),
        [],
        ["there is no image registry/train:1", "image.train"],
        SOON,
    ),
    "misspelt image, told earlier": (
        waiting("ImagePullBackOff", BACK_OFF),
        [("Failed", PULL + "NotFound desc = failed to resolve: not found"), ("BackOff", BACK_OFF)],
        ["there is no image registry/train:1", "failed to resolve"],
        SOON,
    ),
    "no image name": (
        waiting("InvalidImageName", "Failed to apply default image tag: couldn't parse image name: invalid reference"),
        [],
        ["there is no image", "image.train"],
        SOON,
    ),
    "private image": (
        waiting("ErrImagePull", "failed to authorize: 401 Unauthorized"),
        [],
        ["isn't given to this cluster", "image.pull_secret"],
        SOON,
    ),
    "pull limit": (
        waiting("ImagePullBackOff", BACK_OFF),
        [("Failed", PULL + "Unknown desc = toomanyrequests: You have reached your pull rate limit")],
        ["limits pulls", "pull_secret"],
        SLOW,
    ),
    "registry away": (
        waiting("ErrImagePull", "dial tcp: lookup registry: i/o timeout"),
        [],
        ["can't be pulled", "i/o timeout", "reach the registry"],
        SLOW,
    ),
    "no GPU": (
        unscheduled(
            "0/5 nodes are available: 1 node(s) had untolerated taint {node-role: }, 4 Insufficient nvidia.com/gpu. "
            "preemption: 0/5 nodes are available: 5 No preemption victims found."
        ),
        [],
        ["0/5 nodes are available", "4 Insufficient nvidia.com/gpu", "job.gpus", "taint"],
        LONG,
    ),
    "no CPU and memory": (
        unscheduled("0/2 nodes are available: 1 Insufficient cpu, 2 Insufficient memory."),
        [],
        ["1 Insufficient cpu, 2 Insufficient memory", "lower job.cpu and lower job.memory"],
        LONG,
    ),
    "tainted": (
        unscheduled("0/2 nodes are available: 2 node(s) had untolerated taint {gpu: true}."),
        [],
        ["2 node(s)", "job.tolerations"],
        LONG,
    ),
    "selector": (
        unscheduled("0/2 nodes are available: 2 node(s) didn't match Pod's node affinity/selector."),
        [],
        ["2 node(s)", "job.node_selector"],
        LONG,
    ),
    "unscheduled, by event only": (
        PENDING,
        [("FailedScheduling", "0/1 nodes are available: 1 Insufficient cpu.")],
        ["1 Insufficient cpu", "job.cpu"],
        LONG,
    ),
    "volume elsewhere": (
        unscheduled("0/2 nodes are available: 2 node(s) had volume node affinity conflict."),
        [],
        ["another node or zone"],
        LONG,
    ),
    "no claim": (
        unscheduled('0/2 nodes are available: persistentvolumeclaim "first-data" not found.'),
        [],
        ["claim first-data doesn't exist", "volumes"],
        SOON,
    ),
    "multi-attach": (
        PENDING,
        [("FailedAttachVolume", 'Multi-Attach error for volume "pvc-1" Volume is already used by pod(s) other')],
        ["in use on another node", "ReadWriteMany"],
        SLOW,
    ),
    "broken storage": (
        PENDING,
        [("FailedMount", 'MountVolume.MountDevice failed for volume "pvc-1": rpc error: deadline')],
        ["can't be mounted", "storage"],
        SLOW,
    ),
    "no wheel": (
        PENDING,
        [("FailedMount", 'MountVolume.SetUp failed for volume "wheel" : secret "first-wheel" not found')],
        ['secret "first-wheel" not found', "pipeline"],
        SOON,
    ),
    "no token": (
        waiting("CreateContainerConfigError", 'secret "kaggle" not found'),
        [],
        ['secret "kaggle" not found', "lesionflow cluster secret"],
        SOON,
    ),
    "no config map": (
        waiting("CreateContainerConfigError", 'configmap "settings" not found'),
        [],
        ['configmap "settings" not found'],
        SOON,
    ),
    "root image": (
        waiting("CreateContainerConfigError", "container has runAsNonRoot and image will run as root"),
        [],
        ["runs as root", "`user`"],
        SOON,
    ),
    "no network": (
        PENDING,
        [("FailedCreatePodSandBox", "plugin type calico failed: connection refused")],
        ["sandbox", "node's network"],
        SLOW,
    ),
    "no program": (
        ended(128, "StartError", 'exec: "python": executable file not found in $PATH'),
        [],
        ["can't start", "image.train"],
        SOON,
    ),
    "no environment": (
        ended(128, "StartError", "exec: /mnt/lesionflow/models/environments/ab/bin/python: no such file or directory"),
        [],
        ["can't start", "install step"],
        SOON,
    ),
    "exit 127": (ended(127, message="sh: lesionflow: not found"), [], ["not found", "image.train"], SOON),
    "no lesionflow": (
        ended(1, message="/opt/conda/bin/python: No module named lesionflow"),
        [],
        ["has no lesionflow", "deploy/"],
        SOON,
    ),
    "out of memory": (ended(137, "OOMKilled"), [], ["out of memory (limit 8Gi)", "job.memory"], SOON),
    "out of shared memory": (
        ended(1, message="DataLoader worker is killed. insufficient shared memory (shm)"),
        [],
        ["/dev/shm", "job.shm"],
        SOON,
    ),
    "evicted": (
        {"phase": "Failed", "reason": "Evicted", "message": "The node was low on resource: ephemeral-storage."},
        [],
        ["evicted", "disk space"],
        SOON,
    ),
    "deadline": (
        {"phase": "Failed", "reason": "DeadlineExceeded", "message": "Pod was active on the node longer than ..."},
        [],
        ["deadline", "job.deadline"],
        SOON,
    ),
    "refused by its node": (
        {"phase": "Failed", "reason": "UnexpectedAdmissionError", "message": "Allocate failed due to no GPU"},
        [],
        ["refused it", "run again"],
        SOON,
    ),
    "pushed aside": (disrupted("PreemptionByScheduler", "preempting"), [], ["disrupted", "job.priority_class"], SLOW),
    "lost node": (disrupted("DeletionByPodGC", "node not found"), [], ["node is lost", "kubectl get nodes"], SLOW),
    "sidecar": (
        {
            "phase": "Running",
            "containerStatuses": [
                container(terminated={"exitCode": 0}),
                container(running={}) | {"name": "istio-proxy"},
            ],
        },
        [],
        ["istio-proxy keeps the pod alive", "istio = false"],
        SOON,
    ),
    "crash loop": (
        {
            "phase": "Running",
            "containerStatuses": [
                container(waiting={"reason": "CrashLoopBackOff"}) | {"lastState": {"terminated": {"exitCode": 9}}}
            ],
        },
        [],
        ["crashes again", "exit code 9"],
        SOON,
    ),
}


@pytest.mark.parametrize("name", CAUSES)
def test_a_pods_cause_is_one_line_with_a_remedy(cluster, put, name):
    status, events, words, patience = CAUSES[name]
    pod = put(status, *events)
    text = explain(cluster.api, [pod])
    assert text.startswith(f"{pod['metadata']['name']}: ") and "\n" not in text
    for word in words:
        assert word in text, text
    assert [cause.patience for cause in find_causes(cluster.api, [pod])] == [patience]


REFUSALS = {
    'pods "x" is forbidden: exceeded quota: kf, requested: cpu=2, used: cpu=7, limited: cpu=8': (
        "requested: cpu=2, used: cpu=7, limited: cpu=8",
        "job.cpu",
    ),
    'pods "x" is forbidden: violates PodSecurity "restricted:latest": runAsNonRoot != true': ("PodSecurity", "level"),
    'pods "x" is forbidden: error looking up service account team/me: serviceaccount "me" not found': (
        'serviceaccount "me" not found',
        "service_account",
    ),
    'pods "x" is forbidden: maximum memory usage per Container is 2Gi, but limit is 8Gi': ("2Gi", "LimitRange"),
    'pods "x" is forbidden: failed quota: kf: must specify limits.cpu': ("must specify", "LimitRange"),
    'pods "x" is forbidden: no PriorityClass with name fast was found': ("fast", "job.priority_class"),
    'admission webhook "validate.kyverno.svc-fail" denied the request: image not signed': ("not signed", "policy"),
}


@pytest.mark.parametrize("message", REFUSALS)
def test_pods_that_were_never_made_are_explained_by_their_owner(cluster, message):
    job = manifests.pytorch_job(PLACE, "first-abc", ["python"])
    old = cluster.double.store.create(job, "team")
    cluster.double.store.event(old, "FailedCreatePod", "Error creating: an older job's trouble", "Warning")
    cluster.double.store.delete("PyTorchJob", "team", "first-abc")
    job = cluster.double.store.create(job, "team")
    try:
        assert explain(cluster.api, [], [job]) == "", "the events of an earlier job of that name aren't this one's"
        cluster.double.store.event(job, "FailedCreatePod", f"Error creating: {message}", "Warning")
        text = explain(cluster.api, [], [job])
        assert text.startswith("first-abc: ") and "\n" not in text
        for word in REFUSALS[message]:
            assert word in text, text
    finally:
        cluster.double.store.delete("PyTorchJob", "team", "first-abc")


def test_a_pending_claim_quotes_its_provisioner(cluster, put):
    claim = next(c for c in manifests.claims(PLACE) if c["metadata"]["name"] == "first-data")
    claim = cluster.double.store.create(claim, "team")
    said = 'storageclass.storage.k8s.io "fast" not found'
    cluster.double.store.event(claim, "ProvisioningFailed", said, "Warning")
    pod = put(unscheduled("0/1 nodes are available: pod has unbound immediate PersistentVolumeClaims."))
    text = explain(cluster.api, [pod])
    assert "claim first-data is pending" in text and said in text and "volumes.storage_class" in text
    assert "ReadWriteOnce" in text


def test_what_is_well_or_speaks_for_itself_has_no_cause(cluster, put):
    running = {"phase": "Running", "containerStatuses": [container(running={}) | {"ready": True}]}
    starting = waiting("ContainerCreating")
    refused = ended(3, message="error: row 7 has no age")
    pods = [put(status) for status in (running, starting, refused, PENDING, ended(0, "Completed"))]
    assert explain(cluster.api, pods) == ""


def test_a_long_pull_is_no_trouble_but_told(cluster, put):
    pod = put(waiting("ContainerCreating"), ("Pulling", 'Pulling image "registry/train:1"'))
    assert pulling(cluster.api, pod) == "registry/train:1" and explain(cluster.api, [pod]) == ""
    assert pulling(cluster.api, put(waiting("ContainerCreating"))) == ""
    assert pulling(cluster.api, put({"phase": "Running", "containerStatuses": [container(running={})]})) == ""


def test_the_same_cause_of_many_pods_is_told_once(cluster, put):
    pods = [put(unscheduled("0/1 nodes are available: 1 Insufficient cpu.")) for _ in range(3)]
    text = explain(cluster.api, pods)
    assert "\n" not in text and all(pod["metadata"]["name"] in text for pod in pods)
