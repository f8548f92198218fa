"""What a service reads, laid out in the run: RUN/serving/<version>/{bundle, triton, packages}.

A version's folder is written once and never changed: pods of an older model may start again at any time.
"""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path

from lesionflow.bundle import Bundle
from lesionflow.cluster.settings import Place
from lesionflow.errors import DataError
from lesionflow.keys import digest, file_hash

FOLDER = "serving"


def stage(place: Place, run: Path) -> Path:
    """Lay out a verified copy of the run's bundle for the service and return its folder, RUN/serving/<version>.

    `triton` is added in that form, `packages` (hard links to the run's environment) unless the images hold
    lesionflow already. Another bundle, form or set of packages gives another version; one that is there and
    verifies is taken as it is. Raises `DataError` for a bundle that doesn't verify.
    """
    bundle = Bundle.open(run / "bundle")
    packages = None if place.settings.image.packaged else site_packages(Path(place.environment))
    folder = run / FOLDER / _version(place, bundle, packages)
    if folder.exists():
        if _intact(folder / "bundle"):
            return folder
        shutil.rmtree(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Not a private temporary folder: the service's pods, whose user may be another, have to read it.
    work = folder.with_name(f".staging.{uuid.uuid4().hex}")
    work.mkdir()
    try:
        shutil.copytree(run / "bundle", work / "bundle")
        Bundle.open(work / "bundle")
        if place.settings.serving.form == "triton":
            from lesionflow.export.triton import write_repository

            write_repository(work / "bundle", work / "triton", gpu=place.settings.serving.gpus > 0)
        if packages:
            shutil.copytree(packages, work / "packages", copy_function=_link)
        work.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def prune(run: Path, used: str) -> None:
    """Remove the versions whose names don't occur in `used` (the text of the live services)."""
    for folder in (run / FOLDER).glob("*"):
        if folder.name not in used:
            shutil.rmtree(folder, ignore_errors=True)


def site_packages(environment: Path) -> Path | None:
    """The packages of a virtual environment, None if there is none."""
    return next(iter(sorted(environment.glob("lib/python3.*/site-packages"))), None)


def _version(place: Place, bundle: Bundle, packages: Path | None) -> str:
    installed = sorted(p.name for p in packages.glob("*.dist-info")) if packages else []
    ours = [file_hash(p) for p in packages.glob("lesionflow-*.dist-info/RECORD")] if packages else []
    return digest([bundle.version, place.settings.serving.form, installed, ours])[:12]


def _intact(bundle: Path) -> bool:
    try:
        Bundle.open(bundle)
    except DataError:
        return False
    return True


def _link(source: str, target: str) -> None:
    """A hard link where the file system has them: an environment is large, and on the same volume."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
