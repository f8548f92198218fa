"""When a checkpoint is due: at epochs' ends while it is cheap, and after some minutes whatever it costs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lesionflow.recipe import Recipe
from lesionflow.training.conduct import Conductor, Stop


@pytest.fixture
def due(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Ask whether a checkpoint is due so many seconds after the last, which took so many; on rank 0 or another."""
    recipe = Recipe.load("quick", ["training.checkpoint_cost=0.02", "training.checkpoint_minutes=10"])
    module = SimpleNamespace(recipe=recipe, step=5)
    conductor = Conductor(
        tmp_path, tmp_path, fold=0, model=0, identity="", state=None, validate=lambda _: {}, stop=Stop(), names=[]
    )

    def ask(since: float, took: float, *, boundary: bool, first: bool = True) -> bool:
        monkeypatch.setattr("time.monotonic", lambda: 1000.0 + since)
        conductor._saved_at, conductor._save_seconds = 1000.0, took
        conductor._losses = [torch.tensor(0.5)]
        loss, stop, found = conductor._agree(SimpleNamespace(world_size=1, is_global_zero=first), module, boundary)
        assert (loss, stop) == (0.5, False)
        return found

    return ask


def test_epochs_ends_are_saved_while_that_is_cheap(due) -> None:
    assert due(100, 1.9, boundary=True)
    assert not due(100, 2.1, boundary=True), "more than two percent of the time"
    assert not due(100, 0.1, boundary=False)


def test_minutes_without_a_checkpoint_end_with_one(due) -> None:
    assert due(601, 50, boundary=False)
    assert not due(599, 50, boundary=False)


def test_only_the_first_ranks_clock_counts(due) -> None:
    assert not due(601, 0, boundary=True, first=False)
