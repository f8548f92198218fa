"""What can be wrong with a metadata table, cell by cell and as a whole.

Each check is a function from the table's text cells (`table.read_cells`) to findings; `check_table`
runs them all. A swapped header is looked for first: its columns would fail every other check too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import combinations

import numpy as np
import polars as pl
from numpy.typing import NDArray

from lesionflow.data.findings import Finding, error, warning
from lesionflow.data.missingness import check_missing
from lesionflow.data.schema import BY_NAME, TRAIN_ONLY
from lesionflow.data.table import as_number, as_target, is_number

Array = NDArray[np.float64]

# Relations that hold in the published metadata to 2e-5: they betray swapped columns that ranges can't.
_RELATIONS: tuple[tuple[tuple[str, ...], Callable[..., Array]], ...] = (
    (("tbp_lv_A", "tbp_lv_Aext", "tbp_lv_deltaA"), lambda a, b, d: a - b - d),
    (("tbp_lv_B", "tbp_lv_Bext", "tbp_lv_deltaB"), lambda a, b, d: a - b - d),
    (("tbp_lv_L", "tbp_lv_Lext", "tbp_lv_deltaL"), lambda a, b, d: a - b - d),
    (("tbp_lv_A", "tbp_lv_B", "tbp_lv_C"), lambda a, b, c: np.hypot(a, b) - c),
    (("tbp_lv_Aext", "tbp_lv_Bext", "tbp_lv_Cext"), lambda a, b, c: np.hypot(a, b) - c),
    (("tbp_lv_A", "tbp_lv_B", "tbp_lv_H"), lambda a, b, h: np.degrees(np.arctan2(b, a)) - h),
    (("tbp_lv_Aext", "tbp_lv_Bext", "tbp_lv_Hext"), lambda a, b, h: np.degrees(np.arctan2(b, a)) - h),
    (("tbp_lv_areaMM2", "tbp_lv_perimeterMM", "tbp_lv_area_perim_ratio"), lambda a, p, r: p**2 / a - r),
)
_HOLDS = 0.01
_SAMPLE = 2000


def check_table(cells: pl.DataFrame, name: str, part: str) -> list[Finding]:
    """All findings of one metadata table, given as text cells; `name` is its file's name."""
    if not cells.height:
        return [error("no_rows", name, [name], "no rows under the header", "restore the file")]
    findings = [*_columns(cells, name, part)]
    swapped = swapped_columns(cells)
    findings += [
        error(
            "swapped_header", f"{a}, {b}", [a, b],
            f"the cells of {a} are those of {b} and the other way round", "swap the two names in the header line",
        )
        for a, b in swapped
    ]  # fmt: skip
    distrusted = {column for pair in swapped for column in pair}
    cells = cells.drop(distrusted)
    if "isic_id" in cells.columns:
        findings += _ids(cells)
        for column in cells.columns:
            findings += _cells(cells, column) if column in BY_NAME else []
        if "target" in cells.columns:
            findings += [*_targets(cells, part), *_missing_by_label(cells)]
        if "patient_id" in cells.columns:
            findings += _patients(cells)
    return findings


def swapped_columns(cells: pl.DataFrame) -> list[tuple[str, str]]:
    """Pairs of columns whose cells don't fit their own name but each other's, or whose exchange
    repairs the relations between the colour and size columns."""
    known = [c for c in cells.columns if c in BY_NAME and cells[c].null_count() < cells.height]
    misfits = [c for c in known if _fit(cells[c], c) < 0.5]
    pairs = [
        (a, b)
        for a, b in combinations(misfits, 2)
        if _fit(cells[a], b) > 0.95 and _fit(cells[b], a) > 0.95
    ]  # fmt: skip
    return pairs or _unrelated(cells)


def _fit(values: pl.Series, name: str) -> float:
    """Share of the filled cells that could stand under `name`."""
    column, filled = BY_NAME[name], values.drop_nulls()
    number = filled.str.strip_chars().cast(pl.Float64, strict=False)
    if column.kind == "label":
        fits = number.is_in([0.0, 1.0])
    elif column.kind == "number":
        low = -math.inf if column.low is None else column.low
        high = math.inf if column.high is None else column.high
        fits = number.is_between(low, high)
    elif column.values:
        fits = filled.is_in(list(column.values))
    elif column.name in ("isic_id", "patient_id", "lesion_id"):
        fits = filled.str.contains("^" + {"i": "ISIC", "p": "IP", "l": "IL"}[name[0]] + r"_\d+$")
    else:
        fits = number.is_null()
    return float(fits.fill_null(False).mean() or 0.0)  # type: ignore[arg-type]


