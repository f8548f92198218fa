"""The command line: Typer commands of a few lines each, no logic.

Heavy imports live inside the commands, so that `lesionflow --help` and `score` cost what they need.
Exit codes are those of `lesionflow.errors`.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from lesionflow import __version__
from lesionflow.cluster.commands import cluster_app, pipeline_app
from lesionflow.errors import DataError, GateRefused, LesionflowError, UsageError, explain_missing
from lesionflow.options import (
    BundleArgument,
    DataOption,
    JsonOption,
    PublicKeyOption,
    QuietOption,
    RecipeArgument,
    RunArgument,
    RunOption,
    SetOption,
    SignatureOption,
    TokenFileOption,
    load_recipe,
    print_json,
    read_token,
)

if TYPE_CHECKING:
    from lesionflow.bundle import Bundle

app = typer.Typer(
    name="lesionflow",
    help="Train, evaluate, export and serve skin-lesion triage models. Not a medical device.",
    epilog="Start with: lesionflow data synth --out data && lesionflow run quick --data data --out runs/first",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=True,
)
data_app = typer.Typer(help="Fetch, make, check, prepare and split data.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(pipeline_app, name="pipeline")
app.add_typer(cluster_app, name="cluster")


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"lesionflow {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and end.", is_eager=True, callback=_version)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Options before the command hold for all of them."""


@app.command()
def run(
    recipe: RecipeArgument,
    data: DataOption,
    out: RunOption,
    set_: SetOption = None,
    processes: Annotated[int, typer.Option(min=1, help="Processes per fold (torchrun).")] = 1,
    jobs: Annotated[int, typer.Option(min=0, help="Folds trained side by side; 0: one per core or GPU.")] = 0,
    incumbent: Annotated[Path | None, typer.Option(help="Bundle of an earlier run that must not be beaten by.")] = None,
    serve_on: Annotated[bool, typer.Option("--keep-serving", help="Leave the service running at the end.")] = False,
    quiet: QuietOption = False,
) -> None:
    """The whole job: prepare, split, train, stack, evaluate, gate, export, deploy, smoke.

    Interrupted or repeated, it goes on where it was: what is done under the same recipe, data and
    code is not done again.

    Example: lesionflow run quick --data data --out runs/first --processes 2
    """
    from lesionflow import steps
    from lesionflow.progress import TrainingBars, print_summary

    with TrainingBars(not quiet) as bars:
        steps.run_all(
            load_recipe(recipe, set_), data, out,
            processes=processes, jobs=jobs, incumbent=incumbent, keep_serving=serve_on,
            tell=bars.tell, show=bars.show, progress=not quiet,
        )  # fmt: skip
    print_summary(out)


@app.command()
def train(
    out: RunOption,
    recipe: Annotated[
        str | None, typer.Argument(help="A shipped recipe's name, or a .toml file.", metavar="[RECIPE]")
    ] = None,
    data: Annotated[Path | None, typer.Option("--data", help="Data set directory in the competition's layout.")] = None,
    fold: Annotated[str, typer.Option(help="Fold number, several with commas, or all.")] = "all",
    processes: Annotated[int, typer.Option(min=1, help="Processes per fold and node (torchrun).")] = 1,
    jobs: Annotated[int, typer.Option(min=0, help="Folds trained side by side; 0: one per core or GPU.")] = 0,
    anew: Annotated[
        bool, typer.Option("--anew", help="Start again what another recipe left half-trained here.")
    ] = False,
    set_: SetOption = None,
    quiet: QuietOption = False,
) -> None:
    """Train folds, preparing and splitting first; continues from the last checkpoint.

    Without RECIPE and --data it trains what was prepared and split in --out: that is what every node
    of a job on a cluster runs. Ends with exit code 143 after a clean save when it is told to stop
    (SIGTERM, Ctrl-C).

    Example: lesionflow train baseline --data data --out runs/b --fold 0 --set training.epochs=3
    """
    from lesionflow import steps
    from lesionflow.progress import TrainingBars

    if (recipe is None) != (data is None) or (recipe is None and set_):
        raise UsageError("train: give RECIPE and --data, or neither to train what was begun in --out")
    with TrainingBars(not quiet) as bars:
        if recipe is not None and data is not None:
            planned = steps.begin(out, load_recipe(recipe, set_), data)
            steps.prepare(out, data, planned["prepare"], progress=not quiet)
            steps.split(out, planned["split"])
        else:
            planned = steps.planned(out)
        folds = None if fold == "all" else _numbers(fold)
        steps.train(out, planned["train"], folds=folds, processes=processes, jobs=jobs, anew=anew, show=bars.show)


