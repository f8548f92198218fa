"""Metadata alone on real lesions, by cross-validation: LESIONFLOW_REAL_DATA=../shared/data python benchmarks/tabular.py

The table `isic2024-tabular`: five folds by patient, three seeds, each of which deals the patients anew and trains anew.
A figure is the mean of the three seeds' pAUC above 80 % sensitivity (0 to 0.2, a coin 0.02), out-of-fold ranks pooled;
its interval, drawing patients, is the mean of theirs, and so is that of a paired difference. Printed as Markdown:
which features are worth something, which models, and what more patients would be. `--part` prints one of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lesionflow.data.features import Feature, Matrix, catalogue, features
from lesionflow.data.folds import make_folds
from lesionflow.data.table import read_metadata
from lesionflow.evaluation.metrics import fold_rank
from lesionflow.evaluation.paired import paired_difference
from lesionflow.evaluation.ranking import ranking
from lesionflow.models.search import out_of_fold
from lesionflow.models.tabular import Boosted
from lesionflow.recipe import Tabular

SEEDS = (0, 1, 2)
ALL = ("plain", "derived", "context", "neighbours")
ONE = dataclasses.replace(Tabular(), lightgbm=1, catboost=0, xgboost=0)
"""The recipe's own defaults, with one model."""
MEMBERS = {
    "1 LightGBM": {},
    "5 LightGBM": {"lightgbm": 5},
    "5 LightGBM, 2 CatBoost": {"lightgbm": 5, "catboost": 2},
    "5 LightGBM, 2 XGBoost": {"lightgbm": 5, "xgboost": 2},
    "5 LightGBM, 2 CatBoost, 2 XGBoost": {"lightgbm": 5, "catboost": 2, "xgboost": 2},
}


class Study:
    """The real table, its features, and the out-of-fold ranks that were asked for."""

    def __init__(self, folder: Path, replicates: int, threads: int | None) -> None:
        table = read_metadata(folder / "isic2024-tabular" / "train-metadata.csv")
        self.y, self.groups = table["target"].to_numpy(), table["patient_id"].to_list()
        self.about = {f.name: f for f in catalogue(ALL)}
        self.matrix = features(table, ALL)
        self.replicates, self.threads = replicates, threads
        self.folds = [make_folds(table["isic_id"], self.y, self.groups, count=5, seed=s).fold for s in SEEDS]

    def select(self, keep: Callable[[Feature], bool]) -> Matrix:
        at = [i for i, name in enumerate(self.matrix.names) if keep(self.about[name])]
        return Matrix(tuple(self.matrix.names[i] for i in at), np.ascontiguousarray(self.matrix.values[:, at]))

    def ranks(self, matrix: Matrix, options: Tabular, share: float = 1.0) -> list[np.ndarray]:
        """Per seed, float64 [N]; `share` of the patients that may be learned from are."""
        return [
            fold_rank(self._scores(matrix, fold, options, seed, share), fold)
            for seed, fold in zip(SEEDS, self.folds, strict=True)
        ]

    def _scores(self, matrix: Matrix, fold: np.ndarray, options: Tabular, seed: int, share: float) -> np.ndarray:
        if share == 1:
            return out_of_fold(matrix, self.y, fold, options, seed=seed, threads=self.threads)
        names, owner = np.unique(self.groups, return_inverse=True)
        # One order of the patients for all shares: a larger one has those of the smaller.
        place = np.random.default_rng([seed, 7]).permutation(len(names))
        scores = np.empty(len(self.y))
        for k in range(5):
            learn = (fold != k) & (place[owner] < share * len(names))
            part = Matrix(matrix.names, matrix.values[learn])
            trees = Boosted.fit(part, self.y[learn], options, seed=seed, threads=self.threads)
            scores[fold == k] = trees.logits(matrix.values[fold == k])
        return scores

    def figures(self, ranks: list[np.ndarray]) -> str:
        each = [ranking(self.y, r, self.groups, replicates=self.replicates) for r in ranks]
        area, whole = [one["pauc"] for one in each], np.mean([one["auc"].value for one in each])
        low, high = (np.mean([getattr(one.interval, end) for one in area]) for end in ("low", "high"))
        seeds = " ".join(f"{one.value:.4f}" for one in area)
        return f"{np.mean([one.value for one in area]):.4f} ({low:.4f} to {high:.4f}) | {seeds} | {whole:.4f}"

    def difference(self, a: list[np.ndarray], b: list[np.ndarray]) -> str:
        each = [
            paired_difference(self.y, x, z, self.groups, replicates=self.replicates) for x, z in zip(a, b, strict=True)
        ]
        value, low, high = (np.mean([one[key] for one in each]) for key in ("difference", "low", "high"))
        return f"{value:+.4f} ({low:+.4f} to {high:+.4f})"