def _unrelated(cells: pl.DataFrame) -> list[tuple[str, str]]:
    """The one exchange of two columns that repairs every broken relation, if there is one."""
    relations = [(names, gap) for names, gap in _RELATIONS if set(names) <= set(cells.columns)]
    numbers = [name for name in cells.columns if is_number(name) and cells[name].null_count() < cells.height]
    relations = [(names, gap) for names, gap in relations if set(names) <= set(numbers)]
    if not relations:
        return []
    family = sorted({name for names, _ in relations for name in names})
    rows = cells.filter(pl.all_horizontal(pl.col(family).is_not_null())).head(_SAMPLE)
    table = rows.select(as_number(name) for name in numbers)
    values = {name: table[name].to_numpy() for name in numbers}

    def broken(order: dict[str, str]) -> set[str]:
        with np.errstate(all="ignore"):
            gaps = ((names, gap(*(values[order.get(n, n)] for n in names))) for names, gap in relations)
            return {name for names, g in gaps if np.mean(np.abs(g) < _HOLDS) < 0.5 for name in names}

    suspects = sorted(broken({})) if table.height else []
    exchanges = {tuple(sorted((a, b))) for a in suspects for b in numbers if a != b}
    return [(a, b) for a, b in sorted(exchanges) if not broken({a: b, b: a})][:1]


def _columns(cells: pl.DataFrame, name: str, part: str) -> Iterator[Finding]:
    needed = ("isic_id", "target") if part == "train" else ("isic_id",)
    if missing := [c for c in needed if c not in cells.columns]:
        yield error("missing_column", name, missing, f"no column {', '.join(missing)}", "add it, or restore the header")
    if unknown := [c for c in cells.columns if c not in BY_NAME]:
        yield warning(
            "unknown_column", name, unknown, "columns that the competition doesn't have",
            "correct the name if it is misspelt; otherwise they are left unused",
        )  # fmt: skip
    if part != "train" and (leaks := [c for c in cells.columns if c in TRAIN_ONLY]):
        yield error(
            "train_only_column", name, leaks, "columns that are only known after the biopsy, in a file to be scored",
            "remove them: as inputs they would leak the label",
        )  # fmt: skip


def _cells(cells: pl.DataFrame, name: str) -> Iterator[Finding]:
    """Cells that can't stand under a column's name."""
    column, text = BY_NAME[name], cells[name]
    if column.values:
        odd = cells.filter(text.is_not_null() & ~text.is_in(list(column.values)))
        if odd.height:
            yield warning(
                "unknown_category", name, _pairs(odd, name),
                f"values other than {', '.join(column.values[:6])}{', ...' if len(column.values) > 6 else ''}",
                "correct the spelling, or leave the cell empty",
            )  # fmt: skip
    if not is_number(name):
        return
    number = cells.select(as_number(name))[name]
    words = cells.filter(text.is_not_null() & number.is_null())
    if words.height:
        yield error(
            "not_a_number", name, _pairs(words, name), "text among numbers",
            "correct the cells, or leave them empty where the value is unknown",
        )  # fmt: skip
    wild = cells.filter(number.is_not_null() & ~number.is_finite())
    if wild.height:
        yield error(
            "not_finite", name, _pairs(wild, name), "NaN or infinite values",
            "leave the cells empty where the value is unknown",
        )  # fmt: skip
    low = -math.inf if column.low is None else column.low
    high = math.inf if column.high is None else column.high
    off = cells.filter(number.is_finite() & ~number.is_between(low, high))
    if off.height:
        hint = "; so many are off that the header may be swapped" if off.height > cells.height / 2 else ""
        bounds = f"outside {low:g} .. {high:g}" if math.isfinite(high) else f"below {low:g}"
        yield error(
            "out_of_range", name, _pairs(off, name), f"values {bounds}, which can't be true{hint}",
            "correct the cells, or leave them empty where the value is unknown",
        )  # fmt: skip


