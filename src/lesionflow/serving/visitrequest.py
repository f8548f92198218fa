"""What a triage request asks: a form or JSON to pictures and typed metadata of the same lesions.

Everything here is pure: no server, no model. Whatever is wrong with a request is a `RequestError`.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import polars as pl
import polars.selectors as cs

from lesionflow.data.schema import BY_NAME, TEST_COLUMNS
from lesionflow.data.table import read_text, typed
from lesionflow.errors import DataError
from lesionflow.serving.multipart import LONGEST_NAME, read_parts
from lesionflow.serving.protocol import RequestError, ServiceLimits

REASONS = 100
"""So many of the highest-ranked get reasons unless asked otherwise: they cost as much as the score."""
MOST_COLUMNS = 200
MOST_NUMBER = 1e6
"""Nothing that is measured on skin comes near; sums and squares of more stop being numbers."""
WITHHELD = ("patient_id", "target")
"""Columns of metadata that aren't used: whose visit it is is known, and the answer isn't asked of the client."""


@dataclass(frozen=True)
class Asked:
    """A request that was understood."""

    ids: list[str]
    files: list[str | None]
    images: list[bytes | None]
    table: pl.DataFrame
    """Metadata of these lesions, typed, in their order; at least `isic_id`."""
    described: bool
    """Whether any metadata came."""
    heatmaps: frozenset[str] | bool
    reasons: int
    count: bool = True
    """Whether the visit counts in the service's figures: one that is asked for again, for its heat maps, shouldn't."""
    notes: tuple[str, ...] = ()
    """What of the request isn't used."""


def of_form(body: bytes, content_type: str, limits: ServiceLimits) -> Asked:
    """Read a form. Raises `RequestError`."""
    files: list[str] = []
    images: list[bytes | None] = []
    metadata: bytes | None = None
    options: Any = {}
    for part in read_parts(body, content_type, limits.visit + 2):
        if part.name == "images" and part.file is not None:
            files.append(part.file or f"{len(files) + 1}")
            images.append(part.data)
        elif part.name == "metadata" and metadata is None:
            metadata = part.data
        elif part.name == "options":
            options = _json(part.data, "options")
        else:
            raise RequestError(
                f"part {part.name[:64]!r} of the form is unknown or came twice: there are images, metadata and options"
            )
    table, unused = _table(metadata, limits) if metadata is not None else (None, ())
    return _joined(files, images, table, options, limits, unused)


def of_json(body: bytes, limits: ServiceLimits) -> Asked:
    """Read JSON. Raises `RequestError`."""
    # Objects and lists take forty times their text: what can't be a visit isn't read.
    if body.count(b"{") > 2 * limits.visit + 10 or body.count(b",") > (MOST_COLUMNS + 10) * limits.visit + 100:
        raise RequestError(
            f"more objects or values than {limits.visit:,} lesions have: leave some out", status=413, limit="visit"
        )
    request = _json(body, "the request")
    lesions = request.get("lesions") if isinstance(request, dict) else None
    if not isinstance(lesions, list) or not all(isinstance(one, dict) for one in lesions):
        raise RequestError("lesions must be a list of objects with id, image and metadata")
    _bounded(len(lesions), limits)
    ids, images, rows = [], list[bytes | None](), []
    for position, lesion in enumerate(lesions):
        name, where = lesion.get("id", str(position + 1)), f"lesions[{position}]"
        if not isinstance(name, str) or not name:
            raise RequestError(f"{where}.id must be a text")
        if not name.isprintable() or len(name) > LONGEST_NAME:
            raise RequestError(
                f"{where}.id has control characters, or more than {LONGEST_NAME} in all: send a plain text", status=422
            )
        row = lesion.get("metadata") or {}
        if not isinstance(row, dict) or not all(isinstance(v, str | int | float | None) for v in row.values()):
            raise RequestError(f"{where}.metadata must be an object of texts and numbers")
        if not all(_is_whole(text) for text in (*row, *row.values()) if isinstance(text, str)):
            raise RequestError(f"{where}.metadata holds half a character (a lone surrogate): leave it out", status=422)
        ids.append(name)
        images.append(_base64(lesion.get("image"), where))
        rows.append({column: None if v is None or v == "" else str(v) for column, v in row.items()})
    columns = sorted({column for row in rows for column in row} - {"isic_id"})
    if len(columns) > MOST_COLUMNS:
        raise RequestError(
            f"lesions have {len(columns)} columns of metadata, the competition knows {len(TEST_COLUMNS)}"
        )
    cells = {"isic_id": ids} | {column: [row.get(column) for row in rows] for column in columns}
    _unique(ids, "lesions")
    table, unused = _typed(pl.DataFrame(cells, schema=dict.fromkeys(cells, pl.String))) if columns else (None, ())
    return _joined(list(ids), images, table, request.get("options") or {}, limits, unused, plain=True)


