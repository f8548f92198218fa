"""The competition's second metric with its interval: malignant lesions among their patient's 15 highest scores."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lesionflow.evaluation.intervals import Figure
from lesionflow.evaluation.metrics import TOP_K, Floats, Ints, retrieved
from lesionflow.evaluation.rates import proportion


def retrieval(
    y: Ints, s: Floats, groups: Ints, known: NDArray[np.bool_], *, replicates: int, level: float
) -> dict[str, Any]:
    """Top-15 retrieval over the known patients: a lesion that is its own group would always be found.

    y, s, groups [n], known bool [n]: whether the lesion's patient is known. A figure with `k`, `patients` (with a
    malignant lesion), `malignant`, `lesions` and `patients_with_k_lesions_or_fewer`, in whom nothing can be missed;
    without a value where that holds for every patient with a malignant lesion.
    """
    truth, owner = y[known], groups[known]
    size = np.bincount(owner) if len(owner) else np.zeros(0, int)
    about = {
        "k": TOP_K, "patients": len(np.unique(owner[truth == 1])), "malignant": int(truth.sum()),
        "lesions": len(truth), "patients_with_k_lesions_or_fewer": int(((size > 0) & (size <= TOP_K)).sum()),
    }  # fmt: skip
    reason = None
    if not len(truth):
        reason = "the patient of no lesion is known"
    elif not truth.any() or truth.all():
        reason = "known patients lack malignant or benign lesions"
    elif size[owner[truth == 1]].max() <= TOP_K:
        reason = f"no patient with a malignant lesion has more than {TOP_K} lesions, so none can be missed"
    if reason:
        clusters = len(np.unique(owner))
        return about | Figure.missing(reason, level=level, clusters=clusters, malignant=about["malignant"]).to_dict()
    found = retrieved(truth, s[known], owner)
    return about | proportion(found, owner[truth == 1], level=level, replicates=replicates).to_dict()
