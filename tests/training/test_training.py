"""Training loses nothing and repeats nothing: killed, stopped, resumed, on one process or two."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file

from lesionflow import keys
from lesionflow.data.folds import Folds
from lesionflow.data.sampler import Sampler
from lesionflow.data.store import Store
from lesionflow.errors import UsageError
from lesionflow.evaluation.metrics import pauc
from lesionflow.keys import file_hash
from lesionflow.models.image import LesionModule, preprocess_spec
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
    assert resume.checkpoints(run / "fold-0" / "model-0")
    assert work(run).wait(120) == 0
    assert file_hash(run / "fold-0" / "model-0" / "weights.safetensors") == uninterrupted
    sampler = sampler_of(run)
    assert shown(run) == {step: sampler.batch(step).rows.tolist() for step in range(sampler.steps)}


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


def torchrun(run: Path, processes: int, *options: str) -> list[str]:
    launcher = [sys.executable, "-m", launch.AGENT, "--standalone", f"--nproc-per-node={processes}"]
    return [*launcher, str(WORKER), str(run), "--folds", "0", *options]


def forget(run: Path, *names: str) -> None:
    for name in names:
        (run / "fold-0" / name).unlink()


def back_to_the_last_checkpoint(run: Path) -> None:
    """Leave a checkpoint of the last step that ends in the weights that are there."""
    recipe, sampler, folder = Recipe.load(run / "recipe.toml"), sampler_of(run), run / "fold-0" / "model-0"
    module = LesionModule(recipe, preprocess_spec(recipe), sampler, seed=0)
    module.average.module.load_state_dict(load_file(folder / "weights.safetensors"))
    module.step = sampler.steps
    resume.save(folder, module, torch.optim.SGD(module.network.parameters()), identity_of(run))


def test_two_processes_train_on_the_global_order_of_one_and_score_bit_for_bit_as_one(run: Path) -> None:
    launch.run_children([torchrun(run, 2)], run, [0], at_once=1, threads=1)
    sampler, ranks = sampler_of(run), [shown(run, 0), shown(run, 1)]
    for step in range(sampler.steps):
        whole = sampler.batch(step).rows.tolist()
        assert ranks[0][step] == whole[0::2]
        assert ranks[1][step] == whole[1::2]
    oof = pl.read_parquet(run / "fold-0" / "oof.parquet")
    folds = Folds.load(run / "folds.parquet")
    store = Store.open(run / "store")
    assert oof["isic_id"].to_list() == [store.ids[r] for r in folds.held_out_rows(0)]
    assert np.isfinite(oof["logit"].to_numpy()).all()
    forget(run, "oof.parquet", "holdout.parquet")
    assert work(run).wait(120) == 0
    assert pl.read_parquet(run / "fold-0" / "oof.parquet").equals(oof), "the same weights, scored by one process"
    # As after a kill between the last checkpoint and the weights: there is nothing left to train.
    back_to_the_last_checkpoint(run)
    forget(run, "oof.parquet", "holdout.parquet", "model-0/weights.safetensors")
    launch.run_children([torchrun(run, 2, "slow-end")], run, [0], at_once=1, threads=1)
    assert pl.read_parquet(run / "fold-0" / "oof.parquet").equals(oof), "no rank went ahead of the one that writes"


def test_without_batch_normalisation_two_processes_end_where_one_does(run: Path) -> None:
    recipe = Recipe.load(run / "recipe.toml", ["model.backbone=test_convnext", "training.epochs=4"])
    (run / "recipe.toml").write_text(recipe.to_toml())
    both = Path(shutil.copytree(run, run.with_name("both")))
    assert work(run).wait(120) == 0
    launch.run_children([torchrun(both, 2)], both, [0], at_once=1, threads=1)
    one, two = (pl.read_parquet(path / "fold-0" / "oof.parquet") for path in (run, both))
    off = np.abs(one["logit"].to_numpy() - two["logit"].to_numpy())
    print(f"logits differ by {off.max():.1e}")
    assert 0 < off.max() < 1e-5, "rounding alone"
    figures = [pauc(part["target"].to_numpy(), part["logit"].to_numpy()) for part in (one, two)]
    assert figures[0] == pytest.approx(figures[1], abs=1e-3)


def test_each_drawn_lesion_is_shown_once_though_the_number_of_processes_changes(run: Path) -> None:
    sampler, seen, phases = sampler_of(run), dict[int, list[int]](), (1, 2, 4)
    for processes in phases:
        start = max(seen, default=-1) + 1
        command = torchrun(run, processes, *(["slowly"] if processes < 4 else []))
        training = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
        if processes < 4:
            wait_for_step(run, 7, training)
            for child in Path(f"/proc/{training.pid}/task/{training.pid}/children").read_text().split():
                os.kill(int(child), signal.SIGTERM)
        training.wait(120)
        traces = [shown(run, rank) for rank in range(processes)]
        for step in traces[0]:
            assert step >= start and step not in seen, "no step is done twice"
            seen[step] = [row for rank in traces for row in rank[step]]
        for rank in range(processes):
            (run / f"trace-{rank}.csv").unlink()
    assert sorted(seen) == list(range(sampler.steps))
    for step, rows in seen.items():
        assert sorted(rows) == sorted(sampler.batch(step).rows.tolist())


def test_one_rank_told_to_stop_stops_both_after_a_save(run: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", launch.AGENT, "--standalone", "--nproc-per-node=2", str(WORKER),
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
    assert resume.load(run / "fold-0" / "model-0", identity_of(run)) is not None


def test_a_rank_that_waits_for_one_that_never_comes_ends_at_once(run: Path, free_port: Callable[[], int]) -> None:
    port = free_port()
    where = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-m", "lesionflow.training.worker", str(run), "--folds", "0"]
    rank = subprocess.Popen(command, env={**ENVIRONMENT, **where})
    deadline = time.monotonic() + 60
    while True:
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
            break
        assert rank.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.5)
    rank.terminate()
    try:
        assert rank.wait(5) == -signal.SIGTERM
    finally:
        rank.kill()


def identity_of(run: Path) -> str:
    return keys.model_identity(keys.planned_keys(run)["train"], fold=0, model=0)


def test_a_stop_during_validation_is_saved_and_loses_no_step(run: Path, uninterrupted: str) -> None:
    recipe = Recipe.load(run / "recipe.toml", ["training.validate_every=5", "training.checkpoint_every=12"])
    (run / "recipe.toml").write_text(recipe.to_toml())
    first = work(run, "slow-scoring")
    deadline = time.monotonic() + 120
    while not (run / "scoring").exists():
        assert first.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    first.terminate()
    assert first.wait(10) == 143
    per_epoch = sampler_of(run).steps_per_epoch
    state = resume.load(run / "fold-0" / "model-0", identity_of(run))
    assert state is not None and state["step"] == steps_done(run) == 5 * per_epoch
    assert work(run).wait(120) == 0
    assert file_hash(run / "fold-0" / "model-0" / "weights.safetensors") == uninterrupted


def test_a_stop_while_the_end_is_scored_keeps_the_weights(run: Path, uninterrupted: str) -> None:
    first = work(run, "slow-scoring")
    while not (run / "scoring").exists():
        assert first.poll() is None
        time.sleep(0.02)
    first.terminate()
    assert first.wait(10) == 143
    assert file_hash(run / "fold-0" / "model-0" / "weights.safetensors") == uninterrupted
    assert not (run / "fold-0" / "oof.parquet").exists()
    done = steps_done(run)
    assert work(run).wait(120) == 0
    assert (run / "fold-0" / "oof.parquet").exists() and steps_done(run) == done, "nothing was trained again"


@pytest.mark.parametrize("processes", [1, 2])
def test_a_loss_that_is_no_number_ends_training_and_names_the_lesions(run: Path, processes: int) -> None:
    command = [sys.executable, str(WORKER)]
    if processes > 1:
        command = [sys.executable, "-m", launch.AGENT, "--standalone", f"--nproc-per-node={processes}",
                   str(WORKER)]  # fmt: skip
    with pytest.raises(UsageError, match=r"not finite at step 18, see the batch's lesions in .*not-finite\.json"):
        launch.run_children([[*command, str(run), "--folds", "0", "nan=17"]], run, [0], at_once=1, threads=1)
    told = json.loads((run / "fold-0" / "model-0" / "not-finite.json").read_text())
    ids = Store.open(run / "store").ids
    assert told == {"fold": 0, "model": 0, "step": 18, "isic_ids": [ids[row] for row in sampler_of(run).batch(17).rows]}
    assert not (run / "fold-0" / "model-0" / "weights.safetensors").exists()


def test_a_full_disk_costs_checkpoints_but_no_training(run: Path, uninterrupted: str) -> None:
    first = subprocess.Popen([sys.executable, str(WORKER), str(run), "--folds", "0", "slowly"], env=ENVIRONMENT,
                             stderr=subprocess.PIPE, text=True)  # fmt: skip
    per_epoch, model = sampler_of(run).steps_per_epoch, run / "fold-0" / "model-0"
    wait_for_step(run, per_epoch + 3, first)
    (before,) = resume.checkpoints(model)[:1]
    # The kernel refuses to write files larger than this, from one byte to the next, as a full disk does.
    _, hard = resource.prlimit(first.pid, resource.RLIMIT_FSIZE, (before.stat().st_size // 2, resource.RLIM_INFINITY))
    wait_for_step(run, 4 * per_epoch + 3, first)
    assert resume.checkpoints(model)[0] == before, "nothing newer, and what was there stays"
    resource.prlimit(first.pid, resource.RLIMIT_FSIZE, (hard, hard))
    assert first.wait(120) == 0
    assert "can't be saved" in first.stderr.read() and not list(model.glob(".step-*"))
    assert file_hash(model / "weights.safetensors") == uninterrupted


def test_a_killed_loader_process_is_a_preemption(run: Path, uninterrupted: str) -> None:
    first = subprocess.Popen([sys.executable, str(WORKER), str(run), "--folds", "0", "slowly"], text=True,
                             env=ENVIRONMENT | {"LESIONFLOW_LOADERS": "2"}, stderr=subprocess.PIPE)  # fmt: skip
    wait_for_step(run, sampler_of(run).steps_per_epoch + 2, first)
    below = subprocess.run(["pgrep", "-P", str(first.pid), "-f", "spawn_main"], capture_output=True, text=True)
    loaders = below.stdout.split()
    assert len(loaders) == 2, "both loader processes run"
    os.kill(int(loaders[0]), signal.SIGKILL)
    _, errors = first.communicate(timeout=60)
    assert first.returncode == 143, errors
    assert "a loader process was killed" in errors
    assert work(run).wait(120) == 0
    assert file_hash(run / "fold-0" / "model-0" / "weights.safetensors") == uninterrupted


def test_the_held_out_fold_is_never_trained_on(run: Path) -> None:
    assert work(run).wait(120) == 0
    held_out = set(Folds.load(run / "folds.parquet").held_out_rows(0).tolist())
    assert not held_out & {row for rows in shown(run).values() for row in rows}
