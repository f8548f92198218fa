"""Training jobs of both kinds, run by the double as real processes: made, joined, followed, failed, removed."""

from __future__ import annotations

import os
import queue
import signal
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from double.controller import Controller
from double.server import Double

from lesionflow.cluster import jobs, jobstate, manifests, watch
from lesionflow.cluster.api import Api
from lesionflow.cluster.podlogs import PodLog
from lesionflow.cluster.settings import Place, Settings
from lesionflow.errors import (
    ClusterError,
    DataError,
    GateRefused,
    LesionflowError,
    Preempted,
    UsageError,
)

KEY, OTHER = "a" * 32, "b" * 32
LAST = "if rank == 0: time.sleep(1)"
"""Once the master is done, the Training Operator stops the workers, whatever they do."""
RANK = "rank = int(os.environ.get('PET_NODE_RANK') or os.environ['RANK'])"


@dataclass
class Cluster:
    double: Double
    api: Api
    controller: Controller
    folder: Path
    kind: str
    number: int = 0

    def place(self, **job):
        """A run of its own on the shared cluster."""
        self.number += 1
        settings = {"launcher": "auto", "retries": 3, **job}
        place = Place(f"run{self.number}", Settings.from_dict({"job": settings}))
        for claim in manifests.claims(place):
            self.api.create(claim)
        return place


SLOW = pytest.mark.slow
EACH = pytest.mark.parametrize("cluster", ["kubeflow-1.8", "kubeflow-1.11"], indirect=True)
OLDER = pytest.mark.parametrize("cluster", ["kubeflow-1.8", pytest.param("kubeflow-1.11", marks=SLOW)], indirect=True)
NEWER = pytest.mark.parametrize("cluster", [pytest.param("kubeflow-1.8", marks=SLOW), "kubeflow-1.11"], indirect=True)


@pytest.fixture(scope="module")
def cluster(request, crds, tmp_path_factory):
    """A cluster that runs jobs: PyTorchJobs in the older one, TrainJobs in the newer."""
    folder = tmp_path_factory.mktemp("jobs")
    with Double(request.param, crds) as double, pytest.MonkeyPatch.context() as patch:
        patch.setenv("KUBECONFIG", str(double.kubeconfig(folder / "kubeconfig")))
        patch.setattr(watch, "POLL", 0.1)
        kind = "PyTorchJob" if request.param == "kubeflow-1.8" else "TrainJob"
        if kind == "PyTorchJob":  # That operator restarts for ever and fails nothing.
            patch.setattr(watch, "VERDICT_PATIENCE", 1.0)
        with Controller(double, netns=False, grace=3.0) as controller:
            yield Cluster(double, Api.connect(Settings()), controller, folder, kind)


@pytest.fixture(autouse=True)
def healed(request):
    yield
    if "cluster" in request.fixturenames:
        cluster = request.getfixturevalue("cluster")
        cluster.controller.heal()
        cluster.double.faults.clear()


def python(body):
    """A container's command that runs these lines of Python."""
    return ["python", "-u", "-c", f"import os, sys, time\n{RANK}\n{body}"]


class Running:
    """`train` in a thread: its lines, and the error it ended with."""

    def __init__(self, cluster, place, command, key=KEY):
        self.lines, self.error = [], None
        self._thread = threading.Thread(target=self._run, args=(cluster.api, place, key, command), daemon=True)
        self._thread.start()

    def _run(self, *arguments):
        try:
            jobs.train(*arguments, tell=self.lines.append)
        except Exception as error:
            self.error = error

    def until(self, text, timeout=15.0):
        deadline = time.monotonic() + timeout
        while not any(text in line for line in self.lines):
            assert time.monotonic() < deadline, f"no {text!r} in {self.lines}"
            assert self._thread.is_alive() or any(text in line for line in self.lines), (self.lines, self.error)
            time.sleep(0.05)

    def join(self, timeout=30.0):
        self._thread.join(timeout)
        assert not self._thread.is_alive(), self.lines
        if self.error:
            raise self.error
        return self.lines


