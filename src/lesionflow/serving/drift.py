"""Whether the lesions that come are still like those the model was judged on. No torch, no patient's values.

    drift = Drift(bundle.info["drift"])
    drift.add(statistics(pixels), {"image": logits}, bands=bands, table=metadata)    # one patient
    drift.gauges()

What is known of the hold-out travels as shares of lesions in bins: of what pictures look like, of every mode's
log-odds, of the bands, of the metadata's columns and their gaps (`driftreference` makes it). A figure is held against
it by the first two of Neyman's smooth components: `level`, the probability that a new lesion lies above one of the
hold-out (a Mann-Whitney statistic), and `spread`, how far out lesions lie on either side; a category by its share.

Lesions of one patient are alike, so patients are what is counted. With the intraclass correlation r of the hold-out, a
patient of n lesions is worth n / (1 + (n - 1) r) (the weights of least variance), and the sum of these is the effective
number of lesions. Where the new patients themselves vary more than this says, their own cluster-robust variance counts.
Means are then compared by Student's t with Welch's degrees of freedom, shares on the arcsine scale (Anscombe's), and
all p-values together keep to the level by Holm's procedure. docs/drift.md has false alarms and power, as measured.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from lesionflow.evaluation.quantiles import beta_cdf
from lesionflow.serving.driftfigures import (
    NUMBER_TESTS,
    Codes,
    Doubles,
    Ints,
    Population,
    observed,
    populations,
    weighted,
)

if TYPE_CHECKING:
    import polars as pl

ALPHA = 0.05
"""How often a report on lesions like the hold-out's may name anything at all (familywise)."""
WINDOW_ALPHA = 0.01
"""The same for one of the service's windows, of which there are many."""
WINDOW = 100
"""Patients that the service looks at together."""
TOGETHER, MOST_TOGETHER = 32, 4096
"""Patients, and lesions, that the service takes in at once."""
FEWEST_PATIENTS = 10
"""With fewer nothing is tested."""
SMALLEST = 0.03
"""Least distance of `level` from 1/2 and of `spread` from the hold-out's that is worth a word: under 0.1 s.d."""
SMALLEST_ARCSINE = 0.1
"""The same for shares, as Cohen's h: 2 |asin(sqrt(p)) - asin(sqrt(q))|; 0.05 about one half, less for rare ones."""


@dataclass(frozen=True)
class Shift:
    """One figure of new lesions against the hold-out's."""

    figure: str
    test: str
    """`level`, `spread`, `missing`, or a category."""
    usual: float
    """The hold-out's value: 0.5 of a level, about 1/3 of a spread, or a share."""
    value: float | None
    """The new lesions'; None where there are none."""
    patients: int
    effective: float
    """What they are worth, in lesions of as many patients."""
    p: float | None
    """Two-sided; None where it wasn't tested."""
    adjusted: float | None = None
    """By Holm's procedure, over everything tested at once."""
    shifted: bool = False
    """Whether `adjusted` is at most the level, and the difference worth a word."""
    institution: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def words(self) -> str:
        """What has changed, in a phrase."""
        if self.value is None:
            return "not seen"
        if self.test == "level":
            if self.value > self.usual:
                return f"higher, above the usual lesion in {self.value:.0%} of cases"
            return f"lower, below the usual lesion in {1 - self.value:.0%} of cases"
        if self.test == "spread":
            return f"{'more' if self.value > self.usual else 'less'} often far from the usual"
        return f"{self.test}: {self.value:.1%} of lesions, {self.usual:.1%} were usual"


