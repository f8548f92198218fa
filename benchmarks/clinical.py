"""Do the clinical figures keep their word? python benchmarks/clinical.py --part threshold

Simulated cohorts, markdown tables. `threshold`: how often the true sensitivity is under the bound it was chosen for,
at most 5 % (1.4 points of simulation error at 1,000 cohorts). `shift`: a prevalence that calibration has to recover.
`coverage`: how often 95 % intervals hold the truth, by number of malignant lesions. Each takes a few minutes on one
core; `--cohorts` shortens it.
"""

from __future__ import annotations

import argparse
from statistics import NormalDist

import numpy as np

from lesionflow.evaluation import thresholds

CLUSTERS = {
    "one lesion a patient": lambda rng, n: np.ones(n, int),
    "2 on average": lambda rng, n: rng.geometric(0.5, n),
    "5 each": lambda rng, n: np.full(n, 5),
    "8 % of patients have 10-30": lambda rng, n: np.where(rng.random(n) < 0.08, rng.integers(10, 31, n), 1),
}
"""Malignant lesions per patient."""


def malignant_cohort(rng: np.random.Generator, sizes: str, patients: int, alike: float, step: float):
    """Scores of malignant lesions, standard normal; `alike` is the correlation within a patient, `step` makes ties."""
    owner = np.repeat(np.arange(patients), CLUSTERS[sizes](rng, patients))
    s = np.sqrt(alike) * rng.normal(size=patients)[owner] + np.sqrt(1 - alike) * rng.normal(size=len(owner))
    return np.round(s / step) * step if step else s, owner


def under_the_bound(
    cohorts: int, sizes: str, patients: int, alike: float, step: float, target: float
) -> tuple[float, float, float]:
    """Share of cohorts whose true sensitivity is under `target`; share that reached it; mean true sensitivity."""
    under, true = 0, []
    for seed in range(cohorts):
        s, owner = malignant_cohort(np.random.default_rng([seed, patients]), sizes, patients, alike, step)
        # Benign lesions play no part.
        y, scores, groups = np.r_[np.ones(len(s), int), 0], np.r_[s, -99.0], np.r_[owner, -1]
        chosen = thresholds.choose_threshold(y, scores, groups, target)
        if chosen.reached:
            true.append(1 - NormalDist().cdf(chosen.value - step / 2))
            under += true[-1] < target
    return under / cohorts, len(true) / cohorts, float(np.mean(true)) if true else float("nan")


def threshold(cohorts: int) -> None:
    print("| malignant lesions per patient | alike | ties | patients | 90 %: under, true | 95 %: under, true |")
    print("|---|---|---|---|---|---|")
    for sizes in CLUSTERS:
        for alike, step in ((0.0, 0.0), (0.3, 0.0), (0.8, 0.0), (0.8, 0.5)):
            if sizes.startswith("one") and alike == 0.3:
                continue
            for patients in (40, 80, 200):
                cells = []
                for target in (0.9, 0.95):
                    under, reached, true = under_the_bound(cohorts, sizes, patients, alike, step, target)
                    cells.append(f"{under:.1%}, {true:.3f}" if reached > 0.05 else "not reached")
                ties = "yes" if step else "no"
                print(f"| {sizes} | {alike:g} | {ties} | {patients} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parts = {"threshold": threshold}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=parts, action="append")
    parser.add_argument("--cohorts", type=int, default=1000)
    options = parser.parse_args()
    for part in options.part or parts:
        parts[part](options.cohorts)


if __name__ == "__main__":
    main()
