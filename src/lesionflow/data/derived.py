"""A lesion's own features: its cleaned columns, and what is published to be worth making of them.

Every feature is a formula of one row; nothing is learned from data. The derived ones are those that
public solutions of the ISIC 2024 challenge shared, and the geometry and colour differences of CIELAB
behind them; each states its formula.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from lesionflow.data.schema import BY_NAME, COLUMNS, SITES

Floats = NDArray[np.float64]
Values = Mapping[str, Floats]
"""Feature or column -> float64 [N], NaN where unknown."""


@dataclass(frozen=True)
class Feature:
    """One column of the feature matrix."""

    name: str
    block: str
    """`plain`, `derived`, `context` or `neighbours`."""
    formula: str
    unit: str
    why: str
    concept: str
    """What it is about: size, darkness, colour, border, shape, naevus, skin, place, age, sex, tile, count."""
    against: str = ""
    """What the lesion is compared with: nothing, the `patient`'s other lesions, those of its `site`, `neighbours`."""
    higher: str = ""
    """What a lesion with a higher value is, in one clinical adjective; empty where no word fits."""
    lower: str = ""


_NUMBERS: dict[str, tuple[str, str, str, str, str]] = {
    # column: unit, concept, higher, lower, what it is
    "age_approx": ("years", "age", "older", "younger", "risk rises with age"),
    "clin_size_long_diam_mm": ("mm", "size", "larger", "smaller", "longest diameter"),
    "tbp_lv_A": ("CIELAB a*", "colour", "redder", "less red", "red against green inside the lesion"),
    "tbp_lv_Aext": ("CIELAB a*", "skin", "", "", "red against green of the skin around"),
    "tbp_lv_B": ("CIELAB b*", "colour", "yellower", "less yellow", "yellow against blue inside; blue is deep pigment"),
    "tbp_lv_Bext": ("CIELAB b*", "skin", "", "", "yellow against blue of the skin around"),
    "tbp_lv_C": ("CIELAB", "colour", "more colourful", "greyer", "chroma inside"),
    "tbp_lv_Cext": ("CIELAB", "skin", "", "", "chroma of the skin around"),
    "tbp_lv_H": ("degrees", "colour", "yellower", "redder", "hue inside"),
    "tbp_lv_Hext": ("degrees", "skin", "", "", "hue of the skin around"),
    "tbp_lv_L": ("CIELAB L*", "darkness", "lighter", "darker", "lightness inside"),
    "tbp_lv_Lext": ("CIELAB L*", "skin", "", "", "lightness of the skin around"),
    "tbp_lv_areaMM2": ("mm2", "size", "larger", "smaller", "area"),
    "tbp_lv_area_perim_ratio": ("1", "border", "more jagged", "smoother", "perimeter squared over area"),
    "tbp_lv_color_std_mean": ("CIELAB", "colour", "more varied in colour", "more even in colour", "irregularity"),
    "tbp_lv_deltaA": ("CIELAB a*", "colour", "redder against its skin", "less red against its skin",
                      "redness against the skin around"),
    "tbp_lv_deltaB": ("CIELAB b*", "colour", "yellower against its skin", "less yellow against its skin",
                      "yellowness against the skin around"),
    "tbp_lv_deltaL": ("CIELAB L*", "darkness", "lighter against its skin", "darker against its skin",
                      "lightness against the skin around"),
    "tbp_lv_deltaLB": ("CIELAB", "darkness", "more contrasted", "fainter", "contrast in L and b"),
    "tbp_lv_deltaLBnorm": ("CIELAB", "darkness", "more contrasted", "fainter", "contrast in L and b, normalised"),
    "tbp_lv_eccentricity": ("1", "shape", "more elongated", "rounder", "of the fitted ellipse"),
    "tbp_lv_minorAxisMM": ("mm", "size", "wider", "narrower", "smallest diameter"),
    "tbp_lv_nevi_confidence": ("%", "naevus", "more naevus-like", "less naevus-like", "the scanner's classifier"),
    "tbp_lv_norm_border": ("0-10", "border", "more irregular in its border", "more regular in its border",
                           "border irregularity and asymmetry"),
    "tbp_lv_norm_color": ("0-10", "colour", "more varied in colour", "more even in colour", "colour variation"),
    "tbp_lv_perimeterMM": ("mm", "size", "larger", "smaller", "perimeter"),
    "tbp_lv_radial_color_std_max": ("CIELAB", "colour", "more asymmetric in colour", "more symmetric in colour",
                                    "colour asymmetry"),
    "tbp_lv_stdL": ("CIELAB L*", "colour", "more uneven in lightness", "more even in lightness",
                    "spread of lightness inside"),
    "tbp_lv_stdLExt": ("CIELAB L*", "skin", "", "", "spread of lightness around: hair, sun damage"),
    "tbp_lv_symm_2axis": ("1", "shape", "more asymmetric", "more symmetric", "asymmetry of the border about two axes"),
    "tbp_lv_symm_2axis_angle": ("degrees", "shape", "", "", "angle of the axis of asymmetry"),
    "tbp_lv_x": ("mm", "place", "", "", "place on the body model, across"),
    "tbp_lv_y": ("mm", "place", "", "", "place on the body model, upwards"),
    "tbp_lv_z": ("mm", "place", "", "", "place on the body model, in depth"),
}  # fmt: skip
NUMBERS = tuple(_NUMBERS)
"""Every numeric column a model may see."""

