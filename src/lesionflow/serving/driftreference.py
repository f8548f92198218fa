"""What the hold-out looks like, for `serving.drift`: bins, shares, and how alike a patient's lesions are.

Nothing of a single patient is kept: shares of lesions in bins of about 5 % each, means, and numbers of patients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from lesionflow.bundle import band
from lesionflow.serving.driftfigures import (
    CATEGORIES,
    Codes,
    Doubles,
    Figures,
    Ints,
    Observed,
    observed,
    test_scores,
    weighted,
)  # fmt: skip
from lesionflow.serving.predictor import CANNOT_JUDGE

if TYPE_CHECKING:
    import polars as pl

FEWEST_PATIENTS = 20
FEWEST_LESIONS = 200
"""A hold-out of less says too little of what is usual, and so does an institution's part of it."""
PICTURES_EACH, MOST_PICTURES = 50, 20_000
"""Pictures of a patient, and of all, that are looked at: a patient's are alike, and each takes a millisecond."""
MOST_INSTITUTIONS = 12
BINS = 20
LEAST_ALIKE, UNKNOWN_ALIKE = 0.01, 1.0
"""Lesions of one patient are never quite independent; where nothing is known of it they are taken for one."""


def nothing(reason: str) -> dict[str, Any]:
    """The reference of a bundle that has none, and why."""
    return {"reason": reason, "figures": {}, "whole": {}, "institutions": {}}


def of_holdout(
    scores: pl.DataFrame,
    table: pl.DataFrame,
    statistics: Mapping[str, Doubles] | None,
    info: Mapping[str, Any],
    seed: int = 0,
) -> dict[str, Any]:
    """bundle.json's `drift`, from a run's hold-out.

    scores: rows of holdout.parquet; table: the same lesions' metadata, in the same order; statistics:
    `inputs.statistics` of their pictures, NaN for those not looked at, None without any; info: bundle.json's
    `thresholds`, `calibration` and `visit`. Malignant lesions beyond the calibration's prevalence are left out at
    random, as there will be fewer of them in service than in an enriched data set.
    """
    modes = list(info["visit"]["modes"]) if info.get("visit") else ["image"]
    keep = usual_rows(scores["target"].to_numpy(), info["calibration"].get("prevalence"), seed)
    if statistics is not None:
        statistics = {name: x[keep] for name, x in statistics.items()}
    scores, table = scores[keep], table[keep]
    logits = {
        mode: scores[f"{mode}_logit" if f"{mode}_logit" in scores.columns else "logit"].to_numpy() for mode in modes
    }
    doubts = scores["doubts"].list.len().to_numpy() > 0 if "doubts" in scores.columns else np.zeros(len(scores), bool)
    bands = served_bands(logits, table, doubts, info, pictures=statistics is not None)
    metadata = table if any(table[c].count() for c in table.columns if c in _described()) else None
    return reference(
        scores["patient_group"].to_list(), table, statistics=statistics, logits=logits, bands=bands, metadata=metadata
    )


def reference(
    groups: Sequence[str],
    table: pl.DataFrame | None,
    *,
    statistics: Mapping[str, Doubles] | None = None,
    logits: Mapping[str, Doubles] | None = None,
    bands: Sequence[str | None] | None = None,
    metadata: pl.DataFrame | None = None,
) -> dict[str, Any]:
    """The same from the figures themselves: N lesions, `groups` their patients (their own ids where unknown).

    `table` has the `attribution` and `patient_id` of the same rows where there are any.
    """
    owner, count = grouped(groups)
    if len(groups) < FEWEST_LESIONS or count < FEWEST_PATIENTS:
        return nothing(
            f"the hold-out has {len(groups):,} lesions of {count:,} patients, and under {FEWEST_LESIONS} of "
            f"{FEWEST_PATIENTS} nothing is known of what is usual; train with a larger folds.holdout"
        )
    seen = observed(statistics, logits, bands, metadata, visit_sizes(owner, patients_known(table)))
    described = _describe(seen)
    figures = Figures(described)
    codes = figures.codes(seen, len(groups))
    institutions = {}
    if table is not None and "attribution" in table.columns:
        counts = table["attribution"].drop_nulls().value_counts(sort=True).head(MOST_INSTITUTIONS)
        where = table["attribution"].to_numpy()
        for name, lesions in counts.iter_rows():
            rows = np.flatnonzero(where == name)
            mine, patients = grouped([groups[row] for row in rows.tolist()])
            if lesions >= FEWEST_LESIONS and patients >= FEWEST_PATIENTS and name:
                institutions[name] = _population(figures, codes[:, rows], mine, patients)
    return {
        "reason": None,
        "figures": described,
        "whole": _population(figures, codes, owner, count),
        "institutions": institutions,
    }