def of_node(lines, node):
    return [line.removeprefix(f"[node-{node}] ") for line in lines if line.startswith(f"[node-{node}] ")]


def uid(cluster, place, key=KEY):
    job = cluster.api.get(cluster.kind, place.job_name(key))
    return job and job["metadata"]["uid"]


def pod_of(cluster, place, node):
    job = {"kind": cluster.kind, **cluster.api.get(cluster.kind, place.job_name(KEY))}
    return next(p["metadata"]["name"] for p in jobstate.pods_of(cluster.api, job) if jobstate.node_of(p) == node)


@EACH
def test_every_nodes_log_is_told_and_the_state_is_the_same_for_both_kinds(cluster):
    place = cluster.place(nodes=3)
    lines = []
    jobs.train(cluster.api, place, KEY, python(f"for n in range(3): print('line', n)\n{LAST}"), tell=lines.append)
    assert lines[0] == f"made {cluster.kind} {place.job_name(KEY)}"
    for node in range(3):
        assert of_node(lines, node) == ["line 0", "line 1", "line 2"]
    (state,) = jobs.states(cluster.api, place)
    assert (state.phase, state.nodes, state.ready, state.restarts) == ("Succeeded", 3, 3, 0)
    assert state.kind == cluster.kind and state.started <= state.ended and state.reason == ""
    assert cluster.api.get("NetworkPolicy", f"{place.name}-train") is not None


@EACH
@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (3, DataError),
        *(
            pytest.param(code, kind, marks=SLOW)
            for code, kind in ((1, LesionflowError), (2, UsageError), (4, GateRefused), (5, ClusterError))
        ),
    ],
)
def test_a_failing_node_ends_the_job_with_its_own_code_and_words(cluster, code, kind):
    place = cluster.place()
    body = f"print('working')\nif rank == 1: print('error: row 7 is bad'); sys.exit({code})\ntime.sleep(60)"
    start = time.monotonic()
    with pytest.raises(LesionflowError) as caught:
        jobs.train(cluster.api, place, KEY, python(body), tell=lambda line: None)
    assert time.monotonic() - start < 10
    assert type(caught.value) is kind
    name = place.job_name(KEY)
    assert str(caught.value) == f"row 7 is bad (node-1 of job {name}, exit code {code})"


@OLDER
def test_a_crash_without_a_word_quotes_the_end_of_its_log(cluster):
    place = cluster.place()
    with pytest.raises(LesionflowError, match=r"ZeroDivisionError: division by zero \(node-\d of job"):
        jobs.train(cluster.api, place, KEY, python("1 / 0"), tell=lambda line: None)


@EACH
def test_a_preempted_node_restarts_and_says_why(cluster):
    place = cluster.place()
    body = (
        f"flag = os.path.join({str(cluster.folder)!r}, '{place.name}-')\n"
        "first = not os.path.exists(flag + str(rank))\nopen(flag + str(rank), 'w').close()\n"
        "print('first' if first else 'second')\n"
        "if rank == 1 and first: time.sleep(0.5); print('error: preempted after a clean save'); sys.exit(143)\n"
        "if rank == 1: open(flag + 'done', 'w').close()\n"
        f"while not os.path.exists(flag + 'done'): time.sleep(0.1)\n{LAST}"
    )
    lines = []
    jobs.train(cluster.api, place, KEY, python(body), tell=lines.append)
    told = of_node(lines, 1)
    assert "restarted (exit code 143: preempted after a clean save)" in told, lines
    assert told.index("first") < told.index("restarted (exit code 143: preempted after a clean save)")
    assert told[-1] == "second" and told.count("second") == told.count("first") == 1
    (state,) = jobs.states(cluster.api, place)
    assert (state.phase, state.restarts) == ("Succeeded", 1)


