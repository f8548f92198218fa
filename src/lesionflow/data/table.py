"""Metadata files to typed tables, with errors that name the column, the ids and the remedy.

Every cell is read as text first and converted column by column, so a stray word in a number
column is reported with its lesion instead of turning the whole column into text. `read_cells`
gives the text as it stands (the audit looks at that), `read_metadata` the typed table.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import polars as pl

from lesionflow.data.schema import BY_NAME
from lesionflow.errors import DataError

NULLS = ["", "NA"]
_SHOWN = 5
_KNOWN = {name.casefold(): name for name in BY_NAME}


class FileError(DataError):
    """A file that can't be read at all; `code` names the fault for the audit."""

    def __init__(self, path: Path, code: str, problem: str, remedy: str) -> None:
        super().__init__(f"{path}: {problem}: {remedy}")
        self.path, self.code, self.problem, self.remedy = path, code, problem, remedy


def read_metadata(path: Path, *, require: Sequence[str] = ("isic_id",)) -> pl.DataFrame:
    """A metadata CSV as a table: numbers Float64, `target` Int8, everything else String.

    Empty cells and `NA` become null. The columns in `require` must exist; a required `isic_id` or
    `target` must be filled in every row. Raises `DataError` that names the column and the first
    ids: for unreadable files, missing columns, words or NaN among numbers, targets other than 0
    and 1, and repeated ids.
    """
    return typed(read_cells(path), path, require=require)


def read_text(text: str, where: str, *, rows: int | None = None, columns: int = 200) -> pl.DataFrame:
    """As `read_metadata`, of a CSV that is in memory; errors call it `where`.

    At most `rows` rows are read. Spaces around cells don't count, nor does the case of a known column's name.
    Raises `DataError` also for more than `columns` columns.
    """
    lines = filter(None, csv.reader(io.StringIO(text.removeprefix("\ufeff"), newline=""), strict=True))
    try:
        names = [_KNOWN.get(name.strip().casefold(), name.strip()) for name in next(lines)]
        if len(names) > columns:
            raise DataError(f"{where}: {len(names):,} columns, the competition has {len(BY_NAME)}: send those")
        rows_read = [[cell.strip() for cell in row] for row in islice(lines, rows)]
    except (StopIteration, csv.Error):
        raise DataError(f"{where}: not a CSV with a header line: send the text of one") from None
    if repeated := _repeated(names):
        raise DataError(f"{where}: column {_listed(repeated)} occurs twice in the header: rename or remove one")
    if ragged := next((n for n, row in enumerate(rows_read, 2) if len(row) != len(names)), None):
        raise DataError(f"{where}: line {ragged:,} hasn't the header's {len(names)} cells: {_RAGGED}")
    cells = {name: [None if row[n] in NULLS else row[n] for row in rows_read] for n, name in enumerate(names)}
    return typed(pl.DataFrame(cells, schema=dict.fromkeys(names, pl.String)), where)


def typed(cells: pl.DataFrame, path: Path | str, *, require: Sequence[str] = ("isic_id",)) -> pl.DataFrame:
    """Cells as text (String, null where empty) to what `read_metadata` gives; errors call them `path`."""
    if missing := [name for name in require if name not in cells.columns]:
        raise DataError(
            f"{path}: no column {', '.join(missing)} (found {_listed(cells.columns)}): "
            "add it, or check that the header line is intact"
        )
    table = cells.with_columns([as_number(name) for name in cells.columns if is_number(name)])
    for name in table.columns:
        if not is_number(name):
            continue
        bad = cells.filter(cells[name].is_not_null() & ~table[name].is_finite().fill_null(False))
        if bad.height:
            raise DataError(
                f"{path}: column {name}: {_cells(bad.height)} without a finite number ({_examples(bad, name)}): "
                f"{swap_hint(cells, name)}correct them, or leave them empty where the value is unknown"
            )
    if "target" in table.columns:
        table = _with_target(path, cells, table, required="target" in require)
    if "isic_id" in table.columns:
        _check_ids(path, table)
    return table


def read_cells(path: Path) -> pl.DataFrame:
    """Every cell of a CSV as text (String), empty cells and `NA` as null. Raises `DataError`.

    Ragged lines, doubled column names, other encodings than UTF-8 and empty files are refused.
    """
    names = _header(path)
    try:
        cells = pl.read_csv(path, infer_schema=False, null_values=NULLS, raise_if_empty=False)
    except (pl.exceptions.PolarsError, OSError, UnicodeDecodeError) as error:
        raise _explain(path, len(names), error) from None
    if cells.columns != names:
        cells = cells.rename(dict(zip(cells.columns, names, strict=True)))
    # A line that is too short is padded with nulls in silence, which shows in the last column.
    if cells.height and len(names) > 1 and cells[names[-1]].null_count() and (line := _ragged(path, len(names))):
        raise FileError(path, "ragged_line", line, _RAGGED)
    return cells


def is_number(name: str) -> bool:
    return name in BY_NAME and BY_NAME[name].kind == "number"


def as_number(name: str) -> pl.Expr:
    """Text to Float64; what isn't a number becomes null."""
    return pl.col(name).str.strip_chars().cast(pl.Float64, strict=False)


