"""The main job's steps: plain functions, paths and plain values in, files out.

    prepare -> split -> train (per fold) -> stack -> evaluate -> gate -> export -> deploy -> smoke

The command line, the pipeline's components and the notebooks call these and nothing else. A step
whose work is done under the same content key (`keys`) returns at once; `run_all` is the steps in order.
Everything is found in, and written to, the run directory:

    recipe.toml  run.json  steps/<step>.json        what was asked, of which data, and what is done
    store/  folds.parquet                           the data and its split, with their hashes
    fold-<k>/  events/  metrics.csv                 weights, TensorBoard and curves
    oof.parquet  metrics.json  gate.json            out-of-fold scores and what they are worth
    report.html  MODEL_CARD.md  bundle/             for people, and for the service
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lesionflow import keys
from lesionflow.errors import DataError, GateRefused, UsageError
from lesionflow.plan import STEPS, begin, planned, step
from lesionflow.recipe import Recipe

if TYPE_CHECKING:
    import polars as pl

    from lesionflow.data.folds import Folds
    from lesionflow.data.store import Store
    from lesionflow.training.status import Progress

__all__ = [
    "STEPS", "begin", "copy_bundle", "deploy", "evaluate", "export", "gate", "planned", "prepare", "run_all",
    "smoke", "split", "stack", "train", "undeploy",
]  # fmt: skip

PARITY_LESIONS = 64
"""Stored lesions, drawn at random, on which the exported graph must agree with torch before a bundle is written."""
DECISIVE_LESIONS = 128
"""At most so many malignant lesions of the hold-out, on which it must also agree with what was evaluated."""
REFERENCE_LESIONS = 8
"""Synthetic lesions whose answers travel in the bundle."""
DESCRIBED = (
    "patient_id", "sex", "age_approx", "anatom_site_general", "attribution", "copyright_license", "tbp_tile_type",
    "clin_size_long_diam_mm", "tbp_lv_Lext", "tbp_lv_Bext",
)  # fmt: skip
"""Columns that go with the scores where the data has them: what subgroups and credits are made of."""


def prepare(run: Path, data: Path, key: str, *, progress: bool = False) -> Path:
    """Data set directory -> `store/`. Raises `DataError` naming what can't be used."""
    from lesionflow.data import store

    recipe = _recipe(run)
    with step(run, "prepare", key, lambda: ["store"]) as needed:
        if needed:
            store.prepare(data, run / "store", skip_corrupt=recipe.image.skip_corrupt, progress=progress)
    return run / "store"


def split(run: Path, key: str) -> Path:
    """`store/` -> `folds.parquet`, written once; a second run reuses it, a changed file is refused."""
    from lesionflow.data.folds import Folds, write_folds

    path, options = run / "folds.parquet", _recipe(run).folds
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

    A model that another recipe left half-trained is refused (`DataError`), or with `anew` started again.
    """
    from lesionflow.data.folds import Folds
    from lesionflow.training import launch

    count = Folds.load(run / "folds.parquet").count
    wanted = list(range(count)) if folds is None else list(folds)
    if wrong := [k for k in wanted if not 0 <= k < count]:
        raise UsageError(f"--fold {wrong[0]}: the run has folds 0 to {count - 1}")
    if launch.Nodes.from_environment(os.environ).rank > 0:
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

    Where the split set lesions aside from every fold, `holdout.parquet` has them with the mean of all folds'
    logits, which is what is served, and `inputs.json` says what pictures the model was tried on.
    """
    out = run / "oof.parquet"

    def outputs() -> list[str]:
        return [name for name in ("oof.parquet", "holdout.parquet", "inputs.json") if (run / name).exists()]

    with step(run, "stack", key, outputs) as needed:
        if needed:
            _stack(run, progress)
    return out


def evaluate(run: Path, key: str, *, progress: bool = False) -> dict[str, Any]:
    """`oof.parquet` and `holdout.parquet` -> `metrics.json`, and the folds' curves in one `metrics.csv`.

    Raises `DataError` for predictions that leak: other folds, a patient on two sides, a model scoring its own.
    """
    with step(run, "evaluate", key, lambda: ["metrics.json", "metrics.csv"]) as needed:
        if needed:
            _evaluate(run, progress)
    return keys.read_json(run / "metrics.json")


