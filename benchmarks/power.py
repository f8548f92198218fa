"""Does `compare` keep its word? python benchmarks/power.py [--coverage] --cohorts 1000

Simulated cohorts of patients, scored by two correlated models whose true difference is known. Without --coverage:
how often the interval of the pAUC's difference excludes 0 where the truth is 0 and where it is 0.010, beside the
power that `compare` foretold; also at the size that it named for a power of 80 %. With it: how often intervals hold
the true difference of pAUC, AUC and average precision, and how often percentile intervals would. About
20 and 40 minutes on one core; --cohorts 400 and --pauc are quicker.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np
from scipy.special import ndtr

from lesionflow.evaluation.compare import malignant_for
from lesionflow.evaluation.paired import Pair, compare_scores
from lesionflow.evaluation.ranking import MEASURES
from lesionflow.evaluation.resample import Patients, partial_area

NORMAL = NormalDist()


@dataclass(frozen=True)
class Design:
    """How two models score a population."""

    name: str
    a: float
    b: float
    """Distance of the classes in standard deviations of the noise within a patient, for either model."""
    alike: float = 0.8
    """Correlation of the two models' noise."""
    patient: float = 0.4
    """Standard deviation of the patients' own level."""
    hidden: float = 0.0
    """Share of malignant lesions that look benign to both."""
    uneven: bool = False
    """Whether some patients have many lesions and many few."""
    per_patient: float = 0.0
    """Malignant lesions per patient who has any; 0: patients have them by chance."""

    def cohort(self, rng: np.random.Generator, malignant: int, patients: int, benign: int):
        """y, score of a, score of b, patient; [malignant + benign] each."""
        y = np.r_[np.ones(malignant, int), np.zeros(benign, int)]
        weight = rng.gamma(0.7, size=patients) + 0.05 if self.uneven else np.ones(patients)
        patient = rng.choice(patients, len(y), p=weight / weight.sum())
        if self.per_patient:
            patient[:malignant] = rng.integers(0, max(1, round(malignant / self.per_patient)), malignant)
        seen = (y == 1) & (rng.random(len(y)) >= self.hidden)
        level, noise = (self._pair(rng.normal(size=(3, n))) for n in (patients, len(y)))
        s_a, s_b = (noise[i] + d * seen + self.patient * level[i][patient] for i, d in enumerate((self.a, self.b)))
        return y, s_a, s_b, patient

    def _pair(self, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        shared = np.sqrt(self.alike) * z[0]
        return tuple(shared + np.sqrt(1 - self.alike) * z[i] for i in (1, 2))

    def truth(self, measure: str = "pauc", share: float = 0.02) -> float:
        """a's true figure minus b's; `share` of lesions malignant (for average precision)."""
        return self._figure(self.a, measure, share) - self._figure(self.b, measure, share)

    def _figure(self, distance: float, measure: str, share: float) -> float:
        spread = np.sqrt(1 + self.patient**2)
        score = np.linspace(-10, 14, 4001)
        fpr, seen = ndtr(-score / spread)[::-1], ndtr((distance - score) / spread)[::-1]
        tpr = (1 - self.hidden) * seen + self.hidden * fpr
        if measure == "average_precision":
            grid, height = tpr, share * tpr / np.maximum(share * tpr + (1 - share) * fpr, 1e-300)
        else:
            grid = np.linspace({"pauc": 0.8, "pauc_88": 0.88, "auc": 0.0}[measure], 1, 20_001)
            height = np.interp(grid, tpr, 1 - fpr)
        return float(np.sum((height[1:] + height[:-1]) / 2 * np.diff(grid)))

    def apart(self, difference: float) -> Design:
        """The same with b moved so that the true pAUC difference is `difference`."""
        low, high = 0.0, self.a
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if replace(self, b=middle).truth() > difference else (low, middle)
        return replace(self, b=(low + high) / 2)


DESIGNS = (
    Design("strong models", 3.2, 3.2),
    Design("medium models", 2.2, 2.2),
    Design("strong, unlike each other, uneven patients", 3.2, 3.2, alike=0.5, patient=0.8, uneven=True),
)
COVERED = (
    Design("strong, alike", 3.2, 3.0),
    Design("medium, alike", 2.2, 2.1),
    Design("medium, 15 % look benign", 2.2, 2.2, hidden=0.15),
    Design("strong and medium", 3.2, 2.2, alike=0.5),
    Design("all but the same", 3.2, 3.2, alike=0.98),
    Design("unlike, uneven patients", 3.2, 3.2, alike=0.5, patient=0.8, uneven=True),
    Design("four malignant a patient", 3.2, 3.0, patient=0.6, per_patient=4),
    Design("all but perfect (pAUC 0.194)", 3.8, 3.8, alike=0.5),
)


def pairs(design: Design, malignant: int, cohorts: int, replicates: int, first: int = 0) -> list[Pair]:
    """The pAUC's comparison in cohorts with 20 benign lesions and one patient per malignant lesion."""
    result = []
    for seed in range(first, first + cohorts):
        data = design.cohort(np.random.default_rng([seed, malignant]), malignant, malignant, 20 * malignant)
        result += compare_scores(*data, [partial_area(0.8)], replicates=replicates, seed=seed)
    return result


def foretold(pair: Pair, difference: float) -> float:
    """The power that this comparison foretells for a true `difference`: either side of 0 counts."""
    if pair.error is None or pair.reach is None:
        return float("nan")
    return sum(NORMAL.cdf((side * difference - pair.reach) / pair.error) for side in (1, -1))


def excludes(found: list[Pair]) -> tuple[float, float]:
    """Shares of cohorts whose interval lies above 0, and below."""
    spans = [pair.difference.interval for pair in found]
    return float(np.mean([(s.low or 0) > 0 for s in spans])), float(np.mean([(s.high or 0) < 0 for s in spans]))


def power(cohorts: int, replicates: int) -> None:
    print("| models | malignant | true difference | A is better | B is better | foretold |")
    print("|---|---|---|---|---|---|")
    for design in DESIGNS:
        apart = design.apart(0.010)
        pilots = pairs(apart, 80, cohorts, replicates, first=10**6)
        named = int(np.median([malignant_for(0.010, p, 80) for p in pilots if p.reach is not None]))
        for malignant in (80, 300, named):
            for difference, one in ((0.0, design), (0.010, apart)):
                found = pairs(one, malignant, cohorts, replicates)
                above, below = excludes(found)
                # Where the truth is 0 an interval of 95 % excludes it in 5 % of cohorts.
                said = f"{np.nanmedian([foretold(p, difference) for p in found]):.1%}" if difference else "2.5 % each"
                mark = " (named for 80 %)" if malignant == named else ""
                print(
                    f"| {design.name} | {malignant}{mark} | {difference:.3f} | {above:.1%} | {below:.1%} | {said} |",
                    flush=True,
                )


def coverage(cohorts: int, replicates: int, *, designs: Sequence[Design] = COVERED, all_figures: bool = True) -> None:
    names = list(MEASURES) if all_figures else ["pauc"]
    heads = ["pAUC: covers, width"] + ["percentile: covers, width", "AUC", "average precision"] * all_figures
    print(f"| models | malignant | {' | '.join(heads)} |\n{'|---' * (2 + len(heads))}|")
    for design in designs:
        for malignant in (300, 80, 40, 20):
            truths = {name: design.truth(name, malignant / (malignant + 4000)) for name in names}
            covered: dict[str, list[float]] = {}
            for seed in range(cohorts):
                data = design.cohort(np.random.default_rng([seed, malignant, 1]), malignant, 200, 4000)
                found = compare_scores(*data, [MEASURES[n] for n in names], replicates=replicates, seed=seed)
                spans = {
                    n: (p.difference.interval.low, p.difference.interval.high)
                    for n, p in zip(names, found, strict=True)
                }
                if all_figures:
                    spans["percentile"] = percentile(*data, replicates, seed)
                for name, (low, high) in spans.items():
                    if low is not None:
                        covered.setdefault(name, []).append(low <= truths.get(name, truths["pauc"]) <= high)
                        covered.setdefault(f"{name} width", []).append(high - low)
            wide = ["pauc", "percentile"] if all_figures else ["pauc"]
            cells = [f"{np.mean(covered[k]):.1%}, {np.median(covered[f'{k} width']):.4f}" for k in wide]
            cells += [f"{np.mean(covered[k]):.1%}" for k in ("auc", "average_precision") if all_figures]
            print(f"| {design.name} | {malignant} | {' | '.join(cells)} |", flush=True)


def percentile(y, s_a, s_b, patient, replicates: int, seed: int) -> tuple[float, float]:
    """The percentile interval of the pAUC's difference, from the same replicates."""
    patients = Patients(y, [s_a, s_b], patient)
    drawn = [[t.value(w, 0.8) for t in patients.tables] for w in patients.draws(replicates, seed)]
    gaps = np.concatenate([a - b for a, b in drawn])
    low, high = np.quantile(gaps[np.isfinite(gaps)], [0.025, 0.975])
    return float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cohorts", type=int, default=1000)
    parser.add_argument("--replicates", type=int, default=500)
    parser.add_argument("--coverage", action="store_true", help="Intervals against the truth instead of power.")
    parser.add_argument("--pauc", action="store_true", help="With --coverage: of the pAUC alone, which is quicker.")
    options = parser.parse_args()
    if options.coverage:
        coverage(options.cohorts, options.replicates, all_figures=not options.pauc)
    else:
        power(options.cohorts, options.replicates)


if __name__ == "__main__":
    main()
