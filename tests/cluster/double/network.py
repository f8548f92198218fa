"""Where pods run: each on a "host" of its own (a network namespace on a bridge), or all on loopback.

    network = connect()                    # namespaces where permitted, else loopback
    address = network.attach("team", "job-worker-0", ["job-worker-0"])
    Popen([*address.wrap, "python", ...], env=env | network.translate("team", env) | address.environment)

In a namespace a pod has eth0, its own host name, and finds the others' services in /etc/hosts, as from a
cluster's DNS. Every device and namespace carries a prefix with this process's id, so that what a killed
test left behind is recognised and removed by the next one.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

PREFIX = "lfd"
_NETNS = Path("/var/run/netns")
_ETC = Path("/etc/netns")
_LOCK = Path(tempfile.gettempdir()) / "lesionflow-double-network.lock"
_count = itertools.count()


@dataclass(frozen=True)
class Address:
    """Where one pod is: how its commands are started there, and what they must know about it."""

    ip: str
    wrap: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    device: str = ""


class Loopback:
    """All pods on 127.0.0.1: names mean nothing, so the master's address and port are translated."""

    isolated = False

    def __init__(self) -> None:
        self._ports: dict[tuple[str, str], int] = {}

    def attach(self, namespace: str, hostname: str, names: Sequence[str]) -> Address:
        return Address("127.0.0.1", environment={"GLOO_SOCKET_IFNAME": "lo"})

    def detach(self, address: Address) -> None: ...

    def translate(self, namespace: str, environment: dict[str, str]) -> dict[str, str]:
        """The master's variables as they work here: one free port per master."""
        found = {}
        for prefix in ("", "PET_"):
            if master := environment.get(f"{prefix}MASTER_ADDR"):
                port = self._ports.setdefault((namespace, master), free_port())
                found |= {f"{prefix}MASTER_ADDR": "127.0.0.1", f"{prefix}MASTER_PORT": str(port)}
        return found

    def close(self) -> None: ...


class Bridge:
    """One bridge, one namespace per pod; they reach each other and the bridge's own address, nothing else."""

    isolated = True

    def __init__(self) -> None:
        self.tag = f"{PREFIX}{_base36(os.getpid(), 5)}{_base36(next(_count) % 36, 1)}"
        self._numbers = itertools.count(2)
        self._free: list[int] = []
        self._pods: dict[str, tuple[str, Address, str, tuple[str, ...]]] = {}
        with _LOCK.open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            remove_leftovers()
            self.subnet = _free_subnet()
            _batch(
                f"link add {self.tag} type bridge",
                f"addr add {self.subnet}.1/24 dev {self.tag}",
                f"link set {self.tag} up",
            )

    def attach(self, namespace: str, hostname: str, names: Sequence[str]) -> Address:
        """Make a host for a pod; `names` are what its services are called within the Kubernetes namespace."""
        number = self._free.pop() if self._free else next(self._numbers)
        name, outside, ip = f"{self.tag}-{number}", f"{self.tag}v{number}", f"{self.subnet}.{number}"
        _batch(
            f"netns add {name}",
            f"link add {outside} type veth peer name eth0 netns {name}",
            f"link set {outside} master {self.tag} up",
        )
        _batch(f"addr add {ip}/24 dev eth0", "link set eth0 up", "link set lo up", netns=name)
        # A shell of its own sets the host's name and then becomes the command: its process id is the pod's.
        uts = ("unshare", "--uts", "sh", "-c", 'hostname "$0"; exec "$@"', hostname)
        address = Address(ip, ("ip", "netns", "exec", name, *uts), {"GLOO_SOCKET_IFNAME": "eth0"}, name)
        self._pods[name] = (namespace, address, hostname, tuple(names))
        self._write_hosts()
        return address

    def detach(self, address: Address) -> None:
        if self._pods.pop(address.device, None) is None:
            return
        number = int(address.device.rpartition("-")[2])
        _remove_namespace(address.device, f"{self.tag}v{number}")
        self._free.append(number)
        self._write_hosts()

    def translate(self, namespace: str, environment: dict[str, str]) -> dict[str, str]:
        return {}

    def close(self) -> None:
        for _, address, *_ in list(self._pods.values()):
            self.detach(address)
        _ip("link", "del", self.tag)

    def _write_hosts(self) -> None:
        for own, (namespace, address, hostname, _) in self._pods.items():
            lines = ["127.0.0.1 localhost", f"{address.ip} {hostname}"]
            for other, (elsewhere, there, _, names) in self._pods.items():
                for name in names:
                    full = [f"{name}.{elsewhere}{rest}" for rest in ("", ".svc", ".svc.cluster.local")]
                    short = [name] if elsewhere == namespace and (other != own or name != hostname) else []
                    lines.append(" ".join([there.ip, *short, *full]))
            folder = _ETC / own
            folder.mkdir(parents=True, exist_ok=True)
            # Written in place: running pods have this very file mounted over /etc/hosts.
            (folder / "hosts").write_text("\n".join(lines) + "\n")


