"""The competition's metric and its neighbours, exactly, with numpy alone.

    pauc(y, s)                 partial area above 80 % sensitivity, 0 to 0.2; a coin gives 0.02
    pauc(y, s, min_tpr=0.88)   the same above 88 % (the official sample's bound)

Only the order of the malignant scores among the benign ones matters, so everything starts from one
small table, `Order`: for each distinct malignant score, how many lesions of either class lie there
and between. Scores become float64 first and are never turned round as `1 - s`, which would merge tiny
probabilities. Tied scores are one diagonal of the ROC curve. No result depends on the order of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lesionflow.errors import DataError, UsageError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Groups = Sequence[Any] | NDArray[Any]

MIN_TPR = 0.80
"""Sensitivity above which the competition's leaderboard measures the area."""
TOP_K = 15


@dataclass(frozen=True)
class Order:
    """Where the lesions lie relative to the K distinct malignant scores, ascending.

    Cell 2k+1 holds what is tied with malignant score k, cell 2k what lies strictly between its neighbours.
    """

    malignant_at: Ints
    """int64 [P]: index 0..K-1 of each malignant lesion's score, in row order."""
    benign_cell: Ints
    """int64 [N]: cell 0..2K of each benign lesion, in row order."""
    size: int
    """K, the number of distinct malignant scores."""


def pauc(y: ArrayLike, s: ArrayLike, min_tpr: float = MIN_TPR) -> float:
    """Partial area under the ROC curve where the sensitivity is at least `min_tpr`.

    y [n]: 1 malignant, 0 benign; s [n]: higher is more suspicious, any finite numbers.
    Result in 0 .. 1 - min_tpr: the integral of 1 - FPR over TPR from `min_tpr` to 1, the ROC's points
    joined by straight lines. Formula: the ISIC 2024 challenge, equal to scikit-learn's
    `roc_auc_score(1 - y, -s, max_fpr=1 - min_tpr)` before its McClish correction.

    Raises `DataError` for NaN, infinities, targets other than 0 and 1, or a single class.
    """
    order = order_of(*checked(y, s))
    benign = np.bincount(order.benign_cell, minlength=2 * order.size + 1)
    malignant = np.bincount(order.malignant_at, minlength=order.size)
    return float(area(benign[None], malignant[None], min_tpr)[0])


def auc(y: ArrayLike, s: ArrayLike) -> float:
    """Area under the whole ROC curve, 0 to 1, ties counting one half. Raises as `pauc` does."""
    return pauc(y, s, min_tpr=0.0)


def order_of(y: NDArray[np.bool_], s: Floats) -> Order:
    """The `Order` of checked targets bool [n] and scores float64 [n]."""
    distinct, at = np.unique(s[y], return_inverse=True)
    benign = s[~y]
    left, right = np.searchsorted(distinct, benign, "left"), np.searchsorted(distinct, benign, "right")
    return Order(at.astype(np.int64), (left + right).astype(np.int64), len(distinct))


@dataclass(frozen=True)
class Segments:
    """The rises of R ROC curves at K malignant scores each, highest score first; all float64 [R, K] but `cut`."""

    fpr_start: Floats
    fpr_end: Floats
    """False-positive rate where the rise begins and ends; they differ where benign lesions tie."""
    width: Floats
    """How much of the rise lies above `min_tpr`."""
    kept: Floats
    """The same as a share of the rise, 0 to 1."""
    cut: NDArray[np.bool_]
    """Whether the curve passes `min_tpr` here."""

    @property
    def specificity(self) -> Floats:
        """Mean specificity over the part that is kept."""
        return 1.0 - self.fpr_end + 0.5 * self.kept * (self.fpr_end - self.fpr_start)


def segments(benign: NDArray[Any], malignant: NDArray[Any], min_tpr: float) -> Segments:
    """Rises of the curves whose weights are [R, 2K+1] per benign cell and [R, K] per malignant score."""
    if not 0 <= min_tpr < 1:
        raise UsageError(f"min_tpr must be at least 0 and less than 1, got {min_tpr}")
    found = np.cumsum(malignant[:, ::-1], axis=1, dtype=np.float64)
    passed = np.cumsum(benign[:, :0:-1], axis=1, dtype=np.float64)
    total = passed[:, -1:] + benign[:, :1]
    tpr = found / found[:, -1:]
    start = np.concatenate([np.zeros_like(tpr[:, :1]), tpr[:, :-1]], axis=1)
    width = np.maximum(tpr - np.maximum(start, min_tpr), 0.0)
    kept = np.divide(width, tpr - start, out=np.ones_like(tpr), where=tpr > start)
    cut = (start <= min_tpr) & (tpr > min_tpr)
    return Segments(passed[:, 0::2] / total, passed[:, 1::2] / total, width, kept, cut)


