"""What finding cancers costs: lesions to review per malignant one found, overall and within each patient.

At a sensitivity, the threshold is the highest score whose sensitivity reaches it. Benign lesions weigh as the
stated prevalence says (see `prevalence`), so that thinned data doesn't flatter:

    reviewed per cancer = 1 + (1 - prevalence) / prevalence * (1 - specificity) / sensitivity

A reader may rather take each patient's k most suspicious lesions. `within_patient` is the smallest k that finds the
share; tied benign lesions come first, and a thinned benign lesion takes as many places as it stands for.

In each replicate of the patients the threshold (and k) is found anew, as it would be on other data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lesionflow.errors import DataError
from lesionflow.evaluation.intervals import FEWEST_MALIGNANT, NOT_ASKED, Figure, Interval
from lesionflow.evaluation.metrics import Floats, Groups, Ints, checked, codes
from lesionflow.evaluation.prevalence import stated, too_few
from lesionflow.evaluation.resample import Patients

SENSITIVITIES = (0.8, 0.9, 0.95)
METHOD = "patient-clustered bootstrap, percentile, threshold found anew"
_ROUNDING = 1e-9


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
    weigh as `prevalence` says (0: as in the data). Raises `DataError` as `metrics.pauc` does.
    """
    malignant, scores = checked(y, s)
    known = np.asarray(patients_known, bool)
    if known.shape != scores.shape:
        raise DataError(f"patients_known: {known.size} values for {scores.size} lesions; they must match row by row")
    share, owner = stated(malignant, prevalence), codes(groups, len(scores))
    overall = _Overall(malignant, scores, owner, known, share, sensitivities, replicates, seed)
    within = _within(malignant, scores, owner, known, prevalence, sensitivities, replicates, seed)
    result = []
    for i, sensitivity in enumerate(sensitivities):
        figure = _Figures(level, overall.patients.groups, overall.patients.malignant, replicates)
        inside = _Figures(level, within.clusters, within.malignant, replicates)
        k, cost, costs = within.rows[i] if within.rows else (None, None, None)
        result.append(
            {
                "sensitivity": sensitivity,
                "score": float(overall.score[i]),
                "specificity": figure(1 - overall.passed[0, i], 1 - overall.passed[1:, i]).to_dict(),
                "reviewed_per_cancer": figure(overall.cost[0, i], overall.cost[1:, i]).to_dict(),
                "flagged_per_patient": (
                    inside.missing(within.reason) if within.reason else inside(overall.load[0, i], overall.load[1:, i])
                ).to_dict(),
                "within_patient": {
                    "k": k,
                    "reviewed_per_cancer": (
                        Figure.missing(
                            within.reason or "", level=level, clusters=within.clusters, malignant=within.malignant
                        )
                        if cost is None or costs is None
                        else inside(cost, costs)
                    ).to_dict(),
                },
            }
        )
    return result


class _Figures:
    """Percentile intervals of replicates, or why there are none."""

    def __init__(self, level: float, clusters: int, malignant: int, replicates: int) -> None:
        self.level, self.clusters, self.malignant, self.replicates = level, clusters, malignant, replicates

    def missing(self, reason: str) -> Figure:
        return Figure.missing(reason, level=self.level, clusters=self.clusters, malignant=self.malignant)

    def __call__(self, value: float, drawn: Floats) -> Figure:
        about = (self.level, METHOD)
        reason = NOT_ASKED if not self.replicates else None
        if self.malignant < FEWEST_MALIGNANT:
            reason = reason or too_few(self.malignant)
        if reason:
            return Figure(float(value), Interval(None, None, *about, 0, 0, self.clusters, self.malignant, reason))
        kept = drawn[np.isfinite(drawn)]
        low, high = np.quantile(kept, [(1 - self.level) / 2, (1 + self.level) / 2])
        dropped = len(drawn) - len(kept)
        interval = Interval(
            min(float(low), float(value)), max(float(high), float(value)), *about,
            len(drawn), dropped, self.clusters, self.malignant,
        )  # fmt: skip
        return Figure(float(value), interval)


