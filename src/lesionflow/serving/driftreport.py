"""A data set held against what a bundle was judged on, in all and institution by institution.

    report = drift_files(Path("run/bundle"), Path("data"))
    for one in report["institutions"]:
        print(one["institution"], one["shifted"])

Nothing is known of any target, and nothing is needed: this says whether lesions, and what the model makes of them, are
still like the hold-out's, not whether the model is still right.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lesionflow.bundle import NOTICE
from lesionflow.data.images import Pixels, to_pixels
from lesionflow.data.source import Source, find_parts, open_source
from lesionflow.errors import DataError, UsageError
from lesionflow.keys import write_json
from lesionflow.progress import track
from lesionflow.serving.drift import ALPHA, FEWEST_PATIENTS, Shift, Sums, adjusted
from lesionflow.serving.driftfigures import Doubles, Observed, observed, populations
from lesionflow.serving.driftreference import grouped, patients_known, served_bands, visit_sizes
from lesionflow.serving.inputs import statistics
from lesionflow.serving.predictor import Predictor

if TYPE_CHECKING:
    import polars as pl

_BATCH = 64
_SHOWN = 5
OWN, WHOLE = "its own lesions of the hold-out", "the whole hold-out"


@dataclass(frozen=True)
class Looked:
    """What a bundle sees in a data set of N lesions."""

    seen: Observed
    groups: list[str]
    """The patient of each; the lesion's own id where unknown."""
    institution: list[str | None]
    known: int
    """Lesions of known patients."""
    unusable: dict[str, str]
    """Why a picture couldn't be read, by id."""


def drift_files(
    bundle: Path | Predictor,
    data: Path,
    *,
    metadata: Path | None = None,
    part: str | None = None,
    out: Path | None = None,
    alpha: float = ALPHA,
    progress: bool = True,
) -> dict[str, Any]:
    """Hold `data` (data set directory, folder, HDF5 file, or a metadata CSV) against a bundle's reference.

    `part` is `train` or `test` of a data set directory, by default the one there is, `test` of both. Institutions are
    those of the column `attribution`. Each is held against its own part of the hold-out where that was large enough,
    else against all of it. One report names anything at all, where nothing has changed, with probability `alpha` at
    most. Writes the report to `out` as JSON where that is given. Raises `DataError` for a bundle without a reference.
    """
    if not 0 < alpha < 1:
        raise UsageError(f"alpha = {alpha:g}: must lie between 0 and 1, such as 0.05")
    predictor = bundle if isinstance(bundle, Predictor) else Predictor(bundle)
    info = predictor.bundle.info
    if "drift" not in info:
        raise DataError(
            f"{predictor.bundle.path}: has no reference to hold lesions against; "
            "export it again from its run (`lesionflow export RUN`) with this version"
        )
    figures, tests = populations(info["drift"])
    looked = look(predictor, data, metadata=metadata, part=part, progress=progress)
    count = len(looked.groups)
    codes = figures.codes(looked.seen, count)
    parts, found = [], list[Shift]()
    for name in _institutions(looked.institution, set(tests)):
        rows = np.array([i for i, one in enumerate(looked.institution) if not name or one == name], np.int64)
        owner, patients = grouped([looked.groups[row] for row in rows.tolist()])
        sums = Sums(tests[name if name in tests else ""])
        sums.add(codes[:, rows], owner, patients)
        shifts = sums.shifts(name or None)
        parts.append((name, sums, len(shifts)))
        found += shifts
    shifts, place, institutions = adjusted(found, alpha), 0, []
    for name, sums, number in parts:
        mine = shifts[place : place + number]
        place += number
        few = f"{_patients(sums.patients)}: under {FEWEST_PATIENTS} nothing is tested"
        institutions.append({
            "institution": name or None,
            "against": OWN if name in tests and name else WHOLE,
            "lesions": sums.lesions,
            "patients": sums.patients,
            "reference_patients": sums.tests.patients,
            "reason": few if sums.patients < FEWEST_PATIENTS else None,
            "tested": sum(one.p is not None for one in mine),
            "shifted": sum(one.shifted for one in mine),
            "figures": [one.to_dict() | {"words": one.words} for one in mine],
        })  # fmt: skip
    whole = info["drift"]["whole"]
    report = {
        "model": predictor.bundle.name,
        "bundle": predictor.bundle.version,
        "data": str(data),
        "lesions": count,
        "patients": _known_patients(looked),
        "lesions_without_patient": count - looked.known,
        "unusable": {"count": len(looked.unusable), "first": dict(list(looked.unusable.items())[:_SHOWN])},
        "reference": {"lesions": whole["lesions"], "patients": whole["patients"]},
        "alpha": alpha,
        "tested": sum(one.p is not None for one in shifts),
        "shifted": sum(one.shifted for one in shifts),
        "institutions": institutions,
        "notice": NOTICE,
    }
    if out is not None:
        write_json(out, report)
    return report


