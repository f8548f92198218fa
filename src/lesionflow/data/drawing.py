"""Drawing synthetic lesions: skin, outline, colour, hair, and one sign that only the pixels hold.

A crop shows 15 x 15 mm whatever its size in pixels, as in SLICE-3D. What stands in a column is drawn
from that column: colours of lesion and skin in CIELAB (D65), area, eccentricity, border and the
variegation of colour. The **structure** is not in any column: it shifts hue and lightness from the
lesion's centre to its rim, with mean zero over the lesion, so that the measured colours stay true, and
adds streaks around the border.

Skin, mottling and hair are cut from the tiles of `textures`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from lesionflow.data.textures import Plane, bank, crop

Pixels = NDArray[np.uint8]

FIELD_MM = 15.0
"""Side of a crop, millimetres."""
SMALLEST, LARGEST = 61, 239
"""Sides of a crop, pixels."""
DICE = 43
"""Uniform random numbers that drawing one lesion takes."""
JPEG_QUALITY = 75
_ANGLES = 512
_WAVES = (3, 5, 7, 9, 11)
_WAVE_SHARES = (0.6, 1.0, 1.3, 1.0, 0.7)
_STREAKS = 15

# sRGB (IEC 61966-2-1) from XYZ, with the D65 white folded in.
_WHITE = np.array([0.95047, 1.0, 1.08883])
_TO_LINEAR = np.array(
    [[3.2404542, -1.5371385, -0.4985314], [-0.9692660, 1.8760108, 0.0415560], [0.0556434, -0.2040259, 1.0572252]]
)
_FROM_WHITE = (_TO_LINEAR * _WHITE).astype(np.float32)


@dataclass(frozen=True)
class Scene:
    """What one crop shows; colours in CIELAB."""

    skin: tuple[float, float, float]
    delta: tuple[float, float, float]
    """Lesion minus skin, mean over the lesion."""
    skin_std: float
    """Spread of the skin's L."""
    color_std: float
    """Spread of colour within the lesion."""
    area: float
    """mm2"""
    eccentricity: float
    ratio: float
    """Perimeter^2 / area over that of the smooth ellipse, at least 1."""
    structure: float
    """The sign that no column holds, standard normal."""
    hairiness: float
    """The patient's, 0..1."""


def draw(scene: Scene, dice: Plane) -> Pixels:
    """One crop, uint8 [side, side, 3], 61..239 pixels a side. `dice` are `DICE` uniform numbers in 0..1."""
    u = dice.tolist()
    textures = bank()
    side = _side(u[0], u[1])
    fine = crop(textures.grain if u[2] < 0.5 else textures.lines, side, u[3], u[4], u[5])
    coarse = crop(textures.blotches, side, u[6], u[7], u[8])
    tint = crop(textures.blotches, side, u[9], u[10], u[8])
    std = scene.skin_std
    lightness = scene.skin[0] + (0.8 * std) * fine + (0.6 * std) * coarse
    lightness += _slope(side, u[11], u[12])
    red = scene.skin[1] + (0.45 * std) * tint - (0.15 * std) * fine
    yellow = scene.skin[2] + (0.35 * std) * coarse
    planes = (lightness, red, yellow)
    if u[13] < 0.3:
        _add_neighbour(planes, scene, u[14:18])
    _add_lesion(planes, scene, u[18:35])
    _add_hair(planes, scene.hairiness, u[35:41])
    if u[41] < 0.015:  # The edge of a body part, against the booth's dark.
        for plane, value in zip(planes, (2.0, 0.0, 0.0), strict=True):
            plane[:, : int(side * 0.2 * u[42])] = value
    return to_rgb(*planes)


def encode(image: Pixels) -> bytes:
    """JPEG as the competition stores it: quality 75, 4:2:0, about 3 KB."""
    return simplejpeg.encode_jpeg(image, quality=JPEG_QUALITY, colorsubsampling="420")  # type: ignore[no-any-return]


def to_rgb(lightness: Plane, a: Plane, b: Plane) -> Pixels:
    """CIELAB planes to sRGB, uint8 [H, W, 3], clipped to the gamut."""
    y = (lightness + np.float32(16)) * np.float32(1 / 116)
    cubes = [f * f * f for f in (y + a * np.float32(1 / 500), y, y - b * np.float32(1 / 200))]
    image = np.empty((*lightness.shape, 3), np.uint8)
    gamma = _gamma()
    for channel, (x_part, y_part, z_part) in enumerate(_FROM_WHITE):
        linear = x_part * cubes[0] + y_part * cubes[1] + z_part * cubes[2]
        np.clip(linear * np.float32(4095), 0, 4095, out=linear)
        image[..., channel] = gamma[linear.astype(np.int16)]
    return image


