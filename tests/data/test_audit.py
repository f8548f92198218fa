"""Each fault is planted once in a small clean set and must be found: where it is, and what to do."""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path

import h5py
import numpy as np
import polars as pl
import pytest
from PIL import Image

from lesionflow.data.audit import audit, render, to_json

REAL = Path(os.environ.get("LESIONFLOW_REAL_DATA", Path(__file__).parents[2] / "../shared/data"))
LESIONS = 60
PATIENTS = 12


def lesion(seed, side=96):
    """A dark spot on textured skin, uint8 [side, side, 3]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side] / side - 0.5
    skin = rng.uniform([180, 130, 110], [225, 180, 160])
    spot = np.exp(-(((x - rng.uniform(-0.1, 0.1)) / rng.uniform(0.1, 0.3)) ** 2 + (y / rng.uniform(0.1, 0.3)) ** 2))
    texture = Image.fromarray(rng.integers(0, 255, (24, 24), dtype=np.uint8)).resize((side, side))
    pixels = skin - 90 * spot[..., None] + (np.asarray(texture, float)[..., None] - 128) * 0.2
    return np.clip(pixels + rng.normal(0, 2, pixels.shape), 0, 255).astype(np.uint8)


def encode(pixels, kind="JPEG", **options):
    out = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(out, kind, **options)
    return out.getvalue()


def make_table(count, first, rng):
    """Text cells of a metadata table in which everything is as it should be."""
    a, b, a_ext, b_ext = rng.uniform(5, 30, (4, count))
    light = rng.uniform(20, 70, count)
    patient = rng.permutation(np.arange(count) % PATIENTS)
    target = (np.arange(count) % 10 == 0).astype(int)
    columns = {
        "isic_id": [f"ISIC_{i:07d}" for i in range(first, first + count)],
        "target": target,
        "patient_id": [f"IP_{first + p:07d}" for p in patient],
        "age_approx": patient * 5.0 + 20,
        "sex": np.where(patient % 2, "male", "female"),
        "anatom_site_general": rng.choice(["anterior torso", "head/neck"], count),
        "clin_size_long_diam_mm": rng.uniform(2, 12, count).round(2),
        "tbp_lv_A": a,
        "tbp_lv_Aext": a_ext,
        "tbp_lv_B": b,
        "tbp_lv_Bext": b_ext,
        "tbp_lv_C": np.hypot(a, b),
        "tbp_lv_H": np.degrees(np.arctan2(b, a)),
        "tbp_lv_L": light,
        "tbp_lv_deltaA": a - a_ext,
        "tbp_lv_deltaB": b - b_ext,
        "attribution": ["Institute, of Somewhere"] * count,
        "copyright_license": ["CC-0"] * count,
        "iddx_1": np.where(target, "Malignant", "Benign"),
        "tbp_lv_dnn_lesion_confidence": rng.uniform(50, 100, count),
    }
    return pl.DataFrame({name: pl.Series(map(str, values)) for name, values in columns.items()})


class DataSet:
    """A data set directory that faults are planted in."""

    def __init__(self, path):
        self.path = path

    def table(self, part="train"):
        return pl.read_csv(self.path / f"{part}-metadata.csv", infer_schema=False)

    def write_table(self, table, part="train"):
        table.write_csv(self.path / f"{part}-metadata.csv")

    def cell(self, row, column, value, part="train"):
        table = self.table(part)
        cells = table[column].to_list()
        cells[row] = value
        self.write_table(table.with_columns(pl.Series(column, cells, dtype=pl.String)), part)

    def images(self, part="train"):
        with h5py.File(self.path / f"{part}-image.hdf5") as file:
            return {name: file[name][()] for name in file}

    def image(self, row, data, part="train"):
        """Replace the image of a row (bytes), or remove it (None); returns its id."""
        isic_id = self.id(row, part)
        with h5py.File(self.path / f"{part}-image.hdf5", "r+") as file:
            if isic_id in file:
                del file[isic_id]
            if data is not None:
                file[isic_id] = np.bytes_(data)
        return isic_id

    def id(self, row, part="train"):
        return self.table(part)["isic_id"][row]

    def row_of(self, patient_of_row, *, same):
        """Another row, of the same or of another patient, with the same target."""
        table = self.table()
        keys = table.select("patient_id", "target").rows()
        for row in range(len(keys) - 1, -1, -1):
            alike = keys[row][0] == keys[patient_of_row][0]
            if row != patient_of_row and alike == same and keys[row][1] == keys[patient_of_row][1]:
                return row
        raise AssertionError("no such row")


@pytest.fixture(scope="session")
def template(tmp_path_factory):
    path = tmp_path_factory.mktemp("clean")
    rng = np.random.default_rng(7)
    for part, first, count in (("train", 1000, LESIONS), ("test", 9000, 8)):
        table = make_table(count, first, rng)
        with h5py.File(path / f"{part}-image.hdf5", "w") as file:
            for isic_id in table["isic_id"]:
                file[isic_id] = np.bytes_(encode(lesion(int(isic_id[5:])), quality=90))
        if part == "test":
            table = table.drop("target", "iddx_1", "tbp_lv_dnn_lesion_confidence")
        table.write_csv(path / f"{part}-metadata.csv")
    return path


@pytest.fixture
def data(template, tmp_path):
    shutil.copytree(template, tmp_path / "data")
    return DataSet(tmp_path / "data")


def the(findings, code, *, also=()):
    """The one finding of a kind; no error but it (and those that follow from it) may be there."""
    matching = [f for f in findings if f.code == code]
    assert len(matching) == 1, [(f.code, f.where, f.examples) for f in findings]
    (finding,) = matching
    assert finding.remedy
    assert finding.count >= len(finding.examples) >= 1
    others = [f.code for f in findings if f.severity == "error" and f.code not in (code, *also)]
    assert not others
    return finding


def test_clean_set_has_no_findings(data):
    assert audit(data.path) == []


def test_clean_set_of_two_columns_and_a_folder_has_no_findings(data):
    data.write_table(data.table().select("isic_id", "target"))
    (data.path / "train-image/image").mkdir(parents=True)
    for isic_id, jpeg in data.images().items():
        (data.path / f"train-image/image/{isic_id}.jpg").write_bytes(jpeg)
    (data.path / "train-image.hdf5").unlink()
    assert audit(data.path) == []


# Images -------------------------------------------------------------------------------------------


def cut_exif(pixels):
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(pixels, exif=exif)


def deep_png(pixels):
    return encode(Image.fromarray(pixels[..., 0].astype(np.uint16) * 257), "PNG")


IMAGE_FAULTS = {
    "zero bytes": (lambda p: b"", "empty_image", "error"),
    "truncated": (lambda p: encode(p)[:-300], "damaged_image", "error"),
    "header only": (lambda p: encode(p)[:40], "damaged_image", "error"),
    "text": (lambda p: b"<html>404</html>", "not_an_image", "error"),
    "huge": (lambda p: encode(Image.new("RGB", (9000, 20))), "image_over_limits", "error"),
    "tiny": (lambda p: encode(p[:4, :4]), "image_over_limits", "error"),
    "cmyk": (lambda p: encode(Image.fromarray(p).convert("CMYK")), "cmyk_image", "warning"),
    "grey": (lambda p: encode(Image.fromarray(p).convert("L")), "grey_image", "warning"),
    "rotated": (cut_exif, "rotated_image", "warning"),
    "png": (lambda p: encode(p, "PNG"), "misnamed_image", "warning"),
    "png of 16 bits": (deep_png, "deep_image", "warning"),
    "one colour": (lambda p: encode(np.full_like(p, 130)), "blank_image", "warning"),
}


@pytest.mark.parametrize("fault", IMAGE_FAULTS)
@pytest.mark.parametrize("storage", ["hdf5", "folder"])
def test_faulty_image_is_found(data, fault, storage):
    make, code, severity = IMAGE_FAULTS[fault]
    isic_id = data.image(17, make(lesion(1)))
    if storage == "folder":
        folder = data.path / "train-image"
        folder.mkdir()
        for name, jpeg in data.images().items():
            (folder / f"{name}.jpg").write_bytes(jpeg)
        (data.path / "train-image.hdf5").unlink()
    finding = the(audit(data.path), code)
    assert finding.severity == severity
    assert finding.count == 1
    assert finding.examples[0].split()[0] == isic_id


def test_png_in_a_png_file_is_fine(tmp_path):
    for seed in range(3):
        (tmp_path / f"ISIC_{seed}.png").write_bytes(encode(lesion(seed), "PNG"))
    assert audit(tmp_path) == []


def test_truncated_hdf5_is_found(data):
    path = data.path / "train-image.hdf5"
    os.truncate(path, path.stat().st_size // 2)
    assert the(audit(data.path), "truncated_hdf5").where == "train-image.hdf5"


@pytest.mark.parametrize(
    ("content", "code"), [(b"", "empty_file"), (b"no HDF5 at all " * 100, "not_hdf5")], ids=["empty", "other format"]
)
def test_unreadable_hdf5_is_found(data, content, code):
    (data.path / "train-image.hdf5").write_bytes(content)
    assert the(audit(data.path), code).where == "train-image.hdf5"


def test_missing_and_extra_images_are_found(data):
    isic_id = data.image(5, None)
    assert the(audit(data.path), "missing_image").examples == (isic_id,)
    data.write_table(data.table().filter(pl.col("isic_id") != isic_id))
    with h5py.File(data.path / "train-image.hdf5", "r+") as file:
        file["ISIC_7777777"] = np.bytes_(encode(lesion(0)))
    finding = the(audit(data.path), "extra_image")
    assert (finding.severity, finding.examples) == ("warning", ("ISIC_7777777",))


@pytest.mark.parametrize("images", [True, False])
def test_without_images_only_the_metadata_is_judged(data, images):
    data.image(3, b"broken")
    found = {f.code for f in audit(data.path, images=images)}
    assert found == ({"not_an_image"} if images else set())


# Images that are the same -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("same_patient", "code", "severity"),
    [(True, "same_bytes", "warning"), (False, "same_bytes_across_patients", "error")],
)
def test_equal_bytes_are_found(data, same_patient, code, severity):
    other = data.row_of(11, same=same_patient)
    data.image(other, data.images()[data.id(11)])
    finding = the(audit(data.path), code)
    assert finding.severity == severity
    assert set(finding.examples[0].split(" = ")) == {data.id(11), data.id(other)}


def test_equal_bytes_with_two_labels_are_found(data):
    data.image(11, data.images()[data.id(10)])
    assert the(audit(data.path), "same_bytes_two_labels").examples == (f"{data.id(10)} = {data.id(11)}",)


def copies(jpeg):
    image = Image.open(io.BytesIO(jpeg))
    brighter = np.clip(np.asarray(image, int) + 6, 0, 255).astype(np.uint8)
    return {
        "quality 95": encode(image, quality=95),
        "quality 60": encode(image, quality=60),
        "smaller": encode(image.resize((64, 64), Image.Resampling.LANCZOS), quality=90),
        "larger": encode(image.resize((150, 150), Image.Resampling.BICUBIC), quality=90),
        "brighter": encode(brighter, quality=90),
    }


@pytest.mark.parametrize("kind", copies(encode(lesion(0))))
def test_near_duplicates_are_found(data, kind):
    other = data.row_of(11, same=True)
    data.image(other, copies(data.images()[data.id(11)])[kind])
    finding = the(audit(data.path), "near_duplicate")
    assert finding.severity == "warning"
    assert set(finding.examples[0].split(" = ")) == {data.id(11), data.id(other)}


def test_near_duplicate_across_patients_is_found(data):
    other = data.row_of(11, same=False)
    data.image(other, copies(data.images()[data.id(11)])["quality 60"])
    the(audit(data.path), "near_duplicate_across_patients")


def test_equal_bytes_in_train_and_test_are_found(data):
    data.image(2, data.images()[data.id(4)], part="test")
    assert the(audit(data.path), "same_bytes_train_test").examples == (data.id(2, "test"),)


def test_several_processes_find_the_same(data):
    data.image(3, b"broken")
    data.image(data.row_of(11, same=True), data.images()[data.id(11)])
    assert audit(data.path, workers=2) == audit(data.path)


# Metadata -----------------------------------------------------------------------------------------

CELL_FAULTS = {
    "NaN": ("age_approx", "NaN", "not_finite", "error"),
    "infinite": ("tbp_lv_L", "inf", "not_finite", "error"),
    "negative age": ("age_approx", "-5", "out_of_range", "error"),
    "lightness above 100": ("tbp_lv_L", "140", "out_of_range", "error"),
    "text in a number": ("clin_size_long_diam_mm", "about 3", "not_a_number", "error"),
    "decimal comma": ("clin_size_long_diam_mm", "3,5", "not_a_number", "error"),
    "unknown site": ("anatom_site_general", "elbow", "unknown_category", "warning"),
    "target 2": ("target", "2", "bad_target", "error"),
    "target in words": ("target", "malignant", "bad_target", "error"),
    "target 0.5": ("target", "0.5", "bad_target", "error"),
    "no target": ("target", None, "no_target", "error"),
    "another diagnosis": ("iddx_1", "Malignant", "diagnosis_disagrees", "warning"),
}


@pytest.mark.parametrize("fault", CELL_FAULTS)
def test_faulty_cell_is_found(data, fault):
    column, value, code, severity = CELL_FAULTS[fault]
    data.cell(23, column, value)
    finding = the(audit(data.path, images=False), code)
    assert finding.severity == severity
    assert column in finding.where
    assert finding.examples == (data.id(23) if value is None else f"{data.id(23)}: {value}",)


def test_duplicate_id_is_found(data):
    table = data.table()
    data.write_table(pl.concat([table, table[7]]))
    assert the(audit(data.path, images=False), "duplicate_id").examples == (data.id(7),)


def test_empty_and_odd_ids_are_found(data):
    data.cell(4, "isic_id", None)
    assert the(audit(data.path, images=False), "empty_id").examples == ("line 6",)
    data.cell(4, "isic_id", "ISIC_0000001.jpg")
    assert the(audit(data.path, images=False), "odd_id", also=["missing_image"]).examples == ("'ISIC_0000001.jpg'",)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("sex", "age_approx"),
        ("isic_id", "patient_id"),
        ("target", "patient_id"),
        ("sex", "anatom_site_general"),
        ("tbp_lv_A", "tbp_lv_B"),  # Ranges can't tell these apart; the chroma and hue can.
        ("tbp_lv_C", "tbp_lv_L"),
        ("tbp_lv_deltaA", "tbp_lv_deltaB"),
    ],
)
def test_swapped_header_is_found(data, first, second):
    data.write_table(data.table().rename({first: second, second: first}))
    finding = the(audit(data.path, images=False), "swapped_header", also=["missing_image"])
    assert set(finding.examples) == {first, second}


@pytest.mark.parametrize(("value", "code"), [("0", "no_malignant"), ("1", "no_benign")])
def test_one_class_only_is_found(data, value, code):
    data.write_table(data.table().drop("iddx_1").with_columns(target=pl.lit(value)))
    assert the(audit(data.path, images=False), code).where == "target"


@pytest.mark.parametrize("column", ["isic_id", "target"])
def test_missing_column_is_found(data, column):
    data.write_table(data.table().drop(column))
    finding = the(audit(data.path, images=False), "missing_column")
    assert finding.examples == (column,)


def test_misspelt_column_is_found(data):
    data.write_table(data.table().rename({"age_approx": "age_aprox"}))
    assert the(audit(data.path, images=False), "unknown_column").examples == ("age_aprox",)


def test_train_only_columns_in_the_test_file_are_found(data):
    data.write_table(data.table("test").with_columns(mel_thick_mm=pl.lit("0.4")), "test")
    finding = the(audit(data.path, images=False), "train_only_column")
    assert (finding.where, finding.examples) == ("test-metadata.csv", ("mel_thick_mm",))


def test_missingness_that_gives_the_label_away_is_found(data):
    benign = pl.col("target") == "0"
    hidden = [pl.when(~benign).then(pl.col(c)).alias(c) for c in ("age_approx", "tbp_lv_L", "patient_id")]
    data.write_table(data.table().with_columns(hidden))
    finding = the(audit(data.path, images=False), "missing_by_label")
    assert finding.severity == "warning"
    assert {e.split()[0] for e in finding.examples} == {"age_approx", "tbp_lv_L", "patient_id"}


def test_missingness_alike_for_both_labels_is_fine(data):
    every_third = pl.int_range(pl.len()) % 3 == 0
    data.write_table(data.table().with_columns(pl.when(~every_third).then("age_approx").alias("age_approx")))
    assert audit(data.path, images=False) == []


def test_lesions_of_unknown_patients_are_counted(data):
    data.cell(8, "patient_id", None)
    assert the(audit(data.path, images=False), "no_patient").examples == (data.id(8),)


def test_patient_of_both_sexes_is_found(data):
    table = data.table()
    data.cell(8, "sex", "male" if table["sex"][8] == "female" else "female")
    assert the(audit(data.path, images=False), "two_sexes").examples == (table["patient_id"][8],)


def test_patient_with_most_lesions_is_found(data):
    busy = pl.int_range(pl.len()) < 40
    table = data.table().with_columns(pl.when(busy).then(pl.lit("IP_1")).otherwise("patient_id").alias("patient_id"))
    data.write_table(table.drop("sex"))
    assert the(audit(data.path, images=False), "dominant_patient").examples == ("IP_1",)


def test_ids_and_patients_in_both_parts_are_found(data):
    data.cell(0, "isic_id", data.id(3), part="test")
    assert the(audit(data.path, images=False), "same_id_train_test", also=["missing_image"]).examples == (data.id(3),)
    data.cell(0, "isic_id", "ISIC_0009000", part="test")
    data.cell(0, "patient_id", "IP_0001003", part="test")
    assert the(audit(data.path, images=False), "same_patient_train_test").severity == "warning"


def spoil_ragged(text):
    lines = text.split(b"\n")
    lines[9] = lines[9].replace(b'"Institute, of Somewhere"', b"Institute, of Somewhere")
    return b"\n".join(lines)


def spoil_short(text):
    lines = text.split(b"\n")
    lines[9] = lines[9][:30]
    return b"\n".join(lines)


FILE_FAULTS = {
    "empty": (lambda text: b"", "empty_file", "0 bytes"),
    "header only": (lambda text: text.split(b"\n")[0] + b"\n", "no_rows", "no rows"),
    "comma in a cell": (spoil_ragged, "ragged_line", "line 10"),
    "cut line": (spoil_short, "ragged_line", "line 10"),
    "latin-1": (lambda text: text.replace(b"Institute", "Université".encode("latin-1")), "encoding", "line 2"),
    "UTF-16": (lambda text: text.decode().encode("utf-16"), "encoding", "UTF-16"),
    "column twice": (lambda text: text.replace(b"tbp_lv_Bext", b"tbp_lv_B", 1), "repeated_column", "tbp_lv_B"),
}


@pytest.mark.parametrize("fault", FILE_FAULTS)
def test_faulty_file_is_found(data, fault):
    spoil, code, said = FILE_FAULTS[fault]
    path = data.path / "train-metadata.csv"
    path.write_bytes(spoil(path.read_bytes()))
    finding = the(audit(data.path, images=False), code)
    assert finding.where == "train-metadata.csv"
    assert said in finding.message


def test_byte_order_mark_and_windows_lines_are_fine(data):
    path = data.path / "train-metadata.csv"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert audit(data.path, images=False) == []


def test_absent_images_and_empty_directory_are_found(data, tmp_path):
    (data.path / "train-image.hdf5").unlink()
    assert the(audit(data.path), "no_images").severity == "warning"
    assert audit(data.path, images=False) == []
    (tmp_path / "nothing").mkdir()
    assert the(audit(tmp_path / "nothing"), "no_data").severity == "error"


# Folds --------------------------------------------------------------------------------------------


@pytest.fixture(params=["parquet", "csv"])
def folds(data, request, tmp_path):
    """Writes folds grouped by patient, after `change` was applied; returns the path."""

    def write(change=lambda table: table):
        patient = data.table()["patient_id"].str.slice(3).cast(pl.Int64)
        table = change(pl.DataFrame({"isic_id": data.table()["isic_id"], "fold": patient % 5}))
        path = tmp_path / f"folds.{request.param}"
        table.write_parquet(path) if request.param == "parquet" else table.write_csv(path)
        return path

    return write


def move(row):
    return lambda table: table.with_columns(
        fold=pl.when(pl.int_range(pl.len()) == row).then((pl.col("fold") + 1) % 5).otherwise("fold")
    )


def test_grouped_folds_are_fine(data, folds):
    assert audit(data.path, folds=folds()) == []


def test_patient_in_two_folds_is_found(data, folds):
    finding = the(audit(data.path, images=False, folds=folds(move(9))), "patient_in_two_folds")
    assert finding.examples == (data.table()["patient_id"][9],)


def test_lesion_without_a_fold_is_found(data, folds):
    finding = the(audit(data.path, images=False, folds=folds(lambda t: t[1:])), "no_fold")
    assert finding.examples == (data.id(0),)


def test_folds_of_another_data_set_are_found(data, folds):
    path = folds(lambda t: pl.concat([t, t[:1].with_columns(isic_id=pl.lit("ISIC_5"))]))
    assert the(audit(data.path, images=False, folds=path), "unknown_in_folds").examples == ("ISIC_5",)


def test_unreadable_folds_are_found(data, tmp_path):
    (tmp_path / "folds.csv").write_text("a,b\n1,2\n")
    assert the(audit(data.path, images=False, folds=tmp_path / "folds.csv"), "unreadable_folds").remedy


def test_one_picture_in_two_folds_is_an_error(data, folds):
    other = next(r for r in range(11, LESIONS) if folds and _fold(data, r) != _fold(data, 1) and r % 10)
    data.image(other, copies(data.images()[data.id(1)])["quality 60"])
    assert the(audit(data.path, folds=folds()), "near_duplicate_across_folds").severity == "error"


def test_one_picture_with_two_labels_is_listed_as_a_leak_too(data, folds):
    other = next(r for r in range(11, LESIONS) if _fold(data, r) != _fold(data, 10) and r % 10)
    data.image(other, data.images()[data.id(10)])  # Row 10 is malignant.
    held_out = folds(
        lambda t: t.with_columns(fold=pl.when(pl.col("fold") == _fold(data, 10)).then(-1).otherwise("fold"))
    )
    finding = the(audit(data.path, folds=held_out), "same_bytes_across_folds", also=("same_bytes_two_labels",))
    assert set(finding.examples[0].split(" = ")) == {data.id(10), data.id(other)}


def _fold(data, row):
    return int(data.table()["patient_id"][row][3:]) % 5


# How it is shown ----------------------------------------------------------------------------------


def test_findings_are_shown_with_counts_examples_and_remedies(data):
    from rich.console import Console

    for row in range(20, 28):
        data.cell(row, "age_approx", "[old]")
    findings = audit(data.path, images=False)
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(render(findings))
    text = console.export_text()
    assert "age_approx" in text
    assert f"{data.id(20)}: [old]" in text
    assert data.id(25) not in text
    assert "8" in text
    assert findings[0].remedy[:20] in text
    assert "1 errors, 0 warnings" in text
    shown = json.loads(to_json(findings))
    assert (shown["errors"], shown["findings"][0]["count"], len(shown["findings"][0]["examples"])) == (1, 8, 5)


def test_errors_come_first(data):
    data.cell(8, "patient_id", None)
    data.cell(9, "age_approx", "-1")
    assert [f.severity for f in audit(data.path, images=False)] == ["error", "warning"]


# Synthetic and real data --------------------------------------------------------------------------


def synthetic_findings(path, seed):
    synthetic = pytest.importorskip("lesionflow.data.synthetic")
    synthetic.synthesize(path, patients=12, lesions=150, seed=seed, workers=1, progress=False)
    return [(f.code, f.where, f.examples) for f in audit(path)]


@pytest.mark.parametrize("seed", range(10))
def test_clean_synthetic_set_has_no_findings(tmp_path, seed):
    assert synthetic_findings(tmp_path, seed) == []


@pytest.mark.slow
def test_no_false_alarm_on_200_clean_synthetic_sets(tmp_path):
    alarms = {seed: found for seed in range(200) if (found := synthetic_findings(tmp_path / str(seed), seed))}
    assert alarms == {}


# Reviewed by eye: the 24 most alike pairs of 7,479 images are different lesions, none is reported.
REVIEWED = {
    "isic2024-images": [("missing_by_label", 41), ("no_patient", 7133)],
    "isic2024-tabular": [("no_images", 1)],
    "isic2024-test-stub": [],
}


@pytest.mark.parametrize("name", REVIEWED)
def test_findings_on_real_data_are_the_reviewed_ones(name):
    if not (REAL / name).exists():
        pytest.skip(f"no real data at {REAL / name}")
    assert [(f.code, f.count) for f in audit(REAL / name)] == REVIEWED[name]
