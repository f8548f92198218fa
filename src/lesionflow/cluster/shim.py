"""What a pipeline component calls: one step, with its outcome reported to whoever started the process.

A failing step ends its process with the exit code of `lesionflow.errors`, which stops the pipeline;
its cause stands in the component's log and in the run's failure.json, for `finish`.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import os
import sys
import tomllib
import traceback
import uuid
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lesionflow import keys, steps
from lesionflow.cluster.manifests import KAGGLE_SECRET
from lesionflow.cluster.settings import Place, Settings
from lesionflow.errors import DataError, GateRefused, LesionflowError, UsageError
from lesionflow.recipe import Recipe
from lesionflow.training.status import report

Tickets = namedtuple("Tickets", ["prepare", "split", "train", "stack", "evaluate", "gate", "export"])

FAILURE = "failure.json"
RECORD = "pipeline.json"
ROC_POINTS = 200

keys.share_files()  # Before anything is written to a volume.


def fetch(run: str, data: str, source: str) -> str:
    """See that the data set is there: from Kaggle, synthetic, or (with no source) what lies there already."""
    with _step(run, "fetch"):
        (Path(run) / FAILURE).unlink(missing_ok=True)
        keys.write_json(Path(run) / RECORD, {"state": "RUNNING", "began": _now()})
        if source == "kaggle":
            from lesionflow.data.fetch import fetch as download

            for held in Path(KAGGLE_SECRET).glob("KAGGLE_*"):
                os.environ[held.name] = held.read_text().strip()
            download(Path(data))
        elif source == "synthetic":
            if not (Path(data) / "truth.json").exists():
                from lesionflow.data.synthetic import synthesize

                synthesize(Path(data), patients=60, lesions=2000, seed=1)
        elif source:
            raise UsageError(f"source {source!r}: not kaggle, synthetic or empty (for data that is there)")
    return source or "there"


def begin(run: str, data: str, recipe: str, incumbent: str = "") -> Any:
    """Write the recipe into the run and return every step's ticket.

    A ticket is the content key and a mark of the work that satisfied it. While that work stands, the
    mark stays the same and KFP may skip the step; once an output is gone or changed it is a new one,
    so that no cache of KFP's outlives the files.
    """
    with _step(run, "begin"):
        planned = steps.begin(
            Path(run),
            Recipe.from_dict(tomllib.loads(recipe)),
            Path(data),
            incumbent=Path(incumbent) if incumbent else None,
        )
        return Tickets(**{step: _ticket(Path(run), step, key) for step, key in planned.items()})


def call(step: str, run: str, ticket: str, **options: Any) -> str:
    """Run one of `steps` under its ticket."""
    with _step(run, step):
        arguments: list[Any] = [Path(run)]
        if "data" in options:
            arguments.append(Path(options.pop("data")))
        getattr(steps, step)(*arguments, _key(ticket), **options)
        _stamp(Path(run), step, ticket)
    return step


def train(run: str, ticket: str, processes: int, name: str, settings: str) -> str:
    """Train here, or as a job on the cluster, which runs `lesionflow train` on the same volume."""
    from lesionflow.progress import TrainingBars

    place = _place(name, settings)
    if place is not None:
        with _step(run, "train"):
            _link_events(Path(run) / "events", Path(place.path("logs")), name)
    if place is None or place.settings.job.launcher == "local":
        with TrainingBars() as bars:
            return call("train", run, ticket, processes=processes, anew=True, show=bars.show)
    from lesionflow.cluster import jobs
    from lesionflow.cluster.api import Api

    with _step(run, "train"):
        if not keys.is_done(Path(run), "train", _key(ticket)):
            # -u: an operator may ask for buffered output, which would keep the log back.
            command = [place.python, "-u", "-m", "lesionflow", "train", "--out", run, "--anew"]
            command += ["--processes", str(place.settings.job.processes)]
            jobs.train(Api.connect(place.settings), place, _key(ticket), command, tell=_tell)
        if not keys.is_done(Path(run), "train", _key(ticket)):
            raise DataError(f"{run}: the job succeeded, but its weights aren't here: does it see the same volume?")
        _stamp(Path(run), "train", ticket)
    return "train"


def evaluate(run: str, ticket: str, metrics: Any, roc: Any) -> str:
    """Evaluate, and hand the figures and the ROC curve to KFP's own pages."""
    done = call("evaluate", run, ticket)
    figures = keys.read_json(Path(run) / "metrics.json")
    for name, value in flat_figures(figures).items():
        metrics.log_metric(name, value)
    roc.log_roc_curve(*_roc(Path(run) / "oof.parquet"))
    return done


