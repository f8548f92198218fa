"""The commands of `lesionflow pipeline` and `lesionflow cluster`: a few lines each, no logic."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lesionflow.errors import ClusterError, UsageError
from lesionflow.options import (
    DataOption,
    JsonOption,
    RecipeArgument,
    RunOption,
    SetOption,
    load_recipe,
    print_json,
)

if TYPE_CHECKING:
    from lesionflow.cluster.api import Api
    from lesionflow.cluster.settings import Place, Settings
    from lesionflow.recipe import Recipe

pipeline_app = typer.Typer(help="The same job as a Kubeflow pipeline.", no_args_is_help=True)
cluster_app = typer.Typer(help="Check a cluster, run on it, watch, and clean up.", no_args_is_help=True)

ClusterOption = Annotated[
    Path | None, typer.Option("--cluster", help="Settings file (TOML); every field has a default.")
]
OnOption = Annotated[
    list[str] | None, typer.Option("--on", help="Override a setting, e.g. job.gpus=1 or namespace=team; repeatable.")
]
NameOption = Annotated[str, typer.Option("--name", help="The run's name on the cluster; its objects begin with it.")]
NameArgument = Annotated[str, typer.Argument(help="The run's name on the cluster.", metavar="NAME")]
SourceOption = Annotated[
    str, typer.Option(help="kaggle, synthetic, or a folder on the data volume that holds the data set.")
]
IncumbentOption = Annotated[
    str, typer.Option(help="Bundle to compare with, on the models volume: runs/NAME/bundle.", metavar="PATH")
]


@pipeline_app.command("run")
def pipeline_run(
    recipe: RecipeArgument,
    data: DataOption,
    out: RunOption,
    local: Annotated[bool, typer.Option("--local", help="Run here, each step a process (kfp.local).")] = False,
    processes: Annotated[int, typer.Option(min=1, help="Processes per fold (torchrun).")] = 1,
    incumbent: Annotated[Path | None, typer.Option(help="Bundle of an earlier run to compare with.")] = None,
    name: Annotated[str, typer.Option("--name", help="Train, and serve, on a cluster under this name.")] = "",
    cluster: ClusterOption = None,
    on: OnOption = None,
    serve_on: Annotated[bool, typer.Option("--keep-serving", help="Leave the service running at the end.")] = False,
    set_: SetOption = None,
) -> None:
    """Run the pipeline on this machine, step by step as on a cluster; `cluster run` runs it there.

    Example: lesionflow pipeline run quick --local --data data --out runs/pipeline
    """
    if not local:
        raise UsageError("pipeline run: say --local to run it here; `lesionflow cluster run` runs it on a cluster")
    from lesionflow.cluster.pipeline import run_local
    from lesionflow.progress import print_summary

    place = _place(name, cluster, on) if name else None
    run_local(
        _deployable(load_recipe(recipe, set_)), data, out,
        processes=processes, incumbent=incumbent, place=place, keep_serving=serve_on,
    )  # fmt: skip
    print_summary(out)


@pipeline_app.command("compile")
def pipeline_compile(
    out: Annotated[Path, typer.Option("--out", help="The file to write (.yaml).")] = Path("pipeline.yaml"),
    name: NameOption = "lesionflow",
    source: SourceOption = "kaggle",
    cluster: ClusterOption = None,
    on: OnOption = None,
) -> None:
    """Write the pipeline as a file for Kubeflow Pipelines 2.0.3 or later.

    Example: lesionflow pipeline compile --name first --out pipeline.yaml
    """
    from lesionflow.cluster.compile import compile_pipeline

    typer.echo(str(compile_pipeline(_place(name, cluster, on), out, source=source)))


@pipeline_app.command("submit")
def pipeline_submit(
    recipe: RecipeArgument,
    name: NameOption,
    source: SourceOption = "kaggle",
    incumbent: IncumbentOption = "",
    clean: Annotated[bool, typer.Option(help="Remove the training job when the run has ended.")] = False,
    cluster: ClusterOption = None,
    on: OnOption = None,
    set_: SetOption = None,
) -> None:
    """Make the run's volumes and start its pipeline on the cluster; `cluster run` also watches it.

    Example: lesionflow pipeline submit baseline --name first --source kaggle
    """
    from lesionflow.cluster.submit import submit

    place = _place(name, cluster, on)
    made = submit(
        _api(place.settings),
        place,
        _deployable(load_recipe(recipe, set_)),
        source=source,
        incumbent=incumbent,
        clean=clean,
    )
    typer.echo(made.url)


@cluster_app.command("run")
def cluster_run(
    recipe: RecipeArgument,
    name: NameOption,
    source: SourceOption = "kaggle",
    incumbent: IncumbentOption = "",
    wait: Annotated[bool, typer.Option(help="Watch the run until it has ended.")] = True,
    clean: Annotated[bool, typer.Option(help="Remove the training job when the run has ended.")] = False,
    cluster: ClusterOption = None,
    on: OnOption = None,
    set_: SetOption = None,
) -> None:
    """The whole job on a cluster: volumes, pipeline, distributed training, service; and watch it.

    The same name again goes on where it was: what is done under the same recipe, data and code is not
    done again. Ctrl-C stops watching, not the run.

    Example: lesionflow cluster run quick --name first --source synthetic --on job.nodes=2
    """
    from lesionflow.cluster.submit import follow, submit

    place = _place(name, cluster, on)
    api = _api(place.settings)
    made = submit(api, place, _deployable(load_recipe(recipe, set_)), source=source, incumbent=incumbent, clean=clean)
    typer.echo(made.url)
    if not wait:
        return
    try:
        follow(api, place, made, tell=typer.echo)
    except KeyboardInterrupt:
        typer.echo(f"the run goes on; lesionflow cluster status {name} looks again, cluster logs {name} follows it")
        raise
    typer.echo(f"run {name} is done; its model answers as {place.settings.serving.name}")


@cluster_app.command("doctor")
def cluster_doctor(
    cluster: ClusterOption = None,
    on: OnOption = None,
    job: Annotated[bool, typer.Option("--job", help="End with a job of two pods that talk to each other.")] = False,
    name: Annotated[str, typer.Option("--name", help="Look at this run's volumes too.")] = "",
    as_json: JsonOption = False,
) -> None:
    """Ask a cluster everything that a run needs, and say what to do about what is missing; exit 5 if it can't work.

    Example: lesionflow cluster doctor --on job.gpus=1 --job
    """
    from lesionflow.cluster import doctor
    from lesionflow.cluster.settings import Settings

    settings = Settings.load(cluster, on or [])
    if as_json:
        found = doctor.examine(settings, job=job, run=name)
        typer.echo(doctor.to_json(found))
    else:
        from rich.console import Console

        console = Console()
        found = doctor.examine(settings, job=job, run=name, tell=lambda check: console.print(doctor.render([check])))
    if failed := [check.name for check in found if check.status == "fail"]:
        raise ClusterError(f"this cluster isn't ready: {', '.join(failed)}; each is listed with its remedy")


@cluster_app.command("secret")
def cluster_secret(
    source: Annotated[
        str | None, typer.Option("--from", help="A file with the token or kaggle.json; - reads standard input.")
    ] = None,
    ask: Annotated[bool, typer.Option("--ask", help="Type the token, unseen.")] = False,
    cluster: ClusterOption = None,
    on: OnOption = None,
) -> None:
    """Put the Kaggle token into a secret that the download mounts; it is never printed.

    Example: lesionflow cluster secret --from ~/.kaggle/kaggle.json
    """
    import io

    from lesionflow.cluster.secrets import store_kaggle_token
    from lesionflow.cluster.settings import Settings

    settings = Settings.load(cluster, on or [])
    given = io.StringIO(typer.prompt("Kaggle token", hide_input=True)) if ask else source
    store_kaggle_token(_api(settings), settings, source=given, tell=typer.echo)


@cluster_app.command("status")
def cluster_status(
    name: NameArgument,
    cluster: ClusterOption = None,
    on: OnOption = None,
    as_json: JsonOption = False,
) -> None:
    """A run's training jobs, service and other objects.

    Example: lesionflow cluster status first
    """
    from lesionflow.cluster.clean import clean
    from lesionflow.cluster.jobs import states

    place = _place(name, cluster, on)
    api = _api(place.settings)
    jobs, objects = states(api, place), clean(api, name)
    if as_json:
        print_json({"jobs": [asdict(job) for job in jobs], "objects": [asdict(found) for found in objects]})
        return
    if not objects:
        typer.echo(f"run {name} has nothing in namespace {api.namespace}")
    for job in jobs:
        why = f": {job.reason}" if job.reason else ""
        typer.echo(f"{job.kind} {job.name}: {job.phase}, {job.ready} of {job.nodes} nodes{why}")
    for found in objects:
        if found.kind not in ("TrainJob", "PyTorchJob"):
            typer.echo(f"{found.kind} {found.name}")


@cluster_app.command("logs")
def cluster_logs(name: NameArgument, cluster: ClusterOption = None, on: OnOption = None) -> None:
    """Follow all nodes of a run's training job.

    Example: lesionflow cluster logs first
    """
    from lesionflow.cluster.jobs import follow

    place = _place(name, cluster, on)
    for line in follow(_api(place.settings), place):
        typer.echo(line)


@cluster_app.command("tensorboard")
def cluster_tensorboard(name: NameArgument, cluster: ClusterOption = None, on: OnOption = None) -> None:
    """Start Kubeflow's TensorBoard on a run's curves and print where it is.

    Example: lesionflow cluster tensorboard first
    """
    from lesionflow.cluster.manifests import tensorboard

    place = _place(name, cluster, on)
    api = _api(place.settings)
    if not api.serves("Tensorboard"):
        raise ClusterError(
            "this cluster has no Tensorboard kind: ask for Kubeflow's tensorboard-controller, or copy the logs volume "
            "and run `tensorboard --logdir`"
        )
    api.apply(tensorboard(place))
    typer.echo(f"/tensorboard/{api.namespace}/{name}/ on the Kubeflow dashboard's address (TensorBoards, in its menu)")


@cluster_app.command("clean")
def cluster_clean(
    name: Annotated[str, typer.Argument(help="The run's name; without one, every run's.", metavar="[NAME]")] = "",
    yes: Annotated[bool, typer.Option("--yes", help="Remove; without it, only list.")] = False,
    cluster: ClusterOption = None,
    on: OnOption = None,
) -> None:
    """List, or with --yes remove, everything a run left: jobs, pods, services, secrets and volumes with their data.

    Only what carries our labels. Example: lesionflow cluster clean first --yes
    """
    from lesionflow.cluster.clean import clean
    from lesionflow.cluster.settings import Settings
    from lesionflow.cluster.submit import stop

    settings = Settings.load(cluster, on or [])
    api = _api(settings)
    if yes:
        stop(api, settings, name, tell=typer.echo)
    found = clean(api, name, remove=yes)
    for one in found:
        typer.echo(f"{'removed' if one.removed else 'would remove'} {one.kind} {one.name}")
    if not found:
        typer.echo("nothing to remove")


def _place(name: str, cluster: Path | None, on: list[str] | None) -> Place:
    from lesionflow.cluster.settings import Place, Settings

    return Place(name, Settings.load(cluster, on or []))


def _api(settings: Settings) -> Api:
    from lesionflow.cluster.api import Api

    return Api.connect(settings)


def _deployable(recipe: Recipe) -> Recipe:
    """Refuse what the pipeline's last steps could not put behind the service."""
    if not recipe.model.per_fold:
        raise UsageError(
            f"{recipe.name}: without a model of pictures there is nothing for the service, which the pipeline ends "
            "with; use `lesionflow run`, and `lesionflow predict` with its bundle"
        )
    return recipe
