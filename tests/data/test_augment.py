"""Augmentation changes what it says, the same way for a lesion whoever draws it, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lesionflow.data.augment import augment, normalise
from lesionflow.data.images import PreprocessSpec
from lesionflow.data.sampler import DRAWS
from lesionflow.recipe import Augment

NOTHING = Augment(flip=False, rotate90=False)
SPEC = PreprocessSpec(size=24, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))


def images(count: int = 40) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(30, 200, (count, 24, 24, 3), dtype=np.uint8))


def randoms(count: int = 40) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(1).random((count, DRAWS), np.float32))


def back(x: torch.Tensor) -> torch.Tensor:
    """Normalised [B, 3, S, S] back to grey levels [B, S, S, 3]."""
    mean, std = torch.tensor(SPEC.mean), torch.tensor(SPEC.std)
    return (x.permute(0, 2, 3, 1) * std + mean) * 255


def test_normalising_is_the_formula() -> None:
    batch = images(3)
    expected = (batch / 255 - torch.tensor(SPEC.mean)) / torch.tensor(SPEC.std)
    assert torch.allclose(normalise(batch, SPEC), expected.permute(0, 3, 1, 2), atol=1e-6)


def test_without_settings_only_normalisation_is_left() -> None:
    assert torch.allclose(augment(images(), randoms(), NOTHING, SPEC), normalise(images(), SPEC), atol=1e-5)


def test_flips_and_turns_are_exact_and_all_eight_occur() -> None:
    batch = images(200)
    changed = back(augment(batch, randoms(200), Augment(), SPEC))
    symmetries = [torch.rot90(flipped, turn, (1, 2)) for flipped in (batch, batch.flip(2)) for turn in range(4)]
    matches = torch.stack([((s - changed).abs().amax((1, 2, 3)) < 0.01) for s in symmetries])
    assert (matches.sum(0) == 1).all(), "every image is one symmetry of itself"
    assert (matches.sum(1) > 8).all(), "and every symmetry occurs"


@pytest.mark.parametrize("settings", [Augment(), Augment(rotate=30, scale=0.2, hue=0.05, contrast=0.3, saturation=0.3)])
def test_a_lesion_is_changed_alike_in_any_batch(settings: Augment) -> None:
    whole = augment(images(), randoms(), settings, SPEC)
    part = augment(images()[10:13], randoms()[10:13], settings, SPEC)
    assert torch.allclose(whole[10:13], part, atol=1e-5)


def test_brightness_scales_and_stays_in_its_range() -> None:
    ratio = back(augment(images(), randoms(), Augment(False, False, brightness=0.2), SPEC)) / images()
    assert (ratio.amax((1, 2, 3)) - ratio.amin((1, 2, 3))).max() < 1e-3, "one factor an image"
    factors = ratio.mean((1, 2, 3))
    assert factors.min() >= 0.8 - 1e-4
    assert factors.max() <= 1.2 + 1e-4
    assert factors.std() > 0.05


def test_contrast_and_saturation_keep_the_mean_grey_and_hue_the_luma() -> None:
    luma = torch.tensor([0.299, 0.587, 0.114])
    before = (images().float() @ luma).mean((1, 2))
    for settings in (Augment(False, False, contrast=0.4), Augment(False, False, saturation=0.4)):
        after = (back(augment(images(), randoms(), settings, SPEC)) @ luma).mean((1, 2))
        assert torch.allclose(before, after, atol=0.1)
    changed = back(augment(images(), randoms(), Augment(False, False, hue=0.2), SPEC))
    assert torch.allclose(changed @ luma, images().float() @ luma, atol=0.6)
    assert (changed - images()).abs().mean() > 3


def test_warping_moves_pixels_but_mirrors_nothing_in_from_nowhere() -> None:
    flat = torch.full((8, 24, 24, 3), 120, dtype=torch.uint8)
    settings = Augment(rotate=45, scale=0.3)
    assert torch.allclose(back(augment(flat, randoms(8), settings, SPEC)), flat.float(), atol=0.01)
    assert not torch.allclose(back(augment(images(8), randoms(8), settings, SPEC)), images(8).float(), atol=20)


def test_warp_without_angle_is_the_exact_symmetry() -> None:
    settings = Augment(scale=1e-9)
    warped = back(augment(images(), randoms(), settings, SPEC))
    batch = images()
    symmetries = [torch.rot90(f, t, (1, 2)) for f in (batch, batch.flip(2)) for t in range(4)]
    off = torch.stack([(s - warped).abs().amax((1, 2, 3)) for s in symmetries]).amin(0)
    assert off.max() < 0.1
