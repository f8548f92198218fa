"""What the service counts, for Prometheus at `/metrics`: requests, lesions, bands, batches, refusals and drift.

Nothing here names a patient, a file or a path: labels are the service's own words. With several workers each writes
its counts to files of its own, and whichever is asked adds them all up; those of one that ended stay counted. A worker
has a slot, not a process number, so that two hundred restarts leave no more files than one.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest, values
from prometheus_client.multiprocess import MultiProcessCollector

from lesionflow import __version__

if TYPE_CHECKING:
    from lesionflow.serving.drift import Drift
    from lesionflow.serving.service import Service

FOLDER = "PROMETHEUS_MULTIPROC_DIR"
"""Variable with the folder that workers count in; set by the supervisor."""
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
SIZES = (1, 2, 4, 8, 16, 32, 64)


def use_slot(slot: int) -> None:
    """Count in the files of this worker's slot. Before any `Telemetry` is made."""
    values.ValueClass = values.MultiProcessValue(lambda: slot)  # type: ignore[no-untyped-call]


class Telemetry:
    """The counts of one process. Safe to call from several threads."""

    def __init__(self, service: Service, drift: Drift | None = None) -> None:
        """Hears of the service's batches and answers from now on; `drift` is asked for its gauges."""
        self._service, self._drift = service, drift
        self._registry = CollectorRegistry()
        prefix = "lesionflow"
        own: dict[str, Any] = {"registry": self._registry}
        self._requests = Counter(f"{prefix}_requests", "Requests answered.", ("method", "route", "status"), **own)
        self._seconds = Histogram(
            f"{prefix}_request_seconds", "From the request's head to its answer.", ("route",), buckets=SECONDS, **own
        )
        self._refused = Counter(f"{prefix}_refusals", "Requests refused, by the limit they met.", ("limit",), **own)
        self._lesions = Counter(f"{prefix}_lesions", "Lesions answered, by band.", ("band",), **own)
        self._batches = Histogram(f"{prefix}_batch_lesions", "Lesions in a run of the graph.", buckets=SIZES, **own)
        self._graph = Counter(f"{prefix}_graph_seconds", "Seconds that the graph has run.", **own)
        gauge: dict[str, Any] = {**own, "multiprocess_mode": "livesum"}
        self._running = Gauge(f"{prefix}_requests_running", "Requests being received or answered.", **gauge)
        self._waiting = Gauge(f"{prefix}_lesions_waiting", "Lesions that wait for the graph.", **gauge)
        self._wait = Gauge(
            f"{prefix}_wait_seconds", "How long a request would wait for the graph now.",
            multiprocess_mode="livemax", **own,
        )  # fmt: skip
        self._ready = Gauge(f"{prefix}_ready", "Workers that are ready.", **gauge)
        self._known: dict[tuple[str, ...], Any] = {}
        """Counters by name and labels: looking one up takes longer than counting with it."""
        self._lock = threading.Lock()
        self._told: dict[str, set[tuple[str, ...]]] = {}
        self._drifts: dict[str, Gauge] = {}
        info = service.predictor.bundle
        self._model = Gauge(
            f"{prefix}_model_info", "The model and the software that serves it; the number of workers.",
            ("model", "bundle", "version"), **gauge,
        )  # fmt: skip
        self._model.labels(service.name, str(info.version), __version__).set(1)
        # A worker that crashed may have left its slot's gauges as they were.
        for one in (self._running, self._waiting, self._wait, self._ready):
            one.set(0)
        answered = service.answered

        def told(bands: Sequence[str | None]) -> None:
            answered(bands)
            for band in bands:
                self._of(self._lesions, band or "none").inc()

        service.answered = told  # type: ignore[method-assign]
        service.batched = self._batched

    def began(self) -> None:
        """A request's head has come."""
        self._running.inc()

    def ended(self, method: str, route: str, status: int, seconds: float, limit: str | None = None) -> None:
        """A request was answered, or its client left; `limit` names the one that refused it."""
        self._running.dec()
        self._of(self._requests, method, route, str(status)).inc()
        self._of(self._seconds, route).observe(seconds)
        if limit is not None:
            self.refused(limit)

    def refused(self, limit: str) -> None:
        """A request, or a connection, met this limit."""
        self._refused.labels(limit).inc()

    def _of(self, counter: Any, *labels: str) -> Any:
        key = (counter._name, *labels)
        if (known := self._known.get(key)) is None:
            known = self._known[key] = counter.labels(*labels)
        return known

    def _batched(self, lesions: int, seconds: float) -> None:
        self._batches.observe(lesions)
        self._graph.inc(seconds)

    def refresh(self) -> None:
        """Set what is looked at rather than counted. Workers do it regularly: another may be the one asked."""
        self._waiting.set(self._service.batcher.waiting)
        self._wait.set(self._service.batcher.wait(1))
        self._ready.set(self._service.reason is None)
        if self._drift is not None:
            with self._lock:  # A scrape and the workers' own look may come together.
                self._tell_drift(self._drift)

    def _tell_drift(self, drift: Drift) -> None:
        told: dict[str, set[tuple[str, ...]]] = {}
        for one in drift.gauges():
            gauge = self._drifts.get(one.name)
            if gauge is None:
                # Each worker has windows of its own, told apart by `pid`, which is its slot.
                gauge = self._drifts[one.name] = Gauge(
                    f"lesionflow_drift_{one.name}", "See docs/drift.md.", tuple(one.labels),
                    registry=self._registry, multiprocess_mode="liveall",
                )  # fmt: skip
            gauge.labels(**one.labels).set(one.value)
            told.setdefault(one.name, set()).add(tuple(str(value) for value in one.labels.values()))
        for name, before in self._told.items():
            for labels in before - told.get(name, set()):
                # Of several workers each keeps a file of what it once told: there it can only be made no number.
                self._drifts[name].labels(*labels).set(float("nan"))
                self._drifts[name].remove(*labels)
        self._told = told

    def render(self) -> tuple[bytes, str]:
        """The answer to a scrape, of all workers, and its media type."""
        self.refresh()
        registry: Any = self._registry
        if values.ValueClass._multiprocess and os.environ.get(FOLDER):
            registry = CollectorRegistry()
            MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry), CONTENT_TYPE_LATEST
