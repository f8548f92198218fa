"""A split's ids, a stretch at a time, and the hash over every id with its fold, whatever the order of the rows.

The hash is `keys.digest` of `{"data": ..., "folds": [[id, fold], ... by id], "names": ...}`, fed to the hash function a
stretch at a time. Ids that already ascend, as the competition's do, are read twice; others as often as it takes to
have a part of them in memory at a time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

STRETCH = 1 << 14
"""Lesions whose ids are in memory together, so that many of them take no more than few."""
PART = 1 << 18
"""Lesions that are sorted together: 20 bytes each."""
_SAMPLE = 256

Pieces = Callable[[], Iterator[pa.Array]]
"""Gives all ids in the order of the rows, a piece at a time, as often as it is called."""


def stretches(ids: Sequence[str] | Path) -> Iterator[pa.Array]:
    """Ids in the order of the rows, of a sequence or of a file of folds, as Arrow arrays of `STRETCH`."""
    if isinstance(ids, Path):
        with pq.ParquetFile(ids) as file:
            for batch in file.iter_batches(STRETCH, columns=["isic_id"]):
                yield batch.column("isic_id").cast(pa.large_string())
    else:
        for start in range(0, len(ids), STRETCH):
            yield pa.array(ids[start : start + STRETCH], pa.large_string())


def split_hash(ids: Pieces, fold: NDArray[np.int8], data_hash: str, names: Sequence[str] | None) -> str:
    """SHA-256, 64 hex digits: the data's hash, each lesion's fold int8 [N], and the folds' names if there are any."""
    found = hashlib.sha256(f'{{"data":{_json(data_hash)},"folds":['.encode())
    comma = ""
    for part, folds in _ascending(ids, fold):
        for start in range(0, len(part), STRETCH):
            texts, numbers = part[start : start + STRETCH].to_pylist(), folds[start : start + STRETCH].tolist()
            found.update((comma + _json(list(zip(texts, numbers, strict=True)))[1:-1]).encode())
            comma = ","
    found.update(("]}" if names is None else f'],"names":{_json(list(names))}}}').encode())
    return found.hexdigest()


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _ascending(ids: Pieces, fold: NDArray[np.int8]) -> Iterator[tuple[pa.Array, NDArray[np.int8]]]:
    """All ids with their folds, ascending by id (and by fold where an id comes twice), in parts."""
    if _ascend(ids):
        at = 0
        for piece in ids():
            yield piece, fold[at : at + len(piece)]
            at += len(piece)
        return
    sample = pa.concat_arrays([piece.take(pa.array(range(0, len(piece), _SAMPLE))) for piece in ids()])
    limits = sample.take(pc.sort_indices(sample))[PART // _SAMPLE :: PART // _SAMPLE].unique().to_pylist()
    for low, high in pairwise([None, *limits, None]):
        texts, folds, at = [], [], 0
        for piece in ids():
            inside = np.ones(len(piece), bool)
            if low is not None:
                inside &= pc.greater_equal(piece, low).to_numpy(zero_copy_only=False)
            if high is not None:
                inside &= pc.less(piece, high).to_numpy(zero_copy_only=False)
            texts.append(piece.filter(pa.array(inside)))
            folds.append(fold[at : at + len(piece)][inside])
            at += len(piece)
        part = pa.table({"id": pa.chunked_array(texts), "fold": np.concatenate(folds)})
        part = part.sort_by([("id", "ascending"), ("fold", "ascending")]).combine_chunks()
        yield part.column("id").chunk(0) if len(part) else texts[0][:0], part.column("fold").to_numpy()


def _ascend(ids: Pieces) -> bool:
    """Whether every id is greater than the one before it."""
    last = None
    for piece in ids():
        if not len(piece):
            continue
        if last is not None and not last < piece[0].as_py():
            return False
        if not pc.all(pc.less(piece[:-1], piece[1:])).as_py() and len(piece) > 1:
            return False
        last = piece[-1].as_py()
    return True
