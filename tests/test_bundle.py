"""A bundle is used only if it is exactly what was written."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lesionflow.bundle import Bundle, band, check_info, probability_interval, verify, write_manifest
from lesionflow.errors import DataError


def edit_info(bundle: Path, **changes) -> None:
    info = json.loads((bundle / "bundle.json").read_text())
    (bundle / "bundle.json").write_text(json.dumps(info | changes))
    write_manifest(bundle)


def test_an_untouched_bundle_opens_and_knows_itself(bundle_dir):
    bundle = Bundle.open(bundle_dir)
    assert (bundle.name, bundle.models, bundle.spec.size) == ("tiny", 2, 32)
    assert bundle.info["notice"] == "Not a medical device."
    assert len(bundle.version) == 12


def test_sha256sum_reads_the_manifest(bundle_dir):
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "MANIFEST.sha256"], cwd=bundle_dir, check=True)


FILES = ["bundle.json", "image.onnx", "MODEL_CARD.md", "reference/a.png", "reference/answers.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("at", [0, -1])
def test_one_flipped_bit_is_refused_by_name(bundle_copy, name, at):
    data = bytearray((bundle_copy / name).read_bytes())
    data[at] ^= 1
    (bundle_copy / name).write_bytes(data)
    with pytest.raises(DataError, match=f"{name}: changed"):
        verify(bundle_copy)


@pytest.mark.parametrize("name", FILES[1:])
def test_a_removed_file_is_refused_by_name(bundle_copy, name):
    (bundle_copy / name).unlink()
    with pytest.raises(DataError, match=f"{name}: removed"):
        verify(bundle_copy)


@pytest.mark.parametrize("name", ["extra.json", "reference/c.png", "deep/er/x.txt", ".hidden.json"])
def test_an_added_file_is_refused_by_name(bundle_copy, name):
    (bundle_copy / name).parent.mkdir(parents=True, exist_ok=True)
    (bundle_copy / name).write_bytes(b"x")
    with pytest.raises(DataError, match=f"{name}: added"):
        verify(bundle_copy)


def test_a_renamed_file_is_refused_with_both_names(bundle_copy):
    (bundle_copy / "reference/a.png").rename(bundle_copy / "reference/z.png")
    with pytest.raises(DataError, match=r"z\.png: renamed, the manifest has it as reference/a\.png"):
        verify(bundle_copy)


def test_two_swapped_files_are_refused(bundle_copy):
    a, b = bundle_copy / "MODEL_CARD.md", bundle_copy / "reference/answers.json"
    a_data, b_data = a.read_bytes(), b.read_bytes()
    a.write_bytes(b_data)
    b.write_bytes(a_data)
    with pytest.raises(DataError, match="changed"):
        verify(bundle_copy)


def test_a_link_is_refused_even_to_the_same_bytes(bundle_copy, tmp_path):
    moved = tmp_path / "card.md"
    (bundle_copy / "MODEL_CARD.md").rename(moved)
    (bundle_copy / "MODEL_CARD.md").symlink_to(moved)
    with pytest.raises(DataError, match=r"MODEL_CARD\.md: a symbolic link"):
        verify(bundle_copy)


def test_a_linked_folder_is_refused(bundle_copy, tmp_path):
    (bundle_copy / "reference").rename(tmp_path / "elsewhere")
    (bundle_copy / "reference").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="reference: a symbolic link"):
        verify(bundle_copy)


def test_a_pipe_is_refused_and_not_read(bundle_copy):
    os.mkfifo(bundle_copy / "pipe.json")
    with pytest.raises(DataError, match=r"pipe\.json: not a plain file"):
        verify(bundle_copy)


def test_a_pickle_has_no_place_in_a_bundle_even_if_listed(bundle_copy):
    (bundle_copy / "model.pkl").write_bytes(b"x")
    with pytest.raises(DataError, match=r"model\.pkl: a bundle can't hold this kind"):
        write_manifest(bundle_copy)
    with pytest.raises(DataError, match=r"model\.pkl: a bundle can't hold this kind"):
        verify(bundle_copy)


@pytest.mark.parametrize(
    "name", ["../secret.json", "/etc/hostname", "reference/../../x.json", "a\\..\\b.json", "./a.json"]
)
def test_a_manifest_that_names_a_path_outside_is_refused(bundle_copy, name):
    with (bundle_copy / "MANIFEST.sha256").open("a") as file:
        file.write(f"{'0' * 64}  {name}\n")
    with pytest.raises(DataError, match="leaves the bundle's folder"):
        verify(bundle_copy)


def test_a_manifest_with_a_name_twice_is_refused(bundle_copy):
    manifest = bundle_copy / "MANIFEST.sha256"
    manifest.write_text(manifest.read_text() + f"{'0' * 64}  image.onnx\n")
    with pytest.raises(DataError, match=r"image\.onnx"):
        verify(bundle_copy)


def test_without_a_manifest_nothing_is_opened(bundle_copy):
    (bundle_copy / "MANIFEST.sha256").unlink()
    with pytest.raises(DataError, match=r"MANIFEST\.sha256: missing"):
        Bundle.open(bundle_copy)


def test_a_folder_that_is_no_bundle_says_so(tmp_path):
    with pytest.raises(DataError, match="not a bundle"):
        Bundle.open(tmp_path)


def test_a_file_changed_after_the_check_is_not_used(bundle_copy):
    bundle = Bundle.open(bundle_copy)
    (bundle_copy / "image.onnx").write_bytes(b"another graph")
    with pytest.raises(DataError, match=r"image\.onnx: changed since"):
        bundle.read("image.onnx")


def test_a_graph_that_keeps_tensors_in_another_file_is_refused(bundle_copy, tmp_path):
    import onnx

    model = onnx.load(bundle_copy / "image.onnx")
    onnx.save(model, tmp_path / "x.onnx", save_as_external_data=True, location="x.data", size_threshold=0)
    (bundle_copy / "image.onnx").write_bytes((tmp_path / "x.onnx").read_bytes())
    write_manifest(bundle_copy)
    with pytest.raises(DataError, match="another file"):
        verify(bundle_copy)


def test_external_data_hidden_in_a_nested_graph_is_found():
    from onnx import TensorProto, helper

    from lesionflow.graphfile import check_self_contained

    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    inner = helper.make_graph([helper.make_node("Constant", [], ["c"], value=tensor)], "inner", [], [])
    node = helper.make_node("If", ["flag"], ["y"], then_branch=inner, else_branch=inner)
    model = helper.make_model(helper.make_graph([node], "outer", [], []))
    with pytest.raises(DataError, match="another file"):
        check_self_contained(model.SerializeToString(), "nested")
    for attribute in node.attribute:
        attribute.g.node[0].attribute[0].t.data_location = TensorProto.DEFAULT
    check_self_contained(helper.make_model(helper.make_graph([node], "o", [], [])).SerializeToString(), "x")


@pytest.mark.parametrize("cut", [1, 100, -1])
def test_a_truncated_graph_is_refused(bundle_copy, cut):
    data = (bundle_copy / "image.onnx").read_bytes()
    (bundle_copy / "image.onnx").write_bytes(data[:cut])
    write_manifest(bundle_copy)
    with pytest.raises(DataError, match=r"image\.onnx"):
        verify(bundle_copy)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("format", 2),
        ("name", "../up"),
        ("name", ""),
        ("models", 0),
        ("models", True),
        ("preprocess", {"size": 32}),
        ("preprocess", {"size": 10**9, "filter": "bilinear", "mean": [0, 0, 0], "std": [1, 1, 1]}),
        ("preprocess", {"size": 32, "filter": "bilinear", "mean": [0, 0, 0], "std": [1, 0, 1]}),
        ("calibration", {"a": -1.0, "b": 0.0}),
        ("calibration", None),
        ("thresholds", {"refer": {"probability": 0.5}}),
        ("thresholds", None),
        ("thresholds", {"urgent": {"logit": 0.5}}),
        ("thresholds", {"low": {"logit": 0.5}}),
        ("thresholds", {"refer": {"logit": 0.5}, "low": {"logit": 0.6}}),
        ("inputs", ["brightness"]),
        ("tta", "many"),
        ("notice", ""),
    ],
)
def test_a_field_that_cannot_be_used_is_named(bundle_copy, field, value):
    edit_info(bundle_copy, **{field: value})
    with pytest.raises(DataError, match=field):
        Bundle.open(bundle_copy)


def test_nan_in_bundle_json_is_refused(bundle_copy):
    edit_info(bundle_copy, metrics={"pauc": float("nan")})
    with pytest.raises(DataError, match="NaN"):
        Bundle.open(bundle_copy)


def test_thresholds_name_the_band():
    thresholds = {"refer": {"logit": 2.0}, "low": {"logit": -1.0}}
    assert [band(z, thresholds) for z in (-1.1, -1.0, 1.9, 2.0)] == ["low", "routine", "routine", "refer"]
    assert [band(z, {"refer": {"logit": 2.0}}) for z in (-9.0, 2.0)] == ["routine", "refer"]
    assert band(5.0, {}) is None


def test_opening_a_bundle_loads_neither_torch_nor_onnx(bundle_dir):
    code = (
        "import sys; from pathlib import Path; from lesionflow.bundle import Bundle;"
        f"Bundle.open(Path({str(bundle_dir)!r}));"
        "print([m for m in ('torch', 'timm', 'lightning', 'onnx', 'onnxruntime', 'pickle5') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_probabilitys_interval_follows_from_the_lines_covariance():
    line = {"a": 0.8, "b": -4.0, "covariance": [[0.04, 0.02], [0.02, 0.09]]}
    low, high = probability_interval(2.0, line)
    error = 1.959964 * (4 * 0.04 + 2 * 2 * 0.02 + 0.09) ** 0.5
    assert [math.log(p / (1 - p)) for p in (low, high)] == pytest.approx([-2.4 - error, -2.4 + error])
    assert probability_interval(2.0, line | {"covariance": None}) is None
    assert probability_interval(2.0, {"a": 0.8, "b": -4.0}) is None


@pytest.mark.parametrize(
    "covariance", [[[1, 0]], [[-1, 0], [0, 1]], [[1, 2], [2, 1]], [[1, 0.1], [0.2, 1]], [[math.inf, 0], [0, 1]], "x"]
)
def test_a_covariance_that_is_none_is_refused(bundle_dir, covariance):
    info = Bundle.open(bundle_dir).info
    changed = info | {"calibration": info["calibration"] | {"covariance": covariance}}
    with pytest.raises(DataError, match="calibration can't be"):
        check_info(changed, "bundle.json")
