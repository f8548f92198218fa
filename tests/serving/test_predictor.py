"""Answers from files and bytes, without torch."""

import csv
import json
import math
import subprocess
import sys

import h5py
import numpy as np
import pytest

from lesionflow.bundle import Bundle, write_manifest
from lesionflow.data.images import PreprocessSpec, to_batch
from lesionflow.errors import DataError, GateRefused, ImageError
from lesionflow.serving import graph as graphs
from lesionflow.serving.graph import Graph
from lesionflow.serving.predictor import Predictor, predict_files

IDS = ["ISIC_0000003", "ISIC_0000001", "ISIC_0000002"]


@pytest.fixture
def data(tmp_path, encode):
    """Three lesions as an HDF5 file, with metadata in another order than the ids'."""
    folder = tmp_path / "data"
    folder.mkdir()
    with h5py.File(folder / "test-image.hdf5", "w") as file:
        for number, isic_id in enumerate(IDS):
            file[isic_id] = np.void(encode(number))
    (folder / "test-metadata.csv").write_text("isic_id,patient_id\n" + "".join(f"{i},IP_1\n" for i in IDS))
    return folder


def rows(path):
    with path.open() as file:
        return [(row["isic_id"], float(row["target"])) for row in csv.DictReader(file)]


def edit_info(bundle, **changes):
    info = json.loads((bundle / "bundle.json").read_text())
    (bundle / "bundle.json").write_text(json.dumps(info | changes))
    write_manifest(bundle)


def test_an_answer_is_the_graphs_logit_calibrated_and_named(bundle_copy, encode):
    images = [encode(seed) for seed in range(30)]
    middle = float(np.median([a.logit for a in Predictor(bundle_copy).predict(images)]))
    edit_info(bundle_copy, thresholds={"refer": {"logit": middle}})
    predictor = Predictor(bundle_copy)
    answers = predictor.predict(images)
    fold_logits, logit = predictor.logits(to_batch(images, PreprocessSpec(size=32)))
    assert [a.logit for a in answers] == logit.tolist()
    assert [list(a.fold_logits) for a in answers] == fold_logits.tolist()
    for answer in answers:
        assert answer.probability == pytest.approx(1 / (1 + math.exp(-answer.logit)), rel=1e-12)
        assert answer.band == ("refer" if answer.logit >= middle else "routine")
    assert {a.band for a in answers} == {"refer", "routine"}


def test_the_bundles_calibration_is_applied(bundle_copy, encode):
    (before,) = Predictor(bundle_copy).predict([encode(1)])
    edit_info(bundle_copy, calibration={"kind": "platt", "a": 0.5, "b": -3.0})
    (after,) = Predictor(bundle_copy).predict([encode(1)])
    assert after.logit == before.logit
    assert after.probability == pytest.approx(1 / (1 + math.exp(3.0 - 0.5 * before.logit)), rel=1e-12)


def test_an_extreme_logit_does_not_overflow(bundle_dir):
    predictor = Predictor(bundle_dir)
    assert (predictor.probability(-5000.0), predictor.probability(5000.0)) == (0.0, 1.0)


def test_an_answer_does_not_depend_on_its_neighbours_or_the_threads(bundle_dir, encode):
    images = [encode(seed) for seed in range(40)]
    together = [a.logit for a in Predictor(bundle_dir, threads=2).predict(images)]
    alone = [Predictor(bundle_dir, threads=1).predict([image])[0].logit for image in images[::13]]
    np.testing.assert_allclose(together[::13], alone, atol=1e-5)


@pytest.mark.parametrize("wrong", [np.zeros((1, 32, 32, 3), np.float32), np.zeros((1, 31, 32, 3), np.uint8)])
def test_pixels_of_another_kind_are_refused(bundle_dir, wrong):
    with pytest.raises(DataError, match="uint8"):
        Predictor(bundle_dir).logits(wrong)


def test_a_damaged_image_is_an_image_error(bundle_dir, encode):
    with pytest.raises(ImageError):
        Predictor(bundle_dir).predict([encode(0)[:200]])


def test_the_reference_lesions_are_reproduced(bundle_dir):
    result = Predictor(bundle_dir).smoke()
    assert result["count"] == 2
    assert result["max_abs"] < 1e-5


@pytest.mark.parametrize("change", [0.01, float("inf")])
def test_a_stored_answer_that_is_not_reproduced_refuses(bundle_copy, change):
    path = bundle_copy / "reference/answers.json"
    stored = json.loads(path.read_text())
    stored["answers"][1]["fold_logits"][0] += change if math.isfinite(change) else 1e9
    path.write_text(json.dumps(stored))
    write_manifest(bundle_copy)
    with pytest.raises(GateRefused, match=r"b\.jpg"):
        Predictor(bundle_copy).smoke()


def test_a_graph_of_another_shape_than_bundle_json_says_is_refused(bundle_copy):
    edit_info(bundle_copy, models=3)
    with pytest.raises(DataError, match="fold_logits"):
        Predictor(bundle_copy)


