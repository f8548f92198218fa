"""Kinds of diagnosis: targets beside the label, counted on what is trained on alone."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from lesionflow.data.diagnosis import UNKNOWN, kinds
from lesionflow.errors import UsageError


def table(**columns: object) -> pl.DataFrame:
    second = ["Melanoma"] * 12 + ["Basal"] * 11 + ["Rare"] * 4 + [None] * 20 + ["A benign one"] * 3
    first = ["Malignant"] * 27 + ["Benign"] * 22 + ["Indeterminate"]
    made = pl.DataFrame({"target": [1] * 27 + [0] * 23, "iddx_1": first, "iddx_2": second})
    return made.with_columns(**{name: pl.lit(value) for name, value in columns.items()})


def test_kinds_are_the_second_level_and_benign_is_one() -> None:
    found = kinds(lambda *columns: [table()], np.arange(50))
    assert found.names == ("Basal", "Benign", "Melanoma")
    assert found.codes[:12].tolist() == [2] * 12 and found.codes[12:23].tolist() == [0] * 11
    assert found.codes[23:27].tolist() == [UNKNOWN] * 4, "too rare to learn"
    assert found.codes[27:49].tolist() == [1] * 22 and found.codes[49] == UNKNOWN
    assert found.codes.dtype == np.int16


def test_what_is_held_out_decides_nothing_about_the_kinds() -> None:
    without = np.arange(3, 50)  # Nine melanomas are left: too few.
    with pytest.raises(UsageError, match=r"found: Basal, Benign; set training\.auxiliary=0"):
        kinds(lambda *columns: [table()], without)


def test_without_a_column_of_kinds_there_is_nothing_to_teach() -> None:
    with pytest.raises(UsageError, match="found: Benign"):
        kinds(lambda *columns: [table().drop("iddx_1", "iddx_2")], np.arange(50))
