"""The distributed training job: made or joined, watched to its end, and its failure's cause named.

    train(api, place, key, [place.python, "-m", "lesionflow", "train", "--out", place.run])

The key names the job: a second call for the same work joins the job that runs, another recipe's call
stops it. Whoever only watches can leave at any time; the job goes on in the cluster.
"""

from __future__ import annotations

import contextlib
import queue
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any, Never

from lesionflow.cluster import manifests
from lesionflow.cluster.api import Api
from lesionflow.cluster.explain import Cause, cause_of, explain, find_causes
from lesionflow.cluster.jobstate import (
    ENDED,
    KINDS,
    JobState,
    condemned,
    ended_of,
    launcher,
    missing_owners,
    node_of,
    phase_of,
    pods_of,
    restarts_of,
    states,
    trainer_of,
    verdict,
)
from lesionflow.cluster.podlogs import PodLog
from lesionflow.cluster.probe import PROBE, probe
from lesionflow.cluster.settings import Place
from lesionflow.errors import ClusterError, LesionflowError, Preempted, UsageError, from_exit_code
from lesionflow.keys import digest

__all__ = ["JobState", "follow", "launcher", "probe", "states", "train"]

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
REMOVAL = 240.0
"""Seconds an old job has to go: its pods have 90 to save their work."""
SETTINGS = "lesionflow/settings"
"""Annotation: a hash of what the job was made from."""


def train(api: Api, place: Place, key: str, command: Sequence[str], *, tell: Callable[[str], object] = print) -> None:
    """Run the training job of `key` and return once it succeeded; one that runs already is joined.

    `tell` gets every node's log lines and what happens to the job. Raises the error the job ended with
    (the first failed node's exit code decides its class), and `ClusterError` for a job that can't start,
    was deleted or refused; a job that can't start is removed first. Ctrl-C and SIGTERM (`Preempted`)
    leave the job running.
    """
    chosen = launcher(api, place.settings)
    if chosen == "local":
        raise UsageError("job.launcher is local: training happens in the pipeline's own pod, without a job")
    api.apply(manifests.network_policy(place))
    with _leaving(place, tell):
        job = _join_or_make(api, place, KINDS[chosen], place.job_name(key), command, tell)
        watch = Watch(api, job, patient=False)
        for line in watch.lines():
            tell(line)
    if watch.phase == "Failed":
        error = watch.failure(place)
        if phase_of(watch.job) != "Failed":
            api.delete(watch.kind, watch.name)
        raise error


def follow(api: Api, place: Place) -> Iterator[str]:
    """The lines of the run's newest job, from the beginning until it ends. Raises `ClusterError` if there is none."""
    jobs = [job for job in _jobs(api, place) if job["metadata"]["name"] != place.name + PROBE]
    if not jobs:
        raise ClusterError(f"run {place.name} has no training job here; `lesionflow cluster run` makes one")
    watch = Watch(api, jobs[-1], patient=True)
    yield from watch.lines()
    how = f": {watch.failure(place)}" if watch.phase == "Failed" else ""
    yield f"job {watch.name}: {watch.phase}{how}"


def _join_or_make(
    api: Api, place: Place, kind: str, name: str, command: Sequence[str], tell: Callable[[str], object]
) -> Object:
    """The job to watch: the one that runs, or a new one after everything in its way is gone."""
    make = manifests.train_job if kind == "TrainJob" else manifests.pytorch_job
    wanted, runtime = make(place, name, command), manifests.training_runtime(place, name)
    made_from = digest([wanted, runtime])[:16]
    wanted["metadata"]["annotations"] = {SETTINGS: made_from}
    for job in _jobs(api, place):
        same = (job["kind"], job["metadata"]["name"]) == (kind, name)
        called, phase = f"job {job['metadata']['name']}", phase_of(job)
        if "deletionTimestamp" in job["metadata"]:
            tell(f"{called} is being removed: waiting for that")
        elif same and phase not in ENDED:
            unchanged = job["metadata"].get("annotations", {}).get(SETTINGS) == made_from
            if unchanged or any(_has_begun(pod) for pod in pods_of(api, job)):
                tell(f"joined {called} ({phase})" + ("" if unchanged else "; it keeps the settings it was made with"))
                return job
            tell(f"{called} has not begun, and the settings changed: made anew")
        elif same:
            tell(f"{called} ended ({phase}) and its work isn't done: made anew")
        elif phase in ENDED:
            continue
        else:
            tell(f"{called} trains something else in the same run: stopped")
        _remove(api, job)
    if kind == "TrainJob":
        api.apply(runtime)
    made = api.create(wanted)
    tell(f"made {kind} {name}")
    return {"apiVersion": wanted["apiVersion"], "kind": kind, **made}


def _jobs(api: Api, place: Place) -> Objects:
    jobs = [job for kind in KINDS.values() for job in api.list(kind, manifests.selector(place.name))]
    return sorted(jobs, key=lambda job: str(job["metadata"].get("creationTimestamp", "")))


def _remove(api: Api, job: Object) -> None:
    """Delete a job and wait until its pods are gone too: a new one of its name would take them for its own."""
    kind, name = job["kind"], job["metadata"]["name"]
    api.delete(kind, name)
    api.wait(
        lambda: api.get(kind, name) is None and not pods_of(api, job),
        timeout=REMOVAL,
        what=f"removing job {name} and its pods (`lesionflow cluster clean` says what holds them)",
    )


def _has_begun(pod: Object) -> bool:
    state = trainer_of(pod).get("state", {})
    return "running" in state or "terminated" in state


