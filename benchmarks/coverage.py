"""How often do 95 % intervals of the pAUC hold the truth? python benchmarks/coverage.py --cohorts 400

Simulated cohorts of 200 patients and 4,000 benign lesions, with a patient effect; three strengths of signal.
Percentile and BCa intervals of the same replicates are shown beside ours. About 10 minutes on one core.
"""

from __future__ import annotations

import argparse
from statistics import NormalDist

import numpy as np

from lesionflow.evaluation import intervals, metrics
from lesionflow.evaluation.resample import Patients, influence

SIGNALS = ((2.2, 0.0), (2.2, 0.15), (3.2, 0.0))
"""Distance of the classes in standard deviations; share of malignant lesions that look benign."""


def cohort(rng: np.random.Generator, malignant: int, patients: int, benign: int, distance: float, hidden: float):
    y = np.r_[np.ones(malignant, int), np.zeros(benign, int)]
    patient = rng.integers(0, patients, len(y))
    visible = (y == 1) & (rng.random(len(y)) >= hidden)
    return y, rng.normal(size=len(y)) + distance * visible + 0.4 * rng.normal(size=patients)[patient], patient


def three(y, s, patient, replicates: int, seed: int) -> dict[str, tuple[float, float]]:
    """Our interval, the percentile and the BCa interval, from the same replicates."""
    ours = intervals.bootstrap_pauc(y, s, patient, replicates=replicates, seed=seed)
    patients = Patients(y, [s], patient)
    table = patients.tables[0]
    values = np.concatenate([table.value(w, 0.8) for w in patients.draws(replicates, seed)])
    values = values[np.isfinite(values)]
    point, per_lesion = influence(*table.times(patients.everyone()), 0.8)
    pull = table.spread(per_lesion)[0]
    skew = (patients.multiplicity * pull**3).sum() / (6 * (patients.multiplicity * pull**2).sum() ** 1.5)
    normal = NormalDist()
    below = np.clip((values < point).mean() + (values == point).mean() / 2, 1e-4, 1 - 1e-4)
    shift = normal.inv_cdf(float(below))
    levels = []
    for q in (0.025, 0.975):
        z = shift + normal.inv_cdf(q)
        levels.append(normal.cdf(shift + z / (1 - skew * z)))
    return {
        "ours": (ours.low, ours.high),
        "BCa": tuple(np.quantile(values, levels)),
        "percentile": tuple(np.quantile(values, [0.025, 0.975])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cohorts", type=int, default=400)
    parser.add_argument("--replicates", type=int, default=600)
    options = parser.parse_args()
    print("| pAUC | malignant | " + " | ".join(f"{n}: covers, width" for n in ("ours", "BCa", "percentile")) + " |")
    print("|---|---|---|---|---|")
    for distance, hidden in SIGNALS:
        y, s, _ = cohort(np.random.default_rng(0), 400_000, 1_000_000, 1_000_000, distance, hidden)
        truth = metrics.pauc(y, s)
        for malignant in (20, 40, 80, 300):
            found: dict[str, list[tuple[bool, float]]] = {}
            for seed in range(options.cohorts):
                data = cohort(np.random.default_rng(seed + 1), malignant, 200, 4000, distance, hidden)
                for name, (low, high) in three(*data, options.replicates, seed).items():
                    found.setdefault(name, []).append((low <= truth <= high, high - low))
            cells = [f"{np.mean([c for c, _ in f]):.0%}, {np.mean([w for _, w in f]):.4f}" for f in found.values()]
            print(f"| {truth:.4f} | {malignant} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
