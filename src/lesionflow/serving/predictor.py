"""From a bundle to answers: decode, run the graph, calibrate, name the band. No torch.

    predictor = Predictor(Path("run/bundle"))
    for answer in predictor.predict([Path("lesion.jpg").read_bytes()]):
        print(answer.probability, answer.band)

The service, the export's parity check and `predict_files` all go through `Predictor`, so they can't differ.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lesionflow.bundle import Bundle, band
from lesionflow.data.images import DEFAULT_LIMITS, Limits, Pixels, PreprocessSpec, to_batch, to_pixels
from lesionflow.data.source import Source, open_source
from lesionflow.errors import DataError, GateRefused, ImageError, UsageError
from lesionflow.keys import atomic
from lesionflow.progress import track
from lesionflow.serving.graph import Floats, Graph, NoGraph

if TYPE_CHECKING:
    import polars as pl

    from lesionflow.serving.inputs import Doubles
    from lesionflow.serving.remote import Remote

SMOKE_TOLERANCE = 1e-3
"""Largest logit difference to the stored answers: another CPU may add in another order, another model may not pass."""

VISIT_TOLERANCE = 0.05
"""The same for a fold's trees: a picture's logit that differs in its last digits can fall on a split's other side."""

CANNOT_JUDGE = "cannot judge"
"""The band of a picture unlike those that the model was tried on: a person has to look."""

DECODE_BATCH = 64
"""Lesions decoded ahead while the graph works on the ones before."""


@dataclass(frozen=True)
class Answer:
    """What the model says about one lesion."""

    logit: float
    """Mean over the models, uncalibrated."""
    probability: float
    """Calibrated, 0..1."""
    fold_logits: tuple[float, ...]
    """One per model."""
    band: str | None
    """`refer`, `routine`, `low` or `cannot judge`; None for a picture that can be judged if there are no thresholds."""
    doubts: tuple[str, ...] = ()
    """Why the picture can't be judged, in words; empty if it can."""


class Predictor:
    """A loaded bundle. Safe to call from several threads."""

    def __init__(
        self, bundle: Bundle | Path, threads: int | None = None, *, graph: Graph | Remote | None = None
    ) -> None:
        """Check and load a bundle onto `threads` CPU threads (by default all), or use a `graph` that runs elsewhere.

        Raises `DataError`.
        """
        self.bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        self.spec = self.bundle.spec
        self.graph = graph or (Graph(self.bundle, threads) if self.bundle.pictures else NoGraph(self.bundle))
        calibration = self.bundle.info["calibration"]
        self._a, self._b = float(calibration["a"]), float(calibration["b"])

    def logits(self, pixels: Pixels) -> tuple[Floats, Floats]:
        """uint8 [B, S, S, 3] to (`fold_logits` float32 [B, K], `logit` float32 [B]); B may be 0."""
        return self.graph.logits(pixels)

    def predict(self, images: Sequence[bytes], limits: Limits = DEFAULT_LIMITS) -> list[Answer]:
        """Encoded JPEG or PNG images to answers, in order. Raises `ImageError` on the first unusable one."""
        pixels = to_batch(images, self.spec, limits)
        return self.answers(pixels, *self.logits(pixels))

    def answers(
        self, pixels: Pixels, fold_logits: Floats, logit: Floats, seen: Mapping[str, Doubles] | None = None
    ) -> list[Answer]:
        """Calibrate and name the bands of raw outputs, `fold_logits` [B, K] and `logit` [B], for uint8 [B, S, S, 3].

        `seen`: what `look` said of the pixels, if that is known already.
        """
        thresholds = self.bundle.info["thresholds"]
        doubts = self.doubts(pixels, fold_logits, seen)
        return [
            Answer(
                one,
                self.probability(one),
                tuple(row),
                CANNOT_JUDGE if doubt else band(one, thresholds),
                tuple(doubt),
            )
            for row, one, doubt in zip(fold_logits.tolist(), logit.tolist(), doubts, strict=True)
        ]

    def look(self, pixels: Pixels) -> Mapping[str, Doubles]:
        """What the crops look like, by figure: see `inputs.statistics`."""
        from lesionflow.serving.inputs import statistics

        return statistics(pixels)

    def doubts(self, pixels: Pixels, fold_logits: Floats, seen: Mapping[str, Doubles] | None = None) -> list[list[str]]:
        """Per lesion, why the model can't judge it; nothing where the bundle doesn't say what it knows."""
        if not (known := self.bundle.info.get("inputs")):
            return [[]] * len(pixels)
        from lesionflow.serving.inputs import unusual

        return unusual(self.look(pixels) if seen is None else seen, fold_logits, known)

    def probability(self, logit: float) -> float:
        """1 / (1 + exp(-(a x logit + b))) in double precision."""
        return sigmoid(self._a * logit + self._b)

    def smoke(self) -> dict[str, Any]:
        """Ask about the reference lesions again; returns their `count` and `max_abs`, the largest difference.

        Raises `GateRefused` if this machine doesn't reproduce the stored answers.
        """
        stored = self.bundle.answers()
        worst = 0.0
        for entry in stored if self.bundle.pictures else []:
            where = self.bundle.path / "reference" / entry["file"]
            try:
                (answer,) = self.predict([self.bundle.read(f"reference/{entry['file']}")])
            except ImageError as error:
                raise DataError(f"{where}: {error}") from None
            off = float(
                np.abs(np.subtract([answer.logit, *answer.fold_logits], [entry["logit"], *entry["fold_logits"]])).max()
            )
            if not off <= SMOKE_TOLERANCE:  # Nor is NaN.
                raise GateRefused(
                    f"{where}: the logit is {answer.logit:.6f}, {off:.2g} off the stored answer, and at most "
                    f"{SMOKE_TOLERANCE:g} is allowed: don't serve this bundle on this machine, export it again"
                )
            worst = max(worst, off)
        if rows := self.bundle.visit():
            worst = max(worst, self._smoke_visit(stored, rows))
        return {"count": len(stored), "max_abs": worst}

    def _smoke_visit(self, stored: list[dict[str, Any]], rows: list[dict[str, Any]]) -> float:
        """The same for all of them as one set with metadata."""
        import polars as pl

        from lesionflow.serving.visit import Visits

        pictures = [
            self.bundle.read(f"reference/{entry['file']}") if self.bundle.pictures else None for entry in stored
        ]
        answers = Visits(self).predict(pictures, pl.DataFrame(rows, infer_schema_length=None), with_reasons=False)
        expected = np.array([entry["visit_fold_logits"] for entry in stored])
        off = float(np.abs(np.array([answer.fold_logits for answer in answers]) - expected).max())
        if not off <= VISIT_TOLERANCE:
            raise GateRefused(
                f"{self.bundle.path}: with metadata, the reference lesions' logits are {off:.2g} off the stored "
                f"answers, and at most {VISIT_TOLERANCE:g} is allowed: don't serve this bundle on this machine"
            )
        return off


