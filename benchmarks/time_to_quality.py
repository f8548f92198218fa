"""How much sooner the baseline is as good as the reference recipe ends: python benchmarks/time_to_quality.py

    python benchmarks/time_to_quality.py [--data ../shared/data/isic2024-images] [--out runs/quality] [--seeds 3]

Both recipes are trained on the same three folds of the real pictures, with each seed, one core each. The reference is
scored as it ends. The baseline is validated on the way, every quarter of an epoch (all held-out malignant lesions, a
sample of the benign ones), and the first time its pAUC, mean over the folds, is at least the reference's counts: how
many pictures it had seen by then and what CPU-seconds they had taken, validation left out, against what the reference
took in all. What is there already isn't trained again.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from lesionflow import steps
from lesionflow.evaluation.metrics import pauc
from lesionflow.recipe import Recipe
from lesionflow.training.conduct import Conductor

FOLDS = 3
SAME = [f"folds.count={FOLDS}", "folds.holdout=0", "model.backbone=tf_efficientnet_lite0"]
RECIPES = {"reference": SAME, "baseline": [*SAME, "training.validate_every=0.25"]}


def train(name: str, seed: int, data: Path, out: Path) -> None:
    """One recipe with one seed; leaves `steps.csv` (fold, step, cpu_seconds of training alone)."""
    run = out / f"{name}-{seed}"
    if (run / "done").exists():
        return
    keyed = steps.begin(run, Recipe.load(name, [*RECIPES[name], f"seed={seed}"]), data)
    steps.prepare(run, data, keyed["prepare"], progress=False)
    steps.split(run, keyed["split"])
    rows = _timed()
    steps.train(run, keyed["train"], jobs=1)
    with (run / "steps.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("fold", "step", "cpu_seconds"), *rows])
    (run / "done").touch()


def _timed() -> list[tuple[int, int, float]]:
    """Have training note its CPU seconds after every step, what validation and checkpoints take left out."""
    rows: list[tuple[int, int, float]] = []
    start, ended = Conductor.on_train_start, Conductor.on_train_batch_end
    spent, since = 0.0, 0.0

    def begin(self: Conductor, *of: Any) -> None:
        nonlocal spent, since
        start(self, *of)
        spent, since = 0.0, time.process_time()

    def end(self: Conductor, trainer: Any, module: Any, *of: Any) -> None:
        nonlocal spent, since
        spent += time.process_time() - since
        ended(self, trainer, module, *of)
        rows.append((self.fold, module.step, round(spent, 3)))
        since = time.process_time()

    Conductor.on_train_start, Conductor.on_train_batch_end = begin, end  # type: ignore[method-assign]
    return rows


def final(run: Path) -> tuple[float, float, float]:
    """pAUC (mean of folds), pictures and CPU-seconds of a whole training, per model."""
    found = [pl.read_parquet(run / f"fold-{k}" / "oof.parquet") for k in range(FOLDS)]
    steps_ = pl.read_csv(run / "steps.csv").group_by("fold").agg(pl.col("cpu_seconds").max())
    pictures = [curve(run, k)["lesions"].max() for k in range(FOLDS)]
    quality = [pauc(one["target"].to_numpy(), one["logit"].to_numpy()) for one in found]
    return float(np.mean(quality)), float(np.mean(pictures)), float(steps_["cpu_seconds"].mean())


def curve(run: Path, fold: int) -> pl.DataFrame:
    return pl.read_csv(run / f"fold-{fold}" / "model-0" / "metrics.csv", infer_schema_length=None)


def reached(run: Path, aim: float) -> tuple[float, float, float, float] | None:
    """Pictures, CPU-seconds, pAUC and its sampling error at the first validation that is as good; None if none is."""
    cost = pl.read_csv(run / "steps.csv").group_by("step").agg(pl.col("cpu_seconds").mean())
    folds = [curve(run, k).filter(pl.col("pauc").is_not_null()) for k in range(FOLDS)]
    for at in range(min(len(one) for one in folds)):
        points = [one.row(at, named=True) for one in folds]
        quality = float(np.mean([p["pauc"] for p in points]))
        if quality >= aim:
            step = int(np.mean([p["step"] for p in points]))
            seconds = float(cost.filter(pl.col("step") == step)["cpu_seconds"].item())
            error = float(np.sqrt(np.sum(np.square([p["pauc_error"] for p in points]))) / FOLDS)
            return float(np.mean([p["lesions"] for p in points])), seconds, quality, error
    return None


def table(out: Path, seeds: int) -> None:
    print("| seed | reference: pAUC, mean of folds | pictures | CPU-s | baseline as good: pAUC | pictures | CPU-s | "
          "pictures, ratio | CPU-s, ratio | baseline in the end |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|---|")
    for seed in range(seeds):
        aim, pictures, seconds = final(out / f"reference-{seed}")
        ended = final(out / f"baseline-{seed}")[0]
        head = f"| {seed} | {aim:.4f} | {pictures:,.0f} | {seconds:.0f} |"
        if (found := reached(out / f"baseline-{seed}", aim)) is None:
            print(f"{head} not on the way | | | | | {ended:.4f} |")
            continue
        seen, spent, quality, error = found
        ratio = f"{pictures / seen:.1f} | {seconds / spent:.1f}"
        print(f"{head} {quality:.4f} ± {error:.4f} | {seen:,.0f} | {spent:.0f} | {ratio} | {ended:.4f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    real = Path(os.environ.get("LESIONFLOW_REAL_DATA", "../shared/data")) / "isic2024-images"
    parser.add_argument("--data", type=Path, default=real)
    parser.add_argument("--out", type=Path, default=Path("runs/quality"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--one", nargs=2, metavar=("RECIPE", "SEED"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        train(options.one[0], int(options.one[1]), options.data, options.out)
        return
    command = [sys.executable, __file__, "--data", str(options.data), "--out", str(options.out)]
    for seed in range(options.seeds):
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        both = [subprocess.Popen([*command, "--one", name, str(seed)], env=environment) for name in RECIPES]
        codes = [one.wait() for one in both]
        if any(codes):
            sys.exit("training failed")
    table(options.out, options.seeds)


if __name__ == "__main__":
    main()
