"""What the components do around a step: tickets that follow the files, figures for KFP, failures on record."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lesionflow import keys, steps
from lesionflow.cluster import shim
from lesionflow.cluster.settings import Place
from lesionflow.recipe import Recipe


@pytest.fixture
def run(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "run"))


def begin(run: Path, recipe: Recipe, synthetic: Path) -> dict[str, str]:
    return shim.begin(str(run), str(synthetic), recipe.to_toml())._asdict()


def test_a_ticket_stands_as_long_as_the_work_does(run: Path, tiny_recipe: Recipe, synthetic: Path) -> None:
    first = begin(run, tiny_recipe, synthetic)
    shim.call("prepare", str(run), first["prepare"], data=str(synthetic))
    shim.call("split", str(run), first["split"])
    second = begin(run, tiny_recipe, synthetic)
    assert second["prepare"] == first["prepare"] and second["split"] == first["split"], "KFP's cache may skip these"
    assert second["train"] != first["train"], "work that isn't done never meets a cached answer"
    (run / "folds.parquet").unlink()
    third = begin(run, tiny_recipe, synthetic)
    assert third["split"] != first["split"], "nor does work whose file is gone"
    assert third["prepare"] == first["prepare"]
    changed = Recipe.from_dict({**tiny_recipe.to_dict(), "folds": {"count": 3}})
    assert begin(run, changed, synthetic)["split"].partition(".")[0] != first["split"].partition(".")[0]


def test_a_failing_step_says_so_to_its_parent_its_log_and_its_run(
    run: Path, tiny_recipe: Recipe, synthetic: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    (tmp_path / "status").mkdir()
    monkeypatch.setenv("LESIONFLOW_STATUS", str(tmp_path / "status"))
    tickets = begin(run, tiny_recipe, synthetic)
    with pytest.raises(SystemExit) as stopped:
        shim.call("gate", str(run), tickets["gate"])
    assert stopped.value.code == 3
    assert "(exit code 3)" in capsys.readouterr().out
    assert json.loads((tmp_path / "status" / "0.json").read_text())["code"] == 3
    assert keys.read_json(run / shim.FAILURE)["step"] == "gate"
    shim.finish(str(run), "", "", clean=False)
    record = keys.read_json(run / shim.RECORD)
    assert record["state"] == "FAILED" and record["failure"]["exit_code"] == 3
    shim.fetch(str(run), str(synthetic), "")
    assert keys.read_json(run / shim.RECORD)["state"] == "RUNNING"
    assert not (run / shim.FAILURE).exists(), "a new start forgets the old failure"


def test_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = str(tmp_path / "run")
    assert shim.fetch(run, str(tmp_path / "any"), "") == "there"
    with pytest.raises(SystemExit):
        shim.fetch(run, str(tmp_path / "any"), "nonsense")
    assert keys.read_json(Path(run) / shim.FAILURE)["exit_code"] == 2
    held = tmp_path / "secret"
    held.mkdir()
    (held / "KAGGLE_API_TOKEN").write_text("KGAT_token\n")
    asked: list[str] = []
    monkeypatch.setattr(shim, "KAGGLE_SECRET", str(held))
    monkeypatch.delenv("KAGGLE_API_TOKEN", raising=False)
    import os

    monkeypatch.setattr("lesionflow.data.fetch.fetch", lambda out: asked.append(os.environ["KAGGLE_API_TOKEN"]))
    shim.fetch(run, str(tmp_path / "data"), "kaggle")
    assert asked == ["KGAT_token"], "the mounted secret reaches Kaggle's client, and nothing else does"
    monkeypatch.delenv("KAGGLE_API_TOKEN")


def test_figures_and_curve_for_kfps_pages(tmp_path: Path) -> None:
    import polars as pl

    metrics = {
        "pauc": {"rank_pooled": {"value": 0.12, "interval": {"low": 0.1, "high": 0.14, "level": 0.95}}, "maximum": 0.2},
        "auc": {"pooled": {"value": 0.9, "interval": None}},
        "folds": [{"value": 1.0}],
        "odd": {"value": float("nan")},
    }
    assert shim.flat_figures(metrics) == {
        "pauc_rank_pooled": 0.12,
        "pauc_rank_pooled_low": 0.1,
        "pauc_rank_pooled_high": 0.14,
        "auc_pooled": 0.9,
    }
    pl.DataFrame({"target": [0, 1, 0, 1], "logit": [-2.0, 3.0, 0.0, 0.0]}).write_parquet(tmp_path / "oof.parquet")
    false, true, thresholds = shim._roc(tmp_path / "oof.parquet")
    assert (false, true) == ([0, 0, 0.5, 1], [0, 0.5, 1, 1]), "ties move together"
    assert thresholds == sorted(thresholds, reverse=True) and max(thresholds) <= 1


def test_the_place_names_and_paths_of_a_run() -> None:
    place = Place("first")
    assert place.run == "/mnt/lesionflow/models/runs/first"
    assert place.environment.startswith("/mnt/lesionflow/models/environments/")
    assert place.job_name("0123456789abcdef") == "first-01234567"
    assert steps.STEPS[:7] == shim.Tickets._fields


def test_a_run_that_was_begun_anew_is_left_to_its_new_recipe(run: Path, tiny_recipe: Recipe, synthetic: Path) -> None:
    """Two pipelines of one name: the older one must not record its key over what the newer recipe makes."""
    older = begin(run, tiny_recipe, synthetic)
    begin(run, Recipe.from_dict({**tiny_recipe.to_dict(), "folds": {"count": 3}}), synthetic)
    with pytest.raises(SystemExit):
        shim.call("split", str(run), older["split"])
    assert "begun again meanwhile" in keys.read_json(run / shim.FAILURE)["message"]


def test_curves_follow_the_volume(tmp_path: Path) -> None:
    run, old, new = tmp_path / "run", tmp_path / "old", tmp_path / "new"
    for folder in (run, old, new):
        folder.mkdir()
    shim._link_events(run / "events", old, "first")
    (run / "events" / "curve").touch()
    assert (old / "first" / "curve").exists()
    shim._link_events(run / "events", new, "first")
    assert (run / "events" / "curve").exists(), "what is there stays"
    old.rename(tmp_path / "gone")
    shim._link_events(run / "events", new, "first")
    assert (run / "events").resolve() == new / "first"


def test_a_pipeline_that_never_began_is_no_success(run: Path, synthetic: Path) -> None:
    """Its first pod failed before any code of ours ran: what lies there is the pipeline's before it."""
    shim.fetch(str(run), str(synthetic), "")
    keys.write_json(run / shim.RECORD, {**keys.read_json(run / shim.RECORD), "state": "SUCCEEDED"})
    assert shim.finish(str(run), "", "", clean=False) == "SUCCEEDED"
    keys.write_json(run / shim.FAILURE, {"step": "gate", "exit_code": 4, "message": "old"})
    assert shim.finish(str(run), "", "", clean=False) == "FAILED"
    assert keys.read_json(run / shim.RECORD)["failure"] is None


def test_an_error_of_several_lines_is_one_in_the_log(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped, shim._step(str(run), "export"):
        raise RuntimeError("first\nsecond")
    assert stopped.value.code == 1
    assert "error: RuntimeError: first second (exit code 1)\n" in capsys.readouterr().out


def test_only_jobs_that_have_ended_are_cleaned_after_a_pipeline(run: Path, double, api) -> None:
    """One that runs belongs to a newer pipeline of the same name."""
    from lesionflow.cluster import manifests
    from lesionflow.cluster.settings import Settings

    settings = Settings.load(None, ["namespace=team"])
    for name in ("over", "running"):
        api.create(manifests.pytorch_job(Place("first", settings), name, ["true"]))
    api.create(manifests.pytorch_job(Place("other", settings), "others", ["true"]))
    for name in ("over", "others"):
        done = {"type": "Succeeded", "status": "True", "reason": "JobSucceeded", "message": "done"}
        double.store.set_status("PyTorchJob", "team", name, {"conditions": [done], "replicaStatuses": {}})
    shim.finish(str(run), "first", settings.to_toml(), clean=True)
    assert {job["metadata"]["name"] for job in double.store.list("PyTorchJob")} == {"running", "others"}
