"""A run on a cluster from outside: its objects made, its pipeline submitted and watched to the end.

    api = Api.connect(settings)
    submitted = submit(api, place, recipe, source="kaggle")
    follow(api, place, submitted, tell=print)

Claims and the wheel's secret are made here and not in the pipeline: KFP's volumes in the pipeline are
its own, and a claim must outlive the run that filled it. Doing it again changes nothing.
"""

from __future__ import annotations

import contextlib
import logging
import re
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lesionflow.cluster import jobs, kfp_api, manifests
from lesionflow.cluster.api import Api
from lesionflow.cluster.compile import compile_pipeline
from lesionflow.cluster.settings import Place, Settings
from lesionflow.errors import ClusterError, LesionflowError, UsageError, from_exit_code
from lesionflow.recipe import Recipe
from lesionflow.wheel import file_name, wheel_bytes

SOURCES = ("kaggle", "synthetic")
POLL = 2.0
"""Seconds between two looks at a run."""
PATIENCE = 120.0
"""Seconds the Pipelines API may be away while a run is watched."""
PIPELINE_RUN = "lesionflow/pipeline-run"
"""Annotation of the models claim: the newest pipeline run on it."""
ENDED = ("SUCCEEDED", "FAILED", "CANCELED", "SKIPPED")


@dataclass(frozen=True)
class Submitted:
    """A run that KFP has accepted."""

    id: str
    url: str
    """Its page in KFP's dashboard."""


def submit(
    api: Api,
    place: Place,
    recipe: Recipe,
    *,
    source: str = "kaggle",
    incumbent: str = "",
    clean: bool = False,
) -> Submitted:
    """Make what the run needs and start its pipeline.

    `source` is `kaggle`, `synthetic`, or a path on the data volume where the data set lies already;
    `incumbent` a bundle on the models volume; with `clean` the training job is removed at the end.
    Raises `ClusterError` if the cluster or Kubeflow Pipelines refuses.
    """
    url = kfp_api.endpoint(place.settings)
    if not url:
        raise ClusterError(
            "Kubeflow Pipelines' API isn't known from here: set --on kfp=URL or KFP_ENDPOINT, for instance after "
            "`kubectl -n kubeflow port-forward svc/ml-pipeline 8888:8888` http://localhost:8888"
        )
    health = kfp_api.health(url)
    if health.fault:
        raise ClusterError(f"Kubeflow Pipelines at {url} {health.fault}: `lesionflow cluster doctor` says what to do")
    make_objects(api, place, kaggle=source == "kaggle")
    arguments = {
        "run": place.run,
        "data": data_path(place, source),
        "recipe": recipe.to_toml(),
        "source": source if source in SOURCES else "",
        "name": place.name,
        "settings": place.settings.to_toml(),
        "processes": place.settings.job.processes,
        "incumbent": f"{place.path('models')}/{incumbent}" if incumbent else "",
        "clean": clean,
    }
    # A namespace is refused where KFP isn't multi-user, and needed where it is.
    namespace = api.namespace if health.multi_user else None
    with tempfile.TemporaryDirectory(prefix="lesionflow-") as scratch:
        package = compile_pipeline(place, Path(scratch) / "pipeline.yaml", source=source)
        client = _client(url)
        with _refusals(url):
            made = client.create_run_from_pipeline_package(
                str(package),
                arguments=arguments,
                run_name=f"{place.name}-{time.strftime('%Y%m%d-%H%M%S')}",
                experiment_name=place.settings.experiment,
                namespace=namespace,
                service_account=place.settings.service_account,
            )
    if not place.settings.volumes.models_claim:
        note = {"metadata": {"annotations": {PIPELINE_RUN: made.run_id}}}
        with contextlib.suppress(ClusterError):  # The run is on its way: without the note, `clean` doesn't know it.
            api.patch("PersistentVolumeClaim", place.claim("models"), note)
    return Submitted(made.run_id, f"{url}/#/runs/details/{made.run_id}")


def stop(api: Api, settings: Settings, name: str = "", *, tell: Callable[[str], object] = print) -> None:
    """Terminate a run's pipeline (without a name, every run's) if it still goes, before its volumes are removed.

    A pipeline that can't be asked is named, and nothing more: it may be gone with its Kubeflow.
    """
    claims = api.list("PersistentVolumeClaim", manifests.selector(name))
    noted = {c["metadata"].get("annotations", {}).get(PIPELINE_RUN) for c in claims} - {None}
    if not noted:
        return
    url = kfp_api.endpoint(settings)
    if not url or kfp_api.health(url).fault:
        tell(f"Kubeflow Pipelines can't be asked whether {', '.join(sorted(noted))} still goes")
        return
    client = _client(url)
    for run_id in sorted(noted):
        try:
            if _terminate(api, client, run_id):
                tell(f"terminated the pipeline run {run_id}")
        except Exception as error:  # kfp's client raises its transport's own kinds.
            tell(f"can't say whether the pipeline run {run_id} still goes ({error.__class__.__name__})")


