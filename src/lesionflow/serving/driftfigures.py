"""What drift is measured of: figures of lesions, the bins they fall into, and the tests of a population's shares."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lesionflow.errors import DataError

if TYPE_CHECKING:
    import polars as pl

Doubles = NDArray[np.float64]
Ints = NDArray[np.int64]
Codes = NDArray[np.int8]

NUMBER_TESTS = ("level", "spread")
OTHER = "other"
"""The bin of categories that the hold-out doesn't have."""
VISIT_SIZE = "lesions per patient"
CATEGORIES = ("sex", "anatom_site_general", "tbp_tile_type", "tbp_lv_location_simple")
_MOST_FIGURES, _MOST_BINS, _MOST_INSTITUTIONS = 256, 64, 64
_CELLS = 2_000_000
_REMEDY = "export the bundle again"


@dataclass(frozen=True)
class Observed:
    """N lesions' figures."""

    numbers: Mapping[str, Doubles]
    """Figure -> float64 [N], NaN where unknown."""
    categories: Mapping[str, Sequence[str | None]]
    """Figure -> N of them, None where unknown."""


def observed(
    statistics: Mapping[str, Doubles] | None = None,
    logits: Mapping[str, Doubles] | None = None,
    bands: Sequence[str | None] | None = None,
    table: pl.DataFrame | None = None,
    sizes: Doubles | None = None,
) -> Observed:
    """The figures of N lesions, from as much as is known of them.

    statistics: `inputs.statistics`; logits: mode -> [N], NaN for none; bands: N of what is served; table: N rows of
    typed metadata; sizes [N]: how many lesions a patient has, at one of the patient's lesions, NaN elsewhere.
    """
    numbers = {f"picture {name}": np.asarray(x, np.float64) for name, x in (statistics or {}).items()}
    numbers |= {f"score {mode}": np.asarray(x, np.float64) for mode, x in (logits or {}).items()}
    categories: dict[str, Sequence[str | None]] = {}
    if bands is not None:
        categories["band"] = [band or "none" for band in bands]
    if sizes is not None:
        numbers[VISIT_SIZE] = sizes
    if table is not None:
        from lesionflow.data.derived import NUMBERS

        for name in NUMBERS:
            column = table[name].to_numpy() if name in table.columns else np.full(table.height, np.nan)
            numbers[f"metadata {name}"] = np.asarray(column, np.float64)
        for name in CATEGORIES:
            cells = table[name].to_list() if name in table.columns else [None] * table.height
            categories[f"metadata {name}"] = cells
    return Observed(numbers, categories)


