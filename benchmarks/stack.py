"""What patient context and the stack are worth where the truth is known: python benchmarks/stack.py

Synthetic lesions with a known probability of malignancy, so that the best pAUC that pictures, metadata and patient
context allow is known too (`lesionflow.data.bounds`). Two questions: which share of the gap between picture + plain
metadata and that best do the features close, and does the stack beat either part, by a paired interval above zero?

Without arguments the picture's score is **emulated**: its true evidence (structure, and the look of the one lesion)
with noise of a stated standard deviation added, log-odds; no pixel is drawn and no network trained. About five
minutes on one core. With `--run RUN DATA` scores are those of a real run on a synthetic data set (the folder that
`lesionflow data synth` wrote): its own tables, and a stack of the same pictures with plain metadata, made anew.

pAUC stands twice: on the labels drawn (that is what intervals are of), and in expectation over the labels, which is
free of their luck and what `best_pauc` in truth.json is.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import polars as pl

from lesionflow.data.appearance import measure, table
from lesionflow.data.bounds import INFORMATION, posterior, weighted_pauc
from lesionflow.data.cohort import SIGNATURE_VARIANCE, STRUCTURE_WEIGHT, TRAIT_WEIGHTS, Cohort, draw_cohort, stream
from lesionflow.data.features import Matrix, features, lesions_of_patient
from lesionflow.data.folds import HOLDOUT, Folds, make_folds
from lesionflow.data.synthetic import CHUNK
from lesionflow.evaluation.metrics import fold_rank, pauc
from lesionflow.evaluation.paired import compare_scores
from lesionflow.evaluation.resample import partial_area
from lesionflow.models.stack import MODES, Stacked, fit_stack
from lesionflow.recipe import Stack, Tabular

PLAIN = "picture + plain metadata"
NAMES = {
    "image": "picture",
    "record": "record",
    "visit": "visit",
    "image_record": "picture + record",
    "image_visit": "picture + visit",
}


@dataclass(frozen=True)
class Set:
    """Lesions with the truth, row by row."""

    cohort: Cohort
    rows: np.ndarray
    """Of the cohort."""
    table: pl.DataFrame

    @property
    def y(self) -> np.ndarray:
        return self.cohort.target[self.rows].astype(np.int8)

    @property
    def p(self) -> np.ndarray:
        return self.cohort.probability[self.rows]


def columns(cohort: Cohort) -> pl.DataFrame:
    """The metadata that `lesionflow data synth` would write, of all lesions."""
    parts = []
    for number, first in enumerate(range(0, len(cohort.number), CHUNK)):
        rows = np.arange(first, min(first + CHUNK, len(cohort.number)))
        numbers = measure(cohort, rows, stream(cohort.seed, 1, number))
        parts.append(table(cohort, rows, numbers, stream(cohort.seed, 2, number)))
    return pl.concat(parts)


def emulated(cohort: Cohort, noise: float, rng: np.random.Generator) -> np.ndarray:
    """A picture's log-odds: what one crop tells at best, and normal noise of this standard deviation."""
    look = cohort.look @ np.asarray(TRAIT_WEIGHTS) / (1 + SIGNATURE_VARIANCE)
    return look + STRUCTURE_WEIGHT * cohort.structure + noise * rng.standard_normal(len(look)) + cohort.intercept


def best_with(cohort: Cohort, image: np.ndarray) -> np.ndarray:
    """The best ranking with the patient's metadata and this very picture's score.

    The columns give the look away, so what the picture adds is the structure, shrunk by its noise.
    """
    told = image - cohort.intercept - cohort.look @ np.asarray(TRAIT_WEIGHTS) / (1 + SIGNATURE_VARIANCE)
    noise = np.var(told - STRUCTURE_WEIGHT * cohort.structure)
    share = STRUCTURE_WEIGHT / (STRUCTURE_WEIGHT**2 + noise)
    return posterior(replace(cohort, structure=share * told), "all")


