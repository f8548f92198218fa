"""Services on the double: KServe's objects, statuses and traffic, with real lesionflow processes behind them."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from double.controller import Controller

from lesionflow import steps
from lesionflow.bundle import Bundle, write_manifest
from lesionflow.cluster import addresses, manifests, services, staging
from lesionflow.cluster.settings import Place, Settings
from lesionflow.errors import ClusterError, DataError, GateRefused

KIND = "InferenceService"
# Stands in for Triton: a second lesionflow service on the bundle beside the repository, which takes the same pixels
# under the same name. A real Triton reads such a repository in tests/export/test_triton.py.
STAND_IN = """
import sys
from pathlib import Path
from lesionflow.serving.app import serve
repository = Path(sys.argv[1])
assert (repository / "tiny/config.pbtxt").is_file() and (repository / "tiny/1/model.onnx").is_file()
serve(repository.parent / "bundle", port=int(sys.argv[2]), threads=1)
"""


def make_place(name="first", **serving) -> Place:
    volumes = {"models_claim": "shared-models"}
    return Place(name, Settings.from_dict({"volumes": volumes, "serving": {"timeout": 60, **serving}}))


@pytest.fixture
def models(tmp_path) -> Path:
    """The models volume."""
    return tmp_path / "models"


@pytest.fixture
def cluster(double, api, models):
    """The controller; the claim that both runs share is there."""

    def triton(repository: str, port: int) -> list[str]:
        return [sys.executable, "-c", STAND_IN, repository, str(port)]

    claim = manifests.claims(Place("shared"))[2]
    with Controller(double, {"shared-models": models}, grace=1, triton_command=triton) as controller:
        api.create(claim)
        yield controller


@pytest.fixture
def begin(bundle_dir, models):
    """Make a run whose bundle is the tiny one with its own card, and so its own version."""

    def run(name: str) -> Path:
        folder = models / "runs" / name
        shutil.copytree(bundle_dir, folder / "bundle")
        (folder / "bundle/MODEL_CARD.md").write_text(f"the model of {name}")
        write_manifest(folder / "bundle")
        return folder

    return run


def version(run: Path) -> str:
    return Bundle.open(run / "bundle").version


def served(api, name="skin-cancer-detection") -> str | None:
    """The bundle that answers at the service's address, asked often enough to meet both sides of a split."""
    found = {addresses.served_bundle(addresses.service_url(api.get(KIND, name)), "tiny")[0] for _ in range(20)}
    return found.pop() if len(found) == 1 else None


def spoil(run: Path) -> None:
    """Change the run's stored answers, so that no service can reproduce them."""
    path = run / "bundle/reference/answers.json"
    stored = json.loads(path.read_text())
    stored["answers"][0]["logit"] += 1
    path.write_text(json.dumps(stored))
    write_manifest(run / "bundle")


def watch_shares(store) -> list[tuple[str, int | None]]:
    """The (run, canaryTrafficPercent) that the service's specs take from now on, filled as it happens."""
    seen: list[tuple[str, int | None]] = []
    generations = {o["metadata"]["generation"] for o in store.list(KIND, "team")}

    def changed(kind, obj):
        if obj["kind"] == KIND and kind == "MODIFIED" and obj["metadata"]["generation"] not in generations:
            generations.add(obj["metadata"]["generation"])
            environment = obj["spec"]["predictor"]["containers"][0]["env"]
            uri = next(e["value"] for e in environment if e["name"] == "STORAGE_URI")
            seen.append((uri.split("/runs/")[1].split("/")[0], obj["spec"]["predictor"].get("canaryTrafficPercent")))

    store.subscribe(changed)
    return seen