def _joined(
    files: list[str],
    images: list[bytes | None],
    table: pl.DataFrame | None,
    options: Any,
    limits: ServiceLimits,
    unused: Sequence[str],
    *,
    plain: bool = False,
) -> Asked:
    """Pictures and rows of the same lesions: a row's `isic_id` is a file's name, with or without its suffix."""
    known = set() if table is None else set(table["isic_id"].to_list())
    stems = [name if plain or name in known else PurePosixPath(name).stem or name for name in files]
    _unique(stems, "images")
    ids, given = list(stems), list(images)
    notes = [f"columns not used: {', '.join(unused[:10])}{', ...' if len(unused) > 10 else ''}"] if unused else []
    if not plain and table is not None:
        seen = set(stems)
        extra = [name for name in table["isic_id"].to_list() if name not in seen]
        ids, given = [*ids, *extra], [*given, *[None] * len(extra)]
        if extra and stems:
            shown = ", ".join(extra[:5]) + (", ..." if len(extra) > 5 else "")
            notes.append(f"no picture has the name of {len(extra):,} of {table.height:,} rows: {shown}")
    if not ids:
        raise RequestError("no lesions: send images, or metadata with a row for each lesion", status=422)
    _bounded(len(ids), limits)
    order = pl.DataFrame({"isic_id": ids})
    lesions = order if table is None else order.join(table, on="isic_id", how="left", maintain_order="left")
    heatmaps, reasons, count = _options(options, limits)
    if isinstance(heatmaps, frozenset) and (unknown := sorted(heatmaps - set(ids))):
        raise RequestError(f"heat maps: no lesion has the id {unknown[0][:64]!r}: name those of this visit", status=422)
    names = [None if plain or n >= len(files) else files[n] for n in range(len(ids))]
    return Asked(ids, names, given, lesions, table is not None, heatmaps, reasons, count, tuple(notes))


def _options(options: Any, limits: ServiceLimits) -> tuple[frozenset[str] | bool, int, bool]:
    if not isinstance(options, dict) or set(options) - {"heatmaps", "reasons", "count"}:
        raise RequestError("options must be an object; there are heatmaps and reasons, and count")
    heatmaps, reasons = options.get("heatmaps", False), options.get("reasons", REASONS)
    if not isinstance(count := options.get("count", True), bool):
        raise RequestError("options.count must be true or false: whether the visit counts in the service's figures")
    if isinstance(heatmaps, list) and all(isinstance(one, str) for one in heatmaps):
        if len(heatmaps) > limits.heatmaps:
            raise RequestError(
                f"{len(heatmaps):,} heat maps, the limit is {limits.heatmaps}: ask for fewer", limit="heatmaps"
            )
        heatmaps = frozenset(heatmaps)
    elif not isinstance(heatmaps, bool):
        raise RequestError("options.heatmaps must be true, false or a list of ids")
    if isinstance(reasons, bool):
        reasons = limits.visit if reasons else 0
    if not isinstance(reasons, int) or reasons < 0:
        raise RequestError("options.reasons must be true, false or how many of the highest-ranked get any")
    return heatmaps, reasons, count


def _table(metadata: bytes, limits: ServiceLimits) -> tuple[pl.DataFrame, Sequence[str]]:
    try:
        # One row too many is enough to be refused by.
        text = metadata.decode("utf-8")
        return _one_patient(read_text(text, "metadata", rows=limits.visit + 1, columns=MOST_COLUMNS))
    except UnicodeDecodeError:
        raise RequestError("metadata isn't UTF-8: save the CSV as UTF-8", status=422) from None
    except DataError as error:
        raise RequestError(str(error), status=422) from None


def _typed(cells: pl.DataFrame) -> tuple[pl.DataFrame, Sequence[str]]:
    try:
        return _one_patient(typed(cells, "metadata"))
    except DataError as error:
        raise RequestError(str(error), status=422) from None


def _is_whole(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _one_patient(table: pl.DataFrame) -> tuple[pl.DataFrame, Sequence[str]]:
    """The columns that may be used, and the names of those that nobody knows."""
    if "patient_id" in table.columns and (patients := table["patient_id"].drop_nulls().unique()).len() > 1:
        raise DataError(f"metadata: column patient_id: {patients.len():,} patients; a visit is one patient's")
    known = table.select(name for name in table.columns if name in TEST_COLUMNS and name not in WITHHELD)
    for name in known.select(cs.float()).columns:
        if (beyond := known.filter(known[name].abs() > MOST_NUMBER)).height:
            first = f"{beyond['isic_id'][0]}: {beyond[name][0]:g}"
            raise DataError(f"metadata: column {name}: {first} is more than can be measured: correct it")
    return known, [name for name in table.columns if name not in BY_NAME]


def _bounded(count: int, limits: ServiceLimits) -> None:
    if count > limits.visit:
        raise RequestError(
            f"{count:,} lesions, the limit is {limits.visit:,}: leave some out", status=413, limit="visit"
        )


def _unique(ids: Sequence[str], where: str) -> None:
    if len(set(ids)) != len(ids):
        twice = next(name for name, count in Counter(ids).items() if count > 1)
        raise RequestError(f"{where}: {twice!r} comes twice: give each lesion its own id", status=422)


def _base64(value: Any, where: str) -> bytes | None:
    if value is None:
        return None
    try:
        return base64.b64decode(value, validate=True)
    except (TypeError, ValueError, binascii.Error):
        raise RequestError(f"{where}.image isn't base64: send the JPEG or PNG file's bytes so") from None


def _json(data: bytes, what: str) -> Any:
    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is no JSON number")

    try:
        return json.loads(data, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{what} isn't valid JSON ({str(error)[:100]})") from None