_FINE = {
    "back_top": ("Torso Back Top Third",), "back_middle": ("Torso Back Middle Third",),
    "back_bottom": ("Torso Back Bottom Third",), "front_top": ("Torso Front Top Half",),
    "front_bottom": ("Torso Front Bottom Half",), "arm_upper": ("Left Arm - Upper", "Right Arm - Upper"),
    "arm_lower": ("Left Arm - Lower", "Right Arm - Lower"), "leg_upper": ("Left Leg - Upper", "Right Leg - Upper"),
    "leg_lower": ("Left Leg - Lower", "Right Leg - Lower"),
}  # fmt: skip
_FLAGS: dict[str, tuple[str, tuple[str, ...], str, str]] = {
    # feature: column, cells that are 1, concept, why
    **{
        "site_" + s.replace("/", "_").replace(" ", "_"): ("anatom_site_general", (s,), "place", "risk differs by site")
        for s in SITES
    },
    "side_left": ("tbp_lv_location_simple", ("Left Arm", "Left Leg"), "place", "more sun on the driver's side"),
    "side_right": ("tbp_lv_location_simple", ("Right Arm", "Right Leg"), "place", "more sun on the driver's side"),
    **{"part_" + k: ("tbp_lv_location", v, "place", "sun differs within a site") for k, v in _FINE.items()},
}
_BINARY: dict[str, tuple[str, str, str, str, str]] = {
    # feature: column, cell that is 1, cell that is 0, concept, why
    "male": ("sex", "male", "female", "sex", "men have more melanomas of the trunk"),
    "tile_white": (
        "tbp_tile_type",
        "3D: white",
        "3D: XP",
        "tile",
        "white light shows colours otherwise than polarised",
    ),
}
_CATEGORIES = tuple({column: None for column, *_ in (*_BINARY.values(), *_FLAGS.values())})


def plain() -> tuple[Feature, ...]:
    found = [
        Feature(name, "plain", f"`{name}`", unit, why, concept, "", higher, lower)
        for name, (unit, concept, higher, lower, why) in _NUMBERS.items()
    ]
    for name, (column, yes, no, concept, why) in _BINARY.items():
        found.append(Feature(name, "plain", f"`{column}`: 1 for {yes}, 0 for {no}", "0/1", why, concept))
    for name, (column, cells, concept, why) in _FLAGS.items():
        found.append(Feature(name, "plain", f"`{column}` is {' or '.join(cells)}", "0/1", why, concept))
    return tuple(found)


def plain_values(table: pl.DataFrame) -> dict[str, Floats]:
    """The plain features of a typed table, in its row order.

    What isn't finite or lies outside the schema's range is NaN, as is a column that isn't there. Categories are
    compared without regard to case or blanks around; an unseen or empty one is NaN in a feature that has a
    category for 0 as well, else 0 in every flag of its column: none of these places is known to be the lesion's.
    """
    values = {name: _number(table, name) for name in NUMBERS}
    codes = _codes(table)
    for name, (column, yes, no, _, _) in _BINARY.items():
        values[name] = _lookup(codes, column, {yes: 1.0, no: 0.0}, np.nan)
    for name, (column, cells, _, _) in _FLAGS.items():
        values[name] = _lookup(codes, column, dict.fromkeys(cells, 1.0), 0.0)
    return values


