"""Score a submission file against the truth, as the competition does, each figure with its interval.

    lesionflow score submission.csv train-metadata.csv
    lesionflow score runs/first/oof.parquet

Rows are joined on `isic_id`, never by position. Missing, extra and duplicate ids and scores that are not
finite numbers are refused by name and count. Only the columns needed are read, and no torch is imported:
401,059 rows take a few seconds, start of the process included.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lesionflow.errors import DataError, UsageError
from lesionflow.evaluation import metrics, tables
from lesionflow.evaluation.grouping import describe
from lesionflow.evaluation.intervals import Figure
from lesionflow.evaluation.metrics import Floats, Ints
from lesionflow.evaluation.ranking import MEASURES, mean_of_folds, ranking, span_of
from lesionflow.evaluation.rates import rate
from lesionflow.evaluation.retrieval import retrieval

if TYPE_CHECKING:
    import polars as pl

WAYS = {"rank_pooled": "by rank in fold", "pooled": "as they are", "mean_of_folds": "mean of folds"}
"""How the scores of several folds' models become one figure."""
NOT_PROBABILITIES = "the scores are not probabilities: some lie outside 0..1"


def score_files(
    submission: Path,
    truth: Path | None = None,
    *,
    min_tpr: float = metrics.MIN_TPR,
    replicates: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Any]:
    """Every figure of `submission` (isic_id and target, or an oof.parquet) against `truth` (isic_id, target).

    Both may be CSV or parquet; an oof.parquet or holdout.parquet holds the truth itself. Where the truth has
    `patient_id`, intervals draw patients. The result is JSON-able, and each figure in it is `Figure.to_dict()`:

    - `pauc` (above `min_tpr`), `pauc_88`, `auc`, `average_precision`: {`pooled`: the scores as they are, and where
      the submission has a column `fold` also `rank_pooled` and `mean_of_folds`}, besides `min_tpr`, `maximum` and
      `chance`. `headline` names the one to quote.
    - `retrieval`: top-15 retrieval over known patients, with `k`, `patients`, `malignant`, `lesions`.
    - `brier`, `log_loss` (nats): without a value, and with the reason, where scores lie outside 0..1.
    - `counts`, `groups` (whom intervals draw), `score_column`, `settings`.

    `replicates=0` leaves the intervals out. Raises `DataError` with the first offending ids and the remedy,
    `UsageError` without a truth.
    """
    answers, column = tables.scores(submission)
    if truth is None and column != "logit":
        raise UsageError(f"{submission}: a submission doesn't hold the truth; name it too, such as train-metadata.csv")
    truth = truth or submission
    lesions = tables.truth(truth)
    answers = answers.drop("target", strict=False)
    joined = tables.join(answers, lesions, submission, truth, "score exactly the lesions of the truth")
    y, s = joined["target"].to_numpy(), joined["score"].to_numpy()
    fold = _folds(joined, submission)
    groups = tables.groups(joined["patient_id"], joined["isic_id"])
    options: dict[str, Any] = {"replicates": replicates, "seed": seed, "level": level}
    found = {"pooled": ranking(y, s, groups, min_tpr=min_tpr, **options)}
    if fold is not None:
        found["rank_pooled"] = ranking(y, s, groups, folds=fold, min_tpr=min_tpr, **options)
        found["mean_of_folds"] = mean_of_folds(y, s, groups, fold, min_tpr=min_tpr, **options)
    known = joined["patient_id"].drop_nulls()
    malignant = int(y.sum())
    ranges = {"pauc": span_of(min_tpr), "pauc_88": span_of(0.88), "average_precision": {"chance": malignant / len(y)}}
    return {
        "headline": "pooled" if fold is None else "rank_pooled",
        **{name: ranges.get(name, {}) | {way: one[name].to_dict() for way, one in found.items()} for name in MEASURES},
        "retrieval": retrieval(
            y, s, groups, joined["patient_id"].is_not_null().to_numpy(), replicates=replicates, level=level
        ),
        **_losses(y, s, groups, options),
        "counts": {
            "lesions": len(y), "malignant": malignant, "benign": len(y) - malignant,
            "folds": 1 if fold is None else len(np.unique(fold)),
        },
        "groups": describe(known.n_unique(), len(known), len(y) - len(known)).to_dict(),
        "score_column": column,
        "settings": {**options, "min_tpr": min_tpr},
    }  # fmt: skip


