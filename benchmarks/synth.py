"""How fast the synthetic set is made, by number of processes and with repeated images.

    python benchmarks/synth.py [LESIONS]

Includes drawing, JPEG encoding, HDF5, CSV and the truth.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

from lesionflow.data.synthetic import synthesize


def main(lesions: int) -> None:
    print(f"{lesions:,} lesions, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    print("| processes | images | seconds | lesions/s | KB per image |")
    print("|---|---|---|---|---|")
    for workers, repeat in ((1, False), (2, False), (1, True)):
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            made = synthesize(
                Path(folder) / "set", patients=max(40, lesions // 385), lesions=lesions, prevalence=0.01,
                workers=workers, repeat_bytes=repeat, progress=False,
            )  # fmt: skip
            seconds = time.perf_counter() - start
            count = made["lesions"]["train"] + made["lesions"]["test"]
            size = (made["bytes"]["train-image.hdf5"] + made["bytes"]["test-image.hdf5"]) / count / 1000
            kind = "repeated" if repeat else "drawn"
            print(f"| {workers} | {kind} | {seconds:.1f} | {count / seconds:,.0f} | {size:.2f} |", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000)