def served_bands(
    logits: Mapping[str, Doubles],
    table: pl.DataFrame | None,
    doubts: ArrayLike,
    info: Mapping[str, Any],
    *,
    pictures: bool,
) -> list[str | None]:
    """The band that each lesion is served with, by the way it is scored (as `visit.Visits` chooses); "" without any."""
    count = len(next(iter(logits.values())))
    modes = served_modes(list(logits), table, np.isfinite(logits["image"]) if pictures else np.zeros(count, bool))
    thresholds = {
        m: info["visit"]["modes"][m]["thresholds"] if info.get("visit") else info["thresholds"] for m in logits
    }
    return [
        None if not mode else CANNOT_JUDGE if doubt else band(float(logits[mode][row]), thresholds[mode])
        for row, (mode, doubt) in enumerate(zip(modes, np.asarray(doubts).tolist(), strict=True))
    ]


def served_modes(modes: Sequence[str], table: pl.DataFrame | None, seen: Any) -> list[str]:
    """Which way each lesion is scored, of the bundle's modes; seen [N]: whether there is a picture."""
    from lesionflow.data.features import has_record, lesions_of_patient

    if table is None or list(modes) == ["image"]:
        return ["image" if one else "" for one in seen]
    found = []
    for known, alone, picture in zip(has_record(table), lesions_of_patient(table) == 1, seen, strict=True):
        context = "visit" if "visit" in modes and not alone else "record"
        if not known and "image" in modes:
            found.append("image" if picture else "")
        else:
            found.append(f"image_{context}" if picture else context)
    return found


def draw_pictures(groups: Sequence[str], each: int = PICTURES_EACH, most: int = MOST_PICTURES, seed: int = 0) -> Ints:
    """Rows whose pictures to look at, drawn at random: `each` of a patient and `most` in all; sorted."""
    owner, _ = grouped(groups)
    shuffled = np.random.default_rng(seed).permutation(len(owner))
    ordered = shuffled[np.argsort(owner[shuffled], kind="stable")]
    starts = np.searchsorted(owner[ordered], owner[ordered])
    # The first of every patient before the second of any.
    place = np.arange(len(owner)) - starts
    chosen = ordered[np.argsort(place, kind="stable")][: min(most, int((place < each).sum()))]
    return np.sort(chosen)


def usual_rows(targets: Any, prevalence: float | None, seed: int = 0) -> Ints:
    """Rows of all benign lesions and of as many malignant ones as `prevalence` allows, drawn at random; sorted."""
    y = np.asarray(targets)
    sick, well = np.flatnonzero(y == 1), np.flatnonzero(y != 1)
    most = len(sick) if prevalence is None else round(len(well) * prevalence / (1 - prevalence))
    drawn = np.random.default_rng(seed).permutation(sick)[:most]
    return np.sort(np.concatenate([well, drawn]))


def grouped(groups: Sequence[str]) -> tuple[Ints, int]:
    """Patients as 0..G-1 [N], and G."""
    names, owner = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    return owner.astype(np.int64), len(names)


def patients_known(table: pl.DataFrame | None) -> Any:
    """bool [N], or None where the table names no patient at all."""
    if table is None or "patient_id" not in table.columns:
        return None
    known = table["patient_id"].is_not_null().to_numpy()
    return known if known.any() else None


def visit_sizes(owner: Ints, known: Any) -> Doubles | None:
    """How many lesions the patient has, at the patient's first lesion; NaN elsewhere and for unknown patients."""
    if known is None:
        return None
    sizes = np.full(len(owner), np.nan)
    first = np.unique(owner, return_index=True)[1]
    sizes[first] = np.bincount(owner)[owner[first]]
    return np.where(known, sizes, np.nan)


