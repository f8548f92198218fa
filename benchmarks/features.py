"""Our features against pandas on a table of the competition's size: python benchmarks/features.py [--lesions N]

401,059 lesions of 1,042 patients, a median of 241 each and at most 9,184. pandas makes the comparisons within the
patient, and within the patient's body site, from the same columns, twice: by groupby.transform with its built-in
functions, and with lambdas as notebooks have it. The lambdas see 20 patients, and their time for all is extrapolated
from how many groups these have. What both make must agree to 1e-9.
"""

from __future__ import annotations

import argparse
import os
import resource
import time
import warnings
from typing import Any

import numpy as np
import pandas as pd
import polars as pl

from lesionflow.data import context, derived
from lesionflow.data.features import catalogue, features
from lesionflow.data.schema import BY_NAME, LOCATIONS, LOCATIONS_SIMPLE, SEXES, SITES, TILE_TYPES

LESIONS, PATIENTS, MEDIAN, MOST = 401_059, 1042, 241, 9184
COLUMNS, OWN_SECONDS, NEIGHBOUR_SECONDS, MEGABYTES, VISIT_MILLISECONDS = 150, 10.0, 15.0, 6000, 100
FEW = 20
OWN = ("plain", "derived", "context")
SCOPES = {"patient": ["patient_id"], "site": ["patient_id", "anatom_site_general"]}


def counts(lesions: int, patients: int) -> np.ndarray:
    """Lesions of each patient: log-normal as in the full set, one with its largest share, adding up to `lesions`."""
    rng = np.random.default_rng(0)
    most = round(MOST / LESIONS * lesions)
    others = MEDIAN * np.exp(0.97 * rng.standard_normal(patients - 1))
    others = np.minimum(others * (lesions - most) / others.sum(), most * 0.9)
    drawn = np.maximum(1, np.round(others * (lesions - most) / others.sum())).astype(int)
    drawn[drawn.argmax()] += lesions - most - drawn.sum()
    return np.append(drawn, most)


def table(lesions: int, patients: int) -> pl.DataFrame:
    """Typed metadata: patients differ, a few cells are blank, some columns have ties; rows in no order."""
    rng = np.random.default_rng(1)
    size = counts(lesions, patients)
    patient = rng.permutation(np.repeat(np.arange(len(size)), size))
    columns: dict[str, Any] = {
        "isic_id": pl.Series(rng.permutation(lesions)).cast(pl.String).str.zfill(7),
        "patient_id": pl.Series(patient).cast(pl.String),
    }
    for name, values in (
        ("sex", SEXES), ("tbp_tile_type", TILE_TYPES), ("anatom_site_general", SITES),
        ("tbp_lv_location", LOCATIONS), ("tbp_lv_location_simple", LOCATIONS_SIMPLE),
    ):  # fmt: skip
        at = rng.integers(0, len(values), len(size) if name in ("sex", "tbp_tile_type") else lesions)
        codes = at[patient] if len(at) == len(size) else at
        columns[name] = pl.Series(np.array(values)[codes])
    for name in derived.NUMBERS:
        low, high = BY_NAME[name].low, BY_NAME[name].high
        values = 0.7 * rng.standard_normal(len(size))[patient] + rng.standard_normal(lesions)
        if name in ("tbp_lv_x", "tbp_lv_y", "tbp_lv_z"):
            values = values * {"x": 150, "y": 350, "z": 80}[name[-1]]
        elif low is not None and high is not None and high <= 100:
            values = low + (high - low) / (1 + np.exp(-values))
        else:
            values = np.exp(0.5 * values) * (4 if low is not None else 1)
        digits = {"age_approx": -1, "clin_size_long_diam_mm": 2, "tbp_lv_symm_2axis": 3}.get(name, 6)
        columns[name] = np.round(values, digits)
    blank = rng.random(lesions) < 0.02
    return pl.DataFrame(columns).with_columns(
        pl.when(pl.Series(blank)).then(None).otherwise(pl.col(name)).alias(name)
        for name in ("age_approx", "anatom_site_general", "tbp_lv_norm_border")
    )


def built_in(frame: pd.DataFrame) -> dict[str, pd.Series]:
    """Difference, z, robust z, rank and share of the largest by groupby.transform's own functions."""
    made = {}
    for scope, keys in SCOPES.items():
        for name in context.BASES:
            x, by = frame[name], frame.groupby(keys)[name]
            n, mean, middle = by.transform("count"), by.transform("mean"), by.transform("median")
            mad = (x - middle).abs().groupby([frame[key] for key in keys]).transform("median")
            wide = np.maximum(context.MAD_TO_SD * mad, context.LEAST_SPREAD * by.transform("std"))
            made[f"{name}_{scope}_diff"] = ((x - mean) * n / (n - 1)).where(n > 1)
            made[f"{name}_{scope}_z"] = ((x - mean) / by.transform("std")).where(n > 2)
            made[f"{name}_{scope}_robust_z"] = ((x - middle) / wide).where(n > 2)
            made[f"{name}_{scope}_rank"] = ((by.rank() - 1) / (n - 1)).where(n > 1)
            if scope == "patient":
                made[f"{name}_{scope}_share"] = (x / by.transform("max")).where(n > 1)
    return made


