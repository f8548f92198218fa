"""Folds: patient-grouped, stratified, seeded, written once, and hash-checked ever after.

The whole patient goes to one fold. Patients with malignant lesions are dealt first, largest first,
each to the fold with the fewest malignant lesions so far; then all others, by their number of
lesions. The result depends on the ids, targets, groups and the seed alone, never on row order.

A hold-out is dealt before that, if one is asked for: whole patients, the wanted share of the malignant and of all
lesions, as fold -1. No fold's model trains on it, so the mean of all folds' models, which is what is
served, can be judged on it. With `kind="institution"` each institution is a fold: every figure then
says how a model does where it has never been.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from lesionflow.data.rows import Rows, where
from lesionflow.data.splithash import STRETCH, split_hash, stretches
from lesionflow.data.store import Store
from lesionflow.errors import DataError, UsageError
from lesionflow.keys import atomic

HOLDOUT = -1
"""The fold number of the hold-out's rows."""
KINDS = ("patient", "institution")
FEWEST_MALIGNANT = 5
"""Malignant lesions that an institution needs to be a fold of its own."""
_MOST = 100
_BY_PATIENT = 'or split by patient (folds.kind = "patient")'


class Folds:
    """Which fold each lesion is held out in.

    `ids` [N] in store order, `fold` int8 [N] in 0..count-1, or -1 for the hold-out, `count` of folds without the
    hold-out, `hash` over every id with its fold. `kind` is `patient` or `institution`; `names` [count] are then the
    institutions, else None. `holdout` is the share that was asked for. Of a file the ids stay in there until somebody
    asks for them: a training doesn't, and so has one byte for each lesion.
    """

    def __init__(
        self,
        ids: Sequence[str] | Path,
        fold: NDArray[np.int8],
        data_hash: str,
        seed: int,
        *,
        holdout: float = 0.0,
        kind: str = "patient",
        names: Sequence[str] | None = None,
    ) -> None:
        """`ids` are those of the lesions, or the file of folds that has them."""
        self._ids = ids
        self.fold = fold
        self.data_hash = data_hash
        self.seed = seed
        self.holdout = holdout
        self.kind = kind
        self.names = None if names is None else list(names)
        self.count = int(fold.max()) + 1
        self.hash = split_hash(partial(stretches, ids), fold, data_hash, self.names)

    @cached_property
    def ids(self) -> list[str]:
        return [isic_id for piece in stretches(self._ids) for isic_id in piece.to_pylist()]

    def save(self, path: Path) -> None:
        """Write `isic_id, fold` as Parquet, with the hashes and settings in the file's own metadata."""
        table = pl.DataFrame({"isic_id": self.ids, "fold": self.fold})
        stamps = {"data_hash": self.data_hash, "fold_hash": self.hash, "seed": str(self.seed)}
        # What is as usual is left out, so that a plain split is the same file as ever.
        if self.holdout:
            stamps["holdout"] = repr(self.holdout)
        if self.kind != "patient":
            stamps |= {"kind": self.kind, "names": json.dumps(self.names)}
        with atomic(path) as file:
            table.write_parquet(file, metadata=stamps)

    @classmethod
    def load(cls, path: Path) -> Folds:
        """Read folds; raises `DataError` if a single assignment differs from what was written."""
        try:
            stamps, fold = pl.read_parquet_metadata(path), pl.read_parquet(path, columns=["fold"])["fold"]
            folds = cls(
                path, fold.to_numpy(), stamps["data_hash"], int(stamps["seed"]),
                holdout=float(stamps.get("holdout", 0)), kind=stamps.get("kind", "patient"),
                names=json.loads(stamps.get("names", "null")),
            )  # fmt: skip
        except FileNotFoundError:
            raise DataError(f"{path}: no folds; run `lesionflow data split` first") from None
        except (pl.exceptions.PolarsError, pa.ArrowException, KeyError, ValueError, TypeError) as error:
            raise DataError(f"{path}: not a folds file ({error}); delete it and split again") from None
        if folds.hash != stamps["fold_hash"]:
            raise DataError(
                f"{path}: the folds were changed after they were written (hash {folds.hash[:12]}, "
                f"expected {stamps['fold_hash'][:12]}); delete the file and its run, and split again"
            )
        return folds

    def check(self, store: Store) -> None:
        """Raise `DataError` unless these folds were made for this store, row by row, with every patient on one side.

        The last is looked at itself, since whoever changes a file can also write a new hash into it.
        """
        if store.hash != self.data_hash:
            raise DataError(
                f"folds were made for data {self.data_hash[:12]}, this is {store.hash[:12]}; "
                "use the same data, or a new run directory"
            )
        pieces = zip(stretches(self._ids), stretches(store.ids), strict=False)
        if len(self.fold) != len(store) or not all(a.equals(b) for a, b in pieces):
            raise DataError("folds: the rows stand in another order than the store's; delete the file and split again")
        if store.patients is not None:  # Without patients every lesion is a group of its own.
            check_patients(store.patients, self.fold)

    def train_rows(self, fold: int) -> Rows:
        """The rows a fold's models may learn from, ascending: all others but the hold-out's."""
        return where((self.fold != fold) & (self.fold != HOLDOUT))

    def held_out_rows(self, fold: int) -> Rows:
        """The rows of a fold, ascending."""
        return where(self.fold == fold)

    def holdout_rows(self) -> Rows:
        """The rows that no model learns from, ascending; empty without a hold-out."""
        return where(self.fold == HOLDOUT)


