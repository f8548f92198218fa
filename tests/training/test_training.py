"""Training loses nothing and repeats nothing: killed, stopped, resumed, on one process or two."""

from __future__ import annotations

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from lesionflow import keys
from lesionflow.data.folds import Folds
from lesionflow.data.sampler import Sampler
from lesionflow.data.store import Store
from lesionflow.errors import DataError
from lesionflow.keys import file_hash
from lesionflow.recipe import Recipe
from lesionflow.training import launch, resume

WORKER = Path(__file__).with_name("traced_worker.py")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def run(prepared: Path, tmp_path: Path) -> Path:
    """A prepared run with twelve epochs to train, so that there is a middle to be killed in."""
    shutil.copytree(prepared, tmp_path / "run")
    recipe = Recipe.load(prepared / "recipe.toml", ["training.epochs=12", "training.validate_every=0"])
    (tmp_path / "run" / "recipe.toml").write_text(recipe.to_toml())
    return tmp_path / "run"


def work(run: Path, *options: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, str(WORKER), str(run), "--folds", "0", *options], env=ENVIRONMENT)


def sampler_of(run: Path) -> Sampler:
    recipe, store, folds = (
        Recipe.load(run / "recipe.toml"),
        Store.open(run / "store"),
        Folds.load(run / "folds.parquet"),
    )
    rows = folds.train_rows(0)
    options = recipe.training
    return Sampler(
        rows, store.targets[rows], recipe.sampling, epochs=options.epochs, batch_size=options.batch_size, seed=0
    )


def shown(run: Path, rank: int = 0) -> dict[int, list[int]]:
    """Rows shown at each step, by the last process that got that far."""
    lines = csv.reader((run / f"trace-{rank}.csv").open())
    return {int(step): [int(row) for row in rows] for step, *rows in lines}


def steps_done(run: Path) -> int:
    path = run / "trace-0.csv"
    return len(path.read_text().splitlines()) if path.exists() else 0


def wait_for_step(run: Path, step: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while steps_done(run) < step:
        assert process.poll() is None, "the worker ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def uninterrupted(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """SHA-256 of the weights of the same training without any trouble."""
    run = tmp_path_factory.mktemp("whole") / "run"
    shutil.copytree(prepared, run)
    recipe = Recipe.load(prepared / "recipe.toml", ["training.epochs=12", "training.validate_every=0"])
    (run / "recipe.toml").write_text(recipe.to_toml())
    assert work(run).wait(120) == 0
    return file_hash(run / "fold-0" / "model-0" / "weights.safetensors")


def test_a_killed_training_resumes_to_the_same_weights(run: Path, uninterrupted: str) -> None:
    first = work(run, "slowly")
    wait_for_step(run, 30, first)
    first.kill()
    assert first.wait() == -signal.SIGKILL
    assert (run / "fold-0" / "model-0" / "last.ckpt").exists()
    assert work(run).wait(120) == 0
    assert file_hash(run / "fold-0" / "model-0" / "weights.safetensors") == uninterrupted
    sampler = sampler_of(run)
    assert shown(run) == {step: [d.row for d in sampler.batch(step)] for step in range(sampler.steps)}


def test_a_stopped_training_saves_mid_epoch_and_goes_on_there(run: Path, uninterrupted: str) -> None:
    first = work(run, "slowly")
    per_epoch = sampler_of(run).steps_per_epoch
    wait_for_step(run, per_epoch + 3, first)
    first.send_signal(signal.SIGTERM)
    assert first.wait(20) == 143
    done = steps_done(run)
    assert done % per_epoch, "stopped in the middle of an epoch"
    assert work(run).wait(120) == 0
    assert file_hash(run / "fold-0" / "model-0" / "weights.safetensors") == uninterrupted
    assert steps_done(run) == sampler_of(run).steps, "no step was done twice"


def test_two_processes_train_on_the_global_order_of_one(run: Path) -> None:
    launch.run_children(
        [[sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(WORKER), str(run),
          "--folds", "0"]], run, [0], at_once=1, threads=1,
    )  # fmt: skip
    sampler, ranks = sampler_of(run), [shown(run, 0), shown(run, 1)]
    for step in range(sampler.steps):
        whole = [d.row for d in sampler.batch(step)]
        assert ranks[0][step] == whole[0::2]
        assert ranks[1][step] == whole[1::2]
    oof = pl.read_parquet(run / "fold-0" / "oof.parquet")
    folds = Folds.load(run / "folds.parquet")
    store = Store.open(run / "store")
    assert oof["isic_id"].to_list() == [store.ids[r] for r in folds.held_out_rows(0)]
    assert np.isfinite(oof["logit"].to_numpy()).all()


def test_one_rank_told_to_stop_stops_both_after_a_save(run: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(WORKER),
               str(run), "--folds", "0", "slowly"]  # fmt: skip
    status = tmp_path / "status"
    status.mkdir()
    first = subprocess.Popen(command, env={**ENVIRONMENT, "LESIONFLOW_STATUS": str(status)})
    wait_for_step(run, 10, first)
    workers = subprocess.run(["pgrep", "-P", str(first.pid)], capture_output=True, text=True).stdout.split()
    started = time.monotonic()
    os.kill(int(workers[1]), signal.SIGTERM)
    first.wait(30)
    assert time.monotonic() - started < 10
    from lesionflow.training.status import collect

    assert collect(status, first.returncode).code == 143
    assert resume.load(run / "fold-0" / "model-0" / "last.ckpt", identity_of(run)) is not None


def identity_of(run: Path) -> str:
    return keys.model_identity(keys.planned_keys(run)["train"], fold=0, model=0)


def test_a_checkpoint_of_another_training_is_refused_and_a_damaged_one_passed_over(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = work(run, "slowly")
    wait_for_step(run, 12, first)
    first.terminate()
    assert first.wait(20) == 143
    path = run / "fold-0" / "model-0" / "last.ckpt"
    assert resume.load(path, identity_of(run)) is not None
    with pytest.raises(DataError, match="another data set, split, recipe"):
        resume.load(path, "other")
    path.write_bytes(path.read_bytes()[:-1000])
    assert resume.load(path, identity_of(run)) is None
    assert "last.ckpt" in caplog.text


def test_the_held_out_fold_is_never_trained_on(run: Path) -> None:
    assert work(run).wait(120) == 0
    held_out = set(Folds.load(run / "folds.parquet").held_out_rows(0).tolist())
    assert not held_out & {row for rows in shown(run).values() for row in rows}
