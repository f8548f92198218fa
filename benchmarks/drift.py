"""How often is drift named where there is none, and where there is some? python benchmarks/drift.py --cohorts 400

Simulated patients of very different size (15 lesions at the median, 25 on average) whose lesions are alike in light, in
skin, in site and in score, with 96 figures that hang together; some are skewed, tied or rare. A hold-out of 200 of them
is the reference, drawn anew each time, and cohorts of 20 to 300 patients are held against it. `--data DIR` takes a real
data set's metadata instead and splits its patients at random, for false alarms alone. About 15 minutes on one core.
Beside ours: lesions taken for independent (Mann-Whitney of the same bins, Holm), and a population stability index of
0.2 and more, the usual rule of thumb.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import polars as pl

from lesionflow.data.derived import NUMBERS
from lesionflow.serving.drift import ALPHA, WINDOW_ALPHA, Shift, Sums, adjusted
from lesionflow.serving.driftfigures import Figures, observed, populations
from lesionflow.serving.driftreference import grouped, reference, visit_sizes

HELD, SIZES = 200, (20, 50, 100, 300)
STATISTICS = ("brightness", "contrast", "red_green", "blue_green", "colourfulness", "detail_1", "detail_2", "detail_4",
              "detail_8", "peaked", "flat")  # fmt: skip
MODES = ("image", "record", "visit", "image_record", "image_visit")
SITES = ("anterior torso", "head/neck", "lower extremity", "posterior torso", "upper extremity")
FACTORS = 8


@dataclass(frozen=True)
class Cohort:
    """Lesions of simulated patients."""

    patient: np.ndarray
    statistics: dict[str, np.ndarray]
    logits: dict[str, np.ndarray]
    bands: list[str]
    table: pl.DataFrame

    @property
    def groups(self) -> list[str]:
        return [f"P{one:05d}" for one in self.patient]


def cohort(rng: np.random.Generator, patients: int) -> Cohort:
    """So many patients: figures are loaded on factors of patient and lesion, the loadings the same every time."""
    fixed = np.random.default_rng(1)
    names = [*STATISTICS, *MODES, *NUMBERS]
    own, shared = fixed.normal(size=(2, FACTORS, len(names)))
    alike = fixed.uniform(0.05, 0.7, len(names))
    size = np.maximum(1, np.round(15 * rng.lognormal(size=patients))).astype(int)
    patient = np.repeat(np.arange(patients), size)
    n = len(patient)
    person = (rng.normal(size=(patients, FACTORS)) @ shared / FACTORS**0.5)[patient]
    lesion = 0.8 * rng.normal(size=(n, FACTORS)) @ own / FACTORS**0.5 + 0.6 * rng.normal(size=(n, len(names)))
    x = dict(zip(names, (np.sqrt(alike) * person + np.sqrt(1 - alike) * lesion).T, strict=True))
    for name in ("detail_1", "tbp_lv_areaMM2", "tbp_lv_perimeterMM", "clin_size_long_diam_mm"):
        x[name] = np.exp(x[name])
    x["flat"] = np.maximum(x["flat"] - 0.5, 0)  # Most are 0.
    x["age_approx"] = (5 * np.round(11 + 3 * rng.normal(size=patients))).clip(0, 90)[patient]
    site = rng.dirichlet(2 * np.ones(len(SITES)), patients)
    columns = {name: x[name] for name in NUMBERS}
    columns["age_approx"] = np.where((rng.random(patients) < 0.02)[patient], np.nan, columns["age_approx"])
    columns |= {
        "patient_id": [f"P{one:05d}" for one in patient],
        "sex": rng.choice(["female", "male"], patients)[patient],
        "tbp_tile_type": rng.choice(["3D: XP", "3D: white"], patients, p=[0.7, 0.3])[patient],
        "anatom_site_general": np.array(SITES)[(rng.random(n)[:, None] > site.cumsum(1)[patient]).sum(1).clip(max=4)],
        "tbp_lv_location_simple": rng.choice(["Torso Back", "Torso Front", "Left Arm", "Right Arm"], n),
    }
    score = x["image_visit"]
    bands = np.where(score > 1.2, "refer", np.where(score > -0.5, "routine", "low"))
    bands = np.where(rng.random(n) < 0.002, CANNOT, bands)
    stats, logits = ({name: x[name] for name in of} for of in (STATISTICS, MODES))
    return Cohort(patient, stats, logits, bands.tolist(), pl.DataFrame(columns))


def moved(figure: str, by: float, wider: float = 1.0) -> Callable[[Cohort, np.random.Generator], Cohort]:
    """A picture's figure `by` standard deviations up, and spread `wider` about its mean."""

    def change(one: Cohort, _: np.random.Generator) -> Cohort:
        x = one.statistics[figure]
        x = x.mean() + wider * (x - x.mean()) + by * x.std()
        return replace(one, statistics=one.statistics | {figure: x})

    return change


