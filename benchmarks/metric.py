"""Our bootstrap of the pAUC against scikit-learn on the same replicates: python benchmarks/metric.py [--all]

The competition's size: 401,059 lesions, 393 malignant, 1,042 patients. scikit-learn scores 20 of the replicates,
lesions weighted by how often their patient was drawn; its time for all 2,000 is extrapolated from these. With --all
everything that metrics.json holds of an out-of-fold table is timed as well, subgroups included.
"""

from __future__ import annotations

import argparse
import resource
import time
from typing import Any

import numpy as np
import polars as pl
from sklearn.metrics import roc_auc_score

from lesionflow.evaluation.evaluate import evaluate
from lesionflow.evaluation.intervals import bootstrap_pauc
from lesionflow.evaluation.ranking import by_fold, ranking
from lesionflow.evaluation.resample import Patients

LESIONS, MALIGNANT, PATIENTS = 401_059, 393, 1042
TIMES_FASTER, PAUC_SECONDS, ALL_SECONDS, ALL_MEGABYTES = 150, 1.0, 5.0, 1000


def cohort(lesions: int, malignant: int, patients: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Targets, scores with a patient and a class effect, patients of very different size."""
    rng = np.random.default_rng(0)
    share = rng.lognormal(size=patients)
    patient = rng.choice(patients, lesions, p=share / share.sum())
    patient[:patients] = np.arange(patients)
    y = np.zeros(lesions, np.int64)
    y[rng.choice(lesions, malignant, replace=False)] = 1
    return y, rng.normal(size=lesions) + 2.2 * y + 0.4 * rng.normal(size=patients)[patient], patient


def out_of_fold() -> pl.DataFrame:
    """The same as an oof table of five folds, with the columns that subgroups are cut by."""
    y, s, patient = cohort(LESIONS, MALIGNANT, PATIENTS)
    rng = np.random.default_rng(1)
    sites = np.array(["head/neck", "upper extremity", "lower extremity", "anterior torso", "posterior torso"])
    houses = np.array([f"institution {i}" for i in range(7)])
    return pl.DataFrame(
        {
            "isic_id": [f"ISIC_{i:07}" for i in range(len(y))],
            "patient_group": [f"IP_{i:07}" for i in patient],
            "target": y.astype(np.int8),
            "fold": (patient % 5).astype(np.int8),
            "logit": 1.5 * s - 5,
            "fold_hash": ["0" * 64] * len(y),
            "sex": np.array(["female", "male"])[(rng.random(PATIENTS) < 0.6).astype(int)][patient],
            "age_approx": (5.0 * rng.integers(4, 18, PATIENTS))[patient],
            "anatom_site_general": sites[rng.integers(0, 5, len(y))],
            "attribution": houses[rng.integers(0, 7, PATIENTS)][patient],
            "tbp_tile_type": np.array(["3D: white", "3D: XP"])[(rng.random(len(y)) < 0.7).astype(int)],
            "clin_size_long_diam_mm": 1 + rng.lognormal(1.0, 0.5, len(y)),
            "tbp_lv_Lext": rng.normal(60, 8, PATIENTS)[patient] + rng.normal(size=len(y)),
            "tbp_lv_Bext": rng.normal(27, 4, PATIENTS)[patient] + rng.normal(size=len(y)),
        }
    )


def timed(what: Any) -> tuple[Any, float, float]:
    """The result, seconds on the clock, and seconds of processor over all cores, which others' work hardly changes."""
    clock, processor = time.perf_counter(), time.process_time()
    return what(), time.perf_counter() - clock, time.process_time() - processor


def peak() -> float:
    """Most memory that this process has held so far, megabytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replicates", type=int, default=2000)
    parser.add_argument("--compared", type=int, default=20)
    parser.add_argument("--all", action="store_true", help="time the whole of metrics.json as well")
    options = parser.parse_args()
    y, s, patient = cohort(LESIONS, MALIGNANT, PATIENTS)

    interval, whole, whole_cpu = timed(lambda: bootstrap_pauc(y, s, patient, replicates=options.replicates))
    _, four, four_cpu = timed(lambda: ranking(y, s, patient, replicates=options.replicates))
    _, folds, folds_cpu = timed(lambda: by_fold(y, s, patient, patient % 5, replicates=options.replicates))
    ours_peak = peak()

    start = time.perf_counter()
    drawn = Patients(y, [s], patient)
    weights = np.concatenate(list(drawn.draws(options.replicates, seed=0)))
    ours = drawn.tables[0].value(weights, 0.8)
    values = time.perf_counter() - start

    start = time.perf_counter()
    theirs = []
    for row in weights[: options.compared]:
        corrected = roc_auc_score(1 - y, -s, max_fpr=0.2, sample_weight=row[patient])
        theirs.append(0.02 + 0.18 * (corrected - 0.5) / 0.5)
    plain = (time.perf_counter() - start) / options.compared * options.replicates
    worst = np.abs(ours[: options.compared] - np.array(theirs)).max()

    print(f"{LESIONS:,} lesions, {MALIGNANT} malignant, {PATIENTS:,} patients; {options.replicates:,} replicates.")
    print(f"pAUC interval {interval.low:.4f} to {interval.high:.4f}\n")
    print("| what | seconds | of processor | times faster |\n|---|---|---|---|")
    print(f"| scikit-learn's values, {options.compared} replicates, extrapolated | {plain:.1f} | | 1 |")
    print(f"| our values, the same replicates | {values:.2f} | | {plain / values:,.0f} |")
    ratio = plain / whole
    print(f"| our pAUC interval, with each replicate's standard error | {whole:.2f} | {whole_cpu:.2f} | {ratio:,.0f} |")
    print(f"| pAUC above 0.80 and 0.88, AUC, average precision, with intervals | {four:.2f} | {four_cpu:.2f} | |")
    print(f"| the same of each of five folds and their mean | {folds:.2f} | {folds_cpu:.2f} | |")
    print(f"\nlargest difference over {options.compared} replicates: {worst:.1e}; peak memory {ours_peak:.0f} MB")
    failed = [f"values differ by {worst:.1e}"] * int(worst > 1e-12)
    failed += [f"only {ratio:.0f} times faster"] * int(ratio < TIMES_FASTER)
    failed += [f"pAUC took {whole:.1f} s"] * (whole > PAUC_SECONDS)
    if options.all:
        oof = out_of_fold()
        before = peak()
        result, seconds, cpu = timed(lambda: evaluate(oof))
        cells = sum(len(partition["cells"]) for partition in result["subgroups"])
        print(f"all of metrics.json: {seconds:.2f} s ({cpu:.2f} s of processor), {cells} subgroup cells")
        print(f"peak memory {peak():.0f} MB; before it {before:.0f} MB, scikit-learn's run and the table included")
        failed += [f"everything took {seconds:.1f} s"] * (seconds > ALL_SECONDS)
        failed += [f"peak memory {peak():.0f} MB"] * (peak() > ALL_MEGABYTES)
    if failed:
        raise SystemExit("; ".join(failed))


if __name__ == "__main__":
    main()
