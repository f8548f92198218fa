"""This package as a wheel, made from what is installed: how the code reaches a cluster or an offline notebook.

A wheel is an archive of a package's files and its metadata. It is packed from the running code, be that a
checkout or an installation, without a build tool or a network, and equal code gives equal bytes.
"""

from __future__ import annotations

import base64
import hashlib
import io
import zipfile
from importlib import metadata
from pathlib import Path

from lesionflow import __version__
from lesionflow.errors import UsageError
from lesionflow.recipe import shipped

_KINDS = (".py", ".typed", ".html", ".toml", ".js", ".css", ".svg")
_EPOCH = (1980, 1, 1, 0, 0, 0)


def file_name() -> str:
    return f"lesionflow-{__version__}-py3-none-any.whl"


def wheel_bytes() -> bytes:
    """The wheel of the code that runs now. Raises `UsageError` if the package isn't installed at all."""
    try:
        distribution = metadata.distribution("lesionflow")
    except metadata.PackageNotFoundError:
        raise UsageError("lesionflow isn't installed, so it can't be packed: pip install it first") from None
    package = Path(__file__).parent
    files = {
        f"lesionflow/{path.relative_to(package).as_posix()}": path.read_bytes()
        for path in sorted(package.rglob("*"))
        if path.suffix in _KINDS and "__pycache__" not in path.parts
    }
    files |= {f"lesionflow/recipes/{path.name}": path.read_bytes() for path in shipped().values()}
    files["lesionflow/recipes/__init__.py"] = b""
    info = f"lesionflow-{__version__}.dist-info"
    files[f"{info}/METADATA"] = (distribution.read_text("METADATA") or "").encode()
    files[f"{info}/entry_points.txt"] = (distribution.read_text("entry_points.txt") or "").encode()
    files[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: lesionflow\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    record = "".join(f"{name},sha256={_digest(data)},{len(data)}\n" for name, data in files.items())
    files[f"{info}/RECORD"] = (record + f"{info}/RECORD,,\n").encode()
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, data, zipfile.ZIP_DEFLATED)
    return packed.getvalue()


def _digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
