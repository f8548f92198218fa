"""How a lesion compares with the same patient's other lesions, and with those on the same body site.

Rows are grouped once, sorted by patient and isic_id, and every statistic is a reduction over such a segment
alone: a patient's numbers don't depend, to the last bit, on who else is in the table, on the order of its rows
or on the number of threads.

| lesions | difference, rank, ratio | z, robust z |
|---|---|---|
| 1 | NaN | NaN |
| 2 | defined | NaN: one other lesion has no spread |
| 3 or more | defined | defined |

Only lesions with a value count. All equal: difference 0, z 0, rank 0.5. Where more than half are nearly equal the MAD
says nothing of the others, so the robust z takes a tenth of the standard deviation at least.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import numpy as np
import polars as pl
from numpy.typing import NDArray

from lesionflow.data.derived import Feature, Floats, Values, derived, plain, ratio

Ints = NDArray[np.int64]
Placed = tuple[Ints, Ints]
T = TypeVar("T")
R = TypeVar("R")
FEW = 20_000
"""Rows under which threads cost more than they save."""
MAD_TO_SD = 1.482602218505602
"""1 / Phi^-1(3/4): the MAD of a normal distribution times this is its standard deviation."""

LEAST_SPREAD = 0.1
"""Of a robust z, in standard deviations: a MAD near 0 would make scores of millions of what is nearly equal."""

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
    "robust_z": ("({0} - median) / max(1.4826 MAD, SD / 10), over {1}", "SD", "the same where some are odd already"),
    "rank": ("share of the others of {1} that have less {0}, ties half", "0-1", "no scale, no outliers"),
    "share": ("{0} over the largest of {1}", "0-1", "1 for the most conspicuous"),
}


class Patients:
    """Rows grouped by patient, sorted by isic_id within: what every comparison starts from.

    `order` int64 [N] are the table's rows in that canonical order, `code` int64 [N] numbers the patients along it,
    ascending; `starts` and `counts` are where each patient's rows start, and how many there are. A lesion without a
    patient_id is a patient of its own. Without a column isic_id the table's own order stands in for it.
    """

    def __init__(self, table: pl.DataFrame) -> None:
        patient = pl.Series("patient", [None], pl.String).new_from_index(0, table.height)
        if "patient_id" in table.columns:
            patient = table["patient_id"].cast(pl.String).replace("", None)
        ids = table["isic_id"].cast(pl.String) if "isic_id" in table.columns else pl.Series(np.arange(table.height))
        keys = pl.DataFrame({"patient": patient, "id": ids})
        order = keys.select(pl.arg_sort_by("patient", "id", maintain_order=True)).to_series()
        ordered = patient.gather(order)
        first = (ordered.is_null() | ordered.ne_missing(ordered.shift(1))).to_numpy().copy()
        first[:1] = True
        self.order: Ints = order.to_numpy().astype(np.int64)
        self.code: Ints = np.cumsum(first) - 1
        self.starts, self.counts = _runs(self.code)

    @property
    def lesions(self) -> Ints:
        """How many lesions each row's patient has, in the table's order: int64 [N]."""
        found = np.empty_like(self.order)
        found[self.order] = self.counts[self.code]
        return found

    def by_patient(self) -> Groups:
        return Groups(np.arange(len(self.code)), self.code)

    def by_site(self, site: Ints) -> Groups:
        """By patient and `site` [N], a small number in canonical order; below 0 it is unknown, and the row left out."""
        key = self.code * (int(site.max(initial=0)) + 1) + site
        rows = np.flatnonzero(site >= 0)
        rows = rows[np.argsort(key[rows], kind="stable")]
        return Groups(rows, key[rows], len(key))


def places(x: Floats) -> Placed:
    """Rows in ascending order of value, NaN last, and each row's place therein."""
    place = np.argsort(x)
    rank = np.empty_like(place)
    rank[place] = np.arange(len(x))
    return place, rank


