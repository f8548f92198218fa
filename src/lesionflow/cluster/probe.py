"""A tiny two-pod job that shows whether training could run: for the doctor.

It takes the road of a real job (image, operator, volumes, network policy, security) with a few lines of
Python that need no package: the pods find each other by the operator's environment, exchange a token
both ways, and each reads from every volume what the other wrote.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import secrets
import time
from typing import Any

from lesionflow.cluster import manifests
from lesionflow.cluster.api import Api
from lesionflow.cluster.explain import explain, find_causes
from lesionflow.cluster.jobstate import (
    ENDED,
    KINDS,
    condemned,
    create_job,
    ended_of,
    error_line,
    has_begun,
    launcher,
    missing_owners,
    node_of,
    phase_of,
    pods_of,
    trainer_of,
    verdict,
)
from lesionflow.cluster.settings import Place
from lesionflow.errors import ClusterError, UsageError

Object = dict[str, Any]

PROBE = "-probe"
"""What the run's name is followed by in the names of what the probe makes."""
STUCK = 60.0
"""Seconds a cause may keep the pods from starting: a doctor answers sooner than a job gives up."""
_MARK = "lesionflow-probe "

_SCRIPT = """
import importlib, json, os, socket, sys, time
token, limit, volumes = sys.argv[1], float(sys.argv[2]), sys.argv[3:]
get = os.environ.get
host = get("PET_MASTER_ADDR") or get("MASTER_ADDR") or ""
port = int(get("PET_MASTER_PORT") or get("MASTER_PORT") or 29500)
node = int(get("PET_NODE_RANK") or get("RANK") or 0)
nodes = int((get("PET_NNODES") or get("WORLD_SIZE") or "1").split(":")[-1])
deadline = time.monotonic() + limit
seen = {"node": node, "nodes": nodes, "host": socket.gethostname(), "python": sys.version.split()[0]}

def fail(text):
    print("error: " + text, flush=True)
    sys.exit(5)

def name(volume, of):
    return os.path.join(volume, ".lesionflow-probe-%s-%d" % (token, of))

def write():
    for volume in volumes:
        try:
            with open(name(volume, node), "w") as file:
                file.write(token)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            fail("volume %s is not writable: %s" % (volume, error))

def read(of):
    # Shared file systems show another node's file after a moment.
    for volume in volumes:
        while True:
            try:
                os.listdir(volume)
                with open(name(volume, of)) as file:
                    if file.read() == token:
                        break
            except OSError:
                pass
            if time.monotonic() > deadline:
                fail("volume %s does not show what node-%d wrote into it" % (volume, of))
            time.sleep(0.2)

def say(connection, text):
    connection.sendall((token + " " + text + "\\n").encode())

def hear(lines, text):
    line = lines.readline().strip()
    if line != token + " " + text:
        fail("the other node says %r instead of %r" % (line[-40:], text))

def main():
    if nodes != 2:
        fail("the operator's environment tells of %d nodes instead of 2" % nodes)
    write()
    start = time.monotonic()
    if node == 0:
        server = socket.create_server(("", port))
        server.settimeout(limit)
        connection, _ = server.accept()
    else:
        while True:
            try:
                connection = socket.create_connection((host, port), timeout=5)
                break
            except OSError as error:
                if time.monotonic() > deadline:
                    fail("node-0 can't be reached at %s:%d: %s" % (host, port, error))
                time.sleep(0.2)
    connection.settimeout(limit)
    seen["waited"] = round(time.monotonic() - start, 2)
    lines = connection.makefile()
    say(connection, "hello from %d" % node)
    hear(lines, "hello from %d" % (1 - node))
    read(1 - node)
    say(connection, "read")
    hear(lines, "read")
    for package in ("torch", "lesionflow"):
        try:
            seen[package] = importlib.import_module(package).__version__
        except Exception:
            seen[package] = None
    if seen["torch"]:
        import torch
        seen["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]

try:
    main()
except socket.timeout:
    fail("the other node did not come within %.0f s" % limit)
finally:
    for volume in volumes:
        try:
            os.remove(name(volume, node))
        except OSError:
            pass
print("lesionflow-probe " + json.dumps(seen), flush=True)
"""


