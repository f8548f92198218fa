"""Download a competition's files from Kaggle: resumable, checked, and done only once.

    fetch(Path("data"))        # about 1.6 GB: train and test, images and metadata

A file appears under its name only when it is complete and its checksum holds. What has arrived of
a broken-off transfer stays in `.<name>.part` and is continued, by this call or the next one, as
long as the server's file is still the same. `fetch.json` records size and SHA-256 of every file;
a second fetch checks the files against it and touches the network only for what is missing or
damaged. Tokens: see `lesionflow.data.kaggle`.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import json
import re
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from lesionflow.data import kaggle
from lesionflow.errors import ClusterError, UsageError
from lesionflow.keys import atomic, file_hash, write_json

COMPETITION = "isic-2024-challenge"
FILES = (
    "train-metadata.csv",
    "test-metadata.csv",
    "sample_submission.csv",
    "test-image.hdf5",
    "train-image.hdf5",
)
"""What lesionflow reads; the competition's single JPEG files are left out, they repeat the HDF5 file."""
RECORD = "fetch.json"
_CHUNK = 1 << 16
_SPARE = 64 << 20

Advance = Callable[[int, int | None], None]
"""Told how many bytes have arrived, out of how many (None if the server doesn't say)."""


@dataclass(frozen=True)
class Remote:
    """What the server says about a file."""

    size: int | None
    validator: str | None
    """ETag or date that proves a partial download belongs to the same file; None: no resuming."""
    md5: str | None

    @classmethod
    def of(cls, headers: Any) -> Remote:
        length = headers.get("Content-Length")
        plain = headers.get("Content-Encoding", "identity") == "identity"
        etag = headers.get("ETag", "")
        md5 = None
        if found := re.search(r"md5=([A-Za-z0-9+/=]+)", headers.get("x-goog-hash", "")):
            md5 = base64.b64decode(found[1]).hex()
        elif re.fullmatch(r'"[0-9a-f]{32}"', etag):
            md5 = etag.strip('"')
        validator = etag if etag and not etag.startswith("W/") else headers.get("Last-Modified")
        resumable = plain and headers.get("Accept-Ranges") == "bytes"
        return cls(int(length) if length and plain else None, validator if resumable else None, md5)


def fetch(
    out: Path,
    *,
    competition: str = COMPETITION,
    progress: bool = True,
    files: Sequence[str] = FILES,
    tries: int = 6,
    pause: float = 1.0,
) -> list[Path]:
    """Download `files` of a competition into `out` and return their paths.

    `tries` attempts in a row may fail without a byte arriving, `pause` seconds apart at first and
    twice as long each time. Raises `UsageError` (no token, wrong names, no disk space) and
    `ClusterError` (rules not accepted, no network, damaged transfer).
    """
    for name in files:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise UsageError(f"file {name!r}: name a file of the competition, without leading / and ..")
    out.mkdir(parents=True, exist_ok=True)
    record = _read_record(out, competition)
    wanted = [name for name in files if not _is_intact(out / name, record.get(name))]
    with ExitStack() as stack:
        client = stack.enter_context(kaggle.connect()) if wanted else None
        for name in wanted:
            advance = stack.enter_context(_bar(name, progress))
            try:
                record[name] = _fetch_one(client, out, competition, name, tries, pause, advance)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise _no_space(out, name) from None
                raise
            write_json(out / RECORD, {"competition": competition, "files": record})
    return [out / name for name in files]


def _fetch_one(
    client: Any, out: Path, competition: str, name: str, tries: int, pause: float, advance: Advance
) -> dict[str, Any]:
    part = out / Path(name).parent / f".{Path(name).name}.part"
    part.parent.mkdir(parents=True, exist_ok=True)
    failures, damaged = 0, False
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            remote = _transfer(client, part, competition, name, out, advance)
        except kaggle.TransientError as error:
            arrived = part.exists() and part.stat().st_size > before
            failures = 1 if arrived else failures + 1
            if failures >= tries:
                raise ClusterError(
                    f"{name}: {error}, {failures} times in a row: check the network and fetch again "
                    "(what has arrived is kept and continued)"
                ) from None
            time.sleep(min(pause * 2 ** (failures - 1), 60))
            continue
        if problem := _mismatch(part, remote):
            _discard(part)
            if damaged:
                raise ClusterError(f"{name}: {problem}, twice: try again later, or over another network")
            damaged = True
            continue
        break
    target = out / name
    if not name.endswith(".zip") and zipfile.is_zipfile(part):
        _unzip(part, target, out)  # Kaggle serves some files compressed, under the plain name.
        _discard(part)
    else:
        part.replace(target)
        _discard(part)
    return {"bytes": target.stat().st_size, "sha256": file_hash(target), "remote_md5": remote.md5}


