"""How a picture's and the metadata's log-odds become one score, and a fold's whole pipeline as it is served.

    joined = Joined.load(read)                                 # what `stack.save_stack` wrote
    joined.scores(fold_image, record, visit, alone)            # {mode: log-odds [B, K]}

A mode is named by what it takes, from the poorest to the richest:

    image          the picture alone
    record         the lesion's own metadata
    visit          metadata, compared with the patient's other lesions
    image_record   picture and record
    image_visit    picture and visit

A patient's only lesion has nothing to be compared with: where `alone`, `visit` is `record` and `image_visit` is
`image_record`. Everything is elementwise, so a lesion's score is the same, to the last bit, in any company.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lesionflow import recipe
from lesionflow.data.features import BLOCKS
from lesionflow.errors import DataError
from lesionflow.models.tabular import Boosted
from lesionflow.models.ways import (
    INDEX,
    METHODS,
    REMEDY,
    Floats,
    Line,
    Linear,
    Rank,
    Reference,
    Trees,
    Way,
    an_object,
    damaged,
    number,
    parsed,
    texts,
)

if TYPE_CHECKING:
    from lesionflow.data.features import Matrix

Flags = NDArray[np.bool_]

FORMAT = 1
MODES = tuple(recipe.MODES)
JOINED = {"image_record": "record", "image_visit": "visit"}
"""Each joined mode's metadata."""
IMAGE_LOGIT = "image_logit"
"""The picture's log-odds, where it is a column that trees learn from."""
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_MOST_FOLDS = 100


@dataclass(frozen=True)
class Pipeline:
    """All that scores a lesion without having learned from fold `fold`, but its picture's model."""

    fold: int
    record: Boosted
    visit: Boosted | None
    ways: Mapping[str, Way] = field(default_factory=dict)
    """By joined mode."""

    def scores(
        self, image: Floats | None, record: Floats | None, visit: Floats | None, alone: Flags
    ) -> dict[str, Floats]:
        """Log-odds [B] of every mode that the inputs allow, in the order of `MODES`.

        image [B]: log-odds of this fold's model of pictures; record [B, F] and visit [B, G]: features; alone [B]:
        whether a lesion is its patient's only one. None for what there isn't.
        """
        own: dict[str, tuple[Boosted, Floats]] = {}
        if record is not None:
            own["record"] = self.record, record
            if visit is not None and self.visit is not None:
                own["visit"] = self.visit, visit
        raw = {mode: trees.logits(values) for mode, (trees, values) in own.items()}
        for mode, of in JOINED.items():
            if image is not None and of in own and mode in self.ways:
                raw[mode] = self.ways[mode].join(image, raw[of], own[of][1])
        for mode, other in (("visit", "record"), ("image_visit", "image_record")):
            if mode in raw:
                raw[mode] = np.where(alone, raw[other], raw[mode])
        if image is not None:
            raw["image"] = image
        return {mode: raw[mode] for mode in MODES if mode in raw}

    def contributions(self, record: Floats, visit: Floats | None, alone: Flags) -> tuple[tuple[str, ...], Floats]:
        """What each feature adds to the log-odds of mode `visit` (`record` where there is none).

        Names [F] and float64 [B, F + 1], last the base. The names are those of the richest features.
        """
        if visit is None or self.visit is None:
            return self.record.names, self.record.contributions(record)
        names = self.visit.names
        shares, place = self.visit.contributions(visit), {name: column for column, name in enumerate(names)}
        if alone.any():
            columns = [*(place[name] for name in self.record.names), len(names)]
            plain = np.zeros((int(alone.sum()), len(names) + 1))
            plain[:, columns] = self.record.contributions(record[alone])
            shares[alone] = plain
        return names, shares


