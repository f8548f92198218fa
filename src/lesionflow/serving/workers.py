"""Several processes that answer on one port, and who looks after them.

The supervisor holds the listening socket; workers inherit it and accept from one queue, so a connection that waits
belongs to no worker and none is lost when one ends. It loads no model itself. SIGHUP replaces the workers one after
another: a new one first, and once that is ready an old one drains. One that crashed is replaced, later and later if it
goes on. SIGTERM or Ctrl-C drains all. A worker whose supervisor is gone drains and ends as well.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType

from lesionflow.errors import LesionflowError, from_exit_code
from lesionflow.serving.settings import Settings

START = 120.0
"""Seconds that a worker may take until it is ready."""
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 10.0
"""Seconds before one that crashed is replaced: twice as long after each."""
STEADY = 30.0
"""A worker that lived so many seconds has the pauses begin anew."""
CODE = "from lesionflow.serving.workers import work; work()"


@dataclass(eq=False)
class _Worker:
    process: subprocess.Popen[bytes]
    status: int
    """The end of the pipe that it says on that it is ready, or why not; closed when it ends."""
    slot: int
    began: float = field(default_factory=time.monotonic)
    said: bytes = b""
    name: str | None = None
    """The model's, once it is ready."""
    leaves: float | None = None
    """When it is ended by force; None while it isn't to leave."""


