"""A bundle is used only if it is exactly what was written."""

import json
import math
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
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

    from lesionflow.graphfile import check_graph

    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    inner = helper.make_graph([helper.make_node("Constant", [], ["c"], value=tensor)], "inner", [], [])
    node = helper.make_node("Body", ["flag"], ["y"], then_branch=inner, else_branch=inner)
    model = helper.make_model(helper.make_graph([node], "outer", [], []))
    with pytest.raises(DataError, match="another file"):
        check_graph(model.SerializeToString(), "nested")
    for attribute in node.attribute:
        inside = attribute.g.node[0].attribute[0].t
        inside.data_location, inside.raw_data = TensorProto.DEFAULT, b"1234"
    check_graph(helper.make_model(helper.make_graph([node], "o", [], [])).SerializeToString(), "x")


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


LEAVING = ("  ../x", "  /etc/passwd", "  a/../../b", "  ./x", "  a//b", "  a\\\\b")


def alterations(bundle: Path, rng: random.Random) -> list[tuple[str, Callable[[Path], None]]]:
    """Ways to alter a bundle, by name; each changes something for sure."""
    files = sorted(path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file())
    name, other = rng.sample(files, 2)
    at = rng.random()

    def edit(change: Callable[[bytes, int], bytes]) -> Callable[[Path], None]:
        def apply(folder: Path) -> None:
            data = (folder / name).read_bytes()
            (folder / name).write_bytes(change(data, int(at * len(data))))

        return apply

    def rename(change: Callable[[str], str]) -> Callable[[Path], None]:
        return lambda folder: (folder / name).rename((folder / name).with_name(change(name.split("/")[-1])))

    def other_hash(entry: str) -> str:
        return entry[:63] + ("0" if entry[63] != "0" else "1") + entry[64:]

    def swap(folder: Path) -> None:
        first, second = (folder / name).read_bytes(), (folder / other).read_bytes()
        (folder / name).write_bytes(second)
        (folder / other).write_bytes(first)

    def linked(folder: Path) -> None:
        (folder / name).rename(folder.parent / "elsewhere")
        (folder / name).symlink_to(folder.parent / "elsewhere")

    def added(path: str, data: bytes = b"x") -> Callable[[Path], None]:
        def apply(folder: Path) -> None:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(data)

        return apply

    def line(change: Callable[[list[str]], list[str]]) -> Callable[[Path], None]:
        def apply(folder: Path) -> None:
            lines = (folder / "MANIFEST.sha256").read_text().splitlines()
            (folder / "MANIFEST.sha256").write_text("\n".join(change(lines)) + "\n")

        return apply

    which = rng.randrange(len(files) - 1)
    return [
        ("a bit", edit(lambda d, i: d[:i] + bytes([d[i] ^ (1 << rng.randrange(8))]) + d[i + 1 :])),
        ("a byte more", edit(lambda d, i: d[:i] + b"\0" + d[i:])),
        ("a byte at the end", edit(lambda d, i: d + rng.choice([b"\0", b" ", b"\n", b"\r\n", b"\xef\xbb\xbf"]))),
        ("a byte less", edit(lambda d, i: d[:i] + d[i + 1 :])),
        ("cut off", edit(lambda d, i: d[:i])),
        ("emptied", edit(lambda d, i: b"")),
        ("removed", lambda folder: (folder / name).unlink()),
        ("renamed", lambda folder: (folder / name).rename(folder / "other.json")),
        ("another case", rename(lambda last: last.swapcase())),
        ("a look-alike", rename(lambda last: last.replace("e", "\u0435", 1) if "e" in last else last + "\u200b")),
        ("swapped", swap),
        ("linked", linked),
        ("a folder in its place", lambda folder: ((folder / name).unlink(), (folder / name).mkdir())),
        ("a pipe in its place", lambda folder: ((folder / name).unlink(), os.mkfifo(folder / name))),
        ("one more", added(f"{rng.randrange(99)}.json")),
        ("one more, hidden", added(f".{rng.randrange(99)}.txt")),
        ("one more below", added("reference/deeper/x.png")),
        ("code", added(f"tabular/{rng.choice(['a.pkl', 'b.so', 'c.py', 'd.pt', 'e.joblib'])}")),
        ("weights outside", added("weights.bin", b"0" * 100)),
        ("a line less", line(lambda lines: lines[:which] + lines[which + 1 :])),
        ("a line twice", line(lambda lines: [*lines, lines[which]])),
        ("a line that leaves", line(lambda lines: [*lines, "0" * 64 + rng.choice(LEAVING)])),
        ("another hash", line(lambda lines: [other_hash(lines[which]), *lines[:which], *lines[which + 1 :]])),
        ("no manifest", line(lambda lines: [])),
    ]  # fmt: skip


def test_a_thousand_altered_bundles_are_all_refused(finished: Path, tmp_path: Path):
    seed = int(os.environ.get("LESIONFLOW_SEED", random.randrange(1 << 30)))
    print(f"LESIONFLOW_SEED={seed}")
    rng, bundle, missed, kinds = random.Random(seed), finished / "bundle", [], set()
    for number in range(1000):
        ways = alterations(bundle, rng)
        kind, alter = ways[number % len(ways)]
        kinds.add(kind)
        copy = tmp_path / "altered"
        shutil.copytree(bundle, copy)
        try:
            alter(copy)
            verify(copy)
            missed.append(kind)
        except DataError:
            pass
        finally:
            shutil.rmtree(copy)
            (tmp_path / "elsewhere").unlink(missing_ok=True)
    assert not missed and len(kinds) == 24