def _add_lesion(planes: tuple[Plane, Plane, Plane], scene: Scene, u: list[float]) -> None:
    side = planes[0].shape[0]
    scale = side / FIELD_MM
    flat = np.sqrt(1 - scene.eccentricity**2)
    minor = np.sqrt(scene.area * flat / np.pi) * scale
    major = minor / flat
    radius = _outline(scene.ratio, scene.structure, u)
    reach = int(np.ceil(1.25 * major * float(radius.max()))) + 2
    middle = side / 2
    low, high = max(0, int(middle) - reach), min(side, int(middle) + reach)
    axis = np.arange(low, high, dtype=np.float32) + np.float32(0.5 - middle)
    turn = np.pi * u[11]
    cos, sin = np.cos(turn), np.sin(turn)
    x = (axis[None, :] * cos + axis[:, None] * sin).astype(np.float32) * np.float32(1 / major)
    y = (axis[:, None] * cos - axis[None, :] * sin).astype(np.float32) * np.float32(1 / minor)
    angle = (np.arctan2(y, x) * np.float32(_ANGLES / (2 * np.pi))).astype(np.int16) & (_ANGLES - 1)
    depth = np.sqrt(x * x + y * y) / radius[angle]  # 1 on the border.
    inside = depth < 1
    pixels = max(int(inside.sum()), 1)
    soft = np.float32(max(2.0 / np.sqrt(major * minor), 0.15 + 0.3 * u[12]))
    mask = np.clip((1 - depth) / soft + np.float32(0.5), 0, 1)
    mask *= mask * (3 - 2 * mask)
    held = mask * inside
    # The fade takes colour from within the border; the rest is made up for it, so that the mean holds.
    gain = np.float32(pixels / max(float(held.sum()), 1.0))

    view = tuple(p[low:high, low:high] for p in planes)
    textures = bank()
    for plane, delta in zip(view, scene.delta, strict=True):
        plane += (gain * np.float32(delta)) * mask
    spread = scene.color_std
    for plane, share, start in ((view[0], 1.5, 13), (view[1], 0.7, 15), (view[2], 1.1, 15)):
        field = crop(textures.mottle, high - low, u[start], u[start + 1], u[11]) * mask
        field -= mask * np.float32(float((field * inside).sum()) / max(float(held.sum()), 1.0))
        plane += np.float32(share * spread) * field
    profile = np.clip(1 - 2 * depth * depth, -1, 1) * mask
    profile -= mask * np.float32(float((profile * inside).sum()) / max(float(held.sum()), 1.0))
    for plane, share in zip(view, _STRUCTURE_SHIFT, strict=True):
        plane += np.float32(share * scene.structure) * profile


_STRUCTURE_SHIFT = (2.5, -2.0, -11.0)
"""CIELAB at the centre per unit of structure; the rim goes the other way."""


def _outline(ratio: float, structure: float, u: list[float]) -> Plane:
    """The border's radius over the ellipse's by angle, float32 [angles]: waves with the asked perimeter, same area.

    A wave of amplitude a and order k lengthens perimeter^2 / area by a factor of about 1 + a^2 (k^2 - 1) / 2.
    """
    theta = np.arange(_ANGLES) * (2 * np.pi / _ANGLES)
    share = (np.array(u[:5]) + 0.15) * _WAVE_SHARES
    order = np.array(_WAVES)
    amplitude = np.sqrt(2 * max(ratio - 1, 0) * (share / share.sum()) / (order**2 - 1))
    radius = 1 + amplitude @ np.cos(order[:, None] * theta + 2 * np.pi * np.array(u[5:10])[:, None])
    radius += 0.035 * min(max(structure, 0.0), 2.5) * np.cos(_STREAKS * theta + 5 * np.sin(theta) + 2 * np.pi * u[10])
    radius = np.maximum(radius, 0.25)
    return np.asarray(radius / np.sqrt(np.mean(radius**2)), np.float32)


def _add_neighbour(planes: tuple[Plane, Plane, Plane], scene: Scene, u: list[float]) -> None:
    """A freckle or a small naevus off centre, in the same colours."""
    side = planes[0].shape[0]
    turn, away = 2 * np.pi * u[0], (0.34 + 0.12 * u[1]) * side
    cx, cy = side / 2 + away * np.cos(turn), side / 2 + away * np.sin(turn)
    radius = (0.35 + 0.8 * u[2]) * side / FIELD_MM
    reach = int(2 * radius) + 1
    left, top = max(0, int(cx) - reach), max(0, int(cy) - reach)
    x = np.arange(left, min(side, int(cx) + reach), dtype=np.float32) - np.float32(cx)
    y = np.arange(top, min(side, int(cy) + reach), dtype=np.float32) - np.float32(cy)
    away = (x[None, :] ** 2 + y[:, None] ** 2) * np.float32(1 / radius**2)
    mask = np.float32(0.4 + 0.6 * u[3]) * np.exp(-(away**2))
    for plane, delta in zip(planes, scene.delta, strict=True):
        plane[top : top + len(y), left : left + len(x)] += np.float32(delta) * mask


def _add_hair(planes: tuple[Plane, Plane, Plane], hairiness: float, u: list[float]) -> None:
    """Strands from the bank; how many is the patient's."""
    density = hairiness + 0.35 * (u[0] - 0.5)
    if density < 0.45:
        return
    layer = bank().hair[0 if density < 0.65 else 1 if density < 0.85 else 2]
    side = planes[0].shape[0]
    strands = crop(layer, side, u[1], u[2], u[3]) * np.float32(0.35 + 0.5 * u[4])
    shade = 72.0 if u[5] < 0.12 else 16.0  # Now and then grey hair.
    planes[0][...] += strands * (np.float32(shade) - planes[0])
    for plane in planes[1:]:
        plane *= 1 - np.float32(0.7) * strands


def _side(u: float, v: float) -> int:
    """Odd numbers around 129, a few far off: quantiles 97, 119, 129, 137, 175 at 1, 25, 50, 75, 99 %."""
    spread = 30.0 if v < 0.1 else 12.0
    normal = np.log(max(u, 1e-6) / max(1 - u, 1e-6)) / 1.702  # Logistic, close to a standard normal.
    return int(min(max(2 * round((128 + spread * normal) / 2) + 1, SMALLEST), LARGEST))


def _slope(side: int, u: float, v: float) -> Plane:
    """Uneven light: a plane of up to 4 L either way."""
    axis = np.linspace(-1, 1, side, dtype=np.float32)
    return np.asarray(np.float32(4 * (u - 0.5)) * axis[None, :] + np.float32(4 * (v - 0.5)) * axis[:, None])


@cache
def _gamma() -> Pixels:
    linear = np.arange(4096) / 4095
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.round(255 * encoded).astype(np.uint8)
