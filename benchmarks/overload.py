"""Five times too many requests: how the accepted ones fare, how fast others are refused, and what is left after.

    python benchmarks/overload.py RUN/bundle [--seconds 60] [--images 16] [--limit wait=0.1] [--out overload.json]

The service runs as `lesionflow serve`; requests of so many pictures are sent at fixed times whether or not earlier ones
were answered (an open loop), each on whichever connection is free. First the capacity is measured (a closed loop of
eight), then half of it is asked for, then five times as much, then one request at a time until it answers as before.
The sender shares the machine's cores with the service, so requests are few and large: what is refused costs little.
Latency is measured from when a request was due, so a late sender counts against the service. A refusal's counts from
when its last byte was handed to the system, as the service can't say no to what hasn't been sent.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image


@dataclass
class Seen:
    """What came of a phase's requests."""

    accepted: list[float] = field(default_factory=list)
    """Seconds."""
    refused: list[float] = field(default_factory=list)
    other: list[str] = field(default_factory=list)
    late: float = 0.0
    """Most seconds that a request was sent after it was due."""

    def figures(self) -> dict[str, float | int | None]:
        def at(values: list[float], q: float) -> float | None:
            return round(1000 * float(np.quantile(values, q)), 1) if values else None

        return {
            "accepted": len(self.accepted), "accepted_p50_ms": at(self.accepted, 0.5),
            "accepted_p99_ms": at(self.accepted, 0.99), "refused": len(self.refused),
            "refused_p50_ms": at(self.refused, 0.5), "refused_p99_ms": at(self.refused, 0.99),
            "refused_max_ms": at(self.refused, 1.0), "other": len(self.other),
            "sent_late_ms": round(1000 * self.late, 1),
        }  # fmt: skip


class Client:
    """Connections to one service, as many as are in use at a time."""

    def __init__(self, port: int, request: bytes) -> None:
        self.port, self.request = port, request
        self.free: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def send(self, due: float, seen: Seen) -> None:
        try:
            while self.free and self.free[-1][0].at_eof():
                self.free.pop()[1].close()  # Idle for too long: the service closed it.
            reader, writer = self.free.pop() if self.free else await asyncio.open_connection("127.0.0.1", self.port)
            seen.late = max(seen.late, time.perf_counter() - due)
            writer.write(self.request)
            sent = time.perf_counter()
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            status = int(head.split(b" ", 2)[1])
            await reader.readexactly(int(head.split(b"content-length: ")[1].split(b"\r\n")[0]))
        except (OSError, asyncio.IncompleteReadError) as error:
            seen.other.append(type(error).__name__)
            return
        now = time.perf_counter()
        if status == 200:
            seen.accepted.append(now - due)
        elif status == 503:
            seen.refused.append(now - sent)
        else:
            seen.other.append(str(status))
        if b"connection: close" in head:
            writer.close()
        else:
            self.free.append((reader, writer))

    async def closed_loop(self, seconds: float, many: int) -> Seen:
        seen, until = Seen(), time.perf_counter() + seconds

        async def one() -> None:
            while time.perf_counter() < until:
                await self.send(time.perf_counter(), seen)

        await asyncio.gather(*(one() for _ in range(many)))
        return seen

    async def open_loop(self, seconds: float, rate: float) -> Seen:
        seen, began, tasks = Seen(), time.perf_counter(), []
        for n in range(int(seconds * rate)):
            due = began + n / rate
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            tasks.append(asyncio.create_task(self.send(due, seen)))
        await asyncio.gather(*tasks)
        return seen


def request_of(bundle: Path, images: int) -> bytes:
    """A whole HTTP request of so many made-up crops."""
    rng = np.random.default_rng(0)
    data = []
    for _ in range(images):
        small = rng.integers(90, 200, (12, 12, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(small).resize((133, 133), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        data.append(base64.b64encode(buffer.getvalue()).decode())
    body = json.dumps({"inputs": [{"name": "image", "datatype": "BYTES", "shape": [images], "data": data}]}).encode()
    name = json.loads((bundle / "bundle.json").read_text())["name"]
    head = f"POST /v2/models/{name}/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def memory(pid: int) -> float:
    """Resident MiB."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.split("VmRSS:")[1].split()[0]) / 1024


async def phases(port: int, pid: int, request: bytes, seconds: float) -> dict[str, object]:
    client = Client(port, request)
    await client.closed_loop(3, 4)
    capacity = len((await client.closed_loop(8, 4)).accepted) / 8
    half = await client.open_loop(max(20.0, seconds / 3), capacity / 2)
    before, samples = memory(pid), list[float]()

    async def sample() -> None:
        while True:
            samples.append(memory(pid))
            await asyncio.sleep(1)

    sampling = asyncio.create_task(sample())
    over = await client.open_loop(seconds, 5 * capacity)
    sampling.cancel()
    ended, usual = time.perf_counter(), float(np.quantile(half.accepted, 0.99))
    recovery = None
    while recovery is None and time.perf_counter() - ended < 30:
        one = Seen()
        await client.send(time.perf_counter(), one)
        if one.accepted and one.accepted[0] <= usual:
            recovery = round(time.perf_counter() - ended, 3)
    first = max(samples[: max(1, len(samples) // 4)])
    return {
        "capacity_per_second": round(capacity, 2), "half_load": half.figures(), "overload": over.figures(),
        "p99_ratio": round(float(np.quantile(over.accepted, 0.99)) / usual, 2), "recovery_s": recovery,
        "rss_mib": {"before": round(before, 1), "first_quarter_max": round(first, 1), "max": round(max(samples), 1)},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--limit", action="append", default=[], help="passed on to the service")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        ready = Path(scratch) / "ready.json"
        command = [sys.executable, "-m", "lesionflow", "serve", str(asked.bundle), "--port", "0"]
        command += ["--ready-file", str(ready), *(word for limit in asked.limit for word in ("--limit", limit))]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            while not ready.exists():
                if server.poll() is not None:
                    sys.exit(f"the service ended with {server.returncode}")
                time.sleep(0.05)
            port = int(json.loads(ready.read_text())["url"].rpartition(":")[2])
            request = request_of(asked.bundle, asked.images)
            found = asyncio.run(phases(port, server.pid, request, asked.seconds))
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)
    text = json.dumps({"images": asked.images, "limits": asked.limit, "seconds": asked.seconds, **found}, indent=2)
    print(text)
    if asked.out:
        asked.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