@pytest.mark.parametrize("double", ["kubeflow-1.8", "kubeflow-1.11"], indirect=True)
def test_raw_a_proven_candidate_replaces_the_service(cluster, api, begin):
    one, two = begin("first"), begin("second")
    told: list[str] = []
    deployed = services.deploy(api, make_place(), one, tell=told.append)
    assert (deployed["way"], deployed["outcome"], deployed["mode"]) == ("first", None, "raw")
    assert json.loads((one / "deploy.json").read_text()) == deployed
    assert version(one) in told[0]
    assert steps.smoke(one, deployed["url"])["max_abs"] < 1e-4
    assert services.settle(api, make_place(), one, True)["outcome"] == "promoted"

    place = make_place("second")
    deployed = services.deploy(api, place, two, tell=told.append)
    assert (deployed["way"], deployed["candidate"]) == ("candidate", "skin-cancer-detection-candidate")
    assert steps.smoke(two, deployed["url"])["max_abs"] < 1e-4
    assert served(api) == version(one)
    settled = services.settle(api, place, two, True)
    assert settled["outcome"] == "promoted"
    assert settled["url"] == addresses.service_url(api.get(KIND, "skin-cancer-detection")) != deployed["url"]
    assert served(api) == version(two)
    assert api.get(KIND, deployed["candidate"]) is None
    assert services.settle(api, place, two, False) == settled, "settled once is settled"
    before = api.get(KIND, "skin-cancer-detection")["metadata"]["generation"]
    assert services.deploy(api, place, two)["way"] == "same"
    assert api.get(KIND, "skin-cancer-detection")["metadata"]["generation"] == before


def test_raw_a_refused_candidate_leaves_the_service_alone(cluster, api, begin):
    one, two = begin("first"), begin("second")
    services.deploy(api, make_place(), one)
    services.settle(api, make_place(), one, True)
    before = api.get(KIND, "skin-cancer-detection")
    place = make_place("second")
    deployed = services.deploy(api, place, two)
    spoil(two)
    with pytest.raises(GateRefused):
        steps.smoke(two, deployed["url"])
    settled = services.settle(api, place, two, False)
    assert settled["outcome"] == "rolled back"
    assert api.get(KIND, "skin-cancer-detection-candidate") is None
    assert api.get(KIND, "skin-cancer-detection")["spec"] == before["spec"]
    assert served(api) == version(one)
    assert steps.smoke(one, settled["url"])["max_abs"] < 1e-4
    assert list((two / "serving").iterdir()) == [], "the refused version takes no room"
    assert services.undeploy(api, place) == [], "the service is the other run's"
    assert services.undeploy(api, make_place()) == ["skin-cancer-detection"]
    assert api.get(KIND, "skin-cancer-detection") is None


@pytest.mark.parametrize("passed", [True, False], ids=["promoted", "rolled back"])
def test_serverless_a_canary_gets_its_share_until_it_is_settled(cluster, double, api, begin, passed):
    one, two = begin("first"), begin("second")
    options = {"mode": "serverless", "canary": 30}
    first, second = make_place(**options), make_place("second", **options)
    assert services.deploy(api, first, one)["way"] == "first"
    services.settle(api, first, one, True)
    before = api.get(KIND, "skin-cancer-detection")
    assert "canaryTrafficPercent" not in before["spec"]["predictor"]

    deployed = services.deploy(api, second, two)
    assert (deployed["way"], deployed["canary"]) == ("canary", 30)
    live = api.get(KIND, "skin-cancer-detection")
    assert {t["percent"]: t["latestRevision"] for t in live["status"]["components"]["predictor"]["traffic"]} == {
        30: True,
        70: False,
    }
    assert addresses.served_bundle(deployed["url"], "tiny")[0] == version(two)
    assert served(api) is None, "both answer at the service's own address"
    if not passed:
        spoil(two)
        with pytest.raises(GateRefused):
            steps.smoke(two, deployed["url"])
    expected = version(two if passed else one)
    shares = watch_shares(double.store)
    settled = services.settle(api, second, two, passed)
    assert settled["outcome"] == ("promoted" if passed else "rolled back")
    # Back over 0: without it, Knative would give all traffic to the refused revision until the restored one is ready.
    assert shares == ([("second", None)] if passed else [("first", 0), ("first", None)])
    after = api.get(KIND, "skin-cancer-detection")
    assert "canaryTrafficPercent" not in after["spec"]["predictor"]
    assert served(api) == expected
    if not passed:
        assert after["spec"] == before["spec"]
        assert after["metadata"]["labels"][manifests.RUN] == "first"
        assert steps.smoke(one, settled["url"])["max_abs"] < 1e-4


