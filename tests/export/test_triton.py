"""The Triton repository: its files here, and (slow) a real Triton server that loads and answers them."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from lesionflow.bundle import Bundle, write_manifest
from lesionflow.data.images import to_batch
from lesionflow.errors import DataError, UsageError
from lesionflow.export.triton import write_repository
from lesionflow.serving.predictor import Predictor
from lesionflow.serving.remote import PredictorError, Remote

LESIONS = 1000
PACKAGES = ("nvidia-pytriton==0.7.0", "numpy<2", "onnxruntime>=1.20", "tritonclient[http,grpc]>=2.51")


def listed(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_the_repository_holds_the_bundles_graph_and_its_shapes(bundle_dir, tmp_path):
    out = write_repository(bundle_dir, tmp_path / "triton")
    assert out == tmp_path / "triton"
    assert listed(out) == ["tiny/1/model.onnx", "tiny/config.pbtxt"]
    assert (out / "tiny/1/model.onnx").read_bytes() == (bundle_dir / "image.onnx").read_bytes()
    text = re.sub(r"\s+", " ", (out / "tiny/config.pbtxt").read_text())
    for part in (
        'name: "tiny" backend: "onnxruntime" max_batch_size: 64',
        'name: "image" data_type: TYPE_UINT8 dims: [ 32, 32, 3 ]',
        'name: "fold_logits" data_type: TYPE_FP32 dims: [ 2 ] }',
        'name: "logit" data_type: TYPE_FP32 dims: [ 1 ] reshape { shape: [ ] } }',
        "preferred_batch_size: [ 16, 32, 64 ]",
        "kind: KIND_CPU",
        f'key: "bundle" value {{ string_value: "{Bundle.open(bundle_dir).version}" }}',
    ):
        assert part in text
    assert "platform" not in text
    assert text.count("{") == text.count("}")


def test_smaller_batches_and_gpus(bundle_dir, tmp_path):
    text = (write_repository(bundle_dir, tmp_path / "r", max_batch=20, gpu=True) / "tiny/config.pbtxt").read_text()
    assert "max_batch_size: 20" in text
    assert "preferred_batch_size: [ 16, 20 ]" in text
    assert "KIND_GPU" in text
    with pytest.raises(UsageError, match="max_batch"):
        write_repository(bundle_dir, tmp_path / "r", max_batch=0)


def test_maps_are_offered_where_the_graph_gives_them(mapped_bundle, tmp_path):
    text = (write_repository(mapped_bundle, tmp_path / "r") / "mapped/config.pbtxt").read_text()
    assert 'reshape { shape: [ ] } },\n  { name: "cam" data_type: TYPE_FP32 dims: [ 8, 8 ] }\n]' in text
    assert text.count("{") == text.count("}")


def test_a_bundle_that_does_not_verify_leaves_what_was_there(bundle_copy, tmp_path):
    out = write_repository(bundle_copy, tmp_path / "r")
    before = (out / "tiny/config.pbtxt").read_text()
    (bundle_copy / "MODEL_CARD.md").write_text("better than it is")
    with pytest.raises(DataError, match="MODEL_CARD"):
        write_repository(bundle_copy, out)
    assert (out / "tiny/config.pbtxt").read_text() == before
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_another_bundle_replaces_the_model_and_only_it(bundle_copy, tmp_path):
    out = write_repository(bundle_copy, tmp_path / "r")
    first = (out / "tiny/config.pbtxt").read_text()
    (out / "other").mkdir()
    (bundle_copy / "MODEL_CARD.md").write_text("another card")
    write_manifest(bundle_copy)
    write_repository(bundle_copy, out)
    assert (out / "tiny/config.pbtxt").read_text() != first
    assert sorted(p.name for p in out.iterdir()) == ["other", "tiny"]


def test_a_folder_that_is_no_model_is_kept(bundle_dir, tmp_path):
    (tmp_path / "r/tiny").mkdir(parents=True)
    (tmp_path / "r/tiny/precious.txt").write_text("mine")
    with pytest.raises(UsageError, match="not a Triton model"):
        write_repository(bundle_dir, tmp_path / "r")
    assert (tmp_path / "r/tiny/precious.txt").read_text() == "mine"


def test_other_tensors_than_the_contracts_are_refused(bundle_copy, tmp_path):
    info = json.loads((bundle_copy / "bundle.json").read_text())
    info["graph"]["outputs"][1]["shape"] = [-1, 1]
    (bundle_copy / "bundle.json").write_text(json.dumps(info))
    write_manifest(bundle_copy)
    with pytest.raises(DataError, match="logit"):
        write_repository(bundle_copy, tmp_path / "r")


def test_writing_loads_no_torch(bundle_dir, tmp_path):
    code = f"""
import sys
from pathlib import Path
from lesionflow.export.triton import write_repository
write_repository(Path({str(bundle_dir)!r}), Path({str(tmp_path / "r")!r}))
print([m for m in ("torch", "onnx", "onnxruntime", "lightning") if m in sys.modules])
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


# --- A real server ---------------------------------------------------------------------------------------------------

