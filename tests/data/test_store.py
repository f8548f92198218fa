"""A store gives back every byte, refuses what it can't hold, and costs no memory."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import h5py
import numpy as np
import polars as pl
import pytest

from lesionflow.data.source import open_source
from lesionflow.data.store import Store, prepare
from lesionflow.errors import DataError


def changed(synthetic: Path, out: Path) -> Path:
    shutil.copytree(synthetic, out)
    return out


def test_every_image_and_cell_comes_back(synthetic: Path, tmp_path: Path) -> None:
    store = prepare(synthetic, tmp_path / "store")
    with open_source(synthetic) as source:
        assert store.ids == source.ids
        assert all(store.jpeg(row) == data for row, (_, data) in enumerate(source.images(source.ids)))
        assert store.table.equals(source.metadata.select(store.table.columns))
        assert store.targets.tolist() == source.metadata["target"].to_list()
        assert store.groups == source.metadata["patient_id"].to_list()
    assert store.info["synthetic"]


def test_batches_join_without_a_seam(synthetic: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lesionflow.data.store._BATCH", 37)
    small = prepare(synthetic, tmp_path / "small")
    monkeypatch.undo()
    whole = prepare(synthetic, tmp_path / "whole")
    assert [small.jpeg(row) for row in range(len(small))] == [whole.jpeg(row) for row in range(len(whole))]
    assert small.hash == whole.hash, "the hash is of the content, not of how it is cut"


def test_the_hash_follows_the_content(synthetic: Path, tmp_path: Path) -> None:
    first = prepare(synthetic, tmp_path / "a").hash
    assert prepare(synthetic, tmp_path / "b").hash == first
    data = changed(synthetic, tmp_path / "data")
    with h5py.File(data / "train-image.hdf5", "r+") as file:
        name = next(iter(file))
        image = bytes(file[name][()])
        del file[name]
        file.create_dataset(name, data=np.bytes_(image[:-3] + b"\x00" + image[-2:]))
    assert prepare(data, tmp_path / "c").hash != first


def test_a_store_travels_to_workers(synthetic: Path, tmp_path: Path) -> None:
    store = prepare(synthetic, tmp_path / "store")
    copy = pickle.loads(pickle.dumps(store))
    assert len(pickle.dumps(store)) < 1000
    assert copy.jpeg(11) == store.jpeg(11)


def test_a_missing_image_is_named_or_left_out(synthetic: Path, tmp_path: Path) -> None:
    data = changed(synthetic, tmp_path / "data")
    with h5py.File(data / "train-image.hdf5", "r+") as file:
        name = sorted(file)[7]
        del file[name]
    with pytest.raises(DataError, match=name):
        prepare(data, tmp_path / "store")
    assert not (tmp_path / "store" / "store.json").exists()
    store = prepare(data, tmp_path / "store", skip_corrupt=True)
    assert store.info["skipped"] == [name]
    assert name not in store.ids


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.drop("target"), ("target", "missing")),
        (lambda t: pl.concat([t, t.head(1)]), ("more than once", "ISIC_")),
        (lambda t: t.with_columns(target=pl.when(pl.col("isic_id") == t["isic_id"][4]).then(None).otherwise("target")),
         ("without a target", "ISIC_")),
        (lambda t: t.head(0), ("rows",)),
    ],
)  # fmt: skip
def test_unusable_metadata_is_refused_by_column_and_id(synthetic: Path, tmp_path: Path, change, words) -> None:
    data = changed(synthetic, tmp_path / "data")
    table = pl.read_csv(data / "train-metadata.csv", infer_schema=False)
    change(table).write_csv(data / "train-metadata.csv")
    with pytest.raises(DataError) as caught:
        prepare(data, tmp_path / "store")
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_an_image_model_needs_only_id_and_target(synthetic: Path, tmp_path: Path) -> None:
    data = changed(synthetic, tmp_path / "data")
    table = pl.read_csv(data / "train-metadata.csv", infer_schema=False)
    table.select("isic_id", "target").write_csv(data / "train-metadata.csv")
    store = prepare(data, tmp_path / "store")
    assert store.groups == store.ids, "without patients every lesion is its own group"


def test_the_real_images_fit(real_data: Path, tmp_path: Path) -> None:
    store = prepare(real_data / "isic2024-images", tmp_path / "store")
    assert (len(store), int((store.targets == 1).sum()), store.info["patients_known"]) == (7479, 237, 177)
    assert not store.info["synthetic"]


def test_a_damaged_store_is_refused(synthetic: Path, tmp_path: Path) -> None:
    prepare(synthetic, tmp_path / "store")
    arrow = tmp_path / "store" / "lesions.arrow"
    whole = arrow.read_bytes()
    arrow.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="prepare the store again"):
        Store.open(tmp_path / "store")
    arrow.write_bytes(whole)
    info = json.loads((tmp_path / "store" / "store.json").read_text())
    (tmp_path / "store" / "store.json").write_text(json.dumps({**info, "lesions": 3}))
    with pytest.raises(DataError, match=r"store\.json says 3"):
        Store.open(tmp_path / "store")
    with pytest.raises(DataError, match="not a lesion store"):
        Store.open(tmp_path)
