"""A metrics.json of schema 2 with everything in it, for what shows figures: invented numbers of a plausible run.

`metrics()` has it all; `metrics(kind="institution")` is a split by institution; `bare()` has few malignant lesions
and no hold-out, so that most figures are only a reason. `oof()` is a table to draw curves from.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

LEVEL = 0.95
FEW = "12 malignant lesions: under 20, no interval is worth printing"
PATIENTS = "patient-clustered bootstrap-t, logit scale"
GROUPS = {
    "kind": "patient", "clusters": 812, "patients": 812, "lesions_with_patient": 24_310, "lesions_without_patient": 0,
    "note": "Intervals draw the 812 patients with replacement.",
}  # fmt: skip
SITES = ("Clinic of the North", "Harbour Hospital", "Valley Dermatology", "St Anna", "others together")


def figure(value: float | None, low: float | None = None, high: float | None = None, **changes: Any) -> dict[str, Any]:
    """A `intervals.Figure` as it stands in the file."""
    interval = {
        "low": low, "high": high, "level": LEVEL, "method": PATIENTS, "replicates": 0 if low is None else 2000,
        "dropped": 0, "clusters": 812, "malignant": 310, "reason": FEW if low is None else None,
    }  # fmt: skip
    return {"value": value, "interval": interval | changes}


def missing(reason: str = FEW) -> dict[str, Any]:
    return figure(None, reason=reason)


def around(value: float, relative: float = 0.1, **changes: Any) -> dict[str, Any]:
    """A figure with an interval a little wider below than above."""
    return figure(value, value * (1 - 1.2 * relative), value * (1 + relative), **changes)


def ways(value: float, relative: float, top: float = 1.0) -> dict[str, Any]:
    """The three ways to join folds."""
    result = {}
    for name, shift in (("rank_pooled", 1.0), ("pooled", 0.985), ("mean_of_folds", 1.012)):
        at = value * shift
        result[name] = figure(at, at * (1 - 1.2 * relative), min(top, at * (1 + relative)))
    result["mean_of_folds"]["sd"] = value * 0.06
    return result


def metrics(kind: str = "patient") -> dict[str, Any]:
    """Everything: 24,310 lesions, 310 of them malignant, five folds and a hold-out."""
    names = list(SITES) if kind == "institution" else None
    return {
        "schema": 2,
        "settings": {
            "replicates": 2000, "seed": 0, "level": LEVEL,
            "sensitivity": 0.9, "low_sensitivity": 0.95, "prevalence": 0.00098,
        },
        "counts": {"lesions": 24_310, "malignant": 310, "benign": 24_000, "folds": 5, "prevalence": 310 / 24_310},
        "groups": dict(GROUPS),
        "split": {"kind": kind, "names": names, "holdout": 6_060},
        "fold_hash": "f" * 64,
        "headline": "rank_pooled",
        "pauc": {
            "min_tpr": 0.8, "maximum": 0.2, "chance": 0.02, **ways(0.1482, 0.06, 0.2),
            "folds": [_fold(i, names[i] if names else None) for i in range(5)],
        },
        "pauc_88": {"min_tpr": 0.88, "maximum": 0.12, "chance": 0.0072, **ways(0.0781, 0.08, 0.12)},
        "auc": ways(0.9312, 0.012),
        "average_precision": {"chance": 310 / 24_310, **ways(0.2417, 0.16)},
        "retrieval": {
            "k": 15, **around(0.712, 0.08), "patients": 201, "malignant": 310, "lesions": 24_310,
            "patients_with_k_lesions_or_fewer": 96,
        },
        "operating": operating(1.0),
        "calibration": assessment(0.04),
        "decision_curve": decision(),
        "thresholds": {
            "refer": {
                "value": -1.4183, "target": 0.9, "reached": True, "sensitivity": 0.9355, "lower_bound": 0.9031,
                "specificity": around(0.7214, 0.03), "level": 0.95,
                "method": "one-sided Clopper-Pearson, effective sample size by patient",
                "malignant": 310, "malignant_clusters": 201, "reason": None, "scale": "pooled logit",
            }
        },
        "subgroup_threshold": {"sensitivity": 0.9, "score": 0.8213},
        "subgroups": subgroups(),
        "leaks": {
            "patients_in_two_folds": 0, "fold_hash_checked": True,
            "exact_duplicates": {
                "count": 1, "checked": 24_310, "pairs": [_pair("ISIC_0000117", "ISIC_0731142", 0, 3, 0, 0, False)],
            },
            "near_duplicates": {
                "count": 2, "checked": 24_310, "reason": None,
                "pairs": [
                    _pair("ISIC_0001442", "ISIC_0001907", 1, 2, 0, 0, False),
                    _pair("ISIC_0093221", "ISIC_0412009", -1, 4, 1, 1, None),
                ],
            },
        },
        "probability": {
            "kind": "logistic", "a": 0.9312, "b": -4.117, "prevalence": 0.00098, "data_prevalence": 78 / 6_060,
            "lesions": 6_060, "malignant": 78, "fitted_on": "holdout", "covariance": [[0.011, 0.003], [0.003, 0.024]],
        },
        "served": served(),
        "modes": modes(),
    }  # fmt: skip


WORTH = {"image": 0.1301, "record": 0.1342, "visit": 0.1391, "image_record": 0.1442, "image_visit": 0.1482}
STEPS = (
    ("record", "image", "image_record"), ("context", "image_record", "image_visit"),
    ("image", "visit", "image_visit"), ("context", "record", "visit"), ("stack", "visit", "image_visit"),
)  # fmt: skip


def modes() -> dict[str, Any]:
    """Five ways to score a lesion; what is served is the figures' own `rank_pooled` and hold-out."""
    kept, each = served(), {}
    for i, (name, value) in enumerate(WORTH.items()):
        last = name == "image_visit"
        each[name] = {
            "out_of_fold": {"pauc": around(value, 0.06), "auc": around(0.89 + value / 4, 0.012)},
            "holdout": {"pauc": around(value + 0.004, 0.1), "auc": around(0.892 + value / 4, 0.02)},
            "difference": None if last else {
                "out_of_fold": _gap(value - WORTH["image_visit"], 0.008),
                "holdout": _gap(value - WORTH["image_visit"] + 0.001, 0.017),
            },
            "probability": {
                "kind": "logistic", "a": 0.9 + i / 50, "b": -4.2, "prevalence": 0.00098, "data_prevalence": 78 / 6_060,
                "lesions": 6_060, "malignant": 78, "fitted_on": "holdout",
                "covariance": [[0.011, 0.003], [0.003, 0.024]],
            },
            "thresholds": {
                band: one | {
                    "logit": one["logit"] + 0.01 * i,
                    "specificity": around(one["specificity"]["value"] - 0.02 * (4 - i), 0.04),
                }
                for band, one in kept["thresholds"].items()
            },
        }  # fmt: skip
    adds = [
        {"block": block, "from": a, "to": b, "out_of_fold": _gap(WORTH[b] - WORTH[a], 0.007),
         "holdout": _gap(WORTH[b] - WORTH[a] - 0.001, 0.016)}
        for block, a, b in STEPS
    ]  # fmt: skip
    return {"served": "image_visit", "each": each, "adds": adds}