# Runs in Triton's own environment: the client library and ours want different numpys.
CLIENT = """
import json, sys
import numpy as np
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

http_url, grpc_url, config, pixels, out = sys.argv[1:]
parsed = text_format.Parse(open(config).read(), model_config_pb2.ModelConfig())
pixels = np.load(pixels)
answers = {}
for kind, url, library in (("http", http_url, triton_http), ("grpc", grpc_url, triton_grpc)):
    client = library.InferenceServerClient(url)
    assert client.is_model_ready("tiny")

    def ask(part):
        tensor = library.InferInput("image", list(part.shape), "UINT8")
        tensor.set_data_from_numpy(part)
        answer = client.infer("tiny", [tensor])
        return answer.as_numpy("fold_logits"), answer.as_numpy("logit")

    at, size, rows = 0, 1, []
    while at < len(pixels):  # Every batch size from 1 to 64, and round again.
        rows.append(ask(pixels[at : at + size]))
        at, size = at + size, size % 64 + 1
    for name, column in zip(("fold_logits", "logit"), zip(*rows)):
        answers[f"{kind}_{name}"] = np.concatenate(column)
    for size in range(1, 65):
        logit = ask(pixels[:size])[1]
        assert logit.shape == (size, 1), logit.shape
        answers[f"{kind}_{size}"] = logit
    try:
        ask(pixels[:65])
    except library.InferenceServerException as error:
        answers[f"{kind}_65"] = np.array(str(error))
np.savez(out, config=json.dumps({
    "name": parsed.name, "backend": parsed.backend, "platform": parsed.platform, "batch": parsed.max_batch_size,
    "inputs": [[t.name, t.data_type, list(t.dims)] for t in parsed.input],
    "outputs": [[t.name, t.data_type, list(t.dims), list(t.reshape.shape), t.HasField("reshape")]
                for t in parsed.output],
    "types": [model_config_pb2.TYPE_UINT8, model_config_pb2.TYPE_FP32],
}), **answers)
"""


@pytest.fixture(scope="session")
def triton_environment(environment_with) -> Path:
    return environment_with("pytriton", *PACKAGES)


@contextmanager
def triton(environment: Path, repository: Path, scratch: Path) -> Iterator[tuple[str, str]]:
    """Run a Triton server on a repository; gives its HTTP and gRPC addresses."""
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    packages = environment / f"lib/python{version}/site-packages"
    server = packages / "pytriton/tritonserver"
    # The wheel has no ONNX backend. A folder with a model.py and no library is one in Python, under the folder's
    # name: it answers for `backend: "onnxruntime"`. The Python backend itself needs its stub for this very Python.
    backends = scratch / "backends"
    shutil.copytree(server / "backends/python", backends / "python")
    shutil.copy(server / "python_backend_stubs" / version / "triton_python_backend_stub", backends / "python")
    (backends / "python/triton_python_backend_stub").chmod(0o755)
    (backends / "onnxruntime").mkdir()
    shutil.copy(Path(__file__).with_name("triton_backend.py"), backends / "onnxruntime/model.py")
    (server / "bin/tritonserver").chmod(0o755)
    http, grpc = free_port(), free_port()
    variables = {
        **os.environ,
        # The stub was moved away from the libraries it was linked to; and it starts the first `python3` on the path.
        "LD_LIBRARY_PATH": str(packages / "nvidia_pytriton.libs"),
        "PATH": f"{environment / 'bin'}:{os.environ['PATH']}",
    }
    arguments = [
        f"--model-repository={repository}",
        f"--backend-directory={backends}",
        "--http-address=127.0.0.1",
        f"--http-port={http}",
        "--grpc-address=127.0.0.1",
        f"--grpc-port={grpc}",
        "--allow-metrics=false",
        "--disable-auto-complete-config",  # Our config.pbtxt must do without Triton's help.
    ]
    log = scratch / "triton.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [server / "bin/tritonserver", *arguments], env=variables, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        deadline = time.monotonic() + 120
        while True:
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{http}/v2/health/ready", timeout=5) as answer:
                    if answer.status == 200:
                        break
            except OSError:
                time.sleep(0.1)
        yield f"127.0.0.1:{http}", f"127.0.0.1:{grpc}"
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def statistics(address: str) -> dict:
    with urllib.request.urlopen(f"http://{address}/v2/models/tiny/stats", timeout=5) as answer:
        return json.load(answer)["model_stats"][0]


@pytest.fixture
def undecided(bundle_dir, export_tiny, tiny_models, tmp_path, encode) -> Path:
    """The tiny bundle with logits far apart and around 0, so that a small difference could change a class."""
    import torch

    predictor = Predictor(bundle_dir)
    middle = float(np.median(predictor.logits(to_batch([encode(n) for n in range(100)], predictor.spec))[1]))
    models = copy.deepcopy(tiny_models)
    with torch.no_grad():
        for model in models:
            model[7].weight.mul_(20)
            model[7].bias.sub_(middle).mul_(20)
    export_tiny(tmp_path / "undecided", models=models)
    return tmp_path / "undecided"


