"""Jobs whose nodes come and go: training goes on with those that are there, and loses no step."""

from __future__ import annotations

import csv
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from lesionflow.recipe import Recipe
from lesionflow.training.launch import _torchrun
from lesionflow.training.nodes import Elastic, Nodes


def test_an_elastic_policys_environment_is_read() -> None:
    given = {
        "PET_NNODES": "1:4", "PET_RDZV_ENDPOINT": "job-worker-0:23456", "PET_RDZV_BACKEND": "c10d",
        "PET_RDZV_ID": "job", "PET_MAX_RESTARTS": "7", "PET_NPROC_PER_NODE": "2",
    }  # fmt: skip
    nodes = Nodes.from_environment(given)
    assert nodes.count == 4 and nodes.elastic == Elastic(1, "job-worker-0:23456", "c10d", "job", "", 7)
    command = _torchrun(["RUN"], 2, nodes)
    for option in ("--nnodes=1:4", "--rdzv-endpoint=job-worker-0:23456", "--max-restarts=7", "--nproc-per-node=2"):
        assert option in command
    assert not [part for part in command if "node-rank" in part or "standalone" in part]
    assert Nodes.from_environment({"PET_NNODES": "2"}).elastic is None
    assert Nodes.from_environment({"PET_NNODES": "1:2"}).elastic is None, "without a place to meet it has a fixed size"


@pytest.fixture
def run(prepared: Path, tmp_path: Path) -> Path:
    shutil.copytree(prepared, tmp_path / "run")
    settings = ["training.epochs=60", "training.validate_every=0"]
    recipe = Recipe.load(prepared / "recipe.toml", settings)
    (tmp_path / "run" / "recipe.toml").write_text(recipe.to_toml())
    return tmp_path / "run"


def steps_told(run: Path) -> list[int]:
    path = run / "fold-0" / "model-0" / "metrics.csv"
    with path.open() if path.exists() else open(os.devnull) as file:  # noqa: PTH123
        return [int(row["step"]) for row in csv.DictReader(file)]


@pytest.mark.slow
def test_a_node_that_leaves_is_done_without_and_one_that_comes_is_taken_in(
    run: Path, free_port: Callable[[], int]
) -> None:
    port = free_port()
    policy = {
        "PET_NNODES": "1:2", "PET_RDZV_ENDPOINT": f"127.0.0.1:{port}", "PET_MAX_RESTARTS": "20", "OMP_NUM_THREADS": "1",
        "PET_RDZV_CONF": "last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=3",
    }  # fmt: skip

    def node() -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "lesionflow", "train", "--out", str(run), "--fold", "0", "--quiet"]
        return subprocess.Popen(command, env=os.environ | policy, stderr=subprocess.PIPE, text=True)

    def until(steps: int) -> None:
        deadline = time.monotonic() + 120
        while len(steps_told(run)) < steps:
            if first.poll() is not None:
                pytest.fail(first.communicate()[1])
            assert time.monotonic() < deadline
            time.sleep(0.05)

    first = node()  # Whoever comes first keeps the meeting place, and has to stay.
    deadline = time.monotonic() + 60
    while socket.socket().connect_ex(("127.0.0.1", port)):
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    second = node()
    until(5)
    second.send_signal(signal.SIGTERM)
    _, errors = second.communicate(timeout=60)
    assert second.returncode == 143, errors
    left = len(steps_told(run))
    until(left + 5)
    third = node()
    _, errors = third.communicate(timeout=240)
    assert third.returncode == 0, errors
    _, errors = first.communicate(timeout=60)
    assert first.returncode == 0, errors
    told = steps_told(run)
    assert told == list(range(1, told[-1] + 1)), "every step once, though two, one and two processes took them"
    assert pl.read_parquet(run / "fold-0" / "oof.parquet")["logit"].is_finite().all()
