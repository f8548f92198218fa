"""What a native library is given: damaged or hostile text of trees is refused, and never ends the process."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lesionflow.errors import DataError
from lesionflow.models import modeltext
from lesionflow.models.boosters import KINDS, read
from lesionflow.recipe import Tabular

NAMES = ("first", "second", "third", "unknown")
FILES = {"lightgbm": "p-lightgbm-0.txt", "catboost": "p-catboost-0.json", "xgboost": "p-xgboost-0.json"}
OPTIONS = Tabular(rounds=10, learning_rate=0.1, leaves=8, columns=1.0)


def lesions(count: int = 800) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(count, 4))
    y = (2 * x[:, 0] + x[:, 1] + rng.normal(size=count) > 2).astype(np.int8)
    x[rng.random(count) < 0.2, 1] = np.nan
    x[:, 3] = np.nan
    return x, y


@pytest.fixture(scope="module")
def texts() -> dict[str, bytes]:
    x, y = lesions()
    return {kind: KINDS[kind].fit(x, y, NAMES, OPTIONS, seed=0, shift=0.5).text for kind in KINDS}


def native(kind: str, text: bytes) -> Any:
    """The library's own model of unchecked text."""
    if kind == "lightgbm":
        return importlib.import_module(kind).Booster(model_str=text.decode())
    if kind == "xgboost":
        model = importlib.import_module(kind).Booster()
        model.load_model(bytearray(text))
        return model
    model = importlib.import_module(kind).CatBoost()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "m.json").write_bytes(text)
        model.load_model(str(Path(folder) / "m.json"), format="json")
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_checked_text_scores_as_the_whole_to_the_last_bit(kind: str, texts: dict[str, bytes]) -> None:
    x, _ = lesions()
    model = KINDS[kind](texts[kind])
    found = model.margins(x), model.contributions(x), model.gains()
    checked = model._model
    model._model = native(kind, texts[kind])
    assert model._model is not checked
    for ours, theirs in zip(found, (model.margins(x), model.contributions(x), model.gains()), strict=True):
        assert np.array_equal(ours, theirs)


def test_a_tree_that_never_split_may_weigh_nothing() -> None:
    """As where nothing is left to learn: p (1 - p) ends at 0."""
    x, y = lesions()
    blank = np.full_like(x, np.nan)
    top = json.loads(KINDS["xgboost"].fit(blank, y, NAMES, OPTIONS, seed=0, shift=0.0).text)
    assert len(_tree(top)["sum_hessian"]) == 1
    _tree(top)["sum_hessian"] = [0.0]
    model = read("xgboost", json.dumps(top).encode(), FILES["xgboost"], NAMES)
    assert np.isfinite(model.margins(x)).all() and np.isfinite(model.contributions(x)).all()


def test_bounds_are_those_of_the_recipe() -> None:
    """What can be trained can be read."""
    fields = {field.name: field for field in dataclasses.fields(Tabular)}
    assert str(modeltext.MOST_TREES) in str(fields["rounds"].metadata) and modeltext.MOST_TREES == 20_000
    assert str(modeltext.MOST_LEAVES) in str(fields["leaves"].metadata) and modeltext.MOST_LEAVES == 1024


def line(key: str, new: str) -> Callable[[str], str]:
    """Replace that line of the first tree, and say its size anew."""

    def change(text: str) -> str:
        return resized(re.sub(f"(?m)^{key}=.*$", f"{key}={new}", text, count=1))

    return change


def resized(text: str) -> str:
    """LightGBM's text with `tree_sizes` as they are, as a careful attacker leaves them."""
    trees = re.findall(r"Tree=\d+\n.*?\n\n\n", text, re.S)
    return re.sub(r"(?m)^tree_sizes=.*$", "tree_sizes=" + " ".join(str(len(tree)) for tree in trees), text, count=1)


def first(text: str, key: str) -> list[str]:
    found = re.search(f"(?m)^{key}=(.*)$", text)
    assert found
    return found[1].split()


def item(key: str, place: int, new: object) -> Callable[[str], str]:
    """Replace one number of a list of the first tree."""

    def change(text: str) -> str:
        numbers = first(text, key)
        numbers[place] = str(new)
        return line(key, " ".join(numbers))(text)

    return change


def circle(text: str) -> str:
    """The last two nodes are each other's children and nobody else's; all others are a chain."""
    count = len(first(text, "left_child"))
    left = [*range(1, count - 2), -count - 1, count - 1, count - 2]
    right = range(-count, 0)
    return line("left_child", " ".join(map(str, left)))(line("right_child", " ".join(map(str, right)))(text))