def probe(api: Api, place: Place, *, timeout: float = 600.0) -> dict[str, Any]:
    """Run the tiny job and return what it saw; everything it made is removed, also after a failure.

    The answer: `seconds` until it was done, `launcher`, `volumes` (those that exist and both pods can use) and
    `nodes`, one mapping each with node, host, python, torch and lesionflow (versions or None), gpus (names, if
    torch is there) and waited (seconds until the other was found). `timeout` (seconds) includes pulling the image.
    Raises `ClusterError` with the cause.
    """
    chosen = launcher(api, place.settings)
    if chosen == "local":
        raise UsageError("job.launcher is local: there is no job to try")
    kind, name = KINDS[chosen], place.name + PROBE
    volumes = [v for v in manifests.VOLUMES if api.get("PersistentVolumeClaim", place.claim(v)) is not None]
    small = _small(place, timeout)
    token = secrets.token_hex(8)
    command = ["python", "-c", _SCRIPT, token, str(int(timeout)), *(place.path(v) for v in volumes)]
    make = manifests.train_job if kind == "TrainJob" else manifests.pytorch_job
    made = [manifests.network_policy(place)] if api.get("NetworkPolicy", f"{place.name}-train") is None else []
    made += [manifests.training_runtime(small, name)] if kind == "TrainJob" else []
    made += [make(small, name, command)]
    for obj in made:
        _mount_only(obj, volumes)
    start = time.monotonic()
    _remove(api, made)
    try:
        for obj in made:
            create_job(api, obj)
        nodes = _await(api, kind, name, timeout)
        seconds = round(time.monotonic() - start, 1)
    finally:
        _remove(api, made)
    return {"seconds": seconds, "launcher": chosen, "volumes": volumes, "nodes": nodes}


def _small(place: Place, timeout: float) -> Place:
    """The same place with a job that asks for next to nothing, but for a GPU if the real one wants any."""
    job = dataclasses.replace(
        place.settings.job,
        nodes=2,
        processes=1,
        gpus=min(1, place.settings.job.gpus),
        cpu="500m",
        memory="1Gi",
        shm="64Mi",
        retries=0,
        ttl=300,
        deadline=int(timeout) + 60,
    )
    return Place(place.name, dataclasses.replace(place.settings, job=job))


def _mount_only(obj: Object, volumes: list[str]) -> None:
    """Take the claims that don't exist yet out of every pod template of an object."""
    absent = set(manifests.VOLUMES) - set(volumes)
    if "containers" in obj:
        obj["volumes"] = [v for v in obj["volumes"] if v["name"] not in absent]
        for container in obj["containers"]:
            container["volumeMounts"] = [m for m in container["volumeMounts"] if m["name"] not in absent]
        return
    for value in obj.values():
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, dict):
                _mount_only(part, volumes)


def _await(api: Api, kind: str, name: str, timeout: float) -> list[Object]:
    """What each node saw, once both are done."""
    deadline, first_seen = time.monotonic() + timeout, dict[str, float]()
    while True:
        job = api.get(kind, name)
        if job is None:
            raise ClusterError(f"the probe {name} was deleted while it ran")
        job = {"kind": kind, **job}
        pods = pods_of(api, job)
        done = len(pods) == 2 and all(ended_of(pod).get("exitCode") == 0 for pod in pods)
        if done and (seen := [_seen(api, pod) for pod in pods]) and all(seen):
            return seen
        failed = condemned(pods)
        waiting = [pod for pod in pods if not has_begun(pod)]
        owners = missing_owners(api, job, pods)
        causes = find_causes(api, waiting, owners) if waiting or owners else []
        given_up = any(
            time.monotonic() - first_seen.setdefault(c.remedy, time.monotonic()) > min(c.patience, STUCK)
            for c in causes
        )
        if failed or given_up or (phase_of(job) in ENDED and not done) or time.monotonic() > deadline:
            why = explain(api, pods, missing_owners(api, job, pods))
            if not why and failed:
                text = _log(api, failed[0])
                said = error_line(text) or (text.splitlines() or ["it left no word"])[-1]
                why = f"node-{node_of(failed[0])}: {said}"
            why = why or verdict(job).get("message", "") or f"not done after {timeout:.0f} s ({len(pods)} of 2 pods)"
            raise ClusterError(f"the probe job failed: {why}")
        time.sleep(0.5)


def _seen(api: Api, pod: Object) -> Object:
    lines = [line for line in _log(api, pod).splitlines() if line.startswith(_MARK)]
    return dict(json.loads(lines[-1].removeprefix(_MARK))) if lines else {}


def _log(api: Api, pod: Object) -> str:
    return api.tail(pod["metadata"]["name"], 20, container=trainer_of(pod)["name"])


def _remove(api: Api, made: list[Object]) -> None:
    """Remove what the probe makes, the job first, and wait until its pods are gone."""
    job = made[-1]
    for obj in reversed(made):
        with contextlib.suppress(ClusterError):
            api.delete(obj["kind"], obj["metadata"]["name"])
    api.wait(
        lambda: not pods_of(api, job) and all(api.get(o["kind"], o["metadata"]["name"]) is None for o in made),
        timeout=120,
        what=f"removing the probe {job['metadata']['name']} (`lesionflow cluster clean` removes what is left)",
    )
