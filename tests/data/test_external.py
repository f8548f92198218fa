"""Public sets become data sets of our layout: labels, groups, licences, counts, and what isn't as published.

No image or row here is of those sets: the folders are stand-ins in the published layouts, with drawn images.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from PIL import Image

from lesionflow.data import external
from lesionflow.data.audit import audit
from lesionflow.data.external import convert, overlap
from lesionflow.data.publicsets import SETS
from lesionflow.data.source import open_source
from lesionflow.errors import DataError, UsageError
from lesionflow.recipe import Recipe

Encode = Callable[..., bytes]


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text.strip() + "\n")
    return path


def one_hot(classes: str, found: dict[str, str]) -> str:
    names = classes.split(",")
    rows = [",".join([image, *("1.0" if name == label else "0.0" for name in names)]) for image, label in found.items()]
    return "\n".join([f"image,{classes}", *rows])


def images(folder: Path, names: list[str], encode: Encode, suffix: str = ".jpg") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        data = encode(number, "PNG" if suffix == ".png" else "JPEG")
        (folder / f"{name}{suffix}").write_bytes(data)


def isic2018(root: Path, encode: Encode) -> Path:
    classes = "MEL,NV,BCC,AKIEC,BKL,DF,VASC"
    found = dict(zip([f"ISIC_{n:07d}" for n in range(24306, 24313)], classes.split(","), strict=True))
    truth = one_hot(classes, found)
    write(root / "ISIC2018_Task3_Training_GroundTruth" / "ISIC2018_Task3_Training_GroundTruth.csv", truth)
    groups = [f"{name},HAM_{number // 2:07d},histopathology" for number, name in enumerate(found)]
    write(
        root / "ISIC2018_Task3_Training_LesionGroupings.csv",
        "\n".join(["image,lesion_id,diagnosis_confirm_type", *groups]),
    )
    images(root / "ISIC2018_Task3_Training_Input", list(found), encode)
    return root


def isic2019(root: Path, encode: Encode) -> Path:
    names = ["ISIC_0000000", "ISIC_0000002_downsampled", *(f"ISIC_{n:07d}" for n in range(24306, 24314))]
    classes = "MEL,NV,BCC,AK,BKL,DF,VASC,SCC,UNK"
    found = dict(zip(names, [*classes.split(","), "NV"], strict=True))
    write(root / "ISIC_2019_Training_GroundTruth.csv", one_hot(classes, found))
    rows = [
        "ISIC_0000000,55.0,anterior torso,MSK4_0011169,female",
        "ISIC_0000002_downsampled,,palms/soles,,",
        *(f"{name},85.0,head/neck,HAM_{number // 2:07d},male" for number, name in enumerate(names[2:])),
    ]
    write(
        root / "ISIC_2019_Training_Metadata.csv",
        "\n".join(["image,age_approx,anatom_site_general,lesion_id,sex", *rows]),
    )
    images(root / "ISIC_2019_Training_Input" / "ISIC_2019_Training_Input", names, encode)
    return root


def isic2020(root: Path, encode: Encode) -> Path:
    header = (
        "image_name,patient_id,lesion_id,sex,age_approx,anatom_site_general_challenge,diagnosis,benign_malignant,target"
    )
    rows = [
        "ISIC_2637011,IP_7279968,IL_7972535,male,45.0,head/neck,unknown,benign,0",
        "ISIC_0015719,IP_3075186,IL_4649854,female,45.0,upper extremity,nevus,benign,0",
        "ISIC_0052212,IP_2842074,IL_9087444,female,50.0,torso,melanoma,malignant,1",
        "ISIC_0068279,IP_6890425,IL_4255399,,,,unknown,benign,0",
    ]
    write(root / "ISIC_2020_Training_GroundTruth_v2.csv", "\n".join([header, *rows]))
    write(root / "ISIC_2020_Training_Duplicates.csv", "image_name_1,image_name_2\nISIC_2637011,ISIC_0068279")
    images(root / "train", [row.partition(",")[0] for row in rows], encode)
    return root


PAD_HEADER = (
    "patient_id,lesion_id,smoke,drink,background_father,background_mother,age,pesticide,gender,skin_cancer_history,"
    "cancer_history,has_piped_water,has_sewage_system,fitspatrick,region,diameter_1,diameter_2,diagnostic,itch,grew,"
    "hurt,changed,bleed,elevation,img_id,biopsed"
)


def pad(root: Path, encode: Encode) -> Path:
    found = [("BCC", "NOSE", "FEMALE"), ("MEL", "BACK", "MALE"), ("SCC", "HAND", ""), ("ACK", "FACE", "MALE"),
             ("NEV", "THIGH", "FEMALE"), ("SEK", "CHEST", "MALE")]  # fmt: skip
    names = [f"PAT_{n // 2 + 8}_{n + 15}_{n + 100}" for n in range(len(found))]
    rows = [
        f"PAT_{n // 2 + 8},{n + 15},,,,,{50 + n},,{sex},,,,,,{region},,,{label},,,,,,,{names[n]}.png,True"
        for n, (label, region, sex) in enumerate(found)
    ]
    write(root / "metadata.csv", "\n".join([PAD_HEADER, *rows]))
    images(root / "images" / "imgs_part_1" / "imgs_part_1", names[:3], encode, ".png")
    images(root / "images" / "imgs_part_2" / "imgs_part_2", names[3:], encode, ".png")
    return root


STAND_INS = {"isic2018": isic2018, "isic2019": isic2019, "isic2020": isic2020, "pad-ufes-20": pad}
EXPECTED: dict[str, dict[str, Any]] = {
    "isic2018": {"lesions": 7, "malignant": 2, "groups": 4, "without a group": 0, "dropped": {}},
    "isic2019": {"lesions": 9, "malignant": 3, "groups": 5, "without a group": 1, "dropped": {"unknown diagnosis": 1}},
    "isic2020": {"lesions": 3, "malignant": 1, "groups": 3, "without a group": 0, "dropped": {"duplicate": 1}},
    "pad-ufes-20": {"lesions": 6, "malignant": 3, "groups": 3, "without a group": 0, "dropped": {}},
}


@pytest.mark.parametrize("kind", SETS)
def test_a_set_becomes_a_data_set_that_passes_the_checks(kind: str, tmp_path: Path, encode: Encode) -> None:
    source = STAND_INS[kind](tmp_path / "stand-in", encode)
    out = tmp_path / "out"
    counts = convert(kind, source, out, progress=False)
    assert {name: counts[name] for name in EXPECTED[kind]} == EXPECTED[kind]
    assert counts["linked"] == counts["lesions"] and counts["copied"] == counts["scaled"] == 0
    with open_source(out) as ours:
        ours.check()
        assert ours.metadata is not None
        table = ours.metadata
        for isic_id, data in ours.images(ours.ids):
            (published,) = [p for p in source.rglob(f"{isic_id}*") if p.suffix in (".jpg", ".png")]
            assert data == published.read_bytes()
    assert table.columns[:8] == [
        "isic_id", "target", "patient_id", "age_approx", "sex", "anatom_site_general", "attribution",
        "copyright_license",
    ]  # fmt: skip
    assert set(table["copyright_license"]) == {"CC-BY" if kind == "pad-ufes-20" else "CC-BY-NC"}
    record = json.loads((out / "convert.json").read_text())
    assert record["counts"] == counts and record["citation"].startswith("doi:")
    errors = [f for f in audit(out, images=False, progress=False) if f.severity == "error"]
    assert not errors, errors


def converted(kind: str, tmp_path: Path, encode: Encode, **options: Any) -> dict[str, dict[str, Any]]:
    """The stand-in's rows by id."""
    source = STAND_INS[kind](tmp_path / "stand-in", encode)
    convert(kind, source, tmp_path / "out", progress=False, **options)
    with open_source(tmp_path / "out") as ours:
        assert ours.metadata is not None
        return {row["isic_id"]: row for row in ours.metadata.iter_rows(named=True)}


