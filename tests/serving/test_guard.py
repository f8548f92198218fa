"""Connections on their own: heads, pace, number, and refusals that arrive. An application of two lines behind them."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import uvicorn

from lesionflow.serving import guard as guards
from lesionflow.serving.guard import Guard
from lesionflow.serving.protocol import ServiceLimits

LIMITS = ServiceLimits(headers=4096, head_time=0.6, rate=2000, idle=1.0, connections=6)


class Double:
    """A server in a thread, and what its application saw."""

    def __init__(self) -> None:
        self.bodies: list[int] = []
        self.gone = 0
        self.guard = Guard(LIMITS, lambda limit: self.refusals.append(limit))
        self.refusals: list[str] = []
        self.port = 0

    async def app(self, scope, receive, send) -> None:
        size, status = 0, 413 if scope["path"] == "/refuse" else 200
        while status == 200:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.gone += 1
                return
            size += len(message["body"])
            if not message["more_body"]:
                break
        if scope["path"] == "/slow":
            await asyncio.sleep(0.5)
        self.bodies.append(size)
        body = b"x" * 20_000_000 if scope["path"] == "/large" else json.dumps({"bytes": size}).encode()
        headers = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def connect(self, data: bytes = b"") -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=10)
        connection.sendall(data)
        return connection


@contextmanager
def serving(monkeypatch) -> Iterator[Double]:
    monkeypatch.setattr(guards, "GRACE", 0.3)
    monkeypatch.setattr(guards, "SWEEP", 0.05)
    double = Double()
    listener = socket.create_server(("127.0.0.1", 0))
    double.port = listener.getsockname()[1]

    class Server(uvicorn.Server):
        async def startup(self, sockets=None) -> None:
            await super().startup(sockets)
            self.watching = asyncio.create_task(double.guard.watch())

        async def shutdown(self, sockets=None) -> None:
            for server in self.servers:
                server.close()
            await double.guard.drain(0.5)
            await super().shutdown(sockets)
            self.watching.cancel()

    config = uvicorn.Config(
        double.app, http=double.guard.protocol(), ws="none", interface="asgi3", lifespan="off", log_config=None
    )
    server = double.server = Server(config)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield double
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture
def double(monkeypatch) -> Iterator[Double]:
    with serving(monkeypatch) as double:
        yield double


def answer(connection: socket.socket) -> tuple[int, dict, dict[str, str]]:
    """(status, body, headers) of the one answer on a connection; status 0 where it was closed without."""
    file = connection.makefile("rb")
    first = file.readline()
    if not first:
        return 0, {}, {}
    headers = dict(line.decode().strip().lower().split(": ", 1) for line in iter(file.readline, b"\r\n"))
    return int(first.split()[1]), json.loads(file.read(int(headers["content-length"]))), headers


def closed(connection: socket.socket, within: float = 5.0) -> bool:
    connection.settimeout(within)
    try:
        return connection.recv(1000) == b""
    except ConnectionError:
        return True
    except TimeoutError:
        return False


def head(path: str = "/", *more: str) -> bytes:
    return "\r\n".join([f"POST {path} HTTP/1.1", "Host: a", *more, "", ""]).encode()


@pytest.mark.parametrize(
    ("data", "status", "limit"),
    [
        (head("/", "X: " + "a" * 5000), 431, "headers"),
        (head("/", *(f"X{n}: 1" for n in range(150))), 431, "headers"),
        (head("/" + "a" * 5000), 431, "headers"),
        (b"GET / HTTP/1.1\r\nX: " + b"a" * 400_000, 431, "headers"),
        (b"\x16\x03\x01 no HTTP at all\r\n\r\n", 400, None),
        (head("/", "Content-Length: 5", "Content-Length: 6"), 400, None),
        (head("/", "Content-Length: 5", "Transfer-Encoding: chunked"), 400, None),
        (head("/", "Transfer-Encoding: chunked") + b"zz\r\n", 400, None),
    ],
)
def test_a_bad_head_is_refused_by_name(double, data: bytes, status: int, limit: str | None) -> None:
    connection = double.connect()
    for start in range(0, len(data), 60_000):
        connection.sendall(data[start : start + 60_000])
    found, body, headers = answer(connection)
    assert (found, body.get("limit")) == (status, limit)
    assert headers["connection"] == "close"
    assert closed(connection)
    assert double.bodies == []


def test_a_head_that_never_ends_is_ended(double) -> None:
    connection = double.connect(b"GET / HTTP/1.1\r\nHost: a\r\n")
    started = time.monotonic()
    assert answer(connection)[:2][0] == 408
    assert 0.4 < time.monotonic() - started < 3
    assert double.refusals == ["head_time"]


def test_a_connection_without_a_request_is_closed(double) -> None:
    assert closed(double.connect(), 3)


def test_a_slow_body_is_ended_and_a_steady_one_is_not(double) -> None:
    slow = double.connect(head("/", "Content-Length: 100000") + b"x" * 10)
    status, body, _ = answer(slow)
    assert (status, body["limit"]) == (408, "rate")
    steady = double.connect(head("/", "Content-Length: 6000"))
    for _ in range(12):
        steady.sendall(b"x" * 500)
        time.sleep(0.1)
    assert answer(steady)[:2] == (200, {"bytes": 6000})
    assert (double.bodies, double.gone) == ([6000], 1)


def test_who_takes_no_answer_is_let_go(double) -> None:
    connection = double.connect(head("/large", "Content-Length: 0"))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    deadline = time.monotonic() + 8
    while "rate" not in double.refusals:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    while double.guard.open:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_an_early_refusal_arrives_although_the_body_is_still_sent(double) -> None:
    size = 30_000_000
    connection = double.connect(head("/refuse", f"Content-Length: {size}"))
    sent = threading.Thread(target=lambda: connection.sendall(b"x" * size), daemon=True)
    sent.start()
    time.sleep(0.2)
    status, _, headers = answer(connection)
    assert (status, headers["connection"]) == (413, "close")
    sent.join(5)
    connection.close()


def test_a_small_refused_request_keeps_its_connection(double) -> None:
    connection = double.connect(head("/refuse", "Content-Length: 3") + b"abc")
    status, _, headers = answer(connection)
    assert status == 413
    assert "connection" not in headers
    connection.sendall(head("/", "Content-Length: 2") + b"ab")
    assert answer(connection)[0] == 200


def test_more_connections_than_allowed_are_told_so(double) -> None:
    kept = [double.connect(head("/", "Content-Length: 100")) for _ in range(6)]
    time.sleep(0.1)
    extra = double.connect(head("/", "Content-Length: 0"))
    status, body, headers = answer(extra)
    assert (status, body["limit"], headers["retry-after"]) == (503, "connections", "1")
    extra.close()
    for connection in kept:
        connection.sendall(b"x" * 100)
        assert answer(connection)[0] == 200


def test_too_many_requests_at_once_on_one_connection(double) -> None:
    connection = double.connect(head("/slow", "Content-Length: 0") * 40)
    status, body, _ = answer(connection)
    assert (status, body["limit"]) == (503, "pipelined")
    assert closed(connection)


def test_pipelined_requests_are_answered_in_order(double) -> None:
    connection = double.connect(head("/", "Content-Length: 1") + b"a" + head("/", "Content-Length: 2") + b"ab")
    file = connection.makefile("rb")
    text = b""
    while text.count(b"bytes") < 2:
        text += file.read1(1000)
    assert text.index(b'{"bytes": 1}') < text.index(b'{"bytes": 2}')


def test_a_drain_answers_what_comes_on_open_connections(monkeypatch) -> None:
    with serving(monkeypatch) as double:
        running = double.connect(head("/slow", "Content-Length: 0"))
        open_one = double.connect(head("/", "Content-Length: 0"))
        assert answer(open_one)[0] == 200
        double.server.should_exit = True
        time.sleep(0.25)
        open_one.sendall(head("/", "Content-Length: 3") + b"abc")
        status, body, headers = answer(open_one)
        assert (status, body, headers["connection"]) == (200, {"bytes": 3}, "close")
        assert answer(running)[0] == 200
        with pytest.raises(OSError):
            double.connect()
