"""Thousands of requests that nobody honest sends leave the service as it was."""

from __future__ import annotations

import importlib.util
import os
import random
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from lesionflow.serving.app import REFRESH

spec = importlib.util.spec_from_file_location("hostile", Path(__file__).with_name("hostile.py"))
hostile = importlib.util.module_from_spec(spec)
sys.modules["hostile"] = hostile  # Its dataclasses look themselves up.
spec.loader.exec_module(hostile)

COUNT = 5000
GIVEN_BACK = 2 * REFRESH
"""Seconds after which freed memory is the system's again."""


@pytest.fixture(scope="module")
def target(start, finished):
    with start(finished / "bundle") as running:
        yield running


def test_five_thousand_hostile_requests_change_nothing(target):
    seed = int(os.environ.get("LESIONFLOW_SEED", random.randrange(1 << 30)))
    print(f"LESIONFLOW_SEED={seed}")
    name = httpx.post(f"{target.url}/v2/repository/index").json()[0]["name"]
    hostile.attack(target.url, name, COUNT, seed=0)  # Until every buffer has its size.
    time.sleep(GIVEN_BACK)
    before = hostile.memory(target.process.pid)
    borne = hostile.attack(target.url, name, COUNT, seed)
    assert target.process.poll() is None
    assert not borne.wrong
    assert sum(borne.status.values()) == COUNT
    refused = sum(count for status, count in borne.status.items() if status.startswith("4"))
    assert refused > COUNT / 4, borne.status
    until = time.monotonic() + 3 * GIVEN_BACK
    while (grown := hostile.memory(target.process.pid) - before) >= 50 and time.monotonic() < until:
        time.sleep(1)
    assert grown < 50, f"{grown:.0f} MiB more than the {before:.0f} before"
    assert httpx.get(f"{target.url}/v2/health/ready").json()["ready"] is True


@pytest.mark.parametrize("kind", hostile.KINDS)
def test_every_kind_is_answered_or_cut_off(target, kind):
    parts = urlsplit(target.url)
    name = httpx.post(f"{target.url}/v2/repository/index").json()[0]["name"]
    data = hostile.KINDS[kind](hostile.np.random.default_rng(7), name)
    status = hostile.send((parts.hostname, parts.port), data, "at once")
    assert status == "closed" or status[0] in "24", status
