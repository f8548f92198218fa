"""What each way to score a lesion is worth, and what each part adds to the others.

A visit gives a picture, or metadata, or both, of one lesion or of several. Each way of answering, a *mode*, has its own
scores in the out-of-fold and the hold-out table (`<mode>_logit`), and here gets its own figures, its own line from
log-odds to probability and its own thresholds: an answer from less is never given the promises of one from more.

Modes are compared on the same lesions and the same draws of patients, so that what they have in common cancels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lesionflow.errors import DataError
from lesionflow.evaluation import calibration
from lesionflow.evaluation.intervals import Figure
from lesionflow.evaluation.metrics import Floats, Ints
from lesionflow.evaluation.paired import Pair, compare_several
from lesionflow.evaluation.ranking import MEASURES
from lesionflow.evaluation.rates import rate
from lesionflow.evaluation.thresholds import choose_bands
from lesionflow.recipe import MODES, Evaluation

if TYPE_CHECKING:
    import polars as pl

NO_HOLDOUT = "no patients were set aside (folds.holdout = 0), so nothing that is served was tried on unseen patients"
_FIGURES = ("pauc", "auc")
_STEPS = (
    # what is added, to which mode, giving which
    ("record", "image", "image_record"),
    ("context", "image_record", "image_visit"),
    ("image", "visit", "image_visit"),
    ("image", "record", "image_record"),
    ("context", "record", "visit"),
)


@dataclass(frozen=True)
class Scored:
    """Lesions with the scores of every mode, of the folds or of the hold-out."""

    table: pl.DataFrame
    """With `<mode>_logit`, and `logit`, the scores that are served."""
    y: Ints
    groups: Ints
    """The patient of each lesion, int64 [n]."""
    rank: Callable[[Floats], Floats]
    """What makes scores of several folds comparable; the identity where one model made them all."""
    judged: NDArray[np.bool_]
    """Whether the picture can be judged, bool [n]."""


def modes_of(table: pl.DataFrame) -> tuple[str, ...]:
    """The modes that a table of scores has columns for, from least to most; none where pictures are all there is."""
    found = tuple(mode for mode in MODES if f"{mode}_logit" in table.columns)
    return found if len(found) > 1 else ()


def modes(
    oof: Scored,
    holdout: Scored | None,
    options: Evaluation,
    *,
    margin: float = 0.0,
    level: float = 0.95,
) -> dict[str, Any]:
    """{"served": mode, "each": {mode: figures}, "adds": [what a part adds]}; see docs/metrics.md. JSON-able.

    Each mode has `out_of_fold` and `holdout`: `pauc` and `auc` as figures, or the reason; `difference`, its pAUC minus
    that of what is served, on both (None for the served mode itself); `probability`, from log-odds, fitted on the
    hold-out, or out of fold without one; `thresholds` as `thresholds.choose_bands` gives them, lowered by `margin`,
    None without a hold-out. The served mode's scores are the column `logit`: a lesion that lacks what the mode takes is
    scored as service would. Raises `DataError` naming the column for scores that are missing.
    """
    names = modes_of(oof.table)
    served = names[-1]
    scores = {"out_of_fold": _scores(oof, names, "oof")}
    parts = {"out_of_fold": oof}
    if holdout is not None:
        scores["holdout"], parts["holdout"] = _scores(holdout, names, "holdout"), holdout
    drawing: dict[str, Any] = {"replicates": options.replicates, "seed": options.seed, "level": level}
    pairs = _pairs(names, served)
    measured = {
        where: compare_several(
            part.y,
            {name: part.rank(s) for name, s in scores[where].items()},
            part.groups,
            [MEASURES[name] for name in _FIGURES],
            pairs,
            **drawing,
        )
        for where, part in parts.items()
    }
    alone = {where: found[0] for where, found in measured.items()}
    between = {where: found[1] for where, found in measured.items()}
    best = max(_parts(names), key=lambda name: alone["out_of_fold"][name][0].value or 0.0)
    each = {
        name: {
            **{where: _figures(alone.get(where, {}).get(name)) for where in ("out_of_fold", "holdout")},
            "difference": None if name == served else _both(between, (name, served)),
            **_fitted(name, scores, parts, options, margin, level),
        }
        for name in names
    }
    # Naming the better part by the same lesions flatters that part, so what joining adds isn't overstated.
    steps = [*_steps(names), *([("stack", best, served)] if len(_parts(names)) > 1 else [])]
    adds = [
        {"block": block, "from": before, "to": after, **_both(between, (after, before))}
        for block, before, after in steps
    ]
    return {"served": served, "each": each, "adds": adds}


def with_specificity(
    threshold: Mapping[str, Any], y: Ints, groups: Ints, referred: NDArray[np.bool_], **resampling: Any
) -> dict[str, Any]:
    """A threshold whose specificity has its interval; its sensitivity has its bound."""
    benign = y == 0
    found = rate(~referred[benign], np.ones(benign.sum()), groups[benign], malignant=0, fewest=0, **resampling)
    return {name: value for name, value in threshold.items() if name != "referred"} | {"specificity": found.to_dict()}


def _scores(part: Scored, names: Sequence[str], what: str) -> dict[str, Floats]:
    """Log-odds of each mode, float64 [n]; the last is what is served."""
    result = {}
    for name in names:
        column = "logit" if name == names[-1] else f"{name}_logit"
        if column not in part.table.columns:
            raise DataError(f"{what}: no column {column}, which the folds have; gather the scores again")
        values = part.table[column].cast(float).to_numpy()
        if (odd := np.flatnonzero(~np.isfinite(values))).size:
            raise DataError(
                f"{what}: {column} is empty, NaN or infinite for {odd.size} lesions (such as "
                f"{part.table['isic_id'][int(odd[0])]}); gather the scores again"
            )
        result[name] = values.astype(np.float64)
    return result


def _steps(names: Sequence[str]) -> list[tuple[str, str, str]]:
    """What of `_STEPS` these modes have; the picture is added to the most that metadata alone gives."""
    found = [one for one in _STEPS if one[1] in names and one[2] in names]
    return [one for one in found if one != ("image", "record", "image_record") or "image_visit" not in names]


def _parts(names: Sequence[str]) -> list[str]:
    """The picture, and the most that metadata alone gives."""
    return [name for name in ("image", "visit" if "visit" in names else "record") if name in names]


def _pairs(names: Sequence[str], served: str) -> list[tuple[str, str]]:
    """What is served against each mode, and what each part adds: (a, b) for a - b, each once."""
    wanted = [(served, name) for name in names if name != served]
    return list(dict.fromkeys(wanted + [(after, before) for _, before, after in _steps(names)]))


def _figures(found: Sequence[Figure] | None) -> dict[str, Any]:
    if found is None:
        return {"reason": NO_HOLDOUT}
    return {name: one.to_dict() for name, one in zip(_FIGURES, found, strict=True)}


def _both(between: Mapping[str, Mapping[tuple[str, str], Pair]], pair: tuple[str, str]) -> dict[str, Any]:
    return {where: _difference(between.get(where), pair) for where in ("out_of_fold", "holdout")}


def _difference(found: Mapping[tuple[str, str], Pair] | None, pair: tuple[str, str]) -> dict[str, Any]:
    if found is None:
        return {"reason": NO_HOLDOUT}
    if pair in found:
        return found[pair].difference.to_dict() | {"p_better": found[pair].p_better}
    # b - a, with its interval turned round.
    one, (low, high) = found[pair[::-1]], ("low", "high")
    result, better = one.difference.to_dict(), one.p_better
    ends = {
        name: None if result["interval"][of] is None else -result["interval"][of]
        for name, of in ((low, high), (high, low))
    }
    return {
        "value": -(one.difference.value or 0.0),
        "interval": result["interval"] | ends,
        "p_better": None if better is None else 1 - better,
    }


def _fitted(
    name: str,
    scores: Mapping[str, Mapping[str, Floats]],
    parts: Mapping[str, Scored],
    options: Evaluation,
    margin: float,
    level: float,
) -> dict[str, Any]:
    """How this mode's log-odds become a probability and a band."""
    on = "holdout" if "holdout" in parts else "out_of_fold"
    part, s = parts[on], scores[on][name]
    fitted = calibration.fit(s, part.y, prevalence=options.prevalence, groups=part.groups).to_dict()
    fitted |= {"fitted_on": "holdout" if on == "holdout" else "out-of-fold"}
    if on != "holdout":
        return {"probability": fitted, "thresholds": None}
    # A picture that can't be judged is missed by whatever looks at it, and by nothing else.
    judged = part.judged if "image" in name else np.ones(len(s), bool)
    bands = choose_bands(
        part.y, s, part.groups,
        sensitivity=options.sensitivity, low_sensitivity=options.low_sensitivity,
        prevalence=options.prevalence, level=level, judged=judged,
    )  # fmt: skip
    resampling = {"replicates": options.replicates, "level": level, "seed": options.seed}
    thresholds = {}
    for band, one in bands.items():
        logit = one["logit"] - margin
        referred = judged & (s >= logit)
        thresholds[band] = with_specificity(one | {"logit": logit}, part.y, part.groups, referred, **resampling)
    return {"probability": fitted, "thresholds": thresholds}
