"""Draw the pipeline's graph from what is compiled for Kubeflow: docs/pipeline.svg.

    python docs/draw_pipeline.py [--check]

Tasks and their dependencies are read from the compiled pipeline, not from a list kept beside it, so
the picture can't show what wouldn't run. Colours work on light and on dark pages.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import yaml

OUT = Path(__file__).with_name("pipeline.svg")
SAYS = {
    "begin": "the recipe, the data's fingerprint, every step's content key",
    "fetch": "the data set: downloaded with the secret's token, or made",
    "prepare": "images and table as a memory-mapped store",
    "split": "folds that never share a patient",
    "train": "every fold, distributed: a TrainJob or PyTorchJob",
    "stack": "out-of-fold scores of all lesions",
    "evaluate": "pAUC and its interval, thresholds, curves",
    "gate": "good enough? else the pipeline ends here",
    "export": "the bundle: an ONNX graph that answers as torch did",
    "deploy": "an InferenceService, or a local one, that is ready",
    "smoke": "reference lesions, asked and compared",
    "finish": "whatever happened: recorded, and cleaned up if asked",
}
"""A line on what a task makes; a task without one is drawn with its name alone."""
WIDTH, ROW, BOX, HEIGHT, LEFT, TOP = 660, 58, 150, 34, 24, 18


@dataclass(eq=False)
class Task:
    """A task of the graph, or a group (an exit handler's, a condition's) that holds tasks of its own."""

    name: str
    label: str
    needs: set[str] = field(default_factory=set)
    inner: list[Task] = field(default_factory=list)


def compiled() -> dict[str, Any]:
    """The pipeline as Kubeflow gets it (its first YAML document)."""
    from kfp.compiler import Compiler

    from lesionflow.cluster.pipeline import build

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pipeline.yaml"
        Compiler().compile(build(), str(path))
        found: dict[str, Any] = next(yaml.safe_load_all(path.read_text()))
    return found


def tasks(pipeline: dict[str, Any], component: str = "") -> list[Task]:
    """The tasks of the pipeline, or of one of its sub-graphs, in an order that respects what each one needs."""
    graph = (pipeline["components"][component] if component else pipeline["root"])["dag"]["tasks"]
    found = {}
    for name, task in graph.items():
        inputs = task.get("inputs", {})
        producers = {
            source["producerTask"]
            for value in [*inputs.get("parameters", {}).values(), *inputs.get("artifacts", {}).values()]
            for key in ("taskOutputParameter", "taskOutputArtifact")
            if (source := value.get(key))
        }
        below = task["componentRef"]["name"]
        inner = tasks(pipeline, below) if "dag" in pipeline["components"][below] else []
        found[name] = Task(
            name, task.get("taskInfo", {}).get("name", name), producers | set(task.get("dependentTasks", [])), inner
        )
    ordered: list[Task] = []
    while len(ordered) < len(found):
        done = {task.name for task in ordered}
        ordered.append(next(t for t in found.values() if t not in ordered and t.needs <= done))
    return ordered


def essential(ordered: list[Task]) -> dict[str, set[str]]:
    """Each task's needs without those that another of its needs already waits for."""
    behind: dict[str, set[str]] = {}
    for task in ordered:
        behind[task.name] = task.needs.union(*(behind[need] for need in task.needs))
    return {task.name: {n for n in task.needs if not any(n in behind[o] for o in task.needs)} for task in ordered}


def draw(pipeline: dict[str, Any]) -> str:
    """The SVG's text."""
    parts: list[str] = []
    end = _column(tasks(pipeline), TOP, 0, parts)
    names = [task.label for task in _flat(tasks(pipeline))]
    height = end + 4
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"
  role="img" aria-labelledby="title desc" font-family="system-ui, sans-serif" font-size="14">
<title id="title">The lesionflow pipeline</title>
<desc id="desc">Steps in order, each waiting for those it has an arrow from: {escape(", ".join(names))}.</desc>
<style>
  .box {{ fill: #4c8bb8; fill-opacity: .16; stroke: #4c8bb8; stroke-width: 1.5 }}
  .group {{ fill: none; stroke: #808890; stroke-width: 1; stroke-dasharray: 5 4 }}
  .arrow {{ fill: none; stroke: #808890; stroke-width: 1.5; marker-end: url(#head) }}
  .name {{ fill: #2f7fb5; font-weight: 600; text-anchor: middle }}
  .says {{ fill: #78828c; font-size: 13px }}
</style>
<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">
  <path d="M0 0 L8 4 L0 8 z" fill="#808890"/></marker></defs>
{chr(10).join(parts)}
</svg>
"""


def _column(ordered: list[Task], top: int, depth: int, parts: list[str]) -> int:
    """Draw tasks below each other and their arrows; returns where the column ends."""
    x, y = LEFT + 16 * depth, top
    span: dict[str, tuple[int, int]] = {}
    for task in ordered:
        start = y
        if task.inner:
            frame = len(parts)
            y = _column(task.inner, y + 26, depth + 1, parts)
            wide = WIDTH - 2 * x
            parts.insert(
                frame,
                f'<rect class="group" x="{x}" y="{start}" width="{wide}" height="{y - start - 8}" rx="8"/>'
                f'<text class="says" x="{x + 12}" y="{start + 18}">{escape(task.label)}</text>',
            )
            span[task.name] = (start, y - 8)
            y += ROW - HEIGHT - 8
            continue
        parts.append(
            f'<rect class="box" x="{x}" y="{y}" width="{BOX}" height="{HEIGHT}" rx="6"/>'
            f'<text class="name" x="{x + BOX // 2}" y="{y + 22}">{escape(task.label)}</text>'
            f'<text class="says" x="{x + BOX + 18}" y="{y + 22}">{escape(SAYS.get(task.label, ""))}</text>'
        )
        span[task.name] = (y, y + HEIGHT)
        y += ROW
    order = [task.name for task in ordered]
    for name, needs in essential(ordered).items():
        for need in sorted(needs, key=order.index):
            (_, low), (high, _) = span[need], span[name]
            skipped = order.index(name) - order.index(need) - 1
            if not skipped:
                parts.append(f'<path class="arrow" d="M{x + BOX // 2} {low} V{high}"/>')
            else:  # Around the boxes in between, further out the more there are.
                far = x - 6 - 4 * min(skipped, 4)
                parts.append(f'<path class="arrow" d="M{x} {low - 10} H{far} V{high + 10} H{x}"/>')
    return y - (ROW - HEIGHT) + 16 if ordered else y


def _flat(ordered: list[Task]) -> list[Task]:
    return [leaf for task in ordered for leaf in (_flat(task.inner) if task.inner else [task])]


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw docs/pipeline.svg from the compiled pipeline.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the picture is out of date")
    check = parser.parse_args().check
    text = draw(compiled())
    if check:
        sys.exit(not OUT.exists() or OUT.read_text() != text)
    OUT.write_text(text)


if __name__ == "__main__":
    main()
