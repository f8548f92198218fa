"""Other people's clients get the answers that the documentation says: its own commands are run, word by word."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lesionflow import client
from lesionflow.data.images import Limits
from lesionflow.data.source import open_source
from lesionflow.errors import UsageError
from lesionflow.serving.predictor import Predictor
from lesionflow.serving.protocol import ServiceLimits

DOCS = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
CONSOLE = [line[2:] for b in re.findall(r"```console\n(.*?)```", DOCS, re.DOTALL) for line in b.splitlines()]
PYTHON = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)


@pytest.fixture(scope="module")
def url(start, finished: Path):
    with start(finished / "bundle") as running:
        yield running.url


@pytest.fixture(scope="module")
def mapped(start, mapped_bundle: Path):
    """A service whose graph gives heat maps."""
    with start(mapped_bundle) as running:
        yield running.url


@pytest.fixture(scope="module")
def folder(synthetic: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`crops/` with one patient's lesions and one `a.jpg`, and their `visit.csv`."""
    folder = tmp_path_factory.mktemp("visit")
    (folder / "crops").mkdir()
    (folder / "token").write_text("t0ken\n")
    with (synthetic / "train-metadata.csv").open() as file:
        rows = list(csv.DictReader(file))
    rows = [row for row in rows if row["patient_id"] == rows[0]["patient_id"]]
    rows[0]["isic_id"], first = "a", rows[0]["isic_id"]
    with open_source(synthetic) as source:
        for row in rows:
            name = row["isic_id"]
            (folder / "crops" / f"{name}.jpg").write_bytes(source.read(first if name == "a" else name))
    with (folder / "visit.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, [name for name in rows[0] if name != "target"], extrasaction="ignore")
        table.writeheader()
        table.writerows(rows)
    return folder


@pytest.fixture(scope="module")
def expected(finished: Path, folder: Path) -> dict[str, float]:
    """Each lesion's probability by its picture alone."""
    files = sorted((folder / "crops").glob("*.jpg"))
    answers = Predictor(finished / "bundle").predict([path.read_bytes() for path in files])
    return {path.stem: answer.probability for path, answer in zip(files, answers, strict=True)}


@pytest.mark.parametrize("command", [line for line in CONSOLE if "curl" in line])
def test_curl(url, mapped, folder, expected, command):
    if shutil.which("curl") is None:
        pytest.skip("no curl on this machine")
    done = subprocess.run(
        ["bash", "-c", command.replace("http://127.0.0.1:8080", mapped if "heatmaps" in command else url)],
        cwd=folder, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    if "/v1/model" in command:
        assert answer["served"] == "image_visit" and answer["limits"]["visit"] == 10_000
        return
    if "heatmaps" in command:
        assert [one["heatmap"][:22] for one in answer["lesions"]] == ["data:image/png;base64,"]
        return
    if "/v1/triage" not in command:
        if "/infer" in command:
            found = {output["name"]: output["data"] for output in answer["outputs"]}
            assert found["probability"] == pytest.approx([expected["a"]], abs=1e-6)
        return
    found = {lesion["id"]: lesion for lesion in answer["lesions"]}
    assert set(found) == (set(expected) if "crops/*" in command else {"a"})
    assert {name: one["scores"]["image"] for name, one in found.items()} == pytest.approx(
        {name: expected[name] for name in found}, abs=1e-2
    )
    if "metadata=" in command:
        assert answer["context"]["lesions"] == len(expected) > 3
        assert found["a"]["mode"] == "image_visit"


@pytest.mark.parametrize("code", PYTHON, ids=lambda code: "tritonclient" if "triton" in code else "client")
def test_python(url, folder, expected, code):
    if "tritonclient" in code:
        pytest.importorskip("tritonclient.http", reason="tritonclient isn't installed")
    code = code.replace("http://127.0.0.1:8080", url).replace("127.0.0.1:8080", url.removeprefix("http://"))
    more = "import json; print(json.dumps(answer.as_numpy('probability').tolist()))" if "tritonclient" in code else ""
    done = subprocess.run([sys.executable, "-c", f"{code}\n{more}"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    if more:
        assert json.loads(lines[-1]) == pytest.approx([expected[name] for name in sorted(expected)][:32], abs=1e-6)
    else:
        assert [line.split()[0] for line in lines] == ["1", "2", "3", "4", "5"]


@pytest.mark.parametrize("command", [line for line in CONSOLE if line.startswith("lesionflow ask")])
def test_ask(url, folder, command):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", command.replace("http://127.0.0.1:8080", url)],
        cwd=folder, env={**os.environ, "PATH": path, "COLUMNS": "160"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Not a medical device." in done.stdout
    assert len([line for line in done.stdout.splitlines() if "│" in line]) >= 5


def test_one_patient_out_of_a_larger_file(url, folder, synthetic):
    """`--patient` gives what the patient's own files give."""
    with (folder / "visit.csv").open() as file:
        patient = next(csv.DictReader(file))["patient_id"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    pictures, table = str(synthetic / "train-image.hdf5"), str(synthetic / "train-metadata.csv")
    command = ["lesionflow", "ask", url, pictures, "--metadata", table, "--patient", patient, "--json"]
    done = subprocess.run(command, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with client.Client(url) as service:
        visit = service.triage(client.pictures([folder / "crops"]), folder / "visit.csv")
    ours, theirs = json.loads(done.stdout)["lesions"], visit["lesions"]
    assert [one["probability"] for one in ours] == pytest.approx([one["probability"] for one in theirs], abs=1e-6)


@pytest.mark.parametrize("command", [line for line in CONSOLE if "lesionflow serve" in line])
def test_serve(command, bundle_dir, folder, tmp_path):
    """As the documentation starts it, on a free port; where there is a token, it is asked for."""
    command = re.sub(r" --port \d+|#.*", "", command).replace("runs/first/bundle", str(bundle_dir))
    ready, path = tmp_path / "ready.json", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    words = f"{command} --port 0 --ready-file {ready}".replace("lesionflow serve", "exec lesionflow serve")
    process = subprocess.Popen(
        ["bash", "-c", words], cwd=folder, env={**os.environ, "PATH": path},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while not ready.exists():
            assert process.poll() is None and time.monotonic() < deadline, process.stderr.read().decode()
            time.sleep(0.05)
        with client.Client(json.loads(ready.read_text())["url"]) as service:
            if "token" in command:
                with pytest.raises(UsageError, match="asks for a token"):
                    service.about()
            elif "--limit" in command:
                assert (service.about()["limits"]["visit"], service.about()["limits"]["visit_body"]) == (2000, 2**26)
            assert service.health()["ready"]
    finally:
        process.terminate()
        assert process.wait(30) == 0


def test_the_table_of_limits_is_the_limits():
    section = DOCS.split("## Limits")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `([a-z_.]+)` \| ([\d,]+) ?([A-Za-z]*) \|.*\|$", section, re.MULTILINE)
    unit = {"": 1, "s": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
    written = {name: int(number.replace(",", "")) * unit[of] for name, number, of in rows}
    service = {name: value for name, value in vars(ServiceLimits()).items() if not isinstance(value, Limits)}
    assert written == service | {f"image.{name}": value for name, value in vars(ServiceLimits().image).items()}


def test_the_client_stays_inside_the_limits():
    limits = ServiceLimits()
    assert limits.images >= client.BATCH_IMAGES and client.BATCH_BYTES + limits.image.bytes < limits.body
    assert limits.time < client.TIMEOUT


@pytest.mark.parametrize("limit", ["images", "visit", "heatmaps", "image.pixels", "image.bytes"])
def test_a_limit_s_status_is_the_documented_one(finished, encode, limit):
    from starlette.testclient import TestClient

    from lesionflow.serving.app import create_app

    one = {limit.removeprefix("image."): 100} if limit.startswith("image.") else {}
    few = ServiceLimits(images=1, visit=1, heatmaps=1, image=Limits(**one))
    status = int(re.search(rf"\| `{re.escape(limit)}` \|.*\| (\d{{3}}) \|", DOCS).group(1))  # type: ignore[union-attr]
    files = [("images", (f"{n}.jpg", io.BytesIO(encode(n)))) for n in range(2 if limit == "visit" else 1)]
    with TestClient(create_app(finished / "bundle", limits=few)) as service:
        while service.get("/v2/health/ready").status_code != 200:
            pass
        if limit == "images":
            tensor = {"name": "image", "datatype": "BYTES", "shape": [2], "data": ["", ""]}
            found = service.post("/v2/models/quick/infer", json={"inputs": [tensor]})
        else:
            options = {"options": json.dumps({"heatmaps": ["0", "1"] if limit == "heatmaps" else False})}
            found = service.post("/v1/triage", files=files, data=options)
    said = found.json()
    assert (found.status_code, said.get("limit") or said["errors"][0]["limit"]) == (status, limit)