def _gap(value: float, reach: float) -> dict[str, Any]:
    return figure(value, value - reach, value + reach) | {"p_better": 0.5 + math.erf(1.4 * value / reach) / 2}


def tabular() -> dict[str, Any]:
    """What the trees look at: 24 features of four blocks, and how five folds joined them."""
    shares = [1 / (i + 2) for i in range(24)]
    blocks = ("plain", "derived", "context", "neighbours")
    ways = ("trees", "linear", "trees", "rank", "trees")
    return {
        "importances": [
            {"name": f"tbp_lv_radial_color_std_max_{i}", "block": blocks[i % 4], "share": share / sum(shares),
             "why": "odd & rare"}
            for i, share in enumerate(shares)
        ],
        "choices": {"image_visit": [{"fold": i, "method": way, "pauc": {way: 0.1}} for i, way in enumerate(ways)]},
        "members": {"lightgbm": 3, "catboost": 1, "xgboost": 0},
        "blocks": list(blocks),
        "missing": "refuse",
    }  # fmt: skip


def bare() -> dict[str, Any]:
    """Twelve malignant lesions of unknown patients, no hold-out: values without intervals, and reasons."""
    found = metrics()
    found["counts"] |= {"lesions": 412, "malignant": 12, "benign": 400, "folds": 3, "prevalence": 12 / 412}
    found["groups"] = {
        "kind": "lesion", "clusters": 412, "patients": 0, "lesions_with_patient": 0, "lesions_without_patient": 412,
        "note": "No patient is known, so intervals draw single lesions and are not patient-clustered: "
        "lesions of one patient are alike, and the true uncertainty is larger.",
    }  # fmt: skip
    found["split"] = {"kind": "patient", "names": None, "holdout": 0}
    for name in ("pauc", "pauc_88", "auc", "average_precision"):
        for way in ("rank_pooled", "pooled", "mean_of_folds"):
            found[name][way] = figure(found[name][way]["value"])
        found[name]["mean_of_folds"] |= {"value": None, "sd": None}
    found["pauc"]["folds"] = [
        {"fold": i, "name": None, "lesions": 137, "malignant": 4, "groups": 137, **figure(0.1 + 0.02 * i)}
        for i in range(3)
    ]
    found["retrieval"] |= missing("the patient of no lesion is known") | {"patients": 0, "malignant": 0, "lesions": 0}
    found["retrieval"]["patients_with_k_lesions_or_fewer"] = 0
    for one in found["operating"]:
        one |= {name: figure(one[name]["value"]) for name in ("specificity", "reviewed_per_cancer")}
        one["flagged_per_patient"] = missing("the patient of no lesion is known")
        one["within_patient"] = {"k": None, "reviewed_per_cancer": missing("the patient of no lesion is known")}
    found["calibration"] = {
        "prevalence": 0.00098, "data_prevalence": 12 / 412, "bins": [], "reason": FEW,
        **{name: missing() for name in ("intercept", "slope", "ece", "brier", "log_loss", "expected_observed")},
    }  # fmt: skip
    found["decision_curve"] |= {"low": None, "high": None, "reason": FEW}
    found["thresholds"]["refer"] |= {
        "value": -2.9, "reached": False, "sensitivity": 1.0, "lower_bound": 0.779, "malignant": 12,
        "malignant_clusters": 12,
        "reason": "finding every malignant lesion of 12 patients vouches for a sensitivity of 0.779 at most; "
        "0.9 takes at least 29",
    }  # fmt: skip
    for one in found["subgroups"]:
        for cell in one["cells"]:
            cell |= {name: missing() for name in ("pauc", "auc", "sensitivity", "difference")}
    found["leaks"]["exact_duplicates"] = {"count": 0, "checked": 412, "pairs": []}
    found["leaks"]["near_duplicates"] = {"count": None, "pairs": [], "checked": 0, "reason": "not asked for"}
    found["probability"] |= {"lesions": 412, "malignant": 12, "fitted_on": "out-of-fold", "covariance": None}
    found["served"] = {"reason": "no lesions were held out: set folds.holdout, such as 0.2"}
    nothing = {"reason": "no patients were set aside (folds.holdout = 0)"}
    for one in found["modes"]["each"].values():
        one |= {"out_of_fold": {"pauc": figure(0.11), "auc": figure(0.88)}, "holdout": nothing, "thresholds": None}
        one["difference"] = one["difference"] and {
            "out_of_fold": figure(-0.01) | {"p_better": None}, "holdout": nothing
        }  # fmt: skip
        one["probability"] = one["probability"] | {"fitted_on": "out-of-fold"}
    for one in found["modes"]["adds"]:
        one |= {"out_of_fold": figure(0.01) | {"p_better": None}, "holdout": nothing}
    return found


