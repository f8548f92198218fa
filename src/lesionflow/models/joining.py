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

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lesionflow.errors import DataError
from lesionflow.models.tabular import Boosted

if TYPE_CHECKING:
    from lesionflow.data.features import Matrix

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]

FORMAT = 1
INDEX = "stack.json"
MODES = ("image", "record", "visit", "image_record", "image_visit")
"""From the poorest to the richest; of those there are the last is served."""
JOINED = {"image_record": "record", "image_visit": "visit"}
"""Each joined mode's metadata."""
METHODS = ("linear", "rank", "trees")
"""The simplest first: it wins a tie."""
IMAGE_LOGIT = "image_logit"
"""The picture's log-odds, where it is a column that trees learn from."""
_KNOTS = 1001
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_MOST_FOLDS = 100
_REMEDY = "restore the file, or train and export again"


@dataclass(frozen=True)
class Line:
    """Log-odds = intercept + sum of slope x input: a logistic regression. No slope is under 0."""

    slopes: tuple[float, ...]
    intercept: float

    def __call__(self, *columns: Floats) -> Floats:
        # Term by term: a matrix product may add up in another order for another number of rows.
        result = np.full(columns[0].shape, self.intercept)
        for slope, column in zip(self.slopes, columns, strict=True):
            result += slope * column
        return result

    def to_dict(self) -> dict[str, Any]:
        return {"slopes": list(self.slopes), "intercept": self.intercept}

    @classmethod
    def from_dict(cls, value: Any, where: str, inputs: int) -> Line:
        entry = _object(value, where)
        slopes = _numbers(entry.get("slopes"), f"{where}.slopes")
        if len(slopes) != inputs or min(slopes) < 0:
            raise _damaged(f"{where}.slopes", f"expected {inputs} numbers, none under 0")
        return cls(tuple(slopes), _number(entry.get("intercept"), f"{where}.intercept"))


@dataclass(frozen=True)
class Reference:
    """Where a score ranks among those of a reference: shares 0..1 at distinct, ascending scores."""

    at: tuple[float, ...]
    share: tuple[float, ...]

    @classmethod
    def of(cls, scores: Floats) -> Reference:
        """Of scores [n]: at most 1,001 quantiles; equal ones are one, at the mean of their shares."""
        shares = np.linspace(0, 1, min(_KNOTS, len(scores)))
        at, which, count = np.unique(np.quantile(scores, shares), return_inverse=True, return_counts=True)
        return cls(tuple(at.tolist()), tuple((np.bincount(which, shares) / count).tolist()))

    def __call__(self, scores: Floats) -> Floats:
        """Shares of scores [B], interpolated; what lies outside ranks as the lowest or the highest known."""
        return np.interp(scores, self.at, self.share)

    def to_dict(self) -> dict[str, Any]:
        return {"at": list(self.at), "share": list(self.share)}

    @classmethod
    def from_dict(cls, value: Any, where: str) -> Reference:
        entry = _object(value, where)
        at, share = (_numbers(entry.get(name), f"{where}.{name}") for name in ("at", "share"))
        if not (1 <= len(at) == len(share) <= _KNOTS):
            raise _damaged(where, f"expected as many shares as scores, 1 to {_KNOTS}")
        if np.any(np.diff(at) <= 0) or np.any(np.diff(share) < 0) or not 0 <= share[0] <= share[-1] <= 1:
            raise _damaged(where, "expected ascending scores, and shares ascending within 0..1")
        return cls(tuple(at), tuple(share))


