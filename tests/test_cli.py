"""The command line: every command explains itself with an example, errors are one line with their code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.main import get_command

from lesionflow.cli import app
from lesionflow.errors import UsageError


def leaves(command, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], object]]:
    children = getattr(command, "commands", None)
    if not children:
        return [(path, command)]
    return [leaf for name, child in children.items() for leaf in leaves(child, (*path, name))]


COMMANDS = leaves(get_command(app))


@pytest.mark.parametrize(("path", "command"), COMMANDS, ids=[" ".join(p) for p, _ in COMMANDS])
def test_every_command_has_help_with_an_example(path: tuple[str, ...], command) -> None:
    if path == ("recipes",):
        return
    assert f"Example: lesionflow {' '.join(path)}" in command.help.replace("\n", " ").replace("  ", " ")


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "lesionflow", *map(str, arguments)], capture_output=True, text=True)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("score", "missing.csv", "truth.csv"), 3, "missing.csv"),
        (("run", "nosuch", "--data", "x", "--out", "y"), 2, "baseline"),
        (("run", "quick", "--data", "x", "--out", "y"), 3, "x"),
        (("verify", "nothing"), 3, "nothing"),
        (("ask", "http://127.0.0.1:9", "."), 5, "lesionflow serve"),
        (("train", "quick"), 2, "--out"),
        (("nonsense",), 2, "nonsense"),
        (("data", "check", "nowhere"), 2, "nowhere"),
        (("data", "prepare", "nowhere", "--out", "store"), 3, "nowhere"),
        (("show", "nowhere"), 3, "nowhere"),
    ],
)
def test_errors_are_short_and_carry_their_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], code: int, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run(*arguments)
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = run("--debug", "verify", tmp_path / "nothing")
    assert "Traceback" in done.stderr


def test_a_missing_extra_is_named(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError('no torch', name='torch')")
    command = (
        "import sys; sys.path.insert(0, %r); sys.argv = ['lesionflow', 'serve', 'x']; import lesionflow.cli as c\n"
    )
    command += "def serve(*a, **k): import torch\n"
    command += "import lesionflow.serving.app as app; app.serve = serve; c.main()"
    done = subprocess.run([sys.executable, "-c", command % str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "pip install 'lesionflow[train]'" in done.stderr


def test_version() -> None:
    from lesionflow import __version__

    assert run("--version").stdout.strip() == f"lesionflow {__version__}"
    assert typer.__version__


def test_what_a_service_is_named_and_told_must_fit_its_urls_and_headers(bundle_dir, tmp_path, monkeypatch):
    from lesionflow.options import read_token
    from lesionflow.serving.app import serve

    with pytest.raises(UsageError, match=r"--model-name 'a/b'"):
        serve(bundle_dir, port=0, name="a/b")
    (tmp_path / "token").write_text("two words\n")
    with pytest.raises(UsageError, match="without spaces"):
        read_token(tmp_path / "token")
    monkeypatch.setenv("LESIONFLOW_TOKEN", "schlüssel")
    with pytest.raises(UsageError, match="LESIONFLOW_TOKEN: has characters"):
        read_token(None)


def test_help_names_every_limit():
    from lesionflow.cli import serve
    from lesionflow.serving.protocol import ServiceLimits
    from lesionflow.serving.settings import named

    text = " ".join((serve.__doc__ or "").split())
    assert f"Limits: {', '.join(name for name, _ in named(ServiceLimits()))};" in text
