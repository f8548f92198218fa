"""The other nodes of a job, seen through the run directory they share.

A connection to a machine that lost its power, or to a pod whose network went with it, looks idle for
ever, and a collective operation waits for it. So every node's launcher keeps a small file fresh in
`nodes/` of the run, with a mark that is new each time it starts. Another mark than the one a node
trained with means that node began anew and waits for us; a file that no longer changes, that it is gone.
"""

from __future__ import annotations

import contextlib
import json
import time
import uuid
from pathlib import Path

from lesionflow.keys import write_json

BEAT = 5.0
"""Seconds between two signs of life."""
SILENCE = 90.0
"""Seconds without one until a node counts as gone: shared file systems may hold a change back for a minute."""


class Peers:
    """The nodes of one job; asked from the launcher's loop."""

    def __init__(self, run: Path, count: int, rank: int) -> None:
        self.folder, self.rank = run / "nodes", rank
        self.others = [node for node in range(count) if node != rank]
        self._mark, self._next = uuid.uuid4().hex, 0.0
        self._trained_with: dict[int, str] = {}
        self._heard: dict[int, tuple[str, float]] = {}

    def beat(self) -> None:
        """Leave a sign of life, if it is time for one."""
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + BEAT
            with contextlib.suppress(OSError):  # A full or absent volume shows itself elsewhere.
                write_json(self.folder / f"{self.rank}.json", {"mark": self._mark, "time": time.time()})

    def joined(self) -> None:
        """All nodes have found each other: these are the ones that must stay."""
        if not self._trained_with:
            self._trained_with = {node: self._read(node)[0] for node in self.others}

    def lost(self) -> str:
        """Why training with these nodes can't go on; empty as long as it can."""
        for node, mark in self._trained_with.items():
            now, beat = self._read(node)
            if not mark:
                self._trained_with[node] = now  # Its file wasn't visible here yet when all had joined.
            elif now and now != mark:
                return f"node {node} started again"
            last, since = self._heard.setdefault(node, (beat, time.monotonic()))
            if beat != last:
                self._heard[node] = (beat, time.monotonic())
            elif time.monotonic() - since > SILENCE:
                return f"node {node} has given no sign of life for {SILENCE:.0f} s"
        return ""

    def _read(self, node: int) -> tuple[str, str]:
        try:
            text = (self.folder / f"{node}.json").read_text()
            return str(json.loads(text)["mark"]), text
        except (OSError, ValueError, KeyError):
            return "", ""
