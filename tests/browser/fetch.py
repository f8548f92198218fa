"""What the tests of pages need besides pip's packages: Debian's Chromium, and axe-core from npm in the tests' cache.

`make browser` runs this. As root on a machine with apt it installs what is missing; elsewhere it says what to
install. It never fails: tests of pages then skip, with the reason.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from pathlib import Path

AXE = "4.14.1"
CACHE = Path(os.environ.get("LESIONFLOW_CACHE", Path.home() / ".cache" / "lesionflow"))
AXE_PATH = CACHE / f"axe-core-{AXE}" / "node_modules" / "axe-core" / "axe.min.js"
NO_CHROMIUM = "no Chromium: `apt-get install chromium`, or set LESIONFLOW_CHROMIUM to the program; see `make browser`"
NO_AXE = f"no axe-core {AXE} in {CACHE}: `make browser` takes it from npm"


def chromium() -> str | None:
    """The browser's program: LESIONFLOW_CHROMIUM, or the first that is on the PATH."""
    named = os.environ.get("LESIONFLOW_CHROMIUM")
    names = [named] if named else ["chromium", "chromium-browser", "google-chrome"]
    return next((found for name in names if (found := shutil.which(name))), None)


def lacking() -> list[str]:
    """What is missing, in words."""
    return ([] if chromium() else [NO_CHROMIUM]) + ([] if AXE_PATH.exists() else [NO_AXE])


def install() -> None:
    """Install what is missing, if we may."""
    packages = ([] if chromium() else ["chromium", "fonts-dejavu-core"]) + (
        [] if AXE_PATH.exists() or shutil.which("npm") else ["npm"]
    )
    if packages and os.geteuid() == 0 and shutil.which("apt-get"):
        quiet = {"env": os.environ | {"DEBIAN_FRONTEND": "noninteractive"}, "stdout": subprocess.DEVNULL}
        subprocess.run(["apt-get", "update", "-qq"], **quiet, timeout=300)
        subprocess.run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", *packages], **quiet, timeout=900)
    if not AXE_PATH.exists() and shutil.which("npm"):
        place = AXE_PATH.parents[2]
        place.mkdir(parents=True, exist_ok=True)
        command = ["npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(place), f"axe-core@{AXE}"]
        subprocess.run(command, stdout=subprocess.DEVNULL, timeout=300)


if __name__ == "__main__":
    # A registry that doesn't answer is no reason for `make test` to end here.
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        install()
    for missing in lacking():
        print(f"browser tests will skip: {missing}")