@dataclass(frozen=True)
class Joined:
    """Every fold's pipeline, and what they are fed."""

    pipelines: tuple[Pipeline, ...]
    blocks: tuple[str, ...]
    """Of features, all that any pipeline looks at."""
    modes: tuple[str, ...]
    """What it can score, in the order of `MODES`."""
    choices: dict[str, Any]
    """How each fold's way to join was chosen: see `stack.fit_stack`."""

    @property
    def served(self) -> str:
        """The richest mode."""
        return self.modes[-1]

    def scores(
        self, fold_image: Floats | None, record: Matrix, visit: Matrix | None, alone: Flags
    ) -> dict[str, Floats]:
        """Log-odds [B, K] of every mode, from the pictures' log-odds [B, K] and features of the same B lesions."""
        rows, lone = record.values, np.asarray(alone, np.bool_)
        self._check(fold_image, record, visit, lone)
        parts = [
            pipeline.scores(
                None if fold_image is None else np.ascontiguousarray(fold_image[:, k]),
                rows, None if visit is None else visit.values, lone,
            )
            for k, pipeline in enumerate(self.pipelines)
        ]  # fmt: skip
        return {mode: np.column_stack([part[mode] for part in parts]) for mode in parts[0]}

    def contributions(self, record: Matrix, visit: Matrix | None, alone: Flags) -> tuple[tuple[str, ...], Floats]:
        """`Pipeline.contributions`, the mean over all pipelines."""
        lone = np.asarray(alone, np.bool_)
        self._check(None, record, visit, lone)
        values = None if visit is None else visit.values
        found = [pipeline.contributions(record.values, values, lone) for pipeline in self.pipelines]
        return found[0][0], np.mean([shares for _, shares in found], axis=0)

    def importances(self) -> dict[str, float]:
        """Each feature's share of what the richest metadata's trees gained, the mean over all pipelines."""
        found = [(p.visit or p.record).importances() for p in self.pipelines]
        return {name: float(np.mean([one[name] for one in found])) for name in found[0]}

    def _check(self, fold_image: Floats | None, record: Matrix, visit: Matrix | None, alone: Flags) -> None:
        first = self.pipelines[0]
        for what, matrix, trees in (("record", record, first.record), ("visit", visit, first.visit)):
            if matrix is not None and trees is not None:
                check_names(matrix.names, trees.names, what)
                if len(matrix.values) != len(alone):
                    raise DataError(f"{what}: {len(matrix.values)} rows for {len(alone)} lesions; give one for each")
        if fold_image is None:
            return
        if fold_image.shape != (len(alone), len(self.pipelines)):
            raise DataError(
                f"pictures' log-odds: shape {fold_image.shape}, expected {len(alone)} lesions x "
                f"{len(self.pipelines)} folds; use the graph that belongs to these trees"
            )
        if not np.isfinite(fold_image).all():
            raise DataError("pictures' log-odds: NaN or infinite; leave out lesions that have no picture")

    @classmethod
    def load(cls, read: Callable[[str], bytes]) -> Joined:
        """What `stack.save_stack` wrote; `read` gives a file's bytes by its name.

        Raises `DataError` naming the field or the file that is damaged, missing or doesn't belong.
        """

        def bytes_of(name: str) -> bytes:
            try:
                return read(name)
            except (OSError, KeyError):
                raise DataError(f"{name}: missing, but the stack needs it: {REMEDY}") from None

        top = an_object(parsed(bytes_of(INDEX)), INDEX)
        names, modes = _layout(top)
        blocks = texts(top.get("blocks"), "blocks")
        if odd := [block for block in blocks if block not in BLOCKS]:
            raise damaged("blocks", f"no block {odd[0]!r} of features; there are {', '.join(BLOCKS)}")
        if not blocks:
            raise damaged("blocks", f"none of {', '.join(BLOCKS)}")
        entries = top.get("pipelines")
        if not isinstance(entries, list) or not 1 <= len(entries) <= _MOST_FOLDS:
            raise damaged("pipelines", f"expected 1 to {_MOST_FOLDS} of them")
        pipelines = []
        for k, value in enumerate(entries):
            where = f"pipelines[{k}]"
            entry = an_object(value, where)
            ways = an_object(entry.get("ways"), f"{where}.ways")
            if entry.get("fold") != k or set(ways) != set(modes) & set(JOINED):
                raise damaged(where, f"expected fold {k}, and a way for each joined mode")
            own = {of: _trees(bytes_of, entry.get(of), f"{where}.{of}", names[of]) for of in names}
            found = {m: _way(bytes_of, ways[m], f"{where}.ways.{m}", names[JOINED[m]]) for m in JOINED if m in ways}
            pipelines.append(Pipeline(k, own["record"], own.get("visit"), found))
        choices = an_object(top.get("choices"), "choices")
        return cls(tuple(pipelines), blocks, modes, choices)


def check_names(found: Sequence[str], expected: Sequence[str], what: str) -> None:
    """Raise `DataError` naming the first feature that isn't the one that the trees learned from."""
    if tuple(found) == tuple(expected):
        return
    absent = [name for name in expected if name not in found]
    problem = f"has no {absent[0]!r}" if absent else "has more features, or in another order"
    raise DataError(f"{what}: {problem} than the trees learned from; use the version of lesionflow that made them")


def _layout(top: dict[str, Any]) -> tuple[dict[str, tuple[str, ...]], tuple[str, ...]]:
    """Names of the features by metadata, and the modes, of an index that fits together."""
    if top.get("format") != FORMAT:
        raise damaged("format", f"this version of lesionflow reads {FORMAT}")
    names = {of: texts(value, f"names.{of}") for of, value in an_object(top.get("names"), "names").items()}
    if set(names) not in ({"record"}, {"record", "visit"}) or not all(names.values()):
        raise damaged("names", "expected those of record, and perhaps of visit")
    if odd := [name for name in names["record"] if name not in names.get("visit", names["record"])]:
        raise damaged("names", f"{odd[0]!r} is a feature of the record, but not of the visit")
    modes = texts(top.get("modes"), "modes")
    possible = [mode for mode in MODES if mode in names or mode == "image" or JOINED.get(mode) in names]
    if list(modes) not in (possible, [mode for mode in possible if "image" not in mode]):
        raise damaged("modes", f"expected {', '.join(possible)}, or those without image")
    return names, modes


def _trees(read: Callable[[str], bytes], value: Any, where: str, names: Sequence[str]) -> Boosted:
    files = texts(value, where)
    if not files or not all(_FILE.fullmatch(name) for name in files):
        raise damaged(where, "expected names of files in the same folder")
    return Boosted.load(read, files, names)


def _way(read: Callable[[str], bytes], value: Any, where: str, names: Sequence[str]) -> Way:
    entry = an_object(value, where)
    method, line = entry.get("method"), entry.get("line")
    if method == "linear":
        return Linear(Line.from_dict(line, f"{where}.line", 2))
    if method == "rank":
        image, trees = (Reference.from_dict(entry.get(name), f"{where}.{name}") for name in ("image", "trees"))
        edge = number(entry.get("edge"), f"{where}.edge")
        if not 0 < edge < 0.5:
            raise damaged(f"{where}.edge", "expected a number between 0 and 0.5")
        return Rank(image, trees, edge, Line.from_dict(line, f"{where}.line", 1))
    if method == "trees":
        trees_of_both = _trees(read, entry.get("files"), f"{where}.files", (*names, IMAGE_LOGIT))
        return Trees(trees_of_both, Line.from_dict(line, f"{where}.line", 1))
    raise damaged(f"{where}.method", f"expected one of {', '.join(METHODS)}")
