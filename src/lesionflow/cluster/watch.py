"""Watching one training job until it ends: its logs, its restarts, what keeps it from starting, why it failed."""

from __future__ import annotations

import contextlib
import queue
import re
import time
from collections.abc import Iterator
from typing import Any

from lesionflow.cluster import manifests
from lesionflow.cluster.api import Api
from lesionflow.cluster.explain import Cause, cause_of, explain, find_causes, pulling
from lesionflow.cluster.jobstate import (
    ENDED,
    condemned,
    ended_of,
    error_line,
    has_begun,
    missing_owners,
    node_of,
    phase_of,
    pods_of,
    trainer_of,
    verdict,
)
from lesionflow.cluster.podlogs import PodEnds, PodLog
from lesionflow.cluster.settings import Place
from lesionflow.errors import ClusterError, LesionflowError, from_exit_code

Object = dict[str, Any]
Objects = list[Object]

POLL = 1.0
"""Seconds between two looks at a job."""
API_PATIENCE = 120.0
"""Seconds the cluster's API may be away while a job is watched: the job itself doesn't need it."""
IDLE_PATIENCE = 120.0
"""Seconds in which an operator must have made a pod, or said why not."""
VERDICT_PATIENCE = 4.0
"""Seconds an operator has to fail a job of which a node ended with a permanent exit code; some never do."""


