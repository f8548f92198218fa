"""Cleaning up removes everything of a run, whatever state it was left in, and nothing else."""

from __future__ import annotations

import random
import threading
import time

import pytest
from double.controller import Controller

from lesionflow.cluster import clean as cleaning
from lesionflow.cluster import jobs, manifests, watch
from lesionflow.cluster.api import KINDS, Api
from lesionflow.cluster.clean import Found, clean
from lesionflow.cluster.settings import Place, Settings
from lesionflow.errors import ClusterError

SETTINGS = Settings.from_dict({"job": {"retries": 1}, "volumes": {"data_claim": "theirs"}})
CLAIM = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}}}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(cleaning, "POLL", 0.05)
    monkeypatch.setattr(watch, "POLL", 0.1)


def objects_of(place, launcher="trainjob"):
    """Everything a run makes, in the order in which it does."""
    command = ["python", "-c", "import time; time.sleep(60)"]
    name = place.job_name("a" * 32)
    job = [manifests.pytorch_job(place, name, command)]
    if launcher == "trainjob":
        job = [manifests.training_runtime(place, name), manifests.train_job(place, name, command)]
    return [
        *manifests.claims(place),
        manifests.secret(place, place.wheel_secret, {"wheel": b"zip"}),
        manifests.network_policy(place),
        *job,
        manifests.tensorboard(place),
        manifests.inference_service(place, name=f"{place.name}-service"),
    ]


def bystanders(store):
    """Other people's objects, as like ours as can be."""
    labels = manifests.labels("first")
    almost = [
        {manifests.RUN: "first"},
        {manifests.MANAGED_BY: "helm", manifests.RUN: "first"},
        {"lesionflow/part": "train"},
        {manifests.MANAGED_BY: "lesionflow-operator"},
        {},
    ]
    made = []
    for number, their in enumerate(almost):
        for version, kind, body in (
            ("v1", "ConfigMap", {"data": {"a": "b"}}),
            ("v1", "Secret", {"data": {"a": "Yg=="}}),
            ("v1", "PersistentVolumeClaim", {"spec": CLAIM}),
            ("v1", "Pod", {"spec": {"containers": [{"name": "node", "image": "x"}], "nodeName": "node-1"}}),
        ):
            metadata = {"name": f"first-{kind.lower()}-{number}", "labels": their}
            made.append(store.create({"apiVersion": version, "kind": kind, "metadata": metadata, **body}, "team"))
    theirs = {"metadata": {"name": "theirs"}, "apiVersion": "v1", "kind": "PersistentVolumeClaim", "spec": CLAIM}
    made.append(store.create(theirs, "team"))
    # The same labels, but in a namespace that isn't ours to clean.
    elsewhere = {"metadata": {"name": "first-map", "labels": labels}, "apiVersion": "v1", "kind": "ConfigMap"}
    made.append(store.create(elsewhere, "default"))
    return [(o["kind"], o["metadata"]["namespace"], o["metadata"]["name"]) for o in made]


def snapshot(store, keys):
    """These objects without what controllers may change about them."""
    seen = []
    for obj in (store.get(*key) for key in keys):
        metadata = {k: v for k, v in obj["metadata"].items() if k not in ("resourceVersion", "managedFields")}
        seen.append({k: v for k, v in obj.items() if k != "status"} | {"metadata": metadata})
    return seen


def everything(store):
    """Whatever is in the namespace, with our label or without, events aside."""
    return {(kind, o["metadata"]["name"]) for kind in store.kinds for o in store.list(kind, "team") if kind != "Event"}


def ours(store):
    """Every object with our label in the namespace, of whatever kind the cluster has."""
    return [
        (kind, obj["metadata"]["name"])
        for kind in store.kinds
        for obj in store.list(kind, "team", manifests.selector())
    ]


class Interrupted(Exception):
    pass


class Failing:
    """An API that stops answering after a number of writes."""

    def __init__(self, api, writes):
        self._api, self._left = api, writes

    def __getattr__(self, name):
        found = getattr(self._api, name)
        if name not in ("create", "apply", "delete"):
            return found

        def write(*arguments, **options):
            self._left -= 1
            if self._left < 0:
                raise Interrupted
            return found(*arguments, **options)

        return write


@pytest.mark.parametrize("double", ["kubeflow-1.8", "kubeflow-1.11"], indirect=True)
def test_runs_that_were_interrupted_anywhere_leave_nothing_and_bystanders_everything(double, api):
    launcher = jobs.launcher(api, SETTINGS)
    with Controller(double, netns=False, grace=1.0) as controller:
        others = bystanders(double.store)
        before = snapshot(double.store, others)
        kept = Place("kept", SETTINGS)
        for obj in manifests.claims(kept):
            api.create(obj)
        there = everything(double.store)
        for seed in range(10) if launcher == "trainjob" else range(10, 20):
            draw = random.Random(seed)
            place = Place("first", SETTINGS)
            made = objects_of(place, launcher)
            stop = draw.randrange(1, len(made) + 4)
            failing = Failing(api, stop)
            try:
                for obj in made:
                    failing.create(obj)
                time.sleep(draw.choice([0.0, 0.1, 0.5]))
                clean(failing, "first", remove=True)
            except Interrupted:
                pass
            time.sleep(draw.choice([0.0, 0.05, 0.2]))
            found = clean(api, "first", remove=True)
            assert all(f.removed and f.run == "first" for f in found)
            assert {name.partition("-")[0] for _, name in ours(double.store)} <= {"kept"}, seed
            assert clean(api, "first", remove=True) == [], "a second time there is nothing"
            # What operators made of ours, without our label: the garbage collector takes a moment.
            api.wait(lambda: everything(double.store) == there, timeout=5, what="collecting what was owned", every=0.05)
        assert snapshot(double.store, others) == before
        assert len(clean(api, "kept")) == 2
        assert controller.errors == []


