"""Content keys: is this step's work already done?

A step's key is a hash of everything its result depends on: the hashes of its inputs, its part of
the recipe, and the code of the rooms it runs through. `run` and the pipeline ask the same question
with the same key, so neither repeats work nor reuses the work of another recipe.

A finished step leaves `steps/<step>.json` in the run: its key, its outputs with their hashes, and
how long it took. The record is written last and atomically: a step that died has none.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from lesionflow import __version__
from lesionflow.errors import DataError

_CHUNK = 1 << 20
UMASK = "LESIONFLOW_UMASK"
"""Environment variable, octal: set where pods of several users write to one volume."""


def share_files() -> None:
    """Let others change what this process and its children write from now on, if `UMASK` asks for it."""
    if asked := os.environ.get(UMASK):
        os.umask(int(asked, 8))


def digest(value: Any) -> str:
    """SHA-256 of a JSON-able value in canonical form, 64 hex digits."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tree_hash(path: Path) -> str:
    """SHA-256 over a file, or over the names and bytes of every file under a directory."""
    if path.is_file():
        return file_hash(path)
    return digest({str(p.relative_to(path)): file_hash(p) for p in sorted(path.rglob("*")) if p.is_file()})


@cache
def code_version(rooms: tuple[str, ...]) -> str:
    """Version and source hash of the rooms (files or folders of the package) that a step runs through."""
    package = Path(__file__).parent
    sources = [
        p
        for room in rooms
        for p in ([package / room] if room.endswith(".py") else (package / room).glob("*.[ph][yt]*"))
    ]
    return f"{__version__}+{digest({str(p.relative_to(package)): file_hash(p) for p in sorted(sources)})[:16]}"


def content_key(step: str, inputs: Mapping[str, str], recipe: Any, rooms: tuple[str, ...]) -> str:
    """The key of one step's work: 32 hex digits.

    `inputs` maps names to content hashes, `recipe` is the JSON-able part of the recipe the step reads.
    """
    return digest({"step": step, "inputs": dict(inputs), "recipe": recipe, "code": code_version(rooms)})[:32]


def planned_keys(run: Path) -> dict[str, str]:
    """The steps' keys of a run that was begun. Raises `DataError` for a directory that isn't one."""
    try:
        return dict(json.loads((run / "run.json").read_text())["keys"])
    except (OSError, json.JSONDecodeError, KeyError):
        raise DataError(
            f"{run}: not a run that was begun (no run.json); start it with `lesionflow run` or `train`"
        ) from None


def require(run: Path, step: str) -> None:
    """Raise `DataError` unless `step` was finished for what the run is now asked to be.

    So a later step can't pick up what an earlier recipe, or a refused gate, left in the directory.
    """
    record = read_record(run, step)
    if record is None or record["key"] != planned_keys(run)[step]:
        raise DataError(
            f"{run}: {step} isn't done for this recipe, data and code; run it first (`lesionflow run` does)"
        )


def fold_identity(key: str, fold: int) -> str:
    """What a fold's scores carry, so that those of another training are recognised."""
    return digest([key, fold])


def model_identity(key: str, fold: int, model: int) -> str:
    """What a model's weights and checkpoint carry."""
    return digest([key, fold, model])


def is_done(run: Path, step: str, key: str) -> bool:
    """Whether `step` was finished under this very key and its outputs are still what it wrote."""
    record = read_record(run, step)
    if record is None or record["key"] != key:
        return False
    return all(
        (run / name).exists() and tree_hash(run / name) == expected for name, expected in record["outputs"].items()
    )


def read_record(run: Path, step: str) -> dict[str, Any] | None:
    try:
        return dict(json.loads((run / "steps" / f"{step}.json").read_text()))
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def mark_done(run: Path, step: str, key: str, outputs: Iterable[str], seconds: float) -> None:
    """Record that `step` wrote `outputs` (paths relative to the run) under `key`."""
    record = {
        "step": step,
        "key": key,
        "seconds": round(seconds, 3),
        "outputs": {name: tree_hash(run / name) for name in outputs},
    }
    write_json(run / "steps" / f"{step}.json", record)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object that a step wrote. Raises `DataError` if it isn't there."""
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError:
        raise DataError(f"{path}: missing; run the step that writes it first") from None
    except (json.JSONDecodeError, TypeError, ValueError) as error:
        raise DataError(f"{path}: not a JSON object ({error}); run the step that writes it again") from None


def write_json(path: Path, value: Any) -> None:
    """Write readable JSON atomically."""
    with atomic(path) as file:
        file.write((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic(path) as file:
        file.write(text.encode())


@contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """A binary file that appears under its name only once it is complete and on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(fd, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
