"""A folder from which a Kaggle notebook without network makes a submission: packages, bundle and the notebook itself.

write_folder(Path("run/bundle"), Path("kaggle"), owner="me")

wheels/                  this package and, unless left out, what it needs, for this Python on this kind of machine
bundle/                  the model
submit.ipynb             installs from wheels/, runs `lesionflow submit`, writes submission.csv
dataset-metadata.json    for `kaggle datasets create -p FOLDER --dir-mode zip`
kernel-metadata.json     for `kaggle kernels push -p FOLDER`
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lesionflow.bundle import Bundle
from lesionflow.data.fetch import COMPETITION
from lesionflow.errors import UsageError
from lesionflow.keys import write_json, write_text
from lesionflow.progress import track
from lesionflow.wheel import file_name, wheel_bytes

NOTEBOOK = "submit.ipynb"
OWNER = "INSERT_USERNAME_HERE"
"""What stands for the Kaggle user where none was named; Kaggle's command refuses it."""

_OWNER = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{1,49}")


def write_folder(
    bundle: Path, folder: Path, *, owner: str = "", wheels: bool = True, progress: bool = True
) -> dict[str, Any]:
    """Write the offline folder; it appears once it is complete.

    `owner` is the Kaggle user whose dataset and notebook these will be; without one its place is marked. Without
    `wheels` only this package's own wheel goes in, for a notebook whose image has the rest. Gives `folder`,
    `dataset` and `kernel` (Kaggle's names), `python`, `packages` (their number) and `bytes`.

    Raises `UsageError` for a folder that isn't empty, a name that Kaggle has no user by, and packages that pip can't
    get; `DataError` for a bundle that doesn't verify.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder}: isn't an empty folder; name another, or empty it first")
    if owner and not _OWNER.fullmatch(owner):
        raise UsageError(
            f"--owner {owner}: a Kaggle user name is of letters, digits and dashes, as in its page's address"
        )
    opened = Bundle.open(bundle)
    extras = _extras(opened)
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    (work / "wheels").mkdir(parents=True)
    try:
        own = work / "wheels" / file_name()
        slug = _slug(opened.name)
        steps: tuple[Callable[[], object], ...] = (
            lambda: own.write_bytes(wheel_bytes()),
            lambda: _download(own, extras) if wheels else None,
            lambda: Bundle.open(Path(shutil.copytree(bundle, work / "bundle"))),
            lambda: write_text(work / NOTEBOOK, json.dumps(notebook(opened.name, extras), indent=1) + "\n"),
            lambda: _describe(work, opened, owner or OWNER, slug),
        )
        for step in track(steps, "notebook folder", show=progress):
            step()
        files = [path for path in work.rglob("*") if path.is_file()]
        result = {
            "folder": str(folder),
            "dataset": f"{owner or OWNER}/{slug}",
            "kernel": f"{owner or OWNER}/{slug}-submit",
            "python": _python(),
            "packages": len(list((work / "wheels").iterdir())),
            "bytes": sum(path.stat().st_size for path in files),
        }
        if folder.exists():
            folder.rmdir()
        work.rename(folder)
        return result
    finally:
        shutil.rmtree(work, ignore_errors=True)


def notebook(name: str, extras: Sequence[str] = ("serve",), python: str | None = None) -> dict[str, Any]:
    """The notebook, nbformat 4.5, without any output."""
    needs = ",".join(extras)
    cells = (
        _text(
            f"# Submission of {name}\n\nInstalls lesionflow from this dataset, without network, and scores the "
            "competition's test files. Not a medical device."
        ),
        _code(_FIND, tags=("parameters",)),
        _text("Packages come from the dataset's folder `wheels`; what the image already has stays as it is."),
        _code(_INSTALL.format(needs=needs, python=python or _python())),
        _text("Every lesion is compared with the same patient's others where the model was trained with metadata."),
        _code(_SUBMIT),
    )
    return {
        "cells": [{"id": f"cell-{number}", **cell} for number, cell in enumerate(cells)],
        "metadata": {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }


_FIND = f"""\
import os
import subprocess
import sys
from pathlib import Path