def test_triton_with_a_stand_in_behind_our_transformer(cluster, api, begin):
    one = begin("first")
    place = make_place(form="triton")
    deployed = services.deploy(api, place, one)
    assert deployed["form"] == "triton"
    pods = api.list("Pod", "serving.kserve.io/inferenceservice=skin-cancer-detection")
    assert sorted(p["metadata"]["labels"]["component"] for p in pods) == ["predictor", "transformer"]
    assert steps.smoke(one, deployed["url"])["max_abs"] < 1e-4
    assert services.settle(api, place, one, True)["outcome"] == "promoted"


def test_a_first_model_that_fails_is_removed(cluster, api, begin):
    one = begin("first")
    deployed = services.deploy(api, make_place(), one)
    spoil(one)
    with pytest.raises(GateRefused):
        steps.smoke(one, deployed["url"])
    assert services.settle(api, make_place(), one, False)["outcome"] == "removed"
    assert api.get(KIND, "skin-cancer-detection") is None


def test_a_service_that_never_gets_ready_is_named_with_its_cause(cluster, api, begin, monkeypatch):
    monkeypatch.setattr(services, "PATIENCE", 0.5)
    one, two = begin("first"), begin("second")
    services.deploy(api, make_place(), one)
    cluster.fail_image_pull(match="candidate")
    told: list[str] = []
    with pytest.raises(ClusterError, match=r"-candidate: not ready after 4 s: .*pull"):
        services.deploy(api, make_place("second", timeout=4), two, tell=told.append)
    assert any("waiting" in line and "pull" in line for line in told)
    assert api.get(KIND, "skin-cancer-detection-candidate") is None
    assert not (two / "deploy.json").exists()
    cluster.heal()

    # A container that ends by itself is named with its own last words, long before the time is up.
    folder = staging.stage(make_place("second"), two)
    monkeypatch.setattr(services, "stage", lambda place, run: folder)
    real = Bundle.open
    monkeypatch.setattr(services.Bundle, "open", lambda path, verify=True: real(path, verify=False))
    (folder / "bundle/MODEL_CARD.md").write_text("tampered with")
    with pytest.raises(ClusterError, match=r"ModelLoadFailed: .*MODEL_CARD.md: changed"):
        services.deploy(api, make_place("second"), two)
    assert served(api) == version(one)


def test_a_canary_that_never_gets_ready_is_taken_back(cluster, api, begin):
    one, two = begin("first"), begin("second")
    options = {"mode": "serverless", "canary": 30}
    services.deploy(api, make_place(**options), one)
    services.settle(api, make_place(**options), one, True)
    before = api.get(KIND, "skin-cancer-detection")["spec"]
    cluster.fail_image_pull(match="predictor-00002")
    with pytest.raises(ClusterError, match="pull"):
        services.deploy(api, make_place("second", **options, **{"timeout": 4}), two)
    assert api.get(KIND, "skin-cancer-detection")["spec"] == before
    assert served(api) == version(one)


def test_somebody_elses_service_is_not_touched(api, begin):
    foreign = manifests.inference_service(make_place())
    foreign["metadata"]["labels"] = {}
    api.create(foreign)
    with pytest.raises(ClusterError, match="choose another serving"):
        services.deploy(api, make_place(), begin("first"))


