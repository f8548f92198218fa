"""Our bootstrap of the pAUC against scikit-learn on the same replicates: python benchmarks/metric.py

The competition's size: 401,059 lesions, 393 malignant, 1,042 patients. scikit-learn scores 20 of the replicates,
lesions weighted by how often their patient was drawn; its time for all 2,000 is extrapolated from these.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from sklearn.metrics import roc_auc_score

from lesionflow.evaluation.intervals import bootstrap_pauc
from lesionflow.evaluation.resample import Patients


def cohort(lesions: int, malignant: int, patients: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Targets, scores with a patient and a class effect, patients of very different size."""
    rng = np.random.default_rng(0)
    share = rng.lognormal(size=patients)
    patient = rng.choice(patients, lesions, p=share / share.sum())
    patient[:patients] = np.arange(patients)
    y = np.zeros(lesions, np.int64)
    y[rng.choice(lesions, malignant, replace=False)] = 1
    return y, rng.normal(size=lesions) + 2.2 * y + 0.4 * rng.normal(size=patients)[patient], patient


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replicates", type=int, default=2000)
    parser.add_argument("--compared", type=int, default=20)
    options = parser.parse_args()
    y, s, patient = cohort(401_059, 393, 1042)

    start = time.perf_counter()
    interval = bootstrap_pauc(y, s, patient, replicates=options.replicates)
    whole = time.perf_counter() - start

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
    each = (time.perf_counter() - start) / options.compared
    plain = each * options.replicates
    worst = np.abs(ours[: options.compared] - np.array(theirs)).max()

    print(
        f"pAUC interval {interval.low:.4f} to {interval.high:.4f}; "
        f"{options.replicates:,} replicates of 1,042 patients\n"
    )
    print("| what | seconds | ratio |\n|---|---|---|")
    print(f"| scikit-learn, {options.compared} replicates, extrapolated | {plain:.1f} | 1 |")
    print(f"| ours, the same replicates | {values:.2f} | {plain / values:,.0f} |")
    print(f"| ours, whole interval with standard errors | {whole:.2f} | {plain / whole:,.0f} |")
    print(f"\nlargest difference over {options.compared} replicates: {worst:.1e}")
    if worst > 1e-12:
        raise SystemExit("the values differ")


if __name__ == "__main__":
    main()
