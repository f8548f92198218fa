"""Boosted trees on a lesion's metadata: several models, each with its own seed and draw of benign lesions.

    trees = Boosted.fit(matrix, y, recipe.tabular, seed=0)
    trees.logits(values)            # float64 [B], log-odds
    trees.contributions(values)     # float64 [B, F + 1]: what each feature adds; the rows sum to the log-odds
    files = trees.save(folder, "fold-0")
    Boosted.load(read, files, trees.names)

A model that saw only some of the benign lesions thinks malignant ones too common. Its log-odds are corrected by
log(drawn / all) (King & Zeng 2001, prior correction), so that all members share a scale and can be averaged.

The number of trees is fixed. Stopping early on the fold that is scored, as is common, picks the best of many
numbers on the very lesions that are then said to be unseen.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lesionflow.data.features import Matrix
from lesionflow.errors import DataError, UsageError
from lesionflow.models.boosters import KINDS, Booster, Floats, cores, read
from lesionflow.recipe import Tabular

_FILE = re.compile(r".*-(lightgbm|catboost|xgboost)-(\d+)\.(?:txt|json)")


class Boosted:
    """The mean of several boosted models' log-odds."""

    def __init__(self, names: Sequence[str], members: Sequence[tuple[str, Booster]]) -> None:
        self.names = tuple(names)
        """The F features, in the order of the columns."""
        self.members = tuple(members)
        """(kind, model) of each."""
        if not members:
            raise UsageError("tabular: no model asked for; set tabular.lightgbm, catboost or xgboost to at least 1")

    @classmethod
    def fit(cls, matrix: Matrix, y: ArrayLike, options: Tabular, *, seed: int, threads: int | None = None) -> Boosted:
        """Train all members that `options` asks for, on every row of `matrix` [N, F] with targets y [N] (0/1).

        Members are trained side by side on `threads` (by default all cores), one thread each, so that the number
        of threads can't change a tree. Raises `DataError` for targets of one class or that aren't 0 and 1.
        """
        values, truth = np.ascontiguousarray(matrix.values), np.asarray(y)
        if truth.shape != (len(values),):
            raise DataError(f"targets: {truth.size} for {len(values)} rows of features; they must match row by row")
        if not np.isin(truth, (0, 1)).all() or len(np.unique(truth)) < 2:
            raise DataError("targets: expected 0 (benign) and 1 (malignant), and both of them; use more lesions")
        truth = truth.astype(np.int8)
        asked = [(kind, i) for kind in KINDS for i in range(getattr(options, kind))]

        def one(which: tuple[str, int]) -> tuple[str, Booster]:
            kind, i = which
            rng = np.random.default_rng([seed, list(KINDS).index(kind), i])
            rows, shift = draw(truth, options.negatives, rng)
            x, target = values, truth
            if len(rows) < len(values):  # Rows are copied only where some are left out.
                x, target = values[rows], truth[rows]
            own = int(rng.integers(2**31 - 1))
            return kind, KINDS[kind].fit(x, target, matrix.names, options, seed=own, shift=shift)

        with ThreadPoolExecutor(threads or cores()) as pool:
            return cls(matrix.names, list(pool.map(one, asked)))

    def logits(self, values: Floats) -> Floats:
        """Log-odds of values [B, F] (NaN where unknown), at the prevalence of what was learned from: float64 [B].

        Raises `DataError` where the trees give what isn't a number.
        """
        x = self._checked(values)
        if not len(x):
            return np.zeros(0)
        total = np.zeros(len(x))
        for _, model in self.members:
            total += model.margins(x)
        return _finite(total / len(self.members), "log-odds of row")

    def contributions(self, values: Floats) -> Floats:
        """What each feature adds to each lesion's log-odds, and last the base: float64 [B, F + 1].

        TreeSHAP (Lundberg et al. 2020, path-dependent) of each member, averaged: a row sums to its `logits`.
        Raises `DataError` where the trees give what isn't a number.
        """
        x = self._checked(values)
        total = np.zeros((len(x), len(self.names) + 1))
        if len(x):
            for _, model in self.members:
                total += model.contributions(x)
        return _finite(total / len(self.members), "contributions to row")

    def importances(self) -> dict[str, float]:
        """Each feature's share of what all splits gained, the mean over the members; it sums to 1.

        Gain is each library's own (CatBoost's: how much the prediction changes). All 0 if no tree ever split.
        """
        shares = []
        for _, model in self.members:
            gains = _finite(model.gains(), "gain of feature")
            if gains.sum() > 0:
                shares.append(gains / gains.sum())
        mean = np.mean(shares, axis=0) if shares else np.zeros(len(self.names))
        return dict(zip(self.names, mean.tolist(), strict=True))

    def save(self, folder: Path, prefix: str) -> list[str]:
        """Write each member as text, `<prefix>-<kind>-<i>.txt` or `.json`; the files' names, in the members' order."""
        folder.mkdir(parents=True, exist_ok=True)
        files, count = [], dict.fromkeys(KINDS, 0)
        for kind, model in self.members:
            files.append(f"{prefix}-{kind}-{count[kind]}.{KINDS[kind].suffix}")
            count[kind] += 1
            (folder / files[-1]).write_bytes(model.text)
        return files

    @classmethod
    def load(cls, read_file: Callable[[str], bytes], files: Sequence[str], names: Sequence[str]) -> Boosted:
        """Read what `save` wrote, of the features `names`; predictions are bit for bit as before.

        Raises `DataError` naming a file that is no model, or is of other features.
        """
        members = []
        for file in files:
            if not (found := _FILE.fullmatch(file)):
                raise DataError(f"{file}: expected <prefix>-<kind>-<number>, kind one of {', '.join(KINDS)}")
            members.append((found[1], read(found[1], read_file(file), file, names)))
        return cls(names, members)

    def _checked(self, values: Floats) -> Floats:
        x = np.ascontiguousarray(values, np.float64)
        if x.ndim != 2 or x.shape[1] != len(self.names):
            raise DataError(
                f"features: shape {x.shape}, the trees know {len(self.names)} features; use the same blocks"
            )
        return x


def _finite(found: Floats, what: str) -> Floats:
    if not np.isfinite(found).all():
        row = int(np.argwhere(~np.isfinite(found))[0][0])
        raise DataError(f"tabular: the trees' {what} {row} is NaN or infinite; restore their files, or train again")
    return found


def draw(y: NDArray[np.int8], negatives: float, rng: np.random.Generator) -> tuple[NDArray[np.int64], float]:
    """Rows to learn from, ascending: all malignant lesions and `negatives` benign ones for each (0: all of them).

    And the correction of the log-odds, log(drawn / all): 0 where all are drawn.
    """
    benign, malignant = np.flatnonzero(y == 0), np.flatnonzero(y == 1)
    count = max(round(negatives * len(malignant)), 1)
    if not negatives or count >= len(benign):
        return np.arange(len(y)), 0.0
    drawn = rng.choice(benign, count, replace=False)
    return np.sort(np.concatenate([malignant, drawn])), math.log(count / len(benign))
