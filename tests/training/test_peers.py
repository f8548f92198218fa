"""Nodes that are lost without a word: seen by their files, and by nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from lesionflow.training import peers
from lesionflow.training.peers import Peers


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(peers.time, "monotonic", lambda: now[0])
    return now


def test_a_node_that_started_again_is_noticed_at_once(tmp_path: Path, clock: list[float]) -> None:
    ours, theirs = Peers(tmp_path, 2, 0), Peers(tmp_path, 2, 1)
    ours.beat()
    theirs.beat()
    assert ours.lost() == "", "before all have joined, nobody can be lost"
    ours.joined()
    assert ours.lost() == "" and ours.others == [1]
    Peers(tmp_path, 2, 1).beat()
    assert ours.lost() == "node 1 started again"


def test_an_earlier_life_doesnt_count(tmp_path: Path, clock: list[float]) -> None:
    Peers(tmp_path, 2, 1).beat()
    ours, theirs = Peers(tmp_path, 2, 0), Peers(tmp_path, 2, 1)
    theirs.beat()
    ours.joined()
    assert ours.lost() == ""


def test_silence_is_noticed_and_a_beat_ends_it(tmp_path: Path, clock: list[float]) -> None:
    ours, theirs = Peers(tmp_path, 3, 2), Peers(tmp_path, 3, 1)
    third = Peers(tmp_path, 3, 0)
    for node in (theirs, third):
        node.beat()
    ours.joined()
    assert ours.lost() == ""
    for _ in range(30):
        clock[0] += peers.BEAT
        theirs.beat()
        third.beat()
        assert ours.lost() == ""
    for _ in range(30):
        clock[0] += peers.BEAT
        third.beat()
        if said := ours.lost():
            break
    assert said.startswith("node 1 has given no sign of life")


def test_a_file_that_a_shared_volume_shows_late_is_no_loss(tmp_path: Path, clock: list[float]) -> None:
    ours = Peers(tmp_path, 2, 0)
    ours.joined()
    assert ours.lost() == ""
    clock[0] += 30
    theirs = Peers(tmp_path, 2, 1)
    theirs.beat()
    assert ours.lost() == ""
    assert ours.lost() == ""
    Peers(tmp_path, 2, 1).beat()
    assert ours.lost() == "node 1 started again"
