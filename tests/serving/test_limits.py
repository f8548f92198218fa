"""Bad input is answered with its own error, never with a 500, and nothing is logged of it."""

from __future__ import annotations

import base64
import json
import logging
import struct
import time

import pytest
from starlette.testclient import TestClient

from lesionflow.bundle import write_manifest
from lesionflow.data.images import Limits
from lesionflow.serving.access import flush
from lesionflow.serving.app import create_app
from lesionflow.serving.protocol import ServiceLimits

INFER = "/v2/models/tiny/infer"
LIMITS = ServiceLimits(body=200_000, images=4, image=Limits(bytes=50_000, pixels=40_000, side=300))


@pytest.fixture(scope="module")
def client(bundle_dir):
    with TestClient(create_app(bundle_dir, limits=LIMITS)) as client:
        wait_until(lambda: client.get("/v2/health/ready").status_code == 200)
        yield client


def wait_until(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def ask(client, images, shape=None):
    data = [base64.b64encode(image).decode() for image in images]
    tensor = {"name": "image", "datatype": "BYTES", "shape": shape or [len(images)], "data": data}
    return client.post(INFER, json={"inputs": [tensor]})


def test_a_body_over_the_limit_is_413_by_its_announced_length(client):
    response = client.post(INFER, content=b"x" * 200_001)
    assert (response.status_code, response.json()["limit"]) == (413, "body")


def test_a_body_over_the_limit_is_413_while_it_streams(client):
    response = client.post(INFER, content=(b"x" * 50_000 for _ in range(5)))
    assert "content-length" not in response.request.headers
    assert (response.status_code, response.json()["limit"]) == (413, "body")


def test_too_many_images_name_the_limit(client, encode):
    response = ask(client, [encode(0)] * 5)
    assert (response.status_code, response.json()["limit"]) == (400, "images")
    assert ask(client, [encode(0)] * 4).status_code == 200


@pytest.mark.parametrize(
    ("width", "height", "limit"), [(301, 20, "image.side"), (250, 250, "image.pixels"), (5, 80, "image.min_side")]
)
def test_an_image_over_a_limit_is_422_and_named(client, encode, width, height, limit):
    response = ask(client, [encode(0), encode(1, width=width, height=height), encode(2)])
    assert response.status_code == 422
    assert response.json()["image"] == 1
    assert response.json()["limit"] == limit
    assert response.json()["error"].startswith("image 2 of 3: ")


@pytest.mark.parametrize(
    "data", [b"", b"GIF89a", b"\xff\xd8", b"\xff\xd8\xff\xe0junk", b"\x89PNG\r\n\x1a\n" + b"\0" * 40]
)
def test_what_is_no_image_is_422(client, encode, data):
    response = ask(client, [encode(0), data])
    assert (response.status_code, response.json()["image"]) == (422, 1)


def test_a_truncated_image_is_422(client, encode):
    assert ask(client, [encode(0)[:400]]).status_code == 422


GOOD = {"name": "image", "datatype": "BYTES", "shape": [1], "data": ["aGk="]}
PIXELS = {"name": "image", "datatype": "UINT8", "shape": [1, 32, 32, 3]}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"inputs": NaN}',
        b"9" * 10_000,
        {},
        {"inputs": []},
        {"inputs": [GOOD, GOOD]},
        {"inputs": ["image"]},
        {"inputs": [{**GOOD, "name": "picture"}]},
        {"inputs": [{**GOOD, "name": 7}]},
        {"inputs": [{**GOOD, "datatype": "FP32"}]},
        {"inputs": [{**GOOD, "datatype": ["BYTES"]}]},
        {"inputs": [{**GOOD, "shape": []}]},
        {"inputs": [{**GOOD, "shape": [0]}]},
        {"inputs": [{**GOOD, "shape": [-1]}]},
        {"inputs": [{**GOOD, "shape": [1.0]}]},
        {"inputs": [{**GOOD, "shape": [True]}]},
        {"inputs": [{**GOOD, "shape": [2]}]},
        {"inputs": [{**GOOD, "shape": [1, 2]}]},
        {"inputs": [{**GOOD, "data": "aGk="}]},
        {"inputs": [{**GOOD, "data": [7]}]},
        {"inputs": [{**GOOD, "data": ["!"]}]},
        {"inputs": [{**GOOD, "data": ["ü"]}]},
        {"inputs": [{**GOOD, "parameters": {"content_type": "str"}}]},
        {"inputs": [{**GOOD, "parameters": 3}]},
        {"inputs": [{**GOOD, "parameters": {"binary_data_size": 4}}]},
        {"inputs": [{**PIXELS, "data": []}]},
        {"inputs": [{**PIXELS, "data": [256] * 3072}]},
        {"inputs": [{**PIXELS, "data": [-1] * 3072}]},
        {"inputs": [{**PIXELS, "data": [0.5] * 3072}]},
        {"inputs": [{**PIXELS, "data": [10**30] * 3072}]},
        {"inputs": [{**PIXELS, "data": [[1], [2, 3]]}]},
        {"inputs": [{**PIXELS, "data": [True] * 3072}]},
        {"inputs": [{**PIXELS, "data": None}]},
        {"inputs": [{**PIXELS, "data": [0] * 3071}]},
        {"inputs": [{**PIXELS, "shape": [1, 3, 32, 32], "data": [0] * 3072}]},
        {"inputs": [GOOD], "id": 7},
        {"inputs": [GOOD], "outputs": [{"name": "diagnosis"}]},
        {"inputs": [GOOD], "outputs": [{"name": ["logit"]}]},
        {"inputs": [GOOD], "outputs": [{"name": "logit"}, {"name": "logit"}]},
        {"inputs": [GOOD], "outputs": {"name": "logit"}},
    ],
    ids=repr,
)
def test_a_malformed_request_is_400_and_says_why(client, body):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = client.post(INFER, content=content)
    assert response.status_code == 400, response.text
    assert len(response.json()["error"]) > 10


