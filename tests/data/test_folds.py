"""Patients stay whole, classes stay balanced, and a changed fold file is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from lesionflow.data.folds import Folds, make_folds, write_folds
from lesionflow.errors import DataError


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


def test_what_is_no_folds_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no folds"):
        Folds.load(tmp_path / "missing.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="not a folds file"):
        Folds.load(tmp_path / "bad.parquet")
