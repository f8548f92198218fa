"""A service of the tiny bundle in a process of its own, on a free port, ended by SIGTERM."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

CODE = """
import sys
from pathlib import Path
from lesionflow.errors import LesionflowError
from lesionflow.serving.app import serve
try:
    serve(Path(sys.argv[1]), port=int(sys.argv[2]), threads=1, ready_file=Path(sys.argv[3]))
except LesionflowError as error:
    sys.exit(f"{error.exit_code}: {error}")
"""


class Running:
    """A started service: its URL, its process, and what it has printed once it has ended."""

    def __init__(self, process: subprocess.Popen[bytes], url: str) -> None:
        self.process, self.url = process, url

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, str, str]:
        """(exit code, stdout, stderr)."""
        os.kill(self.process.pid, number)
        out, err = self.process.communicate(timeout=20)
        return self.process.returncode, out.decode(), err.decode()


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """`with start(bundle) as running:` for a service that is ended afterwards, whatever happened."""

    @contextmanager
    def run(bundle: Path, port: int = 0) -> Iterator[Running]:
        ready = tmp_path_factory.mktemp("ready") / "ready.json"
        process = subprocess.Popen(
            [sys.executable, "-c", CODE, str(bundle), str(port), str(ready)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        try:
            deadline = time.monotonic() + 60
            while not ready.exists():
                assert process.poll() is None, process.stderr.read().decode()
                assert time.monotonic() < deadline, "the service wasn't ready within a minute"
                time.sleep(0.02)
            yield Running(process, json.loads(ready.read_text())["url"])
        finally:
            process.kill()
            process.communicate()

    return run


@pytest.fixture(scope="session")
def service(start, bundle_dir) -> Iterator[Running]:
    with start(bundle_dir) as running:
        yield running