def gate(run: Path, key: str, *, incumbent: Path | None = None) -> dict[str, Any]:
    """`metrics.json` -> `gate.json`, `report.html` and `MODEL_CARD.md`.

    Raises `GateRefused` with the reasons when the model isn't good enough; the report is written all
    the same. With an `incumbent` run's `oof.parquet` beside its bundle the paired difference counts too.
    """
    from lesionflow.evaluation import gate as gates

    recipe = _recipe(run)
    with step(run, "gate", key, lambda: ["gate.json", "report.html", "MODEL_CARD.md"]) as needed:
        if needed:
            paired = _paired(run, incumbent) if incumbent else None
            result = gates.check(keys.read_json(run / "metrics.json"), recipe.gate, paired=paired)
            keys.write_json(run / "gate.json", result)
            _report(run, result)
            if not result["passed"]:
                raise GateRefused("the gate refuses this model: " + "; ".join(result["reasons"]))
    return keys.read_json(run / "gate.json")


def export(run: Path, key: str) -> Path:
    """Weights -> `bundle/`, only if the exported graph agrees with torch on stored lesions (else `GateRefused`)."""
    with step(run, "export", key, lambda: ["bundle"]) as needed:
        if needed:
            _export(run)
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
    from lesionflow.serving.client import ask
    from lesionflow.serving.predictor import SMOKE_TOLERANCE

    url = url or keys.read_json(run / "deploy.json")["url"]
    bundle = Bundle.open(run / "bundle")
    stored = bundle.answers()
    started = time.monotonic()
    answers = ask(url, [bundle.path / "reference" / entry["file"] for entry in stored])
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
    stack(run, stage("stack"))
    evaluate(run, stage("evaluate"))
    gate(run, stage("gate"), incumbent=incumbent)
    export(run, stage("export"))
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


def _stack(run: Path, progress: bool) -> None:
    import polars as pl

    store, folds = _open(run)
    parts = {name: [_scores(run, folds, k, name) for k in range(folds.count)] for name in ("oof", "holdout")}
    for k, part in enumerate(parts["oof"]):
        if (part["fold"] != k).any():
            raise DataError(f"{run}/fold-{k}/oof.parquet: scores of another fold; delete the folder and train again")
    _write_scores(run / "oof.parquet", pl.concat(parts["oof"]), store, len(store) - len(folds.holdout_rows()))
    if not folds.holdout:
        for name in ("holdout.parquet", "inputs.json"):
            (run / name).unlink(missing_ok=True)
        return
    # What is served is the mean of the folds' models, and none of them has seen these patients.
    logit = pl.col("logit")
    served = pl.concat(parts["holdout"]).group_by("isic_id").agg(fold_logits=logit, logit=logit.mean())
    table = _judged(run, parts["holdout"][0].drop("logit").join(served, on="isic_id"), store, progress)
    _write_scores(run / "holdout.parquet", table, store, len(folds.holdout_rows()))


def _scores(run: Path, folds: Folds, k: int, name: str) -> pl.DataFrame:
    """The scores that fold k's training wrote, if they are of this very recipe, data and split."""
    import polars as pl

    path = run / f"fold-{k}" / f"{name}.parquet"
    if not path.exists():
        raise DataError(f"{path}: fold {k} has no scores; train it first (`lesionflow train --fold {k}`)")
    part = pl.read_parquet(path)
    if pl.read_parquet_metadata(path).get("identity") != keys.fold_identity(keys.planned_keys(run)["train"], k):
        raise DataError(f"{path}: scores of another recipe, data set or code; train fold {k} again")
    if set(part["fold_hash"]) - {folds.hash}:
        raise DataError(f"{path}: scores of another split; delete {path.parent} and train fold {k} again")
    return part