class Sums:
    """What is kept of new lesions: sums over patients, nothing of any one of them."""

    def __init__(self, tests: Population) -> None:
        self.tests, self.patients, self.lesions = tests, 0, 0
        count = len(tests)
        self.clusters, self.w, self.wy, self.w2, self.w2y, self.w2y2, self.w4 = np.zeros((7, count))

    def add(self, codes: Codes, owner: Ints, count: int) -> None:
        """Take `count` more patients in: their lesions' bins [F, N], and whose each is [N]."""
        for shares, lesions in self.tests.figures.shares(codes, owner, count):
            w, y = weighted(self.tests.rows, self.tests.scores, self.tests.alike, shares, lesions)
            square = w * w
            self.clusters += (w > 0).sum(0)
            self.w += w.sum(0)
            self.wy += (w * y).sum(0)
            self.w2 += square.sum(0)
            self.w2y += (square * y).sum(0)
            self.w2y2 += (square * y * y).sum(0)
            self.w4 += (square * square).sum(0)
        self.patients += count
        self.lesions += codes.shape[1]

    def shifts(self, institution: str | None = None) -> list[Shift]:
        """Every test, not yet adjusted for the others."""
        tests, result = self.tests, []
        mean, weight, freedom = self.effective()
        for i, (figure, test) in enumerate(tests.names):
            k, usual = int(self.clusters[i]), float(tests.mean[i])
            value = float(mean[i]) if k else None
            p = None
            if value is not None and k >= FEWEST_PATIENTS and weight[i] > 0 and tests.weight[i] > 0:
                ours, theirs = 1 / weight[i], 1 / tests.weight[i]
                if tests.is_number[i]:
                    # Where the hold-out doesn't vary, nothing can be said of how much it would.
                    gap = (value - usual) / math.sqrt(tests.variance[i]) if tests.variance[i] > 0 else 0.0
                else:
                    gap = _arcsine(value, weight[i]) - _arcsine(usual, tests.weight[i])
                held = max(tests.patients - 1, 1)
                df = (ours + theirs) ** 2 / (ours**2 / (freedom[i] or held) + theirs**2 / held)
                p = student_p(float(gap / math.sqrt(ours + theirs)), float(df))
            result.append(Shift(figure, test, usual, value, k, float(weight[i]), p, institution=institution))
        return result

    def effective(self) -> tuple[Doubles, Doubles, Doubles]:
        """Mean, effective number and degrees of freedom of each test [T]; 0 degrees where the hold-out's count."""
        with np.errstate(divide="ignore", invalid="ignore"):
            mean = self.wy / self.w  # Never over 1 by rounding: each sum's parts are no larger.
            spread = (self.w2y2 - 2 * mean * self.w2y + mean**2 * self.w2) / self.w**2
            robust = np.maximum(spread, 0) * self.clusters / (self.clusters - 1)
            variance = np.where(self.tests.is_number, self.tests.variance, mean * (1 - mean))
            worth = np.where(robust > 0, variance / robust, np.inf)
            freedom = np.maximum(self.w2**2 / self.w4 - 1, 1)
        own = worth < self.w
        return mean, np.where(own, worth, self.w), np.where(own, freedom, 0.0)


def adjusted(shifts: Sequence[Shift], alpha: float = ALPHA) -> list[Shift]:
    """The shifts with Holm's p-values, which keep to `alpha` over all of them however they depend on each other."""
    tested = sorted((p, i) for i, p in enumerate(one.p for one in shifts) if p is not None)
    result, highest = list(shifts), 0.0
    for place, (p, i) in enumerate(tested):
        highest = max(highest, min(1.0, p * (len(tested) - place)))
        one = shifts[i]
        result[i] = replace(one, adjusted=highest, shifted=highest <= alpha and _worth_a_word(one))
    return result


def _worth_a_word(one: Shift) -> bool:
    value = one.value if one.value is not None else one.usual
    if one.test in NUMBER_TESTS:
        return abs(value - one.usual) >= SMALLEST
    return 2 * abs(math.asin(math.sqrt(value)) - math.asin(math.sqrt(one.usual))) >= SMALLEST_ARCSINE


def _arcsine(share: float, number: float) -> float:
    """Twice the arcsine of a share of `number` lesions, as Anscombe corrects it: variance about 1 / number."""
    return 2 * math.asin(math.sqrt((share * number + 0.375) / (number + 0.75)))


def student_p(t: float, freedom: float) -> float:
    """Two-sided p-value of Student's t."""
    return beta_cdf(freedom / 2, 0.5, freedom / (freedom + t * t))


@dataclass(frozen=True)
class Gauge:
    """One sample for `/metrics`."""

    name: str
    labels: Mapping[str, str]
    value: float


@dataclass(frozen=True)
class _Patient:
    """What `add` was told."""

    count: int
    statistics: Mapping[str, Doubles] | None
    logits: Mapping[str, Doubles]
    bands: Sequence[str | None] | None
    table: pl.DataFrame | None
    institution: str | None

    @property
    def kind(self) -> tuple[object, ...]:
        """What is known: patients of a kind can be taken together."""
        return self.statistics is None, tuple(self.logits), self.bands is None, self.table is None


