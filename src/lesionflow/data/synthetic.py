"""A synthetic mini SLICE-3D in the competition's layout, with the true answers beside it.

    lesionflow data synth --out DIR --patients 40 --lesions 2000 --seed 0 --prevalence 0.05
    python -c "from pathlib import Path; from lesionflow.data.synthetic import synthesize; synthesize(Path('DIR'))"

`cohort` draws patients, lesions and labels from a known probability, `appearance` turns them into the
columns, `drawing` draws the crops from the columns, `bounds` says what can be known. This module writes
the files:

- `train-image.hdf5` + `train-metadata.csv` (55 columns), `test-image.hdf5` + `test-metadata.csv` (44
  columns, other patients, about 5 % as many lesions), `sample_submission.csv`;
- `truth.json`: parameters, every lesion's true probability, the test part's malignant lesions, and the
  best pAUC that images, metadata, patient context and all of them can reach: `best_pauc` in expectation
  over the labels (no model beats it on average), `best_pauc_of_these_labels` on the labels drawn.

Lesions are handled in chunks of fixed size with generators keyed by seed and chunk, so the files don't
depend on the number of workers. With `repeat_bytes` the images are `POOL` crops over and over: the
metadata is whole, but an image then says nothing of its lesion.

Many lesions are drawn in spawned processes; a script that makes more than `PARALLEL_FROM` of them needs
the usual `if __name__ == "__main__":`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from lesionflow.data import schema
from lesionflow.data.appearance import ellipse_ratio, measure, table
from lesionflow.data.bounds import best_pauc
from lesionflow.data.cohort import GENERATOR_VERSION, Cohort, Floats, draw_cohort, stream
from lesionflow.data.drawing import DICE, Scene, draw, encode
from lesionflow.data.textures import Plane
from lesionflow.errors import UsageError
from lesionflow.keys import write_json
from lesionflow.progress import track

__all__ = ["GENERATOR_VERSION", "synthesize"]

CHUNK = 256
"""Lesions that share one key of the random generators; part of the version."""
POOL = CHUNK
"""Distinct crops with `repeat_bytes`."""
PARALLEL_FROM = 4000
"""Lesions from which on worker processes pay for their start."""
_PARTIAL = ".lesionflow-partial-"
_FILES = (
    "train-image.hdf5", "train-metadata.csv", "test-image.hdf5", "test-metadata.csv", "sample_submission.csv",
    "truth.json",
)  # fmt: skip
_NOTE = "Synthetic data made by lesionflow: no lesion and no patient here is real."


def synthesize(
    out: Path,
    *,
    patients: int = 40,
    lesions: int = 2000,
    seed: int = 0,
    prevalence: float = 0.05,
    repeat_bytes: bool = False,
    workers: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Write the set to `out` and return truth.json's content without the per-lesion answers.

    `lesions` is the number of training rows, of which max(1, round(prevalence x lesions)) are malignant.
    `workers` are processes (None: as many as the machine has cores, at most 8, for large sets).
    An `out` that holds this very set already is kept as it is. The files appear together at the end,
    `truth.json` last. Raises `UsageError` naming the argument and its bound, or an `out` that isn't empty.
    """
    parameters = {
        "generator": GENERATOR_VERSION,
        "patients": patients,
        "lesions": lesions,
        "seed": seed,
        "prevalence": prevalence,
        "repeat_bytes": repeat_bytes,
    }
    _check(patients, lesions, seed, prevalence, workers)
    if (truth := _already(out, parameters)) is not None:
        return truth
    cohort = draw_cohort(patients=patients, lesions=lesions, seed=seed, prevalence=prevalence)
    out.mkdir(parents=True, exist_ok=True)
    # Inside `out`, not beside it: `out` may be a volume of its own, where nothing can be renamed into place.
    work = Path(tempfile.mkdtemp(dir=out, prefix=_PARTIAL))
    try:
        start = time.monotonic()
        _write(work, cohort, repeat_bytes, _processes(workers, lesions, repeat_bytes), progress)
        truth = _truth(cohort, parameters, work)
        truth["lesions_per_second"] = round(len(cohort.number) / (time.monotonic() - start), 1)
        for name in _FILES[:-1]:
            (work / name).replace(out / name)
        write_json(out / "truth.json", {k: v for k, v in truth.items() if k != "lesions_per_second"})
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return _summary(truth)


