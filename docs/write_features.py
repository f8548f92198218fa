"""Write the list of features in docs/features.md from `lesionflow.data.features.catalogue`.

python docs/write_features.py [--check]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lesionflow.data.derived import SHORT
from lesionflow.data.features import BLOCKS, catalogue

PAGE = Path(__file__).with_name("features.md")
BEGIN, END = "<!-- features: python docs/write_features.py -->\n", "<!-- /features -->"


def tables() -> str:
    """A table for every block, a row for every feature; what the short names in formulas stand for."""
    parts = []
    for block in BLOCKS:
        found = catalogue((block,))
        parts.append(f"\n### {block}: {len(found)}\n")
        if block == "derived":
            parts.append("Here " + ", ".join(f"{short} is `{name}`" for short, name in SHORT.items()) + ".\n")
        parts.append("| name | formula | unit | why |\n|---|---|---|---|")
        for f in found:
            cells = (f"`{f.name}`", f.formula, f.unit, f.why)
            parts.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(parts) + "\n\n"


def written(page: str) -> str:
    """The page with the list as it should be."""
    head, rest = page.split(BEGIN)
    return f"{head}{BEGIN}{tables()}{END}{rest.split(END, 1)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the list of features in docs/features.md.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the list is out of date")
    check = parser.parse_args().check
    page = PAGE.read_text()
    if check:
        sys.exit(written(page) != page)
    PAGE.write_text(written(page))


if __name__ == "__main__":
    main()