def _judged(run: Path, table: pl.DataFrame, store: Store, progress: bool) -> pl.DataFrame:
    """The table with `doubts`, why a picture can't be judged; writes what that is held against to `inputs.json`."""
    import numpy as np
    import polars as pl

    from lesionflow.data.images import to_pixels
    from lesionflow.models.image import preprocess_spec
    from lesionflow.progress import track
    from lesionflow.serving.inputs import reference, statistics, unusual

    spec, place = preprocess_spec(_recipe(run)), {name: row for row, name in enumerate(store.ids)}
    found = [
        statistics(to_pixels(store.jpeg(place[name]), spec)[None])
        for name in track(table["isic_id"], "pictures", total=len(table), show=progress)
    ]
    stats = {name: np.concatenate([one[name] for one in found]) for name in found[0]}
    fold_logits = np.array(table["fold_logits"].to_list())
    known = reference(stats, fold_logits)
    keys.write_json(run / "inputs.json", known)
    return table.with_columns(doubts=pl.Series(unusual(stats, fold_logits, known), dtype=pl.List(pl.String)))


def _write_scores(out: Path, table: pl.DataFrame, store: Store, expected: int) -> None:
    """Scores with what subgroups are made of, one row per lesion, in the order of their ids."""
    extra = [name for name in DESCRIBED if name in store.table.columns]
    table = table.join(store.table.select("isic_id", *extra), on="isic_id", how="left").sort("isic_id")
    if len(table) != expected or table["isic_id"].n_unique() != expected:
        raise DataError(f"{out}: {len(table)} scores for {expected} lesions; train every fold again")
    with keys.atomic(out) as file:
        table.write_parquet(file)


def _evaluate(run: Path, progress: bool) -> None:
    import polars as pl

    from lesionflow.evaluation import leaks
    from lesionflow.evaluation.evaluate import evaluate as figures

    recipe, (store, folds) = _recipe(run), _open(run)
    oof = pl.read_parquet(run / "oof.parquet")
    holdout = pl.read_parquet(run / "holdout.parquet") if folds.holdout else None
    leaks.check_oof(oof, folds)
    found = leaks.duplicates(store, folds, progress=progress)
    split = {"kind": folds.kind, "names": folds.names, "holdout": len(folds.holdout_rows())}
    metrics = figures(oof, holdout, recipe.evaluation, split=split, leaks=found)
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


def _export(run: Path) -> None:
    import numpy as np

    from lesionflow.data.datamodule import pixels
    from lesionflow.export.onnx import export_bundle
    from lesionflow.models.image import Members, preprocess_spec
    from lesionflow.training.scoring import fold_weights, load_network

    recipe, (store, folds) = _recipe(run), _open(run)
    metrics = keys.read_json(run / "metrics.json")
    models = [
        Members([load_network(path, recipe) for path in paths]) for paths in fold_weights(run, recipe, folds.count)
    ]
    spec = preprocess_spec(recipe)
    served, thresholds = _decisive(run, store), _thresholds(metrics["served"], recipe.gate.parity)
    drawn = np.random.default_rng(0).choice(len(store), min(PARITY_LESIONS, len(store)), replace=False)
    rows = [*served, *(row for row in drawn.tolist() if row not in served)]
    info = {
        "name": recipe.name,
        "metrics": metrics,
        "calibration": metrics["probability"],
        "thresholds": thresholds,
        "inputs": keys.read_json(run / "inputs.json") if folds.holdout else {},
        "recipe": recipe.to_dict(),
        "data_hash": store.hash,
        "fold_hash": folds.hash,
        "data_licence": _licences(store),
        "synthetic": store.info["synthetic"],
    }
    export_bundle(
        models,
        run / "bundle",
        spec=spec,
        info=info,
        parity_images=np.stack([pixels(store, int(row), spec) for row in rows]),
        tolerance=recipe.gate.parity,
        # evaluated=np.array(list(served.values())),
        reference=_reference_lesions(),
        card=(run / "MODEL_CARD.md").read_text(),
        tta=recipe.training.tta,
    )


def _thresholds(served: dict[str, Any], tolerance: float) -> dict[str, Any]:
    """The bands that could be vouched for, lowered by what the exported graph may differ: none is lost to rounding."""
    bands = served.get("thresholds", {})
    return {
        name: one | {"logit": one["logit"] - tolerance}
        for name, one in bands.items()
        if one["reached"] and bands["refer"]["reached"]
    }


