"""What a pipeline component calls: one step, with its outcome reported to whoever started the process."""

from __future__ import annotations

import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

from lesionflow import steps
from lesionflow.errors import LesionflowError
from lesionflow.recipe import Recipe
from lesionflow.training.status import report

Keys = namedtuple("Keys", ["prepare", "split", "train", "stack", "evaluate", "gate", "export"])


def begin(run: str, data: str, recipe: str) -> Any:
    """Write the recipe into the run and return every step's content key."""
    try:
        import tomllib

        return Keys(**steps.begin(Path(run), Recipe.from_dict(tomllib.loads(recipe)), Path(data)))
    except LesionflowError as error:
        _end(error)


def call(step: str, run: str, key: str | None = None, **options: Any) -> str:
    """Run one of `steps`; ends the process with the error table's exit code if it fails."""
    arguments: list[Any] = [Path(run)]
    if "data" in options:
        arguments.append(Path(options.pop("data")))
    if key is not None:
        arguments.append(key)
    try:
        getattr(steps, step)(*arguments, **options)
    except LesionflowError as error:
        _end(error)
    return step


def _end(error: LesionflowError) -> None:
    print(f"error: {error}", file=sys.stderr)  # noqa: T201 - the component's log
    report(error.exit_code, str(error))
    sys.exit(error.exit_code)
