"""The main job's steps: plain functions, paths and plain values in, files out.

    prepare -> split -> train (per fold) -> stack -> evaluate -> gate -> export -> deploy -> smoke

The command line, the pipeline's components and the notebooks call these and nothing else. A step
whose work is done under the same content key (`keys`) returns at once; `run_all` is the steps in order.
Everything is found in, and written to, the run directory:

    recipe.toml  run.json  steps/<step>.json        what was asked, of which data, and what is done
    store/  folds.parquet                           the data and its split, with their hashes
    fold-<k>/  events/  metrics.csv                 weights, TensorBoard and curves
    oof.parquet  holdout.parquet                    scores of lesions whose patients the models never saw
    stack/                                          boosted trees on the metadata, and how they join the pictures
    metrics.json  gate.json                         what they are worth, and whether that is enough
    report.html  gallery.html  MODEL_CARD.md        for people
    bundle/                                         for the service
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lesionflow import keys
from lesionflow.errors import DataError, GateRefused, UsageError
from lesionflow.plan import STEPS, begin, data_of, incumbent_hash, plan_gate, planned, recipe_of, step
from lesionflow.recipe import Recipe

if TYPE_CHECKING:
    from lesionflow.training.status import Progress

__all__ = [
    "STEPS", "begin", "copy_bundle", "deploy", "evaluate", "export", "gate", "plan_gate", "planned", "prepare",
    "run_all", "smoke", "split", "stack", "train", "undeploy",
]  # fmt: skip


def prepare(run: Path, data: Path, key: str, *, progress: bool = False) -> Path:
    """Data set directory -> `store/`. Raises `DataError` naming what can't be used."""
    from lesionflow.data import store

    recipe = recipe_of(run)
    with step(run, "prepare", key, lambda: ["store"]) as needed:
        if needed:
            store.prepare(
                data, run / "store",
                skip_corrupt=recipe.image.skip_corrupt, pictures=recipe.model.per_fold > 0, progress=progress,
            )  # fmt: skip
    return run / "store"


def split(run: Path, key: str) -> Path:
    """`store/` -> `folds.parquet`, written once; a second run reuses it, a changed file is refused."""
    from lesionflow.data.folds import Folds, write_folds

    path, options = run / "folds.parquet", recipe_of(run).folds
    record = keys.read_record(run, "split")
    if path.exists():
        Folds.load(path)  # Refuses a file whose assignments don't have the hash they were written with ...
        if record is not None and record["outputs"]["folds.parquet"] != keys.file_hash(path):
            # ... and this one, a file that was swapped together with its hash.
            raise DataError(f"{path}: not the file this run wrote; delete it and its run directory, and split again")
        if record is None or record["key"] != key:
            path.unlink()  # Another recipe's or data set's folds.
    with step(run, "split", key, lambda: ["folds.parquet"]) as needed:
        if needed:
            write_folds(
                run / "store", path, count=options.count, seed=options.seed, holdout=options.holdout, kind=options.kind
            )
    return path


def train(
    run: Path,
    key: str,
    *,
    folds: Sequence[int] | None = None,
    processes: int = 1,
    jobs: int = 0,
    anew: bool = False,
    show: Callable[[Progress], None] | None = None,
) -> None:
    """Train folds (all by default) -> `fold-<k>/` with weights and held-out scores, continuing what was begun.

    Without a model of pictures (`model.per_fold = 0`) there is nothing to do here: trees are grown by `stack`.
    A model that another recipe left half-trained is refused (`DataError`), or with `anew` started again.
    """
    from lesionflow.data.folds import Folds
    from lesionflow.training import launch
    from lesionflow.training.nodes import Nodes

    if not recipe_of(run).model.per_fold:
        with step(run, "train", key, lambda: []):
            return
    count = Folds.load(run / "folds.parquet").count
    wanted = list(range(count)) if folds is None else list(folds)
    if wrong := [k for k in wanted if not 0 <= k < count]:
        raise UsageError(f"--fold {wrong[0]}: the run has folds 0 to {count - 1}")
    if Nodes.from_environment(os.environ).rank > 0:
        # The job's first node records the step; this one only has to find it done when it comes late.
        keys.require(run, "split")
        if not keys.is_done(run, "train", key):
            launch.train(run, wanted, processes=processes, jobs=jobs, anew=anew, show=show)
        return
    if len(wanted) < count:
        launch.train(run, wanted, processes=processes, jobs=jobs, anew=anew, show=show)
        return
    with step(run, "train", key, lambda: [f"fold-{k}/{name}" for k in wanted for name in _fold_files(run)]) as needed:
        if needed:
            launch.train(run, wanted, processes=processes, jobs=jobs, anew=anew, show=show)