def test_listing_changes_nothing(double, api):
    place = Place("first", SETTINGS)
    made = [api.create(obj) for obj in objects_of(place)]
    version = double.store.version
    found = clean(api, "first")
    assert sorted((f.kind, f.name) for f in found) == sorted((o["kind"], o["metadata"]["name"]) for o in made)
    assert not any(f.removed for f in found) and double.store.version == version
    assert clean(api, "fir") == [] == clean(api, "first-data")


def test_the_kaggle_secret_goes_with_everything_only(double, api):
    place = Place("first", SETTINGS)
    api.create(manifests.secret(place, "kaggle", {"key": b"x"}, of_run=False))
    api.create(manifests.network_policy(place))
    assert clean(api, "first", remove=True) == [Found("NetworkPolicy", "first-train", "first", True)]
    assert clean(api, remove=True) == [Found("Secret", "kaggle", "", True)]
    assert ours(double.store) == []


@pytest.mark.parametrize("double", ["kubeflow-1.8"], indirect=True)
def test_kinds_that_the_cluster_lacks_or_forbids_are_passed_over(double, api, caplog):
    assert not api.serves("TrainJob")
    double.faults["deny"] = {("list", "deployments"), ("list", "configmaps")}
    api.create(manifests.network_policy(Place("first", SETTINGS)))
    assert [f.kind for f in clean(api, "first", remove=True)] == ["NetworkPolicy"]
    assert "ConfigMap: left aside" in caplog.text
    double.faults["status"] = 500
    with pytest.raises(ClusterError, match="500"):
        clean(api, "first", remove=True)


def test_what_cannot_go_is_named_with_what_holds_it(double, api):
    place = Place("first", SETTINGS)
    for obj in manifests.claims(place):
        api.create(obj)
    volume = {"name": "v", "persistentVolumeClaim": {"claimName": "first-models"}}
    spec = {"containers": [{"name": "notebook", "image": "x"}], "volumes": [volume]}
    notebook = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "notebook-0"}, "spec": spec}
    double.store.create(notebook, "team")
    double.store.set_status("Pod", "team", "notebook-0", {"phase": "Running"})
    with pytest.raises(ClusterError) as caught:
        clean(api, "first", remove=True, timeout=0.5)
    text = str(caught.value)
    assert "PersistentVolumeClaim first-models is held by kubernetes.io/pvc-protection" in text
    assert "mounted by notebook-0" in text and "first-logs" not in text
    double.store.delete("Pod", "team", "notebook-0")
    clean(api, "first", remove=True, timeout=5)
    assert ours(double.store) == []


def test_a_server_that_ignores_selectors_costs_nobody_anything(double, api, monkeypatch):
    others = bystanders(double.store)
    before = snapshot(double.store, others)
    whole = Api.list
    monkeypatch.setattr(Api, "list", lambda self, kind, labels="", fields="": whole(self, kind))
    api.create(manifests.network_policy(Place("second", SETTINGS)))
    api.create(manifests.network_policy(Place("first", SETTINGS)))
    assert [f.name for f in clean(api, "first", remove=True)] == ["first-train"]
    assert snapshot(double.store, others) == before


def test_a_job_in_the_middle_of_training_goes_with_its_pods(double, api):
    place = Place("first", SETTINGS)
    with Controller(double, netns=False, grace=1.0):
        errors, up = [], threading.Event()

        def tell(line):
            if line == "[node-0] up":
                up.set()

        def train():
            try:
                jobs.train(api, place, "a" * 32, ["python", "-uc", "print('up');import time;time.sleep(60)"], tell=tell)
            except ClusterError as error:
                errors.append(str(error))

        for obj in manifests.claims(place):
            api.create(obj)
        double.store.create(
            {"metadata": {"name": "theirs"}, "apiVersion": "v1", "kind": "PersistentVolumeClaim", "spec": CLAIM}, "team"
        )
        thread = threading.Thread(target=train)
        thread.start()
        assert up.wait(20)
        kinds = {f.kind for f in clean(api, "first", remove=True)}
        thread.join(10)
        assert {"TrainJob", "TrainingRuntime", "Pod", "NetworkPolicy", "PersistentVolumeClaim"} <= kinds
        assert len(errors) == 1 and "was deleted" in errors[0]
        assert ours(double.store) == [] and double.store.get("PersistentVolumeClaim", "team", "theirs")


def test_every_kind_we_make_is_looked_for():
    made = {obj["kind"] for launcher in ("trainjob", "pytorchjob") for obj in objects_of(Place("first"), launcher)}
    looked_for = {kind for kinds in cleaning.ORDER for kind in kinds}
    assert made <= looked_for <= set(KINDS)