def grow(data: Set, folds: Folds, image: np.ndarray, held_image: np.ndarray, tabular: Tabular, method: str) -> Stacked:
    """A stack of the picture's scores [N] (of the hold-out [H, K]) and the data's metadata."""
    rows, held = np.flatnonzero(folds.fold != HOLDOUT), folds.holdout_rows()
    own = tuple(block for block in tabular.blocks if block in ("plain", "derived"))
    record, visit = features(data.table, own), features(data.table, tabular.blocks) if tabular.blocks != own else None
    alone = lesions_of_patient(data.table) == 1

    def part(matrix: Matrix, of: np.ndarray) -> Matrix:
        return Matrix(matrix.names, np.ascontiguousarray(matrix.values[of]))

    return fit_stack(
        image, held_image, part(record, rows), None if visit is None else part(visit, rows),
        part(record, held), None if visit is None else part(visit, held), alone[rows], alone[held],
        data.y[rows], folds.fold[rows], tabular=tabular, stack=Stack(method=method), seed=0,
        ids=[folds.ids[i] for i in rows], model_fold=folds.fold[rows], folds=folds, progress=True,
    )  # fmt: skip


def plain(tabular: Tabular) -> Tabular:
    return replace(tabular, derived=False, context=False, neighbours=False)


def report(
    title: str, data: Set, rows: np.ndarray, fold: np.ndarray, scores: Mapping[str, np.ndarray],
    best: Mapping[str, np.ndarray], replicates: int,
) -> None:  # fmt: skip
    """One table of figures and one of differences, of the lesions `rows` of the set."""
    y, p, groups = data.y[rows], data.p[rows], data.cohort.patient[data.rows][rows]
    ranks = {name: fold_rank(score, fold) for name, score in scores.items()}
    print(f"\n### {title}\n\n{len(y):,} lesions, {int(y.sum())} malignant, {len(np.unique(groups))} patients\n")
    print("| score | pAUC on these labels | in expectation |\n|---|---|---|")
    expected = {}
    for name, rank in ranks.items():
        expected[name] = weighted_pauc(p, 1 - p, rank)
        print(f"| {name} | {pauc(y, rank):.4f} | {expected[name]:.4f} |")
    for name, score in best.items():
        expected[name] = weighted_pauc(p, 1 - p, score[rows])
        print(f"| *best with {name}* | {pauc(y, score[rows]):.4f} | {expected[name]:.4f} |")
    stack = NAMES["image_visit"]
    print("\n| difference in pAUC | | 95 % interval | better with |\n|---|---|---|---|")
    for other in (name for name in (PLAIN, "picture + record", "picture", "visit", "record") if name in ranks):
        measures = [partial_area(0.8)]
        (pair,) = compare_scores(y, ranks[stack], ranks[other], groups, measures, replicates=replicates)
        found = pair.difference.interval
        shown = found.reason if found.low is None else f"[{found.low:+.4f}, {found.high:+.4f}]"
        sure = "" if pair.p_better is None else f"{pair.p_better:.1%}"
        print(f"| {stack} - {other} | {pair.difference.value:+.4f} | {shown} | {sure} |")
    print()
    for name in best:
        if name == "all" or name not in INFORMATION:
            closed = (expected[stack] - expected[PLAIN]) / (expected[name] - expected[PLAIN])
            print(f"Gap from {PLAIN} to the best with {name}, in expectation: {closed:.0%} closed.")


def bounds(data: Set) -> dict[str, np.ndarray]:
    return {name: posterior(data.cohort, name)[data.rows] for name in INFORMATION}


def emulate(options: argparse.Namespace, tabular: Tabular) -> None:
    cohort = draw_cohort(
        patients=options.patients, lesions=options.lesions, seed=options.seed, prevalence=options.prevalence
    )
    rows = np.flatnonzero(~cohort.test)
    data = Set(cohort, rows, columns(cohort)[rows.tolist()])
    groups = data.table["patient_id"].to_list()
    folds = make_folds(data.table["isic_id"].to_list(), data.y, groups, count=5, seed=0)
    fold, none = folds.fold.astype(np.int64), np.zeros((0, 5))
    for noise in options.noise:
        start = time.perf_counter()
        image = emulated(cohort, noise, np.random.default_rng([options.seed, 7]))
        full = grow(data, folds, image[rows], none, tabular, options.method)
        bare = grow(data, folds, image[rows], none, plain(tabular), options.method)
        scores = {NAMES[mode]: full.oof[mode] for mode in MODES}
        scores = {"picture": scores.pop("picture"), PLAIN: bare.oof["image_record"]} | scores
        best = bounds(data) | {"this very picture": best_with(cohort, image)[rows]}
        title = f"Emulated picture, noise of {noise:g}; cohort {options.seed}"
        report(title, data, np.arange(len(rows)), fold, scores, best, options.replicates)
        told(full)
        print(f"{time.perf_counter() - start:.0f} s", flush=True)


