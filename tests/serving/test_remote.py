"""The service as a transformer: pixels go to a predictor over real sockets, and the answers stay the same.

The predictor is a second lesionflow service, which takes pixels as Triton does; where it has to misbehave,
a small HTTP server does. tests/export/test_triton.py does the same before a real Triton.
"""

from __future__ import annotations

import http.server
import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest

from lesionflow.bundle import Bundle, write_manifest
from lesionflow.client import ask
from lesionflow.data.images import PreprocessSpec, to_batch
from lesionflow.errors import DataError, UsageError
from lesionflow.serving import endpoints, remote
from lesionflow.serving.app import create_app, serve
from lesionflow.serving.predictor import Predictor
from lesionflow.serving.remote import PredictorError, Remote


@pytest.fixture(scope="module")
def pixels(encode):
    return to_batch([encode(n) for n in range(70)], PreprocessSpec(size=32))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def until(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.05)


@contextmanager
def transformer(bundle: Path, *arguments: str):
    """`lesionflow serve` in a process of its own; gives its URL as soon as it takes requests."""
    port = free_port()
    command = [sys.executable, "-m", "lesionflow", "serve", str(bundle), "--http_port", str(port), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"

    def live() -> bool:
        assert process.poll() is None, process.stdout.read().decode()
        try:
            return httpx.get(f"{url}/v2/health/live").status_code == 200
        except httpx.TransportError:
            return False

    try:
        until(live)
        yield url, process
    finally:
        process.kill()
        process.communicate()


@contextmanager
def fake(answer):
    """An HTTP server whose POSTs are answered by `answer(handler, body)`; gives its address and the connections."""
    connections = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self):
            super().setup()
            connections.append(self.client_address)

        def do_POST(self):
            answer(self, self.rfile.read(int(self.headers["Content-Length"])))

        def reply(self, status, body, **headers):
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(key.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_port}", connections
    finally:
        server.shutdown()
        server.server_close()


def well(handler, body):
    """Answer like Triton for a model of two folds: the first pixel of each lesion, as [B, 2] and [B, 1]."""
    length = int(handler.headers["Inference-Header-Content-Length"])
    shape = json.loads(body[:length])["inputs"][0]["shape"]
    first = np.frombuffer(body[length:], np.uint8).reshape(shape)[:, 0, 0, 0].astype("<f4")
    folds = np.stack([first, first + 1], axis=1)
    tensors = [("fold_logits", [len(first), 2], folds), ("logit", [len(first), 1], first)]
    outputs = [
        {"name": n, "datatype": "FP32", "shape": s, "parameters": {"binary_data_size": t.nbytes}} for n, s, t in tensors
    ]
    head = json.dumps({"outputs": outputs}).encode()
    data = head + b"".join(t.tobytes() for _, _, t in tensors)
    handler.reply(200, data, Inference_Header_Content_Length=str(len(head)))


def test_before_a_predictor_the_answers_are_those_of_the_bundle_alone(service, bundle_dir, encode, tmp_path):
    images = [encode(n) for n in range(80)]
    for number, image in enumerate(images):
        (tmp_path / f"{number:02}.jpg").write_bytes(image)
    expected = Predictor(bundle_dir).predict(images)
    address = service.url.removeprefix("http://")
    # As KServe writes it; the names with dashes are the same options.
    others = ["--workers", "4", "--predictor_use_ssl", "false", "--predictor_request_timeout_seconds", "600"]
    with transformer(bundle_dir, "--model_name", "skin", "--predictor_host", address, *others) as (url, process):
        until(lambda: httpx.get(f"{url}/v2/health/ready").status_code == 200)
        for name in ("skin", "tiny"):
            answers = ask(url, [tmp_path], model=name)
            assert [a["band"] for a in answers] == [e.band for e in expected]
            np.testing.assert_allclose([a["logit"] for a in answers], [e.logit for e in expected], atol=1e-5, rtol=0)
            assert max(abs(a["probability"] - e.probability) for a, e in zip(answers, expected, strict=True)) < 1e-5
            assert httpx.get(f"{url}/v2/models/{name}").json()["name"] == name
        assert httpx.post(f"{url}/v2/repository/index").json()[0]["name"] == "skin"
        assert len(ask(url, [tmp_path])) == 80, "one model, so no name is needed"
        assert httpx.get(f"{url}/v2/models/other").status_code == 404
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0, "it ends although it would look at the predictor again"