def operating(better: float) -> list[dict[str, Any]]:
    rows = []
    for sensitivity, score, specificity, reviewed, flagged, k, within in (
        (0.8, 0.9121, 0.912, 112.1, 2.64, 21, 148.0),
        (0.9, 0.8213, 0.821, 202.7, 5.37, 44, 331.4),
        (0.95, 0.7004, 0.700, 322.9, 9.02, 97, 702.2),
    ):
        rows.append({
            "sensitivity": sensitivity, "score": score, "specificity": around(specificity, 0.03),
            "reviewed_per_cancer": around(reviewed / better, 0.2), "flagged_per_patient": around(flagged, 0.15),
            "within_patient": {"k": k, "reviewed_per_cancer": around(within, 0.18)},
        })  # fmt: skip
    return rows


def assessment(off: float) -> dict[str, Any]:
    """A reliability curve from 1 in 100,000 to 1 in 10, with nothing malignant in the lowest bins."""
    edges = np.geomspace(1e-5, 0.3, 11)
    bins = []
    for i, (low, high) in enumerate(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)):
        predicted = math.sqrt(low * high)
        observed = predicted * (1 + off * (i - 4))
        malignant = 0 if i < 2 else 5 + 6 * i
        seen = (
            figure(0.0, 0.0, 2 * predicted, malignant=0)
            if not malignant
            else figure(observed, observed * 0.55, observed * 1.6, malignant=malignant)
        )
        bins.append({
            "low": low, "high": high, "lesions": 2431, "malignant": malignant, "share": 0.1, "predicted": predicted,
            "observed": seen,
        })  # fmt: skip
    return {
        "prevalence": 0.00098,
        "data_prevalence": 310 / 24_310,
        "intercept": figure(off, off - 0.16, off + 0.15),
        "slope": figure(1 - off, 0.86, 1.09),
        "ece": figure(0.00021, 0.00009, 0.00041),
        "brier": figure(0.000941, 0.000928, 0.000953),
        "log_loss": figure(0.00562, 0.00528, 0.00601),
        "expected_observed": figure(1 - off, 0.85, 1.14),
        "bins": bins,
        "reason": None,
    }