class Figures:
    """How figures fall into bins: F of them, at most B bins each."""

    def __init__(self, described: Mapping[str, Any]) -> None:
        """From the reference's `figures`. Raises `KeyError`, `TypeError` or `ValueError` for what can't be used."""
        if len(described) > _MOST_FIGURES:
            raise ValueError(f"{len(described)} figures, at most {_MOST_FIGURES} are read")
        self.names = list(described)
        self.kinds = [str(one["kind"]) for one in described.values()]
        self.edges: dict[str, Doubles] = {}
        self.values: dict[str, dict[str, int]] = {}
        for name, one in described.items():
            if one["kind"] == "number":
                self.edges[name] = np.array(one["edges"], np.float64)
                if not (np.isfinite(self.edges[name]).all() and (np.diff(self.edges[name]) > 0).all()):
                    raise ValueError(f"{name}: edges must rise")
            elif one["kind"] == "category":
                self.values[name] = {str(value): n for n, value in enumerate(one["values"])}
            elif one["kind"] != "missing":
                raise ValueError(f"{name}: no kind {one['kind']!r}")
        self.bins = max([self.bins_of(name) for name in self.names], default=1)
        if self.bins > _MOST_BINS:
            raise ValueError(f"{self.bins} bins, at most {_MOST_BINS} are read")

    def bins_of(self, name: str) -> int:
        if name in self.edges:
            return len(self.edges[name]) + 1
        return len(self.values[name]) + 1 if name in self.values else 2

    def codes(self, seen: Observed, count: int) -> Codes:
        """The bin of each figure of each lesion, int8 [F, N]; -1 where it is unknown."""
        found = np.full((len(self.names), count), -1, np.int8)
        for row, name in enumerate(self.names):
            if name in self.edges:
                if (x := seen.numbers.get(name)) is not None:
                    found[row] = np.where(np.isnan(x), -1, np.searchsorted(self.edges[name], x, side="right"))
            elif name in self.values:
                if (cells := seen.categories.get(name)) is not None:
                    known, other = self.values[name], len(self.values[name])
                    found[row] = [-1 if cell is None else known.get(cell, other) for cell in cells]
            else:
                of = "metadata " + name.removeprefix("missing ")
                if (x := seen.numbers.get(of)) is not None:
                    found[row] = np.isnan(x)
                elif (cells := seen.categories.get(of)) is not None:
                    found[row] = [cell is None for cell in cells]
        return found

    def shares(self, codes: Codes, owner: Ints, count: int) -> Iterator[tuple[Doubles, Doubles]]:
        """Of `count` patients, some at a time: the shares of their lesions by bin [G, F, B], and their lesions [G, F].

        codes [F, N]; owner [N] in 0..count-1. Shares are 0 where a patient has no such figure.
        """
        bins, figures = self.bins, len(self.names)
        order = np.argsort(owner, kind="stable")
        ends = np.cumsum(np.bincount(owner, minlength=count))
        start, step = 0, max(1, _CELLS // max(1, figures * bins))
        while start < count:
            first = int(ends[start - 1]) if start else 0
            enough = int(np.searchsorted(ends, first + _CELLS // max(1, figures), side="right"))
            stop = min(start + step, count, max(enough, start + 1))
            rows = order[first : ends[stop - 1]]
            place = ((owner[rows] - start) * figures + np.arange(figures)[:, None]) * bins + codes[:, rows]
            cells = np.bincount(place[codes[:, rows] >= 0], minlength=(stop - start) * figures * bins)
            held = cells.reshape(stop - start, figures, bins).astype(np.float64)
            lesions = held.sum(2)
            yield held / np.maximum(lesions, 1)[:, :, None], lesions
            start = stop


class Population:
    """What is tested of a population: T tests of its figures, each the mean of a score of bins."""

    def __init__(self, figures: Figures, population: Mapping[str, Any]) -> None:
        """From one of the reference's populations; raises as `Figures` does."""
        self.figures, self.patients = figures, int(population["patients"])
        rows, names, scores, numbers = [], [], [], []
        for row, name in enumerate(figures.names):
            if (known := population["figures"].get(name)) is None:
                continue
            mine = test_scores(figures, name, np.array(known["shares"], np.float64))
            for test, of in known["tests"].items():
                rows.append(row)
                names.append((name, str(test)))
                scores.append(mine[test])
                numbers.append([float(of[field]) for field in ("mean", "variance", "alike", "weight")])
        self.rows, self.names = np.array(rows, np.int64), names
        self.scores = np.array(scores, np.float64).reshape(len(rows), figures.bins)
        table = np.array(numbers, np.float64).reshape(len(rows), 4)
        self.mean, self.variance, self.alike, self.weight = table.T
        if not (np.isfinite(table).all() and (table[:, 1:] >= 0).all() and (self.alike <= 1).all()):
            raise ValueError("a test's mean, variance, alike and weight must be finite, and not negative")
        self.is_number = np.array([test in NUMBER_TESTS and figures.kinds[row] == "number" for row, (_, test)
                                   in zip(rows, names, strict=True)], bool)  # fmt: skip

    def __len__(self) -> int:
        return len(self.names)


def test_scores(figures: Figures, name: str, shares: Doubles) -> dict[str, Doubles]:
    """What a lesion of each bin counts in each test of the figure: test -> float64 [B].

    `shares` are the population's, by bin. A number's bins count by their place in the middle of the shares (the
    mid-distribution function), 0..1, and by how far that is out, (2u - 1)^2.
    """
    wide = np.zeros(figures.bins)
    if shares.shape != (figures.bins_of(name),) or not (shares >= 0).all():
        raise ValueError(f"{name}: shares must be {figures.bins_of(name)} numbers of 0 or more")
    if name in figures.edges:
        place = np.cumsum(shares) - shares / 2
        level, spread = wide.copy(), wide.copy()
        level[: len(shares)], spread[: len(shares)] = place, (2 * place - 1) ** 2
        return {"level": level, "spread": spread}
    of = [*figures.values[name], OTHER] if name in figures.values else ["", "missing"]
    if len(of) == 3:
        of[1] = ""  # Of two categories one says it all.
    return {one: np.eye(figures.bins)[n] for n, one in enumerate(of) if one}


def weighted(rows: Ints, scores: Doubles, alike: Doubles, shares: Doubles, lesions: Doubles) -> tuple[Doubles, Doubles]:
    """Each patient's weight and mean score in each test, [G, T] both."""
    n = lesions[:, rows]
    return n / (1 + np.maximum(n - 1, 0) * alike), np.einsum("gtb,tb->gt", shares[:, rows], scores)


def populations(reference: Mapping[str, Any]) -> tuple[Figures, dict[str, Population]]:
    """The reference's bins, and its tests by institution ("" for the whole hold-out). Raises `DataError`."""
    try:
        if reason := reference["reason"]:
            raise DataError(f"the bundle has no reference to hold lesions against: {reason}")
        if len(reference["institutions"]) > _MOST_INSTITUTIONS:
            raise ValueError(f"more than {_MOST_INSTITUTIONS} institutions")
        figures = Figures(reference["figures"])
        known = {"": reference["whole"], **reference["institutions"]}
        return figures, {str(name): Population(figures, one) for name, one in known.items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"bundle.json: drift can't be used ({error}): {_REMEDY}") from None
