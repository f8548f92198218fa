"""Boosted trees' text, checked before a native library sees it.

    checked = lightgbm(text)        # or catboost, xgboost
    checked.names                   # [F]
    checked.text                    # what may be given to the library

The libraries trust what they read: a child's index that is out of range is memory of somebody else, and a circle of
children never ends. So every index, length and number that scoring follows is checked here. What scoring doesn't
need (the settings of the training, say) is not handed on: LightGBM's text is cut behind its trees, and the JSON of
the others is written anew from what was checked. Scores and contributions are the same to the last bit.

Only what `boosters` itself trains can be read: one output, no categories, no linear leaves. All functions raise
`ValueError` saying where the damage is; `boosters.read` adds the file.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

MOST_TREES = 20_000
"""As a recipe's `tabular.rounds`."""
MOST_LEAVES = 1024
"""As a recipe's `tabular.leaves`."""
MOST_DEPTH = 16
"""Of CatBoost's trees."""
MOST_BORDERS = 254
"""Of one of CatBoost's features: it writes no more than this."""
_SINGLE = 3.4028235e38
"""Largest number in single precision."""
_LEAST_WEIGHT = 1e-12
"""Of one of XGBoost's nodes: `min_leaf` keeps trained ones far above."""

_END = b"end of trees\n"
_HEADER = re.compile(
    rb"tree\nversion=v4\nnum_class=1\nnum_tree_per_iteration=1\nlabel_index=0\nmax_feature_idx=(\d{1,6})\n"
    rb"objective=binary sigmoid:1\nfeature_names=([^\n]+)\nfeature_infos=([!-~ ]+)\ntree_sizes=([\d ]+)\n\n"
)
_COUNTS = ("split_feature", "decision_type", "left_child", "right_child", "leaf_count", "internal_count")
_KEYS = (
    "split_feature", "split_gain", "threshold", "decision_type", "left_child", "right_child", "leaf_value",
    "leaf_weight", "leaf_count", "internal_value", "internal_weight", "internal_count",
)  # fmt: skip
_SIGNS = dict.fromkeys(_KEYS, r"-+.\de ") | dict.fromkeys(_COUNTS, r"-\d ") | {"threshold": r"-+.\deinf "}
"""What numbers are made of. A threshold may be `inf`: it tells known from unknown."""
_LISTS = "".join(f"{key}=([{_SIGNS[key]}]*)\n" for key in _KEYS)
_TREE = re.compile(
    rb"Tree=(\d{1,6})\nnum_leaves=(\d{1,6})\nnum_cat=0\n%b"
    rb"is_linear=0\nshrinkage=\d+(?:\.\d+)?(?:e-\d+)?\n\n\n" % _LISTS.encode()
)
_DECISIONS = {0, 2, 8, 10}
"""LightGBM's bits: 2, what is unknown goes left; 8, NaN is unknown. 1 would be a category, 4 a 0 that is unknown."""
_BASE_SCORE = re.compile(r"\[?(\d(?:\.\d+)?(?:E-?\d+)?)\]?")


@dataclass(frozen=True)
class Checked:
    """Text that is safe to load, and the F features that its trees know."""

    text: str
    names: tuple[str, ...]


def lightgbm(text: bytes) -> Checked:
    """LightGBM's own format, version 4."""
    header, end = _HEADER.match(text), text.find(_END)
    if end < 0:
        raise ValueError("its end is missing")
    if not header:
        raise ValueError("its header isn't that of a binary model")
    names = tuple(header[2].decode().split(" "))
    if not len(names) == len(header[3].split(b" ")) == int(header[1]) + 1:
        raise ValueError("its header lists more, or fewer, features than max_feature_idx says")
    sizes = [int(size) for size in header[4].split()]
    if len(sizes) > MOST_TREES or sum(sizes) != end - header.end():
        raise ValueError(
            f"tree_sizes: expected at most {MOST_TREES}, that add up to the trees' {end - header.end()} bytes"
        )
    at = header.end()
    for index, size in enumerate(sizes):
        found = _TREE.fullmatch(text, at, at + size)
        if not found or int(found[1]) != index:
            raise ValueError(f"tree {index}: a line is missing, out of place or holds what isn't a number")
        try:
            _lightgbm_tree(int(found[2]), dict(zip(_KEYS, found.groups()[2:], strict=True)), len(names))
        except ValueError as error:
            raise ValueError(f"tree {index}: {error}") from None
        at += size
    return Checked(text[: end + len(_END)].decode(), names)


