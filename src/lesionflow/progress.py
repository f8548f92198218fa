"""Progress on stderr: bar, count, speed and remaining time, the same look everywhere."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from rich.progress import TaskID

    from lesionflow.training.status import Progress as Training

from lesionflow import keys
from lesionflow.errors import DataError
from lesionflow.recipe import MODES

T = TypeVar("T")

SCHEMA = 2
"""Of metrics.json, as `evaluation.evaluate` writes it."""


def track(items: Iterable[T], what: str, *, total: int | None = None, show: bool = True) -> Iterator[T]:
    """Yield `items`, showing a bar on stderr while they are consumed."""
    if not show:
        yield from items
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TaskProgressColumn(show_speed=True),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield from progress.track(items, total=total, description=what)


class TrainingBars:
    """One bar per fold on a terminal; elsewhere a line per step and, about twice a minute, per fold."""

    def __init__(self, enabled: bool = True) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._console = Console(stderr=True)
        self._enabled = enabled
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=self._console,
            transient=False,
        )
        self._tasks: dict[tuple[int, int], TaskID] = {}
        self._told: dict[tuple[int, int], float] = {}

    def __enter__(self) -> TrainingBars:
        return self

    def __exit__(self, *_: object) -> None:
        if self._tasks:
            self._bars.stop()

    def tell(self, text: str) -> None:
        """One line: a step begins. Bars of the step before are left as they are."""
        if self._tasks:
            self._bars.stop()
        if self._enabled:
            self._console.print(f"[bold]{text}[/bold]", highlight=False)

    def show(self, progress: Training) -> None:
        """Where a fold is."""
        if not self._enabled:
            return
        key = (progress.fold, progress.model)
        what = f"fold {progress.fold}" + (f" model {progress.model}" if progress.model else "")
        note = f"loss {progress.loss:.3f}  {progress.images_per_second:.0f} images/s"
        if not self._console.is_terminal:
            now, last = time.monotonic(), self._told.get(key, 0.0)
            if now - last > 30 or (progress.step == progress.steps and last != float("inf")):
                self._told[key] = float("inf") if progress.step == progress.steps else now
                left = f"{progress.remaining_seconds:.0f} s left"
                self._console.print(f"{what}: step {progress.step}/{progress.steps}  {note}  {left}", highlight=False)
            return
        if not self._tasks:
            self._bars.start()
        if key not in self._tasks:
            self._tasks[key] = self._bars.add_task(what, total=progress.steps, note=note)
        self._bars.update(self._tasks[key], completed=progress.step, note=note)


def print_summary(run: Path) -> None:
    """A short table of what a run found, and where to look."""
    from rich.console import Console
    from rich.table import Table

    if not (run / "metrics.json").exists():
        raise DataError(f"{run}: no metrics.json; not a run, or not evaluated yet")
    metrics = keys.read_json(run / "metrics.json")
    if metrics.get("schema") != SCHEMA:
        raise DataError(f"{run}: metrics.json of another version; `lesionflow evaluate {run}` writes it again")
    exported = keys.read_record(run, "export")
    current = exported is not None and exported["key"] == keys.planned_keys(run)["export"]
    table = Table(title=f"lesionflow: {run}", show_header=False, title_justify="left")
    counts, pauc = metrics["counts"], metrics["pauc"]
    headline = pauc[metrics["headline"]]
    table.add_row("lesions", f"{counts['lesions']:,}, {counts['malignant']:,} malignant, {counts['folds']} folds")
    table.add_row("pAUC above 80 % TPR", with_interval(headline["value"], headline["interval"]) + " (0.02 is chance)")
    table.add_row("mean of folds", f"{pauc['mean_of_folds']['value']:.4f}")
    auc = metrics["auc"][metrics["headline"]]
    table.add_row("AUC", with_interval(auc["value"], auc["interval"]))
    for mode, found in metrics.get("modes", {}).get("each", {}).items():
        pauc_of = found["out_of_fold"]["pauc"]
        table.add_row(f"pAUC of {MODES[mode]}", with_interval(pauc_of["value"], pauc_of["interval"]))
    served = metrics["served"]
    if "pauc" in served:
        lesions = f"{served['counts']['lesions']:,} lesions of patients in no fold"
        table.add_row(
            "served, pAUC", with_interval(served["pauc"]["value"], served["pauc"]["interval"]) + f", {lesions}"
        )
        refer = served["thresholds"]["refer"]
        bound = f"sensitivity {refer['sensitivity']:.1%}, at least {refer['lower_bound']:.1%}"
        table.add_row("band refer", bound if refer["reached"] else f"none: {refer['reason']}")
    for name, what in (
        ("report.html", "report"),
        ("gallery.html", "errors, with pictures (not for sharing)"),
        ("MODEL_CARD.md", "model card"),
        ("bundle", "bundle"),
        ("events", "TensorBoard: tensorboard --logdir"),
    ):
        if (run / name).exists() and (current or name not in ("bundle", "gallery.html")):
            table.add_row(what, str(run / name))
    if (run / "gate.json").exists() and not (gate := keys.read_json(run / "gate.json"))["passed"]:
        table.add_row("gate", "refused: " + "; ".join(gate["reasons"]))
    if current and (run / "smoke.json").exists():
        smoke = json.loads((run / "smoke.json").read_text())
        table.add_row("service", f"answered on {smoke['lesions']} reference lesions, off by {smoke['max_abs']:.1e}")
    console = Console()
    console.print(table)
    console.print("Not a medical device.")


def with_interval(value: float, interval: dict[str, Any] | None) -> str:
    """A figure with its interval, or with the reason why it has none."""
    if interval is None:
        return f"{value:.4f}"
    if interval["low"] is None:
        return f"{value:.4f} (no interval: {interval['reason']})"
    return f"{value:.4f} [{interval['low']:.4f}, {interval['high']:.4f}]"


def print_answers(answers: list[dict[str, Any]], top: int) -> None:
    """The service's `top` most suspicious answers, after those that a person has to look at in any case."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("image", "probability", "band")
    unclear = [a for a in answers if a.get("band") == "cannot judge"]
    ranked = sorted((a for a in answers if a not in unclear), key=lambda a: -a["probability"])
    for answer in (*unclear, *ranked[:top]):
        table.add_row(Text(str(answer["image"])), f"{answer['probability']:.4f}", answer.get("band") or "-")
    Console().print(table)
    if len(ranked) > top:
        Console().print(f"and {len(ranked) - top} less suspicious ones (--top N, --json for all)")
    Console().print("Not a medical device.")


