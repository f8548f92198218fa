"""A service's fixed address: a TCP forwarder that shares connections out among revisions."""

from __future__ import annotations

import contextlib
import socket
import threading


class Front:
    """Listens on a port of 127.0.0.1; `route` says where new connections go, by percent."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._routes: list[tuple[int, int]] = []
        self._count = 0
        threading.Thread(target=self._accept, name="front", daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def route(self, shares: list[tuple[int, int]]) -> None:
        """Pairs of port and percent; they are followed exactly over every hundred connections."""
        self._routes = shares

    def close(self) -> None:
        # Closing alone would leave the thread waiting in accept.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client, self._choose()), daemon=True).start()

    def _choose(self) -> int:
        # 37 is coprime to 100, so a share comes spread out and not in one run.
        point, self._count = self._count * 37 % 100, self._count + 1
        for port, percent in self._routes:
            if point < percent:
                return port
            point -= percent
        return 0

    def _serve(self, client: socket.socket, port: int) -> None:
        with client, contextlib.suppress(OSError):
            if not port:
                client.recv(65536)
                client.sendall(b"HTTP/1.1 503 Service Unavailable\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
                return
            with socket.create_connection(("127.0.0.1", port), 5) as server:
                server.settimeout(None)
                back = threading.Thread(target=_pump, args=(server, client), daemon=True)
                back.start()
                _pump(client, server)
                back.join()


def _pump(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)