def test_a_submission_has_every_row_in_metadata_order(bundle_dir, data, tmp_path, encode):
    result = predict_files(bundle_dir, data, metadata=None, out=tmp_path / "s.csv", progress=False)
    expected = [a.probability for a in Predictor(bundle_dir).predict([encode(n) for n in range(3)])]
    assert (result["rows"], result["scored"], result["skipped"]) == (3, 3, [])
    assert [isic_id for isic_id, _ in rows(tmp_path / "s.csv")] == IDS
    np.testing.assert_allclose([score for _, score in rows(tmp_path / "s.csv")], expected, atol=1e-7)


def test_the_text_of_a_score_is_the_score(bundle_dir, data, tmp_path):
    """Rounding would tie lesions that differ: the written number must read back as the very same double."""
    predict_files(bundle_dir, data, out=tmp_path, progress=False)
    texts = [line.split(",")[1] for line in (tmp_path / "submission.csv").read_text().splitlines()[1:]]
    assert [repr(float(text)) for text in texts] == texts
    predictor = Predictor(bundle_dir)
    near = [predictor.probability(float(z)) for z in np.nextafter(np.float32([-12, 1, 9]), np.float32(99))]
    assert all(p > predictor.probability(z) for p, z in zip(near, [-12.0, 1.0, 9.0], strict=True))


def test_bare_files_are_scored_in_id_order(bundle_dir, data, tmp_path):
    predict_files(bundle_dir, data / "test-image.hdf5", out=tmp_path / "s.csv", progress=False)
    assert [isic_id for isic_id, _ in rows(tmp_path / "s.csv")] == sorted(IDS)


def test_more_lesions_than_a_batch_keep_their_places(bundle_dir, tmp_path, encode):
    folder = tmp_path / "crops"
    folder.mkdir()
    for number in range(150):
        (folder / f"L{number:03}.jpg").write_bytes(encode(number % 7))
    predict_files(bundle_dir, folder, out=tmp_path / "s.csv", progress=False)
    got = rows(tmp_path / "s.csv")
    assert [isic_id for isic_id, _ in got] == [f"L{n:03}" for n in range(150)]
    expected = [a.probability for a in Predictor(bundle_dir).predict([encode(n) for n in range(7)])]
    np.testing.assert_allclose([s for _, s in got], [expected[n % 7] for n in range(150)], atol=1e-6)


def test_a_corrupt_image_stops_by_name_and_writes_nothing(bundle_dir, data, tmp_path, encode):
    with h5py.File(data / "test-image.hdf5", "a") as file:
        del file[IDS[1]]
        file[IDS[1]] = np.void(encode(5)[:300])
    with pytest.raises(DataError, match=IDS[1]):
        predict_files(bundle_dir, data, out=tmp_path / "s.csv", progress=False)
    assert not (tmp_path / "s.csv").exists()


@pytest.mark.parametrize("how", ["corrupt", "missing"])
def test_a_skipped_lesion_is_listed_and_gets_the_mean(bundle_dir, data, tmp_path, how):
    with h5py.File(data / "test-image.hdf5", "a") as file:
        del file[IDS[1]]
        if how == "corrupt":
            file[IDS[1]] = np.void(b"\xff\xd8 no image")
    result = predict_files(bundle_dir, data, out=tmp_path / "s.csv", progress=False, skip_corrupt=True)
    got = dict(rows(tmp_path / "s.csv"))
    assert [s["isic_id"] for s in result["skipped"]] == [IDS[1]]
    assert list(got) == IDS
    assert got[IDS[1]] == pytest.approx((got[IDS[0]] + got[IDS[2]]) / 2)


def test_nothing_usable_is_an_error(bundle_dir, tmp_path):
    (tmp_path / "crops").mkdir()
    (tmp_path / "crops/a.jpg").write_bytes(b"")
    with pytest.raises(DataError, match="none of 1 images"):
        predict_files(bundle_dir, tmp_path / "crops", out=tmp_path / "s.csv", progress=False, skip_corrupt=True)


def test_verified_once_is_enough(bundle_dir):
    assert Predictor(Bundle.open(bundle_dir)).bundle.hashes


def test_predicting_and_serving_load_no_torch(bundle_dir, data, tmp_path):
    code = f"""
import sys
from pathlib import Path
import lesionflow.serving.app, lesionflow.client, lesionflow.serving.endpoints
from lesionflow.serving.predictor import predict_files
lesionflow.serving.app.create_app(Path({str(bundle_dir)!r}))
predict_files(Path({str(bundle_dir)!r}), Path({str(data)!r}), out=Path({str(tmp_path / "s.csv")!r}))
print([m for m in ("torch", "torchvision", "timm", "lightning", "onnx", "matplotlib") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert len(rows(tmp_path / "s.csv")) == 3


def test_a_light_graph_and_one_whose_threads_share_a_batch_say_the_same(bundle_dir, encode, monkeypatch):
    pixels = to_batch([encode(n) for n in range(70)], PreprocessSpec(size=32))
    shared, light = (Graph(Bundle.open(bundle_dir), 3, light=light) for light in (False, True))
    assert (shared.parallel, light.parallel) == (1, 3)
    for one, other in zip(shared.logits(pixels), light.logits(pixels), strict=True):
        np.testing.assert_array_equal(one, other)
    monkeypatch.setattr(graphs, "LIGHT", 10.0)
    assert Graph(Bundle.open(bundle_dir), 3).parallel == 3
    monkeypatch.setattr(graphs, "LIGHT", 0.0)
    assert Graph(Bundle.open(bundle_dir), 3).parallel == 1
