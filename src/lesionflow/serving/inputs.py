"""Pictures that the model can't judge: what a crop looks like, held against the held-out lesions. No torch.

A network answers any picture, a blank one or a screenshot too. So a few plain figures of the crop (light, colour,
detail at several scales) are compared with those of real lesions that no model was trained on. A crop far outside
their range gets reasons in words instead of a band. So does one on which the folds' models disagree far more than they
do on held-out lesions.

All limits share one margin, chosen so that about `EXPECTED` of the held-out lesions themselves fall outside any of
them: how far a figure lies from the median is measured in the distance from the median to the 1 % or 99 % quantile,
and the margin is how many of these even the most unusual lesions keep to.

What this can't find: a picture with the light, colour and detail of skin that shows no lesion, an upside-down or
mirrored crop (the model takes those as they are), another part of the body, or a lesion of a kind never seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lesionflow.data.images import Pixels
from lesionflow.errors import DataError

Doubles = NDArray[np.float64]

EXPECTED = 0.002
"""Share of real lesions that fall outside."""
FEWEST = 200
"""With fewer held-out lesions nothing is known about the limits, and only flat pictures are refused."""
FLAT = 1.0
"""Standard deviation of the luminance, of 255, under which a picture shows nothing at all."""
LEVELS = 4
"""Scales of detail: differences between neighbours of 1, 2, 4 and 8 pixels."""
_EDGE = 0.01
_SLACK = 1.1
_TINY = 1e-6
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)
"""Weights of red, green and blue in the luminance (Rec. 601)."""
_CHUNK = 64

# What it means to lie below or above the held-out lesions.
_WORDS = {
    "brightness": ("much darker", "much brighter"),
    "contrast": ("with much less contrast", "with much more contrast"),
    "red_green": ("with much less red", "with much more red"),
    "blue_green": ("with much less blue", "with much more blue"),
    "colourfulness": ("with much less variety of colour", "with much more variety of colour"),
    "detail_1": ("much blurrier", "much noisier or sharper"),
    "detail_2": ("with much less fine detail", "with much more fine detail"),
    "detail_4": ("with much less detail", "with much more detail"),
    "detail_8": ("with much less structure", "with much more structure"),
    "peaked": ("with detail spread far more evenly", "with much harder edges"),
    "flat": ("with hardly a pixel like its neighbour", "with much larger areas of one flat colour"),
}
_DETAILS = tuple(f"detail_{2**level}" for level in range(LEVELS))


def statistics(pixels: Pixels) -> dict[str, Doubles]:
    """uint8 [B, S, S, 3] to figures of each crop, float64 [B] by name:

    `brightness`, `contrast`: mean and standard deviation of the luminance, 0..255; `red_green`, `blue_green`: log2 of
    the ratio of mean channels; `colourfulness`: log10 of the spread of the channels' differences; `detail_1` to
    `detail_8`: log10 of the root mean square of the luminance's Laplacian at that scale in pixels; `peaked`: log10 of
    the kurtosis of the finest of these (text and drawings are peaked, noise is not); `flat`: share of neighbouring
    pixels that are equal.
    """
    parts = [_statistics(pixels[start : start + _CHUNK]) for start in range(0, len(pixels), _CHUNK)]
    return {name: np.concatenate([part[name] for part in parts] or [np.zeros(0)]) for name in _WORDS}


def _statistics(pixels: Pixels) -> dict[str, Doubles]:
    channels = [np.ascontiguousarray(pixels[..., channel]) for channel in range(3)]
    colour = [channel.astype(np.float32) for channel in channels]
    red, green, blue = (channel.mean((1, 2)).astype(np.float64) + 1 for channel in colour)
    spread = np.hypot((colour[0] - colour[1]).std((1, 2)), (colour[2] - colour[1]).std((1, 2)))
    light = _LUMA[0] * colour[0] + _LUMA[1] * colour[1] + _LUMA[2] * colour[2]
    same = [channel[:, :, 1:] == channel[:, :, :-1] for channel in channels]
    found = {
        "brightness": light.mean((1, 2)).astype(np.float64),
        "contrast": light.std((1, 2)).astype(np.float64),
        "red_green": np.log2(red / green),
        "blue_green": np.log2(blue / green),
        "colourfulness": np.log10(spread.astype(np.float64) + 0.1),
        "flat": (same[0] & same[1] & same[2]).mean((1, 2)),
    }
    for level, name in enumerate(_DETAILS):
        squares = _laplacian(light).astype(np.float64) ** 2
        mean = squares.mean((1, 2))
        found[name] = np.log10(np.sqrt(mean) + 0.1)
        if level == 0:
            found["peaked"] = np.log10((squares**2).mean((1, 2)) / (mean**2 + _TINY) + 1)
        light = _halved(light)
    return found


def _laplacian(light: NDArray[np.float32]) -> NDArray[np.float32]:
    around = light[:, :-2, 1:-1] + light[:, 2:, 1:-1] + light[:, 1:-1, :-2] + light[:, 1:-1, 2:]
    return 4 * light[:, 1:-1, 1:-1] - around


def _halved(light: NDArray[np.float32]) -> NDArray[np.float32]:
    high, wide = light.shape[1] // 2, light.shape[2] // 2
    squares = light[:, : 2 * high, : 2 * wide].reshape(-1, high, 2, wide, 2)
    halved: NDArray[np.float32] = (squares[:, :, 0] + squares[:, :, 1]).sum(axis=-1) / np.float32(4)
    return halved


def reference(stats: Mapping[str, Doubles], fold_logits: ArrayLike | None = None) -> dict[str, Any]:
    """What the held-out lesions are like, for `unusual`; JSON-able, goes into the bundle as `inputs`.

    stats: `statistics` of n lesions; fold_logits [n, K]: the served models' logits of lesions that none of them was
    trained on, None where there are none. Gives `lesions`, `expected` (share outside), `limits` (name -> `low`,
    `high`), `disagreement` (highest standard deviation of a lesion's fold logits, or null) and `reason`, why there
    are no limits. Raises `DataError` for figures that aren't finite.
    """
    values = _table(stats)
    known: dict[str, Any] = {
        "lesions": len(values), "expected": EXPECTED, "limits": {}, "disagreement": None, "reason": None,
    }  # fmt: skip
    if len(values) < FEWEST:
        reason = f"{len(values)} held-out lesions: under {FEWEST} they don't show what is usual"
        return known | {"reason": f"{reason}; only flat pictures are refused"}
    if not np.isfinite(values).all():
        raise DataError("statistics of the held-out lesions: some aren't finite: was a crop empty?")
    low, centre, high = np.quantile(values, (_EDGE, 0.5, 1 - _EDGE), axis=0)
    down, up = np.maximum(centre - low, _TINY), np.maximum(high - centre, _TINY)
    far = np.maximum((centre - values) / down, (values - centre) / up).max(1)
    wide = None
    if (spread := _spread(fold_logits)) is not None:
        wide = max(float(np.quantile(spread, 1 - _EDGE)), _TINY)
        far = np.maximum(far, spread / wide)
    margin = float(np.quantile(far, 1 - EXPECTED)) * _SLACK
    limits = {
        name: {"low": float(centre[i] - margin * down[i]), "high": float(centre[i] + margin * up[i])}
        for i, name in enumerate(_WORDS)
    }
    return known | {"limits": limits, "disagreement": None if wide is None else margin * wide}


def unusual(
    stats: Mapping[str, Doubles], fold_logits: ArrayLike | None, reference: Mapping[str, Any]
) -> list[list[str]]:
    """Per lesion, why the model can't judge it, in words; empty where it can.

    stats: `statistics` of n lesions; fold_logits [n, K] or None. Raises `DataError` if `reference` isn't one.
    """
    values, names = _table(stats), list(_WORDS)
    reasons: list[list[str]] = [[] for _ in values]

    def note(rows: NDArray[np.bool_], text: str) -> None:
        for row in np.flatnonzero(rows):
            reasons[row].append(text)

    note(values[:, names.index("contrast")] < FLAT, "a flat picture that shows nothing")
    try:
        for name, limit in reference["limits"].items():
            column = values[:, names.index(name)]
            for outside, words in zip((column < limit["low"], column > limit["high"]), _WORDS[name], strict=True):
                note(outside, f"{words} than the lesions the model knows")
        spread = _spread(fold_logits)
        if reference["disagreement"] is not None and spread is not None:
            note(spread > reference["disagreement"], "the models disagree far more than on the lesions they know")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"bundle.json: inputs can't be used ({error}): export the bundle again") from None
    return reasons


def _table(stats: Mapping[str, Doubles]) -> Doubles:
    return np.stack([np.asarray(stats[name], dtype=np.float64) for name in _WORDS], axis=1)


def _spread(fold_logits: ArrayLike | None) -> Doubles | None:
    """How far the folds' models are apart, float64 [n]; one model alone can't disagree."""
    if fold_logits is None:
        return None
    logits = np.asarray(fold_logits, dtype=np.float64)
    return np.asarray(logits.std(axis=1)) if logits.ndim == 2 and logits.shape[1] > 1 else None
