"""Public data sets of skin lesions, converted to this package's layout, with their labels mapped to malignant or not.

    convert("isic2019", Path("ISIC_2019"), Path("data/isic-2019"))
    lesionflow run baseline --data data/isic-2019 --out runs/isic-2019

They are dermoscopic images (ISIC 2018 to 2020) and phone photographs (PAD-UFES-20), not crops of total-body
photographs: something to start an image model from, not to mix with ISIC 2024. A set is a folder in the layout that
its publishers give it; nothing is downloaded. The label maps are `publicsets.SETS`, copied into `convert.json`.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
from PIL import Image, ImageOps

from lesionflow.data.images import DEFAULT_LIMITS
from lesionflow.data.publicsets import (
    BENIGN,
    DUPLICATE,
    MALIGNANT,
    SETS,
    UNCERTAIN,
    UNKNOWN,
    PublicSet,
    archive_id,
    read_set,
    some,
)
from lesionflow.data.schema import SEXES, SITES
from lesionflow.data.source import IMAGE_SUFFIXES, find_parts, open_images
from lesionflow.data.table import read_cells
from lesionflow.errors import DataError, UsageError
from lesionflow.keys import atomic, digest, file_hash, write_json
from lesionflow.progress import track

CHOICES = ("benign", "malignant", "drop")
"""What may be done with an uncertain diagnosis."""
RECORD = "convert.json"
_SHOWN = 5


def convert(
    kind: str,
    source: Path,
    out: Path,
    *,
    uncertain: str = "benign",
    without: Sequence[Path] = (),
    side: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Write a public set as a data set directory, `out`: `train-image/` and `train-metadata.csv`.

    `source` is the set as published, unpacked; images may lie in any folder below it. They are linked where the file
    system allows, else copied; with `side`, those whose shorter side is longer than so many pixels are scaled down
    to it (JPEG). `uncertain` says what an actinic keratosis is (benign, malignant or drop), `without` names data sets
    whose ids are left out. `patient_id` is the patient, or where a set doesn't know patients the lesion, so that its
    images stay on one side of a split; `iddx_full` holds the published diagnosis.

    `out` appears once it is complete; a conversion that broke off goes on where it was, one that is done is not done
    again. Gives the counts, also written to `out/convert.json`. Raises `UsageError` for an unknown kind or choice and
    an `out` that holds something else, `DataError` naming file, column and ids for data that aren't as published.
    """
    if kind not in SETS:
        raise UsageError(f"{kind}: not one of {', '.join(SETS)}")
    if uncertain not in CHOICES:
        raise UsageError(f"--uncertain {uncertain}: {', '.join(CHOICES)}")
    if side and not 32 <= side <= 4096:
        raise UsageError(f"--side {side}: from 32 to 4096 pixels, or 0 for images as they are")
    known = SETS[kind]
    if out.resolve().is_relative_to(source.resolve()):
        raise UsageError(f"{out}: lies in the set's own folder {source}; name a folder outside of it")
    path, lesions = read_set(kind, source)
    lesions, dropped = _labelled(path, lesions, known, uncertain)
    taken = {name for other in without for name in ids_of(other)}
    if taken:
        kept = lesions.filter(~pl.col("isic_id").is_in(list(taken)))
        dropped["in another set"] = len(lesions) - len(kept)
        lesions = kept
    if lesions.is_empty():
        raise DataError(f"{path}: no lesion is left after leaving out {dropped}; check the label map and --without")
    files = _find_images(source, path, lesions)
    table = _metadata(lesions, known)
    if not side:
        _check_sizes(files)
    asked = {"kind": kind, "uncertain": uncertain, "side": side, "table": digest(table.write_csv())}
    if (done := _record(out)) is not None and done["asked"] == asked:
        return dict(done["counts"])
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out}: holds something else; name another folder, or empty it first")
    work = out.with_name(f".{out.name}.partial")
    if (begun := _record(work)) is None or begun["asked"] != asked:
        shutil.rmtree(work, ignore_errors=True)
        write_json(work / RECORD, {"asked": asked})
    linked, copied, scaled = _place(files, work / "train-image", side, progress)
    with atomic(work / "train-metadata.csv") as file:
        table.write_csv(file)
    counts = {
        "set": known.title,
        "lesions": len(table),
        "malignant": int(table["target"].sum()),
        "benign": int((table["target"] == 0).sum()),
        "dropped": {reason: number for reason, number in dropped.items() if number},
        "groups": table["patient_id"].n_unique() - int(table["patient_id"].has_nulls()),
        "without a group": table["patient_id"].null_count(),
        "linked": linked,
        "copied": copied,
        "scaled": scaled,
        "licence": known.licence,
    }
    labels = {name: (uncertain if label == UNCERTAIN else label) for name, label in known.labels.items()}
    about = {"attribution": known.attribution, "citation": known.citation, "labels": labels}
    write_json(work / RECORD, {"asked": asked, "counts": counts, **about, "source_table": file_hash(path)})
    if out.exists():
        out.rmdir()
    work.rename(out)
    return counts


