"""The pipeline's components are the same steps: same run, same answers, same refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lesionflow import pack, steps
from lesionflow.errors import GateRefused
from lesionflow.recipe import Recipe


@pytest.fixture(scope="module")
def piped(tmp_path_factory: pytest.TempPathFactory, synthetic: Path, tiny_recipe: Recipe) -> Path:
    from lesionflow.cluster.pipeline import run_local

    run = tmp_path_factory.mktemp("pipeline") / "run"
    run_local(tiny_recipe, synthetic, run)
    return run


def test_the_local_pipeline_ends_with_a_served_model_that_answered(piped: Path) -> None:
    smoke = json.loads((piped / "smoke.json").read_text())
    assert smoke["lesions"] == pack.REFERENCE_LESIONS
    assert smoke["max_abs"] < 1e-4
    assert not (piped / "deploy.json").exists(), "and leaves no service behind"
    for step in steps.STEPS[:-2]:
        assert (piped / "steps" / f"{step}.json").exists()


def test_run_recognises_the_pipelines_work(piped: Path, synthetic: Path, tiny_recipe: Recipe) -> None:
    told: list[str] = []
    steps.run_all(tiny_recipe, synthetic, piped, tell=told.append)
    assert told == [f"{step} (already done)" for step in steps.STEPS[:-2]] + ["deploy", "smoke"]


def test_a_failing_step_ends_the_pipeline_with_its_own_error(
    piped: Path, tmp_path: Path, synthetic: Path, tiny_recipe: Recipe
) -> None:
    from lesionflow.cluster.pipeline import run_local

    run = Path(shutil.copytree(piped, tmp_path / "run"))  # What comes before the gate is done already.
    shutil.rmtree(run / "bundle")
    strict = Recipe.from_dict({**tiny_recipe.to_dict(), "gate": {"pauc_floor": 0.2}})
    with pytest.raises(GateRefused, match="gate"):
        run_local(strict, synthetic, run)
    assert not (run / "bundle").exists()
