"""A visit's answers are those of training: fold by fold, with more or less to go by."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from lesionflow import keys, steps
from lesionflow.bundle import Bundle, band, write_manifest
from lesionflow.data.source import open_source
from lesionflow.data.store import Store
from lesionflow.errors import DataError, GateRefused, UsageError
from lesionflow.recipe import Recipe
from lesionflow.serving.predictor import CANNOT_JUDGE, Predictor, predict_files
from lesionflow.serving.submission import submit
from lesionflow.serving.visit import NO_PICTURE, Visits


@pytest.fixture(scope="module")
def visits(finished: Path) -> Visits:
    return Visits(Predictor(finished / "bundle"))


@pytest.fixture(scope="module")
def store(finished: Path) -> Store:
    return Store.open(finished / "store")


@pytest.fixture(scope="module")
def patient(store: Store) -> list[int]:
    """The rows of one patient with at least five lesions."""
    groups = np.array(store.groups)
    names, counts = np.unique(groups, return_counts=True)
    return np.flatnonzero(groups == names[counts >= 5][0]).tolist()


def test_the_fold_s_own_pipeline_reproduces_its_out_of_fold_score(finished: Path, visits: Visits, store: Store) -> None:
    oof = pl.read_parquet(finished / "oof.parquet")
    place = {name: row for row, name in enumerate(store.ids)}
    rows = [place[name] for name in oof["isic_id"]]
    pictures = visits.predictor.predict([store.jpeg(row) for row in rows])
    raw = np.array([answer.fold_logits for answer in pictures])
    own = np.arange(len(oof)), oof["fold"].to_numpy()
    scores = visits.score(raw, store.table[rows])
    assert np.abs(scores.fold_logits[own] - oof["logit"].to_numpy()).max() < 1e-3
    # With the very logits of training there is no difference at all.
    exact = np.repeat(oof["image_logit"].to_numpy()[:, None], raw.shape[1], 1)
    assert (visits.score(exact, store.table[rows]).fold_logits[own] == oof["logit"].to_numpy()).all()


def test_the_hold_out_s_scores_are_what_is_served(finished: Path, visits: Visits, store: Store) -> None:
    table = pl.read_parquet(finished / "holdout.parquet")
    place = {name: row for row, name in enumerate(store.ids)}
    rows = [place[name] for name in table["isic_id"]]
    scores = visits.score(np.array(table["image_fold_logits"].to_list()), store.table[rows])
    assert (scores.fold_logits == np.array(table["fold_logits"].to_list())).all()
    assert np.abs(scores.fold_logits.mean(1) - table["logit"].to_numpy()).max() < 1e-12


def test_one_visit_or_the_whole_table_is_the_same(visits: Visits, store: Store, patient: list[int]) -> None:
    raw = np.random.default_rng(0).normal(size=(len(store), visits.predictor.bundle.models))
    whole, alone = visits.score(raw, store.table), visits.score(raw[patient], store.table[patient])
    assert (whole.fold_logits[patient] == alone.fold_logits).all()


def test_the_answer_rests_on_what_there_is(visits: Visits, store: Store, patient: list[int]) -> None:
    pictures = [store.jpeg(row) for row in patient]
    table = store.table[patient]
    full = visits.predict(pictures, table)
    assert {answer.mode for answer in full} == {"image_visit"}
    assert set(full[0].scores) == {"image", "record", "visit", "image_record", "image_visit"}
    (single,) = visits.predict(pictures[:1], table[:1])
    assert single.mode == "image_record" and single.fold_logits != full[0].fold_logits
    bare = visits.predict(pictures)
    assert {answer.mode for answer in bare} == {"image"} and not any(answer.reasons for answer in bare)
    expected = visits.predictor.predict(pictures)
    assert [answer.logit for answer in bare] == pytest.approx([answer.logit for answer in expected], abs=1e-5)
    assert [answer.probability for answer in bare] == pytest.approx([a.probability for a in expected], abs=1e-6)
    assert [answer.band for answer in bare] == [answer.band for answer in expected]
    blind = visits.predict([None, *pictures[1:]], table)
    assert (blind[0].mode, blind[0].band, blind[0].doubts) == ("visit", CANNOT_JUDGE, (NO_PICTURE,))
    # The other lesions' comparison doesn't need the missing picture.
    assert blind[1:] == full[1:]
    half = table.with_columns(
        pl.when(pl.int_range(pl.len()) == 0).then(None).otherwise(pl.col(name)).alias(name)
        for name in table.columns
        if name.startswith("tbp_lv") or name.startswith("clin")
    )
    mixed = visits.predict(pictures, half)
    assert (mixed[0].mode, mixed[1].mode) == ("image", "image_visit")
    nothing = visits.predict([None], pl.DataFrame({"isic_id": ["a"]}))
    assert nothing[0].mode == "" and nothing[0].band == CANNOT_JUDGE
    with pytest.raises(DataError, match="2 pictures and 1 rows"):
        visits.predict(pictures[:2], table[:1])


def test_reasons_are_of_the_features_and_their_shares_of_the_score(
    visits: Visits, store: Store, patient: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: dict[str, object] = {}

    def said(
        values: np.ndarray, shares: np.ndarray, names: tuple[str, ...], table: pl.DataFrame, rows: object = None
    ) -> list[tuple[str]]:
        heard.update(values=values, names=names)
        # What the features add is the metadata's score, so a reason speaks of what the trees did.
        scores = visits.score(np.full((len(table), visits.predictor.bundle.models), np.nan), table)
        assert np.abs(shares.sum(1) - scores.by_mode["visit"]).max() < 1e-9
        return [("a reason",)] * len(table)

    monkeypatch.setattr("lesionflow.serving.visit.reasons", said)
    answers = visits.predict([store.jpeg(row) for row in patient], store.table[patient])
    assert {answer.reasons for answer in answers} == {("a reason",)}
    assert heard["values"].shape == (len(patient), len(heard["names"]))


def test_lesions_without_a_patient_s_name_are_one_visit(visits: Visits, store: Store, patient: list[int]) -> None:
    pictures, table = [store.jpeg(row) for row in patient], store.table[patient]
    unnamed = visits.predict(pictures, table.drop("patient_id"))
    assert [a.fold_logits for a in unnamed] == [a.fold_logits for a in visits.predict(pictures, table)]


def test_files_are_scored_with_their_metadata(finished: Path, synthetic: Path, visits: Visits, tmp_path: Path) -> None:
    done = predict_files(
        finished / "bundle", synthetic, out=tmp_path / "s.csv", details=tmp_path / "d.csv", progress=False
    )
    assert sum(done["modes"].values()) == done["rows"] and done["modes"]["image_visit"] > 0
    with open_source(synthetic, "test") as source:
        ids, table = source.ids, source.metadata
        answers = visits.predict([source.read(name) for name in ids], table)
    written = pl.read_csv(tmp_path / "s.csv")
    assert written["isic_id"].to_list() == ids
    assert written["target"].to_list() == pytest.approx([a.probability for a in answers], rel=1e-4)
    details = pl.read_csv(tmp_path / "d.csv")
    assert details["mode"].to_list() == [a.mode for a in answers]
    assert details["probability_record"].to_list() == pytest.approx([a.scores["record"] for a in answers])
    bare = predict_files(finished / "bundle", synthetic / "test-image.hdf5", out=tmp_path / "b.csv", progress=False)
    assert bare["modes"] == {"image": done["rows"]}


def test_a_lesion_without_a_picture_is_scored_by_its_metadata(finished: Path, synthetic: Path, tmp_path: Path) -> None:
    import h5py

    data = Path(shutil.copytree(synthetic, tmp_path / "data"))
    lost = pl.read_csv(data / "test-metadata.csv")["isic_id"][0]
    with h5py.File(data / "test-image.hdf5", "a") as file:
        del file[lost]
    done = predict_files(
        finished / "bundle", data, out=tmp_path / "s.csv", details=tmp_path / "d.csv", progress=False, skip_corrupt=True
    )
    row = pl.read_csv(tmp_path / "d.csv").row(0, named=True)
    assert row["mode"] in ("visit", "record") and row["probability"] == row[f"probability_{row['mode']}"]
    assert [one["isic_id"] for one in done["skipped"]] == [lost]


@pytest.fixture
def tampered(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished / "bundle", tmp_path / "bundle"))


def test_trees_that_answer_otherwise_are_not_served(tampered: Path) -> None:
    path = tampered / "tabular" / "stack.json"
    stack = keys.read_json(path)
    for mode in stack["pipelines"][0]["ways"].values():
        for line in (mode.get("line"), mode):
            if isinstance(line, dict) and "intercept" in line:
                line["intercept"] += 1.0
    keys.write_json(path, stack)
    with pytest.raises(DataError, match="changed"):
        Bundle.open(tampered)
    write_manifest(tampered)
    with pytest.raises(GateRefused, match="with metadata"):
        Predictor(tampered).smoke()


def test_an_answer_that_is_no_number_names_no_band() -> None:
    for thresholds in ({}, {"refer": {"logit": 0.0}}):
        with pytest.raises(DataError, match="not a number"):
            band(float("nan"), thresholds)


def test_each_way_has_its_own_line_and_thresholds(finished: Path) -> None:
    metrics, bundle = keys.read_json(finished / "metrics.json"), Bundle.open(finished / "bundle")
    modes = bundle.info["visit"]["modes"]
    for name, found in metrics["modes"]["each"].items():
        served = name == metrics["modes"]["served"]
        expected = metrics["probability"] if served else found["probability"]
        assert modes[name]["calibration"] == expected
    assert modes["image"]["calibration"] == bundle.info["calibration"]
    assert not modes["record"]["thresholds"] and not modes["visit"]["thresholds"]


def test_a_lesion_without_metadata_is_ranked_by_its_picture_on_one_scale(
    finished: Path, synthetic: Path, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    data = Path(shutil.copytree(synthetic, tmp_path / "data"))
    table = pl.read_csv(data / "train-metadata.csv", infer_schema=False)
    bare = pl.int_range(pl.len()) % 5 == 0
    blank = [pl.when(bare).then(None).otherwise(pl.col(c)).alias(c) for c in table.columns if c.startswith("tbp_lv_")]
    table.with_columns(blank).write_csv(data / "train-metadata.csv")
    values = tiny_recipe.to_dict()
    recipe = Recipe.from_dict(values | {"tabular": values["tabular"] | {"missing": "allow"}})
    keyed = steps.begin(run, recipe, data)
    steps.prepare(run, data, keyed["prepare"])
    steps.split(run, keyed["split"])
    steps.train(run, keyed["train"])
    steps.stack(run, keyed["stack"])
    oof = pl.read_parquet(run / "oof.parquet").join(table.select("isic_id", bare=bare), on="isic_id")
    without = oof.filter(pl.col("bare"))
    # Not the trees' score, and in the picture's order within a fold.
    assert (without["logit"] != without["image_visit_logit"]).all()
    for _, fold in without.group_by("fold"):
        assert fold.sort("image_logit")["logit"].is_sorted()
    assert (oof.filter(~pl.col("bare"))["logit"] == oof.filter(~pl.col("bare"))["image_visit_logit"]).all()


def test_a_bundle_without_its_trees_is_refused(tampered: Path) -> None:
    (tampered / "tabular" / "stack.json").unlink()
    write_manifest(tampered)
    with pytest.raises(DataError, match=r"stack\.json"):
        Visits(Predictor(tampered))


def test_metadata_alone_is_a_run(synthetic: Path, tmp_path: Path, encode) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for name in ("train-metadata.csv", "test-metadata.csv", "truth.json"):
        shutil.copy(synthetic / name, data / name)
    recipe = Recipe.load("tabular", ["tabular.lightgbm=1", "tabular.rounds=20", "folds.count=2"])
    told: list[str] = []
    result = steps.run_all(recipe, data, tmp_path / "run", tell=told.append)
    assert result["max_abs"] == 0 and any("left out" in text for text in told)
    metrics = keys.read_json(tmp_path / "run" / "metrics.json")
    assert list(metrics["modes"]["each"]) == ["record", "visit"] and metrics["modes"]["served"] == "visit"
    bundle = tmp_path / "run" / "bundle"
    assert not (bundle / "image.onnx").exists()
    done = predict_files(bundle, data, out=tmp_path / "s.csv", progress=False)
    assert done["scored"] == done["rows"] and set(done["modes"]) <= {"visit", "record"}
    asked = submit(bundle, data, tmp_path / "submission.csv", progress=False)
    assert asked["scored"] == done["rows"] and (tmp_path / "submission.csv").exists()
    # Here the metadata alone was vouched for, so it names bands; a lesion with next to no metadata is scored too.
    visits, table = Visits(Predictor(bundle)), Store.open(tmp_path / "run" / "store").table
    thresholds = {"refer": {"logit": -1.0}, "low": {"logit": -2.0}}
    for mode in visits.modes.values():
        mode["thresholds"] = thresholds
    sparse = table.head(3).select("isic_id", "patient_id", "age_approx")
    for answers in (visits.predict([None] * 40, table.head(40)), visits.predict([None] * 3, sparse)):
        assert [a.band for a in answers] == [band(a.logit, thresholds) for a in answers]
    with pytest.raises(UsageError, match="--metadata"):
        predict_files(bundle, synthetic / "test-image.hdf5", out=tmp_path / "n.csv", progress=False)
    with pytest.raises(UsageError, match="metadata alone"):
        Predictor(bundle).predict([encode(1)])
    with pytest.raises(UsageError, match="metadata alone"):
        steps.deploy(tmp_path / "run")


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(UsageError, match="nothing to train"):
        Recipe.load("tabular", ["tabular.lightgbm=0"])
