"""Write the table of cluster settings in docs/cluster.md from the fields of `lesionflow.cluster.settings`.

python docs/write_settings.py [--check]
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import sys
from pathlib import Path
from typing import Any

from lesionflow.cluster import settings

PAGE = Path(__file__).with_name("cluster.md")
BEGIN, END = "<!-- settings: python docs/write_settings.py -->\n", "<!-- /settings -->"


def table() -> str:
    """A row for every field: its name as `--on` takes it, its default, and what it means."""
    tree = ast.parse(Path(settings.__file__).read_text())
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    rows = ["| field | default | what |", "|---|---|---|"]
    for name, default, says in _fields(settings.Settings(), classes, ""):
        shown = f"`{default}`" if default != "" else ""
        rows.append(f"| `{name}` | {shown} | {says.replace('|', chr(92) + '|')} |")
    return "\n".join(rows) + "\n"


def _fields(section: Any, classes: dict[str, ast.ClassDef], prefix: str) -> list[tuple[str, str, str]]:
    found = []
    says = _docstrings(classes[type(section).__name__])
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            found += _fields(value, classes, f"{field.name}.")
        else:
            shown = str(value).lower() if isinstance(value, bool) else str(value)
            found.append((prefix + field.name, shown, says.get(field.name, "")))
    return found


def _docstrings(section: ast.ClassDef) -> dict[str, str]:
    """Field -> the string under it, on one line."""
    found = {}
    for field, after in zip(section.body, section.body[1:], strict=False):
        named = isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        said = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        if named and said:
            found[field.target.id] = " ".join(str(after.value.value).split())
    return found


def written(page: str) -> str:
    """The page with the table as it should be."""
    head, rest = page.split(BEGIN)
    return f"{head}{BEGIN}{table()}{END}{rest.split(END, 1)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the settings' table in docs/cluster.md.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the table is out of date")
    check = parser.parse_args().check
    page = PAGE.read_text()
    if check:
        sys.exit(written(page) != page)
    PAGE.write_text(written(page))


if __name__ == "__main__":
    main()
