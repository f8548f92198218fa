"""Exit codes as the outside sees them, and the operators' environments."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from lesionflow import keys, steps
from lesionflow.errors import DataError, UsageError
from lesionflow.recipe import Recipe
from lesionflow.training.launch import _cores, _threads, _torchrun
from lesionflow.training.nodes import Nodes
from lesionflow.training.status import Outcome, collect, report

TINY = ["--set", "model.backbone=mobilenetv3_small_050", "--set", "model.weights=none", "--set", "image.size=32",
        "--set", "folds.count=2", "--set", "training.batch_size=16", "--set", "training.validate_every=0",
        "--set", "evaluation.replicates=200"]  # fmt: skip


@pytest.fixture
def run(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "run"))


def lesionflow(*arguments: object) -> subprocess.Popen[str]:
    """The command as a container's first process would be started."""
    command = [sys.executable, "-m", "lesionflow", *map(str, arguments)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def ends(process: subprocess.Popen[str], seconds: float = 180) -> tuple[int, str]:
    _, errors = process.communicate(timeout=seconds)
    return process.returncode, errors


def test_a_bad_recipe_is_2(synthetic: Path, tmp_path: Path) -> None:
    code, errors = ends(lesionflow("train", "quick", "--data", synthetic, "--out", tmp_path / "r", "--set", "seed=-1"))
    assert code == 2
    assert errors.startswith("error: ")
    assert "seed" in errors
    assert "Traceback" not in errors


def test_a_recipe_that_only_the_workers_find_bad_is_2(synthetic: Path, tmp_path: Path) -> None:
    code, errors = ends(
        lesionflow(
            "train",
            "quick",
            "--data",
            synthetic,
            "--out",
            tmp_path / "r",
            "--processes",
            2,
            *TINY,
            "--set",
            "model.weights=missing.pt",
        )
    )
    assert code == 2, errors
    assert "missing.pt" in errors


def test_a_corrupt_image_is_3_and_named(synthetic: Path, tmp_path: Path) -> None:
    import h5py
    import numpy as np

    data = tmp_path / "data"
    shutil.copytree(synthetic, data)
    with h5py.File(data / "train-image.hdf5", "r+") as file:
        name = sorted(file)[5]
        cut = bytes(file[name][()])[:-300]
        del file[name]
        file.create_dataset(name, data=np.bytes_(cut))
    options = ("--data", data, *TINY, "--set", "training.epochs=2", "--set", "sampling.kind=shuffle")
    code, errors = ends(lesionflow("train", "quick", "--out", tmp_path / "r", "--processes", 2, *options))
    assert code == 3, errors
    assert name in errors
    code, errors = ends(
        lesionflow("train", "quick", "--out", tmp_path / "s", *options, "--set", "image.skip_corrupt=true")
    )
    assert code == 0, errors
    assert name in (tmp_path / "s" / "store" / "store.json").read_text(), "left out, and listed"


def test_a_refused_gate_is_4_with_reasons_and_a_report(synthetic: Path, tmp_path: Path) -> None:
    options = ("--data", synthetic, "--out", tmp_path / "r", *TINY, "--set", "training.epochs=1")
    code, errors = ends(lesionflow("run", "quick", *options, "--set", "gate.pauc_floor=0.2"))
    assert code == 4, errors
    assert "gate" in errors
    assert (tmp_path / "r" / "report.html").exists()
    assert not (tmp_path / "r" / "bundle").exists()


@pytest.mark.parametrize("processes", [1, 2])
def test_a_stopped_training_is_143_and_can_go_on(synthetic: Path, tmp_path: Path, processes: int) -> None:
    options = ("--data", synthetic, "--out", tmp_path / "r", "--processes", processes, *TINY)
    options = (*options, "--set", "training.epochs=3000")
    process = lesionflow("train", "quick", *options)
    curve = tmp_path / "r" / "fold-0" / "model-0" / "metrics.csv"
    deadline = time.monotonic() + 120
    while not curve.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    code, errors = ends(process, 60)
    assert code == 143, errors
    assert "saved" in errors
    assert list((tmp_path / "r" / "fold-0" / "model-0").glob("step-*.ckpt"))


def test_children_die_with_a_killed_parent(synthetic: Path, tmp_path: Path) -> None:
    process = lesionflow("train", "quick", "--data", synthetic, "--out", tmp_path / "r", *TINY,
                         "--set", "training.epochs=3000")  # fmt: skip
    curve = tmp_path / "r" / "fold-0" / "model-0" / "metrics.csv"
    while not curve.exists():
        assert process.poll() is None
        time.sleep(0.1)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 20
    while subprocess.run(["pgrep", "-f", f"training.worker {tmp_path}"], capture_output=True).stdout:
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.2)


