"""What gets installed stays free to use: no strong copyleft, no package known to be dead or hostile."""

from __future__ import annotations

import json
import subprocess
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
FORBIDDEN = ("AGPL", "AFFERO", "GPL-3", "GPLV3", "GPL-2", "GPLV2", "SSPL", "BUSL", "COMMONS CLAUSE")
AVOIDED = {"albumentations", "albumentationsx", "albucore", "deepchecks", "cleanlab", "torchdata"}


def dependencies() -> set[str]:
    """Every distribution that pyproject's dependencies and extras pull in, names in canonical form."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    waiting = [*project["dependencies"], *(r for rs in project["optional-dependencies"].values() for r in rs)]
    found: set[str] = set()
    while waiting:
        requirement = Requirement(waiting.pop())
        name = requirement.name.lower().replace("_", "-")
        if name in found or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        try:
            waiting += metadata.distribution(name).requires or []
        except metadata.PackageNotFoundError:
            continue
        found.add(name)
    return found


def licence(name: str) -> str:
    about = metadata.metadata(name)
    classifiers = [c for c in about.get_all("Classifier") or [] if c.startswith("License")]
    text = about.get("License-Expression") or ""
    return " ".join([text, *classifiers, (about.get("License") or "")[:80]]).upper()


def pins() -> dict[str, Requirement]:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return {r.name.lower().replace("_", "-"): r for r in map(Requirement, lines)}


def test_what_is_installed_is_what_is_pinned() -> None:
    installed = {name: metadata.version(name) for name in pins()}
    assert not {name: v for name, v in installed.items() if not pins()[name].specifier.contains(v)}


def test_nothing_that_is_installed_has_a_strong_copyleft_licence() -> None:
    names = dependencies() | set(pins())
    assert len(dependencies()) > 60, "the walk over the dependencies found them"
    bad = {}
    for name in names:
        text = licence(name).replace("LESSER GENERAL PUBLIC", "LGPL").replace("LGPL", "")
        if any(word in text for word in FORBIDDEN) and " OR " not in text:
            bad[name] = licence(name)
    assert not bad


def test_avoided_packages_are_not_pulled_in() -> None:
    assert not AVOIDED & dependencies()


def test_the_poisoned_lightning_releases_are_excluded() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirement = next(r for r in map(Requirement, project["optional-dependencies"]["train"]) if r.name == "lightning")
    assert not requirement.specifier.contains("2.6.2")
    assert not requirement.specifier.contains("2.6.3")
    assert requirement.specifier.contains(metadata.version("lightning"))


def test_pins_satisfy_the_project_and_name_no_registry() -> None:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert not [line for line in lines if "://" in line or line.startswith("-")]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(r for rs in project["optional-dependencies"].values() for r in rs)]
    for requirement in map(Requirement, wanted):
        pin = pins()[requirement.name.lower()]
        (version,) = [s.version for s in pin.specifier]
        assert requirement.specifier.contains(version), f"{pin} doesn't satisfy {requirement}"


@pytest.mark.slow
def test_the_bill_of_materials_lists_every_pin_and_no_path_of_this_machine() -> None:
    subprocess.run(["make", "sbom"], cwd=ROOT, check=True, capture_output=True, timeout=600)
    text = (ROOT / "build" / "sbom.json").read_text()
    found = {c["name"].lower().replace("_", "-"): c["version"] for c in json.loads(text)["components"]}
    assert not {name: str(r) for name, r in pins().items() if not r.specifier.contains(found.get(name, "0"))}
    assert str(ROOT) not in text and "file://" not in text
