"""Two models on the same lesions: how far apart, how sure that is, and how many lesions it would take.

    lesionflow compare runs/new runs/old
    lesionflow compare a.csv b.csv --truth train-metadata.csv

A side is a run, an out-of-fold or hold-out table, or a submission. Both must hold exactly the same lesions. Scores
of folds are ranked within their fold first, as different models' scales differ; other scores are taken as they are.

Power is told for a paired comparison of these two models: the standard error of their difference is taken to fall
with the square root of the number of malignant lesions, everything else (the patients per malignant lesion, the
benign lesions per patient, how alike the models are) staying as it is here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np

from lesionflow.errors import DataError
from lesionflow.evaluation import tables
from lesionflow.evaluation.grouping import describe
from lesionflow.evaluation.intervals import FEWEST_MALIGNANT
from lesionflow.evaluation.metrics import fold_rank
from lesionflow.evaluation.paired import Pair, compare_scores
from lesionflow.evaluation.ranking import MEASURES, ranking

if TYPE_CHECKING:
    import polars as pl

POWER = 0.8
DIFFERENCES = (0.005, 0.010, 0.020)
"""pAUC differences that `malignant_for` is given for."""
NAMES = {
    "pauc": "pAUC above\n80 % TPR",
    "pauc_88": "pAUC above\n88 % TPR",
    "auc": "AUC",
    "average_precision": "average\nprecision",
}


@dataclass(frozen=True)
class Side:
    """One of the two, read."""

    path: Path
    kind: str
    """`folds` (logits of several folds, ranked within each) or `scores` (taken as they are)."""
    table: pl.DataFrame
    """isic_id, score; where known target, patient_id, fold, fold_hash."""


def compare_files(
    a: Path,
    b: Path,
    *,
    truth: Path | None = None,
    of: str = "oof",
    replicates: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Any]:
    """Compare `a` with `b`: run directories (their `of`.parquet), such tables, or submissions (isic_id, target).

    `truth` (isic_id, target and perhaps patient_id) is needed where neither side knows it. JSON-able:
    {"a", "b": {"path", "kind"}, "counts", "groups", "settings", for each of `ranking.MEASURES`: {"a", "b",
    "difference": `Figure`, "p_better"}, "power": see `power`, "verdict": {"better": "a", "b" or None, "text"}}.
    Raises `DataError` with counts and the first offending ids where the two can't be compared.
    """
    first, second = side(a, of), side(b, of)
    _same_split(first, second)
    both = _joined(first, second, truth)
    y, groups = both["target"].to_numpy(), tables.groups(both["patient_id"], both["isic_id"])
    s_a, s_b = both["score_a"].to_numpy(), both["score_b"].to_numpy()
    options: dict[str, Any] = {"replicates": replicates, "seed": seed, "level": level}
    found = compare_scores(y, s_a, s_b, groups, list(MEASURES.values()), **options)
    pairs = dict(zip(MEASURES, found, strict=True))
    alone = [ranking(y, s, groups, **options) for s in (s_a, s_b)]
    known = both["patient_id"].drop_nulls()
    malignant = int(y.sum())
    planned = power(pairs["pauc"], malignant, level)
    return {
        **{name: {"path": str(one.path), "kind": one.kind} for name, one in (("a", first), ("b", second))},
        "counts": {"lesions": len(y), "malignant": malignant, "benign": len(y) - malignant},
        "groups": describe(known.n_unique(), len(known), len(y) - len(known)).to_dict(),
        "settings": options,
        **{
            name: {
                "a": alone[0][name].to_dict(),
                "b": alone[1][name].to_dict(),
                "difference": pair.difference.to_dict(),
                "p_better": pair.p_better,
            }
            for name, pair in pairs.items()
        },
        "power": planned,
        "verdict": verdict(pairs["pauc"], planned),
    }


def power(pair: Pair, malignant: int, level: float = 0.95) -> dict[str, Any]:
    """How large a difference could have been seen, and how many malignant lesions others would take.

    {"power": 0.8, "level", "detectable": the smallest true difference whose interval excludes 0 with that power,
    "malignant_for_observed", "malignant_for": {"0.005": n, ...}, "reason": None or why there is none of it}.
    A difference d is seen with power 1 - beta where d = (c + z_beta) * e: e is the standard error, c how many of them
    the interval reaches. Both shrink with the root of the malignant lesions: e to 0, c to the normal's quantile.
    """
    result: dict[str, Any] = {
        "power": POWER, "level": level, "detectable": None, "malignant_for_observed": None,
        "malignant_for": {f"{d:.3f}": None for d in DIFFERENCES}, "reason": pair.difference.interval.reason,
    }  # fmt: skip
    if result["reason"] or pair.error is None or pair.reach is None:
        return result
    if not pair.error:
        return result | {"reason": "both order the lesions alike: there is no difference to see"}
    observed = abs(pair.a - pair.b)
    return result | {
        "detectable": pair.reach + NormalDist().inv_cdf(POWER) * pair.error,
        "malignant_for_observed": malignant_for(observed, pair, malignant, level) if observed else None,
        "malignant_for": {f"{d:.3f}": malignant_for(d, pair, malignant, level) for d in DIFFERENCES},
    }


def malignant_for(difference: float, pair: Pair, malignant: int, level: float = 0.95) -> int:
    """Malignant lesions with which a true `difference` is seen with a power of 80 %; `pair` is of `malignant`."""
    assert pair.error and pair.reach is not None
    normal = NormalDist()
    limit = normal.inv_cdf((1 + level) / 2)
    needed, excess = normal.inv_cdf(POWER) + limit, max(1e-9, pair.reach / pair.error - limit)
    # The root x of malignant / n solves (needed + excess * x) * x = difference / error.
    x = ((needed**2 + 4 * excess * difference / pair.error) ** 0.5 - needed) / (2 * excess)
    return max(FEWEST_MALIGNANT, int(np.ceil(malignant / x**2)))


def verdict(pair: Pair, planned: dict[str, Any]) -> dict[str, Any]:
    """Which is better by the interval of the pAUC's difference, and a sentence that says so."""
    interval, sure = pair.difference.interval, pair.difference.interval.level
    if interval.low is None or interval.high is None:
        return {"better": None, "text": f"A and B can't be compared by an interval: {interval.reason}."}
    span = f"pAUC {pair.a - pair.b:+.4f} [{interval.low:+.4f}, {interval.high:+.4f}]"
    if interval.low > 0 or interval.high < 0:
        better = "a" if interval.low > 0 else "b"
        return {
            "better": better,
            "text": f"{better.upper()} is better: A - B is {span}, which excludes 0 at {100 * sure:g} %.",
        }
    if not pair.error:
        return {"better": None, "text": "A and B order these lesions alike; there is nothing to tell apart."}
    if (needed := planned["malignant_for_observed"]) is None:
        what = "the observed difference is 0, which no number of lesions would tell apart"
    else:
        what = f"if the difference is what it looks like, it would take about {_round(needed):,} malignant lesions"
    return {"better": None, "text": f"A and B can't be told apart: A - B is {span}; {what}."}


