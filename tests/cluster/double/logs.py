"""The log endpoint: what a container wrote so far, or writes until it ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from double import answers
from double.answers import Refused
from double.store import Object

if TYPE_CHECKING:
    from double.server import Double

_POLL = 0.05
_stamps: dict[tuple[str, str, int], list[float]] = {}
_guard = threading.Lock()


def read(double: Double, namespace: str, pod: str, query: dict[str, str]) -> Iterator[bytes]:
    """The lines that a log request asks for. Raises `Refused` before the first one.

    Lines have no time of their own in the file: each gets that of when it was first seen, or of the file's last
    change if that is earlier. `sinceTime` counts in whole seconds, as kubelets do: a line of that second comes again.
    """
    found = double.store.get("Pod", namespace, pod)
    if found is None:
        raise answers.not_found(double.store.kinds["Pod"], pod)
    container = _container(found, query.get("container", ""))
    path = double.store.log_path(namespace, pod, container, previous=query.get("previous") == "true")
    if not path.exists():
        _explain(found, container, previous=query.get("previous") == "true")
    follow, stamped = query.get("follow") == "true", query.get("timestamps") == "true"
    since = 0.0
    if text := query.get("sinceTime"):
        since = float(int(datetime.fromisoformat(text).timestamp()))
    elif query.get("sinceSeconds"):
        since = time.time() - float(query["sinceSeconds"])
    cut = double.faults.get("cut_logs")
    sent = at = 0
    first, number = True, _identity(path)
    while True:
        # Asked before reading: what was written until the end is then certainly in the file.
        over = not follow or _ended(double, namespace, pod, container, number, path)
        now = double.store.get("Pod", namespace, pod)
        if now is not None and now["metadata"]["uid"] != found["metadata"]["uid"]:
            return  # A new pod of this name, whose log file may even have the old one's number.
        number = number or _identity(path)
        lines = _lines(path, found["metadata"]["uid"], number, final=over)
        if first and (tail := query.get("tailLines")):
            at = max(0, len(lines) - int(tail))
        first = False
        for line, when in lines[at:]:
            if when < since:
                continue
            stamp = datetime.fromtimestamp(when, UTC).strftime("%Y-%m-%dT%H:%M:%S.%f") + "000Z "
            yield (stamp.encode() if stamped else b"") + line
            sent += 1
            if cut and sent >= cut:
                raise ConnectionResetError
        at = max(at, len(lines))
        if over:
            return
        if double.stopping.wait(_POLL):
            return
        yield b""


def _lines(path: Path, uid: str, number: int, *, final: bool) -> list[tuple[bytes, float]]:
    """Lines with the times they were first seen; one that is still being written only at the end."""
    if _identity(path) != number or not number:
        return []
    with _guard:
        content = path.read_bytes()
        lines = content.splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n") and not final:
            lines.pop()
        stamps = _stamps.setdefault((str(path), uid, number), [])
        when = min(time.time(), path.stat().st_mtime)
        stamps.extend(max(when, stamps[-1] if stamps else 0.0) for _ in range(len(lines) - len(stamps)))
        return list(zip(lines, stamps, strict=False))


def _identity(path: Path) -> int:
    """Which file is there: another one after the log was rotated."""
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return 0


def _container(pod: Object, asked: str) -> str:
    spec = pod["spec"]
    names = [c["name"] for c in spec["containers"]]
    every = names + [c["name"] for c in spec.get("initContainers") or []]
    name = pod["metadata"]["name"]
    if asked and asked not in every:
        raise Refused(400, "BadRequest", f"container {asked} is not valid for pod {name}")
    if not asked and len(names) > 1:
        message = f"a container name must be specified for pod {name}, choose one of: [{' '.join(names)}]"
        raise Refused(400, "BadRequest", message)
    return asked or str(names[0])


def _explain(pod: Object, container: str, *, previous: bool) -> None:
    """Raise why there is no log yet; a container that started but wrote nothing has an empty one."""
    name, status = pod["metadata"]["name"], _status(pod, container)
    state: dict[str, Any] = status.get("state") or {}
    if previous:
        message = f'previous terminated container "{container}" in pod "{name}" not found'
        raise Refused(400, "BadRequest", message)
    if "waiting" in state:
        reason = state["waiting"].get("reason", "ContainerCreating")
        raise Refused(400, "BadRequest", f'container "{container}" in pod "{name}" is waiting to start: {reason}')
    if not state and (pod.get("status") or {}).get("phase", "Pending") == "Pending":
        message = f'container "{container}" in pod "{name}" is waiting to start: ContainerCreating'
        scheduled = pod["spec"].get("nodeName")
        raise Refused(400, "BadRequest", message if scheduled else f"pod {name} does not have a host assigned")


def _ended(double: Double, namespace: str, pod: str, container: str, number: int, path: Path) -> bool:
    found = double.store.get("Pod", namespace, pod)
    if found is None or (number and _identity(path) != number):
        return True
    status = _status(found, container)
    if (found.get("status") or {}).get("phase") in ("Succeeded", "Failed"):
        return True
    return "terminated" in (status.get("state") or {})


def _status(pod: Object, container: str) -> Object:
    status = pod.get("status") or {}
    every = [*(status.get("containerStatuses") or []), *(status.get("initContainerStatuses") or [])]
    return next((s for s in every if s.get("name") == container), {})
