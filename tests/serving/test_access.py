"""Every request gets an id and one line in the log that names nobody; without the token it gets nothing else."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.testclient import TestClient

from lesionflow.serving.access import Access, JsonLines, flush

SECRET = "mole-of-Jane-Doe"


async def echo(request: Request) -> Response:
    body = await request.body()
    request.state.lesions = 3
    return JSONResponse({"id": request.state.request_id, "bytes": len(body)})


async def live(request: Request) -> Response:
    return JSONResponse({"live": True})


async def fail(request: Request) -> Response:
    raise ValueError(SECRET)


@pytest.fixture(autouse=True)
def said():
    """A test's lines are written before the next one looks for its own."""
    yield
    flush()


class Told:
    """Telemetry that notes what it hears."""

    def __init__(self) -> None:
        self.running, self.heard = 0, []

    def began(self) -> None:
        self.running += 1

    def ended(self, *what) -> None:
        self.running -= 1
        self.heard.append(what)


def make(token: str | None = None) -> tuple[TestClient, Told]:
    routes = [
        Route("/echo/{name}", echo, methods=["GET", "POST"]), Route("/fail", fail), Route("/v2/health/live", live),
    ]  # fmt: skip
    app = Starlette(routes=routes, middleware=[Middleware(Access, token=token)])
    app.state.telemetry = told = Told()
    return TestClient(app, raise_server_exceptions=False), told


def lines(capfd) -> list[dict]:
    flush()
    return [json.loads(line) for line in capfd.readouterr().err.splitlines()]


def test_a_line_names_the_route_and_nothing_that_was_sent(capfd) -> None:
    client, told = make()
    answer = client.post(f"/echo/{SECRET}?q={SECRET}", content=SECRET * 10, headers={"X-Name": SECRET})
    (line,) = lines(capfd)
    assert SECRET not in json.dumps(line)
    assert {name: line[name] for name in ("level", "method", "route", "status", "lesions", "bytes")} == {
        "level": "info", "method": "POST", "route": "/echo/{name}", "status": 200, "lesions": 3,
        "bytes": 10 * len(SECRET),
    }  # fmt: skip
    assert line["request_id"] == answer.json()["id"] == answer.headers["x-request-id"]
    assert told.heard[0][:3] == ("POST", "/echo/{name}", 200)
    assert told.running == 0


@pytest.mark.parametrize(("given", "kept"), [("visit-7.a_B", True), ("a" * 65, False), ("a b", False), ("ä", False)])
def test_an_id_is_kept_where_it_is_one(given: str, kept: bool, capfd) -> None:
    answer = make()[0].get("/echo/a", headers={"X-Request-ID": given.encode()})
    assert (answer.headers["x-request-id"] == given) is kept
    assert lines(capfd)[0]["request_id"] == answer.headers["x-request-id"]


def test_an_error_says_its_kind_alone(capfd) -> None:
    client, told = make()
    answer = client.get("/fail")
    assert (answer.status_code, answer.json()["error"]) == (500, "internal error: please report it")
    said = lines(capfd)
    assert SECRET not in json.dumps(said)
    assert said[0]["error"] == "ValueError"
    assert (said[1]["status"], said[1]["level"]) == (500, "warning")
    assert told.running == 0


def test_health_is_not_worth_a_line_and_unknown_methods_have_no_name(capfd) -> None:
    client, told = make()
    client.get("/v2/health/live")
    assert lines(capfd) == []
    client.request("PROPFIND", "/elsewhere")
    (line,) = lines(capfd)
    assert (line["method"], line["route"], line["status"]) == ("other", "(none)", 404)
    assert told.heard[1][0] == "other"


def test_the_token_is_asked_for_everywhere_but_at_the_door(capfd) -> None:
    client, told = make("s3cret")
    for given in ("", "Bearer wrong", "Basic s3cret", "s3cret"):
        answer = client.get("/echo/a", headers={"Authorization": given})
        assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
        assert answer.json()["request_id"] == answer.headers["x-request-id"]
    assert told.heard[0][4] == "token"
    assert client.get("/nowhere").status_code == 401, "without the token nobody learns what there is"
    assert client.get("/v2/health/live").status_code == 200
    assert client.get("/echo/a", headers={"Authorization": "bearer s3cret"}).status_code == 200
    assert "s3cret" not in json.dumps(lines(capfd))


def test_answers_bring_the_headers_that_keep_browsers_careful() -> None:
    headers = make()[0].get("/echo/a").headers
    assert headers["content-security-policy"].startswith("default-src 'none'")
    assert (headers["x-content-type-options"], headers["cache-control"]) == ("nosniff", "no-store")


def test_what_libraries_log_is_a_line_without_a_traceback(capfd) -> None:
    logger = logging.getLogger("some.library")
    logger.addHandler(JsonLines())
    try:
        raise ValueError(SECRET)
    except ValueError:
        logger.exception("it went wrong")
    (line,) = lines(capfd)
    assert (line["message"], line["error"]) == ("it went wrong", "ValueError")
    assert SECRET not in json.dumps(line)


def test_nobody_reading_the_log_holds_up_nothing() -> None:
    code = (
        "import time\nfrom lesionflow.serving.access import log\nstarted = time.monotonic()\n"
        "for n in range(30_000): log('info', n=n, text='x' * 100)\n"
        "import os; os.write(1, str(time.monotonic() - started).encode())\n"
    )
    reading, writing = os.pipe()
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=writing, timeout=60)
    os.close(writing), os.close(reading)
    assert done.returncode == 0
    assert float(done.stdout) < 10
