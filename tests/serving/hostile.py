"""Requests that nobody honest sends, drawn from a seed, over raw sockets: what `test_hostile.py` has a service bear.

    python tests/serving/hostile.py BUNDLE --count 100000 --seed 1

Every kind is a function of a random generator that gives bytes to send, and how: at once, in pieces, or cut off. A
service has borne it if it answered with a status under 500 or 503, or closed the connection, and still answers others.
"""

from __future__ import annotations

import argparse
import base64
import functools
import gzip
import io
import json
import socket
import struct
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

Rng = np.random.Generator
TIMEOUT = 20.0
TRIAGE, EDGE = "/v1/triage", "edge-of-the-form"


def crop(rng: Rng, kind: str = "JPEG", size: int = 40) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (size, size, 3), dtype=np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def request(
    path: str, body: bytes = b"", kind: str = "application/json", method: str = "POST", **headers: str
) -> bytes:
    lines = {"Host": "service", "Content-Type": kind, "Content-Length": str(len(body))}
    lines |= {name.replace("_", "-"): value for name, value in headers.items()}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode("latin-1", "replace") + body


def infer(body: bytes, name: str, **headers: str) -> bytes:
    return request(f"/v2/models/{name}/infer", body, **headers)


def tensor(images: list[bytes], name: str) -> bytes:
    data = b"".join(struct.pack("<I", len(image)) + image for image in images)
    entry = {
        "name": "image",
        "datatype": "BYTES",
        "shape": [len(images)],
        "parameters": {"binary_data_size": len(data)},
    }
    head = json.dumps({"inputs": [entry]}).encode()
    length = {"Inference_Header_Content_Length": str(len(head))}
    return request(f"/v2/models/{name}/infer", head + data, "application/octet-stream", **length)


def form(parts: list[tuple[str, bytes]]) -> bytes:
    """Parts as (what follows `form-data; `, content)."""
    body = b"".join(
        f"--{EDGE}\r\nContent-Disposition: form-data; {what}\r\n\r\n".encode() + data + b"\r\n" for what, data in parts
    )
    return request(TRIAGE, body + f"--{EDGE}--\r\n".encode(), f"multipart/form-data; boundary={EDGE}")


def pictures(images: list[bytes]) -> bytes:
    return form([(f'name="images"; filename="{n}.jpg"', image) for n, image in enumerate(images)])


