"""The doctor's questions about what a cluster lets us do: rights, admission, and the objects a run would make.

The objects are tried in strict dry runs, which pass through everything a real one would: unknown
fields, pod security, limits, quota and webhooks. Nothing is stored.
"""

from __future__ import annotations

from typing import Any

from lesionflow.cluster import manifests
from lesionflow.cluster.api import KINDS
from lesionflow.cluster.doctor.scene import Answer, Scene, Unanswered, together
from lesionflow.cluster.jobstate import KINDS as JOB_KINDS
from lesionflow.cluster.secrets import kaggle_fault
from lesionflow.cluster.settings import Image, Place
from lesionflow.errors import ClusterError

PROBE_TIMEOUT = 900.0
"""Seconds for the tiny job: a node that pulls the image for the first time takes minutes."""
_WRITE = ("create", "get", "list", "patch", "delete")
_READ = (("get", "Pod", ""), ("list", "Pod", ""), ("delete", "Pod", ""), ("get", "Pod", "log"), ("list", "Event", ""))


def account(scene: Scene) -> Answer:
    """Whether the account that the pods run as is there."""
    name, namespace = scene.settings.service_account, scene.api.namespace
    if not scene.allowed("get", "ServiceAccount"):
        raise Unanswered("this account may not look at service accounts")
    if scene.api.get("ServiceAccount", name) is None:
        others = ", ".join(a["metadata"]["name"] for a in scene.read("ServiceAccount")) or "none"
        return Answer(
            "fail",
            f"namespace {namespace} has no service account {name}; it has: {others}",
            "set service_account to one of these: default-editor in a profile, pipeline-runner without profiles",
        )
    return Answer("ok", f"pods run as {name}")


def permissions(scene: Scene) -> Answer:
    """Whether this account, and that of the pipeline's pods, may do all that a run, its logs and its clean-up need."""
    kinds = ["NetworkPolicy", "InferenceService"]
    kinds += {"trainjob": ["TrainJob", "TrainingRuntime"], "pytorchjob": ["PyTorchJob"]}.get(scene.launcher, [])
    by_pods = [(verb, kind, "") for kind in kinds if scene.serves(kind) for verb in _WRITE] + list(_READ)
    asked = [(verb, kind, "") for kind in ("PersistentVolumeClaim", "Secret") for verb in _WRITE] + by_pods
    missing = _missing(scene, asked)
    optional = _missing(scene, [(verb, "Tensorboard", "") for verb in _WRITE] if scene.serves("Tensorboard") else [])
    faults = []
    if missing:
        faults.append(Answer("fail", f"this account may not {_list(missing)}", _grant(scene, missing)))
    pods = scene.settings.service_account
    other = scene.account != f"system:serviceaccount:{scene.api.namespace}:{pods}"
    review = "LocalSubjectAccessReview"
    may_ask = other and scene.serves(review) and scene.allowed("create", review)
    # The train step is a pod: a run that an administrator starts stops there for want of its rights.
    if may_ask and (lacking := _missing(scene, by_pods, pods)):
        text = f"the pods' account {pods} may not {_list(lacking)}"
        faults.append(Answer("fail", text, _grant(scene, lacking, pods, role="lesionflow-pods")))
    if optional:
        remedy = (
            f"without it `cluster tensorboard` fails, nothing else; {_grant(scene, optional, role='lesionflow-boards')}"
        )
        faults.append(Answer("warn", f"this account may not {_list(optional)}", remedy))
    return together(faults, f"all {len(asked)} rights that a run needs")


def pod(scene: Scene) -> Answer:
    """Whether the job's pod is admitted: pod security, limits, quota, policies, priority class."""
    if not scene.allowed("create", "Pod"):
        raise Unanswered("this account may not create pods; the job's operator does it later")
    replicas = manifests.pytorch_job(scene.trial, scene.trial.name, ["true"])["spec"]["pytorchReplicaSpecs"]
    template = replicas["Master"]["template"]
    tried = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": scene.trial.name, **template["metadata"]},
        "spec": {"restartPolicy": "Never", **template["spec"]},
    }
    if refusal := _refusal(scene, tried):
        return Answer("fail", f"the job's pod would be refused: {refusal}", _pod_remedy(refusal))
    return Answer("ok", "the job's pod is admitted in a dry run")


