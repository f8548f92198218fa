"""Steps trust only what was made for the same recipe, data and code: nothing slips past the gate."""

from __future__ import annotations

import shutil
from pathlib import Path

import polars as pl
import pytest

from lesionflow import keys, steps
from lesionflow.errors import DataError, GateRefused, UsageError
from lesionflow.recipe import Recipe


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def changed(recipe: Recipe, **sections: object) -> Recipe:
    values = recipe.to_dict()
    for name, fields in sections.items():
        values[name] = {**values[name], **fields} if isinstance(fields, dict) else fields
    return Recipe.from_dict(values)


def test_a_second_run_does_nothing_but_serve(copy: Path, synthetic: Path, tiny_recipe: Recipe) -> None:
    told: list[str] = []
    steps.run_all(tiny_recipe, synthetic, copy, tell=told.append)
    assert told == [f"{step} (already done)" for step in steps.STEPS[:-2]] + ["deploy", "smoke"]


def test_a_changed_floor_repeats_only_the_gate_and_what_follows(
    copy: Path, synthetic: Path, tiny_recipe: Recipe
) -> None:
    told: list[str] = []
    steps.run_all(changed(tiny_recipe, gate={"delta": 0.2}), synthetic, copy, tell=told.append)
    assert told[4:] == ["evaluate (already done)", "gate", "export", "deploy", "smoke"]


def test_a_new_recipe_cannot_be_gated_on_old_metrics(copy: Path, synthetic: Path, tiny_recipe: Recipe) -> None:
    keyed = steps.begin(copy, changed(tiny_recipe, seed=5), synthetic)
    for step in ("gate", "export"):
        with pytest.raises(DataError, match="isn't done for this recipe"):
            getattr(steps, step)(copy, keyed[step])
    with pytest.raises(DataError, match="export isn't done"):
        steps.deploy(copy)


def test_folds_of_two_recipes_are_never_pooled(copy: Path, synthetic: Path, tiny_recipe: Recipe) -> None:
    keyed = steps.begin(copy, changed(tiny_recipe, seed=5), synthetic)
    steps.train(copy, keyed["train"], folds=[0])
    with pytest.raises(DataError, match="train fold 1 again"):
        steps.stack(copy, keyed["stack"])


def test_a_refused_gate_stops_export_and_deployment(copy: Path, synthetic: Path, tiny_recipe: Recipe) -> None:
    strict = changed(tiny_recipe, gate={"pauc_floor": 0.2})
    keyed = steps.begin(copy, strict, synthetic)
    with pytest.raises(GateRefused, match="floor"):
        steps.gate(copy, keyed["gate"])
    with pytest.raises(DataError, match="gate isn't done"):
        steps.export(copy, keyed["export"])
    with pytest.raises(DataError, match="export isn't done"):
        steps.deploy(copy)


def test_an_incumbent_is_compared_on_the_same_lesions(finished: Path, copy: Path) -> None:
    incumbent = finished / "bundle"
    keyed = steps.plan_gate(copy, incumbent)
    checks = steps.gate(copy, keyed["gate"], incumbent=incumbent)["checks"]
    assert any("incumbent" in check["text"] or "incumbent" in check["name"] for check in checks)
    with pytest.raises(UsageError, match="another incumbent"):
        steps.gate(copy, keyed["gate"])
    again = steps.plan_gate(copy, None)
    assert again["gate"] != keyed["gate"] and again["evaluate"] == keyed["evaluate"]
    with pytest.raises(UsageError, match="nowhere"):
        steps.plan_gate(copy, copy / "nowhere" / "bundle")
    with pytest.raises(UsageError, match="own bundle"):
        steps.plan_gate(copy, copy / "bundle")


def test_the_incumbent_s_scores_are_part_of_the_question(finished: Path, copy: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(finished, tmp_path / "other"))
    first = steps.plan_gate(copy, other / "bundle")["gate"]
    table = pl.read_parquet(other / "oof.parquet")
    table.with_columns(logit=pl.col("target") * 9.0).write_parquet(other / "oof.parquet")
    assert steps.plan_gate(copy, other / "bundle")["gate"] != first


def test_the_report_is_of_this_very_recipe(copy: Path, synthetic: Path, tiny_recipe: Recipe) -> None:
    from lesionflow import present

    assert present.report(copy).exists()
    assert "data:image" not in (copy / "report.html").read_text()
    assert "data:image/jpeg" in present.report(copy, copy / "full.html", include_images=True).read_text()
    steps.begin(copy, changed(tiny_recipe, seed=7), synthetic)
    with pytest.raises(DataError, match="evaluate isn't done"):
        present.report(copy)


def test_a_hold_out_s_lost_scores_are_made_again(copy: Path, synthetic: Path, tiny_recipe: Recipe) -> None:
    (copy / "fold-1" / "holdout.parquet").unlink()
    told: list[str] = []
    steps.run_all(tiny_recipe, synthetic, copy, tell=told.append)
    assert told[2] == "train"
    assert (copy / "fold-1" / "holdout.parquet").exists()


def test_without_a_hold_out_nothing_of_it_is_left(copy: Path, synthetic: Path, tiny_recipe: Recipe) -> None:
    from lesionflow.bundle import Bundle

    assert (copy / "holdout.parquet").exists() and (copy / "inputs.json").exists()
    steps.run_all(changed(tiny_recipe, folds={"holdout": 0.0}), synthetic, copy)
    assert not (copy / "holdout.parquet").exists() and not (copy / "inputs.json").exists()
    info = Bundle.open(copy / "bundle").info
    assert info["thresholds"] == {} and info["calibration"]["fitted_on"] == "out-of-fold"
    assert "reason" in keys.read_json(copy / "metrics.json")["served"]


def test_a_swapped_folds_file_is_refused(copy: Path) -> None:
    from lesionflow.data.folds import write_folds

    (copy / "folds.parquet").unlink()
    write_folds(copy / "store", copy / "folds.parquet", count=2, seed=9)
    with pytest.raises(DataError, match="not the file this run wrote"):
        steps.split(copy, keys.planned_keys(copy)["split"])


def test_changed_weights_are_not_exported(copy: Path) -> None:
    weights = copy / "fold-0" / "model-0" / "weights.safetensors"
    shutil.copy(copy / "fold-1" / "model-0" / "weights.safetensors", weights)
    shutil.rmtree(copy / "bundle")
    with pytest.raises(DataError, match="weights of another recipe"):
        steps.export(copy, keys.planned_keys(copy)["export"])


def test_a_copied_bundle_is_verified_and_nothing_is_overwritten(finished: Path, tmp_path: Path) -> None:
    assert steps.copy_bundle(finished / "bundle", tmp_path / "mine") == tmp_path / "mine"
    with pytest.raises(UsageError, match="already there"):
        steps.copy_bundle(finished / "bundle", tmp_path / "mine")


def test_undeploy_ends_the_service_from_any_path(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    deployed = steps.deploy(copy)
    assert steps.smoke(copy)["max_abs"] < 1e-4
    monkeypatch.chdir(copy.parent)
    steps.undeploy(Path("run"))
    with pytest.raises(ProcessLookupError):
        os.kill(deployed["pid"], 0)
