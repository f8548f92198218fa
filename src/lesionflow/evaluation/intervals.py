"""How far a figure can be trusted: patient-clustered bootstrap intervals.

The interval of a ranking's figure is a *bootstrap-t on the logit scale*: each replicate draws patients with
replacement, and its distance from the figure is measured in its own standard error (infinitesimal jackknife)
on the scale log(x / (maximum - x)). It keeps to 0..maximum and is wider below than above, as it must be: the
figure hangs on the few malignant lesions that score lowest. No replicate knows a worse lesion than the data
holds, so the lower end is stretched where few patients carry the standard error.

Nominal level 95 %. On simulated cohorts (`benchmarks/coverage.py`) the pAUC's covers 94-95 % at 300 malignant
lesions, 95-97 % at 80, 93-95 % at 40 and 91-94 % at 20, where percentile intervals cover 91-94, 84-91, 78-89 and
71-82 %. Under 20 malignant lesions, or lesions of under 10 patients, no interval is printed, only the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from lesionflow.evaluation.metrics import MIN_TPR, Floats, Groups
from lesionflow.evaluation.quantiles import satterthwaite, student_quantile
from lesionflow.evaluation.resample import Measure, Patients, partial_area

FEWEST_MALIGNANT = 20
"""Below this no interval is worth printing."""
FEWEST_GROUPS = 10
"""Nor where the lesions that it hangs on are of fewer patients (or lesions of unknown patients)."""
FEWEST_PER_FOLD = 5
METHOD = "patient-clustered bootstrap-t, logit scale"
METHOD_SEPARATED = "exact bound at complete separation"
NOT_ASKED = "not asked for"
"""Why there is no interval where `replicates` is 0."""


@dataclass(frozen=True)
class Interval:
    """A two-sided interval, or the reason why there is none."""

    low: float | None
    high: float | None
    level: float
    """Nominal coverage."""
    method: str
    replicates: int
    """Replicates drawn."""
    dropped: int
    """Of these, how many said nothing: one class only, or no spread within the replicate."""
    clusters: int
    """Patients (or lesions, where patients are unknown) that were drawn."""
    malignant: int
    reason: str | None = None
    """Why low and high are None."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Figure:
    """A value with its interval: the shape that every figure has in metrics.json."""

    value: float | None
    """None where it can't be computed; `interval.reason` then says why."""
    interval: Interval

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def missing(cls, reason: str, *, level: float = 0.95, clusters: int = 0, malignant: int = 0) -> Figure:
        """No figure, and why."""
        return cls(None, Interval(None, None, level, METHOD, 0, 0, clusters, malignant, reason))


@dataclass(frozen=True)
class Sampled:
    """A figure with its bootstrap distribution: what an interval is made from."""

    value: float
    error: float
    """Standard error of `value`."""
    values: Floats
    errors: Floats
    """Figure and standard error per replicate, float64 [R]."""
    freedom: float
    """Degrees of freedom of `error`: few where few groups make it up."""


def bootstrap_pauc(
    y: ArrayLike,
    s: ArrayLike,
    groups: Groups,
    *,
    replicates: int = 2000,
    seed: int = 0,
    min_tpr: float = MIN_TPR,
    level: float = 0.95,
) -> Interval:
    """Interval of `metrics.pauc` (of the AUC for `min_tpr=0`), drawing whole groups with replacement.

    y [n] 0/1, s [n] scores, groups [n]: the patient of each lesion, or the lesion's own id where unknown.
    Raises `DataError` as `metrics.pauc` does.
    """
    return bootstrap_areas(y, s, groups, (min_tpr,), replicates=replicates, seed=seed, level=level)[0]