@NEWER
def test_a_killed_node_comes_back(cluster):
    place = cluster.place()
    flag = cluster.folder / f"{place.name}-go"
    body = f"print('up')\nwhile not os.path.exists({str(flag)!r}): time.sleep(0.1)\nprint('done')"
    body += "\n" + LAST
    running = Running(cluster, place, python(body))
    running.until("[node-1] up")
    running.until("[node-0] up")
    cluster.controller.kill("team", pod_of(cluster, place, 1))
    running.until("[node-1] restarted (exit code 137)")
    flag.touch()
    lines = running.join()
    assert of_node(lines, 1)[-2:] == ["up", "done"] and of_node(lines, 0)[-1] == "done"


@EACH
def test_restarts_end_somewhere(cluster):
    place = cluster.place(retries=1)
    running = Running(cluster, place, python("time.sleep(1); print('error: told to stop'); sys.exit(143)"))
    with pytest.raises(Preempted, match=r"told to stop \(node-\d of .* given up after 1 restarts \(job.retries\)"):
        running.join()
    assert sum("[node-1] restarted" in line for line in running.lines) == 1
    assert cluster.kind == "TrainJob" or uid(cluster, place) is None, "this operator would restart it for ever"


@EACH
def test_a_second_call_joins_and_a_changed_job_is_left_running(cluster):
    place = cluster.place()
    flag = cluster.folder / f"{place.name}-go"
    command = python(f"print('up')\nwhile not os.path.exists({str(flag)!r}): time.sleep(0.1)")
    first = Running(cluster, place, command)
    first.until("[node-1] up")
    before = uid(cluster, place)
    second = Running(cluster, place, command)
    second.until("[node-1] up")
    third = Running(cluster, place, [*command, "--processes", "2"])
    third.until("keeps the settings it was made with")
    flag.touch()
    first.join(), second.join(), third.join()
    assert second.lines[0].startswith(f"joined job {place.job_name(KEY)} (")
    assert uid(cluster, place) == before
    assert of_node(second.lines, 0) == of_node(first.lines, 0) == ["up"], "a joined log begins at its beginning"


@OLDER
def test_an_ended_job_is_made_anew_and_another_recipes_is_stopped(cluster):
    place = cluster.place()
    jobs.train(cluster.api, place, KEY, python("print('once')"), tell=lambda line: None)
    before = uid(cluster, place)
    lines = []
    jobs.train(cluster.api, place, KEY, python("print('twice')"), tell=lines.append)
    assert "ended (Succeeded) and its work isn't done: made anew" in lines[0] and "[node-0] twice" in lines
    assert uid(cluster, place) not in (before, None)
    old = Running(cluster, place, python("print('up')\ntime.sleep(60)"), OTHER)
    old.until("[node-0] up")
    jobs.train(cluster.api, place, KEY, python("print('mine')"), tell=lines.append)
    assert any("trains something else in the same run: stopped" in line for line in lines)
    with pytest.raises(ClusterError, match="was deleted while it was watched"):
        old.join()
    assert uid(cluster, place, OTHER) is None


@NEWER
def test_a_job_is_made_anew_with_settings_that_its_runtime_cannot_change(cluster):
    place = cluster.place(retries=1)
    jobs.train(cluster.api, place, KEY, python("print('once')"), tell=lambda line: None)
    place = replace(place, settings=replace(place.settings, job=replace(place.settings.job, retries=2)))
    lines = []
    jobs.train(cluster.api, place, KEY, python("print('twice')"), tell=lines.append)
    assert "[node-0] twice" in lines


