"""The API server double as fixtures, for whatever talks to a cluster."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from double.server import Double

from lesionflow.cluster.api import Api
from lesionflow.cluster.settings import Settings


@pytest.fixture(scope="session")
def crds() -> Path:
    """The folder of upstream CRDs (LESIONFLOW_CRDS, by default ../shared/crds); skips where there is none."""
    default = Path(__file__).resolve().parents[3] / "shared" / "crds"
    path = Path(os.environ.get("LESIONFLOW_CRDS", default))
    if not (path / "kf-1.11").is_dir():
        pytest.skip(f"no CRDs in {path}: set LESIONFLOW_CRDS to a folder of them")
    return path


@pytest.fixture(scope="session", autouse=True)
def quick_compiler() -> Iterator[None]:
    """For each setting of a task kfp reads the whole call stack, for a name in an error: seconds under pytest."""
    from kfp.dsl.pipeline_task import PipelineTask

    def check(task: PipelineTask) -> None:
        assert task.container_spec is not None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PipelineTask, "_ensure_container_spec_exists", check)
        yield


@pytest.fixture(params=["kubeflow-1.11"])
def double(request: pytest.FixtureRequest, crds: Path) -> Iterator[Double]:
    """A running double; another profile by `@pytest.mark.parametrize("double", ["trainer-2.3"], indirect=True)`."""
    with Double(request.param, crds) as running:
        yield running


@pytest.fixture
def api(double: Double, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Api:
    """lesionflow's client, connected to the double in namespace "team" as a user would be."""
    monkeypatch.setenv("KUBECONFIG", str(double.kubeconfig(tmp_path / "kubeconfig")))
    return Api.connect(Settings())