class Drift:
    """The service's look at what comes, in windows of about `window` patients. Safe to call from several threads.

    A request is taken for one patient. Institutions are told apart only where the reference knows them, so that no
    text of a client becomes a label. A few patients' figures are kept until they are taken in together.
    """

    def __init__(self, reference: Mapping[str, Any], window: int = WINDOW, alpha: float = WINDOW_ALPHA) -> None:
        """From bundle.json's `drift`. Raises `DataError` where it says nothing, or can't be used."""
        self.window, self.alpha = window, alpha
        self.figures, self.tests = populations(reference)
        self._sums = {name: Sums(tests) for name, tests in self.tests.items()}
        self._windows = dict.fromkeys(self.tests, 0)
        self._last: dict[str, list[Shift]] = {}
        self._waiting: list[_Patient] = []
        self._lock = threading.Lock()

    def add(
        self,
        statistics: Mapping[str, Doubles] | None,
        logits: Mapping[str, Doubles],
        *,
        bands: Sequence[str | None] | None = None,
        table: pl.DataFrame | None = None,
        institution: str | None = None,
    ) -> None:
        """Take one patient's lesions in; every argument of the same N lesions, as `observed` takes them.

        The arrays are kept for a while, so they must not be written to afterwards.
        """
        count = len(next(iter(logits.values()), ())) or (len(table) if table is not None else 0)
        if not count:
            return
        if table is not None:
            table = table.select(name for name in table.columns if f"metadata {name}" in self.figures.names)
            table = table if table.width else None  # Without columns it has no rows either.
        with self._lock:
            self._waiting.append(_Patient(count, statistics, logits, bands, table, institution))
            if len(self._waiting) >= TOGETHER or sum(one.count for one in self._waiting) >= MOST_TOGETHER:
                self._take()

    def gauges(self) -> list[Gauge]:
        """What the last full window of each institution said; `institution` is empty for all together.

        `lesionflow_drift_` + `windows`: how many there were; `patients`: in the one being filled; `shifted`: tests that
        have shifted; `shift`: by `figure` and `test`, the new value less the usual one (all of them for all together,
        those that have shifted for an institution).
        """
        found = []
        with self._lock:
            self._take()
            for name, sums in self._sums.items():
                label = {"institution": name}
                found += [Gauge("windows", label, self._windows[name]), Gauge("patients", label, sums.patients)]
                if (last := self._last.get(name)) is not None:
                    found.append(Gauge("shifted", label, sum(one.shifted for one in last)))
                    found += [
                        Gauge("shift", label | {"figure": one.figure, "test": one.test}, one.value - one.usual)
                        for one in last
                        if one.value is not None and (one.shifted or not name)
                    ]
        return found

    def _take(self) -> None:
        """Take the waiting patients in, those of a kind at once: one at a time costs ten times as much."""
        kinds: dict[tuple[object, ...], list[_Patient]] = {}
        for one in self._waiting:
            kinds.setdefault(one.kind, []).append(one)
        self._waiting = []
        for patients in kinds.values():
            counts = [one.count for one in patients]
            codes, owner = self._codes(patients, counts), np.repeat(np.arange(len(patients)), counts)
            for name, sums in list(self._sums.items()):
                mine = np.array([not name or one.institution == name for one in patients])
                if not mine.any():
                    continue
                rows = mine[owner]
                sums.add(codes[:, rows], (np.cumsum(mine) - 1)[owner[rows]], int(mine.sum()))
                if sums.patients >= self.window:
                    self._last[name] = adjusted(sums.shifts(), self.alpha)
                    self._windows[name] += 1
                    self._sums[name] = Sums(self.tests[name])

    def _codes(self, patients: list[_Patient], counts: list[int]) -> Codes:
        first, table = patients[0], None
        statistics = [one.statistics for one in patients if one.statistics is not None]
        tables = [one.table for one in patients if one.table is not None]
        sizes = np.full(sum(counts), np.nan)
        if tables:
            import polars as pl  # A service of pictures alone does without.

            table = pl.concat(tables, how="diagonal_relaxed")
            sizes[np.cumsum([0, *counts[:-1]])] = counts
        seen = observed(
            {name: np.concatenate([one[name] for one in statistics]) for name in statistics[0]} if statistics else None,
            {name: np.concatenate([one.logits[name] for one in patients]) for name in first.logits},
            None if first.bands is None else [band for one in patients for band in one.bands or ()],
            table,
            sizes if tables else None,
        )
        return self.figures.codes(seen, sum(counts))
