"""Options that several commands share, and what they do with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from lesionflow.recipe import Recipe

RecipeArgument = Annotated[str, typer.Argument(help="A shipped recipe's name, or a .toml file.", metavar="RECIPE")]
DataOption = Annotated[Path, typer.Option("--data", help="Data set directory in the competition's layout.")]
RunOption = Annotated[Path, typer.Option("--out", help="Run directory; an existing one is continued.")]
RunArgument = Annotated[Path, typer.Argument(help="Run directory.", metavar="RUN")]
BundleArgument = Annotated[Path, typer.Argument(help="Bundle directory.", metavar="BUNDLE")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="Override a recipe field, e.g. training.epochs=5; repeatable.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]


def load_recipe(recipe: str, overrides: list[str] | None) -> Recipe:
    from lesionflow.recipe import Recipe

    return Recipe.load(recipe, overrides or [])


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))
