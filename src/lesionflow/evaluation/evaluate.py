"""From predictions to metrics.json: every figure with its interval, or the reason why it has none.

Two tables are read. The out-of-fold one has each lesion once, scored by a model that never saw its patient;
folds are different models whose scales differ, so there is no one pAUC of it, and all are given: each fold's,
their mean, that of the pooled logits, and that of the logits ranked within their fold and then pooled. The
last is the headline: it uses every malignant lesion and forgives only a shift of scale. Ranks compare only
where folds hold the same share of malignant lesions; for a split by institution the mean of folds is quoted.

The hold-out has the patients that no fold's model saw, scored by the mean of all of them: what is served. So
what goes with the served model (its probabilities, its thresholds and bands) is fitted and vouched for there.
The schema is described in docs/metrics.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from lesionflow.data.folds import HOLDOUT
from lesionflow.errors import DataError
from lesionflow.evaluation import calibration, metrics
from lesionflow.evaluation.decision import decision_curve
from lesionflow.evaluation.grouping import describe
from lesionflow.evaluation.intervals import Figure
from lesionflow.evaluation.metrics import Floats, Ints
from lesionflow.evaluation.modes import NO_HOLDOUT, Scored, modes, modes_of, with_specificity
from lesionflow.evaluation.prevalence import linearised, pulls, weights
from lesionflow.evaluation.ranking import MEASURES, by_fold, ranking, span_of
from lesionflow.evaluation.rates import rate
from lesionflow.evaluation.retrieval import retrieval
from lesionflow.evaluation.subgroups import subgroups
from lesionflow.evaluation.thresholds import band_of, choose_bands, choose_threshold
from lesionflow.evaluation.workload import operating
from lesionflow.progress import SCHEMA
from lesionflow.recipe import Evaluation

if TYPE_CHECKING:
    import polars as pl

COLUMNS = ("isic_id", "patient_group", "target", "fold", "logit", "fold_hash")
CANNOT_JUDGE = "cannot judge"


def evaluate(
    oof: pl.DataFrame,
    holdout: pl.DataFrame | None = None,
    options: Evaluation | None = None,
    *,
    split: Mapping[str, Any] | None = None,
    leaks: Mapping[str, Any] | None = None,
    margin: float = 0.0,
    level: float = 0.95,
) -> dict[str, Any]:
    """The content of metrics.json for an out-of-fold table and the hold-out's, with `COLUMNS` and what is known
    of the lesions (sex, age_approx, attribution, ...); the hold-out's fold is -1, its `doubts` say why a picture
    can't be judged. `split` is {kind, names, holdout}, `leaks` what was looked for. Served thresholds are lowered by
    `margin` logits, as much as the exported graph may differ, so that rounding loses no lesion. JSON-able, no NaN.

    Raises `DataError` naming the column and the first ids.
    """
    options = options or Evaluation()
    lesions = _Lesions(_checked(oof, "oof"), options, level)
    y, s, groups = lesions.y, lesions.s, lesions.groups
    institutions = split is not None and split["kind"] == "institution"

    # Ranks within a fold compare across folds of one prevalence, as patients are dealt; institutions have their own.
    def rank(scores: Floats) -> Floats:
        return metrics.placement(scores, lesions.fold, y) if institutions else metrics.fold_rank(scores, lesions.fold)

    ranks = rank(s)
    # Subgroups are compared at the highest score that finds the wanted share of all malignant lesions.
    threshold = float(np.sort(ranks[y == 1])[::-1][int(np.ceil(options.sensitivity * y.sum() - 1e-9)) - 1])
    # Subgroups are half of the work. Two threads that multiply alone beat two that share every product.
    with threadpool_limits(1), ThreadPoolExecutor(1) as pool:
        cells = pool.submit(subgroups, lesions.table, y, ranks, groups, threshold, **lesions.resampling)
        parts = pool.submit(_modes, lesions, rank, holdout, options, margin, level)
        weighted = {"prevalence": options.prevalence, **lesions.resampling}
        probability = calibration.cross_fitted(s, y, lesions.fold, prevalence=options.prevalence)
        refer = choose_threshold(y, s, groups, options.sensitivity, level=level)
        return {
            "schema": SCHEMA,
            "settings": {
                **lesions.resampling,
                "sensitivity": options.sensitivity,
                "low_sensitivity": options.low_sensitivity,
                "prevalence": options.prevalence or float(y.mean()),
            },
            **lesions.described(),
            "split": dict(split) if split else {"kind": "patient", "names": None, "holdout": 0},
            "fold_hash": str(lesions.table["fold_hash"][0]),
            "headline": "mean_of_folds" if institutions else "rank_pooled",
            **_ranking(lesions, ranks, (split or {}).get("names")),
            "retrieval": retrieval(y, ranks, groups, lesions.known, **lesions.drawing),
            "operating": operating(y, ranks, groups, lesions.known, **weighted),
            "calibration": calibration.assess(probability, y, groups, **weighted),
            "decision_curve": decision_curve(probability, y, groups, **weighted),
            "thresholds": {
                "refer": with_specificity(refer.to_dict(), y, groups, s >= refer.value, **lesions.resampling)
                | {"scale": "pooled logit"}
            },
            **_served(lesions, holdout, options, margin, level),
            "subgroup_threshold": {"sensitivity": options.sensitivity, "score": threshold},
            "subgroups": cells.result(),
            "leaks": dict(leaks) if leaks else {"reason": "not looked for"},
            **parts.result(),
        }


class _Lesions:
    """A checked table and what every figure of it needs."""

    def __init__(self, table: pl.DataFrame, options: Evaluation, level: float) -> None:
        self.table = table
        self.y: Ints = table["target"].to_numpy()
        """int8 [n], 1 malignant."""
        self.s: Floats = table["logit"].to_numpy()
        self.fold: Ints = table["fold"].to_numpy()
        self.groups = metrics.codes(table["patient_group"].to_list(), len(table))
        self.known = (table["patient_group"] != table["isic_id"]).to_numpy()
        """Whether the patient is known, bool [n]."""
        self.drawing: dict[str, Any] = {"replicates": options.replicates, "level": level}
        self.resampling: dict[str, Any] = {"replicates": options.replicates, "seed": options.seed, "level": level}

    def described(self) -> dict[str, Any]:
        """Counts, and what the groups are."""
        malignant, total, known = int(self.y.sum()), len(self.y), int(self.known.sum())
        patients = len(np.unique(self.groups[self.known]))
        return {
            "counts": {
                "lesions": total, "malignant": malignant, "benign": total - malignant,
                "folds": len(np.unique(self.fold)), "prevalence": malignant / total,
            },
            "groups": describe(patients, known, total - known).to_dict(),
        }  # fmt: skip


def _ranking(lesions: _Lesions, ranks: Floats, names: list[str] | None) -> dict[str, Any]:
    """pAUC at 0.80 and 0.88, AUC and average precision, the folds joined in three ways, and each fold's pAUC."""
    y, s, fold, groups = lesions.y, lesions.s, lesions.fold, lesions.groups
    each, mean = by_fold(y, s, groups, fold, **lesions.resampling)
    ways = {
        "rank_pooled": ranking(y, ranks, groups, **lesions.resampling),
        "pooled": ranking(y, s, groups, **lesions.resampling),
        "mean_of_folds": mean,
    }
    joined = {name: {way: found[name].to_dict() for way, found in ways.items()} for name in MEASURES}
    folds = [_fold(lesions, int(f), names, one["pauc"]) for f, one in zip(np.unique(fold), each, strict=True)]
    values = [one["value"] for one in folds if one["value"] is not None]
    joined["pauc"]["mean_of_folds"]["sd"] = float(np.std(values, ddof=1)) if len(values) == len(folds) > 1 else None
    return {
        "pauc": {**span_of(0.8), **joined["pauc"], "folds": folds},
        "pauc_88": {**span_of(0.88), **joined["pauc_88"]},
        "auc": joined["auc"],
        "average_precision": {"chance": float(y.mean()), **joined["average_precision"]},
    }


