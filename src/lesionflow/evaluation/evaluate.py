"""From out-of-fold predictions to metrics.json: every figure with its interval, or the reason for none.

Folds come from different models whose scales differ, so there is no one pAUC of a cross-validation. All four
are given: each fold's, their mean, that of the pooled logits, and that of the logits ranked within their fold
and then pooled. The last is the headline: it uses every malignant lesion and forgives only a shift of scale.
The schema is described in docs/metrics.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from lesionflow.errors import DataError
from lesionflow.evaluation import metrics
from lesionflow.evaluation.grouping import describe
from lesionflow.evaluation.intervals import bootstrap_areas, bootstrap_mean_of_folds, choose_threshold
from lesionflow.evaluation.metrics import Floats, Groups, Ints

if TYPE_CHECKING:
    import polars as pl

SCHEMA = 1
COLUMNS = ("isic_id", "patient_group", "target", "fold", "logit", "fold_hash")


def evaluate_oof(
    oof: pl.DataFrame,
    *,
    replicates: int = 2000,
    seed: int = 0,
    sensitivity: float = 0.9,
    min_tpr: float = metrics.MIN_TPR,
    level: float = 0.95,
) -> dict[str, Any]:
    """The content of metrics.json for an out-of-fold table (columns isic_id, patient_group, target, fold, logit,
    fold_hash). JSON-able, without NaN. Raises `DataError` naming the column and the first ids.
    """
    checked = _checked(oof)
    y, s = checked["target"].to_numpy(), checked["logit"].to_numpy()
    fold = checked["fold"].to_numpy()
    groups = metrics.codes(checked["patient_group"].to_list(), len(y))
    ranks = metrics.fold_rank(s, fold)
    known = checked.filter(checked["patient_group"] != checked["isic_id"])
    grouping = describe(known["patient_group"].n_unique(), len(known), len(y) - len(known))
    options: dict[str, Any] = {"replicates": replicates, "seed": seed, "level": level}
    ranked, ranked_auc = _areas(y, ranks, groups, min_tpr, options)
    pooled, pooled_auc = _areas(y, s, groups, min_tpr, options)
    folds = [_fold(int(f), y[fold == f], s[fold == f], groups[fold == f], min_tpr, options) for f in np.unique(fold)]
    probability = 1 / (1 + np.exp(-np.clip(s, -700, 700)))
    return {
        "schema": SCHEMA,
        "counts": {"lesions": len(y), "malignant": int(y.sum()), "benign": int((y == 0).sum()), "folds": len(folds)},
        "groups": grouping.to_dict(),
        "fold_hash": str(checked["fold_hash"][0]),
        "headline": "rank_pooled",
        "pauc": {
            "min_tpr": min_tpr,
            "maximum": round(1 - min_tpr, 12),
            "chance": round((1 - min_tpr) ** 2 / 2, 12),
            "rank_pooled": ranked,
            "pooled": pooled,
            "mean_of_folds": _mean(folds, y, s, groups, fold, min_tpr, options),
            "folds": folds,
        },
        "auc": {"rank_pooled": ranked_auc, "pooled": pooled_auc},
        "average_precision": {"rank_pooled": metrics.average_precision(y, ranks)},
        "retrieval": _retrieval(known, ranks[(checked["patient_group"] != checked["isic_id"]).to_numpy()]),
        "probabilities": {
            "log_loss": metrics.log_loss(y, probability),
            "brier": metrics.brier(y, probability),
            "calibrated": False,
        },
        "thresholds": {"refer": choose_threshold(y, s, groups, sensitivity).to_dict() | {"scale": "pooled logit"}},
        "settings": {**options, "sensitivity": sensitivity},
    }


def _areas(
    y: Ints, s: Floats, groups: Groups, min_tpr: float, options: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    partial, whole = bootstrap_areas(y, s, groups, (min_tpr, 0.0), **options)
    return (
        {"value": metrics.pauc(y, s, min_tpr), "interval": partial.to_dict()},
        {"value": metrics.auc(y, s), "interval": whole.to_dict()},
    )


def _fold(fold: int, y: Ints, s: Floats, groups: Ints, min_tpr: float, options: dict[str, Any]) -> dict[str, Any]:
    malignant = int(y.sum())
    result: dict[str, Any] = {
        "fold": fold, "lesions": len(y), "malignant": malignant, "groups": len(np.unique(groups)),
        "value": None, "interval": None, "reason": None,
    }  # fmt: skip
    if malignant in (0, len(y)):
        return result | {"reason": f"all its lesions are {'malignant' if malignant else 'benign'}"}
    partial, _ = _areas(y, s, groups, min_tpr, options)
    return result | partial


def _mean(
    folds: list[dict[str, Any]], y: Ints, s: Floats, groups: Ints, fold: Ints, min_tpr: float, options: dict[str, Any]
) -> dict[str, Any]:
    values = [one["value"] for one in folds if one["value"] is not None]
    if len(values) < len(folds):
        reason = f"{len(folds) - len(values)} of {len(folds)} folds have one class only"
        return {"value": None, "sd": None, "interval": None, "reason": reason}
    interval = bootstrap_mean_of_folds(y, s, groups, fold, min_tpr=min_tpr, **options)
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"value": float(np.mean(values)), "sd": sd, "interval": interval.to_dict(), "reason": None}


def _retrieval(known: pl.DataFrame, ranks: Floats) -> dict[str, Any]:
    """Top-15 retrieval over the known patients: a lesion that is its own group would always be found."""
    result: dict[str, Any] = {
        "k": metrics.TOP_K, "value": None, "patients": known.filter(known["target"] == 1)["patient_group"].n_unique(),
        "malignant": int(known["target"].sum()), "lesions": len(known), "reason": None,
    }  # fmt: skip
    if not result["malignant"] or result["malignant"] == len(known):
        return result | {"reason": "the known patients do not have lesions of both classes"}
    value = metrics.top_k_retrieval(known["target"].to_numpy(), ranks, known["patient_group"].to_list())
    small = sum(known["patient_group"].value_counts()["count"] <= metrics.TOP_K)
    return result | {"value": value, "patients_with_k_lesions_or_fewer": int(small)}


def _checked(oof: pl.DataFrame) -> pl.DataFrame:
    import polars as pl

    if absent := [name for name in COLUMNS if name not in oof.columns]:
        raise DataError(f"oof: no column {', '.join(absent)}; write it with `lesionflow train`")
    table = oof.select(COLUMNS)
    for name in COLUMNS:
        if table[name].null_count():
            raise DataError(f"oof: {name} is empty for {_first(table.filter(pl.col(name).is_null()))}; train again")
    if len(repeated := table.filter(table["isic_id"].is_duplicated())):
        raise DataError(f"oof: more than one row for {_first(repeated)}; each lesion is held out once")
    if len(odd := table.filter(~pl.col("logit").cast(pl.Float64).is_finite())):
        raise DataError(f"oof: logit is NaN or infinite for {_first(odd)}; train again")
    if table["fold_hash"].n_unique() != 1:
        raise DataError("oof: rows of different fold hashes; predictions of different splits can't be pooled")
    split = table.group_by("patient_group").agg(pl.col("fold").n_unique().alias("folds")).filter(pl.col("folds") > 1)
    if len(split):
        example = str(split["patient_group"].sort()[0])
        raise DataError(f"oof: {len(split)} patients lie in more than one fold (such as {example}); split again")
    # A fixed order, so that the same predictions give the same file.
    return table.with_columns(pl.col("logit").cast(pl.Float64), pl.col("target").cast(pl.Int8)).sort("isic_id")


def _first(table: pl.DataFrame) -> str:
    ids = ", ".join(table["isic_id"].head(5).to_list())
    return f"{len(table)} lesions ({ids}{', ...' if len(table) > 5 else ''})"