def framed(client, tail: bytes, size: int | None = None, length: object = None, count: int = 1):
    tensor = {"name": "image", "datatype": "BYTES", "shape": [count]}
    tensor["parameters"] = {"binary_data_size": len(tail) if size is None else size}
    head = json.dumps({"inputs": [tensor]}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head) if length is None else length)}
    return client.post(INFER, content=head + tail, headers=headers)


@pytest.mark.parametrize(
    "how",
    [
        {"tail": b""},
        {"tail": b"\1\0"},
        {"tail": struct.pack("<I", 9) + b"short"},
        {"tail": struct.pack("<I", 0xFFFFFFFF)},
        {"tail": struct.pack("<I", 1) + b"xy"},
        {"tail": struct.pack("<I", 1) + b"x", "count": 2},
        {"tail": struct.pack("<I", 1) + b"x", "size": 4},
        {"tail": struct.pack("<I", 1) + b"x", "size": 6},
        {"tail": struct.pack("<I", 1) + b"x", "size": -5},
        {"tail": struct.pack("<I", 1) + b"x", "length": -1},
        {"tail": struct.pack("<I", 1) + b"x", "length": 10**9},
        {"tail": struct.pack("<I", 1) + b"x", "length": "ten"},
        {"tail": struct.pack("<I", 1) + b"x", "length": "9" * 5000},
        {"tail": struct.pack("<I", 1) + b"x", "length": 5},
    ],
    ids=repr,
)
def test_a_binary_request_that_does_not_add_up_is_400(client, how):
    response = framed(client, **how)
    assert response.status_code == 400, response.text


def test_unknown_models_paths_and_methods(client, encode):
    assert client.post("/v2/models/other/infer", content=b"{}").status_code == 404
    assert client.get("/v2/models/tiny/versions/2").status_code == 404
    assert client.get("/v1/models").status_code == 404
    assert client.get(INFER).status_code == 405
    for response in (client.get("/v2/models/other"), client.get("/v3"), client.get(INFER)):
        assert "error" in response.json()


def test_a_compressed_body_is_refused(client):
    assert client.post(INFER, content=b"x", headers={"Content-Encoding": "gzip"}).status_code == 415


def test_an_error_inside_is_500_and_its_text_is_not_logged(bundle_dir, encode, caplog, capfd, monkeypatch):
    app = create_app(bundle_dir)

    def fail(pixels):
        raise RuntimeError("patient ISIC_0000001")

    with TestClient(app) as client, caplog.at_level(logging.DEBUG):
        wait_until(lambda: client.get("/v2/health/ready").status_code == 200)
        monkeypatch.setattr(app.state.service.predictor.graph, "logits", fail)
        response = ask(client, [encode(0)])
    assert response.status_code == 500
    flush()
    logged = capfd.readouterr().err
    assert "ISIC_0000001" not in response.text + caplog.text + logged
    assert '"error":"RuntimeError"' in logged and response.json()["request_id"] in logged


def test_beyond_the_queue_it_says_busy_and_when_to_try_again(bundle_dir, encode):
    with TestClient(create_app(bundle_dir, limits=ServiceLimits(requests=0))) as client:
        wait_until(lambda: client.get("/v2/health/ready").status_code == 200)
        response = ask(client, [encode(0)])
    assert (response.status_code, response.json()["limit"]) == (503, "requests")
    assert response.headers["Retry-After"] == "1"


def test_a_bundle_whose_answers_are_not_reproduced_is_live_but_never_ready(bundle_copy, encode):
    path = bundle_copy / "reference/answers.json"
    stored = json.loads(path.read_text())
    stored["answers"][0]["logit"] += 0.01
    path.write_text(json.dumps(stored))
    write_manifest(bundle_copy)
    app = create_app(bundle_copy)
    with TestClient(app) as client:
        wait_until(lambda: "stored answer" in app.state.service.reason)
        assert client.get("/v2/health/live").status_code == 200
        for path in ("/v2/health/ready", "/v2/models/tiny/ready"):
            assert client.get(path).status_code == 503
            assert "a.png" in client.get(path).json()["error"]
        assert ask(client, [encode(0)]).status_code == 503


def test_a_hundred_megapixels_are_refused_at_once(client, encode):
    data = bytearray(encode(0, "PNG"))
    data[16:24] = struct.pack(">II", 10_000, 10_000)
    ask(client, [encode(0)])
    started = time.perf_counter()
    response = ask(client, [bytes(data)])
    seconds = time.perf_counter() - started
    assert (response.status_code, response.json()["limit"]) == (422, "image.side")
    assert seconds < 0.02


def test_reading_a_visit_counts_in_its_time(bundle_dir, monkeypatch, encode):
    from lesionflow.serving import triage

    monkeypatch.setattr(triage, "of_form", lambda *of: time.sleep(2))
    with TestClient(create_app(bundle_dir, limits=ServiceLimits(time=0.2))) as client:
        deadline = time.monotonic() + 30
        while client.get("/v2/health/ready").status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        response = client.post("/v1/triage", files={"images": ("a.jpg", encode(1))})
    assert (response.status_code, response.json()["limit"]) == (503, "time")