@app.command()
def tune(
    recipe: RecipeArgument,
    data: DataOption,
    out: Annotated[Path, typer.Option("--out", help="Where to write the tuned recipe (.toml).")],
    trials: Annotated[int, typer.Option(min=1, help="Settings to try.")] = 30,
    timeout: Annotated[float | None, typer.Option(min=1, help="Seconds after which no trial is begun.")] = None,
    set_: SetOption = None,
    quiet: QuietOption = False,
) -> None:
    """Search for the boosted trees' settings on the metadata (Optuna), and write a recipe with the best.

    Only `train-metadata.csv` is read. The folds are the recipe's, and its hold-out is left alone, so that a run of
    the tuned recipe judges it honestly.

    Example: lesionflow tune ensemble --data data --out tuned.toml --trials 50
    """
    from lesionflow.models.search import tune as search

    result = search(load_recipe(recipe, set_), data, out, trials=trials, timeout=timeout, progress=not quiet)
    typer.echo(f"{out}: pAUC {result['value']:.4f} in {result['trials']} trials, {result['before']:.4f} before")
    gain = result["other_folds"]
    span = f" [{gain['low']:+.4f}, {gain['high']:+.4f}]" if gain.get("low") is not None else ""
    typer.echo(f"on other folds of the same patients, free of that choice's luck: {gain['difference']:+.4f}{span}")


@app.command()
def evaluate(run: RunArgument, as_json: JsonOption = False) -> None:
    """Combine the folds' out-of-fold scores and write metrics.json.

    Example: lesionflow evaluate runs/first
    """
    from lesionflow import steps
    from lesionflow.progress import print_summary

    planned = steps.planned(run)
    steps.stack(run, planned["stack"])
    metrics = steps.evaluate(run, planned["evaluate"])
    print_json(metrics) if as_json else print_summary(run)


@app.command()
def gate(
    run: RunArgument,
    incumbent: Annotated[Path | None, typer.Option(help="Bundle of an earlier run to compare with.")] = None,
) -> None:
    """Write the report and the model card, and refuse (exit 4, with reasons) a model that isn't good enough.

    Example: lesionflow gate runs/first --incumbent runs/best/bundle
    """
    from lesionflow import steps

    planned = steps.plan_gate(run, incumbent)
    for check in steps.gate(run, planned["gate"], incumbent=incumbent)["checks"]:
        typer.echo(f"{'pass' if check['passed'] else 'FAIL'}  {check['text']}")


@app.command()
def export(
    run: RunArgument,
    out: Annotated[Path | None, typer.Option("--out", help="Copy the bundle here as well.")] = None,
) -> None:
    """Export the run's models to RUN/bundle (ONNX), if they agree with torch on stored lesions.

    Example: lesionflow export runs/first --out first.bundle
    """
    from lesionflow import steps

    made = steps.export(run, steps.planned(run)["export"])
    typer.echo(str(steps.copy_bundle(made, out) if out else made))


@app.command()
def sign(
    bundle: BundleArgument,
    private_key: Annotated[Path, typer.Option(help="Elliptic-curve key in PEM, which stays with you.")],
    signature: SignatureOption = None,
) -> None:
    """Sign a bundle, so that others can check who made it: with your private key, readable by model-signing too.

    A key's password, if it has one, comes from the environment (LESIONFLOW_KEY_PASSWORD).

    A pair of keys: openssl ecparam -name prime256v1 -genkey -noout -out maker.pem;
    openssl ec -in maker.pem -pubout -out maker.pub

    Example: lesionflow sign runs/first/bundle --private-key maker.pem
    """
    from lesionflow.signing import sign as write_signature

    typer.echo(str(write_signature(bundle, private_key, signature)))


