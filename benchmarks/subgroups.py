"""Figures by subgroup: how long they take, and whether the differences hold: python benchmarks/subgroups.py

First the competition's size (401,059 lesions, 393 malignant, 1,042 patients), all partitions. Then how often the 95 %
interval of a cell's difference to all others holds the truth, and how often it leaves 0 out where there is no
difference, over simulated cohorts of 200 patients and 4,000 benign lesions. The truth is a population 300 times as
large. `--cohorts 1000` takes about ten minutes on one core, `--cohorts 0` leaves this part out.
"""

from __future__ import annotations

import argparse
import resource
import time

import numpy as np
import polars as pl

from lesionflow.evaluation import metrics
from lesionflow.evaluation.subgroups import subgroups

PATIENTS, BENIGN, LARGER = 200, 4000, 300
EFFECT = 0.4
SETTINGS = ((20, 80), (20, 280), (40, 60), (40, 260), (80, 220), (80, 20))
"""Malignant lesions in the cell, and outside."""
SIGNALS = ((2.2, 2.2), (1.6, 2.4))
"""Distance of the classes in the cell, and outside: no difference, and about 0.05 of pAUC."""


def competition() -> tuple[pl.DataFrame, np.ndarray, np.ndarray, np.ndarray]:
    """Table, targets, ranks and patients of the competition's size."""
    rng = np.random.default_rng(0)
    n, patients = 401_059, 1042
    share = rng.lognormal(size=patients)
    patient = rng.choice(patients, n, p=share / share.sum())
    patient[:patients] = np.arange(patients)
    y = np.zeros(n, np.int64)
    y[rng.choice(n, 393, replace=False)] = 1
    s = rng.normal(size=n) + 2.2 * y + EFFECT * rng.normal(size=patients)[patient]
    table = pl.DataFrame({
        "sex": rng.choice(["female", "male"], patients)[patient],
        "age_approx": rng.integers(4, 18, patients)[patient] * 5.0,
        "anatom_site_general": rng.choice(["a", "b", "c", "d", "e"], n),
        "attribution": rng.choice([f"clinic {i}" for i in range(7)], patients)[patient],
        "tbp_tile_type": rng.choice(["3D: XP", "3D: white"], patients)[patient],
        "clin_size_long_diam_mm": rng.lognormal(1.3, 0.4, n),
        "tbp_lv_Lext": rng.normal(55, 11, patients)[patient] + rng.normal(0, 5, n),
        "tbp_lv_Bext": rng.normal(26, 4, n),
    })  # fmt: skip
    return table, y, metrics.fold_rank(s, patient % 5), patient


def cohort(rng, cell: int, rest: int, distances: tuple[float, float], by_patient: bool, times: int = 1):
    """y, scores, patients, and whether a lesion is in the cell: a kind of patient, or of lesion."""
    patients, share = times * PATIENTS, cell / (cell + rest)
    weight = rng.lognormal(size=patients)
    kind = rng.random(patients) < share
    kind[:2] = (True, False)

    def owners(count: int, among: np.ndarray) -> np.ndarray:
        p = np.where(among, weight, 0)
        return rng.choice(patients, count, p=p / p.sum())

    everyone = np.ones(patients, bool)
    if by_patient:
        patient = np.r_[owners(cell, kind), owners(rest, ~kind), owners(times * BENIGN, everyone)]
        inside = kind[patient]
    else:
        patient = owners(cell + rest + times * BENIGN, everyone)
        inside = np.r_[np.ones(cell, bool), np.zeros(rest, bool), rng.random(times * BENIGN) < share]
    y = np.r_[np.ones(cell + rest, int), np.zeros(times * BENIGN, int)]
    raised = np.where(inside, *distances) * y
    return y, rng.normal(size=len(y)) + raised + EFFECT * rng.normal(size=patients)[patient], patient, inside


def difference(y, s, patient, inside, replicates: int, seed: int):
    table = pl.DataFrame({"sex": np.where(inside, "in", "out")})
    cells = subgroups(table, y, s, patient, None, replicates=replicates, seed=seed)[0]["cells"]
    return cells[0]["difference"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cohorts", type=int, default=200)
    parser.add_argument("--replicates", type=int, default=600)
    options = parser.parse_args()
    table, y, ranks, patient = competition()
    start, processor = time.perf_counter(), time.process_time()
    found = subgroups(table, y, ranks, patient, float(np.quantile(ranks[y == 1], 0.1)))
    seconds, busy = time.perf_counter() - start, time.process_time() - processor
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    cells = sum(len(part["cells"]) for part in found)
    print(
        f"{cells} cells of {len(found)} partitions, 2,000 replicates: {seconds:.2f} s, {busy:.2f} s of processor time,"
    )
    print(f"at most {memory:.0f} MiB\n")
    if not options.cohorts:
        return
    print("| cell is a kind of | malignant inside | outside | true difference | held | below | above | width |")
    print("|---|---|---|---|---|---|---|---|")
    for by_patient in (True, False):
        for cell, rest in SETTINGS:
            for distances in SIGNALS:
                rng = np.random.default_rng(0)
                ty, ts, _, ti = cohort(rng, cell * LARGER, rest * LARGER, distances, by_patient, LARGER)
                truth = metrics.pauc(ty[ti], ts[ti]) - metrics.pauc(ty[~ti], ts[~ti])
                ends = []
                for seed in range(options.cohorts):
                    drawn = cohort(np.random.default_rng(seed + 1), cell, rest, distances, by_patient)
                    one = difference(*drawn, options.replicates, seed)["interval"]
                    if one["low"] is not None:
                        ends.append((one["low"], one["high"]))
                low, high = np.array(ends).T
                below, above = np.mean(high < truth), np.mean(low > truth)
                kind = "patient" if by_patient else "lesion"
                print(
                    f"| {kind} | {cell} | {rest} | {truth:+.3f} | {1 - below - above:.1%} | {below:.1%} | {above:.1%} "
                    f"| {np.mean(high - low):.3f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