@contextlib.contextmanager
def _leaving(place: Place, tell: Callable[[str], object]) -> Iterator[None]:
    """Say what becomes of the job when its watcher is stopped."""
    note = (
        "stopped watching; the job goes on in the cluster: run this again to join it, "
        f"`lesionflow cluster logs {place.name}` shows it, `lesionflow cluster clean {place.name} --remove` stops it"
    )

    def stop(signum: int, frame: FrameType | None) -> Never:
        raise Preempted(note)

    previous = None
    with contextlib.suppress(ValueError):  # Not the main thread: signals are the caller's.
        previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt:
        tell(note)
        raise
    finally:
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)


class Watch:
    """One job until it ends: its logs, its restarts, and what keeps it from starting."""

    def __init__(self, api: Api, job: Object, *, patient: bool) -> None:
        self.api, self.job, self.kind = api, job, job["kind"]
        self.name, self._uid = job["metadata"]["name"], job["metadata"]["uid"]
        self.phase = phase_of(job)
        self._patient = patient
        """Whether to wait for ever for a job that can't start; otherwise it is removed."""
        self._pods: Objects = []
        self._known: dict[str, Object] = {}  # By uid, as last seen: a restarted pod is gone at once.
        self._current: dict[int, str] = {}  # Node -> uid.
        self._logs: dict[str, PodLog] = {}
        self._queue: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._trouble: dict[tuple[str, str], tuple[float, float]] = {}  # First and last seen.
        self._told: set[tuple[str, str]] = set()
        self._answered = self._begun = time.monotonic()

    def lines(self) -> Iterator[str]:
        """Log lines as "[node-0] ..." and notices, until the job has ended and its logs are read."""
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
                if before in self._logs:
                    self._logs[before].join(2.0)
                    self._known[before] = (
                        self._logs[before].pod if ended_of(self._logs[before].pod) else self._known[before]
                    )
                yield from self._drain(0)
                yield f"[node-{node}] restarted ({self._how(before)})"
            self._current[node] = uid
        self._known[uid] = pod
        if uid not in self._logs and _has_begun(pod):
            log = self._logs[uid] = PodLog(self.api, pod, trainer_of(pod)["name"], self._queue)
            log.start()

    def _look_for_trouble(self) -> Iterator[str]:
        """Say once what keeps pods from starting, and give up on what won't change."""
        idle = [pod for pod in self._pods if "running" not in trainer_of(pod).get("state", {})]
        # A handful stands for all: two hundred pods wait for the same thing.
        waiting = [pod for pod in idle if pod.get("status", {}).get("phase") not in ("Failed", "Succeeded")][:8]
        owners = missing_owners(self.api, self.job, self._pods)
        causes = find_causes(self.api, waiting, owners) if waiting or owners else []
        if not self._pods and not causes and time.monotonic() - self._begun > IDLE_PATIENCE:
            remedy = "is its operator running? `lesionflow cluster doctor` looks"
            causes = [Cause(self.name, f"no pod was made in {IDLE_PATIENCE:.0f} s, and nothing says why", remedy, 0)]
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
            told = [e["message"] for e in self.api.events(self.name) if e.get("reason") == "ExitedWithCode"]
            pod = re.escape(self._known[uid]["metadata"]["name"])
            codes = [m[1] for text in told if (m := re.search(rf"\.{pod} exited with code (\d+)", text))]
            ended = {"exitCode": codes[-1]} if codes else {}
        said = _error_line(ended.get("message", "")) or (self._logs[uid].error if uid in self._logs else "")
        return ": ".join(filter(None, [f"exit code {ended['exitCode']}" if ended else "its pod is gone", said]))

    def failure(self, place: Place) -> LesionflowError:
        """Why the job failed: the exit code and last words of the node that began it, or what the cluster says."""
        said = [verdict(self.job)]
        if self.kind == "TrainJob":
            said += [verdict(owner) for owner in missing_owners(self.api, self.job, []) if owner["kind"] == "Job"]
        message = " ".join(s.get("reason", "") + " " + s.get("message", "") for s in said).strip()
        if "deadline" in message.lower():
            limit = place.settings.job.deadline
            return ClusterError(
                f"job {self.name} ran longer than job.deadline allows ({limit} s): raise it (0: none) and run again, "
                "finished work is kept"
            )
        failed = condemned(self._pods) or condemned([self._known[uid] for uid in self._current.values()])
        if not failed:
            why = explain(self.api, self._pods, missing_owners(self.api, self.job, self._pods))
            return ClusterError(f"job {self.name} failed: {why or message or 'the cluster does not say why'}")
        pod, code = failed[0], int(ended_of(failed[0])["exitCode"])
        if (cause := cause_of(self.api, pod)) is not None:
            return ClusterError(f"node-{node_of(pod)} of job {self.name}: {cause.text}")
        text = f"{self._last_words(pod)} (node-{node_of(pod)} of job {self.name}, exit code {code})"
        if code not in manifests.PERMANENT:
            text += f"; given up after {restarts_of(self.api, self.job)} restarts (job.retries)"
        return from_exit_code(code, text)

    def _last_words(self, pod: Object) -> str:
        """The program's own "error: ..." line, else the end of its log."""
        uid, message = pod["metadata"]["uid"], ended_of(pod).get("message", "")
        if line := _error_line(message) or (self._logs[uid].error if uid in self._logs else ""):
            return line
        text = message or self.api.tail(pod["metadata"]["name"], 20, container=trainer_of(pod)["name"])
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return _error_line(text) or " | ".join(lines[-3:]) or "it left no word"


def _error_line(text: str) -> str:
    lines = [line.removeprefix("error: ") for line in text.splitlines() if line.startswith("error: ")]
    return lines[-1] if lines else ""
