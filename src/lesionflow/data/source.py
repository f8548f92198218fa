"""Where lesions come from: the competition's HDF5 file, or a folder of images, with its metadata.

    with open_source(Path("data")) as source:
        for isic_id, jpeg in source.images(source.ids):
            ...

A data set directory has `train-image.hdf5` (or the folder `train-image/` or `train-image/image/`)
and `train-metadata.csv`, and the same for `test`. The bytes come out exactly as they were stored.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import h5py
import numpy as np
import polars as pl

from lesionflow.data.table import FileError, read_metadata
from lesionflow.errors import DataError

__all__ = ["Source", "open_source", "read_metadata"]

HDF5_SUFFIXES = (".hdf5", ".h5")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
_SHOWN = 5


class Images(Protocol):
    """Encoded images by id."""

    files: list[Path]

    def ids(self) -> list[str]: ...
    def read(self, isic_id: str) -> bytes: ...
    def suffix(self, isic_id: str) -> str: ...
    def close(self) -> None: ...


class Hdf5Images:
    """One dataset per id: scalar `|S<n>` as in the competition, opaque, variable-length, or 1-D uint8.

    The handle is opened lazily and once per process: HDF5 must not be shared across a fork, and
    a pickled copy opens the file again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = [path]
        self._file: h5py.File | None = None
        self._pid = 0
        self._open()

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "files": self.files, "_file": None, "_pid": 0}

    def ids(self) -> list[str]:
        try:
            return sorted(self._open())
        except (OSError, RuntimeError) as error:
            problem = f"damaged HDF5 ({_first_line(error)})"
            raise FileError(self.path, "damaged_hdf5", problem, "restore the file") from None

    def read(self, isic_id: str) -> bytes:
        try:
            dataset = h5py.h5d.open(self._open().id, isic_id.encode())
        except (KeyError, ValueError, TypeError):
            raise DataError(f"{self.path}: no image {isic_id!r}: add it, or remove its row from the metadata") from None
        except (OSError, RuntimeError) as error:
            raise self._damaged(error, isic_id) from None
        try:
            return self._bytes(dataset, isic_id)
        except (OSError, RuntimeError) as error:
            raise self._damaged(error, isic_id) from None

    def suffix(self, isic_id: str) -> str:
        """The format an image is expected in, as a file name's ending: the competition's HDF5 holds JPEG."""
        return ".jpg"

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None

    def _bytes(self, dataset: h5py.h5d.DatasetID, isic_id: str) -> bytes:
        kind = dataset.get_type()
        if dataset.get_space().get_simple_extent_npoints() == 0:
            return b""
        if dataset.rank == 0 and isinstance(kind, h5py.h5t.TypeStringID) and not kind.is_variable_str():
            # Read as opaque memory: numpy's S type would drop trailing NUL bytes.
            raw = np.empty((), dtype=f"V{kind.get_size()}")
            dataset.read(h5py.h5s.ALL, h5py.h5s.ALL, raw, mtype=kind)
            data = raw.tobytes()
            return data if data.strip(b"\0") else b""  # An empty value is stored as one NUL.
        value = h5py.Dataset(dataset)[()]
        while isinstance(value, np.ndarray) and value.dtype == object and value.size == 1:
            value = value.reshape(-1)[0]
        if isinstance(value, bytes):
            return value
        if isinstance(value, np.void) or (
            isinstance(value, np.ndarray) and value.dtype.kind in "SV" and value.size == 1
        ):
            return value.tobytes()
        if isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim == 1:
            return value.tobytes()
        raise DataError(
            f"{self.path}: {isic_id!r} is {getattr(value, 'dtype', type(value).__name__)} of shape "
            f"{np.shape(value)}, not encoded bytes: store each image as one scalar of its JPEG bytes"
        )

    def _open(self) -> h5py.File:
        if self._file is not None and self._pid != os.getpid():
            # Inherited through a fork: close our copy of the descriptor, so that the next open gets its own.
            self.close()
        if self._file is None:
            self._file, self._pid = _open_hdf5(self.path), os.getpid()
        return self._file

    def _damaged(self, error: Exception, isic_id: str) -> DataError:
        return DataError(f"{self.path}: image {isic_id!r}: damaged HDF5 ({_first_line(error)}): restore the file")