class Way(Protocol):
    """How one fold joins a picture's log-odds [B], the trees' log-odds [B] and features [B, F] to log-odds [B]."""

    def join(self, image: Floats, trees: Floats, values: Floats) -> Floats: ...
    def to_dict(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Linear:
    """Two log-odds, weighed."""

    line: Line

    def join(self, image: Floats, trees: Floats, values: Floats) -> Floats:
        return self.line(image, trees)

    def to_dict(self) -> dict[str, Any]:
        return {"method": "linear", "line": self.line.to_dict()}


@dataclass(frozen=True)
class Rank:
    """The mean of two ranks, as log-odds, on one line."""

    image: Reference
    trees: Reference
    edge: float
    """Ranks are kept this far from 0 and 1, where log-odds end."""
    line: Line

    def mean_rank(self, image: Floats, trees: Floats) -> Floats:
        """Log-odds of the mean rank, float64 [B]."""
        share = np.clip(0.5 * (self.image(image) + self.trees(trees)), self.edge, 1 - self.edge)
        return np.asarray(np.log(share) - np.log1p(-share))

    def join(self, image: Floats, trees: Floats, values: Floats) -> Floats:
        return self.line(self.mean_rank(image, trees))

    def to_dict(self) -> dict[str, Any]:
        return {
            "method": "rank", "image": self.image.to_dict(), "trees": self.trees.to_dict(), "edge": self.edge,
            "line": self.line.to_dict(),
        }  # fmt: skip


@dataclass(frozen=True)
class Trees:
    """Trees that know the features and the picture's log-odds, on one line."""

    trees: Boosted
    line: Line

    def margin(self, image: Floats, values: Floats) -> Floats:
        """The trees' own log-odds, float64 [B]."""
        return self.trees.logits(np.column_stack([values, image]))

    def join(self, image: Floats, trees: Floats, values: Floats) -> Floats:
        return self.line(self.margin(image, values))

    def to_dict(self) -> dict[str, Any]:
        return {"method": "trees", "line": self.line.to_dict()}


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
                raise DataError(f"{name}: missing, but the stack needs it: {_REMEDY}") from None

        def trees(value: Any, where: str, names: Sequence[str]) -> Boosted:
            files = _texts(value, where)
            if not files or not all(_FILE.fullmatch(name) for name in files) or len(set(files)) < len(files):
                raise _damaged(where, "expected names of files in the same folder, each once")
            return Boosted.load(bytes_of, files, names)

        def way(value: Any, where: str, names: Sequence[str]) -> Way:
            entry = _object(value, where)
            method, line = entry.get("method"), entry.get("line")
            if method == "linear":
                return Linear(Line.from_dict(line, f"{where}.line", 2))
            one = Line.from_dict(line, f"{where}.line", 1)
            if method == "rank":
                image, other = (Reference.from_dict(entry.get(n), f"{where}.{n}") for n in ("image", "trees"))
                edge = _number(entry.get("edge"), f"{where}.edge")
                if not 0 < edge < 0.5:
                    raise _damaged(f"{where}.edge", "expected a number between 0 and 0.5")
                return Rank(image, other, edge, one)
            if method == "trees":
                return Trees(trees(entry.get("files"), f"{where}.files", (*names, IMAGE_LOGIT)), one)
            raise _damaged(f"{where}.method", f"expected one of {', '.join(METHODS)}")

        top = _object(_parsed(bytes_of(INDEX)), INDEX)
        if top.get("format") != FORMAT:
            raise _damaged("format", f"this version of lesionflow reads {FORMAT}")
        names = {of: _texts(value, f"names.{of}") for of, value in _object(top.get("names"), "names").items()}
        if set(names) not in ({"record"}, {"record", "visit"}) or not all(names.values()):
            raise _damaged("names", "expected those of record, and perhaps of visit")
        if odd := [n for n in names["record"] if n not in names.get("visit", names["record"])]:
            raise _damaged("names", f"{odd[0]!r} is a feature of the record, but not of the visit")
        modes, blocks = _texts(top.get("modes"), "modes"), _texts(top.get("blocks"), "blocks")
        possible = [m for m in MODES if m in names or m == "image" or JOINED.get(m) in names]
        if list(modes) not in (possible, [m for m in possible if "image" not in m]):
            raise _damaged("modes", f"expected {', '.join(possible)}, or those without image")
        entries = top.get("pipelines")
        if not isinstance(entries, list) or not 1 <= len(entries) <= _MOST_FOLDS:
            raise _damaged("pipelines", f"expected 1 to {_MOST_FOLDS} of them")
        pipelines = []
        for k, value in enumerate(entries):
            where = f"pipelines[{k}]"
            entry = _object(value, where)
            ways = _object(entry.get("ways"), f"{where}.ways")
            if entry.get("fold") != k or set(ways) != set(modes) & set(JOINED):
                raise _damaged(where, f"expected fold {k}, and a way for each joined mode")
            own = {of: trees(entry.get(of), f"{where}.{of}", names[of]) for of in names}
            found = {m: way(ways[m], f"{where}.ways.{m}", names[JOINED[m]]) for m in JOINED if m in ways}
            pipelines.append(Pipeline(k, own["record"], own.get("visit"), found))
        return cls(tuple(pipelines), blocks, modes, _object(top.get("choices"), "choices"))


def check_names(found: Sequence[str], expected: Sequence[str], what: str) -> None:
    """Raise `DataError` naming the first feature that isn't the one that the trees learned from."""
    if tuple(found) == tuple(expected):
        return
    absent = [name for name in expected if name not in found]
    problem = f"has no {absent[0]!r}" if absent else "has more features, or in another order"
    raise DataError(f"{what}: {problem} than the trees learned from; use the version of lesionflow that made them")


def _parsed(data: bytes) -> Any:
    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is no JSON number")

    try:
        return json.loads(data, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{INDEX}: not valid JSON ({error}): {_REMEDY}") from None


def _damaged(where: str, problem: str) -> DataError:
    return DataError(f"{where if where == INDEX else f'{INDEX}: {where}'}: {problem}: {_REMEDY}")


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _damaged(where, "expected an object")
    return value


def _texts(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value) or len(set(value)) < len(value):
        raise _damaged(where, "expected a list of texts, each once")
    return tuple(value)


def _number(value: Any, where: str) -> float:
    try:
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(number := float(value)):
            return number
    except OverflowError:
        pass
    raise _damaged(where, "expected a finite number")


def _numbers(value: Any, where: str) -> list[float]:
    if not isinstance(value, list) or not value:
        raise _damaged(where, "expected a list of numbers")
    return [_number(one, where) for one in value]
