"""One container's process: started, signalled, ended with all it left behind."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

from double.containers import Command
from double.objects import Object, now

MARK = "DOUBLE_CONTAINER"
"""Variable by which a container's processes are known, whatever session or group they moved to."""
_MESSAGE_BYTES, _MESSAGE_LINES = 2048, 80
# Should the test be killed, so are its pods.
_DIE_WITH_US = ("setpriv", "--pdeathsig", "KILL") if shutil.which("setpriv") else ()


class Process:
    """A running or ended container process."""

    def __init__(self, command: Command, log: Path, mark: str, wrap: Sequence[str] = ()) -> None:
        """Raises `OSError` if there is no such command."""
        if not shutil.which(command.argv[0], path=command.environment["PATH"]):
            raise FileNotFoundError(f'exec: "{command.argv[0]}": executable file not found in $PATH: unknown')
        log.parent.mkdir(parents=True, exist_ok=True)
        self.mark = mark
        self.log = log
        self.log_start = log.stat().st_size if log.exists() else 0
        self.started = now()
        self.finished = ""
        self.out_of_memory = False
        with log.open("ab") as output:
            self.popen = subprocess.Popen(
                [*_DIE_WITH_US, *wrap, *command.argv],
                env=command.environment | {MARK: mark},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd=command.folder,
            )

    @property
    def ended(self) -> bool:
        """Whether the first process ended; then, as in a container, no other one stays."""
        if self.popen.poll() is None:
            return False
        if not self.finished:
            self.finished = now()
            self.kill_all()
        return True

    @property
    def exit_code(self) -> int:
        code = self.popen.returncode
        return 128 - code if code < 0 else int(code)

    def signal(self, number: int) -> None:
        """As the kubelet or kernel would: SIGKILL reaches every process, anything else the first one."""
        with contextlib.suppress(ProcessLookupError):
            self.popen.send_signal(number)
        if number == signal.SIGKILL:
            self.kill_all()

    def kill_all(self) -> None:
        # A process may fork while the list is read, so until none is left.
        for _ in range(20):
            left = [pid for pid in marked(self.mark) if pid != self.popen.pid or self.popen.poll() is None]
            if not left:
                return
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def terminated(self, *, with_log: bool) -> Object:
        """The container's terminated state; `with_log` takes a failure's message from the log's end."""
        code = self.exit_code
        reason = "OOMKilled" if self.out_of_memory else "Completed" if code == 0 else "Error"
        state: Object = {"exitCode": code, "reason": reason, "startedAt": self.started, "finishedAt": self.finished}
        if with_log and code != 0 and (message := self._tail()):
            state["message"] = message
        return state

    def _tail(self) -> str:
        with self.log.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(self.log_start, size - _MESSAGE_BYTES))
            lines = log.read().decode(errors="replace").splitlines(keepends=True)
        return "".join(lines[-_MESSAGE_LINES:])


def marked(mark: str) -> list[int]:
    """Processes of a container (or of all whose mark begins so), zombies not counted."""
    sought = f"{MARK}={mark}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if sought in b"\0" + (entry / "environ").read_bytes():
                    found.append(int(entry.name))
    return found