def sigmoid(z: float) -> float:
    """1 / (1 + exp(-z)), without overflow."""
    if z >= 0:
        return 1.0 / (1.0 + math.exp(-z))
    return math.exp(z) / (1.0 + math.exp(z))


def predict_files(
    bundle: Path | Predictor,
    images: Path,
    *,
    metadata: Path | None = None,
    out: Path,
    part: str = "test",
    threads: int | None = None,
    progress: bool = True,
    skip_corrupt: bool = False,
    details: Path | None = None,
) -> dict[str, Any]:
    """Score every lesion of a data set directory, an HDF5 file or a folder; write `isic_id,target` to `out`.

    `target` is the calibrated probability with all its digits, so that lesions keep the order of
    their logits. Rows are in the metadata's order, sorted by id where there is no metadata. `out` is
    the file, or a folder that gets `submission.csv`; it appears only once it is complete. Images are
    streamed, so memory doesn't grow with their number.

    A bundle that knows metadata uses that of the set, with each patient's other lesions (`serving.visit`); `modes`
    in the answer counts what the scores rest on, and `details` names a file for them, mode by mode.

    A missing or unusable image raises `DataError` naming the id. With `skip_corrupt` it is counted
    and listed, and its row gets the mean probability of the lesions that were scored: the
    competition wants a row for every id, and the mean says only that it is one of this set. Where its metadata
    can be used it gets the score of that instead.
    """
    predictor = bundle if isinstance(bundle, Predictor) else Predictor(bundle, threads)
    out = Path(out) if Path(out).suffix == ".csv" else Path(out) / "submission.csv"
    started = time.perf_counter()
    seen: dict[str, Floats] = {}
    scores: dict[str, float] = {}
    skipped: list[dict[str, str]] = []
    joined: VisitScores | None = None
    note: str | None = None
    with open_source(images, part, metadata) as source:
        ids = source.ids
        if len(set(ids)) != len(ids):
            raise DataError(f"{images}: an isic_id has more than one row: run `lesionflow data check`, keep one")
        pictures = _score(predictor, source, skip_corrupt) if predictor.bundle.pictures else iter(())
        for isic_id, found in track(pictures, "predict", total=len(ids), show=progress and predictor.bundle.pictures):
            if isinstance(found, str):
                skipped.append({"isic_id": isic_id, "reason": found})
            else:
                seen[isic_id], scores[isic_id] = found[0], predictor.probability(found[1])
        if source.metadata is None and not predictor.bundle.pictures:
            raise UsageError(f"{predictor.bundle.path}: knows metadata alone: name a CSV with --metadata")
        if source.metadata is not None and predictor.bundle.info.get("visit"):
            joined = _join(predictor, source.metadata, seen)
            if "patient_id" not in source.metadata.columns:
                note = "the metadata has no patient_id: each lesion stands alone, compared with no other"
            scores |= joined.probability
    if not scores:
        first = f", first {skipped[0]['isic_id']}: {skipped[0]['reason']}" if skipped else ""
        raise DataError(f"{images}: none of {len(ids):,} images can be scored{first}: check the path and the images")
    mean = sum(scores.values()) / len(scores)
    with atomic(out) as file:
        file.write(b"isic_id,target\n")
        file.writelines(f"{isic_id},{scores.get(isic_id, mean)!r}\n".encode() for isic_id in ids)
    if details:
        _write_details(details, ids, scores, seen, joined)
    seconds = time.perf_counter() - started
    return {
        "out": str(out),
        "rows": len(ids),
        "scored": len(scores),
        "skipped": skipped,
        "skipped_score": mean if skipped else None,
        "modes": joined.counts if joined else {"image": len(scores)},
        "note": note,
        "model": predictor.bundle.name,
        "bundle": predictor.bundle.version,
        "seconds": round(seconds, 3),
        "images_per_second": round(len(ids) / seconds, 1),
    }


