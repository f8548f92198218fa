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

from lesionflow.data.derived import Feature, Floats, Values, derived, plain, ratio

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
_SCOPES = {"patient": "the patient's lesions", "site": "the patient's lesions on the same body site"}
_COMPARED = {
    # suffix: formula of {the feature} among {whose lesions}, unit if it isn't the feature's, why
    "diff": ("{0} less the mean of the others of {1}", "", "the ugly duckling: unlike its fellows"),
    "z": ("({0} - mean) / SD (n - 1), over {1}", "SD", "unlike them by their own spread"),
    "robust_z": ("({0} - median) / (1.4826 MAD), over {1}", "SD", "the same where some are odd already"),
    "rank": ("share of the others of {1} that have less {0}, ties half", "0-1", "no scale, no outliers"),
    "share": ("{0} over the largest of {1}", "0-1", "1 for the most conspicuous"),
}


class Patients:
    """Rows grouped by patient, sorted by isic_id within: what every comparison starts from.

    `order` int64 [N] are the table's rows in that canonical order, `code` int64 [N] numbers the patients along it,
    ascending, and `site` int64 [N] is the index into `schema.SITES`, -1 where unknown. A lesion without a patient_id
    is a patient of its own. Without a column isic_id the table's own order stands in for it.
    """

    def __init__(self, table: pl.DataFrame, site: Ints) -> None:
        count = table.height
        if "patient_id" in table.columns:
            patient = table["patient_id"].cast(pl.String).replace("", None)
        else:
            patient = pl.Series("patient_id", [None] * count, pl.String)
        ids = table["isic_id"].cast(pl.String) if "isic_id" in table.columns else pl.Series("isic_id", range(count))
        keys = pl.DataFrame({"patient": patient, "id": ids})
        order = keys.select(pl.arg_sort_by("patient", "id", maintain_order=True)).to_series()
        ordered = patient.gather(order)
        first = (ordered.is_null() | ordered.ne_missing(ordered.shift(1))).to_numpy().copy()
        first[:1] = True
        self.order: Ints = order.to_numpy().astype(np.int64)
        self.code: Ints = np.cumsum(first) - 1
        self.site: Ints = site[self.order]
        self.starts, self.counts = _runs(self.code)

    @property
    def lesions(self) -> Ints:
        """How many lesions each row's patient has, in the table's order: int64 [N]."""
        found = np.empty_like(self.order)
        found[self.order] = self.counts[self.code]
        return found

    def by_patient(self) -> Groups:
        return Groups(np.arange(len(self.code)), self.code)

    def by_site(self) -> Groups:
        """The same lesions by patient and site; those of unknown site are left out."""
        key = self.code * (int(self.site.max(initial=0)) + 1) + self.site
        rows = np.flatnonzero(self.site >= 0)
        rows = rows[np.argsort(key[rows], kind="stable")]
        return Groups(rows, key[rows])