def decision() -> dict[str, Any]:
    prevalence = 0.00098
    probability = np.geomspace(prevalence / 20, prevalence * 50, 41)
    odds = probability / (1 - probability)
    treat_all = prevalence - (1 - prevalence) * odds
    found = 1 / (1 + (probability / 0.012) ** 0.8)
    flagged = 0.6 * np.exp(-np.sqrt(probability / prevalence) * 1.4)
    benefit = np.maximum(prevalence * found - (1 - prevalence) * flagged * odds, treat_all)
    spread = 0.12 * prevalence * np.sqrt(found)
    return {
        "prevalence": prevalence,
        "probability": probability.tolist(),
        "net_benefit": benefit.tolist(),
        "low": (benefit - spread).tolist(),
        "high": (benefit + spread).tolist(),
        "treat_all": treat_all.tolist(),
        "level": LEVEL,
        "method": "patient-clustered bootstrap, pointwise percentile",
        "reason": None,
    }


def subgroups() -> list[dict[str, Any]]:
    proxy = (
        "Individual typology angle of the skin beside the lesion: a proxy from the photograph's lightness. It depends "
        "on lighting and camera and is not a person's skin type."
    )
    return [
        _partition("sex", "Sex", "", [("female", 9_800, 96), ("male", 14_130, 212), ("unknown", 380, 2)]),
        _partition(
            "age", "Age, years", "",
            [("under 40", 3_900, 11), ("40-59", 9_700, 92), ("60-74", 8_100, 143), ("75 and over", 2_300, 64),
             ("unknown", 310, 0)],
        ),
        _partition(
            "site", "Site", "",
            [("anterior torso", 6_100, 71), ("head/neck", 900, 58), ("lower extremity", 6_200, 61),
             ("posterior torso", 7_400, 74), ("upper extremity", 3_600, 44), ("unknown", 110, 2)],
        ),
        {"name": "tile", "title": "Tile type", "note": "", "cells": [], "reason": "no column tbp_tile_type"},
        _partition("tone", "Skin tone, a proxy", proxy,
                   [("very light", 7_100, 112), ("light", 9_900, 121), ("intermediate", 5_200, 61), ("tan", 1_700, 14),
                    ("brown", 410, 2), ("dark", 0, 0)]),
    ]  # fmt: skip


