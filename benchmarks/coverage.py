"""How often do the 95 % intervals hold the truth? python benchmarks/coverage.py --cohorts 1000

Simulated cohorts of 200 patients of very different size and 4,000 benign lesions, with a patient effect; three
strengths of signal. The truth is a population 300 times as large. Each cell: how often the interval holds it, and
how wide it is on average. Percentile intervals of the same replicates stand beside ours for the pAUC. Everything
takes about 20 minutes on one core; --signal and --malignant take a part of it.
"""

from __future__ import annotations

import argparse
from collections import defaultdict

import numpy as np

from lesionflow.evaluation import metrics
from lesionflow.evaluation.intervals import Interval, sample
from lesionflow.evaluation.ranking import ranking
from lesionflow.evaluation.rates import proportion, rate
from lesionflow.evaluation.resample import Patients, partial_area

SIGNALS = ((2.2, 0.0), (2.2, 0.15), (3.2, 0.0))
"""Distance of the classes in standard deviations; share of malignant lesions that look benign."""
PATIENTS, BENIGN, LARGER = 200, 4000, 300
EFFECT = 0.4
SENSITIVITY, SPECIFICITY = 0.9, 0.95
TOP = 3
"""Of about 20 lesions a patient, as 15 are of about 100."""


class Cohort:
    """`times` 200 patients with `malignant` lesions among them."""

    def __init__(self, rng, malignant: int, distance: float, hidden: float, times: int = 1) -> None:
        self.y = np.r_[np.ones(malignant, int), np.zeros(times * BENIGN, int)]
        size = np.cumsum(rng.lognormal(size=times * PATIENTS))
        self.patient = np.searchsorted(size, rng.random(len(self.y)) * size[-1])
        visible = (self.y == 1) & (rng.random(len(self.y)) >= hidden)
        own = EFFECT * rng.normal(size=times * PATIENTS)[self.patient]
        self.s = rng.normal(size=len(self.y)) + distance * visible + own

    def found(self, threshold: float) -> np.ndarray:
        return self.s[self.y == 1] >= threshold

    def probability(self, distance: float, prevalence: float) -> np.ndarray:
        """Roughly calibrated."""
        slope = distance / (1 + EFFECT**2)
        return 1 / (1 + np.exp(-slope * (self.s - distance / 2)) * (1 - prevalence) / prevalence)


class Truth:
    """What the intervals should hold."""

    def __init__(self, malignant: int, distance: float, hidden: float) -> None:
        whole = Cohort(np.random.default_rng(0), malignant * LARGER, distance, hidden, LARGER)
        y, s = whole.y, whole.s
        self.threshold = float(np.quantile(s[y == 1], 1 - SENSITIVITY))
        self.clear = float(np.quantile(s[y == 0], SPECIFICITY))
        self.prevalence = malignant / (malignant + BENIGN)
        p = whole.probability(distance, self.prevalence)
        self.values = {name: one.value for name, one in ranking(y, s, whole.patient, replicates=0).items()} | {
            "percentile": metrics.pauc(y, s),
            "retrieval": metrics.top_k_retrieval(y, s, whole.patient, TOP),
            "sensitivity": SENSITIVITY,
            "specificity": SPECIFICITY,
            "brier": metrics.brier(y, p),
            "log_loss": metrics.log_loss(y, p),
        }


def one(seed: int, malignant: int, distance: float, hidden: float, truth: Truth, replicates: int):
    """Each figure's interval (low, high) in one cohort."""
    rng = np.random.default_rng(seed + 1)
    cohort = Cohort(rng, malignant, distance, hidden)
    y, s, patient = cohort.y, cohort.s, cohort.patient
    figures = ranking(y, s, patient, replicates=replicates, seed=seed)
    figures["retrieval"] = proportion(metrics.retrieved(y, s, patient, TOP), patient[y == 1])
    figures["sensitivity"] = proportion(cohort.found(truth.threshold), patient[y == 1])
    figures["specificity"] = rate((y == 0) & (s < truth.clear), y == 0, patient, malignant=malignant)
    # A mean over all lesions also hangs on how many are malignant, so here that number is drawn as well.
    drawn = Cohort(rng, int(rng.binomial(malignant + BENIGN, truth.prevalence)), distance, hidden)
    p = drawn.probability(distance, truth.prevalence)
    for name, losses in (("brier", metrics.squared_errors(drawn.y, p)), ("log_loss", metrics.log_losses(drawn.y, p))):
        figures[name] = rate(losses, np.ones(len(p)), drawn.patient, malignant=malignant, kind="positive")
    intervals: dict[str, Interval] = {name: figure.interval for name, figure in figures.items()}
    values = sample(Patients(y, [s], patient), [partial_area(0.8)], replicates, seed)[0].values
    low, high = np.nanquantile(values, [0.025, 0.975])
    return {name: (i.low, i.high) for name, i in intervals.items()} | {"percentile": (low, high)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cohorts", type=int, default=1000)
    parser.add_argument("--replicates", type=int, default=600)
    parser.add_argument("--malignant", type=int, nargs="+", default=[300, 80, 40, 20])
    parser.add_argument("--signal", type=int, nargs="+", default=[0, 1, 2], help="which of SIGNALS")
    options = parser.parse_args()
    header = None
    for distance, hidden in (SIGNALS[i] for i in options.signal):
        for malignant in options.malignant:
            truth = Truth(malignant, distance, hidden)
            held: dict[str, list[bool]] = defaultdict(list)
            width: dict[str, list[float]] = defaultdict(list)
            for seed in range(options.cohorts):
                for name, (low, high) in one(seed, malignant, distance, hidden, truth, options.replicates).items():
                    if low is not None:
                        held[name].append(low <= truth.values[name] <= high)
                        width[name].append(high - low)
            if header is None:
                header = list(held)
                print(f"| true pAUC | malignant | {' | '.join(header)} |\n|---|---|{'---|' * len(header)}")
            cells = [f"{100 * np.mean(held[n]):.1f} % ({np.mean(width[n]):.3g})" for n in header]
            print(f"| {truth.values['pauc']:.3f} | {malignant} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
