"""LightGBM, CatBoost and XGBoost behind one face: train one model, keep it as text, score with it.

A model *is* its text, from the moment it is trained: what scores is always what was read back from it, so nothing
changes when it is saved and loaded. Text can be read by a person and, unlike a pickle, runs nothing when loaded;
`modeltext` has checked it before a library sees it.
The libraries are imported when they are first needed.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lesionflow.errors import DataError, missing_extra
from lesionflow.models import modeltext
from lesionflow.recipe import Tabular

Floats = NDArray[np.float64]

_FEW = 1000
"""Rows that are scored in less time than threads take to start."""


class Booster(Protocol):
    """One trained model of F features."""

    text: bytes
    names: tuple[str, ...]
    """The F features, without what the libraries' formats use themselves."""

    def margins(self, values: Floats) -> Floats:
        """Log-odds of values [B, F], float64 [B]."""

    def contributions(self, values: Floats) -> Floats:
        """What each feature adds to the log-odds (TreeSHAP), and last the base: float64 [B, F + 1]."""

    def gains(self) -> Floats:
        """What each feature's splits gained, float64 [F], in the library's own unit."""


class LightGBM:
    """Leaf-wise trees on histograms."""

    suffix = "txt"

    def __init__(self, text: bytes) -> None:
        checked = modeltext.lightgbm(text)
        self.text, self.names = text, checked.names
        self._model = library("lightgbm").Booster(model_str=checked.text)

    @classmethod
    def fit(
        cls, x: Floats, y: NDArray[np.int8], names: Sequence[str], options: Tabular, *, seed: int, shift: float
    ) -> LightGBM:
        lightgbm = library("lightgbm")
        settings = {
            "objective": "binary",
            "learning_rate": options.learning_rate,
            "num_leaves": options.leaves,
            "min_data_in_leaf": options.min_leaf,
            "feature_fraction": options.columns,
            "bagging_fraction": options.rows,
            "bagging_freq": 1,
            "lambda_l2": options.l2,
            "seed": seed,
            # Sums in a fixed order: the same trees on any machine and whatever else is running.
            "deterministic": True,
            "force_row_wise": True,
            "num_threads": 1,
            "verbosity": -1,
        }
        data = lightgbm.Dataset(x, y, feature_name=_plain(names), params={"verbosity": -1, "num_threads": 1})
        model = lightgbm.train(settings, data, num_boost_round=options.rounds)
        if shift:
            # Every lesion is in one leaf of the first tree, so this moves all log-odds alike.
            leaves = model.dump_model(num_iteration=1)["tree_info"][0]["num_leaves"]
            for leaf in range(leaves):
                model.set_leaf_output(0, leaf, model.get_leaf_output(0, leaf) + shift)
        return cls(model.model_to_string(num_iteration=-1).encode())

    def margins(self, values: Floats) -> Floats:
        threads = 1 if len(values) < _FEW else 0
        return np.asarray(self._model.predict(values, raw_score=True, num_threads=threads), np.float64)

    def contributions(self, values: Floats) -> Floats:
        threads = 1 if len(values) < _FEW else 0
        return np.asarray(self._model.predict(values, pred_contrib=True, num_threads=threads), np.float64)

    def gains(self) -> Floats:
        return np.asarray(self._model.feature_importance("gain"), np.float64)


class CatBoost:
    """Symmetric trees, as deep as `leaves` asks for; `min_leaf` doesn't apply to them."""

    suffix = "json"

    def __init__(self, text: bytes) -> None:
        checked = modeltext.catboost(text)
        self.text, self.names = text, checked.names
        self._model = library("catboost", "boosters").CatBoost()
        # The library reads this format from files only.
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.json"
            path.write_text(checked.text)
            self._model.load_model(str(path), format="json")

    @classmethod
    def fit(
        cls, x: Floats, y: NDArray[np.int8], names: Sequence[str], options: Tabular, *, seed: int, shift: float
    ) -> CatBoost:
        catboost = library("catboost", "boosters")
        settings = {
            "loss_function": "Logloss",
            "iterations": options.rounds,
            "boost_from_average": True,
            "learning_rate": options.learning_rate,
            "depth": min(max(round(math.log2(options.leaves)), 1), 16),
            "l2_leaf_reg": options.l2,
            "rsm": options.columns,
            "bootstrap_type": "Bernoulli",
            "subsample": options.rows,
            "random_seed": seed,
            "thread_count": 1,
            "verbose": 0,
            "allow_writing_files": False,
        }
        model = catboost.CatBoost(settings)
        model.fit(catboost.Pool(x, y.astype(np.int64), feature_names=_plain(names)))
        scale, bias = model.get_scale_and_bias()
        model.set_scale_and_bias(scale, bias + shift)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.json"
            model.save_model(str(path), format="json")
            kept = json.loads(path.read_bytes())
        # When it was trained, a random id, the course of the loss.
        for name in ("model_guid", "train_finish_time", "output_options", "training"):
            kept["model_info"].pop(name, None)
        return cls(json.dumps(kept).encode())

    def margins(self, values: Floats) -> Floats:
        found = self._model.predict(values, prediction_type="RawFormulaVal", thread_count=1)
        return np.asarray(found, np.float64)

    def contributions(self, values: Floats) -> Floats:
        pool = library("catboost", "boosters").Pool(values, feature_names=self._model.feature_names_)
        return np.asarray(self._model.get_feature_importance(pool, type="ShapValues", thread_count=1), np.float64)

    def gains(self) -> Floats:
        return np.asarray(self._model.get_feature_importance(type="PredictionValuesChange"), np.float64)


