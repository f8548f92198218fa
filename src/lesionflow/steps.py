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

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lesionflow import __version__, keys
from lesionflow.errors import DataError, GateRefused, UsageError
from lesionflow.recipe import Recipe

if TYPE_CHECKING:
    from lesionflow.data.folds import Folds
    from lesionflow.data.store import Store
    from lesionflow.training.status import Progress

STEPS = ("prepare", "split", "train", "stack", "evaluate", "gate", "export", "deploy", "smoke")

_DATA = ("data/schema.py", "data/table.py", "data/images.py", "data/source.py", "data/store.py")
# The code whose change makes a step's earlier work stale, and the recipe's sections it reads.
_ROOMS: dict[str, tuple[str, ...]] = {
    "prepare": _DATA,
    "split": ("data/folds.py",),
    "train": ("data/images.py", "data/sampler.py", "data/augment.py", "data/datamodule.py", "models", "training"),
    "stack": ("steps.py",),
    "evaluate": ("evaluation", "steps.py"),
    "gate": ("evaluation", "steps.py"),
    "export": ("export", "bundle.py", "serving", "data", "steps.py"),
}
_SECTIONS: dict[str, tuple[str, ...]] = {
    "prepare": (),
    "split": ("folds",),
    "train": ("seed", "image", "sampling", "augment", "model", "optimizer", "training"),
    "stack": (),
    "evaluate": ("evaluation",),
    "gate": ("gate",),
    "export": ("name", "description"),
}
PARITY_LESIONS = 64
"""Stored lesions on which the exported graph must agree with torch before a bundle is written."""
REFERENCE_LESIONS = 8
"""Synthetic lesions whose answers travel in the bundle."""


def plan_keys(recipe: Recipe, fingerprint: str, incumbent: str = "") -> dict[str, str]:
    """Every step's content key, known before the first one runs.

    Keys chain: a step's inputs are what the step before it makes, so its key covers all that came
    before. `fingerprint` is the data's (`fingerprint`), `incumbent` the bundle compared against.
    """
    values = recipe.to_dict()
    keyed: dict[str, str] = {}
    before = fingerprint
    for step in STEPS[:-2]:
        part = {name: values[name] for name in _SECTIONS[step]}
        if step == "prepare":
            part = {"skip_corrupt": recipe.image.skip_corrupt}
        if step == "train" and (weights := Path(recipe.model.weights)).is_file():
            part["weights"] = keys.file_hash(weights)
        inputs = {"before": before, "incumbent": incumbent if step == "gate" else ""}
        before = keyed[step] = keys.content_key(step, inputs, part, _ROOMS[step])
    return keyed


def fingerprint(data: Path) -> str:
    """Hash of a data set directory's training files: their bytes, or names, sizes and times for image folders."""
    from lesionflow.data.source import open_source

    with open_source(data, "train") as source:
        files = sorted(source.files)
    large = len(files) > 64
    return keys.digest(
        {p.name: [p.stat().st_size, p.stat().st_mtime_ns] if large else keys.file_hash(p) for p in files}
    )


def _bundle_hash(bundle: Path) -> str:
    from lesionflow.bundle import MANIFEST, Bundle

    return keys.file_hash(Bundle.open(bundle).path / MANIFEST)


@contextlib.contextmanager
def _step(run: Path, step: str, key: str, outputs: Callable[[], Sequence[str]]) -> Iterator[bool]:
    """Yield whether the step has to run; afterwards, record what it wrote."""
    before = STEPS[STEPS.index(step) - 1]
    # Folds can be trained one by one, so the stack looks at their scores instead of the train step's record.
    if step not in ("prepare", "stack"):
        keys.require(run, before)
    if keys.planned_keys(run)[step] != key:
        # Its recipe.toml is another's too: what this step did now would be recorded as what it is not.
        raise DataError(f"{run}: begun again meanwhile with another recipe, data or code; {step} is left to that")
    if keys.is_done(run, step, key):
        yield False
        return
    (run / "steps" / f"{step}.json").unlink(missing_ok=True)
    started = time.monotonic()
    yield True
    keys.mark_done(run, step, key, outputs(), time.monotonic() - started)


def begin(run: Path, recipe: Recipe, data: Path, *, incumbent: Path | None = None) -> dict[str, str]:
    """Write `recipe.toml` and `run.json` and return the steps' keys.

    Raises `DataError` for unreadable data, `UsageError` on a node of a distributed job: its nodes
    would write over each other, so a run is begun, prepared and split before its job starts.
    """
    from lesionflow.training.launch import Nodes

    if (nodes := Nodes.from_environment(os.environ).count) > 1:
        raise UsageError(
            f"this is one of {nodes} nodes: begin, prepare and split the run on one machine first "
            "(the pipeline does), then start `lesionflow train --out RUN` on all of them"
        )
    run.mkdir(parents=True, exist_ok=True)
    found = fingerprint(data)
    keyed = plan_keys(recipe, found, _bundle_hash(incumbent) if incumbent else "")
    keys.write_text(run / "recipe.toml", recipe.to_toml())
    keys.write_json(
        run / "run.json",
        {
            "recipe": recipe.name,
            "data": str(data.resolve()),
            "lesionflow": __version__,
            "fingerprint": found,
            "versions": _versions(),
            "keys": keyed,
        },
    )
    return keyed


def planned(run: Path, *, incumbent: Path | None = None) -> dict[str, str]:
    """The keys of a run that was begun, as `begin` wrote them (the gate's may follow another incumbent)."""
    if incumbent is None:
        return keys.planned_keys(run)
    begun = keys.read_json(run / "run.json")
    keyed = plan_keys(_recipe(run), begun["fingerprint"], _bundle_hash(incumbent))
    keys.write_json(run / "run.json", {**begun, "keys": keyed})
    return keyed


