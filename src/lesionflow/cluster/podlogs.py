"""A pod's log as it grows, through broken connections: no line lost, none twice.

A broken stream is asked for again from the second of its last line, for a cluster knows no finer
time; what was read of that time before is skipped by its own timestamp and text.
"""

from __future__ import annotations

import contextlib
import datetime
import queue
import re
import threading
from collections import Counter
from typing import Any

from lesionflow.cluster.api import Api
from lesionflow.cluster.jobstate import ended_of, node_of
from lesionflow.errors import ClusterError

Object = dict[str, Any]

OVERLAP = 1
"""Seconds before the last line that are read again: a container's two outputs may be written out of order."""
PAUSE = 0.5
"""Seconds between two attempts."""
_STAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)$")
_FRACTION = re.compile(r"\.\d+")


class PodEnds(threading.Thread):
    """Notes how pods ended, in a thread of its own: a pod that restarts is gone before the next look at it."""

    def __init__(self, api: Api, labels: str) -> None:
        super().__init__(daemon=True, name="ends of pods")
        self.ended: dict[str, Object] = {}
        """The last state of every pod whose training has ended, by uid."""
        self._api, self._labels = api, labels
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Note no more; the thread ends with the next change, or within a minute."""
        self._stopped.set()

    def run(self) -> None:
        from urllib3.exceptions import HTTPError

        while not self._stopped.is_set():
            # Without the right to watch, or with the API away, a pod's end may be missed: that costs a detail.
            with contextlib.suppress(ClusterError, HTTPError, OSError, ValueError):
                for pod in self._api.watch("Pod", self._labels):
                    if self._stopped.is_set():
                        return
                    if ended_of(pod):
                        self.ended[pod["metadata"]["uid"]] = pod
            self._stopped.wait(PAUSE)


class PodLog(threading.Thread):
    """Reads one pod's log, in a thread of its own, until the container has ended and all of it was read."""

    def __init__(self, api: Api, pod: Object, container: str, lines: queue.SimpleQueue[str]) -> None:
        super().__init__(daemon=True, name=f"log of {pod['metadata']['name']}")
        self.node = node_of(pod)
        self.error = ""
        """The last line so far in which the program said what ended it."""
        self._api, self._name, self._uid = api, pod["metadata"]["name"], pod["metadata"]["uid"]
        self._container, self._lines = container, lines
        self._recent: list[tuple[str, str]] = []
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Read no more; the thread ends with the next line, or when its connection does."""
        self._stopped.set()

    def run(self) -> None:
        while not self._stopped.is_set():
            complete = self._read()
            try:
                pod = self._api.get("Pod", self._name)
            except ClusterError:
                complete = False  # The API is away for a moment, which says nothing about the pod.
            else:
                if pod is None or pod["metadata"]["uid"] != self._uid:
                    return
                if complete and ended_of(pod):
                    return
            self._stopped.wait(PAUSE)

    def _read(self) -> bool:
        """Read one stream to its end; whether that was a proper one."""
        from urllib3.exceptions import HTTPError

        seen = Counter(self._recent)
        since = _before(self._recent[-1][0]) if self._recent else ""
        checked = False
        try:
            for raw in self._api.logs(self._name, container=self._container, since=since):
                if self._stopped.is_set():
                    return False
                if not checked:
                    # A restarted pod may have the same name: its log is another reader's.
                    pod = self._api.get("Pod", self._name)
                    if pod is not None and pod["metadata"]["uid"] != self._uid:
                        return False
                    checked = True
                stamp, _, text = raw.partition(" ")
                if not _STAMP.match(stamp):
                    return False  # The node's own excuse in place of the log.
                if seen[stamp, text] > 0:
                    seen[stamp, text] -= 1
                    continue
                self._remember(stamp, text)
                self._lines.put(f"[node-{self.node}] {text}")
        except (ClusterError, HTTPError, OSError):
            return False
        return True

    def _remember(self, stamp: str, text: str) -> None:
        if text.startswith("error: "):
            self.error = text.removeprefix("error: ")
        self._recent.append((stamp, text))
        edge = _before(stamp)
        if _before(self._recent[0][0], 0) < edge:
            self._recent = [line for line in self._recent if _before(line[0], 0) >= edge]


def _before(stamp: str, seconds: int = OVERLAP) -> str:
    """The whole second, in UTC, some seconds before a log line's time (which nodes write in their own zone)."""
    time = datetime.datetime.fromisoformat(_FRACTION.sub("", stamp)).astimezone(datetime.UTC)
    return (time - datetime.timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")