def connect(namespaces: bool | None = None) -> Bridge | Loopback:
    """Namespaces (True), loopback (False), or whichever works here (None)."""
    if namespaces is None:
        namespaces = not why_not()
    return Bridge() if namespaces else Loopback()


def why_not() -> str:
    """Why namespaces can't be made here; empty if they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if missing := [tool for tool in ("ip", "unshare", "hostname") if not shutil.which(tool)]:
        return f"network namespaces need {', '.join(missing)}"
    name = f"{PREFIX}{_base36(os.getpid(), 5)}try"
    made = _ip("netns", "add", name)
    bridged = made and _ip("link", "add", name, "type", "bridge")
    _ip("link", "del", name)
    _ip("netns", "del", name)
    return "" if bridged else "network namespaces or bridges are not permitted here"


def remove_leftovers() -> None:
    """Remove what a process of ours made that no longer lives."""
    namespaces = [p.name for p in _NETNS.glob(f"{PREFIX}*")] if _NETNS.exists() else []
    for name in namespaces:
        if _is_orphan(name):
            _remove_namespace(name, "")
    for name in (p.name for p in Path("/sys/class/net").glob(f"{PREFIX}*")):
        if _is_orphan(name):
            _ip("link", "del", name)
    for folder in _ETC.glob(f"{PREFIX}*") if _ETC.exists() else []:
        if _is_orphan(folder.name):
            shutil.rmtree(folder, ignore_errors=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _is_orphan(name: str) -> bool:
    found = re.match(rf"{PREFIX}([0-9a-z]{{5}})", name)
    return bool(found) and not Path(f"/proc/{int(found[1], 36)}").exists()


def _remove_namespace(name: str, outside: str) -> None:
    listed = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False)
    for pid in listed.stdout.split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    if outside:
        _ip("link", "del", outside)
    _ip("netns", "del", name)
    shutil.rmtree(_ETC / name, ignore_errors=True)


def _free_subnet() -> str:
    taken = subprocess.run(["ip", "-4", "route", "show", "table", "all"], capture_output=True, text=True, check=True)
    for step in range(2560):
        number = (os.getpid() + step) % 2560
        subnet = f"10.{200 + number // 256}.{number % 256}"
        if f" {subnet}." not in f" {taken.stdout}":
            return subnet
    raise OSError("no free subnet among 10.200.0.0 to 10.209.255.0")


def _batch(*commands: str, netns: str = "") -> None:
    where = ["-n", netns] if netns else []
    text = "\n".join(commands)
    for attempt in range(3):
        done = subprocess.run(["ip", *where, "-batch", "-"], input=text, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return
        if "exists" not in done.stderr or attempt == 2:
            raise OSError(f"ip: {done.stderr.strip()} in {text!r}")
        time.sleep(0.1)  # The kernel removes a namespace's devices a moment after the namespace.


def _ip(*arguments: str) -> bool:
    return subprocess.run(["ip", *arguments], capture_output=True, check=False).returncode == 0


def _base36(number: int, width: int) -> str:
    digits = "0123456789abcdefghijklmnopqrstuvwxyz"
    text = ""
    for _ in range(width):
        number, digit = divmod(number, 36)
        text = digits[digit] + text
    return text