def _folds(joined: pl.DataFrame, submission: Path) -> Ints | None:
    """The fold of each lesion, int64 [n], where the submission tells of more than one."""
    import polars as pl

    if "fold" not in joined.columns:
        return None
    fold = joined["fold"].cast(pl.Int64, strict=False)
    if len(bad := joined["isic_id"].filter(fold.is_null())):
        raise DataError(
            f"{submission}: fold is empty or not a whole number for {tables.some(bad)}; "
            "give every lesion its fold, or leave the column out"
        )
    return fold.to_numpy() if fold.n_unique() > 1 else None


def _losses(y: Ints, s: Floats, groups: Ints, options: dict[str, Any]) -> dict[str, Any]:
    """Brier score and log loss, of scores that can be probabilities."""
    malignant = int(y.sum())
    if s.min() < 0 or s.max() > 1:
        missing = Figure.missing(NOT_PROBABILITIES, level=options["level"], malignant=malignant).to_dict()
        return {"brier": missing, "log_loss": missing}
    errors = {"brier": metrics.squared_errors(y, s), "log_loss": metrics.log_losses(y, s)}
    ones = np.ones(len(y))
    return {
        name: rate(each, ones, groups, malignant=malignant, kind="positive", **options).to_dict()
        for name, each in errors.items()
    }


def render(result: dict[str, Any]) -> Any:
    """The score as a table for a terminal, with what must be known to read it (rich renderable)."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    names = {
        "pauc": f"pAUC above\n{result['pauc']['min_tpr']:.0%} TPR", "pauc_88": "pAUC above\n88% TPR",
        "auc": "AUC", "average_precision": "average\nprecision",
    }  # fmt: skip
    ways = [way for way in WAYS if way in result["pauc"]]
    table = Table("", *([WAYS[way] for way in ways] if len(ways) > 1 else ["figure"]), box=box.SIMPLE_HEAD)
    for column in table.columns:
        column.no_wrap = True
    for name, title in names.items():
        table.add_row(title, *(_shown(result[name][way]) for way in ways))
    rest = {"retrieval": f"top-{result['retrieval']['k']}\nretrieval", "brier": "Brier score", "log_loss": "log loss"}
    for name, title in rest.items():
        table.add_row(title, _shown(result[name]))
    counts, settings = result["counts"], result["settings"]
    lines = [f"{counts['lesions']:,} lesions, {counts['malignant']:,} malignant. {result['groups']['note']}"]
    pauc, pauc_88, chance = result["pauc"], result["pauc_88"], result["average_precision"]["chance"]
    lines.append(f"The best pAUC is {pauc['maximum']:g} and {pauc_88['maximum']:g}; a coin gives")
    lines[-1] += f" {pauc['chance']:.2g} and {pauc_88['chance']:.2g}, AUC 0.5, average precision {chance:.2g}."
    figures = [result[name][way] for name in names for way in ways] + [result[name] for name in rest]
    if any(one["interval"]["low"] is not None for one in figures):
        lines.append(f"In brackets: {100 * settings['level']:g} % intervals.")
    missing = [one["interval"]["reason"] for one in figures]
    lines += [f"No interval: {reason}." for reason in dict.fromkeys(reason for reason in missing if reason)]
    return Group(table, *(Text(line) for line in lines))


def _shown(figure: dict[str, Any]) -> str:
    """0.1512, and its interval on a second line."""
    low, high = figure["interval"]["low"], figure["interval"]["high"]
    if figure["value"] is None:
        return "-"
    return f"{figure['value']:.4f}" + ("" if low is None else f"\n[{low:.4f}, {high:.4f}]")