def _described() -> tuple[str, ...]:
    from lesionflow.data.derived import NUMBERS

    return (*NUMBERS, *CATEGORIES)


def _describe(seen: Observed) -> dict[str, Any]:
    """Every figure that is known of some lesions, and its bins."""
    found: dict[str, Any] = {}
    for name, x in seen.numbers.items():
        values = x[np.isfinite(x)]
        edges = np.unique(_rounded(np.quantile(values, np.arange(1, BINS) / BINS))) if len(values) else np.zeros(0)
        if len(edges) and values.min() < values.max():
            found[name] = {"kind": "number", "edges": edges.tolist()}
    for name, cells in seen.categories.items():
        if values_of := sorted({cell for cell in cells if cell is not None}):
            found[name] = {"kind": "category", "values": values_of[: BINS - 1]}
    for name in [name for name in found if name.startswith("metadata ")]:
        found["missing " + name.removeprefix("metadata ")] = {"kind": "missing"}
    return found


def _population(figures: Figures, codes: Codes, owner: Ints, count: int) -> dict[str, Any]:
    """Shares and tests of these lesions: codes [F, N] of `count` patients, owner [N]."""
    parts = list(figures.shares(codes, owner, count))
    shares, lesions = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
    known = {}
    for row, name in enumerate(figures.names):
        here = lesions[:, row] > 0
        if not here.any():
            continue
        n, mine = lesions[here, row], shares[here, row]
        plain = (n[:, None] * mine).sum(0) / n.sum()
        scores = test_scores(figures, name, plain[: figures.bins_of(name)])
        alike = {test: intraclass(n, mine, score) for test, score in scores.items()}
        weight = n / (1 + (n - 1) * next(iter(alike.values())))
        usual = _rounded((weight[:, None] * mine).sum(0) / weight.sum())[: figures.bins_of(name)]
        tests = {test: _test(n, mine, score, alike[test]) for test, score in test_scores(figures, name, usual).items()}
        known[name] = {"shares": usual.tolist(), "tests": tests}
    return {"lesions": len(owner), "patients": count, "figures": known}


def _test(n: Doubles, shares: Doubles, score: Doubles, alike: float) -> dict[str, float]:
    """A test's mean and variance of one lesion, and how many independent lesions the population is worth."""
    (w, y) = (
        one[:, 0]
        for one in weighted(np.zeros(1, np.int64), score[None], np.array([alike]), shares[:, None], n[:, None])
    )
    mean = float((w * y).sum() / w.sum())
    variance = float((w[:, None] * shares * (score - mean) ** 2).sum() / w.sum())
    robust = float((w**2 * (y - mean) ** 2).sum() / w.sum() ** 2) * len(n) / max(len(n) - 1, 1)
    weight = min(float(w.sum()), variance / robust if robust > 0 else np.inf)
    fields = {"mean": mean, "variance": variance, "alike": alike, "weight": weight}
    return {name: float(_rounded(np.array(value))) for name, value in fields.items()}


def intraclass(n: Doubles, shares: Doubles, score: Doubles) -> float:
    """How alike a patient's lesions are, 0.01..1: the intraclass correlation by analysis of variance (Donner 1986).

    n [G] lesions of each patient, shares [G, B] of them by bin, score [B] of a bin. 1 where it can't be known.
    """
    total, groups = n.sum(), len(n)
    if total <= groups or groups < 2:
        return UNKNOWN_ALIKE
    y, square = shares @ score, shares @ score**2
    mean = (n * y).sum() / total
    between = (n * (y - mean) ** 2).sum() / (groups - 1)
    within = (n * (square - y**2)).sum() / (total - groups)
    each = (total - (n**2).sum() / total) / (groups - 1)
    whole = between + (each - 1) * within
    return float(np.clip((between - within) / whole, LEAST_ALIKE, 1.0)) if whole > 1e-12 else UNKNOWN_ALIKE


def _rounded(x: Doubles) -> Doubles:
    """To five significant digits, which is what a reference needs."""
    return np.array([float(f"{one:.5g}") for one in np.ravel(x)]).reshape(np.shape(x))