@OLDER
def test_a_job_that_waits_is_made_anew_with_changed_settings(cluster):
    place = cluster.place()
    cluster.controller.fail_scheduling(match=place.name)
    waiting = Running(cluster, place, python("print('old')"))
    waiting.until("no node can take it")
    before = uid(cluster, place)
    cluster.controller.heal()
    cluster.controller.fail_scheduling(match=place.name)
    changed = Running(cluster, place, python("print('new')"))
    changed.until("has not begun, and the settings changed: made anew")
    changed.until("made " + cluster.kind)
    cluster.controller.heal()
    assert "[node-0] new" in changed.join() and uid(cluster, place) != before
    with pytest.raises(ClusterError, match="deleted"):
        waiting.join()


PLANTED = {
    "image": (lambda c, run: c.fail_image_pull(match=run), ["there is no image", "image.train"]),
    "scheduling": (lambda c, run: c.fail_scheduling(match=run), ["1 Insufficient nvidia.com/gpu", "job.gpus"]),
    "quota": (lambda c, run: c.exceed_quota(match=run), ["exceeded quota: kf-resource-quota", "ask for less"]),
    "security": (lambda c, run: c.enforce_pod_security(match=run), ["violates PodSecurity", "security level"]),
    "claim": (lambda c, run: c.pend_claims(match=run, storage_class="fast"), ['"fast" not found', "storage_class"]),
}


@NEWER
@pytest.mark.parametrize("name", [n if n in ("image", "quota") else pytest.param(n, marks=SLOW) for n in PLANTED])
def test_a_job_that_cannot_start_says_why_at_once_and_is_given_up(cluster, name, monkeypatch):
    plant, words = PLANTED[name]
    monkeypatch.setattr(watch, "find_causes", impatient(watch.find_causes, 1.2))
    run = f"run{cluster.number + 1}"
    plant(cluster.controller, run)
    place = cluster.place()
    start = time.monotonic()
    lines = []
    with pytest.raises(ClusterError) as caught:
        jobs.train(cluster.api, place, KEY, python("print('up')"), tell=lines.append)
    assert 1 < time.monotonic() - start < 10
    for word in words:
        assert word in str(caught.value), str(caught.value)
    assert "job run" in str(caught.value) and "was removed" in str(caught.value)
    told = [line for line in lines if words[0] in line]
    assert 1 <= len(told) == len({line.split(":")[0] for line in told}), "once each"
    assert uid(cluster, place) is None


def impatient(find, seconds):
    return lambda *arguments: [replace(c, patience=min(c.patience, seconds)) for c in find(*arguments)]


@NEWER
def test_a_cause_that_goes_away_is_forgiven(cluster, monkeypatch):
    monkeypatch.setattr(watch, "find_causes", impatient(watch.find_causes, 8))
    place = cluster.place()
    cluster.controller.fail_scheduling("1 Insufficient cpu", match=place.name)
    running = Running(cluster, place, python("print('up')"))
    running.until("1 Insufficient cpu")
    assert jobs.states(cluster.api, place)[0].phase == "Created"
    assert "1 Insufficient cpu" in jobs.states(cluster.api, place)[0].reason
    cluster.controller.heal()
    assert "[node-0] up" in running.join()


@OLDER
def test_a_job_deleted_under_its_watcher_is_noticed(cluster):
    place = cluster.place()
    running = Running(cluster, place, python("print('up')\ntime.sleep(60)"))
    running.until("[node-0] up")
    start = time.monotonic()
    cluster.api.delete(cluster.kind, place.job_name(KEY))
    with pytest.raises(ClusterError, match=r"was deleted .* run again"):
        running.join()
    assert time.monotonic() - start < 3


@OLDER
def test_broken_log_connections_lose_and_double_nothing(cluster):
    place = cluster.place()
    # More than what is read again after a break: else no connection would come any further.
    cluster.double.faults["cut_logs"] = 25
    body = "for n in range(45):\n    print('line', n, rank)\n    time.sleep(0.1)\n" + LAST
    lines = []
    jobs.train(cluster.api, place, KEY, python(body), tell=lines.append)
    for node in (0, 1):
        assert of_node(lines, node) == [f"line {n} {node}" for n in range(45)]


