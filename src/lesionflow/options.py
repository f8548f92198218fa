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
PublicKeyOption = Annotated[
    Path | None, typer.Option(help="PEM file: accept only what this key's owner signed (`lesionflow sign`).")
]
SignatureOption = Annotated[Path | None, typer.Option(help="The signature's file; BUNDLE.sig beside it by default.")]
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
        where, token = "LESIONFLOW_TOKEN", os.environ.get("LESIONFLOW_TOKEN", "").strip()
        if not token:
            return None
    else:
        where = f"--token-file {file}"
        try:
            token = file.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "no text"
            raise UsageError(f"{where}: can't be read ({reason}): give a file with the token alone") from None
        if not token:
            raise UsageError(f"{where}: is empty: give a file with the token alone")
    if not (token.isascii() and token.isprintable() and " " not in token):
        raise UsageError(f"{where}: has characters that a header can't carry: give one line of ASCII, without spaces")
    return token


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))