def make_objects(api: Api, place: Place, *, kaggle: bool = False) -> None:
    """Make the claims and the wheel's secret that the pods mount. Raises `ClusterError` for a missing Kaggle token."""
    if kaggle and api.get("Secret", place.settings.kaggle_secret) is None:
        raise ClusterError(
            f"the secret {place.settings.kaggle_secret} with the Kaggle token isn't in namespace {api.namespace}: "
            "`lesionflow cluster secret` makes it"
        )
    for claim in manifests.claims(place):
        # A claim's size and class can't be changed by applying it again.
        if api.get("PersistentVolumeClaim", claim["metadata"]["name"]) is None:
            api.create(claim)
    if not place.settings.image.packaged:
        api.apply(manifests.secret(place, place.wheel_secret, {file_name(): wheel_bytes()}))


def data_path(place: Place, source: str) -> str:
    """Where the data set of a source lies, as pods see it. Raises `UsageError` for a path that leaves the volume."""
    folder = "isic-2024-challenge" if source == "kaggle" else source
    if folder.startswith("/") or ".." in Path(folder).parts or not folder:
        raise UsageError(f"--source {source!r}: kaggle, synthetic, or a folder on the data volume, like isic/2024")
    return f"{place.path('data')}/{folder}"


def follow(api: Api, place: Place, submitted: Submitted, *, tell: Callable[[str], object] = print) -> None:
    """Tell how the run goes, with the lines of its training job, until it has succeeded.

    Raises the error of the step that failed; the run itself goes on when this is interrupted.
    """
    over = threading.Event()
    lines = threading.Thread(target=_tell_job, args=(api, place, tell, over), daemon=True)
    lines.start()
    try:
        run = _watch(place, submitted, tell)
    finally:
        over.set()
        lines.join(POLL)
    if run.state != "SUCCEEDED":
        raise _cause(api, submitted, run)


def _tell_job(api: Api, place: Place, tell: Callable[[str], object], over: threading.Event) -> None:
    """The job's lines once there is one. What goes wrong with it, the step that waits for it says too."""
    earlier: set[str] | None = None
    told = False
    while not told and not over.wait(POLL):
        with contextlib.suppress(LesionflowError):
            if earlier is None:
                earlier = jobs.ended(api, place)
            for line in jobs.follow(api, place, skip=earlier):
                if over.is_set():
                    return
                told = True  # Once: from the beginning again would be worse than to end.
                tell(line)


def _watch(place: Place, submitted: Submitted, tell: Callable[[str], object]) -> Any:
    """Tell the steps' states as they change; the run as KFP has it once it has ended."""
    client = _client(kfp_api.endpoint(place.settings))
    seen: dict[str, str] = {}
    away = 0.0
    while True:
        try:
            run = client.get_run(submitted.id)
        except Exception as error:  # kfp's client raises its transport's own kinds.
            away = away or time.monotonic()
            if time.monotonic() - away > PATIENCE:
                raise ClusterError(
                    f"Kubeflow Pipelines stopped answering ({type(error).__name__}); the run goes on: {submitted.url}"
                ) from None
            time.sleep(POLL)
            continue
        away = 0.0
        for task in getattr(run.run_details, "task_details", None) or ():
            state = str(task.state)
            if task.display_name in STEPS and state != "None" and seen.get(task.display_name) != state:
                seen[task.display_name] = state
                tell(f"{task.display_name}: {state.lower()}")
        if run.state in ENDED:
            return run
        time.sleep(POLL)


STEPS = (
    "install", "fetch", "begin", "prepare", "split", "train", "stack", "evaluate", "gate", "export", "deploy", "smoke",
    "finish",
)  # fmt: skip


def _cause(api: Api, submitted: Submitted, run: Any) -> LesionflowError:
    """What the failed step's pod said last; KFP itself only knows that it failed."""
    for pod in api.list("Pod", f"pipeline/runid={submitted.id}"):
        if pod.get("status", {}).get("phase") != "Failed":
            continue
        name = pod["metadata"]["name"]
        # KFP's launcher ends with 1 whatever the step did: the step's own line has its code.
        if lines := re.findall(r"(?m)^\s*error: (.+) \(exit code (\d+)\)$", api.tail(name, 100, container="main")):
            message, code = lines[-1]
            return from_exit_code(int(code), f"{message} (pod {name}, {submitted.url})")
    known = getattr(getattr(run, "error", None), "message", "") or f"the run ended {run.state}"
    return ClusterError(f"{known}; see {submitted.url}")


def _terminate(api: Api, client: Any, run_id: str) -> bool:
    """End a pipeline run and wait for that; False if it had ended."""

    def ended() -> bool:
        return client.get_run(run_id).state in ENDED

    if ended():
        return False
    client.terminate_run(run_id)
    api.wait(ended, timeout=PATIENCE, what="the pipeline's end", every=0.5)
    return True


def _client(url: str) -> Any:
    import kfp
    from kfp.client import ServiceAccountTokenVolumeCredentials

    logging.getLogger("kfp").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module="kfp")
    # A pod's token is replaced every hour or so: the client reads it again.
    mounted = kfp_api.token_path()
    credentials = ServiceAccountTokenVolumeCredentials(str(mounted)) if mounted.is_file() else None
    return kfp.Client(host=url, credentials=credentials)


@contextlib.contextmanager
def _refusals(url: str) -> Iterator[None]:
    """Turn the client's exceptions into ours, in one line."""
    try:
        yield
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        raise ClusterError(f"Kubeflow Pipelines at {url} refused the run: {text}") from None