def _fold(lesions: _Lesions, fold: int, names: list[str] | None, figure: Figure) -> dict[str, Any]:
    here = lesions.fold == fold
    return {
        "fold": fold, "name": names[fold] if names and fold < len(names) else None,
        "lesions": int(here.sum()), "malignant": int(lesions.y[here].sum()),
        "groups": len(np.unique(lesions.groups[here])),
    } | figure.to_dict()  # fmt: skip


def _served(
    oof: _Lesions, holdout: pl.DataFrame | None, options: Evaluation, margin: float, level: float
) -> dict[str, Any]:
    """`probability`, how a served logit becomes one, and `served`, what is known of the combination that is served."""
    if holdout is None:
        fitted = calibration.fit(oof.s, oof.y, prevalence=options.prevalence, groups=oof.groups)
        return {"probability": fitted.to_dict() | {"fitted_on": "out-of-fold"}, "served": {"reason": NO_HOLDOUT}}
    here = _Lesions(_checked(holdout, "holdout"), options, level)
    _held_apart(here.table, oof.table)
    y, s, groups, doubtful = here.y, here.s, here.groups, _doubtful(here.table)
    fitted = calibration.fit(s, y, prevalence=options.prevalence, groups=groups)
    parts = calibration.patient_parts(groups, seed=options.seed, y=y)
    probability = calibration.cross_fitted(s, y, parts, prevalence=options.prevalence)
    # A lesion that can't be judged isn't referred by the model: whoever vouches for it must count it as missed.
    bands = choose_bands(
        y, s, groups,
        sensitivity=options.sensitivity, low_sensitivity=options.low_sensitivity,
        prevalence=options.prevalence, level=level, judged=~doubtful,
    )  # fmt: skip
    bands = {name: one | {"logit": one["logit"] - margin} for name, one in bands.items()}
    bands = {
        name: with_specificity(one, y, groups, ~doubtful & (s >= one["logit"]), **here.resampling)
        for name, one in bands.items()
    }
    weighted = {"prevalence": options.prevalence, **here.resampling}
    return {
        "probability": fitted.to_dict() | {"fitted_on": "holdout"},
        "served": {
            **here.described(),
            **{name: one.to_dict() for name, one in ranking(y, s, groups, **here.resampling).items()},
            "retrieval": retrieval(y, s, groups, here.known, **here.drawing),
            "operating": operating(y, s, groups, here.known, **weighted),
            "calibration": calibration.assess(probability, y, groups, **weighted),
            "decision_curve": decision_curve(probability, y, groups, **weighted),
            "thresholds": bands,
            "bands": _bands(here, doubtful, bands, fitted.prevalence, drawn=not options.prevalence),
        },
    }


