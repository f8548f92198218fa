"""Bytes to batch: our path, the original's, and the floor of decode + resize alone, on one core in one run.

    python benchmarks/loader.py [--data DIR] [--lesions 2000]

The original reads an h5py item, decodes with Pillow and applies torchvision's Resize, ToTensor and
Normalize to each image. Ours slices the mapped store, decodes with libjpeg-turbo and resizes with
Pillow into a uint8 batch; on the device it is then normalised, which the comparison with the original
includes. Both arrive at the same pixels within rounding, which is checked first.
"""

from __future__ import annotations

import argparse
import io
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import h5py
import numpy as np
import simplejpeg
import torch
from PIL import Image
from torchvision import transforms

from lesionflow.data.augment import normalise
from lesionflow.data.images import PreprocessSpec, to_batch
from lesionflow.data.store import prepare

try:
    from lesionflow.data.synthetic import synthesize
except ImportError:
    synthesize = None

BATCH = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    real = Path(os.environ.get("LESIONFLOW_REAL_DATA", "../shared/data")) / "isic2024-images"
    parser.add_argument("--data", type=Path, default=real, help="data set directory; synthetic if it isn't there")
    parser.add_argument("--lesions", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    spec = PreprocessSpec(size=128)
    with tempfile.TemporaryDirectory() as scratch:
        data = options.data
        if not data.exists():
            data = Path(scratch) / "synthetic"
            synthesize(data, patients=50, lesions=options.lesions, progress=False)
        store = prepare(data, Path(scratch) / "store")
        rows = range(min(options.lesions, len(store)))
        encoded = [store.jpeg(row) for row in rows]
        ids = store.ids[: len(rows)]

        def ours() -> list[torch.Tensor]:
            return [
                normalise(torch.from_numpy(to_batch([store.jpeg(r) for r in rows[at : at + BATCH]], spec)), spec)
                for at in range(0, len(rows), BATCH)
            ]

        def pixels() -> list[np.ndarray]:
            return [to_batch([store.jpeg(r) for r in rows[at : at + BATCH]], spec) for at in range(0, len(rows), BATCH)]

        pipeline = transforms.Compose(
            [transforms.Resize((128, 128)), transforms.ToTensor(), transforms.Normalize(spec.mean, spec.std)]
        )

        def original() -> list[torch.Tensor]:
            with h5py.File(data / "train-image.hdf5") as file:
                items = [pipeline(Image.open(io.BytesIO(file[name][()])).convert("RGB")) for name in ids]
            return [torch.stack(items[at : at + BATCH]) for at in range(0, len(items), BATCH)]

        def floor() -> None:
            for data in encoded:
                image = Image.fromarray(simplejpeg.decode_jpeg(data))
                np.asarray(image.resize((128, 128), Image.Resampling.BILINEAR))

        off = max(float((a - b).abs().max()) for a, b in zip(ours(), original(), strict=True))
        step = 1 / 255 / min(spec.std)
        assert off <= step, f"pixels differ by {off}"
        rates = {name: [] for name in ("pixels", "ours", "original", "floor")}
        ways: dict[str, Callable[[], object]] = {"pixels": pixels, "ours": ours, "original": original, "floor": floor}
        for _ in range(options.rounds):
            for name, way in ways.items():
                started = time.perf_counter()
                way()
                rates[name].append(len(rows) / (time.perf_counter() - started))
    print(f"{len(rows)} lesions of {data.name}, 128 px, one core, median of {options.rounds} rounds")
    print(f"largest difference of normalised pixels: {off:.2g} (one grey level is {step:.2g})")
    for name, text in (
        ("pixels", "ours, bytes to uint8 batch"),
        ("ours", "ours, bytes to normalised batch"),
        ("original", "original (h5py, Pillow, torchvision)"),
        ("floor", "decode + resize alone"),
    ):
        print(f"{text:42} {median(rates[name]):8.0f} images/s")
    print(f"ours / original {median(a / b for a, b in zip(rates['ours'], rates['original'], strict=True)):.2f}")
    print(f"ours / floor    {median(a / b for a, b in zip(rates['pixels'], rates['floor'], strict=True)):.2f} (uint8)")


if __name__ == "__main__":
    main()
