"""Run the service: take the port, say where, answer until asked to stop, finish what was begun."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import gc
import logging
import os
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from lesionflow.bundle import INFO, NAME, NOTICE, Bundle
from lesionflow.errors import UsageError, missing_extra
from lesionflow.keys import write_json
from lesionflow.serving.predictor import Predictor
from lesionflow.serving.protocol import ServiceLimits
from lesionflow.serving.remote import TIMEOUT, Remote
from lesionflow.serving.settings import Settings

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

BACKLOG = 1024
"""Connections that the kernel keeps until they are accepted."""
REFRESH = 5.0
"""Seconds between two looks at what other workers tell of this one, and after which freed memory is given back."""


def create_app(
    bundle: Path | Predictor,
    *,
    limits: ServiceLimits | None = None,
    name: str | None = None,
    token: str | None = None,
) -> Starlette:
    """The ASGI application, for a server of one's own. Raises `DataError` if the bundle was tampered with.

    The model is served under the bundle's name, and under `name`. With a `token`, requests must bring it. The
    application checks the reference lesions in a thread when it starts, and is ready once they came out right.

    `serve` also holds connections to limits, which a server of one's own has to do for itself: see `guard`.
    """
    try:
        from starlette.responses import Response
        from starlette.routing import Route

        from lesionflow.serving import pages
        from lesionflow.serving.endpoints import application
        from lesionflow.serving.service import Service
        from lesionflow.serving.telemetry import Telemetry
    except ImportError as error:
        raise missing_extra(error.name or "starlette", "serve") from None
    predictor = bundle if isinstance(bundle, Predictor) else Predictor(bundle)
    service = Service(predictor, limits or ServiceLimits(), name)
    app = application(service, token=token)
    telemetry = app.state.telemetry = Telemetry(service, service.drift)

    async def metrics(request: Request) -> Response:
        body, kind = await asyncio.to_thread(telemetry.render)
        return Response(body, headers={"Content-Type": kind})

    app.router.routes += [Route("/metrics", metrics), *pages.routes()]
    return app


def serve(
    bundle: Path,
    host: str = "127.0.0.1",
    port: int = 8080,
    *,
    threads: int | None = None,
    limits: ServiceLimits | None = None,
    ready_file: Path | None = None,
    grace: float = 30.0,
    linger: float = 1.0,
    name: str | None = None,
    token: str | None = None,
    workers: int | None = None,
    predictor_host: str | None = None,
    predictor_tls: bool = False,
    predictor_timeout: float = TIMEOUT,
    public_key: Path | None = None,
    signature: Path | None = None,
) -> None:
    """Serve a bundle until SIGTERM or Ctrl-C, then finish the requests that have begun, and return.

    Port 0 takes a free one. Once requests are taken, one line with the URL goes to stdout, and to
    `ready_file` as JSON (`url`, `pid`). After the signal no connection is accepted; for `linger` seconds requests on
    open ones are still answered, and those still running after `grace` seconds are cut off.

    With `workers` so many processes answer on the one port: SIGHUP replaces them one after another, each once its
    successor is ready, and one that crashed is replaced. See `workers.supervise`.

    `name` is a second name for the model. With a `public_key` the bundle must bear its owner's `signature`: see
    `signing.check_signature`. With a `predictor_host` (HOST, HOST:PORT or URL) this process
    decodes and calibrates, and the graph runs there: see `remote.Remote`. The service then starts at once,
    is unready until the predictor reproduces the reference lesions, and looks again every half minute.

    `bundle` itself may be a link, or a folder whose files are links from one real folder, as KServe's
    storage initialiser makes them; the real bundle may hold none.

    Raises `UsageError` for an address that can't be had, `DataError` for a bundle that was tampered
    with, `GateRefused` if its reference lesions aren't reproduced on this machine.
    """
    settings = Settings(
        Path(bundle), limits or ServiceLimits(), threads, name, token, grace, linger,
        predictor_host, predictor_tls, predictor_timeout, public_key, signature,
    )  # fmt: skip
    if name is not None and not NAME.fullmatch(name):
        raise UsageError(f"--model-name {name!r}: URLs hold it, so give up to 64 letters, digits and ._-")
    with _listen(host, port) as listener:
        url = _url(listener)

        def announce(served: str) -> None:
            sys.stdout.write(f"{url} serves {served}; Ctrl-C ends it. {NOTICE}\n")
            sys.stdout.flush()
            if ready_file is not None:
                write_json(Path(ready_file), {"url": url, "pid": os.getpid()})

        if workers is None:
            answer(listener, settings, announce)
        else:
            from lesionflow.serving.workers import supervise

            supervise(listener, settings, workers, announce)


def answer(listener: socket.socket, settings: Settings, ready: Callable[[str], None]) -> None:
    """Serve on a socket that listens, in this process; `ready` hears the model's name once requests are taken."""
    try:
        import uvicorn

        from lesionflow.serving.access import JsonLines
        from lesionflow.serving.guard import Guard
        from lesionflow.serving.telemetry import FOLDER
    except ImportError as error:
        raise missing_extra(error.name or "uvicorn", "serve") from None
    opened = Bundle.open(_real(settings.bundle))
    if settings.public_key is not None:
        from lesionflow.signing import beside, check_signature

        check_signature(opened, settings.public_key, settings.signature or beside(settings.bundle))
    if not opened.pictures:
        raise UsageError(
            f"{settings.bundle}: knows metadata alone, and the service takes pictures; use `lesionflow predict`"
        )
    graph = None
    if settings.predictor_host:
        graph = Remote(
            opened, settings.predictor_host, tls=settings.predictor_tls, timeout=settings.predictor_timeout
        )  # fmt: skip
    predictor = Predictor(opened, settings.threads, graph=graph)
    app = create_app(predictor, limits=settings.limits, name=settings.name, token=settings.token)
    if graph is None:
        app.state.service.check()
    telemetry = app.state.telemetry
    guard = Guard(settings.limits, telemetry.refused)
    # glibc keeps what threads that decode have freed, hundreds of MB after a few large pictures, until it is asked.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None

    async def refresh() -> None:
        while os.environ.get(FOLDER):
            await asyncio.to_thread(telemetry.refresh)
            await asyncio.sleep(REFRESH)

    async def tidy() -> None:
        gc.collect()
        gc.freeze()  # What was loaded stays: with it set aside, a collection takes milliseconds.
        while True:
            await asyncio.sleep(REFRESH)
            # Errors refer to what they happened with, so refused pictures would wait for a collection of all.
            gc.collect()
            if trim is not None:
                await asyncio.to_thread(trim, 0)

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                self.tasks = [asyncio.create_task(task) for task in (guard.watch(), refresh(), tidy())]
                ready(app.state.service.name)

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            for server in self.servers:
                server.close()
            await guard.drain(settings.linger)
            await super().shutdown(sockets)
            for task in self.tasks:
                task.cancel()

    config = uvicorn.Config(
        app,
        http=guard.protocol(),
        ws="none",
        proxy_headers=False,
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=BACKLOG,
        timeout_keep_alive=round(settings.limits.idle),
        timeout_graceful_shutdown=max(1, round(settings.grace)),
    )
    server = Server(config)

    def stop() -> None:
        server.should_exit = True

    lines = JsonLines(logging.WARNING)
    logging.getLogger().addHandler(lines)
    try:
        with _on_signal(stop), _named_only():
            server.run(sockets=[listener])
    finally:
        logging.getLogger().removeHandler(lines)


