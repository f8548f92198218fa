"""Tiles of noise and hair that the synthetic crops are cut from.

They are the same for every set and seed (they belong to the generator's version), drawn once per
process in a fraction of a second, and cut at random places and turns.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from lesionflow.data.cohort import stream

Plane = NDArray[np.float32]
_TILE = 512


@dataclass(frozen=True)
class Bank:
    """Textures of `_TILE` pixels a side, unit spread and mean zero; hair in 0..1."""

    grain: Plane
    lines: Plane
    blotches: Plane
    mottle: Plane
    hair: tuple[Plane, Plane, Plane]


@cache
def bank() -> Bank:
    rng = stream(0, 9, 0)
    frequency = np.fft.fftfreq(_TILE)
    fy, fx = frequency[:, None], frequency[None, : _TILE // 2 + 1].copy()
    fx[0, -1] = 0.5
    f = np.hypot(fx, fy)

    def texture(gain: NDArray[np.float64]) -> Plane:
        field = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((_TILE, _TILE))) * gain, (_TILE, _TILE))
        field -= field.mean()
        return np.asarray(field / field.std(), np.float32)

    def band(low: float, high: float) -> NDArray[np.float64]:
        return np.asarray(np.exp(-((f / high) ** 2)) * (1 - np.exp(-((f / low) ** 2))))

    angle = np.arctan2(fy, fx)
    along = np.exp(-((np.sin(angle - 0.5) / 0.45) ** 2))
    return Bank(
        grain=texture(band(0.02, 0.22) + 0.6 * band(0.01, 0.05)),
        lines=texture(band(0.05, 0.15) * along + 0.4 * band(0.02, 0.2)),
        blotches=texture(band(0.004, 0.03)),
        mottle=texture(band(0.012, 0.06)),
        hair=(_strands(rng, 40), _strands(rng, 120), _strands(rng, 300)),
    )


def _strands(rng: np.random.Generator, count: int) -> Plane:
    """Curved strands with soft edges on a tile that wraps around."""
    layer = np.zeros((_TILE, _TILE))
    steps = np.linspace(0, 1, 600)[:, None]
    main = rng.uniform(0, np.pi)
    turn = main + 0.45 * rng.standard_normal(count) + np.pi * (rng.random(count) < 0.2) * 0.5
    bend = rng.normal(0, 0.9, count)
    length = rng.uniform(50, 170, count)
    heading = turn + bend * (steps - 0.5)
    x = rng.uniform(0, _TILE, count) + np.cumsum(np.cos(heading), 0) * length / 600
    y = rng.uniform(0, _TILE, count) + np.cumsum(np.sin(heading), 0) * length / 600
    taper = np.minimum(1, 4 * (1 - steps)) * rng.uniform(0.6, 1.0, count)
    reach = 2
    for dy in range(-reach, reach + 1):
        for dx in range(-reach, reach + 1):
            column, row = np.floor(x) + dx, np.floor(y) + dy
            distance = np.hypot(x - column, y - row)
            np.maximum.at(
                layer,
                (row.astype(int) % _TILE, column.astype(int) % _TILE),
                taper * np.exp(-((distance / 0.8) ** 2)),
            )
    return layer.astype(np.float32)


def crop(tile: Plane, side: int, u: float, v: float, flip: float) -> Plane:
    """A square of the tile at a random place, one of eight ways round; a view, never written to."""
    room = _TILE - side
    top, left = int(u * room), int(v * room)
    part = tile[top : top + side, left : left + side]
    way = int(flip * 8)
    part = part[:: -1 if way & 1 else 1, :: -1 if way & 2 else 1]
    return part.T if way & 4 else part