def _check(patients: int, lesions: int, seed: int, prevalence: float, workers: int | None) -> None:
    if not 2 <= patients <= 1_000_000:
        raise UsageError(f"patients must be between 2 and 1000000, got {patients}")
    if not patients <= lesions <= 5_000_000:
        raise UsageError(f"lesions must be between patients ({patients}) and 5000000, got {lesions}")
    if seed < 0:
        raise UsageError(f"seed must be at least 0, got {seed}")
    # Written so that NaN is out of bounds too.
    if not 0 <= prevalence <= 0.5:
        raise UsageError(f"prevalence must be between 0 and 0.5, got {prevalence}")
    if workers is not None and workers < 1:
        raise UsageError(f"workers must be at least 1, got {workers}")


def _already(out: Path, parameters: dict[str, Any]) -> dict[str, Any] | None:
    """The finished set's summary; None where `out` is free; leftovers of a run that was killed are removed."""
    if not out.exists():
        return None
    if not out.is_dir():
        raise UsageError(f"--out {out}: a file, not a folder; choose another path")
    names = {p.name for p in out.iterdir()} - {"lost+found"}
    partial = {name for name in names if name.startswith(_PARTIAL)}
    if "truth.json" in names:
        try:
            truth = dict(json.loads((out / "truth.json").read_text()))
            same = truth["parameters"] == parameters and all(
                (out / name).stat().st_size == size for name, size in truth["bytes"].items()
            )
        except (OSError, ValueError, KeyError, AttributeError):
            same = False
        if same:
            return _summary(truth)
        raise UsageError(
            f"--out {out}: holds another synthetic set, or a changed one; choose another folder or delete it"
        )
    if names - partial and not (partial and names - partial <= set(_FILES)):
        raise UsageError(f"--out {out}: not empty; choose another folder")
    for name in names:
        path = out / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return None