def sites(table: pl.DataFrame) -> NDArray[np.int64]:
    """Index of `anatom_site_general` in `schema.SITES`, -1 where it is unknown: int64 [N]."""
    return _codes(table)["anatom_site_general"]


def _number(table: pl.DataFrame, name: str) -> Floats:
    if name not in table.columns:
        return np.full(table.height, np.nan)
    cells = table[name]
    if cells.dtype != pl.Float64:
        cells = cells.cast(pl.Float64, strict=False)
    values = cells.to_numpy().astype(np.float64)  # A copy of our own; nulls become NaN.
    low, high = BY_NAME[name].low, BY_NAME[name].high
    off = ~np.isfinite(values)
    if low is not None:
        off |= values < low
    if high is not None:
        off |= values > high
    values[off] = np.nan
    return values


def _codes(table: pl.DataFrame) -> dict[str, NDArray[np.int64]]:
    """Column -> index of each cell in the schema's values [N], -1 where it is none of them."""
    found = {name: np.full(table.height, -1) for name in _CATEGORIES}
    read = table.select(
        pl.col(name)
        .cast(pl.String)
        .str.strip_chars()
        .str.to_lowercase()
        .cast(pl.Enum([value.lower() for value in BY_NAME[name].values]), strict=False)
        .to_physical()
        .cast(pl.Int64)
        .fill_null(-1)
        for name in _CATEGORIES
        if name in table.columns
    )
    return found | {column.name: column.to_numpy() for column in read}


def _lookup(codes: Mapping[str, NDArray[np.int64]], column: str, meant: Mapping[str, float], other: float) -> Floats:
    # Code -1 takes the last.
    return np.array([*(meant.get(value, other) for value in BY_NAME[column].values), other])[codes[column]]


def ratio(above: Floats, below: Floats) -> Floats:
    """Division by zero is NaN."""
    return np.where(below == 0, np.nan, above / np.where(below == 0, 1.0, below))


def _norm(*parts: Floats) -> Floats:
    total = np.zeros_like(parts[0])
    for part in parts:
        total = total + part * part
    return np.sqrt(total)


def turn(degrees: Floats) -> Floats:
    """An angle's difference, taken the short way round: -180..180."""
    return np.remainder(degrees + 180.0, 360.0) - 180.0