def check_patients(groups: Sequence[str | None], fold: NDArray[np.int8]) -> None:
    """Raise `DataError`, naming the patients, if a group [N] lies in several folds [N] or in one and the hold-out.

    Lesions without a group (None) stand for themselves.
    """
    pairs = pl.DataFrame(schema={"group": pl.String, "fold": pl.Int64})
    for start in range(0, len(groups), STRETCH):
        here = {"group": groups[start : start + STRETCH], "fold": fold[start : start + STRETCH].astype(np.int64)}
        pairs = pl.concat([pairs, pl.DataFrame(here, schema=pairs.schema).drop_nulls("group")]).unique()
    several = pairs.group_by("group").agg(pl.col("fold").sort()).filter(pl.col("fold").list.len() > 1).sort("group")
    if several.is_empty():
        return
    shown = []
    for group, found in several.head(3).iter_rows():
        places = [f"fold {k}" for k in found if k != HOLDOUT] + ["the hold-out"] * (HOLDOUT in found)
        shown.append(f"{group} in {' and '.join(places)}")
    more = ", ..." if len(several) > len(shown) else ""
    raise DataError(
        f"folds: {len(several):,} patients lie in more than one fold ({', '.join(shown)}{more}): held-out scores "
        "would be too good; delete the file and everything trained on it, and split again"
    )