def _modes(
    oof: _Lesions,
    rank: Callable[[Floats], Floats],
    holdout: pl.DataFrame | None,
    options: Evaluation,
    margin: float,
    level: float,
) -> dict[str, Any]:
    """`modes`, where the run has more than one way to score a lesion."""
    if not modes_of(oof.table):
        return {}
    folds = Scored(oof.table, oof.y, oof.groups, rank, np.ones(len(oof.y), bool))
    held = None
    if holdout is not None:
        here = _Lesions(_checked(holdout, "holdout"), options, level)
        held = Scored(here.table, here.y, here.groups, lambda scores: scores, ~_doubtful(here.table))
    return {"modes": modes(folds, held, options, margin=margin, level=level)}


def _held_apart(holdout: pl.DataFrame, oof: pl.DataFrame) -> None:
    """Refuse a hold-out that isn't one: of this split, under fold -1, and with no lesion or patient of a fold."""
    if (holdout["fold"] != HOLDOUT).any() or (oof["fold"] == HOLDOUT).any():
        raise DataError(f"holdout: its fold is {HOLDOUT}, and no lesion of a fold has that; gather the scores again")
    if holdout["fold_hash"][0] != oof["fold_hash"][0]:
        raise DataError("holdout: of another split than the folds' (fold_hash); gather the scores again")
    for column, what in (("isic_id", "lesions"), ("patient_group", "patients")):
        if shared := sorted(set(holdout[column]) & set(oof[column])):
            raise DataError(
                f"holdout: {len(shared)} {what} lie in a fold too (such as {shared[0]}), so its figures would "
                "flatter; split again"
            )