class XGBoost:
    """Leaf-wise trees on histograms, in single precision."""

    suffix = "json"

    def __init__(self, text: bytes) -> None:
        checked = modeltext.xgboost(text)
        self.text, self.names = text, checked.names
        self._model = library("xgboost", "boosters").Booster({"nthread": 1})
        self._model.load_model(bytearray(checked.text.encode()))

    @classmethod
    def fit(
        cls, x: Floats, y: NDArray[np.int8], names: Sequence[str], options: Tabular, *, seed: int, shift: float
    ) -> XGBoost:
        xgboost = library("xgboost", "boosters")
        share = float(y.mean())
        base = math.log(share / (1 - share))
        settings = {
            "objective": "binary:logistic",
            "tree_method": "hist",
            "grow_policy": "lossguide",
            "max_depth": 0,
            "max_leaves": options.leaves,
            "eta": options.learning_rate,
            # A leaf is weighed by its lesions' p (1 - p), which starts at this.
            "min_child_weight": options.min_leaf * share * (1 - share),
            "colsample_bytree": options.columns,
            "subsample": options.rows,
            "lambda": options.l2,
            "seed": seed,
            "nthread": 1,
            "verbosity": 0,
            # What is added when scoring; while training, `base_margin` takes its place.
            "base_score": 1 / (1 + math.exp(-(base + shift))),
        }
        margin = np.full(len(y), base)
        data = xgboost.DMatrix(x, y, base_margin=margin, feature_names=_plain(names), nthread=1)
        model = xgboost.train(settings, data, num_boost_round=options.rounds)
        return cls(bytes(model.save_raw("json")))

    def margins(self, values: Floats) -> Floats:
        return np.asarray(self._model.predict(self._data(values), output_margin=True), np.float64)

    def contributions(self, values: Floats) -> Floats:
        data = self._data(values)
        parts = np.asarray(self._model.predict(data, pred_contribs=True), np.float64)
        # Single precision adds up to a few millionths beside the margin: the base takes the rest.
        parts[:, -1] += np.asarray(self._model.predict(data, output_margin=True), np.float64) - parts.sum(axis=1)
        return parts

    def gains(self) -> Floats:
        found = self._model.get_score(importance_type="total_gain")
        return np.array([found.get(name, 0.0) for name in self._model.feature_names], np.float64)

    def _data(self, values: Floats) -> Any:
        return library("xgboost", "boosters").DMatrix(values, feature_names=self._model.feature_names, nthread=1)


KINDS: dict[str, type[LightGBM] | type[CatBoost] | type[XGBoost]] = {
    "lightgbm": LightGBM,
    "catboost": CatBoost,
    "xgboost": XGBoost,
}
"""By the name of their field in the recipe's `[tabular]`."""


def read(kind: str, text: bytes, where: str, names: Sequence[str]) -> Booster:
    """The model that was saved as `text`, of the features `names`.

    Raises `DataError` naming the file if that is damaged, or of other features.
    """
    library(kind, "train" if kind == "lightgbm" else "boosters")
    try:
        model: Booster = KINDS[kind](text)
    except Exception as error:  # Each library has errors of its own.
        raise DataError(f"{where}: not a {kind} model ({str(error).strip()[:200]}); export the bundle again") from None
    expected = _plain(names)
    if list(model.names) != expected:
        odd = next((a for a, b in zip(model.names, expected, strict=False) if a != b), None)
        raise DataError(
            f"{where}: the {kind} model is of {len(model.names)} features, this version makes {len(expected)}"
            f"{f' and none that is {odd!r} in its place' if odd else ''}; "
            "use the version of lesionflow that the bundle was made with, or train again"
        )
    return model


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def library(package: str, extra: str = "train") -> Any:
    """An optional library; `UsageError` naming the extra where it isn't installed."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise missing_extra(package, extra) from None


def _plain(names: Sequence[str]) -> list[str]:
    """Names without what the libraries' formats use themselves."""
    return [re.sub(r"\W+", "_", name) for name in names]
