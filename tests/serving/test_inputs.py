"""What the model can't judge is told by name, and real lesions nearly never are."""

import json
import re
import time

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from lesionflow.data.images import PreprocessSpec, to_pixels
from lesionflow.data.source import open_source
from lesionflow.errors import DataError
from lesionflow.serving.inputs import EXPECTED, FEWEST, reference, statistics, unusual

SIZE = 64


@pytest.fixture(scope="module")
def lesions():
    """1,500 crops: skin of many tones in uneven light, a darker blob with a soft edge, sensor noise."""
    rng = np.random.default_rng(0)
    count = 1500
    y, x = np.mgrid[0:SIZE, 0:SIZE] / SIZE - 0.5
    skin = np.array([200, 150, 125]) * rng.uniform(0.5, 1.1, (count, 1)) + rng.normal(0, 6, (count, 3))
    width, height = rng.uniform(0.08, 0.3, (2, count, 1, 1))
    angle = rng.uniform(0, 6.3, (count, 1, 1))
    blob = np.exp(-((x / width) ** 2 + (y / height) ** 2))
    light = 1 + rng.uniform(0, 0.3, (count, 1, 1)) * (np.cos(angle) * x + np.sin(angle) * y)
    dark = rng.uniform(0.15, 0.7, (count, 1, 1, 1))
    crops = skin[:, None, None] * light[..., None] * (1 - dark * blob[..., None])
    crops += rng.normal(0, 1, crops.shape) * rng.uniform(1, 4, (count, 1, 1, 1))
    return crops.clip(0, 255).astype(np.uint8)


def page(size: int) -> np.ndarray:
    image = Image.new("RGB", (size, size), "white")
    for top in range(2, size, 12):
        ImageDraw.Draw(image).text((2, top), "screenshot of a page", fill="black")
    return np.asarray(image)


def face(size: int) -> np.ndarray:
    """A face-like drawing in the colours of skin."""
    image = Image.new("RGB", (size, size), (90, 110, 140))
    draw = ImageDraw.Draw(image)
    for box, colour in (
        ((0.2, 0.1, 0.8, 0.95), (224, 172, 140)), ((0.33, 0.38, 0.43, 0.45), (40, 30, 30)),
        ((0.57, 0.38, 0.67, 0.45), (40, 30, 30)), ((0.38, 0.68, 0.62, 0.75), (170, 60, 60)),
    ):  # fmt: skip
        draw.ellipse([size * edge for edge in box], fill=colour)
    return np.asarray(image.filter(ImageFilter.GaussianBlur(1)))


def blurred(crop: np.ndarray, sigma: float) -> np.ndarray:
    return np.asarray(Image.fromarray(crop).filter(ImageFilter.GaussianBlur(sigma)))


def tinted(crop: np.ndarray, factors: list[float]) -> np.ndarray:
    return (crop * np.array(factors)).clip(0, 255).astype(np.uint8)