def test_a_name_that_does_not_resolve_here_says_where_to_run(api, begin, monkeypatch):
    """Ready, but only for those inside: KServe's public name leads nowhere from this machine."""
    monkeypatch.setattr(services, "REACH", 0.5)
    place, run = make_place(), begin("first")
    double_status = {
        "conditions": [{"type": "Ready", "status": "True"}],
        "url": "http://skin-cancer-detection-team.invalid",
    }
    real = api.get
    monkeypatch.setattr(api, "get", lambda kind, name: (o := real(kind, name)) and {**o, "status": double_status})
    api.create(services._wanted(place, staging.stage(place, run).name, "x"))
    with pytest.raises(ClusterError, match=r"can't be reached from here.*inside the cluster"):
        services.deploy(api, place, run)


def test_nothing_deployed_is_an_error(api, tmp_path):
    with pytest.raises(DataError, match=r"no deploy\.json"):
        services.settle(api, make_place(), tmp_path, True)


def test_staging_is_complete_or_not_there(begin, tmp_path, models):
    run = begin("first")
    place = Place("first", Settings.from_dict({"volumes": {"mount": str(tmp_path)}, "serving": {"form": "triton"}}))
    packages = Path(place.environment) / "lib/python3.11/site-packages"
    (packages / "lesionflow-1.dist-info").mkdir(parents=True)
    (packages / "lesionflow-1.dist-info/RECORD").write_text("a")
    (packages / "lesionflow.py").write_text("")
    folder = staging.stage(place, run)
    assert folder.parent == run / "serving"
    assert sorted(p.name for p in folder.iterdir()) == ["bundle", "packages", "triton"]
    assert (folder / "packages/lesionflow.py").stat().st_ino == (packages / "lesionflow.py").stat().st_ino
    assert (folder / "triton/tiny/config.pbtxt").is_file()
    assert folder.stat().st_mode & 0o055 == 0o055
    inode = folder.stat().st_ino
    assert staging.stage(place, run).stat().st_ino == inode, "what is there and verifies stays"
    (folder / "bundle/MODEL_CARD.md").write_text("tampered with")
    assert staging.stage(place, run) == folder
    assert "tampered" not in (folder / "bundle/MODEL_CARD.md").read_text()
    (packages / "lesionflow-1.dist-info/RECORD").write_text("b")
    assert staging.stage(place, run) != folder, "another wheel is another version"
    spoil(run)
    (run / "bundle/MODEL_CARD.md").write_text("tampered with")
    with pytest.raises(DataError, match="MODEL_CARD"):
        staging.stage(place, run)
    assert not [p for p in (run / "serving").iterdir() if p.name.startswith(".")]


def test_addresses_inside_and_outside(monkeypatch):
    status = {
        "url": "https://gateway.example.com/serving/team/skin/",
        "address": {"url": "http://skin.team.svc.cluster.local/v1/models/skin:predict"},
        "components": {
            "predictor": {
                "latestCreatedRevision": "skin-predictor-00002",
                "latestReadyRevision": "skin-predictor-00002",
                "address": {"url": "http://skin-predictor.team.svc.cluster.local"},
                "traffic": [
                    {"latestRevision": True, "percent": 9, "tag": "latest", "url": "http://latest-skin.example.com"},
                    {"latestRevision": False, "percent": 91, "tag": "prev", "url": "http://prev-skin.example.com"},
                ],
            }
        },
    }
    live = {"status": status}
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    assert addresses.service_url(live) == "https://gateway.example.com/serving/team/skin"
    assert addresses.revision_url(live) == "http://latest-skin.example.com"
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    assert addresses.service_url(live) == "http://skin.team.svc.cluster.local"
    assert addresses.revision_url(live) == "http://latest-skin-predictor.team.svc.cluster.local"
    status["components"]["predictor"]["latestCreatedRevision"] = "skin-predictor-00003"
    assert addresses.revision_url(live) is None
    assert addresses.service_url({}) is None
