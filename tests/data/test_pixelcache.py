"""The cache holds the pixels that decoding gives, is whole or nothing, and changes no result."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from torch.utils.data import DataLoader, StackDataset

from lesionflow import plan
from lesionflow.data import pixelcache
from lesionflow.data.diagnosis import UNKNOWN
from lesionflow.data.images import PreprocessSpec
from lesionflow.data.lesions import Lesions, as_it_is, gather
from lesionflow.data.sampler import Sampler, StepSampler
from lesionflow.data.store import Store, prepare
from lesionflow.errors import DataError, Preempted
from lesionflow.keys import file_hash
from lesionflow.recipe import Recipe, Sampling

SPEC = PreprocessSpec(size=32)


@pytest.fixture(scope="module")
def ready(synthetic: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(synthetic, tmp_path_factory.mktemp("cached") / "run" / "store").path.parent


@pytest.fixture
def store(ready: Path, tmp_path: Path) -> Store:
    shutil.copytree(ready, tmp_path / "run")
    return Store.open(tmp_path / "run" / "store")


def decoded(store: Store) -> np.ndarray:
    return np.stack([pixelcache.pixels(store, row, SPEC) for row in range(len(store))])


def steps_of(store: Store) -> StepSampler:
    rows = np.arange(len(store))
    sampler = Sampler(rows, store.targets, Sampling("balanced", 2.0), epochs=1, batch_size=32, seed=1)
    return StepSampler(sampler, 0, 0, 1)


@pytest.mark.parametrize("processes", [1, 2])
def test_the_cache_is_what_decoding_gives(store: Store, processes: int) -> None:
    cache = pixelcache.build(store, SPEC, processes=processes)
    expected = decoded(store)
    assert np.array_equal(np.fromfile(cache.path, np.uint8), expected.reshape(-1))
    rows = np.array([7, 0, len(store) - 1, 7])
    assert np.array_equal(gather(store, rows, SPEC, cache), gather(store, rows, SPEC))
    for wrong in (-1, len(store)):
        with pytest.raises(IndexError):
            cache.take(np.array([0, wrong]), np.empty((2, 32, 32, 3), np.uint8))
    assert len(pickle.dumps(cache)) < 500
    assert sorted(p.name for p in cache.path.parent.iterdir()) == sorted(
        [".lock", cache.path.name, cache.path.with_suffix(".json").name]
    )


def loader_of(store: Store, workers: int, start: str | None) -> DataLoader:
    """Batches decoded and from the cache, side by side from the same workers."""
    cache = pixelcache.build(store, SPEC)
    # Opened anew: nothing has been read that a forked worker would have to ask the parent's threads for.
    new = Store.open(store.path)
    both = StackDataset(decoded=Lesions(new, SPEC), cached=Lesions(new, SPEC, cache))
    return DataLoader(
        both, sampler=steps_of(store), batch_size=None, collate_fn=as_it_is, num_workers=workers,
        multiprocessing_context=start, timeout=60 if workers else 0,
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(("workers", "start"), [(0, None), (2, "fork"), (2, "spawn"), (8, "fork"), (8, "spawn")])
def test_batches_are_the_same_whatever_the_workers(store: Store, workers: int, start: str | None) -> None:
    expected, seen = decoded(store), 0
    for batch, drawn in zip(loader_of(store, workers, start), steps_of(store), strict=True):
        for found in (batch["decoded"], batch["cached"]):
            assert found.image.numpy().tobytes() == expected[drawn.rows].tobytes()
            assert found.row.tolist() == drawn.rows.tolist()
            assert found.target.tolist() == store.targets[drawn.rows].tolist()
            assert torch.equal(found.randoms, torch.from_numpy(drawn.randoms))
            assert (found.kind == UNKNOWN).all()
        seen += len(drawn)
    assert seen >= 100


def test_a_killed_worker_is_an_error_and_no_hang(store: Store) -> None:
    batches = iter(loader_of(store, 2, "fork"))
    next(batches)
    os.kill(batches._workers[1].pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"DataLoader worker .*(killed by signal|exited unexpectedly)"):
        list(batches)


def test_a_cache_is_of_one_store_and_spec_and_damage_is_not_served(store: Store) -> None:
    cache = pixelcache.build(store, SPEC)
    about = cache.path.with_suffix(".json")
    whole, description = cache.path.read_bytes(), about.read_text()
    assert pixelcache.find(store, SPEC) is not None
    for other in (PreprocessSpec(size=48), PreprocessSpec(size=32, filter="bicubic")):
        assert pixelcache.find(store, other) is None
    damaged = bytearray(whole)
    damaged[-5] ^= 1
    for data, text in (
        (whole[:-1], description),
        (bytes(damaged), description),
        (whole, json.dumps({**json.loads(description), "store": "0" * 64})),
        (whole, description[:100]),
        (whole, "null"),
    ):
        cache.path.write_bytes(data)
        about.write_text(text)
        assert pixelcache.find(store, SPEC) is None
        pixelcache.build(store, SPEC)
        assert (cache.path.read_bytes(), about.read_text()) == (whole, description)
    about.unlink()  # Killed between the two files.
    assert pixelcache.find(store, SPEC) is None


BUILD = """
import sys, time
from pathlib import Path
from lesionflow.data import pixelcache
from lesionflow.data.images import PreprocessSpec
from lesionflow.data.store import Store
if __name__ == "__main__":
    plain, spec = pixelcache.pixels, PreprocessSpec(size=32)
    def slowly(*arguments):
        time.sleep(float(sys.argv[2]))
        return plain(*arguments)
    pixelcache.pixels = slowly
    began = []
    write = pixelcache._written
    pixelcache._written = lambda *a: began.append(1) or write(*a)
    print(pixelcache.build(Store.open(Path(sys.argv[1])), spec).path.name, len(began))
