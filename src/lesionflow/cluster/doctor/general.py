"""The doctor's questions about what a cluster is: reachable, recent, a Kubeflow, with which parts.

What the cluster lets this account do is asked in `access`, whether it has room in `capacity`.
"""

from __future__ import annotations

import re
import time
from email.utils import parsedate_to_datetime

from lesionflow.cluster import kfp_api, manifests
from lesionflow.cluster.api import in_cluster
from lesionflow.cluster.doctor.scene import Answer, Scene, Unanswered, together
from lesionflow.cluster.jobstate import KINDS as JOB_KINDS
from lesionflow.errors import ClusterError

OLDEST = (1, 25)
"""Kubernetes below this lacks strict field validation and pod failure policies by default."""


def api(scene: Scene) -> Answer:
    """Version and account: the version alone is often told to strangers too."""
    version = scene.api.version()
    scene.allowed("get", "Pod")
    who = f" as {scene.account}" if scene.account else ""
    host = scene.api.client.configuration.host
    return Answer("ok", f"Kubernetes {version} at {host}{who}, namespace {scene.api.namespace}")


def kubernetes(scene: Scene) -> Answer:
    said = scene.api.version()
    match = re.match(r"v?(\d+)\.(\d+)", said)
    if not match:
        raise Unanswered(f"no version in {said!r}")
    version = int(match[1]), int(match[2])
    if version < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        return Answer(
            "warn",
            f"Kubernetes {said} is older than {oldest}: misspelt fields pass unseen, a hopeless job may be retried",
            f"upgrade the cluster to Kubernetes {oldest} or later; a Kubeflow release names those it was tested with",
        )
    if scene.launcher == "trainjob" and version < (1, 27):
        remedy = "upgrade the cluster, or set job.launcher=pytorchjob"
        return Answer("warn", f"Kubernetes {said} is older than the 1.27 that Trainer wants", remedy)
    return Answer("ok", f"Kubernetes {said}")


def clock(scene: Scene) -> Answer:
    before = time.time()
    said = scene.api.clock()
    try:
        server = parsedate_to_datetime(said).timestamp()
    except ValueError:
        raise Unanswered("the server sends no Date header") from None
    # The header is cut to seconds, and the answer took its time.
    skew = max(before - server - 1, server - time.time(), 0)
    if skew < 30:
        return Answer("ok", "this clock and the server's agree")
    return Answer(
        "fail" if skew > 300 else "warn",
        f"this clock and the server's are {skew:,.0f} s apart: tokens and certificates are refused as expired",
        "set both by NTP (timedatectl set-ntp true), on the cluster's machines too",
    )


def namespace(scene: Scene) -> Answer:
    name = scene.api.namespace
    if not scene.allowed("get", "Namespace"):
        raise Unanswered(f"this account may not look at namespace {name}")
    found = scene.api.get("Namespace", name)
    if found is None:
        return Answer(
            "fail",
            f"there is no namespace {name}",
            "log in to Kubeflow once, which makes your profile, or set namespace to a profile's name",
        )
    if found.get("status", {}).get("phase") == "Terminating":
        return Answer("fail", f"namespace {name} is being deleted", "use another profile, or wait and make it anew")
    labels = found["metadata"].get("labels") or {}
    if labels.get("app.kubernetes.io/part-of") != "kubeflow-profile":
        return Answer(
            "warn",
            f"namespace {name} is no Kubeflow profile: it lacks a profile's accounts, quota and rights",
            "set namespace to your profile's name; with standalone Pipelines, where there are no profiles, also set "
            "service_account=pipeline-runner",
        )
    level = labels.get("pod-security.kubernetes.io/enforce", "none")
    return Answer("ok", f"{name} is a Kubeflow profile; pod security enforced: {level}")


def istio(scene: Scene) -> Answer:
    name = scene.api.namespace
    found = scene.api.get("Namespace", name) if scene.allowed("get", "Namespace") else None
    labels = (found or {}).get("metadata", {}).get("labels") or {}
    if scene.settings.istio:
        return Answer(
            "warn",
            "istio=true keeps a sidecar in the job's pods, and a sidecar may outlive its job: the job then never ends",
            "set istio=false, unless your mesh admits no pod without a sidecar",
        )
    if found is None:
        raise Unanswered(f"this account may not look at namespace {name}")
    if labels.get("istio-injection") == "enabled" or "istio.io/rev" in labels:
        return Answer("ok", "istio puts sidecars into this namespace's pods; the job's pods opt out")
    return Answer("ok", "no sidecars in this namespace")


def kubeflow(scene: Scene) -> Answer:
    """Which release this looks like; no object says so."""
    parts = [kind for kind in (*JOB_KINDS.values(), "InferenceService", "Notebook") if scene.serves(kind)]
    health = scene.pipelines
    version = health.version if health else ""
    if version:
        parts.append(f"Pipelines {version}")
    if not parts:
        return Answer(
            "fail",
            "none of Kubeflow's kinds is here",
            "install Kubeflow (kubeflow.org/docs/started), or set context to the cluster that has it",
        )
    match = re.match(r"v?2\.(\d+)", version)
    minor = int(match[1]) if match else None
    if scene.serves("TrainJob") or (minor or 0) >= 15:
        release = "1.11 or later"
    elif minor is not None:
        release = "1.8" if minor == 0 else "1.9 or 1.10"
    else:
        release = "1.8 to 1.10" if scene.serves("PyTorchJob") else "in parts"
    return Answer("ok", f"looks like Kubeflow {release}: {', '.join(parts)}")


