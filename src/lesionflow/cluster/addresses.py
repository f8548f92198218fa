"""Where a service answers, from inside a cluster and from outside, and which bundle answers there."""

from __future__ import annotations

import http.client
import json
import os
import re
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import quote, urlsplit

from lesionflow.cluster.manifests import PORT

Object = dict[str, Any]

_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""As `lesionflow ask` goes: a proxy for the world outside doesn't know the cluster's names."""


def service_url(live: Object) -> str | None:
    """The address of a service, None while it has none.

    Inside a cluster it is the local one (`status.address`), which needs no ingress, no public name and no
    login; from outside it is `status.url`, which the ingress must serve to you. Older KServe appends a
    prediction's path to the local one, newer ones may put a path of their own before every service's.
    """
    status = live.get("status") or {}
    local, public = (status.get("address") or {}).get("url"), status.get("url")
    url = (local or public) if _inside() else (public or local)
    return re.sub(r"/v[12]/models/[^/]*(:predict|/infer)$", "", url).rstrip("/") if url else None


def revision_url(live: Object) -> str | None:
    """The newest revision's own address, None until it takes requests."""
    part = predictor_status(live)
    for target in part.get("traffic") or []:
        if target.get("latestRevision") and target.get("url") and newest_is_ready(live):
            local = (part.get("address") or {}).get("url")
            if _inside() and local:
                parts = urlsplit(local)
                return f"{parts.scheme}://{target['tag']}-{parts.netloc}"
            return str(target["url"]).rstrip("/")
    return None


def newest_is_ready(live: Object) -> bool:
    """Whether the newest revision of a serverless service is ready."""
    part = predictor_status(live)
    return bool(part.get("latestCreatedRevision")) and part.get("latestCreatedRevision") == part.get(
        "latestReadyRevision"
    )


def predictor_status(live: Object) -> Object:
    """What the status says about the predictor: revisions, traffic, address; empty if nothing yet."""
    return ((live.get("status") or {}).get("components") or {}).get("predictor") or {}


def served_bundle(url: str, model: str) -> tuple[str | None, str]:
    """The version of the bundle behind an address, and that in words.

    The version is "" if something else answers, None if nothing does.
    """
    try:
        with _DIRECT.open(f"{url}/v2/models/{quote(model, safe='')}", timeout=5) as answer:
            version = str(json.load(answer)["parameters"]["bundle"])
            return version, f"{url} answers with bundle {version}"
    except urllib.error.HTTPError as error:
        return "", f"{url} answers {error.code}"
    except (ValueError, KeyError, TypeError):
        return "", f"{url} is no lesionflow service"
    except (OSError, http.client.HTTPException) as error:
        return None, str(getattr(error, "reason", None) or error)


def pods_port(url: str) -> str | None:
    """The same address at the port that our pods listen on; None for one that names a port, or from outside."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}:{PORT}{parts.path}" if _inside() and parts.port is None else None


def _inside() -> bool:
    """Whether this process runs in a pod: Kubernetes gives every one this variable."""
    return "KUBERNETES_SERVICE_HOST" in os.environ
