"""Four public data sets of skin lesions: what they are called, what their diagnoses mean here, how they are read.

Each reader takes a folder in the layout that the publishers give the set, and gives one row per image, as text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from lesionflow.data.table import read_cells
from lesionflow.errors import DataError

MALIGNANT, BENIGN, UNCERTAIN, UNKNOWN = "malignant", "benign", "uncertain", "unknown"
DUPLICATE = "duplicate"
_DOWNSAMPLED = "_downsampled"
_SHOWN = 5


@dataclass(frozen=True)
class PublicSet:
    """What a set says about itself, and what its diagnoses mean here."""

    title: str
    tables: tuple[str, ...]
    """Names that its table of diagnoses goes by (glob patterns); the last one that is there is read."""
    labels: dict[str, str]
    """Published diagnosis to malignant, benign, uncertain or unknown (left out)."""
    licence: str
    """As `copyright_license` has it."""
    attribution: str
    citation: str


_2018 = {"MEL": MALIGNANT, "NV": BENIGN, "BCC": MALIGNANT, "AKIEC": UNCERTAIN, "BKL": BENIGN, "DF": BENIGN,
         "VASC": BENIGN}  # fmt: skip
_2019 = {"MEL": MALIGNANT, "NV": BENIGN, "BCC": MALIGNANT, "AK": UNCERTAIN, "BKL": BENIGN, "DF": BENIGN,
         "VASC": BENIGN, "SCC": MALIGNANT, "UNK": UNKNOWN}  # fmt: skip
_PAD = {"MEL": MALIGNANT, "BCC": MALIGNANT, "SCC": MALIGNANT, "ACK": UNCERTAIN, "NEV": BENIGN, "SEK": BENIGN}

SETS = {
    "isic2018": PublicSet(
        "ISIC 2018 task 3 (HAM10000)",
        ("ISIC2018_Task3_Training_GroundTruth.csv",),
        _2018,
        "CC-BY-NC",
        "ViDIR Group, Department of Dermatology, Medical University of Vienna",
        "doi:10.1038/sdata.2018.161, arXiv:1902.03368",
    ),
    "isic2019": PublicSet(
        "ISIC 2019",
        ("ISIC_2019_Training_GroundTruth.csv",),
        _2019,
        "CC-BY-NC",
        "BCN_20000 (Hospital Clinic de Barcelona), HAM10000 (ViDIR Group, Medical University of Vienna), MSK",
        "doi:10.1038/sdata.2018.161, arXiv:1710.05006, arXiv:1908.02288",
    ),
    "isic2020": PublicSet(
        "ISIC 2020 (SIIM-ISIC Melanoma Classification)",
        ("train.csv", "ISIC_2020_Training_GroundTruth.csv", "ISIC_2020_Training_GroundTruth_v2.csv"),
        {"1": MALIGNANT, "0": BENIGN},
        "CC-BY-NC",
        "International Skin Imaging Collaboration, SIIM-ISIC 2020 Challenge Dataset",
        "doi:10.34970/2020-ds01, doi:10.1038/s41597-021-00815-z",
    ),
    "pad-ufes-20": PublicSet(
        "PAD-UFES-20",
        ("metadata.csv",),
        _PAD,
        "CC-BY",
        "Dermatological and Surgical Assistance Program, Federal University of Espirito Santo",
        "doi:10.17632/zr7vgbcyr2.1, doi:10.1016/j.dib.2020.106221",
    ),
}

# ISIC 2019 and 2020 name places that ISIC 2024 doesn't (lateral torso, palms/soles, ...): those become unknown.
_REGIONS = {
    "head/neck": ("FACE", "NECK", "NOSE", "SCALP", "EAR", "LIP"),
    "upper extremity": ("ARM", "FOREARM", "HAND"),
    "lower extremity": ("THIGH", "LEG", "FOOT"),
    "anterior torso": ("CHEST", "ABDOMEN"),
    "posterior torso": ("BACK",),
}
_REGION_OF = {region: site for site, regions in _REGIONS.items() for region in regions}
_COLUMNS = ("patient_id", "age_approx", "sex", "anatom_site_general")


def read_set(kind: str, source: Path) -> tuple[Path, pl.DataFrame]:
    """The set's table of diagnoses, and a row per image: isic_id (as the archive has it), stem (of the image file),
    diagnosis, lesion_id, patient_id, age_approx, sex, anatom_site_general, all text, null where unknown.

    A set that doesn't know patients has its lesions' ids as `patient_id`. Raises `DataError` for what isn't as
    published, naming file, column and ids.
    """
    path = _table_path(source, SETS[kind])
    lesions = _READERS[kind](source, path)
    if len(twice := lesions["isic_id"].filter(lesions["isic_id"].is_duplicated()).unique(maintain_order=True)):
        raise DataError(f"{path}: more than one row for {some(twice)}; keep one row of each image")
    return path, lesions


def archive_id(name: str) -> str:
    """`ISIC_0000002` of `ISIC_0000002_downsampled`, as ISIC 2019 calls what it made smaller."""
    return name.removesuffix(_DOWNSAMPLED)


def _isic2018(source: Path, path: Path) -> pl.DataFrame:
    cells = _one_hot(path, _read(path, ("image", *_2018)), tuple(_2018))
    groups = next(iter(sorted(source.rglob("ISIC2018_Task3_Training_LesionGroupings.csv"))), None)
    if groups is None:
        return _with_columns(cells)
    known = _read(groups, ("image", "lesion_id")).select("image", "lesion_id")
    return _with_columns(_join(cells, known, groups)).with_columns(patient_id="lesion_id")


def _isic2019(source: Path, path: Path) -> pl.DataFrame:
    cells = _one_hot(path, _read(path, ("image", *_2019)), tuple(_2019))
    beside = next(iter(sorted(source.rglob("ISIC_2019_Training_Metadata.csv"))), None)
    if beside is None:
        raise DataError(
            f"{source}: no ISIC_2019_Training_Metadata.csv; its lesion_id keeps images of one lesion on one side of a "
            "split, so add it"
        )
    columns = ("image", "age_approx", "anatom_site_general", "lesion_id", "sex")
    return _with_columns(_join(cells, _read(beside, columns).select(columns), beside)).with_columns(
        patient_id="lesion_id"
    )


def _isic2020(source: Path, path: Path) -> pl.DataFrame:
    needed = ("image_name", "patient_id", "sex", "age_approx", "anatom_site_general_challenge", "target")
    cells = _read(path, needed).rename({"image_name": "image", "anatom_site_general_challenge": "anatom_site_general"})
    cells = cells.with_columns(diagnosis=pl.col("target"))
    if "benign_malignant" in cells.columns:
        said = pl.when(pl.col("target") == "1").then(pl.lit("malignant")).otherwise(pl.lit("benign"))
        if len(wrong := cells.filter(pl.col("benign_malignant") != said)):
            raise DataError(f"{path}: target and benign_malignant disagree for {some(wrong['image'])}; restore it")
    for repeated in sorted(source.rglob("ISIC_2020_Training_Duplicates.csv"))[:1]:
        second = _read(repeated, ("image_name_1", "image_name_2"))["image_name_2"].to_list()
        twice = pl.col("image").is_in(second)
        cells = cells.with_columns(diagnosis=pl.when(twice).then(pl.lit(DUPLICATE)).otherwise("diagnosis"))
    return _with_columns(cells)


def _pad(source: Path, path: Path) -> pl.DataFrame:
    cells = _read(path, ("img_id", "patient_id", "lesion_id", "diagnostic", "age", "gender", "region"))
    names = {"img_id": "image", "diagnostic": "diagnosis", "age": "age_approx", "gender": "sex"}
    region = pl.col("region").str.to_uppercase().replace_strict(_REGION_OF, default=None, return_dtype=pl.String)
    cells = cells.rename(names).with_columns(anatom_site_general=region)
    stem = pl.col("image").str.replace(r"(?i)\.(png|jpe?g)$", "")
    return _with_columns(cells.with_columns(image=stem))


_READERS: dict[str, Callable[[Path, Path], pl.DataFrame]] = {
    "isic2018": _isic2018, "isic2019": _isic2019, "isic2020": _isic2020, "pad-ufes-20": _pad,
}  # fmt: skip


def _table_path(source: Path, known: PublicSet) -> Path:
    if not source.is_dir():
        raise DataError(f"{source}: no such folder; point to {known.title} as published, unpacked")
    found = [path for pattern in known.tables for path in sorted(source.rglob(pattern))]
    if not found:
        raise DataError(f"{source}: no {' or '.join(known.tables)}; point to {known.title} as published, unpacked")
    return found[-1]


def _read(path: Path, needed: Sequence[str]) -> pl.DataFrame:
    cells = read_cells(path)
    if missing := [name for name in needed if name not in cells.columns]:
        raise DataError(f"{path}: no column {', '.join(missing)}; restore the file as published")
    if len(empty := cells.filter(pl.col(needed[0]).is_null())):
        raise DataError(f"{path}: column {needed[0]}: {len(empty):,} cells empty; restore the file as published")
    return cells.with_columns(pl.col(pl.String).str.strip_chars())


def _one_hot(path: Path, cells: pl.DataFrame, classes: Sequence[str]) -> pl.DataFrame:
    """The class of each row, from columns of which exactly one is 1."""
    marks = cells.select(pl.col(*classes).cast(pl.Float64, strict=False))
    fine = marks.select(
        pl.all_horizontal(pl.all().is_in([0.0, 1.0]).fill_null(False)) & (pl.sum_horizontal(pl.all()) == 1)
    ).to_series()
    if len(wrong := cells.filter(~fine)):
        raise DataError(
            f"{path}: columns {', '.join(classes)}: not exactly one 1 among zeros for {some(wrong['image'])}; restore"
        )
    named = [pl.when(pl.col(name) == 1).then(pl.lit(name)) for name in classes]
    return cells.select("image", diagnosis=marks.select(pl.coalesce(named)).to_series())


def _join(cells: pl.DataFrame, known: pl.DataFrame, path: Path) -> pl.DataFrame:
    if len(twice := known["image"].filter(known["image"].is_duplicated()).unique()):
        raise DataError(f"{path}: column image: more than one row for {some(twice)}; restore the file")
    if len(lost := cells.join(known, on="image", how="anti")["image"]):
        raise DataError(f"{path}: no row for {some(lost)}; restore the file, it belongs to the same release")
    return cells.join(known, on="image", how="left", maintain_order="left")


def _with_columns(cells: pl.DataFrame) -> pl.DataFrame:
    absent = [pl.lit(None, pl.String).alias(name) for name in (*_COLUMNS, "lesion_id") if name not in cells.columns]
    isic_id = pl.col("image").str.strip_suffix(_DOWNSAMPLED)
    return cells.with_columns(*absent, isic_id=isic_id, stem=pl.col("image"))


def some(ids: pl.Series) -> str:
    """'3 lesions (ISIC_1, ISIC_2, ...)': the count and the first five."""
    shown = ", ".join(ids.head(_SHOWN).to_list()) + (", ..." if len(ids) > _SHOWN else "")
    return f"{len(ids):,} lesion{'s' * (len(ids) != 1)} ({shown})"
