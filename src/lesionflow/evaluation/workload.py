"""What finding cancers costs: lesions to review per malignant one found, overall and within each patient.

At a sensitivity, the threshold is the highest score whose sensitivity reaches it. Benign lesions weigh as the
stated prevalence says (see `prevalence`), so that thinned data doesn't flatter:

    reviewed per cancer = 1 + (1 - prevalence) / prevalence * (1 - specificity) / sensitivity

A reader may rather take each patient's k most suspicious lesions. `within_patient` is the smallest k that finds the
share; tied benign lesions come first, and a thinned benign lesion takes as many places as it stands for. That stands
in for a list that is nearly known; where one benign lesion stands for more than `MOST_STOOD_FOR`, because benign
lesions were thinned or patients with cancer sought out, there are no figures per patient, only the reason.

Two things are uncertain: where the threshold (or k) lies, a quantile of the malignant lesions alone, and what lies
above it. The first is settled by inverting a test: the thresholds at which Clopper and Pearson's interval of the
sensitivity, with the sample size that clustering by patient leaves, holds the wanted one. The second is the patients'
spread at a fixed threshold. Both are joined as Zou & Donner (2008, MOVER) do. Replicates would not do: they never
draw a malignant lesion below the lowest of the data, and cover 68-92 % where few lie below the threshold. Where even
the lowest malignant score may lie above the true threshold, there is no interval.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, log
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lesionflow.errors import DataError
from lesionflow.evaluation.intervals import Figure, Interval
from lesionflow.evaluation.metrics import Floats, Groups, Ints, checked, codes
from lesionflow.evaluation.prevalence import refusal, share_interval, shares, stated
from lesionflow.evaluation.quantiles import satterthwaite, student_quantile
from lesionflow.evaluation.thresholds import independent_lesions

SENSITIVITIES = (0.8, 0.9, 0.95)
METHOD = "patient-clustered, threshold by test inversion, MOVER"
_ROUNDING = 1e-9
MOST_STOOD_FOR = 3
"""Where one benign lesion stands for more lesions than this, no patient's list is known well enough to be counted.