class Groups:
    """Segments of rows that are compared with each other.

    `rows` int64 [M] are canonical rows, each group's together and ascending; `key` int64 [M] is the same within a
    group and ascending over groups.
    """

    def __init__(self, rows: Ints, key: Ints) -> None:
        self.rows = rows
        self.starts, self.sizes = _runs(key)
        self.group: Ints = np.repeat(np.arange(len(self.starts)), self.sizes)

    def counts(self, total: int) -> Floats:
        """Lesions in each row's group, float64 [total]; NaN for rows in none."""
        return self._spread_out(self.sizes[self.group].astype(np.float64), total)

    def compare(self, values: Floats, *, largest: bool) -> list[Floats]:
        """`values` [N] in canonical order -> difference, z, robust z, rank and, if asked for, share of the largest."""
        if not len(self.rows):
            return [np.full(len(values), np.nan) for _ in range(4 + largest)]
        x = values[self.rows]
        ordered = self._ascending(x)
        known = np.add.reduceat((~np.isnan(x)).astype(np.int64), self.starts)
        n = known[self.group]
        with np.errstate(invalid="ignore", divide="ignore"):
            centred = x - self._median(x[ordered], known)[self.group]
            # From the median on, so that equal values have no rounding left between them.
            mean = self._sum(np.nan_to_num(centred)) / known
            rest = centred - mean[self.group]
            spread = np.sqrt(self._sum(np.nan_to_num(rest * rest)) / (known - 1))[self.group]
            apart = np.abs(centred)
            mad = MAD_TO_SD * self._median(apart[self._ascending(apart)], known)[self.group]
            found = [
                np.where(n > 1, rest * (n / (n - 1)), np.nan),
                np.where(n > 2, _over(rest, spread), np.nan),
                np.where(n > 2, _over(centred, mad), np.nan),
                np.where(n > 1, (self._mean_ranks(x, ordered) - 1) / (n - 1), np.nan),
            ]
            if largest:
                last = np.maximum(self.starts + known - 1, self.starts)
                top = x[ordered][last][self.group]
                found.append(np.where((n > 1) & (top > 0), ratio(x, top), np.nan))
        found[3][np.isnan(x)] = np.nan
        return [self._spread_out(column, len(values)) for column in found]

    def _sum(self, values: Floats) -> Floats:
        return np.add.reduceat(values, self.starts)

    def _ascending(self, x: Floats) -> Ints:
        """Positions that sort each group by value, unknown ones last.

        Values become their place in the whole, which with the group makes one integer: those sort fastest.
        """
        bits = max(int(len(x) - 1).bit_length(), 1)
        place = np.argsort(x)
        rank = np.empty_like(place)
        rank[place] = np.arange(len(x))
        key = (self.group << bits) | rank
        key.sort()
        return np.asarray(place[key & ((1 << bits) - 1)])

    def _median(self, ordered: Floats, known: Ints) -> Floats:
        """Of each group, from its values in ascending order with `known` of them filled; NaN for none."""
        low = ordered[self.starts + np.maximum(known - 1, 0) // 2]
        high = ordered[self.starts + np.minimum(known // 2, self.sizes - 1)]
        return np.where(known > 0, low + (high - low) / 2, np.nan)

    def _mean_ranks(self, x: Floats, ordered: Ints) -> Floats:
        """1 for the smallest of each group; equal values share the mean of their ranks."""
        sorted_x = x[ordered]
        new = np.empty(len(x), bool)
        new[0] = True
        new[1:] = sorted_x[1:] != sorted_x[:-1]
        new[self.starts] = True
        first = np.flatnonzero(new)
        length = np.diff(np.append(first, len(x)))
        rank = first + (length - 1) / 2 - self.starts[self.group[first]] + 1
        found = np.empty(len(x))
        found[ordered] = np.repeat(rank, length)
        return found

    def _spread_out(self, column: Floats, total: int) -> Floats:
        found = np.full(total, np.nan)
        found[self.rows] = column
        return found


def features() -> tuple[Feature, ...]:
    """In the order of `context_values`."""
    own = {f.name: f for f in (*plain(), *derived())}
    found = []
    for scope, whose in _SCOPES.items():
        why = "a hundred lesions are read otherwise than three; carries how lesions were sampled"
        found.append(Feature(f"{scope}_lesions", "context", f"number of {whose}", "1", why, "count", scope))
    for scope, whose in _SCOPES.items():
        for name, (unit, largest) in _BASES.items():
            for suffix, (formula, measure, why) in _COMPARED.items():
                if suffix != "share" or (largest and scope == "patient"):
                    f = own[name]
                    found.append(
                        Feature(
                            f"{name}_{scope}_{suffix}", "context", formula.format(f"`{name}`", whose), measure or unit,
                            why, f.concept, scope, f.higher, f.lower,
                        )
                    )  # fmt: skip
    return tuple(found)


def context_values(patients: Patients, values: Values, threads: int = 1) -> list[Floats]:
    """Every context feature of rows in canonical order, in the order of `features`."""
    scopes = {"patient": patients.by_patient(), "site": patients.by_site()}
    total = len(patients.order)
    jobs = [(scope, name) for scope in scopes for name in BASES]

    def compare(job: tuple[str, str]) -> list[Floats]:
        scope, name = job
        return scopes[scope].compare(values[name], largest=scope == "patient" and _BASES[name][1])

    found = [groups.counts(total) for groups in scopes.values()]
    if threads > 1 and total > 20_000:
        with ThreadPoolExecutor(threads) as pool:
            compared = list(pool.map(compare, jobs))
    else:
        compared = [compare(job) for job in jobs]
    return found + [column for columns in compared for column in columns]


def _runs(key: Ints) -> tuple[Ints, Ints]:
    """Where each run of equal keys starts, and its length."""
    if not len(key):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    starts = np.flatnonzero(np.append(True, key[1:] != key[:-1]))
    return starts, np.diff(np.append(starts, len(key)))


def _over(distance: Floats, spread: Floats) -> Floats:
    """In units of the spread; without any, 0 for what is equal and NaN for what isn't."""
    return np.where(spread > 0, distance / np.where(spread > 0, spread, 1.0), np.where(distance == 0, 0.0, np.nan))