def side(path: Path, of: str = "oof") -> Side:
    """Read a run directory, an out-of-fold or hold-out table, or a submission."""
    import polars as pl

    if path.is_dir():
        if not (path / f"{of}.parquet").exists():
            why = "it set no patients aside (folds.holdout)" if of == "holdout" else "not a run, or not trained yet"
            raise DataError(f"{path}: no {of}.parquet; {why}")
        path = path / f"{of}.parquet"
    table, column = tables.scores(path)
    if column != "logit" or "target" not in table.columns:
        return Side(path, "scores", table.select("isic_id", "score"))
    table = table.with_columns(target=tables.targets(table, path))
    if "patient_group" in table.columns:
        own = pl.col("patient_group") == pl.col("isic_id")
        table = table.with_columns(patient_id=pl.when(~own).then(pl.col("patient_group").cast(pl.String)))
    if "fold" not in table.columns or table["fold"].n_unique() == 1:
        return Side(path, "scores", table)
    if table["fold"].null_count():
        raise DataError(f"{path}: fold is empty in {table['fold'].null_count()} rows; train again")
    ranks = fold_rank(table["score"].to_numpy(), table["fold"].to_numpy())
    return Side(path, "folds", table.with_columns(score=pl.Series(ranks)))


def _same_split(a: Side, b: Side) -> None:
    if a.kind != "folds" or b.kind != "folds":
        return
    hashes = [sorted(one.table["fold_hash"].unique()) for one in (a, b) if "fold_hash" in one.table.columns]
    if len(hashes) == 2 and hashes[0] != hashes[1]:
        (first, *_), (second, *_) = hashes
        raise DataError(
            f"{b.path}: its folds are not those of {a.path} (hash {second[:12]}, not {first[:12]}), so the models were "
            "trained on other lesions; train both on one split (the same data, folds.count and folds.seed)"
        )


