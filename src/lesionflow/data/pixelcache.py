"""Decoded pixels of a whole store at training size, in one mapped file: what epochs read instead of decoding again.

    cache = obtain(store, spec, "auto", reads=epochs * lesions)      # builds it, maps it, or None: decode as you go
    cache.take(rows, out)                                            # uint8 [b, S, S, 3], one gather

`pixels/<key>.u8` beside the store is uint8 [rows, S, S, 3] and nothing else; `<key>.json` says of what. The key
covers the store's content, the `PreprocessSpec` and what decodes, so that a cache never serves other pixels than
`to_pixels` makes. The description is written last: data without it, of a killed build, is taken for nothing.
Deleting the folder is always safe.

Checksums: whoever writes a chunk of rows also hashes it. Opening checks the size and `SAMPLED` chunks spread over
the file, which costs a tenth of a second at any size; loader workers, which map it anew, check the size alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from lesionflow.data.images import Pixels, PreprocessSpec, to_pixels
from lesionflow.data.rows import Rows
from lesionflow.data.store import Store
from lesionflow.errors import DataError, ImageError, Preempted
from lesionflow.keys import code_version, digest, write_json
from lesionflow.progress import track

logger = logging.getLogger(__name__)

FORMAT = 1
CHUNK = 256
"""Rows that are decoded, written and hashed as one."""
SAMPLED = 8
"""Chunks whose hash is checked when a cache is opened, the first and the last among them."""
PARALLEL_FROM = 4096
"""Rows from which building pays for starting processes; a script that calls this needs a `__main__` guard then."""
MARGIN = 2.0
"""`auto` wants this many times the needed space free: weights and checkpoints go to the same volume."""
PATIENCE = 120.0
"""Seconds without progress of another's build after which it is taken for dead: a server may keep a lost lock."""


