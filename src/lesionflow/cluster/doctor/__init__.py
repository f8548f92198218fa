"""Is this cluster ready for a run? Each question with its answer, and what to do about it.

    for check in doctor.examine(settings): ...

Checks don't depend on each other: one that fails, or may not look, leaves the others alone. Nothing
on the cluster changes, but for the tiny job that `job=True` asks for, which is removed again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from lesionflow.cluster.api import Api
from lesionflow.cluster.doctor import access, capacity, general, storage
from lesionflow.cluster.doctor.scene import Answer, Check, Scene, Unanswered
from lesionflow.cluster.settings import Settings
from lesionflow.errors import LesionflowError

if TYPE_CHECKING:
    from rich.console import RenderableType

CHECKS: dict[str, Callable[[Scene], Answer]] = {
    "kubernetes": general.kubernetes,
    "clock": general.clock,
    "namespace": general.namespace,
    "istio": general.istio,
    "kubeflow": general.kubeflow,
    "launcher": general.launcher,
    "serving": general.serving,
    "boards": general.boards,
    "pipelines": general.pipelines,
    "account": access.account,
    "permissions": access.permissions,
    "storage": storage.storage,
    "claims": storage.claims,
    "quota": capacity.quota,
    "limits": capacity.limits,
    "nodes": capacity.nodes,
    "node-health": capacity.node_health,
    "gpus": capacity.gpus,
    "image": access.image,
    "secret": access.secret,
    "pod": access.pod,
    "objects": access.objects,
}
"""Name -> question, in the order they are asked; `api` comes before all, `probe` last and only if wanted."""


def examine(
    settings: Settings, *, job: bool = False, run: str = "", tell: Callable[[Check], None] | None = None
) -> list[Check]:
    """Ask every question and return the answers; `tell` hears each as it comes.

    `run` looks at that run's claims too; `job` ends with a tiny job of two pods. Raises `UsageError` only for
    a missing extra: what is wrong with the cluster is an answer.
    """
    found: list[Check] = []

    def keep(name: str, answer: Answer) -> None:
        found.append(Check(name, *answer))
        if tell:
            tell(found[-1])

    asked = CHECKS | ({"probe": access.probe} if job else {})
    try:
        scene = Scene(Api.connect(settings), settings, run)
        keep("api", general.api(scene))
    except LesionflowError as error:
        if error.exit_code == 2:
            raise
        remedy = "kubectl cluster-info asks the same; kubectl config get-contexts lists what `context` may name"
        keep("api", Answer("fail", str(error), remedy))
        for name in asked:
            keep(name, Answer("skip", "not asked without the API"))
        return found
    for name, question in asked.items():
        keep(name, _answer(question, scene))
    return found


def _answer(question: Callable[[Scene], Answer], scene: Scene) -> Answer:
    try:
        return question(scene)
    except (Unanswered, LesionflowError) as error:
        return Answer("skip", str(error))
    except Exception as error:
        # One odd object on somebody's cluster must not silence the questions after it.
        return Answer("skip", f"the check itself broke ({type(error).__name__}: {error})", "please report this")


def to_json(found: Sequence[Check]) -> str:
    """Readable JSON: counts by status, then every check."""
    counts = {status: sum(c.status == status for c in found) for status in ("ok", "warn", "fail", "skip")}
    return json.dumps({**counts, "checks": [asdict(c) for c in found]}, indent=2, ensure_ascii=False)


def render(found: Sequence[Check]) -> RenderableType:
    """A list for the terminal (rich): status, name, what was found and what to do; counts below more than one."""
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table

    table = Table.grid(padding=(0, 1))
    # Fixed widths: checks that are shown one by one stand below each other.
    table.add_column(no_wrap=True, width=4)
    table.add_column(no_wrap=True, width=max(map(len, CHECKS)))
    table.add_column(overflow="fold")
    for check in found:
        style = {"ok": "green", "warn": "yellow", "fail": "red", "skip": "dim"}[check.status]
        text = escape(check.text) + (f"\n→ {escape(check.remedy)}" if check.remedy else "")
        table.add_row(f"[{style}]{check.status}[/{style}]", f"[dim]{check.name}[/dim]", text)
    if len(found) == 1:
        return table
    counts = ", ".join(f"{sum(c.status == s for c in found)} {s}" for s in ("ok", "warn", "fail", "skip"))
    return Group(table, counts)