class Watch:
    """One job until it ends: its logs, its restarts, and what keeps it from starting."""

    def __init__(self, api: Api, place: Place, job: Object, *, patient: bool) -> None:
        self.api, self.place, self.job, self.kind = api, place, job, job["kind"]
        self.name, self._uid = job["metadata"]["name"], job["metadata"]["uid"]
        self.phase = phase_of(job)
        self._patient = patient
        """Whether to wait for ever for a job that can't start, or restarts too often; otherwise it is removed."""
        self._pods: Objects = []
        self._known: dict[str, Object] = {}  # By uid, as last seen: a restarted pod is gone at once.
        self._current: dict[int, str] = {}  # Node -> uid.
        self._restarts: dict[int, int] = {}  # Node -> how often.
        self._last_straw = ""
        self._logs: dict[str, PodLog] = {}
        self._queue: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._ends = PodEnds(api, f"{manifests.selector(place.name)},lesionflow/part=train")
        self._trouble: dict[tuple[str, str], tuple[float, float]] = {}  # First and last seen.
        self._told: set[tuple[str, str]] = set()
        self._answered = self._begun = time.monotonic()

    def lines(self) -> Iterator[str]:
        """Log lines as "[node-0] ..." and notices, until the job has ended and its logs are read."""
        self._ends.start()
        try:
            while True:
                yield from self._look()
                if self.phase in ENDED:
                    break
                yield from self._drain(POLL)
            deadline = time.monotonic() + 5.0
            for uid, log in self._logs.items():
                if ended_of(self._known[uid]):
                    log.join(max(0.0, deadline - time.monotonic()))
            yield from self._drain(0)
        finally:
            self._ends.stop()
            for log in self._logs.values():
                log.stop()

    def _look(self) -> Iterator[str]:
        """One look at the job and its pods."""
        try:
            job = self.api.get(self.kind, self.name)
            pods = pods_of(self.api, job) if job else []
        except ClusterError as error:
            if time.monotonic() - self._answered > API_PATIENCE:
                raise
            yield from self._once(("api", ""), f"{error}; the job goes on, trying again")
            return
        self._answered = time.monotonic()
        self._told.discard(("api", ""))
        if job is None or job["metadata"]["uid"] != self._uid:
            raise ClusterError(
                f"job {self.name} was deleted while it was watched; run again to make it anew, finished work is kept"
            )
        self.job, self._pods, self.phase = {"kind": self.kind, **job}, pods, phase_of(job)
        for pod in pods:
            yield from self._meet(pod)
        if self.phase == "Suspended":
            yield from self._once(("suspended", ""), f"job {self.name} is suspended: it starts once its queue lets it")
        elif self.phase not in ENDED:
            if condemned(pods, manifests.PERMANENT) and self._lasts(("verdict", ""), VERDICT_PATIENCE):
                self.phase = "Failed"
                return
            yield from self._look_for_trouble()

    def _meet(self, pod: Object) -> Iterator[str]:
        uid, node = pod["metadata"]["uid"], node_of(pod)
        if uid not in self._known:
            if (before := self._current.get(node)) is not None:
                # Its end may be told a moment after the new pod; all nodes together wait for that no longer than this.
                deadline = self._answered + 2.0
                if before in self._logs:
                    self._logs[before].join(max(0.0, deadline - time.monotonic()))
                while before not in self._ends.ended and time.monotonic() < deadline:
                    time.sleep(0.05)
                self._known[before] = self._ends.ended.get(before, self._known[before])
                yield from self._drain(0)
                self._restarts[node] = self._restarts.get(node, 0) + 1
                if self._restarts[node] > self.place.settings.job.retries and not self._patient:
                    self.phase = "Failed"  # The Training Operator itself would restart it for ever.
                    self._last_straw = f"node-{node}: {self._how(before)}"
                    return
                yield f"[node-{node}] restarted ({self._how(before)})"
            self._current[node] = uid
        self._known[uid] = pod
        if uid not in self._logs and has_begun(pod):
            log = self._logs[uid] = PodLog(self.api, pod, trainer_of(pod)["name"], self._queue)
            log.start()

    def _look_for_trouble(self) -> Iterator[str]:
        """Say once what keeps pods from starting, and give up on what won't change."""
        idle = [pod for pod in self._pods if "running" not in trainer_of(pod).get("state", {})]
        # A handful stands for all: two hundred pods wait for the same thing.
        waiting = [pod for pod in idle if pod.get("status", {}).get("phase") not in ("Failed", "Succeeded")][:8]
        try:
            owners = missing_owners(self.api, self.job, self._pods)
            causes = find_causes(self.api, waiting, owners) if waiting or owners else []
            images = {} if causes else {node_of(pod): pulling(self.api, pod) for pod in waiting}
        except ClusterError:
            return  # An account that may not read events, or an API that is away: the job goes on.
        if not self._pods and not causes and time.monotonic() - self._begun > IDLE_PATIENCE:
            remedy = "is its operator running? `lesionflow cluster doctor` looks"
            causes = [Cause(self.name, f"no pod was made in {IDLE_PATIENCE:.0f} s, and nothing says why", remedy, 0)]
        for node, image in images.items():
            if image:
                yield from self._once((image, ""), f"[node-{node}] pulls image {image}")
        for cause in causes:
            # What the cluster says varies from look to look (counts, back-offs), the remedy doesn't.
            which = (cause.about, cause.remedy)
            yield from self._once(which, cause.text)
            if self._lasts(which, cause.patience) and not self._patient:
                self.api.delete(self.kind, self.name)
                waited = time.monotonic() - self._begun
                raise ClusterError(f"{cause.text} (given up after {waited:.0f} s; job {self.name} was removed)")

    def _once(self, which: tuple[str, str], text: str) -> Iterator[str]:
        if which not in self._told:
            self._told.add(which)
            yield text

    def _lasts(self, which: tuple[str, str], patience: float) -> bool:
        """Whether a trouble has been there that long; one that was away for ten seconds begins anew."""
        now = time.monotonic()
        first, last = self._trouble.get(which, (now, now))
        first = first if now - last < 10 else now
        self._trouble[which] = (first, now)
        return now - first >= patience

    def _drain(self, seconds: float) -> Iterator[str]:
        deadline = time.monotonic() + seconds
        with contextlib.suppress(queue.Empty):
            while True:
                left = deadline - time.monotonic()
                yield self._queue.get(timeout=left) if left > 0 else self._queue.get_nowait()

    def _how(self, uid: str) -> str:
        """How a pod ended that was restarted, in a few words."""
        ended = ended_of(self._known[uid])
        if (cause := cause_of(self.api, self._known[uid])) is not None:
            return cause.what
        if not ended:
            # The pod was gone before its end was seen; the Training Operator has told it in an event.
            told: list[str] = []
            with contextlib.suppress(ClusterError):
                told = [e["message"] for e in self.api.events(self.name) if e.get("reason") == "ExitedWithCode"]
            pod = re.escape(self._known[uid]["metadata"]["name"])
            codes = [m[1] for text in told if (m := re.search(rf"\.{pod} exited with code (\d+)", text))]
            ended = {"exitCode": codes[-1]} if codes else {}
        said = error_line(ended.get("message", "")) or (self._logs[uid].error if uid in self._logs else "")
        return ": ".join(filter(None, [f"exit code {ended['exitCode']}" if ended else "its pod is gone", said]))

    def failure(self) -> LesionflowError:
        """Why the job failed: the exit code and last words of the node that began it, or what the cluster says."""
        said = [verdict(self.job)]
        if self.kind == "TrainJob":
            said += [verdict(owner) for owner in missing_owners(self.api, self.job, []) if owner["kind"] == "Job"]
        message = " ".join(s.get("reason", "") + " " + s.get("message", "") for s in said).strip()
        if "deadline" in message.lower():
            limit = self.place.settings.job.deadline
            return ClusterError(
                f"job {self.name} ran longer than job.deadline allows ({limit} s): raise it (0: none) and run again, "
                "finished work is kept"
            )
        self._known = {uid: self._ends.ended.get(uid, pod) for uid, pod in self._known.items()}
        failed = condemned(self._pods) or condemned([self._known[uid] for uid in self._current.values()])
        failed = failed or condemned(list(self._known.values()))[-1:]
        if not failed and self._last_straw:
            retries = self.place.settings.job.retries
            return ClusterError(
                f"job {self.name} had to restart more than {retries} times (job.retries), at last {self._last_straw}"
            )
        if not failed:
            why = explain(self.api, self._pods, missing_owners(self.api, self.job, self._pods))
            return ClusterError(f"job {self.name} failed: {why or message or 'the cluster does not say why'}")
        pod, code = failed[0], int(ended_of(failed[0])["exitCode"])
        if (cause := cause_of(self.api, pod)) is not None:
            return ClusterError(f"node-{node_of(pod)} of job {self.name}: {cause.text}")
        text = f"{self._last_words(pod)} (node-{node_of(pod)} of job {self.name}, exit code {code})"
        if code not in manifests.PERMANENT:
            text += f"; given up after {self.place.settings.job.retries} restarts (job.retries)"
        return from_exit_code(code, text)

    def _last_words(self, pod: Object) -> str:
        """The program's own "error: ..." line, else the end of its log."""
        uid, message = pod["metadata"]["uid"], ended_of(pod).get("message", "")
        if line := error_line(message) or (self._logs[uid].error if uid in self._logs else ""):
            return line
        text = message or self.api.tail(pod["metadata"]["name"], 20, container=trainer_of(pod)["name"])
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return error_line(text) or " | ".join(lines[-3:]) or "it left no word"
