"""The memory-mapped lesion store: the competition's files as one Arrow table on disk.

    store = prepare(Path("isic-2024"), Path("run/store"))     # streams; memory stays bounded
    store = Store.open(Path("run/store"))                      # maps; costs nothing

`lesions.arrow` holds the metadata and the encoded images, one row per lesion in the metadata's
order; `store.json` its content hash and counts. Images stay encoded: 401,059 lesions are 1.2 GB,
and decoding is cheaper than reading pixels from a disk. A store can be opened by any number of
processes at once; workers that unpickle one map the same file again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from lesionflow.data import schema
from lesionflow.data.images import decode, inspect
from lesionflow.data.mapped import Blobs, Mapped, Texts
from lesionflow.data.source import Source, open_source
from lesionflow.errors import DataError, ImageError
from lesionflow.keys import atomic, write_json
from lesionflow.progress import track

FORMAT = 1
_BATCH = 4096


class Store:
    """Random access to the lesions of a prepared data set.

    `table` is the metadata (polars, N rows), `targets` int8 [N] (-1 where unknown), `jpeg(i)` the
    encoded image of row i, `hash` the content hash that every later artefact carries. Training reads neither the
    table nor all texts of a column: what it holds of a row is the target, one byte.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.info: dict[str, Any] = json.loads((path / "store.json").read_text())
        except FileNotFoundError:
            raise DataError(f"{path}: not a lesion store; make one with `lesionflow data prepare`") from None
        if self.info["format"] != FORMAT:
            raise DataError(f"{path}: store format {self.info['format']}, expected {FORMAT}; prepare it again")
        self.hash: str = self.info["hash"]
        self._map()

    @classmethod
    def open(cls, path: Path) -> Store:
        return cls(Path(path))

    def _map(self) -> None:
        file = self.path / "lesions.arrow"
        try:
            self._file = Mapped(file)
            self._images = Blobs(self._file, "image")
        except (OSError, pa.ArrowInvalid) as error:
            raise DataError(f"{file}: can't be read ({error}); prepare the store again") from None
        if (total := len(self._file)) != self.info["lesions"]:
            raise DataError(f"{file}: {total} rows, store.json says {self.info['lesions']}; prepare the store again")
        self.columns = [name for name in self._file.columns if name != "image"]

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"])  # type: ignore[misc]

    def __len__(self) -> int:
        return len(self._file)

    @cached_property
    def table(self) -> pl.DataFrame:
        """The metadata, N rows in store order, all of it in memory: `tables` has a batch at a time."""
        return self._file.table(*self.columns)

    def tables(self, *columns: str) -> Iterator[pl.DataFrame]:
        """Some columns of the metadata, batch by batch in store order; those that aren't there are left out."""
        known = [name for name in columns if name in self.columns]
        return (pl.DataFrame(batch.select(known)) for batch in self._file.batches())

    @property
    def pictures(self) -> bool:
        """Whether lesions have images."""
        return bool(self.info.get("pictures", True))

    @property
    def ids(self) -> Texts:
        """`isic_id`, [N]."""
        return Texts(self._file, lambda batch: batch.column("isic_id"))

    @cached_property
    def targets(self) -> NDArray[np.int8]:
        """1 malignant, 0 not, -1 unknown; int8 [N]."""
        targets = np.full(len(self), -1, np.int8)
        if "target" in self.columns:
            for start, batch in zip(self._file.starts.tolist(), self._file.batches(), strict=False):
                targets[start : start + len(batch)] = batch.column("target").fill_null(-1).to_numpy()
        return targets

    @property
    def patients(self) -> Texts | None:
        """`patient_id`, [N], None where it isn't known; None in all where the store has no such column."""
        return Texts(self._file, lambda batch: batch.column("patient_id")) if "patient_id" in self.columns else None

    @property
    def groups(self) -> Texts:
        """What must stay on one side of a split, [N]: the patient, or the lesion itself where no patient is known."""
        if "patient_id" not in self.columns:
            return self.ids
        return Texts(self._file, _patient_or_lesion)

    def jpeg(self, row: int) -> bytes:
        """The encoded image of one row."""
        return self._images[row]


def _patient_or_lesion(batch: pa.RecordBatch) -> pa.Array:
    return pc.coalesce(batch.column("patient_id"), batch.column("isic_id"))