def test_it_waits_for_the_predictor_and_names_it(start, bundle_dir, encode, tmp_path):
    port = free_port()
    (tmp_path / "a.jpg").write_bytes(encode(0))
    with transformer(bundle_dir, "--predictor-host", f"127.0.0.1:{port}") as (url, _):
        until(lambda: "is it running" in httpx.get(f"{url}/v2/health/ready").json()["error"])
        assert httpx.get(f"{url}/v2/models/tiny/ready").status_code == 503
        assert httpx.post(f"{url}/v2/models/tiny/infer", json={}).status_code == 503
        with start(bundle_dir, port):
            until(lambda: httpx.get(f"{url}/v2/health/ready").status_code == 200)
            assert len(ask(url, [tmp_path])) == 1
        tensor = {"name": "image", "datatype": "UINT8", "shape": [1, 32, 32, 3], "data": [0] * 32 * 32 * 3}
        response = httpx.post(f"{url}/v2/models/tiny/infer", json={"inputs": [tensor]})
        assert response.status_code == 503
        assert f"127.0.0.1:{port} can't be reached" in response.json()["error"]
        assert response.headers["retry-after"] == "1"


def test_another_model_behind_it_makes_it_unready(start, service, bundle_dir, export_tiny, tiny_models, tmp_path):
    """Whoever replaces the predictor's model replaces the meaning of its logits: that is noticed, and said."""
    from starlette.testclient import TestClient

    export_tiny(tmp_path / "other", models=tiny_models[::-1], info={"name": "tiny", "thresholds": {}})
    bundle = Bundle.open(bundle_dir)
    with start(tmp_path / "other") as other, pytest.MonkeyPatch.context() as patch:
        patch.setattr(endpoints, "RETRY_SECONDS", 0.05)
        patch.setattr(endpoints, "RECHECK_SECONDS", 0.05)
        graph = Remote(bundle, service.url)
        with TestClient(create_app(Predictor(bundle, graph=graph))) as client:
            until(lambda: client.get("/v2/health/ready").status_code == 200)
            until(lambda: readiness(client, graph, other.url) == 503)
            assert "off the stored answer" in client.get("/v2/health/ready").json()["error"]
            until(lambda: readiness(client, graph, service.url) == 200)


def readiness(client, graph, url: str) -> int:
    """The status of readiness once `url` is where the predictor is; no connection is left to where it was."""
    graph._ports, graph._idle = (int(url.rpartition(":")[2]),), type(graph._idle)()
    return client.get("/v2/health/ready").status_code


def test_large_batches_are_cut_and_one_connection_serves_them(bundle_dir, pixels):
    sizes = []

    def answer(handler, body):
        sizes.append(json.loads(body[: int(handler.headers["Inference-Header-Content-Length"])])["inputs"][0]["shape"])
        well(handler, body)

    with fake(answer) as (address, connections):
        graph = Remote(Bundle.open(bundle_dir), address)
        for _ in range(3):
            fold_logits, logit = graph.logits(pixels)
            assert logit.tolist() == pixels[:, 0, 0, 0].tolist()
            assert fold_logits[:, 1].tolist() == (logit + 1).tolist()
        assert [shape[0] for shape in sizes] == [64, 6] * 3
        assert len(connections) == 1
        assert [len(part) for part in graph.logits(pixels[:0])] == [0, 0]
        graph.close()


def test_a_connection_closed_while_idle_is_replaced(bundle_dir, pixels):
    """A predictor (or a proxy before it) may close what it kept open: the next request must not fail."""

    def answer(handler, body):
        well(handler, body)
        handler.close_connection = True  # Without saying so.

    with fake(answer) as (address, connections):
        graph = Remote(Bundle.open(bundle_dir), address)
        for _ in range(3):
            assert len(graph.logits(pixels[:2])[1]) == 2
            time.sleep(0.05)
        assert len(connections) == 3