def bootstrap_areas(
    y: ArrayLike,
    s: ArrayLike,
    groups: Groups,
    min_tprs: Sequence[float],
    *,
    replicates: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> list[Interval]:
    """The intervals for several `min_tpr` from the same replicates."""
    patients = Patients(y, [s], groups)
    return [one.interval for one in figures(patients, [partial_area(m) for m in min_tprs], replicates, seed, level)]


def bootstrap_mean_of_folds(
    y: ArrayLike,
    s: ArrayLike,
    groups: Groups,
    folds: ArrayLike,
    *,
    replicates: int = 2000,
    seed: int = 0,
    min_tpr: float = MIN_TPR,
    level: float = 0.95,
) -> Interval:
    """Interval of the mean over folds of the pAUC; patients are drawn within their fold, as folds are fixed."""
    parts = parts_of(y, s, groups, folds)
    return mean_figures(parts, [partial_area(min_tpr)], replicates, seed, level)[1][0].interval


def parts_of(y: ArrayLike, s: ArrayLike, groups: Groups, folds: ArrayLike) -> list[Patients]:
    """The groups of each fold, in the order of the folds."""
    truth, scores, fold, owner = np.asarray(y), np.asarray(s), np.asarray(folds), np.asarray(groups)
    return [Patients(truth[fold == f], [scores[fold == f]], owner[fold == f]) for f in np.unique(fold)]


def figures(patients: Patients, measures: Sequence[Measure], replicates: int, seed: int, level: float) -> list[Figure]:
    """Each measure of the first score vector, with its interval, all from the same replicates."""
    points = patients.tables[0].estimate(patients.everyone(), measures)
    values = [float(value[0]) for value, _ in points]
    if reason := _not_asked(replicates) or too_few([patients]):
        return [Figure(value, _refused([patients], level, reason)) for value in values]
    sampled = sample(patients, measures, replicates, seed)
    return [figure_of(one, m, [patients], replicates, level) for one, m in zip(sampled, measures, strict=True)]


def mean_figures(
    parts: Sequence[Patients], measures: Sequence[Measure], replicates: int, seed: int, level: float
) -> tuple[list[list[Figure]], list[Figure]]:
    """Each part's measures, and their means over the parts; groups are drawn within their part."""
    count = len(parts)
    if reason := _not_asked(replicates) or too_few(parts):
        alone = [figures(p, measures, replicates, seed + i, level) for i, p in enumerate(parts)]
        values = [sum(float(one[i].value or 0.0) for one in alone) / count for i in range(len(measures))]
        return alone, [Figure(value, _refused(parts, level, reason)) for value in values]
    per_part = [sample(p, measures, replicates, seed + i) for i, p in enumerate(parts)]
    alone = []
    for part, drawn in zip(parts, per_part, strict=True):
        few = too_few([part])
        alone.append(
            [
                Figure(one.value, _refused([part], level, few)) if few else figure_of(one, m, [part], replicates, level)
                for one, m in zip(drawn, measures, strict=True)
            ]
        )
    means = []
    for measure, each in zip(measures, zip(*per_part, strict=True), strict=True):
        variance = sum(one.error**2 for one in each)
        mean = Sampled(
            sum(one.value for one in each) / count,
            variance**0.5 / count,
            np.mean([one.values for one in each], axis=0),
            np.sqrt(np.sum([one.errors**2 for one in each], axis=0)) / count,
            variance**2 / max(sum(one.error**4 / one.freedom for one in each), 1e-300),
        )
        means.append(figure_of(mean, measure, parts, replicates, level))
    return alone, means


def sample(patients: Patients, measures: Sequence[Measure], replicates: int, seed: int) -> list[Sampled]:
    """The measures of the first score vector, with their bootstrap distributions."""
    table = patients.tables[0]
    drawn = [table.estimate(w, measures) for w in patients.draws(replicates, seed)]
    cells, result = table.times(patients.everyone()), []
    for i, measure in enumerate(measures):
        value, per_lesion = measure.influence(*cells)
        values, errors = (np.concatenate([chunk[i][j] for chunk in drawn]) for j in (0, 1))
        result.append(sampled(patients, float(value[0]), table.spread(per_lesion)[0], values, errors))
    return result


def sampled(patients: Patients, value: float, pull: Floats, values: Floats, errors: Floats) -> Sampled:
    """A figure whose atoms pull by `pull` [A], with its replicates' `values` and `errors` [R]."""
    squares = pull**2
    variance, fourths = (float((patients.multiplicity * x).sum()) for x in (squares, squares**2))
    return Sampled(value, variance**0.5, values, errors, satterthwaite(variance, fourths, patients.groups))


def figure_of(one: Sampled, measure: Measure, parts: Sequence[Patients], replicates: int, level: float) -> Figure:
    """A sampled figure with its interval."""
    return Figure(one.value, _interval(one, measure, parts, replicates, level))


def _interval(one: Sampled, measure: Measure, parts: Sequence[Patients], replicates: int, level: float) -> Interval:
    maximum = measure.maximum
    if one.value >= maximum * (1 - 1e-12):
        low = _separated(parts, measure, (1 + level) / 2)
        return _made(low, maximum, METHOD_SEPARATED, parts, level, 0, 0)
    if one.value <= 0 or one.error <= 0:
        return _refused(parts, level, "the figure does not vary: are the scores reversed or constant?")
    t = student(one, maximum)
    if len(t) < replicates / 4:
        return _refused(parts, level, "most replicates separate the classes completely")
    centre = np.log(one.value / (maximum - one.value))
    error = one.error * maximum / (one.value * (maximum - one.value))
    high_t, low_t = np.quantile(t, [(1 + level) / 2, (1 - level) / 2])
    high_t *= _stretch(one.freedom, sum(p.malignant_groups for p in parts), level)
    low, high = (maximum / (1 + np.exp(error * q - centre)) for q in (high_t, low_t))
    return _made(min(low, one.value), max(high, one.value), METHOD, parts, level, replicates, replicates - len(t))


def _stretch(freedom: float, malignant_groups: int, level: float) -> float:
    """How much further the lower end must reach than the replicates say, which know no worse lesion than the data's.

    Student's quantile for the normal one, as few groups make up the standard error; and the standard deviation of
    Student's t, as few groups have a malignant lesion.
    """
    tail = (1 + level) / 2
    wider: float = (malignant_groups / (malignant_groups - 2)) ** 0.5
    return student_quantile(tail, freedom) / NormalDist().inv_cdf(tail) * wider


def student(one: Sampled, maximum: float) -> Floats:
    """Each replicate's distance from the figure in its own standard errors, on the logit scale: float64 [<= R]."""
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled = np.log(one.values / (maximum - one.values))
        errors = one.errors * maximum / (one.values * (maximum - one.values))
        t = (scaled - np.log(one.value / (maximum - one.value))) / errors
    finite: Floats = t[np.isfinite(t)]
    return finite


def _separated(parts: Sequence[Patients], measure: Measure, confidence: float) -> float:
    """Lower bound where every malignant lesion outranks every benign one, so that no replicate varies.

    With n independent patients none of whom fails, at most 1 - (1 - confidence)^(1/n) would. Those malignant
    could all rank last, those benign all first.
    """
    missed: float = 1 - (1 - confidence) ** (1 / sum(p.malignant_groups for p in parts))
    raised: float = 1 - (1 - confidence) ** (1 / sum(p.benign_groups for p in parts))
    return float(np.mean([measure.bound(missed, raised, p.prevalence) for p in parts]))


def _not_asked(replicates: int) -> str | None:
    return None if replicates else NOT_ASKED


def too_few(parts: Sequence[Patients]) -> str | None:
    """Why these lesions are too few for an interval; None if they are not."""
    malignant, groups = sum(p.malignant for p in parts), sum(p.malignant_groups for p in parts)
    if malignant < FEWEST_MALIGNANT:
        return f"{malignant} malignant lesions: under {FEWEST_MALIGNANT}, no interval is worth printing"
    if groups < FEWEST_GROUPS:
        return f"malignant lesions of {groups} patients: under {FEWEST_GROUPS}, no interval is worth printing"
    if len(parts) > 1 and (least := min(p.malignant for p in parts)) < FEWEST_PER_FOLD:
        return f"{least} malignant lesions in a fold: under {FEWEST_PER_FOLD}, no interval is worth printing"
    return None


def _made(
    low: float, high: float, method: str, parts: Sequence[Patients], level: float, drawn: int, dropped: int
) -> Interval:
    clusters, malignant = sum(p.groups for p in parts), sum(p.malignant for p in parts)
    return Interval(float(low), float(high), level, method, drawn, dropped, clusters, malignant)


def _refused(parts: Sequence[Patients], level: float, reason: str) -> Interval:
    clusters, malignant = sum(p.groups for p in parts), sum(p.malignant for p in parts)
    return Interval(None, None, level, METHOD, 0, 0, clusters, malignant, reason)
