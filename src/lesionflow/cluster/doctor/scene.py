"""What the doctor's checks share: the cluster under examination, and the form of an answer.

A check is a function of a `Scene` and returns an `Answer`. It raises `Unanswered` where it may not
look, which is no fault of the cluster: a Kubeflow profile doesn't see nodes, for instance.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

from lesionflow.cluster import kfp_api
from lesionflow.cluster.api import KINDS, Api
from lesionflow.cluster.jobstate import KINDS as JOB_KINDS
from lesionflow.cluster.settings import Place, Settings
from lesionflow.errors import ClusterError

Status = Literal["ok", "warn", "fail", "skip"]


@dataclass(frozen=True)
class Check:
    """One question about a cluster, and its answer."""

    name: str
    """Stable name, for scripts."""
    status: Status
    """`fail`: a run would stop; `warn`: look at it; `skip`: couldn't be answered from here."""
    text: str
    remedy: str = ""


class Answer(NamedTuple):
    """A check without its name."""

    status: Status
    text: str
    remedy: str = ""


class Unanswered(Exception):
    """The question can't be answered from here; says why."""


def together(faults: Sequence[Answer], fine: str) -> Answer:
    """One answer from several findings: the worst of them, every text and remedy; `fine` if there are none."""
    if not faults:
        return Answer("ok", fine)
    status: Status = "fail" if any(f.status == "fail" for f in faults) else "warn"
    remedies = dict.fromkeys(f.remedy for f in faults)
    return Answer(status, "; ".join(f.text for f in faults), "; ".join(remedies))


class Scene:
    """What the checks look at: a cluster, the settings, and what was already read, so that nothing is asked twice."""

    def __init__(self, api: Api, settings: Settings, run: str = "") -> None:
        self.api = api
        self.settings = settings
        self.run = run
        self.trial = Place(f"doctor-{secrets.token_hex(3)}", settings)
        """A run that doesn't exist, for objects that are only tried."""
        self._lists: dict[str, list[dict[str, Any]]] = {}
        self._served: dict[str, bool] = {}
        self._allowed: dict[tuple[str, str, str, str], bool] = {}

    def read(self, kind: str) -> list[dict[str, Any]]:
        """All objects of a kind. Raises `Unanswered` if this account may not list them."""
        if kind not in self._lists:
            if not self.allowed("list", kind):
                raise Unanswered(f"this account may not list {KINDS[kind][1]}, as is usual in a Kubeflow profile")
            self._lists[kind] = self.api.list(kind)
        return self._lists[kind]

    def serves(self, kind: str) -> bool:
        if kind not in self._served:
            self._served[kind] = self.api.serves(kind)
        return self._served[kind]

    def allowed(self, verb: str, kind: str, subresource: str = "", *, pods: str = "") -> bool:
        asked = (verb, kind, subresource, pods)
        if asked not in self._allowed:
            self._allowed[asked] = self.api.allowed(verb, kind, subresource, pods=pods)
        return self._allowed[asked]

    @cached_property
    def groups(self) -> dict[str, list[str]]:
        return self.api.groups()

    @cached_property
    def account(self) -> str:
        """Who the cluster takes us for; empty on clusters that don't tell (before 1.28)."""
        review = {"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview"}
        try:
            return str(self.api.create(review)["status"]["userInfo"]["username"])
        except (ClusterError, KeyError):
            return ""

    @cached_property
    def pipelines(self) -> kfp_api.Health | None:
        """How the Pipelines API is; None if its address isn't known."""
        url = kfp_api.endpoint(self.settings)
        return kfp_api.health(url) if url else None

    @cached_property
    def launcher(self) -> str:
        """What trains here: the settings' launcher, or the one `auto` means; empty if there is none."""
        named = self.settings.job.launcher
        return named if named != "auto" else next((n for n, kind in JOB_KINDS.items() if self.serves(kind)), "")