def _decisive(run: Path, store: Store) -> dict[int, float]:
    """Store row -> served logit of the hold-out's malignant lesions: on these the thresholds and their bounds rest."""
    import polars as pl

    if not (run / "holdout.parquet").exists():
        return {}
    place = {name: row for row, name in enumerate(store.ids)}
    table = pl.read_parquet(run / "holdout.parquet").filter(pl.col("target") == 1).sort("isic_id").head(DECISIVE_LESIONS)
    return {place[name]: logit for name, logit in table.select("isic_id", "logit").iter_rows()}


def _report(run: Path, gate_result: dict[str, Any]) -> None:
    import polars as pl

    from lesionflow.evaluation.report import write_card, write_report

    recipe, (store, folds) = _recipe(run), _open(run)
    curves = (run / "metrics.csv").read_text()
    context = {
        "recipe": recipe.to_dict(),
        "recipe_toml": recipe.to_toml(),
        "data_hash": store.hash,
        "fold_hash": folds.hash,
        "data": store.info,
        "synthetic": store.info["synthetic"],
        "data_licence": _licences(store),
        "versions": keys.read_json(run / "run.json")["versions"],
        "gate": gate_result,
        "curves": pl.read_csv(run / "metrics.csv", infer_schema_length=None).to_dicts() if curves else [],
    }
    metrics = keys.read_json(run / "metrics.json")
    write_report(run / "report.html", metrics, pl.read_parquet(run / "oof.parquet"), context)
    write_card(run / "MODEL_CARD.md", metrics, context)


def _paired(run: Path, incumbent: Path) -> dict[str, Any]:
    """The paired difference to the run that the incumbent bundle came from, on the lesions both scored."""
    import polars as pl

    from lesionflow.evaluation.metrics import fold_rank
    from lesionflow.evaluation.paired import paired_difference

    other = incumbent.parent / "oof.parquet"
    if not other.exists():
        raise UsageError(f"--incumbent {incumbent}: no oof.parquet beside the bundle to compare with; give RUN/bundle")
    both = pl.read_parquet(run / "oof.parquet").join(pl.read_parquet(other), on="isic_id", suffix="_b")
    if len(both) == 0:
        raise DataError(f"{other}: shares no lesion with this run, so there is nothing to compare")
    if set(both["fold_hash"]) != set(both["fold_hash_b"]):
        raise DataError(f"{other}: another split than this run's; a paired comparison needs the same folds")
    fold, options = both["fold"].to_numpy(), _recipe(run).evaluation
    ours, theirs = (fold_rank(both[column].to_numpy(), fold) for column in ("logit", "logit_b"))
    return paired_difference(
        both["target"].to_numpy(), ours, theirs, both["patient_group"].to_list(),
        replicates=options.replicates, seed=options.seed,
    )  # fmt: skip


def _reference_lesions() -> list[tuple[str, bytes]]:
    """Synthetic lesions for the bundle: never a patient's."""
    import tempfile

    from lesionflow.data.source import open_source
    from lesionflow.data.synthetic import synthesize

    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "reference"
        synthesize(made, patients=4, lesions=REFERENCE_LESIONS, seed=7, prevalence=0.25, workers=1, progress=False)
        with open_source(made) as source:
            return [(f"{name}.jpg", data) for name, data in source.images(source.ids)]


def _licences(store: Store) -> str:
    if store.info["synthetic"]:
        return "synthetic, made by lesionflow: no licence applies"
    if "copyright_license" not in store.table.columns:
        return "unknown: the metadata has no copyright_license column"
    counts = store.table["copyright_license"].drop_nulls().value_counts(sort=True)
    return ", ".join(f"{name} ({count:,} lesions)" for name, count in counts.iter_rows()) or "unknown"


def _fold_files(run: Path) -> list[str]:
    models = [f"model-{number}/weights.safetensors" for number in range(_recipe(run).model.per_fold)]
    return ["oof.parquet", *models]


def _open(run: Path) -> tuple[Store, Folds]:
    from lesionflow.data.folds import Folds
    from lesionflow.data.store import Store

    store, folds = Store.open(run / "store"), Folds.load(run / "folds.parquet")
    folds.check(store)
    return store, folds


def _recipe(run: Path) -> Recipe:
    return Recipe.load(run / "recipe.toml")
