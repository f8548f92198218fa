"""Recipes are refused by field and bound, and survive the way to TOML and back."""

from __future__ import annotations

from pathlib import Path

import pytest

from lesionflow.errors import UsageError
from lesionflow.recipe import Recipe, shipped


@pytest.mark.parametrize("name", sorted(shipped()))
def test_every_shipped_recipe_loads_and_describes_itself(name: str) -> None:
    recipe = Recipe.load(name)
    assert recipe.name == name
    assert recipe.description
    head = shipped()[name].read_text().split("[", 1)[0]
    assert f"lesionflow run {name} --data" in head, "the header gives the command"


def test_a_recipe_survives_toml(tmp_path: Path) -> None:
    recipe = Recipe.load("baseline", ["training.epochs=7", "model.backbone=resnet18"])
    path = tmp_path / "recipe.toml"
    path.write_text(recipe.to_toml())
    assert Recipe.load(path) == recipe
    assert recipe.training.epochs == 7
    assert recipe.model.backbone == "resnet18"


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("training.epochs=0", ("training.epochs", "between 1 and 10000", "0")),
        ("training.epochs=2.5", ("training.epochs", "int", "2.5")),
        ("training.epochs=true", ("training.epochs", "int", "True")),
        ("optimizer.lr=nan", ("optimizer.lr", "nan")),
        ("optimizer.name=sgd", ("optimizer.name", "adamw, adam", "sgd")),
        ("training.epoch=3", ("training.epoch", "training.epochs")),
        ("seed=-1", ("seed", "at least 0")),
        ("augment.flip=1", ("augment.flip", "bool")),
        ("training=3", ("training", "section")),
        ("training.epochs", ("field=value",)),
        ("seed.x=3", ("seed",)),
        ("folds.holdout=0.6", ("folds.holdout", "between 0 and 0.5")),
        ("evaluation.low_sensitivity=0.8", ("low_sensitivity", "evaluation.sensitivity 0.9")),
    ],
)
def test_a_wrong_field_is_named_with_its_bound(override: str, parts: tuple[str, ...]) -> None:
    with pytest.raises(UsageError) as caught:
        Recipe.load("quick", [override] if override != "seed.x=3" else ["seed=1", override])
    for part in parts:
        assert part in str(caught.value)


def test_an_unknown_recipe_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match="baseline"):
        Recipe.load("bestline")
    with pytest.raises(UsageError, match="no such file"):
        Recipe.load("missing.toml")


def test_broken_toml_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("name = ")
    with pytest.raises(UsageError, match=r"mine\.toml"):
        Recipe.load(path)
