"""Folds: patient-grouped, stratified, seeded, written once, and hash-checked ever after.

The whole patient goes to one fold. Patients with malignant lesions are dealt first, largest first,
each to the fold with the fewest malignant lesions so far; then all others, by their number of
lesions. The result depends on the ids, targets, groups and the seed alone, never on row order.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from lesionflow.data.store import Store
from lesionflow.errors import DataError
from lesionflow.keys import atomic, digest


class Folds:
    """Which fold each lesion is held out in.

    `ids` [N] in store order, `fold` int8 [N] in 0..count-1, `hash` over every id with its fold.
    """

    def __init__(self, ids: Sequence[str], fold: NDArray[np.int8], data_hash: str, seed: int) -> None:
        self.ids = list(ids)
        self.fold = fold
        self.data_hash = data_hash
        self.seed = seed
        self.count = int(fold.max()) + 1
        self.hash = _fold_hash(self.ids, fold, data_hash)

    def save(self, path: Path) -> None:
        """Write `isic_id, fold` as Parquet, with the hashes in the file's own metadata."""
        table = pl.DataFrame({"isic_id": self.ids, "fold": self.fold})
        stamps = {"data_hash": self.data_hash, "fold_hash": self.hash, "seed": str(self.seed)}
        with atomic(path) as file:
            table.write_parquet(file, metadata=stamps)

    @classmethod
    def load(cls, path: Path) -> Folds:
        """Read folds; raises `DataError` if a single assignment differs from what was written."""
        try:
            table, stamps = pl.read_parquet(path), pl.read_parquet_metadata(path)
            folds = cls(table["isic_id"].to_list(), table["fold"].to_numpy(), stamps["data_hash"], int(stamps["seed"]))
        except FileNotFoundError:
            raise DataError(f"{path}: no folds; run `lesionflow data split` first") from None
        except (pl.exceptions.PolarsError, KeyError, ValueError) as error:
            raise DataError(f"{path}: not a folds file ({error}); delete it and split again") from None
        if folds.hash != stamps["fold_hash"]:
            raise DataError(
                f"{path}: the folds were changed after they were written (hash {folds.hash[:12]}, "
                f"expected {stamps['fold_hash'][:12]}); delete the file and its run, and split again"
            )
        return folds

    def check(self, store: Store) -> None:
        """Raise `DataError` unless these folds were made for this store, row by row."""
        if store.hash != self.data_hash:
            raise DataError(
                f"folds were made for data {self.data_hash[:12]}, this is {store.hash[:12]}; "
                "use the same data, or a new run directory"
            )
        if self.ids != store.ids:
            raise DataError("folds: the rows stand in another order than the store's; delete the file and split again")

    def train_rows(self, fold: int) -> NDArray[np.int64]:
        return np.flatnonzero(self.fold != fold)

    def held_out_rows(self, fold: int) -> NDArray[np.int64]:
        return np.flatnonzero(self.fold == fold)


def _fold_hash(ids: Sequence[str], fold: NDArray[np.int8], data_hash: str) -> str:
    return digest({"data": data_hash, "folds": sorted(zip(ids, fold.tolist(), strict=True))})


def make_folds(
    ids: Sequence[str],
    targets: NDArray[np.int8],
    groups: Sequence[str],
    *,
    count: int = 5,
    seed: int = 0,
    data_hash: str = "",
) -> Folds:
    """Deal groups (patients) to `count` folds. Raises `DataError` when some fold would lack either class."""
    names, member = np.unique(np.asarray(groups), return_inverse=True)
    malignant = np.bincount(member, weights=targets == 1, minlength=len(names)).astype(np.int64)
    lesions = np.bincount(member, minlength=len(names))
    if (with_malignant := int((malignant > 0).sum())) < count:
        raise DataError(
            f"target: malignant lesions come from {with_malignant} patients, {count} folds need at least {count}; "
            "use fewer folds (folds.count) or more data"
        )
    shuffled = np.random.default_rng([seed, 0x0F01D5]).permutation(len(names))
    # Largest first balances best; the seeded shuffle decides among equals (lexsort is stable).
    dealt = shuffled[np.lexsort((-lesions[shuffled], -malignant[shuffled]))]
    group_fold = _deal(dealt, malignant, lesions, count)
    fold = group_fold[member].astype(np.int8)
    for k in range(count):
        if not (targets[fold == k] == 0).any():
            raise DataError(f"fold {k} has no benign lesion; use fewer folds (folds.count) or more data")
    return Folds(ids, fold, data_hash, seed)


def _deal(
    dealt: NDArray[np.int64], malignant: NDArray[np.int64], lesions: NDArray[np.int64], count: int
) -> NDArray[np.int64]:
    """Greedy: each group to the fold that has the fewest malignant, then the fewest lesions."""
    fold = np.zeros(len(dealt), np.int64)
    have_malignant, have_lesions = [0] * count, [0] * count
    for group in dealt.tolist():
        m, n = int(malignant[group]), int(lesions[group])
        if m:
            k = min(range(count), key=lambda f: (have_malignant[f], have_lesions[f], f))
        else:
            k = min(range(count), key=lambda f: (have_lesions[f], f))
        fold[group] = k
        have_malignant[k] += m
        have_lesions[k] += n
    return fold


def write_folds(store_path: Path, out: Path, *, count: int = 5, seed: int = 0) -> Folds:
    """Split a store and write the folds, once: a file made for the same data and settings is kept.

    Raises `DataError` for a file that was changed, or was made for other data or settings.
    """
    store = Store.open(store_path)
    if out.exists():
        folds = Folds.load(out)
        folds.check(store)
        if (folds.count, folds.seed) != (count, seed):
            raise DataError(
                f"{out}: has {folds.count} folds with seed {folds.seed}, asked were {count} with seed {seed}; "
                "keep those settings, or delete the file and everything trained on it"
            )
        return folds
    folds = make_folds(store.ids, store.targets, store.groups, count=count, seed=seed, data_hash=store.hash)
    folds.save(out)
    return folds
