"""Chromium and axe-core for the tests of pages; they skip where there is none."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

QUIET = (
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


fetch = load(Path(__file__).with_name("fetch.py"))
start = load(Path(__file__).parents[1] / "serving" / "conftest.py").start
"""A service in a process of its own."""


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install 'lesionflow[dev]'")
    program = fetch.chromium() or pytest.skip(fetch.NO_CHROMIUM)
    arguments = [*QUIET, "--no-sandbox"] if os.geteuid() == 0 else list(QUIET)
    # Closed with the module: as long as it runs, this thread has an event loop that asyncio.run won't share.
    with playwright.sync_playwright() as running:
        started = running.chromium.launch(executable_path=program, args=arguments)
        yield started
        started.close()


@pytest.fixture(scope="module")
def axe():
    if not fetch.AXE_PATH.exists():
        pytest.skip(fetch.NO_AXE)
    return fetch.AXE_PATH.read_text()


@pytest.fixture
def visit(browser):
    """Open a page: `visit(path or URL, width, scheme)` -> page; `page.told` collects what it says, and whom it asks
    but itself."""
    contexts = []

    def go(where: Path | str, width: int = 1280, scheme: str = "light"):
        url = where if isinstance(where, str) else where.as_uri()
        own = ("data:", f"blob:{url}", url) if isinstance(where, str) else ("data:", "file:")
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.told = []
        page.on("console", lambda message: page.told.append(message.text))
        page.on("pageerror", lambda error: page.told.append(str(error)))
        page.on("request", lambda request: request.url.startswith(own) or page.told.append(request.url))
        page.goto(url)
        return page

    yield go
    for context in contexts:
        context.close()