def objects(scene: Scene) -> Answer:
    """Whether every other object of a run passes the cluster's schemas and webhooks."""
    place = scene.trial
    tried = [*manifests.claims(place), manifests.secret(place, place.wheel_secret, {"wheel": b"tried"})]
    tried += [manifests.network_policy(place)]
    if scene.launcher == "trainjob":
        tried += [manifests.training_runtime(place, place.name), manifests.train_job(place, place.name, ["true"])]
    elif scene.launcher == "pytorchjob":
        tried += [manifests.pytorch_job(place, place.name, ["true"])]
    tried += [manifests.inference_service(place, name=place.name), manifests.tensorboard(place)]
    # What the cluster doesn't have, or this account may not do, other checks have said.
    tried = [o for o in tried if scene.serves(o["kind"]) and scene.allowed("create", o["kind"])]
    if not tried:
        raise Unanswered("this account may create none of a run's objects")
    faults = [
        Answer("fail", f"{obj['kind']} would be refused: {refusal}", _object_remedy(refusal))
        for obj in tried
        if (refusal := _refusal(scene, obj))
    ]
    return together(faults, f"{', '.join(dict.fromkeys(o['kind'] for o in tried))} pass a strict dry run")


def secret(scene: Scene) -> Answer:
    name = scene.settings.kaggle_secret
    if not scene.allowed("get", "Secret"):
        raise Unanswered("this account may not look at secrets")
    fault = kaggle_fault(scene.api, scene.settings)
    if fault == "missing":
        return Answer(
            "warn",
            f"there is no secret {name} with a Kaggle token",
            "lesionflow cluster secret, unless the data lie on the data claim already",
        )
    if fault:
        return Answer("fail", f"secret {name} can't be used: {fault}", "lesionflow cluster secret makes it right")
    return Answer("ok", f"secret {name} holds a Kaggle token")


def image(scene: Scene) -> Answer:
    """Whether the images can be what the pods take them for; a registry isn't asked."""
    image = scene.settings.image
    faults = []
    if image.packaged and image.train == Image().train:
        remedy = "set image.train to an image built from deploy/, or image.packaged=false"
        faults.append(Answer("fail", f"image.packaged, but {image.train} doesn't hold lesionflow", remedy))
    for field, name in (("train", image.train), ("serve", image.serve)):
        tag = name.rpartition("/")[2].partition(":")[2]
        if name and "@sha256:" not in name and tag in ("", "latest"):
            remedy = f"set image.{field} to a tag or digest that stays: nodes keep old copies of a moving one"
            faults.append(Answer("warn", f"image.{field}={name} may change from one run to the next", remedy))
    if image.pull_secret and scene.allowed("get", "Secret"):
        held = scene.api.get("Secret", image.pull_secret)
        remedy = (
            f"kubectl -n {scene.api.namespace} create secret docker-registry {image.pull_secret} --docker-server=..."
        )
        if held is None:
            faults.append(Answer("fail", f"image.pull_secret: there is no secret {image.pull_secret}", remedy))
        elif held.get("type") not in ("kubernetes.io/dockerconfigjson", "kubernetes.io/dockercfg"):
            text = f"image.pull_secret: secret {image.pull_secret} is of type {held.get('type')}, not a registry login"
            faults.append(Answer("fail", text, f"delete it, then {remedy}"))
    source = "holds lesionflow" if image.packaged else "needs python and torch; lesionflow is installed beside them"
    return together(faults, f"{image.train}: {source}")


