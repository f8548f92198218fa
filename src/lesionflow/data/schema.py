"""The competition's columns, stated once: type, range, and what a model may see.

`train-metadata.csv` has 55 columns, `test-metadata.csv` 44. The eleven others are the label
itself or were only known after the biopsy; used as inputs they would leak it, so they may
serve as auxiliary *targets* only (`require_inputs` refuses them by name).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from lesionflow.errors import DataError

Kind = Literal["id", "label", "number", "category", "text"]


@dataclass(frozen=True)
class Column:
    """One column of the competition's metadata."""

    name: str
    kind: Kind
    """How its cells are read; numbers are float64, everything else is text."""
    low: float | None = None
    """Smallest value that can be true (inclusive); None where there is no bound."""
    high: float | None = None
    """Largest value that can be true (inclusive)."""
    values: tuple[str, ...] = ()
    """Every category the competition uses; empty where the set is open."""
    train_only: bool = False
    """Absent from the test file: a target at most, never an input."""


SITES = ("anterior torso", "head/neck", "lower extremity", "posterior torso", "upper extremity")
SEXES = ("female", "male")
TILE_TYPES = ("3D: XP", "3D: white")
LOCATIONS_SIMPLE = (
    "Head & Neck", "Left Arm", "Left Leg", "Right Arm", "Right Leg", "Torso Back", "Torso Front", "Unknown",
)  # fmt: skip
LOCATIONS = (
    "Head & Neck",
    "Left Arm", "Left Arm - Lower", "Left Arm - Upper",
    "Left Leg", "Left Leg - Lower", "Left Leg - Upper",
    "Right Arm", "Right Arm - Lower", "Right Arm - Upper",
    "Right Leg", "Right Leg - Lower", "Right Leg - Upper",
    "Torso Back", "Torso Back Bottom Third", "Torso Back Middle Third", "Torso Back Top Third",
    "Torso Front", "Torso Front Bottom Half", "Torso Front Top Half",
    "Unknown",
)  # fmt: skip
LICENSES = ("CC-0", "CC-BY", "CC-BY-NC")


def _number(name: str, low: float | None = None, high: float | None = None, *, train_only: bool = False) -> Column:
    return Column(name, "number", low, high, train_only=train_only)


# In the order of train-metadata.csv. CIELAB: L in 0..100, a and b in -128..127, chroma from 0, hue in degrees.
COLUMNS: tuple[Column, ...] = (
    Column("isic_id", "id"),
    Column("target", "label", 0, 1, train_only=True),
    Column("patient_id", "id"),
    _number("age_approx", 0, 120),
    Column("sex", "category", values=SEXES),
    Column("anatom_site_general", "category", values=SITES),
    _number("clin_size_long_diam_mm", 0, 300),
    Column("image_type", "category", values=("TBP tile: close-up",)),
    Column("tbp_tile_type", "category", values=TILE_TYPES),
    _number("tbp_lv_A", -128, 127),
    _number("tbp_lv_Aext", -128, 127),
    _number("tbp_lv_B", -128, 127),
    _number("tbp_lv_Bext", -128, 127),
    _number("tbp_lv_C", 0, 182),
    _number("tbp_lv_Cext", 0, 182),
    _number("tbp_lv_H", -180, 360),
    _number("tbp_lv_Hext", -180, 360),
    _number("tbp_lv_L", 0, 100),
    _number("tbp_lv_Lext", 0, 100),
    _number("tbp_lv_areaMM2", 0),
    _number("tbp_lv_area_perim_ratio", 0),
    _number("tbp_lv_color_std_mean", 0),
    _number("tbp_lv_deltaA"),
    _number("tbp_lv_deltaB"),
    _number("tbp_lv_deltaL"),
    _number("tbp_lv_deltaLB"),
    _number("tbp_lv_deltaLBnorm"),
    _number("tbp_lv_eccentricity", 0, 1),
    Column("tbp_lv_location", "category", values=LOCATIONS),
    Column("tbp_lv_location_simple", "category", values=LOCATIONS_SIMPLE),
    _number("tbp_lv_minorAxisMM", 0),
    _number("tbp_lv_nevi_confidence", 0, 100),
    _number("tbp_lv_norm_border", 0, 10),
    _number("tbp_lv_norm_color", 0, 10),
    _number("tbp_lv_perimeterMM", 0),
    _number("tbp_lv_radial_color_std_max", 0),
    _number("tbp_lv_stdL", 0),
    _number("tbp_lv_stdLExt", 0),
    _number("tbp_lv_symm_2axis", 0, 1),
    _number("tbp_lv_symm_2axis_angle", 0, 180),
    _number("tbp_lv_x"),
    _number("tbp_lv_y"),
    _number("tbp_lv_z"),
    Column("attribution", "text"),
    Column("copyright_license", "category", values=LICENSES),
    Column("lesion_id", "id", train_only=True),
    Column("iddx_full", "text", train_only=True),
    Column("iddx_1", "category", values=("Benign", "Indeterminate", "Malignant"), train_only=True),
    Column("iddx_2", "text", train_only=True),
    Column("iddx_3", "text", train_only=True),
    Column("iddx_4", "text", train_only=True),
    Column("iddx_5", "text", train_only=True),
    Column("mel_mitotic_index", "text", train_only=True),
    _number("mel_thick_mm", 0, train_only=True),
    _number("tbp_lv_dnn_lesion_confidence", 0, 100, train_only=True),
)

BY_NAME = {c.name: c for c in COLUMNS}
TRAIN_COLUMNS = tuple(c.name for c in COLUMNS)
TEST_COLUMNS = tuple(c.name for c in COLUMNS if not c.train_only)
TRAIN_ONLY = tuple(c.name for c in COLUMNS if c.train_only)


def require_inputs(columns: Iterable[str]) -> None:
    """Raise `DataError` if any of `columns` is known only at training time."""
    if leaks := [name for name in columns if name in TRAIN_ONLY]:
        raise DataError(
            f"column {', '.join(leaks)}: known only at training time, so as an input it leaks the label; "
            "drop it, or use it as an auxiliary target"
        )