def served() -> dict[str, Any]:
    def band(logit: float, target: float, sensitivity: float, bound: float, specificity: float) -> dict[str, Any]:
        return {
            "logit": logit, "target": target, "reached": True, "sensitivity": sensitivity, "lower_bound": bound,
            "specificity": around(specificity, 0.03), "level": 0.95,
            "method": "one-sided Clopper-Pearson, effective sample size by patient",
            "malignant": 78, "malignant_clusters": 51, "reason": None,
        }  # fmt: skip

    def kept(lesions: int, malignant: int, share: float, at: float) -> dict[str, Any]:
        return {
            "lesions": lesions,
            "malignant": malignant,
            "share": around(share, 0.07),
            "share_at_prevalence": around(at, 0.07),
        }

    small = {"clusters": 203, "malignant": 78}
    return {
        "counts": {"lesions": 6_060, "malignant": 78, "benign": 5_982, "prevalence": 78 / 6_060},
        "groups": GROUPS | {"clusters": 203, "patients": 203, "lesions_with_patient": 6_060,
                            "note": "Intervals draw the 203 patients with replacement."},
        "pauc": figure(0.1521, 0.1302, 0.1688, **small),
        "pauc_88": figure(0.0804, 0.0611, 0.0952, **small),
        "auc": figure(0.9370, 0.9102, 0.9561, **small),
        "average_precision": figure(0.2611, 0.171, 0.372, **small),
        "retrieval": {
            "k": 15, **figure(0.731, 0.604, 0.836, **small), "patients": 51, "malignant": 78, "lesions": 6_060,
            "patients_with_k_lesions_or_fewer": 24,
        },
        "operating": operating(1.1),
        "calibration": assessment(0.02),
        "decision_curve": decision(),
        "thresholds": {
            "refer": band(-1.61, 0.9, 0.9615, 0.9043, 0.6512),
            "low": band(-2.40, 0.95, 0.9872, 0.9510, 0.4133),
        },
        "bands": {
            "refer": kept(2161, 75, 0.3566, 0.3494),
            "routine": kept(1424, 2, 0.2350, 0.2377),
            "low": kept(2461, 1, 0.4061, 0.4106),
            "cannot judge": kept(14, 0, 0.0023, 0.0023),
        },
    }  # fmt: skip


def oof(malignant: int = 60, benign: int = 1200, folds: int = 5, seed: int = 0) -> Any:
    """An out-of-fold table (the columns that every one has); curves are drawn from it."""
    import polars as pl

    rng = np.random.default_rng(seed)
    n = malignant + benign
    y = np.repeat([1, 0], [malignant, benign]).astype(np.int8)
    return pl.DataFrame({
        "isic_id": [f"ISIC_{i:07d}" for i in range(n)],
        "patient_group": [f"IP_{i % 80:04d}" for i in range(n)],
        "target": y,
        "fold": (np.arange(n) % 80 % folds).astype(np.int16),
        "logit": (rng.normal(0, 1, n) + 2.1 * y - 2).astype(np.float32),
        "fold_hash": ["f" * 64] * n,
    })  # fmt: skip


def context() -> dict[str, Any]:
    """What the report is told beside the figures."""
    from lesionflow.recipe import Recipe

    recipe = Recipe(name="baseline <i>", description="A test & more.")
    return {
        "recipe": recipe.to_dict(),
        "recipe_toml": recipe.to_toml(),
        "data_hash": "d" * 64,
        "fold_hash": "f" * 64,
        "synthetic": True,
        "data_licence": "CC-BY (24,300 lesions), CC-0 (10)",
        "versions": {"lesionflow": "9.9", "numpy": "2.0"},
        "gate": {
            "passed": False,
            "reasons": ["pAUC 0.1482: the lower bound 0.1375 is under the floor 0.1900"],
            "checks": [
                {"name": "pauc_floor", "value": 0.1375, "bound": 0.19, "passed": False,
                 "text": "pAUC 0.1482: the lower bound 0.1375 is under the floor 0.1900"},
                {"name": "sensitivity_floor", "value": 0.903, "bound": 0.85, "passed": True,
                 "text": "sensitivity 0.935: its lower bound 0.903 is not under the floor 0.850"},
            ],
        },
        "curves": [
            {"fold": f, "model": 0, "epoch": e, "loss": 1.2 / (1 + e) + 0.03 * f,
             "pauc": 0.02 + 0.13 * (1 - 0.7**e) + 0.004 * f if e % 2 else None}
            for f in range(5) for e in range(9)
        ],
        "tabular": tabular(),
        "explain": explain(),
    }  # fmt: skip


