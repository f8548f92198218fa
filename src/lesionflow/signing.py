"""Who made a bundle: a signature beside it, by a key that its maker keeps, checked with the public half.

    sign(Path("run/bundle"), Path("maker.pem"))                       # writes run/bundle.sig
    check_signature(Bundle.open(Path("run/bundle")), Path("maker.pub"))

The format is that of OpenSSF's model-signing with an elliptic-curve key, so its own command line reads it too:
a Sigstore bundle around an in-toto statement that lists every file's SHA-256, the manifest's included. Nothing is
sent anywhere, and no identity service is asked.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

from lesionflow.bundle import MANIFEST, Bundle
from lesionflow.errors import DataError, UsageError, missing_extra
from lesionflow.keys import file_hash, write_text

PASSWORD = "LESIONFLOW_KEY_PASSWORD"  # noqa: S105 - the variable's name
"""Environment variable with the private key's password, if it has one."""

KEYS = "openssl ecparam -name prime256v1 -genkey -noout -out maker.pem; openssl ec -in maker.pem -pubout -out maker.pub"
"""How a pair of keys is made."""

MAX_BYTES = 1024 * 1024
"""A signature of a bundle's few dozen files takes a few kilobytes."""


def beside(bundle: Path) -> Path:
    """Where a bundle's signature lies unless said otherwise: beside the folder, whose manifest knows no such file."""
    path = Path(os.path.abspath(bundle))  # noqa: PTH100 - a link keeps its name
    return path.with_name(f"{path.name}.sig")


def sign(bundle: Path, private_key: Path, signature: Path | None = None) -> Path:
    """Sign every file of a bundle that is whole, and return where the signature was written.

    `private_key` is an elliptic-curve key (P-256, P-384 or P-521) in PEM; its password, if any, is looked up in
    `LESIONFLOW_KEY_PASSWORD`. Raises `DataError` for a bundle that isn't whole, `UsageError` for a key that can't be
    used.
    """
    _, signing, _ = _library()
    Bundle.open(bundle)
    signature = signature or beside(bundle)
    _readable(private_key, "--private-key")
    with tempfile.TemporaryDirectory(prefix="lesionflow-") as scratch:
        made = Path(scratch) / "signature"
        try:
            password: Any = (os.environ.get(PASSWORD) or "").encode() or None  # Bytes, whatever its hint says.
            signer = signing.Config().set_hashing_config(_hashing())
            signer.use_elliptic_key_signer(private_key=private_key, password=password).sign(bundle, made)
        except Exception as error:  # The library has no errors of its own, and its texts may quote the key's file.
            raise UsageError(
                f"--private-key {private_key}: can't sign with it ({type(error).__name__}): give an elliptic-curve key "
                f"in PEM, with its password, if it has one, in {PASSWORD}; a pair is made by `{KEYS}`"
            ) from None
        write_text(signature, made.read_text())
    return signature


def check_signature(bundle: Bundle, public_key: Path, signature: Path | None = None) -> None:
    """Return if this opened bundle is what the key's owner signed; else raise `DataError` saying why not.

    The signed hashes are compared with those that the bundle was opened with, and every later `Bundle.read` holds a
    file to these: what was signed is what is used.
    """
    _, _, verifying = _library()
    signature = signature or beside(bundle.path)
    _readable(public_key, "--public-key")
    if not signature.is_file():
        raise DataError(
            f"{signature}: no signature, and --public-key asks for one: `lesionflow sign` writes it, or say where it "
            "is with --signature"
        )
    if signature.stat().st_size > MAX_BYTES:
        raise DataError(f"{signature}: larger than any bundle's signature: don't use this bundle")
    data = signature.read_bytes()
    with tempfile.TemporaryDirectory(prefix="lesionflow-") as scratch:
        held = Path(scratch) / "signature"
        held.write_bytes(data)  # What is checked is what is read below, whoever writes meanwhile.
        try:
            verifier = verifying.Config().set_hashing_config(_hashing())
            verifier = verifier.use_elliptic_key_verifier(public_key=public_key)
        except Exception as error:
            raise UsageError(
                f"--public-key {public_key}: can't be used ({type(error).__name__}): give the public half of an "
                f"elliptic-curve key in PEM; a pair is made by `{KEYS}`"
            ) from None
        try:
            verifier.verify(bundle.path, held)
            listed = _listed(data)
        except Exception as error:
            raise DataError(
                f"{bundle.path}: {signature.name} isn't this key's signature of these files ({type(error).__name__}): "
                "don't use this bundle, or give the key that signed it"
            ) from None
    manifest = file_hash(bundle.path / MANIFEST)
    if not bundle.hashes or listed != {**bundle.hashes, MANIFEST: manifest}:
        raise DataError(f"{bundle.path}: {signature.name} is of other files: don't use this bundle")


def _listed(data: bytes) -> dict[str, str]:
    """SHA-256 by name, as a signature that was verified lists them."""
    statement: dict[str, Any] = json.loads(base64.b64decode(json.loads(data)["dsseEnvelope"]["payload"]))
    return {str(r["name"]): str(r["digest"]) for r in statement["predicate"]["resources"]}


def _library() -> tuple[Any, Any, Any]:
    try:
        from model_signing import hashing, signing, verifying
    except ImportError as error:
        raise missing_extra(error.name or "model_signing", "sign") from None
    logging.getLogger("model_signing").setLevel(logging.ERROR)
    return hashing, signing, verifying


def _hashing() -> Any:
    """Every file counts, those included that the library would leave out (.git and the like)."""
    return _library()[0].Config().set_ignored_paths(paths=[], ignore_git_paths=False)


def _readable(key: Path, option: str) -> None:
    try:
        key.open("rb").close()
    except OSError as error:
        raise UsageError(f"{option} {key}: can't be read ({error.strerror}): check the path") from None
