"""Maps point at what the model uses, and the test of them can tell when they don't."""

import json
import subprocess
import sys

import h5py
import numpy as np
import pytest
from PIL import Image

from lesionflow.errors import DataError, UsageError
from lesionflow.serving.explain import cams, deletion, explain_files
from lesionflow.serving.graph import Graph
from lesionflow.serving.heat import enlarged, highest, overlay
from lesionflow.serving.predictor import Predictor
from lesionflow.serving.remote import Remote

SIZE = 64


class Known(Graph):
    """A model that is known: its logit is the mean of a map of 16 x 16 places, which holds how dark each is.

    `honest` maps are that map; others point at the place's mirror image, with the same mean.
    """

    def __init__(self, honest: bool = True) -> None:
        self.cam_shape, self.honest = (16, 16), honest

    def logits(self, pixels):
        logit = self.explained(pixels)[1]
        return logit[:, None], logit

    def explained(self, pixels):
        dark = 100 - pixels.reshape(len(pixels), 16, 4, 16, 4, 3).mean((2, 4, 5), dtype=np.float32) / 2
        logit = dark.mean((1, 2))
        return logit[:, None], logit, dark if self.honest else dark[:, ::-1, ::-1]


@pytest.fixture(scope="module")
def crops():
    """60 crops of grey skin, each with a dark square of a fifth of the crop somewhere off the middle."""
    rng = np.random.default_rng(0)
    crops = np.full((60, SIZE, SIZE, 3), 180, np.uint8)
    for crop in crops:
        top, left = rng.integers(4, SIZE - 32, 2)
        crop[top : top + 28, left : left + 28] = rng.integers(20, 60)
    return crops


def test_the_deletion_test_measures_what_a_known_model_loses(crops):
    found = deletion(Known(), crops, seed=3)
    json.dumps(found, allow_nan=False)
    assert (found["share"], found["lesions"]) == (0.2, 60)
    value = {name: one["value"] for name, one in found.items() if isinstance(one, dict)}
    # Painting the square in the skin's colour takes away all that raises the logit over that of bare skin.
    whole = np.mean(Known().logits(crops)[1] - (100 - 180 / 2))
    assert value["highest"] == pytest.approx(whole, rel=0.06)
    assert value["lowest"] == pytest.approx(0, abs=0.01)
    assert 0 < value["random"] < 0.6 * value["highest"]
    assert 0 < value["another"] < 0.9 * value["highest"]
    for name, other in (("difference", "random"), ("difference_lowest", "lowest"), ("difference_another", "another")):
        assert value[name] == pytest.approx(value["highest"] - value[other], abs=1e-5)
        assert found[name]["interval"]["low"] > 0
        assert found[name]["interval"]["clusters"] == 60


def test_a_map_that_points_elsewhere_is_found_out(crops):
    found = deletion(Known(honest=False), crops)
    assert found["difference"]["interval"]["low"] < 0
    # The hard comparison: another lesion's map, which is as wrong, does no worse.
    assert found["difference_another"]["interval"]["low"] < 0