def _lightgbm_tree(leaves: int, fields: dict[str, bytes], width: int) -> None:
    """`leaves` leaves ~0, ~1... under one internal node less, numbered so that a child comes after its parent."""
    if not 1 <= leaves <= MOST_LEAVES:
        raise ValueError(f"num_leaves: expected 1 to {MOST_LEAVES}")
    found: dict[str, list[Any]] = {}
    for key, line in fields.items():
        values: list[Any] = list(map(int if key in _COUNTS else float, line.split()))
        count = leaves if key.startswith("leaf") else leaves - 1
        # A tree that never split has no weight.
        if len(values) != count and not (leaves == 1 and key == "leaf_weight" and not values):
            raise ValueError(f"{key}: {len(values)} numbers for {leaves} leaves")
        if key != "threshold" and not all(map(math.isfinite, values)):
            raise ValueError(f"{key}: a number is infinite")
        found[key] = values
    if not set(found["decision_type"]) <= _DECISIONS:
        raise ValueError("decision_type: expected splits by a number's size")
    for key, most in (("split_feature", width), ("leaf_count", 2**31), ("internal_count", 2**31)):
        if not all(0 <= value < most for value in found[key]):
            raise ValueError(f"{key}: out of range")
    if leaves > 1:
        _check_children(found["left_child"], found["right_child"], [*range(-leaves, 0), *range(1, leaves - 1)])


def _check_children(left: Sequence[int], right: Sequence[int], expected: Sequence[int]) -> None:
    """Every node but the root is the child of one that comes before it, and of no other: so they are one tree.

    `left` and `right` are those of node 0, 1...; a negative number is a leaf, or none.
    """
    if sorted([*left, *right]) != expected:
        raise ValueError("children: a node isn't the child of exactly one other, or there is no such node")
    for side in (left, right):
        if any(0 <= child <= node for node, child in enumerate(side)):
            raise ValueError("children: they go in a circle")


def catboost(text: bytes) -> Checked:
    """CatBoost's JSON of symmetric trees."""
    top = _json(text)
    features = _list(_get(top, "features_info", "float_features"), "float_features")
    names, borders, kept = [], [], []
    for index, one in enumerate(features):
        where = f"float_features[{index}]"
        names.append(_text(_get(one, "feature_id"), where))
        own = _floats(_get(one, "borders"), f"{where}.borders", most=MOST_BORDERS)
        if any(low >= high for low, high in pairwise(own)):
            raise ValueError(f"{where}.borders: expected ascending numbers")
        if _get(one, "feature_index") != index or _get(one, "flat_feature_index") != index:
            raise ValueError(f"{where}: out of place")
        nan = _get(one, "nan_value_treatment")
        if type(has_nans := _get(one, "has_nans")) is not bool or nan not in ("AsIs", "AsFalse", "AsTrue"):
            raise ValueError(f"{where}: has_nans or nan_value_treatment is none")
        borders += [(index, border) for border in own]
        kept.append(
            {"borders": own, "feature_id": names[-1], "feature_index": index, "flat_feature_index": index,
             "has_nans": has_nans, "nan_value_treatment": nan}
        )  # fmt: skip
    trees = _list(_get(top, "oblivious_trees"), "oblivious_trees", most=MOST_TREES)
    scale, bias = _list(_get(top, "scale_and_bias"), "scale_and_bias", count=2)
    if scale != 1:
        raise ValueError("scale_and_bias: expected a scale of 1")
    anew = {
        "features_info": {"float_features": kept},
        "oblivious_trees": [_catboost_tree(tree, f"oblivious_trees[{i}]", borders) for i, tree in enumerate(trees)],
        "scale_and_bias": [1, _floats(bias, "bias", count=1)],
    }
    return Checked(json.dumps(anew), tuple(names))


