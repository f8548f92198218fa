"""Planted leaks are refused or listed, by name."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image

from lesionflow.data.folds import HOLDOUT, Folds, make_folds
from lesionflow.data.store import Store, prepare
from lesionflow.errors import DataError
from lesionflow.evaluation import leaks

LESIONS = 400


@pytest.fixture(scope="module")
def folds() -> Folds:
    ids = [f"ISIC_{i:07d}" for i in range(LESIONS)]
    targets = (np.arange(LESIONS) % 10 == 0).astype(np.int8)
    return make_folds(ids, targets, groups(), count=3, holdout=0.2, data_hash="d")


def groups() -> list[str]:
    return [f"IP_{i % 40 // 10 + 4 * (i // 40):03d}" for i in range(LESIONS)]


def scores(folds: Folds, *, held_out: bool = False) -> pl.DataFrame:
    table = pl.DataFrame(
        {"isic_id": folds.ids, "patient_group": groups(), "fold": folds.fold.astype(np.int64), "logit": 0.5}
    ).with_columns(fold_hash=pl.lit(folds.hash))
    return table.filter((pl.col("fold") == HOLDOUT) == held_out)


def change(table: pl.DataFrame, row: int, column: str, value: object) -> pl.DataFrame:
    here = pl.int_range(pl.len()) == row
    return table.with_columns(pl.when(here).then(pl.lit(value)).otherwise(pl.col(column)).alias(column))


def test_what_the_split_made_is_fine_in_any_order(folds: Folds) -> None:
    oof, holdout = scores(folds), scores(folds, held_out=True)
    assert len(holdout) == len(folds.holdout_rows()) > 50
    checked = leaks.check_oof(oof.sample(fraction=1, shuffle=True, seed=1), folds, holdout)
    assert checked == {"patients_in_two_folds": 0, "fold_hash_checked": True}
    with pytest.raises(DataError, match="its scores are missing"):
        leaks.check_oof(oof, folds)


class Held:
    """What is asked of a store."""

    def __init__(self, folds: Folds) -> None:
        every = pl.concat([scores(folds), scores(folds, held_out=True)])
        self.ids, self.groups = every["isic_id"].to_list(), every["patient_group"].to_list()
        self.targets = np.arange(len(every)) % 2


def test_targets_patients_and_served_logits_are_the_data_s(folds: Folds) -> None:
    store = Held(folds)
    truth = pl.DataFrame({"isic_id": store.ids, "target": store.targets})
    oof, holdout = (
        scores(folds, held_out=part).join(truth, on="isic_id").with_columns(logit=pl.lit(0.5)) for part in (False, True)
    )
    holdout = holdout.with_columns(fold_logits=pl.lit([0.25, 0.75]))
    assert leaks.check_oof(oof, folds, holdout, store=store)
    with pytest.raises(DataError, match=rf"oof: 1 lesions \({oof['isic_id'][4]}\) have another target"):
        leaks.check_oof(change(oof, 4, "target", 1 - oof["target"][4]), folds, holdout, store=store)
    with pytest.raises(DataError, match=r"oof: 1 lesions .* another patient"):
        leaks.check_oof(change(oof, 4, "patient_group", "IP_new"), folds, holdout, store=store)
    with pytest.raises(DataError, match=r"holdout: 1 lesions .* isn't the mean"):
        leaks.check_oof(oof, folds, change(holdout, 0, "logit", 3.0), store=store)


def test_a_prediction_of_a_model_that_learned_from_the_lesion_is_refused(folds: Folds) -> None:
    oof = scores(folds)
    other = (oof["fold"][7] + 1) % 3
    with pytest.raises(DataError, match=rf"1 lesions \({oof['isic_id'][7]}\) are given another fold.*learned from"):
        leaks.check_oof(change(oof, 7, "fold", other), folds)


def test_all_offenders_are_counted_and_five_named(folds: Folds) -> None:
    oof = scores(folds)
    swapped = oof.with_columns(fold=(pl.col("fold") + 1) % 3)
    first = ", ".join(sorted(oof["isic_id"])[:5])
    with pytest.raises(DataError, match=rf"{len(oof)} lesions \({first}, \.\.\.\)"):
        leaks.check_oof(swapped, folds)


def test_predictions_of_another_split_are_refused(folds: Folds) -> None:
    other = make_folds(folds.ids, (np.arange(LESIONS) % 10 == 0).astype(np.int8), groups(), count=3, seed=5)
    with pytest.raises(DataError, match=rf"another split \(fold hash {other.hash[:12]}"):
        leaks.check_oof(scores(folds).with_columns(fold_hash=pl.lit(other.hash)), folds)
    with pytest.raises(DataError, match=r"1 lesions .* another split"):
        leaks.check_oof(change(scores(folds), 3, "fold_hash", "0" * 64), folds)


def test_unknown_repeated_and_missing_lesions_are_refused(folds: Folds) -> None:
    oof = scores(folds)
    with pytest.raises(DataError, match=r"1 lesions \(ISIC_9999999\) are not in the split"):
        leaks.check_oof(change(oof, 0, "isic_id", "ISIC_9999999"), folds)
    with pytest.raises(DataError, match=rf"1 lesions \({oof['isic_id'][2]}\) are scored more than once"):
        leaks.check_oof(pl.concat([oof, oof[2:3]]), folds)
    with pytest.raises(DataError, match=rf"1 lesions \({oof['isic_id'][2]}\) have no score"):
        leaks.check_oof(pl.concat([oof[:2], oof[3:]]), folds)
    with pytest.raises(DataError, match="have no fold"):
        leaks.check_oof(change(oof, 0, "fold", None), folds)
    with pytest.raises(DataError, match="no column fold_hash"):
        leaks.check_oof(oof.drop("fold_hash"), folds)


def test_the_holdout_and_the_folds_may_not_be_mixed(folds: Folds) -> None:
    oof, holdout = scores(folds), scores(folds, held_out=True)
    with pytest.raises(DataError, match=rf"oof: 1 lesions \({holdout['isic_id'][0]}\) are of the hold-out"):
        leaks.check_oof(pl.concat([oof, holdout[:1]]), folds)
    with pytest.raises(DataError, match=rf"holdout: 1 lesions \({oof['isic_id'][0]}\) are of a fold"):
        leaks.check_oof(oof, folds, pl.concat([holdout, oof[:1]]))


def test_a_patient_on_two_sides_is_refused_by_name(folds: Folds) -> None:
    oof, holdout = scores(folds), scores(folds, held_out=True)
    a = oof["patient_group"][0]
    elsewhere = int(np.flatnonzero(oof["fold"].to_numpy() != oof["fold"][0])[0])
    with pytest.raises(DataError, match=rf"1 patients lie in more than one fold \({a} in fold"):
        leaks.check_oof(change(oof, elsewhere, "patient_group", a), folds)
    with pytest.raises(DataError, match=rf"{a} in fold \d and the hold-out"):
        leaks.check_oof(oof, folds, change(holdout, 0, "patient_group", a))


def features(folds: Folds) -> pl.DataFrame:
    return pl.DataFrame({"isic_id": folds.ids, "fold": folds.fold.astype(np.int64)}).with_columns(
        model_fold=pl.when(pl.col("fold") == HOLDOUT).then(None).otherwise("fold")
    )


def test_features_from_models_that_held_the_lesion_out_are_fine(folds: Folds) -> None:
    table = features(folds)
    leaks.check_features(table, folds)
    leaks.check_features(table.with_columns(pl.col("model_fold").fill_null(1)), folds)


def test_in_fold_stacking_is_refused_by_name(folds: Folds) -> None:
    table = features(folds)
    row = int(np.flatnonzero(folds.fold == 0)[0])
    with pytest.raises(DataError, match=rf"1 lesions \({folds.ids[row]}\) were scored by a model that learned"):
        leaks.check_features(change(table, row, "model_fold", 1), folds)
    one_model = table.with_columns(model_fold=pl.lit(1))
    learned = int(((folds.fold != 1) & (folds.fold != HOLDOUT)).sum())
    with pytest.raises(DataError, match=rf"{learned} lesions .* learned from them"):
        leaks.check_features(one_model, folds)
    for nobody in (3, -1, None):
        with pytest.raises(DataError, match=rf"\({folds.ids[row]}\) have no model of folds 0 to 2"):
            leaks.check_features(change(table, row, "model_fold", nobody), folds)
    with pytest.raises(DataError, match="another fold than the split's"):
        leaks.check_features(change(table, row, "fold", 1), folds)


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """60 lesions of 20 patients; 3 repeats 2 byte for byte, 17 is 9 re-encoded, 41 is 40 enlarged, 50 repeats 48."""
    out = tmp_path_factory.mktemp("copied")
    (out / "data" / "train-image").mkdir(parents=True)
    pictures = [picture(i) for i in range(60)]
    pictures[3], pictures[50] = pictures[2], pictures[48]
    pictures[17], pictures[41] = again(pictures[9], quality=60), again(pictures[40], scale=1.5)
    for i, data in enumerate(pictures):
        (out / "data" / "train-image" / f"ISIC_{i:07d}.jpg").write_bytes(data)
    patients = [None if i == 17 else f"IP_{i // 3:03d}" for i in range(60)]
    pl.DataFrame(
        {"isic_id": [f"ISIC_{i:07d}" for i in range(60)], "target": [int(i in (9, 30)) for i in range(60)],
         "patient_id": patients}
    ).write_csv(out / "data" / "train-metadata.csv")  # fmt: skip
    return prepare(out / "data", out / "store")


def picture(seed: int) -> bytes:
    """Something with structure, unlike all others."""
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(60, 220, (7, 8, 3), dtype=np.uint8)).resize((97, 83), Image.Resampling.BICUBIC)
    pixels = np.asarray(image) + rng.normal(0, 12, (83, 97, 1))
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def again(data: bytes, quality: int = 90, scale: float = 1.0) -> bytes:
    image = Image.open(io.BytesIO(data))
    buffer = io.BytesIO()
    image.resize((round(image.width * scale), round(image.height * scale))).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def split_of(store: Store, moved: dict[int, int]) -> Folds:
    fold = np.zeros(len(store), np.int8)
    fold[-1] = 1
    for row, k in moved.items():
        fold[row] = k
    return Folds(store.ids, fold, store.hash, 0)


def test_copies_across_folds_are_listed_and_within_a_fold_not(copied: Store) -> None:
    found = leaks.duplicates(copied, split_of(copied, {3: 1, 17: 1, 50: HOLDOUT}))
    exact, near = found["exact_duplicates"], found["near_duplicates"]
    assert (exact["count"], exact["checked"], near["count"], near["checked"], near["reason"]) == (2, 60, 1, 60, None)
    assert exact["pairs"] == [
        {"ids": ["ISIC_0000002", "ISIC_0000003"], "folds": [0, 1], "targets": [0, 0], "same_patient": False},
        {"ids": ["ISIC_0000048", "ISIC_0000050"], "folds": [0, -1], "targets": [0, 0], "same_patient": True},
    ]
    assert near["pairs"] == [
        {"ids": ["ISIC_0000009", "ISIC_0000017"], "folds": [0, 1], "targets": [1, 0], "same_patient": None}
    ]
    within = leaks.duplicates(copied, split_of(copied, {}))
    assert within["exact_duplicates"]["count"] == within["near_duplicates"]["count"] == 0
    enlarged = leaks.duplicates(copied, split_of(copied, {41: 1}))["near_duplicates"]
    assert [pair["ids"] for pair in enlarged["pairs"]] == [["ISIC_0000040", "ISIC_0000041"]]


def test_many_lesions_are_not_decoded_unasked(copied: Store) -> None:
    near = leaks.duplicates(copied, split_of(copied, {17: 1}), near_limit=59)["near_duplicates"]
    assert (near["count"], near["checked"], near["pairs"]) == (None, 0, [])
    assert "60 lesions: over 59" in near["reason"] and "data check" in near["reason"]
    assert leaks.duplicates(copied, split_of(copied, {17: 1}), near_limit=None)["near_duplicates"]["count"] == 1


def test_all_pairs_are_counted_and_fifty_listed(tmp_path: Path) -> None:
    (tmp_path / "data" / "train-image").mkdir(parents=True)
    one, other = picture(0), picture(1)
    for i in range(40):
        (tmp_path / "data" / "train-image" / f"ISIC_{i:07d}.jpg").write_bytes(one if i < 30 else other)
    pl.DataFrame(
        {"isic_id": [f"ISIC_{i:07d}" for i in range(40)], "target": [int(i == 39) for i in range(40)]}
    ).write_csv(tmp_path / "data" / "train-metadata.csv")
    store = prepare(tmp_path / "data", tmp_path / "store")
    fold = (np.arange(40) % 2).astype(np.int8)
    exact = leaks.duplicates(store, Folds(store.ids, fold, store.hash, 0))["exact_duplicates"]
    assert (exact["count"], len(exact["pairs"])) == (15 * 15 + 5 * 5, leaks.LISTED)
    assert exact["pairs"][0]["ids"][1] == "ISIC_0000039"  # What concerns a malignant lesion comes first.
    assert exact["pairs"][0]["same_patient"] is None


def test_the_real_images_have_no_copies(real_data: Path, tmp_path: Path) -> None:
    store = prepare(real_data / "isic2024-images", tmp_path / "store")
    folds = make_folds(store.ids, store.targets, store.groups, data_hash=store.hash, holdout=0.2)
    folds.check(store)
    found = leaks.duplicates(store, folds)
    assert found["near_duplicates"]["checked"] == len(store)
    assert found["exact_duplicates"]["count"] == found["near_duplicates"]["count"] == 0