INPUT = Path("/kaggle/input")  # Kaggle mounts a dataset there, by its name or by its kind, owner and name.
places = [INPUT / "{COMPETITION}", INPUT / "competitions" / "{COMPETITION}"]
DATA = Path(os.environ.get("LESIONFLOW_DATA") or next((p for p in places if p.is_dir()), places[0]))
given = os.environ.get("LESIONFLOW_FOLDER")
folders = [Path(given)] if given else [Path.cwd(), *INPUT.glob("*"), *INPUT.glob("datasets/*/*")]
WHEEL = next((wheel for folder in folders for wheel in folder.glob("wheels/lesionflow-*.whl")), None)
assert WHEEL, f"no wheels/lesionflow-*.whl in {{', '.join(map(str, folders))}}: add the dataset to this notebook"
BUNDLE = WHEEL.parents[1] / "bundle"
OUT = os.environ.get("LESIONFLOW_OUT", "submission.csv")"""

_INSTALL = """\
packages = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--find-links", str(WHEEL.parent)]
done = subprocess.run([*packages, f"{{WHEEL}}[{needs}]"], capture_output=True, text=True)
print(done.stdout, done.stderr)
made, here = "{python}", ".".join(map(str, sys.version_info[:2]))
assert done.returncode == 0, f"pip can't install; the folder was made for Python {{made}}, this is {{here}}\""""

_SUBMIT = """\
score = ["submit", str(BUNDLE), "--data", str(DATA), "--out", OUT, "--skip-corrupt", "--quiet"]
for command in (["verify", str(BUNDLE)], score):  # Does it answer here as it did where it was made?
    done = subprocess.run([sys.executable, "-m", "lesionflow", *command], capture_output=True, text=True)
    print(done.stdout, done.stderr)
    assert done.returncode == 0, done.stderr"""


def _text(source: str) -> dict[str, Any]:
    return {"cell_type": "markdown", "metadata": {}, "source": source.splitlines(keepends=True)}


def _code(source: str, tags: Sequence[str] = ()) -> dict[str, Any]:
    return {
        "cell_type": "code",
        "execution_count": None,
        "metadata": {"tags": list(tags)} if tags else {},
        "outputs": [],
        "source": source.splitlines(keepends=True),
    }


def _download(wheel: Path, extras: Sequence[str]) -> None:
    """What the wheel needs, as wheels beside it, from where this machine's pip takes packages."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--only-binary", ":all:"]
    wanted = f"{wheel}[{','.join(extras)}]"
    done = subprocess.run([*command, "--dest", str(wheel.parent), wanted], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip() or done.stdout.strip() or "no reason given").splitlines()[-1][:300]
        raise UsageError(
            f"pip can't get the packages of lesionflow[{','.join(extras)}] ({reason}); check the network, or leave "
            "them out with --no-wheels if the notebook's image has them"
        )


def _extras(bundle: Bundle) -> tuple[str, ...]:
    """What the bundle takes to run: CatBoost's and XGBoost's trees need their libraries."""
    boosted = any("catboost" in name or "xgboost" in name for name in bundle.hashes)
    return ("serve", "boosters") if boosted else ("serve",)


def _describe(work: Path, bundle: Bundle, owner: str, slug: str) -> None:
    licence = bundle.info.get("data_licence") or "not recorded"
    write_json(
        work / "dataset-metadata.json",
        {
            "title": slug,
            "id": f"{owner}/{slug}",
            # The code is Apache-2.0, packages have their own licences, and the data's bear on the model.
            "licenses": [{"name": "other"}],
            "description": f"{bundle.name}, bundle {bundle.version}, with what runs it. Trained on data under "
            f"{licence if isinstance(licence, str) else json.dumps(licence)}. {bundle.info['notice']}",
        },
    )
    write_json(
        work / "kernel-metadata.json",
        {
            "id": f"{owner}/{slug}-submit",
            "title": f"{slug}-submit",
            "code_file": NOTEBOOK,
            "language": "python",
            "kernel_type": "notebook",
            "is_private": True,
            "enable_gpu": False,
            "enable_internet": False,
            "dataset_sources": [f"{owner}/{slug}"],
            "competition_sources": [COMPETITION],
            "kernel_sources": [],
            "model_sources": [],
        },
    )


def _slug(name: str) -> str:
    """`lesionflow-NAME` as Kaggle writes names: 6 to 43 of small letters, digits and dashes (`-submit` must fit)."""
    return re.sub(r"[^a-z0-9]+", "-", f"lesionflow-{name}".lower())[:43].strip("-")


def _python() -> str:
    return f"{sys.version_info[0]}.{sys.version_info[1]}"