def _catboost_tree(tree: Any, where: str, borders: Sequence[tuple[int, float]]) -> dict[str, Any]:
    """Every split is one of all features' borders, by its place among them; a leaf for each way to answer all."""
    splits = []
    for split in _list(_get(tree, "splits") or [], f"{where}.splits", most=MOST_DEPTH, fewest=0):
        place = _ints([_get(split, "split_index")], f"{where}.split_index", 0, len(borders), 1)[0]
        feature, border = borders[place]
        if (_get(split, "split_type"), _get(split, "float_feature_index"), _get(split, "border")) != (
            "FloatFeature", feature, border,
        ):  # fmt: skip
            raise ValueError(f"{where}.splits: not the feature's border number {place}")
        splits.append(
            {"border": border, "float_feature_index": feature, "split_index": place, "split_type": "FloatFeature"}
        )
    values, weights = (
        _floats(_get(tree, key), f"{where}.{key}", count=2 ** len(splits)) for key in ("leaf_values", "leaf_weights")
    )
    if min(weights) < 0:
        raise ValueError(f"{where}.leaf_weights: under 0")
    return {"leaf_values": values, "leaf_weights": weights, "splits": splits or None}


def xgboost(text: bytes) -> Checked:
    """XGBoost's JSON of a binary model."""
    top = _json(text)
    learner, version = _get(top, "learner"), _ints(_get(top, "version"), "version", 0, 1000, 3)
    names = tuple(_text(name, "feature_names") for name in _list(_get(learner, "feature_names"), "feature_names"))
    booster, parameters = _get(learner, "gradient_booster"), _get(learner, "learner_model_param")
    objective = _get(learner, "objective", "name")
    if (_get(booster, "name"), objective) != ("gbtree", "binary:logistic"):
        raise ValueError("it isn't a binary model of trees")
    base = _text(_get(parameters, "base_score"), "base_score")
    # The share of malignant lesions.
    if not (found := _BASE_SCORE.fullmatch(base)) or not 0 < float(found[1]) < 1:
        raise ValueError("base_score: expected a number between 0 and 1")
    if _get(parameters, "num_feature") != str(len(names)):
        raise ValueError("num_feature: it isn't the number of feature_names")
    trees = _list(_get(booster, "model", "trees"), "trees", most=MOST_TREES)
    count = str(len(trees))
    if _get(booster, "model", "gbtree_model_param", "num_trees") != count:
        raise ValueError("num_trees: it isn't the number of trees")
    model = {
        "cats": {"enc": [], "feature_segments": [], "sorted_idx": []},
        "gbtree_model_param": {"num_parallel_tree": "1", "num_trees": count},
        "iteration_indptr": list(range(len(trees) + 1)),
        "tree_info": [0] * len(trees),
        "trees": [_xgboost_tree(tree, index, len(names)) for index, tree in enumerate(trees)],
    }
    anew = {
        "learner": {
            "attributes": {}, "feature_names": names, "feature_types": [],
            "gradient_booster": {"model": model, "name": "gbtree"},
            "learner_model_param": {
                "base_score": base, "boost_from_average": "0", "num_class": "0", "num_feature": str(len(names)),
                "num_target": "1",
            },
            "objective": {"name": objective, "reg_loss_param": {"scale_pos_weight": "1"}},
        },
        "version": version,
    }  # fmt: skip
    return Checked(json.dumps(anew), names)


