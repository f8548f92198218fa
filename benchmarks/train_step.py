"""A training step: what it costs, what it waits for, and what stands beside it.

    python benchmarks/train_step.py [--data DIR] [--steps 30] [--rounds 3]

Sides, each a process of its own on one core, in turn, round by round, all on one backbone at one size:

    original     as the public demo trains: h5py, Pillow and torchvision for each picture in a DataLoader, Lightning's
                 own loop, Adam, no augmentation, no average of the weights
    reference    the reference recipe (the same settings) in this engine
    baseline     the baseline recipe: balanced sampling, augmentation, AdamW, EMA, checkpoints
    compiled     the baseline with torch.compile, once it has compiled; the seconds that took are told

Of each: pictures per CPU-second, peak memory, the share of a step that waits for data, and the share that goes to
agreeing to stop, checkpoints and curves. The first steps are left out.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from lesionflow import steps
from lesionflow.recipe import Recipe

SIDES = ("original", "reference", "baseline", "compiled")
WARM = 4
"""Steps that aren't counted."""
BATCH, SIZE, BACKBONE = 32, 128, "tf_efficientnet_lite0"


class Clock:
    """Seconds by what they went to, and when each step ended."""

    def __init__(self) -> None:
        self.spent: defaultdict[str, float] = defaultdict(float)
        self.ends: list[tuple[float, float]] = []

    def around(self, what: str, function: Any) -> Any:
        def timed(*of: Any, **more: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*of, **more)
            finally:
                self.spent[what] += time.perf_counter() - began

        return timed

    def step(self) -> None:
        self.ends.append((time.perf_counter(), time.process_time()))
        if len(self.ends) == WARM:
            self.spent.clear()

    def result(self, images: int) -> dict[str, float]:
        (began, cpu), (ended, cpu_ended) = self.ends[WARM - 1], self.ends[-1]
        count, wall = len(self.ends) - WARM, ended - began
        return {
            "images_per_cpu_second": images * count / (cpu_ended - cpu),
            "step_ms": 1000 * wall / count,
            "data": self.spent["data"] / wall,
            "between": self.spent["between"] / wall,
            "first_step_s": 0.0,
            "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }


class Enough(Exception):
    """As many steps as were asked for."""


def ours(data: Path, work: Path, recipe: Recipe, count: int, *, compiled: bool) -> dict[str, float]:
    """Steps of the real engine, timed from outside."""
    from torch.utils.data import DataLoader

    from lesionflow.data.datamodule import LesionData
    from lesionflow.models.image import LesionModule
    from lesionflow.training import run as engine
    from lesionflow.training.conduct import Conductor

    run, clock = work / "run", Clock()
    keyed = steps.begin(run, recipe, data)
    steps.prepare(run, data, keyed["prepare"], progress=False)
    steps.split(run, keyed["split"])
    loader, ended, step = LesionData.train_dataloader, Conductor.on_train_batch_end, LesionModule.training_step
    first: list[float] = []

    class Timed:
        """A loader whose batches are waited for by the clock."""

        def __init__(self, of: DataLoader[Any]) -> None:
            self.of = of

        def __len__(self) -> int:
            return len(self.of)

        def __iter__(self) -> Any:
            batches = iter(self.of)
            take = clock.around("data", lambda: next(batches, None))
            while (batch := take()) is not None:
                yield batch

    def counted(self: Conductor, *of: Any) -> None:
        clock.around("between", ended)(self, *of)
        clock.step()
        if len(clock.ends) == WARM + count:
            raise Enough

    def compiling(self: LesionModule, *of: Any) -> Any:
        if not first:
            first.append(time.perf_counter())
            if compiled:
                self.network.compile()
        return step(self, *of)

    LesionData.train_dataloader = lambda self: Timed(loader(self))  # type: ignore[method-assign, return-value]
    Conductor.on_train_batch_end = counted  # type: ignore[method-assign]
    LesionModule.training_step = compiling  # type: ignore[method-assign]
    try:
        engine.train_folds(run, [0])
    except Enough:
        return clock.result(BATCH) | {"first_step_s": clock.ends[0][0] - first[0]}
    raise AssertionError("the training ended before it had so many steps")


def original(data: Path, work: Path, recipe: Recipe, count: int, *, compiled: bool) -> dict[str, float]:
    """The same number of steps in the way of the demo."""
    import h5py
    import lightning as L
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset
    from torchvision import transforms

    from lesionflow.data.table import read_metadata
    from lesionflow.models.image import build

    table, clock = read_metadata(data / "train-metadata.csv"), Clock()
    ids, targets = table["isic_id"].to_list(), table["target"].to_list()
    order = np.random.default_rng(0).permutation(len(ids)).tolist()
    change = transforms.Compose(
        [transforms.Resize((SIZE, SIZE)), transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)]
    )

    class Crops(Dataset[Any]):
        def __init__(self) -> None:
            self.file = h5py.File(data / "train-image.hdf5")

        def __len__(self) -> int:
            return len(order)

        def __getitem__(self, at: int) -> Any:
            image = Image.open(io.BytesIO(self.file[ids[order[at]]][()])).convert("RGB")
            return change(image), float(targets[order[at]])

    class Network(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = build(recipe.model)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            x, y = batch
            return torch.nn.functional.binary_cross_entropy_with_logits(self.network(x)[:, 0], y.float())

        def on_train_batch_end(self, *of: Any) -> None:
            clock.step()

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=1e-3)

    loader = DataLoader(Crops(), BATCH, collate_fn=clock.around("data", torch.utils.data.default_collate))
    fetch = Crops.__getitem__
    Crops.__getitem__ = clock.around("data", fetch)  # type: ignore[method-assign]
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, limit_train_batches=WARM + count, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Network(), loader)
    return clock.result(BATCH)


