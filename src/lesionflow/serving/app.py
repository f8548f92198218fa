"""Run the service: take the port, say where, answer until asked to stop, finish what was begun."""

from __future__ import annotations

import errno
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from lesionflow.bundle import INFO, NOTICE, Bundle
from lesionflow.errors import UsageError, missing_extra
from lesionflow.keys import write_json
from lesionflow.serving.predictor import Predictor
from lesionflow.serving.protocol import ServiceLimits
from lesionflow.serving.remote import TIMEOUT, Remote

if TYPE_CHECKING:
    from starlette.applications import Starlette


def create_app(bundle: Path | Predictor, *, limits: ServiceLimits | None = None, name: str | None = None) -> Starlette:
    """The ASGI application, for a server of one's own. Raises `DataError` if the bundle was tampered with.

    The model is served under the bundle's name, and under `name`. The application checks the reference
    lesions in a thread when it starts, and is ready once they came out right.
    """
    try:
        from lesionflow.serving.endpoints import application
        from lesionflow.serving.service import Service
    except ImportError as error:
        raise missing_extra(error.name or "starlette", "serve") from None
    predictor = bundle if isinstance(bundle, Predictor) else Predictor(bundle)
    return application(Service(predictor, limits or ServiceLimits(), name))


def serve(
    bundle: Path,
    host: str = "127.0.0.1",
    port: int = 8080,
    *,
    threads: int | None = None,
    limits: ServiceLimits | None = None,
    ready_file: Path | None = None,
    grace: float = 30.0,
    name: str | None = None,
    predictor_host: str | None = None,
    predictor_tls: bool = False,
    predictor_timeout: float = TIMEOUT,
) -> None:
    """Serve a bundle until SIGTERM or Ctrl-C, then finish the requests that have begun, and return.

    Port 0 takes a free one. Once requests are taken, one line with the URL goes to stdout, and to
    `ready_file` as JSON (`url`, `pid`). Requests still running `grace` seconds after the signal are cut off.

    `name` is a second name for the model. With a `predictor_host` (HOST, HOST:PORT or URL) this process
    decodes and calibrates, and the graph runs there: see `remote.Remote`. The service then starts at once,
    is unready until the predictor reproduces the reference lesions, and looks again every half minute.

    `bundle` itself may be a link, or a folder whose files are links from one real folder, as KServe's
    storage initialiser makes them; the real bundle may hold none.

    Raises `UsageError` for an address that can't be had, `DataError` for a bundle that was tampered
    with, `GateRefused` if its reference lesions aren't reproduced on this machine.
    """
    try:
        import uvicorn
    except ImportError:
        raise missing_extra("uvicorn", "serve") from None
    with _listen(host, port) as listener:
        opened = Bundle.open(_real(Path(bundle)))
        if not opened.pictures:
            raise UsageError(
                f"{bundle}: knows metadata alone, and the service takes pictures; use `lesionflow predict`"
            )
        graph = Remote(opened, predictor_host, tls=predictor_tls, timeout=predictor_timeout) if predictor_host else None
        app = create_app(Predictor(opened, threads, graph=graph), limits=limits, name=name)
        if graph is None:
            app.state.service.check()
        url = _url(listener)

        def announce() -> None:
            sys.stdout.write(f"{url} serves {app.state.service.name}; Ctrl-C ends it. {NOTICE}\n")
            sys.stdout.flush()
            if ready_file is not None:
                write_json(Path(ready_file), {"url": url, "pid": os.getpid()})

        class Server(uvicorn.Server):
            async def startup(self, sockets: list[socket.socket] | None = None) -> None:
                await super().startup(sockets)
                if self.started:
                    announce()

        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=max(1, round(grace)),
        )
        server = Server(config)

        def stop() -> None:
            server.should_exit = True

        with _on_signal(stop):
            server.run(sockets=[listener])


@contextmanager
def _on_signal(stop: Callable[[], None]) -> Iterator[None]:
    """uvicorn drains on a signal and then raises it again for whoever was there before: that is `stop`, so
    the process ends with 0. It also catches a signal that comes before uvicorn listens to any."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        stop()

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
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
        listener = socket.create_server(address[:2], family=family, backlog=128)
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
