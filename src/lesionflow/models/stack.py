"""Joining pictures and metadata: every fold's trees, and its way to join them, learned from the other folds alone.

    stacked = fit_stack(image, image_holdout, record, visit, ..., tabular=recipe.tabular, stack=recipe.stack, ...)
    stacked.oof["image_visit"]        # float64 [N], each lesion scored by its own fold's pipeline
    save_stack(stacked, run / "stack")

Three ways to join, all of which end in log-odds:

    linear   a logistic regression on the picture's and the trees' log-odds
    rank     the mean of both ranks among the reference's scores, as log-odds, on one line
    trees    trees that know the features and the picture's log-odds, on one line

Fold k's way is fitted on the lesions of the other folds, each with the scores of *its own* fold's models: those
never learned from the lesion, so they are as good as they will be on a new one (stacked generalisation, Wolpert
1992; out-of-fold scores as inputs, Breiman 1996). `auto` takes for fold k what ranks best in the other folds, so no
lesion's target chooses how it is scored. What is left of a dependence: those other scores come from models that
learned from fold k. The hold-out is free of that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lesionflow.data.features import Matrix, check_inputs
from lesionflow.errors import DataError
from lesionflow.keys import write_json
from lesionflow.models.joining import FORMAT, IMAGE_LOGIT, JOINED, MODES, Flags, Joined, Pipeline, check_names
from lesionflow.models.tabular import Boosted
from lesionflow.models.ways import INDEX, METHODS, Floats, Line, Linear, Rank, Reference, Trees, Way, fit_line
from lesionflow.progress import track
from lesionflow.recipe import Stack, Tabular

if TYPE_CHECKING:
    from lesionflow.data.folds import Folds

__all__ = ["METHODS", "MODES", "Joined", "Pipeline", "Stacked", "choose", "fit_stack", "save_stack"]

FEWEST_MALIGNANT = 10
"""Under so many among the lesions that have company, all lesions say how context and picture are joined."""


@dataclass(frozen=True)
class Stacked:
    """What `fit_stack` found, for N lesions of K folds and H of the hold-out."""

    oof: dict[str, Floats]
    """Log-odds [N] by mode, in the order of `MODES`; the last is what is served."""
    holdout: dict[str, Floats]
    """Log-odds [H, K]: every fold's pipeline's."""
    pipelines: tuple[Pipeline, ...]
    choices: dict[str, Any]
    """By joined mode a list of `{"fold", "method", "pauc"}`: the method, and each method's pAUC in the other folds
    that it was chosen by (empty where the recipe named it)."""
    blocks: tuple[str, ...]
    """Of features, as the recipe asks for them."""

    @property
    def joined(self) -> Joined:
        """The same as it is served."""
        return Joined(self.pipelines, self.blocks, tuple(self.oof), self.choices)


def fit_stack(
    image: ArrayLike | None,
    image_holdout: ArrayLike | None,
    record: Matrix,
    visit: Matrix | None,
    record_h: Matrix | None,
    visit_h: Matrix | None,
    alone: ArrayLike,
    alone_h: ArrayLike,
    y: ArrayLike,
    fold: ArrayLike,
    *,
    tabular: Tabular,
    stack: Stack,
    seed: int,
    ids: Sequence[str],
    model_fold: ArrayLike,
    folds: Folds,
    progress: bool = False,
    threads: int | None = None,
) -> Stacked:
    """Train every fold's trees and ways to join, and score every lesion with them.

    For the N lesions of the folds: image [N] out-of-fold log-odds of the pictures (None without pictures) and
    `model_fold` [N], the fold whose model made each; `record` and `visit` features; alone [N] whether a lesion is its
    patient's only one; y [N] 0/1; fold [N]; ids. For the H of the hold-out: image_holdout [H, K], `record_h`,
    `visit_h` and alone_h [H]; their targets are never asked for. Whatever the threads, one seed gives one result.

    Raises `DataError`, naming lesions or features, for scores of a model that learned from the lesion, lesions of the
    hold-out among those to learn from, columns that can't be features, and what isn't finite or of equal length.
    """
    fitter = _Fitter(image, record, visit, alone, y, fold, tabular, stack, seed, folds.count, threads)
    fitter.check(ids, np.asarray(model_fold), folds)
    fitter.grow(progress)
    choices: dict[str, Any] = {}
    ways: list[dict[str, Way]] = [{} for _ in range(folds.count)]
    for mode in fitter.joined:
        found = {method: fitter.ways(mode, method) for method in fitter.methods}
        scores = {method: fitter.joined_scores(mode, found[method]) for method in found} if len(found) > 1 else {}
        choices[mode] = []
        for k in range(folds.count):
            method, by = fitter.methods[0], dict[str, float]()
            if scores:
                method, by = choose(scores, fitter.y, fitter.fold, k, among=fitter.used(JOINED[mode]))
            ways[k][mode] = found[method][k]
            choices[mode].append({"fold": k, "method": method, "pauc": by})
    trees = fitter.trees
    pipelines = tuple(
        Pipeline(k, trees["record"][k], trees["visit"][k] if visit is not None else None, ways[k])
        for k in range(folds.count)
    )
    stacked = Stacked(fitter.oof(pipelines), {}, pipelines, choices, tabular.blocks)
    if record_h is None or not len(record_h.values):
        none = {mode: np.zeros((0, folds.count)) for mode in stacked.oof}
        return Stacked(stacked.oof, none, pipelines, choices, tabular.blocks)
    held = None if image is None or image_holdout is None else np.asarray(image_holdout, np.float64)
    if image is not None and held is None:
        raise DataError("hold-out: features without the pictures' log-odds; give both, or neither")
    unseen = stacked.joined.scores(held, record_h, visit_h, np.asarray(alone_h, np.bool_))
    return Stacked(stacked.oof, unseen, pipelines, choices, tabular.blocks)


def choose(
    scores: Mapping[str, Floats], y: NDArray[np.int8], fold: NDArray[np.int64], k: int, *, among: Flags | None = None
) -> tuple[str, dict[str, float]]:
    """Which method is fold k's: the one whose scores [N] rank best in all *other* folds, and every method's pAUC there.

    Scores are ranked within their fold. `among` [N]: lesions that count. A tie goes to the simpler method.
    """
    from lesionflow.evaluation.metrics import fold_rank, pauc

    rows = np.flatnonzero((fold != k) & (True if among is None else among))
    by = {m: pauc(y[rows], fold_rank(scores[m][rows], fold[rows])) for m in METHODS if m in scores}
    return max(by, key=lambda m: by[m]), by


def save_stack(stacked: Stacked, folder: Path) -> None:
    """Write `stack.json` and every model of the trees, as text, to `folder`."""

    def kept(trees: Boosted, k: int, of: str) -> list[str]:
        return trees.save(folder, f"fold-{k}-{of}")

    entries = []
    for p in stacked.pipelines:
        ways = {}
        for mode, way in p.ways.items():
            files = {"files": kept(way.trees, p.fold, mode)} if isinstance(way, Trees) else {}
            ways[mode] = way.to_dict() | files
        own = {"record": p.record} | ({"visit": p.visit} if p.visit is not None else {})
        entries.append({"fold": p.fold} | {of: kept(trees, p.fold, of) for of, trees in own.items()} | {"ways": ways})
    first = stacked.pipelines[0]
    names = {"record": first.record.names} | ({"visit": first.visit.names} if first.visit is not None else {})
    index = {
        "format": FORMAT,
        "blocks": list(stacked.blocks),
        "modes": list(stacked.oof),
        "names": {of: list(found) for of, found in names.items()},
        "choices": stacked.choices,
        "pipelines": entries,
    }
    write_json(folder / INDEX, index)


class _Fitter:
    """The lesions to learn from, the trees grown on them, and the trees' own out-of-fold log-odds."""

    def __init__(
        self,
        image: ArrayLike | None,
        record: Matrix,
        visit: Matrix | None,
        alone: ArrayLike,
        y: ArrayLike,
        fold: ArrayLike,
        tabular: Tabular,
        stack: Stack,
        seed: int,
        count: int,
        threads: int | None,
    ) -> None:
        self.image = None if image is None else np.asarray(image, np.float64)
        self.matrices = {"record": record} | ({"visit": visit} if visit is not None else {})
        self.alone, self.y = np.asarray(alone, np.bool_), np.asarray(y).astype(np.int8)
        self.fold = np.asarray(fold).astype(np.int64)
        self.tabular, self.stack, self.seed, self.count, self.threads = tabular, stack, seed, count, threads
        self.joined = [m for m, of in JOINED.items() if image is not None and of in self.matrices]
        self.methods = METHODS if stack.method == "auto" else (stack.method,)
        self.trees: dict[str, list[Boosted]] = {}
        self.margins: dict[str, Floats] = {}

    def check(self, ids: Sequence[str], model_fold: NDArray[Any], folds: Folds) -> None:
        import polars as pl

        from lesionflow.evaluation.leaks import check_features

        n = len(self.y)
        lengths = {f"{of} features": len(m.values) for of, m in self.matrices.items()}
        lengths |= {"ids": len(ids), "alone": len(self.alone), "folds": len(self.fold), "model_fold": len(model_fold)}
        if self.image is not None:
            lengths["pictures' log-odds"] = len(self.image)
        for what, found in lengths.items():
            if found != n:
                raise DataError(f"{what}: {found} values for {n} lesions; they must match row by row")
        made = model_fold if self.image is not None else self.fold
        table = {"isic_id": list(ids), "fold": self.fold, "model_fold": np.asarray(made, np.int64)}
        check_features(pl.DataFrame(table), folds)
        if (held := self.fold < 0).any():
            first = ", ".join(str(ids[i]) for i in np.flatnonzero(held)[:5])
            raise DataError(f"fold: {int(held.sum())} lesions ({first}) are of the hold-out; give them as such")
        if self.image is not None and (bad := np.flatnonzero(~np.isfinite(self.image))).size:
            raise DataError(f"pictures' log-odds: {bad.size} aren't finite ({ids[bad[0]]}, ...); score them again")
        for matrix in self.matrices.values():
            check_inputs(matrix.names)
        if "visit" in self.matrices:
            record, visit = (self.matrices[of].names for of in ("record", "visit"))
            check_names([name for name in record if name in visit], record, "visit")

    def grow(self, progress: bool) -> None:
        """Train the trees of all folds, each kind once, and score every fold with its own."""
        kinds = [*self.matrices, *(self.joined if "trees" in self.methods else [])]
        jobs = [(kind, k) for kind in kinds for k in range(self.count)]
        for kind in kinds:
            self.trees[kind], self.margins[kind] = [], np.empty(len(self.y))
        for kind, k in track(jobs, "grow trees", total=len(jobs), show=progress):
            matrix, rows = self.matrices[JOINED.get(kind, kind)], np.flatnonzero(self.fold != k)
            names, values = matrix.names, matrix.values[rows]
            if kind in JOINED:
                names, values = (*names, IMAGE_LOGIT), np.column_stack([values, self._noisy(kind, k)[rows]])
            own = int(np.random.SeedSequence([self.seed, k, MODES.index(kind)]).generate_state(1)[0] >> 2)
            trees = Boosted.fit(Matrix(names, values), self.y[rows], self.tabular, seed=own, threads=self.threads)
            self.trees[kind].append(trees)
            held = np.flatnonzero(self.fold == k)
            values = matrix.values[held]
            if kind in JOINED:
                values = np.column_stack([values, self._picture[held]])
            self.margins[kind][held] = trees.logits(values)

    def used(self, of: str) -> Flags:
        """Lesions [N] that a way to join with this metadata is fitted and chosen on: those it is for, if enough."""
        company = ~self.alone
        fewest = min(int(self.y[company & (self.fold != k)].sum()) for k in range(self.count))
        return company if of == "visit" and fewest >= FEWEST_MALIGNANT else np.ones(len(self.y), np.bool_)

    def ways(self, mode: str, method: str) -> list[Way]:
        """Every fold's way to join by this method, from the other folds."""
        make: Callable[[str, int, NDArray[np.int64]], Way] = {
            "linear": self._linear, "rank": self._rank, "trees": self._trees
        }[method]  # fmt: skip
        used = self.used(JOINED[mode])
        return [make(mode, k, np.flatnonzero(used & (self.fold != k))) for k in range(self.count)]

    def joined_scores(self, mode: str, ways: Sequence[Way]) -> Floats:
        """Out-of-fold log-odds [N], each by its own fold's way."""
        scores, of = np.empty(len(self.y)), JOINED[mode]
        for k, way in enumerate(ways):
            rows = np.flatnonzero(self.fold == k)
            if isinstance(way, Trees):
                scores[rows] = way.line(self.margins[mode][rows])
            else:
                scores[rows] = way.join(self._picture[rows], self.margins[of][rows], self.matrices[of].values[:0])
        return scores

    def oof(self, pipelines: Sequence[Pipeline]) -> dict[str, Floats]:
        """What the pipelines say of their own folds: by construction what they will say when they are served."""
        found: dict[str, Floats] = {}
        for k, pipeline in enumerate(pipelines):
            rows = np.flatnonzero(self.fold == k)
            image = None if self.image is None else self.image[rows]
            values = {of: matrix.values[rows] for of, matrix in self.matrices.items()}
            scores = pipeline.scores(image, values["record"], values.get("visit"), self.alone[rows])
            for mode, one in scores.items():
                found.setdefault(mode, np.empty(len(self.y)))[rows] = one
        return found

    @property
    def _picture(self) -> Floats:
        assert self.image is not None
        return self.image

    def _noisy(self, kind: str, k: int) -> Floats:
        if not self.stack.noise:
            return self._picture
        rng = np.random.default_rng([self.seed, k, MODES.index(kind), 0x401])
        return self._picture + self.stack.noise * rng.standard_normal(len(self.y))

    def _linear(self, mode: str, k: int, rows: NDArray[np.int64]) -> Way:
        return Linear(fit_line([self._picture[rows], self.margins[JOINED[mode]][rows]], self.y[rows]))

    def _rank(self, mode: str, k: int, rows: NDArray[np.int64]) -> Way:
        image, trees = self._picture[rows], self.margins[JOINED[mode]][rows]
        flat = Rank(Reference.of(image), Reference.of(trees), 0.5 / len(rows), Line((1.0,), 0.0))
        line = fit_line([flat.mean_rank(image, trees)], self.y[rows])
        return Rank(flat.image, flat.trees, flat.edge, line)

    def _trees(self, mode: str, k: int, rows: NDArray[np.int64]) -> Way:
        return Trees(self.trees[mode][k], fit_line([self.margins[mode][rows]], self.y[rows]))