def measure(side: str, data: Path, count: int, core: int) -> dict[str, float]:
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    name = "reference" if side in ("original", "reference") else "baseline"
    overrides = [f"model.backbone={BACKBONE}", f"image.size={SIZE}", f"training.batch_size={BATCH}", "folds.holdout=0"]
    recipe = Recipe.load(name, overrides)
    with tempfile.TemporaryDirectory() as scratch:
        way = original if side == "original" else ours
        return way(data, Path(scratch), recipe, count, compiled=side == "compiled")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    real = Path(os.environ.get("LESIONFLOW_REAL_DATA", "../shared/data")) / "isic2024-images"
    parser.add_argument("--data", type=Path, default=real, help="data set directory")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--core", type=int, default=0, help="the core that every side is pinned to")
    parser.add_argument(
        "--sides", nargs="+", choices=SIDES, default=[s for s in SIDES if s != "compiled" or shutil.which("g++")]
    )
    parser.add_argument("--one", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.data, options.steps, options.core)))
        return
    found: dict[str, list[dict[str, float]]] = {side: [] for side in options.sides}
    for _ in range(options.rounds):
        for side in options.sides:
            command = [
                sys.executable,
                __file__,
                "--data",
                options.data,
                "--steps",
                options.steps,
                "--core",
                options.core,
            ]
            done = subprocess.run([*map(str, command), "--one", side], stdout=subprocess.PIPE, check=True, text=True)
            found[side].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"{side}: {found[side][-1]}", file=sys.stderr, flush=True)
    print(
        f"{BACKBONE}, {SIZE} px, batches of {BATCH}, one core, {options.rounds} rounds of {options.steps} steps, median"
    )
    heads = ("side", "images per CPU-second", "to original", "step, ms", "waits for data", "between steps", "peak MiB")
    print(f"| {' | '.join(heads)} | first step, s |")
    print("|---|---|---|---|---|---|---|---|")
    base = [one["images_per_cpu_second"] for one in found.get("original", found[options.sides[0]])]
    for side, rounds in found.items():
        middle = {name: median(one[name] for one in rounds) for name in rounds[0]}
        ratio = median(one["images_per_cpu_second"] / b for one, b in zip(rounds, base, strict=True))
        first = f"{middle['first_step_s']:.1f}" if middle["first_step_s"] else ""
        print(
            f"| {side} | {middle['images_per_cpu_second']:.1f} | {ratio:.2f} | {middle['step_ms']:.0f} "
            f"| {100 * middle['data']:.2f} % | {100 * middle['between']:.2f} % | {middle['peak_mib']:.0f} | {first} |"
        )


if __name__ == "__main__":
    main()