def supervise(listener: socket.socket, settings: Settings, count: int, announce: Callable[[str], None]) -> None:
    """Serve in `count` processes until SIGTERM or Ctrl-C; `announce` hears the model's name once all are ready.

    Raises what the first worker that can't start would have raised itself. Call it in the main thread.
    """
    from lesionflow.serving.graph import available_cpus

    threads = settings.threads or max(1, available_cpus() // count)
    with tempfile.TemporaryDirectory(prefix="lesionflow-metrics-") as folder:
        supervisor = _Supervisor(listener, replace(settings, threads=threads), count, Path(folder), announce)
        with supervisor.on_signals():
            supervisor.run()


class _Supervisor:
    def __init__(
        self, listener: socket.socket, settings: Settings, count: int, folder: Path, announce: Callable[[str], None]
    ) -> None:
        self._listener, self._settings, self._count, self._folder = listener, settings, count, folder
        self._announce: Callable[[str], None] | None = announce
        self._workers: list[_Worker] = []
        self._selector = selectors.DefaultSelector()
        self._stopping = False
        self._old: list[_Worker] = []
        """To be replaced, by the one that follows or those after it."""
        self._new: _Worker | None = None
        self._pause, self._not_before = FIRST_PAUSE, 0.0

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT end all, SIGHUP replaces all."""
        wakes, woken = socket.socketpair()
        wakes.setblocking(False)
        woken.setblocking(False)
        self._selector.register(woken, selectors.EVENT_READ, None)

        def handle(number: int, frame: FrameType | None) -> None:
            if number == signal.SIGHUP:
                self._old = [worker for worker in self._workers if worker.leaves is None and worker is not self._new]
            else:
                self._stopping = True

        before = {n: signal.signal(n, handle) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
        wakes_before = signal.set_wakeup_fd(wakes.fileno(), warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(wakes_before)
            for number, handler in before.items():
                signal.signal(number, handler)
            for one in (wakes, woken):
                one.close()
            self._selector.close()

    def run(self) -> None:
        try:
            while self._step():
                for key, _ in self._selector.select(0.2):
                    if key.data is None:
                        with contextlib.suppress(BlockingIOError):
                            key.fileobj.recv(64)  # type: ignore[union-attr]
                    else:
                        self._hear(key.data)
        finally:
            for worker in self._workers:
                worker.process.kill()
                worker.process.wait()

    def _step(self) -> bool:
        """Do what is due; False once all have ended."""
        now = time.monotonic()
        for worker in self._workers:
            late = worker.leaves is None and worker.name is None and now - worker.began > START
            if late or (worker.leaves is not None and now > worker.leaves):
                worker.process.kill()
        if self._stopping:
            for worker in self._workers:
                self._end(worker)
            return bool(self._workers)
        self._roll()
        staying = sum(worker.leaves is None for worker in self._workers if worker is not self._new)
        if now >= self._not_before:
            for _ in range(self._count - staying):
                self._start()
        if self._announce is not None and all(worker.name for worker in self._workers):
            self._announce(self._workers[0].name or "")
            self._announce = None
        return True

    def _roll(self) -> None:
        """One step of replacing `_old`: its successor is started, is ready, and only then does it leave."""
        self._old = [worker for worker in self._old if worker in self._workers]
        if self._announce is not None or any(worker.leaves is not None for worker in self._workers):
            return
        if self._new is not None and self._new.name is not None:
            self._new = None
            if self._old:
                self._end(self._old.pop(0))
        elif self._old and self._new is None and time.monotonic() >= self._not_before:
            self._new = self._start()

    def _start(self) -> _Worker:
        slot = min(set(range(len(self._workers) + 1)) - {worker.slot for worker in self._workers})
        told, tells = os.pipe()
        os.set_blocking(told, False)
        try:
            process = subprocess.Popen(
                [sys.executable, "-c", CODE, str(self._listener.fileno()), str(tells), str(slot)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                pass_fds=(self._listener.fileno(), tells),
                env={**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(self._folder)},
                start_new_session=True,  # Ctrl-C in a terminal is the supervisor's to pass on.
            )
        finally:
            os.close(tells)
        worker = _Worker(process, told, slot)
        self._workers.append(worker)
        self._selector.register(told, selectors.EVENT_READ, worker)
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # Its end is heard of soon enough.
            process.stdin.write(self._settings.to_json().encode() + b"\n")
            process.stdin.flush()
        return worker

    def _hear(self, worker: _Worker) -> None:
        try:
            said = os.read(worker.status, 65536)
        except BlockingIOError:
            return
        worker.said += said
        if said:
            if b"\n" in worker.said:
                worker.name = json.loads(worker.said).get("ready")
            return
        self._selector.unregister(worker.status)
        os.close(worker.status)
        code = worker.process.wait()
        assert worker.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            worker.process.stdin.close()
        self._workers.remove(worker)
        # What it measured is over; what it counted stays.
        for file in self._folder.glob(f"gauge_live*_{worker.slot}.db"):
            file.unlink(missing_ok=True)
        if worker.leaves is None and not self._stopping:
            self._lost(worker, code)

    def _lost(self, worker: _Worker, code: int) -> None:
        """One has ended that wasn't to."""
        error = json.loads(worker.said).get("error") if b"\n" in worker.said else None
        if self._announce is not None and worker.name is None:
            raise from_exit_code(code, error or f"a worker ended with exit code {code} before it was ready")
        from lesionflow.serving.access import log

        if time.monotonic() - worker.began > STEADY:
            self._pause = FIRST_PAUSE
        self._not_before = time.monotonic() + self._pause
        log(
            "error",
            message=f"a worker ended with exit code {code}",
            pause=self._pause,
            **({"error": error} if error else {}),
        )
        self._pause = min(2 * self._pause, LONGEST_PAUSE)
        if worker is self._new:
            # What is served stays as it is: the new ones would end the same way.
            self._new, self._old = None, []

    def _end(self, worker: _Worker) -> None:
        if worker.leaves is None:
            worker.leaves = time.monotonic() + self._settings.linger + self._settings.grace + 5
            worker.process.send_signal(signal.SIGTERM)


def work() -> None:
    """A worker's whole life. Its settings come on stdin, which stays open for as long as there is a supervisor."""
    listener = socket.socket(fileno=int(sys.argv[1]))
    status, slot = int(sys.argv[2]), int(sys.argv[3])
    os.set_inheritable(status, False)
    # Until the server listens to signals: nothing has begun that could be finished.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    settings = Settings.from_json(sys.stdin.readline())

    def say(**what: str) -> None:
        with contextlib.suppress(BrokenPipeError):
            os.write(status, json.dumps(what).encode() + b"\n")

    def orphaned() -> None:
        sys.stdin.read()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=orphaned, daemon=True).start()
    try:
        from lesionflow.serving.app import answer
        from lesionflow.serving.telemetry import use_slot

        use_slot(slot)
        answer(listener, settings, lambda name: say(ready=name))
    except LesionflowError as error:
        say(error=str(error))
        sys.exit(error.exit_code)
