"""Two scores of the same lesions, compared on the same draws of patients."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from lesionflow.evaluation.intervals import FEWEST_MALIGNANT, Interval
from lesionflow.evaluation.metrics import MIN_TPR, Groups
from lesionflow.evaluation.resample import Patients

METHOD = "patient-clustered paired bootstrap, percentile"


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
    """pAUC of `s_a` minus that of `s_b`, two scores of the same lesions, on the same replicates.

    `p_better` is the share of replicates in which a is ahead (draws count half); it and the percentile
    interval are None, with the reason, under 20 malignant lesions.
    """
    patients = Patients(y, [s_a, s_b], groups)
    a, b = (float(t.value(patients.everyone(), min_tpr)[0]) for t in patients.tables)
    result = {"difference": a - b, "a": a, "b": b, "min_tpr": min_tpr, "p_better": None}
    clusters, malignant = patients.groups, patients.malignant
    if malignant < FEWEST_MALIGNANT:
        reason = f"{malignant} malignant lesions: under {FEWEST_MALIGNANT}, no interval is worth printing"
        return result | Interval(None, None, level, METHOD, 0, 0, clusters, malignant, reason).to_dict()
    drawn = [[t.value(w, min_tpr) for t in patients.tables] for w in patients.draws(replicates, seed)]
    gap = np.concatenate([first - second for first, second in drawn])
    gap = gap[np.isfinite(gap)]
    low, high = np.quantile(gap, [(1 - level) / 2, (1 + level) / 2])
    ahead = float(np.mean(gap > 0) + np.mean(gap == 0) / 2)
    interval = Interval(float(low), float(high), level, METHOD, replicates, replicates - len(gap), clusters, malignant)
    return result | interval.to_dict() | {"p_better": ahead}
