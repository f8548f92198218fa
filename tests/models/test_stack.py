"""Every fold's pipeline learned from the other folds alone, and is served bit for bit as it was scored."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lesionflow.data.features import Matrix
from lesionflow.data.folds import Folds, make_folds
from lesionflow.errors import DataError
from lesionflow.evaluation.metrics import fold_rank, pauc
from lesionflow.models import stack as module
from lesionflow.models.stack import METHODS, MODES, Joined, Stacked, choose, fit_stack, save_stack
from lesionflow.models.ways import LEAST_SLOPE, MOST_SLOPE, Line, Reference, fit_line
from lesionflow.recipe import Stack, Tabular

FEW = Tabular(lightgbm=1, rounds=12, columns=1.0, min_leaf=5)
K = 3


@dataclass(frozen=True)
class World:
    """A cohort with its split, and what each source says of it."""

    folds: Folds
    y: np.ndarray
    image: np.ndarray
    record: Matrix
    visit: Matrix
    alone: np.ndarray

    def fit(self, *, options: Tabular = FEW, seed: int = 0, threads: int | None = 1, **changes: Any) -> Stacked:
        """`fit_stack` on this, with a few arguments changed: those of `Stack` by their names, others as they are."""
        rows, held = np.flatnonzero(self.folds.fold >= 0), self.folds.holdout_rows()
        method, noise = changes.pop("method", "linear"), changes.pop("noise", 0.0)
        arguments: dict[str, Any] = {
            "image": self.image[rows],
            "image_holdout": np.column_stack([self.image[held] + 0.1 * k for k in range(K)]),
            "record": part(self.record, rows),
            "visit": part(self.visit, rows),
            "record_h": part(self.record, held),
            "visit_h": part(self.visit, held),
            "alone": self.alone[rows],
            "alone_h": self.alone[held],
            "y": self.y[rows],
            "fold": self.folds.fold[rows],
            "ids": [self.folds.ids[i] for i in rows],
            "model_fold": self.folds.fold[rows],
            "folds": self.folds,
        }
        stack = Stack(method=method, noise=noise)
        return fit_stack(
            **(arguments | changes), tabular=options, stack=stack, seed=seed, threads=threads, progress=False
        )


def part(matrix: Matrix, rows: np.ndarray) -> Matrix:
    return Matrix(matrix.names, np.ascontiguousarray(matrix.values[rows]))


def make(seed: int = 0, lesions: int = 1500, picture: float = 1.5, metadata: float = 1.0) -> World:
    rng = np.random.default_rng(seed)
    patient = rng.integers(0, 150, lesions)
    y = (rng.random(lesions) < 0.1).astype(np.int8)
    ids = [f"ISIC_{i:07d}" for i in range(lesions)]
    folds = make_folds(ids, y, [f"IP_{p}" for p in patient], count=K, holdout=0.2)
    x = rng.normal(size=(lesions, 5))
    x[:, 0] += metadata * y
    x[:, 3] += metadata * y
    x[rng.random(x.shape) < 0.02] = np.nan
    image = rng.normal(size=lesions) + picture * y - 2
    record, visit = Matrix(("a", "b"), x[:, [0, 1]].copy()), Matrix(("a", "b", "c", "d", "e"), x[:, [0, 1, 2, 3, 4]])
    return World(folds, y, image, record, visit, rng.random(lesions) < 0.15)


@pytest.fixture(scope="module")
def world() -> World:
    return make()


@pytest.fixture(scope="module")
def stacks(world: World) -> dict[str, Stacked]:
    return {method: world.fit(method=method) for method in (*METHODS, "auto")}


@pytest.mark.parametrize("method", [*METHODS, "auto"])
def test_a_fold_s_pipeline_reproduces_its_out_of_fold_scores(
    world: World, stacks: dict[str, Stacked], method: str
) -> None:
    stacked = stacks[method]
    assert tuple(stacked.oof) == MODES
    oof_rows = np.flatnonzero(world.folds.fold >= 0)
    np.testing.assert_array_equal(stacked.oof["image"], world.image[oof_rows])
    for k, pipeline in enumerate(stacked.pipelines):
        mine = world.folds.held_out_rows(k)
        place = np.searchsorted(oof_rows, mine)
        for rows, at in ((mine, place), (mine[7:8], place[7:8]), (mine[-3:], place[-3:])):
            again = pipeline.scores(
                world.image[rows], world.record.values[rows], world.visit.values[rows], world.alone[rows]
            )
            for mode in MODES:
                np.testing.assert_array_equal(again[mode], stacked.oof[mode][at], err_msg=f"{mode}, fold {k}")
        # Another fold's pipeline says something else, so the equality means something.
        other = stacked.pipelines[(k + 1) % K].scores(
            world.image[mine], world.record.values[mine], world.visit.values[mine], world.alone[mine]
        )
        assert not np.array_equal(other["image_visit"], stacked.oof["image_visit"][place])


@pytest.mark.parametrize("method", [*METHODS, "auto"])
def test_saved_and_loaded_it_scores_the_same_to_the_last_bit(
    world: World, stacks: dict[str, Stacked], method: str, tmp_path: Path
) -> None:
    stacked = stacks[method]
    save_stack(stacked, tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} <= {".json", ".txt"}
    loaded = Joined.load(reader(tmp_path))
    held = world.folds.holdout_rows()
    image = np.column_stack([world.image[held] + 0.1 * k for k in range(K)])
    scores = loaded.scores(image, part(world.record, held), part(world.visit, held), world.alone[held])
    assert list(scores) == list(stacked.holdout) == list(loaded.modes) and loaded.served == "image_visit"
    for mode in MODES:
        assert scores[mode].shape == (len(held), K)
        np.testing.assert_array_equal(scores[mode], stacked.holdout[mode])
    assert (loaded.blocks, loaded.choices) == (FEW.blocks, stacked.choices)
    assert loaded.importances().keys() == set(world.visit.names)
    assert sum(loaded.importances().values()) == pytest.approx(1)


def reader(folder: Path) -> Callable[[str], bytes]:
    return lambda name: (folder / name).read_bytes()


@pytest.mark.parametrize("threads", [1, 3])
def test_one_seed_gives_one_result(world: World, stacks: dict[str, Stacked], threads: int) -> None:
    again = world.fit(method="auto", threads=threads)
    for mode in MODES:
        np.testing.assert_array_equal(again.oof[mode], stacks["auto"].oof[mode])
        np.testing.assert_array_equal(again.holdout[mode], stacks["auto"].holdout[mode])
    other = world.fit(method="auto", seed=1)
    assert not np.array_equal(other.oof["visit"], again.oof["visit"])


def test_a_fold_s_own_targets_reach_no_score_of_its_metadata(world: World, stacks: dict[str, Stacked]) -> None:
    rows = np.flatnonzero(world.folds.fold >= 0)
    for k in range(K):
        y, mine = world.y.copy(), world.folds.fold == k
        y[mine] = 1 - y[mine]
        changed = replace(world, y=y).fit()
        here = mine[rows]
        for mode in ("record", "visit"):
            np.testing.assert_array_equal(changed.oof[mode][here], stacks["linear"].oof[mode][here])
            assert not np.array_equal(changed.oof[mode][~here], stacks["linear"].oof[mode][~here])


@pytest.mark.parametrize("noise", [0.0, 0.7])
def test_a_way_to_join_is_fitted_on_the_other_folds_out_of_fold_scores(world: World, noise: float) -> None:
    rows = np.flatnonzero(world.folds.fold >= 0)
    fold, y, image, alone = (a[rows] for a in (world.folds.fold, world.y, world.image, world.alone))
    for method in ("linear", "trees"):
        stacked = world.fit(method=method, noise=noise)
        for mode, of, matrix in (("image_record", "record", world.record), ("image_visit", "visit", world.visit)):
            margin = stacked.oof[of]
            if method == "trees":
                margin = np.empty(len(y))
                for k, pipeline in enumerate(stacked.pipelines):
                    here = fold == k
                    margin[here] = pipeline.ways[mode].margin(image[here], matrix.values[rows][here])
            for k, pipeline in enumerate(stacked.pipelines):
                # Only lesions with company say how context and picture are joined.
                others = (fold != k) & ~(alone & (of == "visit"))
                inputs = [image[others], margin[others]] if method == "linear" else [margin[others]]
                assert pipeline.ways[mode].line == fit_line(inputs, y[others]), (method, mode, k)


def test_pictures_that_a_model_learned_from_are_refused_by_name(world: World) -> None:
    rows = np.flatnonzero(world.folds.fold >= 0)
    planted = world.folds.fold[rows].copy()
    planted[[4, 9]] = (planted[[4, 9]] + 1) % K
    first, second = (world.folds.ids[rows[i]] for i in (4, 9))
    with pytest.raises(DataError, match=rf"2 lesions \({first}, {second}\) were scored by a model that learned"):
        world.fit(model_fold=planted)


def test_a_lesion_of_the_hold_out_is_not_learned_from(world: World) -> None:
    rows = np.flatnonzero(world.folds.fold >= 0)
    stranger = world.folds.ids[world.folds.holdout_rows()[0]]
    ids, fold = [world.folds.ids[i] for i in rows], world.folds.fold[rows].copy()
    ids[0], fold[0] = stranger, -1
    with pytest.raises(DataError, match=f"{stranger}.*hold-out"):
        world.fit(ids=ids, fold=fold, model_fold=np.maximum(fold, 0))


@pytest.mark.parametrize("name", ["tbp_lv_dnn_lesion_confidence", "patient_id"])
def test_columns_that_can_t_be_features_are_refused_by_name(world: World, name: str) -> None:
    rows = np.flatnonzero(world.folds.fold >= 0)
    with pytest.raises(DataError, match=name):
        world.fit(record=Matrix(("a", name), world.record.values[rows]), visit=None, record_h=None)


def test_what_does_not_match_or_is_not_finite_is_named(world: World) -> None:
    rows = np.flatnonzero(world.folds.fold >= 0)
    broken = world.image[rows].copy()
    broken[3] = np.nan
    with pytest.raises(DataError, match=world.folds.ids[rows[3]]):
        world.fit(image=broken)
    with pytest.raises(DataError, match="visit features: 5 values"):
        world.fit(visit=part(world.visit, rows[:5]))
    with pytest.raises(DataError, match="visit: has no 'a'"):
        world.fit(visit=Matrix(("x", *world.visit.names[1:]), world.visit.values[rows]))
    with pytest.raises(DataError, match="hold-out: features without the pictures"):
        world.fit(image_holdout=None)


def test_the_choice_never_looks_at_the_fold_s_own_targets() -> None:
    rng = np.random.default_rng(1)
    n = 3000
    fold, y = rng.integers(0, K, n), (rng.random(n) < 0.05).astype(np.int8)
    scores = {"linear": rng.normal(size=n) + y, "rank": rng.normal(size=n) + y, "trees": rng.normal(size=n) + y}
    for k in range(K):
        method, by = choose(scores, y, fold, k)
        permuted, mine = y.copy(), np.flatnonzero(fold == k)
        permuted[mine] = rng.permutation(y[mine])
        assert choose(scores, permuted, fold, k) == (method, by)
        permuted[mine] = 1 - y[mine]
        assert choose(scores, permuted, fold, k) == (method, by)
        others = np.flatnonzero(fold != k)
        permuted[others] = rng.permutation(y[others])
        assert choose(scores, permuted, fold, k)[1] != by
        assert by[method] == max(by.values())
        here = fold != k
        assert by["rank"] == pauc(y[here], fold_rank(scores["rank"][here], fold[here]))


def test_a_tie_goes_to_the_simpler_method() -> None:
    y, fold = np.tile([0, 1, 0, 0], 30).astype(np.int8), np.repeat(np.arange(3), 40)
    same = y.astype(float)
    assert choose({"trees": same, "rank": same, "linear": same}, y, fold, 0)[0] == "linear"
    assert choose({"trees": same, "rank": same, "linear": -same}, y, fold, 0)[0] == "rank"


def test_each_fold_takes_what_the_other_folds_say(world: World, stacks: dict[str, Stacked]) -> None:
    auto = stacks["auto"]
    rows = np.flatnonzero(world.folds.fold >= 0)
    fold, company = world.folds.fold[rows], ~world.alone[rows]
    for mode in ("image_record", "image_visit"):
        for k, choice in enumerate(auto.choices[mode]):
            assert choice["fold"] == k and choice["pauc"][choice["method"]] == max(choice["pauc"].values())
            # Trees are shared, so the chosen way is that of the fixed method.
            fixed = stacks[choice["method"]].oof[mode]
            here = (fold == k) & company
            np.testing.assert_array_equal(auto.oof[mode][here], fixed[here])
    assert stacks["rank"].choices["image_visit"][0] == {"fold": 0, "method": "rank", "pauc": {}}
    json.dumps(auto.choices, allow_nan=False)


@pytest.mark.parametrize("method", METHODS)
def test_a_patient_s_only_lesion_falls_back(world: World, stacks: dict[str, Stacked], method: str) -> None:
    stacked = stacks[method]
    alone = world.alone[world.folds.fold >= 0]
    for scores, lone in ((stacked.oof, alone), (stacked.holdout, world.alone[world.folds.holdout_rows()])):
        for rich, poor in (("visit", "record"), ("image_visit", "image_record")):
            np.testing.assert_array_equal(scores[rich][lone], scores[poor][lone])
            assert (scores[rich][~lone] != scores[poor][~lone]).mean() > 0.9


@pytest.mark.parametrize("method", ["linear", "trees", "auto"])
def test_useless_metadata_hardly_harm_a_strong_picture(method: str) -> None:
    # Not of `rank`: a mean of ranks gives noise half the say.
    world = make(3, lesions=4000, picture=2.5, metadata=0.0)
    stacked = world.fit(method=method, options=replace(FEW, rounds=60, min_leaf=40))
    y, fold = (a[world.folds.fold >= 0] for a in (world.y, world.folds.fold))
    image, both = (pauc(y, fold_rank(stacked.oof[mode], fold)) for mode in ("image", "image_visit"))
    assert image > 0.14 and both > image - (0.012 if method == "trees" else 0.004)


def test_two_sources_are_better_than_either(world: World, stacks: dict[str, Stacked]) -> None:
    y, fold = (a[world.folds.fold >= 0] for a in (world.y, world.folds.fold))
    for method in ("linear", "rank", "auto"):
        worth = {mode: pauc(y, fold_rank(stacks[method].oof[mode], fold)) for mode in MODES}
        assert worth["image_visit"] > max(worth["image"], worth["visit"]) + 0.01, (method, worth)


def test_the_hold_out_changes_nothing_but_its_own_scores(world: World, stacks: dict[str, Stacked]) -> None:
    held = world.folds.holdout_rows()
    y = world.y.copy()
    y[held] = 1 - y[held]
    for changed in (replace(world, y=y), world):
        more: dict[str, Any] = {} if changed is not world else {"record_h": None, "visit_h": None}
        again = changed.fit(method="linear", **more)
        for mode in MODES:
            np.testing.assert_array_equal(again.oof[mode], stacks["linear"].oof[mode])
            if more:
                assert again.holdout[mode].shape == (0, K)
            else:
                np.testing.assert_array_equal(again.holdout[mode], stacks["linear"].holdout[mode])


@pytest.mark.parametrize(("changes", "kinds"), [
    ({"method": "linear"}, 2), ({"method": "rank"}, 2), ({"method": "trees"}, 4), ({"method": "auto"}, 4),
    ({"method": "auto", "visit": None}, 2), ({"method": "linear", "visit": None}, 1),
    ({"method": "auto", "image": None}, 2),
])  # fmt: skip
def test_no_tree_is_grown_twice_or_in_vain(
    world: World, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], kinds: int
) -> None:
    grown: list[int] = []
    fit = module.Boosted.fit

    def counted(*arguments: Any, seed: int, **options: Any) -> Any:
        grown.append(seed)
        return fit(*arguments, seed=seed, **options)

    monkeypatch.setattr(module.Boosted, "fit", counted)
    world.fit(options=replace(FEW, rounds=1), **changes)
    assert len(grown) == len(set(grown)) == kinds * K


@pytest.mark.parametrize(("changes", "modes"), [
    ({"image": None, "image_holdout": None}, ("record", "visit")),
    ({"visit": None, "visit_h": None}, ("image", "record", "image_record")),
    ({"image": None, "visit": None, "visit_h": None}, ("record",)),
])  # fmt: skip
def test_what_is_missing_leaves_poorer_modes(
    world: World, changes: dict[str, Any], modes: tuple[str, ...], tmp_path: Path
) -> None:
    stacked = world.fit(**changes)
    save_stack(stacked, tmp_path)
    joined = Joined.load(reader(tmp_path))
    assert tuple(stacked.oof) == tuple(stacked.holdout) == joined.modes == modes
    assert joined.served == modes[-1]


def test_a_visit_is_served_what_it_brings(world: World, stacks: dict[str, Stacked]) -> None:
    joined, rows = stacks["trees"].joined, np.arange(6)
    record, visit, alone = part(world.record, rows), part(world.visit, rows), world.alone[rows]
    image = np.column_stack([world.image[rows]] * K)
    assert list(joined.scores(None, record, visit, alone)) == ["record", "visit"]
    assert list(joined.scores(image, record, None, alone)) == ["image", "record", "image_record"]
    whole = joined.scores(image, record, visit, alone)
    np.testing.assert_array_equal(joined.scores(None, record, visit, alone)["visit"], whole["visit"])
    assert joined.pipelines[0].scores(world.image[rows], None, None, alone).keys() == {"image"}
    for wrong, match in (
        ({"record": Matrix(("b", "a"), record.values)}, "record: has more features, or in another order"),
        ({"visit": Matrix(("a", "b", "c", "d", "z"), visit.values)}, "visit: has no 'e'"),
        ({"fold_image": image[:, :2]}, "expected 6 lesions x 3 folds"),
        ({"fold_image": np.full_like(image, np.nan)}, "NaN"),
        ({"record": part(world.record, rows[:2])}, "2 rows for 6 lesions"),
    ):
        arguments: dict[str, Any] = {"fold_image": image, "record": record, "visit": visit, "alone": alone}
        with pytest.raises(DataError, match=match):
            joined.scores(**(arguments | wrong))


def test_contributions_add_up_to_the_visit_s_score(world: World, stacks: dict[str, Stacked]) -> None:
    rows = world.folds.holdout_rows()
    record, visit, alone = part(world.record, rows), part(world.visit, rows), world.alone[rows]
    names, shares = stacks["linear"].joined.contributions(record, visit, alone)
    assert names == world.visit.names and shares.shape == (len(rows), 6)
    np.testing.assert_allclose(shares.sum(1), stacks["linear"].holdout["visit"].mean(1), atol=1e-6)
    assert (shares[alone][:, 2:5] == 0).all() and (shares[~alone][:, 3] != 0).all()
    names, shares = stacks["linear"].joined.contributions(record, None, alone)
    assert names == world.record.names
    np.testing.assert_allclose(shares.sum(1), stacks["linear"].holdout["record"].mean(1), atol=1e-6)


def test_the_hold_out_is_scored_by_every_fold_s_pipeline_in_order(world: World, stacks: dict[str, Stacked]) -> None:
    held = world.folds.holdout_rows()
    for k, pipeline in enumerate(stacks["auto"].pipelines):
        scores = pipeline.scores(
            world.image[held] + 0.1 * k, world.record.values[held], world.visit.values[held], world.alone[held]
        )
        for mode in MODES:
            np.testing.assert_array_equal(scores[mode], stacks["auto"].holdout[mode][:, k])


def test_noise_is_for_learning_alone(world: World, stacks: dict[str, Stacked]) -> None:
    noisy = world.fit(method="trees", noise=0.5)
    assert not np.array_equal(noisy.oof["image_visit"], stacks["trees"].oof["image_visit"])
    np.testing.assert_array_equal(noisy.oof["image"], stacks["trees"].oof["image"])
    np.testing.assert_array_equal(noisy.oof["visit"], stacks["trees"].oof["visit"])


def test_few_with_company_share_their_way_with_all() -> None:
    world = make(5)
    alone = np.ones(len(world.alone), bool)
    alone[::40] = False
    stacked = replace(world, alone=alone).fit(method="auto")
    assert np.isfinite(stacked.oof["image_visit"]).all()


@pytest.mark.parametrize(("change", "match"), [
    (lambda top: top.update(format=2), "format: this version of lesionflow reads 1"),
    (lambda top: top.pop("names"), "names: expected an object"),
    (lambda top: top["names"].update(other=["a"]), "names: expected those of record"),
    (lambda top: top["names"].update(record=[]), "names: expected those of record"),
    (lambda top: top["names"].update(record=["a", "z"]), "'z' is a feature of the record, but not of the visit"),
    (lambda top: top["names"].update(visit=["a", "a", "b"]), "names.visit: expected a list of texts, each once"),
    (lambda top: top["names"].update(visit=["a", "b", "c"]), "features"),
    (lambda top: top.update(modes=["image", "image_visit"]), "modes: expected image, record, visit"),
    (lambda top: top.update(blocks="plain"), "blocks: expected a list of texts"),
    (lambda top: top.update(blocks=["plain", "magic"]), "blocks: no block 'magic' of features; there are plain"),
    (lambda top: top.update(blocks=[]), "blocks: none of plain"),
    (lambda top: top.update(choices=[]), "choices: expected an object"),
    (lambda top: top.update(pipelines=[]), "pipelines: expected 1 to 100"),
    (lambda top: top["pipelines"].append(7), r"pipelines\[3\]: expected an object"),
    (lambda top: top["pipelines"].reverse(), r"pipelines\[0\]: expected fold 0"),
    (lambda top: top["pipelines"][1]["ways"].pop("image_record"), r"pipelines\[1\]: .*a way for each joined mode"),
    (lambda top: top["pipelines"][1].pop("visit"), r"pipelines\[1\].visit: expected a list of texts"),
    (lambda top: top["pipelines"][1].update(visit=[]), r"pipelines\[1\].visit: expected names of files"),
    (lambda top: top["pipelines"][1].update(visit=["../x-lightgbm-0.txt"]), "expected names of files in the same"),
    (lambda top: top["pipelines"][1].update(visit=["gone-lightgbm-0.txt"]), "gone-lightgbm-0.txt: missing"),
    (lambda top: top["pipelines"][1].update(visit=["stack.json"]), "stack.json"),
    (lambda top: top["pipelines"][1].update(visit=top["pipelines"][1]["record"]), "features"),
    (lambda top: way(top).update(method="magic"), r"ways.image_visit.method: expected one of linear, rank, trees"),
    (lambda top: way(top).update(line=None), r"line: expected an object"),
    (lambda top: way(top)["line"].update(slopes=[1.0]), r"line.slopes: expected 2 numbers"),
    (lambda top: way(top)["line"].update(slopes=[1.0, -1.0]), "none under 0"),
    (lambda top: way(top)["line"].update(slopes=[1.0, 1.1e6]), "none under 0 or over 1,000,000"),
    (lambda top: way(top)["line"].update(slopes=[1.0, "2"]), "line.slopes: expected a finite number"),
    (lambda top: way(top)["line"].update(intercept=True), "line.intercept: expected a finite number"),
    (lambda top: way(top)["line"].update(intercept=10**400), "line.intercept: expected a finite number"),
])  # fmt: skip
def test_a_damaged_index_is_refused_by_its_field(
    stacks: dict[str, Stacked], tmp_path: Path, change: Callable[[Any], Any], match: str
) -> None:
    save_stack(stacks["linear"], tmp_path)
    top = json.loads((tmp_path / "stack.json").read_text())
    change(top)
    (tmp_path / "stack.json").write_text(json.dumps(top))
    with pytest.raises(DataError, match=match):
        Joined.load(reader(tmp_path))


def test_a_number_too_large_is_refused(stacks: dict[str, Stacked], tmp_path: Path) -> None:
    save_stack(stacks["linear"], tmp_path)
    top = json.loads((tmp_path / "stack.json").read_text())
    way(top)["line"]["intercept"] = "here"
    (tmp_path / "stack.json").write_text(json.dumps(top).replace('"here"', "1e999"))
    with pytest.raises(DataError, match=r"line\.intercept: expected a finite number"):
        Joined.load(reader(tmp_path))


def way(top: Any, k: int = 0) -> Any:
    return top["pipelines"][k]["ways"]["image_visit"]


@pytest.mark.parametrize(("change", "match"), [
    (lambda one: one.update(edge=0.5), "edge: expected a number between 0 and 0.5"),
    (lambda one: one["image"].update(at=[]), "image.at: expected a list of numbers"),
    (lambda one: one["image"]["at"].pop(), "image: expected as many shares as scores"),
    (lambda one: one["trees"]["at"].reverse(), "trees: expected ascending scores"),
    (lambda one: one["trees"].update(share=[2.0] * len(one["trees"]["at"])), "trees: expected ascending scores"),
])  # fmt: skip
def test_damaged_ranks_are_refused_by_their_field(
    stacks: dict[str, Stacked], tmp_path: Path, change: Callable[[Any], Any], match: str
) -> None:
    save_stack(stacks["rank"], tmp_path)
    top = json.loads((tmp_path / "stack.json").read_text())
    change(way(top))
    (tmp_path / "stack.json").write_text(json.dumps(top))
    with pytest.raises(DataError, match=match):
        Joined.load(reader(tmp_path))


@pytest.mark.parametrize("text", ["", "[]", "nonsense", '{"format": NaN}', "[" * 100_000, '{"format": 1e999}', "\xff"])
def test_an_index_that_is_no_object_of_finite_numbers_is_refused(text: str) -> None:
    with pytest.raises(DataError, match=r"stack\.json"):
        Joined.load(lambda name: text.encode("latin-1"))


def test_a_missing_index_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"stack\.json: missing"):
        Joined.load(reader(tmp_path))
    with pytest.raises(DataError, match=r"stack\.json: missing"):
        Joined.load({}.__getitem__)


def test_a_line_is_the_likeliest() -> None:
    rng = np.random.default_rng(0)
    n = 20_000
    a, b = 3 * rng.normal(size=n) - 5, 0.2 * rng.normal(size=n)
    y = (rng.random(n) < 1 / (1 + np.exp(-(0.8 * a + 4 * b + 2)))).astype(np.int8)
    line = fit_line([a, b], y)
    assert line.slopes == pytest.approx((0.8, 4.0), rel=0.05) and line.intercept == pytest.approx(2, abs=0.1)
    residual = 1 / (1 + np.exp(-line(a, b))) - y
    # The ridge moves the optimum by next to nothing.
    assert abs(residual.sum()) < 1e-4 and abs((residual * a).sum()) < 1 and abs((residual * b).sum()) < 0.1
    np.testing.assert_array_equal(line(a, b)[5:6], line(a[5:6], b[5:6]))


def test_a_line_never_turns_a_score_round() -> None:
    rng = np.random.default_rng(0)
    y = (rng.random(2000) < 0.2).astype(np.int8)
    good, wrong = rng.normal(size=2000) + y, rng.normal(size=2000) - y
    both = fit_line([good, wrong], y)
    assert both.slopes[1] == 0 and both.slopes[0] == fit_line([good], y).slopes[0] > 0.5
    neither = fit_line([wrong, wrong - 0.1 * y], y)
    assert neither.slopes == (pytest.approx(LEAST_SLOPE / wrong.std()), 0)
    assert neither(wrong, wrong).mean() == pytest.approx(np.log(y.mean() / (1 - y.mean())), abs=1e-3)
    separated = fit_line([y.astype(float), np.zeros(2000)], y)
    assert 5 < separated.slopes[0] < 100 and separated.slopes[1] == 0
    assert Line((1.0,), 0.0)(good).tolist() == good.tolist()


@pytest.mark.parametrize("level", [0.0, -3.7, 1e6])
def test_rounding_is_not_learned_from(level: float) -> None:
    """Scores that differ in their last digits only tell nothing, even where those digits happen to agree with y."""
    rng = np.random.default_rng(0)
    y = (rng.random(2000) < 0.2).astype(np.int8)
    good, equal = rng.normal(size=2000) + y, level + 1e-12 * max(abs(level), 1) * y
    assert len(np.unique(equal)) == 2
    both, alone = fit_line([good, equal], y), fit_line([equal], y)
    assert both.slopes == (fit_line([good], y).slopes[0], 0)
    assert alone.slopes == (LEAST_SLOPE,)
    assert alone(equal) == pytest.approx(np.log(y.mean() / (1 - y.mean())), abs=1e-9)
    # Little spread that isn't rounding is a score like any other, and what is fitted can be read again.
    small = fit_line([1e-4 * good], y)
    assert small.slopes[0] == pytest.approx(1e4 * fit_line([good], y).slopes[0])
    least = fit_line([1e-8 * good], y)
    assert least.slopes == (MOST_SLOPE,)
    for line in (both, alone, small, least):
        assert Line.from_dict(line.to_dict(), "line", len(line.slopes)) == line


def test_ranks_are_shares_of_the_reference() -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(size=50_000)
    reference = Reference.of(scores)
    assert len(reference.at) == 1001
    new = rng.normal(size=200)
    share = [(scores < one).mean() for one in new]
    np.testing.assert_allclose(reference(new), share, atol=1e-3)
    assert reference(np.array([-99.0, 99.0])).tolist() == [0, 1]
    np.testing.assert_array_equal(reference(new)[3:4], reference(new[3:4]))
    tied = Reference.of(np.array([0.0, 0, 0, 0, 1, 2]))
    assert tied.at == (0, 1, 2) and tied.share == pytest.approx((0.3, 0.8, 1))
    assert Reference.of(np.zeros(7))(np.array([-1.0, 0, 1])).tolist() == [0.5] * 3


def test_serving_a_stack_loads_neither_torch_nor_a_booster() -> None:
    code = (
        "import sys, lesionflow.models.stack; "
        "print({'torch', 'lightgbm', 'catboost', 'xgboost', 'scipy', 'lesionflow.evaluation.leaks'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"
