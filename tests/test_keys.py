"""A key changes with whatever a result depends on; a record holds only as long as its outputs do."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from lesionflow import keys, plan
from lesionflow.recipe import Recipe


def test_each_step_key_follows_its_own_section_and_all_before_it() -> None:
    base = Recipe.load("quick")
    first = plan.plan_keys(base, "data")
    changed = {
        "folds.seed=1": "split",
        "training.epochs=9": "train",
        "seed=5": "train",
        "evaluation.seed=1": "evaluate",
        "gate.delta=0.1": "gate",
        "image.skip_corrupt=true": "prepare",
    }
    for override, step in changed.items():
        other = plan.plan_keys(Recipe.load("quick", [override]), "data")
        differing = [name for name in first if first[name] != other[name]]
        names = list(first)
        assert differing == names[names.index(step) :], override
    assert plan.plan_keys(base, "other data")["prepare"] != first["prepare"]
    assert plan.plan_keys(base, "data", "incumbent")["evaluate"] == first["evaluate"]
    assert plan.plan_keys(base, "data", "incumbent")["gate"] != first["gate"]


def test_every_recipe_section_belongs_to_a_step() -> None:
    covered = {name for sections in plan._SECTIONS.values() for name in sections}
    assert covered == {f.name for f in dataclasses.fields(Recipe)}


def test_a_step_is_done_only_while_its_outputs_stand(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").write_text("1")
    keys.mark_done(tmp_path, "step", "key", ["out"], 1.0)
    assert keys.is_done(tmp_path, "step", "key")
    assert not keys.is_done(tmp_path, "step", "other key")
    (tmp_path / "out" / "a").write_text("2")
    assert not keys.is_done(tmp_path, "step", "key")
    (tmp_path / "out" / "a").write_text("1")
    (tmp_path / "out" / "b").write_text("")
    assert not keys.is_done(tmp_path, "step", "key")


def test_a_half_written_file_never_takes_the_name(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), keys.atomic(path) as file:
        file.write(b"new")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_code_version_changes_with_the_rooms() -> None:
    assert keys.code_version(("data",)) != keys.code_version(("models",))
    assert keys.code_version(("data/images.py",)).startswith("0.")
