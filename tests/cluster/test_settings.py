"""Settings say where a run lies; what they refuse, they refuse by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from lesionflow.cluster import jobstate
from lesionflow.cluster.addresses import pods_port
from lesionflow.cluster.settings import Place, Settings, parse_selector, parse_tolerations
from lesionflow.errors import ClusterError, UsageError


def test_a_file_and_overrides_make_settings_that_survive_toml(tmp_path: Path) -> None:
    (tmp_path / "cluster.toml").write_text('namespace = "team"\n[job]\nnodes = 3\n')
    settings = Settings.load(tmp_path / "cluster.toml", ["job.gpus=1", "volumes.storage_class=longhorn"])
    assert (settings.namespace, settings.job.nodes, settings.job.gpus) == ("team", 3, 1)
    (tmp_path / "again.toml").write_text(settings.to_toml())
    assert Settings.load(tmp_path / "again.toml") == settings


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("job.nodes=0", "job.nodes"),
        ("job.nods=2", "job.nods"),
        ("job.memory=lots", "job.memory"),
        ("job.launcher=mpi", "pytorchjob"),
        ("volumes.mount=data", "absolute"),
        ("volumes.access=ReadOnly", "volumes.access"),
        ("job.tolerations=gpu", "NoSchedule"),
        ("job.node_selector=gpu", "key=value"),
        ("serving.name=Skin_Cancer", "serving.name"),
        ("image.index=https://user:secret@host/simple", "image.index carries a login"),
        ("kfp=http://user:secret@host", "kfp carries a login"),
        ("nonsense", "--on"),
    ],
)
def test_what_cannot_be_is_refused_by_name(override: str, word: str) -> None:
    with pytest.raises(UsageError, match=word) as refused:
        Settings.load(None, [override])
    assert "secret" not in str(refused.value)


def test_selectors_and_tolerations_become_kubernetes_own() -> None:
    assert parse_selector("a=b, pool=gpu") == {"a": "b", "pool": "gpu"}
    assert parse_tolerations("gpu=yes:NoSchedule,spot:NoExecute") == [
        {"key": "gpu", "operator": "Equal", "value": "yes", "effect": "NoSchedule"},
        {"key": "spot", "operator": "Exists", "effect": "NoExecute"},
    ]


def test_names_and_paths() -> None:
    for wrong in ("First", "1st", "a_b", "x" * 31, ""):
        with pytest.raises(UsageError, match="run name"):
            Place(wrong)
    shared = Place("first", Settings.load(None, ["volumes.data_claim=isic", "image.packaged=true"]))
    assert (shared.claim("data"), shared.claim("models"), shared.python) == ("isic", "first-models", "python")


def test_another_code_or_image_gets_another_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Place("first").environment
    assert Place("second").environment == here, "runs share it"
    assert Place("first", Settings.load(None, ["image.train=other:1"])).environment != here
    monkeypatch.setattr("lesionflow.cluster.settings.code_version", lambda rooms: "another")
    assert Place("first").environment != here


def test_a_webhook_that_has_not_seen_the_runtime_yet_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow:
        asked = 0

        def create(self, job: dict) -> dict:
            self.asked += 1
            if self.asked < 3:
                raise ClusterError("denied: TrainingRuntime must be created before the TrainJob is created")
            return {"made": job}

    monkeypatch.setattr(jobstate.time, "sleep", lambda seconds: None)
    api = Slow()
    assert jobstate.create_job(api, {"kind": "TrainJob"}) == {"made": {"kind": "TrainJob"}}
    assert api.asked == 3

    class Refusing:
        def create(self, job: dict) -> dict:
            raise ClusterError("exceeded quota")

    with pytest.raises(ClusterError, match="quota"):
        jobstate.create_job(Refusing(), {})


def test_headless_services_are_asked_at_the_pods_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    assert pods_port("http://skin.team.svc.cluster.local") is None, "from outside the ingress answers"
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    assert pods_port("http://skin.team.svc.cluster.local") == "http://skin.team.svc.cluster.local:8080"
    assert pods_port("http://skin.team.svc.cluster.local:80") is None