def png(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG whose header claims this size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def jpeg_of(width: int, height: int, rng: Rng) -> bytes:
    """A JPEG whose frame header claims another size."""
    data = bytearray(crop(rng))
    at = data.find(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def scans(rng: Rng, count: int) -> bytes:
    """A progressive JPEG with one of its scans again and again."""
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    start = data.rfind(b"\xff\xda")
    return data[:-2] + data[start:-2] * count + b"\xff\xd9"


def numbers(rng: Rng, value: str) -> bytes:
    shape = [1, int(rng.integers(1, 64)), 32, 3]
    kind = rng.choice(["UINT8", "FP32", "BYTES", "INT64"])
    return f'{{"inputs":[{{"name":"image","datatype":"{kind}","shape":{shape},"data":[{value}]}}]}}'.encode()


@functools.cache
def inflating() -> bytes:
    """A PNG of 48 MB of zeros in 47 KB."""
    return png(4000, 4000, zlib.compress(b"\0" * 48_004_000, 9))


def mutated(rng: Rng, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(int(rng.integers(1, 20))):
        changed[int(rng.integers(len(changed)))] = int(rng.integers(256))
    return bytes(changed)


def names(rng: Rng) -> str:
    return str(
        rng.choice(
            ["../../../etc/passwd", "..\\..\\boot.ini", "/dev/zero",
             "C:\\x.jpg", "a\x00b.jpg", "\u202egpj.exe", "x" * 4000,
             "%2e%2e%2f", "\ud7ff\ue000", "<script>alert(1)</script>.jpg", "';--", ""]
        )
    )  # fmt: skip


KINDS: dict[str, Callable[[Rng, str], bytes]] = {
    "a body beyond the limit, announced": lambda r, n: request(
        f"/v2/models/{n}/infer", b"x" * 100, Content_Length=str(int(r.integers(1, 9)) << 40)
    ),
    "a picture of a hundred megapixels": lambda r, n: tensor([png(int(r.integers(10_000, 60_000)), 10_000)], n),
    "a JPEG that claims to be huge": lambda r, n: pictures([jpeg_of(65_000, int(r.integers(2000, 65_000)), r)]),
    "a PNG that inflates": lambda r, n: tensor([inflating()[: int(r.integers(30_000, 90_000))]], n),
    "a thousand scans": lambda r, n: tensor([scans(r, int(r.integers(200, 1000)))], n),
    "a truncated picture": lambda r, n: pictures([crop(r)[: int(r.integers(3, 600))]]),
    "a damaged picture": lambda r, n: pictures([mutated(r, crop(r, str(r.choice(["JPEG", "PNG"])))), crop(r)]),
    "a polyglot": lambda r, n: tensor([crop(r) + b"PK\x03\x04<script>" + r.bytes(200), b"GIF89a" + r.bytes(99)], n),
    "another type": lambda r, n: infer(b"<xml/>", n, kind=str(r.choice(["text/xml", "image/png", "a/b;c", ""]))),
    "not a number": lambda r, n: infer(numbers(r, str(r.choice(["NaN", "Infinity", "1e999", "-1", "256", "null"]))), n),
    "a wrong shape": lambda r, n: infer(
        json.dumps(
            {"inputs": [{"name": "image", "datatype": "UINT8", "shape": [int(r.integers(-9, 1 << 40))] * 4}]}
        ).encode(),
        n,
    ),
    "a huge header": lambda r, n: request("/v2", method="GET", X_Large="y" * int(r.integers(40_000, 300_000))),
    "thousands of headers": lambda r, n: request("/v2", method="GET", **{f"X{i}": "1" for i in range(5000)}),
    "deep JSON": lambda r, n: infer(b"[" * int(r.integers(2000, 200_000)), n),
    "a deep object": lambda r, n: request(TRIAGE, b'{"lesions":' * 5000 + b"1" + b"}" * 5000),
    "a gzip bomb": lambda r, n: infer(gzip.compress(b"0" * 5_000_000), n, Content_Encoding="gzip"),
    "names that go places": lambda r, n: form([(f'name="images"; filename="{names(r)}"', crop(r))]),
    "bad UTF-8": lambda r, n: form([('name="metadata"', b"isic_id,age_approx\n\xff\xfe" + r.bytes(30))]),
    "a CSV of nonsense": lambda r, n: form(
        [
            ('name="images"; filename="a.jpg"', crop(r)),
            ('name="metadata"', mutated(r, b"isic_id,age_approx,sex\na,50,male\n")),
        ]
    ),
    "a form without an end": lambda r, n: pictures([crop(r)])[:-30].replace(b"Content-Length", b"X-Length"),
    "a form of nothing but edges": lambda r, n: form([("", b"")] * int(r.integers(1, 500))),
    "no HTTP": lambda r, n: r.bytes(int(r.integers(1, 3000))),
    "a strange method and path": lambda r, n: request(
        f"/{r.bytes(20).hex()}/%00/..", method=str(r.choice(["TRACE", "PUT", "BREW", "GET"]))
    ),
    "lengths that contradict": lambda r, n: request(
        f"/v2/models/{n}/infer", b"0\r\n\r\n", Transfer_Encoding="chunked", Inference_Header_Content_Length="-1"
    ),
    "a tensor that claims more": lambda r, n: tensor([crop(r)], n).replace(
        b'"shape": [1]', b'"shape": [%d]' % int(r.integers(2, 1 << 40))
    ),
    "lesions that are none": lambda r, n: request(
        TRIAGE,
        json.dumps(
            {"lesions": [r.choice([{"id": 1}, {"image": "%%"}, {"id": "a", "metadata": 5}, {"id": "a" * 9999}])]}
        ).encode(),
    ),
    "the same lesion twice": lambda r, n: request(
        TRIAGE, json.dumps({"lesions": [{"id": "a", "image": base64.b64encode(crop(r)).decode()}] * 2}).encode()
    ),
    "a hundred lesions of metadata": lambda r, n: request(
        TRIAGE,
        json.dumps(
            {
                "lesions": [
                    {"id": str(i), "metadata": {"age_approx": float(x)}} for i, x in enumerate(r.normal(0, 1e300, 100))
                ]
            }
        ).encode(),
    ),
    "options that are none": lambda r, n: request(
        TRIAGE, json.dumps({"lesions": [], "options": {"heatmaps": ["x"] * 9999, "reasons": -5}}).encode()
    ),
}
"""What is sent, by name; a request that is cut off or dripped is made of any of them."""


@dataclass
class Borne:
    """What came of it."""

    status: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    """Answers that nobody should get, by kind."""


def send(address: tuple[str, int], data: bytes, how: str) -> str:
    """Send, and give the status, or what happened instead."""
    try:
        with socket.create_connection(address, TIMEOUT) as connection:
            connection.settimeout(TIMEOUT)
            if how == "cut off":
                connection.sendall(data[: len(data) // 2])
                return "cut off"
            if how == "dripped":
                for start in range(0, min(len(data), 40), 8):
                    connection.sendall(data[start : start + 8])
                    time.sleep(0.002)
                data = data[40:]
            connection.sendall(data)
            answer = connection.recv(64)
    except (ConnectionError, BrokenPipeError):
        return "closed"
    except TimeoutError:
        return "no answer"
    except OSError:
        return "closed"
    return answer[9:12].decode("latin-1") if answer.startswith(b"HTTP/1.1 ") else "closed"


def attack(url: str, name: str, count: int, seed: int, threads: int = 8) -> Borne:
    """Send `count` requests, every kind in turn; what came of them."""
    parts, borne = urlsplit(url), Borne()
    address = (parts.hostname or "", parts.port or 80)
    kinds = list(KINDS)

    def one(number: int) -> tuple[str, str]:
        rng = np.random.default_rng([seed, number])
        kind = kinds[number % len(kinds)]
        how = str(rng.choice(["at once", "at once", "at once", "dripped", "cut off"]))
        return kind, send(address, KINDS[kind](rng, name), how)

    with ThreadPoolExecutor(threads) as pool:
        for kind, status in pool.map(one, range(count), chunksize=1):
            borne.status[status] += 1
            if status == "no answer" or (status.startswith("5") and status != "503"):
                borne.wrong.append(f"{kind}: {status}")
    return borne


def memory(pid: int) -> float:
    """Resident MiB of a process and its children."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return 0.0
    own = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")) / 1024
    return own + sum(memory(int(child)) for child in children)


def main() -> None:
    import tempfile

    from lesionflow.bundle import Bundle
    from lesionflow.serving import local
    from lesionflow.serving.app import REFRESH

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        name = Bundle.open(options.bundle).name
        url, pid = local.start(options.bundle, Path(scratch) / "log")
        try:
            attack(url, name, 5000, 0)
            time.sleep(2 * REFRESH)
            before, started = memory(pid), time.monotonic()
            borne = attack(url, name, options.count, options.seed)
            seconds = time.monotonic() - started
            time.sleep(2 * REFRESH)
            after = memory(pid)
            alive = attack(url, name, 0, 0) and send(
                (urlsplit(url).hostname or "", urlsplit(url).port or 0),
                request("/v2/health/ready", method="GET"),
                "at once",
            )
        finally:
            local.stop(options.bundle, pid)
    print(f"{options.count:,} requests of {len(KINDS)} kinds in {seconds:.0f} s, seed {options.seed}")
    print(f"answers: {dict(borne.status.most_common())}")
    print(f"memory: {before:.0f} to {after:.0f} MiB; afterwards ready: {alive}; wrong: {Counter(borne.wrong)}")
    sys.exit(bool(borne.wrong) or alive != "200" or after - before >= 50)


if __name__ == "__main__":
    main()