def as_target(name: str = "target") -> pl.Expr:
    """Text to Int8; what is neither 0 nor 1 becomes null."""
    number = as_number(name)
    return pl.when(number.is_in([0.0, 1.0])).then(number).cast(pl.Int8).alias(name)


def swap_hint(cells: pl.DataFrame, name: str) -> str:
    """`"they look like those of 'sex' ...; "` when a column's text is another column's vocabulary, else empty."""
    words = cells[name].drop_nulls().unique()
    words = words.filter(words.cast(pl.Float64, strict=False).is_null())
    for other in cells.columns:
        allowed = BY_NAME[other].values if other in BY_NAME else ()
        if other != name and allowed and words.len() and words.is_in(list(allowed)).all():
            return f"they look like cells of {other!r}, so the header may be swapped; "
    return ""


def _with_target(path: Path | str, cells: pl.DataFrame, table: pl.DataFrame, *, required: bool) -> pl.DataFrame:
    table = table.with_columns(as_target())
    bad = cells.filter(cells["target"].is_not_null() & table["target"].is_null())
    if bad.height:
        raise DataError(
            f"{path}: column target: {_cells(bad.height)} neither 0 (benign) nor 1 (malignant) "
            f"({_examples(bad, 'target')}): {swap_hint(cells, 'target')}write 0 or 1"
        )
    empty = cells.filter(cells["target"].is_null())
    if required and empty.height:
        raise DataError(
            f"{path}: column target: {_cells(empty.height)} empty ({_ids(empty)}): "
            "fill them in, or leave these lesions out of training"
        )
    return table


def _check_ids(path: Path | str, table: pl.DataFrame) -> None:
    ids = table["isic_id"]
    if ids.null_count():
        rows = [str(i + 2) for i in table.with_row_index().filter(ids.is_null())["index"].head(_SHOWN)]
        raise DataError(
            f"{path}: column isic_id: {_cells(ids.null_count())} empty (lines {', '.join(rows)}): "
            "every lesion needs its id; restore or remove these lines"
        )
    twice = ids.filter(ids.is_duplicated()).unique(maintain_order=True)
    if twice.len():
        raise DataError(
            f"{path}: column isic_id: {twice.len():,} ids occur more than once ({_listed(twice.to_list())}): "
            "keep one row of each"
        )


def _repeated(names: Sequence[str]) -> list[str]:
    return sorted(name for name, count in Counter(names).items() if count > 1)


def _header(path: Path) -> list[str]:
    if not path.is_file():
        raise FileError(
            path, "no_file", "no such file", "check the path, or fetch the data with `lesionflow data fetch`"
        )
    if not path.stat().st_size:
        raise FileError(path, "empty_file", "empty file (0 bytes)", "restore it")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            names = next(csv.reader(file), [])
    except (UnicodeDecodeError, csv.Error) as error:
        raise _explain(path, 0, error) from None
    if repeated := _repeated(names):
        problem = f"column {', '.join(repeated)} occurs twice in the header"
        raise FileError(path, "repeated_column", problem, "rename or remove one")
    return names


_UTF8 = "save the file as UTF-8"
_RAGGED = "restore the line, or quote the cell that contains a comma"


def _explain(path: Path, columns: int, error: Exception) -> FileError:
    """Why a CSV can't be read, by line where that can be found out."""
    with path.open("rb") as file:
        if file.read(2) in (b"\xff\xfe", b"\xfe\xff"):
            return FileError(path, "encoding", "encoded as UTF-16", _UTF8)
        file.seek(0)
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError as wrong:
                shown = line[max(wrong.start - 20, 0) : wrong.start + 1].decode("latin-1")
                return FileError(path, "encoding", f"line {number:,} isn't UTF-8 (near {shown!r})", _UTF8)
    if columns and (line_of_fault := _ragged(path, columns)):
        return FileError(path, "ragged_line", line_of_fault, _RAGGED)
    first_line = (str(error).splitlines() or [type(error).__name__])[0]
    return FileError(path, "damaged_table", f"damaged CSV ({first_line})", "restore the file")


def _ragged(path: Path, columns: int) -> str:
    """What is wrong with the first line of another number of cells than the header, or an empty text."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file)
        for row in reader:
            if row and len(row) != columns:
                return f"line {reader.line_num:,} ({row[0][:40]}) has {len(row)} cells, the header has {columns}"
    return ""


def _cells(count: int) -> str:
    return "1 cell" if count == 1 else f"{count:,} cells"


def _ids(rows: pl.DataFrame) -> str:
    return _listed(rows["isic_id"].to_list()) if "isic_id" in rows.columns else "no isic_id column to name them by"


def _examples(rows: pl.DataFrame, name: str) -> str:
    if "isic_id" not in rows.columns:
        return ", ".join(repr(v) for v in rows[name].head(_SHOWN))
    pairs = rows.select("isic_id", name).head(_SHOWN).iter_rows()
    return ", ".join(f"{isic_id}: {value!r}" for isic_id, value in pairs) + (", ..." if rows.height > _SHOWN else "")


def _listed(names: Sequence[object]) -> str:
    return ", ".join(map(str, names[:_SHOWN])) + (", ..." if len(names) > _SHOWN else "")