def stack(run: Path, key: str, *, progress: bool = False) -> Path:
    """The folds' scores -> `oof.parquet`: every lesion once, scored by a model that never saw its patient.

    With metadata in the recipe, boosted trees are grown here and joined with the pictures' scores: `stack/`.
    Where the split set lesions aside from every fold, `holdout.parquet` has them with the mean of all folds'
    logits, which is what is served, and `inputs.json` says what pictures the model was tried on.
    """
    from lesionflow.gather import OUTPUTS, gather

    with step(run, "stack", key, lambda: [name for name in OUTPUTS if (run / name).exists()]) as needed:
        if needed:
            gather(run, progress=progress)
    return run / "oof.parquet"


def evaluate(run: Path, key: str, *, progress: bool = False) -> dict[str, Any]:
    """`oof.parquet` and `holdout.parquet` -> `metrics.json`, and the folds' curves in one `metrics.csv`.

    Raises `DataError` for predictions that leak: other folds, a patient on two sides, a model scoring its own.
    """
    with step(run, "evaluate", key, lambda: ["metrics.json", "metrics.csv"]) as needed:
        if needed:
            _evaluate(run, progress)
    return keys.read_json(run / "metrics.json")


def gate(run: Path, key: str, *, incumbent: Path | None = None) -> dict[str, Any]:
    """`metrics.json` -> `gate.json`, `MODEL_CARD.md` and a first `report.html`.

    Raises `GateRefused` with the reasons when the model isn't good enough; the report is written all
    the same. With an `incumbent` run's `oof.parquet` beside its bundle the paired difference counts too.
    """
    from lesionflow import present
    from lesionflow.evaluation import gate as gates

    if incumbent_hash(run, incumbent) != keys.read_json(run / "run.json").get("incumbent", ""):
        raise UsageError(
            f"{run}: the gate was planned with another incumbent, or with none; plan it again with this one"
        )
    recipe = recipe_of(run)
    with step(run, "gate", key, lambda: ["gate.json", "MODEL_CARD.md"]) as needed:
        if needed:
            paired = present.paired(run, incumbent) if incumbent else None
            result = gates.check(keys.read_json(run / "metrics.json"), recipe.gate, paired=paired)
            keys.write_json(run / "gate.json", result)
            for stale in ("explain.json", "gallery.html", "smoke.json"):  # Another model's.
                (run / stale).unlink(missing_ok=True)
            present.card(run)
            present.report(run)
            if not result["passed"]:
                raise GateRefused("the gate refuses this model: " + "; ".join(result["reasons"]))
    return keys.read_json(run / "gate.json")


def export(run: Path, key: str) -> Path:
    """Weights -> `bundle/`, only if the exported graph agrees with torch on stored lesions (else `GateRefused`).

    The bundle's own maps then explain its errors: `gallery.html`, `explain.json`, and `report.html` once more.
    """
    from lesionflow import present
    from lesionflow.pack import pack

    written = ["bundle"]
    with step(run, "export", key, lambda: written) as needed:
        if needed:
            pack(run)
            written += present.explain(run)
    return run / "bundle"


def copy_bundle(bundle: Path, out: Path) -> Path:
    """A verified copy of a bundle. Raises `UsageError` when `out` is already there."""
    import shutil

    from lesionflow.bundle import Bundle

    if out.exists():
        raise UsageError(f"--out {out}: already there; choose another name or delete it")
    shutil.copytree(bundle, out)
    return Bundle.open(out).path


def deploy(run: Path, *, port: int = 0) -> dict[str, Any]:
    """Serve the run's bundle in the background of this machine and wait until it is ready.

    Writes `deploy.json` (url, pid). `smoke` checks it, `undeploy` ends it. Raises `ClusterError` if it
    doesn't become ready, `DataError` if the bundle isn't this recipe's.
    """
    from lesionflow.serving import local

    run = run.resolve()
    keys.require(run, "export")
    if not recipe_of(run).model.per_fold:
        raise UsageError(f"{run}: this model knows metadata alone, and the service takes pictures; use `predict`")
    if (run / "deploy.json").exists() and keys.read_json(run / "deploy.json")["kind"] == "local":
        undeploy(run)
    url, pid = local.start(run / "bundle", run / "serving.log", port=port)
    deployed = {"url": url, "pid": pid, "kind": "local"}
    keys.write_json(run / "deploy.json", deployed)
    return deployed


