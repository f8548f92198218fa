"""Bytes to batch and cache to batch: our paths, the original's, and the floors of each, on one core in one run.

    python benchmarks/loader.py [--data DIR] [--lesions 2000]

The original reads an h5py item, decodes with Pillow and applies torchvision's Resize, ToTensor and
Normalize to each image. Ours slices the mapped store, decodes with libjpeg-turbo and resizes with
Pillow into a uint8 batch; on the device it is then normalised, which the comparison with the original
includes. Both arrive at the same pixels within rounding, which is checked first.

The loader's batches (pixels, targets, randoms, rows, as training asks for them in the sampler's order) are measured
with and without the cache of decoded pixels, against decode + resize alone, and against a plain copy of the same
pixels from one array in memory to another. The cache's file has been read before, so this is memory, not a disk.
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
from lesionflow.data.datamodule import Lesions
from lesionflow.data.images import PreprocessSpec, to_batch
from lesionflow.data.pixelcache import build
from lesionflow.data.sampler import Sampler
from lesionflow.data.store import prepare
from lesionflow.recipe import Sampling

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

        started = time.perf_counter()
        cache = build(store, spec)
        building = time.perf_counter() - started
        known = np.arange(len(rows))
        sampler = Sampler(known, store.targets[known], Sampling("shuffle"), epochs=1, batch_size=BATCH, seed=0)
        steps = [sampler.batch(step) for step in range(sampler.steps)]
        decoding, cached = Lesions(store, spec), Lesions(store, spec, cache)
        gathered = [cached.__getitems__(draws).image.numpy().copy() for draws in steps]
        for draws, image in zip(steps, gathered, strict=True):
            assert np.array_equal(decoding.__getitems__(draws).image.numpy(), image), "the cache holds other pixels"

        def decode_path() -> None:
            for draws in steps:
                decoding.__getitems__(draws)

        def cache_path() -> None:
            for draws in steps:
                cached.__getitems__(draws)

        def copy() -> None:
            for image in gathered:
                np.copyto(np.empty_like(image), image)

        off = max(float((a - b).abs().max()) for a, b in zip(ours(), original(), strict=True))
        step = 1 / 255 / min(spec.std)
        assert off <= step, f"pixels differ by {off}"
        rates = {name: [] for name in ("pixels", "ours", "original", "loader", "floor", "cache", "copy")}
        ways: dict[str, Callable[[], object]] = {
            "pixels": pixels, "ours": ours, "original": original, "loader": decode_path, "floor": floor,
            "cache": cache_path, "copy": copy,
        }  # fmt: skip
        for _ in range(options.rounds):
            for name, way in ways.items():
                repeats = 10 if name in ("cache", "copy") else 1  # A pass of these takes milliseconds.
                started = time.perf_counter()
                for _ in range(repeats):
                    way()
                rates[name].append(repeats * len(rows) / (time.perf_counter() - started))
    print(f"{len(rows)} lesions of {data.name}, 128 px, one core, median of {options.rounds} rounds")
    print(f"largest difference of normalised pixels: {off:.2g} (one grey level is {step:.2g})")
    for name, text in (
        ("pixels", "ours, bytes to uint8 batch"),
        ("ours", "ours, bytes to normalised batch"),
        ("original", "original (h5py, Pillow, torchvision)"),
        ("floor", "decode + resize alone"),
        ("loader", "the loader's batches, decoding"),
        ("cache", "the loader's batches, from the cache"),
        ("copy", "plain copy of the same batches"),
    ):
        print(f"{text:42} {median(rates[name]):8.0f} images/s")
    print(f"ours / original {median(a / b for a, b in zip(rates['ours'], rates['original'], strict=True)):.2f}")
    print(f"ours / floor    {median(a / b for a, b in zip(rates['pixels'], rates['floor'], strict=True)):.2f} (uint8)")
    print(
        f"loader / floor  {median(a / b for a, b in zip(rates['loader'], rates['floor'], strict=True)):.2f} (decoding)"
    )
    print(f"cache / copy    {median(a / b for a, b in zip(rates['cache'], rates['copy'], strict=True)):.2f}")
    print(f"the cache of all {len(store)} lesions was built in {building:.1f} s")


if __name__ == "__main__":
    main()