def look(
    predictor: Predictor, data: Path, *, metadata: Path | None = None, part: str | None = None, progress: bool = True
) -> Looked:
    """Score a data set and take its figures. Pictures that can't be used are counted, and left out."""
    with _open(Path(data), metadata, part) as source:
        ids, table, info = source.ids, source.metadata, predictor.bundle.info
        joined = table is not None and bool(info.get("visit"))
        pictures = predictor.bundle.pictures and source.has_images
        if not pictures and not joined:
            need = "pictures" if predictor.bundle.pictures else "metadata"
            raise UsageError(f"{data}: has no {need}, and the bundle scores nothing without")
        fold_logits = np.full((len(ids), predictor.bundle.models), np.nan)
        stats, doubts, unusable = dict[str, Doubles](), np.zeros(len(ids), bool), dict[str, str]()
        batches = _batches(predictor, source, unusable) if pictures else iter(())
        total = -(-len(ids) // _BATCH)
        for rows, pixels in track(batches, "drift", total=total, show=progress and pictures):
            raw, _ = predictor.logits(pixels)
            fold_logits[rows] = raw
            doubts[rows] = [bool(doubt) for doubt in predictor.doubts(pixels, raw)]
            for name, x in statistics(pixels).items():
                stats.setdefault(name, np.full(len(ids), np.nan))[rows] = x
    if joined:
        from lesionflow.serving.visit import Visits

        assert table is not None
        logits = Visits(predictor).score(fold_logits, table).by_mode
    else:
        logits = {"image": fold_logits.mean(1)}
    described = table if any(name.startswith("metadata ") for name in info["drift"]["figures"]) else None
    known = patients_known(table)
    groups = ids if known is None or table is None else _groups(table)
    owner, _ = grouped(groups)
    bands = served_bands(logits, table if joined else None, doubts, info, pictures=pictures)
    institution = table["attribution"].to_list() if table is not None and "attribution" in table.columns else []
    return Looked(
        observed(stats, logits, bands, described, visit_sizes(owner, known)),
        groups,
        institution or [None] * len(ids),
        0 if known is None else int(known.sum()),
        unusable,
    )


def render(report: dict[str, Any]) -> Any:
    """The report as text for a terminal (rich renderable): what has shifted, the clearest first."""
    from rich.console import Group
    from rich.text import Text

    lines = [Text(f"{report['lesions']:,} lesions of {report['patients']:,} known patients.")]
    if loose := report["lesions_without_patient"]:
        lines.append(
            Text(
                f"The patient of {loose:,} is unknown. Each of these counts as a patient of its own: if many are one "
                "patient's, more is named than should be."
            )
        )
    if report["unusable"]["count"]:
        lines.append(Text(f"{report['unusable']['count']:,} pictures can't be used and were left out."))
    for one in report["institutions"]:
        shifted = sorted((f for f in one["figures"] if f["shifted"]), key=lambda figure: figure["p"])
        name = one["institution"] or "All"
        said = one["reason"] or f"nothing has shifted in {one['tested']} tests"
        if shifted:
            said = f"{len(shifted)} of {one['tested']} tests have shifted"
        head = f"\n{name}: {one['lesions']:,} lesions of {_patients(one['patients'])} against {one['against']}"
        lines.append(Text(f"{head} ({one['reference_patients']:,} patients): {said}.", "bold"))
        lines += [Text(f"  {line}") for line in _together(shifted)]
    lines.append(
        Text(
            f"\nOn lesions like the hold-out's such a report names anything in at most {report['alpha']:.0%} of cases."
        )
    )
    return Group(*lines)


def _together(shifted: list[dict[str, Any]]) -> list[str]:
    """A line for each, but one for all columns that are missing as often: forms are left empty as a whole."""
    found: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for one in shifted:
        key = (one["words"],) if one["test"] == "missing" else (one["words"], one["figure"])
        found.setdefault(key, []).append(one)
    lines = []
    for (words, *_), them in found.items():
        rest = f" and {len(them) - _SHOWN} more" if len(them) > _SHOWN else ""
        names = ", ".join(
            one["figure"].removeprefix("missing ") if n else one["figure"] for n, one in enumerate(them[:_SHOWN])
        )
        lines.append(f"{names}{rest}: {words} (p = {them[0]['adjusted']:.2g})")
    return lines


def _open(data: Path, metadata: Path | None, part: str | None) -> Source:
    if part not in (None, "train", "test"):
        raise UsageError(f"--part {part}: train or test")
    if data.is_file() and data.suffix.lower() == ".csv":
        from lesionflow.data.table import read_metadata

        return Source(data.parent, part or "test", None, read_metadata(data), data)
    if part is None and data.is_dir():
        part = "test" if any(find_parts(data, "test")) else "train"
    source = open_source(data, part or "test", metadata)
    if len(set(source.ids)) != len(source.ids):
        raise DataError(f"{data}: an isic_id has more than one row: run `lesionflow data check`, keep one")
    return source


def _batches(predictor: Predictor, source: Source, unusable: dict[str, str]) -> Iterator[tuple[list[int], Pixels]]:
    """Rows of the lesions whose pictures can be used and their pixels; one thread decodes ahead of the graph."""

    def load(start: int) -> tuple[list[int], Pixels]:
        rows, pixels = [], []
        for row, name in enumerate(source.ids[start : start + _BATCH], start):
            try:
                pixels.append(to_pixels(source.read(name), predictor.spec))
            except DataError as error:
                unusable[name] = str(error)
            else:
                rows.append(row)
        size = predictor.spec.size
        return rows, np.stack(pixels) if pixels else np.empty((0, size, size, 3), np.uint8)

    with ThreadPoolExecutor(1, "decode") as pool:
        starts = range(0, len(source.ids), _BATCH)
        future = pool.submit(load, 0)
        for start in starts:
            loaded = future.result()
            if start + _BATCH < len(source.ids):
                future = pool.submit(load, start + _BATCH)
            yield loaded


def _institutions(names: list[str | None], known: set[str]) -> list[str]:
    """All together ("") and each of them; a single one that the hold-out doesn't know is all together."""
    found = sorted({name for name in names if name})
    alone = len(found) == 1 and found[0] not in known and None not in names
    return ["", *([] if alone else found)]


def _groups(table: pl.DataFrame) -> list[str]:
    pairs = zip(table["patient_id"].to_list(), table["isic_id"].to_list(), strict=True)
    return [patient or f"lesion {name}" for patient, name in pairs]


def _patients(count: int) -> str:
    return "1 patient" if count == 1 else f"{count:,} patients"


def _known_patients(looked: Looked) -> int:
    return len(set(looked.groups)) - (len(looked.groups) - looked.known)
