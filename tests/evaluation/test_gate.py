"""The gate passes only what is shown, and says why not."""

from __future__ import annotations

import dataclasses
import json

import pytest

from lesionflow.evaluation.gate import check
from lesionflow.recipe import Gate

GATE = Gate(pauc_floor=0.1, sensitivity_floor=0.8, delta=0.01, parity=1e-4)


def figures(low=0.12, reason=None, bound=0.85):
    interval = {"low": low, "high": None if low is None else 0.16, "reason": reason}
    return {
        "headline": "rank_pooled",
        "pauc": {"chance": 0.02, "rank_pooled": {"value": 0.14, "interval": interval}},
        "served": {"thresholds": {"refer": {"sensitivity": 0.92, "lower_bound": bound}}},
    }


def test_a_model_that_shows_all_passes_without_reasons():
    result = check(figures(), GATE, parity=1e-6, paired={"difference": -0.005, "low": -0.02, "high": 0.01})
    assert result["passed"]
    assert result["reasons"] == []
    assert [c["name"] for c in result["checks"]] == ["pauc_floor", "sensitivity_floor", "incumbent", "parity"]
    assert all(c["passed"] and c["text"] for c in result["checks"])
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize(
    ("arguments", "name", "text"),
    [
        ({"metrics": figures(low=0.0999)}, "pauc_floor", "lower bound 0.0999 is under the floor 0.1000"),
        ({"metrics": figures(bound=0.79)}, "sensitivity_floor", "lower bound 0.790 is under the floor 0.800"),
        ({"paired": {"difference": -0.011, "low": None, "high": None}}, "incumbent", "-0.0110 (no interval) is below"),
        ({"parity": 2e-4}, "parity", "0.0002 exceeds 0.0001"),
        ({"parity": float("nan")}, "parity", "exceeds"),
        ({"paired": {"difference": float("nan")}}, "incumbent", "is below"),
    ],
)
def test_each_missed_bound_refuses_alone_and_names_itself(arguments, name, text):
    metrics = arguments.pop("metrics", figures())
    result = check(metrics, GATE, **arguments)
    assert not result["passed"]
    assert [c["name"] for c in result["checks"] if not c["passed"]] == [name]
    assert len(result["reasons"]) == 1
    assert text in result["reasons"][0]
    json.dumps(result, allow_nan=False)


def test_bounds_are_inclusive():
    result = check(figures(low=0.1, bound=0.8), GATE, parity=1e-4, paired={"difference": -0.01})
    assert result["passed"]


def test_without_an_interval_only_a_floor_at_chance_is_met():
    few = figures(low=None, reason="9 malignant lesions: under 20, no interval is worth printing")
    refused = check(few, dataclasses.replace(GATE, sensitivity_floor=0.0))
    assert not refused["passed"]
    assert "no interval (9 malignant lesions" in refused["reasons"][0]
    assert "can't be shown" in refused["reasons"][0]
    assert check(few, Gate(pauc_floor=0.02))["passed"]


def test_an_unasked_sensitivity_is_not_checked():
    result = check(figures(bound=0.1), dataclasses.replace(GATE, sensitivity_floor=0.0))
    assert result["passed"]
    assert [c["name"] for c in result["checks"]] == ["pauc_floor"]
