"""Frozen dataclasses from TOML: types, bounds and choices checked, every error naming the field.

`recipe` and the cluster's settings are written with these. A field's bounds stand in its metadata
(`bound`), a section is a field whose type is another dataclass.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import field
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from lesionflow.errors import UsageError

T = TypeVar("T")


def bound(default: Any, low: float | None = None, high: float | None = None, choices: tuple[str, ...] = ()) -> Any:
    """A dataclass field with a default and what its value may be."""
    return field(default=default, metadata={"low": low, "high": high, "choices": choices})


def read_toml(path: Path, what: str) -> dict[str, Any]:
    """A TOML file's values. Raises `UsageError` naming the file."""
    try:
        return tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise UsageError(f"{what} {path}: no such file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{what} {path}: not valid TOML ({error})") from None


def override_all(values: dict[str, Any], overrides: Iterable[str], option: str = "--set") -> None:
    """Apply overrides like `section.field=value` in place."""
    for text in overrides:
        override(values, text, option)


def override(values: dict[str, Any], change: str, option: str = "--set") -> None:
    """Apply one `section.field=value` in place; the value is TOML, or else a string."""
    name, equals, text = change.partition("=")
    if not equals or not name.strip():
        raise UsageError(f"{option} {change!r}: expected field=value, for instance training.epochs=5")
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        value = text  # An unquoted string.
    *sections, last = name.strip().split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise UsageError(f"{option} {change!r}: {section} is a field, not a section")
    values[last] = value


def build(cls: type[T], values: Mapping[str, Any], where: str, prefix: str = "") -> T:
    """A dataclass from plain values; `where` (the file) and `prefix` (the section) go into the errors."""
    hints = get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if unknown := [name for name in values if name not in fields]:
        known = ", ".join(prefix + name for name in fields)
        raise UsageError(f"{where}: unknown field {prefix}{unknown[0]}; known are {known}")
    built: dict[str, Any] = {}
    for name, value in values.items():
        kind = hints[name]
        if dataclasses.is_dataclass(kind):
            if not isinstance(value, Mapping):
                raise UsageError(f"{where}: {prefix}{name} is a section, not a value")
            built[name] = build(kind, value, where, f"{prefix}{name}.")  # type: ignore[arg-type]
        else:
            built[name] = check(value, kind, fields[name].metadata, f"{where}: {prefix}{name}")
    missing = [n for n, f in fields.items() if n not in built and f.default is dataclasses.MISSING]
    if missing:
        raise UsageError(f"{where}: {prefix}{missing[0]} is missing")
    return cls(**built)


def check(value: Any, kind: type, bounds: Mapping[str, Any], what: str) -> Any:
    """The value, an int made a float where one is asked for. Raises `UsageError` for a wrong type or bound."""
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UsageError(f"{what} must be {kind.__name__}, got {value!r}")
    low, high, choices = (bounds.get(k) for k in ("low", "high", "choices"))
    if choices and value not in choices:
        raise UsageError(f"{what} must be one of {', '.join(choices)}, got {value!r}")
    # Written so that NaN, which compares false with everything, is out of bounds too.
    if (low is not None and not value >= low) or (high is not None and not value <= high):
        limits = f"at least {low}" if high is None else f"between {low} and {high}"
        raise UsageError(f"{what} must be {limits}, got {value}")
    return value
