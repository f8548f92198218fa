"""Options that several commands share, and what they do with them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lesionflow.errors import UsageError

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
TokenFileOption = Annotated[
    Path | None, typer.Option(help="File with the service's token; else LESIONFLOW_TOKEN of the environment.")
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]


def load_recipe(recipe: str, overrides: list[str] | None) -> Recipe:
    from lesionflow.recipe import Recipe

    return Recipe.load(recipe, overrides or [])


def read_token(file: Path | None) -> str | None:
    """A service's token, from a file or the environment: never an argument, which every user of a machine can see."""
    if file is None:
        return os.environ.get("LESIONFLOW_TOKEN", "").strip() or None
    try:
        token = file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "no text"
        raise UsageError(f"--token-file {file}: can't be read ({reason}): give a file with the token alone") from None
    if not token:
        raise UsageError(f"--token-file {file}: is empty: give a file with the token alone")
    return token


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))