# Name -> (the picture made from a crop, a reason that it must get).
PLANTED = {
    "black": (lambda crop: np.zeros_like(crop), "shows nothing"),
    "white": (lambda crop: np.full_like(crop, 255), "shows nothing"),
    "noise": (lambda crop: np.random.default_rng(1).integers(0, 256, crop.shape, dtype=np.uint8), "noisier"),
    "screenshot": (lambda crop: page(len(crop)), "brighter|contrast|edges|less red"),
    "face": (lambda crop: face(len(crop)), "flat colour|contrast|less red"),
    "blurred": (lambda crop: blurred(crop, 4), "blurrier"),
    "blue": (lambda crop: tinted(crop, [0.5, 0.7, 2.5]), "more blue"),
    "green": (lambda crop: tinted(crop, [0.6, 1.7, 0.6]), "less red"),
    "grey": (lambda crop: np.repeat(crop.mean(-1, keepdims=True).astype(np.uint8), 3, -1), "less red"),
    "inverted": (lambda crop: 255 - crop, "more blue|less red"),
    "pixelated": (lambda crop: crop[::8, ::8].repeat(8, 0).repeat(8, 1), "flat colour"),
    "half black": (
        lambda crop: np.where(np.arange(len(crop))[None, :, None] < len(crop) / 2, 0, crop),
        "flat|contrast",
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_pictures_are_found_for_the_right_reason(lesions, name):
    known = reference(statistics(lesions[:1000]))
    make, reason = PLANTED[name]
    found = unusual(statistics(np.stack([make(crop).astype(np.uint8) for crop in lesions[1000:1050]])), None, known)
    assert all(any(re.search(reason, text) for text in reasons) for reasons in found), found[:3]


def test_lesions_that_the_limits_never_saw_are_judged(lesions):
    known = reference(statistics(lesions[:1000]))
    assert sum(map(bool, unusual(statistics(lesions[1000:]), None, known))) <= 5  # 1 in 100; 1 is expected.
    assert sum(map(bool, unusual(statistics(lesions[:1000]), None, known))) <= 1000 * EXPECTED
    mirrored = unusual(statistics(lesions[1000:, ::-1, ::-1]), None, known)
    assert sum(map(bool, mirrored)) <= 5, "an upside-down crop is like any other"


def test_real_lesions_are_judged_and_planted_pictures_of_them_are_not(real_data):
    spec = PreprocessSpec(size=128)
    with open_source(real_data / "isic2024-images", "train") as source:
        ids = np.random.default_rng(0).permutation(source.ids)[:1600].tolist()
        crops = np.stack([to_pixels(source.read(name), spec) for name in ids])
    known = reference(statistics(crops[:800]))
    assert np.mean([bool(found) for found in unusual(statistics(crops[800:]), None, known)]) < 0.01
    for name, (make, _) in PLANTED.items():
        bad = np.stack([make(crop).astype(np.uint8) for crop in crops[800:840]])
        found = np.mean([bool(reasons) for reasons in unusual(statistics(bad), None, known)])
        assert found == 1.0, f"{name}: found in {found:.0%} only"


def test_models_that_disagree_cannot_judge(lesions):
    stats = statistics(lesions)
    logits = np.random.default_rng(2).normal(0, 0.4, (len(lesions), 5))
    known = reference(stats, logits)
    assert known["disagreement"] > logits.std(1).max() * 0.9
    apart = np.tile([-6.0, 6.0, -6.0, 6.0, 0.0], (3, 1))
    few = {name: column[:3] for name, column in stats.items()}
    assert unusual(few, apart, known) == [["the models disagree far more than on the lesions they know"]] * 3
    assert unusual(few, logits[:3], known) == [[]] * 3
    # One model alone, or a service without its logits, is no disagreement.
    assert reference(stats, logits[:, :1])["disagreement"] is None
    assert unusual(few, apart[:, :1], known) == unusual(few, None, known) == [[]] * 3


def test_a_lesion_is_judged_alone_as_among_others(lesions):
    together = statistics(lesions[:130])
    for row in (0, 77, 129):
        alone = statistics(lesions[row : row + 1])
        for name, column in together.items():
            assert alone[name][0] == pytest.approx(column[row], abs=1e-6), name
    assert all(len(column) == 0 for column in statistics(lesions[:0]).values())
    assert unusual(statistics(lesions[:0]), None, reference(together)) == []


def test_the_statistics_are_what_they_say():
    flat = np.full((1, 32, 32, 3), (100, 50, 200), dtype=np.uint8)
    found = {name: float(column[0]) for name, column in statistics(flat).items()}
    assert found["brightness"] == pytest.approx(0.299 * 100 + 0.587 * 50 + 0.114 * 200, abs=1e-3)
    assert found["red_green"] == pytest.approx(np.log2(101 / 51), abs=1e-6)
    assert found["blue_green"] == pytest.approx(np.log2(201 / 51), abs=1e-6)
    assert (found["contrast"], found["flat"]) == (pytest.approx(0, abs=1e-3), 1.0)
    striped = flat.copy()
    striped[:, :, ::2] = 0
    assert float(statistics(striped)["flat"][0]) == 0.0
    assert float(statistics(striped)["detail_1"][0]) > 1.9
    assert float(statistics(striped)["detail_2"][0]) == -1.0, "at the next scale there is nothing left of it"


def test_few_lesions_set_no_limits_but_a_flat_picture_is_still_refused(lesions):
    known = reference(statistics(lesions[: FEWEST - 1]))
    assert (known["limits"], known["lesions"]) == ({}, FEWEST - 1)
    assert "under 200" in known["reason"]
    found = unusual(statistics(np.stack([np.full((SIZE, SIZE, 3), 9, np.uint8), lesions[0]])), None, known)
    assert found == [["a flat picture that shows nothing"], []]


def test_a_reference_survives_json_and_a_damaged_one_is_refused(lesions):
    stats = statistics(lesions[:300])
    known = reference(stats, np.random.default_rng(0).normal(size=(300, 3)))
    assert json.loads(json.dumps(known, allow_nan=False)) == known
    for damage in (
        {"limits": {"brightness": {"low": 1.0}}},
        {"limits": {"charm": {"low": 0, "high": 1}}},
        {"limits": 3},
    ):
        with pytest.raises(DataError, match="inputs"):
            unusual(stats, None, known | damage)
    with pytest.raises(DataError, match="finite"):
        reference({name: column * np.nan for name, column in stats.items()})


def test_looking_costs_little_beside_the_model(lesions):
    began = time.process_time()
    for crop in lesions[:100]:
        statistics(crop[None])
    assert (time.process_time() - began) / 100 < 0.005
