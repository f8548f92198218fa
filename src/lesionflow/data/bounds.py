"""What can be known of a synthetic lesion, and so the best pAUC that any model can reach.

Signature and deviation are independent normals with variances `SIGNATURE_VARIANCE` and 1 per
trait, so a single lesion gives away E[deviation | look] = look / (1 + v), and a patient with n
lesions E = look - v sum(looks) / (1 + n v), leaving the variance v / (1 + n v).

**The best ranking with the information S** is P(y = 1 | S). Write the log-odds as K + R, K the
part's conditional mean given S and R the rest. Where R is independent of S (every part that S does
not show, and normal residuals of constant variance), P(y = 1 | S) = E[sigmoid(K + R)] rises
strictly with K: the sum of the known parts ranks as well as the posterior itself. Where R's
variance differs between rows (patients with few lesions, blank cells) `posterior` integrates it
out, with a normal standing in for the discrete effects behind blank cells.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from lesionflow.data.cohort import (
    AGE_MEAN,
    AGE_SD,
    AGE_WEIGHT,
    MALE_SHARE,
    NEVUS_WEIGHT,
    SEX_WEIGHTS,
    SIGNATURE_VARIANCE,
    SITE_SHARES,
    SITE_WEIGHTS,
    STRUCTURE_WEIGHT,
    TRAIT_WEIGHTS,
    Cohort,
    Flags,
    Floats,
    sigmoid,
)

Information = Literal["images", "metadata", "patient_context", "all"]
Bounds = dict[Information, float]
INFORMATION: tuple[Information, ...] = ("images", "metadata", "patient_context", "all")
_NODES, _NODE_WEIGHTS = np.polynomial.hermite_e.hermegauss(16)


def posterior(cohort: Cohort, information: Information) -> Floats:
    """P(y = 1 | information) of every lesion, float64 [lesions].

    `images`: structure and look of the one crop. `metadata`: its own row. `patient_context`: its row and
    the rows of all the patient's lesions in the set. `all`: these and the crop.
    """
    v, weights = SIGNATURE_VARIANCE, np.asarray(TRAIT_WEIGHTS)
    look, squared = cohort.look @ weights, float(weights @ weights)
    if information in ("patient_context", "all"):
        n = np.bincount(cohort.patient, minlength=len(cohort.age))
        totals = np.bincount(cohort.patient, weights=look, minlength=len(cohort.age))
        known = look - (v * totals / (1 + n * v))[cohort.patient]
        unknown = (squared * v / (1 + n * v))[cohort.patient]
    else:
        known = look / (1 + v)
        unknown = np.full(len(look), squared * v / (1 + v))
    if information in ("images", "all"):
        known = known + STRUCTURE_WEIGHT * cohort.structure
    else:
        unknown = unknown + STRUCTURE_WEIGHT**2
    blind = information == "images"
    if blind:
        unknown = unknown + NEVUS_WEIGHT**2
    else:
        known = known + NEVUS_WEIGHT * cohort.nevus
    patient = cohort.patient
    sex, site = np.asarray(SEX_WEIGHTS), np.asarray(SITE_WEIGHTS)
    sex_shares, site_shares = np.array([1 - MALE_SHARE, MALE_SHARE]), np.asarray(SITE_SHARES)
    for effect, blank, mean, variance in (
        (AGE_WEIGHT * (cohort.age[patient] - AGE_MEAN), cohort.age_blank[patient], 0.0, (AGE_WEIGHT * AGE_SD) ** 2),
        (sex[cohort.male[patient].astype(int)], cohort.sex_blank[patient], *_moments(sex, sex_shares)),
        (site[cohort.site], cohort.site_blank, *_moments(site, site_shares)),
    ):
        hidden = np.ones(len(effect), bool) if blind else blank
        known = known + np.where(hidden, mean, effect)
        unknown = unknown + np.where(hidden, variance, 0.0)
    spread = np.sqrt(unknown)
    total = np.zeros(len(known))
    for node, node_weight in zip(_NODES, _NODE_WEIGHTS / _NODE_WEIGHTS.sum(), strict=True):
        total += node_weight * sigmoid(cohort.intercept + known + node * spread)
    return total


def weighted_pauc(malignant: Floats, benign: Floats, score: Floats, min_tpr: float = 0.8) -> float:
    """Partial AUC above `min_tpr` where every row counts `malignant` as a case and `benign` as a control.

    With 0/1 weights this is the competition's metric; with p and 1 - p it is the curve in
    expectation over the labels, hence a score's pAUC without the luck of one draw. Ties are one diagonal.
    """
    order = np.argsort(-score, kind="stable")
    last = np.append(np.diff(score[order]) != 0, True)
    tpr = np.concatenate([[0.0], np.cumsum(malignant[order])[last]]) / malignant.sum()
    specificity = 1 - np.concatenate([[0.0], np.cumsum(benign[order])[last]]) / benign.sum()
    at = int(np.searchsorted(tpr, min_tpr, side="left"))
    # The first point at or above min_tpr; the segment that crosses it is cut there.
    rise = tpr[at] - tpr[at - 1]
    share = (min_tpr - tpr[at - 1]) / rise if rise > 0 else 1.0
    cut = specificity[at - 1] + share * (specificity[at] - specificity[at - 1])
    x, y = np.append(min_tpr, tpr[at:]), np.append(cut, specificity[at:])
    return float(np.sum(np.diff(x) * (y[1:] + y[:-1]) / 2))


def best_pauc(cohort: Cohort, rows: Flags, *, images_tell: bool = True) -> tuple[Bounds, Bounds]:
    """What no model can beat but by luck, by information: in expectation over the labels, and on the labels drawn.

    Without `images_tell` (images repeated at random) a crop carries nothing.
    """
    p, y = cohort.probability[rows], cohort.target[rows].astype(np.float64)
    expected: Bounds = {}
    realised: Bounds = {}
    for information in INFORMATION:
        score = posterior(cohort, information if images_tell or information != "all" else "patient_context")[rows]
        if information == "images" and not images_tell:
            score = np.zeros_like(score)
        expected[information] = round(weighted_pauc(p, 1 - p, score), 6)
        realised[information] = round(weighted_pauc(y, 1 - y, score), 6)
    return expected, realised


def _moments(effects: Floats, shares: Floats) -> tuple[float, float]:
    mean = float(effects @ shares)
    return mean, float((effects - mean) ** 2 @ shares)
