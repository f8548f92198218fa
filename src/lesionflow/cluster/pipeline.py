"""The main job as a Kubeflow pipeline: components of a few lines over `steps`.

    lesionflow pipeline run quick --local --data DIR --out RUN
    lesionflow pipeline compile --name first --out pipeline.yaml

    fetch -> begin -> prepare -> split -> train -> stack -> evaluate -> gate -> export -> deploy -> smoke
    finish (always, whatever happened)

Every component calls one step with plain values and its ticket, which is its content key and what
finished it before (`shim.begin`). KFP caches on parameters, so it skips exactly what is still done.
What only a cluster has (volumes, secrets, the Python environment) is added by `_place` alone.
"""

import logging
import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from kfp import dsl, local

from lesionflow.cluster.manifests import KAGGLE_SECRET, SHARED, VOLUMES
from lesionflow.cluster.settings import Place
from lesionflow.errors import from_exit_code
from lesionflow.recipe import Recipe
from lesionflow.training import status

IMAGE = "python:3.11"
"""Named by the components; a place's own image replaces it."""
WHEEL = "/var/run/lesionflow-wheel"

component = dsl.component(base_image=IMAGE, install_kfp_package=False)


@component
def fetch(run: str, data: str, source: str) -> str:
    from lesionflow.cluster import shim

    return shim.fetch(run, data, source)


@component
def begin(run: str, data: str, recipe: str, incumbent: str, after: str) -> NamedTuple(  # type: ignore[valid-type]
    "Tickets", prepare=str, split=str, train=str, stack=str, evaluate=str, gate=str, export=str
):
    from lesionflow.cluster import shim

    return shim.begin(run, data, recipe, incumbent)


@component
def prepare(run: str, data: str, ticket: str) -> str:
    from lesionflow.cluster import shim

    return shim.call("prepare", run, ticket, data=data)


@component
def split(run: str, ticket: str, after: str) -> str:
    from lesionflow.cluster import shim

    return shim.call("split", run, ticket)


@component
def train(run: str, ticket: str, processes: int, name: str, settings: str, after: str) -> str:
    from lesionflow.cluster import shim

    return shim.train(run, ticket, processes, name, settings)


@component
def stack(run: str, ticket: str, after: str) -> str:
    from lesionflow.cluster import shim

    return shim.call("stack", run, ticket)


@component
def evaluate(
    run: str, ticket: str, after: str, metrics: dsl.Output[dsl.Metrics], roc: dsl.Output[dsl.ClassificationMetrics]
) -> str:
    from lesionflow.cluster import shim

    return shim.evaluate(run, ticket, metrics, roc)


@component
def gate(run: str, ticket: str, incumbent: str, after: str, report: dsl.Output[dsl.HTML]) -> str:
    from lesionflow.cluster import shim

    return shim.gate(run, ticket, incumbent, report)


@component
def export(run: str, ticket: str, after: str) -> str:
    from lesionflow.cluster import shim

    return shim.call("export", run, ticket)


@component
def deploy(run: str, name: str, settings: str, after: str) -> str:
    from lesionflow.cluster import shim

    return shim.deploy(run, name, settings)


@component
def smoke(run: str, name: str, settings: str, after: str) -> str:
    from lesionflow.cluster import shim

    return shim.smoke(run, name, settings)


@component
def finish(run: str, name: str, settings: str, clean: bool) -> str:
    # KFP's own word for how it ended (PipelineTaskFinalStatus) would be refused by backends before 2.15.
    from lesionflow.cluster import shim

    return shim.finish(run, name, settings, clean)


INSTALL = """
umask 0
if [ -e "$1/.ready" ]; then echo "$1 is there"; exit 0; fi
mkdir -p "$(dirname "$1")"
new=$(mktemp -d "$1.XXXXXX")
trap 'rm -rf "$new"' EXIT
chmod 755 "$new"
python3 -m venv --system-site-packages "$new"
"$new/bin/python" -m pip install --no-cache-dir ${3:+--index-url "$3"} "$2[train,serve,cluster]"
"$new/bin/python" -m lesionflow --version
touch "$new/.ready"
# Another run may have been quicker; what a pod of its uses then stays as it is. A half-made one goes.
if [ ! -e "$1/.ready" ]; then rm -rf "$1"; mv -T "$new" "$1"; fi
"""
"""Runs before everything else where the image doesn't hold lesionflow. The environment stands on the image's
packages (torch among them), so only what is missing is installed, and every later pod starts at once."""


@dsl.container_component
def install(environment: str, wheel: str, index: str):  # type: ignore[no-untyped-def]
    """Make the Python environment on the models volume, once for an image, a wheel and an index."""
    return dsl.ContainerSpec(
        image=IMAGE, command=["sh", "-ec", INSTALL, "install", environment, f"{WHEEL}/{wheel}", index]
    )