class FolderImages:
    """A folder of `<isic_id>.jpg`, `.jpeg` or `.png`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._paths: dict[str, Path] = {}
        for path in image_files(folder):
            if path.stem in self._paths:
                raise DataError(f"{folder}: {self._paths[path.stem].name} and {path.name} have one id: keep one")
            self._paths[path.stem] = path
        self.files = list(self._paths.values())

    def ids(self) -> list[str]:
        return sorted(self._paths)

    def read(self, isic_id: str) -> bytes:
        try:
            return self._paths[isic_id].read_bytes()
        except (KeyError, FileNotFoundError):
            raise DataError(
                f"{self.folder}: no image {isic_id!r}: add {isic_id}.jpg, or remove its row from the metadata"
            ) from None

    def suffix(self, isic_id: str) -> str:
        return self._paths[isic_id].suffix.lower()

    def close(self) -> None:
        """Nothing is held open."""


class Source:
    """The lesions of one part of a data set: encoded images, and metadata where there is any."""

    def __init__(
        self,
        directory: Path,
        part: str,
        images: Images | None,
        metadata: pl.DataFrame | None,
        metadata_path: Path | None = None,
    ) -> None:
        self.directory = directory
        self.part = part
        self.metadata = metadata
        """Typed table, one row per lesion; None for bare images."""
        self.metadata_path = metadata_path
        self._images = images
        self._image_ids: list[str] | None = None
        self.files = ([metadata_path] if metadata_path else []) + (images.files if images else [])
        """Every file the source reads, for hashing."""
        self.ids: list[str] = self.image_ids() if metadata is None else metadata["isic_id"].to_list()
        """In the metadata's order; sorted where there is no metadata."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def has_images(self) -> bool:
        return self._images is not None

    def image_ids(self) -> list[str]:
        """Sorted ids of the images that exist, whether or not the metadata knows them."""
        if self._image_ids is None:
            self._image_ids = self._images.ids() if self._images else []
        return self._image_ids

    def missing(self) -> list[str]:
        """Ids with metadata but no image, in the metadata's order."""
        return difference(self.ids, self.image_ids())

    def extra(self) -> list[str]:
        """Ids with an image but no metadata."""
        return difference(self.image_ids(), self.ids)

    def check(self) -> None:
        """Raise `DataError` if metadata and images are not of the same ids."""
        for ids, problem, remedy in (
            (self.missing(), "rows of the metadata have no image", "add the images or remove the rows"),
            (self.extra(), "images have no row in the metadata", "add the rows or remove the images"),
        ):
            if ids:
                shown = ", ".join(ids[:_SHOWN]) + (", ..." if len(ids) > _SHOWN else "")
                raise DataError(f"{self.directory}: {len(ids):,} {problem} ({shown}): {remedy}")

    def read(self, isic_id: str) -> bytes:
        """One image's bytes exactly as stored. Raises `DataError` if there is none."""
        if self._images is None:
            raise DataError(
                f"{self.directory}: no images: add {self.part}-image.hdf5, or a folder {self.part}-image/ "
                "of <isic_id>.jpg"
            )
        return self._images.read(isic_id)

    def images(self, ids: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        """(id, bytes) one by one, in the order of `ids`."""
        return ((isic_id, self.read(isic_id)) for isic_id in ids)

    def close(self) -> None:
        if self._images is not None:
            self._images.close()

    def __enter__(self) -> Source:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_source(path: Path, part: str = "train", metadata: Path | None = None) -> Source:
    """Open a data set directory, an HDF5 file, or a folder of images.

    A directory's own `<part>-metadata.csv` is read unless `metadata` names another file. Either
    the images or the metadata may be absent, not both. Raises `DataError`.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path}: no such file or directory: check the path, or run `lesionflow data fetch`")
    images, own = find_parts(path, part)
    table_path = metadata or own
    if images is None and table_path is None:
        raise DataError(
            f"{path}: neither {part}-image.hdf5, a folder {part}-image/, {part}-metadata.csv nor images "
            "(<isic_id>.jpg, .jpeg or .png): point to a data set directory"
        )
    table = read_metadata(table_path) if table_path else None
    return Source(path, part, open_images(images) if images else None, table, table_path)


def find_parts(path: Path, part: str) -> tuple[Path | None, Path | None]:
    """The HDF5 file or image folder, and the metadata file, that `path` holds for `part`."""
    if path.is_file():
        if path.suffix.lower() not in HDF5_SUFFIXES:
            raise DataError(f"{path}: neither a directory nor an HDF5 file (.hdf5, .h5): point to one of them")
        return path, None
    table = path / f"{part}-metadata.csv"
    own = table if table.exists() else None
    for candidate in (path / f"{part}-image.hdf5", path / f"{part}-image.h5"):
        if candidate.is_file():
            return candidate, own
    folder = path / f"{part}-image"
    for candidate in (folder / "image", folder):
        if candidate.is_dir() and (candidate == folder or image_files(candidate)):
            return candidate, own
    return (path if own is None and image_files(path) else None), own


def open_images(path: Path) -> Images:
    return Hdf5Images(path) if path.is_file() else FolderImages(path)


def image_files(folder: Path) -> list[Path]:
    """The images directly in a folder, by name."""
    with os.scandir(folder) as entries:
        names = [e.name for e in entries if e.name.lower().endswith(IMAGE_SUFFIXES) and not e.name.startswith(".")]
    return [folder / name for name in sorted(names)]


def difference(ids: Sequence[str], others: Sequence[str]) -> list[str]:
    """The ids that aren't among the others, in order."""
    known = set(others)
    return [isic_id for isic_id in ids if isic_id not in known]


def _open_hdf5(path: Path) -> h5py.File:
    if not path.exists():
        raise FileError(path, "no_file", "no such file", "check the path")
    if not (size := path.stat().st_size):
        raise FileError(path, "empty_file", "empty file (0 bytes)", "restore it")
    try:
        return h5py.File(path, "r", locking="best-effort")
    except OSError as error:
        if "truncated" in str(error):
            problem = f"truncated HDF5 file, it ends after {size:,} bytes"
            remedy = "copy it again, or download it again with `lesionflow data fetch`"
            raise FileError(path, "truncated_hdf5", problem, remedy) from None
        if "signature not found" in str(error):
            raise FileError(path, "not_hdf5", "not an HDF5 file", "restore it, or check the path") from None
        raise FileError(path, "damaged_hdf5", f"can't be opened ({_first_line(error)})", "restore the file") from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