def _bands(
    here: _Lesions, doubtful: NDArray[np.bool_], bands: Mapping[str, Any], prevalence: float, *, drawn: bool
) -> dict[str, Any] | None:
    """How many lesions each band holds; None where no band could be vouched for."""
    named = band_of(here.s, bands)
    if named is None:
        return None
    named = np.where(doubtful, CANNOT_JUDGE, named)
    names = ["refer", "routine", *(["low"] if bands["low"]["reached"] else []), CANNOT_JUDGE]
    result = {}
    weight = weights(here.y == 1, prevalence)
    for name in names:
        held = named == name
        malignant = int((held & (here.y == 1)).sum())
        # Benign lesions are thinned in most data sets, so the share is also given for the stated prevalence.
        stated = linearised(
            float(weight @ held), pulls(here.y == 1, weight, held.astype(np.float64), drawn=drawn), here.groups,
            malignant=malignant, level=here.resampling["level"],
        )  # fmt: skip
        figure = rate(held, np.ones(len(held)), here.groups, malignant=malignant, fewest=0, **here.resampling)
        result[name] = {
            "lesions": int(held.sum()), "malignant": malignant, "share": figure.to_dict(),
            "share_at_prevalence": _within(stated).to_dict(),
        }  # fmt: skip
    return result


def _within(share: Figure) -> Figure:
    """A share whose interval stays within 0..1."""
    interval = share.interval
    if interval.low is None or interval.high is None:
        return share
    return replace(share, interval=replace(interval, low=max(0.0, interval.low), high=min(1.0, interval.high)))


def _doubtful(table: pl.DataFrame) -> NDArray[np.bool_]:
    """Whether a picture can't be judged, bool [n]."""
    import polars as pl

    if "doubts" not in table.columns:
        return np.zeros(len(table), bool)
    return (table["doubts"].cast(pl.List(pl.String)).list.len().fill_null(0) > 0).to_numpy()


def _checked(table: pl.DataFrame, what: str) -> pl.DataFrame:
    import polars as pl

    if absent := [name for name in COLUMNS if name not in table.columns]:
        raise DataError(f"{what}: no column {', '.join(absent)}; write it with `lesionflow train`")
    for name in COLUMNS:
        if table[name].null_count():
            raise DataError(f"{what}: {name} is empty for {_first(table.filter(pl.col(name).is_null()))}; train again")
    if len(repeated := table.filter(table["isic_id"].is_duplicated())):
        raise DataError(f"{what}: more than one row for {_first(repeated)}; each lesion is held out once")
    if len(odd := table.filter(~pl.col("logit").cast(pl.Float64).is_finite())):
        raise DataError(f"{what}: logit is NaN or infinite for {_first(odd)}; train again")
    if table["fold_hash"].n_unique() != 1:
        raise DataError(f"{what}: rows of different fold hashes; predictions of different splits can't be pooled")
    split = table.group_by("patient_group").agg(pl.col("fold").n_unique().alias("folds")).filter(pl.col("folds") > 1)
    if len(split):
        example = str(split["patient_group"].sort()[0])
        raise DataError(f"{what}: {len(split)} patients lie in more than one fold (such as {example}); split again")
    # A fixed order, so that the same predictions give the same file.
    return table.with_columns(pl.col("logit").cast(pl.Float64), pl.col("target").cast(pl.Int8)).sort("isic_id")


def _first(table: pl.DataFrame) -> str:
    ids = ", ".join(table["isic_id"].head(5).to_list())
    return f"{len(table)} lesions ({ids}{', ...' if len(table) > 5 else ''})"
