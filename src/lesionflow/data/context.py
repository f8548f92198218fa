"""How a lesion compares with the same patient's other lesions, and with those on the same body site.

Rows are grouped once, sorted by patient and isic_id, and every statistic is a reduction over such a segment
alone: a patient's numbers don't depend, to the last bit, on who else is in the table, on the order of its rows
or on the number of threads.

| lesions | difference, rank, ratio | z, robust z |
|---|---|---|
| 1 | NaN | NaN |
| 2 | defined | NaN: one other lesion has no spread |
| 3 or more | defined | defined |

Only lesions with a value count. All equal: difference 0, z 0, rank 0.5. Where more than half are equal the MAD is 0:
the robust z is then 0 for those and NaN for the others.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import polars as pl
from numpy.typing import NDArray

from lesionflow.data.derived import Feature, Floats, Values, ratio

Ints = NDArray[np.int64]
MAD_TO_SD = 1.482602218505602
"""1 / Phi^-1(3/4): the MAD of a normal distribution times this is its standard deviation."""

_BASES: dict[str, tuple[str, bool]] = {
    # feature: unit, whether a share of the patient's largest makes sense
    "clin_size_long_diam_mm": ("mm", True),
    "tbp_lv_areaMM2": ("mm2", True),
    "tbp_lv_minorAxisMM": ("mm", False),
    "tbp_lv_L": ("CIELAB L*", False),
    "tbp_lv_A": ("CIELAB a*", False),
    "tbp_lv_B": ("CIELAB b*", False),
    "tbp_lv_H": ("degrees", False),
    "tbp_lv_deltaL": ("CIELAB L*", False),
    "tbp_lv_deltaA": ("CIELAB a*", False),
    "tbp_lv_deltaLBnorm": ("CIELAB", True),
    "tbp_lv_stdL": ("CIELAB L*", True),
    "tbp_lv_color_std_mean": ("CIELAB", True),
    "tbp_lv_radial_color_std_max": ("CIELAB", False),
    "tbp_lv_norm_border": ("0-10", True),
    "tbp_lv_norm_color": ("0-10", True),
    "tbp_lv_symm_2axis": ("1", True),
    "tbp_lv_eccentricity": ("1", False),
    "tbp_lv_nevi_confidence": ("%", False),
    "contrast_Lab": ("CIELAB", True),
    "circularity": ("1", False),
}
BASES = tuple(_BASES)
_SCOPES = {"patient": "the patient's", "site": "the patient's lesions on the same body site:"}
