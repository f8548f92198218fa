"""A patient's visit: pictures and metadata of the lesions in, one answer each out, from whatever there is.

    visits = Visits(Predictor(Path("run/bundle")))
    for answer in visits.predict(images, table):
        print(answer.isic_id, answer.mode, answer.probability, answer.band, answer.reasons)

A lesion with a picture and metadata is scored by both, compared with the patient's other lesions; a patient's only
lesion without that comparison; one without metadata by its picture; one without a usable picture by its metadata, but
then no band is named (unless the bundle never knew pictures). The answer says which, and the bundle what each of
these ways was measured to be worth. Features are those of training, by the same function, and every fold's pipeline is
kept: the fold's own reproduces its out-of-fold score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lesionflow.bundle import band
from lesionflow.data.features import Matrix, catalogue, features, has_record, lesions_of_patient
from lesionflow.data.images import DEFAULT_LIMITS, Limits, to_pixels
from lesionflow.errors import DataError
from lesionflow.models.stack import Joined
from lesionflow.serving.predictor import CANNOT_JUDGE, Predictor, sigmoid
from lesionflow.serving.reasons import reasons

if TYPE_CHECKING:
    import polars as pl

FOLDER = "tabular"
"""Where the bundle keeps trees and how they are joined."""
NO_PICTURE = "no picture that can be judged"

Doubles = NDArray[np.float64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Scores:
    """What is known of N lesions, before calibration."""

    mode: list[str]
    """Which way each was scored; "" for a lesion with neither picture nor metadata."""
    fold_logits: Doubles
    """[N, K] of that mode; NaN without one."""
    by_mode: dict[str, Doubles]
    """[N] mean log-odds of every mode, NaN where the lesion lacks what it takes."""


@dataclass(frozen=True)
class VisitAnswer:
    """What the bundle says about one lesion of a visit."""

    isic_id: str
    mode: str
    """`image_visit`, `image_record`, `image`, `visit` or `record`: what the answer rests on; "" for none."""
    logit: float
    """Mean over the folds' pipelines, uncalibrated."""
    probability: float
    """Calibrated for that mode, 0..1."""
    fold_logits: tuple[float, ...]
    band: str | None
    """`refer`, `routine`, `low` or `cannot judge`; None where no thresholds could be vouched for."""
    doubts: tuple[str, ...]
    """Why it can't be judged, in words."""
    reasons: tuple[str, ...]
    """What in the metadata speaks for or against, in words."""
    scores: dict[str, float]
    """Calibrated probability by mode, of the modes that there was enough for."""


@dataclass(frozen=True)
class Described:
    """The features of N lesions, made once."""

    table: pl.DataFrame
    known: Flags
    """Whether a lesion has metadata worth using."""
    alone: Flags
    """Whether it is its patient's only one that has."""
    record: Matrix
    visit: Matrix | None

    def rows(self, rows: Sequence[int]) -> Described:
        """Of some of these lesions, still compared with all of them."""

        def of(matrix: Matrix) -> Matrix:
            return Matrix(matrix.names, np.ascontiguousarray(matrix.values[rows]))

        here = np.asarray(rows, np.int64)
        visit = None if self.visit is None else of(self.visit)
        return Described(self.table[here], self.known[here], self.alone[here], of(self.record), visit)


