"""The InferenceService of a run: put a new model up, prove it, and let it replace the old one, or not.

    deployed = deploy(api, place, run, tell=print)      # writes RUN/deploy.json
    steps.smoke(run, deployed["url"])                   # raises if an answer is off
    settle(api, place, run, passed=True)                # promote, or False: roll back

A new model never takes the old one's place before `settle`. There are four ways up:

    first      nothing was there: the service itself; rolling back deletes it
    same       this very version is there already: at most its resources change
    canary     serverless, serving.canary > 0: a new revision gets that share, and is asked by its own address
    candidate  otherwise: a second service, NAME-candidate; the one that serves is not touched

With Triton it is always a candidate: KServe splits predictor and transformer separately, so a canary's
transformer would meet the old predictor.

Ready alone doesn't say which model answers: raw mode keeps it True all through a roll-out, and KServe's
observedGeneration is that of the Deployment beneath, not the service's own. So we also ask the service
itself, whose metadata names its bundle, and wait for the right one.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lesionflow.bundle import Bundle
from lesionflow.cluster import manifests
from lesionflow.cluster.addresses import (
    newest_is_ready,
    pods_port,
    predictor_status,
    revision_url,
    served_bundle,
    service_url,
)
from lesionflow.cluster.api import Api
from lesionflow.cluster.explain import find_causes
from lesionflow.cluster.settings import Place
from lesionflow.cluster.staging import prune, stage
from lesionflow.errors import ClusterError, DataError
from lesionflow.keys import write_json

Object = dict[str, Any]

KIND = "InferenceService"
BUNDLE, PREVIOUS = "lesionflow/bundle", "lesionflow/previous"
"""Annotations: the bundle that is served, and the service as it was before (spec and bundle, as JSON).