def test_both_operators_environments_are_read() -> None:
    v1 = {"MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456", "WORLD_SIZE": "2", "RANK": "1"}
    assert Nodes.from_environment(v1) == Nodes(2, 1, "job-master-0", 23456, True)
    v2 = {"PET_NNODES": "3", "PET_NODE_RANK": "2", "PET_MASTER_ADDR": "job-node-0-0.job", "PET_MASTER_PORT": "29400"}
    assert Nodes.from_environment(v2) == Nodes(3, 2, "job-node-0-0.job", 29400, True)
    two_each = {**v1, "WORLD_SIZE": "4", "PET_NPROC_PER_NODE": "2"}
    assert Nodes.from_environment(two_each) == Nodes(2, 1, "job-master-0", 23456, True)
    assert Nodes.from_environment({}) == Nodes()
    command = _torchrun(["RUN"], 2, Nodes(3, 2, "host", 29400))
    assert "--nnodes=3" in command
    assert "--node-rank=2" in command
    assert "--nproc-per-node=2" in command, "never left to torchrun's own guess"


def test_the_first_rank_that_failed_by_itself_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LESIONFLOW_STATUS", str(tmp_path))
    for rank, code in (("0", 143), ("1", 3), ("2", 143)):
        monkeypatch.setenv("RANK", rank)
        report(code, f"rank {rank}")
    assert collect(tmp_path, 1) == Outcome(3, "rank 1")
    (tmp_path / "1.json").unlink()
    assert collect(tmp_path, 1).code == 143
    assert collect(tmp_path / "empty", 1) == Outcome(1)
    assert collect(tmp_path, 0) == Outcome(0), "what ranks said before they were restarted doesn't count"
    killed, crashed = collect(tmp_path / "empty", -9), collect(tmp_path / "empty", -11)
    assert killed.code == 143 and "SIGKILL" in killed.message
    assert crashed.code == 1 and "crashed (SIGSEGV)" in crashed.message
    assert "RANK" in os.environ


def test_threads_stay_within_a_containers_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quota = tmp_path / "cpu.max"
    quota.write_text("100000 100000\n")
    assert _cores(quota) == 1
    quota.write_text("50000 100000\n")
    assert _cores(quota) == 1, "half a core is still one thread"
    quota.write_text("max 100000\n")
    assert _cores(quota) == len(os.sched_getaffinity(0))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert _threads(1000) == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert _threads(1000) == 3, "who asked for a number gets it"


def test_a_lost_rank_is_a_preemption_and_nothing_else_is(monkeypatch: pytest.MonkeyPatch) -> None:
    from lesionflow.training.lost import lost_peer

    gone = RuntimeError("[gloo/transport/tcp/pair.cc:545] Read error [10.0.0.2]:1: Connection reset by peer.")
    assert not lost_peer(gone), "alone, there is no peer"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert lost_peer(gone)
    assert not lost_peer(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not lost_peer(ValueError("Connection reset by peer"))


def test_a_node_of_a_job_begins_nothing(
    tmp_path: Path, synthetic: Path, tiny_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PET_NNODES", "2")
    with pytest.raises(UsageError, match="prepare and split the run on one machine first"):
        steps.begin(tmp_path / "run", tiny_recipe, synthetic)
    assert not (tmp_path / "run").exists()


def test_a_node_that_waits_for_the_others_stops_at_once(
    run: Path, monkeypatch: pytest.MonkeyPatch, free_port: Callable[[], int]
) -> None:
    """A pod that is deleted before its job is complete: 143, and not after torchrun's patience."""
    for name, value in {"PET_NNODES": "2", "PET_NODE_RANK": "0", "PET_MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PET_MASTER_PORT", str(free_port()))
    node = lesionflow("train", "--out", run, "--quiet")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (run / "nodes" / "0.json").exists():
        time.sleep(0.1)
    time.sleep(3)
    asked = time.monotonic()
    node.terminate()
    code, errors = ends(node)
    assert code == 143, errors
    assert "stopped before training began" in errors
    assert time.monotonic() - asked < 20


def test_what_another_recipe_left_half_trained_is_refused_or_started_anew(run: Path, tiny_recipe: Recipe) -> None:
    import torch

    from lesionflow.training import resume

    folder = run / "fold-0" / "model-0"
    folder.mkdir(parents=True)
    network = torch.nn.Linear(2, 1)
    left = SimpleNamespace(step=7, network=network, average=SimpleNamespace(module=network), auxiliary=None)
    path = resume.save(folder, left, torch.optim.SGD(network.parameters()), "another")
    with pytest.raises(DataError, match="another data set, split, recipe"):
        resume.load(folder, "ours")
    assert resume.load(folder, "ours", anew=True) is None
    steps.train(run, keys.planned_keys(run)["train"], folds=[0], anew=True)
    weights = folder / "weights.safetensors"
    assert weights.exists() and not path.exists()
    assert weights.stat().st_mode & 0o777 == 0o644, "pods of other users read it"