def _joined(a: Side, b: Side, truth: Path | None) -> pl.DataFrame:
    """One row per lesion: isic_id, target, patient_id, score_a, score_b."""
    import polars as pl

    known = [one for one in (a, b) if "target" in one.table.columns]
    if truth is not None:
        lesions, where = tables.truth(truth), truth
    elif known:
        lesions, where = known[0].table, known[0].path
    else:
        raise DataError(
            f"{a.path}, {b.path}: neither says which lesions are malignant; give --truth CSV (isic_id, target)"
        )
    for one in known:
        _agree(lesions, one, where)
    if "patient_id" not in lesions.columns or not lesions["patient_id"].count():
        # The truth knows no patients: ask the sides.
        named = next((one.table for one in known if "patient_id" in one.table.columns), None)
        patient = pl.lit(None, pl.String).alias("patient_id")
        lesions = (
            lesions.select("isic_id", "target", patient)
            if named is None
            else lesions.drop("patient_id", strict=False).join(
                named.select("isic_id", "patient_id"), on="isic_id", how="left"
            )
        )
    joined = lesions.select("isic_id", "target", "patient_id")
    for name, one in (("score_a", a), ("score_b", b)):
        mine = one.table.select("isic_id", pl.col("score").alias(name))
        joined = tables.join(mine, joined, one.path, where, "compare both on exactly the same lesions")
    _same_folds(a, b)
    return joined


def _agree(lesions: pl.DataFrame, one: Side, where: Path) -> None:
    both = lesions.join(one.table.select("isic_id", other="target"), on="isic_id")
    if len(odd := both.filter(both["target"] != both["other"])["isic_id"].sort()):
        raise DataError(f"{one.path}: another target than {where} for {tables.some(odd)}; use files of one data set")


def _same_folds(a: Side, b: Side) -> None:
    """Also where a file says nothing of its split: each lesion in the same fold."""
    if a.kind != "folds" or b.kind != "folds":
        return
    both = a.table.select("isic_id", "fold").join(b.table.select("isic_id", other="fold"), on="isic_id")
    if len(odd := both.filter(both["fold"] != both["other"])["isic_id"].sort()):
        raise DataError(f"{b.path}: another fold than {a.path} for {tables.some(odd)}; train both on one split")


def render(result: dict[str, Any]) -> Any:
    """The comparison as a table for a terminal, and its sentence (rich renderable)."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table("", "A", "B", "A - B", "A better", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for column in table.columns:
        column.no_wrap = True
    for name in MEASURES:
        one = result[name]
        table.add_row(
            NAMES[name],
            _shown(one["a"], ""), _shown(one["b"], ""), _shown(one["difference"], "+"), _sure(one["p_better"]),
        )  # fmt: skip
    counts, planned = result["counts"], result["power"]
    lines = [f"A {result['a']['path']}", f"B {result['b']['path']}"]
    lines.append(f"{counts['lesions']:,} lesions, {counts['malignant']:,} malignant. {result['groups']['note']}")
    if planned["detectable"] is not None:
        needed = ", ".join(f"{d}: {_round(n):,}" for d, n in planned["malignant_for"].items())
        lines.append(
            f"With {100 * POWER:.0f} % power this comparison sees a true pAUC difference of "
            f"{planned['detectable']:.4f}. Malignant lesions that it would take to see {needed}."
        )
    missing = [result[name]["difference"]["interval"]["reason"] for name in MEASURES]
    lines += [f"No interval: {reason}." for reason in dict.fromkeys(r for r in missing if r)]
    return Group(table, *(Text(line) for line in lines), Text(result["verdict"]["text"], style="bold"))


def _shown(figure: dict[str, Any], sign: str) -> str:
    low, high = figure["interval"]["low"], figure["interval"]["high"]
    span = "" if low is None else f"\n[{low:{sign}.4f}, {high:{sign}.4f}]"
    return f"{figure['value']:{sign}.4f}{span}"


def _sure(share: float | None) -> str:
    if share is None:
        return "-"
    return "> 99.9 %" if share > 0.999 else "< 0.1 %" if share < 0.001 else f"{100 * share:.1f} %"


def _round(count: int) -> int:
    """Two digits: more would promise what an extrapolation can't."""
    return int(float(f"{count:.2g}"))