def make_folds(
    ids: Sequence[str],
    targets: NDArray[np.int8],
    groups: Sequence[str],
    *,
    count: int = 5,
    seed: int = 0,
    data_hash: str = "",
    holdout: float = 0.0,
    kind: str = "patient",
    institutions: Sequence[str | None] | None = None,
) -> Folds:
    """Deal groups (patients) to folds, after setting the share `holdout` of them aside.

    ids, targets (0/1), groups and institutions are [N]. `kind="patient"` makes `count` folds.
    `kind="institution"` makes one of each institution with at least five malignant lesions and a benign one (`count`
    is then not looked at); the others are one fold together if they have both classes, else they join the smallest.

    Raises `DataError` when a fold or the hold-out would lack either class, a lesion's institution is unknown, a
    patient was seen at two, or fewer than two folds come out; `UsageError` for a `kind` or a share that isn't one.
    """
    if kind not in KINDS or not 0 <= holdout < 1:
        raise UsageError(f"folds: kind {kind!r}, hold-out {holdout}; expected {' or '.join(KINDS)}, and a share 0..1")
    names, member = np.unique(np.asarray(list(groups)), return_inverse=True)
    malignant = np.bincount(member, weights=targets == 1, minlength=len(names)).astype(np.int64)
    lesions = np.bincount(member, minlength=len(names))
    group_fold = np.zeros(len(names), np.int64)
    if holdout and malignant.any():
        group_fold[_set_aside(malignant, lesions, holdout, seed)] = HOLDOUT
    left = np.flatnonzero(group_fold != HOLDOUT)
    fold_names: list[str] | None = None
    if kind == "institution":
        fold_names, of_lesion = _institutions(ids, targets, groups, institutions, group_fold[member] != HOLDOUT)
        group_fold[member] = np.where(group_fold[member] == HOLDOUT, HOLDOUT, of_lesion)
        count = len(fold_names)
    else:
        if (with_malignant := int((malignant[left] > 0).sum())) < count:
            beside = " outside the hold-out" if holdout else ""
            raise DataError(
                f"target: malignant lesions come from {with_malignant} patients{beside}, {count} folds need at least "
                f"{count}; use fewer folds (folds.count){', a smaller folds.holdout' if holdout else ''} or more data"
            )
        shuffled = left[np.random.default_rng([seed, 0x0F01D5]).permutation(len(left))]
        group_fold[shuffled] = _deal(malignant[shuffled], lesions[shuffled], count)
    fold = group_fold[member].astype(np.int8)
    for k in range(count):
        if not (targets[fold == k] == 0).any():
            raise DataError(f"fold {k} has no benign lesion; use fewer folds (folds.count) or more data")
    if holdout and len(np.unique(targets[fold == HOLDOUT])) < 2:
        raise DataError(
            f"the hold-out ({int((fold == HOLDOUT).sum())} lesions) lacks malignant or benign lesions; use a larger "
            "folds.holdout, none (folds.holdout = 0), or more data"
        )
    return Folds(ids, fold, data_hash, seed, holdout=holdout, kind=kind, names=fold_names)