def lambdas(frame: pd.DataFrame) -> dict[str, pd.Series]:
    """The same with a lambda for each."""
    made = {}
    for scope, keys in SCOPES.items():
        for name in context.BASES:
            by = frame.groupby(keys)[name]
            made[f"{name}_{scope}_diff"] = by.transform(lambda x: (x - x.mean()) * x.count() / (x.count() - 1))
            made[f"{name}_{scope}_z"] = by.transform(lambda x: (x - x.mean()) / x.std())
            made[f"{name}_{scope}_robust_z"] = by.transform(
                lambda x: (
                    (x - x.median())
                    / max(context.MAD_TO_SD * (x - x.median()).abs().median(), context.LEAST_SPREAD * x.std())
                )
            )
            made[f"{name}_{scope}_rank"] = by.transform(lambda x: (x.rank() - 1) / (x.count() - 1))
            if scope == "patient":
                made[f"{name}_{scope}_share"] = by.transform(lambda x: x / x.max())
    return made


def worst(ours: dict[str, np.ndarray], theirs: dict[str, pd.Series]) -> float:
    """Largest difference, relative where values are over 1; what only one of them knows counts as infinite.

    Where pandas divides nothing by no spread we say 0, and where it divides something by it, nothing.
    """
    found = 0.0
    for name in ours.keys() & theirs.keys():
        a, b = ours[name], theirs[name].to_numpy(np.float64)
        b = np.where(np.isinf(b), np.nan, b)
        if not name.endswith(("_z", "_share")) and not np.array_equal(np.isnan(a), np.isnan(b)):
            return float("inf")
        both = ~(np.isnan(a) | np.isnan(b))
        found = max(found, float(np.max(np.abs(a - b)[both] / np.maximum(1, np.abs(b[both])), initial=0.0)))
    return found


def timed(what: Any) -> tuple[Any, float, float]:
    """The result, seconds on the clock, and seconds of processor over all cores, which others' work hardly changes."""
    clock, processor = time.perf_counter(), time.process_time()
    return what(), time.perf_counter() - clock, time.process_time() - processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lesions", type=int, default=LESIONS)
    parser.add_argument("--patients", type=int, default=PATIENTS)
    options = parser.parse_args()
    rows = table(options.lesions, options.patients)
    size = rows["patient_id"].value_counts()["count"]
    visit = rows.head(MEDIAN).with_columns(patient_id=pl.lit("one"))
    features(visit)  # Imports once.

    own, own_clock, own_cpu = timed(lambda: features(rows, OWN))
    near, near_clock, near_cpu = timed(lambda: features(rows, ("neighbours",)))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    alone, alone_clock, alone_cpu = timed(lambda: features(rows, ("context",)))
    visits = sorted(timed(lambda: features(visit))[1] for _ in range(15))[7] * 1000

    frame = pd.DataFrame({name: own.values[:, own.names.index(name)] for name in context.BASES})
    frame["patient_id"], frame["anatom_site_general"] = rows["patient_id"], rows["anatom_site_general"].to_list()
    ours = {f.name: own.values[:, i] for i, f in enumerate(catalogue(OWN)) if f.block == "context"}
    theirs, plain_clock, plain_cpu = timed(lambda: built_in(frame))
    difference = worst(ours, theirs)
    compared = len(ours.keys() & theirs.keys())
    del theirs
    few = frame["patient_id"].isin(frame["patient_id"].drop_duplicates().head(FEW)).to_numpy()
    warnings.simplefilter("ignore")
    slow, few_clock, few_cpu = timed(lambda: lambdas(frame[few]))
    difference = max(difference, worst({name: column[few] for name, column in ours.items()}, slow))
    groups, some = (f.groupby(SCOPES["site"]).ngroups + f["patient_id"].nunique() for f in (frame, frame[few]))

    cores = len(os.sched_getaffinity(0))
    print(
        f"{rows.height:,} lesions, {len(size):,} patients, median {size.median():.0f} and at most {size.max():,} "
        f"lesions each; {cores} cores, load {os.getloadavg()[0]:.1f}\n"
    )
    print("| what | columns | seconds | of processor |\n|---|---|---|---|")
    print(f"| ours: plain, derived, context | {len(own.names)} | {own_clock:.1f} | {own_cpu:.1f} |")
    print(f"| ours: context alone | {len(alone.names)} | {alone_clock:.1f} | {alone_cpu:.1f} |")
    print(f"| ours: neighbours | {len(near.names)} | {near_clock:.1f} | {near_cpu:.1f} |")
    print(f"| pandas, built-in functions: context | {compared} | {plain_clock:.1f} | {plain_cpu:.1f} |")
    scale = groups / some
    print(
        f"| pandas, lambdas: context, extrapolated from {FEW} patients | {len(slow)} | {few_clock * scale:.0f} | "
        f"{few_cpu * scale:.0f} |"
    )
    print(f"\none visit of {MEDIAN} lesions, all {len(own.names) + len(near.names)} columns: {visits:.0f} ms")
    print(f"largest difference to pandas {difference:.1e}; peak memory {memory:.0f} MB, the table included")
    failed = [f"{len(own.names)} columns"] * (len(own.names) < COLUMNS)
    failed += [f"own and context features took {own_clock:.1f} s"] * (own_clock > OWN_SECONDS)
    failed += [f"neighbours took {near_clock:.1f} s"] * (near_clock > NEIGHBOUR_SECONDS)
    failed += [f"a visit took {visits:.0f} ms"] * (visits > VISIT_MILLISECONDS)
    failed += [f"values differ by {difference:.1e}"] * int(difference > 1e-9)
    failed += [f"peak memory {memory:.0f} MB"] * (memory > MEGABYTES)
    if failed:
        raise SystemExit("; ".join(failed))


if __name__ == "__main__":
    main()
