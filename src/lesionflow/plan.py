"""What a run is asked to do, and the keys under which its steps record what they did.

    planned = begin(run, recipe, data)            # recipe.toml and run.json: every step's key, before the first
    with step(run, "split", planned["split"], lambda: ["folds.parquet"]) as needed:
        if needed: ...                            # recorded in steps/split.json once it is through

Keys chain: a step's inputs are what the step before it makes, so its key covers all that came before.
A step refuses to work on what an earlier recipe, or a refused gate, left in the directory.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lesionflow import __version__, keys
from lesionflow.errors import DataError, UsageError
from lesionflow.recipe import Recipe

if TYPE_CHECKING:
    from lesionflow.data.folds import Folds
    from lesionflow.data.store import Store

STEPS = ("prepare", "split", "train", "stack", "evaluate", "gate", "export", "deploy", "smoke")

_DATA = ("data/schema.py", "data/table.py", "data/images.py", "data/source.py", "data/store.py")
# The code whose change makes a step's earlier work stale, and the recipe's sections it reads.
_ROOMS: dict[str, tuple[str, ...]] = {
    "prepare": _DATA,
    "split": ("data/folds.py",),
    "train": (
        "data/images.py",
        "data/sampler.py",
        "data/augment.py",
        "data/diagnosis.py",
        "data/datamodule.py",
        "data/lesions.py",
        "data/pixelcache.py",
        "models/image.py",
        "training",
    ),
    "stack": (
        "data/images.py",
        "data/features.py",
        "data/derived.py",
        "data/context.py",
        "data/neighbours.py",
        "data/missingness.py",
        "models",
        "evaluation/metrics.py",
        "evaluation/leaks.py",
        "serving/inputs.py",
        "gather.py",
    ),
    "evaluate": ("evaluation", "data/duplicates.py", "serving/predictor.py", "steps.py"),
    "gate": ("evaluation", "reporting", "pack.py", "present.py", "steps.py"),
    "export": ("export", "bundle.py", "serving", "data", "reporting", "pack.py", "present.py"),
}
_SECTIONS: dict[str, tuple[str, ...]] = {
    "prepare": (),
    "split": ("folds",),
    "train": ("seed", "image", "sampling", "augment", "model", "optimizer", "training"),
    "stack": ("tabular", "stack"),
    "evaluate": ("evaluation",),
    "gate": ("gate", "name", "description"),
    "export": ("name", "description"),
}

# Of [training]: however pictures are read and checkpoints are made, the weights are the same.
_WITHOUT_EFFECT = ("cache", "checkpoint_every", "checkpoint_minutes", "checkpoint_cost")


def plan_keys(recipe: Recipe, fingerprint: str, incumbent: str = "") -> dict[str, str]:
    """Every step's content key, known before the first one runs.

    `fingerprint` is the data's (`fingerprint`), `incumbent` the hash of the bundle compared against.
    """
    values = recipe.to_dict()
    keyed: dict[str, str] = {}
    before = fingerprint
    for step in STEPS[:-2]:
        part = {name: values[name] for name in _SECTIONS[step]}
        if step == "prepare":
            part = {"skip_corrupt": recipe.image.skip_corrupt, "pictures": recipe.model.per_fold > 0}
        if step == "evaluate":
            part["parity"] = recipe.gate.parity  # Thresholds leave room for it.
        if step == "train":
            part["training"] = {name: v for name, v in values["training"].items() if name not in _WITHOUT_EFFECT}
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


def incumbent_hash(run: Path, incumbent: Path | None) -> str:
    """Hash of the bundle that a run is compared with and of the scores beside it; "" for none.

    Raises `UsageError` for the run's own bundle, which training again would overwrite, and where no scores are.
    """
    from lesionflow.bundle import MANIFEST, Bundle

    if incumbent is None:
        return ""
    if incumbent.resolve().parent == run.resolve():
        raise UsageError(f"--incumbent {incumbent}: this run's own bundle; compare with another run's")
    if not (scores := incumbent.parent / "oof.parquet").exists():
        raise UsageError(f"--incumbent {incumbent}: no oof.parquet beside the bundle to compare with; give RUN/bundle")
    return keys.digest([keys.file_hash(Bundle.open(incumbent).path / MANIFEST), keys.file_hash(scores)])


@contextlib.contextmanager
def step(run: Path, name: str, key: str, outputs: Callable[[], Sequence[str]]) -> Iterator[bool]:
    """Yield whether the step has to run; afterwards, record what it wrote."""
    before = STEPS[STEPS.index(name) - 1]
    # Folds can be trained one by one, so the stack looks at their scores instead of the train step's record.
    if name not in ("prepare", "stack"):
        keys.require(run, before)
    if keys.planned_keys(run)[name] != key:
        # Its recipe.toml is another's too: what this step did now would be recorded as what it is not.
        raise DataError(f"{run}: begun again meanwhile with another recipe, data or code; {name} is left to that")
    if keys.is_done(run, name, key):
        yield False
        return
    (run / "steps" / f"{name}.json").unlink(missing_ok=True)
    started = time.monotonic()
    yield True
    keys.mark_done(run, name, key, outputs(), time.monotonic() - started)


def begin(run: Path, recipe: Recipe, data: Path, *, incumbent: Path | None = None) -> dict[str, str]:
    """Write `recipe.toml` and `run.json` and return the steps' keys.

    Raises `DataError` for unreadable data, `UsageError` on a node of a distributed job: its nodes
    would write over each other, so a run is begun, prepared and split before its job starts.
    """
    from lesionflow.training.nodes import Nodes

    if (nodes := Nodes.from_environment(os.environ).count) > 1:
        raise UsageError(
            f"this is one of {nodes} nodes: begin, prepare and split the run on one machine first "
            "(the pipeline does), then start `lesionflow train --out RUN` on all of them"
        )
    run.mkdir(parents=True, exist_ok=True)
    found = fingerprint(data)
    compared = incumbent_hash(run, incumbent)
    keyed = plan_keys(recipe, found, compared)
    keys.write_text(run / "recipe.toml", recipe.to_toml())
    keys.write_json(
        run / "run.json",
        {
            "recipe": recipe.name,
            "data": str(data.resolve()),
            "lesionflow": __version__,
            "fingerprint": found,
            "incumbent": compared,
            "versions": _versions(),
            "keys": keyed,
        },
    )
    return keyed


def planned(run: Path) -> dict[str, str]:
    """The keys of a run that was begun, as `begin` wrote them."""
    return keys.planned_keys(run)


def plan_gate(run: Path, incumbent: Path | None) -> dict[str, str]:
    """The run's keys for a gate that compares with `incumbent`, or with none, whatever was planned before."""
    begun, compared = keys.read_json(run / "run.json"), incumbent_hash(run, incumbent)
    if compared == begun.get("incumbent", ""):
        return keys.planned_keys(run)
    keyed = plan_keys(recipe_of(run), begun["fingerprint"], compared)
    keys.write_json(run / "run.json", {**begun, "incumbent": compared, "keys": keyed})
    return keyed


def _versions() -> dict[str, str]:
    from importlib import metadata

    found = {"lesionflow": __version__, "python": sys.version.split()[0]}
    for package in ("torch", "timm", "lightning", "numpy", "polars", "pillow", "simplejpeg", "onnxruntime", "lightgbm"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def recipe_of(run: Path) -> Recipe:
    """The recipe that the run was begun with."""
    return Recipe.load(run / "recipe.toml")


def data_of(run: Path) -> tuple[Store, Folds]:
    """The run's lesions and their split. Raises `DataError` if one was changed or they don't belong together."""
    from lesionflow.data.folds import Folds
    from lesionflow.data.store import Store

    store, folds = Store.open(run / "store"), Folds.load(run / "folds.parquet")
    folds.check(store)
    return store, folds
