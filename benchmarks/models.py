"""What makes an image model better for the same minutes: variants of the baseline on real data, paired over seeds.

    python benchmarks/models.py --data ../shared/data/isic2024-images --out runs/models [--seeds 3] [--jobs 2]

Three folds (every lesion is held out once), no hold-out, about 5,000 pictures a model; what is dearer a picture sees
fewer of them. Each variant is trained with each seed, on one core, and scored out of fold. What is there already isn't
trained again, so the command can be repeated after a stop. The figure of a variant is the mean over seeds of its pAUC,
by rank within folds; its difference to the baseline's is paired on lesions, with its interval over patients.

Three variants cost no training: the last weights instead of their average, the mean of four mirror images, and both.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from lesionflow import steps
from lesionflow.data.folds import Folds
from lesionflow.data.pixelcache import find
from lesionflow.data.store import Store
from lesionflow.evaluation.intervals import bootstrap_pauc
from lesionflow.evaluation.metrics import fold_rank, pauc
from lesionflow.evaluation.paired import mean_difference
from lesionflow.recipe import Recipe

SAME = ["folds.count=3", "folds.holdout=0"]
VARIANTS: dict[str, tuple[str, list[str]]] = {
    "baseline": ("the recipe: lite0, 128 px, 7 negatives, 4 epochs, EMA 0.99", []),
    "negatives-3": ("3 negatives per malignant lesion, 8 epochs", ["sampling.negatives=3", "training.epochs=8"]),
    "negatives-15": ("15 negatives, 2 epochs", ["sampling.negatives=15", "training.epochs=2"]),
    "drop-path": ("stochastic depth 0.2", ["model.drop_path=0.2"]),
    "warp": ("any rotation, zoom by 15 %", ["augment.rotate=180", "augment.scale=0.15"]),
    "kinds": ("auxiliary loss: the kind of diagnosis", ["training.auxiliary=0.5"]),
    "lite1": ("EfficientNet-Lite1, 3 epochs", ["model.backbone=tf_efficientnet_lite1", "training.epochs=3"]),
    "lite2": (
        "EfficientNet-Lite2, 3 epochs, 5.7 negatives",
        ["model.backbone=tf_efficientnet_lite2", "training.epochs=3", "sampling.negatives=5.7"],
    ),
    "160px": ("160 px, 3 epochs, 5.8 negatives", ["image.size=160", "training.epochs=3", "sampling.negatives=5.8"]),
    "96px": ("96 px, 7 epochs", ["image.size=96", "training.epochs=7"]),
}
FREE = {
    "last": "baseline's last weights instead of their average",
    "flips": "baseline, mean of four mirror images",
    "last-flips": "both",
}
BASE = "baseline"


def train(variant: str, seed: int, data: Path, out: Path) -> None:
    """One variant with one seed, from data to out-of-fold scores; returns at once if they are there."""
    run = out / f"{variant}-{seed}"
    if (run / "cost.json").exists():
        return
    recipe = Recipe.load("baseline", [*SAME, *VARIANTS[variant][1], f"seed={seed}"])
    keyed = steps.begin(run, recipe, data)
    steps.prepare(run, data, keyed["prepare"], progress=False)
    steps.split(run, keyed["split"])
    if variant == BASE:
        _keep_last_weights(run)
    started, cpu = time.perf_counter(), time.process_time()
    for fold in range(recipe.folds.count):
        steps.train(run, keyed["train"], folds=[fold], jobs=1)
    spent = {"cpu_seconds": time.process_time() - cpu, "seconds": time.perf_counter() - started}
    if variant == BASE:
        _score_again(run, recipe)
    (run / "cost.json").write_text(json.dumps(spent))


def _keep_last_weights(run: Path) -> None:
    """Have training leave the weights that aren't averaged beside the others."""
    from safetensors.torch import save_file

    from lesionflow.models.image import LesionModule
    from lesionflow.training.conduct import Conductor

    ended = Conductor.on_train_end

    def keeping(self: Conductor, trainer: object, module: LesionModule) -> None:
        tensors = {k: v.detach().cpu().contiguous().clone() for k, v in module.network.state_dict().items()}
        save_file(tensors, run / f"last-{self.fold}.safetensors")
        ended(self, trainer, module)

    Conductor.on_train_end = keeping


