"""How the model does by sex, age, site, kind of tile, institution, size and skin tone (a proxy).

A cell shows a figure only where its interval has earned it: ranking and sensitivity from
`intervals.FEWEST_MALIGNANT` malignant lesions on, specificity wherever enough patients have benign ones. Lesions
without the value are a cell of their own, `unknown`; a column that isn't there leaves the partition out, with the
reason.

`difference` is a cell's pAUC minus that of all other lesions. Patients with lesions on both sides make the two alike,
so its standard error is that of the difference itself: each patient's pull on the one less the pull on the other
(infinitesimal jackknife, see `resample.influence`), with Student's t and Satterthwaite's degrees of freedom.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray

from lesionflow.evaluation import intervals
from lesionflow.evaluation.intervals import NOT_ASKED, Figure, Interval, figures
from lesionflow.evaluation.metrics import MIN_TPR, Floats, Groups, Ints, checked, codes, order_of
from lesionflow.evaluation.quantiles import satterthwaite, student_quantile
from lesionflow.evaluation.rates import exact_sums, proportion, rate
from lesionflow.evaluation.resample import Patients, influence, partial_area

UNKNOWN = "unknown"
OTHERS = "others together"
MOST_CELLS = 20
"""Values of an open column that are shown; the rarer ones are one cell."""
_THREADS = 2
METHOD_DIFFERENCE = "cluster-robust t of the difference"
TONE_NOTE = (
    "Skin tone is a proxy: the individual typology angle of the skin beside the lesion, from the photograph's "
    "lightness. It depends on lighting and camera and is not a person's skin type."
)
SITE_NOTE = "A patient can have lesions in several cells."


@dataclass(frozen=True)
class Partition:
    """One way to cut the lesions into cells."""

    name: str
    title: str
    columns: tuple[str, ...]
    label: Callable[[], pl.Expr]
    """The cell of each lesion, null where unknown."""
    labels: tuple[str, ...] = ()
    """All cells in their order; () where they are whatever the column holds."""
    note: str = ""


def _text(column: str) -> Callable[[], pl.Expr]:
    def label() -> pl.Expr:
        stripped = pl.col(column).cast(pl.String).str.strip_chars()
        return pl.when(stripped != "").then(stripped)

    return label


def _bands(value: pl.Expr, limits: Sequence[float], labels: Sequence[str]) -> pl.Expr:
    """The label of the band that a value lies in; a limit belongs to the band above it."""
    band: pl.Expr = pl.when(value.is_finite()).then(pl.lit(labels[0]))
    for limit, label in zip(limits, labels[1:], strict=True):
        band = pl.when(value.is_finite() & (value >= limit)).then(pl.lit(label)).otherwise(band)
    return band


def typology_angle() -> pl.Expr:
    """Individual typology angle, degrees: arctan((L* - 50) / b*) of the skin beside the lesion (Chardon et al. 1991).

    Null where b* isn't positive: that is no colour of skin.
    """
    lightness, yellow = pl.col("tbp_lv_Lext").cast(pl.Float64), pl.col("tbp_lv_Bext").cast(pl.Float64)
    return pl.when(yellow > 0).then(((lightness - 50) / yellow).arctan().degrees())


AGES = ("under 40", "40-59", "60-74", "75 and over")
SIZES = ("under 3 mm", "3 to under 6 mm", "6 mm and over")
TONES = ("dark", "brown", "tan", "intermediate", "light", "very light")
TONE_LIMITS = (-30.0, 10.0, 28.0, 41.0, 55.0)
PARTITIONS = (
    Partition("sex", "Sex", ("sex",), _text("sex")),
    Partition(
        "age", "Age, years", ("age_approx",),
        lambda: _bands(pl.col("age_approx").cast(pl.Float64), (40, 60, 75), AGES), AGES,
    ),
    Partition("site", "Site", ("anatom_site_general",), _text("anatom_site_general"), note=SITE_NOTE),
    Partition("tile", "Tile type", ("tbp_tile_type",), _text("tbp_tile_type")),
    Partition("institution", "Institution", ("attribution",), _text("attribution")),
    Partition(
        "size", "Largest diameter", ("clin_size_long_diam_mm",),
        lambda: _bands(pl.col("clin_size_long_diam_mm").cast(pl.Float64), (3, 6), SIZES), SIZES, SITE_NOTE,
    ),
    Partition(
        "tone", "Skin tone, a proxy", ("tbp_lv_Lext", "tbp_lv_Bext"),
        lambda: _bands(typology_angle(), TONE_LIMITS, TONES), TONES, TONE_NOTE,
    ),
)  # fmt: skip


def subgroups(
    table: pl.DataFrame,
    y: ArrayLike,
    ranks: ArrayLike,
    groups: Groups,
    threshold: float | None,
    *,
    replicates: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> list[dict[str, Any]]:
    """The partitions of n lesions: `{name, title, note, cells}`, with `reason` where there are no cells.

    table [n] has the columns of `PARTITIONS` that are known; y [n] 0/1; ranks [n] scores that compare across folds;
    groups [n] the patient of each lesion; sensitivity and specificity are those of `ranks >= threshold` (None: left
    out). A cell is `{label, lesions, malignant, groups, pauc, auc, sensitivity, specificity, difference}`, the last
    five as `Figure.to_dict`. Intervals are not widened for the number of comparisons; the note gives it.

    Raises `DataError` as `metrics.pauc` does.
    """
    lesions = _Lesions(y, ranks, groups, threshold, replicates, seed, level)
    result: list[dict[str, Any]] = []
    for part in PARTITIONS:
        cut = _cells(table, part)
        cells = {"cells": [], "reason": cut} if isinstance(cut, str) else {"cells": lesions.cells(*cut)}
        result.append({"name": part.name, "title": part.title, "note": part.note, **cells})
    compared = [sum(_shown(cell["difference"]) for cell in one["cells"]) for one in result]
    for one, here in zip(result, compared, strict=True):
        if here:
            one["note"] = " ".join(filter(None, [one["note"], _multiplicity(here, sum(compared), level)]))
    return result


def _shown(figure: dict[str, Any]) -> bool:
    return figure["interval"]["low"] is not None


def _multiplicity(here: int, total: int, level: float) -> str:
    return (
        f"{here} of {total} comparisons over all partitions, not corrected for their number: where there is no true "
        f"difference, about {total * (1 - level):.1f} of {total} intervals leave out 0 by chance."
    )


def _cells(table: pl.DataFrame, part: Partition) -> tuple[list[str], Ints] | str:
    """Labels and each lesion's cell, int64 [n]; or why there are none."""
    if absent := [column for column in part.columns if column not in table.columns]:
        return f"no column {', '.join(absent)}"
    label = table.select(part.label().alias("label"))["label"]
    if label.null_count() == len(label):
        return f"{', '.join(part.columns)}: unknown for every lesion"
    labels = list(part.labels)
    if not labels:
        counts = label.drop_nulls().value_counts().sort(["count", "label"], descending=[True, False])
        labels = sorted(counts["label"].head(MOST_CELLS))
        if len(counts) > MOST_CELLS:
            kept = pl.col("label").is_in(labels) | pl.col("label").is_null()
            label = label.to_frame().select(pl.when(kept).then("label").otherwise(pl.lit(OTHERS)))["label"]
            labels.append(OTHERS)
    if label.null_count():
        labels.append(UNKNOWN)
    place = {name: k for k, name in enumerate(labels)}
    return labels, label.fill_null(UNKNOWN).replace_strict(place, return_dtype=pl.Int64).to_numpy()


