"""The README's promises: its commands run, its tree is the tree."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lesionflow.cli import app
from lesionflow.recipe import shipped

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def commands(text: str) -> list[str]:
    blocks = re.findall(r"```console\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("$ ")]
    return [line[2:].split("  #")[0].strip() for line in lines]


def test_the_step_by_step_commands_run(tmp_path: Path) -> None:
    section = README.split("## A first run, step by step")[1].split("\n## ")[0]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    found = commands(section)
    assert len(found) == 12
    for command in found:
        done = subprocess.run(
            shlex.split(command), cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    assert (tmp_path / "submission.csv").read_text().startswith("isic_id,target\n")
    assert (tmp_path / "runs" / "first" / "report.html").exists()
    assert not (tmp_path / "runs" / "first" / "deploy.json").exists()


@pytest.mark.parametrize("command", sorted({c for c in commands(README) if c.startswith("lesionflow")}))
def test_every_command_in_the_readme_exists_with_its_options(command: str) -> None:
    words = shlex.split(command)[1:]
    depth = 2 if words[0] in ("data", "pipeline", "cluster") else 1
    result = CliRunner().invoke(app, [*words[:depth], "--help"])
    assert result.exit_code == 0, result.output
    text = re.sub(r"[^\w-]+", " ", result.output)
    for option in (w for w in words if w.startswith("--")):
        assert option in text, f"{command}: no option {option}"


def test_make_targets_in_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for command in commands(README):
        if command.startswith("make "):
            assert re.search(rf"^{command.split()[1]}:", makefile, re.MULTILINE)


def test_the_tree_and_the_recipes_are_what_is_there() -> None:
    tree = README.split("## Where things live")[1].split("```")[1]
    for line in tree.splitlines():
        if match := re.match(r"^(  )?([\w./-]+?)/?\s{2,}", line):
            folder = ROOT / "src" / "lesionflow" if match[1] else ROOT
            assert (folder / match[2]).exists(), f"{match[2]} is in the README's tree but not there"
    named = set(re.findall(r"^\| `([\w-]+)` \|", README.split("## Recipes")[1], re.MULTILINE))
    assert set(shipped()) <= named


def test_relative_links_lead_somewhere() -> None:
    for text in (README, (ROOT / "CONTRIBUTING.md").read_text()):
        for target in re.findall(r"\]\(((?!http)[^)#]+)\)", text):
            assert (ROOT / target).exists(), target


def test_every_promise_of_security_names_a_test_that_exists() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", (ROOT / "SECURITY.md").read_text())
    assert len(named) > 10
    for path, test in named:
        assert (ROOT / path).exists() and (not test or f"def {test}(" in (ROOT / path).read_text()), f"{path}::{test}"
