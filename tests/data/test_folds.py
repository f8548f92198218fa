"""Patients stay whole, classes stay balanced, and a changed fold file is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from lesionflow.data.folds import HOLDOUT, Folds, make_folds, write_folds
from lesionflow.data.store import Store
from lesionflow.errors import DataError, UsageError


def cohort(seed: int = 0, patients: int = 60) -> tuple[list[str], np.ndarray, list[str]]:
    rng = np.random.default_rng(seed)
    sizes = np.minimum(rng.lognormal(2.5, 1, patients).astype(int) + 1, 200)
    groups = [f"IP_{p:07d}" for p, n in enumerate(sizes) for _ in range(n)]
    targets = (rng.random(len(groups)) < 0.06).astype(np.int8)
    return [f"ISIC_{i:07d}" for i in range(len(groups))], targets, groups


@pytest.mark.parametrize("seed", range(5))
def test_patients_are_whole_and_malignant_lesions_even(seed: int) -> None:
    ids, targets, groups = cohort(seed)
    folds = make_folds(ids, targets, groups, count=5, seed=seed)
    by_group: dict[str, set[int]] = {}
    for group, fold in zip(groups, folds.fold.tolist(), strict=True):
        by_group.setdefault(group, set()).add(fold)
    assert all(len(found) == 1 for found in by_group.values())
    malignant = np.bincount(folds.fold, weights=targets)
    lesions = np.bincount(folds.fold)
    assert malignant.max() - malignant.min() <= 3
    assert lesions.max() - lesions.min() < 0.1 * len(ids)
    assert sorted(np.concatenate([folds.held_out_rows(k) for k in range(5)]).tolist()) == list(range(len(ids)))


def test_the_split_follows_the_seed_and_not_the_row_order() -> None:
    ids, targets, groups = cohort()
    folds = make_folds(ids, targets, groups, seed=1)
    order = np.random.default_rng(5).permutation(len(ids))
    shuffled = make_folds([ids[i] for i in order], targets[order], [groups[i] for i in order], seed=1)
    assert dict(zip(shuffled.ids, shuffled.fold.tolist(), strict=True)) == dict(
        zip(folds.ids, folds.fold.tolist(), strict=True)
    )
    assert shuffled.hash == folds.hash
    assert make_folds(ids, targets, groups, seed=2).hash != folds.hash


def test_a_changed_assignment_is_refused(tmp_path: Path) -> None:
    ids, targets, groups = cohort()
    path = tmp_path / "folds.parquet"
    make_folds(ids, targets, groups, data_hash="d").save(path)
    stamps = pl.read_parquet_metadata(path)
    table = pl.read_parquet(path)
    moved = table.with_columns(pl.when(pl.col("isic_id") == ids[3]).then(9).otherwise("fold").alias("fold"))
    moved.cast({"fold": pl.Int8}).write_parquet(
        path, metadata={k: stamps[k] for k in ("data_hash", "fold_hash", "seed")}
    )
    with pytest.raises(DataError, match="changed after they were written"):
        Folds.load(path)


def test_folds_of_other_data_are_refused(tmp_path: Path, prepared: Path) -> None:
    ids, targets, groups = cohort()
    path = tmp_path / "folds.parquet"
    make_folds(ids, targets, groups, data_hash="other").save(path)
    with pytest.raises(DataError, match="folds were made for data"):
        write_folds(prepared / "store", path)


def test_a_second_split_reuses_the_first(tmp_path: Path, prepared: Path) -> None:
    path = tmp_path / "folds.parquet"
    first = write_folds(prepared / "store", path, count=3)
    stamp = path.stat().st_mtime_ns
    assert write_folds(prepared / "store", path, count=3).hash == first.hash
    assert path.stat().st_mtime_ns == stamp
    with pytest.raises(DataError, match="3 folds"):
        write_folds(prepared / "store", path, count=4)


def test_too_few_malignant_patients_are_named() -> None:
    ids, targets, groups = cohort()
    targets[:] = 0
    targets[:3] = 1
    with pytest.raises(DataError, match=r"folds\.count"):
        make_folds(ids, targets, groups, count=5)


def test_a_plain_split_is_the_one_it_always_was() -> None:
    """Runs that exist go on, and comparisons across versions stay paired: these hashes must not change."""
    hashes = {s: make_folds(*cohort(s), count=5, seed=s, data_hash="d").hash[:16] for s in range(3)}
    assert hashes == {0: "ba737dae5bb7c754", 1: "89b3d8f9394fe5ff", 2: "fef846bbbb8468ed"}


@pytest.mark.parametrize("share", [0.1, 0.2, 0.5])
def test_the_holdout_has_its_share_of_both_classes_and_whole_patients(share: float) -> None:
    ids, targets, groups = cohort(4)
    folds = make_folds(ids, targets, groups, count=3, holdout=share)
    aside = folds.holdout_rows()
    assert folds.count == 3
    assert abs(targets[aside].sum() - share * targets.sum()) <= 3
    assert abs(len(aside) - share * len(ids)) <= max(groups.count(g) for g in groups)
    assert not {groups[i] for i in aside} & {g for g, k in zip(groups, folds.fold, strict=True) if k != HOLDOUT}
    for k in range(3):
        assert not set(folds.train_rows(k)) & (set(aside) | set(folds.held_out_rows(k)))
        assert len(folds.train_rows(k)) + len(folds.held_out_rows(k)) + len(aside) == len(ids)
    malignant = np.bincount(folds.fold[folds.fold >= 0], weights=targets[folds.fold >= 0])
    assert malignant.max() - malignant.min() <= 3


def test_every_patient_may_be_held_out_whatever_its_size() -> None:
    ids, targets, groups = cohort()
    owners, size = np.unique(groups, return_counts=True)
    largest = set(owners[np.argsort(-size)[:5]])
    seen = []
    for seed in range(60):
        folds = make_folds(ids, targets, groups, count=2, seed=seed, holdout=0.2)
        seen.append(len(largest & {groups[i] for i in folds.holdout_rows()}) / 5)
    assert 0.12 < np.mean(seen) < 0.3


def test_another_seed_holds_out_others_even_where_no_two_patients_are_of_one_size() -> None:
    groups = [f"IP_{p:03d}" for p in range(60) for _ in range(p + 2)]
    targets = np.r_[1, np.diff(np.unique(groups, return_inverse=True)[1])].astype(np.int8)  # One each.
    ids = [f"ISIC_{i:07d}" for i in range(len(groups))]
    drawn = {
        tuple(make_folds(ids, targets, groups, count=2, seed=seed, holdout=0.2).holdout_rows()) for seed in range(30)
    }
    assert len(drawn) == 30


def test_the_holdout_follows_the_seed_and_not_the_row_order() -> None:
    ids, targets, groups = cohort()
    folds = make_folds(ids, targets, groups, seed=1, holdout=0.2)
    order = np.random.default_rng(5).permutation(len(ids))
    shuffled = make_folds([ids[i] for i in order], targets[order], [groups[i] for i in order], seed=1, holdout=0.2)
    assert shuffled.hash == folds.hash
    assert make_folds(ids, targets, groups, seed=2, holdout=0.2).hash != folds.hash


def test_a_holdout_without_malignant_lesions_is_refused() -> None:
    ids, targets, groups = cohort()
    targets[:] = 0
    targets[[groups.index(g) for g in sorted(set(groups))[:3]]] = 1
    refused = 0
    for seed in range(20):
        try:
            make_folds(ids, targets, groups, count=2, seed=seed, holdout=0.05)
        except DataError as error:
            assert "folds.holdout" in str(error)
            refused += 1
    assert refused > 10
    with pytest.raises(DataError, match=r"0 patients outside the hold-out|from 0 patients"):
        make_folds(ids, np.zeros_like(targets), groups, count=2, holdout=0.2)


@pytest.mark.parametrize(("holdout", "kind"), [(1.0, "patient"), (-0.1, "patient"), (0.0, "clinic")])
def test_what_is_no_split_is_refused(holdout: float, kind: str) -> None:
    with pytest.raises(UsageError, match="patient or institution"):
        make_folds(*cohort(), holdout=holdout, kind=kind)


def clinics(seed: int = 0) -> tuple[list[str], np.ndarray, list[str], list[str]]:
    """Patients of four institutions, of which two have fewer than five malignant lesions."""
    ids, targets, groups = cohort(seed)
    place = {g: "ABCD"[i % 4] for i, g in enumerate(sorted(set(groups)))}
    where = [place[g] for g in groups]
    for small, keep in (("C", 3), ("D", 2)):
        rows = [i for i, name in enumerate(where) if name == small]
        targets[rows] = 0
        targets[rows[:keep]] = 1
    return ids, targets, groups, where


def test_each_institution_is_a_fold_and_the_small_ones_one_together() -> None:
    ids, targets, groups, where = clinics()
    folds = make_folds(ids, targets, groups, kind="institution", institutions=where)
    assert (folds.kind, folds.names, folds.count) == ("institution", ["A", "B", "C; D"], 3)
    assert folds.fold.tolist() == [{"A": 0, "B": 1}.get(name, 2) for name in where]


def test_small_institutions_without_malignant_lesions_join_the_smallest() -> None:
    ids, targets, groups, where = clinics()
    targets[[name in "CD" for name in where]] = 0
    smallest = min("AB", key=lambda a: sum(t for t, name in zip(targets, where, strict=True) if name == a))
    folds = make_folds(ids, targets, groups, kind="institution", institutions=where)
    assert folds.names == (["A; C; D", "B"] if smallest == "A" else ["A", "B; C; D"])


def test_an_institution_split_sets_patients_of_every_place_aside() -> None:
    ids, targets, groups, where = clinics()
    folds = make_folds(ids, targets, groups, kind="institution", institutions=where, holdout=0.2)
    aside = folds.holdout_rows()
    assert {where[i] for i in aside} == set("ABCD")
    assert not {groups[i] for i in aside} & {g for g, k in zip(groups, folds.fold, strict=True) if k != HOLDOUT}
    for k, name in enumerate(folds.names or ()):
        assert {where[i] for i in folds.held_out_rows(k)} == set(name.split("; "))


def test_institutions_that_cant_be_split_are_refused_by_name() -> None:
    ids, targets, groups, where = clinics()
    with pytest.raises(DataError, match="column attribution"):
        make_folds(ids, targets, groups, kind="institution")
    with pytest.raises(DataError, match=rf"empty for 2 lesions \({ids[3]}, {ids[7]}\)"):
        empty = [None if i == 3 else " " if i == 7 else name for i, name in enumerate(where)]
        make_folds(ids, targets, groups, kind="institution", institutions=empty)
    with pytest.raises(DataError, match=rf"1 patients have lesions at two institutions \({groups[0]}\)"):
        make_folds(ids, targets, groups, kind="institution", institutions=["D", *where[1:]])
    with pytest.raises(DataError, match=r"1 folds.*folds\.kind"):
        make_folds(ids, targets, groups, kind="institution", institutions=["A"] * len(ids))


def prepared_store(tmp_path: Path, synthetic: Path) -> Path:
    from lesionflow.data.store import prepare

    prepare(synthetic, tmp_path / "store")
    return tmp_path / "store"


def test_settings_are_kept_in_the_file_and_others_refused(tmp_path: Path, synthetic: Path) -> None:
    store, path = prepared_store(tmp_path, synthetic), tmp_path / "folds.parquet"
    first = write_folds(store, path, kind="institution", holdout=0.25)
    again = write_folds(store, path, kind="institution", holdout=0.25, count=9)
    assert again.hash == first.hash
    assert (again.kind, again.names, again.holdout) == ("institution", first.names, 0.25)
    assert first.names
    where = Store.open(store).table["attribution"].to_list()
    assert {where[i] for i in first.held_out_rows(0)} == set(first.names[0].split("; "))
    with pytest.raises(DataError, match=r"by institution with seed 0 and a hold-out of 0.25, asked were 5 folds"):
        write_folds(store, path, holdout=0.25)
    with pytest.raises(DataError, match=r"asked were .* hold-out of 0\.2;"):
        write_folds(store, path, kind="institution", holdout=0.2)


def test_institutions_with_swapped_names_are_refused(tmp_path: Path) -> None:
    ids, targets, groups, where = clinics()
    path = tmp_path / "folds.parquet"
    make_folds(ids, targets, groups, kind="institution", institutions=where).save(path)
    stamps = {k: v for k, v in pl.read_parquet_metadata(path).items() if k != "ARROW:schema"}
    pl.read_parquet(path).write_parquet(path, metadata={**stamps, "names": '["B", "A", "C; D"]'})
    with pytest.raises(DataError, match="changed after they were written"):
        Folds.load(path)


@pytest.mark.parametrize("moved_to", [1, HOLDOUT])
def test_a_patient_on_two_sides_is_refused_by_name_even_with_a_new_hash(
    tmp_path: Path, synthetic: Path, moved_to: int
) -> None:
    store = Store.open(prepared_store(tmp_path, synthetic))
    folds = make_folds(store.ids, store.targets, store.groups, count=2, data_hash=store.hash)
    row = int(np.flatnonzero(folds.fold == 0)[0])
    forged = folds.fold.copy()
    forged[row] = moved_to
    path = tmp_path / "folds.parquet"
    Folds(folds.ids, forged, store.hash, 0).save(path)  # Its own hash is right.
    place = "the hold-out" if moved_to == HOLDOUT else "fold 1"
    with pytest.raises(
        DataError, match=rf"1 patients lie in more than one fold \({store.groups[row]} in fold 0 and {place}"
    ):
        Folds.load(path).check(store)
    folds.check(store)


def test_what_is_no_folds_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no folds"):
        Folds.load(tmp_path / "missing.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="not a folds file"):
        Folds.load(tmp_path / "bad.parquet")