def _xgboost_tree(tree: Any, index: int, width: int) -> dict[str, Any]:
    """Nodes 0, 1..., leaves among them, numbered so that a child comes after its parent; a leaf's children are -1."""
    where = f"trees[{index}]"
    parameters = _get(tree, "tree_param")
    left = _ints(_get(tree, "left_children"), f"{where}.left_children", -1, 2 * MOST_LEAVES - 1)
    count = len(left)
    right = _ints(_get(tree, "right_children"), f"{where}.right_children", -1, count, count)
    if [child < 0 for child in left] != [child < 0 for child in right]:
        raise ValueError(f"{where}: a node has one child only")
    try:
        _check_children(left, right, [-1] * (2 * left.count(-1)) + list(range(1, count)))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    parents = [2**31 - 1] * count
    for side in (left, right):
        for node, child in enumerate(side):
            if child >= 0:
                parents[child] = node
    if _get(parameters, "num_nodes") != str(count) or _get(parameters, "num_feature") != str(width):
        raise ValueError(f"{where}.tree_param: it isn't of {count} nodes and {width} features")
    if any(_ints(_get(tree, "split_type"), f"{where}.split_type", 0, 1, count)):
        raise ValueError(f"{where}.split_type: expected splits by a number's size")
    numbers = {
        key: _floats(_get(tree, key), f"{where}.{key}", count=count, limit=_SINGLE)
        for key in ("base_weights", "loss_changes", "split_conditions", "sum_hessian")
    }
    # Contributions divide by it; not those of a tree that never split, whose weight may vanish.
    weights = numbers["sum_hessian"]
    light = min(weights) < (_LEAST_WEIGHT if count > 1 else 0)
    if light or any(weights[i] > 1.01 * weights[parents[i]] for i in range(1, count)):
        raise ValueError(f"{where}.sum_hessian: a node weighs nothing, or more than its parent")
    return {
        "categories": [], "categories_nodes": [], "categories_segments": [], "categories_sizes": [],
        "default_left": _ints(_get(tree, "default_left"), f"{where}.default_left", 0, 2, count),
        "id": index, "left_children": left, "right_children": right, "parents": parents, "split_type": [0] * count,
        "split_indices": _ints(_get(tree, "split_indices"), f"{where}.split_indices", 0, width, count), **numbers,
        "tree_param": {
            "num_deleted": "0", "num_feature": str(width), "num_nodes": str(count), "size_leaf_vector": "1",
        },
    }  # fmt: skip


def _json(text: bytes) -> Any:
    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is no JSON number")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError:
        raise ValueError("nested too deep") from None


def _get(value: Any, *path: str) -> Any:
    for key in path:
        if not isinstance(value, dict) or key not in value:
            raise ValueError(f"{key}: missing")
        value = value[key]
    return value


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: expected a text")
    return value


def _list(value: Any, where: str, *, count: int | None = None, most: int = 1_000_000, fewest: int = 1) -> list[Any]:
    if count is not None:
        fewest = most = count
    if not isinstance(value, list) or not fewest <= len(value) <= most:
        raise ValueError(f"{where}: expected a list of {fewest if fewest == most else f'{fewest} to {most}'}")
    return value


def _ints(value: Any, where: str, low: int, high: int, count: int | None = None) -> list[int]:
    """Of low <= number < high."""
    found = _list(value, where, count=count)
    if not all(type(one) is int and low <= one < high for one in found):
        raise ValueError(f"{where}: expected whole numbers from {low} to {high - 1}")
    return found


def _floats(
    value: Any, where: str, *, count: int | None = None, most: int = 1_000_000, limit: float = 1e300
) -> list[float]:
    found = _list(value, where, count=count, most=most, fewest=0)
    if not all(type(one) in (int, float) and abs(one) <= limit for one in found):
        raise ValueError(f"{where}: expected finite numbers")
    return [float(one) for one in found]