@dataclass(frozen=True)
class VisitScores:
    """What metadata made of the pictures' scores, by lesion."""

    mode: dict[str, str]
    probability: dict[str, float]
    by_mode: dict[str, dict[str, float]]

    @property
    def counts(self) -> dict[str, int]:
        """Lesions by the way they were scored."""
        return {mode: list(self.mode.values()).count(mode) for mode in sorted(set(self.mode.values()) - {""})}


def _join(predictor: Predictor, table: pl.DataFrame, seen: Mapping[str, Floats]) -> VisitScores:
    from lesionflow.serving.visit import Visits

    visits, ids = Visits(predictor), table["isic_id"].to_list()
    nothing = np.full(predictor.bundle.models, np.nan)
    scores = visits.score(np.array([seen.get(name, nothing) for name in ids], np.float64), table)
    logits = scores.fold_logits.mean(1).tolist()
    of = dict(zip(ids, zip(scores.mode, logits, strict=True), strict=True))
    return VisitScores(
        {name: mode for name, (mode, _) in of.items()},
        {name: visits.probability(mode, logit) for name, (mode, logit) in of.items() if mode},
        {
            mode: {n: visits.probability(mode, x) for n, x in zip(ids, found.tolist(), strict=True) if math.isfinite(x)}
            for mode, found in scores.by_mode.items()
        },
    )


def _write_details(
    out: Path, ids: Sequence[str], scores: Mapping[str, float], seen: Mapping[str, Floats], joined: VisitScores | None
) -> None:
    """Every lesion's probability and what it rests on, with that of each mode that there was enough for."""
    import polars as pl

    by_mode = joined.by_mode if joined else {"image": {name: scores[name] for name in seen}}
    modes = joined.mode if joined else dict.fromkeys(seen, "image")
    columns = {f"probability_{mode}": [found.get(name) for name in ids] for mode, found in by_mode.items()}
    table = pl.DataFrame(
        {
            "isic_id": list(ids),
            "probability": [scores.get(name) for name in ids],
            "mode": [modes.get(name) or None for name in ids],
            **columns,
        }
    )
    with atomic(out) as file:
        table.write_csv(file)


def _score(
    predictor: Predictor, source: Source, skip_corrupt: bool
) -> Iterator[tuple[str, tuple[Floats, float] | str]]:
    """(id, (fold logits [K], their mean)), or (id, why it was left out). One thread decodes ahead of the graph."""
    starts = range(0, len(source.ids), DECODE_BATCH)
    with ThreadPoolExecutor(1, "decode") as pool:
        loads = (_load(source, source.ids[s : s + DECODE_BATCH], predictor.spec, skip_corrupt) for s in starts)
        future = pool.submit(next, loads, None)
        while (loaded := future.result()) is not None:
            future = pool.submit(next, loads, None)
            ids, pixels, skipped = loaded
            fold_logits, logits = predictor.logits(pixels)
            for isic_id, row, logit in zip(ids, fold_logits, logits.tolist(), strict=True):
                if not math.isfinite(logit):
                    raise DataError(f"{isic_id}: the model's answer is not a number: export the bundle again")
                yield isic_id, (row, logit)
            yield from skipped


def _load(
    source: Source, ids: Sequence[str], spec: PreprocessSpec, skip_corrupt: bool
) -> tuple[list[str], Pixels, list[tuple[str, str]]]:
    """Ids and pixels uint8 [B, S, S, 3] of the usable lesions, and (id, reason) of the others."""
    pixels = np.empty((len(ids), spec.size, spec.size, 3), dtype=np.uint8)
    good: list[str] = []
    skipped: list[tuple[str, str]] = []
    for isic_id in ids:
        try:
            pixels[len(good)] = to_pixels(source.read(isic_id), spec)
        except DataError as error:
            if not skip_corrupt:
                raise DataError(f"{isic_id}: {error}; --skip-corrupt leaves such images out, and lists them") from None
            skipped.append((isic_id, str(error)))
        else:
            good.append(isic_id)
    return good, pixels[: len(good)], skipped