def prepare(run: Path, data: Path, key: str, *, progress: bool = False) -> Path:
    """Data set directory -> `store/`. Raises `DataError` naming what can't be used."""
    from lesionflow.data import store

    recipe = _recipe(run)
    with _step(run, "prepare", key, lambda: ["store"]) as needed:
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
    with _step(run, "split", key, lambda: ["folds.parquet"]) as needed:
        if needed:
            write_folds(run / "store", path, count=options.count, seed=options.seed)
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
    with _step(run, "train", key, lambda: [f"fold-{k}/{name}" for k in wanted for name in _fold_files(run)]) as needed:
        if needed:
            launch.train(run, wanted, processes=processes, jobs=jobs, anew=anew, show=show)


def stack(run: Path, key: str) -> Path:
    """`fold-<k>/oof.parquet` -> `oof.parquet`: every lesion once, scored by a model that never saw its patient."""
    import polars as pl

    store, folds = _open(run)
    out = run / "oof.parquet"
    with _step(run, "stack", key, lambda: ["oof.parquet"]) as needed:
        if needed:
            parts = []
            for k in range(folds.count):
                path = run / f"fold-{k}" / "oof.parquet"
                if not path.exists():
                    raise DataError(f"{path}: fold {k} has no scores; train it first (`lesionflow train --fold {k}`)")
                part = pl.read_parquet(path)
                expected = keys.fold_identity(keys.planned_keys(run)["train"], k)
                if pl.read_parquet_metadata(path).get("identity") != expected:
                    raise DataError(f"{path}: scores of another recipe, data set or code; train fold {k} again")
                if set(part["fold_hash"]) != {folds.hash} or (part["fold"] != k).any():
                    raise DataError(f"{path}: scores of another split; delete {path.parent} and train fold {k} again")
                parts.append(part)
            table = pl.concat(parts)
            extra = [c for c in ("patient_id", "sex", "age_approx", "anatom_site_general", "attribution") if c in
                     store.table.columns]  # fmt: skip
            table = table.join(store.table.select("isic_id", *extra), on="isic_id", how="left").sort("isic_id")
            if len(table) != len(store) or table["isic_id"].n_unique() != len(store):
                raise DataError(f"{out}: {len(table)} scores for {len(store)} lesions; train every fold again")
            with keys.atomic(out) as file:
                table.write_parquet(file)
    return out


def evaluate(run: Path, key: str) -> dict[str, Any]:
    """`oof.parquet` -> `metrics.json` and the folds' curves in one `metrics.csv`."""
    import polars as pl

    from lesionflow.data.folds import Folds
    from lesionflow.evaluation.evaluate import evaluate_oof

    options = _recipe(run).evaluation
    with _step(run, "evaluate", key, lambda: ["metrics.json", "metrics.csv"]) as needed:
        if needed:
            oof = pl.read_parquet(run / "oof.parquet")
            metrics = evaluate_oof(
                oof, replicates=options.replicates, seed=options.seed, sensitivity=options.sensitivity
            )
            count, members = Folds.load(run / "folds.parquet").count, _recipe(run).model.per_fold
            paths = [run / f"fold-{k}/model-{m}/metrics.csv" for k in range(count) for m in range(members)]
            curves = [pl.read_csv(path, infer_schema_length=None) for path in paths if path.exists()]
            if curves:
                # A resumed run wrote some steps twice; the later row is the one that counts.
                merged = pl.concat(curves, how="diagonal_relaxed").unique(
                    ["fold", "model", "step"], keep="last", maintain_order=True
                )
                keys.write_text(run / "metrics.csv", merged.write_csv())
            else:
                keys.write_text(run / "metrics.csv", "")
            keys.write_json(run / "metrics.json", metrics)
    return keys.read_json(run / "metrics.json")


def gate(run: Path, key: str, *, incumbent: Path | None = None) -> dict[str, Any]:
    """`metrics.json` -> `gate.json`, `report.html` and `MODEL_CARD.md`.

    Raises `GateRefused` with the reasons when the model isn't good enough; the report is written all
    the same. With an `incumbent` run's `oof.parquet` beside its bundle the paired difference counts too.
    """
    from lesionflow.evaluation import gate as gates

    recipe = _recipe(run)
    with _step(run, "gate", key, lambda: ["gate.json", "report.html", "MODEL_CARD.md"]) as needed:
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
    with _step(run, "export", key, lambda: ["bundle"]) as needed:
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


def _export(run: Path) -> None:
    import numpy as np

    from lesionflow.data.datamodule import pixels
    from lesionflow.export.onnx import export_bundle
    from lesionflow.models.image import Members, preprocess_spec
    from lesionflow.training.scoring import fold_weights, load_network

    recipe, (store, folds) = _recipe(run), _open(run)
    models = [
        Members([load_network(path, recipe) for path in paths]) for paths in fold_weights(run, recipe, folds.count)
    ]
    spec = preprocess_spec(recipe)
    rows = np.random.default_rng(0).choice(len(store), min(PARITY_LESIONS, len(store)), replace=False)
    info = {
        "name": recipe.name,
        "metrics": keys.read_json(run / "metrics.json"),
        # Thresholds belong to the combination that is served, which no lesion here has been held out from.
        "thresholds": {},
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
        reference=_reference_lesions(),
        card=(run / "MODEL_CARD.md").read_text(),
        tta=recipe.training.tta,
    )


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


def _versions() -> dict[str, str]:
    from importlib import metadata

    found = {"lesionflow": __version__, "python": sys.version.split()[0]}
    for package in ("torch", "timm", "lightning", "numpy", "polars", "pillow", "simplejpeg", "onnxruntime"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found