@app.command()
def verify(bundle: BundleArgument, public_key: PublicKeyOption = None, signature: SignatureOption = None) -> None:
    """Check a bundle's files against its manifest and reproduce the stored answers; with a key, its signature too.

    Example: lesionflow verify runs/first/bundle

    Example: lesionflow verify runs/first/bundle --public-key maker.pub
    """
    from lesionflow.bundle import Bundle
    from lesionflow.serving.predictor import Predictor

    opened = Bundle.open(bundle)
    _signed(opened, public_key, signature)
    result = Predictor(opened).smoke()
    said = f"intact, signed by the owner of {public_key}" if public_key else "intact"
    typer.echo(f"{bundle}: {said}; {result['count']} reference lesions reproduced within {result['max_abs']:.1e}")


def _signed(bundle: Bundle, public_key: Path | None, signature: Path | None) -> None:
    if public_key is not None:
        from lesionflow.signing import check_signature

        check_signature(bundle, public_key, signature)
    elif signature is not None:
        raise UsageError("--signature says nothing without --public-key: give the key that must have signed")


@app.command()
def predict(
    bundle: BundleArgument,
    images: Annotated[Path, typer.Option(help="HDF5 file, folder of images, or data set directory.")],
    out: Annotated[Path, typer.Option("--out", help="Submission file (isic_id,target).")],
    metadata: Annotated[Path | None, typer.Option(help="CSV whose isic_id column gives the rows.")] = None,
    skip_corrupt: Annotated[bool, typer.Option(help="Count and list unusable images instead of stopping.")] = False,
    details: Annotated[
        Path | None, typer.Option(help="CSV with each lesion's probabilities: picture, metadata, both.")
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Score lesions with a bundle and write a submission file. Needs no torch.

    A bundle that was trained with metadata uses that of the lesions, and compares them with the same patient's
    others; without metadata it scores the pictures alone.

    Example: lesionflow predict runs/first/bundle --images data/test-image.hdf5 --out submission.csv

    Example: lesionflow predict runs/first/bundle --images data --out submission.csv --details details.csv
    """
    from lesionflow.serving.predictor import predict_files

    result = predict_files(
        bundle, images, metadata=metadata, out=out, progress=not quiet, skip_corrupt=skip_corrupt, details=details
    )
    if as_json:
        print_json(result)
        return
    used = ", ".join(f"{count:,} by {mode.replace('_', ' and ')}" for mode, count in result["modes"].items())
    typer.echo(f"{result['out']}: {result['rows']:,} rows ({used}), {result['images_per_second']:,} images/s")
    if result["note"]:
        typer.echo(result["note"], err=True)
    for skipped in result["skipped"]:
        typer.echo(f"left out {skipped['isic_id']}: {skipped['reason']}", err=True)


@app.command()
def drift(
    bundle: BundleArgument,
    data: Annotated[
        Path, typer.Argument(help="Data set directory, folder, HDF5 file, or metadata CSV.", metavar="DATA")
    ],
    metadata: Annotated[Path | None, typer.Option(help="CSV of the lesions, where DATA holds pictures alone.")] = None,
    part: Annotated[str | None, typer.Option(help="Of a data set directory: train or test; by default, test.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write the whole report here (JSON).")] = None,
    alpha: Annotated[float, typer.Option(help="How often a report may be wrong to name anything.")] = 0.05,
    strict: Annotated[bool, typer.Option("--strict", help="Exit 4 if anything has shifted.")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Say whether lesions, and their scores, are still like those that the bundle was judged on.

    In all, and for each institution (`attribution`). No targets are needed; patients are what is counted.

    Example: lesionflow drift runs/first/bundle data/march --out drift.json
    """
    from rich.console import Console

    from lesionflow.serving.driftreport import drift_files, render

    report = drift_files(bundle, data, metadata=metadata, part=part, out=out, alpha=alpha, progress=not quiet)
    print_json(report) if as_json else Console().print(render(report))
    if strict and report["shifted"]:
        raise GateRefused(f"{data}: {report['shifted']} of {report['tested']} tests have shifted")


@app.command()
def submit(
    bundle: BundleArgument,
    data: Annotated[Path | None, typer.Option("--data", help="Folder of the competition's test files.")] = None,
    out: Annotated[Path, typer.Option("--out", help="Submission file (isic_id,target).")] = Path("submission.csv"),
    notebook: Annotated[
        Path | None, typer.Option(help="Write this folder for a Kaggle notebook without network instead.")
    ] = None,
    owner: Annotated[str, typer.Option(help="Kaggle user whose dataset and notebook that is.")] = "",
    wheels: Annotated[bool, typer.Option(help="Put the packages that lesionflow needs into it.")] = True,
    skip_corrupt: Annotated[bool, typer.Option(help="Count and list unusable images instead of stopping.")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Make a Kaggle submission from the test files, checked against sample_submission.csv where there is one.

    Example: lesionflow submit runs/first/bundle --data data/isic-2024 --out submission.csv

    With --notebook, write a folder instead: wheels, bundle and a notebook that does this without network.

    Example: lesionflow submit runs/first/bundle --notebook kaggle --owner me
    """
    from lesionflow.serving import notebook as folders
    from lesionflow.serving import submission

    if (data is None) == (notebook is None):
        raise UsageError("submit: give --data DIR for a submission, or --notebook FOLDER for a notebook that makes one")
    if notebook is not None:
        made = folders.write_folder(bundle, notebook, owner=owner, wheels=wheels, progress=not quiet)
        if as_json:
            print_json(made)
            return
        typer.echo(
            f"{made['folder']}: {made['packages']} wheels for Python {made['python']}, {made['bytes'] / 1e6:.0f} MB\n"
            f"kaggle datasets create -p {made['folder']} --dir-mode zip   ({made['dataset']})\n"
            f"kaggle kernels push -p {made['folder']}   ({made['kernel']})"
        )
        return
    assert data is not None
    result = submission.submit(bundle, data, out, skip_corrupt=skip_corrupt, progress=not quiet)
    if as_json:
        print_json(result)
        return
    asked = f"as {submission.SAMPLE} asks" if result["sample"] else f"no {submission.SAMPLE} to check against"
    used = ", ".join(f"{count:,} by {mode.replace('_', ' and ')}" for mode, count in result["modes"].items())
    typer.echo(f"{result['out']}: {result['rows']:,} rows ({used}), {asked}")
    for skipped in result["skipped"]:
        typer.echo(f"left out {skipped['isic_id']}: {skipped['reason']}", err=True)


@app.command()
def score(
    submission: Annotated[
        Path, typer.Argument(help="CSV or Parquet with isic_id and target (or a run's oof.parquet).")
    ],
    truth: Annotated[
        Path | None, typer.Argument(help="CSV with isic_id and target; a run's own tables hold the truth.")
    ] = None,
    min_tpr: Annotated[float, typer.Option(help="Least true positive rate of the partial area.")] = 0.8,
    replicates: Annotated[int, typer.Option(min=0, help="Bootstrap replicates for the interval; 0: none.")] = 2000,
    as_json: JsonOption = False,
) -> None:
    """Score a submission: the competition's pAUC above 80 % TPR and its neighbours, with patient-clustered intervals.

    Example: lesionflow score submission.csv train-metadata.csv --json
    or: lesionflow score runs/first/oof.parquet
    """
    from lesionflow.evaluation.scoring import render, score_files

    result = score_files(submission, truth, min_tpr=min_tpr, replicates=replicates)
    if as_json:
        print_json(result)
        return
    from rich.console import Console

    Console().print(render(result))


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="Run directory, oof.parquet, holdout.parquet or submission.", metavar="A")],
    b: Annotated[Path, typer.Argument(help="The same, on the same lesions.", metavar="B")],
    truth: Annotated[Path | None, typer.Option(help="CSV with isic_id and target, where neither says it.")] = None,
    of: Annotated[str, typer.Option(help="Of a run: oof (out of fold) or holdout (what is served).")] = "oof",
    replicates: Annotated[int, typer.Option(min=0, help="Bootstrap replicates for the intervals; 0: none.")] = 2000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the replicates.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Compare two models on the same lesions: difference, interval, power, and which is better.

    Example: lesionflow compare runs/new runs/old --of holdout

    Example: lesionflow compare mine.csv theirs.csv --truth train-metadata.csv --json
    """
    from lesionflow.evaluation.compare import compare_files, render

    if of not in ("oof", "holdout"):
        raise UsageError(f"--of {of}: oof or holdout")
    result = compare_files(a, b, truth=truth, of=of, replicates=replicates, seed=seed)
    if as_json:
        print_json(result)
        return
    from rich.console import Console

    Console().print(render(result))


@app.command()
def report(
    run: RunArgument,
    out: Annotated[Path | None, typer.Option("--out", help="Where to write it; by default RUN/report.html.")] = None,
    include_images: Annotated[
        bool, typer.Option("--include-images", help="Put the gallery's pictures of patients' lesions into it.")
    ] = False,
) -> None:
    """Write the report of an evaluated run again: one page, no network, and no patient's picture unless asked for.

    Example: lesionflow report runs/first --out first.html
    """
    from lesionflow import present

    if include_images and (out is None or out.resolve() == (run / "report.html").resolve()):
        raise UsageError("--include-images: say where with --out FILE; RUN/report.html never holds pictures")
    typer.echo(str(present.report(run, out, include_images=include_images)))


@app.command()
def explain(
    bundle: BundleArgument,
    images: Annotated[Path, typer.Option(help="Folder of images, HDF5 file, or data set directory.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the pictures and explain.json.")],
    quiet: QuietOption = False,
) -> None:
    """Show where a bundle's model looks: each lesion with its class-activation map over it.

    Example: lesionflow explain runs/first/bundle --images crops/ --out maps
    """
    from lesionflow.serving.explain import explain_files

    result = explain_files(bundle, images, out, progress=not quiet)
    typer.echo(f"{out}: {result['count']} pictures and explain.json")


@app.command(context_settings={"token_normalize_func": lambda option: option.replace("_", "-")})
def serve(
    bundle: BundleArgument,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8080,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of the model; all cores by default.")] = None,
    ready_file: Annotated[
        Path | None, typer.Option(help="Written (JSON with the URL) once requests are taken.")
    ] = None,
    model_name: Annotated[str | None, typer.Option(help="A second name for the model, in URLs.")] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes that answer; SIGHUP then restarts them one after another.")
    ] = None,
    limit: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE of a limit, such as visit=2000; may be repeated.")
    ] = None,
    token_file: TokenFileOption = None,
    public_key: PublicKeyOption = None,
    signature: SignatureOption = None,
    grace: Annotated[float, typer.Option(min=0, help="Seconds that begun requests may take at the end.")] = 30.0,
    predictor_host: Annotated[str | None, typer.Option(help="HOST[:PORT] of a Triton that runs the graph.")] = None,
    predictor_timeout: Annotated[float, typer.Option(min=0.1, help="Seconds to wait for it.")] = 30.0,
    predictor_request_timeout_seconds: Annotated[float | None, typer.Option(min=0.1, hidden=True)] = None,
    predictor_use_ssl: Annotated[str, typer.Option(hidden=True)] = "false",
    predictor_protocol: Annotated[str, typer.Option(hidden=True)] = "v2",
    http_port: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """Serve a bundle: triage of a visit, a page for it at /, the Open Inference Protocol v2, /metrics.

    Ctrl-C or SIGTERM drains and ends. A token, if requests must bring one, comes from the environment
    (LESIONFLOW_TOKEN) or --token-file.

    With --predictor-host it decodes and calibrates, and Triton runs the graph. The options that KServe
    adds to a transformer's command (--model_name, --predictor_host, --http_port, ...) are understood.

    Limits: body, images, visit_body, visit, heatmaps, requests, memory, wait, burst, time, headers, head_time, rate,
    idle, connections, image.bytes, image.pixels, image.side, image.min_side, image.scans; docs/serving.md says of what.

    Example: lesionflow serve runs/first/bundle --port 8080
    """
    from lesionflow.serving.app import serve as run_server
    from lesionflow.serving.settings import with_limits

    if predictor_protocol != "v2":
        raise UsageError(f"--predictor_protocol {predictor_protocol}: v2 is the one that is spoken here")
    if signature is not None and public_key is None:
        raise UsageError("--signature says nothing without --public-key: give the key that must have signed")
    if predictor_host and workers:
        typer.echo("--workers is left out: with a predictor one process waits for many answers at a time", err=True)
    run_server(
        bundle, host=host, port=http_port or port, threads=threads, ready_file=ready_file, name=model_name,
        predictor_host=predictor_host, predictor_timeout=predictor_request_timeout_seconds or predictor_timeout,
        predictor_tls=predictor_use_ssl.lower() in ("true", "1", "yes"),
        limits=with_limits(limit or []), token=read_token(token_file), grace=grace,
        workers=None if predictor_host else workers, public_key=public_key, signature=signature,
    )  # fmt: skip


@app.command()
def deploy(
    run: RunArgument,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 0,
) -> None:
    """Serve the run's bundle in the background and wait until it is ready; `undeploy` ends it.

    Example: lesionflow deploy runs/first
    """
    from lesionflow import steps

    typer.echo(steps.deploy(run, port=port)["url"])


@app.command()
def smoke(run: RunArgument) -> None:
    """Ask the deployed service about the bundle's reference lesions and compare with the stored answers.

    Example: lesionflow smoke runs/first
    """
    from lesionflow import steps

    result = steps.smoke(run)
    typer.echo(f"{result['url']}: {result['lesions']} reference lesions, off by at most {result['max_abs']:.1e}")


@app.command()
def undeploy(run: RunArgument) -> None:
    """End the run's background service.

    Example: lesionflow undeploy runs/first
    """
    from lesionflow import steps

    steps.undeploy(run)


@app.command()
def show(run: RunArgument) -> None:
    """Print what a run found, and where to look.

    Example: lesionflow show runs/first
    """
    from lesionflow.progress import print_summary

    print_summary(run)


@app.command()
def ask(
    url: Annotated[str, typer.Argument(help="Where the service is, e.g. http://127.0.0.1:8080; or a deployed run.")],
    images: Annotated[list[Path] | None, typer.Argument(help="Image files, a folder of them, or an HDF5 file.")] = None,
    metadata: Annotated[
        Path | None, typer.Option(help="CSV of one patient's lesions: the visit is ranked as a whole.")
    ] = None,
    patient: Annotated[str | None, typer.Option(help="Of several in --metadata, the one to ask about.")] = None,
    token_file: TokenFileOption = None,
    top: Annotated[int, typer.Option(min=1, help="How many to print.")] = 10,
    as_json: JsonOption = False,
) -> None:
    """Ask a running service about images; prints the most suspicious first.

    With --metadata the images are one patient's visit: lesions are compared with each other, and reasons given.

    Example: lesionflow ask http://127.0.0.1:8080 crops/ --metadata visit.csv
    """
    from lesionflow import client
    from lesionflow.progress import print_answers, print_visit

    if (deployed := Path(url) / "deploy.json").exists():
        url = json.loads(deployed.read_text())["url"]
    elif Path(url).is_dir():
        raise UsageError(f"{url}: not deployed; `lesionflow deploy {url}` serves it, or give a URL")
    with client.Client(url, token=read_token(token_file)) as service:
        if metadata is None:
            if patient is not None or not images:
                raise UsageError("nothing to ask about: give images, or --metadata, which --patient is looked up in")
            answers = service.infer(client.pictures(images))
            print_json(answers) if as_json else print_answers(answers, top)
            return
        rows = client.rows_of(metadata, patient) if patient is not None else None
        only = {row.get("isic_id", "") for row in rows} if rows is not None else None
        found = list(client.pictures(images or [], only))
        if images and not found:
            typer.echo(f"no picture has the name of a lesion of {patient}: asking about the metadata alone", err=True)
        visit = service.triage(found, rows or metadata, reasons=max(top, 100))
        print_json(visit) if as_json else print_visit(visit, top)


@app.command()
def recipes() -> None:
    """List the shipped recipes."""
    from lesionflow.recipe import Recipe, shipped

    for name, path in shipped().items():
        typer.echo(f"{name:14} {Recipe.load(path).description}")


@data_app.command("synth")
def data_synth(
    out: Annotated[Path, typer.Option("--out", help="Where to write the data set.")],
    patients: Annotated[int, typer.Option(help="Number of patients.")] = 40,
    lesions: Annotated[int, typer.Option(help="Number of lesions.")] = 2000,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    prevalence: Annotated[float, typer.Option(help="Share of malignant lesions (the real one is 0.001).")] = 0.05,
    repeat_bytes: Annotated[
        bool, typer.Option(help="Draw images from a small pool: millions of rows cheaply.")
    ] = False,
    quiet: QuietOption = False,
) -> None:
    """Make a synthetic mini SLICE-3D in the competition's layout, with the true answers in truth.json.

    Example: lesionflow data synth --out data --patients 100 --lesions 5000
    """
    from lesionflow.data.synthetic import synthesize

    synthesize(
        out, patients=patients, lesions=lesions, seed=seed, prevalence=prevalence,
        repeat_bytes=repeat_bytes, progress=not quiet,
    )  # fmt: skip
    typer.echo(f"{out}: {lesions:,} synthetic lesions of {patients:,} patients")


@data_app.command("fetch")
def data_fetch(
    out: Annotated[Path, typer.Option("--out", help="Where to put the files.")],
    competition: Annotated[str, typer.Option(help="Kaggle competition.")] = "isic-2024-challenge",
    quiet: QuietOption = False,
) -> None:
    """Download the competition from Kaggle; resumes, checks, and does nothing when all is there.

    The token comes from the environment or ~/.kaggle. Example: lesionflow data fetch --out data/isic-2024
    """
    from lesionflow.data.fetch import fetch

    for path in fetch(out, competition=competition, progress=not quiet):
        typer.echo(str(path))


@data_app.command("convert")
def data_convert(
    kind: Annotated[str, typer.Argument(help="isic2018, isic2019, isic2020 or pad-ufes-20.", metavar="KIND")],
    source: Annotated[Path, typer.Argument(help="The set as published, unpacked.", metavar="FOLDER")],
    out: Annotated[Path, typer.Option("--out", help="Where to write the data set.")],
    uncertain: Annotated[
        str, typer.Option(help="What an actinic keratosis is: benign, malignant, or drop.")
    ] = "benign",
    without: Annotated[list[Path] | None, typer.Option(help="Leave out the ids of this data set; repeatable.")] = None,
    side: Annotated[
        int, typer.Option(min=0, help="Scale images down to this shorter side, pixels; 0: as they are.")
    ] = 0,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Convert a public set of skin lesions to a data set directory, to start an image model from.

    Example: lesionflow data convert isic2019 ISIC_2019 --out data/isic-2019 --side 256
    """
    from lesionflow.data.external import convert

    counts = convert(kind, source, out, uncertain=uncertain, without=without or (), side=side, progress=not quiet)
    if as_json:
        print_json(counts)
        return
    left_out = "; ".join(f"{number:,} left out ({reason})" for reason, number in counts["dropped"].items())
    typer.echo(
        f"{out}: {counts['lesions']:,} lesions, {counts['malignant']:,} malignant, {counts['licence']}"
        f"{'; ' * bool(left_out)}{left_out}"
    )


@data_app.command("overlap")
def data_overlap(
    a: Annotated[Path, typer.Argument(help="Data set directory or metadata file.", metavar="A")],
    b: Annotated[Path, typer.Argument(help="Another.", metavar="B")],
    as_json: JsonOption = False,
) -> None:
    """List the ids that two data sets have in common; exit 3 if there are any.

    Example: lesionflow data overlap data/isic-2019 data/isic-2024
    """
    from lesionflow.data.external import overlap

    ids = overlap(a, b)
    print_json(ids) if as_json else typer.echo("\n".join(ids) or "no id in common")
    if ids:
        raise DataError(
            f"{a} and {b}: {len(ids):,} ids in common; leave them out (`lesionflow data convert --without`)"
        )


@data_app.command("check")
def data_check(
    directory: Annotated[Path, typer.Argument(help="Data set directory.", metavar="DIR")],
    images: Annotated[bool, typer.Option(help="Decode and compare the images too.")] = True,
    folds: Annotated[Path | None, typer.Option(help="A folds file to check against the patients.")] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Look for everything that would spoil a training or leak the label; exit 3 if there is an error.

    Example: lesionflow data check data
    """
    from lesionflow.data.audit import audit, render, to_json

    findings = audit(directory, images=images, folds=folds, progress=not quiet)
    if as_json:
        typer.echo(to_json(findings))
    else:
        from rich.console import Console

        Console().print(render(findings))
    if errors := sum(f.severity == "error" for f in findings):
        raise DataError(f"{directory}: {errors} kinds of error; each is listed with its remedy")


@data_app.command("prepare")
def data_prepare(
    directory: Annotated[Path, typer.Argument(help="Data set directory.", metavar="DIR")],
    out: Annotated[Path, typer.Option("--out", help="Where to write the store.")],
    skip_corrupt: Annotated[bool, typer.Option(help="Leave out rows whose image is missing or damaged.")] = False,
    quiet: QuietOption = False,
) -> None:
    """Stream a data set into a memory-mapped store.

    Example: lesionflow data prepare data --out store
    """
    from lesionflow.data.store import prepare

    store = prepare(directory, out, skip_corrupt=skip_corrupt, progress=not quiet)
    typer.echo(f"{out}: {len(store):,} lesions, hash {store.hash[:12]}")
    for isic_id in store.info["skipped"]:
        typer.echo(f"left out {isic_id}", err=True)


@data_app.command("split")
def data_split(
    store: Annotated[Path, typer.Argument(help="Prepared store.", metavar="STORE")],
    out: Annotated[Path, typer.Option("--out", help="Folds file (Parquet).")],
    folds: Annotated[int, typer.Option(min=2, help="Number of folds (by patient only).")] = 5,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    holdout: Annotated[
        float, typer.Option(min=0, max=0.5, help="Share of patients kept out of every fold, to judge what is served.")
    ] = 0.0,
    kind: Annotated[str, typer.Option(help="patient, or institution: each is a fold of its own.")] = "patient",
) -> None:
    """Split a store into folds that share no patient; an existing file for the same data is kept.

    Example: lesionflow data split store --out folds.parquet --holdout 0.2
    """
    from lesionflow.data.folds import HOLDOUT, write_folds

    made = write_folds(store, out, count=folds, seed=seed, holdout=holdout, kind=kind)
    aside = f", {len(made.holdout_rows()):,} lesions in the hold-out" if HOLDOUT in made.fold else ""
    typer.echo(f"{out}: {made.count} folds{aside}, hash {made.hash[:12]}")
    for k, name in enumerate(made.names or ()):
        typer.echo(f"fold {k}: {name}")


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is neither a fold number nor all", param_hint="--fold") from None


def main() -> NoReturn:
    """Run the command line and end the process with the error table's exit code."""
    from lesionflow.keys import share_files
    from lesionflow.training.status import report

    share_files()
    debug = "--debug" in sys.argv[1:]
    try:
        app(standalone_mode=True)
        code, message = 0, ""
    except LesionflowError as error:
        if debug:
            traceback.print_exc()
        code, message = error.exit_code, str(error)
    except ModuleNotFoundError as missing:
        if debug or (explained := explain_missing(missing)) is None:
            raise
        code, message = explained.exit_code, str(explained)
    except KeyboardInterrupt:
        code, message = 130, "interrupted"
    except SystemExit as stop:
        code, message = stop.code if isinstance(stop.code, int) else 1, ""
    if message:
        print(f"error: {message}", file=sys.stderr)  # noqa: T201
    report(code, message)
    sys.exit(code)
