"""The pipeline as a file that Kubeflow Pipelines runs, from version 2.0.3 on.

Today's SDK says some things twice, once in fields that older backends refuse to parse. What both
say is kept in the older field, so one file serves every backend.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from lesionflow.cluster.settings import Place
from lesionflow.errors import UsageError
from lesionflow.keys import write_text

Documents = list[dict[str, Any]]

_NEWER = {
    # Beside cpuLimit, memoryLimit, ... (numbers) the same as strings or parameters.
    "resourceCpuLimit", "resourceCpuRequest", "resourceMemoryLimit", "resourceMemoryRequest",
    # Beside accelerator.type and count.
    "resourceType", "resourceCount",
    # Beside constant, secretName, ...
    "pvcNameParameter", "secretNameParameter", "configMapNameParameter",
    # A secret's default: it has to be there.
    "optional",
}  # fmt: skip
_KUBERNETES = ("pvcMount", "secretAsVolume", "secretAsEnv", "imagePullSecret", "nodeSelector")


def compile_pipeline(place: Place, out: Path, *, source: str = "") -> Path:
    """Write the pipeline of a place to a YAML file. Raises `UsageError` for an ending that KFP doesn't know."""
    import yaml

    if out.suffix not in (".yaml", ".yml"):
        raise UsageError(f"--out {out}: the file must end in .yaml")
    text = yaml.dump_all(documents(place, source=source), sort_keys=True, width=120)
    write_text(
        out, f"# lesionflow's pipeline for the run {place.name}; needs Kubeflow Pipelines 2.0.3 or later.\n{text}"
    )
    return out


def documents(place: Place, *, source: str = "") -> Documents:
    """The pipeline's specification and its platform's, in fields that KFP 2.0.3 knows."""
    import yaml
    from kfp import compiler

    from lesionflow.cluster.pipeline import build

    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "pipeline.yaml"
        compiler.Compiler().compile(build(place, source=source), str(path))
        pipeline, platform = yaml.safe_load_all(path.read_text())
    executors = pipeline["deploymentSpec"]["executors"]
    for executor in executors.values():
        executor["container"]["resources"] = _older(executor["container"].get("resources", {}))
    configured = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    for executor in configured.values():
        for name in _KUBERNETES:
            if name in executor:
                executor[name] = _older(executor[name])
    return [pipeline, platform]


def _older(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _older(entry) for key, entry in value.items() if key not in _NEWER}
    return [_older(entry) for entry in value] if isinstance(value, list) else value