def launcher(scene: Scene) -> Answer:
    named, found = scene.settings.job.launcher, scene.launcher
    if found == "local":
        return Answer(
            "warn",
            "job.launcher=local trains in the pipeline's own pod, on one node",
            "set job.launcher=auto to train distributed",
        )
    if not found:
        return Answer(
            "fail",
            "the cluster has neither TrainJob nor PyTorchJob: nothing can train distributed",
            "install Kubeflow Trainer (kubeflow.org/docs/components/trainer), or set job.launcher=local",
        )
    kind = JOB_KINDS[found]
    if not scene.serves(kind):
        other = next((n for n, k in JOB_KINDS.items() if scene.serves(k)), "local")
        return Answer(
            "fail",
            f"job.launcher={named}, but the cluster has no {kind}",
            f"set job.launcher=auto or {other}, or install what serves {kind}",
        )
    if found == "trainjob" and "jobset.x-k8s.io" not in scene.groups:
        return Answer(
            "fail",
            "Kubeflow Trainer is here, but not JobSet, on which it stands",
            "install JobSet with Trainer's own manifests (kubeflow.org/docs/components/trainer/operator-guides)",
        )
    return Answer("ok", f"trains as {kind}" + (" (auto)" if named == "auto" else "") + _trainer(scene))


def _trainer(scene: Scene) -> str:
    """Which Trainer a TrainJob meets: 2.2 renamed a field. Nothing but a try tells users who may not read CRDs."""
    if scene.launcher != "trainjob" or not scene.allowed("create", "TrainJob"):
        return ""
    tried = manifests.train_job(scene.trial, scene.trial.name, ["true"])
    tried["spec"]["runtimePatches"] = []
    try:
        scene.api.create(tried, dry_run=True)
    except ClusterError as error:
        if "unknown field" in str(error):
            return ", Trainer 2.1 or earlier"
    return ", Trainer 2.2 or later"


def serving(scene: Scene) -> Answer:
    wanted = scene.settings.serving
    if not scene.serves("InferenceService"):
        return Answer(
            "fail", "the cluster has no InferenceService: nothing can be deployed", "install KServe (kserve.github.io)"
        )
    faults = []
    triton = wanted.form == "triton" and scene.allowed("get", "ClusterServingRuntime")
    if triton and scene.api.get("ClusterServingRuntime", "kserve-tritonserver") is None:
        remedy = "install KServe's cluster resources, which bring it, or set serving.form=lesionflow"
        faults.append(Answer("fail", "there is no ClusterServingRuntime kserve-tritonserver", remedy))
    if wanted.mode == "serverless" and "serving.knative.dev" not in scene.groups:
        remedy = "install Knative Serving, or set serving.mode=raw"
        faults.append(Answer("fail", "serving.mode=serverless, but the cluster has no Knative", remedy))
    if wanted.mode == "raw" and (wanted.canary or not wanted.replicas):
        field = "serving.canary" if wanted.canary else "serving.replicas=0"
        remedy = "set serving.mode=serverless, or leave the field at its default"
        faults.append(Answer("warn", f"{field} has no effect with serving.mode=raw", remedy))
    return together(faults, f"KServe is here; serves as {wanted.form}, {wanted.mode}")


def boards(scene: Scene) -> Answer:
    missing = [kind for kind in ("Tensorboard", "Notebook") if not scene.serves(kind)]
    if missing:
        return Answer(
            "warn",
            f"the cluster has no {' and no '.join(missing)}",
            "install Kubeflow's notebooks and tensorboard controllers; meanwhile `lesionflow cluster logs` shows "
            "a run, and tensorboard --logdir its events",
        )
    return Answer("ok", "Tensorboard and Notebook are here")


def pipelines(scene: Scene) -> Answer:
    url, health = kfp_api.endpoint(scene.settings), scene.pipelines
    forward = (
        "kubectl port-forward -n kubeflow svc/ml-pipeline 8888:8888, then set KFP_ENDPOINT=http://localhost:8888; "
        f"in a multi-user Kubeflow also: kubectl create token {scene.settings.service_account} "
        f"-n {scene.api.namespace} --audience pipelines.kubeflow.org, into a file named by KF_PIPELINES_SA_TOKEN_PATH"
    )
    if health is None:
        return Answer("warn", "no address of the Pipelines API is known outside the cluster", forward)
    if not health.fault:
        version = f" {health.version}" if health.version else ""
        return Answer("ok", f"Pipelines{version} answers at {url}" + (", multi-user" if health.multi_user else ""))
    text = f"the Pipelines API at {url} {health.fault}"
    if not in_cluster():
        return Answer("fail", text, forward)
    if health.refused and not kfp_api.token():
        return Answer(
            "fail",
            f"{text}: this pod has no token for it",
            'make the notebook server anew with the configuration "Allow access to Kubeflow Pipelines" (the PodDefault '
            "access-ml-pipeline); where the list lacks it, an administrator adds that PodDefault to the namespace",
        )
    remedy = "see that ml-pipeline runs (kubectl -n kubeflow get deploy ml-pipeline), or set kfp to its address"
    return Answer("fail", text, remedy)
