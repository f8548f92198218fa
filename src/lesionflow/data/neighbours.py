"""A lesion among its neighbours: on the body, and in how lesions look.

*On the body* are the coordinates `tbp_lv_x, y, z` of the body model, mm. *Looks* are a space of eight axes, each in
units of its usual robust spread among one patient's lesions (1.4826 MAD, rounded, of published SLICE-3D metadata):
constants, so that a patient of two lesions has distances too, and nothing is learned from the data at hand.

Only the same patient's lesions are neighbours. A lesion without a coordinate is nobody's neighbour on the body and has
none, one with an axis unknown the same in looks; the features concerned are NaN. Of n lesions that are left, the k
nearest are min(5, n - 1); equally near ones count as the search finds them in the order of isic_id, the same every
time. Distances are square roots of summed squared differences, never |a|^2 + |b|^2 - 2ab, which cancels.

The local outlier factor is that of Breunig et al. 2000: how much sparser a lesion's surroundings are than those of its
k nearest, so about 1 inside a cloud of any density and more outside it.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lesionflow.data.context import FEW, MAD_TO_SD, Patients, in_threads
from lesionflow.data.derived import Feature, Floats, Values, derived, plain
from lesionflow.errors import missing_extra

Ints = NDArray[np.int64]
NEAREST = 5
"""Neighbours that are averaged over, where a patient has so many."""
RADII = (20, 50, 100)
"""Of the neighbourhoods that are counted, mm."""
POSITION = ("tbp_lv_x", "tbp_lv_y", "tbp_lv_z")
LOOKS = {
    # feature: one unit of the space; the size is taken as its logarithm
    "clin_size_long_diam_mm": 0.3,
    "tbp_lv_L": 7.0,
    "tbp_lv_A": 3.0,
    "tbp_lv_B": 4.0,
    "tbp_lv_deltaLBnorm": 1.6,
    "tbp_lv_norm_color": 1.6,
    "tbp_lv_norm_border": 1.2,
    "tbp_lv_symm_2axis": 0.1,
}
_DIFFERENCES = (
    "clin_size_long_diam_mm", "tbp_lv_L", "tbp_lv_deltaLBnorm", "tbp_lv_norm_color", "tbp_lv_norm_border",
    "tbp_lv_nevi_confidence",
)  # fmt: skip
_AXES = "size (ln), L, A, B, deltaLBnorm, norm_color, norm_border, symm_2axis"
_ODD = ("look", "patient", "odder", "more alike")
_ROWS: tuple[tuple[str, str, str, str, tuple[str, str, str, str]], ...] = (
    # name, formula, unit, why, (concept, against, higher, lower)
    ("nearest_mm", "distance to the nearest lesion on the body", "mm", "alone or in a crowd",
     ("place", "neighbours", "more solitary", "more crowded")),
    ("nearest5_mm", "mean distance to the k nearest on the body", "mm", "the same, less by chance",
     ("place", "neighbours", "more solitary", "more crowded")),
    *((f"within_{r}mm", f"lesions within {r} mm on the body", "1", "density of lesions; carries how they were sampled",
       ("count", "neighbours", "", "")) for r in RADII),
    ("look_nearest", "distance in looks to the most alike lesion", "usual spreads", "has it a twin", _ODD),
    ("look_nearest5", "mean distance in looks to the k most alike", "usual spreads", "has it fellows", _ODD),
    ("look_lof", "local outlier factor in looks (3 lesions or more)", "1", "odd, however varied the others are", _ODD),
    ("look_to_median", f"distance in looks to the patient's median of each axis: {_AXES}", "usual spreads",
     "how far from the patient's typical lesion", _ODD),
    ("look_to_median_rank", "share of the others that are nearer to that median, ties half", "0-1",
     "1 for the patient's oddest", _ODD),
    ("look_own_spreads", "root mean square of the axes' robust z in the patient's own spreads (3 lesions or more; "
     "axes without spread are left out)", "SD", "the same, by what is usual in this patient", _ODD),
    ("look_from_near", "mean distance in looks to the k nearest on the body", "usual spreads",
     "unlike what grows on the same skin", ("look", "neighbours", "odder", "more alike")),
)  # fmt: skip


@cache
def features() -> tuple[Feature, ...]:
    own = {f.name: f for f in (*plain(), *derived())}
    found = [Feature(name, "neighbours", formula, unit, why, *words) for name, formula, unit, why, words in _ROWS]
    for name in _DIFFERENCES:
        f, formula = own[name], f"`{name}` less its mean over the k nearest on the body"
        why = "unlike what grows on the same skin"
        words = (f.concept, "neighbours", f.higher, f.lower)
        found.append(Feature(f"{name}_near_diff", "neighbours", formula, f.unit, why, *words))
    return tuple(found)


def neighbour_values(patients: Patients, values: Values, threads: int = 1) -> dict[str, Floats]:
    """Every neighbour feature by name, of rows in canonical order as `values` [N] are.

    Raises `UsageError` where scipy is missing.
    """
    names = [f.name for f in features()]
    total = len(patients.code)
    found = {name: np.full(total, np.nan) for name in names}
    several = np.flatnonzero(patients.counts > 1)
    if not len(several):
        return found
    tree = _tree()
    with np.errstate(invalid="ignore", divide="ignore"):
        place = np.stack([values[name] for name in POSITION], axis=1)
        looks = np.stack([_axis(name, values[name]) / unit for name, unit in LOOKS.items()], axis=1)
    raw = np.stack([values[name] for name in _DIFFERENCES], axis=1)

    def one(patient: int) -> None:
        rows = slice(patients.starts[patient], patients.starts[patient] + patients.counts[patient])
        for name, column in _patient(tree, place[rows], looks[rows], raw[rows]).items():
            found[name][rows] = column

    # The largest first, so that no thread is left with it at the end.
    order = several[np.argsort(-patients.counts[several], kind="stable")].tolist()
    in_threads(one, order, threads if total > FEW else 1)
    return found


def _tree() -> Any:
    try:
        from scipy.spatial import cKDTree
    except ModuleNotFoundError:
        raise missing_extra("scipy", "train") from None
    return cKDTree


def _axis(name: str, column: Floats) -> Floats:
    if name != "clin_size_long_diam_mm":
        return column
    return np.log(np.where(column > 0, column, np.nan))


def _patient(tree: Any, place: Floats, looks: Floats, raw: Floats) -> dict[str, Floats]:
    """Features of one patient's lesions: place [n, 3], looks [n, 8], raw [n, 6] -> columns [n]."""
    found: dict[str, Floats] = {}
    count = len(place)

    def put(name: str, rows: Ints, column: Floats) -> None:
        found[name] = np.full(count, np.nan)
        found[name][rows] = column

    placed = np.flatnonzero(np.isfinite(place).all(axis=1))
    if len(placed) > 1:
        points = np.ascontiguousarray(place[placed])
        grown = tree(points)
        distance, near = _nearest(grown, points)
        put("nearest_mm", placed, distance[:, 0])
        put("nearest5_mm", placed, distance.mean(axis=1))
        for radius in RADII:
            inside = grown.query_ball_point(points, radius, return_length=True)
            put(f"within_{radius}mm", placed, inside - 1.0)
        near = placed[near]
        apart = np.sqrt(((looks[placed][:, None] - looks[near]) ** 2).sum(axis=2))
        put("look_from_near", placed, _known_mean(apart[:, :, None])[:, 0])
        means = _known_mean(raw[near])
        for i, name in enumerate(_DIFFERENCES):
            put(f"{name}_near_diff", placed, raw[placed, i] - means[:, i])
    seen = np.flatnonzero(np.isfinite(looks).all(axis=1))
    if len(seen) > 1:
        points = np.ascontiguousarray(looks[seen])
        distance, near = _nearest(tree(points), points)
        put("look_nearest", seen, distance[:, 0])
        put("look_nearest5", seen, distance.mean(axis=1))
        away = points - np.median(points, axis=0)
        from_median = np.sqrt((away * away).sum(axis=1))
        put("look_to_median", seen, from_median)
        put("look_to_median_rank", seen, _share_below(from_median))
        if len(seen) > 2:
            put("look_lof", seen, _outlier_factor(distance, near))
            spread = MAD_TO_SD * np.median(np.abs(away), axis=0)
            if (spread > 0).any():
                own = away[:, spread > 0] / spread[spread > 0]
                put("look_own_spreads", seen, np.sqrt((own * own).mean(axis=1)))
    return found


