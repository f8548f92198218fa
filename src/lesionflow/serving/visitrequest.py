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

from lesionflow.data.schema import TEST_COLUMNS
from lesionflow.data.table import read_text, typed
from lesionflow.errors import DataError
from lesionflow.serving.multipart import plain_name, read_parts
from lesionflow.serving.protocol import RequestError, ServiceLimits

REASONS = 100
"""So many of the highest-ranked get reasons unless asked otherwise: they cost as much as the score."""
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
    table = _table(metadata) if metadata is not None else None
    return _joined(files, images, table, options, limits)


def of_json(body: bytes, limits: ServiceLimits) -> Asked:
    """Read JSON. Raises `RequestError`."""
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
        row = lesion.get("metadata") or {}
        if not isinstance(row, dict) or not all(isinstance(v, str | int | float | None) for v in row.values()):
            raise RequestError(f"{where}.metadata must be an object of texts and numbers")
        ids.append(plain_name(name))
        images.append(_base64(lesion.get("image"), where))
        rows.append({column: None if v is None or v == "" else str(v) for column, v in row.items()})
    columns = sorted({column for row in rows for column in row} - {"isic_id"})
    if len(columns) > 200:
        raise RequestError(
            f"lesions have {len(columns)} columns of metadata, the competition knows {len(TEST_COLUMNS)}"
        )
    cells = {"isic_id": ids} | {column: [row.get(column) for row in rows] for column in columns}
    _unique(ids, "lesions")
    table = _typed(pl.DataFrame(cells, schema=dict.fromkeys(cells, pl.String))) if columns else None
    return _joined(list(ids), images, table, request.get("options") or {}, limits, plain=True)


def _joined(
    files: list[str],
    images: list[bytes | None],
    table: pl.DataFrame | None,
    options: Any,
    limits: ServiceLimits,
    *,
    plain: bool = False,
) -> Asked:
    """Pictures and rows of the same lesions: a row's `isic_id` is a file's name, with or without its suffix."""
    known = set() if table is None else set(table["isic_id"].to_list())
    stems = [name if plain or name in known else PurePosixPath(name).stem or name for name in files]
    _unique(stems, "images")
    ids, given = list(stems), list(images)
    if not plain and table is not None:
        extra = [name for name in table["isic_id"].to_list() if name not in set(stems)]
        ids, given = [*ids, *extra], [*given, *[None] * len(extra)]
    if not ids:
        raise RequestError("no lesions: send images, or metadata with a row for each lesion", status=422)
    _bounded(len(ids), limits)
    order = pl.DataFrame({"isic_id": ids})
    lesions = order if table is None else order.join(table, on="isic_id", how="left", maintain_order="left")
    heatmaps, reasons = _options(options, limits)
    names = [None if plain or n >= len(files) else files[n] for n in range(len(ids))]
    return Asked(ids, names, given, lesions, table is not None, heatmaps, reasons)


def _options(options: Any, limits: ServiceLimits) -> tuple[frozenset[str] | bool, int]:
    if not isinstance(options, dict) or set(options) - {"heatmaps", "reasons"}:
        raise RequestError("options must be an object; there are heatmaps and reasons")
    heatmaps, reasons = options.get("heatmaps", False), options.get("reasons", REASONS)
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
    return heatmaps, reasons


def _table(metadata: bytes) -> pl.DataFrame:
    try:
        return _one_patient(read_text(metadata.decode("utf-8"), "metadata"))
    except UnicodeDecodeError:
        raise RequestError("metadata isn't UTF-8: save the CSV as UTF-8", status=422) from None
    except DataError as error:
        raise RequestError(str(error), status=422) from None


def _typed(cells: pl.DataFrame) -> pl.DataFrame:
    try:
        return _one_patient(typed(cells, "metadata"))
    except DataError as error:
        raise RequestError(str(error), status=422) from None


def _one_patient(table: pl.DataFrame) -> pl.DataFrame:
    if "patient_id" in table.columns and (patients := table["patient_id"].drop_nulls().unique()).len() > 1:
        raise DataError(f"metadata: column patient_id: {patients.len():,} patients; a visit is one patient's")
    return table.select(name for name in table.columns if name in TEST_COLUMNS and name not in WITHHELD)


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
