"""Two scores of the same lesions, compared on the same draws of patients.

The interval of a difference is a *symmetric bootstrap-t*: each replicate's distance from the difference is
measured in its own standard error (infinitesimal jackknife of the difference itself, so what the two models have
in common cancels), and the interval reaches as far to either side as 95 % of those distances. Under few malignant
lesions it is much wider than a percentile interval, as it must be.

Nominal level 95 %. Measured with `benchmarks/power.py --coverage` in eight settings, it covers 93-98 % at 300
malignant lesions, 94-99 % at 80, 93-100 % at 40 and 92-99 % at 20, where percentile intervals cover as little as 76 %.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from lesionflow.evaluation import intervals
from lesionflow.evaluation.intervals import Figure, Interval
from lesionflow.evaluation.metrics import MIN_TPR, Floats, Groups
from lesionflow.evaluation.resample import Measure, Patients, partial_area

METHOD = "patient-clustered paired bootstrap-t, symmetric"
METHOD_ALIKE = "both order the lesions alike"
_ATOMS = 20_000  # Lone lesions that several scores place differently can't be drawn together; two by two they can.
_ROUNDING = 1e-7  # A standard error under this share of the largest value is rounding.


@dataclass(frozen=True)
class Pair:
    """A figure of two scores a and b of the same lesions."""

    a: float
    b: float
    difference: Figure
    """a - b with its interval."""
    p_better: float | None
    """How sure it is that a's true figure is the larger one, 0 to 1; 1/2 where the difference is 0. Above 97.5 %
    exactly where the 95 % interval lies above 0."""
    error: float | None
    """Standard deviation of the difference over the replicates."""
    reach: float | None
    """Half the interval's width, before it is cut to what is possible."""


