"""The service over a real socket: the predictor's answers in every form, and a clean end."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import signal
import socket
import struct
import time
from types import SimpleNamespace
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from PIL import Image

from lesionflow.data.images import PreprocessSpec, to_batch
from lesionflow.serving.predictor import Predictor
from lesionflow.serving.protocol import RequestError, ServiceLimits
from lesionflow.serving.service import Service

INFER = "/v2/models/tiny/infer"


@pytest.fixture(scope="module")
def expected(bundle_dir, encode):
    return Predictor(bundle_dir).predict([encode(n) for n in range(5)])


@pytest.fixture
def http(service):
    with httpx.Client(base_url=service.url, timeout=20) as client:
        yield client


def binary(head: dict, *tensors: bytes) -> tuple[bytes, dict]:
    text = json.dumps(head).encode()
    return text + b"".join(tensors), {"Inference-Header-Content-Length": str(len(text))}


def elements(images) -> bytes:
    return b"".join(struct.pack("<I", len(image)) + image for image in images)


def outputs(response) -> dict:
    """Decode a response by hand, JSON or binary."""
    assert response.status_code == 200, response.text
    length = response.headers.get("Inference-Header-Content-Length")
    head = json.loads(response.content[: int(length)] if length else response.content)
    at, found = int(length or 0), {}
    for tensor in head["outputs"]:
        if "data" in tensor:
            found[tensor["name"]] = np.reshape(tensor["data"], tensor["shape"])
            continue
        raw = response.content[at : at + tensor["parameters"]["binary_data_size"]]
        at += len(raw)
        if tensor["datatype"] == "BYTES":
            values = []
            while raw:
                (size,) = struct.unpack("<I", raw[:4])
                values.append(raw[4 : 4 + size].decode())
                raw = raw[4 + size :]
            found[tensor["name"]] = np.array(values)
        else:
            kind = {"FP32": "<f4", "FP64": "<f8"}[tensor["datatype"]]
            found[tensor["name"]] = np.frombuffer(raw, kind).reshape(tensor["shape"])
    assert not length or at == len(response.content)
    return found


def assert_same(found: dict, expected) -> None:
    np.testing.assert_allclose(found["logit"], [a.logit for a in expected], atol=1e-6)
    np.testing.assert_allclose(found["probability"], [a.probability for a in expected], atol=1e-6)
    np.testing.assert_allclose(found["fold_logits"], [a.fold_logits for a in expected], atol=1e-6)
    assert found["band"].tolist() == [a.band for a in expected]


def test_it_says_what_it_is(http):
    assert http.get("/v2").json()["extensions"] == ["binary_tensor_data"]
    assert http.get("/v2/health/live").json() == {"live": True}
    assert http.get("/v2/health/ready").json() == {"ready": True}
    assert http.get("/v2/models/tiny/ready").json() == {"name": "tiny", "ready": True}
    assert http.post("/v2/repository/index").json() == [{"name": "tiny", "version": "1", "state": "READY"}]
    metadata = http.get("/v2/models/tiny").json()
    assert metadata["inputs"] == [{"name": "image", "datatype": "BYTES", "shape": [-1]}]
    assert {o["name"]: o["shape"] for o in metadata["outputs"]}["fold_logits"] == [-1, 2]
    assert metadata["parameters"]["notice"] == "Not a medical device."
    assert http.get("/v2/models/tiny/versions/1").json() == metadata


@pytest.mark.parametrize("parameters", [{}, {"parameters": {"content_type": "base64"}}])
def test_json_with_base64_images(http, encode, expected, parameters):
    data = [base64.b64encode(encode(n)).decode() for n in range(5)]
    tensor = {"name": "image", "datatype": "BYTES", "shape": [5], "data": data, **parameters}
    response = http.post(INFER, json={"id": "visit-7", "inputs": [tensor]})
    assert response.json()["id"] == "visit-7"
    assert_same(outputs(response), expected)


@pytest.mark.parametrize("shape", [[5], [5, 1]])
def test_binary_images_and_binary_answers(http, encode, expected, shape):
    data = elements(encode(n) for n in range(5))
    tensor = {"name": "image", "datatype": "BYTES", "shape": shape, "parameters": {"binary_data_size": len(data)}}
    body, headers = binary({"inputs": [tensor], "parameters": {"binary_data_output": True}}, data)
    response = http.post("/v2/models/tiny/versions/1/infer", content=body, headers=headers)
    assert response.headers["content-type"] == "application/octet-stream"
    assert_same(outputs(response), expected)


def test_pixels_in_both_forms(http, encode, expected):
    pixels = to_batch([encode(n) for n in range(5)], PreprocessSpec(size=32))
    tensor = {"name": "image", "datatype": "UINT8", "shape": list(pixels.shape)}
    assert_same(outputs(http.post(INFER, json={"inputs": [{**tensor, "data": pixels.tolist()}]})), expected)
    assert_same(outputs(http.post(INFER, json={"inputs": [{**tensor, "data": pixels.ravel().tolist()}]})), expected)
    sized = {**tensor, "parameters": {"binary_data_size": pixels.nbytes}}
    body, headers = binary({"inputs": [sized]}, pixels.tobytes())
    assert_same(outputs(http.post(INFER, content=body, headers=headers)), expected)


def test_only_what_is_asked_for_in_the_form_asked_for(http, encode, expected):
    data = [base64.b64encode(encode(0)).decode()]
    tensor = {"name": "image", "datatype": "BYTES", "shape": [1], "data": data}
    wanted = [{"name": "logit", "parameters": {"binary_data": True}}, {"name": "band"}]
    response = http.post(INFER, json={"inputs": [tensor], "outputs": wanted})
    found = outputs(response)
    assert list(found) == ["logit", "band"]
    assert found["logit"].dtype == np.dtype("<f4")
    assert found["band"].tolist() == [expected[0].band]


def test_health_answers_while_the_model_works(http, service, encode):
    """Six requests of 64 images are in the queue; health must not wait behind them."""
    from concurrent.futures import ThreadPoolExecutor

    data = elements(encode(n % 5, width=600, height=600) for n in range(64))
    tensor = {"name": "image", "datatype": "BYTES", "shape": [64], "parameters": {"binary_data_size": len(data)}}
    body, headers = binary({"inputs": [tensor]}, data)
    with ThreadPoolExecutor(8) as pool:
        futures = [
            pool.submit(httpx.post, service.url + INFER, content=body, headers=headers, timeout=60) for _ in range(6)
        ]
        slowest = 0.0
        while not all(f.done() for f in futures):
            started = time.monotonic()
            assert http.get("/v2/health/live").status_code == 200
            slowest = max(slowest, time.monotonic() - started)
        total = [f.result().status_code for f in futures]
    assert total == [200] * 6
    assert slowest < 2.0


def test_it_prints_one_line_and_sigterm_ends_it_with_zero(start, bundle_dir):
    with start(bundle_dir) as running:
        httpx.get(running.url + "/v2/health/ready")
        code, out, err = running.stop(signal.SIGTERM)
    assert (code, err) == (0, "")
    assert out == f"{running.url} serves tiny; Ctrl-C ends it. Not a medical device.\n"


def test_control_c_ends_it_with_zero(start, bundle_dir):
    with start(bundle_dir) as running:
        assert running.stop(signal.SIGINT)[0] == 0


def test_a_request_that_has_begun_is_answered_before_the_end(start, bundle_dir, encode):
    data = elements([encode(0)])
    tensor = {"name": "image", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": len(data)}}
    body, headers = binary({"inputs": [tensor]}, data)
    with start(bundle_dir) as running:
        parts = urlsplit(running.url)
        with socket.create_connection((parts.hostname, parts.port), timeout=20) as connection:
            head = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
            head += "".join(f"{k}: {v}\r\n" for k, v in headers.items()) + "\r\n"
            connection.sendall(head.encode() + body[:-10])
            time.sleep(0.3)
            running.process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            assert running.process.poll() is None, "it waits for the request"
            connection.sendall(body[-10:])
            answer = b""
            while chunk := connection.recv(65536):
                answer += chunk
        running.process.communicate(timeout=20)
        assert running.process.returncode == 0
    assert answer.startswith(b"HTTP/1.1 200")
    assert b'"probability"' in answer


def test_a_busy_port_is_a_usage_error(service, bundle_dir):
    from lesionflow.errors import UsageError
    from lesionflow.serving.app import serve

    port = urlsplit(service.url).port
    with pytest.raises(UsageError, match=f"--port {port}: in use"):
        serve(bundle_dir, port=port)


def test_an_address_that_is_not_ours_is_a_usage_error(bundle_dir):
    from lesionflow.errors import UsageError
    from lesionflow.serving.app import serve

    with pytest.raises(UsageError, match="--host"):
        serve(bundle_dir, host="203.0.113.7", port=0)


def test_a_tampered_bundle_is_not_served(bundle_copy):
    from lesionflow.errors import DataError
    from lesionflow.serving.app import serve

    (bundle_copy / "MODEL_CARD.md").write_text("better than it is")
    with pytest.raises(DataError, match="MODEL_CARD"):
        serve(bundle_copy, port=0)


def test_a_hangup_drains_and_ends_with_0(start, bundle_dir):
    with start(bundle_dir) as running:
        assert running.stop(signal.SIGHUP)[0] == 0


def flat(side: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (200, 150, 120)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def idle(bundle_dir):
    made = Service(Predictor(bundle_dir), ServiceLimits(wait=0.2, requests=3))
    made.reason = None
    yield made
    made.close()


def test_large_pictures_that_wait_to_be_decoded_count_in_the_wait_and_go_one_by_one(idle, encode):
    large, small = flat(4500), encode(0)
    assert [rows.stop - rows.start for rows, _ in idle._pieces([small] * 70 + [large] * 2)] == [64, 6, 1, 1]

    async def busy() -> None:
        with idle.admitted() as place:
            await idle.usable([large], place)
            others = [asyncio.create_task(idle.usable([large] * 2, place)) for _ in range(12)]
            await asyncio.sleep(0.02)
            with pytest.raises(RequestError, match="of work are waiting") as refused, idle.admitted():
                pass
            assert refused.value.limit == "wait"
            await asyncio.gather(*others)
            assert place.bytes == 25 * idle.predictor.spec.size**2 * 3, "decoded pictures are held too"

    asyncio.run(busy())
    with idle.admitted():
        assert idle.admission._queued == 0


def test_a_burst_is_taken_and_what_goes_on_to_be_too_much_is_not_queued(bundle_dir, monkeypatch):
    service = Service(Predictor(bundle_dir), ServiceLimits(burst=20))
    service.reason, now = None, 0.0
    monkeypatch.setattr("lesionflow.serving.admission.time", SimpleNamespace(perf_counter=lambda: now))
    service.batcher.seconds, service.admission._alone = 0.01 * service.batcher.parallel, 0.02
    inside: list[contextlib.ExitStack] = []

    def ask(waits: float) -> bool:
        monkeypatch.setattr(service.batcher, "soon", lambda count: waits)
        stack = contextlib.ExitStack()
        try:
            stack.enter_context(service.admitted()).has(1)
        except RequestError as error:
            assert error.limit == "wait" and "more is asked" in str(error)
            return False
        inside.append(stack)
        return True

    def answer(count: int) -> None:
        for _ in range(count):
            inside.pop(0).close()

    assert all(ask(waits=0.5) for _ in range(20)), "a burst waits as long as it must"
    for _ in range(500):  # As many who each send the next once they are answered, and faster than was thought.
        now += 0.005
        answer(1)
        assert ask(waits=0.5)
    assert not ask(waits=0.5), "one too many, and the queue is as long"
    assert ask(waits=0.01), "who hardly waits is always taken"
    for _ in range(300):  # Twice as much as can be answered.
        now += 0.01
        answer(1)
        assert [ask(waits=0.5), ask(waits=0.01)] == [False, True]
    answer(len(inside))
    now += 0.1
    assert not ask(waits=0.5)
    now += 0.4
    assert ask(waits=0.5), "it is forgotten as soon as twice a burst could have been answered"
    answer(1)
    service.close()
    assert service.admission._waiting == pytest.approx(0)


def test_what_the_model_never_sees_keeps_nobody_out(bundle_dir, monkeypatch):
    service = Service(Predictor(bundle_dir), ServiceLimits(burst=20))
    service.reason, service.batcher.seconds, service.admission._alone = None, 0.01, 0.02
    monkeypatch.setattr("lesionflow.serving.admission.time", SimpleNamespace(perf_counter=lambda: 0.0))
    monkeypatch.setattr(service.batcher, "soon", lambda count: 0.5)
    for _ in range(500):
        with service.admitted():
            pass
    for _ in range(500):  # Not even if they are many at one time.
        with contextlib.ExitStack() as stack:
            for _ in range(30):
                stack.enter_context(service.admitted())
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(service.admitted()).has(1)
        with pytest.raises(RequestError, match="more is asked"):
            stack.enter_context(service.admitted())
    service.close()


def test_how_long_one_alone_takes_is_learned_from_those_who_were_alone(idle):
    with idle.admitted() as place:
        place.received()
        time.sleep(0.02)
        place.answered()
    learned = idle.admission._alone
    assert learned >= 0.02
    with idle.admitted() as first, idle.admitted() as second:
        first.received()
        second.received()
        first.answered()
        second.answered()
    assert idle.admission._alone == learned


def test_bodies_that_are_slow_to_come_take_nobodys_place(idle):
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(idle.admitted()) for _ in range(10)]
        for place in slow[:3]:
            place.received()
        for refused in (slow[3].received, lambda: stack.enter_context(idle.admitted())):
            with pytest.raises(RequestError, match="3 requests are waiting"):
                refused()
    assert idle.admission.pending == idle.admission.held == idle.admission.decoding == 0


def test_what_a_library_warns_of_is_a_line_that_quotes_nothing(start, bundle_dir):
    buffer = io.BytesIO()
    Image.new("CMYK", (40, 40)).save(buffer, "JPEG")
    # A date that claims to be longer than the file: Pillow warns when it looks for the resolution.
    tiff = (
        b"II*\0"
        + struct.pack("<IH", 8, 2)
        + struct.pack("<HHII", 0x0132, 2, 90_000, 26)
        + struct.pack("<HHII", 0x011A, 5, 1, 50)
    )
    exif = b"Exif\0\0" + tiff
    data = b"\xff\xd8\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + buffer.getvalue()[2:]
    with pytest.warns(UserWarning):
        to_batch([data], PreprocessSpec(size=32))
    with start(bundle_dir) as running:
        tensor = {"name": "image", "datatype": "BYTES", "shape": [1], "data": [base64.b64encode(data).decode()]}
        assert httpx.post(running.url + INFER, json={"inputs": [tensor]}).status_code == 200
        missing = httpx.get(running.url + "/v3")
        assert missing.json()["request_id"] == missing.headers["X-Request-ID"]
        lines = [json.loads(line) for line in running.stop()[2].splitlines()]
    assert any(line.get("error") == "UserWarning" for line in lines)