@pytest.mark.slow
def test_a_real_triton_answers_as_the_bundle_does(undecided, triton_environment, tmp_path, encode):
    """Triton 2.51 loads the repository and answers 1,000 lesions over HTTP and gRPC as the bundle's predictor does.

    This proves what Triton reads and what clients meet: the layout, config.pbtxt (parsed strictly, without
    auto-completion), names, types and shapes, the reshape of `logit`, batches of 1 to 64 and their limit, dynamic
    batching, tritonclient, and lesionflow before it as transformer. It proves nothing about Triton's own
    C++ backend for ONNX, which isn't in the package: here the same graph runs in a Python backend of that name.
    """
    repository = write_repository(undecided, tmp_path / "repository")
    bundle, alone = Bundle.open(undecided), Predictor(undecided)
    images = [encode(seed, width=60 + seed % 80, height=60 + seed % 70) for seed in range(LESIONS)]
    pixels = to_batch(images, bundle.spec)
    fold_logits, logit = alone.logits(pixels)
    assert 100 < (logit > 0).sum() < LESIONS - 100, "lesions of both classes are needed"
    np.save(tmp_path / "pixels.npy", pixels)
    with triton(triton_environment, repository, tmp_path) as (http, grpc):
        client = tmp_path / "client.py"
        client.write_text(CLIENT)
        files = [repository / "tiny/config.pbtxt", tmp_path / "pixels.npy", tmp_path / "answers.npz"]
        subprocess.run([triton_environment / "bin/python", client, http, grpc, *files], check=True)
        found = np.load(tmp_path / "answers.npz")
        check_config(json.loads(str(found["config"])), bundle)
        worst = {}
        for kind in ("http", "grpc"):
            worst[kind] = max(
                float(np.abs(found[f"{kind}_logit"].ravel() - logit).max()),
                float(np.abs(found[f"{kind}_fold_logits"] - fold_logits).max()),
                *(float(np.abs(found[f"{kind}_{n}"].ravel() - logit[:n]).max()) for n in range(1, 65)),
            )
            assert worst[kind] <= 1e-5
            assert ((found[f"{kind}_logit"].ravel() > 0) == (logit > 0)).all()
            assert "64" in str(found[f"{kind}_65"])

        # Single lesions from many threads: Triton puts them together.
        before = statistics(http)
        remote = Remote(bundle, http)
        with ThreadPoolExecutor(16) as pool:
            singles = list(pool.map(lambda n: remote.logits(pixels[n : n + 1])[1][0], range(256)))
        remote.close()
        np.testing.assert_allclose(singles, logit[:256], atol=1e-5, rtol=0)
        after = statistics(http)
        lesions, calls = (after[k] - before[k] for k in ("inference_count", "execution_count"))
        assert lesions == 256
        assert calls < 256

        worst["transformer"] = transformer_difference(undecided, http, images, alone, tmp_path)
        assert worst["transformer"] <= 1e-5
    print(f"{LESIONS} lesions, largest difference {worst}; {lesions} single requests in {calls} calls of the graph")
    with pytest.raises(PredictorError, match=f"{http}.*is it running"):
        Remote(bundle, http).logits(pixels[:1])


def check_config(config: dict, bundle: Bundle) -> None:
    """What Triton's own message type reads in config.pbtxt is what bundle.json says."""
    uint8, fp32 = config["types"]
    size = bundle.spec.size
    assert (config["name"], config["backend"], config["platform"], config["batch"]) == ("tiny", "onnxruntime", "", 64)
    assert config["inputs"] == [["image", uint8, [size, size, 3]]]
    assert config["outputs"] == [["fold_logits", fp32, [2], [], False], ["logit", fp32, [1], [], True]]


def transformer_difference(bundle: Path, http: str, images: list[bytes], alone: Predictor, scratch: Path) -> float:
    """Start `lesionflow serve` before Triton with the arguments KServe gives, and compare its answers."""
    from lesionflow.client import ask

    crops = scratch / "crops"
    crops.mkdir()
    for number, image in enumerate(images):
        (crops / f"{number:04}.jpg").write_bytes(image)
    ready, port = scratch / "ready.json", free_port()
    kserve = ["--model_name", "skin", "--predictor_host", http, "--http_port", str(port)]
    command = [sys.executable, "-m", "lesionflow", "serve", str(bundle), "--ready-file", str(ready), *kserve]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 60
            while True:
                assert process.poll() is None
                assert time.monotonic() < deadline
                try:
                    with urllib.request.urlopen(f"{url}/v2/health/ready", timeout=5):
                        break
                except OSError:
                    time.sleep(0.1)
            answers = ask(url, [crops], model="skin")
        finally:
            process.terminate()
    expected = alone.predict(images)
    assert [a["band"] for a in answers] == [e.band for e in expected]
    pairs = list(zip(answers, expected, strict=True))
    assert max(abs(a["probability"] - e.probability) for a, e in pairs) <= 1e-5
    return max(abs(a["logit"] - e.logit) for a, e in pairs)
