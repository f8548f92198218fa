"""Leak guards: what would make held-out scores too good is refused by name, or listed.

    check_oof(oof, folds)            predictions that a lesion's own model made, foreign ones, patients on two sides
    check_features(table, folds)     the same for what a second stage learns from
    duplicates(store, folds)         one picture in two folds, under two ids

A lesion of fold k must be scored by model k, the only one that didn't learn from that fold. The hold-out, fold -1,
may be scored by every model.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import combinations, islice
from typing import Any

import numpy as np
import polars as pl

from lesionflow.data import duplicates as look_alikes
from lesionflow.data.folds import HOLDOUT, Folds, check_patients
from lesionflow.data.images import decode
from lesionflow.data.store import Store
from lesionflow.errors import DataError
from lesionflow.progress import track

LISTED = 50
"""Pairs of duplicates that are listed; the count is of all."""
NEAR_LIMIT = 500_000
"""Lesions up to which near-duplicates are looked for unasked: about 6,000 a second on one core."""
_CHUNK = 1024
_SHOWN = 5


def check_oof(
    oof: pl.DataFrame, folds: Folds, holdout: pl.DataFrame | None = None, *, store: Store | None = None
) -> dict[str, Any]:
    """Refuse out-of-fold predictions (and those of the hold-out) that aren't what this split makes them.

    `oof` has the columns isic_id, patient_group, fold and fold_hash, and a row for each lesion of the folds;
    `holdout` the same for the hold-out. Raises `DataError`, naming lesions and patients, for another fold hash,
    repeated, unknown and missing lesions, a lesion scored as of another fold than its own (its score then comes
    from a model that learned from it), and patients on two sides. With
    the `store` also targets and patients that aren't the data's. Returns what was checked, for metrics.json.
    """
    tables = [_expected(oof, folds, "oof", held_out=False)]
    if holdout is not None:
        tables.append(_expected(holdout, folds, "holdout", held_out=True))
    sides = pl.concat([table.select("patient_group", pl.col("fold").cast(pl.Int64)) for table in tables])
    check_patients(sides["patient_group"].to_list(), sides["fold"].to_numpy())
    if holdout is None and len(folds.holdout_rows()):
        raise DataError("holdout: the split has one, and its scores are missing; train every fold again on this split")
    for name, table in (("oof", oof), ("holdout", holdout)):
        if store is not None and table is not None:
            _of_store(table, store, name)
    return {"patients_in_two_folds": 0, "fold_hash_checked": True}


def _of_store(table: pl.DataFrame, store: Store, name: str) -> None:
    """Refuse targets and patients that aren't the data's, and served logits that aren't the folds' mean."""
    true = pl.DataFrame({"isic_id": store.ids, "truly": store.targets, "of": store.groups})
    joined = table.join(true, on="isic_id", how="left")
    remedy = "gather the scores again"
    _refuse(joined.filter(pl.col("target").cast(pl.Int64) != pl.col("truly")), name, "have another target", remedy)
    _refuse(joined.filter(pl.col("patient_group") != pl.col("of")), name, "are given to another patient", remedy)
    if "fold_logits" in table.columns:
        off = (pl.col("fold_logits").list.mean() - pl.col("logit")).abs() > 1e-6
        _refuse(joined.filter(off), name, "have a logit that isn't the mean of the folds'", remedy)


def check_features(features: pl.DataFrame, folds: Folds, *, model: str = "model_fold") -> None:
    """Refuse rows that a model made which learned from that very lesion: leakage into a second stage.

    `features` has the columns isic_id, fold and `model`, the fold that the row's model held out. In the hold-out,
    which no model learned from, `model` may be any fold, or null for a mean over models. Raises `DataError`, naming
    the lesions.
    """
    table = _joined(features, folds, "features", ("isic_id", "fold", model))
    _refuse(
        table.filter(pl.col("fold") != pl.col("own")), "features", "are given another fold than the split's",
        "make the features again",
    )  # fmt: skip
    outside = pl.col(model).is_not_null() & ~pl.col(model).is_between(0, folds.count - 1)
    unknown = outside | (pl.col(model).is_null() & (pl.col("own") != HOLDOUT))
    _refuse(
        table.filter(unknown), "features", f"have no model of folds 0 to {folds.count - 1} in {model}",
        "make the features again, and write down which fold's model made them",
    )  # fmt: skip
    _refuse(
        table.filter((pl.col(model) != pl.col("own")) & (pl.col("own") != HOLDOUT)), "features",
        "were scored by a model that learned from them", "score each lesion by the model of its own fold",
    )  # fmt: skip


def duplicates(
    store: Store, folds: Folds, *, near_limit: int | None = NEAR_LIMIT, progress: bool = False
) -> dict[str, Any]:
    """Pairs of lesions on two sides of the split whose images are the same bytes, or one picture.

    `near_limit` is the most lesions whose images are decoded and compared, None for no limit. Returns
    `{"exact_duplicates": {count, checked, pairs}, "near_duplicates": {count, checked, pairs, reason}}`: the number of
    pairs and the first 50, those with a malignant lesion first, each `{ids, folds, targets, same_patient}` (fold -1
    for the hold-out, null where a patient is unknown). Of images that are equal byte for byte within a fold one is
    compared. How near-duplicates are found, and what escapes, is said in `data.duplicates`.
    """
    if not store.pictures:
        none: dict[str, Any] = {"count": None, "checked": 0, "pairs": [], "reason": "the lesions have no pictures"}
        return {"exact_duplicates": none, "near_duplicates": none}
    same: dict[bytes, list[int]] = defaultdict(list)
    for row in track(range(len(store)), "hash images", total=len(store), show=progress):
        same[hashlib.blake2b(store.jpeg(row), digest_size=16).digest()].append(row)
    count, pairs = 0, list[tuple[int, int]]()
    for rows in same.values():
        if len(rows) > 1:
            sizes = Counter(folds.fold[rows].tolist())
            count += (len(rows) ** 2 - sum(n**2 for n in sizes.values())) // 2
            pairs += _across(rows, folds)
    exact = {"count": count, "checked": len(store), "pairs": _listed(pairs, store, folds)}
    if near_limit is not None and len(store) > near_limit:
        reason = (
            f"{len(store):,} lesions: over {near_limit:,}, near-duplicates are not looked for unasked; "
            "`lesionflow data check DATA --folds FILE` lists them"
        )
        return {
            "exact_duplicates": exact,
            "near_duplicates": {"count": None, "checked": 0, "pairs": [], "reason": reason},
        }
    once = [row for rows in same.values() for row in {int(folds.fold[r]): r for r in reversed(rows)}.values()]
    near = _near(sorted(once), store, folds, progress)
    return {
        "exact_duplicates": exact,
        "near_duplicates": {
            "count": len(near), "checked": len(store), "pairs": _listed(near, store, folds), "reason": None,
        },
    }  # fmt: skip


def _near(rows: Sequence[int], store: Store, folds: Folds, progress: bool) -> list[tuple[int, int]]:
    """Pairs of these rows that lie in two folds and show one picture in different bytes."""
    bar = track(rows, "look for one picture twice", total=len(rows), show=progress)
    thumbnails = (look_alikes.thumbnail(decode(store.jpeg(row))) for row in bar)
    features = [look_alikes.features(np.stack(part)) for part in iter(lambda: list(islice(thumbnails, _CHUNK)), [])]
    pairs = np.asarray(rows)[look_alikes.candidates(np.concatenate(features))]
    pairs = pairs[folds.fold[pairs[:, 0]] != folds.fold[pairs[:, 1]]]
    found = []
    for a, b in track(pairs.tolist(), "compare look-alikes", total=len(pairs), show=progress and len(pairs) > 1000):
        first, second = store.jpeg(a), store.jpeg(b)
        if first != second and look_alikes.same_picture(decode(first), decode(second)):
            found.append((a, b))
    return found


def _across(rows: Sequence[int], folds: Folds) -> Iterator[tuple[int, int]]:
    """Up to 50 pairs of these rows that lie in different folds."""
    left = LISTED
    for a, b in combinations(rows, 2):
        if folds.fold[a] != folds.fold[b]:
            yield a, b
            left -= 1
        if not left:
            return


def _listed(pairs: Sequence[tuple[int, int]], store: Store, folds: Folds) -> list[dict[str, Any]]:
    targets, names = store.targets, store.ids
    known = "patient_id" in store.table.columns
    patients = store.table["patient_id"] if known else pl.Series([None] * len(store), dtype=pl.String)
    ordered = sorted(
        ((a, b) if names[a] < names[b] else (b, a) for a, b in pairs),
        key=lambda pair: (-max(targets[list(pair)]), names[pair[0]], names[pair[1]]),
    )
    return [
        {
            "ids": [names[a], names[b]],
            "folds": [int(folds.fold[a]), int(folds.fold[b])],
            "targets": [int(targets[a]), int(targets[b])],
            "same_patient": None if patients[a] is None or patients[b] is None else patients[a] == patients[b],
        }
        for a, b in ordered[:LISTED]
    ]


def _expected(table: pl.DataFrame, folds: Folds, name: str, *, held_out: bool) -> pl.DataFrame:
    """The table's rows with their `own` fold, if they are the lesions of the folds (or of the hold-out), once each."""
    joined = _joined(table, folds, name, ("isic_id", "patient_group", "fold", "fold_hash"))
    if len(other := joined.filter(pl.col("fold_hash") != folds.hash)):
        raise DataError(
            f"{name}: {_first(other)} were scored on another split (fold hash {other['fold_hash'][0][:12]}, the "
            f"split's is {folds.hash[:12]}); train again on this split, or use the folds of that training"
        )
    remedy = "train every fold again on this split"
    _refuse(joined.filter(pl.col("isic_id").is_duplicated()), name, "are scored more than once", remedy)
    belongs = (pl.col("own") == HOLDOUT) == held_out
    place = "a fold, not of the hold-out" if held_out else "the hold-out, not of a fold"
    _refuse(joined.filter(~belongs), name, f"are of {place}", remedy)
    _refuse(
        joined.filter(pl.col("fold") != pl.col("own")), name,
        "are given another fold than the split's, so a model that learned from them scored them", remedy,
    )  # fmt: skip
    wanted = (folds.fold == HOLDOUT) == held_out
    absent = pl.DataFrame({"isic_id": pl.Series(folds.ids, dtype=pl.String).filter(pl.Series(wanted))})
    _refuse(absent.join(joined, on="isic_id", how="anti"), name, "have no score", remedy)
    return joined


def _joined(table: pl.DataFrame, folds: Folds, name: str, columns: Sequence[str]) -> pl.DataFrame:
    if absent := [column for column in columns if column not in table.columns]:
        raise DataError(f"{name}: no column {', '.join(absent)}; without it leaks can't be ruled out")
    split = pl.DataFrame({"isic_id": folds.ids, "own": folds.fold.astype(np.int64)})
    joined = table.select(columns).join(split, on="isic_id", how="left")
    _refuse(
        joined.filter(pl.col("own").is_null()), name, "are not in the split", "score the lesions of this split alone"
    )
    _refuse(joined.filter(pl.col("fold").is_null()), name, "have no fold", "make the table again")
    return joined


def _refuse(rows: pl.DataFrame, name: str, problem: str, remedy: str) -> None:
    if len(rows):
        raise DataError(f"{name}: {_first(rows)} {problem}; {remedy}")


def _first(rows: pl.DataFrame) -> str:
    ids = rows["isic_id"].unique().sort()
    more = ", ..." if len(ids) > _SHOWN else ""
    return f"{len(ids):,} lesions ({', '.join(map(str, ids.head(_SHOWN)))}{more})"
