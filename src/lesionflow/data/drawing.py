"""Drawing a synthetic lesion: skin, outline, colour, hair, and one fine sign that only the pixels hold.

A crop shows 15 x 15 mm whatever its size in pixels, as in SLICE-3D. Everything that also stands in a
metadata column (size, outline, colours) is drawn from the very numbers the column is made of. The fine
sign, a bluish veil with a brown counterpart, leaves the mean colours as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import simplejpeg
from numpy.typing import NDArray

Floats = NDArray[np.float64]

FIELD_MM = 15.0
"""Side of a crop, millimetres."""
HARMONICS = (2, 3, 4, 5, 7)
"""Waves around the outline."""
JPEG_QUALITY = 88

# CIELAB (D65) to linear sRGB, IEC 61966-2-1.
_WHITE = np.array([0.95047, 1.0, 1.08883])
_TO_LINEAR = np.array(
    [[3.2404542, -1.5371385, -0.4985314], [-0.9692660, 1.8760108, 0.0415560], [0.0556434, -0.2040259, 1.0572252]]
)
_VEIL = np.array([-26.0, -4.0, 30.0], np.float32)
"""RGB change of the veil at full strength: darker and bluish."""


@dataclass(frozen=True)
class Lesion:
    """Everything that is drawn; lengths in millimetres, colours in CIELAB, angles in radians."""

    side: int
    """Pixels a side of the square crop."""
    major: float
    """Half the long axis."""
    minor: float
    """Half the short axis."""
    angle: float
    waves: Floats
    """Amplitudes of `HARMONICS` relative to the radius, and their phases, [2, 5]."""
    skin: Floats
    """L, a, b of the skin around, [3]."""
    colour: Floats
    """Mean L, a, b of the lesion, [3]."""
    variegation: float
    """Spread of the colour within the lesion, in units of L."""
    edge: float
    """Width of the border's fade, millimetres."""
    veil: float
    """Strength of the fine sign, 0 to 1."""
    hairs: int


