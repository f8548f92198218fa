"""From a synthetic lesion's hidden traits to the columns that the body scanner would have measured.

The formulas are those found in SLICE-3D: C = hypot(A, B), H = atan2(B, A) in degrees,
deltaX = X - Xext, area_perim_ratio = perimeter^2 / area, norm_border a linear function of
area_perim_ratio and symm_2axis, norm_color about 3 color_std_mean, deltaLBnorm falling with Lext.
The distributions follow the real ones, except that small lesions are a little larger
(median 4.6 mm instead of 3.3) so that there is something to see at 64 pixels.

The crop is drawn from these very columns (`drawing`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from lesionflow.data import schema
from lesionflow.data.cohort import SIGNATURE_VARIANCE, Cohort, Floats, Ints

INSTITUTIONS = (
    ("Memorial Sloan Kettering Cancer Center", "CC-BY"),
    ("Department of Dermatology, Hospital Clínic de Barcelona", "CC-BY-NC"),
    ("University Hospital of Basel", "CC-BY-NC"),
    ("Frazer Institute, The University of Queensland, Dermatology Research Centre", "CC-BY"),
    ("ACEMID MIA", "CC-0"),
    ("ViDIR Group, Department of Dermatology, Medical University of Vienna", "CC-BY-NC"),
    (
        "Department of Dermatology, University of Athens, Andreas Syggros Hospital of Skin and Venereal Diseases, "
        "Alexander Stratigos, Konstantinos Liopyris",
        "CC-BY",
    ),
)
"""Names and licences; synthetic rows carry them only so that code meets realistic values."""

# Site -> (location, simple location, share, centre of x, y, z in mm, spread of each).
_PLACES: dict[str, tuple[tuple[str, str, float, tuple[int, int, int], tuple[int, int, int]], ...]] = {
    "anterior torso": (
        ("Torso Front Top Half", "Torso Front", 0.75, (0, 1330, -30), (105, 110, 75)),
        ("Torso Front Bottom Half", "Torso Front", 0.25, (0, 1010, -30), (105, 80, 75)),
    ),
    "head/neck": (("Head & Neck", "Head & Neck", 1.0, (0, 1580, -36), (57, 90, 79)),),
    "lower extremity": (
        ("Left Leg - Lower", "Left Leg", 0.28, (-170, 280, 65), (100, 110, 55)),
        ("Right Leg - Lower", "Right Leg", 0.27, (170, 280, 65), (100, 110, 55)),
        ("Left Leg - Upper", "Left Leg", 0.22, (-160, 620, 65), (100, 100, 55)),
        ("Right Leg - Upper", "Right Leg", 0.21, (160, 620, 65), (100, 100, 55)),
        ("Left Leg", "Left Leg", 0.01, (-165, 450, 65), (110, 180, 55)),
        ("Right Leg", "Right Leg", 0.01, (165, 450, 65), (110, 180, 55)),
    ),
    "posterior torso": (
        ("Torso Back Top Third", "Torso Back", 0.58, (0, 1390, 124), (105, 90, 60)),
        ("Torso Back Middle Third", "Torso Back", 0.36, (0, 1140, 124), (100, 80, 60)),
        ("Torso Back Bottom Third", "Torso Back", 0.06, (0, 960, 124), (90, 60, 60)),
    ),
    "upper extremity": (
        ("Left Arm - Upper", "Left Arm", 0.33, (-260, 1330, 55), (120, 90, 60)),
        ("Right Arm - Upper", "Right Arm", 0.33, (260, 1330, 55), (120, 90, 60)),
        ("Left Arm - Lower", "Left Arm", 0.17, (-400, 1120, 55), (120, 110, 60)),
        ("Right Arm - Lower", "Right Arm", 0.15, (400, 1120, 55), (120, 110, 60)),
        ("Left Arm", "Left Arm", 0.01, (-300, 1250, 55), (150, 150, 60)),
        ("Right Arm", "Right Arm", 0.01, (300, 1250, 55), (150, 150, 60)),
    ),
}
_MELANOMA = "Malignant::Malignant melanocytic proliferations (Melanoma)"
_ADNEXAL = "Malignant::Malignant adnexal epithelial proliferations - Follicular::Basal cell carcinoma"
_EPIDERMAL = "Malignant::Malignant epidermal proliferations"
_DIAGNOSES = (
    (f"{_ADNEXAL}::Basal cell carcinoma, Nodular", 0.27),
    (f"{_ADNEXAL}::Basal cell carcinoma, Superficial", 0.12),
    (_ADNEXAL, 0.05),
    (f"{_EPIDERMAL}::Squamous cell carcinoma in situ", 0.13),
    (f"{_EPIDERMAL}::Squamous cell carcinoma, Invasive", 0.05),
    (f"{_MELANOMA}::Melanoma in situ", 0.13),
    (f"{_MELANOMA}::Melanoma in situ::Melanoma in situ, Lentigo maligna type", 0.07),
    (f"{_MELANOMA}::Melanoma Invasive::Melanoma Invasive, Superficial spreading", 0.13),
    (f"{_MELANOMA}::Melanoma, NOS", 0.05),
)
_NEVUS = "Benign::Benign melanocytic proliferations::Nevus"


def measure(cohort: Cohort, rows: NDArray[np.int64], rng: np.random.Generator) -> dict[str, Floats]:
    """The numeric columns of some lesions, float64 [rows] each, by column name."""
    patient = cohort.patient[rows]
    white = cohort.white_tile[patient]
    skin, noise = cohort.skin[patient], rng.standard_normal((len(rows), 12))
    # A trait of unit variance; the cap keeps one lesion in ten thousand from swallowing its crop.
    size, darkness, color, border = np.clip(cohort.look[rows] / np.sqrt(1 + SIGNATURE_VARIANCE), -3.2, 3.2).T

    l_ext = np.where(white, 61.0, 48.0) + np.where(white, 8.0, 10.0) * (0.85 * skin[:, 0] + 0.5 * noise[:, 0])
    l_ext = np.clip(l_ext, 30, 80)
    a_ext = np.clip(np.where(white, 16.4, 14.8) + 2.9 * skin[:, 1] + 2.0 * noise[:, 1], 6, 32)
    b_ext = np.clip(np.where(white, 25.3, 27.5) + 3.2 * skin[:, 2] + 2.6 * noise[:, 2], 13, 42)
    delta_l = -np.minimum(4.0 + 5.0 * np.exp(0.5 * darkness), 0.8 * l_ext)
    delta_a, delta_b = 4.8 + 2.0 * noise[:, 3], 1.5 + 2.0 * noise[:, 4]
    a, b, lightness = a_ext + delta_a, b_ext + delta_b, l_ext + delta_l

    diameter = 2.8 + 1.8 * np.exp(0.7 * size)
    eccentricity = np.clip(0.97 - 0.21 * np.exp(0.62 * noise[:, 5]), 0.17, 0.968)
    major = diameter / 0.977
    flat = np.sqrt(1 - eccentricity**2)
    area = np.pi / 4 * major**2 * flat / 1.046
    norm_border = np.minimum(3.0 * np.exp(0.48 * border), 10)
    ratio = ellipse_ratio(eccentricity) * (1 + 0.05 * norm_border**1.65)
    color_std = 0.93 * np.exp(0.6 * color)
    delta_lb = np.hypot(delta_l, delta_b) + 0.14 * np.abs(noise[:, 6])
    place = _centres(cohort, rows)
    return {
        "clin_size_long_diam_mm": np.round(diameter, 2),
        "tbp_lv_A": a,
        "tbp_lv_Aext": a_ext,
        "tbp_lv_B": b,
        "tbp_lv_Bext": b_ext,
        "tbp_lv_C": np.hypot(a, b),
        "tbp_lv_Cext": np.hypot(a_ext, b_ext),
        "tbp_lv_H": np.degrees(np.arctan2(b, a)),
        "tbp_lv_Hext": np.degrees(np.arctan2(b_ext, a_ext)),
        "tbp_lv_L": lightness,
        "tbp_lv_Lext": l_ext,
        "tbp_lv_areaMM2": area,
        "tbp_lv_area_perim_ratio": ratio,
        "tbp_lv_color_std_mean": color_std,
        "tbp_lv_deltaA": delta_a,
        "tbp_lv_deltaB": delta_b,
        "tbp_lv_deltaL": delta_l,
        "tbp_lv_deltaLB": delta_lb,
        "tbp_lv_deltaLBnorm": 12.5 * delta_lb * l_ext**-0.7,
        "tbp_lv_eccentricity": eccentricity,
        "tbp_lv_minorAxisMM": major * flat,
        "tbp_lv_nevi_confidence": 50 * (1 + np.tanh(0.5 * (-1.9 - 4.5 * cohort.nevus[rows]))),
        "tbp_lv_norm_border": norm_border,
        "tbp_lv_norm_color": np.minimum(2.95 * color_std, 10),
        "tbp_lv_perimeterMM": np.sqrt(ratio * area),
        "tbp_lv_radial_color_std_max": 0.95 * color_std * np.exp(0.2 * noise[:, 7]),
        "tbp_lv_stdL": 0.4 + 0.12 * np.abs(delta_l) + 0.8 * color_std,
        "tbp_lv_stdLExt": np.clip(2.15 * np.exp(0.25 * noise[:, 8]), 1, 6),
        "tbp_lv_symm_2axis": np.clip((norm_border + 2.146 - 0.172 * ratio) / 7.527, 0.05, 0.85),
        "tbp_lv_symm_2axis_angle": 5.0 * rng.integers(0, 36, len(rows)),
        "tbp_lv_x": place[:, 0] + place[:, 3] * noise[:, 9],
        "tbp_lv_y": place[:, 1] + place[:, 4] * noise[:, 10],
        "tbp_lv_z": place[:, 2] + place[:, 5] * noise[:, 11],
        # Known only at training time, and telling: a model that is fed it gives itself away.
        "tbp_lv_dnn_lesion_confidence": 100 * rng.random(len(rows)) ** np.where(cohort.target[rows] == 1, 0.2, 0.02),
    }


def ellipse_ratio(eccentricity: Floats) -> Floats:
    """Perimeter^2 / area of an ellipse (Ramanujan's second approximation); 4 pi for a circle."""
    long = 1 / np.sqrt(1 - eccentricity**2)
    h = 3 * ((long - 1) / (long + 1)) ** 2
    half_perimeter = np.pi * (long + 1) / 2 * (1 + h / (10 + np.sqrt(4 - h)))
    return np.asarray(4 * half_perimeter**2 / (np.pi * long))


def table(
    cohort: Cohort, rows: NDArray[np.int64], numbers: dict[str, Floats], rng: np.random.Generator
) -> pl.DataFrame:
    """The competition's columns of some lesions, in the order of train-metadata.csv."""
    patient, target = cohort.patient[rows], cohort.target[rows]
    place = _places(cohort, rows)
    blank_site = cohort.site_blank[rows]
    names, licences = zip(*INSTITUTIONS, strict=True)
    diagnosis = [*(d for d, _ in _DIAGNOSES), _NEVUS, "Benign"]
    shares = np.array([share for _, share in _DIAGNOSES])
    kind = rng.choice(len(shares), len(rows), p=shares / shares.sum())
    # Some benign lesions were biopsied too, and a few of those were described.
    biopsied = (rng.random(len(rows)) < 0.05) | (target == 1)
    described = biopsied & (rng.random(len(rows)) < 0.1)
    kind = np.where(target == 1, kind, np.where(described, len(shares), len(shares) + 1))
    invasive = np.array(["Melanoma Invasive" in d for d in diagnosis])[kind]
    thickness = np.round(0.2 + rng.gamma(1.0, 0.4, len(rows)), 1)
    mitoses = rng.choice(["<1/mm^2", "0/mm^2", "3/mm^2", ">4/mm^2"], len(rows), p=[0.43, 0.41, 0.08, 0.08])
    text: dict[str, Any] = {
        "isic_id": [f"ISIC_{n:07d}" for n in cohort.number[rows]],
        "target": target,
        "patient_id": [f"IP_{n:07d}" for n in cohort.patient_number[patient]],
        "age_approx": _blank(cohort.age[patient], cohort.age_blank[patient]),
        "sex": _blank(_pick(schema.SEXES, cohort.male[patient].astype(int)), cohort.sex_blank[patient]),
        "anatom_site_general": _blank(_pick(schema.SITES, cohort.site[rows]), blank_site),
        "image_type": ["TBP tile: close-up"] * len(rows),
        "tbp_tile_type": _pick(schema.TILE_TYPES, cohort.white_tile[patient].astype(int)),
        "tbp_lv_location": _pick([*_LOCATIONS, "Unknown"], np.where(blank_site, len(_LOCATIONS), place)),
        "tbp_lv_location_simple": _pick([*_SIMPLE, "Unknown"], np.where(blank_site, len(_SIMPLE), place)),
        "attribution": _pick(names, cohort.institution[patient]),
        "copyright_license": _pick(licences, cohort.institution[patient]),
        "lesion_id": _blank([f"IL_{n:07d}" for n in cohort.number[rows]], ~biopsied),
        "iddx_full": _pick(diagnosis, kind),
        "mel_mitotic_index": _blank(mitoses.tolist(), ~invasive),
        "mel_thick_mm": _blank(thickness, ~invasive),
    }
    for level in range(5):
        parts = [(d.split("::") + [None] * 5)[level] for d in diagnosis]
        text[f"iddx_{level + 1}"] = _pick(parts, kind)
    rounded = {name: pl.Series(values).round_sig_figs(8) for name, values in numbers.items()}
    # Explicit types: a chunk whose cells are all blank is written like any other.
    kinds = {c.name: pl.Float64 if c.kind == "number" else pl.String for c in schema.COLUMNS} | {"target": pl.Int8}
    columns: dict[str, Any] = {**text, **rounded}
    return pl.DataFrame({name: pl.Series(name, columns[name], dtype=kinds[name]) for name in schema.TRAIN_COLUMNS})


_ALL_PLACES = [place for site in schema.SITES for place in _PLACES[site]]
_LOCATIONS, _SIMPLE = [p[0] for p in _ALL_PLACES], [p[1] for p in _ALL_PLACES]


def _places(cohort: Cohort, rows: NDArray[np.int64]) -> Ints:
    """Index into all places, from the lesion's number so that columns drawn elsewhere agree."""
    spot = (cohort.number[rows] * 0.6180339887498949) % 1.0
    place = np.zeros(len(rows), np.int64)
    first = 0
    for index, site in enumerate(schema.SITES):
        ends = np.cumsum([p[2] for p in _PLACES[site]])
        chosen = np.minimum(np.searchsorted(ends, spot), len(ends) - 1) + first
        place = np.where(cohort.site[rows] == index, chosen, place)
        first += len(ends)
    return place


def _centres(cohort: Cohort, rows: NDArray[np.int64]) -> Floats:
    boxes = np.array([(*p[3], *p[4]) for p in _ALL_PLACES], np.float64)
    return np.asarray(boxes[_places(cohort, rows)])


def _pick(values: Sequence[str | None], index: Ints) -> list[str | None]:
    return [values[i] for i in index]


def _blank(values: Sequence[object] | Floats, blank: NDArray[np.bool_]) -> list[object]:
    return [None if hide else value for value, hide in zip(values, blank, strict=True)]
