"""A Kaggle submission from a bundle and the competition's test files, checked against the sample before and after.

    submit(Path("run/bundle"), Path("isic-2024"), Path("submission.csv"))

The scores are those of `predictor.predict_files`: a bundle that knows metadata compares each lesion with the same
patient's others. What is refused is refused before anything is scored, where it can be.
"""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lesionflow.data.source import find_parts, open_source
from lesionflow.errors import DataError
from lesionflow.keys import atomic
from lesionflow.serving.predictor import Predictor, predict_files

SAMPLE = "sample_submission.csv"
HEADER = "isic_id,target"
_SHOWN = 5


def submit(
    bundle: Path | Predictor,
    data: Path,
    out: Path,
    *,
    skip_corrupt: bool = False,
    threads: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Score the test files in `data` and write `isic_id,target`, one row per id of the sample and in its order.

    `data` holds `test-image.hdf5` (or a folder `test-image/`) and `test-metadata.csv`; `sample_submission.csv` where
    there is one says which ids are wanted, else the metadata does. A bundle that knows metadata alone needs no images.
    `out` is the file, or a folder that gets `submission.csv`; it appears once it is complete and checked. With
    `skip_corrupt` an unusable image is listed, and its lesion gets the score of its metadata, or the mean.

    Gives what `predict_files` gives, and `sample`: how many ids it asked for (None without one). Raises `DataError`
    for missing files, ids that differ (with counts and the first of them) and unusable images.
    """
    data, out = Path(data), Path(out)
    out = out if out.suffix == ".csv" else out / "submission.csv"
    predictor = bundle if isinstance(bundle, Predictor) else Predictor(bundle, threads)
    wanted = _wanted(data, predictor.bundle.pictures)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        unordered = Path(scratch) / "submission.csv"
        result = predict_files(predictor, data, out=unordered, progress=progress, skip_corrupt=skip_corrupt)
        order = _ids(unordered) if wanted is None else wanted
        # Lines are moved as they stand, so that no digit of a score is lost.
        lines = {line.partition(",")[0]: line for line in unordered.read_text().splitlines()[1:]}
        ordered = Path(scratch) / out.name
        ordered.write_text("\n".join([HEADER, *(lines[name] for name in order)]) + "\n")
        check_submission(ordered, data / SAMPLE if wanted is not None else None)
        with atomic(out) as file:
            file.write(ordered.read_bytes())
    return {**result, "out": str(out), "sample": None if wanted is None else len(wanted)}


def check_submission(submission: Path, sample: Path | None = None) -> int:
    """Check a written file as Kaggle reads it, and give its number of rows.

    Two columns, `isic_id,target`; no id twice; every target a finite number in 0..1; with a `sample`, exactly its ids
    and in its order. Raises `DataError` with the count and the first offenders.
    """
    rows = _read(submission)
    names = [name for name, _ in rows]
    if repeated := _repeated(names):
        raise DataError(f"{submission}: {_some(repeated)} in more than one row; keep one row per isic_id")
    if bad := [f"{name}: {text!r}" for name, text in rows if not _is_probability(text)]:
        raise DataError(f"{submission}: column target is no number in 0..1 for {_some(bad)}; score these lesions again")
    if sample is not None:
        wanted = _ids(sample)
        _same(submission, names, sample, wanted, "write a row for each id of the sample and for no other")
        if names != wanted:
            row = next(n for n, pair in enumerate(zip(names, wanted, strict=True)) if pair[0] != pair[1])
            raise DataError(
                f"{submission}: has the ids of {sample}, but in another order, first in row {row + 1}: "
                f"{names[row]}, not {wanted[row]}; sort the rows as the sample has them"
            )
    return len(rows)


def _wanted(data: Path, pictures: bool) -> list[str] | None:
    """The sample's ids, if there is one, after checking that the test files can answer for each of them."""
    if not data.is_dir():
        raise DataError(f"{data}: no such folder; point to the competition's files (`lesionflow data fetch` gets them)")
    images, metadata = find_parts(data, "test")
    absent = ["test-image.hdf5 (or a folder test-image/)"] if pictures and images is None else []
    absent += ["test-metadata.csv"] if metadata is None else []
    if absent:
        raise DataError(
            f"{data}: no {' and no '.join(absent)}; a submission is made of that, `lesionflow data fetch` gets it"
        )
    if not (data / SAMPLE).is_file():
        return None
    wanted = _ids(data / SAMPLE)
    if repeated := _repeated(wanted):
        raise DataError(f"{data / SAMPLE}: {_some(repeated)} in more than one row; restore the file")
    with open_source(data, "test") as source:
        remedy = "take both files from one download of the competition"
        _same(metadata or data, source.ids, data / SAMPLE, wanted, remedy)
    return wanted


def _same(path: Path, names: Sequence[str], sample: Path, wanted: Sequence[str], remedy: str) -> None:
    have, asked = set(names), set(wanted)
    missing, extra = [n for n in wanted if n not in have], [n for n in names if n not in asked]
    if not missing and not extra:
        return
    parts = [f"no row for {_some(missing)} of {sample}"] * bool(missing) + [f"{_some(extra)} not in {sample}"] * bool(
        extra
    )
    raise DataError(f"{path}: {len(names):,} ids, {sample.name} has {len(wanted):,}: {'; '.join(parts)}; {remedy}")


def _ids(path: Path) -> list[str]:
    return [name for name, _ in _read(path)]


def _read(path: Path) -> list[tuple[str, str]]:
    """(isic_id, target as text) of each row."""
    try:
        header, *lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError):
        raise DataError(f"{path}: can't be read as a table, or is empty; restore it") from None
    if header.strip() != HEADER:
        raise DataError(f"{path}: the first line is {header[:60]!r}, expected {HEADER!r}; restore it")
    rows = [line.split(",") for line in lines]
    if bad := [n for n, row in enumerate(rows, 2) if len(row) != 2 or not row[0].strip()]:
        raise DataError(f"{path}: line {bad[0]:,} isn't an id and a score ({len(bad):,} such lines); correct it")
    if not rows:
        raise DataError(f"{path}: has no rows; restore it")
    return [(name.strip(), text) for name, text in rows]


def _repeated(names: Sequence[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


def _is_probability(text: str) -> bool:
    try:
        return 0.0 <= float(text) <= 1.0 and math.isfinite(float(text))
    except ValueError:
        return False


def _some(names: Sequence[str]) -> str:
    """'3 lesions (ISIC_1, ISIC_2, ...)': the count and the first five."""
    shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
    return f"{len(names):,} lesion{'s' * (len(names) != 1)} ({shown})"