class PixelCache:
    """All lesions' pixels, read-only; safe to pickle into workers, each of which maps the file anew."""

    def __init__(self, path: Path, rows: int, size: int) -> None:
        self.path, self.rows, self.size = path, rows, size
        self._map()

    def _map(self) -> None:
        if self.path.stat().st_size != (expected := self.rows * self.size**2 * 3):
            raise DataError(f"{self.path}: not the {expected:,} bytes it was written with; delete it and run again")
        # A plain array over the map: the subclass would cost at every batch.
        self._flat = np.asarray(np.memmap(self.path, np.uint8, "r", shape=(self.rows, self.size**2 * 3)))

    def __getstate__(self) -> tuple[Path, int, int]:
        return self.path, self.rows, self.size

    def __setstate__(self, state: tuple[Path, int, int]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    def take(self, rows: Rows, out: Pixels) -> None:
        """Copy rows of the store [b] into `out`, contiguous uint8 [b, S, S, 3]. Raises `IndexError`."""
        if len(rows) and not (rows.min() >= 0 and rows.max() < self.rows):
            raise IndexError(f"rows {rows.min()} to {rows.max()} of {self.rows}")
        # With mode "raise" numpy would gather into a buffer of its own first.
        np.take(self._flat, rows, axis=0, out=out.reshape(len(rows), -1), mode="clip")


def pixels(store: Store, row: int, spec: PreprocessSpec) -> Pixels:
    """One stored lesion as uint8 [S, S, 3]; raises `DataError` naming its id if it can't be decoded."""
    try:
        return to_pixels(store.jpeg(row), spec)
    except ImageError as error:
        raise DataError(
            f"image {store.ids[row]}: {error}; or leave such images out (--set image.skip_corrupt=true)"
        ) from None


def obtain(
    store: Store,
    spec: PreprocessSpec,
    mode: str,
    *,
    reads: int,
    progress: bool = False,
    asked: Callable[[], bool] = lambda: False,
) -> PixelCache | None:
    """The store's cache, built if that is wanted (`mode`: on, off or auto); None: decode as you go.

    `auto` takes a cache that is there, and builds one if the schedule reads more pictures (`reads`) than the store
    has rows, so that decoding all of them once is less work than decoding what is drawn, and if `MARGIN` times the
    space is free. Any number of processes may ask at once: one builds, the others wait for it. `asked` says
    whether to stop, and then `Preempted` is raised. Raises `DataError` if the volume is too small ("on" only).
    """
    if mode == "off" or not store.pictures:
        return None
    if (cache := find(store, spec)) is not None:
        return cache
    if mode == "auto":
        if reads <= len(store):
            return None
        if MARGIN * needed(store, spec) > _free(store):
            logger.warning("%s: too little space to keep decoded pictures; decoding as it goes", store.path.parent)
            return None
    try:
        return build(store, spec, progress=progress, asked=asked)
    except OSError as error:
        if mode == "on":
            raise DataError(f"{path_of(store, spec)}: {error.strerror}; {_REMEDY}") from None
        logger.warning("%s: %s; decoding as it goes", path_of(store, spec), error.strerror)
        return None


_REMEDY = "decode as it goes (--set training.cache=off), or put the run on another volume"


def needed(store: Store, spec: PreprocessSpec) -> int:
    """Bytes of the cache's file."""
    return len(store) * spec.size**2 * 3


def path_of(store: Store, spec: PreprocessSpec) -> Path:
    """Where the cache of these pixels is, or would be."""
    return store.path.parent / "pixels" / f"{store.hash[:16]}-{digest([spec.to_dict(), _decoder()])[:16]}.u8"


def _decoder() -> list[str]:
    """What else decides about the pixels: our code and the libraries that decode and resize."""
    return [code_version(("data/images.py",)), *(f"{name} {metadata.version(name)}" for name in _LIBRARIES)]


_LIBRARIES = ("pillow", "simplejpeg")


def find(store: Store, spec: PreprocessSpec) -> PixelCache | None:
    """The finished cache of these pixels, None if there is none or it is damaged."""
    path = path_of(store, spec)
    try:
        about: dict[str, Any] = json.loads(path.with_suffix(".json").read_text())
        whole = _about(store, spec, about["sha256"]) == about and len(about["sha256"]) == -(-len(store) // CHUNK)
        if not whole:
            raise DataError(f"{path}: its description is of something else")
        cache = PixelCache(path, len(store), spec.size)
        for number in sorted({round(n) for n in np.linspace(0, len(about["sha256"]) - 1, SAMPLED)}):
            chunk = cache._flat[number * CHUNK : (number + 1) * CHUNK]
            if hashlib.sha256(chunk.data).hexdigest() != about["sha256"][number]:
                raise DataError(f"{path}: rows from {number * CHUNK} aren't what was written")
    except FileNotFoundError:
        return None
    except (DataError, json.JSONDecodeError, KeyError, TypeError) as error:
        logger.warning("decoded pictures are of no use (%s)", error)
        return None
    return cache


def _about(store: Store, spec: PreprocessSpec, hashes: list[str]) -> dict[str, Any]:
    about = {
        "format": FORMAT,
        "store": store.hash,
        "spec": spec.to_dict(),
        "decoder": _decoder(),
        "rows": len(store),
        "dtype": "uint8",
        "shape": [len(store), spec.size, spec.size, 3],
        "checksum": f"sha256 of every {CHUNK} rows; {SAMPLED} of them are checked on opening",
        "sha256": hashes,
    }
    return dict(json.loads(json.dumps(about)))  # Tuples become lists, as they come back from the file.


def build(
    store: Store,
    spec: PreprocessSpec,
    *,
    processes: int = 0,
    progress: bool = False,
    asked: Callable[[], bool] = lambda: False,
) -> PixelCache:
    """Decode all rows with `processes` (0: one per core, for few rows one) into a cache, or wait for who does.

    Raises `DataError` naming a lesion that can't be decoded, or the bytes needed and free; `OSError` for a volume
    that can't be written; `Preempted` if `asked` to stop.
    """
    path = path_of(store, spec)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone(path, asked):
        if (cache := find(store, spec)) is not None:
            return cache  # Another process was quicker.
        _clear(path)
        size, free = needed(store, spec), _free(store)
        if size > free:
            raise DataError(
                f"{path.parent}: decoded pictures need {size:,} bytes, {free:,} are free on this volume; {_REMEDY}"
            )
        fd, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        temporary = Path(name)
        try:
            os.ftruncate(fd, size)
            hashes = list(_written(store, spec, temporary, processes, progress, asked))
            os.fsync(fd)
            temporary.chmod(0o644)
            temporary.replace(path)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise DataError(
                    f"{path.parent}: decoded pictures need {size:,} bytes, and the volume filled up "
                    f"({_free(store):,} free); {_REMEDY}"
                ) from None
            raise
        finally:
            os.close(fd)
            temporary.unlink(missing_ok=True)
        write_json(path.with_suffix(".json"), _about(store, spec, hashes))
    return PixelCache(path, len(store), spec.size)


def _free(store: Store) -> int:
    return shutil.disk_usage(store.path.parent).free


def _clear(path: Path) -> None:
    """Remove what an earlier content of the store, a damaged cache, and killed builds left."""
    for other in path.parent.iterdir():
        with contextlib.suppress(FileNotFoundError):
            dead = other.name.startswith(".") and ".u8." in other.name
            dead = dead and time.time() - other.stat().st_mtime > PATIENCE
            foreign = other.suffix in (".u8", ".json") and not other.name.startswith((".", path.name[:16]))
            if dead or foreign or other == path.with_suffix(".json"):
                other.unlink()


def _written(
    store: Store, spec: PreprocessSpec, file: Path, processes: int, progress: bool, asked: Callable[[], bool]
) -> Iterator[str]:
    """Write all chunks and yield their hashes in order."""
    starts = range(0, len(store), CHUNK)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = processes or (min(cores, 16) if len(store) >= PARALLEL_FROM else 1)
    if processes == 1:
        with file.open("r+b") as out:
            hashes = (_write(store, spec, out.fileno(), start) for start in starts)
            yield from _until(asked, track(hashes, "decode pictures", total=len(starts), show=progress))
        return
    # Spawned: a forked process would share the parent's threads and locks.
    with ProcessPoolExecutor(
        processes, get_context("spawn"), initializer=_begin_worker, initargs=(store, spec, file)
    ) as pool:
        try:
            done = pool.map(_write_in_worker, starts)
            yield from _until(asked, track(done, "decode pictures", total=len(starts), show=progress))
        finally:
            pool.shutdown(cancel_futures=True)


def _until(asked: Callable[[], bool], hashes: Iterator[str]) -> Iterator[str]:
    for found in hashes:
        if asked():
            raise Preempted("stopped while pictures were decoded for the cache; run again to go on")
        yield found


_worker: tuple[Store, PreprocessSpec, int]


def _begin_worker(store: Store, spec: PreprocessSpec, file: Path) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Interrupts are the parent's matter ...
    if sys.platform == "linux":  # ... and without a parent nothing would end this process.
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    _worker = store, spec, os.open(file, os.O_WRONLY)


def _write_in_worker(start: int) -> str:
    return _write(*_worker, start)


def _write(store: Store, spec: PreprocessSpec, fd: int, start: int) -> str:
    """Decode one chunk, write it at its place and return its hash."""
    rows = range(start, min(start + CHUNK, len(store)))
    chunk = np.empty((len(rows), spec.size, spec.size, 3), np.uint8)
    for at, row in enumerate(rows):
        chunk[at] = pixels(store, row, spec)
    # Written, not stored through a map: a full disk is an error here, and would be a killed process there.
    left, offset = chunk.data.cast("B"), start * spec.size**2 * 3
    while left:
        count = os.pwrite(fd, left, offset)
        left, offset = left[count:], offset + count
    return hashlib.sha256(chunk.data).hexdigest()


@contextlib.contextmanager
def _alone(path: Path, asked: Callable[[], bool]) -> Iterator[None]:
    """One build at a time, as far as the volume has locks; without any each writes its own file, and one stays."""
    with path.with_name(".lock").open("w") as file:
        seen, since = 0.0, time.monotonic()
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if asked():
                    raise Preempted("stopped while another process decoded pictures; run again to go on") from None
                newest = max((p.stat().st_mtime for p in _builds(path)), default=0.0)
                if newest != seen:
                    seen, since = newest, time.monotonic()
                if time.monotonic() - since > PATIENCE:
                    logger.warning("%s: locked, but nothing is written; building without the lock", path)
                    break
                time.sleep(0.2)
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                    raise
                break
        yield


def _builds(path: Path) -> Iterator[Path]:
    """Unfinished files that are there now."""
    for other in path.parent.glob(".*.u8.*"):
        if other.exists():
            yield other