LIGHTGBM = {
    "tree_sizes": (lambda t: re.sub(r"tree_sizes=\d+", "tree_sizes=99999999", t), "tree_sizes: expected at most"),
    "sizes shifted": (lambda t: re.sub(r"tree_sizes=(\d+) (\d+)", lambda m: f"tree_sizes={int(m[1]) + 9} "
                                       f"{int(m[2]) - 9}", t), "tree 0: a line is missing"),
    "feature": (item("split_feature", 0, 4), "tree 0: split_feature: out of range"),
    "huge feature": (item("split_feature", 0, 2**40), "tree 0: split_feature: out of range"),
    "leaf": (item("left_child", 0, -9), "tree 0: children: a node isn't the child of exactly one"),
    "node": (item("right_child", 0, 7), "tree 0: children: a node isn't"),
    "circle": (circle, "tree 0: children: they go in a circle"),
    "leaves": (line("num_leaves", "9"), "numbers for 9 leaves"),
    "many leaves": (line("num_leaves", "99999"), "tree 0: num_leaves"),
    "category": (item("decision_type", 0, 1), "tree 0: decision_type"),
    "infinite leaf": (item("leaf_value", 0, "1e999"), "tree 0: leaf_value: a number is infinite"),
    "nan leaf": (item("leaf_value", 0, "nan"), "tree 0: a line is missing"),
    "nan threshold": (item("threshold", 0, "nan"), "tree 0: a line is missing"),
    "linear": (line("is_linear", "1"), "tree 0: a line is missing"),
    "categories": (line("num_cat", "1"), "tree 0: a line is missing"),
    "classes": (lambda t: t.replace("num_class=1", "num_class=9", 1), "header"),
    "width": (lambda t: t.replace("max_feature_idx=3", "max_feature_idx=2"), "header lists more"),
    "names": (lambda t: t.replace("second", "other", 1), "none that is 'other' in its place"),
    "half": (lambda t: t[: len(t) // 4], "its end is missing"),
}  # fmt: skip


@pytest.mark.parametrize("name", LIGHTGBM)
def test_hostile_lightgbm_is_refused_by_its_place(name: str, texts: dict[str, bytes]) -> None:
    change, message = LIGHTGBM[name]
    text = texts["lightgbm"].decode()
    damaged = change(text)
    assert damaged != text
    with pytest.raises(DataError, match=rf"p-lightgbm-0\.txt.*{re.escape(message)}"):
        read("lightgbm", damaged.encode(), FILES["lightgbm"], NAMES)


def _tree(top: dict[str, Any]) -> dict[str, Any]:
    return top["learner"]["gradient_booster"]["model"]["trees"][0]  # type: ignore[no-any-return]


def _put(numbers: list[Any], place: int, new: Any) -> None:
    numbers[place] = new


XGBOOST = {
    "child": (lambda t: _put(_tree(t)["left_children"], 0, 999), "children: a node isn't the child of exactly one"),
    "circle": (lambda t: _put(_tree(t)["left_children"], 1, 1), "trees[0]"),
    "feature": (lambda t: _put(_tree(t)["split_indices"], 0, 4), "split_indices: expected whole numbers from 0 to 3"),
    "kind": (lambda t: _put(_tree(t)["split_type"], 0, 1), "split_type"),
    "length": (lambda t: _tree(t)["split_conditions"].pop(), "split_conditions: expected a list of"),
    "infinite": (lambda t: _put(_tree(t)["split_conditions"], 0, 1e39), "split_conditions: expected finite"),
    "no number": (lambda t: _put(_tree(t)["split_conditions"], 0, "1"), "split_conditions: expected finite"),
    "nodes": (lambda t: _tree(t)["tree_param"].update(num_nodes="99"), "tree_param"),
    "width": (lambda t: t["learner"]["learner_model_param"].update(num_feature="9"), "num_feature"),
    "base": (lambda t: t["learner"]["learner_model_param"].update(base_score="[nan]"), "base_score"),
    "weight": (lambda t: _put(_tree(t)["sum_hessian"], 0, 0.0), "sum_hessian: a node weighs nothing"),
    "heavy": (lambda t: _put(_tree(t)["sum_hessian"], 1, 1e9), "or more than its parent"),
    "dart": (lambda t: t["learner"]["gradient_booster"].update(name="dart"), "binary model of trees"),
    "trees": (lambda t: t["learner"]["gradient_booster"]["model"]["trees"].pop(), "num_trees"),
    "names": (lambda t: _put(t["learner"]["feature_names"], 1, "other"), "none that is 'other'"),
}
CATBOOST = {
    "place": (lambda t: _put(t["oblivious_trees"][0]["splits"], 0, t["oblivious_trees"][0]["splits"][0]
                             | {"split_index": 10**6}), "split_index: expected whole numbers"),
    "feature": (lambda t: t["oblivious_trees"][0]["splits"][0].update(float_feature_index=9), "not the feature"),
    "leaves": (lambda t: t["oblivious_trees"][0]["leaf_values"].pop(), "leaf_values: expected a list of 8"),
    "weights": (lambda t: t["oblivious_trees"][0]["leaf_weights"].pop(), "leaf_weights: expected a list of 8"),
    "depth": (lambda t: t["oblivious_trees"][0]["splits"].extend([{}] * 14), "splits: expected a list of"),
    "borders": (lambda t: t["features_info"]["float_features"][0]["borders"].reverse(), "ascending numbers"),
    "bias": (lambda t: t.update(scale_and_bias=[1, [float("inf")]]), "no JSON number"),
    "scale": (lambda t: _put(t["scale_and_bias"], 0, 2), "a scale of 1"),
    "trees": (lambda t: t.pop("oblivious_trees"), "oblivious_trees: missing"),
    "names": (lambda t: t["features_info"]["float_features"][1].update(feature_id="other"), "none that is 'other'"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, all_ in (("xgboost", XGBOOST), ("catboost", CATBOOST)) for name in all_]
)
def test_hostile_json_is_refused_by_its_place(kind: str, name: str, texts: dict[str, bytes]) -> None:
    change, message = (XGBOOST if kind == "xgboost" else CATBOOST)[name]  # type: ignore[operator]
    top = json.loads(texts[kind])
    change(top)
    with pytest.raises(DataError, match=rf"{FILES[kind]}.*{re.escape(message)}"):
        read(kind, json.dumps(top).encode(), FILES[kind], NAMES)


def test_nested_json_is_refused() -> None:
    for kind in ("catboost", "xgboost"):
        with pytest.raises(DataError, match="not a"):
            read(kind, b"[" * 200_000, FILES[kind], NAMES)


FUZZ = r"""
import json, random, re, sys
import numpy as np
from lesionflow.errors import DataError
from lesionflow.models.tabular import Boosted
sys.path.insert(0, sys.argv[4])
from test_modeltext import FILES, NAMES, lesions, resized

kind, source, rounds = sys.argv[1], open(sys.argv[2]).read(), int(sys.argv[3])
x = lesions(64)[0]
rng = random.Random(1)
numbers = ["-1", "0", "1", "3", "4", "7", "-8", "-9", "99", "2147483648", "-2147483649", "4294967297",
           "1e308", "-1e308", "nan", "inf", "1e999", "", "1_0", "-", "0x1", "99999999999999999999999", "null", "[]"]

def change(text):
    way = rng.randrange(8)
    if way <= 2:  # A number.
        spots = [m.span() for m in re.finditer(r"-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?", text)]
        a, b = rng.choice(spots)
        return text[:a] + rng.choice(numbers) + text[b:]
    if way == 3:  # Two numbers that change places.
        spots = [m.span() for m in re.finditer(r"-?\d+(?:\.\d+)?", text)]
        (a, b), (c, d) = sorted(rng.sample(spots, 2))
        return text[:a] + text[c:d] + text[b:c] + text[a:b] + text[d:]
    if way == 4 and kind == "lightgbm":
        lines = text.split("\n")
        spot = rng.randrange(len(lines))
        return "\n".join(lines[:spot] + rng.choice([[], [rng.choice(lines)]]) + lines[spot + 1:])
    a = rng.randrange(len(text))
    if way <= 5:
        return text[:a] + chr(ord(text[a]) ^ 1 << rng.randrange(7)) + text[a + 1:]
    if way == 6:
        return text[:a] + text[a + rng.randrange(1, 40):]
    return text[:a] + text[max(a - 30, 0):a] + text[a:]

loaded = refused = 0
for number in range(rounds):
    text = source
    for _ in range(rng.choice([1, 1, 2])):
        text = change(text)
    if kind == "lightgbm" and rng.random() < 0.8:
        text = resized(text)
    try:
        trees = Boosted.load(lambda name: text.encode(), [FILES[kind]], NAMES)
    except DataError as error:
        assert FILES[kind] in str(error), error
        refused += 1
        continue
    loaded += 1
    try:
        assert np.isfinite(trees.logits(x)).all() and np.isfinite(trees.contributions(x)).all()
    except DataError as error:
        assert "NaN or infinite" in str(error), error
    try:
        assert np.isfinite(list(trees.importances().values())).all()
    except DataError as error:
        assert "NaN or infinite" in str(error), error
print(loaded, refused)
"""


@pytest.mark.parametrize("kind", KINDS)
def test_no_mutation_ends_the_process(kind: str, texts: dict[str, bytes], tmp_path: Path) -> None:
    """In a process of its own: a library that reads memory of somebody else takes it down."""
    text = texts[kind]
    if kind == "lightgbm":
        text = text[: text.index(b"end of trees")] + b"end of trees\n"
    if kind == "catboost":
        text = json.dumps(json.loads(text) | {"model_info": {}}).encode()
    (tmp_path / "model").write_bytes(text)
    done = subprocess.run(
        [sys.executable, "-c", FUZZ, kind, str(tmp_path / "model"), "400", str(Path(__file__).parent)],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    loaded, refused = map(int, done.stdout.split())
    assert loaded > 20 and refused > 150, "what is loaded and what is refused are both tried"


@pytest.mark.slow
def test_thousands_of_trees_are_checked_in_a_second() -> None:
    x, y = lesions(3000)
    text = (
        KINDS["lightgbm"].fit(x, y, NAMES, dataclasses.replace(OPTIONS, rounds=3000, leaves=15), seed=0, shift=0).text
    )
    began = time.perf_counter()
    modeltext.lightgbm(text)
    assert len(text) > 3_000_000 and time.perf_counter() - began < 1