class Visits:
    """A bundle that knows metadata. Safe to call from several threads."""

    def __init__(self, predictor: Predictor) -> None:
        """Load the trees beside the predictor's graph. Raises `DataError` for a bundle without any."""
        bundle = predictor.bundle
        if not (info := bundle.info.get("visit")):
            raise DataError(
                f"{bundle.path}: knows pictures alone; train with metadata (tabular.lightgbm = 3) and export again"
            )
        self.predictor, self.modes = predictor, dict[str, Any](info["modes"])
        self.joined = Joined.load(lambda name: bundle.read(f"{FOLDER}/{name}"))
        if len(self.joined.pipelines) != bundle.models:
            raise DataError(
                f"{bundle.path}: {len(self.joined.pipelines)} folds join metadata, the graph has {bundle.models}: "
                "export the bundle again"
            )
        if ("image" in self.joined.modes) != bundle.pictures or set(self.joined.modes) - set(self.modes):
            raise DataError(
                f"{bundle.path}: bundle.json knows the modes {', '.join(self.modes)}, "
                f"its trees {', '.join(self.joined.modes)}: export the bundle again"
            )
        self._own = tuple(name for name in self.joined.blocks if name in ("plain", "derived"))

    def describe(self, table: pl.DataFrame) -> Described:
        """What the trees look at. `patient_id` says whose the lesions are; without one each stands alone."""
        every, names = features(table, self.joined.blocks), [one.name for one in catalogue(self._own)]
        own = np.ascontiguousarray(every.values[:, [every.names.index(name) for name in names]])
        visit = every if self.joined.blocks != self._own else None
        return Described(
            table, has_record(table), lesions_of_patient(table) == 1, Matrix(tuple(names), own), visit
        )  # fmt: skip

    def score(self, fold_logits: Doubles, table: pl.DataFrame | Described) -> Scores:
        """The pictures' log-odds [N, K] (a row of NaN for none) and the lesions' metadata, N rows in the same order."""
        lesions = table if isinstance(table, Described) else self.describe(table)
        known, alone, record, visit = lesions.known, lesions.alone, lesions.record, lesions.visit
        image = np.asarray(fold_logits, np.float64)
        seen: Flags = np.asarray(np.isfinite(image).all(axis=1))
        pictures = np.where(seen[:, None], image, 0.0) if "image" in self.joined.modes else None
        found = self.joined.scores(pictures, record, visit, alone)
        mode = [self._mode(*flags) for flags in zip(seen.tolist(), known.tolist(), alone.tolist(), strict=True)]
        chosen = np.full(image.shape, np.nan)
        for name, logits in found.items():
            here = np.array([one == name for one in mode], bool)
            chosen[here] = logits[here]
        if not np.isfinite(chosen[[one != "" for one in mode]]).all():
            raise DataError(f"{self.predictor.bundle.path}: the trees' answer is not a number: export the bundle again")
        known = known if self.predictor.bundle.pictures else np.ones(len(known), bool)
        able = {name: (seen if "image" in name else True) & (known if name != "image" else True) for name in found}
        return Scores(
            mode, chosen, {name: np.where(able[name], logits.mean(1), np.nan) for name, logits in found.items()}
        )

    def explain(self, table: pl.DataFrame | Described, rows: Sequence[int] | None = None) -> list[tuple[str, ...]]:
        """What in each lesion's metadata moves its score, in words; none for lesions without metadata.

        With `rows` only those lesions are told of, still compared with all: words cost more than scores.
        """
        lesions = table if isinstance(table, Described) else self.describe(table)
        told = lesions if rows is None else lesions.rows(rows)
        names, shares = self.joined.contributions(told.record, told.visit, told.alone)
        values = lesions.visit if lesions.visit is not None else lesions.record
        said = reasons(values.values, shares, names, lesions.table, rows)
        return [one if has else () for one, has in zip(said, told.known.tolist(), strict=True)]

    def predict(
        self,
        images: Sequence[bytes | None],
        table: pl.DataFrame | None = None,
        limits: Limits = DEFAULT_LIMITS,
        *,
        with_reasons: bool = True,
    ) -> list[VisitAnswer]:
        """Encoded pictures (None for a lesion without) and metadata of the same lesions, in order, to answers.

        All are taken for one patient's where the table has no `patient_id`. Raises `ImageError` on the first
        unusable picture, `DataError` where rows and pictures aren't of the same number.
        """
        import polars as pl

        if table is not None and "isic_id" not in table.columns:
            raise DataError("metadata: no column isic_id; give each lesion its id")
        table = pl.DataFrame({"isic_id": [f"lesion {n + 1}" for n in range(len(images))]}) if table is None else table
        if len(table) != len(images):
            raise DataError(f"{len(images)} pictures and {len(table)} rows of metadata: give one row for each lesion")
        if "patient_id" not in table.columns:
            table = table.with_columns(patient_id=pl.lit("this visit"))
        spec, models = self.predictor.spec, self.predictor.bundle.models
        given = [row for row, image in enumerate(images) if image is not None]
        pixels = np.empty((len(given), spec.size, spec.size, 3), np.uint8)
        for place, row in enumerate(given):
            pixels[place] = to_pixels(images[row] or b"", spec, limits)
        fold_logits = np.full((len(images), models), np.nan)
        raw, _ = self.predictor.logits(pixels)
        fold_logits[given] = raw
        unseen = (NO_PICTURE,) if self.predictor.bundle.pictures else ()
        doubts: list[tuple[str, ...]] = [unseen] * len(images)
        for row, doubt in zip(given, self.predictor.doubts(pixels, raw), strict=True):
            doubts[row] = tuple(doubt)
        described = self.describe(table)
        scores = self.score(fold_logits, described)
        said = self.explain(described) if with_reasons else [()] * len(images)
        return [
            self.answer(name, scores, row, doubts[row], said[row])
            for row, name in enumerate(table["isic_id"].to_list())
        ]

    def probability(self, mode: str, logit: float) -> float:
        """Calibrated for the mode."""
        calibration = self.modes[mode]["calibration"]
        return sigmoid(float(calibration["a"]) * logit + float(calibration["b"]))

    def _mode(self, seen: bool, known: bool, alone: bool) -> str:
        if not known and self.predictor.bundle.pictures:
            return "image" if seen else ""
        # Without any picture, trees take what little there is, as they did when they were evaluated.
        context = "visit" if "visit" in self.joined.modes and not alone else "record"
        return f"image_{context}" if seen else context

    def answer(
        self, name: str, scores: Scores, row: int, doubts: tuple[str, ...], said: tuple[str, ...]
    ) -> VisitAnswer:
        """Calibrate and name the band of one row of `scores`."""
        mode, folds = scores.mode[row], scores.fold_logits[row]
        logit = float(folds.mean())
        judged = band(logit, self.modes[mode]["thresholds"]) if mode and not doubts else CANNOT_JUDGE
        return VisitAnswer(
            name, mode, logit, self.probability(mode, logit) if mode else float("nan"), tuple(folds.tolist()),
            judged, doubts, said,
            {one: self.probability(one, float(of[row])) for one, of in scores.by_mode.items() if np.isfinite(of[row])},
        )  # fmt: skip
