"""multipart/form-data in memory: a request's body to its parts. Nothing is ever written to disk.

Web frameworks spool large parts to temporary files; pictures of patients must not end up there, so this uses the
parser alone. The body was bounded before it got here.
"""

from __future__ import annotations

import posixpath
from dataclasses import dataclass, field

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from lesionflow.serving.protocol import RequestError

MOST_HEADER = 4096
LONGEST_NAME = 200


@dataclass(frozen=True)
class Part:
    """One field or file of a form."""

    name: str
    file: str | None
    """The file's name without folders, as the client calls it; None for a plain field."""
    data: bytes


@dataclass
class _Open:
    headers: dict[bytes, bytes] = field(default_factory=dict)
    key: bytes = b""
    value: bytes = b""
    data: list[bytes] = field(default_factory=list)


def read_parts(body: bytes, content_type: str, most: int) -> list[Part]:
    """The parts of a body of this Content-Type, in order. Raises `RequestError`, also for more than `most` of them."""
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise RequestError("Content-Type must be multipart/form-data with a boundary", status=415)
    parts: list[Part] = []
    now = _Open()
    ended = False

    def begin() -> None:
        nonlocal now
        if len(parts) >= most:
            raise RequestError(f"more than {most:,} parts in the form: send fewer at a time", status=413, limit="visit")
        now = _Open()

    def key(data: bytes, start: int, end: int) -> None:
        now.key += data[start:end]

    def value(data: bytes, start: int, end: int) -> None:
        now.value += data[start:end]

    def header() -> None:
        now.headers[now.key.lower()], now.key, now.value = now.value, b"", b""

    def content(data: bytes, start: int, end: int) -> None:
        now.data.append(data[start:end])

    def finish() -> None:
        parts.append(_part(now, len(parts)))

    def last() -> None:
        nonlocal ended
        ended = True

    parser = MultipartParser(
        boundary,
        {
            "on_part_begin": begin, "on_header_field": key, "on_header_value": value, "on_header_end": header,
            "on_part_data": content, "on_part_end": finish, "on_end": last,
        },
        max_header_size=MOST_HEADER,
    )  # fmt: skip
    try:
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise RequestError(f"the form can't be read ({str(error)[:100]}): see multipart/form-data") from None
    if not ended:
        raise RequestError("the form ends before its last boundary: was the upload cut off?")
    return parts


def _part(found: _Open, position: int) -> Part:
    kind, options = parse_options_header(found.headers.get(b"content-disposition", b""))
    if kind != b"form-data" or b"name" not in options:
        raise RequestError(
            f"part {position + 1} of the form has no name: send Content-Disposition: form-data; name=..."
        )
    if found.headers.get(b"content-transfer-encoding", b"binary").lower() not in (b"binary", b"8bit", b"7bit"):
        raise RequestError(f"part {position + 1} of the form has a transfer encoding: send it as it is", status=415)
    file = options.get(b"filename")
    return Part(
        options[b"name"].decode("utf-8", "replace")[:LONGEST_NAME],
        None if file is None else plain_name(file.decode("utf-8", "replace")),
        b"".join(found.data),
    )


def plain_name(name: str) -> str:
    """A file's name without folders and control characters; it is only ever said back."""
    last = posixpath.basename(name.replace("\\", "/"))
    return "".join(c for c in last if c.isprintable())[:LONGEST_NAME]
