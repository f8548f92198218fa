"""The notebooks run top to bottom on this machine's backends, and nothing of a run stays in them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import nbformat
import pytest

from lesionflow.recipe import Recipe

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
HERE: dict[str, Any] = {
    "CLUSTER": False,
    "OVERRIDES": ["training.ema=0.9"],
    "PATIENTS": 20,
    "LESIONS": 240,
    "PREVALENCE": 0.15,
    "RECIPE": "tiny.toml",
}
"""What the parameters cells get here: no cluster, a small data set, a network of a second's training."""
TOKEN = "KGAT_" + "0123456789abcdef" * 2


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def code(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def parameters(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    (cell,) = [cell for cell in code(notebook) if "parameters" in cell.metadata.get("tags", [])]
    return cell


def printed(notebook: nbformat.NotebookNode) -> str:
    """Everything that a run's cells show as text."""
    outputs = [output for cell in code(notebook) for output in cell.outputs]
    parts = [output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs]
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", "\n".join(parts))


@pytest.fixture(scope="module")
def run_notebook(
    tmp_path_factory: pytest.TempPathFactory, tiny_recipe: Recipe
) -> Iterator[Callable[..., nbformat.NotebookNode]]:
    """`run_notebook(path, NAME="x")`: run it with HERE's parameters and these, all in one folder as after a clone."""
    from nbclient import NotebookClient

    folder = tmp_path_factory.mktemp("clone") / "notebooks"
    folder.mkdir()
    (folder / "tiny.toml").write_text(tiny_recipe.to_toml())

    def run(path: Path, **more: Any) -> nbformat.NotebookNode:
        notebook = read(path)
        cell = parameters(notebook)
        values = {"CLUSTER": False, **more} if path.stem == "03_client" else {**HERE, **more}
        cell.source += "\n" + "\n".join(f"{name} = {value!r}" for name, value in values.items())
        where = {"metadata": {"path": str(folder)}}
        return NotebookClient(notebook, timeout=600, kernel_name="python3", resources=where).execute()

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        patch.setenv("IPYTHONDIR", str(folder.parent / "ipython"))
        patch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
        yield run


@pytest.fixture(scope="module")
def ran(run_notebook: Callable[..., nbformat.NotebookNode]) -> dict[str, nbformat.NotebookNode]:
    """Every notebook, in order."""
    return {path.stem: run_notebook(path) for path in NOTEBOOKS}


def test_01_makes_data_that_passes_the_checks(ran: dict[str, nbformat.NotebookNode]) -> None:
    text = printed(ran["01_secret_and_checks"])
    assert "this runs on this machine" in text
    assert "240 synthetic lesions of 20 patients" in text
    assert "no token stored" in text


def test_02_trains_and_says_what_it_is_worth(ran: dict[str, nbformat.NotebookNode]) -> None:
    found = re.search(
        r"pAUC (0\.\d{4}), (?:95 % interval (0\.\d{4}) to (0\.\d{4})|(.*no interval.*)); \d+ malignant",
        printed(ran["02_pipeline"]),
    )
    assert found
    value, low, high, reason = found.groups()
    assert reason or float(low) < float(value) < float(high) <= 0.2


def test_03_is_answered_by_the_model_and_cleans_up(ran: dict[str, nbformat.NotebookNode]) -> None:
    notebook = ran["03_client"]
    text = printed(notebook)
    scores = [float(score) for score in re.findall(r"^\d\. \S+  (\d\.\d{3})$", text, re.MULTILINE)]
    assert len(scores) == 5
    assert scores == sorted(scores, reverse=True)
    visit, compared = map(int, re.search(r"(\d+) lesions, (\d+) compared with each other", text).groups())  # type: ignore[union-attr]
    assert visit == compared > 1
    ranked = re.findall(r"^(\d): \S+  (\d\.\d{5})", text, re.MULTILINE)
    assert [int(rank) for rank, _ in ranked] == list(range(1, min(visit, 5) + 1))
    assert [p for _, p in ranked] == sorted((p for _, p in ranked), reverse=True)
    pictures = [o for cell in code(notebook) for o in cell.outputs if "image/png" in o.get("data", {})]
    assert len(pictures) == 1
    sent, floats, ratio = (
        int(n.replace(",", ""))
        for n in re.search(r"JPEG bytes ([\d,]+)   floats in JSON ([\d,]+)   ([\d,]+) times", text).groups()  # type: ignore[union-attr]
    )
    assert floats > 3 * 224 * 224
    assert ratio == round(floats / sent)
    url = re.search(r"http://127\.0\.0\.1:\d+", text)
    assert url
    with pytest.raises(OSError, match="refused"):
        __import__("urllib.request").request.urlopen(url[0], timeout=2)


def test_a_refusing_gate_stops_the_notebook_with_its_reason(
    ran: dict[str, nbformat.NotebookNode], run_notebook: Callable[..., nbformat.NotebookNode]
) -> None:
    from nbclient.exceptions import CellExecutionError

    with pytest.raises(CellExecutionError, match="which step failed, and why") as stopped:
        run_notebook(NOTEBOOKS[1], OVERRIDES=[*HERE["OVERRIDES"], "gate.pauc_floor=0.2"])
    assert "the gate refuses this model" in str(stopped.value)


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A double whose jobs and services are processes here, with KUBECONFIG pointing to it; gives the controller."""
    from double.controller import Controller
    from double.server import Double

    crds = Path(os.environ.get("LESIONFLOW_CRDS", ROOT.parent / "shared" / "crds"))
    if not crds.is_dir():
        pytest.skip(f"no upstream CRDs in {crds}: set LESIONFLOW_CRDS")
    with Double("kubeflow-1.11", crds) as double:
        monkeypatch.setenv("KUBECONFIG", str(double.kubeconfig(tmp_path / "kubeconfig")))
        with Controller(double, {"first-models": tmp_path / "models"}, netns=False, grace=1.0) as controller:
            controller.double = double
            yield controller


def test_01_on_a_cluster_stores_the_token_and_ends_with_a_probe_job(
    run_notebook: Callable[..., nbformat.NotebookNode], cluster: Any, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "small.toml").write_text('[job]\ncpu = "500m"\nmemory = "1Gi"\n')
    done = run_notebook(
        NOTEBOOKS[0], CLUSTER=None, TOKEN_FILE=str(tmp_path / "token"), SETTINGS=str(tmp_path / "small.toml")
    )
    text = printed(done)
    assert "this runs on the cluster" in text
    assert re.search(r"stored the Kaggle token from \S+ as\s+secret kaggle", text)
    assert re.search(r"^ok +probe ", text, re.MULTILINE)
    assert TOKEN not in nbformat.writes(done)
    assert cluster.store.get("Secret", "team", "kaggle")


@pytest.mark.slow
def test_01_on_a_cluster_that_is_not_ready_stops_there(
    run_notebook: Callable[..., nbformat.NotebookNode], cluster: Any, tmp_path: Path
) -> None:
    from nbclient.exceptions import CellExecutionError

    (tmp_path / "large.toml").write_text("[job]\nnodes = 40\n")
    with pytest.raises(CellExecutionError, match="repair what is marked fail"):
        run_notebook(NOTEBOOKS[0], CLUSTER=None, SETTINGS=str(tmp_path / "large.toml"))


@pytest.mark.slow
def test_03_on_a_cluster_finds_the_service_and_lists_what_would_be_removed(
    run_notebook: Callable[..., nbformat.NotebookNode], cluster: Any, tmp_path: Path, bundle_dir: Path
) -> None:
    from lesionflow.cluster import manifests, services
    from lesionflow.cluster.api import Api
    from lesionflow.cluster.settings import Place, Settings

    place = Place("first", Settings.load(overrides=["image.packaged=true"]))
    api = Api.connect(place.settings)
    api.create(manifests.claims(place)[2])
    run = tmp_path / "models" / "runs" / "first"
    shutil.copytree(bundle_dir, run / "bundle")
    deployed = services.deploy(api, place, run)
    services.settle(api, place, run, passed=True)
    text = printed(run_notebook(NOTEBOOKS[2], CLUSTER=None, NAME="first"))
    assert deployed["url"] in text
    assert len(re.findall(r"^\d\. \S+  \d\.\d{3}$", text, re.MULTILINE)) == 5
    assert "would remove InferenceService skin-cancer-detection" in text
    assert api.get("InferenceService", "skin-cancer-detection"), "and only lists it"


@pytest.mark.slow
def test_02_and_03_on_a_cluster_from_the_volumes_to_an_answer(
    run_notebook: Callable[..., nbformat.NotebookNode], cluster: Any, synthetic: Path, tmp_path: Path
) -> None:
    """The pipeline's API is a stand-in that runs what was submitted; jobs and the service are real processes."""
    from double.pipelines import Pipelines

    mount = tmp_path / "volumes"
    cluster.volumes |= {f"first-{name}": mount / name for name in ("data", "logs", "models")}
    shutil.copytree(synthetic, mount / "data" / "synthetic")
    for name in ("logs", "models"):
        (mount / name).mkdir()
    with Pipelines(cluster.double, environment=dict(os.environ)) as pipelines:
        (tmp_path / "here.toml").write_text(
            f'kfp = "{pipelines.url}"\n[volumes]\nmount = "{mount}"\n[image]\npackaged = true\n'
            '[job]\nnodes = 2\ncpu = "500m"\nmemory = "1Gi"\n'
        )
        on = {"CLUSTER": None, "NAME": "first", "SETTINGS": str(tmp_path / "here.toml")}
        text = printed(run_notebook(NOTEBOOKS[1], **on))
        assert "smoke: succeeded" in text
        assert "run first is done" in text
        assert re.search(r"TrainJob \S+: Succeeded, 2 of 2 nodes", text)
        assert "/tensorboard/team/first/" in text
        text = printed(run_notebook(NOTEBOOKS[2], **on))
        assert len(re.findall(r"^\d\. \S+  \d\.\d{3}$", text, re.MULTILINE)) == 5


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_nothing_of_a_run_is_in_git(path: Path) -> None:
    notebook = read(path)
    nbformat.validate(notebook)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    for cell in code(notebook):
        assert cell.outputs == []
        assert cell.execution_count is None
    text = path.read_text()
    assert not re.search(r"/(home|root|work|tmp|Users|mnt)/", text), "a machine's path"
    assert not re.search(r"KGAT|[0-9a-f]{24,}|\"key\"|Bearer", text), "a token"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_stay_thin(path: Path) -> None:
    cells = code(read(path))
    assert len(cells) <= 12
    assert max(len(cell.source.splitlines()) for cell in cells) <= 16
    for cell in cells:
        # A ! command doesn't stop a notebook by itself.
        if re.search(r"^\s*!", cell.source, re.MULTILINE) and "tensorboard" not in cell.source:
            assert "assert _exit_code == 0" in cell.source


def test_every_file_a_notebook_points_to_is_there() -> None:
    for path in NOTEBOOKS:
        for cell in read(path).cells:
            for target in re.findall(r"\]\(((?!http)[^)#]+)\)", cell.source):
                assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_the_picture_of_the_pipeline_is_the_pipeline() -> None:
    svg = ROOT / "docs" / "pipeline.svg"
    done = subprocess.run([sys.executable, str(ROOT / "docs" / "draw_pipeline.py"), "--check"], check=False)
    assert done.returncode == 0, "run: python docs/draw_pipeline.py"
    root = ElementTree.parse(svg).getroot()
    space = "{http://www.w3.org/2000/svg}"
    assert root.get("viewBox")
    names = [element.text for element in root.iter(f"{space}text") if element.get("class") == "name"]
    assert {"prepare", "split", "train", "evaluate", "gate", "export", "deploy", "smoke"} <= set(names)
    (said,) = [element.text or "" for element in root.iter(f"{space}desc")]
    assert all(name in said for name in names if name)
    assert "background" not in svg.read_text(), "transparent, for light and dark pages"