def told(stacked: Stacked) -> None:
    for mode, choices in stacked.choices.items():
        worth = {method: np.mean([choice["pauc"][method] for choice in choices]) for method in choices[0]["pauc"]}
        methods = ", ".join(f"{method} {value:.4f}" for method, value in worth.items()) or "as asked for"
        print(f"{NAMES[mode]}: {', '.join(choice['method'] for choice in choices)} by fold ({methods})")


def real(run: Path, source: Path, options: argparse.Namespace) -> None:
    from lesionflow.plan import data_of, recipe_of

    recipe, (store, folds) = recipe_of(run), data_of(run)
    given = json.loads((source / "truth.json").read_text())["parameters"]
    if given["repeat_bytes"]:
        raise SystemExit("a set with repeated pictures: they say nothing of their lesions")
    drawn = {name: given[name] for name in ("patients", "lesions", "seed", "prevalence")}
    cohort = draw_cohort(**drawn)
    place = {f"ISIC_{number:07d}": row for row, number in enumerate(cohort.number.tolist())}
    rows = np.array([place[name] for name in store.ids])
    data = Set(cohort, rows, store.table)
    if not np.array_equal(data.y, store.targets):
        raise SystemExit(f"{run}: not of the set in {source}")
    parts = {name: run / f"{name}.parquet" for name in ("oof", "holdout")}
    tables = {name: pl.read_parquet(path) for name, path in parts.items() if path.exists()}
    at = {name: row for row, name in enumerate(store.ids)}
    order = {name: np.array([at[one] for one in kept["isic_id"]]) for name, kept in tables.items()}
    sort = {name: np.argsort(found) for name, found in order.items()}
    image = tables["oof"]["image_logit"].to_numpy()[sort["oof"]]
    held = np.zeros((0, folds.count))
    if "holdout" in tables:
        held = np.array(tables["holdout"]["image_fold_logits"].to_list())[sort["holdout"]]
    tabular = recipe.tabular
    if options.members:
        # Both sides anew, with as many trees each.
        tabular = replace(tabular, lightgbm=options.members, rounds=options.rounds or tabular.rounds)
        full = grow(data, folds, image, held, tabular, recipe.stack.method)
    bare = grow(data, folds, image, held, plain(tabular), recipe.stack.method)
    own = {"oof": bare.oof["image_record"]}
    if "holdout" in tables:
        own["holdout"] = bare.holdout["image_record"].mean(1)
    for name, kept in tables.items():
        found = order[name][sort[name]]
        scores = {
            NAMES[mode]: kept[f"{mode}_logit"].to_numpy()[sort[name]]
            for mode in MODES
            if f"{mode}_logit" in kept.columns
        }
        if options.members:
            scores = {NAMES[mode]: full.oof[mode] if name == "oof" else full.holdout[mode].mean(1) for mode in MODES}
        scores = {"picture": scores.pop("picture"), PLAIN: own[name]} | scores
        what = "out of fold" if name == "oof" else "hold-out, the mean of all folds' pipelines"
        title = f"Trained pictures, {run.name}: {what}"
        report(title, data, found, folds.fold[found].astype(np.int64), scores, bounds(data), options.replicates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", nargs=2, type=Path, metavar=("RUN", "DATA"), help="a finished run, and its data set")
    parser.add_argument("--noise", nargs="+", type=float, default=[0.0, 1.5, 3.0], help="of emulated pictures")
    parser.add_argument("--patients", type=int, default=300)
    parser.add_argument("--lesions", type=int, default=30_000)
    parser.add_argument("--prevalence", type=float, default=0.015)
    parser.add_argument("--seed", type=int, default=0, help="of the cohort")
    parser.add_argument("--members", type=int, help="LightGBM models per fold (2; with --run as the run has)")
    parser.add_argument("--rounds", type=int, help="of each (200; with --run as the run has)")
    parser.add_argument("--no-derived", action="store_true", help="context and neighbours on plain columns alone")
    parser.add_argument("--method", default="auto")
    parser.add_argument("--replicates", type=int, default=2000)
    options = parser.parse_args()
    if options.run:
        real(*options.run, options)
    else:
        tabular = Tabular(lightgbm=options.members or 2, rounds=options.rounds or 200, derived=not options.no_derived)
        emulate(options, tabular)


if __name__ == "__main__":
    main()