_Row = tuple[str, str, str, str, str, str, str, Callable[[Values], Floats]]
# name, formula, unit, why, concept, higher, lower, function; short names stand for the columns in `SHORT`.
SHORT = {
    "size": "clin_size_long_diam_mm", "age": "age_approx", "L": "tbp_lv_L", "A": "tbp_lv_A", "B": "tbp_lv_B",
    "C": "tbp_lv_C", "H": "tbp_lv_H", "Lext": "tbp_lv_Lext", "Aext": "tbp_lv_Aext", "Bext": "tbp_lv_Bext",
    "Cext": "tbp_lv_Cext", "Hext": "tbp_lv_Hext", "area": "tbp_lv_areaMM2", "perimeter": "tbp_lv_perimeterMM",
    "minor": "tbp_lv_minorAxisMM", "eccentricity": "tbp_lv_eccentricity", "std": "tbp_lv_color_std_mean",
    "radial": "tbp_lv_radial_color_std_max", "stdL": "tbp_lv_stdL", "stdLext": "tbp_lv_stdLExt",
    "border": "tbp_lv_norm_border", "color": "tbp_lv_norm_color", "symm": "tbp_lv_symm_2axis",
    "contrast": "tbp_lv_deltaLBnorm", "nevi": "tbp_lv_nevi_confidence", "x": "tbp_lv_x", "y": "tbp_lv_y",
    "z": "tbp_lv_z", "angle": "tbp_lv_symm_2axis_angle",
}  # fmt: skip
_DERIVED: tuple[_Row, ...] = (
    ("contrast_L", "|L - Lext|", "CIELAB", "how far it stands out in lightness", "darkness", "more contrasted",
     "fainter", lambda v: np.abs(v["L"] - v["Lext"])),
    ("contrast_a", "|A - Aext|", "CIELAB", "how far it stands out in redness", "colour", "more contrasted",
     "fainter", lambda v: np.abs(v["A"] - v["Aext"])),
    ("contrast_b", "|B - Bext|", "CIELAB", "how far it stands out in yellowness", "colour", "more contrasted",
     "fainter", lambda v: np.abs(v["B"] - v["Bext"])),
    ("contrast_Lab", "sqrt((L - Lext)^2 + (A - Aext)^2 + (B - Bext)^2)", "CIELAB", "CIE76 colour difference to skin",
     "darkness", "more contrasted", "fainter",
     lambda v: _norm(v["L"] - v["Lext"], v["A"] - v["Aext"], v["B"] - v["Bext"])),
    ("contrast_chroma", "C - Cext", "CIELAB", "saturation against skin", "colour", "more colourful", "greyer",
     lambda v: v["C"] - v["Cext"]),
    ("contrast_hue", "H - Hext, the short way round", "degrees", "hue against skin", "colour", "yellower", "redder",
     lambda v: turn(v["H"] - v["Hext"])),
    ("contrast_hue_size", "|H - Hext|, the short way round", "degrees", "how far its hue differs from skin", "colour",
     "more contrasted", "fainter", lambda v: np.abs(turn(v["H"] - v["Hext"]))),
    ("contrast_share", "(L - Lext) / Lext", "1", "contrast counts for more on dark skin", "darkness",
     "lighter against its skin", "darker against its skin", lambda v: ratio(v["L"] - v["Lext"], v["Lext"])),
    ("circularity", "4 pi area / perimeter^2", "1", "1 for a disc; jagged borders lower it", "border",
     "rounder in outline", "less round in outline", lambda v: ratio(4 * np.pi * v["area"], v["perimeter"] ** 2)),
    ("border_length_ratio", "perimeter / (2 sqrt(pi area))", "1", "border against a disc's of the same area", "border",
     "less round in outline", "rounder in outline", lambda v: ratio(v["perimeter"], 2 * np.sqrt(np.pi * v["area"]))),
    ("axis_ratio", "minor / size", "1", "minor against major axis", "shape", "rounder", "more elongated",
     lambda v: ratio(v["minor"], v["size"])),
    ("size_to_area", "size / sqrt(area)", "1", "diameter against area: long or ragged lesions", "shape",
     "more elongated", "rounder", lambda v: ratio(v["size"], np.sqrt(v["area"]))),
    ("fill", "area / size^2", "1", "share of its square that it fills", "shape", "rounder", "more elongated",
     lambda v: ratio(v["area"], v["size"] ** 2)),
    ("ellipse_ratio", "sqrt(1 - eccentricity^2)", "1", "axis ratio of the fitted ellipse", "shape", "rounder",
     "more elongated", lambda v: np.sqrt(1 - v["eccentricity"] ** 2)),
    ("log_area", "ln(area)", "ln mm2", "sizes are skewed; products become sums", "size", "larger", "smaller",
     lambda v: np.log(np.where(v["area"] > 0, v["area"], np.nan))),
    ("border_plus_asymmetry", "border + 10 symm", "0-20", "border and asymmetry on one scale", "border",
     "more irregular", "more regular", lambda v: v["border"] + 10 * v["symm"]),
    ("border_by_asymmetry", "border symm", "0-10", "both at once", "border", "more irregular", "more regular",
     lambda v: v["border"] * v["symm"]),
    ("border_by_colour", "border color", "0-100", "B and C of the ABCD rule together", "border", "more irregular",
     "more regular", lambda v: v["border"] * v["color"]),
    ("colour_by_asymmetry", "radial symm", "CIELAB", "colour asymmetry of an asymmetric lesion", "colour",
     "more asymmetric in colour", "more symmetric in colour", lambda v: v["radial"] * v["symm"]),
    ("perimeter_by_asymmetry", "perimeter symm", "mm", "length of irregular border", "border", "more irregular",
     "more regular", lambda v: v["perimeter"] * v["symm"]),
    ("severity", "(border + color + 10 eccentricity) / 3", "0-10", "mean of three irregularities", "border",
     "more irregular", "more regular", lambda v: (v["border"] + v["color"] + 10 * v["eccentricity"]) / 3),
    ("visibility", "contrast + color", "1", "how far it catches the eye", "colour", "more striking", "fainter",
     lambda v: v["contrast"] + v["color"]),
    ("colour_evenness", "std / radial", "1", "irregular everywhere or to one side", "colour", "", "",
     lambda v: ratio(v["std"], v["radial"])),
    ("lightness_spread_to_skin", "stdL / stdLext", "1", "unevenness beyond the skin's own", "colour",
     "more uneven in lightness", "more even in lightness", lambda v: ratio(v["stdL"], v["stdLext"])),
    ("colour_spread_to_skin", "std / stdLext", "1", "colour irregularity beyond the skin's own", "colour",
     "more varied in colour", "more even in colour", lambda v: ratio(v["std"], v["stdLext"])),
    ("lightness_spread_share", "stdL / Lext", "1", "unevenness relative to the skin's lightness", "colour",
     "more uneven in lightness", "more even in lightness", lambda v: ratio(v["stdL"], v["Lext"])),
    ("hue_by_colour_spread", "H std", "degrees", "hue of irregular lesions", "colour", "", "",
     lambda v: v["H"] * v["std"]),
    ("contrast_to_size", "contrast / size", "1/mm", "small but striking", "darkness", "", "",
     lambda v: ratio(v["contrast"], v["size"])),
    ("contrast_by_size", "contrast size", "mm", "large and striking", "darkness", "", "",
     lambda v: v["contrast"] * v["size"]),
    ("size_by_age", "size age", "mm years", "a large lesion late in life", "size", "", "",
     lambda v: v["size"] * v["age"]),
    ("size_to_age", "size / age", "mm/years", "large for the age", "size", "", "",
     lambda v: ratio(v["size"], v["age"])),
    ("asymmetry_by_age", "symm age", "years", "an irregular lesion late in life", "shape", "", "",
     lambda v: v["symm"] * v["age"]),
    ("naevus_to_age", "nevi / age", "%/years", "naevi appear before 40", "naevus", "", "",
     lambda v: ratio(v["nevi"], v["age"])),
    ("not_naevus_by_size", "(100 - nevi) size", "% mm", "large and unlike a naevus", "naevus", "", "",
     lambda v: (100 - v["nevi"]) * v["size"]),
    ("distance_from_axis", "sqrt(x^2 + z^2)", "mm", "trunk or limb", "place", "", "", lambda v: _norm(v["x"], v["z"])),
    ("distance_from_origin", "sqrt(x^2 + y^2 + z^2)", "mm", "place on the body as one number", "place", "", "",
     lambda v: _norm(v["x"], v["y"], v["z"])),
    ("angle_around", "atan2(z, x)", "radians", "front, side or back", "place", "", "",
     lambda v: np.arctan2(v["z"], v["x"])),
    ("asymmetry_angle_cos", "cos(2 angle)", "1", "an axis' angle has no beginning", "shape", "", "",
     lambda v: np.cos(np.radians(2 * v["angle"]))),
)  # fmt: skip


def derived() -> tuple[Feature, ...]:
    return tuple(
        Feature(name, "derived", formula, unit, why, concept, "", higher, lower)
        for name, formula, unit, why, concept, higher, lower, _ in _DERIVED
    )


def derived_values(values: Values) -> dict[str, Floats]:
    """The derived features from the plain ones; NaN where a term is unknown or a divisor is zero."""
    short = {name: values[column] for name, column in SHORT.items()}
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        found = {row[0]: row[7](short) for row in _DERIVED}
    for column in found.values():
        column[~np.isfinite(column)] = np.nan
    return found


def names(features: Iterable[Feature]) -> tuple[str, ...]:
    return tuple(f.name for f in features)


assert set(NUMBERS) == {c.name for c in COLUMNS if c.kind == "number" and not c.train_only}
