"""Do the clinical figures keep their word? python benchmarks/clinical.py --part threshold

Simulated cohorts, markdown tables. `threshold`: how often the true sensitivity is under the bound it was chosen for,
at most 5 % (1.4 points of simulation error at 1,000 cohorts). `shift`: a prevalence that calibration has to recover.
`work`, `reliability`, `drawn`, `line`: how often 95 % intervals hold the truth, by number of malignant lesions.
`lists`: how many lesions one benign lesion may stand for before figures per patient are no use. Each takes a few
minutes on one core; `--cohorts` shortens it.
"""

from __future__ import annotations

import argparse
from statistics import NormalDist

import numpy as np

from lesionflow.bundle import probability_interval
from lesionflow.evaluation import calibration, decision, thresholds, workload
from lesionflow.evaluation.workload import SENSITIVITIES

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


PREVALENCE = 0.001
PATIENTS, BENIGN, DISTANCE, ALIKE = 200, 4000, 2.2, 0.4
MALIGNANT = (300, 80, 40, 20)


def cohort(rng: np.random.Generator, malignant: int, scale: int = 1, benign: int = BENIGN):
    """Targets, scores and patients. Scores are normal with spread 1 in either class, DISTANCE apart."""
    y = np.r_[np.ones(malignant * scale, int), np.zeros(benign * scale, int)]
    patient = rng.integers(0, PATIENTS * scale, len(y))
    s = rng.normal(size=len(y)) * (1 - ALIKE**2) ** 0.5 + DISTANCE * y
    return y, s + ALIKE * rng.normal(size=PATIENTS * scale)[patient], patient


def held(figure: dict, truth: float) -> bool | None:
    """Whether the interval holds the truth; None where there is no interval."""
    low, high = figure["interval"]["low"], figure["interval"]["high"]
    return None if low is None else low <= truth <= high


def table(names: list[str], rows: dict[int | str, dict[str, list[bool | None]]]) -> None:
    print(f"| malignant lesions | {' | '.join(names)} |")
    print("|" + "---|" * (len(names) + 1))
    for malignant, found in rows.items():
        cells = []
        for name in names:
            kept = [one for one in found[name] if one is not None]
            share = len(kept) / len(found[name])
            cells.append(
                "no interval" if share < 0.05 else f"{np.mean(kept):.1%}" + ("" if share > 0.95 else f" of {share:.0%}")
            )
        print(f"| {malignant} | {' | '.join(cells)} |", flush=True)


def work(cohorts: int) -> None:
    """Coverage of what reviewing costs. "of 40 %": in so many cohorts there was an interval.

    Overall at PREVALENCE, benign lesions thinned; per patient where all of ten times as many benign lesions were kept.
    """
    normal = NormalDist()
    rows: dict[int | str, dict[str, list[bool | None]]] = {}
    names = [f"{name} at {one:.0%}" for name in ("overall", "flagged a patient", "within") for one in SENSITIVITIES]
    for malignant in MALIGNANT:
        found: dict[str, list[bool | None]] = {name: [] for name in names}
        y, s, patient = cohort(np.random.default_rng(10**6), malignant, 50, 10 * BENIGN)
        whole = malignant / (malignant + 10 * BENIGN)
        many = workload.operating(y, s, patient, np.ones(len(y), bool), prevalence=whole, replicates=0)
        for seed in range(cohorts):
            y, s, patient = cohort(np.random.default_rng([seed, malignant]), malignant)
            thinned = workload.operating(y, s, patient, np.zeros(len(y), bool), prevalence=PREVALENCE)
            y, s, patient = cohort(np.random.default_rng([seed, malignant]), malignant, benign=10 * BENIGN)
            lists = workload.operating(y, s, patient, np.ones(len(y), bool), prevalence=whole)
            for one, listed, truth in zip(thinned, lists, many, strict=True):
                se = one["sensitivity"]
                passed = 1 - normal.cdf(DISTANCE - normal.inv_cdf(se))
                cost = 1 + (1 - PREVALENCE) / PREVALENCE * passed / se
                found[f"overall at {se:.0%}"].append(held(one["reviewed_per_cancer"], cost))
                load = (malignant * se + 10 * BENIGN * passed) / PATIENTS
                found[f"flagged a patient at {se:.0%}"].append(held(listed["flagged_per_patient"], load))
                deep = truth["within_patient"]["reviewed_per_cancer"]["value"]
                found[f"within at {se:.0%}"].append(held(listed["within_patient"]["reviewed_per_cancer"], deep))
        rows[malignant] = found
    table(names, rows)