def _ids(cells: pl.DataFrame) -> Iterator[Finding]:
    ids = cells["isic_id"]
    if ids.null_count():
        lines = (cells.with_row_index().filter(ids.is_null())["index"] + 2).to_list()
        yield error(
            "empty_id", "isic_id", (f"line {n}" for n in lines), "rows without an id", "restore or remove these lines"
        )
    twice = ids.filter(ids.is_duplicated() & ids.is_not_null()).unique(maintain_order=True)
    if twice.len():
        yield error("duplicate_id", "isic_id", twice, "ids that occur more than once", "keep one row of each")
    odd = ids.filter(ids.str.contains(r"[\s/\\]|\.(?i:jpe?g|png)$"))
    if odd.len():
        yield error(
            "odd_id", "isic_id", map(repr, odd), "ids with spaces, slashes or a file's ending",
            "write the bare id, as in ISIC_0015670",
        )  # fmt: skip


def _targets(cells: pl.DataFrame, part: str) -> Iterator[Finding]:
    target = cells.select(as_target())["target"]
    wrong = cells.filter(cells["target"].is_not_null() & target.is_null())
    if wrong.height:
        yield error(
            "bad_target", "target", _pairs(wrong, "target"), "targets that are neither 0 (benign) nor 1 (malignant)",
            "write 0 or 1",
        )  # fmt: skip
    if part != "train":
        return
    unknown = cells.filter(cells["target"].is_null())["isic_id"]
    if unknown.len():
        yield error(
            "no_target", "target", unknown, "lesions without a target", "fill it in, or leave these lesions out"
        )
    for value, label in ((1, "malignant"), (0, "benign")):
        if not (target == value).any():
            yield error(
                f"no_{label}", "target", ["target"], f"not a single {label} lesion",
                "check that the table is complete; training and scoring need both kinds",
            )  # fmt: skip
    if "iddx_1" in cells.columns:
        said = cells["iddx_1"]
        differs = cells.filter(((said == "Benign") & (target == 1)) | ((said == "Malignant") & (target == 0)))
        if differs.height:
            yield warning(
                "diagnosis_disagrees", "iddx_1, target", _pairs(differs, "iddx_1"),
                "the diagnosis says otherwise than the target", "find out which of the two is right",
            )  # fmt: skip


def _missing_by_label(cells: pl.DataFrame) -> Iterator[Finding]:
    """Columns that are empty much more often for one label: being filled would itself predict it."""
    labelled = cells.with_columns(cells.select(as_target())).drop_nulls("target")
    if found := check_missing(labelled, labelled["target"]):
        yield warning(
            "missing_by_label", "target", found, "whether these columns are filled gives the label away",
            "train on images only, or on rows that have them, and never give a model their missingness",
        )  # fmt: skip


def _patients(cells: pl.DataFrame) -> Iterator[Finding]:
    unknown = cells.filter(cells["patient_id"].is_null())["isic_id"]
    if unknown.len():
        yield warning(
            "no_patient", "patient_id", unknown, "lesions of no known patient",
            "each counts as a patient of its own, in folds and in intervals: fill in the id where it is known",
        )  # fmt: skip
    if "sex" in cells.columns:
        sexes = cells.drop_nulls("patient_id").group_by("patient_id").agg(pl.col("sex").drop_nulls().n_unique())
        both = sexes.filter(pl.col("sex") > 1)["patient_id"].sort()
        if both.len():
            yield warning(
                "two_sexes", "patient_id, sex", both, "patients of both sexes",
                "check whether two patients share an id: their lesions would be ranked together",
            )  # fmt: skip
    known = cells["patient_id"].drop_nulls()
    if known.n_unique() >= 5:
        (patient, lesions) = known.value_counts(sort=True).row(0)
        if lesions > known.len() / 2:
            yield warning(
                "dominant_patient", "patient_id", [patient],
                f"one patient has {lesions:,} of {known.len():,} lesions",
                "check the id: figures would describe this patient more than all others",
            )  # fmt: skip


def _pairs(rows: pl.DataFrame, name: str) -> Iterator[str]:
    return (f"{isic_id}: {value}" for isic_id, value in rows.select("isic_id", name).iter_rows())
