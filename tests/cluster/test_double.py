"""The API server double, seen through the clients it has to satisfy: kubectl, the Python client, and ours."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from double.answers import Refused, timestamp
from double.schemas import examine, quantity
from double.server import Double

from lesionflow.cluster import manifests
from lesionflow.cluster.api import Api
from lesionflow.cluster.settings import Place
from lesionflow.errors import ClusterError

Object = dict[str, Any]


def pod(name: str, **labels: str) -> Object:
    spec = {"containers": [{"name": "main", "image": "busybox", "command": ["true"]}]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": labels}, "spec": spec}


def config_map(name: str, **data: str) -> Object:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": data}


def train_job(name: str, **trainer: Any) -> Object:
    spec = {"runtimeRef": {"name": "torch-distributed"}, "trainer": {"numNodes": 2, **trainer}}
    return {"apiVersion": "trainer.kubeflow.org/v1alpha1", "kind": "TrainJob", "metadata": {"name": name}, "spec": spec}


def condition(type_: str) -> Object:
    return {"type": type_, "status": "True", "reason": type_, "message": "", "lastTransitionTime": timestamp()}


def owned(obj: Object, owner: Object) -> Object:
    reference = {"apiVersion": owner["apiVersion"], "kind": owner["kind"], "name": owner["metadata"]["name"]}
    obj["metadata"]["ownerReferences"] = [{**reference, "uid": owner["metadata"]["uid"], "controller": True}]
    return obj


def running(double: Double, name: str, **state: Any) -> None:
    """Mark a pod's container as running, or as the given state says."""
    container = {"name": "main", "image": "busybox", "imageID": "", "ready": not state, "restartCount": 0}
    phase = "Succeeded" if "terminated" in state else "Running"
    statuses = [{**container, "state": state or {"running": {}}}]
    double.store.set_status("Pod", "team", name, {"phase": phase, "containerStatuses": statuses})


# --- Schemas