def overlap(a: Path, b: Path) -> list[str]:
    """Ids that two data sets (directories, or metadata files) have in common, sorted; `_downsampled` doesn't count."""
    return sorted(set(ids_of(a)) & set(ids_of(b)))


def ids_of(path: Path) -> list[str]:
    """The ids of a data set directory or a metadata file, as the archive has them. Raises `DataError`."""
    table = path
    if path.is_dir():
        images, own = find_parts(path, "train")
        if own is None and images is not None:
            return [archive_id(name) for name in open_images(images).ids()]
        table = own or path / "train-metadata.csv"
    cells = read_cells(table)
    if "isic_id" not in cells.columns:
        raise DataError(f"{table}: no column isic_id; point to a data set directory or its train-metadata.csv")
    return [archive_id(name) for name in cells["isic_id"].drop_nulls().to_list()]


# Making ours of it --------------------------------------------------------------------------------------------


def _labelled(
    path: Path, lesions: pl.DataFrame, known: PublicSet, uncertain: str
) -> tuple[pl.DataFrame, dict[str, int]]:
    """Rows with a target 0 or 1, and how many of the others were left out, by reason."""
    labels = {**known.labels, DUPLICATE: DUPLICATE}
    if len(other := lesions.filter(~pl.col("diagnosis").is_in(list(labels)).fill_null(False))):
        words = ", ".join(repr(word) for word in other["diagnosis"].unique(maintain_order=True).head(_SHOWN))
        raise DataError(
            f"{path}: {words} is no diagnosis of {known.title} ({', '.join(known.labels)}), for "
            f"{some(other['isic_id'])}; correct or remove these rows"
        )
    label = pl.col("diagnosis").replace_strict(labels, return_dtype=pl.String)
    lesions = lesions.with_columns(label=label.replace({UNCERTAIN: uncertain}))
    dropped = {
        "unknown diagnosis": int((lesions["label"] == UNKNOWN).sum()),
        "uncertain diagnosis": int((lesions["label"] == "drop").sum()),
        "duplicate": int((lesions["label"] == DUPLICATE).sum()),
    }
    return lesions.filter(pl.col("label").is_in([MALIGNANT, BENIGN])), dropped


def _metadata(lesions: pl.DataFrame, known: PublicSet) -> pl.DataFrame:
    """train-metadata.csv, in the order of ids. What isn't known, or isn't a word of ISIC 2024's, is empty."""
    sex, site = pl.col("sex").str.to_lowercase(), pl.col("anatom_site_general").str.to_lowercase()
    age = pl.when(~pl.col("age_approx").str.to_lowercase().is_in(["unknown", "nan", ""])).then("age_approx")
    number = age.cast(pl.Float64, strict=False)
    if len(wrong := lesions.filter((age.is_not_null() & number.is_null()) | ~number.is_between(0, 120))):
        shown = ", ".join(f"{i}: {a!r}" for i, a in wrong.select("isic_id", "age_approx").head(_SHOWN).iter_rows())
        raise DataError(
            f"{known.title}: column age_approx (age): {len(wrong):,} cells aren't 0 to 120 years ({shown}); "
            "correct or empty them"
        )
    return lesions.sort("isic_id").select(
        "isic_id",
        (pl.col("label") == MALIGNANT).cast(pl.Int8).alias("target"),
        "patient_id",
        number.alias("age_approx"),
        pl.when(sex.is_in(SEXES)).then(sex).alias("sex"),
        pl.when(site.is_in(SITES)).then(site).alias("anatom_site_general"),
        pl.lit(known.attribution).alias("attribution"),
        pl.lit(known.licence).alias("copyright_license"),
        "lesion_id",
        pl.col("diagnosis").alias("iddx_full"),
    )