@pytest.mark.parametrize(
    ("answer", "status", "message"),
    [
        (lambda h, b: h.reply(500, b'{"error": "out of memory"}'), 502, "answered 500: out of memory"),
        (lambda h, b: h.reply(404, b"no such model"), 502, "answered 404: no such model"),
        (lambda h, b: h.reply(503, b'{"error": "loading"}'), 503, "answered 503: loading"),
        (lambda h, b: h.reply(200, b"<html>"), 502, "isn't this model's output"),
        (lambda h, b: h.reply(200, b'{"outputs": []}'), 502, "isn't this model's output"),
        (
            lambda h, b: h.reply(200, b'{"outputs": [{"name": "fold_logits", "datatype": "FP64", "data": [1]}]}'),
            502,
            "FP64",
        ),
        (lambda h, b: time.sleep(1), 504, "no answer within 0.2 s"),
        (lambda h, b: h.wfile.write(b"what?\r\n\r\n"), 503, "can't be reached"),
    ],
)
def test_a_predictor_that_fails_is_named(bundle_dir, pixels, answer, status, message):
    with fake(answer) as (address, _), pytest.raises(PredictorError, match=message) as caught:
        Remote(Bundle.open(bundle_dir), address, timeout=0.2).logits(pixels[:1])
    assert caught.value.http_status == status
    assert address in str(caught.value)
    assert caught.value.exit_code == 5


def test_too_few_logits_are_refused(bundle_dir, pixels):
    def answer(handler, body):
        outputs = [
            {"name": "fold_logits", "datatype": "FP32", "shape": [1, 2], "data": [0, 1]},
            {"name": "logit", "datatype": "FP32", "shape": [1], "data": [0]},
        ]
        handler.reply(200, json.dumps({"outputs": outputs}).encode())

    with fake(answer) as (address, _):
        graph = Remote(Bundle.open(bundle_dir), address)
        assert graph.logits(pixels[:1])[0].tolist() == [[0, 1]]
        with pytest.raises(PredictorError, match="this very bundle"):
            graph.logits(pixels[:2])


def test_without_a_port_the_service_then_the_pod_is_tried(bundle_dir, pixels, monkeypatch):
    """A headless service maps no port: the pod's own has to be found."""
    with fake(well) as (address, _):
        monkeypatch.setattr(remote, "PORTS", (free_port(), int(address.rpartition(":")[2])))
        assert len(Remote(Bundle.open(bundle_dir), "127.0.0.1").logits(pixels[:3])[1]) == 3


@pytest.mark.parametrize("address", ["", "http://", "host:port", "ftp://host", "http://host?x=1"])
def test_what_is_no_address_is_a_usage_error(bundle_dir, address):
    with pytest.raises(UsageError, match="--predictor-host"):
        Remote(Bundle.open(bundle_dir), address)


def test_another_protocol_is_a_usage_error(bundle_dir):
    command = [sys.executable, "-m", "lesionflow", "serve", str(bundle_dir), "--predictor_protocol", "grpc-v2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--predictor_protocol" in done.stderr


@pytest.mark.parametrize("form", ["files", "folder"])
def test_a_bundle_behind_links_is_served_from_its_real_folder(bundle_copy, tmp_path, form):
    """KServe's storage initialiser links what a volume holds into /mnt/models; the bundle itself holds no link."""
    mounted = tmp_path / "models"
    if form == "files":
        mounted.mkdir()
        for entry in bundle_copy.iterdir():
            (mounted / entry.name).symlink_to(entry)
    else:
        mounted.symlink_to(bundle_copy)
    with transformer(mounted) as (url, _):
        assert httpx.get(f"{url}/v2/health/ready").status_code == 200
    shutil.move(bundle_copy / "MODEL_CARD.md", tmp_path / "card.md")
    (bundle_copy / "MODEL_CARD.md").symlink_to(tmp_path / "card.md")
    with pytest.raises(DataError, match="MODEL_CARD"):
        serve(mounted, port=0)


def test_a_changed_file_behind_links_is_refused(bundle_copy, tmp_path):
    (tmp_path / "models").symlink_to(bundle_copy)
    (bundle_copy / "MODEL_CARD.md").write_text("changed")
    with pytest.raises(DataError, match="changed"):
        serve(tmp_path / "models", port=0)
    write_manifest(bundle_copy)
    Bundle.open(bundle_copy)
