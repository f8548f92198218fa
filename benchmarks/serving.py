"""The service against the original's contract, other servers and the bare runtime: python benchmarks/serving.py

One bundle, one machine, one run. Every side answers for the same crops with the same graph in ONNX Runtime:

    lesionflow   JPEG bytes in the protocol's binary form
    json         the original's contract: the protocol's FP32 tensor as JSON numbers, decoded and resized by the client
    litserve     JPEG bytes to LitServe with dynamic batching (with --litserve)
    bare         decode + resize + batches of 16 through the runtime in one process, on all cores: no server
    bare of one  the same with batches of one, which is what a single client's crops can be at best

Clients send one crop at a time and wait for its answer. Their work (sending bytes made beforehand) shares the cores
with the server, so throughput is what this machine gives; CPU seconds are the server's own processes'.

    python benchmarks/serving.py --bundle runs/baseline/bundle --images data/test-image.hdf5 --seconds 15

Without a bundle, untrained EfficientNet-Lite0 (--models of --size pixels); without images, synthetic crops.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

from lesionflow.bundle import Bundle
from lesionflow.data.images import to_batch, to_pixels
from lesionflow.data.source import open_source
from lesionflow.serving import local
from lesionflow.serving.graph import GRAPH_BATCH, Graph
from lesionflow.serving.predictor import Predictor

CLIENTS = (1, 8, 64)
VISIT = 241
"""Lesions of the median patient."""
TICKS = os.sysconf("SC_CLK_TCK")

JSON_SERVER = """
import sys, threading
import numpy as np, uvicorn
from pathlib import Path
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse
from starlette.routing import Route
from lesionflow.serving.graph import Graph
from lesionflow.bundle import Bundle
import json
graph, turn = Graph(Bundle.open(Path(sys.argv[1])), light=False), threading.Lock()
def answer(body):
    tensor = json.loads(body)["inputs"][0]
    unit = np.asarray(tensor["data"], np.float32).reshape(tensor["shape"])
    pixels = (unit * np.float32(255)).round().astype(np.uint8)
    with turn:
        _, logit = graph.logits(pixels)
    return {"outputs": [{"name": "logit", "datatype": "FP32", "shape": [len(logit)], "data": logit.tolist()}]}
async def infer(request):
    return JSONResponse(await run_in_threadpool(answer, await request.body()))
app = Starlette(routes=[Route("/infer", infer, methods=["POST"])])
uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[2]), log_level="error", access_log=False)
"""

LITSERVE = """
import sys
from pathlib import Path
import litserve as ls, numpy as np
from lesionflow.bundle import Bundle
from lesionflow.data.images import to_pixels
from lesionflow.serving.graph import Graph
class Api(ls.LitAPI):
    def setup(self, device):
        self.bundle = Bundle.open(Path(sys.argv[1]))
        self.graph = Graph(self.bundle, light=False)
    def decode_request(self, request):
        return to_pixels(request["content"].file.read(), self.bundle.spec)
    def batch(self, inputs):
        return np.stack(inputs)
    def predict(self, pixels):
        return self.graph.logits(pixels)[1].tolist()
    def unbatch(self, output):
        return output
    def encode_response(self, output):
        return {"logit": output}
if __name__ == "__main__":
    api = Api(max_batch_size=16, batch_timeout=0.002)
    ls.LitServer(api, accelerator="cpu", workers_per_device=1).run(
        host="127.0.0.1", port=int(sys.argv[2]), log_level="error", generate_client_file=False)
"""


@dataclass(frozen=True)
class Server:
    """A running side: where, which process, and how a crop (its number) is asked about."""

    url: str
    pid: int
    ask: Callable[[int], tuple[str, bytes, dict[str, str]]]
    """Path, body and headers."""


@dataclass(frozen=True)
class Measured:
    rate: float
    p50: float
    p99: float
    cpu: float
    """Seconds of the server per answer."""
    sent: float
    """Bytes per crop."""
    failed: int


def cpu_seconds(pid: int) -> float:
    """Of a process and its descendants, those that live and those it has waited for."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return 0.0
    return sum(map(int, fields[11:15])) / TICKS + sum(cpu_seconds(int(child)) for child in children)


def load(server: Server, clients: int, seconds: float, crops: int) -> Measured:
    """`clients` connections, each asking about one crop after another until the time is over."""
    parts, stop = urlsplit(server.url), threading.Event()
    found: list[tuple[list[float], int, int]] = []

    def work(number: int) -> None:
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
        waited, sent, failed, crop = list[float](), 0, 0, number
        while not stop.is_set():
            path, body, headers = server.ask(crop % crops)
            started = time.perf_counter()
            connection.request("POST", path, body, headers)
            response = connection.getresponse()
            response.read()
            if response.status == 200:
                waited.append(time.perf_counter() - started)
                sent += len(body)
            else:
                failed += 1
                time.sleep(0.05)
            crop += clients
        connection.close()
        found.append((waited, sent, failed))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(clients)]
    before, began = cpu_seconds(server.pid), time.perf_counter()
    for thread in threads:
        thread.start()
    time.sleep(seconds)
    stop.set()
    for thread in threads:
        thread.join()
    took, cpu = time.perf_counter() - began, cpu_seconds(server.pid) - before
    times = np.array([one for waited, _, _ in found for one in waited])
    p50, p99 = np.quantile(times, [0.5, 0.99]).tolist() if len(times) else (np.nan, np.nan)
    count = max(1, len(times))
    sent, failed = sum(sent for _, sent, _ in found), sum(failed for _, _, failed in found)
    return Measured(len(times) / took, p50, p99, cpu / count, sent / count, failed)