def smoke(run: Path, url: str | None = None) -> dict[str, Any]:
    """Ask the deployed service about the bundle's reference lesions and compare with the stored answers.

    Writes `smoke.json`. Raises `GateRefused` if an answer is off, `ClusterError` if none comes.
    """
    from lesionflow.bundle import Bundle
    from lesionflow.client import ask
    from lesionflow.options import read_token
    from lesionflow.serving.predictor import SMOKE_TOLERANCE

    url = url or keys.read_json(run / "deploy.json")["url"]
    bundle = Bundle.open(run / "bundle")
    stored = bundle.answers()
    started = time.monotonic()
    # The service was started with the token of this very environment, if there is one.
    answers = ask(url, [bundle.path / "reference" / entry["file"] for entry in stored], token=read_token(None))
    worst = max(abs(answer["logit"] - entry["logit"]) for answer, entry in zip(answers, stored, strict=True))
    result = {
        "url": url,
        "lesions": len(stored),
        "max_abs": worst,
        "seconds": round(time.monotonic() - started, 3),
        "answers": answers,
    }
    keys.write_json(run / "smoke.json", result)
    if not worst <= SMOKE_TOLERANCE:
        raise GateRefused(
            f"{url}: answers differ by {worst:.3g} from those stored in the bundle; don't use this service"
        )
    return result


def undeploy(run: Path) -> None:
    """End the run's local service, if one is running. Raises `UsageError` for a model served on a cluster."""
    from lesionflow.serving import local

    run = run.resolve()
    if not (run / "deploy.json").exists():
        return
    deployed = keys.read_json(run / "deploy.json")
    if deployed["kind"] != "local":
        raise UsageError(
            f"{run}: served on a cluster as {deployed['name']}; `lesionflow cluster clean` lists what is there"
        )
    local.stop(run / "bundle", deployed["pid"])
    (run / "deploy.json").unlink(missing_ok=True)


def run_all(
    recipe: Recipe,
    data: Path,
    run: Path,
    *,
    processes: int = 1,
    jobs: int = 0,
    incumbent: Path | None = None,
    keep_serving: bool = False,
    tell: Callable[[str], None] = lambda text: None,
    show: Callable[[Progress], None] | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """All steps in order. `tell` hears one line a step, `show` the training's progress."""
    from lesionflow.serving.predictor import Predictor

    keyed = begin(run, recipe, data, incumbent=incumbent)

    def stage(step: str) -> str:
        done = step in keyed and keys.is_done(run, step, keyed[step])
        tell(f"{step}{' (already done)' if done else ''}")
        return keyed.get(step, "")

    prepare(run, data, stage("prepare"), progress=progress)
    if skipped := keys.read_json(run / "store" / "store.json")["skipped"]:
        first = ", ".join(skipped[:5])
        tell(f"left out {len(skipped)} lesions without a usable image: {first} (all in {run}/store/store.json)")
    split(run, stage("split"))
    train(run, stage("train"), processes=processes, jobs=jobs, show=show)
    stack(run, stage("stack"), progress=progress)
    evaluate(run, stage("evaluate"), progress=progress)
    gate(run, stage("gate"), incumbent=incumbent)
    export(run, stage("export"))
    if not recipe.model.per_fold:
        tell("deploy, smoke: left out, as the service takes pictures and this model knows metadata alone")
        return Predictor(run / "bundle").smoke()
    stage("deploy")
    deploy(run)
    try:
        stage("smoke")
        answered = smoke(run)
    except BaseException:
        undeploy(run)
        raise
    if not keep_serving:
        undeploy(run)
    return answered


def _evaluate(run: Path, progress: bool) -> None:
    import polars as pl

    from lesionflow.evaluation import leaks
    from lesionflow.evaluation.evaluate import evaluate as figures
    from lesionflow.serving.predictor import SMOKE_TOLERANCE, VISIT_TOLERANCE

    recipe, (store, folds) = recipe_of(run), data_of(run)
    oof = pl.read_parquet(run / "oof.parquet")
    holdout = pl.read_parquet(run / "holdout.parquet") if folds.holdout else None
    found = leaks.check_oof(oof, folds, holdout, store=store) | leaks.duplicates(store, folds, progress=progress)
    split = {"kind": folds.kind, "names": folds.names, "holdout": len(folds.holdout_rows())}
    margin = max(recipe.gate.parity, VISIT_TOLERANCE if recipe.tabular.members else SMOKE_TOLERANCE)
    metrics = figures(oof, holdout, recipe.evaluation, split=split, leaks=found, margin=margin)
    count, members = folds.count, recipe.model.per_fold
    paths = [run / f"fold-{k}/model-{m}/metrics.csv" for k in range(count) for m in range(members)]
    curves = [pl.read_csv(path, infer_schema_length=None) for path in paths if path.exists()]
    text = ""
    if curves:
        # A resumed run wrote some steps twice; the later row is the one that counts.
        merged = pl.concat(curves, how="diagonal_relaxed")
        text = merged.unique(["fold", "model", "step"], keep="last", maintain_order=True).write_csv()
    keys.write_text(run / "metrics.csv", text)
    keys.write_json(run / "metrics.json", metrics)


def _fold_files(run: Path) -> list[str]:
    models = [f"model-{number}/weights.safetensors" for number in range(recipe_of(run).model.per_fold)]
    return ["oof.parquet", "holdout.parquet", *models]