@pytest.mark.parametrize(
    ("schema", "value", "told"),
    [
        ({"type": "integer"}, "2", 'spec: Invalid value: "string": spec in body must be of type integer'),
        ({"type": "integer", "format": "int32"}, 2**31, "int32"),
        ({"type": "integer"}, True, "must be of type integer"),
        ({"type": "string", "enum": ["a", "b"]}, "c", 'spec: Unsupported value: "c": supported values: "a", "b"'),
        ({"type": "string", "pattern": "^a+$"}, "ab", "should match"),
        ({"type": "string", "minLength": 2}, "a", "at least 2 chars"),
        ({"type": "string", "format": "date-time"}, "yesterday", "must be a time"),
        ({"type": "string", "format": "byte"}, "?", "base64"),
        ({"type": "integer", "minimum": 1}, 0, "greater than or equal to 1"),
        ({"type": "integer", "maximum": 1}, 2, "less than or equal to 1"),
        ({"type": "array", "minItems": 1}, [], "at least 1 items"),
        ({"type": "array", "maxItems": 1}, [1, 2], "at most 1 items"),
        ({"type": "array", "items": {"type": "string"}}, ["a", 1], "spec[1]: "),
        ({"type": "array", "x-kubernetes-list-type": "set"}, ["a", "a"], 'spec[1]: Duplicate value: "a"'),
        (
            {"type": "array", "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
            [{"name": "a"}, {"name": "a"}],
            "spec[1]: Duplicate value",
        ),
        ({"type": "object", "required": ["a"]}, {}, "spec.a: Required value"),
        ({"type": "object", "properties": {"a": {"type": "string"}}}, {"a": None}, "spec.a: Invalid value: null"),
        ({"type": "object", "additionalProperties": {"type": "string"}}, {"x/y": 1}, "spec[x/y]: "),
        ({"x-kubernetes-int-or-string": True}, 1.5, "integer or string"),
        ({"not": {"required": ["a"]}}, {"a": 1}, "must not validate"),
        ({"oneOf": [{"required": ["a"]}, {"required": ["b"]}]}, {"a": 1, "b": 1}, "one and only one"),
    ],
)
def test_a_schema_names_each_fault(schema: Object, value: Any, told: str) -> None:
    assert told in "; ".join(map(str, examine(schema, value, "spec").faults))


def test_a_schema_prunes_and_fills_in_defaults() -> None:
    item = {"type": "object", "properties": {"n": {"type": "integer", "default": 3}, "s": {"type": "string"}}}
    found = examine(
        {"type": "object", "properties": {"l": {"type": "array", "items": item}}}, {"l": [{"x": 1}], "y": 2}
    )
    assert (found.value, found.unknown, found.faults) == ({"l": [{"n": 3}]}, ["y", "l[0].x"], [])


def test_what_never_changes_may_not_change(double: Double, api: Api) -> None:
    """The plainest CEL rules: immutable fields, one of a few values, a name's form."""
    runtime = manifests.training_runtime(Place("first"), "first")
    api.apply(runtime)
    runtime["spec"]["template"]["spec"]["failurePolicy"]["maxRestarts"] = 1
    with pytest.raises(ClusterError, match=r"spec.template.spec.failurePolicy: Invalid value: .*immutable"):
        api.apply(runtime)
    api.create(train_job("first"))
    with pytest.raises(ClusterError, match=r"spec.runtimeRef: Invalid value: .*immutable"):
        api.patch("TrainJob", "first", {"spec": {"runtimeRef": {"name": "other"}}})
    with pytest.raises(ClusterError, match=r"spec.managedBy: Invalid value"):
        api.create({**train_job("second"), "spec": {"runtimeRef": {"name": "x"}, "managedBy": "nobody"}})
    with pytest.raises(ClusterError, match="RFC 1035"):
        api.create(train_job("1st"))


@pytest.mark.parametrize(
    ("text", "amount"), [("500m", 0.5), ("2Gi", 2.0**31), ("1e3", 1000.0), ("1k", 1000.0), (4, 4.0)]
)
def test_quantities(text: str | int, amount: float) -> None:
    assert quantity(text) == amount


# --- The store's own rules


def test_objects_have_identity_versions_and_generations(double: Double) -> None:
    store = double.store
    made = store.create(train_job("first"), "team")
    assert made["metadata"]["generation"] == 1
    assert store.update(made)["metadata"]["resourceVersion"] == made["metadata"]["resourceVersion"], "nothing changed"
    changed = store.update({**made, "spec": {**made["spec"], "suspend": True}})
    assert changed["metadata"]["generation"] == 2
    assert int(changed["metadata"]["resourceVersion"]) > int(made["metadata"]["resourceVersion"])
    with pytest.raises(Refused, match="the object has been modified"):
        store.update({**made, "metadata": {**made["metadata"], "labels": {"a": "b"}}})
    with pytest.raises(Refused, match="already exists"):
        store.create(train_job("first"), "team")
    with pytest.raises(Refused, match='namespaces "elsewhere" not found'):
        store.create(train_job("first"), "elsewhere")


def test_a_deleted_owner_takes_what_it_owns_along(double: Double) -> None:
    store = double.store
    told: list[tuple[str, str]] = []
    store.subscribe(lambda type, obj: told.append((type, obj["metadata"]["name"])))
    job = store.create(train_job("first"), "team")
    middle = store.create(owned(config_map("middle"), job), "team")
    store.create(owned(pod("leaf"), middle), "team")
    assert store.delete("TrainJob", "team", "first")
    assert not store.list("Pod", "team")
    assert [name for type, name in told if type == "DELETED"] == ["leaf", "middle", "first"]
    store.create(owned(pod("late"), middle), "team")
    assert not store.get("Pod", "team", "late"), "an orphan of a dead owner is collected"


def test_a_controller_may_hold_a_pod_until_it_has_stopped(double: Double) -> None:
    store = double.store
    store.held.add("Pod")
    store.create(pod("first"), "team")
    store.delete("Pod", "team", "first")
    assert store.get("Pod", "team", "first")["metadata"]["deletionTimestamp"]  # type: ignore[index]
    store.finalize("Pod", "team", "first")
    assert store.get("Pod", "team", "first") is None


def test_a_claim_in_use_stays_until_its_pod_is_gone(double: Double) -> None:
    store = double.store
    spec = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}}}
    claim = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "data"}, "spec": spec}
    assert store.create(claim, "team")["spec"]["storageClassName"] == "longhorn"
    user = pod("user")
    user["spec"]["volumes"] = [{"name": "d", "persistentVolumeClaim": {"claimName": "data"}}]
    store.create(user, "team")
    store.delete("PersistentVolumeClaim", "team", "data")
    assert store.get("PersistentVolumeClaim", "team", "data") is not None
    store.delete("Pod", "team", "user")
    assert store.get("PersistentVolumeClaim", "team", "data") is None


