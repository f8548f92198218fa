"""A training rank keeps a few bytes of each lesion, and no Python object; what replaces lists does as they did."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from lesionflow.data import rows as rowsets
from lesionflow.data import splithash
from lesionflow.data.datamodule import LesionData
from lesionflow.data.folds import Folds
from lesionflow.data.images import PreprocessSpec
from lesionflow.data.sampler import DRAWS, Sampler
from lesionflow.data.store import Store
from lesionflow.errors import DataError
from lesionflow.keys import digest
from lesionflow.recipe import Sampling

KEPT, MOST = 3, 10
"""Bytes that a lesion may cost for as long as a training lasts, and for a moment. A list of ids takes 70."""
SIZES = 20_000, 120_000


@pytest.fixture
def large(encode, tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """Make a store and folds of so many lesions, one picture for all: `large(lesions)` -> their paths."""
    picture = encode(0, width=40, height=40)

    def make(lesions: int, ids: Callable[[int], str] = "ISIC_{:07d}".format) -> tuple[Path, Path]:
        path = tmp_path / f"store-{lesions}"
        path.mkdir()
        patients = [None if i % 50 == 7 else f"IP_{i % 900:07d}" for i in range(lesions)]
        table = pa.table(
            {
                "isic_id": pa.array(map(ids, range(lesions)), pa.large_string()),
                "target": pa.array((np.arange(lesions) % 997 == 0).astype(np.int8)),
                "patient_id": pa.array(patients, pa.large_string()),
                "image": pa.array([picture] * lesions, pa.large_binary()),
            }
        )
        with pa.ipc.new_file(path / "lesions.arrow", table.schema) as writer:
            writer.write_table(table, max_chunksize=4096)
        (path / "store.json").write_text(json.dumps({"format": 1, "hash": "data", "lesions": lesions}))
        fold = np.array([i % 5 if patient is None else int(patient[3:]) % 5 for i, patient in enumerate(patients)])
        Folds(table["isic_id"].to_pylist(), fold.astype(np.int8), "data", 0).save(path / "folds.parquet")
        return path, path / "folds.parquet"

    return make


def a_rank(store_path: Path, folds_path: Path, sampling: str) -> tuple[object, ...]:
    """What a training rank opens, checks and draws from; returns all that it holds on to."""
    store, folds = Store.open(store_path), Folds.load(folds_path)
    folds.check(store)
    train = folds.train_rows(0)
    targets = rowsets.take(store.targets, train)
    sampler = Sampler(train, targets, Sampling(sampling), epochs=4, batch_size=64, seed=1)
    del train, targets
    data = LesionData(store, PreprocessSpec(size=32), sampler, start=max(0, sampler.steps_per_epoch - 3))
    device = SimpleNamespace(root_device=SimpleNamespace(type="cpu"))
    data.trainer = SimpleNamespace(global_rank=0, world_size=2, strategy=device)  # type: ignore[assignment]
    for number, batch in enumerate(data.train_dataloader()):  # Over the end of an epoch.
        assert store.ids[int(batch.row[0])].startswith("ISIC_")
        if number == 5:
            break
    assert "table" not in vars(store) and "ids" not in vars(folds)
    return store, store.ids, store.groups, folds, sampler, data


@pytest.mark.parametrize("sampling", ["balanced", "shuffle"])
def test_a_rank_keeps_no_object_of_each_lesion(large, sampling: str) -> None:
    held, most = [], []
    a_rank(*large(5_000), sampling)  # What is imported and cached once isn't counted.
    for lesions in SIZES:
        paths = large(lesions)
        tracemalloc.start()
        rank = a_rank(*paths, sampling)
        now, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        held.append(now)
        most.append(peak)
        del rank
    kept, peak = ((one[1] - one[0]) / (SIZES[1] - SIZES[0]) for one in (held, most))
    # An order of all training lesions takes four bytes each.
    assert kept < KEPT + 4 * (sampling == "shuffle"), f"{kept:.1f} bytes of each lesion are kept"
    assert peak < MOST, f"{peak:.1f} bytes of each lesion at most"


def test_texts_do_what_a_list_does(large) -> None:
    store = Store.open(large(9_000)[0])
    ids, groups, table = store.table["isic_id"].to_list(), store.groups, store.table
    assert store.ids == ids and len(store.ids) == 9_000 and store.ids != ids[:-1]
    assert (store.ids[0], store.ids[5_000], store.ids[-1]) == (ids[0], ids[5_000], ids[-1])
    assert store.ids[4_090:4_100] == ids[4_090:4_100] and store.ids[::-1000] == ids[::-1000]
    with pytest.raises(IndexError):
        store.ids[9_000]
    chosen = np.array([8_999, 7, 4_096, 7], np.int32)
    assert store.ids.take(chosen).to_list() == [ids[row] for row in chosen]
    assert groups == table.select(pl.coalesce("patient_id", "isic_id"))["patient_id"].to_list()
    assert groups[7] == ids[7], "a lesion without a patient is its own group"
    assert pl.DataFrame({"isic_id": store.ids, "row": range(9_000)})["isic_id"].to_list() == ids
    assert ids[17] in store.ids and "ISIC_x" not in store.ids


def test_rows_are_numpys_in_half_the_bytes() -> None:
    flags = np.random.default_rng(0).random(200_003) < 0.3
    found = rowsets.where(flags)
    assert found.dtype == np.int32 and np.array_equal(found, np.flatnonzero(flags))
    values = np.arange(200_003, dtype=np.int8)
    assert np.array_equal(rowsets.take(values, found[::-1]), values[found[::-1]])
    assert len(rowsets.where(flags[:0])) == 0


@pytest.mark.parametrize("part", [1 << 18, 512])
@pytest.mark.parametrize("names", [None, ["A", "ü"]])
def test_the_hash_of_a_split_is_that_of_its_sorted_list(part: int, names, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splithash, "PART", part)
    for ids in ([f"ISIC_{i:07d}" for i in range(3_000)], [f'é{i * 7919 % 3001}"' for i in range(3_000)], ["b", "a"]):
        fold = (np.arange(len(ids)) % 5 - 1).astype(np.int8)
        content = {"data": "d", "folds": sorted(zip(ids, fold.tolist(), strict=True))}
        expected = digest(content if names is None else content | {"names": names})

        def pieces(ids: list[str] = ids):
            return (pa.array(ids[start : start + 700], pa.large_string()) for start in range(0, len(ids), 700))

        assert splithash.split_hash(pieces, fold, "d", names) == expected


def test_folds_in_another_order_than_the_stores_are_refused(large) -> None:
    store_path, folds_path = large(6_000)
    store, folds = Store.open(store_path), Folds.load(folds_path)
    folds.check(store)
    moved = Folds([*folds.ids[1:], folds.ids[0]], folds.fold, "data", 0)
    shorter = Folds(folds.ids[:-1], folds.fold[:-1], "data", 0)
    for wrong in (moved, shorter):
        with pytest.raises(DataError, match="another order"):
            wrong.check(store)


@pytest.mark.parametrize("kind", ["balanced", "shuffle"])
def test_the_order_is_what_it_was_with_whole_arrays_in_memory(kind: str) -> None:
    """Trainings that exist go on at their step: the order, and the numbers that belong to it, must not change."""
    rows, targets = np.arange(0, 2_000, 2), (np.arange(1_000) % 40 == 0).astype(np.int8)
    sampler = Sampler(rows, targets, Sampling(kind, 3.0), epochs=12, batch_size=32, seed=9)
    malignant, others = rows[targets == 1], rows[targets == 0]
    count = sampler.lesions_per_epoch - len(malignant)
    passes = np.concatenate([np.random.default_rng([9, number, 2]).permutation(others) for number in range(3)])
    for epoch in (0, 11, 3):
        drawn = np.concatenate([malignant, passes[epoch * count : (epoch + 1) * count]])
        order = np.random.default_rng([9, epoch, 1]).permutation(drawn if kind == "balanced" else rows)
        randoms = np.random.default_rng([9, epoch, 3]).random((len(order), DRAWS), np.float32)
        steps = range(epoch * sampler.steps_per_epoch, (epoch + 1) * sampler.steps_per_epoch)
        shown = [sampler.batch(step) for step in steps]
        assert np.array_equal(np.concatenate([draws.rows for draws in shown]), order)
        assert np.array_equal(np.concatenate([draws.randoms for draws in shown]), randoms)
