"""What is compiled is what Kubeflow Pipelines 2.0.3 parses, and holds what a cluster needs and no secret."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import yaml

from lesionflow.cluster.compile import compile_pipeline, documents
from lesionflow.cluster.settings import Place, Settings
from lesionflow.errors import UsageError

STEPS = ["begin", "prepare", "split", "train", "stack", "evaluate", "gate", "export", "deploy", "smoke"]
# KFP 2.0.3 was released with these: its messages are the oracle, and refuse every field they don't know.
OLD = (
    "kfp-pipeline-spec==0.2.2",
    "kfp-kubernetes==1.0.0",
    "protobuf==3.20.3",
    "googleapis-common-protos==1.56.4",
    "pyyaml",
)
PARSE = """
import importlib.util, json, sys, yaml
from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2
import kfp
path = next(p for p in kfp.__path__) + "/kubernetes/kubernetes_executor_config_pb2.py"
spec = importlib.util.spec_from_file_location("kubernetes_executor_config_pb2", path)
kubernetes = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kubernetes)
pipeline, platform = yaml.safe_load_all(open(sys.argv[1]))
json_format.ParseDict(pipeline, pipeline_spec_pb2.PipelineSpec())
json_format.ParseDict(platform, pipeline_spec_pb2.PlatformSpec())
for name, executor in platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"].items():
    json_format.ParseDict(executor, kubernetes.KubernetesExecutorConfig())
"""


@pytest.fixture(scope="module")
def old_python(environment_with) -> Path:
    """An interpreter with the messages of KFP 2.0.3."""
    return environment_with("kfp-2.0.3", "--no-deps", *OLD) / "bin" / "python"


def parse(python: Path, path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([python, "-c", PARSE, str(path)], capture_output=True, text=True)


@pytest.mark.parametrize(
    "settings",
    [[], ["image.packaged=true"], ["job.launcher=local", "job.gpus=1", "volumes.data_claim=shared"]],
    ids=["default", "packaged", "local"],
)
def test_an_old_backend_parses_it(tmp_path: Path, old_python: Path, settings: list[str]) -> None:
    place = Place("first", Settings.load(None, ["namespace=team", *settings]))
    done = parse(old_python, compile_pipeline(place, tmp_path / "pipeline.yaml", source="kaggle"))
    assert done.returncode == 0, done.stderr[-500:]


def test_the_oracle_refuses_what_todays_sdk_writes_by_itself(tmp_path: Path, old_python: Path) -> None:
    """Without our own pass the old backend fails: the test above isn't empty."""
    from kfp import compiler

    from lesionflow.cluster.pipeline import build

    raw = tmp_path / "raw.yaml"
    compiler.Compiler().compile(build(Place("first"), source="kaggle"), str(raw))
    done = parse(old_python, raw)
    assert done.returncode and "no field named" in done.stderr


def test_every_step_is_there_in_order_with_its_volumes() -> None:
    pipeline, platform = documents(Place("first", Settings.load(None, ["volumes.mount=/mnt/x"])), source="kaggle")
    inner = pipeline["components"]["comp-exit-handler-1"]["dag"]["tasks"]
    assert set(inner) == {"install", "fetch", *STEPS}
    before = "fetch"
    for step in STEPS:
        assert before in inner[step]["dependentTasks"], f"{step} waits for {before}"
        before = step
    assert "install" in inner["fetch"]["dependentTasks"]
    outer = pipeline["root"]["dag"]["tasks"]["finish"]
    assert outer["triggerPolicy"]["strategy"] == "ALL_UPSTREAM_TASKS_COMPLETED"
    cached = {name for name, task in inner.items() if task["cachingOptions"].get("enableCache")}
    assert cached == set(STEPS) - {"begin", "deploy", "smoke"}, "what our keys decide, and nothing else"
    executors = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    for name, executor in executors.items():
        mounts = {mount["constant"]: mount["mountPath"] for mount in executor["pvcMount"]}
        assert mounts == {f"first-{v}": f"/mnt/x/{v}" for v in ("data", "logs", "models")}, name
    with_secret = {name: e["secretAsVolume"][0]["secretName"] for name, e in executors.items() if "secretAsVolume" in e}
    assert with_secret == {"exec-fetch": "kaggle", "exec-install": "first-wheel"}


def test_nothing_is_asked_that_old_backends_refuse_to_run() -> None:
    """They parse more than they support: a task's final status was "not supported yet" until KFP 2.15."""
    text = json.dumps(documents(Place("first"), source="kaggle"))
    for word in ("taskFinalStatus", "parameterIterator", "artifactIterator", "triggerCondition", "retryPolicy"):
        assert word not in text


def test_what_a_place_says_arrives_in_the_pods(tmp_path: Path) -> None:
    place = Place("first", Settings.load(None, ["job.launcher=local", "job.gpus=2", "image.train=me/it:1"]))
    pipeline, _ = documents(place)
    executors = pipeline["deploymentSpec"]["executors"]
    assert {executor["container"]["image"] for executor in executors.values()} == {"me/it:1"}
    assert executors["exec-train"]["container"]["resources"]["accelerator"] == {"type": "nvidia.com/gpu", "count": "2"}
    environment = {e["name"]: e["value"] for e in executors["exec-train"]["container"]["env"]}
    assert environment["PATH"].startswith(f"{place.environment}/bin:")
    packaged = documents(Place("first", Settings.load(None, ["image.packaged=true"])))[0]
    assert "exec-install" not in packaged["deploymentSpec"]["executors"]
    with pytest.raises(UsageError, match="yaml"):
        compile_pipeline(place, tmp_path / "pipeline.json")


def test_the_steps_artifacts_are_kfps_own_kinds() -> None:
    pipeline, _ = documents(Place("first"))
    found = {
        name: {a: d["artifactType"]["schemaTitle"] for a, d in c["outputDefinitions"].get("artifacts", {}).items()}
        for name, c in pipeline["components"].items()
        if "outputDefinitions" in c
    }
    assert found["comp-evaluate"] == {"metrics": "system.Metrics", "roc": "system.ClassificationMetrics"}
    assert found["comp-gate"] == {"report": "system.HTML"}
    assert json.dumps(yaml.safe_load(yaml.safe_dump(pipeline))) == json.dumps(pipeline)