class _Lesions:
    """What the cells are made of: targets, scores and patients, placed in one order of malignant scores."""

    def __init__(
        self,
        y: ArrayLike,
        ranks: ArrayLike,
        groups: Groups,
        threshold: float | None,
        replicates: int,
        seed: int,
        level: float,
    ) -> None:
        self.malignant, self.scores = checked(y, ranks)
        self.owner = codes(groups, len(self.scores))
        self.flagged = None if threshold is None else self.scores >= threshold
        self.replicates, self.seed, self.level = replicates, seed, level
        order = order_of(self.malignant, self.scores)
        self.size, self.columns = order.size, 3 * order.size + 1
        # As in `resample.Table`: benign cells first, then malignant scores.
        self.column = np.empty(len(self.scores), np.int64)
        self.column[self.malignant] = 2 * self.size + 1 + order.malignant_at
        self.column[~self.malignant] = order.benign_cell

    def cells(self, labels: Sequence[str], cell: Ints) -> list[dict[str, Any]]:
        """The figures of each cell, lesions in `cell` 0.. as their label's place."""
        differences = self._differences(cell, len(labels))
        # numpy lets other threads work meanwhile, so two cells take little longer than one.
        with ThreadPoolExecutor(_THREADS) as pool:
            masks = (cell == k for k in range(len(labels)))
            return list(pool.map(self._cell, labels, masks, differences))

    def _cell(self, label: str, here: NDArray[np.bool_], difference: Figure) -> dict[str, Any]:
        y, s, owner = self.malignant[here], self.scores[here], self.owner[here]
        lesions, ill, clusters = len(y), int(y.sum()), len(np.unique(owner))
        counts = {"label": label, "lesions": lesions, "malignant": ill, "groups": clusters}
        pauc = auc = sensitivity = specificity = self._missing(_too_few(ill), clusters, ill)
        if ill >= intervals.FEWEST_MALIGNANT and ill < lesions:
            measures = [partial_area(MIN_TPR), partial_area(0.0)]
            patients = Patients(y, [s], owner)
            pauc, auc = map(_earned, figures(patients, measures, self.replicates, self.seed, self.level))
        elif ill == lesions and ill:
            pauc = auc = self._missing("no benign lesions", clusters, ill)
        if self.flagged is None:
            sensitivity = specificity = self._missing("no threshold", clusters, ill)
        else:
            flagged = self.flagged[here]
            if ill >= intervals.FEWEST_MALIGNANT:
                sensitivity = _earned(proportion(flagged[y], owner[y], level=self.level))
            specificity = self._missing("no benign lesions", clusters, ill)
            if ill < lesions:
                specificity = _earned(self._specificity(flagged[~y], owner[~y]))
        shown = {
            "pauc": pauc, "auc": auc, "sensitivity": sensitivity, "specificity": specificity, "difference": difference
        }  # fmt: skip
        return counts | {name: figure.to_dict() for name, figure in shown.items()}

    def _specificity(self, flagged: NDArray[np.bool_], owner: Ints) -> Figure:
        # Summed by patient first: a hundred times fewer rows for the rate to look at.
        passed, total = np.bincount(owner, ~flagged), np.bincount(owner)
        seen = np.flatnonzero(total)
        return rate(
            passed[seen], total[seen].astype(np.float64), seen, malignant=0, fewest=0, replicates=self.replicates,
            seed=self.seed, level=self.level,
        )  # fmt: skip

    def _differences(self, cell: Ints, count: int) -> Iterator[Figure]:
        """pAUC of each cell 0..count-1 less that of all other lesions."""
        lesions = np.bincount(cell * self.columns + self.column, minlength=count * self.columns)
        inside = lesions.reshape(count, self.columns).astype(np.float64)
        outside = inside.sum(axis=0) - inside
        benign, ill = slice(0, 2 * self.size + 1), slice(2 * self.size + 1, self.columns)
        clusters = int(self.owner.max()) + 1
        for k in range(count):
            m, m_outside = int(inside[k, ill].sum()), int(outside[k, ill].sum())
            if reason := _no_difference(m, m_outside, inside[k, benign].sum(), outside[k, benign].sum()):
                yield self._missing(reason, clusters, m)
                continue
            both = np.stack([inside[k], outside[k]])
            (value, rest), pull = influence(both[:, benign], both[:, ill], MIN_TPR)
            own = exact_sums(np.where(cell == k, pull[0][self.column], -pull[1][self.column]), self.owner)
            yield self._difference(float(value - rest), own, m)

    def _difference(self, value: float, pull: Floats, malignant: int) -> Figure:
        clusters, squared = len(pull), float((pull**2).sum())
        reason = NOT_ASKED if not self.replicates else None if squared > 0 else "the difference does not vary"
        if reason:
            figure = Interval(None, None, self.level, METHOD_DIFFERENCE, 0, 0, clusters, malignant, reason)
            return _earned(Figure(value, figure))
        freedom = satterthwaite(squared, float((pull**4).sum()), clusters)
        reach = student_quantile((1 + self.level) / 2, freedom) * float(np.sqrt(squared * clusters / (clusters - 1)))
        most = 1 - MIN_TPR
        low, high = max(value - reach, -most), min(value + reach, most)
        return Figure(value, Interval(low, high, self.level, METHOD_DIFFERENCE, 0, 0, clusters, malignant))

    def _missing(self, reason: str, clusters: int, malignant: int) -> Figure:
        return Figure.missing(reason, level=self.level, clusters=clusters, malignant=malignant)


def _earned(figure: Figure) -> Figure:
    """The figure, without its value where there is no interval (unless none was asked for)."""
    if figure.interval.low is not None or figure.interval.reason == NOT_ASKED:
        return figure
    return Figure(None, figure.interval)


def _too_few(malignant: int) -> str:
    return f"{malignant} malignant lesions: under {intervals.FEWEST_MALIGNANT}, no interval is worth printing"


def _no_difference(malignant: int, outside: int, benign: float, benign_outside: float) -> str | None:
    if malignant < intervals.FEWEST_MALIGNANT:
        return _too_few(malignant)
    if outside < intervals.FEWEST_MALIGNANT:
        return f"all others have {_too_few(outside)}"
    return None if benign and benign_outside else "no benign lesions on one side"
