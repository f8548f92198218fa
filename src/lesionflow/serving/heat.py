"""A map drawn over its crop in hue and saturation alone, for every kind of colour vision. No torch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lesionflow.data.images import Pixels
from lesionflow.serving.graph import Floats

Doubles = NDArray[np.float64]
Mask = NDArray[np.bool_]
_Y = np.array([0.2126, 0.7152, 0.0722])
"""Luminance of linear sRGB (IEC 61966-2-1)."""

TOWARDS, AGAINST = (0, 90, 200), (240, 220, 0)
"""sRGB of evidence for and against malignancy: blue and yellow, which every kind of colour vision tells apart, and
which skin is neither of."""
STRONGEST = 0.65
"""Share of the tint where the map is at its largest; the rest stays the picture's own colour."""
LEAST_SCALE = 2.0
"""Logits. A map that nowhere reaches this is drawn in faint colours, not blown up to full ones."""
OUTLINED = 0.2
"""Share of the crop that is outlined where there is evidence for malignancy, and painted over in the deletion test."""
LEGEND = (
    "Blue: places that raise the logit (towards malignant); yellow: places that lower it. Outlined, where something "
    "speaks for malignancy: the fifth of the crop where most does. The picture's own lightness is kept."
)


def enlarged(cam: Floats, size: int) -> Floats:
    """Maps float32 [B, h, w] to [B, size, size], bilinear."""
    cells = [Image.fromarray(np.ascontiguousarray(one, dtype=np.float32)) for one in cam]
    large = [np.asarray(cell.resize((size, size), Image.Resampling.BILINEAR)) for cell in cells]
    return np.stack(large) if large else np.zeros((0, size, size), np.float32)


def highest(scores: Floats, count: int) -> Mask:
    """The `count` places of each map [B, S, S] with the highest scores; among equal ones the first."""
    flat = scores.reshape(len(scores), -1)
    mask = np.zeros(flat.shape, dtype=bool)
    np.put_along_axis(mask, np.argsort(-flat, axis=1, kind="stable")[:, :count], True, axis=1)
    return mask.reshape(scores.shape)


def overlay(pixels: Pixels, cam: Floats) -> Pixels:
    """A crop uint8 [S, S, 3] with its map [h, w] over it, uint8 [S, S, 3]; `LEGEND` says how to read it.

    Only hue and saturation carry the map: each pixel keeps its luminance, so the lesion stays visible as it is.
    """
    large = enlarged(cam[None], len(pixels))[0]
    weight = STRONGEST * large / max(LEAST_SCALE, float(np.abs(cam).max()))
    light = _linear(pixels / 255.0)
    luminance = (light @ _Y)[..., None]
    tint = np.where(weight[..., None] > 0, _tinted(luminance, TOWARDS), _tinted(luminance, AGAINST))
    mixed = light + np.abs(weight)[..., None].clip(0, STRONGEST) * (tint - light)
    drawn: Pixels = np.rint(255 * _encoded(mixed.clip(0, 1))).astype(np.uint8)
    if float(large.max()) > LEAST_SCALE / 4:
        inside = highest(large[None], round(OUTLINED * large.size))[0]
        drawn[_border(inside)] = 255
        drawn[_border(~inside)] = 0
    return drawn


def _linear(encoded: Doubles) -> Doubles:
    return np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)


def _encoded(linear: Doubles) -> Doubles:
    return np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)


def _tinted(luminance: Doubles, colour: tuple[int, int, int]) -> Doubles:
    """The colour, linear [S, S, 3], at each pixel's luminance [S, S, 1]; paler where it can't be that bright."""
    pure = _linear(np.array(colour) / 255.0)
    tint = luminance * pure / float(pure @ _Y)
    brightest = tint.max(-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        kept = np.where(brightest > 1, (1 - luminance) / (brightest - luminance), 1.0)
    return luminance + kept * (tint - luminance)


def _border(inside: Mask) -> Mask:
    """The places of `inside` [S, S] that touch the outside."""
    padded = np.pad(inside, 1, mode="edge")
    around = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return inside & ~around