def prepare(
    directory: Path,
    out: Path,
    *,
    part: str = "train",
    skip_corrupt: bool = False,
    pictures: bool = True,
    progress: bool = False,
) -> Store:
    """Stream a data set directory into a store at `out`, replacing what is there only when complete.

    Without `pictures` only the metadata is read, and every image is empty.

    Checks that every metadata row has an image whose header can be read and raises `DataError`
    naming the ids otherwise. With `skip_corrupt` every image is decoded once, and rows whose image
    is missing or damaged are left out and listed in `store.json`.
    """
    with open_source(directory, part) as source:
        metadata, skipped = _rows(source, part, skip_corrupt, pictures)
        arrow = metadata.to_arrow(compat_level=pl.CompatLevel.oldest())
        columns = pa.schema([*arrow.schema, pa.field("image", pa.large_binary())])
        content = _Content(metadata.columns)
        ids = metadata["isic_id"].to_list()
        keep = np.zeros(len(ids), bool)
        out.mkdir(parents=True, exist_ok=True)
        # Without this a kill between the two files would leave new rows under the old hash.
        (out / "store.json").unlink(missing_ok=True)
        with atomic(out / "lesions.arrow") as file, pa.ipc.new_file(file, columns) as writer:
            found = _readable(source, ids, skip_corrupt) if pictures else ((name, b"") for name in ids)
            images = track(found, "prepare", total=len(ids), show=progress)
            batch: list[bytes] = []
            start = 0
            for row, (isic_id, data) in enumerate(images):
                problem = "can't be read" if data is None else None
                if data is not None and pictures:
                    problem = _problem(data, thorough=skip_corrupt)
                if problem and not skip_corrupt:
                    raise DataError(
                        f"image {isic_id}: {problem}; `lesionflow data check` lists all such images, "
                        "--skip-corrupt (or image.skip_corrupt = true) leaves them out"
                    )
                if data is None or problem:
                    skipped.append(isic_id)
                else:
                    keep[row] = True
                    batch.append(data)
                if row + 1 - start == _BATCH or row + 1 == len(ids):
                    rows = arrow.slice(start, row + 1 - start).filter(pa.array(keep[start : row + 1]))
                    _write(writer, columns, rows, batch, content)
                    batch, start = [], row + 1
        targets = metadata.filter(pl.Series(keep))
        info = {
            "format": FORMAT,
            "hash": content.hexdigest(),
            "part": part,
            "lesions": int(keep.sum()),
            "malignant": int((targets["target"] == 1).sum()) if "target" in targets.columns else None,
            "patients_known": targets["patient_id"].n_unique() - int(targets["patient_id"].has_nulls())
            if "patient_id" in targets.columns
            else 0,
            "skipped": skipped,
            "pictures": pictures,
            "synthetic": (directory / "truth.json").exists(),
        }
        write_json(out / "store.json", info)
    return Store.open(out)


def _readable(source: Source, ids: Sequence[str], skip_corrupt: bool) -> Iterator[tuple[str, bytes | None]]:
    """Every id with its encoded image; None for one that the file can't give, if such ones are to be left out."""
    if not skip_corrupt:
        yield from source.images(ids)
        return
    for isic_id in ids:
        try:
            yield isic_id, source.read(isic_id)
        except DataError:
            yield isic_id, None


class _Content:
    """The store's hash: over cells and image bytes, not Arrow's encoding of them or how they are cut into batches."""

    def __init__(self, columns: Sequence[str]) -> None:
        self._cells, self._images = hashlib.sha256(json.dumps(list(columns)).encode()), hashlib.sha256()

    def add(self, cells: pl.DataFrame, images: Sequence[bytes]) -> None:
        self._cells.update(cells.write_csv(include_header=False).encode())
        for image in images:
            self._images.update(len(image).to_bytes(8, "little"))
            self._images.update(image)

    def hexdigest(self) -> str:
        return hashlib.sha256(self._cells.digest() + self._images.digest()).hexdigest()


def _rows(source: Source, part: str, skip_corrupt: bool, pictures: bool) -> tuple[pl.DataFrame, list[str]]:
    """Metadata rows that have an image (or all, without `pictures`), in order, and the ids of those that have none."""
    if source.metadata is None:
        if part == "train":
            raise DataError(f"{source.directory}: no {part}-metadata.csv; training needs isic_id and target")
        return pl.DataFrame({"isic_id": source.ids}), []
    needed = ("isic_id", "target") if part == "train" else ("isic_id",)
    if missing := [c for c in needed if c not in source.metadata.columns]:
        raise DataError(f"{part}-metadata.csv: column {', '.join(missing)} is missing; this stage needs {needed}")
    known = [c for c in schema.TRAIN_COLUMNS if c in source.metadata.columns]
    metadata = source.metadata.select(known)
    if metadata.is_empty():
        raise DataError(f"{part}-metadata.csv: no rows")
    if part == "train" and (unlabelled := metadata.filter(pl.col("target").is_null())["isic_id"].to_list()):
        raise DataError(f"train-metadata.csv: {len(unlabelled)} rows without a target, first {unlabelled[:3]}")
    if not pictures:
        return metadata, []
    have = set(source.image_ids())
    lost = [i for i in metadata["isic_id"].to_list() if i not in have]
    if lost and not skip_corrupt:
        raise DataError(
            f"{len(lost)} metadata rows have no image, first {', '.join(lost[:3])}; restore the images, "
            "drop the rows, or leave them out with --skip-corrupt (image.skip_corrupt = true)"
        )
    return metadata.filter(~pl.col("isic_id").is_in(lost)) if lost else metadata, lost


def _problem(data: bytes, *, thorough: bool) -> str | None:
    """What is wrong with an image: by its header, or by decoding it where bad ones are to be left out."""
    try:
        decode(data) if thorough else inspect(data)
    except ImageError as error:
        return str(error)
    return None


def _write(
    writer: pa.RecordBatchWriter, columns: pa.Schema, rows: pa.Table, images: Sequence[bytes], content: _Content
) -> None:
    rows = rows.append_column("image", pa.array(images, pa.large_binary())).cast(columns).combine_chunks()
    for batch in rows.to_batches():
        writer.write_batch(batch)
    content.add(pl.DataFrame(rows.drop_columns("image")), images)
