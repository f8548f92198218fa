"""Which checkpoint wins: the highest step whose checksum and identity hold, and never a silent start from nothing."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lesionflow.errors import DataError
from lesionflow.training import resume


def save(folder: Path, step: int, identity: str = "ours") -> Path:
    torch.manual_seed(step)
    network = torch.nn.Linear(20, 10)
    module = SimpleNamespace(step=step, network=network, average=SimpleNamespace(module=network), auxiliary=None)
    return resume.save(folder, module, torch.optim.Adam(network.parameters()), identity)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for step in (10, 20, 30):
        save(tmp_path / "model", step)
    return tmp_path / "model"


def spoil(path: Path, draw: random.Random) -> str:
    """One of the ways in which files go bad; the file always differs afterwards."""
    data = bytearray(path.read_bytes())
    way = draw.choice(["cut", "bit", "zeros", "empty", "longer", "noise", "head"])
    at = draw.randrange(len(data))
    if way == "cut":
        del data[at:]
    elif way == "bit":
        data[at] ^= 1 << draw.randrange(8)
    elif way == "zeros":
        size = min(draw.choice([512, 4096]), len(data) - at)
        data[at : at + size] = bytes(b ^ 0xFF if not any(data[at : at + size]) else 0 for b in data[at : at + size])
    elif way == "longer":
        data += draw.randbytes(1 + at)
    elif way == "noise":
        data[:] = draw.randbytes(len(data))
    elif way == "head":
        data[: 1 + at % 90] = draw.randbytes(1 + at % 90)
    else:
        data.clear()
    path.write_bytes(data)
    return way


def test_the_two_newest_stay_and_the_newest_wins(folder: Path) -> None:
    assert [p.name for p in resume.checkpoints(folder)] == ["step-000000030.ckpt", "step-000000020.ckpt"]
    state = resume.load(folder, "ours")
    assert state is not None and state["step"] == 30
    assert resume.load(folder / "nothing", "ours") is None


def test_two_hundred_damaged_checkpoints_never_start_a_training_again(folder: Path, tmp_path, caplog) -> None:
    ways = set()
    for seed in range(200):
        draw = random.Random(seed)
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        copy = Path(shutil.copytree(folder, tmp_path / "copy"))
        newest, older = resume.checkpoints(copy)
        before = newest.read_bytes()
        ways.add(way := spoil(newest, draw))
        assert newest.read_bytes() != before, (seed, way)
        caplog.clear()
        state = resume.load(copy, "ours")
        assert state is not None and state["step"] == 20, (seed, way)
        assert [newest.name in r.getMessage() for r in caplog.records] == [True], (seed, way)
        spoil(older, draw)
        with pytest.raises(DataError, match=rf"{newest.name}: damaged, and so is every other"):
            resume.load(copy, "ours")
        assert resume.load(copy, "ours", anew=True) is None
    assert len(ways) == 7


def test_a_damaged_one_is_cleared_away_by_what_is_saved_after_it(folder: Path) -> None:
    newest = resume.checkpoints(folder)[0]
    newest.write_bytes(b"")
    (folder / ".step-000000040.ckpt.abc").write_bytes(b"of a process that was killed")
    save(folder, 25)
    assert [p.name for p in resume.checkpoints(folder)] == ["step-000000025.ckpt", "step-000000020.ckpt"]
    assert not list(folder.glob(".step-*"))


def test_another_trainings_checkpoint_is_refused_and_never_mistaken(folder: Path) -> None:
    with pytest.raises(DataError, match="another data set, split, recipe"):
        resume.load(folder, "theirs")
    save(folder, 40, "theirs")
    state = resume.load(folder, "ours")
    assert state is not None and state["step"] == 30, "the highest step whose identity holds"


def test_what_can_not_be_written_leaves_what_is_there(folder: Path, monkeypatch) -> None:
    def full(*of: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save(folder, 50)
    assert [p.name for p in resume.checkpoints(folder)] == ["step-000000030.ckpt", "step-000000020.ckpt"]
    assert not list(folder.glob(".step-*"))
