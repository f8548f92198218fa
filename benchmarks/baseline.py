"""The baseline recipe beside the reference one: same folds, backbone and images seen, several seeds.

    python benchmarks/baseline.py --data ../shared/data/isic2024-images --out runs/compare [--seeds 3]

Trains what isn't there yet (about 17 minutes a seed on 2 cores: the two recipes run side by side, one
core each) and prints pAUC out of fold with patient-clustered intervals and paired differences. The
reference sees every training lesion once; the baseline's four balanced epochs are as many images.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl

from lesionflow import steps
from lesionflow.evaluation.intervals import bootstrap_pauc
from lesionflow.evaluation.metrics import fold_rank, pauc
from lesionflow.evaluation.paired import paired_difference
from lesionflow.progress import with_interval
from lesionflow.recipe import Recipe

# Every lesion is held out once: no hold-out is taken from the few malignant ones.
SAME = ["folds.holdout=0"]
RECIPES = {"baseline": SAME, "reference": [*SAME, "model.backbone=tf_efficientnet_lite0"]}


def train(recipe: str, data: Path, out: Path, seeds: int) -> None:
    for seed in range(seeds):
        run = out / f"{recipe}-{seed}"
        if (run / "metrics.json").exists():
            continue
        keyed = steps.begin(run, Recipe.load(recipe, [*RECIPES[recipe], f"seed={seed}"]), data)
        steps.prepare(run, data, keyed["prepare"])
        steps.split(run, keyed["split"])
        steps.train(run, keyed["train"], jobs=1)
        steps.stack(run, keyed["stack"])
        steps.evaluate(run, keyed["evaluate"])


def table(out: Path, seeds: int) -> None:
    oofs = {r: [pl.read_parquet(out / f"{r}-{s}" / "oof.parquet") for s in range(seeds)] for r in RECIPES}
    first = oofs["baseline"][0]
    y, fold, groups = first["target"].to_numpy(), first["fold"].to_numpy(), first["patient_group"].to_list()
    assert all(o["fold_hash"][0] == first["fold_hash"][0] for os_ in oofs.values() for o in os_)

    def line(name: str, logit: np.ndarray) -> None:
        ranked = fold_rank(logit, fold)
        interval = bootstrap_pauc(y, ranked, groups).to_dict()
        mean = np.mean([pauc(y[fold == k], logit[fold == k]) for k in np.unique(fold)])
        print(f"{name:24} mean of folds {mean:.4f}   by rank {with_interval(pauc(y, ranked), interval)}")

    for seed in range(seeds):
        for recipe in RECIPES:
            line(f"{recipe}, seed {seed}", oofs[recipe][seed]["logit"].to_numpy())
    averages = {r: np.mean([o["logit"].to_numpy() for o in os_], axis=0) for r, os_ in oofs.items()}
    for recipe, logit in averages.items():
        line(f"{recipe}, {seeds} averaged", logit)
    pairs = {f"seed {s}": [oofs[r][s]["logit"].to_numpy() for r in RECIPES] for s in range(seeds)}
    for name, (ours, theirs) in {**pairs, f"{seeds} averaged": list(averages.values())}.items():
        found = paired_difference(y, fold_rank(ours, fold), fold_rank(theirs, fold), groups)
        print(f"baseline - reference, {name}: {found['difference']:+.4f} [{found['low']:+.4f}, {found['high']:+.4f}]")
    groups_note = json.loads((out / "baseline-0" / "metrics.json").read_text())["groups"]["note"]
    print(groups_note)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    real = Path(os.environ.get("LESIONFLOW_REAL_DATA", "../shared/data")) / "isic2024-images"
    parser.add_argument("--data", type=Path, default=real)
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", choices=sorted(RECIPES), help="train this recipe alone, print nothing")
    options = parser.parse_args()
    if options.only:
        train(options.only, options.data, options.out, options.seeds)
        return
    command = [sys.executable, __file__, "--data", options.data, "--out", options.out, "--seeds", options.seeds]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    children = [subprocess.Popen([*map(str, command), "--only", recipe], env=environment) for recipe in RECIPES]
    codes = [child.wait() for child in children]
    if any(codes):
        sys.exit("training failed")
    table(options.out, options.seeds)


if __name__ == "__main__":
    main()