def _nearest(grown: Any, points: Floats) -> tuple[Floats, Ints]:
    """Distances [n, k] and positions [n, k] of each point's k nearest others, nearest first."""
    k = min(NEAREST, len(points) - 1)
    distance, near = grown.query(points, k=k + 1)
    itself = near == np.arange(len(points))[:, None]
    # Among more than k points in one place a point may not be found as its own neighbour: then any of them goes.
    itself[~itself.any(axis=1), -1] = True
    others = ~itself
    return distance[others].reshape(-1, k), near[others].reshape(-1, k).astype(np.int64)


def _outlier_factor(distance: Floats, near: Ints) -> Floats:
    """Breunig's local outlier factor [n]; 1 among points in one place, NaN next to such a place."""
    reach = np.maximum(distance[near, -1], distance).mean(axis=1)
    own, theirs = reach[:, None], reach[near]
    safe = np.where(theirs > 0, theirs, 1.0)
    ratios = np.where(theirs > 0, own / safe, np.where(own > 0, np.nan, 1.0))
    return np.asarray(ratios.mean(axis=1))


def _known_mean(values: Floats) -> Floats:
    """Mean over the middle axis of what is known, [n, k, m] -> [n, m]; NaN for none."""
    known = np.isfinite(values)
    count = known.sum(axis=1)
    total = np.where(known, values, 0.0).sum(axis=1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _share_below(values: Floats) -> Floats:
    """Share of the other values that are less, ties half."""
    ordered = np.sort(values)
    below, not_above = np.searchsorted(ordered, values, "left"), np.searchsorted(ordered, values, "right")
    return np.asarray((below + not_above - 1) / 2 / (len(values) - 1))