def _processes(workers: int | None, lesions: int, repeat_bytes: bool) -> int:
    if repeat_bytes or (workers is None and lesions < PARALLEL_FROM):
        return 1
    return workers or min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def _write(work: Path, cohort: Cohort, repeat_bytes: bool, processes: int, progress: bool) -> None:
    parts = ("train", "test")
    with ExitStack() as stack:
        tables = [stack.enter_context((work / f"{part}-metadata.csv").open("wb")) for part in parts]
        images = [stack.enter_context(h5py.File(work / f"{part}-image.hdf5", "w")) for part in parts]
        submission = stack.enter_context((work / "sample_submission.csv").open("w", encoding="utf-8"))
        submission.write("isic_id,target\n")
        header = [True, True]
        chunks = _drawn(cohort, repeat_bytes, processes)
        count = -(-len(cohort.number) // CHUNK)
        for rows, numbers, crops in track(chunks, f"lesions, {CHUNK} at a time", total=count, show=progress):
            rng = stream(cohort.seed, 2, int(rows[0]) // CHUNK)
            frame = table(cohort, rows, numbers, rng)
            ids, test = frame["isic_id"].to_list(), cohort.test[rows]
            for number, columns in enumerate((schema.TRAIN_COLUMNS, schema.TEST_COLUMNS)):
                mine = np.flatnonzero(test == bool(number))
                if len(mine):
                    frame[mine.tolist()].select(columns).write_csv(tables[number], include_header=header[number])
                    header[number] = False
            for isic_id, crop, is_test in zip(ids, crops, test, strict=True):
                # A scalar of fixed length, as in the competition; h5py stores no time with it.
                images[int(is_test)].create_dataset(isic_id, data=np.bytes_(crop))
                if is_test:
                    submission.write(f"{isic_id},0.3\n")


def _drawn(
    cohort: Cohort, repeat_bytes: bool, processes: int
) -> Iterator[tuple[NDArray[np.int64], dict[str, Floats], list[bytes]]]:
    """Rows, columns and crops, chunk by chunk in the rows' order."""
    chunks = [np.arange(at, min(at + CHUNK, len(cohort.number))) for at in range(0, len(cohort.number), CHUNK)]

    def columns(number: int) -> dict[str, Floats]:
        return measure(cohort, chunks[number], stream(cohort.seed, 1, number))

    def task(number: int, numbers: dict[str, Floats]) -> tuple[int, int, dict[str, Floats], Floats, Floats]:
        rows = chunks[number]
        needed = {name: numbers[name] for name in _DRAWN_COLUMNS}
        return cohort.seed, number, needed, cohort.structure[rows], cohort.hairiness[cohort.patient[rows]]

    if repeat_bytes:
        pool = _crops(*task(0, columns(0)))
        for number, rows in enumerate(chunks):
            yield rows, columns(number), [pool[row % len(pool)] for row in rows]
        return
    if processes == 1:
        for number, rows in enumerate(chunks):
            numbers = columns(number)
            yield rows, numbers, _crops(*task(number, numbers))
        return
    with ProcessPoolExecutor(processes, get_context("spawn"), initializer=_leave_interrupts_to_the_parent) as pool_of:
        # A window of chunks, so that a large set is never all in memory.
        waiting: deque[tuple[NDArray[np.int64], dict[str, Floats], Future[list[bytes]]]] = deque()
        try:
            for number, rows in enumerate(chunks):
                numbers = columns(number)
                waiting.append((rows, numbers, pool_of.submit(_crops, *task(number, numbers))))
                if len(waiting) > 3 * processes:
                    rows, numbers, crops = waiting.popleft()
                    yield rows, numbers, crops.result()
            while waiting:
                rows, numbers, crops = waiting.popleft()
                yield rows, numbers, crops.result()
        finally:
            pool_of.shutdown(cancel_futures=True)


_DRAWN_COLUMNS = (
    "tbp_lv_Lext", "tbp_lv_Aext", "tbp_lv_Bext", "tbp_lv_deltaL", "tbp_lv_deltaA", "tbp_lv_deltaB", "tbp_lv_stdLExt",
    "tbp_lv_color_std_mean", "tbp_lv_areaMM2", "tbp_lv_eccentricity", "tbp_lv_area_perim_ratio",
)  # fmt: skip


def _leave_interrupts_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _crops(seed: int, number: int, numbers: dict[str, Floats], structure: Floats, hairiness: Floats) -> list[bytes]:
    """One chunk's JPEGs."""
    dice: Plane = stream(seed, 3, number).random((len(structure), DICE), dtype=np.float32)
    skin_and_delta = np.column_stack([numbers[name] for name in _DRAWN_COLUMNS[:6]]).tolist()
    ratio = numbers["tbp_lv_area_perim_ratio"] / ellipse_ratio(numbers["tbp_lv_eccentricity"])
    crops = []
    for row, colors in enumerate(skin_and_delta):
        scene = Scene(
            skin=tuple(colors[:3]),
            delta=tuple(colors[3:]),
            skin_std=float(numbers["tbp_lv_stdLExt"][row]),
            color_std=float(numbers["tbp_lv_color_std_mean"][row]),
            area=float(numbers["tbp_lv_areaMM2"][row]),
            eccentricity=float(numbers["tbp_lv_eccentricity"][row]),
            ratio=float(ratio[row]),
            structure=float(structure[row]),
            hairiness=float(hairiness[row]),
        )
        crops.append(encode(draw(scene, dice[row])))
    return crops


def _truth(cohort: Cohort, parameters: dict[str, Any], work: Path) -> dict[str, Any]:
    train, malignant = ~cohort.test, cohort.target == 1
    both = train.any() and 0 < malignant[train].sum() < train.sum()
    names = [f"ISIC_{n:07d}" for n in cohort.number]
    expected, realised = best_pauc(cohort, train, images_tell=not parameters["repeat_bytes"]) if both else (None, None)
    return {
        "about": _NOTE,
        "parameters": parameters,
        "lesions": {"train": int(train.sum()), "test": int(cohort.test.sum())},
        "malignant": {"train": int(malignant[train].sum()), "test": int(malignant[cohort.test].sum())},
        "intercept": cohort.intercept,
        "best_pauc": expected,
        "best_pauc_of_these_labels": realised,
        "bytes": {name: (work / name).stat().st_size for name in _FILES[:-1]},
        "malignant_in_test": [names[i] for i in np.flatnonzero(malignant & cohort.test)],
        "probability": {name: float(f"{p:.6g}") for name, p in zip(names, cohort.probability.tolist(), strict=True)},
    }


def _summary(truth: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in truth.items() if k not in ("probability", "malignant_in_test")}