def area(benign: NDArray[Any], malignant: NDArray[Any], min_tpr: float) -> Floats:
    """pAUC of many samples at once: weights [R, 2K+1] per benign cell and [R, K] per malignant score -> float64 [R].

    A row without malignant or without benign weight gives NaN.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        curve = segments(benign, malignant, min_tpr)
    result: Floats = (curve.width * curve.specificity).sum(axis=1)
    result[(malignant.sum(axis=1) <= 0) | (benign.sum(axis=1) <= 0)] = np.nan
    return result


def roc_points(y: ArrayLike, s: ArrayLike) -> tuple[Floats, Floats]:
    """(FPR, TPR), float64 [d+1] each: from (0, 0), one point per distinct score, highest first, to (1, 1)."""
    positives, negatives = _steps(y, s)
    return negatives / negatives[-1], positives / positives[-1]


def average_precision(y: ArrayLike, s: ArrayLike) -> float:
    """Sum over distinct scores of the rise in recall times the precision there; no interpolation."""
    positives, negatives = _steps(y, s)
    precision = positives[1:] / (positives[1:] + negatives[1:])
    return float(np.sum(np.diff(positives) * precision) / positives[-1])


def brier(y: ArrayLike, p: ArrayLike) -> float:
    """Mean squared error of probabilities p [n]. Raises `DataError` for a p outside 0..1."""
    return float(np.mean(squared_errors(y, p)))


def log_loss(y: ArrayLike, p: ArrayLike) -> float:
    """Mean negative log likelihood, nats, of probabilities p [n], kept 1e-15 away from 0 and 1."""
    return float(np.mean(log_losses(y, p)))


def squared_errors(y: ArrayLike, p: ArrayLike) -> Floats:
    """Of probabilities p [n], float64 [n]; their mean is the Brier score."""
    truth, probability = _probabilities(y, p)
    errors: Floats = (probability - truth) ** 2
    return errors


def log_losses(y: ArrayLike, p: ArrayLike) -> Floats:
    """Negative log likelihood of each lesion, nats, float64 [n]; its mean is the log loss."""
    truth, probability = _probabilities(y, p)
    safe = np.clip(probability, 1e-15, 1 - 1e-15)
    losses: Floats = -np.where(truth, np.log(safe), np.log1p(-safe))
    return losses


def top_k_retrieval(y: ArrayLike, s: ArrayLike, patients: Groups, k: int = TOP_K) -> float:
    """Share of malignant lesions that are among their own patient's `k` highest scores; `retrieved` says which."""
    return float(retrieved(y, s, patients, k).mean())


def retrieved(y: ArrayLike, s: ArrayLike, patients: Groups, k: int = TOP_K) -> NDArray[np.bool_]:
    """Whether each malignant lesion is among its own patient's `k` highest scores: bool [P], in row order.

    Ties are broken pessimistically: tied benign lesions take the places first, so the order of rows can't help.
    """
    malignant, scores = checked(y, s)
    owner = codes(patients, len(scores))
    ranked = np.lexsort((malignant, -scores, owner))
    sorted_owner = owner[ranked]
    place = np.empty(len(ranked), np.int64)
    place[ranked] = np.arange(len(ranked)) - np.searchsorted(sorted_owner, sorted_owner, "left")
    found: NDArray[np.bool_] = place[malignant] < k
    return found


def fold_rank(scores: ArrayLike, folds: ArrayLike) -> Floats:
    """Each score's mid-rank within its own fold, (rank - 1/2) / size, in (0, 1): float64 [n].

    Folds come from different models whose scales differ; ranks make them comparable before pooling.
    """
    values, fold = _numbers(scores, "scores"), np.asarray(folds)
    if fold.shape != values.shape:
        raise DataError(f"folds: {fold.size} values for {values.size} scores; they must match row by row")
    result = np.empty_like(values)
    for one in np.unique(fold):
        here = fold == one
        _, at, count = np.unique(values[here], return_inverse=True, return_counts=True)
        result[here] = (np.cumsum(count) - count / 2)[at] / here.sum()
    return result