def compare_scores(
    y: ArrayLike,
    s_a: ArrayLike,
    s_b: ArrayLike,
    groups: Groups,
    measures: Sequence[Measure],
    *,
    replicates: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> list[Pair]:
    """Each measure of two scores of the same lesions, and their difference, from the same replicates.

    y [n] 0/1, s_a and s_b [n] scores, groups [n]: the patient of each lesion, or the lesion's own id where unknown.
    `replicates=0` leaves the intervals out. Raises `DataError` as `metrics.pauc` does.
    """
    patients = Patients(y, [s_a, s_b], groups)
    points = _estimate(patients, patients.everyone(), measures)
    reason = intervals.too_few([patients]) if replicates else intervals.NOT_ASKED
    if reason:
        return [_pair(point, _refused(patients, level, reason)) for point in points]
    if np.array_equal(_order(s_a), _order(s_b)):
        alike = Interval(0.0, 0.0, level, METHOD_ALIKE, 0, 0, patients.groups, patients.malignant)
        return [_pair(point, alike, p_better=0.5, error=0.0, reach=0.0) for point in points]
    drawn = [_estimate(patients, w, measures) for w in patients.draws(replicates, seed)]
    result = []
    for i, (measure, point) in enumerate(zip(measures, points, strict=True)):
        a, b, errors = (np.concatenate([chunk[i][j] for chunk in drawn]) for j in range(3))
        result.append(_studentized(point, a - b, errors, measure.maximum, patients, level))
    return result


def compare_several(
    y: ArrayLike,
    scores: Mapping[str, ArrayLike],
    groups: Groups,
    measures: Sequence[Measure],
    pairs: Sequence[tuple[str, str]],
    *,
    replicates: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[dict[str, list[Figure]], dict[tuple[str, str], Pair]]:
    """Several scores of the same lesions: each one's `measures`, and the first of them for `pairs` of scores (a, b).

    What `ranking` and `compare_scores` give one by one, from one set of replicates: where five scores are compared in
    ten ways this is five passes over the lesions instead of thirty. Arguments as there; `scores` are [n] by name.
    """
    patients = Patients(y, list(scores.values()), groups)
    names, everyone = list(scores), patients.everyone()
    points = [[m.influence(*table.times(everyone)) for m in measures] for table in patients.tables]
    value = {name: [float(v[0]) for v, _ in one] for name, one in zip(names, points, strict=True)}

    def point(a: str, b: str, error: float = 0.0) -> Point:
        return tuple(np.array([x]) for x in (value[a][0], value[b][0], error))  # type: ignore[return-value]

    if reason := intervals.too_few([patients]) if replicates else intervals.NOT_ASKED:
        refused = _refused(patients, level, reason)
        alone = {name: [Figure(v, refused) for v in of] for name, of in value.items()}
        return alone, {one: _pair(point(*one), refused) for one in pairs}
    if len(patients.multiplicity) > _ATOMS:
        options: dict[str, Any] = {"replicates": replicates, "seed": seed, "level": level}
        alone = {name: intervals.figures(Patients(y, [s], groups), measures, **options) for name, s in scores.items()}
        return alone, {
            (a, b): compare_scores(y, scores[a], scores[b], groups, measures[:1], **options)[0] for a, b in pairs
        }
    # Pairs of one order have no spread to measure.
    orders = {name: _order(scores[name]) for pair in pairs for name in pair}
    alike = {(a, b) for a, b in pairs if np.array_equal(orders[a], orders[b])}
    at, drawn = {name: i for i, name in enumerate(names)}, []
    for w in patients.draws(replicates, seed):
        rows, pulls = [], []
        for table in patients.tables:
            cells = table.times(w)
            for i, measure in enumerate(measures):
                v, per_lesion = measure.influence(*cells)
                pull = table.spread(per_lesion)
                rows.append((v, np.sqrt(np.einsum("ra,ra->r", w, pull**2))))
                if not i:
                    pulls.append(pull)
        gaps = {
            (a, b): np.sqrt(np.einsum("ra,ra->r", w, (pulls[at[a]] - pulls[at[b]]) ** 2))
            for a, b in pairs
            if (a, b) not in alike
        }
        drawn.append((rows, gaps))

    def joined(row: int) -> tuple[Floats, Floats]:
        return tuple(np.concatenate([rows[row][j] for rows, _ in drawn]) for j in (0, 1))  # type: ignore[return-value]

    alone, pull_of = {}, {}
    for n, (name, table) in enumerate(zip(names, patients.tables, strict=True)):
        pulled = [table.spread(per_lesion)[0] for _, per_lesion in points[n]]
        alone[name] = [
            intervals.figure_of(
                intervals.sampled(patients, value[name][i], pull, *joined(n * len(measures) + i)),
                measure, [patients], replicates, level,
            )
            for i, (measure, pull) in enumerate(zip(measures, pulled, strict=True))
        ]  # fmt: skip
        pull_of[name] = pulled[0]
    found = {}
    for a, b in pairs:
        if (a, b) in alike:
            same = Interval(0.0, 0.0, level, METHOD_ALIKE, 0, 0, patients.groups, patients.malignant)
            found[a, b] = _pair(point(a, b), same, p_better=0.5, error=0.0, reach=0.0)
            continue
        gap = joined(at[a] * len(measures))[0] - joined(at[b] * len(measures))[0]
        errors = np.concatenate([gaps[a, b] for _, gaps in drawn])
        error = float(np.sqrt(everyone[0] @ (pull_of[a] - pull_of[b]) ** 2))
        found[a, b] = _studentized(point(a, b, error), gap, errors, measures[0].maximum, patients, level)
    return alone, found


def paired_difference(
    y: ArrayLike,
    s_a: ArrayLike,
    s_b: ArrayLike,
    groups: Groups,
    *,
    replicates: int = 2000,
    seed: int = 0,
    min_tpr: float = MIN_TPR,
    level: float = 0.95,
) -> dict[str, Any]:
    """pAUC of `s_a` minus that of `s_b`, two scores of the same lesions: `Pair` and its interval in one dict.

    The interval and `p_better` are None, with the reason, where there are too few malignant lesions.
    """
    measures = [partial_area(min_tpr)]
    (pair,) = compare_scores(y, s_a, s_b, groups, measures, replicates=replicates, seed=seed, level=level)
    result = {"difference": pair.difference.value, "a": pair.a, "b": pair.b, "min_tpr": min_tpr}
    return result | {"p_better": pair.p_better} | pair.difference.interval.to_dict()


def mean_difference(
    y: ArrayLike,
    runs_a: Sequence[ArrayLike],
    runs_b: Sequence[ArrayLike],
    groups: Groups,
    *,
    replicates: int = 2000,
    seed: int = 0,
    min_tpr: float = MIN_TPR,
    level: float = 0.95,
) -> Pair:
    """Mean pAUC of several trainings a minus that of as many trainings b, which only their seeds tell apart.

    Every replicate draws patients once for all of them, so the interval is the sampling of patients; how far the seeds
    lie apart is for the caller to show. Arguments as for `compare_scores`, each run one score vector [n].
    """
    if len(runs_a) != len(runs_b) or not runs_a:
        raise ValueError(f"{len(runs_a)} and {len(runs_b)} trainings: give as many of each")
    measure = partial_area(min_tpr)
    patients = Patients(y, [*runs_a, *runs_b], groups)
    (point,) = _estimate(patients, patients.everyone(), [measure])
    if reason := intervals.too_few([patients]):
        return _pair(point, _refused(patients, level, reason))
    drawn = [_estimate(patients, w, [measure])[0] for w in patients.draws(replicates, seed)]
    a, b, errors = (np.concatenate([chunk[j] for chunk in drawn]) for j in range(3))
    return _studentized(point, a - b, errors, measure.maximum, patients, level)


Point = tuple[Floats, Floats, Floats]
"""a, b and the standard error of a - b, float64 [r] each."""


def _estimate(patients: Patients, weights: Floats, measures: Sequence[Measure]) -> list[Point]:
    """The mean of the first half of the scores, that of the second, and the standard error of their difference."""
    tables, half = patients.tables, len(patients.tables) // 2
    cells, result = [table.times(weights) for table in tables], []
    for measure in measures:
        found = [measure.influence(*one) for one in cells]
        a, b = (np.mean([value for value, _ in part], axis=0) for part in (found[:half], found[half:]))
        pulls = [table.spread(of) for table, (_, of) in zip(tables, found, strict=True)]
        pull = sum(pulls[1:half], start=pulls[0]) - sum(pulls[half + 1 :], start=pulls[half])
        result.append((a, b, np.sqrt(np.einsum("ra,ra->r", weights, (pull / half) ** 2))))
    return result


def _studentized(point: Point, gaps: Floats, errors: Floats, maximum: float, patients: Patients, level: float) -> Pair:
    difference, error = float(point[0][0] - point[1][0]), float(point[2][0])
    usable = np.isfinite(gaps)
    gaps, errors, drawn = gaps[usable], errors[usable], len(gaps)
    if error <= _ROUNDING * maximum or not len(gaps):
        return _pair(point, _refused(patients, level, "no draw of patients changes the difference"))
    # A replicate that shows no spread says nothing about the distance: it counts as infinitely far.
    flat = errors <= _ROUNDING * maximum
    t = np.where(flat, np.inf, np.abs(gaps - difference) / np.where(flat, 1.0, errors))
    reach = float(np.sort(t)[int(np.ceil(level * len(t))) - 1] * error)
    if not np.isfinite(reach):
        reason = f"in {int(flat.sum())} of {drawn} replicates no patient tells the two apart"
        return _pair(point, _refused(patients, level, reason))
    dropped = drawn - len(gaps)
    low, high = max(difference - reach, -maximum), min(difference + reach, maximum)
    interval = Interval(low, high, level, METHOD, drawn, dropped, patients.groups, patients.malignant)
    within = float(np.mean(t < abs(difference) / error))
    p_better = 0.5 + float(np.sign(difference)) * within / 2
    return _pair(point, interval, p_better=p_better, error=float(gaps.std()), reach=reach)


def _pair(
    point: Point,
    interval: Interval,
    *,
    p_better: float | None = None,
    error: float | None = None,
    reach: float | None = None,
) -> Pair:
    a, b = float(point[0][0]), float(point[1][0])
    return Pair(a, b, Figure(a - b, interval), p_better, error, reach)


def _refused(patients: Patients, level: float, reason: str) -> Interval:
    return Interval(None, None, level, METHOD, 0, 0, patients.groups, patients.malignant, reason)


def _order(scores: ArrayLike) -> Any:
    """Rank of each score among the distinct ones, int64 [n]."""
    return np.unique(np.asarray(scores, np.float64), return_inverse=True)[1]