@contextmanager
def _named_only() -> Iterator[None]:
    """Warnings, and errors of threads, become lines of the log with their kind alone: their texts may quote a file."""
    from lesionflow.serving.access import log

    def warned(message: Warning | str, category: type[Warning], *where: object) -> None:
        log("warning", message="a library warned", error=category.__name__)

    def ended(error: threading.ExceptHookArgs) -> None:
        log("error", message="a thread ended", error=error.exc_type.__name__)

    before = warnings.showwarning, threading.excepthook
    warnings.showwarning, threading.excepthook = warned, ended  # type: ignore[assignment]
    try:
        yield
    finally:
        warnings.showwarning, threading.excepthook = before


@contextmanager
def _on_signal(stop: Callable[[], None]) -> Iterator[None]:
    """uvicorn drains on a signal and then raises it again for whoever was there before: that is `stop`, so
    the process ends with 0. It also catches a signal that comes before uvicorn listens to any."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        stop()

    # A hangup replaces workers; a service without any ends by it as by SIGTERM, not in the middle of an answer.
    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _real(bundle: Path) -> Path:
    """The folder that a bundle's files really lie in."""
    info = bundle / INFO
    return info.resolve().parent if info.is_symlink() else bundle.resolve()


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.create_server(address[:2], family=family, backlog=BACKLOG)
        # asyncio sets it only on sockets that name their protocol: an answer's second packet would wait 40 ms.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except socket.gaierror:
        raise UsageError(f"--host {host}: not an address of this machine: use 127.0.0.1, or 0.0.0.0 for all") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UsageError(
                f"--port {port}: in use on {host}: stop what listens there, or choose another (0 takes a free one)"
            ) from None
        raise UsageError(f"can't listen on {host}:{port} ({error.strerror}): choose another --host or --port") from None


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