def explain() -> dict[str, Any]:
    """The deletion test: how far the logit falls when a fifth of the crop is painted over."""
    return {
        "share": 0.2,
        "lesions": 64,
        "highest": figure(1.91, 1.62, 2.22),
        "random": figure(0.62, 0.44, 0.81),
        "lowest": figure(0.11, -0.03, 0.26),
        "another": figure(0.91, 0.7, 1.13),
        "difference": figure(1.29, 1.02, 1.58),
        "difference_lowest": figure(1.80, 1.49, 2.13),
        "difference_another": figure(1.0, 0.74, 1.27),
    }


def gallery() -> list[dict[str, Any]]:
    """Two entries with one-pixel pictures."""
    pixel = (
        "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk"
        "+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
    )
    shared = {
        "attribution": "A. Clinic",
        "licence": "CC-BY",
        "image": pixel,
        "probability": 0.0004,
        "band": "low",
        "doubts": [],
        "origin": "hold-out",
    }
    return [
        {"isic_id": "ISIC_0000001", "kind": "missed", "logit": -3.1, "overlay": pixel,
         "sentence": "Malignant, yet 5,411 of 5,982 benign lesions score higher."} | shared,
        {"isic_id": "ISIC_0000002", "kind": "false alarm", "logit": 2.2, "overlay": None,
         "sentence": "Benign, yet 77 of 78 malignant lesions score lower."} | shared,
    ]  # fmt: skip


def _fold(index: int, name: str | None) -> dict[str, Any]:
    value = 0.1482 + 0.009 * (index - 2)
    one = figure(value, value - 0.028, min(0.2, value + 0.019), malignant=62, clusters=162)
    return {"fold": index, "name": name, "lesions": 4862, "malignant": 62, "groups": 162, **one}


def _pair(a: str, b: str, fold_a: int, fold_b: int, y_a: int, y_b: int, same: bool | None) -> dict[str, Any]:
    return {"ids": [a, b], "folds": [fold_a, fold_b], "targets": [y_a, y_b], "same_patient": same}


def _partition(name: str, title: str, note: str, cells: list[tuple[str, int, int]]) -> dict[str, Any]:
    shown = [_cell(*cell) for cell in cells]
    compared = sum(one["difference"]["value"] is not None for one in shown)
    note = f"{note} {compared} of 13 comparisons over all partitions, not corrected for their number.".strip()
    return {"name": name, "title": title, "note": note, "cells": shown}


def _cell(label: str, lesions: int, malignant: int) -> dict[str, Any]:
    shown: dict[str, Any] = {"label": label, "lesions": lesions, "malignant": malignant, "groups": lesions // 30}
    if malignant < 20:
        few = missing(f"{malignant} malignant lesions: under 20, no interval is worth printing")
        shown |= {"pauc": few, "auc": few, "sensitivity": few, "difference": few}
    else:
        shift = 0.12 * ((len(label) * 7 + malignant) % 11 - 5) / 11
        wide = 1.2 / math.sqrt(malignant)
        value = 0.1482 * (1 + shift)
        shown |= {
            "pauc": figure(value, value * (1 - wide), min(0.2, value * (1 + 0.8 * wide)), malignant=malignant),
            "auc": figure(0.93 + shift / 10, 0.93 - wide / 4, min(1.0, 0.93 + wide / 5), malignant=malignant),
            "sensitivity": figure(0.93 + shift / 5, 0.93 - wide / 2, min(0.995, 0.95 + wide / 6), malignant=malignant),
            "difference": figure(0.1482 * shift, 0.1482 * (shift - 1.1 * wide), 0.1482 * (shift + wide)),
        }
    shown["specificity"] = (
        around(0.72 + 0.01 * (len(label) % 5), 0.03) if lesions > malignant else missing("no benign lesions")
    )
    return shown