def _transfer(client: Any, part: Path, competition: str, name: str, out: Path, advance: Advance) -> Remote:
    """One attempt to bring `part` to its full length."""
    response = kaggle.open_file(client, competition, name)
    try:
        remote = Remote.of(response.headers)
        start = part.stat().st_size if part.exists() else 0
        if not (start and remote.validator and _read_note(part) == _note(remote)):
            _discard(part)
            start = 0
            write_json(_note_path(part), _note(remote))
        if remote.size is not None and start >= remote.size:
            return remote
        if start:
            response = kaggle.reopen_file(client, response, start, str(remote.validator), competition, name)
            if response.status_code != 206:  # The file has changed since: its new self comes from the beginning.
                remote, start = Remote.of(response.headers), 0
                write_json(_note_path(part), _note(remote))
        if remote.size is not None and shutil.disk_usage(out).free < remote.size - start + _SPARE:
            raise _no_space(out, name, remote.size - start)
        advance(start, remote.size)
        with part.open("ab" if start else "wb") as file, kaggle.explained(competition, name):
            for chunk in response.iter_content(_CHUNK):
                file.write(chunk)
                start += len(chunk)
                advance(start, remote.size)
        if remote.size is not None and start < remote.size:
            raise kaggle.TransientError(f"the transfer broke off after {start:,} of {remote.size:,} bytes")
        return remote
    finally:
        response.close()


def _mismatch(part: Path, remote: Remote) -> str:
    """What is wrong with a finished download, or an empty text."""
    size = part.stat().st_size
    if remote.size is not None and size != remote.size:
        return f"{size:,} bytes arrived, the server has {remote.size:,}"
    if remote.md5:
        with part.open("rb") as file:
            md5 = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        if md5 != remote.md5:
            return f"the MD5 of what arrived is {md5}, the server's {remote.md5}"
    return ""


def _unzip(archive: Path, target: Path, out: Path) -> None:
    """Put the one file of an archive under its name, atomically; its CRC is checked on the way."""
    try:
        with zipfile.ZipFile(archive) as zipped:
            members = [m for m in zipped.infolist() if not m.is_dir()]
            named = [m for m in members if PurePosixPath(m.filename).name == target.name] or members
            if len(named) != 1:
                raise ClusterError(f"{target.name}: its archive holds {len(members)} files: download it by hand")
            if shutil.disk_usage(out).free < named[0].file_size + _SPARE:
                raise _no_space(out, target.name, named[0].file_size)
            with zipped.open(named[0]) as source, atomic(target) as file:
                shutil.copyfileobj(source, file, _CHUNK)
    except zipfile.BadZipFile as error:
        _discard(archive)
        raise ClusterError(f"{target.name}: its archive is damaged ({error}): fetch again") from None


def _is_intact(path: Path, entry: dict[str, Any] | None) -> bool:
    return bool(
        entry and path.is_file() and path.stat().st_size == entry["bytes"] and file_hash(path) == entry["sha256"]
    )


def _read_record(out: Path, competition: str) -> dict[str, Any]:
    try:
        record = json.loads((out / RECORD).read_text())
    except (OSError, ValueError):
        return {}
    return dict(record["files"]) if record.get("competition") == competition else {}


def _note_path(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _note(remote: Remote) -> dict[str, Any]:
    return {"validator": remote.validator, "size": remote.size}


def _read_note(part: Path) -> Any:
    try:
        return json.loads(_note_path(part).read_text())
    except (OSError, ValueError):
        return None


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _note_path(part).unlink(missing_ok=True)


def _no_space(out: Path, name: str, needed: int | None = None) -> UsageError:
    free = shutil.disk_usage(out).free
    wants = f"needs {needed / 1e6:,.0f} MB more, " if needed else ""
    return UsageError(
        f"{out}: no disk space for {name} ({wants}{free / 1e6:,.0f} MB free): free some, then fetch again"
    )


@contextmanager
def _bar(name: str, show: bool) -> Iterator[Advance]:
    if not show:
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        task = bars.add_task(name, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)