@NEWER
def test_an_api_that_is_away_for_a_while_stops_nothing(cluster):
    place = cluster.place()
    flag = cluster.folder / f"{place.name}-go"
    running = Running(cluster, place, python(f"while not os.path.exists({str(flag)!r}): time.sleep(0.1)\nprint('end')"))
    running.until("made")
    time.sleep(1)
    cluster.double.faults["status"] = 503
    running.until("trying again")
    flag.touch()
    time.sleep(1)
    cluster.double.faults.clear()
    assert "[node-0] end" in running.join()


@OLDER
def test_an_account_that_may_not_read_events_still_trains(cluster):
    place = cluster.place()
    cluster.double.faults["deny"] = {("list", "events")}
    cluster.controller.pend_claims(match=place.name)
    cluster.controller.fail_scheduling(match=place.name)
    running = Running(cluster, place, python("print('up')"))
    running.until("made")
    time.sleep(0.5)
    cluster.controller.heal()
    assert "[node-0] up" in running.join()


@NEWER
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_whoever_stops_watching_leaves_the_job_running(cluster, number):
    place = cluster.place()
    lines = []
    before = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # A shell has what runs in its background ignore it.

    def tell(line):
        lines.append(line)
        if line == "[node-0] up":
            os.kill(os.getpid(), number)

    expected = Preempted if number == signal.SIGTERM else KeyboardInterrupt
    with pytest.raises(expected) as caught:
        jobs.train(cluster.api, place, KEY, python("print('up')\ntime.sleep(60)"), tell=tell)
    said = str(caught.value) if number == signal.SIGTERM else lines[-1]
    assert "the job goes on" in said and f"lesionflow cluster clean {place.name} --yes" in said
    assert signal.getsignal(signal.SIGTERM) is before
    assert jobs.states(cluster.api, place)[0].phase in ("Created", "Running")
    cluster.api.delete(cluster.kind, place.job_name(KEY))


@OLDER
def test_following_shows_the_newest_job_from_its_beginning(cluster):
    place = cluster.place()
    with pytest.raises(ClusterError, match="no training job"):
        list(jobs.follow(cluster.api, place))
    jobs.train(cluster.api, place, OTHER, python("print('old')"), tell=lambda line: None)
    time.sleep(1.1)  # Kubernetes counts a job's age in seconds.
    with pytest.raises(DataError):
        jobs.train(cluster.api, place, KEY, python("print('error: new'); sys.exit(3)"), tell=lambda line: None)
    if cluster.kind == "TrainJob":
        lines = list(jobs.follow(cluster.api, place))
        assert "[node-0] error: new" in lines or "[node-1] error: new" in lines
        assert not any("old" in line for line in lines)
        assert lines[-1].startswith(f"job {place.job_name(KEY)}: Failed: new (node-")
    else:  # This operator never failed the job, so it was removed.
        assert "[node-0] old" in list(jobs.follow(cluster.api, place))


@NEWER
def test_the_probe_sees_both_nodes_and_leaves_nothing(cluster):
    place = cluster.place()
    found = jobs.probe(cluster.api, place, timeout=60)
    assert found["volumes"] == ["data", "logs", "models"] and found["seconds"] < 60
    assert [(n["node"], n["nodes"]) for n in found["nodes"]] == [(0, 2), (1, 2)]
    assert all(n["torch"] and n["gpus"] == [] for n in found["nodes"])
    assert left(cluster, place) == {"PersistentVolumeClaim"}
    for claim in ("data", "logs", "models"):
        assert not list(cluster.controller.claim("team", place.claim(claim)).iterdir())


