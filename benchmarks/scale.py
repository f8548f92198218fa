"""The full competition's size, synthetically: make, prepare and score 401,059 lesions of 1,042 patients.

    python benchmarks/scale.py [--lesions 401059]

Each command is a process of its own; wall and CPU seconds and peak memory are the operating system's.
The crops come from a small pool (`--repeat-bytes`), the metadata is full.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import polars as pl


def measured(name: str, *arguments: object) -> None:
    started = time.perf_counter()
    child = subprocess.Popen([sys.executable, "-m", "lesionflow", *map(str, arguments)], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        sys.exit(f"{name} failed")
    seconds, cpu = time.perf_counter() - started, usage.ru_utime + usage.ru_stime
    print(f"{name:10} {seconds:7.1f} s wall {cpu:7.1f} s CPU {usage.ru_maxrss / 1024:7.0f} MB peak", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lesions", type=int, default=401_059)
    parser.add_argument("--patients", type=int, default=1_042)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        counts = ("--patients", options.patients, "--lesions", options.lesions, "--prevalence", 0.00098)
        measured("synth", "data", "synth", "--out", folder / "data", *counts, "--repeat-bytes", "--quiet")
        sizes = [(folder / "data" / f"train-{p}").stat().st_size / 2**20 for p in ("image.hdf5", "metadata.csv")]
        print(f"           images {sizes[0]:,.0f} MB, metadata {sizes[1]:,.0f} MB")
        measured("prepare", "data", "prepare", folder / "data", "--out", folder / "store", "--quiet")
        truth = pl.read_csv(folder / "data" / "train-metadata.csv", columns=["isic_id", "target"])
        noise = np.random.default_rng(0).standard_normal(len(truth))
        answers = truth.select("isic_id", pl.Series("target", 3 * truth["target"].to_numpy() + noise))
        answers.sample(fraction=1, shuffle=True, seed=0).write_csv(folder / "submission.csv")
        for _ in range(3):
            measured("score", "score", folder / "submission.csv", folder / "data" / "train-metadata.csv", "--json")


if __name__ == "__main__":
    main()