def placement(scores: ArrayLike, folds: ArrayLike, y: ArrayLike) -> Floats:
    """Each score's place among the benign lesions of its fold, 0..1: float64 [n].

    The share of them that score lower, ties counting one half. Unlike `fold_rank` it doesn't depend on how many
    malignant lesions a fold has, so it compares across folds of any prevalence (Pepe's placement values).
    """
    malignant, values = checked(y, scores)
    fold = np.asarray(folds)
    result = np.empty_like(values)
    for one in np.unique(fold):
        here = fold == one
        benign = np.sort(values[here & ~malignant])
        if not len(benign):
            raise DataError(f"fold {one}: has no benign lesion to place scores among; split again")
        lower, upper = (np.searchsorted(benign, values[here], side) for side in ("left", "right"))
        result[here] = (lower + upper) / (2 * len(benign))
    return result


def codes(groups: Groups, length: int) -> Ints:
    """Groups (text or whole numbers) as integers 0..G-1 in their sorted order: int64 [n]."""
    if isinstance(groups, np.ndarray) and groups.dtype.kind in "iu" and len(groups) == length:
        if length and groups.min() >= 0 and groups.max() < 4 * length:
            return (np.cumsum(np.bincount(groups) > 0) - 1)[groups]  # As below, without a sort.
        return np.unique(groups, return_inverse=True)[1].astype(np.int64)
    values = groups.tolist() if isinstance(groups, np.ndarray) else list(groups)
    if len(values) != length:
        raise DataError(f"groups: {len(values)} values for {length} lesions; they must match row by row")
    known = dict.fromkeys(values)
    if None in known:
        raise DataError(
            f"groups: row {values.index(None)} has none; give a lesion of an unknown patient its own isic_id"
        )
    # Sorted, so that replicates are the same whatever the order of rows.
    code = {value: i for i, value in enumerate(sorted(known))}
    return np.fromiter(map(code.__getitem__, values), np.int64, length)


def checked(y: ArrayLike, s: ArrayLike) -> tuple[NDArray[np.bool_], Floats]:
    """Targets as bool [n] and scores as float64 [n], or a `DataError` that says what is wrong with them."""
    truth, scores = _targets(y), _numbers(s, "scores")
    if truth.shape != scores.shape:
        raise DataError(f"{truth.size} targets for {scores.size} scores; they must match row by row")
    if truth.all() or not truth.any():
        kind = "no lesions" if not truth.size else "malignant" if truth.all() else "benign"
        what = kind if kind == "no lesions" else f"all {truth.size} lesions are {kind}"
        raise DataError(f"targets: {what}; a ROC curve needs both classes, so score a set that has both")
    return truth, scores


def _steps(y: ArrayLike, s: ArrayLike) -> tuple[Floats, Floats]:
    """Cumulative malignant and benign counts per distinct score, highest first, starting at zero."""
    truth, scores = checked(y, s)
    order = np.argsort(-scores)
    ordered = scores[order]
    last = np.append(np.nonzero(ordered[1:] != ordered[:-1])[0], len(ordered) - 1)
    positives = np.cumsum(truth[order], dtype=np.float64)[last]
    negatives = (last + 1) - positives
    return np.insert(positives, 0, 0.0), np.insert(negatives, 0, 0.0)


def _targets(y: ArrayLike) -> NDArray[np.bool_]:
    values = _numbers(y, "targets")
    if (odd := np.nonzero((values != 0) & (values != 1))[0]).size:
        raise DataError(f"targets: row {odd[0]} is {values[odd[0]]:g}; expected 1 (malignant) or 0 (benign)")
    return np.equal(values, 1)


def _probabilities(y: ArrayLike, p: ArrayLike) -> tuple[NDArray[np.bool_], Floats]:
    truth, probability = _targets(y), _numbers(p, "probabilities")
    if truth.shape != probability.shape or not truth.size:
        raise DataError(f"{truth.size} targets for {probability.size} probabilities; they must match row by row")
    if (odd := np.nonzero((probability < 0) | (probability > 1))[0]).size:
        raise DataError(f"probabilities: row {odd[0]} is {probability[odd[0]]:g}; expected 0 to 1, so not a logit")
    return truth, probability


def _numbers(values: ArrayLike, what: str) -> Floats:
    try:
        array = np.asarray(values).astype(np.float64)
    except (TypeError, ValueError):
        raise DataError(f"{what}: not all numbers; remove or convert the text") from None
    if array.ndim != 1:
        raise DataError(f"{what}: shape {array.shape}; expected one value per lesion")
    if (bad := np.nonzero(~np.isfinite(array))[0]).size:
        rows = ", ".join(str(i) for i in bad[:5])
        raise DataError(
            f"{what}: {bad.size} of {array.size} are NaN or infinite, first at row {rows}; score them again"
        )
    return array
