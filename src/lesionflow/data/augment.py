"""Random changes to a batch of training images, on the device the batch is on.

All randomness comes in as numbers drawn with the lesion's place in the global order
(`data.sampler.Draws`), so a lesion is changed the same way on one process or on many.
Colour changes and normalisation are one 3x3 matrix and one offset per image.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from lesionflow.data.images import PreprocessSpec
from lesionflow.recipe import Augment

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
# RGB -> YIQ, in which a change of hue is a rotation of the last two axes.
_YIQ = ((0.299, 0.587, 0.114), (0.596, -0.274, -0.322), (0.211, -0.523, 0.312))


def normalise(images: Tensor, spec: PreprocessSpec) -> Tensor:
    """uint8 [B, S, S, 3] to the network's float32 [B, 3, S, S] (channels last in memory)."""
    b, height, width, channels = images.shape
    mean, std = (torch.tensor(v, dtype=torch.float32, device=images.device) for v in (spec.mean, spec.std))
    # A whole line of pixels at a time: broadcasting over three channels alone would be four times slower.
    scale, offset = (1 / (255 * std)).repeat(width), (-mean / std).repeat(width)
    lines = images.view(b, height, width * channels).to(torch.float32)
    return torch.addcmul(offset, lines, scale).view(images.shape).permute(0, 3, 1, 2)


def augment(images: Tensor, randoms: Tensor, settings: Augment, spec: PreprocessSpec) -> Tensor:
    """Change and normalise a batch.

    `images` uint8 [B, S, S, 3], `randoms` float32 [B, DRAWS] in [0, 1). Returns float32 [B, 3, S, S].
    """
    flip_x, flip_y, turn, angle, zoom, *colour = randoms.unbind(dim=1)
    if settings.rotate or settings.scale:
        x = images.to(torch.float32).permute(0, 3, 1, 2)
        x = _warp(x, settings, flip_x, flip_y, turn, angle, zoom).permute(0, 2, 3, 1)
    else:
        x = _dihedral(images, settings, flip_x, flip_y, turn).to(torch.float32)
    matrix, offset = _colour(x, settings, torch.stack(colour, dim=1), spec)
    flat = torch.baddbmm(offset[:, None, :], x.flatten(1, 2), matrix.transpose(1, 2))
    return flat.view(x.shape).permute(0, 3, 1, 2)


def _dihedral(images: Tensor, settings: Augment, flip_x: Tensor, flip_y: Tensor, turn: Tensor) -> Tensor:
    """Flips and right-angle rotations: exact, no resampling. One gather per distinct symmetry."""
    code = _quarter_turns(settings, turn)
    if settings.flip:
        code = code + 4 * (flip_x < 0.5).long() + 8 * (flip_y < 0.5).long()
    out = torch.empty_like(images)
    for symmetry in sorted(set(code.tolist())):
        chosen = code == symmetry
        part = torch.rot90(images[chosen], symmetry % 4, (1, 2))
        dims = [d for d, bit in ((2, 4), (1, 8)) if symmetry & bit]
        out[chosen] = torch.flip(part, dims) if dims else part
    return out


def _quarter_turns(settings: Augment, turn: Tensor) -> Tensor:
    return (turn * 4).long() if settings.rotate90 else torch.zeros_like(turn, dtype=torch.long)


def _warp(
    x: Tensor, settings: Augment, flip_x: Tensor, flip_y: Tensor, turn: Tensor, angle: Tensor, zoom: Tensor
) -> Tensor:
    """Flips, rotation and zoom in one resampling; what lies outside is mirrored in."""
    theta = _quarter_turns(settings, turn) * (math.pi / 2) + (2 * angle - 1) * math.radians(settings.rotate)
    scale = 1 / (1 + (2 * zoom - 1) * settings.scale)
    sign_x = torch.where((flip_x < 0.5) & settings.flip, -1.0, 1.0)
    sign_y = torch.where((flip_y < 0.5) & settings.flip, -1.0, 1.0)
    cos, sin, zero = theta.cos() * scale, theta.sin() * scale, torch.zeros_like(theta)
    affine = torch.stack([cos * sign_x, -sin * sign_y, zero, sin * sign_x, cos * sign_y, zero], 1).view(-1, 2, 3)
    grid = functional.affine_grid(affine, list(x.shape), align_corners=False)
    return functional.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def _colour(x: Tensor, settings: Augment, u: Tensor, spec: PreprocessSpec) -> tuple[Tensor, Tensor]:
    """Brightness, contrast, saturation, hue and normalisation as matrix [B, 3, 3] and offset [B, 3]."""
    b = len(x)
    mean, std = x.new_tensor(spec.mean), x.new_tensor(spec.std)
    luma = x.new_tensor(_LUMA)
    change = (2 * u[:, :4] - 1) * x.new_tensor(
        [settings.brightness, settings.contrast, settings.saturation, settings.hue * 2 * math.pi]
    )
    brightness, contrast, saturation = (1 + change[:, i, None, None] for i in range(3))
    matrix = torch.eye(3, device=x.device).expand(b, 3, 3) * brightness
    offset = x.new_zeros(b, 3)
    if settings.contrast:
        # Away from or towards the image's own mean grey, as torchvision does.
        grey = (x.mean(dim=(1, 2)) @ luma)[:, None] * brightness[:, :, 0]
        matrix = matrix * contrast
        offset = grey * (1 - contrast[:, :, 0]) * x.new_ones(3)
    if settings.saturation:
        blend = saturation * torch.eye(3, device=x.device) + (1 - saturation) * luma.expand(3, 3)
        matrix, offset = blend @ matrix, (blend @ offset[:, :, None])[:, :, 0]
    if settings.hue:
        hue = _hue_rotation(change[:, 3])
        matrix, offset = hue @ matrix, (hue @ offset[:, :, None])[:, :, 0]
    scale = 1 / (255 * std)
    return matrix * scale[:, None], offset * scale - mean / std


def _hue_rotation(angle: Tensor) -> Tensor:
    yiq = angle.new_tensor(_YIQ)
    turn = torch.zeros(len(angle), 3, 3, device=angle.device)
    turn[:, 0, 0] = 1
    turn[:, 1, 1] = turn[:, 2, 2] = angle.cos()
    turn[:, 1, 2], turn[:, 2, 1] = -angle.sin(), angle.sin()
    back: Tensor = torch.linalg.inv(yiq)
    return back @ turn @ yiq