def lab_to_rgb(lab: Floats) -> Floats:
    """CIELAB [..., 3] to sRGB 0..255 [..., 3], clipped to the gamut."""
    fy = (lab[..., 0] + 16) / 116
    f = np.stack([fy + lab[..., 1] / 500, fy, fy - lab[..., 2] / 200], -1)
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * _WHITE
    linear = np.clip(xyz @ _TO_LINEAR.T, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def outline(major: Floats, minor: Floats, waves: Floats, points: int = 72) -> tuple[Floats, Floats]:
    """Area (mm2) and perimeter (mm) of outlines; `major`, `minor` [N], `waves` [N, 2, 5]."""
    theta = np.linspace(0, 2 * np.pi, points, endpoint=False)
    factor = np.ones((len(major), points))
    for n, k in enumerate(HARMONICS):
        factor += waves[:, 0, n, None] * np.cos(k * theta + waves[:, 1, n, None])
    x, y = major[:, None] * np.cos(theta) * factor, minor[:, None] * np.sin(theta) * factor
    x2, y2 = np.roll(x, -1, 1), np.roll(y, -1, 1)
    return 0.5 * np.abs((x * y2 - x2 * y).sum(1)), np.hypot(x2 - x, y2 - y).sum(1)


def render(lesion: Lesion, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Draw one lesion, uint8 [side, side, 3]."""
    side = lesion.side
    axis = ((np.arange(side, dtype=np.float32) + 0.5) / side - 0.5) * FIELD_MM
    cos, sin = np.float32(np.cos(lesion.angle)), np.float32(np.sin(lesion.angle))
    # Coordinates in which the unwaved outline is the unit circle.
    u = (axis[None, :] * cos + axis[:, None] * sin) / np.float32(lesion.major)
    v = (axis[:, None] * cos - axis[None, :] * sin) / np.float32(lesion.minor)
    radius = np.sqrt(u * u + v * v) + np.float32(1e-6)
    mask = _mask(u, v, radius, lesion)

    skin, colour = lab_to_rgb(lesion.skin), lab_to_rgb(lesion.colour)
    darker = lab_to_rgb(lesion.colour - [lesion.variegation, 0, 0]) - colour
    fields = _fields(side, rng, 2)
    tone = fields[0] * mask
    weight = mask.sum() + 1e-6
    tone = (tone - mask * (tone.sum() / weight)).astype(np.float32)
    veil = _veil(u, v, mask, rng) * np.float32(lesion.veil)

    image = np.empty((side, side, 3), np.float32)
    light = 1 + np.float32(0.02) * fields[1] + rng.standard_normal((side, side), np.float32) * np.float32(0.012)
    for channel in range(3):
        flat = skin[channel] + (colour[channel] - skin[channel]) * mask + darker[channel] * tone
        image[..., channel] = (flat + _VEIL[channel] * veil) * light
    _draw_hairs(image, lesion.hairs, axis, rng)
    return np.clip(image + 0.5, 0, 255).astype(np.uint8)


def encode(image: NDArray[np.uint8]) -> bytes:
    """JPEG as the competition stores it: about 3 KB."""
    return simplejpeg.encode_jpeg(image, quality=JPEG_QUALITY, colorsubsampling="420")  # type: ignore[no-any-return]


def _mask(u: NDArray[np.float32], v: NDArray[np.float32], radius: NDArray[np.float32], lesion: Lesion) -> Floats:
    """How much a pixel belongs to the lesion, 0..1; the outline's waves by powers of exp(i theta), without atan2."""
    unit = (u + 1j * v) / radius
    factor = np.ones_like(radius)
    power, at = unit, 1
    for n, k in enumerate(HARMONICS):
        while at < k:
            power, at = power * unit, at + 1
        amplitude, phase = np.float32(lesion.waves[0, n]), lesion.waves[1, n]
        factor += amplitude * (power.real * np.float32(np.cos(phase)) - power.imag * np.float32(np.sin(phase)))
    distance = (radius - factor) * np.float32(lesion.minor / lesion.edge)
    return 1 / (1 + np.exp(np.clip(4 * distance, -30, 30)))


def _fields(side: int, rng: np.random.Generator, count: int) -> NDArray[np.float32]:
    """Smooth random fields with unit spread, float32 [count, side, side]."""
    coarse = rng.standard_normal((count, 6, 6), np.float32)
    at = np.linspace(0, 5, side, dtype=np.float32)
    low = np.minimum(at.astype(np.int64), 4)
    share = at - low
    share = share * share * (3 - 2 * share)
    weights = np.zeros((side, 6), np.float32)
    weights[np.arange(side), low], weights[np.arange(side), low + 1] = 1 - share, share
    fields: NDArray[np.float32] = weights @ coarse @ weights.T
    return fields


def _veil(u: NDArray[np.float32], v: NDArray[np.float32], mask: Floats, rng: np.random.Generator) -> Floats:
    """The fine sign's pattern: a blot inside the lesion, less its mean over the lesion."""
    turn = rng.uniform(0, 2 * np.pi)
    x, y = 0.35 * np.cos(turn), 0.35 * np.sin(turn)
    blot = np.exp(-(((u - np.float32(x)) ** 2 + (v - np.float32(y)) ** 2) / np.float32(0.18))) * mask
    return blot - mask * (blot.sum() / (mask.sum() + 1e-6))


def _draw_hairs(image: NDArray[np.float32], count: int, axis: NDArray[np.float32], rng: np.random.Generator) -> None:
    for angle, offset, bend, shade in rng.random((count, 4)):
        cos, sin = np.float32(np.cos(np.pi * angle)), np.float32(np.sin(np.pi * angle))
        along = axis[None, :] * cos + axis[:, None] * sin
        across = axis[:, None] * cos - axis[None, :] * sin
        across = across + np.float32(bend - 0.5) * 0.06 * along * along - np.float32(offset - 0.5) * 14
        hair = np.abs(across) < 0.09
        image[hair] *= np.float32(0.35 + 0.3 * shade)
