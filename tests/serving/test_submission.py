"""A submission has the sample's ids in its order and `predict`'s scores, here and from a notebook without network."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest

from lesionflow.errors import DataError, UsageError
from lesionflow.serving.notebook import NOTEBOOK, OWNER, write_folder
from lesionflow.serving.predictor import predict_files
from lesionflow.serving.submission import SAMPLE, check_submission, submit

IDS = [f"ISIC_{number:07d}" for number in (7, 3, 9, 1, 5)]


def table(path: Path, rows: list[tuple[str, str]], header: str = "isic_id,target") -> Path:
    path.write_text("\n".join([header, *(f"{a},{b}" for a, b in rows)]) + "\n")
    return path


def rows(path: Path) -> list[tuple[str, str]]:
    with path.open() as file:
        return [(row["isic_id"], row["target"]) for row in csv.DictReader(file)]


@pytest.fixture
def data(tmp_path: Path, encode: Callable[..., bytes]) -> Path:
    """Test files of five lesions of two patients; the sample asks for them in another order than the metadata."""
    folder = tmp_path / "competition"
    (folder / "test-image").mkdir(parents=True)
    for number, name in enumerate(IDS):
        (folder / "test-image" / f"{name}.jpg").write_bytes(encode(number))
    patients = [("IP_1", "IP_2")[number % 2] for number in range(5)]
    table(folder / "test-metadata.csv", list(zip(IDS, patients, strict=True)), "isic_id,patient_id")
    table(folder / SAMPLE, [(name, "0.3") for name in sorted(IDS)])
    return folder


def test_a_submission_has_the_scores_of_predict_in_the_samples_order(
    bundle_dir: Path, data: Path, tmp_path: Path
) -> None:
    result = submit(bundle_dir, data, tmp_path / "made", progress=False)
    predict_files(bundle_dir, data, out=tmp_path / "predicted.csv", progress=False)
    made = rows(tmp_path / "made" / "submission.csv")
    assert [name for name, _ in made] == sorted(IDS)
    assert sorted(made) == sorted(rows(tmp_path / "predicted.csv")), "to the last digit"
    assert len({score for _, score in made}) == 5
    assert (result["sample"], result["rows"]) == (5, 5)
    assert result["out"] == str(tmp_path / "made" / "submission.csv")
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["submission.csv"], "nothing half-done is left"


def test_without_a_sample_the_metadata_says_which_and_in_which_order(
    bundle_dir: Path, data: Path, tmp_path: Path
) -> None:
    (data / SAMPLE).unlink()
    result = submit(bundle_dir, data, tmp_path / "out.csv", progress=False)
    assert result["sample"] is None
    assert [name for name, _ in rows(tmp_path / "out.csv")] == IDS


def test_a_damaged_image_stops_it_or_is_listed(bundle_dir: Path, data: Path, tmp_path: Path) -> None:
    (data / "test-image" / f"{IDS[2]}.jpg").write_bytes(b"\xff\xd8 nothing")
    with pytest.raises(DataError, match=IDS[2]):
        submit(bundle_dir, data, tmp_path / "out.csv", progress=False)
    assert not (tmp_path / "out.csv").exists()
    result = submit(bundle_dir, data, tmp_path / "out.csv", skip_corrupt=True, progress=False)
    assert [skipped["isic_id"] for skipped in result["skipped"]] == [IDS[2]]
    assert len(rows(tmp_path / "out.csv")) == 5


def other_sample(data: Path, names: list[str]) -> None:
    table(data / SAMPLE, [(name, "0.3") for name in names])


FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "an id more": (
        lambda d: other_sample(d, [*IDS, "ISIC_42", "ISIC_43"]),
        r"test-metadata.csv: 5 ids, sample_submission.csv has 7: no row for 2 lesions \(ISIC_42, ISIC_43\)",
    ),
    "an id less": (
        lambda d: other_sample(d, IDS[1:]),
        rf"5 ids, sample_submission.csv has 4: 1 lesion \({IDS[0]}\) not in .*take both files",
    ),
    "an id twice": (lambda d: other_sample(d, [*IDS, IDS[0]]), rf"1 lesion \({IDS[0]}\) in more than one row"),
    "another header": (lambda d: table(d / SAMPLE, [("a", "b")], "id,score"), r"first line is 'id,score', expected"),
    "a ragged line": (lambda d: table(d / SAMPLE, [(IDS[0], "1,2")]), r"line 2 isn't an id and a score \(1 such"),
    "no rows": (lambda d: table(d / SAMPLE, []), r"sample_submission.csv: has no rows"),
    "no metadata": (
        lambda d: (d / "test-metadata.csv").unlink(),
        r"no test-metadata.csv; a submission is made of that",
    ),
    "no images": (lambda d: shutil.rmtree(d / "test-image"), r"no test-image.hdf5 \(or a folder test-image/\)"),
    "no folder": (shutil.rmtree, r"no such folder; point to the competition's files"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_fit_is_refused_before_anything_is_scored(
    fault: str, bundle_dir: Path, data: Path, tmp_path: Path
) -> None:
    spoil, message = FAULTS[fault]
    spoil(data)
    with pytest.raises(DataError, match=message):
        submit(bundle_dir, data, tmp_path / "out.csv", progress=False)
    assert not (tmp_path / "out.csv").exists()


def test_a_written_file_is_checked_row_by_row(tmp_path: Path) -> None:
    sample = table(tmp_path / "sample.csv", [(name, "0.3") for name in IDS])
    good = [(name, "0.125") for name in IDS]
    written = tmp_path / "written.csv"
    assert check_submission(table(written, good), sample) == 5
    wrong: list[tuple[list[tuple[str, str]], str]] = [
        (good[:-1], rf"4 ids, sample.csv has 5: no row for 1 lesion \({IDS[-1]}\)"),
        ([*good, ("ISIC_42", "0.1")], r"1 lesion \(ISIC_42\) not in .*for no other"),
        ([*good, good[0]], r"in more than one row; keep one"),
        ([good[1], good[0], *good[2:]], rf"another order, first in row 1: {IDS[1]}, not {IDS[0]}"),
        ([(IDS[0], "nan"), *good[1:]], rf"no number in 0..1 for 1 lesion \({IDS[0]}: 'nan'\)"),
        ([(IDS[0], "1.5"), (IDS[1], ""), *good[2:]], rf"for 2 lesions \({IDS[0]}: '1.5', {IDS[1]}: ''\)"),
    ]
    for content, message in wrong:
        with pytest.raises(DataError, match=message):
            check_submission(table(written, content), sample)


def test_the_real_stub_gets_its_three_rows(bundle_dir: Path, real_data: Path, tmp_path: Path) -> None:
    stub = real_data / "isic2024-test-stub"
    result = submit(bundle_dir, stub, tmp_path / "out.csv", progress=False)
    assert [name for name, _ in rows(tmp_path / "out.csv")] == [name for name, _ in rows(stub / SAMPLE)]
    assert result["sample"] == 3


# The folder for a notebook ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(bundle_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without the packages: for an image that has them."""
    made = tmp_path_factory.mktemp("kaggle") / "folder"
    result = write_folder(bundle_dir, made, owner="someone", wheels=False, progress=False)
    assert result["packages"] == 1
    return made


