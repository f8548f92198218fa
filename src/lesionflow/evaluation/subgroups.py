"""How the model does by sex, age, site, kind of tile, institution, size and skin tone (a proxy).

A cell shows a figure only where its interval has earned it: ranking and sensitivity from
`intervals.FEWEST_MALIGNANT` malignant lesions on, specificity wherever enough patients have benign ones. Lesions
without the value are a cell of their own, `unknown`; a column that isn't there leaves the partition out, with the
reason.

`difference` is a cell's pAUC minus that of all other lesions. Its interval is put together from those of the two,
which are wider below than above (Zou and Donner's method of variance estimates recovery), with the correlation that
patients with lesions on both sides bring, by the infinitesimal jackknife (`resample.influence`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
_DENSE = 1 << 23  # Patients times columns up to which their lesions are kept as a table.
METHOD_DIFFERENCE = "variance recovered from both intervals, patient-clustered"
MANY_MALIGNANT = 100
"""From here on the interval of all others, which moves a difference least, is a cluster-robust t, far quicker."""
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
        return pl.when((stripped != "") & (stripped.str.to_lowercase() != UNKNOWN)).then(stripped)

    return label


def _number(column: str) -> pl.Expr:
    return pl.col(column).cast(pl.Float64, strict=False)


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
    lightness, yellow = _number("tbp_lv_Lext"), _number("tbp_lv_Bext")
    return pl.when(yellow > 0).then(((lightness - 50) / yellow).arctan().degrees())


AGES = ("under 40", "40-59", "60-74", "75 and over")
SIZES = ("under 3 mm", "3 to under 6 mm", "6 mm and over")
TONES = ("dark", "brown", "tan", "intermediate", "light", "very light")
TONE_LIMITS = (-30.0, 10.0, 28.0, 41.0, 55.0)
PARTITIONS = (
    Partition("sex", "Sex", ("sex",), _text("sex")),
    Partition(
        "age", "Age, years", ("age_approx",),
        lambda: _bands(_number("age_approx"), (40, 60, 75), AGES), AGES,
    ),
    Partition("site", "Site", ("anatom_site_general",), _text("anatom_site_general"), note=SITE_NOTE),
    Partition("tile", "Tile type", ("tbp_tile_type",), _text("tbp_tile_type")),
    Partition("institution", "Institution", ("attribution",), _text("attribution")),
    Partition(
        "size", "Largest diameter", ("clin_size_long_diam_mm",),
        lambda: _bands(_number("clin_size_long_diam_mm"), (3, 6), SIZES), SIZES, SITE_NOTE,
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
        self.total = np.bincount(self.column, minlength=self.columns)
        self.clusters = int(self.owner.max()) + 1
        self.counts: Floats | None = None
        if (size := self.clusters * self.columns) <= _DENSE:
            counts = np.bincount(self.owner * self.columns + self.column, minlength=size)
            self.counts = counts.reshape(self.clusters, self.columns).astype(np.float64)

    def cells(self, labels: Sequence[str], cell: Ints) -> list[dict[str, Any]]:
        """The figures of each cell, lesions in `cell` 0.. as their label's place."""
        # numpy lets other threads work meanwhile, so two cells take little longer than one.
        with ThreadPoolExecutor(_THREADS) as pool:
            return list(pool.map(self._cell, labels, (cell == k for k in range(len(labels)))))

    def _cell(self, label: str, here: NDArray[np.bool_]) -> dict[str, Any]:
        y, s, owner = self.malignant[here], self.scores[here], self.owner[here]
        lesions, ill, clusters = len(y), int(y.sum()), int(np.count_nonzero(np.bincount(owner)))
        few = _too_few(y, owner)
        counts = {"label": label, "lesions": lesions, "malignant": ill, "groups": clusters}
        pauc = auc = sensitivity = self._missing(few, clusters, ill)
        specificity = self._missing("no benign lesions", clusters, ill)
        if not few and ill < lesions:
            measures = [partial_area(MIN_TPR), partial_area(0.0)]
            patients = Patients(y, [s], owner)
            pauc, auc = map(_earned, figures(patients, measures, self.replicates, self.seed, self.level))
        elif not few:
            pauc = auc = specificity
        if self.flagged is None:
            sensitivity = specificity = self._missing("no threshold", clusters, ill)
        else:
            flagged = self.flagged[here]
            if not few:
                sensitivity = _earned(proportion(flagged[y], owner[y], replicates=self.replicates, level=self.level))
            if ill < lesions:
                specificity = _earned(self._specificity(flagged[~y], owner[~y]))
        shown = {
            "pauc": pauc, "auc": auc, "sensitivity": sensitivity, "specificity": specificity,
            "difference": self._difference(here, pauc),
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

    def _difference(self, here: NDArray[np.bool_], pauc: Figure) -> Figure:
        """The cell's `pauc` less that of all other lesions."""
        inside, clusters = pauc.interval, self.clusters
        y, owner = self.malignant[~here], self.owner[~here]
        if pauc.value is None:
            return Figure.missing(
                inside.reason or "", level=self.level, clusters=inside.clusters, malignant=inside.malignant
            )
        if reason := ("no other lesions" if not len(y) else _too_few(y, owner)) or _one_class(y):
            return self._missing(f"all others: {reason}", clusters, inside.malignant)
        benign, ill = slice(0, 2 * self.size + 1), slice(2 * self.size + 1, None)
        mine = np.bincount(self.column[here], minlength=self.columns)
        counts = np.stack([mine, self.total - mine])
        (_, rest), pull = influence(counts[:, benign].astype(np.float64), counts[:, ill].astype(np.float64), MIN_TPR)
        value = pauc.value - float(rest)
        pulls = self._pulls(here, *pull)
        outside = self._outside(~here, float(rest), pulls[1])
        if inside.low is None or inside.high is None or outside is None:
            reason = inside.reason or "all others: their pAUC does not vary"
            interval = Interval(None, None, self.level, METHOD_DIFFERENCE, 0, 0, clusters, inside.malignant, reason)
            return _earned(Figure(value, interval))
        spread = float(np.sqrt((pulls[0] ** 2).sum() * (pulls[1] ** 2).sum()))
        alike = float((pulls[0] * pulls[1]).sum()) / spread if spread > 0 else 0.0
        below, above = pauc.value - inside.low, inside.high - pauc.value
        rest_below, rest_above = float(rest) - outside[0], outside[1] - float(rest)
        low = value - _add(below, rest_above, alike)
        high = value + _add(above, rest_below, alike)
        return Figure(
            value,
            Interval(
                low, high, self.level, METHOD_DIFFERENCE, inside.replicates, inside.dropped, clusters, inside.malignant
            ),
        )

    def _outside(self, others: NDArray[np.bool_], value: float, pull: Floats) -> tuple[float, float] | None:
        """Interval of the pAUC of all others, given each patient's pull on it."""
        if int(self.malignant[others].sum()) < MANY_MALIGNANT or not 0 < value < 1 - MIN_TPR:
            patients = Patients(self.malignant[others], [self.scores[others]], self.owner[others])
            drawn = figures(patients, [partial_area(MIN_TPR)], self.replicates, self.seed, self.level)[0].interval
            return None if drawn.low is None or drawn.high is None else (drawn.low, drawn.high)
        clusters, squared = len(pull), float((pull**2).sum())
        freedom = satterthwaite(squared, float((pull**4).sum()), clusters)
        reach = student_quantile((1 + self.level) / 2, freedom) * float(np.sqrt(squared * clusters / (clusters - 1)))
        most = 1 - MIN_TPR
        centre, step = np.log(value / (most - value)), reach * most / (value * (most - value))
        low, high = (most / (1 + np.exp(-(centre + side))) for side in (-step, step))
        return float(low), float(high)

    def _pulls(self, here: NDArray[np.bool_], inside: Floats, outside: Floats) -> tuple[Floats, Floats]:
        """By patient [G]: the sum of `inside` over the lesions that are here, and of `outside` over all others."""
        column, owner = self.column[here], self.owner[here]
        # Only the cell's lesions are gone through; what they leave of all patients' sums is the others' part.
        mine, theirs = (
            exact_sums(np.r_[one[column], 0.0], np.r_[owner, self.clusters - 1]) for one in (inside, outside)
        )
        if self.counts is None:
            return mine, exact_sums(np.where(here, 0.0, outside[self.column]), self.owner)
        return mine, self.counts @ outside - theirs

    def _missing(self, reason: str, clusters: int, malignant: int) -> Figure:
        return Figure.missing(reason, level=self.level, clusters=clusters, malignant=malignant)


def _earned(figure: Figure) -> Figure:
    """The figure, without its value where there is no interval (unless none was asked for)."""
    if figure.interval.low is not None or figure.interval.reason == NOT_ASKED:
        return figure
    return Figure(None, figure.interval)


def _too_few(y: NDArray[np.bool_], owner: Ints) -> str:
    """Why these lesions can't carry an interval; empty if they can."""
    malignant, fewest = int(y.sum()), intervals.FEWEST_MALIGNANT
    if malignant < fewest:
        return f"{malignant} malignant lesions: under {fewest}, no interval is worth printing"
    if (patients := len(np.unique(owner[y]))) < (fewest := intervals.FEWEST_GROUPS):
        return f"malignant lesions of {patients} patients: under {fewest}, no interval is worth printing"
    return ""


def _one_class(y: NDArray[np.bool_]) -> str:
    return "no benign lesions" if y.all() else ""


def _add(first: float, second: float, alike: float) -> float:
    """How far a difference reaches when its two figures reach that far and are correlated."""
    return float(np.sqrt(max(0.0, first**2 + second**2 - 2 * alike * first * second)))