def test_labels_of_every_diagnosis(tmp_path: Path, encode: Encode) -> None:
    malignant = {
        kind: {row["iddx_full"] for row in converted(kind, tmp_path / kind, encode).values() if row["target"]}
        for kind in SETS
    }
    assert malignant == {
        "isic2018": {"MEL", "BCC"},
        "isic2019": {"MEL", "BCC", "SCC"},
        "isic2020": {"1"},
        "pad-ufes-20": {"MEL", "BCC", "SCC"},
    }


@pytest.mark.parametrize(("kind", "name"), [("isic2018", "AKIEC"), ("isic2019", "AK"), ("pad-ufes-20", "ACK")])
def test_an_actinic_keratosis_is_what_was_asked_for(kind: str, name: str, tmp_path: Path, encode: Encode) -> None:
    for choice, target in (("benign", [0]), ("malignant", [1]), ("drop", [])):
        rows = converted(kind, tmp_path / choice, encode, uncertain=choice).values()
        assert [row["target"] for row in rows if row["iddx_full"] == name] == target
    record = json.loads((tmp_path / "drop" / "out" / "convert.json").read_text())
    assert record["counts"]["dropped"]["uncertain diagnosis"] == 1
    assert record["labels"][name] == "drop"


def test_metadata_is_kept_where_isic_2024_has_a_word_for_it(tmp_path: Path, encode: Encode) -> None:
    rows = converted("isic2019", tmp_path / "2019", encode)
    known = rows["ISIC_0000000"]
    assert (known["age_approx"], known["sex"], known["anatom_site_general"]) == (55.0, "female", "anterior torso")
    assert known["patient_id"] == "MSK4_0011169", "the lesion, where no patient is known"
    blank = rows["ISIC_0000002"]
    assert blank["age_approx"] is blank["sex"] is blank["anatom_site_general"] is blank["patient_id"] is None
    assert rows["ISIC_0024306"]["patient_id"] == rows["ISIC_0024307"]["patient_id"] == "HAM_0000000"
    face, back = (r for r in converted("pad-ufes-20", tmp_path / "pad", encode).values() if r["patient_id"] == "PAT_8")
    assert (face["age_approx"], face["sex"], face["anatom_site_general"]) == (50.0, "female", "head/neck")
    assert (back["sex"], back["anatom_site_general"]) == ("male", "posterior torso")