def test_the_folder_is_what_kaggles_commands_take(folder: Path) -> None:
    dataset = json.loads((folder / "dataset-metadata.json").read_text())
    kernel = json.loads((folder / "kernel-metadata.json").read_text())
    # The bounds that Kaggle's own client checks before it uploads.
    owner, slug = dataset["id"].split("/")
    assert owner == "someone" and 6 <= len(slug) <= 50 and 6 <= len(dataset["title"]) <= 50
    assert len(dataset["licenses"]) == 1
    assert kernel["id"].split("/")[1] == kernel["title"], "Kaggle makes the address from the title"
    assert len(kernel["title"]) <= 50
    assert kernel["dataset_sources"] == [dataset["id"]]
    assert kernel["competition_sources"] == ["isic-2024-challenge"]
    assert (folder / kernel["code_file"]).is_file()
    assert (kernel["enable_internet"], kernel["is_private"], kernel["kernel_type"]) == (False, True, "notebook")


def test_the_notebook_is_valid_thin_and_names_no_place(folder: Path) -> None:
    notebook = nbformat.read(folder / NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(code) == 3 and max(len(cell.source.splitlines()) for cell in code) <= 16
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
    text = (folder / NOTEBOOK).read_text()
    assert not re.search(r"https?://|pypi|/(home|root|work|tmp|Users|mnt)/", text), "no registry, no machine's path"


def test_a_folder_with_content_and_an_impossible_owner_are_refused(bundle_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    with pytest.raises(UsageError, match="isn't an empty folder"):
        write_folder(bundle_dir, tmp_path / "full", progress=False)
    with pytest.raises(UsageError, match=r"--owner me/you: a Kaggle user name"):
        write_folder(bundle_dir, tmp_path / "new", owner="me/you", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_what_breaks_off_leaves_nothing(bundle_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(path.name for path in tmp_path.iterdir())
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(UsageError, match=r"pip can't get the packages of lesionflow\[serve\] \(.*--no-wheels"):
        write_folder(bundle_copy, tmp_path / "new", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    (bundle_copy / "MODEL_CARD.md").write_text("changed")
    with pytest.raises(DataError, match="changed"):
        write_folder(bundle_copy, tmp_path / "new", wheels=False, progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_without_an_owner_kaggles_command_is_made_to_refuse(bundle_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = write_folder(bundle_dir, tmp_path / "empty", wheels=False, progress=False)
    assert result["dataset"] == f"{OWNER}/lesionflow-tiny"


# The notebook, run ---------------------------------------------------------------------------------

RUN = """
import fcntl, socket, struct, sys
from pathlib import Path
import nbformat
from nbclient import NotebookClient

with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
    request = bytearray(struct.pack("16sH14s", b"lo", 0, b""))
    fcntl.ioctl(control, 0x8913, request)  # SIOCGIFFLAGS
    request[16:18] = struct.pack("H", struct.unpack("H", request[16:18])[0] | 1)
    fcntl.ioctl(control, 0x8914, request)  # SIOCSIFFLAGS, up: the kernel is spoken to over the loopback.
try:
    socket.create_connection(("192.0.2.1", 80), timeout=2)
except OSError as error:
    assert error.errno == 101, error  # Network is unreachable: there is no way out.
else:
    sys.exit("there is a network")
notebook = nbformat.read(sys.argv[1], as_version=4)
where = {"metadata": {"path": sys.argv[2]}}
done = NotebookClient(notebook, timeout=300, kernel_name="offline", resources=where).execute()
Path(sys.argv[2], "done.ipynb").write_text(nbformat.writes(done))
"""


def run_offline(folder: Path, data: Path, scratch: Path, packages: Path, *, pip: bool) -> str:
    """Run the folder's notebook in a fresh environment that sees `packages`, where there is no network; its output."""
    if os.geteuid() or subprocess.run(["unshare", "-n", "true"], capture_output=True, check=False).returncode:
        pytest.skip("a network namespace needs root and `unshare -n`")
    python = scratch / "environment" / "bin" / "python"
    subprocess.run(
        [sys.executable, "-m", "venv", *([] if pip else ["--without-pip"]), python.parents[1]],
        check=True,
    )
    (site,) = (python.parents[1] / "lib").glob("python*/site-packages")
    (site / "image.pth").write_text(f"{packages}\n")
    kernel = scratch / "jupyter" / "kernels" / "offline"
    kernel.mkdir(parents=True)
    argv = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (kernel / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "offline", "language": "python"}))
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHON"))}
    environment |= {
        "JUPYTER_PATH": str(scratch / "jupyter"),
        "JUPYTER_RUNTIME_DIR": str(scratch / "runtime"),
        "IPYTHONDIR": str(scratch / "ipython"),
        "LESIONFLOW_DATA": str(data),
        "LESIONFLOW_FOLDER": str(folder),
        "OMP_NUM_THREADS": "1",
    }
    working = scratch / "working"
    working.mkdir()
    command = ["unshare", "-n", sys.executable, "-c", RUN, str(folder / NOTEBOOK), str(working)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    where = subprocess.run(
        [python, "-c", "import lesionflow; print(lesionflow.__file__)"],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert where.stdout.startswith(str(python.parents[1])), "the wheel of the folder is what ran"
    return (working / "done.ipynb").read_text()


def test_the_notebook_submits_without_network_what_predict_gives(
    folder: Path, bundle_dir: Path, data: Path, tmp_path: Path
) -> None:
    installed = Path(next(p for p in sys.path if p.endswith("site-packages")))
    text = run_offline(folder, data, tmp_path / "offline", installed, pip=False)
    assert "5 rows (5 by image), as sample_submission.csv asks" in text
    predict_files(bundle_dir, data, out=tmp_path / "predicted.csv", threads=1, progress=False)
    made = dict(rows(tmp_path / "offline" / "working" / "submission.csv"))
    expected = dict(rows(tmp_path / "predicted.csv"))
    assert list(made) == sorted(expected)
    assert {name: float(p) for name, p in made.items()} == pytest.approx({n: float(p) for n, p in expected.items()})


@pytest.mark.slow
def test_the_folders_own_packages_are_enough(
    finished: Path, synthetic: Path, tmp_path: Path, environment_with: Callable[..., Path]
) -> None:
    """A bundle with metadata, and an environment with a notebook kernel and nothing else that lesionflow needs."""
    kernel = environment_with("kernel", "ipykernel")
    (site,) = (kernel / "lib").glob("python*/site-packages")
    assert not (site / "numpy").exists()
    result = write_folder(finished / "bundle", tmp_path / "folder", owner="someone", progress=False)
    assert result["packages"] > 20
    text = run_offline(tmp_path / "folder", synthetic, tmp_path / "offline", site, pip=True)
    assert "by image and visit" in text, "each lesion stands beside its patient's others"
    predict_files(finished / "bundle", synthetic, out=tmp_path / "predicted.csv", progress=False)
    made = dict(rows(tmp_path / "offline" / "working" / "submission.csv"))
    expected = dict(rows(tmp_path / "predicted.csv"))
    assert list(made) == list(expected)
    assert {n: float(p) for n, p in made.items()} == pytest.approx({n: float(p) for n, p in expected.items()}, abs=1e-6)