KServe copies annotations to its pods, so a changed one means new pods: they change with the spec or not at all."""
REACH = 60.0
"""Seconds after Ready in which the address must answer at all."""
PATIENCE = 8.0
"""Seconds a failed load must last: KServe reports the one before for a moment."""


def deploy(api: Api, place: Place, run: Path, *, tell: Callable[[str], None] = print) -> Object:
    """Put the run's bundle up and wait until it answers; returns, and writes to RUN/deploy.json:

    `url` to ask the new model at, `kind` "kserve", `name` of the service, `form`, `mode`, `way` (see above),
    `canary` (percent), `candidate` (name), `bundle` (version), `outcome` (None until `settle`).

    Raises `ClusterError` with the cause if it doesn't get ready; what was there serves on then.
    """
    serving = place.settings.serving
    folder = stage(place, run)
    bundle = Bundle.open(folder / "bundle")
    live = api.get(KIND, serving.name)
    way = _way(place, live, folder.name)
    wanted = _wanted(place, folder.name, bundle.version)
    if way == "candidate":
        wanted["metadata"]["name"] = f"{serving.name}-candidate"
    elif way == "canary":
        assert live is not None
        wanted["spec"]["predictor"]["canaryTrafficPercent"] = serving.canary
        wanted["metadata"]["annotations"][PREVIOUS] = _previous(live)
    elif live is not None and (previous := live["metadata"]["annotations"].get(PREVIOUS)):
        wanted["metadata"]["annotations"][PREVIOUS] = previous
    name = wanted["metadata"]["name"]
    tell(f"{name}: {serving.mode} {serving.form} service of bundle {bundle.version} ({way})")
    api.apply(wanted)
    try:
        url = _wait(api, place, name, revision_url if way == "canary" else service_url, bundle, tell)
    except ClusterError:
        if way == "candidate":
            api.delete(KIND, name)
        elif way == "canary":
            _restore(api, place)
        raise
    deployed = {
        "url": url,
        "kind": "kserve",
        "name": serving.name,
        "form": serving.form,
        "mode": serving.mode,
        "way": way,
        "canary": serving.canary if way == "canary" else 0,
        "candidate": name if way == "candidate" else "",
        "bundle": bundle.version,
        "version": folder.name,
        "outcome": None,
    }
    write_json(run / "deploy.json", deployed)
    return deployed


def settle(
    api: Api, place: Place, run: Path, passed: bool, *, tell: Callable[[str], None] = lambda text: None
) -> Object:
    """Promote what `deploy` put up if it `passed` the smoke test, else roll back; returns the new deploy.json.

    `outcome` is then "promoted", "rolled back" (the old model serves on) or "removed" (there was none), and `url`
    is the service's own. Raises `ClusterError` if a promoted model doesn't get ready; the old one is put back then.
    """
    deployed = _read(run)
    if deployed["outcome"] is not None:
        return deployed
    name, way = deployed["name"], deployed["way"]
    if passed:
        bundle = Bundle.open(run / "serving" / deployed["version"] / "bundle")
        if way == "canary":
            api.patch(KIND, name, {"spec": {"predictor": {"canaryTrafficPercent": None}}})
            deployed["url"] = _wait(api, place, name, service_url, bundle, tell)
        elif way == "candidate":
            deployed["url"] = _replace(api, place, deployed, bundle, tell)
        deployed["outcome"] = "promoted"
    elif way == "first":
        _delete(api, name)
        deployed |= {"outcome": "removed", "url": ""}
    else:
        if way == "canary":
            _restore(api, place)
        elif way == "candidate":
            _delete(api, deployed["candidate"])
        deployed |= {"outcome": "rolled back", "url": service_url(api.get(KIND, name) or {}) or ""}
    tell(f"{name}: {deployed['outcome']}")
    write_json(run / "deploy.json", deployed)
    prune(run, json.dumps([api.get(KIND, name) for name in _names(place)]))
    return deployed


def undeploy(api: Api, place: Place) -> list[str]:
    """Delete the run's services and wait until they are gone; returns their names. Other runs' stay."""
    mine = [o["metadata"]["name"] for o in api.list(KIND, manifests.selector(place.name))]
    found = [name for name in _names(place) if name in mine]
    for name in found:
        _delete(api, name)
    return found


def _way(place: Place, live: Object | None, version: str) -> str:
    serving = place.settings.serving
    if live is None:
        return "first"
    if live["metadata"].get("labels", {}).get(manifests.MANAGED_BY) != "lesionflow":
        raise ClusterError(
            f"InferenceService {serving.name}: exists, and lesionflow didn't make it: choose another serving.name"
        )
    if (
        f"{place.claim('models')}/{place.run_in_claim}/serving/{version}" in json.dumps(live["spec"])
        and "canaryTrafficPercent" not in live["spec"]["predictor"]
    ):
        return "same"
    split = serving.mode == "serverless" and serving.canary and serving.form == "lesionflow"
    return "canary" if split and _is_serverless(live["metadata"].get("annotations", {})) else "candidate"


def _is_serverless(annotations: Object) -> bool:
    return annotations.get("serving.kserve.io/deploymentMode") in ("Serverless", "Knative")


def _wanted(place: Place, version: str, bundle: str) -> Object:
    """The service in full, without a split of the traffic."""
    made = manifests.inference_service(place, version=version)
    made["spec"]["predictor"].pop("canaryTrafficPercent", None)
    made["metadata"]["annotations"][BUNDLE] = bundle
    return made


def _previous(live: Object) -> str:
    """What to go back to. A canary that was never settled doesn't count: what it would have replaced does."""
    annotations = live["metadata"].get("annotations", {})
    if "canaryTrafficPercent" in live["spec"]["predictor"] and PREVIOUS in annotations:
        return str(annotations[PREVIOUS])
    metadata = live["metadata"]
    kept = {k: v for k, v in annotations.items() if k.startswith(("serving.kserve.io/", "sidecar.")) or k == BUNDLE}
    return json.dumps({"labels": metadata.get("labels", {}), "annotations": kept, "spec": live["spec"]})


def _restore(api: Api, place: Place) -> None:
    """Bring the service before the last change back: at once out of the traffic, then in the spec."""
    name = place.settings.serving.name
    live = api.get(KIND, name) or {}
    text = live.get("metadata", {}).get("annotations", {}).get(PREVIOUS)
    if not text:
        raise ClusterError(f"{name}: nothing is known of what it served before: deploy the run you want")
    old = json.loads(text)
    restored = {"apiVersion": live["apiVersion"], "kind": KIND, "metadata": {"name": name}, "spec": old["spec"]}
    restored["metadata"] |= {"labels": old["labels"], "annotations": old["annotations"]}
    if _is_serverless(old["annotations"]):
        # Without the 0, "the latest revision that is ready" would be the refused one until the restored one is.
        bad = predictor_status(live).get("latestCreatedRevision")
        old["spec"]["predictor"]["canaryTrafficPercent"] = 0

        def back() -> bool:
            found = api.get(KIND, name) or {}
            return newest_is_ready(found) and predictor_status(found)["latestCreatedRevision"] != bad

        api.apply(restored)
        api.wait(back, timeout=place.settings.serving.timeout, what=f"{name}: going back to the old model")
        api.patch(KIND, name, {"spec": {"predictor": {"canaryTrafficPercent": None}}})
    else:
        api.apply(restored)


