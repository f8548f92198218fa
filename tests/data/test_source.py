"""Reading the competition's files: exact bytes, typed tables, and errors that can be acted on."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import time
from pathlib import Path

import h5py
import numpy as np
import polars as pl
import pytest

from lesionflow.data.schema import COLUMNS
from lesionflow.data.source import open_source, read_metadata
from lesionflow.errors import DataError

REAL = Path(os.environ.get("LESIONFLOW_REAL_DATA", Path(__file__).parents[2] / "../shared/data"))
JPEG = b"\xff\xd8 one \x00 two \xff\xd9"


def write_hdf5(path, values):
    with h5py.File(path, "w") as file:
        for name, value in values.items():
            file[name] = value


@pytest.fixture
def data(tmp_path):
    (tmp_path / "train-metadata.csv").write_text("isic_id,target,age_approx,sex\nISIC_2,0,55,male\nISIC_1,1,NA,\n")
    write_hdf5(tmp_path / "train-image.hdf5", {"ISIC_1": np.bytes_(JPEG), "ISIC_2": np.bytes_(b"second" + JPEG)})
    return tmp_path


# Metadata -----------------------------------------------------------------------------------------


def test_columns_are_typed_and_empty_cells_are_null(data):
    table = read_metadata(data / "train-metadata.csv", require=("isic_id", "target"))
    assert table.schema == {"isic_id": pl.String, "target": pl.Int8, "age_approx": pl.Float64, "sex": pl.String}
    assert table.rows() == [("ISIC_2", 0, 55.0, "male"), ("ISIC_1", 1, None, None)]


def test_every_column_of_the_schema_is_typed(tmp_path):
    (tmp_path / "t.csv").write_text(",".join(c.name for c in COLUMNS) + "\n" + "," * (len(COLUMNS) - 1) + "\n")
    with pytest.raises(DataError, match="column isic_id: 1 cell empty"):
        read_metadata(tmp_path / "t.csv")
    (tmp_path / "t.csv").write_text(",".join(c.name for c in COLUMNS) + "\nISIC_1" + "," * (len(COLUMNS) - 1) + "\n")
    table = read_metadata(tmp_path / "t.csv")
    for column in COLUMNS:
        expected = {"number": pl.Float64, "label": pl.Int8}.get(column.kind, pl.String)
        assert table.schema[column.name] == expected
        assert column.name == "isic_id" or table[column.name].null_count() == 1


@pytest.mark.parametrize("text", ["1", "1.0", " 1 "])
def test_target_may_be_written_as_pandas_does(tmp_path, text):
    (tmp_path / "t.csv").write_text(f"isic_id,target\nISIC_1,{text}\n")
    assert read_metadata(tmp_path / "t.csv")["target"].to_list() == [1]


def test_a_leading_zero_in_an_id_survives(tmp_path):
    (tmp_path / "t.csv").write_text("isic_id\n0015670\n")
    assert read_metadata(tmp_path / "t.csv")["isic_id"].to_list() == ["0015670"]


HEADER = "isic_id,target,age_approx,sex"
FAULTS = {
    "text in a number": (f"{HEADER}\nISIC_1,0,old,male\n", ["age_approx", "1 cell", "ISIC_1: 'old'", "correct"]),
    "NaN": (f"{HEADER}\nISIC_1,0,NaN,male\n", ["age_approx", "ISIC_1", "leave them empty"]),
    "infinite": (f"{HEADER}\nISIC_1,0,-inf,male\n", ["age_approx", "ISIC_1"]),
    "swapped": ("isic_id,target,sex,age_approx\nISIC_1,0,5,male\n", ["age_approx", "'sex'", "swapped"]),
    "target 2": (f"{HEADER}\nISIC_1,0,,\nISIC_2,2,,\n", ["target", "ISIC_2: '2'", "write 0 or 1"]),
    "target empty": (f"{HEADER}\nISIC_1,0,,x\nISIC_2,,,x\n", ["target", "ISIC_2", "leave these lesions out"]),
    "no target": ("isic_id,sex\nISIC_1,male\n", ["no column target", "isic_id, sex", "add it"]),
    "no id": ("id,target\nISIC_1,1\n", ["no column isic_id"]),
    "id twice": (f"{HEADER}\nISIC_1,0,,x\nISIC_1,1,,x\n", ["isic_id", "ISIC_1", "keep one row"]),
    "column twice": ("isic_id,target,target\nISIC_1,1,0\n", ["target", "twice in the header"]),
    "long line": (f"{HEADER}\nISIC_1,0,5,male\nISIC_2,0,5,male,9\n", ["line 3", "ISIC_2", "5 cells", "4"]),
    "short line": (f"{HEADER}\nISIC_1,0,5,male\nISIC_2,0\n", ["line 3", "ISIC_2", "2 cells", "4"]),
    "empty file": ("", ["empty file", "restore"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_table_is_refused_by_name(tmp_path, fault):
    text, said = FAULTS[fault]
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(DataError) as caught:
        read_metadata(tmp_path / "t.csv", require=("isic_id", "target"))
    for words in said:
        assert words in str(caught.value)
    assert "t.csv" in str(caught.value)


def test_only_the_first_ids_are_listed(tmp_path):
    (tmp_path / "t.csv").write_text("isic_id,age_approx\n" + "".join(f"ISIC_{i},old\n" for i in range(1000)))
    with pytest.raises(DataError) as caught:
        read_metadata(tmp_path / "t.csv")
    assert "1,000 cells" in str(caught.value)
    assert "ISIC_4" in str(caught.value)
    assert "ISIC_5:" not in str(caught.value)


def test_other_encodings_are_refused_with_the_line(tmp_path):
    (tmp_path / "t.csv").write_bytes("isic_id,attribution\nISIC_1,a\nISIC_2,Zürich\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"line 3 isn't UTF-8.*save the file as UTF-8"):
        read_metadata(tmp_path / "t.csv")


def test_quoted_commas_and_line_breaks_are_read(tmp_path):
    (tmp_path / "t.csv").write_text('isic_id,attribution,sex\nISIC_1,"Institute, of\nSomewhere",\n')
    assert read_metadata(tmp_path / "t.csv").row(0) == ("ISIC_1", "Institute, of\nSomewhere", None)


def test_missing_file_says_how_to_get_it(tmp_path):
    with pytest.raises(DataError, match="data fetch"):
        read_metadata(tmp_path / "no.csv")


# Images -------------------------------------------------------------------------------------------


def test_bytes_come_out_in_the_metadatas_order(data):
    with open_source(data) as source:
        assert source.ids == ["ISIC_2", "ISIC_1"]
        assert source.image_ids() == ["ISIC_1", "ISIC_2"]
        assert list(source.images(source.ids)) == [("ISIC_2", b"second" + JPEG), ("ISIC_1", JPEG)]
        assert source.files == [data / "train-metadata.csv", data / "train-image.hdf5"]
        source.check()


@pytest.mark.parametrize(
    ("stored", "read"),
    [
        (np.bytes_(JPEG), JPEG),
        (np.void(JPEG + b"\0\0"), JPEG + b"\0\0"),
        (np.frombuffer(JPEG + b"\0", np.uint8), JPEG + b"\0"),
        (np.array([JPEG]), JPEG),
        (np.bytes_(b""), b""),
        (h5py.Empty("S3"), b""),
    ],
    ids=["fixed", "opaque", "uint8", "array of one", "empty string", "no value"],
)
def test_every_storage_of_bytes_is_read_exactly(tmp_path, stored, read):
    write_hdf5(tmp_path / "i.hdf5", {"ISIC_1": stored})
    with open_source(tmp_path / "i.hdf5") as source:
        assert source.read("ISIC_1") == read


def test_trailing_zeros_of_fixed_strings_are_kept(tmp_path):
    with h5py.File(tmp_path / "i.hdf5", "w") as file:
        dataset = file.create_dataset("ISIC_1", (), dtype=f"S{len(JPEG) + 2}")
        raw = np.frombuffer(JPEG + b"\0\0", f"V{len(JPEG) + 2}")[0]
        dataset.id.write(h5py.h5s.ALL, h5py.h5s.ALL, np.array(raw), mtype=dataset.id.get_type())
    with open_source(tmp_path / "i.hdf5") as source:
        assert source.read("ISIC_1") == JPEG + b"\0\0"


def test_variable_length_bytes_are_read(tmp_path):
    with h5py.File(tmp_path / "i.hdf5", "w") as file:
        file.create_dataset("ISIC_1", (), dtype=h5py.vlen_dtype(np.uint8))[()] = np.frombuffer(JPEG, np.uint8)
        file.create_dataset("ISIC_2", (), dtype=h5py.string_dtype())[()] = b"no zeros"
    with open_source(tmp_path / "i.hdf5") as source:
        assert [source.read(i) for i in source.ids] == [JPEG, b"no zeros"]


def test_pixels_in_place_of_bytes_are_refused(tmp_path):
    write_hdf5(tmp_path / "i.hdf5", {"ISIC_1": np.zeros((4, 4, 3), np.uint8)})
    with open_source(tmp_path / "i.hdf5") as source, pytest.raises(DataError, match=r"ISIC_1.*\(4, 4, 3\).*JPEG"):
        source.read("ISIC_1")


def test_absent_image_is_named(data):
    with open_source(data) as source, pytest.raises(DataError, match="no image 'ISIC_3'"):
        source.read("ISIC_3")


def test_missing_and_extra_ids_are_compared(data):
    write_hdf5(data / "train-image.hdf5", {"ISIC_1": np.bytes_(JPEG), "ISIC_9": np.bytes_(JPEG)})
    with open_source(data) as source:
        assert (source.missing(), source.extra()) == (["ISIC_2"], ["ISIC_9"])
        with pytest.raises(DataError, match=r"1 rows.*ISIC_2.*add the images"):
            source.check()


@pytest.mark.parametrize("keep", [0.3, 0.8, 0.99])
def test_truncated_hdf5_is_told_from_other_damage(data, keep):
    path = data / "train-image.hdf5"
    os.truncate(path, int(path.stat().st_size * keep))
    with pytest.raises(DataError, match=r"train-image\.hdf5: truncated HDF5.*again"):
        open_source(data)


@pytest.mark.parametrize("folder", ["train-image", "train-image/image", ""])
def test_folders_of_images_are_found(tmp_path, folder):
    where = tmp_path / folder
    where.mkdir(parents=True, exist_ok=True)
    for name in ("ISIC_2.jpg", "ISIC_1.JPEG", "ISIC_3.png", "notes.txt", ".ISIC_4.jpg"):
        (where / name).write_bytes(name.encode())
    source = open_source(tmp_path)
    assert source.ids == ["ISIC_1", "ISIC_2", "ISIC_3"]
    assert source.read("ISIC_1") == b"ISIC_1.JPEG"
    assert [f.name for f in source.files] == ["ISIC_1.JPEG", "ISIC_2.jpg", "ISIC_3.png"]


def test_two_files_of_one_id_are_refused(tmp_path):
    for name in ("ISIC_1.jpg", "ISIC_1.png"):
        (tmp_path / name).write_bytes(JPEG)
    with pytest.raises(DataError, match=r"ISIC_1\.jpg and ISIC_1\.png"):
        open_source(tmp_path)


@pytest.mark.parametrize("isic_id", ["../secret", "/etc/hostname", "sub/ISIC_1"])
def test_an_id_never_leads_out_of_the_folder(tmp_path, isic_id):
    (tmp_path / "images/sub").mkdir(parents=True)
    (tmp_path / "images/ISIC_1.jpg").write_bytes(JPEG)
    (tmp_path / "images/sub/ISIC_1.jpg").write_bytes(JPEG)
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    with pytest.raises(DataError, match="no image"):
        open_source(tmp_path / "images").read(isic_id)


def test_metadata_alone_is_a_source_without_images(data):
    (data / "train-image.hdf5").unlink()
    source = open_source(data)
    assert not source.has_images
    assert len(source) == 2
    with pytest.raises(DataError, match=r"add train-image\.hdf5"):
        source.read("ISIC_1")


def test_metadata_may_lie_elsewhere(data, tmp_path):
    source = open_source(data / "train-image.hdf5", metadata=data / "train-metadata.csv")
    assert source.ids == ["ISIC_2", "ISIC_1"]


@pytest.mark.parametrize("make", [lambda p: p / "nowhere", lambda p: p / "t.zip", lambda p: p / "empty"])
def test_paths_without_lesions_are_refused(tmp_path, make):
    (tmp_path / "t.zip").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError):
        open_source(make(tmp_path))


# Processes ----------------------------------------------------------------------------------------


def test_pickled_source_opens_its_own_handle(data):
    with open_source(data) as source:
        copy = pickle.loads(pickle.dumps(source))
        assert copy.read("ISIC_1") == source.read("ISIC_1")
        assert copy._images._file is not source._images._file


def test_forked_process_reads_through_its_own_handle(data):
    source = open_source(data)
    source.read("ISIC_1")
    context = multiprocessing.get_context("fork")
    results = context.Queue()

    def child():
        inherited = source._images._file
        results.put((source.read("ISIC_2"), source._images._file is inherited))

    process = context.Process(target=child)
    process.start()
    read, shared = results.get(timeout=30)
    process.join(30)
    assert (read, shared) == (b"second" + JPEG, False)
    assert source.read("ISIC_1") == JPEG


# Real data ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "part", "rows", "images"),
    [
        ("isic2024-images", "train", 7479, 7479),
        ("isic2024-tabular", "train", 3586, 0),
        ("isic2024-test-stub", "test", 3, 3),
    ],
)
def test_the_competitions_own_files_are_read(name, part, rows, images):
    if not (REAL / name).exists():
        pytest.skip(f"no real data at {REAL / name}")
    started = time.perf_counter()
    with open_source(REAL / name, part) as source:
        assert (len(source), len(source.image_ids())) == (rows, images)
        if images:
            source.check()
            assert all(data[:2] == b"\xff\xd8" and data[-2:] == b"\xff\xd9" for _, data in source.images(source.ids))
    assert time.perf_counter() - started < 20
