"""Watches: the changes of a kind as lines of JSON, for as long as the client stays."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from double.answers import matcher
from double.core import Kind
from double.store import Change, Object

if TYPE_CHECKING:
    from double.server import Double


def lines(
    double: Double, kind: Kind, namespace: str, query: dict[str, str], shown: Callable[[Object], Object]
) -> Iterator[bytes]:
    """From the resourceVersion in the query on, or first what is there; empty lines ask whether anybody listens."""
    labels, fields = query.get("labelSelector", ""), query.get("fieldSelector", "")
    fits = matcher(labels, fields)
    until = time.monotonic() + float(query.get("timeoutSeconds") or 3600)
    since = query.get("resourceVersion") or "0"
    store = double.store
    with store.changed:
        position, first = len(store.history), []
        if since == "0":
            first = store.list(kind.kind, namespace or None, labels, fields)
        else:
            position = next((i for i, c in enumerate(store.history) if c.version > int(since)), position)
        version = store.version

    def line(type: str, obj: Object) -> bytes:
        return json.dumps({"type": type, "object": obj}).encode() + b"\n"

    def told(change: Change) -> bytes:
        """An object that no longer fits the selectors has gone, for this watch."""
        now, before = fits(change.obj), change.old is not None and fits(change.old)
        if change.key[0] != kind.kind or (namespace and change.key[1] != namespace) or not (now or before):
            return b""
        if change.type == "DELETED" or not now:
            return line("DELETED", shown(change.obj))
        return line("MODIFIED" if before else "ADDED", shown(change.obj))

    for obj in first:
        yield line("ADDED", shown(obj))
    if query.get("sendInitialEvents") == "true":
        marks = {"annotations": {"k8s.io/initial-events-end": "true"}, "resourceVersion": version}
        group = f"{kind.group}/{kind.version}" if kind.group else kind.version
        yield line("BOOKMARK", {"apiVersion": group, "kind": kind.kind, "metadata": marks})
    while time.monotonic() < until and not double.stopping.is_set():
        with store.changed:
            if position == len(store.history):
                store.changed.wait(min(0.5, max(0.0, until - time.monotonic())))
            news = store.history[position:]
            position += len(news)
        for change in news:
            if text := told(change):
                yield text
        if not news:
            yield b""