class Groups:
    """Segments of rows that are compared with each other.

    `rows` int64 [M] are canonical rows, each group's together and ascending; `key` int64 [M] is the same within a
    group and ascending over groups.
    """

    def __init__(self, rows: Ints, key: Ints, total: int | None = None) -> None:
        self.rows = rows
        self.starts, self.sizes = _runs(key)
        self.group: Ints = np.repeat(np.arange(len(self.starts)), self.sizes)
        self.position: Ints | None = None
        """[N] where each row stands in `rows`; None where they are all rows as they are."""
        if total is not None:
            self.position = np.zeros(total, np.int64)
            self.position[rows] = np.arange(len(rows))

    def counts(self, total: int) -> Floats:
        """Lesions in each row's group, float64 [total]; NaN for rows in none."""
        return self._spread_out(self.sizes[self.group].astype(np.float64), total)

    def compare(self, values: Floats, placed: Placed, *, largest: bool) -> list[Floats]:
        """`values` [N] in canonical order -> difference, z, robust z, rank and, if asked for, share of the largest."""
        if not len(self.rows):
            return [np.full(len(values), np.nan) for _ in range(4 + largest)]
        x = values if self.position is None else values[self.rows]
        ordered = self._ascending(placed)
        unknown = np.isnan(x)
        known = np.add.reduceat((~unknown).astype(np.int64), self.starts)
        n = known[self.group]
        with np.errstate(invalid="ignore", divide="ignore"):
            ascending = x[ordered]
            median, mad = self._medians(ascending, known)
            centred = x - median[self.group]
            # From the median on, so that equal values have no rounding left between them.
            mean = self._sum(np.where(unknown, 0.0, centred)) / known
            rest = centred - mean[self.group]
            spread = np.sqrt(self._sum(np.where(unknown, 0.0, rest * rest)) / (known - 1))[self.group]
            found = [
                np.where(n > 1, rest * (n / (n - 1)), np.nan),
                np.where(n > 2, _over(rest, spread), np.nan),
                np.where(n > 2, _over(centred, np.maximum(MAD_TO_SD * mad[self.group], LEAST_SPREAD * spread)), np.nan),
                np.where(n > 1, (self._mean_ranks(ascending, ordered) - 1) / (n - 1), np.nan),
            ]
            if largest:
                top = ascending[self.starts + np.maximum(known - 1, 0)][self.group]
                found.append(np.where((n > 1) & (top > 0), ratio(x, top), np.nan))
        found[3][unknown] = np.nan
        return [self._spread_out(column, len(values)) for column in found]

    def _sum(self, values: Floats) -> Floats:
        return np.add.reduceat(values, self.starts)

    def _ascending(self, placed: Placed) -> Ints:
        """Positions that sort each group by value, unknown ones last.

        A value's place in the whole makes one integer with its group, and those sort fastest.
        """
        place, rank = placed
        bits = max((len(place) - 1).bit_length(), 1)
        key = (self.group << bits) | (rank if self.position is None else rank[self.rows])
        key.sort()
        found: Ints = place[key & ((1 << bits) - 1)]
        return found if self.position is None else self.position[found]

    def _medians(self, ordered: Floats, known: Ints) -> tuple[Floats, Floats]:
        """Median and median absolute deviation of each group, from its values in ascending order.

        `known` of them are filled; NaN for none.
        """
        first, filled = self.starts, np.maximum(known, 1)
        low, high = ordered[first + (filled - 1) // 2], ordered[first + filled // 2]
        median = np.where(known > 0, low + (high - low) / 2, np.nan)
        low, high = (self._nearest(ordered, median, filled, h) for h in ((filled + 1) // 2, filled // 2 + 1))
        return median, low + (high - low) / 2

    def _nearest(self, ordered: Floats, centre: Floats, known: Ints, h: Ints) -> Floats:
        """The h-th smallest distance from `centre` in each group.

        The h nearest stand side by side in `ordered`: a window whose ends are about as far. It is found by halving,
        all groups at once, which spares a second sort.
        """
        h = np.minimum(h, known)
        low, high = np.zeros_like(h), known - h
        while (searching := low < high).any():
            middle = (low + high) // 2
            left, right = ordered[self.starts + middle], ordered[self.starts + middle + h - 1]
            enough = right - centre >= centre - left
            high = np.where(searching & enough, middle, high)
            low = np.where(searching & ~enough, middle + 1, low)
        farthest: list[Floats] = []
        for start in (low, np.maximum(low - 1, 0)):
            left, right = ordered[self.starts + start], ordered[self.starts + start + h - 1]
            farthest.append(np.maximum(np.abs(left - centre), np.abs(right - centre)))
        return np.asarray(np.minimum(farthest[0], farthest[1]))

    def _mean_ranks(self, ascending: Floats, ordered: Ints) -> Floats:
        """1 for the smallest of each group; equal values share the mean of their ranks."""
        new = np.empty(len(ordered), bool)
        new[1:] = ascending[1:] != ascending[:-1]
        new[self.starts] = True
        first = np.flatnonzero(new)
        length = np.diff(np.append(first, len(ordered)))
        rank = first + (length - 1) / 2 - self.starts[self.group[first]] + 1
        found = np.empty(len(ordered))
        found[ordered] = np.repeat(rank, length)
        return found

    def _spread_out(self, column: Floats, total: int) -> Floats:
        if self.position is None:
            return column
        found = np.full(total, np.nan)
        found[self.rows] = column
        return found


@cache
def features() -> tuple[Feature, ...]:
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


def context_values(patients: Patients, site: Ints, values: Values, threads: int = 1) -> dict[str, Floats]:
    """Every context feature by name, of rows in canonical order as `site` [N] and `values` [N] are."""
    scopes = {"patient": patients.by_patient(), "site": patients.by_site(site)}
    total = len(patients.code)

    def compare(name: str) -> list[list[Floats]]:
        placed = places(values[name])
        return [
            groups.compare(values[name], placed, largest=scope == "patient" and _BASES[name][1])
            for scope, groups in scopes.items()
        ]

    compared = in_threads(compare, BASES, threads if total > FEW else 1)
    found = [groups.counts(total) for groups in scopes.values()]
    for i in range(len(scopes)):
        for each in compared:
            found += each[i]
    return {f.name: column for f, column in zip(features(), found, strict=True)}


def in_threads(work: Callable[[T], R], items: Iterable[T], threads: int) -> list[R]:
    """`work` of each item, in order: each is done by one thread, so their number changes no result."""
    if threads < 2:
        return [work(item) for item in items]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, items))


def _runs(key: Ints) -> tuple[Ints, Ints]:
    """Where each run of equal keys starts, and its length."""
    if not len(key):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    starts = np.flatnonzero(np.append(True, key[1:] != key[:-1]))
    return starts, np.diff(np.append(starts, len(key)))


def _over(distance: Floats, spread: Floats) -> Floats:
    """In units of the spread; without any, 0 for what is equal and NaN for what isn't."""
    return np.where(spread > 0, distance / np.where(spread > 0, spread, 1.0), np.where(distance == 0, 0.0, np.nan))