def _score_again(run: Path, recipe: Recipe) -> None:
    from lesionflow.models.image import preprocess_spec
    from lesionflow.training.scoring import load_network, score

    store, folds, spec = Store.open(run / "store"), Folds.load(run / "folds.parquet"), preprocess_spec(recipe)
    cache = find(store, spec)
    for name in FREE:
        parts = []
        for fold in range(recipe.folds.count):
            rows = folds.held_out_rows(fold)
            averaged = run / f"fold-{fold}" / "model-0" / "weights.safetensors"
            weights = run / f"last-{fold}.safetensors" if name.startswith("last") else averaged
            network = load_network(weights, recipe)
            logit = score(network, store, rows, spec, "flips" if name.endswith("flips") else "none", cache)
            parts.append(pl.DataFrame({"isic_id": [store.ids[r] for r in rows], "fold": fold, "logit": logit}))
        pl.concat(parts).write_parquet(run / f"{name}.parquet")


def scores(out: Path, variant: str, seed: int, truth: pl.DataFrame) -> NDArray[np.float64] | None:
    """Ranks within folds [n] in the order of `truth`; None if it wasn't trained."""
    if variant in FREE:
        paths = [out / f"{BASE}-{seed}" / f"{variant}.parquet"]
    else:
        paths = [out / f"{variant}-{seed}" / f"fold-{k}" / "oof.parquet" for k in range(3)]
    if not all(path.exists() for path in paths):
        return None
    found = pl.concat([pl.read_parquet(path).select("isic_id", "fold", "logit") for path in paths])
    joined = truth.select("isic_id").join(found.with_columns(pl.col("fold").cast(pl.Int64)), on="isic_id", how="left")
    assert joined["logit"].null_count() == 0
    return fold_rank(joined["logit"].to_numpy(), joined["fold"].to_numpy())


def table(out: Path, seeds: int) -> None:
    parts = [pl.read_parquet(out / f"{BASE}-0" / f"fold-{k}" / "oof.parquet") for k in range(3)]
    truth = pl.concat(parts).sort("isic_id")
    y, groups = truth["target"].to_numpy(), truth["patient_group"].to_list()
    known = {v: [scores(out, v, s, truth) for s in range(seeds)] for v in [*VARIANTS, *FREE]}
    print(f"{len(y):,} lesions, {int(y.sum())} malignant; {seeds} seeds, three folds")
    print("| variant | pAUC by seed | mean | difference to the baseline, paired | CPU-s a seed, to the baseline's |")
    print("|---|---|---|---|---|")

    def spent(variant: str) -> float:
        costs = [json.loads((out / f"{variant}-{s}" / "cost.json").read_text())["cpu_seconds"] for s in range(seeds)]
        return float(np.mean(costs))

    for variant, ranked in known.items():
        if any(one is None for one in ranked):
            print(f"| {variant} | not trained | | | |")
            continue
        each = [pauc(y, one) for one in ranked]
        if variant == BASE:
            low, high = (bootstrap_pauc(y, ranked[0], groups).to_dict()[end] for end in ("low", "high"))
            gain = f"(seed 0 alone: [{low:.4f}, {high:.4f}])"
        else:
            pair = mean_difference(y, ranked, known[BASE], groups)
            span = pair.difference.interval
            gain = f"{pair.difference.value:+.4f} [{span.low:+.4f}, {span.high:+.4f}]"
        cost = "" if variant in FREE else f"{spent(variant):.0f}, {spent(variant) / spent(BASE):.2f}"
        told = FREE.get(variant) or VARIANTS[variant][0]
        seed_by_seed = ", ".join(f"{one:.4f}" for one in each)
        print(f"| {variant}: {told} | {seed_by_seed} | {np.mean(each):.4f} | {gain} | {cost} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    real = Path(os.environ.get("LESIONFLOW_REAL_DATA", "../shared/data")) / "isic2024-images"
    parser.add_argument("--data", type=Path, default=real)
    parser.add_argument("--out", type=Path, default=Path("runs/models"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time, one core each")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--one", nargs=2, metavar=("VARIANT", "SEED"), help=argparse.SUPPRESS)
    parser.add_argument("--table", action="store_true", help="only print what was trained")
    options = parser.parse_args()
    if options.one:
        train(options.one[0], int(options.one[1]), options.data, options.out)
        return
    if not options.table:
        waiting = [(v, s) for s in range(options.seeds) for v in options.variants]
        running: list[subprocess.Popen[bytes]] = []
        command = [sys.executable, __file__, "--data", str(options.data), "--out", str(options.out)]
        while waiting or running:
            while waiting and len(running) < options.jobs:
                variant, seed = waiting.pop(0)
                print(f"{variant}, seed {seed}", file=sys.stderr, flush=True)
                single = [*command, "--one", variant, str(seed)]
                running.append(subprocess.Popen(single, env=os.environ | {"OMP_NUM_THREADS": "1"}))
            running = [one for one in running if one.poll() is None or (one.returncode and sys.exit("training failed"))]
            time.sleep(1)
    table(options.out, options.seeds)


if __name__ == "__main__":
    main()
