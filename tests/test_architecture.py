"""The house stands: imports go down only, the service is torch-free, the first answer is quick."""

from __future__ import annotations

import ast
import resource
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "lesionflow"
# Lowest first; a room may import rooms of its own level and below.
LEVELS = (
    ("errors", "keys", "fields", "recipe", "options", "progress", "graphfile", "wheel", "__init__"),
    ("data",),
    ("bundle", "signing"),
    ("models", "evaluation", "serving", "client"),
    ("training", "export", "reporting"),
    ("plan", "gather", "pack", "present", "steps"),
    ("cluster",),
    ("cli", "__main__"),
)
TORCH_FREE = (
    "bundle", "client", "graphfile", "signing", "data.schema", "data.images", "data.external",
    "serving.predictor", "serving.app", "serving.submission", "serving.notebook",
    "serving.drift", "serving.driftreport", "serving.triage",
)  # fmt: skip


def level(module: str) -> int:
    room = module.split(".")[1] if "." in module else "__init__"
    return next(n for n, rooms in enumerate(LEVELS) if room in rooms)


def imports(path: Path) -> list[str]:
    """Every lesionflow module a file imports, lazy imports and type-checking ones included."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lesionflow"):
            assert node.module
            found += [node.module] if "." in node.module else [f"lesionflow.{a.name}" for a in node.names]
        elif isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.startswith("lesionflow")]
    return found


def module_name(path: Path) -> str:
    return ".".join(["lesionflow", *path.relative_to(PACKAGE).with_suffix("").parts])


ALLOWED_UP = {
    # The bars know the shape of a training's progress, for the type checker alone.
    ("lesionflow.progress", "lesionflow.training.status"),
}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=module_name)
def test_imports_go_down_only(path: Path) -> None:
    name = module_name(path)
    for imported in imports(path):
        known = imported in ("lesionflow.__version__",) or (name, imported) in ALLOWED_UP
        assert known or level(imported) <= level(name), f"{name} imports {imported}, which lies above it"


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("module", TORCH_FREE)
def test_the_service_never_loads_torch(module: str) -> None:
    heavy = "{'torch', 'timm', 'lightning', 'torchvision', 'matplotlib', 'kfp'}"
    assert run_python(f"import sys, lesionflow.{module}; print({heavy} & set(sys.modules))").strip() == "set()"


def test_help_answers_at_once() -> None:
    # CPU seconds, not wall: the promise is half a second, and a busy machine must not break it.
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "lesionflow", "--help"], capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5
    loaded = run_python("import sys, lesionflow.cli; print('\\n'.join(sys.modules))").split()
    assert not {"torch", "polars", "numpy", "pyarrow", "h5py"} & set(loaded), "the command line pays for no library"


def test_modules_stay_readable() -> None:
    long = {
        str(p.relative_to(PACKAGE)): n for p in PACKAGE.rglob("*.py") if (n := len(p.read_text().splitlines())) > 350
    }
    assert set(long) <= {"cli.py", "steps.py"}, long