Simulated, 300 patients: `within_patient` covers 95-100 % at 3, for lists of 40 and of 200 lesions. At 10 it is 98-100 %
for lists of 200, but 62-97 % for lists of 40; at 100 it is 2-97 %, and the figure down to a fourteenth of the truth.
"""


def operating(
    y: ArrayLike,
    s: ArrayLike,
    groups: Groups,
    patients_known: ArrayLike,
    *,
    prevalence: float,
    sensitivities: Sequence[float] = SENSITIVITIES,
    replicates: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> list[dict[str, Any]]:
    """For each sensitivity {sensitivity, score, specificity, reviewed_per_cancer, flagged_per_patient, within_patient}.

    y [n] 0/1, s [n], groups [n]: the patient of each lesion, `patients_known` bool [n]: whether it is one.
    `flagged_per_patient` and `within_patient` {k, reviewed_per_cancer} are those of known patients. Benign lesions
    weigh as `prevalence` says (0: as in the data). Nothing is drawn: `replicates=0` leaves intervals out, `seed`
    has no effect. Raises `DataError` as `metrics.pauc` does.
    """
    malignant, scores = checked(y, s)
    known = np.asarray(patients_known, bool)
    if known.shape != scores.shape:
        raise DataError(f"patients_known: {known.size} values for {scores.size} lesions; they must match row by row")
    share, owner = stated(malignant, prevalence), codes(groups, len(scores))
    # Sums of fractions depend on their order, in the last digit; nothing may depend on the order of rows.
    order = np.lexsort((known, malignant, scores, owner))
    malignant, scores, owner, known = malignant[order], scores[order], owner[order], known[order]
    about = _About(level, int(owner.max()) + 1, int(malignant.sum()), refusal(malignant, owner, replicates))
    places = [_place(scores[malignant], owner[malignant], one, level) for one in sensitivities]
    passed = _passed(malignant, scores, owner, places, share, level, about)
    inside = _Known(malignant[known], scores[known], owner[known], share, level, replicates)
    rows = []
    for sensitivity, place, (specificity, reviewed) in zip(sensitivities, places, passed, strict=True):
        k, within = inside.within(sensitivity)
        rows.append(
            {
                "sensitivity": sensitivity,
                "score": place.value,
                "specificity": specificity.to_dict(),
                "reviewed_per_cancer": reviewed.to_dict(),
                "flagged_per_patient": inside.flagged(place).to_dict(),
                "within_patient": {"k": k, "reviewed_per_cancer": within.to_dict()},
            }
        )
    return rows


@dataclass(frozen=True)
class _About:
    """What is said beside every interval."""

    level: float
    clusters: int
    malignant: int
    reason: str | None

    def figure(self, value: float, low: float, high: float, reason: str | None = None) -> Figure:
        reason = self.reason or reason
        about = (self.level, METHOD, 0, 0, self.clusters, self.malignant)
        if reason:
            return Figure(value, Interval(None, None, *about, reason))
        return Figure(value, Interval(min(low, value), max(high, value), *about))

    def missing(self, reason: str) -> Figure:
        return Figure.missing(reason, level=self.level, clusters=self.clusters, malignant=self.malignant)


@dataclass(frozen=True)
class _Place:
    """A threshold at a sensitivity, and how high and low the true one may be; lesions from it up are flagged."""

    value: float
    sensitivity: float
    """What is found from `value` up."""
    highest: float
    lowest: float
    """Of the lowest, lesions *above* it are flagged; -inf if no malignant score is low enough."""
    reason: str | None


def _place(ours: Floats, owner: Ints, sensitivity: float, level: float) -> _Place:
    distinct = np.unique(ours)
    below = np.searchsorted(np.sort(ours), distinct, "left") / len(ours)
    at = int(np.nonzero(1 - below >= sensitivity - _ROUNDING)[0].max())
    size = independent_lesions(ours, owner)
    missed = np.append(below, 1.0)
    # From threshold i up, 1 - missed[i] is found: as long as that is in keeping with the wanted sensitivity.
    lowest = highest = at
    while lowest > 0 and _holds(1 - float(missed[lowest - 1]), size, sensitivity, level):
        lowest -= 1
    while highest < len(distinct) and _holds(1 - float(missed[highest + 1]), size, sensitivity, level):
        highest += 1
    needed = ceil(log((1 - level) / 2) / log(sensitivity))
    return _Place(
        value=float(distinct[at]),
        sensitivity=float(1 - below[at]),
        highest=float(distinct[highest]) if highest < len(distinct) else float("inf"),
        lowest=float(distinct[lowest - 1]) if lowest else -np.inf,
        reason=None
        if lowest
        else f"the true threshold may lie below every malignant score; it takes at least {needed} independent ones",
    )


def _holds(share: float, size: float, sensitivity: float, level: float) -> bool:
    if size < 1:
        return True
    low, high = share_interval(share, size, level)
    return low <= sensitivity <= high


def _joined(
    value: float, place: tuple[float, float], sample: tuple[float, float], to: Callable[[float], float]
) -> tuple[float, float]:
    """Distances below and above `value` on the scale `to`: those of both intervals, joined as independent."""
    centre = to(value)
    below = np.hypot(centre - to(min(place[0], value)), centre - to(min(sample[0], value)))
    above = np.hypot(to(max(place[1], value)) - centre, to(max(sample[1], value)) - centre)
    return float(below), float(above)


def _passed(
    malignant: NDArray[np.bool_],
    scores: Floats,
    owner: Ints,
    places: Sequence[_Place],
    prevalence: float,
    level: float,
    about: _About,
) -> list[tuple[Figure, Figure]]:
    """Specificity and lesions reviewed per cancer at each threshold."""
    benign, holder = np.sort(scores[~malignant]), owner[~malignant]
    cuts = np.unique([one.value for one in places])
    share, size = shares(np.searchsorted(cuts, scores[~malignant], "right"), holder, len(cuts) + 1)
    result = []
    for one in places:
        at = int(np.searchsorted(cuts, one.value)) + 1
        value = float(share[at])
        fewest = 1 - np.searchsorted(benign, one.highest, "left") / len(benign)
        most = 1 - np.searchsorted(benign, one.lowest, "right") / len(benign)
        sample = share_interval(value, float(size[at]), level)
        below, above = _joined(value, (float(fewest), float(most)), sample, _arc)
        low, high = (np.sin(np.clip(_arc(value) + one, 0, np.pi / 2)) ** 2 for one in (-below, above))
        cost = (1 - prevalence) / prevalence / one.sensitivity
        result.append(
            (
                about.figure(1 - value, float(1 - high), float(1 - low), one.reason),
                about.figure(1 + cost * value, float(1 + cost * low), float(1 + cost * high), one.reason),
            )
        )
    return result


def _arc(share: float) -> float:
    return float(np.arcsin(np.sqrt(share)))


class _Known:
    """Lesions of known patients: what each patient is asked to have looked at."""

    def __init__(
        self,
        malignant: NDArray[np.bool_],
        scores: Floats,
        owner: Ints,
        prevalence: float,
        level: float,
        replicates: int,
    ) -> None:
        ill, well = int(malignant.sum()), int((~malignant).sum())
        self.patient = np.unique(owner, return_inverse=True)[1]
        self.count = int(self.patient.max()) + 1 if len(owner) else 0
        self.about = _About(level, self.count, ill, refusal(malignant, owner, replicates))
        self.nothing = None
        if not len(owner):
            self.nothing = "the patient of no lesion is known"
        elif not ill or not well or self.count < 2:
            self.nothing = "the known patients lack malignant or benign lesions"
        if self.nothing:
            return
        self.malignant, self.scores = malignant, scores
        benign = ill * (1 - prevalence) / (prevalence * well)
        if benign > MOST_STOOD_FOR:
            many = f"{benign:,.0f}" if benign >= 10 else f"{benign:.1f}"
            self.nothing = (
                f"at this prevalence one benign lesion stands for {many} lesions (at most {MOST_STOOD_FOR} are "
                "allowed), so no patient's whole list is known"
            )
            return
        self.weight = np.where(malignant, 1.0, benign)
        self.size = np.bincount(self.patient, self.weight, self.count)
        # Benign lesions first among equals.
        order = np.lexsort((malignant, -scores, self.patient))
        weight, held = self.weight[order], malignant[order]
        start = np.cumsum(weight) - weight
        first = np.searchsorted(self.patient[order], np.arange(self.count), "left")
        holder = self.patient[order][held]
        self.depth = np.ceil(start[held] - start[first][holder] + 1 - _ROUNDING)
        """How deep each malignant lesion lies in its patient's list, float64 [P]."""
        self.holder = holder

    def flagged(self, place: _Place) -> Figure:
        """Lesions at or above the threshold per patient."""
        if self.nothing:
            return self.about.missing(self.nothing)
        above = self.weight * (self.scores >= place.value)
        load = np.bincount(self.patient, above, self.count).astype(np.float64)
        fewest = float(self.weight @ (self.scores >= place.highest)) / self.count
        most = float(self.weight @ (self.scores > place.lowest)) / self.count
        value = float(load.sum() / self.count)
        sample = self._sample(load, np.ones(self.count), value)
        down, up = _joined(value, (fewest, most), sample, lambda x: x**0.5)
        return self.about.figure(value, max(value**0.5 - down, 0.0) ** 2, (value**0.5 + up) ** 2, place.reason)

    def within(self, sensitivity: float) -> tuple[int | None, Figure]:
        """The smallest k that finds the share, and the lesions reviewed per malignant one found."""
        if self.nothing:
            return None, self.about.missing(self.nothing)
        place = _place(-self.depth, self.holder, sensitivity, self.about.level)
        k = -place.value
        deepest = -place.lowest - 1 if place.lowest > -np.inf else k
        # Thinned benign lesions make k jump, so the spread is looked at where k may be, not only where it is.
        costs = [self._cost(one) for one in (-place.highest, k, deepest)]
        low, high = min(low for _, low, _ in costs), max(high for _, _, high in costs)
        return int(k), self.about.figure(costs[1][0], low, high, place.reason)

    def _cost(self, k: float) -> tuple[float, float, float]:
        """Lesions reviewed per malignant one found in each patient's k highest, with its interval at this k."""
        found = np.bincount(self.holder[self.depth <= k], minlength=self.count).astype(np.float64)
        reviewed = np.minimum(self.size, max(k, 0.0))
        if not found.any():
            return 0.0, 0.0, 0.0
        value = float(reviewed.sum() / found.sum())
        return value, *self._sample(reviewed, found, value)

    def _sample(self, above: Floats, below: Floats, value: float) -> tuple[float, float]:
        """Interval of sum(above) / sum(below) over patients, on the square root's scale, which is even and has a 0."""
        squares = ((above - value * below) / below.sum()) ** 2
        total = float(squares.sum())
        if value <= 0 or total <= 0:
            return value, value
        freedom = satterthwaite(total, float((squares**2).sum()), self.count)
        error = student_quantile((1 + self.about.level) / 2, freedom) * (total * self.count / (self.count - 1)) ** 0.5
        half = error / (2 * value**0.5)
        return max(value**0.5 - half, 0.0) ** 2, (value**0.5 + half) ** 2