def test_core_objects_have_limits_of_their_own(api: Api) -> None:
    claim = manifests.claims(Place("first"))[0]
    api.create(claim)
    for change, told in (
        ({"accessModes": ["ReadWriteOnce"]}, "spec is immutable after creation"),
        ({"resources": {"requests": {"storage": "1Gi"}}}, "can not be less than"),
    ):
        with pytest.raises(ClusterError, match=told):
            api.apply({**claim, "spec": {**claim["spec"], **change}})
    larger = {**claim["spec"], "resources": {"requests": {"storage": "9Gi"}}}
    assert api.apply({**claim, "spec": larger})["spec"]["resources"]["requests"]["storage"] == "9Gi"
    manifest = manifests.secret(Place("first"), "wheel", {"wheel": b"x" * (2**20 + 1)})
    with pytest.raises(ClusterError, match="data: Too long"):
        api.create(manifest)
    made = api.create(pod("first", a="b", c="d"))
    with pytest.raises(ClusterError, match="pod updates may not change"):
        api.patch("Pod", "first", {"spec": {"restartPolicy": "Never"}})
    assert api.patch("Pod", "first", {"metadata": {"labels": {"a": None}}})["metadata"]["labels"] == {"c": "d"}
    assert made["status"]["phase"] == "Pending"


def test_a_quota_is_kept_to(double: Double) -> None:
    hard = {"pods": "1", "requests.cpu": "1"}
    quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "kf"}, "spec": {"hard": hard}}
    double.store.create(quota, "team")
    with pytest.raises(Refused, match=r"failed quota: kf: must specify requests.cpu for: main"):
        double.store.create(pod("none"), "team")
    one = pod("one")
    one["spec"]["containers"][0]["resources"] = {"requests": {"cpu": "500m"}}
    double.store.create(one, "team")
    two = {**one, "metadata": {"name": "two"}}
    told = 'pods "two" is forbidden: exceeded quota: kf, requested: pods=1, used: pods=1, limited: pods=1'
    with pytest.raises(Refused, match=told):
        double.store.create(two, "team")


