"""Whether a model may be exported and deployed: every check with its figure, its bound and a sentence.

result = check(metrics, recipe.gate, parity=3e-6, paired=difference_to_the_incumbent)
if not result["passed"]: raise GateRefused("; ".join(result["reasons"]))
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lesionflow.recipe import Gate


def check(
    metrics: Mapping[str, Any],
    gate: Gate,
    *,
    parity: float | None = None,
    paired: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """{"passed", "reasons", "checks": [{"name", "value", "bound", "passed", "text"}]}.

    `metrics` is the content of metrics.json, `paired` that of `paired.paired_difference(y, ours, incumbent)`,
    `parity` the largest logit difference between torch and the exported graph; None leaves a check out.
    """
    checks = [_floor(metrics, gate.pauc_floor)]
    if gate.sensitivity_floor > 0:
        checks.append(_sensitivity(metrics, gate.sensitivity_floor))
    if paired is not None:
        checks.append(_difference(paired, gate.delta))
    if parity is not None:
        checks.append(_parity(parity, gate.parity))
    reasons = [one["text"] for one in checks if not one["passed"]]
    return {"passed": not reasons, "reasons": reasons, "checks": checks}


def _floor(metrics: Mapping[str, Any], floor: float) -> dict[str, Any]:
    pauc = metrics["pauc"]
    figure = pauc[metrics.get("headline", "rank_pooled")]
    interval = figure.get("interval") or {}
    low, what = interval.get("low"), f"pAUC {figure['value']:.4f}"
    if low is not None:
        passed = low >= floor
        relation = "is not under" if passed else "is under"
        text = f"{what}: the lower bound {low:.4f} {relation} the floor {floor:.4f}"
        return _one("pauc_floor", low, floor, passed, text)
    # Without an interval nothing is shown, so only a floor that asks for no more than a coin can be met.
    chance = pauc.get("chance", 0.02)
    passed = floor <= chance
    reason = interval.get("reason") or "no interval was computed"
    meaning = (
        f"a floor of {floor:.4f} asks for no more than chance" if passed else f"the floor {floor:.4f} can't be shown"
    )
    return _one("pauc_floor", None, floor, passed, f"{what} has no interval ({reason}); {meaning}")


def _sensitivity(metrics: Mapping[str, Any], floor: float) -> dict[str, Any]:
    served = metrics.get("served") or {}
    refer = served.get("thresholds", {}).get("refer")
    if refer is None:
        reason = served.get("reason") or "metrics hold no refer threshold"
        return _one("sensitivity_floor", None, floor, False, f"sensitivity of what is served can't be shown: {reason}")
    low = refer["lower_bound"]
    passed = low >= floor
    relation = "is not under" if passed else "is under"
    what = f"sensitivity {refer['sensitivity']:.3f} of the served band refer"
    text = f"{what}: its lower bound {low:.3f} {relation} the floor {floor:.3f}"
    return _one("sensitivity_floor", low, floor, passed, text)


def _difference(paired: Mapping[str, Any], delta: float) -> dict[str, Any]:
    value, low, high = paired["difference"], paired.get("low"), paired.get("high")
    passed = value >= -delta
    span = "no interval" if low is None or high is None else f"interval {low:+.4f} to {high:+.4f}"
    relation = "is not below" if passed else "is below"
    text = f"pAUC difference to the incumbent {value:+.4f} ({span}) {relation} {-delta:+.4f}"
    return _one("incumbent", value, -delta, passed, text)


def _parity(parity: float, bound: float) -> dict[str, Any]:
    passed = parity <= bound
    relation = "is within" if passed else "exceeds"
    return _one(
        "parity", parity, bound, passed, f"largest logit difference after export {parity:.2g} {relation} {bound:g}"
    )


def _one(name: str, value: float | None, bound: float, passed: bool, text: str) -> dict[str, Any]:
    finite = value if value is None or math.isfinite(value) else None  # A NaN has failed already, and isn't JSON.
    return {"name": name, "value": finite, "bound": bound, "passed": bool(passed), "text": text}