def _replace(api: Api, place: Place, deployed: Object, bundle: Bundle, tell: Callable[[str], None]) -> str:
    """Give a proven candidate's spec to the service itself; the old pods serve until the new ones are ready."""
    name = deployed["name"]
    wanted = _wanted(place, deployed["version"], bundle.version)
    live = api.get(KIND, name)
    if live is not None:
        wanted["metadata"]["annotations"][PREVIOUS] = _previous(live)
    api.apply(wanted)
    try:
        url = _wait(api, place, name, service_url, bundle, tell)
    except ClusterError:
        if live is not None:
            _restore(api, place)
        raise
    _delete(api, deployed["candidate"])
    return url


def _wait(
    api: Api,
    place: Place,
    name: str,
    url_of: Callable[[Object], str | None],
    bundle: Bundle,
    tell: Callable[[str], None],
) -> str:
    """Wait until the service is ready and answers with this bundle; returns its URL."""
    begun, first_seen = time.monotonic(), dict[str, float]()
    timeout = place.settings.serving.timeout
    answered = False
    while True:
        now = time.monotonic()
        live = api.get(KIND, name)
        if live is None:
            raise ClusterError(f"{name}: somebody deleted it while it was waited for: deploy again")
        url = url_of(live) if _condition(live, "Ready").get("status") == "True" else None
        found = "not ready"
        if url:
            served, found = served_bundle(url, bundle.name)
            if served == bundle.version:
                return url
            if served is None and (direct := pods_port(url)):
                # A headless service's name leads to the pods themselves, which listen elsewhere.
                served, found = served_bundle(direct, bundle.name)
                if served == bundle.version:
                    return direct
            answered = answered or served is not None
            if not answered and now - first_seen.setdefault("", now) > REACH:
                raise ClusterError(
                    f"{name}: ready, but {url} can't be reached from here ({found}): run this inside the cluster (in a "
                    "notebook or the pipeline), or make the ingress serve that name to this machine"
                )
        causes = _causes(api, name, live)
        for text, patience in causes:
            if text not in first_seen:
                first_seen[text] = now
                tell(f"{name}: waiting: {text}")
            elif now - first_seen[text] > patience:
                raise ClusterError(f"{name}: doesn't get ready: {text}")
        if now - begun > timeout:
            why = "; ".join(text for text, _ in causes) or _conditions(live) or found
            raise ClusterError(f"{name}: not ready after {timeout} s: {why}")
        time.sleep(0.5)


def _causes(api: Api, name: str, live: Object) -> list[tuple[str, float]]:
    """What keeps a service from getting ready, and for how many seconds each may last."""
    model = (live.get("status") or {}).get("modelStatus") or {}
    found = []
    if model.get("transitionStatus") in ("InvalidSpec", "BlockedByFailedLoad"):
        failure = model.get("lastFailureInfo") or {}
        message = " ".join(str(failure.get("message", "")).split())[-500:]
        found.append((": ".join(filter(None, [failure.get("reason") or "the model didn't load", message])), PATIENCE))
    pods = api.list("Pod", f"serving.kserve.io/inferenceservice={name}")
    found += [(cause.text, cause.patience) for cause in find_causes(api, pods)]
    return found


def _condition(live: Object, kind: str) -> Object:
    conditions = (live.get("status") or {}).get("conditions") or []
    return next((c for c in conditions if c["type"] == kind), {})


def _conditions(live: Object) -> str:
    """The conditions that aren't met, in a line."""
    unmet = [c for c in (live.get("status") or {}).get("conditions") or [] if c["status"] != "True"]
    texts = (" ".join(filter(None, [c["type"], c.get("reason", ""), c.get("message", "")])) for c in unmet)
    return "; ".join(dict.fromkeys(texts))


def _delete(api: Api, name: str) -> None:
    api.delete(KIND, name)
    api.wait(lambda: api.get(KIND, name) is None, timeout=120, what=f"deleting InferenceService {name}")


def _names(place: Place) -> tuple[str, str]:
    name = place.settings.serving.name
    return name, f"{name}-candidate"


def _read(run: Path) -> Object:
    try:
        return dict(json.loads((run / "deploy.json").read_text()))
    except FileNotFoundError:
        raise DataError(f"{run}: nothing was deployed from it (no deploy.json): deploy it first") from None