def bare(bundle: Bundle, crops: list[bytes], seconds: float, batch: int, *, light: bool = False) -> Measured:
    """Decode, resize and batches through the runtime, nothing else; all threads share a batch unless `light`."""
    graph, done, waited = Graph(bundle, light=light), 0, list[float]()
    began, cpu = time.perf_counter(), time.process_time()
    while time.perf_counter() - began < seconds:
        started = time.perf_counter()
        some = [crops[(done + n) % len(crops)] for n in range(batch)]
        graph.logits(to_batch(some, bundle.spec))
        waited.append(time.perf_counter() - started)
        done += batch
    p50, p99 = np.quantile(waited, [0.5, 0.99]).tolist()
    took, cpu = time.perf_counter() - began, time.process_time() - cpu
    return Measured(done / took, p50, p99, cpu / done, float(np.mean([len(crop) for crop in crops])), 0)


def binary(crops: list[bytes], name: str) -> Callable[[int], tuple[str, bytes, dict[str, str]]]:
    """Of one crop in the protocol's binary form."""
    made = []
    for crop in crops:
        data = struct.pack("<I", len(crop)) + crop
        parameters = {"binary_data_size": len(data)}
        tensor = {"name": "image", "datatype": "BYTES", "shape": [1], "parameters": parameters}
        head = json.dumps({"inputs": [tensor]}, separators=(",", ":")).encode()
        kind = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(head))}
        made.append((f"/v2/models/{name}/infer", head + data, kind))
    return made.__getitem__


def numbers(crops: list[bytes], bundle: Bundle) -> Callable[[int], tuple[str, bytes, dict[str, str]]]:
    """Of one crop as the original's clients sent it: floats, written as JSON."""
    made = []
    for crop in crops:
        # Whatever a float32 tensor's `tolist` gives: nineteen characters a value.
        pixels = to_pixels(crop, bundle.spec).astype(np.float32) / np.float32(255)
        data = pixels.ravel().tolist()
        tensor = {"name": "image", "datatype": "FP32", "shape": [1, *pixels.shape], "data": data}
        made.append(("/infer", json.dumps({"inputs": [tensor]}).encode(), {"Content-Type": "application/json"}))
    return made.__getitem__


def form(crops: list[bytes], field: str) -> tuple[bytes, dict[str, str]]:
    """A multipart body of files, and its header."""
    edge = "lesionflow-benchmark"
    parts = [
        f'--{edge}\r\nContent-Disposition: form-data; name="{field}"; filename="{n}.jpg"\r\n\r\n'.encode()
        + crop
        + b"\r\n"
        for n, crop in enumerate(crops)
    ]
    return b"".join(parts) + f"--{edge}--\r\n".encode(), {"Content-Type": f"multipart/form-data; boundary={edge}"}


@contextmanager
def started(code: str, bundle: Path, where: Path, packages: Path | None = None) -> Iterator[tuple[str, int]]:
    """A server of a few lines on a port of its own; its URL and process. `packages` are only for it."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = where / f"server_{port}.py"
    script.write_text(code)
    process = subprocess.Popen(
        [sys.executable, str(script), str(bundle), str(port)], start_new_session=True, cwd=where,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env=os.environ | ({"PYTHONPATH": str(packages.resolve())} if packages else {}),
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while True:
            assert process.poll() is None and time.monotonic() < deadline, f"{script.name} didn't start"
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                time.sleep(0.2)
        time.sleep(2)
        yield f"http://127.0.0.1:{port}", process.pid
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def ours(bundle: Path, where: Path) -> Iterator[tuple[str, int]]:
    url, pid = local.start(bundle, where / "service.log")
    try:
        yield url, pid
    finally:
        local.stop(bundle, pid)


def triage(url: str, pid: int, crops: list[bytes], count: int) -> tuple[float, float]:
    """Seconds, and seconds of the server's CPU per lesion, for a whole visit of `count` in one request."""
    body, kind = form([crops[n % len(crops)] for n in range(count)], "images")
    where = urlsplit(url)
    times, before = [], cpu_seconds(pid)
    for _ in range(3):
        connection = http.client.HTTPConnection(where.hostname or "", where.port, timeout=300)
        began = time.perf_counter()
        connection.request("POST", "/v1/triage", body, kind)
        response = connection.getresponse()
        answer = json.loads(response.read())
        assert response.status == 200 and len(answer["lesions"]) == count, answer
        times.append(time.perf_counter() - began)
        connection.close()
    return float(np.median(times)), (cpu_seconds(pid) - before) / 3 / count