def print_visit(visit: dict[str, Any], top: int) -> None:
    """A triage answer's `top` most suspicious lesions, after those that a person has to look at in any case."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console, table = Console(), Table("rank", "lesion", "probability", "band", "why")
    lesions = visit["lesions"]
    unclear = [lesion for lesion in lesions if lesion["band"] == "cannot judge"]
    judged = [lesion for lesion in lesions if lesion["band"] != "cannot judge"]
    for lesion in (*unclear, *judged[:top]):
        probability, interval = lesion["probability"], lesion.get("interval")
        shown = "-" if probability is None else f"{probability:.4f}"
        shown += f" ({interval['low']:.4f} to {interval['high']:.4f})" if interval else ""
        why = "; ".join(lesion["doubts"] or lesion["reasons"][:3])
        # As text: a file's name is no markup.
        table.add_row(*map(Text, (str(lesion["rank"]), lesion["id"], shown, lesion["band"] or "-", why)))
    console.print(table)
    if len(judged) > top:
        console.print(f"and {len(judged) - top} less suspicious ones (--top N, --json for all)")
    for error in visit["errors"]:
        console.print(Text(f"not used: {error.get('file') or error.get('id')}: {error['error']}"))
    for note in (visit["context"].get("note"), *visit["context"].get("notes", ())):
        if note:
            console.print(Text(note))
    console.print(visit["notice"])
