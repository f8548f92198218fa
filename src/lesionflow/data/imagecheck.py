"""Look at every image once: what is wrong with it, and which others are the same.

Each image is read, hashed and decoded a single time, in several processes when there are many;
what stays of it is 16 bytes of hash and 64 of coefficients (`duplicates.features`).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lesionflow.data import duplicates
from lesionflow.data.findings import Finding, error, warning
from lesionflow.data.images import ImageInfo, Pixels, check_limits, decode, inspect
from lesionflow.data.source import Images, open_images
from lesionflow.errors import DataError, ImageError
from lesionflow.progress import track

_CHUNK = 512
_MANY = 20_000

_RESTORE = "restore the image, or leave it out with --skip-corrupt"
_FAULTS = {
    "unreadable_image": (error, "images that can't be read from the file", "restore the file"),
    "empty_image": (error, "images of zero bytes", _RESTORE),
    "not_an_image": (error, "neither JPEG nor PNG", "convert to JPEG, or leave them out with --skip-corrupt"),
    "damaged_image": (error, "truncated or damaged images", _RESTORE),
    "image_over_limits": (error, "images too large or too small to be lesion crops", "crop them to the lesion"),
    "cmyk_image": (warning, "CMYK images: their colours depend on the converter", "save them as RGB"),
    "grey_image": (warning, "grey images: colour carries much of the signal", "restore the colour image"),
    "rotated_image": (
        warning,
        "images turned by their EXIF orientation: other programs may show them unturned",
        "turn the pixels and remove the EXIF entry",
    ),
    "misnamed_image": (
        warning,
        "images of another format than their place says: other programs may refuse them",
        "convert them, or rename the files",
    ),
    "deep_image": (warning, "images of more than 8 bits, which are scaled down", "save them with 8 bits"),
    "blank_image": (warning, "images of a single colour", "restore the image"),
}


@dataclass
class Scan:
    """What is kept of the images: one row per id."""

    ids: list[str]
    digests: NDArray[np.uint64]
    """Hash of the bytes, uint64 [N, 2]; equal bytes, equal hash."""
    features: NDArray[np.int8]
    """int8 [N, 64]; zeros where there is no picture."""
    faults: dict[str, list[str]] = field(default_factory=dict)
    """By code: the ids concerned, with the measure where it helps."""


def scan(path: Path, ids: Sequence[str], *, workers: int | None = None, progress: bool = False) -> Scan:
    """Read, hash and decode the images `ids` of an HDF5 file or folder, each once."""
    chunks = [list(ids[i : i + _CHUNK]) for i in range(0, len(ids), _CHUNK)]
    result = Scan(list(ids), np.zeros((len(ids), 2), np.uint64), np.zeros((len(ids), 64), np.int8))
    start = 0
    for part in track(_scans(path, chunks, len(ids), workers), "check images", total=len(chunks), show=progress):
        stop = start + len(part.ids)
        result.digests[start:stop], result.features[start:stop] = part.digests, part.features
        for code, hits in part.faults.items():
            result.faults.setdefault(code, []).extend(hits)
        start = stop
    return result


def _scans(path: Path, chunks: list[list[str]], total: int, workers: int | None) -> Iterator[Scan]:
    workers = workers or (min(os.cpu_count() or 1, 16) if total >= _MANY else 1)
    if workers == 1:
        images = open_images(path)
        yield from (_scan_chunk(images, chunk) for chunk in chunks)
        images.close()
        return
    # Spawned, not forked: HDF5 handles and thread pools don't survive a fork.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(partial(_scan_in_worker, path), chunks)


@cache
def _images_of_worker(path: Path) -> Images:
    return open_images(path)


def _scan_in_worker(path: Path, ids: list[str]) -> Scan:
    return _scan_chunk(_images_of_worker(path), ids)


def _scan_chunk(images: Images, ids: list[str]) -> Scan:
    result = Scan(ids, np.zeros((len(ids), 2), np.uint64), np.zeros((len(ids), 64), np.int8))
    thumbnails = np.zeros((len(ids), duplicates.SIDE, duplicates.SIDE), np.uint8)
    for row, isic_id in enumerate(ids):
        try:
            data = images.read(isic_id)
        except (DataError, OSError):
            # Told apart by their ids, so that they don't count as copies of each other.
            result.digests[row] = _digest(isic_id.encode())
            result.faults.setdefault("unreadable_image", []).append(isic_id)
            continue
        result.digests[row] = _digest(data)
        faults, pixels = examine(data, images.suffix(isic_id))
        if pixels is not None:
            thumbnails[row] = duplicates.thumbnail(pixels)
        for code, measure in faults.items():
            result.faults.setdefault(code, []).append(f"{isic_id} ({measure})" if measure else isic_id)
    result.features[:] = duplicates.features(thumbnails)
    return result


def _digest(data: bytes) -> NDArray[np.uint64]:
    return np.frombuffer(hashlib.blake2b(data, digest_size=16).digest(), np.uint64)


def examine(data: bytes, suffix: str) -> tuple[dict[str, str], Pixels | None]:
    """Faults of one encoded image, code to measure, and its pixels if it can be decoded."""
    if not data:
        return {"empty_image": ""}, None
    try:
        info = inspect(data)
    except ImageError:
        known = data[:2] == b"\xff\xd8" or data[:8] == b"\x89PNG\r\n\x1a\n"
        return {"damaged_image" if known else "not_an_image": f"{len(data):,} bytes"}, None
    faults = _header_faults(info, suffix)
    try:
        check_limits(info, len(data))
        pixels = decode(data)
    except ImageError as wrong:
        code = "image_over_limits" if wrong.limit else "damaged_image"
        return faults | {code: f"{info.width}x{info.height}"}, None
    if _is_flat(pixels[::8, ::8]) and _is_flat(pixels):
        faults["blank_image"] = ""
    return faults, pixels


def _is_flat(pixels: Pixels) -> bool:
    return int(np.ptp(pixels.reshape(-1, 3), axis=0).max()) <= 2


def _header_faults(info: ImageInfo, suffix: str) -> dict[str, str]:
    faults = {}
    if (info.format == "png") != (suffix == ".png"):
        faults["misnamed_image"] = f"{info.format.upper()} as {suffix}"
    if info.bits > 8:
        faults["deep_image"] = f"{info.bits} bits"
    if info.format == "jpeg" and info.channels == 4:
        faults["cmyk_image"] = ""
    if info.channels in (1, 2):
        faults["grey_image"] = ""
    if info.orientation != 1:
        faults["rotated_image"] = f"orientation {info.orientation}"
    return faults


def fault_findings(result: Scan, where: str) -> list[Finding]:
    """The single images' faults as findings; `where` names the file or folder."""
    return [
        make(code, where, result.faults[code], message, remedy)
        for code, (make, message, remedy) in _FAULTS.items()
        if code in result.faults
    ]