def untrained(out: Path, count: int, size: int) -> Path:
    """Networks that have learned nothing take as long as those that have."""
    import torch

    from lesionflow.data.images import PreprocessSpec
    from lesionflow.export.onnx import export_bundle
    from lesionflow.models.image import Members, build
    from lesionflow.recipe import Recipe

    recipe = Recipe.load("baseline")
    torch.manual_seed(0)
    models = [Members([build(recipe.model, pretrained=False)]) for _ in range(count)]
    spec, crops = PreprocessSpec(size=size), synthetic(16)
    export_bundle(
        models, out, spec=spec, info={"name": "untrained", "thresholds": {}, "synthetic": True},
        parity_images=to_batch(crops, spec), tolerance=1e-3, reference=[("a.jpg", crops[0])],
    )  # fmt: skip
    return out


def synthetic(count: int) -> list[bytes]:
    from lesionflow.data.synthetic import synthesize

    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "data"
        synthesize(made, patients=8, lesions=max(64, count), seed=5, prevalence=0.1, progress=False)
        with open_source(made) as source:
            return [data for _, data in source.images(source.ids[:count])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="untrained networks if not named")
    parser.add_argument("--models", type=int, default=5, help="of an untrained bundle: one for each fold")
    parser.add_argument("--size", type=int, default=128, help="of its pictures, pixels")
    parser.add_argument("--images", type=Path, help="folder, HDF5 file or data set; synthetic if not named")
    parser.add_argument("--seconds", type=float, default=10, help="of load for each line")
    parser.add_argument("--clients", type=int, nargs="+", default=list(CLIENTS))
    parser.add_argument("--litserve", type=Path, help="folder made by `pip install --target FOLDER litserve`")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        path = options.bundle or untrained(where / "bundle", options.models, options.size)
        bundle = Bundle.open(path)
        if options.images:
            with open_source(options.images, "test") as source:
                crops = [data for _, data in source.images(source.ids[:VISIT])]
        else:
            crops = synthetic(VISIT)
        expected = Predictor(bundle).predict(crops[:1])[0]
        print(f"{bundle.models} models of {bundle.spec.size} pixels, {len(crops)} crops, {os.cpu_count()} CPUs; ")
        print(f"first logit {expected.logit:.4f}; {options.seconds:g} s of load per line\n")
        print(
            "| side | clients | crops/s | p50, ms | p99, ms | server CPU, ms a crop | to bare | to bare of one |"
            " bytes a crop | failed |"
        )
        print("|---|---|---|---|---|---|---|---|---|---|")
        floor, single = (bare(bundle, crops, options.seconds, batch) for batch in (GRAPH_BATCH, 1))
        kept: dict[tuple[str, int], Measured] = {}

        def row(side: str, clients: int | str, one: Measured) -> None:
            times = f"{one.rate:.1f} | {1000 * one.p50:.1f} | {1000 * one.p99:.1f}"
            costs = f"{1000 * one.cpu:.2f} | {one.cpu / floor.cpu:.2f} | {one.cpu / single.cpu:.2f}"
            print(f"| {side} | {clients} | {times} | {costs} | {one.sent:,.0f} | {one.failed} |", flush=True)

        row(f"bare, batches of {GRAPH_BATCH}", "", floor)
        row("bare, batches of one", "", single)
        sides: list[tuple[str, Callable, Callable]] = [
            ("lesionflow", lambda: ours(path, where), lambda: binary(crops, bundle.name)),
            ("json", lambda: started(JSON_SERVER, path, where), lambda: numbers(crops[:32], bundle)),
        ]
        if options.litserve:
            sides.append(
                (
                    "litserve",
                    lambda: started(LITSERVE, path, where, options.litserve),
                    lambda: [("/predict", *form([crop], "content")) for crop in crops].__getitem__,
                )
            )
        for side, start, make in sides:
            ask = make()
            with start() as (url, pid):
                server = Server(url, pid, ask)
                load(server, 2, 1.0, 32)
                for clients in options.clients:
                    kept[side, clients] = load(server, clients, options.seconds, 32)
                    row(side, clients, kept[side, clients])
                if side == "lesionflow":
                    seconds, cpu = triage(url, pid, crops, VISIT)
        row("bare again", "", bare(bundle, crops, options.seconds, GRAPH_BATCH))
        row("bare of one again", "", bare(bundle, crops, options.seconds, 1))
        # A thread to each batch, as the service has it where a graph is light.
        row("bare, a thread a batch", "", bare(bundle, crops, options.seconds, GRAPH_BATCH, light=True))
        spent = f"{1000 * cpu:.2f} ms of CPU per lesion ({cpu / floor.cpu:.2f} of bare)"
        print(
            f"\n{VISIT} lesions in one request to /v1/triage: {seconds:.2f} s, {VISIT / seconds:.1f} a second, {spent}."
        )
        for clients in options.clients:
            ratio = kept["lesionflow", clients].rate / kept["json", clients].rate
            print(f"{clients} clients: {ratio:.1f} times the throughput of FP32 JSON.")


if __name__ == "__main__":
    main()