def of_features(study: Study) -> None:
    print("| features | number | pAUC (95 %) | seeds | AUC | difference (95 %) | to |\n|---|---|---|---|---|---|---|")
    rows: dict[str, tuple[Callable[[Feature], bool], str]] = {
        "plain": (lambda f: f.block == "plain", ""),
        "plain, without place": (lambda f: f.block == "plain" and f.concept != "place", "plain"),
        "+ derived": (lambda f: f.block in ALL[:2], "plain"),
        "+ derived, without tile type": (lambda f: f.block in ALL[:2] and f.concept != "tile", "+ derived"),
        "+ derived, without finer place": (
            lambda f: f.block in ALL[:2] and not f.name.startswith("part_"),
            "+ derived",
        ),
        "+ derived, with counts": (lambda f: f.block in ALL[:2] or f.concept == "count", "+ derived"),
        "+ context": (lambda f: f.block in ALL[:3], "+ derived"),
        "+ neighbours": (lambda f: True, "+ context"),
        "all, without counts": (lambda f: f.concept != "count", "+ neighbours"),
        "all, without tile type": (lambda f: f.concept != "tile", "+ neighbours"),
    }
    done: dict[str, list[np.ndarray]] = {}
    for name, (keep, to) in rows.items():
        matrix = study.select(keep)
        done[name] = study.ranks(matrix, ONE)
        against = study.difference(done[name], done[to]) if to else ""
        print(f"| {name} | {len(matrix.names)} | {study.figures(done[name])} | {against} | {to} |", flush=True)


def of_members(study: Study) -> None:
    print("| models per fold | pAUC (95 %) | seeds | AUC | difference to one (95 %) |\n|---|---|---|---|---|")
    matrix, first = study.select(lambda f: f.block in ALL[:2]), None
    for name, count in MEMBERS.items():
        ranks = study.ranks(matrix, dataclasses.replace(ONE, **count))
        first = first or ranks
        against = study.difference(ranks, first) if ranks is not first else ""
        print(f"| {name} | {study.figures(ranks)} | {against} |", flush=True)


def of_patients(study: Study) -> None:
    print("| patients learned from | pAUC (95 %) | seeds | AUC | difference to all (95 %) |\n|---|---|---|---|---|")
    matrix = study.select(lambda f: f.block in ALL[:2])
    whole = study.ranks(matrix, ONE)
    for share in (0.25, 0.5, 0.75, 1.0):
        ranks = whole if share == 1 else study.ranks(matrix, ONE, share)
        against = study.difference(ranks, whole) if share < 1 else ""
        print(f"| {share:.0%} | {study.figures(ranks)} | {against} |", flush=True)


PARTS = {"features": of_features, "members": of_members, "patients": of_patients}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=PARTS, action="append", help="by default, all")
    parser.add_argument("--replicates", type=int, default=1000)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    folder = Path(os.environ.get("LESIONFLOW_REAL_DATA", "../shared/data"))
    if not (folder / "isic2024-tabular").is_dir():
        raise SystemExit(f"{folder}: no isic2024-tabular; set LESIONFLOW_REAL_DATA")
    study = Study(folder, args.replicates, args.threads)
    print(f"{len(study.y):,} lesions, {study.y.sum()} malignant, {len(set(study.groups))} patients; {ONE}\n")
    for part in args.part or PARTS:
        began = time.monotonic()
        PARTS[part](study)
        print(f"\n({time.monotonic() - began:.0f} s)\n")


if __name__ == "__main__":
    main()