def same_bytes(result: Scan) -> list[list[str]]:
    """Groups of ids whose images are the same, byte for byte; empty and unreadable ones left out."""
    empty = set(result.faults.get("empty_image", ())) | set(result.faults.get("unreadable_image", ()))
    order = np.lexsort(result.digests.T)
    ordered = result.digests[order]
    cuts = np.flatnonzero((ordered[1:] != ordered[:-1]).any(axis=1)) + 1
    groups = ([result.ids[i] for i in sorted(group)] for group in np.split(order, cuts) if len(group) > 1)
    return [group for group in groups if group[0] not in empty]


def near_duplicates(result: Scan, path: Path, *, progress: bool = False) -> list[tuple[str, str]]:
    """Pairs of ids whose images are one picture with other bytes."""
    images = open_images(path)
    pairs = duplicates.candidates(result.features)
    pairs = pairs[(result.digests[pairs[:, 0]] != result.digests[pairs[:, 1]]).any(axis=1)]
    found = []
    for left, right in track(
        pairs.tolist(), "compare look-alikes", total=len(pairs), show=progress and len(pairs) > 1000
    ):
        a, b = result.ids[left], result.ids[right]
        if duplicates.same_picture(decode(images.read(a)), decode(images.read(b))):
            found.append((a, b))
    images.close()
    return found


def duplicate_findings(
    groups: Sequence[Sequence[str]],
    pairs: Sequence[tuple[str, str]],
    where: str,
    *,
    patients: Mapping[str, str | None],
    targets: Mapping[str, str | None],
    folds: Mapping[str, int],
) -> list[Finding]:
    """Equal images as findings, by the worst that each group of them does to an evaluation."""
    levels = (
        (
            error,
            "two_labels",
            targets,
            "are malignant under one id and benign under another",
            "find out which is right",
        ),
        (
            error,
            "across_folds",
            folds,
            "lie in two folds, or one and the hold-out: held-out scores would be too good",
            "keep one, split again",
        ),
        (error, "across_patients", patients, "belong to two patients", "keep one, or correct the patient's id"),
    )
    findings = []
    for code, what, sets in (
        ("same_bytes", "images equal byte for byte", groups),
        ("near_duplicate", "images that are one picture, re-encoded or resized", pairs),
    ):
        every = left = [tuple(group) for group in sets]
        for make, suffix, values, problem, remedy in levels:
            # A leak across the split is listed whatever else is wrong with the pair.
            looked_at = every if suffix == "across_folds" else left
            hits = [g for g in looked_at if len({values[i] for i in g if values.get(i) is not None}) > 1]
            if hits:
                level = make if code == "same_bytes" or suffix == "across_folds" else warning
                listed = (" = ".join(g) for g in hits)
                findings.append(level(f"{code}_{suffix}", where, listed, f"{what} {problem}", remedy))
            left = [g for g in left if g not in hits]
        if left:
            listed = (" = ".join(g) for g in left)
            findings.append(warning(code, where, listed, f"{what}, under several ids", "keep one of each"))
    return findings
