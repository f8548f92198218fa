"""The main job as a Kubeflow pipeline: components of a few lines over `steps`.

    lesionflow pipeline run quick --local --data DIR --out RUN

Every component calls one step with plain values and its content key. The key is a parameter, and
KFP caches on parameters, so the pipeline skips exactly what `lesionflow run` would skip.
"""

import logging
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

from kfp import dsl, local

from lesionflow.errors import from_exit_code
from lesionflow.recipe import Recipe
from lesionflow.training import status

IMAGE = "python:3.11"
"""Named in the compiled pipeline; a cluster's own image replaces it."""

component = dsl.component(base_image=IMAGE, install_kfp_package=False)


@component
def begin(run: str, data: str, recipe: str) -> NamedTuple(  # type: ignore[valid-type]
    "Keys", prepare=str, split=str, train=str, stack=str, evaluate=str, gate=str, export=str
):
    from lesionflow.cluster.shim import begin

    return begin(run, data, recipe)


@component
def prepare(run: str, data: str, key: str) -> str:
    from lesionflow.cluster.shim import call

    return call("prepare", run, key, data=data)


@component
def split(run: str, key: str, after: str) -> str:
    from lesionflow.cluster.shim import call

    return call("split", run, key)


@component
def train(run: str, key: str, processes: int, after: str) -> str:
    from lesionflow.cluster.shim import call

    return call("train", run, key, processes=processes)


@component
def stack(run: str, key: str, after: str) -> str:
    from lesionflow.cluster.shim import call

    return call("stack", run, key)


@component
def evaluate(run: str, key: str, after: str) -> str:
    from lesionflow.cluster.shim import call

    return call("evaluate", run, key)


@component
def gate(run: str, key: str, after: str) -> str:
    from lesionflow.cluster.shim import call

    return call("gate", run, key)


@component
def export(run: str, key: str, after: str) -> str:
    from lesionflow.cluster.shim import call

    return call("export", run, key)


@component
def deploy(run: str, after: str) -> str:
    from lesionflow.cluster.shim import call

    return call("deploy", run)


@component
def smoke(run: str, after: str) -> str:
    from lesionflow.cluster.shim import call

    return call("smoke", run)


@dsl.pipeline(name="lesionflow", description="Prepare, split, train, stack, evaluate, gate, export, deploy, smoke.")
def lesionflow_pipeline(run: str, data: str, recipe: str, processes: int = 1) -> None:
    """The steps in order, each waiting for the one before it.

    `recipe` is the recipe's TOML, `run` and `data` are paths that every component sees.
    """
    keys = begin(run=run, data=data, recipe=recipe).set_caching_options(False)
    done = prepare(run=run, data=data, key=keys.outputs["prepare"])
    done = split(run=run, key=keys.outputs["split"], after=done.output)
    done = train(run=run, key=keys.outputs["train"], processes=processes, after=done.output)
    done = stack(run=run, key=keys.outputs["stack"], after=done.output)
    done = evaluate(run=run, key=keys.outputs["evaluate"], after=done.output)
    done = gate(run=run, key=keys.outputs["gate"], after=done.output)
    done = export(run=run, key=keys.outputs["export"], after=done.output)
    served = deploy(run=run, after=done.output).set_caching_options(False)
    smoke(run=run, after=served.output).set_caching_options(False)


def run_local(recipe: Recipe, data: Path, run: Path, *, processes: int = 1, keep_serving: bool = False) -> None:
    """Run the pipeline on this machine, each component a process of its own (`kfp.local`).

    Raises the error the failing step ended with.
    """
    from lesionflow import steps

    run, data = run.resolve(), data.resolve()
    run.mkdir(parents=True, exist_ok=True)
    logging.getLogger("kfp").setLevel(logging.WARNING)
    local.init(runner=local.SubprocessRunner(use_venv=False), pipeline_root=str(run / "pipeline"))
    with tempfile.TemporaryDirectory(prefix="lesionflow-") as scratch:
        os.environ[status.VARIABLE] = scratch
        try:
            lesionflow_pipeline(run=str(run), data=str(data), recipe=recipe.to_toml(), processes=processes)
        except RuntimeError as error:
            outcome = status.collect(Path(scratch), 1)
            raise from_exit_code(outcome.code, outcome.message or f"pipeline: {error}") from error
        finally:
            del os.environ[status.VARIABLE]
            if not keep_serving:
                steps.undeploy(run)