def lists(cohorts: int) -> None:
    """Each patient's highest lesions where benign ones were thinned: may one stand for so many? No limit is kept to."""
    limit, workload.MOST_STOOD_FOR = workload.MOST_STOOD_FOR, 10**9
    print("| lesions a patient | one stands for | figure / truth, median: 80 %, 90 %, 95 % | coverage |")
    print("|---|---|---|---|")
    for each in (40, 200):
        truths: list[float] = []
        for stood_for in (0, 1, 3, 5, 10, 20, 50, 100):
            values, inside = [], []
            for seed in range(min(cohorts, 200) if stood_for else 1):
                rng, patients = np.random.default_rng([seed, stood_for]), 300 if stood_for else 6000
                patient = np.repeat(np.arange(patients), each)
                y = np.zeros(len(patient), int)
                y[rng.choice(len(y), patients // 2, replace=False)] = 1
                s = rng.normal(size=len(y)) + DISTANCE * y + ALIKE * rng.normal(size=patients)[patient]
                kept = (y == 1) | (rng.random(len(y)) * stood_for < 1)
                known = np.ones(int(kept.sum()), bool)
                found = workload.operating(y[kept], s[kept], patient[kept], known, prevalence=0.5 / each)
                figures = [one["within_patient"]["reviewed_per_cancer"] for one in found]
                values.append([one["value"] for one in figures])
                inside.append([held(*one) for one in zip(figures, truths, strict=False)])
            if not stood_for:
                truths = values[0]
                continue
            ratio = np.median(np.array(values) / truths, axis=0)
            share = [np.mean([one for one in at if one is not None]) for at in zip(*inside, strict=True)]
            cells = [", ".join(f"{one:.2f}" for one in ratio), ", ".join(f"{one:.0%}" for one in share)]
            print(f"| {each} | {stood_for} | {' | '.join(cells)} |", flush=True)
    workload.MOST_STOOD_FOR = limit


LINES = {"right": (DISTANCE, -(DISTANCE**2) / 2), "too bold": (1.5 * DISTANCE, -(DISTANCE**2) / 2 - 0.5)}
"""Slope and intercept of the log-odds given to a score, next to those of the prevalence."""
ASSESSED = ("intercept", "slope", "expected_observed", "brier", "log_loss", "ece")


def probabilities(s: np.ndarray, line: tuple[float, float], prevalence: float = PREVALENCE) -> np.ndarray:
    return 1 / (1 + np.exp(-(line[0] * s + line[1] + np.log(prevalence / (1 - prevalence)))))


def reliability(cohorts: int) -> None:
    """Coverage of what is said of probabilities: right ones, and ones that are too bold."""
    # The score's distribution in either class, as evenly spaced quantiles.
    spaced = np.array([NormalDist().inv_cdf((i + 0.5) / 200_000) for i in range(200_000)])
    truth = np.r_[np.ones(len(spaced), int), np.zeros(len(spaced), int)]
    everyone = np.r_[spaced + DISTANCE, spaced]
    for name, line in LINES.items():
        p_all = probabilities(everyone, line)
        lone = np.arange(len(p_all))
        many = calibration.assess(p_all, truth, lone, prevalence=PREVALENCE, replicates=0)
        rows: dict[int | str, dict[str, list[bool | None]]] = {}
        lines = []
        for malignant, benign in [(one, BENIGN) for one in MALIGNANT] + [(300, 10 * BENIGN)]:
            found: dict[str, list[bool | None]] = {one: [] for one in (*ASSESSED, "bins", "net benefit")}
            errors = []
            for seed in range(cohorts):
                y, s, patient = cohort(np.random.default_rng([seed, malignant]), malignant, benign=benign)
                p = probabilities(s, line)
                one = calibration.assess(p, y, patient, prevalence=PREVALENCE, seed=seed)
                bin_of = np.searchsorted([b["low"] for b in one["bins"]][1:], p_all, "right")
                weight = np.where(truth == 1, PREVALENCE, 1 - PREVALENCE)
                mass, seen, gap = (np.bincount(bin_of, w) for w in (weight, weight * truth, weight * (truth - p_all)))
                error = np.abs(gap).sum() / len(spaced)
                for key in ASSESSED:
                    found[key].append(held(one[key], error if key == "ece" else many[key]["value"]))
                found["bins"] += [held(b["observed"], seen[i] / mass[i]) for i, b in enumerate(one["bins"])]
                curve = decision.decision_curve(p, y, patient, prevalence=PREVALENCE, points=9)
                for at, low, high in zip(curve["probability"], curve["low"], curve["high"], strict=True):
                    rates = [np.mean(p_all[truth == kind] >= at) for kind in (1, 0)]
                    net = PREVALENCE * rates[0] - (1 - PREVALENCE) * rates[1] * at / (1 - at)
                    found["net benefit"].append(low <= net <= high)
                errors.append([one["ece"]["value"], one["ece_plain"]["value"], error])
            about = f"{malignant}, of {benign + malignant:,}"
            rows[about] = found
            lines.append((about, *np.mean(errors, axis=0)))
        print(f"\nProbabilities {name}\n")
        table([*ASSESSED, "bins", "net benefit"], rows)
        print("\n| malignant lesions | ECE, mean | uncorrected | true |\n|---|---|---|---|")
        for malignant, ours, plain, true in lines:
            print(f"| {malignant} | {ours:.5f} | {plain:.5f} | {true:.5f} |", flush=True)


def drawn(cohorts: int) -> None:
    """Coverage at the data's own prevalence (0) of right probabilities, where the malignant count is drawn too."""
    normal, names = NormalDist(), (*[one for one in ASSESSED if one != "ece"], "net benefit")
    slope, intercept = LINES["right"]
    spaced = np.array([normal.inv_cdf((i + 0.5) / 200_000) for i in range(200_000)])
    y_all, s_all = np.repeat([1, 0], len(spaced)), np.r_[spaced + DISTANCE, spaced]
    rows: dict[int | str, dict[str, list[bool | None]]] = {}
    for expected in MALIGNANT[:3]:
        count = expected + BENIGN
        prevalence = expected / count
        p_all = probabilities(s_all, LINES["right"], prevalence)
        many = calibration.assess(p_all, y_all, np.arange(len(y_all)), prevalence=prevalence, replicates=0)
        found: dict[str, list[bool | None]] = {one: [] for one in names}
        for seed in range(cohorts):
            rng = np.random.default_rng([seed, expected])
            malignant = int(rng.binomial(count, prevalence))
            y, s, patient = cohort(rng, malignant, benign=count - malignant)
            p = probabilities(s, LINES["right"], prevalence)
            one = calibration.assess(p, y, patient, prevalence=0, seed=seed)
            for key in names[:-1]:
                found[key].append(held(one[key], many[key]["value"]))
            curve = decision.decision_curve(p, y, patient, prevalence=0, points=9)
            for at, low, high in zip(curve["probability"], curve["low"] or [], curve["high"] or [], strict=False):
                cut = (np.log(at / (1 - at)) - np.log(prevalence / (1 - prevalence)) - intercept) / slope
                rates = [1 - normal.cdf(cut - DISTANCE), 1 - normal.cdf(cut)]
                net = prevalence * rates[0] - (1 - prevalence) * rates[1] * at / (1 - at)
                found["net benefit"].append(low <= net <= high)
        rows[f"{expected} expected, of {count:,}"] = found
    table(list(names), rows)


def shift(cohorts: int) -> None:
    """Fitted where benign lesions are thinned, looked at where they aren't: is the planted prevalence recovered?"""
    print("| fitted on, malignant of all | stated | E/O | intercept | slope | E/O without the shift |")
    print("|---|---|---|---|---|---|")
    few = max(2, cohorts // 20)
    for malignant, benign in ((300, 30_000), (300, 3000), (300, 300), (60, 600)):
        found = []
        for seed in range(few):
            rng = np.random.default_rng([seed, malignant, benign])
            y, s, _ = cohort(rng, malignant, benign=benign)
            y_all, s_all, patient = cohort(rng, 400, benign=399_600)
            row = []
            for prevalence in (PREVALENCE, 0.0):
                p = calibration.fit(3 * s - 1, y, prevalence=prevalence).probability(3 * s_all - 1)
                one = calibration.assess(p, y_all, patient, prevalence=0, replicates=0)
                row += [one[name]["value"] for name in ("expected_observed", "intercept", "slope")]
            found.append(row)
        mean, spread = np.mean(found, axis=0), np.std(found, axis=0)
        cells = [f"{mean[i]:.3f} ({spread[i]:.3f})" for i in range(3)] + [f"{mean[3]:.1f}"]
        print(f"| {malignant} of {malignant + benign:,} | {PREVALENCE:g} | {' | '.join(cells)} |", flush=True)


def line(cohorts: int) -> None:
    """Of one lesion's probability, at scores that 1, 50, 90 and 99 % of lesions lie under."""
    print("| patients | malignant lesions | patients differ by | stated | 1 % | 50 % | 90 % | 99 % |")
    print("|---|---|---|---|---|---|---|---|")

    def draw(rng: np.random.Generator, patients: int, each: float, middle: float, unlike: float):
        owner = np.repeat(np.arange(patients), 1 + rng.poisson(each * rng.gamma(0.7, 1 / 0.7, patients)))
        s = rng.normal(size=patients)[owner] + 1.5 * rng.normal(size=len(owner))
        odds = 0.8 * s + middle + unlike * rng.normal(size=patients)[owner]
        return s, (rng.random(len(s)) < calibration.sigmoid(odds)).astype(int), owner

    for patients, each, middle, unlike in ((1000, 20, -5.5, 1.0), (300, 10, -4.0, 0.0), (300, 10, -4.0, 1.0),
                                           (100, 8, -3.0, 1.0), (60, 6, -2.5, 0.5)):  # fmt: skip
        for prevalence in (PREVALENCE, 0.0):
            rng = np.random.default_rng(1)
            s, y, _ = draw(rng, 60_000, each, middle, unlike)
            true, at = calibration.fit(s, y, prevalence=prevalence), np.quantile(s, (0.01, 0.5, 0.9, 0.99))
            inside, counts = [], []
            for _ in range(cohorts):
                s, y, owner = draw(rng, patients, each, middle, unlike)
                found = calibration.fit(s, y, prevalence=prevalence, groups=owner).to_dict()
                counts.append(y.sum())
                if found["covariance"] is not None:
                    ends = [probability_interval(float(one), found) for one in at]
                    inside.append([low <= p <= high for (low, high), p in zip(ends, true.probability(at), strict=True)])
            cells = " | ".join(f"{share:.1%}" for share in np.mean(inside, axis=0))
            stated = f"{prevalence:g}" if prevalence else "as drawn"
            print(f"| {patients} | {np.mean(counts):.0f} | {unlike:g} | {stated} | {cells} |", flush=True)


def main() -> None:
    parts = {
        "threshold": threshold,
        "shift": shift,
        "work": work,
        "lists": lists,
        "reliability": reliability,
        "drawn": drawn,
        "line": line,
    }
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=parts, action="append")
    parser.add_argument("--cohorts", type=int, default=1000)
    options = parser.parse_args()
    for part in options.part or parts:
        parts[part](options.cohorts)


if __name__ == "__main__":
    main()