def test_lesions_of_one_patient_count_as_one_cluster(crops):
    found = deletion(Known(), crops, groups=np.arange(60) // 3, malignant=60)
    assert found["difference"]["interval"]["clusters"] == 20
    assert found["difference"]["interval"]["malignant"] == 60
    few = deletion(Known(), crops[:4])["difference"]
    assert few["value"] is not None
    assert few["interval"]["low"] is None and "under 10" in few["interval"]["reason"]


def test_no_lesions_and_impossible_shares_are_told(crops):
    found = deletion(Known(), crops[:0])
    assert found["highest"]["value"] is None and found["highest"]["interval"]["reason"]
    assert "another" not in deletion(Known(), crops[:1]), "a single lesion has no other's map"
    for share in (0.0, 1.0, float("nan")):
        with pytest.raises(UsageError, match="share"):
            deletion(Known(), crops, share=share)


def test_the_regions_have_the_same_size_and_random_ones_hang_together():
    from lesionflow.serving.explain import _bumps, _painted

    count = round(0.2 * SIZE * SIZE)
    regions = highest(_bumps(40, SIZE, np.random.default_rng(0)), count)
    assert (regions.sum((1, 2)) == count).all()
    assert len({region.tobytes() for region in regions}) == 40
    for region in regions:
        reached = np.zeros_like(region)
        reached.ravel()[region.ravel().argmax()] = True
        for _ in range(3 * SIZE):
            grown = reached.copy()
            grown[1:] |= reached[:-1]
            grown[:-1] |= reached[1:]
            grown[:, 1:] |= reached[:, :-1]
            grown[:, :-1] |= reached[:, 1:]
            reached = grown & region
        assert (reached == region).all()
    crop = np.full((1, SIZE, SIZE, 3), (10, 20, 30), np.uint8)
    crop[0, 20:40, 20:40] = 255
    assert (_painted(crop, crop[..., 0] == 255) == (10, 20, 30)).all(), "the paint is the border's colour"


def test_the_bundles_maps_are_asked_of_its_own_graph(mapped_bundle, bundle_dir):
    predictor = Predictor(mapped_bundle)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    assert predictor.graph.has_cam
    np.testing.assert_allclose(cams(predictor.graph, pixels).mean((1, 2)), predictor.logits(pixels)[1], atol=1e-5)
    assert deletion(predictor.graph, pixels)["lesions"] == 5
    remote = Remote(predictor.bundle, "127.0.0.1:1")
    assert not remote.has_cam
    with pytest.raises(UsageError, match="own graph"):
        cams(remote, pixels)
    assert not Predictor(bundle_dir).graph.has_cam
    with pytest.raises(UsageError, match="no class-activation maps"):
        cams(Predictor(bundle_dir).graph, pixels)


def luminance(pixels):
    unit = pixels / 255
    linear = np.where(unit <= 0.04045, unit / 12.92, ((unit + 0.055) / 1.055) ** 2.4)
    return linear @ [0.2126, 0.7152, 0.0722]


def test_the_overlay_tints_evidence_and_keeps_every_pixels_luminance():
    rng = np.random.default_rng(0)
    crop = rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    cam = np.array([[8.0, 0.0], [0.0, -8.0]], np.float32)
    drawn = overlay(crop, cam)
    assert (drawn.dtype, drawn.shape) == (np.uint8, crop.shape)
    line = (drawn == 255).all(-1) | (drawn == 0).all(-1)
    assert 0.01 < line.mean() < 0.1
    assert np.abs(luminance(drawn) - luminance(crop))[~line].max() < 0.006  # Eight bits a channel.
    far = overlay(crop, np.zeros((2, 2), np.float32))
    np.testing.assert_allclose(far, crop, atol=1)
    grey = np.full((SIZE, SIZE, 3), 200, np.uint8)
    faint, full = overlay(grey, cam / 80), overlay(grey, cam)
    assert full[2, 2, 2] > full[2, 2, 0] + 40, "blue speaks for malignancy"
    assert full[-3, -3, 2] < full[-3, -3, :2].min() - 40, "yellow against it"
    assert np.ptp(faint[0, 0]) < np.ptp(full[0, 0]) / 5, "a flat map isn't blown up"


def test_colours_differ_for_dichromats():
    """Under simulated protanopia and deuteranopia (Vienot et al., 1999) the two tints stay apart, and from skin."""
    rgb_to_lms = np.array([[17.8824, 43.5161, 4.11935], [3.45565, 27.1554, 3.86714], [0.0299566, 0.184309, 1.46709]])
    blind = {
        "protan": np.array([[0, 2.02344, -2.52581], [0, 1, 0], [0, 0, 1]]),
        "deutan": np.array([[1, 0, 0], [0.494207, 0, 1.24827], [0, 0, 1]]),
    }
    skin = np.full((SIZE, SIZE, 3), (200, 150, 125), np.uint8)
    drawn = overlay(skin, np.array([[8.0, 8.0], [-8.0, -8.0]], np.float32))
    for kind, matrix in blind.items():
        seen = [np.linalg.inv(rgb_to_lms) @ matrix @ rgb_to_lms @ (colour / 255) ** 2.2
                for colour in (drawn[2, 2], drawn[-3, 2], skin[0, 0])]  # fmt: skip
        for one, other in ((0, 1), (0, 2), (1, 2)):
            assert np.abs(seen[one] - seen[other]).max() > 0.1, (kind, one, other)


def test_enlarging_keeps_places_where_they_are():
    large = enlarged(np.array([[[1.0, 0.0], [0.0, 0.0]]], np.float32), 8)[0]
    assert large.argmax() == 0 and large[:2, :2].min() > 0.7 and large[4:, 4:].max() < 0.2
    assert enlarged(np.zeros((0, 2, 2), np.float32), 8).shape == (0, 8, 8)


def test_every_lesion_of_a_folder_gets_a_picture_and_its_map(mapped_bundle, tmp_path, encode):
    (tmp_path / "crops").mkdir()
    for number in range(35):
        (tmp_path / f"crops/L{number:02}.jpg").write_bytes(encode(number))
    summary = explain_files(mapped_bundle, tmp_path / "crops", tmp_path / "out", progress=False)
    told = json.loads((tmp_path / "out/explain.json").read_text())
    assert summary["count"] == told["count"] == len(told["lesions"]) == 35
    assert told["notice"] == "Not a medical device." and "Blue" in told["legend"]
    expected = Predictor(mapped_bundle).predict([encode(n) for n in range(35)])
    for one, answer in zip(told["lesions"], expected, strict=True):
        assert one["logit"] == pytest.approx(answer.logit, abs=1e-5)
        assert np.mean(one["cam"]) == pytest.approx(one["logit"], abs=1e-5)
        assert one["band"] == answer.band
        assert np.asarray(Image.open(tmp_path / "out" / one["file"])).shape == (32, 68, 3)


def test_names_that_are_no_file_names_stay_in_the_folder(mapped_bundle, tmp_path, encode):
    with h5py.File(tmp_path / "test-image.hdf5", "w") as file:
        for name in ("..", "a b", "a_b", "explain.json", "é" * 150):
            file[name] = np.void(encode(1))
    explain_files(mapped_bundle, tmp_path / "test-image.hdf5", tmp_path / "out", progress=False)
    found = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert len(found) == 6
    assert len(list(tmp_path.iterdir())) == 2


def test_what_cannot_be_explained_is_told_and_leaves_no_list(mapped_bundle, bundle_dir, tmp_path, encode):
    (tmp_path / "crops").mkdir()
    with pytest.raises(DataError, match=r"crops"):
        explain_files(mapped_bundle, tmp_path / "crops", tmp_path / "out", progress=False)
    (tmp_path / "crops/bad.jpg").write_bytes(encode(0)[:300])
    with pytest.raises(DataError, match=r"^bad: "):
        explain_files(mapped_bundle, tmp_path / "crops", tmp_path / "out", progress=False)
    assert not (tmp_path / "out/explain.json").exists()
    with pytest.raises(UsageError, match="no class-activation maps"):
        explain_files(bundle_dir, tmp_path / "crops", tmp_path / "out", progress=False)


def test_explaining_loads_no_torch():
    code = "import sys, lesionflow.serving.explain; print({'torch', 'timm', 'onnx', 'matplotlib'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"