"""


def builder(store: Store, seconds: float) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", BUILD, str(store.path), str(seconds)], stdout=subprocess.PIPE, text=True
    )


def wait_for_build(store: Store, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not any(pixelcache._builds(pixelcache.path_of(store, SPEC))):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


def test_a_killed_build_leaves_nothing_that_is_taken_for_whole(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    process = builder(store, 0.02)
    wait_for_build(store, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert pixelcache.find(store, SPEC) is None
    assert not pixelcache.path_of(store, SPEC).exists()
    monkeypatch.setattr(pixelcache, "PATIENCE", -1.0)
    cache = pixelcache.build(store, SPEC)
    assert np.array_equal(np.fromfile(cache.path, np.uint8), decoded(store).reshape(-1))
    assert not any(pixelcache._builds(cache.path)), "what the killed one left is removed"


def test_of_two_builds_at_once_one_works_and_the_other_waits(store: Store) -> None:
    first = builder(store, 0.005)
    wait_for_build(store, first)
    second = builder(store, 0.005)
    said = [process.communicate(timeout=60)[0].split() for process in (first, second)]
    name = pixelcache.path_of(store, SPEC).name
    assert said == [[name, "1"], [name, "0"]]


def test_without_locks_two_builds_do_each_other_no_harm(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    first = builder(store, 0.005)
    wait_for_build(store, first)
    monkeypatch.setattr(pixelcache, "PATIENCE", 0.3)
    monkeypatch.setattr(pixelcache, "_builds", lambda path: iter(()))  # As if nothing was written.
    monkeypatch.setattr(pixelcache, "_clear", lambda path: None)
    cache = pixelcache.build(store, SPEC)
    assert np.array_equal(np.fromfile(cache.path, np.uint8), decoded(store).reshape(-1))
    assert first.wait(60) == 0
    assert pixelcache.find(store, SPEC) is not None


@pytest.mark.parametrize("processes", [1, 2])
def test_a_lesion_that_cannot_be_decoded_is_named(
    store: Store, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    # In the file, so that the processes see it too: past the header, nothing is left.
    row, arrow = 300, store.path / "lesions.arrow"
    image, data = store.jpeg(row), arrow.read_bytes()
    assert data.count(image) == 1
    name = store.ids[row]
    arrow.write_bytes(data.replace(image, image[: len(image) // 3] + bytes(len(image) - len(image) // 3)))
    with pytest.raises(DataError, match=rf"image {name}: .*skip_corrupt"):
        pixelcache.build(Store.open(store.path), SPEC, processes=processes)
    assert [p.name for p in pixelcache.path_of(store, SPEC).parent.iterdir()] == [".lock"]


def test_a_build_stops_when_asked(store: Store) -> None:
    with pytest.raises(Preempted):
        pixelcache.build(store, SPEC, asked=lambda: True)
    assert not any(pixelcache._builds(pixelcache.path_of(store, SPEC)))


def test_what_is_kept_follows_from_mode_schedule_and_space(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    many, need = len(store) + 1, pixelcache.needed(store, SPEC)
    assert need == len(store) * 32 * 32 * 3

    def disk(free: int) -> None:
        monkeypatch.setattr(pixelcache, "_free", lambda store: free)

    disk(10 * need)
    assert pixelcache.obtain(store, SPEC, "off", reads=many) is None
    assert pixelcache.obtain(store, SPEC, "auto", reads=len(store)) is None
    disk(2 * need - 1)
    assert pixelcache.obtain(store, SPEC, "auto", reads=many) is None
    disk(need - 1)
    with pytest.raises(DataError, match=rf"{need:,} bytes, {need - 1:,} are free.*training\.cache=off.*volume"):
        pixelcache.obtain(store, SPEC, "on", reads=0)
    disk(2 * need)
    assert pixelcache.obtain(store, SPEC, "auto", reads=many) is not None
    disk(0)
    assert pixelcache.obtain(store, SPEC, "auto", reads=0) is not None, "it is there already"
    assert pixelcache.obtain(store, SPEC, "off", reads=many) is None


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_fills_up_meanwhile_is_an_error_with_a_remedy(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, data: memoryview, offset: int) -> int:
        with Path("/dev/full").open("wb", buffering=0) as device:
            return device.write(data) or 0

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(DataError, match=r"filled up.*training\.cache=off"):
        pixelcache.build(store, SPEC)
    assert [p.name for p in pixelcache.path_of(store, SPEC).parent.iterdir()] == [".lock"]


def test_training_ends_with_the_same_weights_and_scores_with_and_without(prepared: Path, tmp_path: Path) -> None:
    found, plans = [], []
    for mode in ("on", "off"):
        run = Path(shutil.copytree(prepared, tmp_path / mode))
        recipe = Recipe.load(prepared / "recipe.toml", [f"training.cache={mode}"])
        (run / "recipe.toml").write_text(recipe.to_toml())
        plans.append(plan.plan_keys(recipe, "data"))
        command = [sys.executable, "-m", "lesionflow.training.worker", str(run), "--folds", "0"]
        assert subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode == 0
        assert (run / "pixels").exists() == (mode == "on")
        fold = run / "fold-0"
        logits = [pl.read_parquet(fold / f"{name}.parquet")["logit"].to_list() for name in ("oof", "holdout")]
        found.append((file_hash(fold / "model-0" / "weights.safetensors"), logits))
    assert found[0] == found[1]
    assert plans[0] == plans[1], "the setting changes no step's key"
