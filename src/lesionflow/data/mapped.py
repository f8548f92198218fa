"""An Arrow file where it lies: mapped into memory, and read batch by batch.

All that a process holds of its own is where the batches begin, a few bytes for thousands of rows. The rest are pages
of the file, which all processes share and the kernel drops where memory is short. So a column of texts can be used
like a list, and none of them becomes an object before it is asked for.
"""

from __future__ import annotations

import bisect
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import polars as pl
import pyarrow as pa

from lesionflow.data.rows import Rows

_PAIR = struct.Struct("<2q")


class Mapped:
    """The columns of an Arrow file. `len` is the number of rows, `columns` are the names.

    Raises `OSError` or `pyarrow.ArrowInvalid` for a file that can't be read.
    """

    def __init__(self, file: Path) -> None:
        # No copy: the buffer is the mapped file.
        self._buffer = pa.memory_map(str(file)).read_buffer()
        self._reader = pa.ipc.open_file(self._buffer)
        self.columns: list[str] = self._reader.schema.names
        counts = [batch.num_rows for batch in self.batches()]
        self.starts = np.cumsum([0, *counts])
        """The row that each batch begins with, and the number of rows; int64 [batches + 1]."""
        self._begins: list[int] = self.starts.tolist()

    def __len__(self) -> int:
        return int(self.starts[-1])

    def batch(self, number: int) -> pa.RecordBatch:
        """One batch, in place. Nobody should keep it: it has an object for each of some fifty columns."""
        return self._reader.get_batch(number)

    def batches(self) -> Iterator[pa.RecordBatch]:
        """All batches, one after the other."""
        return map(self.batch, range(self._reader.num_record_batches))

    def table(self, *columns: str) -> pl.DataFrame:
        """Some columns of all rows, in memory."""
        return pl.DataFrame(pa.Table.from_batches(self.batches(), self._reader.schema).select(list(columns)))

    def place(self, row: int) -> tuple[int, int]:
        """The batch that has a row, and the row's place in it."""
        # As plain numbers: a search in an array would cost more than reading the row.
        number = bisect.bisect_right(self._begins, row) - 1
        return number, row - self._begins[number]


class Blobs:
    """A column of bytes without nulls (`large_binary`): `blobs[row]` copies one value out of the mapped file."""

    def __init__(self, file: Mapped, column: str) -> None:
        self._file, self._bytes = file, memoryview(file._buffer)
        # Where the offsets and the bytes of each batch begin in the file.
        self._offsets: list[int] = []
        self._values: list[int] = []
        for batch in file.batches():
            cells = batch.column(column)
            _, offsets, values = cells.buffers()
            self._offsets.append(offsets.address - file._buffer.address + 8 * cells.offset)
            self._values.append(values.address - file._buffer.address if values else 0)

    def __getitem__(self, row: int) -> bytes:
        number, at = self._file.place(row)
        start, end = _PAIR.unpack_from(self._bytes, self._offsets[number] + 8 * at)
        begin = self._values[number]
        return bytes(self._bytes[begin + start : begin + end])


class Texts(Sequence[str]):
    """Texts of a mapped file like a list of them, [N]; polars takes them as a column without making objects.

    `of` gives the texts of a batch, an Arrow array of `large_string`.
    """

    def __init__(self, file: Mapped, of: Callable[[pa.RecordBatch], pa.Array]) -> None:
        self._file, self._of = file, of

    def __len__(self) -> int:
        return len(self._file)

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> list[str]: ...
    def __getitem__(self, row: int | slice) -> str | list[str]:
        if isinstance(row, slice):
            return self.take(np.arange(*row.indices(len(self)))).to_list()
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        number, at = self._file.place(row % len(self))
        text: str = self._piece(number)[at].as_py()
        return text

    def __iter__(self) -> Iterator[str]:
        return (text for piece in self.pieces() for text in piece.to_pylist())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __arrow_c_stream__(self, requested_schema: object = None) -> Any:
        return pa.chunked_array(list(self.pieces()), pa.large_string()).__arrow_c_stream__(requested_schema)

    def pieces(self) -> Iterator[pa.Array]:
        """The texts batch by batch, as Arrow arrays."""
        return (self._piece(number) for number in range(len(self._file.starts) - 1))

    def take(self, rows: Rows) -> pl.Series:
        """The texts of some rows, in the order asked for."""
        order = None if (rows[1:] >= rows[:-1]).all() else np.argsort(rows, kind="stable")
        ascending = rows if order is None else rows[order]
        bounds = np.searchsorted(ascending, self._file.starts.astype(rows.dtype))
        found = pl.Series(dtype=pl.String)
        for number in np.flatnonzero(np.diff(bounds)).tolist():
            here = ascending[bounds[number] : bounds[number + 1]] - self._file.starts[number]
            found.append(pl.Series(self._piece(number).take(pa.array(here))))
        return found.rechunk() if order is None else found[np.argsort(order)]

    def _piece(self, number: int) -> pa.Array:
        return self._of(self._file.batch(number))