@NEWER
def test_a_probe_that_fails_says_why_and_leaves_nothing(cluster, monkeypatch):
    place = Place(f"run{cluster.number + 1}", Settings())
    cluster.number += 1
    monkeypatch.setattr("lesionflow.cluster.probe.STUCK", 1.0)
    cluster.controller.fail_scheduling("1 Insufficient cpu", match=place.name)
    start = time.monotonic()
    with pytest.raises(ClusterError, match=r"probe job failed: .*1 Insufficient cpu"):
        jobs.probe(cluster.api, place, timeout=60)
    assert time.monotonic() - start < 10
    assert left(cluster, place) == set()


def left(cluster, place):
    kinds = ("Pod", "PyTorchJob", "TrainJob", "TrainingRuntime", "NetworkPolicy", "PersistentVolumeClaim", "Secret")
    return {kind for kind in kinds if cluster.api.list(kind, manifests.selector(place.name))}


# Without jobs.


@pytest.mark.parametrize(
    ("double", "missing", "asked", "found"),
    [
        ("kubeflow-1.11", set(), "auto", "trainjob"),
        ("trainer-2.3", set(), "auto", "trainjob"),
        ("kubeflow-1.8", set(), "auto", "pytorchjob"),
        ("kubeflow-1.11", {"TrainJob"}, "auto", "pytorchjob"),
        ("kubeflow-1.11", set(), "pytorchjob", "pytorchjob"),
        ("kubeflow-1.11", set(), "local", "local"),
        ("kubeflow-1.8", set(), "trainjob", "job.launcher is trainjob.* set job.launcher to auto or pytorchjob"),
        ("kubeflow-1.11", {"TrainJob", "PyTorchJob"}, "auto", "neither TrainJob nor PyTorchJob.*administrator"),
        ("kubeflow-1.11", {"TrainJob", "PyTorchJob"}, "trainjob", "ask its administrator"),
    ],
    indirect=["double"],
)
def test_the_launcher_is_what_the_cluster_has(double, api, missing, asked, found):
    double.faults["missing_kinds"] = missing
    settings = Settings.from_dict({"job": {"launcher": asked}})
    if " " not in found:
        assert jobs.launcher(api, settings) == found
    else:
        with pytest.raises(ClusterError, match=found):
            jobs.launcher(api, settings)


def test_a_job_replaced_by_another_of_its_name_is_not_taken_for_it(double, api):
    place = Place("first", Settings())
    make = manifests.train_job(place, "first-aaaaaaaa", ["python"])
    seen = watch.Watch(api, place, {"kind": "TrainJob", **api.create(make)}, patient=False)
    double.store.delete("TrainJob", "team", "first-aaaaaaaa")
    api.create(make)
    with pytest.raises(ClusterError, match="was deleted while it was watched"):
        list(seen.lines())


def test_an_operator_that_makes_nothing_is_noticed(double, api, monkeypatch):
    monkeypatch.setattr(watch, "POLL", 0.1)
    monkeypatch.setattr(watch, "IDLE_PATIENCE", 0.3)
    lines = []
    with pytest.raises(ClusterError, match=r"no pod was made .* is its operator running"):
        jobs.train(api, Place("first", Settings()), KEY, ["python"], tell=lines.append)
    assert lines[0].startswith("made TrainJob") and api.list("TrainJob") == []


def test_a_suspended_job_is_waited_for(double, api, monkeypatch):
    monkeypatch.setattr(watch, "POLL", 0.1)
    monkeypatch.setattr(watch, "IDLE_PATIENCE", 0.3)
    place = Place("first", Settings())
    lines = []

    def status(kind):
        now = "2026-01-01T00:00:00Z"
        condition = {"type": kind, "status": "True", "reason": kind, "message": "", "lastTransitionTime": now}
        double.store.set_status("TrainJob", "team", place.job_name(KEY), {"conditions": [condition]})

    def tell(line):
        lines.append(line)
        if line.startswith("made"):
            status("Suspended")
            threading.Timer(1.0, status, ["Complete"]).start()

    jobs.train(api, place, KEY, ["python"], tell=tell)
    assert sum("is suspended" in line for line in lines) == 1