def scored(by: float) -> Callable[[Cohort, np.random.Generator], Cohort]:
    """The served score and the picture's moved up, as another prevalence or a sharper lens would."""

    def change(one: Cohort, _: np.random.Generator) -> Cohort:
        return replace(one, logits={name: x + by * x.std() for name, x in one.logits.items()})

    return change


def tiled(share: float, kind: str = "3D: white") -> Callable[[Cohort, np.random.Generator], Cohort]:
    """So large a share of patients is photographed with tiles of the kind; 0.3 is usual of the white ones."""

    def change(one: Cohort, rng: np.random.Generator) -> Cohort:
        patients = one.patient.max() + 1
        cells = np.where(rng.random(patients) < share, kind, "3D: XP")[one.patient]
        return replace(one, table=one.table.with_columns(tbp_tile_type=pl.Series(cells)))

    return change


def emptied(share: float) -> Callable[[Cohort, np.random.Generator], Cohort]:
    """So large a share of patients has no age; 0.02 is usual."""

    def change(one: Cohort, rng: np.random.Generator) -> Cohort:
        gone = (rng.random(one.patient.max() + 1) < share)[one.patient]
        x = np.where(gone, np.nan, one.table["age_approx"].to_numpy())
        return replace(one, table=one.table.with_columns(age_approx=pl.Series(x)))

    return change


def doubted(share: float) -> Callable[[Cohort, np.random.Generator], Cohort]:
    """So large a share of lesions can't be judged; 0.002 is usual."""

    def change(one: Cohort, rng: np.random.Generator) -> Cohort:
        bad = rng.random(len(one.bands)) < share
        return replace(one, bands=[CANNOT if b else a for a, b in zip(one.bands, bad, strict=True)])

    return change


CANNOT = "cannot judge"
AGE = "missing age_approx"
CHANGES: tuple[tuple[str, str, Callable[[Cohort, np.random.Generator], Cohort]], ...] = (
    ("brighter by 0.2 s.d.", "picture brightness", moved("brightness", 0.2)),
    ("brighter by 0.5 s.d.", "picture brightness", moved("brightness", 0.5)),
    ("brighter by 1 s.d.", "picture brightness", moved("brightness", 1.0)),
    ("contrast spread 1.3 times", "picture contrast", moved("contrast", 0, 1.3)),
    ("contrast spread 2 times", "picture contrast", moved("contrast", 0, 2.0)),
    ("all scores up by 0.2 s.d.", "score image_visit", scored(0.2)),
    ("all scores up by 0.5 s.d.", "score image_visit", scored(0.5)),
    ("white tiles 50 % (usual: 30)", "metadata tbp_tile_type", tiled(0.5)),
    ("white tiles 80 %", "metadata tbp_tile_type", tiled(0.8)),
    ("a new kind of tile, 10 %", "metadata tbp_tile_type", tiled(0.1, "new")),
    ("a new kind of tile, 30 %", "metadata tbp_tile_type", tiled(0.3, "new")),
    ("no age, 10 % (usual: 2)", AGE, emptied(0.1)),
    ("no age, 30 %", AGE, emptied(0.3)),
    ("cannot judge, 2 % (usual: 0.2)", "band", doubted(0.02)),
    ("cannot judge, 5 %", "band", doubted(0.05)),
)


def held(known: dict, one: Cohort) -> list[Shift]:
    figures, tests = populations(known)
    owner, count = grouped(one.groups)
    seen = observed(one.statistics, one.logits, one.bands, one.table, visit_sizes(owner, np.ones(len(owner), bool)))
    sums = Sums(tests[""])
    sums.add(figures.codes(seen, len(owner)), owner, count)
    return sums.shifts()


def independent(known: dict, one: Cohort) -> tuple[bool, bool]:
    """Whether anything is named when lesions are taken for independent, and by the stability index."""
    figures = Figures(known["figures"])
    seen = observed(one.statistics, one.logits, one.bands, one.table)
    codes = figures.codes(seen, len(one.patient))
    shifts, index = [], 0.0
    for row, name in enumerate(figures.names):
        here = codes[row][codes[row] >= 0]
        if figures.kinds[row] != "number" or not len(here):
            continue
        share = np.array(known["whole"]["figures"][name]["shares"])
        new = np.bincount(here, minlength=len(share)) / len(here)
        place = np.cumsum(share) - share / 2
        spread = (share * place**2).sum() - 0.25
        z = (place[here].mean() - 0.5) / np.sqrt(spread * (1 / len(here) + 1 / known["whole"]["lesions"]))
        shifts.append(float(z))
        a, b = np.maximum(share, 1e-4), np.maximum(new, 1e-4)
        index = max(index, float(((b - a) * np.log(b / a)).sum()))
    from statistics import NormalDist

    p = min(2 * NormalDist().cdf(-abs(z)) for z in shifts) * len(shifts)
    return p <= ALPHA, index >= 0.2