def build(place: Place | None = None, *, source: str = "") -> Any:
    """The pipeline; with a `place`, as its pods run it. `source` says whether the Kaggle secret is needed."""

    @dsl.pipeline(
        name="lesionflow", description="Prepare, split, train, stack, evaluate, gate, export, deploy and smoke-test."
    )
    def lesionflow(
        run: str,
        data: str,
        recipe: str,
        source: str = "",
        name: str = "",
        settings: str = "",
        processes: int = 1,
        incumbent: str = "",
        clean: bool = False,
    ) -> None:
        """The steps in order, each waiting for the one before it; `finish` ends every run.

        `recipe` and `settings` are TOML, `run` and `data` paths that every component sees, `name` the
        run's name on the cluster. Without `settings` everything happens in the components themselves.
        """
        ending = finish(run=run, name=name, settings=settings, clean=clean).set_caching_options(False)
        with dsl.ExitHandler(ending, name="job"):
            fetched = fetch(run=run, data=data, source=source).set_caching_options(False)
            begun = begin(run=run, data=data, recipe=recipe, incumbent=incumbent, after=fetched.output)
            tickets = begun.set_caching_options(False).outputs
            prepared = prepare(run=run, data=data, ticket=tickets["prepare"])
            divided = split(run=run, ticket=tickets["split"], after=prepared.output)
            trained = train(
                run=run, ticket=tickets["train"], processes=processes, name=name, settings=settings,
                after=divided.output,
            )  # fmt: skip
            stacked = stack(run=run, ticket=tickets["stack"], after=trained.output)
            measured = evaluate(run=run, ticket=tickets["evaluate"], after=stacked.output)
            passed = gate(
                run=run, ticket=tickets["gate"], incumbent=incumbent, after=measured.outputs["Output"]
            )  # fmt: skip
            exported = export(run=run, ticket=tickets["export"], after=passed.outputs["Output"])
            served = deploy(run=run, name=name, settings=settings, after=exported.output).set_caching_options(False)
            asked = smoke(run=run, name=name, settings=settings, after=served.output).set_caching_options(False)
            if place:
                light = (fetched, begun, divided, stacked, passed, served, asked)
                heavy = (prepared, measured, exported) + ((trained,) if place.settings.job.launcher == "local" else ())
                for task in (*light, *heavy, trained, ending):
                    _place(task, place, heavy=task in heavy)
                if place.settings.job.launcher == "local" and place.settings.job.gpus:
                    trained.set_accelerator_type(place.settings.job.gpu_resource)
                    trained.set_accelerator_limit(place.settings.job.gpus)
                if source == "kaggle":
                    from kfp import kubernetes

                    secret = place.settings.kaggle_secret
                    kubernetes.use_secret_as_volume(fetched, secret, mount_path=KAGGLE_SECRET)
                if not place.settings.image.packaged:
                    fetched.after(_installed(place))

    return lesionflow


def _installed(place: Place) -> Any:
    from kfp import kubernetes

    from lesionflow.wheel import file_name

    task = install(environment=place.environment, wheel=file_name(), index=place.settings.image.index)
    _place(task.set_caching_options(False), place, heavy=True, environment=False)
    kubernetes.use_secret_as_volume(task, place.wheel_secret, mount_path=WHEEL)
    return task


def _place(task: Any, place: Place, *, heavy: bool = False, environment: bool = True) -> None:
    """Give a task what only a cluster has: its image, the volumes, the environment, a share of the node."""
    from kfp import kubernetes

    settings = place.settings
    task.set_container_image(settings.image.train)
    for volume in VOLUMES:
        kubernetes.mount_pvc(task, pvc_name=place.claim(volume), mount_path=place.path(volume))
    if environment and not settings.image.packaged:
        task.set_env_variable("PATH", f"{place.environment}/bin:/opt/conda/bin:/usr/local/bin:/usr/bin:/bin")
    for key, value in SHARED.items():
        task.set_env_variable(key, value)
    task.set_cpu_limit(settings.job.cpu if heavy else "1").set_memory_limit(settings.job.memory if heavy else "2Gi")
    task.set_cpu_request(settings.job.cpu if heavy else "100m").set_memory_request(
        settings.job.memory if heavy else "512Mi"
    )
    if settings.image.pull_secret:
        kubernetes.set_image_pull_secrets(task, [settings.image.pull_secret])


def run_local(
    recipe: Recipe,
    data: Path,
    run: Path,
    *,
    source: str = "",
    processes: int = 1,
    incumbent: Path | None = None,
    place: Place | None = None,
    clean: bool = False,
    keep_serving: bool = False,
) -> None:
    """Run the pipeline on this machine, each component a process of its own (`kfp.local`).

    With a `place` the training is its job and the model its service, on the cluster that it names.
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
            build()(
                run=str(run),
                data=str(data),
                recipe=recipe.to_toml(),
                source=source,
                name=place.name if place else "",
                settings=place.settings.to_toml() if place else "",
                processes=processes,
                incumbent=str(incumbent.resolve()) if incumbent else "",
                clean=clean,
            )
        except RuntimeError as error:
            outcome = status.collect(Path(scratch), 1)
            raise from_exit_code(outcome.code, outcome.message or f"pipeline: {error}") from error
        finally:
            del os.environ[status.VARIABLE]
            if not keep_serving and place is None:
                steps.undeploy(run)
