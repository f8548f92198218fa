"""Near-duplicate images: the same picture re-encoded, resized or slightly brightened.

Lesion crops all look alike at a glance (a dark blob on skin), so the search is in three steps that
grow stricter. Each image becomes 64 low-frequency DCT coefficients of its 32 x 32 grey thumbnail.
Their signs around the data set's medians are 64 balanced bits; pairs that agree on one of four
bands of 16 bits are candidates, which finds every pair of Hamming distance three or less. What
survives a distance on the coefficients is confirmed on the pictures themselves (`same_picture`).

Memory is 72 bytes an image. Turned and mirrored copies are not looked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lesionflow.data.images import Pixels

SIDE = 32
_KEPT = 8
_BANDS = 4
_HAMMING = 12
_DISTANCE = 0.25
_BUCKET = 2000

# On 7,479 real crops the most alike of 3,367 look-alikes reach 0.46, re-encoded, halved and
# enlarged copies at least 0.76.
_COMPARED = 48
_BLOCKS = 6
_CORRELATION = 0.65
_DIFFERENCE = 8.0


def thumbnail(pixels: Pixels) -> Pixels:
    """uint8 [H, W, 3] to grey uint8 [32, 32], by area."""
    image = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BOX)
    return np.asarray(image.convert("L"))


def features(thumbnails: Pixels) -> NDArray[np.int8]:
    """uint8 [N, 32, 32] to int8 [N, 64]: low DCT coefficients without the mean, scaled to length 127.

    A picture without contrast gives zeros.
    """
    basis = _dct_basis()
    spectrum = (basis @ thumbnails.astype(np.float32) @ basis.T).reshape(len(thumbnails), -1)
    spectrum[:, 0] = 0.0
    length = np.linalg.norm(spectrum, axis=1, keepdims=True)
    unit = np.divide(spectrum, length, out=np.zeros_like(spectrum), where=length > SIDE)
    scaled: NDArray[np.int8] = np.rint(unit * 127).astype(np.int8)
    return scaled


def candidates(coefficients: NDArray[np.int8]) -> NDArray[np.int64]:
    """Pairs of rows, [P, 2] with the smaller row first, whose coefficients nearly agree.

    Rows of zeros (pictures without contrast) are left out.
    """
    rows = np.flatnonzero(coefficients.any(axis=1))
    kept = coefficients[rows]
    if len(rows) < 2:
        return np.empty((0, 2), np.int64)
    # Interleaved, so that every band holds low and high frequencies alike.
    order = np.arange(_KEPT * _KEPT).reshape(-1, _BANDS).T.reshape(-1)
    bits = np.ascontiguousarray(np.packbits((kept > np.median(kept, axis=0))[:, order], axis=1))
    words, whole = bits.view(np.uint16), bits.view(np.uint64)[:, 0]
    found = []
    for band in range(_BANDS):
        for left, right in _bucket_pairs(words[:, band]):
            near = np.bitwise_count(whole[left] ^ whole[right]) <= _HAMMING
            left, right = left[near], right[near]
            gap = np.linalg.norm(kept[left].astype(np.float32) - kept[right].astype(np.float32), axis=1)
            close = gap <= 127 * _DISTANCE
            found.append(np.stack([rows[left[close]], rows[right[close]]], axis=1))
    if not found:
        return np.empty((0, 2), np.int64)
    return np.unique(np.sort(np.concatenate(found), axis=1), axis=0)


def _bucket_pairs(words: NDArray[np.uint16]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Index pairs of equal words, in batches; a word that very many share tells nothing and is cut short."""
    order = np.argsort(words, kind="stable")
    ordered = words[order]
    for shift in range(1, _BUCKET):
        same = np.flatnonzero(ordered[shift:] == ordered[:-shift])
        if not len(same):
            return
        yield order[same], order[same + shift]


def same_picture(first: Pixels, second: Pixels) -> bool:
    """Whether two decoded images, uint8 [H, W, 3], are one picture.

    At 48 x 48 and after equalising the mean colour they must differ by at most eight grey levels on
    average, and in the typical one of 6 x 6 blocks their fine detail (what is left without the
    block's mean) must correlate above 0.65. Two lesions share the coarse look, never the detail;
    the median keeps black borders from deciding.
    """
    a, b = _comparable(first), _comparable(second)
    if float(np.abs(a - b).mean()) > _DIFFERENCE:
        return False
    fine_a, fine_b = _detail(a), _detail(b)
    scale = np.linalg.norm(fine_a, axis=1) * np.linalg.norm(fine_b, axis=1)
    correlation = np.sum(fine_a * fine_b, axis=1) / np.maximum(scale, 1e-6)
    return float(np.median(correlation)) > _CORRELATION


def _comparable(pixels: Pixels) -> NDArray[np.float32]:
    image = Image.fromarray(pixels).resize((_COMPARED, _COMPARED), Image.Resampling.BOX)
    values: NDArray[np.float32] = np.asarray(image, dtype=np.float32)
    centred: NDArray[np.float32] = values - values.mean(axis=(0, 1))
    return centred


def _detail(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """float32 [48, 48, 3] to [36, 192]: each block's pixels without the block's mean colour."""
    side = _COMPARED // _BLOCKS
    blocks = values.reshape(_BLOCKS, side, _BLOCKS, side, 3).transpose(0, 2, 1, 3, 4)
    detail: NDArray[np.float32] = blocks - blocks.mean(axis=(2, 3), keepdims=True)
    return detail.reshape(_BLOCKS * _BLOCKS, -1)


@cache
def _dct_basis() -> NDArray[np.float32]:
    """The first eight rows of the orthonormal DCT-II of length 32."""
    k, x = np.arange(_KEPT)[:, None], np.arange(SIDE)[None, :]
    basis = np.sqrt(2 / SIDE) * np.cos(np.pi * k * (2 * x + 1) / (2 * SIDE))
    basis[0] /= np.sqrt(2)
    single: NDArray[np.float32] = basis.astype(np.float32)
    return single
