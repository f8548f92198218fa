"""A signature says who made a bundle: any other key, file, name or signature is refused."""

import base64
import json
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from lesionflow.bundle import Bundle, write_manifest
from lesionflow.errors import DataError, UsageError
from lesionflow.signing import PASSWORD, beside, check_signature, sign

PEM = serialization.Encoding.PEM


def write_keys(folder: Path, name: str, password: bytes | None = None, curve=ec.SECP256R1) -> tuple[Path, Path]:
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    key = ec.generate_private_key(curve())
    how = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    private.write_bytes(key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, how))
    public.write_bytes(key.public_key().public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture
def keys(tmp_path) -> tuple[Path, Path]:
    return write_keys(tmp_path, "maker")


@pytest.fixture
def signed(bundle_copy, keys) -> Path:
    sign(bundle_copy, keys[0])
    return bundle_copy


@pytest.mark.parametrize("curve", [ec.SECP256R1, ec.SECP384R1, ec.SECP521R1])
def test_what_was_signed_is_accepted_with_the_public_key(bundle_copy, tmp_path, curve):
    private, public = write_keys(tmp_path, "maker", curve=curve)
    assert sign(bundle_copy, private) == beside(bundle_copy)
    check_signature(Bundle.open(bundle_copy), public)
    assert Bundle.open(bundle_copy), "the signature lies beside the bundle, which stays whole"


def test_a_password_comes_from_the_environment_and_is_never_said(bundle_copy, tmp_path, monkeypatch):
    private, public = write_keys(tmp_path, "maker", b"open sesame")
    monkeypatch.setenv(PASSWORD, "a wrong one")
    with pytest.raises(UsageError, match=PASSWORD) as refused:
        sign(bundle_copy, private)
    assert "a wrong one" not in str(refused.value)
    assert not beside(bundle_copy).exists()
    monkeypatch.setenv(PASSWORD, "open sesame")
    sign(bundle_copy, private)
    check_signature(Bundle.open(bundle_copy), public)


def test_another_key_is_refused(signed, tmp_path):
    _, other = write_keys(tmp_path, "other")
    with pytest.raises(DataError, match="isn't this key's signature"):
        check_signature(Bundle.open(signed), other)


@pytest.mark.parametrize("name", ["MODEL_CARD.md", "bundle.json", "reference/answers.json"])
def test_a_file_changed_together_with_the_manifest_is_refused(signed, keys, name):
    path = signed / name
    path.write_text(path.read_text() + "\n")
    write_manifest(signed)
    opened = Bundle.open(signed)
    with pytest.raises(DataError, match="isn't this key's signature of these files"):
        check_signature(opened, keys[1])


def test_added_removed_and_renamed_files_are_refused_though_the_manifest_says_so(signed, keys):
    card = signed / "MODEL_CARD.md"
    for change in (
        lambda: (signed / "more.txt").write_text("x"),
        lambda: (signed / "more.txt").unlink() or card.rename(signed / "OTHER.md"),
        lambda: (signed / "OTHER.md").unlink(),
    ):
        change()
        write_manifest(signed)
        with pytest.raises(DataError, match="isn't this key's signature of these files"):
            check_signature(Bundle.open(signed), keys[1])


def test_what_changes_between_opening_and_checking_is_noticed(signed, keys):
    other = signed / "MODEL_CARD.md"
    before = other.read_bytes()
    other.write_bytes(before + b"\n")
    write_manifest(signed)
    opened = Bundle.open(signed)  # The hashes that the service would hold files to are those of the changed bundle ...
    other.write_bytes(before)
    write_manifest(signed)  # ... and the one on disk is the signed one again.
    with pytest.raises(DataError, match="of other files"):
        check_signature(opened, keys[1])


def test_a_bundle_that_was_not_verified_is_no_signed_one(signed, keys):
    with pytest.raises(DataError, match="of other files"):
        check_signature(Bundle.open(signed, verify=False), keys[1])


def test_no_signature_and_damaged_ones_are_refused(signed, keys):
    path = beside(signed)
    whole = path.read_bytes()
    statement = json.loads(whole)
    forged = json.loads(base64.b64decode(statement["dsseEnvelope"]["payload"]))
    forged["predicate"]["resources"][0]["digest"] = "0" * 64
    payload = base64.b64encode(json.dumps(forged).encode()).decode()
    swapped = {**statement, "dsseEnvelope": {**statement["dsseEnvelope"], "payload": payload}}
    unsigned = {**statement, "dsseEnvelope": {**statement["dsseEnvelope"], "signatures": []}}
    for data in (b"", b"{}", whole[:-40], b"\xff" * 100, json.dumps(swapped).encode(), json.dumps(unsigned).encode()):
        path.write_bytes(data)
        with pytest.raises(DataError, match="isn't this key's signature"):
            check_signature(Bundle.open(signed), keys[1])
    path.write_bytes(b" " * 2_000_000)
    with pytest.raises(DataError, match="larger than any"):
        check_signature(Bundle.open(signed), keys[1])
    path.unlink()
    with pytest.raises(DataError, match="no signature"):
        check_signature(Bundle.open(signed), keys[1])


def test_a_bundle_that_is_not_whole_is_never_signed(bundle_copy, keys):
    (bundle_copy / "MODEL_CARD.md").write_text("other")
    with pytest.raises(DataError, match="changed"):
        sign(bundle_copy, keys[0])


def test_keys_that_are_none_are_refused_by_name(signed, tmp_path):
    rsa_key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    (tmp_path / "rsa.pem").write_bytes(
        rsa_key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    (tmp_path / "text.pem").write_text("no key")
    for name in ("rsa.pem", "text.pem"):
        with pytest.raises(UsageError, match=f"--private-key .*{name}.*openssl ecparam"):
            sign(signed, tmp_path / name)
        with pytest.raises(UsageError, match=f"--public-key .*{name}"):
            check_signature(Bundle.open(signed), tmp_path / name)
    with pytest.raises(UsageError, match=r"--public-key .*gone\.pub: can't be read"):
        check_signature(Bundle.open(signed), tmp_path / "gone.pub")


def lesionflow(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lesionflow", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_command_line_signs_verifies_and_serves_only_what_was_signed(bundle_copy, keys, tmp_path):
    bundle, (private, public) = bundle_copy, keys
    elsewhere = tmp_path / "kept" / "first.sig"
    elsewhere.parent.mkdir()
    made = lesionflow("sign", bundle, "--private-key", private, "--signature", elsewhere)
    assert (made.returncode, made.stdout.strip()) == (0, str(elsewhere)), made.stderr
    said = lesionflow("verify", bundle, "--public-key", public, "--signature", elsewhere)
    assert said.returncode == 0 and "signed" in said.stdout, said.stderr
    for command in ("verify", "serve"):
        unsigned = lesionflow(command, bundle, "--public-key", public)
        assert unsigned.returncode == 3 and "no signature" in unsigned.stderr, unsigned.stderr
    pointless = lesionflow("verify", bundle, "--signature", elsewhere)
    assert pointless.returncode == 2 and "--public-key" in pointless.stderr
    workers = lesionflow("serve", bundle, "--public-key", public, "--workers", 2, "--port", 0)
    assert workers.returncode == 3 and "no signature" in workers.stderr, workers.stderr
