"""Forms in memory: the parts as they were sent, or an error; never a file on disk."""

from __future__ import annotations

import tempfile

import httpx
import numpy as np
import pytest

from lesionflow.serving.multipart import plain_name, read_parts
from lesionflow.serving.protocol import RequestError


def sent(**arguments) -> tuple[bytes, str]:
    """What a real client makes of it."""
    request = httpx.Request("POST", "http://x/", **arguments)
    return request.read(), request.headers["Content-Type"]


def test_parts_come_out_as_they_went_in(monkeypatch):
    monkeypatch.setattr(tempfile, "_get_candidate_names", lambda: pytest.fail("a temporary file"))
    rng = np.random.default_rng(0)
    data = [b"", b"\r\n--", b"--x\r\n", rng.bytes(3_000_000), rng.bytes(100)]
    files = [("images", (f"lesion {n}.jpg", content)) for n, content in enumerate(data)]
    parts = read_parts(*sent(files=files, data={"options": '{"a": 1}'}), most=10)
    assert [(p.name, p.file, p.data) for p in parts if p.file] == [
        ("images", f"lesion {n}.jpg", content) for n, content in enumerate(data)
    ]
    assert [(p.name, p.data) for p in parts if p.file is None] == [("options", b'{"a": 1}')]


def test_too_many_parts_name_the_limit():
    files = [("images", (f"{n}.jpg", b"x")) for n in range(6)]
    with pytest.raises(RequestError, match="more than 5 parts") as caught:
        read_parts(*sent(files=files), most=5)
    assert caught.value.limit == "visit"


@pytest.mark.parametrize("cut", [3, 20, 60, 200])
def test_a_form_that_was_cut_off_is_refused(cut):
    body, kind = sent(files=[("images", ("a.jpg", b"x" * 200))])
    with pytest.raises(RequestError):
        read_parts(body[:-cut], kind, most=5)


@pytest.mark.parametrize("kind", ["multipart/form-data", "multipart/mixed; boundary=a", "text/plain", ""])
def test_another_content_type_is_415(kind):
    with pytest.raises(RequestError) as caught:
        read_parts(b"--a--\r\n", kind, most=5)
    assert caught.value.http_status == 415


def test_no_folder_and_no_control_character_is_left_in_a_name():
    assert plain_name("../../etc/passwd") == "passwd"
    assert plain_name("C:\\photos\\a\x00b\u202e.jpg") == "ab.jpg"
    assert len(plain_name("x" * 5000)) == 200