def test_restricted_namespaces_refuse_other_pods(double: Double) -> None:
    space = double.store.get("Namespace", None, "team")
    assert space
    space["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] = "restricted"
    double.store.update(space)
    with pytest.raises(Refused, match=r'violates PodSecurity "restricted:latest": .*runAsNonRoot=true'):
        double.store.create(pod("root"), "team")


# --- lesionflow's own client


def test_apply_takes_back_what_it_no_longer_says(api: Api, double: Double) -> None:
    job = train_job("first", env=[{"name": "A", "value": "1"}, {"name": "B", "value": "2"}], image="old")
    api.apply(job)
    other = api.get("TrainJob", "first")
    assert other
    other["spec"]["suspend"] = True
    other["metadata"]["labels"] = {"kueue": "yes"}
    double.store.update(other)
    job = train_job("first", env=[{"name": "B", "value": "3"}])
    made = api.apply(job)
    assert made["spec"]["trainer"] == {"numNodes": 2, "env": [{"name": "B", "value": "3"}]}
    assert made["spec"]["suspend"] is True, "what others set stays"
    assert made["metadata"]["labels"] == {"kueue": "yes"}
    again = api.apply(job)
    assert again["metadata"]["resourceVersion"] == made["metadata"]["resourceVersion"]


def test_what_two_appliers_say_stays_until_both_take_it_back(double: Double) -> None:
    store, labelled = double.store, {"metadata": {"name": "first", "labels": {"a": "b"}}}
    whole, bare = train_job("first") | labelled, train_job("first")
    store.apply(whole, "team", "one", force=False)
    store.apply(whole, "team", "two", force=False)
    assert store.apply(bare, "team", "one", force=False)[0]["metadata"]["labels"] == {"a": "b"}
    assert "labels" not in store.apply(bare, "team", "two", force=False)[0]["metadata"]


def test_only_the_status_subresource_writes_a_status(api: Api, double: Double) -> None:
    done = {"conditions": [condition("Complete")]}
    api.create({**train_job("first"), "status": done})
    api.patch("TrainJob", "first", {"status": done, "spec": {"suspend": True}})
    job = api.get("TrainJob", "first")
    assert job
    assert (job.get("status"), job["spec"]["suspend"]) == (None, True)
    api.patch("TrainJob", "first/status", {"status": done, "spec": {"suspend": False}})
    job = api.get("TrainJob", "first")
    assert job
    assert (job["status"], job["spec"]["suspend"]) == (done, True)
    with pytest.raises(Refused, match="unknown field"):
        double.store.set_status("TrainJob", "team", "first", {"phase": "Done"})


def test_dry_run_stores_nothing(api: Api) -> None:
    assert api.apply(train_job("first"), dry_run=True)["metadata"]["uid"]
    assert api.create(train_job("first"), dry_run=True)["metadata"]["uid"]
    assert api.get("TrainJob", "first") is None


def test_unknown_fields_are_refused_by_path(api: Api) -> None:
    with pytest.raises(ClusterError, match=r'unknown field "spec.trainer.numNode"'):
        api.apply(train_job("first", numNode=2))


def test_planted_faults(api: Api, double: Double) -> None:
    faults = double.faults
    faults["deny"] = {("create", "trainjobs"), ("get", "pods/log")}
    assert not api.allowed("create", "TrainJob")
    assert api.allowed("delete", "TrainJob")
    with pytest.raises(ClusterError, match=r"not allowed \(403\): trainjobs.trainer.kubeflow.org is forbidden: User"):
        api.create(train_job("first"))
    faults.clear()
    faults["missing_kinds"] = {"TrainJob"}
    assert not api.serves("TrainJob")
    assert api.serves("TrainingRuntime")
    assert api.list("TrainJob") == []
    faults.clear()
    faults["quota"] = {"pods": "exceeded quota: kf, requested: pods=1, used: pods=9, limited: pods=9"}
    with pytest.raises(ClusterError, match="over the namespace's quota"):
        api.create(pod("first"))
    for status, told in ((401, "log in again"), (500, "answered 500"), ({("list", "pods"): 503}, "answered 503")):
        faults.clear()
        faults["status"] = status
        with pytest.raises(ClusterError, match=told):
            api.list("Pod")
    faults.clear()
    faults["delay"] = 0.3
    began = time.monotonic()
    api.version()
    assert time.monotonic() - began >= 0.3


def test_logs_are_followed_to_the_end(api: Api, double: Double) -> None:
    api.create(pod("first"))
    with pytest.raises(ClusterError, match="does not have a host assigned"):
        list(api.logs("first"))
    running(double, "first")
    log = double.store.log_path("team", "first", "main")

    def write() -> None:
        with log.open("a") as file:
            for i in range(3):
                print(f"line {i}", file=file, flush=True)
                time.sleep(0.1)
        running(double, "first", terminated={"exitCode": 0})

    log.touch()
    writer = threading.Thread(target=write)
    writer.start()
    lines = list(api.logs("first"))
    writer.join()
    assert [line.partition(" ")[2] for line in lines] == ["line 0", "line 1", "line 2"]
    stamps = [line.partition(" ")[0] for line in lines]
    assert stamps == sorted(stamps)
    assert len(set(stamps)) == 3, "lines have the times they were written"
    assert api.tail("first", 1).strip() == "line 2"
    double.store.rotate_log("team", "first", "main")
    log.write_text("after\n")
    assert api.tail("first").strip() == "after"
    assert api.tail("first", previous=True).splitlines()[0] == "line 0"


def test_logs_come_in_whole_lines_and_from_a_second_on(api: Api, double: Double) -> None:
    api.create(pod("first"))
    log = double.store.log_path("team", "first", "main")
    log.write_text("one\n")
    running(double, "first")
    lines = api.logs("first")
    began, _, text = next(lines).partition(" ")
    assert text == "one"
    with log.open("a") as file:
        file.write("half a ")
        file.flush()
        time.sleep(0.3)
        file.write("line\n")
    running(double, "first", terminated={"exitCode": 0})
    assert [line.partition(" ")[2] for line in lines] == ["half a line"]
    # As a kubelet does: what was written in the second that is asked for comes again.
    assert next(api.logs("first", since=began)).partition(" ")[2] == "one"
    double.faults["cut_logs"] = 1
    with pytest.raises(Exception, match=r"IncompleteRead|Connection broken|InvalidChunkLength|ended prematurely"):
        list(api.logs("first"))
    with pytest.raises(ClusterError, match="container other is not valid for pod first"):
        next(api.logs("first", container="other"))


# --- The Python client


@pytest.fixture
def python_client(double: Double, tmp_path: Path) -> Any:
    from kubernetes import config

    return config.new_client_from_config(str(double.kubeconfig(tmp_path / "python")))


def test_the_python_client_reads_and_writes(double: Double, python_client: Any) -> None:
    from kubernetes import client

    core, custom = client.CoreV1Api(python_client), client.CustomObjectsApi(python_client)
    assert [n.metadata.name for n in core.list_node().items] == ["node-1"]
    core.create_namespaced_config_map(
        "team", client.V1ConfigMap(metadata=client.V1ObjectMeta(name="c"), data={"a": "b"})
    )
    core.patch_namespaced_config_map("c", "team", {"data": {"c": "d"}})
    assert core.read_namespaced_config_map("c", "team").data == {"a": "b", "c": "d"}
    patch = [{"op": "remove", "path": "/data/a"}]
    assert core.patch_namespaced_config_map("c", "team", patch).data == {"c": "d"}
    where = ("trainer.kubeflow.org", "v1alpha1", "team", "trainjobs")
    custom.create_namespaced_custom_object(*where, train_job("first"))
    # Sends a JSON patch header for a merge patch body, as its users know; other versions of it don't.
    changed = custom.patch_namespaced_custom_object(*where, "first", {"spec": {"suspend": True}})
    assert changed["spec"]["suspend"] is True
    status = {"conditions": [condition("Complete")]}
    custom.patch_namespaced_custom_object_status(*where, "first", {"status": status})
    assert custom.get_namespaced_custom_object(*where, "first")["status"] == status
    with pytest.raises(client.ApiException) as caught:
        custom.create_namespaced_custom_object(*where, train_job("first"))
    assert (caught.value.status, json.loads(caught.value.body)["reason"]) == (409, "AlreadyExists")
    core.create_namespaced_pod("team", pod("first", run="a"))
    core.create_namespaced_pod("team", pod("second", run="b"))
    listed = core.list_namespaced_pod("team", label_selector="run in (b, c),!x", field_selector="status.phase=Pending")
    assert [p.metadata.name for p in listed.items] == ["second"]
    with pytest.raises(client.ApiException, match="409"):
        core.delete_namespaced_pod("first", "team", body={"preconditions": {"uid": "another"}})
    core.delete_collection_namespaced_pod("team", label_selector="run=b")
    assert [p["metadata"]["name"] for p in double.store.list("Pod", "team")] == ["first"]


def test_the_python_client_watches(double: Double, python_client: Any) -> None:
    from kubernetes import client, watch

    core, store = client.CoreV1Api(python_client), double.store
    store.create(pod("before", run="a"), "team")
    version = core.list_namespaced_pod("team").metadata.resource_version

    def act() -> None:
        store.create(pod("after", run="a"), "team")
        store.create(pod("other", run="b"), "team")
        running(double, "after")
        gone = store.get("Pod", "team", "before")
        assert gone
        store.update({**gone, "metadata": {**gone["metadata"], "labels": {"run": "b"}}})
        store.delete("Pod", "team", "after")

    threading.Timer(0.2, act).start()
    seen = []
    stream = watch.Watch()
    for event in stream.stream(
        core.list_namespaced_pod, "team", label_selector="run=a", resource_version=version, timeout_seconds=5
    ):
        seen.append((event["type"], event["object"].metadata.name))
        if seen[-1] == ("DELETED", "after"):
            stream.stop()
    assert seen == [("ADDED", "after"), ("MODIFIED", "after"), ("DELETED", "before"), ("DELETED", "after")]


def test_fields_may_be_lost_with_a_warning(double: Double) -> None:
    import urllib3

    body = json.dumps(train_job("first", numNode=2))
    url = f"{double.url}/apis/trainer.kubeflow.org/v1alpha1/namespaces/team/trainjobs/?fieldValidation="
    head = {"Content-Type": "application/json"}
    for mode, code, warned in (("Warn", 201, True), ("Ignore", 409, False), ("Strict", 400, False), ("", 400, False)):
        answer = urllib3.request("POST", url + mode, body=body, headers=head)
        assert (answer.status, "spec.trainer.numNode" in answer.headers.get("Warning", "")) == (code, warned), mode


# --- kubectl

Kubectl = Callable[..., str]


@pytest.fixture
def kubectl(double: Double, tmp_path: Path) -> Kubectl:
    program = shutil.which("kubectl")
    if program is None:
        pytest.skip("kubectl is not installed")
    environment = {
        "HOME": str(tmp_path),
        "KUBECONFIG": str(double.kubeconfig(tmp_path / "kubectl")),
        "PATH": os.environ["PATH"],
    }

    def call(*arguments: str, stdin: Any = None, fails: bool = False) -> str:
        text = "\n---\n".join(map(yaml.safe_dump, stdin)) if stdin else None
        done = subprocess.run(
            [program, *arguments], input=text, env=environment, capture_output=True, text=True, timeout=30, check=False
        )
        assert bool(done.returncode) == fails, done.stdout + done.stderr
        return done.stdout + done.stderr

    return call


def test_kubectl_applies_and_shows(kubectl: Kubectl) -> None:
    first = [train_job("first"), config_map("c", a="b")]
    assert "created" in kubectl("apply", "-f", "-", stdin=first)
    assert kubectl("apply", "-f", "-", stdin=first).count("unchanged") == 2
    told = kubectl("apply", "-f", "-", stdin=[train_job("first", numNodes=3), config_map("c", c="d")])
    assert told.count("configured") == 2
    assert yaml.safe_load(kubectl("get", "trainjob", "first", "-o", "yaml"))["spec"]["trainer"]["numNodes"] == 3
    assert yaml.safe_load(kubectl("get", "cm", "c", "-o", "yaml"))["data"] == {"c": "d"}
    assert 'unknown field "spec.trainer.numNode"' in kubectl(
        "apply", "-f", "-", stdin=[train_job("x", numNode=1)], fails=True
    )
    told = kubectl("create", "--dry-run=server", "-f", "-", stdin=[train_job("second")])
    assert "created (server dry run)" in told
    assert kubectl("get", "trainjobs").split()[:4] == ["NAME", "STATE", "AGE", "first"]
    assert "second" not in kubectl("get", "trainjobs")
    assert "first" in kubectl("get", "trainjobs,cm", "-A")


def test_kubectl_applies_on_the_server(kubectl: Kubectl) -> None:
    assert "serverside-applied" in kubectl("apply", "--server-side", "-f", "-", stdin=[train_job("first")])
    other = ["apply", "--server-side", "--field-manager=other", "-f", "-"]
    told = kubectl(*other, stdin=[train_job("first", numNodes=3)], fails=True)
    assert 'conflict with "kubectl"' in told or 'conflicts with "kubectl": .spec.trainer.numNodes' in told
    kubectl(*other, "--force-conflicts", stdin=[train_job("first", numNodes=3)])
    assert kubectl("get", "trainjob", "first", "-o", "jsonpath={.spec.trainer.numNodes}") == "3"


def test_kubectl_waits_reads_logs_and_deletes(kubectl: Kubectl, double: Double) -> None:
    kubectl("create", "-f", "-", stdin=[pod("first"), train_job("first")])
    running(double, "first")
    log = double.store.log_path("team", "first", "main")
    log.write_text("hello\n")

    def act() -> None:
        double.store.set_status("TrainJob", "team", "first", {"conditions": [condition("Complete")]})
        with log.open("a") as file:
            file.write("world\n")
        running(double, "first", terminated={"exitCode": 0})

    double.store.event(double.store.get("Pod", "team", "first") or {}, "Pulled", "image was there")
    threading.Timer(1, act).start()
    assert "condition met" in kubectl("wait", "--for=condition=Complete", "trainjob/first", "--timeout=10s")
    assert kubectl("logs", "-f", "first") == "hello\nworld\n"
    assert kubectl("logs", "first", "--tail=1", "--timestamps").endswith("Z world\n")
    assert "image was there" in kubectl("describe", "pod", "first")
    assert "pod/first" in kubectl("get", "all", "-o", "name")
    assert "deleted" in kubectl("delete", "pod/first", "trainjob/first")
    assert "NotFound" in kubectl("get", "pod", "first", fails=True)


def test_kubectl_patches_and_asks(kubectl: Kubectl, double: Double) -> None:
    kubectl("create", "secret", "generic", "token", "--from-literal=key=value")
    stored = double.store.get("Secret", "team", "token")
    assert stored
    assert stored["data"] == {"key": base64.b64encode(b"value").decode()}
    kubectl("create", "-f", "-", stdin=[train_job("first")])
    kubectl("patch", "trainjob", "first", "--type=merge", "-p", '{"spec":{"suspend":true}}')
    kubectl("label", "trainjob", "first", "team=a")
    assert kubectl("get", "trainjobs", "-l", "team=a", "-o", "jsonpath={.items[*].spec.suspend}") == "true"
    assert kubectl("auth", "can-i", "create", "trainjobs").strip() == "yes"
    double.faults["deny"] = {("create", "trainjobs")}
    assert kubectl("auth", "can-i", "create", "trainjobs", fails=True).startswith("no")
    assert "v1.33" in kubectl("version")
    assert "pytorchjobs" in kubectl("api-resources")