def test_nobody_makes_a_job_for_a_local_launcher(api):
    place = Place("first", Settings.from_dict({"job": {"launcher": "local"}}))
    with pytest.raises(UsageError, match="without a job"):
        jobs.train(api, place, KEY, ["python"])


def test_the_likeliest_cause_comes_first():
    def pod(node, code, at, reason="Error"):
        ended = {"exitCode": code, "finishedAt": f"2026-01-01T00:00:{at:02}Z", "reason": reason}
        labels = {"training.kubeflow.org/replica-type": "worker", "training.kubeflow.org/replica-index": str(node - 1)}
        status = {"containerStatuses": [{"name": "pytorch", "state": {"terminated": ended}}]}
        return {"metadata": {"labels": labels}, "status": status}

    def order(*pods):
        return [jobstate.node_of(p) for p in jobstate.condemned(list(pods))]

    assert order(pod(1, 1, 5), pod(2, 1, 3)) == [2, 1]
    assert order(pod(1, 1, 3), pod(2, 3, 5)) == [2, 1], "a broken connection may end its node first"
    assert order(pod(1, 143, 1), pod(2, 1, 5)) == [2, 1]
    assert order(pod(1, 1, 1), pod(2, 137, 5, "OOMKilled")) == [2, 1]
    assert order(pod(1, 0, 1), pod(2, 143, 5)) == [2]


class Tape:
    """A log endpoint that plays prepared streams; the last one ends with its container."""

    def __init__(self, *streams, uids=(), ended=False):
        self.streams, self.uids, self.ended, self.since = list(streams), list(uids), ended, []

    def logs(self, name, *, container, since):
        self.since.append(since)
        for line in self.streams.pop(0):
            if line is None:
                raise ConnectionResetError
            yield line

    def get(self, kind, name):
        found = self.uids.pop(0) if self.uids else "1"
        ended = {"terminated": {"exitCode": 0}} if self.ended or not self.streams else {}
        statuses = [{"name": "node", "state": ended}]
        return {"metadata": {"name": name, "uid": found}, "status": {"containerStatuses": statuses}}


def played(tape):
    lines = queue.SimpleQueue()
    log = PodLog(tape, {"metadata": {"name": "pod", "uid": "1"}}, "node", lines)
    log.start()
    log.join(10)
    assert not log.is_alive()
    return [lines.get() for _ in range(lines.qsize())]


def test_a_log_is_whole_whatever_its_connections_do():
    def at(seconds, text, zone="Z"):
        return f"2026-01-01T00:00:{seconds:012.9f}{zone} {text}"

    # Equal times and texts, and a line of the other output that appears after a later one.
    first = [at(1, "a"), at(1, "a"), at(2.5, "b"), None]
    again = [at(1, "a"), at(1, "a"), at(2.4, "late"), at(2.5, "b"), at(2.5, "b"), at(9, "c"), None]
    last = [at(9, "c"), at(9.1, "")]
    tape = Tape(first, again, last)
    assert played(tape) == [f"[node-0] {text}" for text in ("a", "a", "b", "late", "b", "c", "")]
    assert tape.since == ["", "2026-01-01T00:00:01Z", "2026-01-01T00:00:08Z"]
    # A node in another time zone, whose kubelet also speaks for itself.
    tape = Tape([at(5, "a", "+02:00"), "failed to watch the file: too many open files"], [at(6, "b", "+02:00")])
    assert played(tape) == ["[node-0] a", "[node-0] b"]
    assert tape.since[1] == "2025-12-31T22:00:04Z"
    # A connection that breaks when the container has ended already.
    assert played(Tape([at(1, "a"), None], [at(1, "a"), at(2, "b")], ended=True)) == ["[node-0] a", "[node-0] b"]
    # A restarted pod of the same name: its lines are for another reader.
    assert played(Tape([at(1, "new")], [], uids=["2", "2"])) == []
