"""The four figures of a ranking with their intervals, from one pass over the replicates.

    ranking(y, s, groups)                        of scores that can be compared as they are
    ranking(y, s, groups, folds=fold)            ranked within each fold first: several models' scores
    by_fold(y, s, groups, folds)                 each fold on its own, and averaged; `mean_of_folds`: the latter

Keys, and what a figure lies between: `pauc` 0..0.2 and `pauc_88` 0..0.12 (above 80 and 88 % sensitivity), `auc`
and `average_precision` 0..1.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lesionflow.evaluation.intervals import Figure, figures, mean_figures, parts_of
from lesionflow.evaluation.metrics import MIN_TPR, Groups, checked, codes, fold_rank
from lesionflow.evaluation.resample import AVERAGE_PRECISION, Measure, Patients, partial_area

MEASURES = {
    "pauc": partial_area(0.80),
    "pauc_88": partial_area(0.88),
    "auc": partial_area(0.0),
    "average_precision": AVERAGE_PRECISION,
}


def ranking(
    y: ArrayLike,
    s: ArrayLike,
    groups: Groups,
    *,
    folds: ArrayLike | None = None,
    min_tpr: float = MIN_TPR,
    replicates: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Figure]:
    """`MEASURES` of scores s [n] for targets y [n] (0/1), groups [n] being drawn with replacement.

    With `folds` [n] the scores are first ranked within their fold (`metrics.fold_rank`): models of different folds
    differ in scale. `min_tpr` is what `pauc` is measured above. `replicates=0` leaves the intervals out. Raises
    `DataError` as `metrics.pauc` does.
    """
    scores = s if folds is None else fold_rank(s, folds)
    found = figures(Patients(y, [scores], groups), _measures(min_tpr), replicates, seed, level)
    return dict(zip(MEASURES, found, strict=True))


def mean_of_folds(
    y: ArrayLike,
    s: ArrayLike,
    groups: Groups,
    folds: ArrayLike,
    *,
    min_tpr: float = MIN_TPR,
    replicates: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Figure]:
    """`MEASURES` of each fold, averaged: the second part of `by_fold`."""
    return by_fold(y, s, groups, folds, min_tpr=min_tpr, replicates=replicates, seed=seed, level=level)[1]


def by_fold(
    y: ArrayLike,
    s: ArrayLike,
    groups: Groups,
    folds: ArrayLike,
    *,
    min_tpr: float = MIN_TPR,
    replicates: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[list[dict[str, Figure]], dict[str, Figure]]:
    """`MEASURES` of each fold, in the folds' order, and averaged over them, from the same replicates.

    Groups are drawn within their fold, as the folds are fixed. A fold of one class has no value, so there is no
    mean either: value None, with the reason.
    """
    truth, scores = checked(y, s)
    fold, owner = np.asarray(folds), codes(groups, len(truth))
    options, measures = (replicates, seed, level), _measures(min_tpr)
    names = np.unique(fold)
    if not (single := [f for f in names if len(np.unique(truth[fold == f])) == 1]):
        each, mean = mean_figures(parts_of(truth, scores, owner, fold), measures, *options)
        return [dict(zip(MEASURES, one, strict=True)) for one in each], dict(zip(MEASURES, mean, strict=True))

    def missing(here: NDArray[np.bool_], reason: str) -> dict[str, Figure]:
        about = {"clusters": len(np.unique(owner[here])), "malignant": int(truth[here].sum())}
        return dict.fromkeys(MEASURES, Figure.missing(reason, level=level, **about))

    alone = []
    for i, f in enumerate(names):
        here = fold == f
        if f in single:
            alone.append(missing(here, f"all its lesions are {'malignant' if truth[here].any() else 'benign'}"))
            continue
        found = figures(Patients(truth[here], [scores[here]], owner[here]), measures, replicates, seed + i, level)
        alone.append(dict(zip(MEASURES, found, strict=True)))
    return alone, missing(fold == fold, f"{len(single)} of {len(names)} folds have one class only")


def _measures(min_tpr: float) -> list[Measure]:
    return list((MEASURES | {"pauc": partial_area(min_tpr)}).values())


def span_of(min_tpr: float) -> dict[str, float]:
    """What a partial area above `min_tpr` lies between: `maximum`, and `chance` for a random order."""
    return {"min_tpr": min_tpr, "maximum": round(1 - min_tpr, 12), "chance": round((1 - min_tpr) ** 2 / 2, 12)}