def gate(run: str, ticket: str, incumbent: str, report: Any) -> str:
    """The gate; the report becomes KFP's, also when the gate refuses. One of an earlier model never does."""
    written = Path(run) / "report.html"
    before = written.stat().st_mtime_ns if written.exists() else None
    done, refused = "", None
    try:
        done = call("gate", run, ticket, incumbent=Path(incumbent) if incumbent else None)
    except GateRefused as error:
        refused = error
    if written.exists() and (refused is None or written.stat().st_mtime_ns != before):
        Path(report.path).parent.mkdir(parents=True, exist_ok=True)
        Path(report.path).write_text(written.read_text())
    if refused is not None:
        raise refused
    return done


def deploy(run: str, name: str, settings: str) -> str:
    """Serve the bundle here in the background, or as an InferenceService."""
    place = _place(name, settings)
    with _step(run, "deploy"):
        if place is None:
            return str(steps.deploy(Path(run))["url"])
        from lesionflow.cluster import services
        from lesionflow.cluster.api import Api

        keys.require(Path(run), "export")
        return str(services.deploy(Api.connect(place.settings), place, Path(run), tell=_tell)["url"])


def smoke(run: str, name: str, settings: str) -> str:
    """Ask the service about the reference lesions; on a cluster, promote the model or roll it back."""
    place = _place(name, settings)
    with _step(run, "smoke"):
        if place is None:
            steps.smoke(Path(run))
        else:
            _prove(Path(run), place)
        keys.write_json(Path(run) / RECORD, {**_record(Path(run)), "state": "SUCCEEDED"})
    return "smoke"


def finish(run: str, name: str, settings: str, clean: bool) -> str:
    """Record how the pipeline ended in the run's pipeline.json; if asked, remove its training job."""
    folder = Path(run)
    record, failure = _record(folder), None
    # The last step says SUCCEEDED; whatever ended before that, a stop in KFP's page too, has not. A record that
    # was ended already is an earlier pipeline's: this one failed before its first step wrote anything.
    fresh = "ended" not in record
    state = "SUCCEEDED" if fresh and record.get("state") == "SUCCEEDED" else "FAILED"
    if fresh and state == "FAILED" and (folder / FAILURE).exists():
        failure = keys.read_json(folder / FAILURE)
    keys.write_json(folder / RECORD, {**record, "state": state, "ended": _now(), "failure": failure})
    _tell(f"the pipeline ended: {state}" + (f"; {failure['step']}: {failure['message']}" if failure else ""))
    if clean and (place := _place(name, settings)) is not None:
        from lesionflow.cluster import jobs
        from lesionflow.cluster.api import Api

        # One that runs belongs to a newer pipeline of this name.
        for removed in jobs.remove_ended(Api.connect(place.settings), place):
            _tell(f"removed {removed}")
    return state


def flat_figures(metrics: Any, name: str = "") -> dict[str, float]:
    """The figures of metrics.json that KFP can compare between runs: every `value`, and its interval's ends."""
    if not isinstance(metrics, dict):
        return {}
    found: dict[str, float] = {}
    if isinstance(value := metrics.get("value"), int | float):
        found[name] = float(value)
        interval = metrics.get("interval") or {}
        found |= {f"{name}_{end}": interval[end] for end in ("low", "high") if isinstance(interval.get(end), float)}
    for part, entry in metrics.items():
        found |= flat_figures(entry, f"{name}_{part}".strip("_"))
    return {key: figure for key, figure in found.items() if math.isfinite(figure)}


