"""Where the Kubeflow Pipelines API is, and whether it lets us in: asked without its client, which retries for long.

Inside a Kubeflow notebook the pod needs a token made for Pipelines, beside its account's own; the
notebook has it if "Allow access to Kubeflow Pipelines" was chosen when it was made.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lesionflow.cluster.api import in_cluster
from lesionflow.cluster.settings import Settings

IN_CLUSTER = "http://ml-pipeline.kubeflow:8888"
VARIABLES = ("KFP_ENDPOINT", "KF_PIPELINES_ENDPOINT")
TIMEOUT = 10.0
"""Seconds a question may take."""
_TOKEN = "/var/run/secrets/kubeflow/pipelines/token"  # noqa: S105 - where a notebook finds it


@dataclass(frozen=True)
class Health:
    """What the API answered."""

    fault: str = ""
    """Why it can't be used; empty if it can."""
    refused: bool = False
    """It is there, but doesn't let this account in."""
    version: str = ""
    """As it calls itself; empty for servers that don't say."""
    multi_user: bool = False


def endpoint(settings: Settings) -> str:
    """The API's URL: the settings', the environment's, or the usual one inside a cluster; empty if unknown."""
    named = settings.kfp or next(filter(None, (os.environ.get(name) for name in VARIABLES)), "")
    if named and "://" not in named:
        named = f"https://{named}"
    return (named or (IN_CLUSTER if in_cluster() else "")).rstrip("/")


def token_path() -> Path:
    """Where this pod's token for Pipelines lies, if it has one."""
    return Path(os.environ.get("KF_PIPELINES_SA_TOKEN_PATH") or _TOKEN)


def token() -> str:
    """This pod's token for Pipelines; empty if it has none."""
    path = token_path()
    return path.read_text().strip() if path.is_file() else ""


def health(url: str) -> Health:
    """Ask the API at `url` how it is. Never raises: a fault is an answer."""
    from urllib3 import PoolManager, Timeout
    from urllib3.exceptions import HTTPError

    held = token()
    headers = {"Accept": "application/json"} | ({"Authorization": f"Bearer {held}"} if held else {})
    version = ""
    said: dict[str, Any] = {}
    with PoolManager(timeout=Timeout(TIMEOUT), retries=False, headers=headers) as pool:
        # The newer path first; only the older one says its version in some releases.
        for path in ("/apis/v2beta1/healthz", "/apis/v1beta1/healthz"):
            try:
                response = pool.request("GET", url + path, redirect=False)
            except (HTTPError, ValueError) as error:
                return Health(f"doesn't answer ({type(error).__name__})")
            answer = _json(response.data)
            if response.status == 200 and answer is not None:
                said = said or answer
                version = version or str(answer.get("tag_name") or "")
            elif not said:
                return _fault(response.status, response.data)
            if version:
                break
    return Health(version="" if version == "unknown" else version, multi_user=bool(said.get("multi_user")))


def _fault(status: int, body: bytes) -> Health:
    if status in (401, 403):
        return Health(f"refuses this account ({status})", refused=True)
    if status in (301, 302, 303, 307, 308) or body.lstrip()[:1] == b"<":
        return Health(f"answers with a login page ({status})", refused=True)
    return Health(f"answers {status}, not as the Pipelines API does")


def _json(body: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(body)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