def probe(scene: Scene) -> Answer:
    """Two small pods of a real job that find each other: what no look at objects can show."""
    from lesionflow.cluster.jobs import probe

    if scene.launcher not in JOB_KINDS:
        raise Unanswered("no job kind to try")
    place = Place(scene.run, scene.settings) if scene.run else scene.trial
    try:
        found = probe(scene.api, place, timeout=PROBE_TIMEOUT)
    except ClusterError as error:
        return Answer("fail", str(error), "do what it names; the checks above may say more")
    volumes = f", both wrote to {', '.join(found['volumes'])}" if found["volumes"] else ""
    seen = "; ".join(
        f"node-{n['node']}: Python {n['python']}, torch {n['torch'] or 'missing'}, {len(n.get('gpus', []))} GPUs"
        for n in found["nodes"]
    )
    text = f"two pods of a {JOB_KINDS[scene.launcher]} found each other in {found['seconds']} s{volumes}; {seen}"
    if all(n["torch"] for n in found["nodes"]):
        return Answer("ok", text)
    return Answer("fail", text, "set image.train to an image with Python and PyTorch")


def _refusal(scene: Scene, obj: dict[str, Any]) -> str:
    """Why the cluster would refuse the object; empty if it wouldn't, or can't tell."""
    try:
        scene.api.create(obj, dry_run=True)
    except ClusterError as error:
        message = str(error).partition(": ")[2]
        # Trainer's webhook looks for the runtime, which a dry run doesn't leave behind; and a webhook
        # with side effects makes a dry run impossible, which says nothing about the object.
        known = ("must be created before the TrainJob", "does not support dry run")
        return "" if any(text in message for text in known) else message
    return ""


def _pod_remedy(refusal: str) -> str:
    if "PodSecurity" in refusal:
        return (
            "a mutating webhook or the settings (user, image) break the namespace's pod security level; the fields "
            "are named; kubectl label namespace NAME pod-security.kubernetes.io/enforce=baseline loosens it"
        )
    if "PriorityClass" in refusal:
        return "set job.priority_class to one that kubectl get priorityclass lists, or leave it empty"
    return _object_remedy(refusal)


def _object_remedy(refusal: str) -> str:
    if "unknown field" in refusal or "strict decoding" in refusal:
        return "this cluster's version of the kind has other fields: docs/cluster.md lists the versions that fit"
    if "denied the request" in refusal:
        return "ask the owner of the named webhook, or change the setting that it names"
    if "quota" in refusal:
        return "ask for less, remove old runs (lesionflow cluster clean), or have the quota raised"
    return "change the setting that the refusal names; docs/cluster.md says what each object is for"


def _missing(scene: Scene, asked: list[tuple[str, str, str]], pods: str = "") -> dict[str, list[str]]:
    """Resource (as kubectl names it) -> the verbs that this account, or that of the pods, lacks."""
    missing: dict[str, list[str]] = {}
    for verb, kind, subresource in asked:
        if not scene.allowed(verb, kind, subresource, pods=pods):
            version, plural = KINDS[kind]
            group = f".{version.partition('/')[0]}" if "/" in version else ""
            name = f"{plural}{group}" + (f"/{subresource}" if subresource else "")
            missing.setdefault(name, []).append(verb)
    return missing


def _list(missing: dict[str, list[str]]) -> str:
    return "; ".join(f"{', '.join(verbs)} {resource}" for resource, verbs in missing.items())


def _grant(scene: Scene, missing: dict[str, list[str]], pods: str = "", *, role: str = "lesionflow") -> str:
    """The commands by which an administrator gives what is missing, or another way."""
    namespace = scene.api.namespace
    _, _, service = scene.account.partition("system:serviceaccount:")
    if scene.account and not service and not pods:
        whom = f"--user={scene.account}"
    else:
        own = service if service and not pods else f"{namespace}:{scene.settings.service_account}"
        whom = f"--serviceaccount={own}"
    verbs = ",".join(v for v in _WRITE if any(v in held for held in missing.values()))
    rights = f"create role {role} --verb={verbs} --resource={','.join(missing)}"
    binding = f"create rolebinding {role} --role={role} {whom}"
    remedy = f"an administrator runs: kubectl -n {namespace} {rights} && kubectl -n {namespace} {binding}"
    # Kubeflow 1.11's profile roles let users read TrainingRuntimes, but not make their own.
    if scene.launcher == "trainjob" and scene.serves("PyTorchJob") and "trainer.kubeflow.org" in " ".join(missing):
        remedy += "; or set job.launcher=pytorchjob"
    return remedy