def test_ids_in_common_are_found_and_left_out(tmp_path: Path, encode: Encode) -> None:
    """ISIC 2019 holds ISIC 2018's images, and calls what it scaled down by another name."""
    converted("isic2018", tmp_path / "a", encode)
    source = isic2019(tmp_path / "stand-in", encode)
    convert("isic2019", source, tmp_path / "b", progress=False)
    older = write(tmp_path / "older.csv", "isic_id,target\nISIC_0000002_downsampled,0\nISIC_0000099,1")
    assert overlap(tmp_path / "a" / "out", tmp_path / "b") == [f"ISIC_{n:07d}" for n in range(24306, 24312)]
    assert overlap(tmp_path / "b", older) == ["ISIC_0000002"]
    assert overlap(tmp_path / "a" / "out", older) == []
    rest = convert("isic2019", source, tmp_path / "c", without=[tmp_path / "a" / "out", older], progress=False)
    assert rest["dropped"] == {"unknown diagnosis": 1, "in another set": 7} and rest["lesions"] == 2
    assert overlap(tmp_path / "a" / "out", tmp_path / "c") == []


def test_it_goes_on_where_it_broke_off_and_is_not_done_twice(
    tmp_path: Path, encode: Encode, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out, work = isic2018(tmp_path / "stand-in", encode), tmp_path / "out", tmp_path / ".out.partial"
    real, made = external.os.link, []

    def breaks(path: Path, target: Path) -> None:
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(target)
        real(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(external.os, "link", breaks)
        with pytest.raises(KeyboardInterrupt):
            convert("isic2018", source, out, progress=False)
    assert not out.exists() and len(list((work / "train-image").iterdir())) == 3
    (work / "train-image" / ".ISIC_0024309.jpg.abc").write_text("cut off")
    with monkeypatch.context() as patch:
        patch.setattr(external.os, "link", lambda path, target: made.append(target) or real(path, target))
        first = convert("isic2018", source, out, progress=False)
    assert len(made) == 3 + 4 and not work.exists()
    assert len(list((out / "train-image").iterdir())) == 7
    stamp = (out / "convert.json").stat().st_mtime_ns
    assert convert("isic2018", source, out, progress=False) == first
    assert (out / "convert.json").stat().st_mtime_ns == stamp
    with pytest.raises(UsageError, match="holds something else"):
        convert("isic2018", source, out, uncertain="drop", progress=False)


def test_images_are_copied_where_they_can_not_be_linked(
    tmp_path: Path, encode: Encode, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(path: Path, target: Path) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(external.os, "link", refuses)
    source = isic2018(tmp_path / "stand-in", encode)
    counts = convert("isic2018", source, tmp_path / "out", progress=False)
    assert (counts["linked"], counts["copied"]) == (0, 7)
    shutil.rmtree(source)
    with open_source(tmp_path / "out") as ours:
        assert len(ours.read("ISIC_0024306")) > 1000


def test_large_images_are_scaled_down_when_asked(tmp_path: Path, encode: Encode) -> None:
    source = isic2018(tmp_path / "stand-in", encode)
    folder = source / "ISIC2018_Task3_Training_Input"
    (folder / "ISIC_0024306.jpg").write_bytes(encode(1, "JPEG", 400, 300))
    (folder / "ISIC_0024307.jpg").unlink()
    (folder / "ISIC_0024307.png").write_bytes(encode(2, "PNG", 300, 400))
    counts = convert("isic2018", source, tmp_path / "out", side=96, progress=False)
    assert (counts["scaled"], counts["linked"]) == (2, 5)
    made = [Image.open(tmp_path / "out" / "train-image" / f"ISIC_{n:07d}.jpg") for n in (24306, 24307, 24308)]
    assert [image.size for image in made] == [(128, 96), (96, 128), (97, 83)]
    before = np.asarray(Image.open(folder / "ISIC_0024307.png").resize((96, 128), Image.Resampling.LANCZOS), float)
    assert np.abs(np.asarray(made[1], float) - before).mean() < 3, "the same picture, in colour"


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


T18 = "ISIC2018_Task3_Training_GroundTruth/ISIC2018_Task3_Training_GroundTruth.csv"
FAULTS: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "no set": ("isic2018", shutil.rmtree, r"no such folder; point to ISIC 2018 task 3"),
    "no table": ("isic2018", lambda s: (s / T18).unlink(), r"no ISIC2018_Task3_Training_GroundTruth.csv; point to"),
    "no column": ("isic2018", lambda s: edit(s / T18, "AKIEC", "AK"), r"GroundTruth.csv: no column AKIEC"),
    "two classes": (
        "isic2018",
        lambda s: edit(s / T18, "ISIC_0024307,0.0,1.0", "ISIC_0024307,1.0,1.0"),
        r"not exactly one 1 among zeros for 1 lesion \(ISIC_0024307\)",
    ),
    "no class": (
        "isic2018",
        lambda s: edit(s / T18, "ISIC_0024307,0.0,1.0", "ISIC_0024307,0.0,maybe"),
        r"for 1 lesion \(ISIC_0024307\)",
    ),
    "an id twice": (
        "isic2018",
        lambda s: edit(s / T18, "ISIC_0024307", "ISIC_0024306"),
        r"more than one row for 1 lesion \(ISIC_0024306\)",
    ),
    "an ungrouped image": (
        "isic2018",
        lambda s: edit(s / "ISIC2018_Task3_Training_LesionGroupings.csv", "ISIC_0024308,", "ISIC_9,"),
        r"LesionGroupings.csv: no row for 1 lesion \(ISIC_0024308\)",
    ),
    "no image": (
        "isic2018",
        lambda s: (s / "ISIC2018_Task3_Training_Input" / "ISIC_0024308.jpg").unlink(),
        r"no image .* for 1 lesion \(ISIC_0024308\); unpack all",
    ),
    "an image twice": (
        "isic2018",
        lambda s: shutil.copytree(s / "ISIC2018_Task3_Training_Input", s / "again"),
        r"image ISIC_00243\d\d is there twice",
    ),
    "no metadata": (
        "isic2019",
        lambda s: (s / "ISIC_2019_Training_Metadata.csv").unlink(),
        r"no ISIC_2019_Training_Met",
    ),
    "an age in words": (
        "isic2019",
        lambda s: edit(s / "ISIC_2019_Training_Metadata.csv", "ISIC_0000000,55.0", "ISIC_0000000,old"),
        r"column age_approx .*1 cells aren't 0 to 120 years \(ISIC_0000000: 'old'\)",
    ),
    "a target of two minds": (
        "isic2020",
        lambda s: edit(s / "ISIC_2020_Training_GroundTruth_v2.csv", "malignant,1", "benign,1"),
        r"target and benign_malignant disagree for 1 lesion \(ISIC_0052212\)",
    ),
    "another target": (
        "isic2020",
        lambda s: edit(s / "ISIC_2020_Training_GroundTruth_v2.csv", "nevus,benign,0", "nevus,benign,2"),
        r"'2' is no diagnosis of ISIC 2020 .* for 1 lesion \(ISIC_0015719\)",
    ),
    "another diagnosis": (
        "pad-ufes-20",
        lambda s: edit(s / "metadata.csv", "SEK", "WART"),
        r"'WART' is no diagnosis of PAD-UFES-20 \(MEL, BCC, SCC, ACK, NEV, SEK\), for 1 lesion \(PAT_10_20_105\)",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_not_as_published_is_refused_by_name(fault: str, tmp_path: Path, encode: Encode) -> None:
    kind, spoil, message = FAULTS[fault]
    source = STAND_INS[kind](tmp_path / "stand-in", encode)
    spoil(source)
    with pytest.raises(DataError, match=message):
        convert(kind, source, tmp_path / "out", progress=False)
    assert [path.name for path in tmp_path.iterdir() if path != source] == []


def test_what_can_not_be_asked_for(tmp_path: Path, encode: Encode) -> None:
    source = isic2018(tmp_path / "stand-in", encode)
    for arguments, options, message in (
        (("isic2016", source, tmp_path / "out"), {}, "not one of isic2018"),
        (("isic2018", source, tmp_path / "out"), {"uncertain": "maybe"}, "--uncertain maybe"),
        (("isic2018", source, tmp_path / "out"), {"side": 8}, "--side 8"),
        (("isic2018", source, source / "out"), {}, "lies in the set's own folder"),
    ):
        with pytest.raises(UsageError, match=message):
            convert(*arguments, progress=False, **options)


def test_files_that_no_training_reads_are_refused_unless_scaled(
    tmp_path: Path, encode: Encode, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lesionflow.data.images import Limits

    source = pad(tmp_path / "stand-in", encode)
    monkeypatch.setattr(external, "DEFAULT_LIMITS", Limits(bytes=1000))
    with pytest.raises(DataError, match=r"6 lesions \(PAT_.*scale them down with --side 512"):
        convert("pad-ufes-20", source, tmp_path / "out", progress=False)
    assert convert("pad-ufes-20", source, tmp_path / "out", side=32, progress=False)["scaled"] == 6
    assert len(pl.read_csv(tmp_path / "out" / "train-metadata.csv")) == 6


@pytest.mark.slow
def test_a_model_of_such_a_set_is_where_the_next_one_starts(
    synthetic: Path, prepared: Path, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    """From the published layout to `model.weights` of a second training, through every step between."""
    import torch
    from safetensors.torch import load_file

    from lesionflow import steps
    from lesionflow.models.image import build
    from lesionflow.training.run import train_folds

    stand_in = tmp_path / "stand-in"
    found, rows = {}, []
    (stand_in / "ISIC_2019_Training_Input").mkdir(parents=True)
    with open_source(synthetic) as drawn:
        assert drawn.metadata is not None
        for isic_id, target, patient in drawn.metadata.select("isic_id", "target", "patient_id").iter_rows():
            found[isic_id] = "MEL" if target else "NV"
            rows.append(f"{isic_id},50.0,head/neck,{patient},male")
            (stand_in / "ISIC_2019_Training_Input" / f"{isic_id}.jpg").write_bytes(drawn.read(isic_id))
    write(stand_in / "ISIC_2019_Training_GroundTruth.csv", one_hot("MEL,NV,BCC,AK,BKL,DF,VASC,SCC,UNK", found))
    header = "image,age_approx,anatom_site_general,lesion_id,sex"
    write(stand_in / "ISIC_2019_Training_Metadata.csv", "\n".join([header, *rows]))
    counts = convert("isic2019", stand_in, tmp_path / "data", progress=False)
    assert counts["malignant"] == list(found.values()).count("MEL")

    first = tmp_path / "first"
    planned = steps.begin(first, tiny_recipe, tmp_path / "data")
    steps.prepare(first, tmp_path / "data", planned["prepare"])
    steps.split(first, planned["split"])
    train_folds(first, [0])
    weights = first / "fold-0" / "model-0" / "weights.safetensors"

    recipe = Recipe.load(prepared / "recipe.toml", [f"model.weights={weights}", "training.epochs=1"])
    network, learned = build(recipe.model).state_dict(), load_file(weights)
    same = {name: torch.equal(value, learned[name]) for name, value in network.items()}
    assert [name for name, equal in same.items() if not equal] == ["classifier.weight", "classifier.bias"]
    second = tmp_path / "second"
    planned = steps.begin(second, recipe, synthetic)
    steps.prepare(second, synthetic, planned["prepare"])
    steps.split(second, planned["split"])
    train_folds(second, [0])
    assert len(pl.read_parquet(second / "fold-0" / "oof.parquet")) > 100
    other = Recipe.load(prepared / "recipe.toml", [f"model.weights={weights}", "model.backbone=mobilenetv3_small_075"])
    with pytest.raises(UsageError, match=r"model.weights lack \d+ tensors"):
        build(other.model)
