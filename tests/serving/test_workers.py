"""Several processes on one port: replaced under load without a dropped request, after a crash, and ended together."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from lesionflow.data.images import Limits
from lesionflow.errors import UsageError
from lesionflow.serving.protocol import ServiceLimits
from lesionflow.serving.settings import Settings, named, with_limits

INFER = "/v2/models/tiny/infer"


@contextmanager
def supervised(bundle: Path, folder: Path, *options: str, env: dict[str, str] | None = None) -> Iterator[tuple]:
    """(process, URL, file with its log) of a service that is killed afterwards, workers too."""
    ready, log = folder / "ready.json", folder / "log"
    command = [sys.executable, "-m", "lesionflow", "serve", str(bundle), "--port", "0", "--ready-file", str(ready)]
    with log.open("wb") as file:
        process = subprocess.Popen([*command, *options], stdout=file, stderr=file, env={**os.environ, **(env or {})})
    try:
        wait_until(lambda: ready.exists() or process.poll() is not None, 90)
        assert process.poll() is None, log.read_text()
        yield process, json.loads(ready.read_text())["url"], log
    finally:
        process.kill()  # Its workers see that it is gone.
        process.wait()


def wait_until(condition, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def children(process: subprocess.Popen) -> set[int]:
    return {int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()}


def metric(url: str, name: str) -> float:
    lines = httpx.get(url + "/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


class Load(threading.Thread):
    """Requests one after another on one connection, renewed only when the server said that it closes it."""

    def __init__(self, url: str, body: bytes, headers: dict[str, str]) -> None:
        super().__init__(daemon=True)
        self.where, self.body, self.headers = urlsplit(url), body, headers
        self.answered, self.dropped, self.stop = 0, list[str](), False

    def run(self) -> None:
        connection = None
        while not self.stop:
            if connection is None:
                connection = http.client.HTTPConnection(self.where.hostname, self.where.port, timeout=60)
            try:
                connection.request("POST", INFER, self.body, self.headers)
                answer = connection.getresponse()
                answer.read()
                if answer.status == 200:
                    self.answered += 1
                else:
                    self.dropped.append(str(answer.status))
                if answer.will_close:
                    connection.close()
                    connection = None
            except (OSError, http.client.HTTPException) as error:
                self.dropped.append(type(error).__name__)
                connection = None


def request_of(image: bytes) -> tuple[bytes, dict[str, str]]:
    data = len(image).to_bytes(4, "little") + image
    tensor = {"name": "image", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": len(data)}}
    head = json.dumps({"inputs": [tensor]}).encode()
    return head + data, {"Inference-Header-Content-Length": str(len(head))}


def restart_under_load(bundle: Path, folder: Path, image: bytes, times: int) -> tuple[int, list[str]]:
    """(answered, dropped) over so many restarts of both workers."""
    with supervised(bundle, folder, "--workers", "2") as (process, url, log):
        loads = [Load(url, *request_of(image)) for _ in range(4)]
        for load in loads:
            load.start()
        for _ in range(times):
            before = children(process)
            process.send_signal(signal.SIGHUP)
            wait_until(lambda old=before: not children(process) & old and len(children(process)) == 2, 120)
        for load in loads:
            load.stop = True
        for load in loads:
            load.join(60)
        answered = sum(load.answered for load in loads)
        assert metric(url, "lesionflow_lesions_total{band=") == answered, "what an ended worker counted stays counted"
        process.terminate()
        assert process.wait(60) == 0, log.read_text()
        return answered, [why for load in loads for why in load.dropped]


@pytest.mark.parametrize("times", [10, pytest.param(200, marks=pytest.mark.slow)])
def test_rolling_restarts_drop_nothing(bundle_dir, encode, tmp_path, times: int) -> None:
    answered, dropped = restart_under_load(bundle_dir, tmp_path, encode(0), times)
    print(f"{times} restarts of 2 workers, {answered} requests answered, {len(dropped)} dropped")
    assert dropped == []
    assert answered > 20 * times


def test_a_crashed_worker_is_replaced_and_all_end_together(bundle_dir, tmp_path) -> None:
    token = tmp_path / "token"
    token.write_text("s3cret-token\n")
    options = ("--workers", "2", "--token-file", str(token), "--limit", "images=3")
    with supervised(bundle_dir, tmp_path, *options) as (process, url, log):
        first = children(process)
        assert len(first) == 2
        for pid in (process.pid, *first):
            assert b"s3cret" not in Path(f"/proc/{pid}/cmdline").read_bytes()
            assert b"s3cret" not in Path(f"/proc/{pid}/environ").read_bytes()
        victim = first.pop()
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: len(children(process)) == 2 and victim not in children(process))
        headers = {"Authorization": "Bearer s3cret-token"}
        wait_until(lambda: "lesionflow_ready 2.0" in httpx.get(url + "/metrics", headers=headers).text)
        assert httpx.get(url + "/v2/models/tiny", headers=headers).json()["parameters"]["max_images"] == 3
        assert httpx.get(url + "/v2/models/tiny").status_code == 401
        last = children(process)
        process.terminate()
        assert process.wait(30) == 0
        assert not [pid for pid in last if Path(f"/proc/{pid}").exists()]
        assert "ended with exit code -9" in log.read_text()
        assert "s3cret" not in log.read_text()


def test_workers_end_when_their_supervisor_is_killed(bundle_dir, tmp_path) -> None:
    with supervised(bundle_dir, tmp_path, "--workers", "1") as (process, _, _):
        (worker,) = children(process)
        process.kill()
        process.wait()
        wait_until(lambda: not Path(f"/proc/{worker}").exists() or "Z" in stat(worker), 20)


def stat(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2]
    except OSError:
        return "Z"


def test_workers_that_cannot_start_say_why(tmp_path) -> None:
    (tmp_path / "bundle").mkdir()
    command = [sys.executable, "-m", "lesionflow", "serve", str(tmp_path / "bundle"), "--port", "0", "--workers", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    alone = subprocess.run(command[:-2], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (alone.returncode, alone.stderr.splitlines()[-1])
    assert done.returncode == 3


def test_settings_reach_a_worker_whole_and_show_no_token() -> None:
    limits = with_limits(["visit=2000", "image.pixels=1_000_000", "head-time=1.5"])
    assert (limits.visit, limits.image.pixels, limits.head_time) == (2000, 1_000_000, 1.5)
    settings = Settings(Path("/b"), limits, 2, "skin", "s3cret")
    assert Settings.from_json(settings.to_json()) == settings
    assert "s3cret" not in repr(settings)
    assert {name for name, _ in named(ServiceLimits())} >= {"body", "image.scans"}
    assert limits.image == Limits(pixels=1_000_000)


@pytest.mark.parametrize("setting", ["nothing=1", "visit=0", "visit=1.5", "wait=nan", "visit", "image.pixels=-3"])
def test_a_limit_that_is_none_is_named(setting: str) -> None:
    with pytest.raises(UsageError, match=setting.split("=")[0]):
        with_limits([setting])


def test_the_keys_that_a_bundle_must_bear_reach_a_worker():
    settings = Settings(Path("b"), public_key=Path("maker.pub"), signature=Path("kept/b.sig"))
    assert Settings.from_json(settings.to_json()) == settings
    assert Settings.from_json(Settings(Path("b")).to_json()).public_key is None
