"""The distributed training job: made or joined, watched to its end, and its failure's cause named.

    train(api, place, key, [place.python, "-m", "lesionflow", "train", "--out", place.run])

The key names the job: a second call for the same work joins the job that runs, another recipe's call
stops it. Whoever only watches can leave at any time; the job goes on in the cluster.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Container, Iterator, Sequence
from types import FrameType
from typing import Any, Never

from lesionflow.cluster import manifests
from lesionflow.cluster.api import Api
from lesionflow.cluster.jobstate import (
    ENDED,
    KINDS,
    JobState,
    create_job,
    has_begun,
    launcher,
    phase_of,
    pods_of,
    states,
)
from lesionflow.cluster.probe import PROBE, probe
from lesionflow.cluster.settings import Place
from lesionflow.cluster.watch import Watch
from lesionflow.errors import ClusterError, Preempted, UsageError
from lesionflow.keys import digest

__all__ = ["JobState", "ended", "follow", "launcher", "probe", "remove_ended", "states", "train"]

Object = dict[str, Any]
Objects = list[Object]

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
        watch = Watch(api, place, job, patient=False)
        for line in watch.lines():
            tell(line)
    if watch.phase == "Failed":
        error = watch.failure()
        if phase_of(watch.job) != "Failed":
            api.delete(watch.kind, watch.name)
        raise error


def remove_ended(api: Api, place: Place) -> list[str]:
    """Remove the run's jobs that have ended, with their runtimes, and return their names. One that runs stays."""
    over = [job for job in _jobs(api, place) if phase_of(job) in ENDED]
    for job in over:
        api.delete(job["kind"], job["metadata"]["name"])
        api.delete("TrainingRuntime", job["metadata"]["name"])
    return [f"{job['kind']} {job['metadata']['name']}" for job in over]


def ended(api: Api, place: Place) -> set[str]:
    """The uids of the run's jobs that have ended."""
    return {job["metadata"]["uid"] for job in _jobs(api, place) if phase_of(job) in ENDED}


def follow(api: Api, place: Place, *, skip: Container[str] = ()) -> Iterator[str]:
    """The lines of the run's newest job, from the beginning until it ends; jobs with a uid in `skip` don't count.

    Raises `ClusterError` if there is none.
    """
    jobs = [job for job in _jobs(api, place) if job["metadata"]["name"] != place.name + PROBE]
    jobs = [job for job in jobs if job["metadata"]["uid"] not in skip]
    if not jobs:
        raise ClusterError(f"run {place.name} has no training job here; `lesionflow cluster run` makes one")
    watch = Watch(api, place, jobs[-1], patient=True)
    yield from watch.lines()
    how = f": {watch.failure()}" if watch.phase == "Failed" else ""
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
            if unchanged or any(has_begun(pod) for pod in pods_of(api, job)):
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
        # No job needs the old one any more, and parts of a runtime can't be changed once it is there.
        api.delete("TrainingRuntime", name)
        api.wait(
            lambda: api.get("TrainingRuntime", name) is None, timeout=REMOVAL, what=f"removing the old runtime {name}"
        )
        api.create(runtime)
    made = create_job(api, wanted)
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


@contextlib.contextmanager
def _leaving(place: Place, tell: Callable[[str], object]) -> Iterator[None]:
    """Say what becomes of the job when its watcher is stopped."""
    note = (
        "stopped watching; the job goes on in the cluster: run this again to join it, "
        f"`lesionflow cluster logs {place.name}` shows it, `lesionflow cluster clean {place.name} --yes` stops it"
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