class _Overall:
    """The data (row 0) and its replicates at each sensitivity: arrays [1 + R, S]."""

    def __init__(
        self,
        malignant: NDArray[np.bool_],
        scores: Floats,
        owner: Ints,
        known: NDArray[np.bool_],
        share: float,
        sensitivities: Sequence[float],
        replicates: int,
        seed: int,
    ) -> None:
        # The second score keeps lesions of unknown patients in atoms of their own.
        columns = [scores] if known.all() or not known.any() else [scores, known.astype(np.float64)]
        self.patients = Patients(malignant, columns, owner)
        lone = np.zeros(len(self.patients.multiplicity))
        if len(columns) > 1:
            lone = self._unknown(malignant, known)
        ill, well = int((malignant & known).sum()), int((~malignant & known).sum())
        benign = ill * (1 - share) / (share * well) if ill and well else np.nan
        drawn: list[list[Floats]] = []
        weightings = [self.patients.everyone()]
        if replicates and self.patients.malignant >= FEWEST_MALIGNANT:
            weightings.extend(self.patients.draws(replicates, seed))
        first = None
        for weighting in weightings:
            all_benign, all_malignant = self.patients.tables[0].times(weighting)
            known_benign, known_malignant = all_benign, all_malignant
            if lone.any():
                less = self.patients.tables[0].times(weighting * lone)
                known_benign, known_malignant = all_benign - less[0], all_malignant - less[1]
            at = [_reaching(all_malignant, one) for one in sensitivities]
            first = first or [int(one[0]) for one in at]
            rows = np.arange(len(weighting))
            above = _above(all_malignant, all_benign)
            above_known = _above(known_malignant, known_benign)
            with np.errstate(invalid="ignore", divide="ignore"):
                total = all_malignant.sum(axis=1), all_benign.sum(axis=1)
                count = (weighting * (1 - lone)).sum(axis=1)
                passed = np.stack([above[1][rows, one] / total[1] for one in at], axis=1)
                found = np.stack([above[0][rows, one] / total[0] for one in at], axis=1)
                load = [(above_known[0][rows, one] + benign * above_known[1][rows, one]) / count for one in at]
                cost = 1 + (1 - share) / share * passed / found
            drawn.append([passed, cost, np.stack(load, axis=1)])
        self.passed, self.cost, self.load = (np.concatenate(one) for one in zip(*drawn, strict=True))
        assert first is not None
        self.score = np.unique(scores[malignant])[first]

    def _unknown(self, malignant: NDArray[np.bool_], known: NDArray[np.bool_]) -> Floats:
        """1 for atoms of lesions without a patient, else 0: float64 [A]."""
        table = self.patients.tables[1]
        both = len(np.unique(known[malignant])) == 2
        unknown = np.zeros((1, 3 * table.size + 1))
        # Cells and scores of the 0 of `known`; where all malignant lesions are known, it lies below their 1.
        if both:
            unknown[0, [1, 2 * table.size + 1]] = 1
        elif known[malignant].all():
            unknown[0, 0] = 1
        else:
            unknown[0, [1, 3]] = 1
        result: Floats = (table.spread(unknown)[0] > 0).astype(np.float64)
        return result


def _reaching(malignant: Floats, sensitivity: float) -> Ints:
    """Index [R] of the highest score at which the sensitivity is reached; weights [R, K] per score, ascending."""
    found = np.cumsum(malignant[:, ::-1], axis=1)
    enough = found >= sensitivity * found[:, -1:] - _ROUNDING
    result: Ints = malignant.shape[1] - 1 - np.argmax(enough, axis=1)
    return result


def _above(malignant: Floats, benign: Floats) -> tuple[Floats, Floats]:
    """Weights at or above each malignant score, [R, K] each."""
    return (
        np.cumsum(malignant[:, ::-1], axis=1)[:, ::-1],
        np.cumsum(benign[:, :0:-1], axis=1)[:, 1::2][:, ::-1],
    )


class _Within:
    def __init__(self, clusters: int, malignant: int, reason: str | None = None) -> None:
        self.clusters, self.malignant, self.reason = clusters, malignant, reason
        self.rows: list[tuple[int, float, Floats]] = []


def _within(
    malignant: NDArray[np.bool_],
    scores: Floats,
    owner: Ints,
    known: NDArray[np.bool_],
    prevalence: float,
    sensitivities: Sequence[float],
    replicates: int,
    seed: int,
) -> _Within:
    """Reviewing each known patient's k highest lesions."""
    ours, s = malignant[known], scores[known]
    ill, well = int(ours.sum()), int((~ours).sum())
    if not len(ours):
        return _Within(0, 0, "the patient of no lesion is known")
    _, patient = np.unique(owner[known], return_inverse=True)
    count = int(patient.max()) + 1
    if not ill or not well:
        return _Within(count, ill, "the known patients lack malignant or benign lesions")
    result = _Within(count, ill)
    share = stated(malignant, prevalence)
    benign = ill * (1 - share) / (share * well)
    size = np.bincount(patient, np.where(ours, 1.0, benign), count)
    # Benign lesions first among equals.
    order = np.lexsort((ours, -s, patient))
    weight = np.where(ours[order], 1.0, benign)
    start = np.cumsum(weight) - weight
    first = np.searchsorted(patient[order], np.arange(count), "left")
    place = np.ceil(start - start[first][patient[order]] + 1 - _ROUNDING)[ours[order]]
    holder = patient[order][ours[order]]
    depth, at = np.unique(place, return_inverse=True)
    # Patients without a malignant lesion and of one size are exchangeable.
    found = np.bincount(holder * len(depth) + at, minlength=count * len(depth)).reshape(count, len(depth))
    reviewed = np.minimum(depth[None], size[:, None])
    rows, multiplicity = np.unique(np.concatenate([found, reviewed], axis=1), axis=0, return_counts=True)
    found, reviewed = rows[:, : len(depth)], rows[:, len(depth) :]
    rng = np.random.default_rng([seed, 1])
    weighting = multiplicity[None].astype(np.float64)
    if replicates and ill >= FEWEST_MALIGNANT:
        weighting = np.concatenate([weighting, rng.multinomial(count, multiplicity / count, size=replicates)])
    hits = np.cumsum(weighting @ found, axis=1)
    cost = weighting @ reviewed
    row = np.arange(len(weighting))
    for sensitivity in sensitivities:
        reach = np.argmax(hits >= sensitivity * hits[:, -1:] - _ROUNDING, axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            per_cancer = cost[row, reach] / hits[row, reach]
        result.rows.append((int(depth[reach[0]]), float(per_cancer[0]), per_cancer[1:]))
    return result