def _find_images(source: Path, path: Path, lesions: pl.DataFrame) -> dict[str, Path]:
    """The image of each lesion, by isic_id; it may lie in any folder below the source."""
    wanted = dict(lesions.select("stem", "isic_id").iter_rows())
    files: dict[str, Path] = {}
    for folder, _, names in os.walk(source):
        for name in names:
            stem, suffix = os.path.splitext(name)  # noqa: PTH122  (hundreds of thousands of names)
            if suffix.lower() not in IMAGE_SUFFIXES or stem not in wanted:
                continue
            here = Path(folder, name)
            if (there := files.get(wanted[stem])) is not None:
                raise DataError(f"{source}: image {stem} is there twice, {there} and {here}; keep one of them")
            files[wanted[stem]] = here
    if lost := [stem for stem, isic_id in wanted.items() if isic_id not in files]:
        raise DataError(
            f"{path}: no image ({', '.join(IMAGE_SUFFIXES)}) below {source} for {some(pl.Series(lost))}; unpack all "
            "of the set's image archives there, or remove these rows"
        )
    return dict(sorted(files.items()))


def _check_sizes(files: dict[str, Path]) -> None:
    bound = DEFAULT_LIMITS.bytes
    if large := [name for name, path in files.items() if path.stat().st_size > bound]:
        raise DataError(
            f"{some(pl.Series(large))}: image files over {bound / 1e6:.0f} MB, which no training reads; "
            "scale them down with --side 512"
        )


def _place(files: dict[str, Path], folder: Path, side: int, progress: bool) -> tuple[int, int, int]:
    """Link, copy or scale each image; those that are there already are counted as what they were."""
    folder.mkdir(exist_ok=True)
    for leftover in folder.glob(".*"):  # Of a file that was being written when an earlier try ended.
        leftover.unlink()
    linked = copied = scaled = 0
    for isic_id, path in track(files.items(), "convert", total=len(files), show=progress):
        if side and (smaller := _scaled(path, side)) is not None:
            scaled += 1
            if not (target := folder / f"{isic_id}.jpg").exists():
                with atomic(target) as file:
                    file.write(smaller)
            continue
        target = folder / f"{isic_id}{path.suffix.lower()}"
        if not target.exists():
            with contextlib.suppress(OSError):  # Another file system, or one without links.
                os.link(path, target)
        if not target.exists():
            with atomic(target) as file, path.open("rb") as bytes_:
                shutil.copyfileobj(bytes_, file)
        same = target.stat().st_ino == path.stat().st_ino and target.stat().st_dev == path.stat().st_dev
        linked, copied = linked + same, copied + (not same)
    return linked, copied, scaled


def _scaled(path: Path, side: int) -> bytes | None:
    """The image with a shorter side of `side` pixels, upright, as JPEG; None for one that is small enough."""
    try:
        with Image.open(path) as file:
            width, height = file.size
            if min(width, height) <= side:
                return None
            file.draft("RGB", (side, side))  # JPEG: decodes at a half, a quarter or an eighth where that is enough.
            image = ImageOps.exif_transpose(file).convert("RGB")
            factor = side / min(image.size)
            image = image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.LANCZOS)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: can't be read as an image ({error}); restore it, or remove its row") from None
    out = io.BytesIO()
    image.save(out, "JPEG", quality=95)
    return out.getvalue()


def _record(folder: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads((folder / RECORD).read_text()))
    except (OSError, ValueError):
        return None