def _roc(oof: Path) -> tuple[list[float], list[float], list[float]]:
    """False and true positive rates and thresholds (the logit's sigmoid), thinned to what a plot shows."""
    import numpy as np
    import polars as pl

    table = pl.read_parquet(oof, columns=["target", "logit"]).sort("logit", descending=True)
    target, logit = table["target"].to_numpy(), table["logit"].to_numpy()
    last = np.flatnonzero(np.append(np.diff(logit) != 0, True))
    true, false = np.cumsum(target)[last], np.cumsum(1 - target)[last]
    kept = np.unique(np.linspace(0, len(last) - 1, ROC_POINTS).astype(int))
    scores = 1 / (1 + np.exp(-logit[last][kept]))
    # KFP wants finite thresholds: the curve's start lies above every score.
    rates = (np.append(0, false[kept] / max(1, false[-1])), np.append(0, true[kept] / max(1, true[-1])))
    return rates[0].tolist(), rates[1].tolist(), np.append(1.0, scores).tolist()


def _prove(run: Path, place: Place) -> None:
    """Ask the new model about its reference lesions; promote it, or roll back."""
    from lesionflow.cluster import services
    from lesionflow.cluster.api import Api

    api = Api.connect(place.settings)
    try:
        steps.smoke(run)
    except LesionflowError:
        services.settle(api, place, run, passed=False)
        raise
    services.settle(api, place, run, passed=True)


def _link_events(events: Path, logs: Path, name: str) -> None:
    """Let the run's curves lie on the logs volume: TensorBoard reads that one alone."""
    if events.is_symlink() and not events.exists():
        events.unlink()  # To another claim, or where it was mounted before.
    if logs.is_dir() and not events.exists():
        (logs / name).mkdir(exist_ok=True)
        events.symlink_to(logs / name)


def _record(run: Path) -> dict[str, Any]:
    return keys.read_json(run / RECORD) if (run / RECORD).exists() else {}


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _ticket(run: Path, step: str, key: str) -> str:
    record = keys.read_record(run, step)
    if record and record.get("ticket") and keys.is_done(run, step, key):
        return str(record["ticket"])
    return f"{key}.{uuid.uuid4().hex[:8]}"


def _key(ticket: str) -> str:
    return ticket.partition(".")[0]


def _stamp(run: Path, step: str, ticket: str) -> None:
    """Note in the step's record which ticket it satisfied."""
    if record := keys.read_record(run, step):
        keys.write_json(run / "steps" / f"{step}.json", {**record, "ticket": ticket})


def _place(name: str, settings: str) -> Place | None:
    return Place(name, Settings.from_dict(tomllib.loads(settings))) if settings else None


@contextlib.contextmanager
def _step(run: str, step: str) -> Iterator[None]:
    """End the process with the error table's exit code if the step fails, its cause written where others look.

    KFP's launcher turns every code into 1, so the line in the log carries it.
    """
    try:
        yield
    except Exception as error:
        code = error.exit_code if isinstance(error, LesionflowError) else 1
        text = str(error) if isinstance(error, LesionflowError) else f"{type(error).__name__}: {error}"
        message = " ".join(text.split())  # One line, for those who look for it in a log.
        with contextlib.suppress(OSError):
            keys.write_json(Path(run) / FAILURE, {"step": step, "exit_code": code, "message": message})
        report(code, message)
        if code == 1:
            traceback.print_exc()
        _tell(f"error: {message} (exit code {code})")
        sys.exit(code)


def _tell(text: str) -> None:
    print(text, flush=True)  # noqa: T201 - the component's log
