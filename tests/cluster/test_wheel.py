"""The wheel that carries the code into a cluster, and the script that installs it there."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from lesionflow.cluster.pipeline import INSTALL
from lesionflow.recipe import shipped
from lesionflow.wheel import file_name, wheel_bytes


def test_it_is_a_wheel_of_this_very_code_every_time_the_same() -> None:
    packed = wheel_bytes()
    assert packed == wheel_bytes()
    assert len(packed) < 700_000, "a secret holds 1 MiB, in base64"
    names = zipfile.ZipFile(io.BytesIO(packed)).namelist()
    assert {f"lesionflow/recipes/{path.name}" for path in shipped().values()} <= set(names)
    assert "lesionflow/reporting/report.html" in names and "lesionflow/cluster/pipeline.py" in names
    assert not [n for n in names if "__pycache__" in n or "test" in n]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The environment that the pipeline's first pod makes, from the wheel alone (dependencies come from here)."""
    folder = tmp_path_factory.mktemp("volume")
    (folder / file_name()).write_bytes(wheel_bytes())
    install(folder)
    return folder


def install(folder: Path) -> str:
    environment = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "PIP_NO_DEPS": "1", "HOME": str(folder)}
    environment["PYTHONPATH"] = next(p for p in sys.path if p.endswith("site-packages"))
    command = ["sh", "-ec", INSTALL, "install", str(folder / "environment"), str(folder / file_name()), ""]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_environment_holds_the_package_and_is_made_once(installed: Path) -> None:
    python = installed / "environment" / "bin" / "python"
    environment = {"PYTHONPATH": next(p for p in sys.path if p.endswith("site-packages")), "PATH": os.environ["PATH"]}
    code = "import lesionflow.cli, lesionflow.recipe as r; print(lesionflow.__file__, *r.shipped())"
    told = subprocess.run([python, "-c", code], env=environment, capture_output=True, text=True, cwd=installed)
    where, *recipes = told.stdout.split()
    assert where.startswith(str(installed)), told.stdout + told.stderr
    assert recipes == list(shipped())
    before = (installed / "environment" / ".ready").stat().st_mtime_ns
    assert "is there" in install(installed)
    assert (installed / "environment" / ".ready").stat().st_mtime_ns == before
    assert sorted(p.name for p in installed.iterdir() if p.name.startswith("environment")) == ["environment"]
