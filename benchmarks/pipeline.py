"""What Kubeflow Pipelines costs on one machine: a finished run asked again, as a pipeline and in process.

    python benchmarks/pipeline.py

All steps are done already, so both sides only look at their content keys. The difference is KFP's: a process,
its executor and our imports for each component; the second line, components that do nothing, is KFP's alone.
"""

# Without "from __future__ import annotations": kfp reads the annotations themselves.

import contextlib
import io
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from kfp import dsl, local

from lesionflow import steps
from lesionflow.cluster.pipeline import run_local
from lesionflow.data.synthetic import synthesize
from lesionflow.recipe import Recipe

COMPONENTS = 13
ROUNDS = 5


@dsl.component(base_image="python:3.11", install_kfp_package=False)
def nothing(after: str) -> str:
    return after


@dsl.pipeline(name="nothing")
def empty() -> None:
    done = nothing(after="start")
    for _ in range(COMPONENTS - 1):
        done = nothing(after=done.output)


def median(run: Callable[[], object]) -> float:
    """Seconds of the median round; what it prints is dropped."""
    took = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            run()
        took.append(time.perf_counter() - started)
    return statistics.median(took)


def main() -> None:
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder:
        data, run = Path(folder) / "data", Path(folder) / "run"
        synthesize(data, patients=20, lesions=400, seed=3, prevalence=0.15, progress=False)
        overrides = ["model.weights=none", "image.size=32", "folds.count=2", "training.epochs=1", "gate.pauc_floor=0"]
        recipe = Recipe.load("quick", overrides)
        with contextlib.redirect_stdout(io.StringIO()):
            run_local(recipe, data, run)
        local.init(runner=local.SubprocessRunner(use_venv=False), pipeline_root=str(Path(folder) / "root"))
        alone = median(empty)
        piped = median(lambda: run_local(recipe, data, run))
        inside = median(lambda: steps.run_all(recipe, data, run))
    print(
        f"{COMPONENTS} components, median of {ROUNDS} rounds, {os.cpu_count()} cores, Python {sys.version.split()[0]}\n"
    )
    print("| side | wall | a step over the work itself |")
    print("|---|---|---|")
    print(f"| in process | {inside:.2f} s | |")
    print(f"| empty components | {alone:.2f} s | {alone / COMPONENTS:.2f} s |")
    print(f"| pipeline | {piped:.2f} s | {(piped - inside) / COMPONENTS:.2f} s |")


if __name__ == "__main__":
    main()