def _deal(malignant: NDArray[np.int64], lesions: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Greedy: each group to the fold that has the fewest malignant, then the fewest lesions."""
    fold = np.zeros(len(lesions), np.int64)
    have_malignant, have_lesions = [0] * count, [0] * count
    # Largest first balances best; the caller's shuffle decides among equals (lexsort is stable).
    for group in np.lexsort((-lesions, -malignant)).tolist():
        m, n = int(malignant[group]), int(lesions[group])
        if m:
            k = min(range(count), key=lambda f: (have_malignant[f], have_lesions[f], f))
        else:
            k = min(range(count), key=lambda f: (have_lesions[f], f))
        fold[group] = k
        have_malignant[k] += m
        have_lesions[k] += n
    return fold


def _set_aside(malignant: NDArray[np.int64], lesions: NDArray[np.int64], share: float, seed: int) -> NDArray[np.int64]:
    """The groups of the hold-out. Largest first, one is taken whenever less than `share` was taken so far.

    Every group has about the same chance, whatever its size: those of similar size are shuffled, what was "taken so
    far" starts at random, and a group's own size doesn't count against it.
    """
    rng = np.random.default_rng([seed, 0x401D])
    shuffled = rng.permutation(len(lesions))
    dealt = shuffled[np.lexsort((-lesions[shuffled], -malignant[shuffled]))]
    run, ill = int(np.ceil(2 / min(share, 1 - share))), int((malignant > 0).sum())
    for first, end in ((0, ill), (ill, len(dealt))):
        for start in range(first, end, run):
            rng.shuffle(dealt[start : min(start + run, end)])
    # How many malignant lesions, and lesions, the hold-out is short of.
    short_malignant, short_lesions = (share - rng.random(2)) * (malignant[malignant > 0].mean(), lesions.mean())
    taken = []
    for group in dealt.tolist():
        m, n = int(malignant[group]), int(lesions[group])
        inside = (short_malignant if m else short_lesions) > 0
        if inside:
            taken.append(group)
        short_malignant += m * (share - inside)
        short_lesions += n * (share - inside)
    return np.array(taken, np.int64)


def _institutions(
    ids: Sequence[str],
    targets: NDArray[np.int8],
    groups: Sequence[str],
    institutions: Sequence[str | None] | None,
    left: NDArray[np.bool_],
) -> tuple[list[str], NDArray[np.int64]]:
    """Names of the folds, and the fold of each lesion [N], from the lesions that are `left` beside the hold-out."""
    if institutions is None:
        raise DataError(f"a split by institution needs the column attribution; add it, {_BY_PATIENT}")
    if empty := [i for i, name in zip(ids, institutions, strict=True) if not (name and name.strip())]:
        raise DataError(
            f"attribution is empty for {len(empty):,} lesions ({', '.join(sorted(empty)[:5])}"
            f"{', ...' if len(empty) > 5 else ''}): fill in their institution, leave them out, {_BY_PATIENT}"
        )
    seen = pl.DataFrame({"group": groups, "at": institutions}).unique()
    if len(twice := seen.filter(pl.col("group").is_duplicated())["group"].unique().sort()):
        raise DataError(
            f"attribution: {len(twice):,} patients have lesions at two institutions ({', '.join(twice.head(5))}"
            f"{', ...' if len(twice) > 5 else ''}): correct it, leave them out, {_BY_PATIENT}"
        )
    names, at = np.unique(np.asarray(institutions), return_inverse=True)
    malignant = np.bincount(at[left], targets[left] == 1, len(names))
    benign = np.bincount(at[left], targets[left] == 0, len(names))
    own = np.flatnonzero((malignant >= FEWEST_MALIGNANT) & (benign > 0)).tolist()
    others = np.setdiff1d(np.arange(len(names)), own).tolist()
    folds = [[i] for i in own]
    if others and malignant[others].sum() and benign[others].sum():
        folds.append(others)
    elif others and folds:
        min(folds, key=lambda f: (malignant[f].sum(), benign[f].sum())).extend(others)
    if not 2 <= len(folds) <= _MOST:
        counted = zip(names[:5], malignant, benign, strict=False)
        found = ", ".join(f"{name}: {m:.0f} malignant, {n:.0f} benign" for name, m, n in counted)
        raise DataError(
            f"a split by institution would have {max(len(folds), 1)} folds, expected 2 to {_MOST} ({found}); use data "
            f"of more institutions with {FEWEST_MALIGNANT} malignant lesions each, {_BY_PATIENT}"
        )
    fold_of = np.zeros(len(names), np.int64)
    for k, members in enumerate(folds):
        fold_of[members] = k
    return ["; ".join(str(names[i]) for i in members) for members in folds], fold_of[at]


def write_folds(
    store_path: Path, out: Path, *, count: int = 5, seed: int = 0, holdout: float = 0.0, kind: str = "patient"
) -> Folds:
    """Split a store and write the folds, once: a file made for the same data and settings is kept.

    The settings are those of `make_folds`; institutions are the column `attribution`. Raises `DataError` for a file
    that was changed, or was made for other data or settings.
    """
    store = Store.open(store_path)
    if out.exists():
        folds = Folds.load(out)
        folds.check(store)
        # By institution the data give the number of folds.
        asked = (kind, count if kind == "patient" else folds.count, seed, holdout)
        if (folds.kind, folds.count, folds.seed, folds.holdout) != asked:
            raise DataError(
                f"{out}: has {_described(folds.kind, folds.count, folds.seed, folds.holdout)}, "
                f"asked were {_described(*asked)}; keep those settings, or delete the file and everything trained on it"
            )
        return folds
    institutions = store.table["attribution"].to_list() if "attribution" in store.table.columns else None
    folds = make_folds(
        store.ids, store.targets, store.groups, count=count, seed=seed, data_hash=store.hash,
        holdout=holdout, kind=kind, institutions=institutions,
    )  # fmt: skip
    folds.save(out)
    return folds


def _described(kind: str, count: int, seed: int, holdout: float) -> str:
    return f"{count} folds by {kind} with seed {seed} and a hold-out of {holdout:g}"
