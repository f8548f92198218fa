"""A service in the background of this machine: start it, wait until it is ready, end it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lesionflow.errors import ClusterError

_STOP_SECONDS = 40.0
"""A drain may take 30 s; after this the process is killed."""


def start(bundle: Path, log: Path, *, port: int = 0, timeout: float = 60.0) -> tuple[str, int]:
    """Start `lesionflow serve` on a bundle and return its URL and process id once it is ready.

    Raises `ClusterError` with the end of its log if it ends, or isn't ready in `timeout` seconds.
    """
    with tempfile.TemporaryDirectory(prefix="lesionflow-") as scratch:
        ready = Path(scratch) / "ready.json"
        command = [sys.executable, "-m", "lesionflow", "serve", str(bundle), "--port", str(port)]
        with log.open("wb") as output:
            server = subprocess.Popen(
                [*command, "--ready-file", str(ready)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C in this terminal isn't meant for it.
            )
        deadline = time.monotonic() + timeout
        try:
            while not ready.exists():
                if server.poll() is not None:
                    tail = log.read_text(errors="replace").strip()[-500:]
                    raise ClusterError(f"the service ended with exit code {server.returncode}: {tail}")
                if time.monotonic() > deadline:
                    raise ClusterError(f"the service wasn't ready after {timeout:.0f} s; see {log}")
                time.sleep(0.05)
        except BaseException:
            server.kill()
            server.wait()
            raise
        return json.loads(ready.read_text())["url"], server.pid


def stop(bundle: Path, pid: int) -> None:
    """End the service `pid` if it still is the one on this bundle, and wait until it has drained."""
    if not _serves(pid, bundle):
        return
    deadline = time.monotonic() + _STOP_SECONDS
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
        while True:
            # A child of this very process has to be reaped before it is gone.
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
            os.kill(pid, 0 if time.monotonic() < deadline else signal.SIGKILL)
            time.sleep(0.1)


def _serves(pid: int, bundle: Path) -> bool:
    """Whether `pid` serves this bundle, and isn't some later process with its number."""
    try:
        return str(bundle).encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
