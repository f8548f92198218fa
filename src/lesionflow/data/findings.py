"""What a check of the data found, and how it is shown."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rich.console import RenderableType

SHOWN = 5


@dataclass(frozen=True)
class Finding:
    """One kind of fault in one place."""

    severity: Literal["error", "warning"]
    """`error`: training would stop or be wrong; `warning`: look at it."""
    code: str
    """Stable name of the fault, for scripts."""
    where: str
    """File or column."""
    count: int
    """How many ids, cells or columns are concerned."""
    examples: tuple[str, ...]
    """The first of them."""
    message: str
    remedy: str


def error(code: str, where: str, hits: Iterable[object], message: str, remedy: str) -> Finding:
    """A finding that training must not pass over; `hits` are the ids, cells or columns concerned."""
    return _finding("error", code, where, hits, message, remedy)


def warning(code: str, where: str, hits: Iterable[object], message: str, remedy: str) -> Finding:
    """A finding that a person should look at; `hits` are the ids, cells or columns concerned."""
    return _finding("warning", code, where, hits, message, remedy)


def _finding(
    severity: Literal["error", "warning"], code: str, where: str, hits: Iterable[object], message: str, remedy: str
) -> Finding:
    listed = [str(hit) for hit in hits]
    return Finding(severity, code, where, len(listed), tuple(listed[:SHOWN]), message, remedy)


def to_json(findings: Sequence[Finding]) -> str:
    """Readable JSON: counts by severity, then every finding."""
    value = {
        "errors": sum(f.severity == "error" for f in findings),
        "warnings": sum(f.severity == "warning" for f in findings),
        "findings": [asdict(f) for f in findings],
    }
    return json.dumps(value, indent=2, ensure_ascii=False)


def render(findings: Sequence[Finding]) -> RenderableType:
    """A table for the terminal (rich): counts, examples and remedies, errors first."""
    from rich import box
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table

    if not findings:
        return "[green]No findings.[/green]"
    errors = sum(f.severity == "error" for f in findings)
    table = Table(box=box.SIMPLE, show_edge=False, pad_edge=False)
    for column, options in (("", {}), ("where", {}), ("count", {"justify": "right"}), ("what, and what to do", {})):
        table.add_column(column, **options, overflow="fold")  # type: ignore[arg-type]
    for finding in findings:
        style = "red" if finding.severity == "error" else "yellow"
        examples = ", ".join(finding.examples) + (", ..." if finding.count > len(finding.examples) else "")
        text = f"{escape(finding.message)}\n[dim]{escape(examples)}[/dim]\n→ {escape(finding.remedy)}"
        where = f"{escape(finding.where)}\n[dim]{finding.code}[/dim]"
        table.add_row(f"[{style}]{finding.severity}[/{style}]", where, f"{finding.count:,}", text)
    return Group(table, f"{errors} errors, {len(findings) - errors} warnings")