def anything(shifts: list[Shift], alpha: float) -> tuple[bool, bool]:
    """Whether Holm's procedure rejects anything, and whether it is worth a word."""
    found = adjusted(shifts, alpha)
    return any((one.adjusted or 1) <= alpha for one in found if one.p is not None), any(one.shifted for one in found)


def false_alarms(cohorts: int) -> None:
    print(f"| patients | tests | p < 0.05 | p < 0.001 | named at {ALPHA} | at {WINDOW_ALPHA} | as independent | PSI |")
    print("|---|---|---|---|---|---|---|---|")
    rows: dict[int, list] = {size: [] for size in SIZES}
    ps: dict[int, list[float]] = {size: [] for size in SIZES}
    tests: dict[int, list[int]] = {size: [] for size in SIZES}
    for seed in range(cohorts):
        rng = np.random.default_rng([seed, 0])
        known = reference_of(cohort(rng, HELD))
        for size in SIZES:
            one = cohort(rng, size)
            shifts = held(known, one)
            found = [s.p for s in shifts if s.p is not None]
            ps[size] += found
            tests[size].append(len(found))
            rows[size].append((anything(shifts, ALPHA)[0], anything(shifts, WINDOW_ALPHA)[0], *independent(known, one)))
    for size in SIZES:
        p, share = np.array(ps[size]), np.mean(rows[size], axis=0)
        print(f"| {size} | {np.mean(tests[size]):.0f} | {(p < 0.05).mean():.1%} | {(p < 0.001).mean():.2%} | "
              f"{' | '.join(f'{one:.1%}' for one in share)} |", flush=True)  # fmt: skip


def power(cohorts: int) -> None:
    print(f"| what changed | {' | '.join(f'{size} patients' for size in SIZES)} |\n|---{'|---' * len(SIZES)}|")
    found = np.zeros((len(CHANGES), len(SIZES)))
    for seed in range(cohorts):
        rng = np.random.default_rng([seed, 1])
        known = reference_of(cohort(rng, HELD))
        for column, size in enumerate(SIZES):
            one = cohort(rng, size)
            for row, (_, figure, change) in enumerate(CHANGES):
                shifts = adjusted(held(known, change(one, rng)))
                found[row, column] += any(s.shifted and s.figure == figure for s in shifts)
    for (name, _, _), row in zip(CHANGES, found / cohorts, strict=True):
        print(f"| {name} | {' | '.join(f'{one:.0%}' for one in row)} |", flush=True)


def reference_of(one: Cohort) -> dict:
    return reference(
        one.groups, one.table, statistics=one.statistics, logits=one.logits, bands=one.bands, metadata=one.table
    )


def real(data: Path, cohorts: int) -> None:
    """False alarms where a real data set's patients are split at random."""
    from lesionflow.data.table import read_metadata

    table = read_metadata(data / "train-metadata.csv").with_columns(group=pl.coalesce("patient_id", "isic_id"))
    groups = np.array(table["group"].to_list())
    patients, rng = np.unique(groups), np.random.default_rng(0)
    half = len(patients) // 2
    print(f"| patients of {len(patients)} | tests | p < 0.05 | p < 0.001 | named at {ALPHA} |\n|---|---|---|---|---|")
    for size in [size for size in SIZES if size <= half]:
        ps, named = [], []
        for _ in range(cohorts):
            order = rng.permutation(patients)
            mine = np.isin(groups, order[half : half + size])
            ours = np.isin(groups, order[:half])
            known = reference(
                groups[ours].tolist(), table.filter(ours).drop("attribution"), metadata=table.filter(ours)
            )
            figures, tests = populations(known)
            owner, count = grouped(groups[mine].tolist())
            seen = observed(None, None, None, table.filter(mine), visit_sizes(owner, np.ones(len(owner), bool)))
            sums = Sums(tests[""])
            sums.add(figures.codes(seen, len(owner)), owner, count)
            shifts = sums.shifts()
            ps.append([s.p for s in shifts if s.p is not None])
            named.append(anything(shifts, ALPHA)[0])
        p = np.concatenate(ps)
        print(f"| {size} | {np.mean([len(one) for one in ps]):.0f} | {(p < 0.05).mean():.1%} | "
              f"{(p < 0.001).mean():.2%} | {np.mean(named):.1%} |", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cohorts", type=int, default=400)
    parser.add_argument("--data", type=Path, help="Data set directory: false alarms on its metadata alone.")
    parser.add_argument("--power", action="store_true", help="Planted shifts alone.")
    parser.add_argument("--alarms", action="store_true", help="False alarms alone.")
    options = parser.parse_args()
    if options.data:
        real(options.data, options.cohorts)
        return
    if not options.power:
        false_alarms(options.cohorts)
    if not options.alarms:
        power(options.cohorts)


if __name__ == "__main__":
    main()
