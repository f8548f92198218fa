"""The figures behind docs/scale.md: python benchmarks/scale_plan.py [--parts networks,reduce,...]

    networks     a training step, scoring and a checkpoint of two networks, one core
    reduce       gradients summed by two processes over loopback (gloo), and what a ring takes over real networks
    validation   the share of the time, and the error of the pAUC, by how many held-out lesions are looked at
    decode       pictures decoded per core, bytes of a lesion, and what that means for disks and cores
    opening      what opening store and folds takes a rank
    evaluation   the exact pAUC and its bootstrap at 4 million lesions

Measured here: all seconds and bytes, on one core where nothing else is said, CPU-seconds so that others' work hardly
counts. Calculated: the ring, disks and cores, by the formulas that stand beside them. Assumed: the pictures per second
of a GPU. Scores and stores of more lesions than the real data has are synthetic.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional

from lesionflow.data.folds import Folds
from lesionflow.data.images import PreprocessSpec
from lesionflow.data.lesions import Lesions
from lesionflow.data.sampler import Sampler
from lesionflow.data.store import Store, prepare
from lesionflow.evaluation.intervals import bootstrap_pauc
from lesionflow.evaluation.metrics import pauc
from lesionflow.models.image import LesionModule, preprocess_spec
from lesionflow.recipe import Recipe, Sampling
from lesionflow.training import resume
from lesionflow.training.validation import sample, sampling_error

NETWORKS = ("tf_efficientnet_lite0", "tf_efficientnet_b0")
SIZE, BATCH, PER_RANK = 128, 32, 64
SIZES = (400_000, 4_000_000, 400_000_000)
PREVALENCE = 0.00098
GPU_RATES = (1_000, 5_000)
"""Pictures per second of a GPU in training, assumed."""
BACKWARD = 2 / 3
"""Share of a step in which gradients become ready and can be summed while others are computed."""
LATENCY = 50e-6
"""Seconds of one message between two machines, assumed."""
_MB = 2**20


def cpu(what: Callable[[], object], rounds: int) -> float:
    """Median CPU-seconds of a call."""
    spent = []
    for _ in range(rounds):
        started = time.process_time()
        what()
        spent.append(time.process_time() - started)
    return median(spent)


def most(what: Callable[[], object]) -> float:
    """The most memory that a call holds beyond what was there, MB, as far as numpy and Python ask for it."""
    tracemalloc.start()
    what()
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return held / _MB


def heads(*names: str) -> None:
    print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}")


def network(name: str) -> dict[str, float]:
    """One core's pictures per second in training and scoring, bytes of the gradient, and a checkpoint's cost."""
    torch.set_num_threads(1)
    recipe = Recipe.load("baseline", [f"model.backbone={name}", "model.weights=none", f"image.size={SIZE}"])
    rows = np.arange(BATCH)
    sampler = Sampler(rows, (rows < 8).astype(np.int8), Sampling(), epochs=1, batch_size=BATCH, seed=0)
    module = LesionModule(recipe, preprocess_spec(recipe), sampler, seed=0)
    optimizer = module.configure_optimizers()
    x = torch.randn(BATCH, 3, SIZE, SIZE).contiguous(memory_format=torch.channels_last)
    target = torch.zeros(BATCH)

    def step() -> None:
        loss = functional.binary_cross_entropy_with_logits(module.network(x)[:, 0], target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        module.average.update(module.network, step=1)

    step()
    training = BATCH / cpu(step, 7)
    with torch.inference_mode():
        module.eval()
        module.network(x)
        scoring = BATCH / cpu(lambda: module.network(x), 7)
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        size = resume.save(Path(folder), module, optimizer, "0" * 64).stat().st_size
        saving = time.perf_counter() - started
    gradient = sum(p.numel() * 4 for p in module.network.parameters() if p.requires_grad)
    return {"training": training, "scoring": scoring, "gradient": gradient, "checkpoint": size, "saving": saving}


def networks() -> dict[str, dict[str, float]]:
    found = {name: apart("network", name) for name in NETWORKS}
    print(f"\n{SIZE} px, random weights, one core, batches of {BATCH}; training with AdamW and the moving average.\n")
    heads("network", "training, pictures/s", "scoring, pictures/s", "gradient, MB", "checkpoint, MB", "to write it, s")
    for name, one in found.items():
        sizes = f"{one['gradient'] / _MB:.1f} | {one['checkpoint'] / _MB:.1f} | {one['saving']:.2f}"
        print(f"| {name} | {one['training']:.1f} | {one['scoring']:.0f} | {sizes} |")
    return found


def reducing(rank: str, port: str, size: str) -> dict[str, float]:
    """Seconds that two processes take to sum so many bytes, in buckets of 25 MB as DDP does."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=int(rank), world_size=2)
    buckets = torch.zeros(int(size) // 4).split(25 * _MB // 4)
    spent = []
    for _ in range(23):
        dist.barrier()
        started = time.perf_counter()
        for bucket in buckets:
            dist.all_reduce(bucket)
        spent.append(time.perf_counter() - started)
    dist.destroy_process_group()
    return {"median": median(spent[3:]), "least": min(spent[3:])}


def ring(size: float, ranks: int, gbit: float) -> float:
    """Seconds of a ring all-reduce: 2 (W - 1) / W of the bytes over each link, in 2 (W - 1) messages."""
    return 2 * (ranks - 1) / ranks * size * 8 / (gbit * 1e9) + 2 * (ranks - 1) * LATENCY


def reduce(measured: dict[str, dict[str, float]]) -> None:
    print("\nTwo processes on one machine over loopback (gloo), measured, seconds on the clock.\n")
    heads("network", "gradient, MB", "median, s", "least, s", "as a ring's link, Gbit/s")
    for name, one in measured.items():
        port = str(29_600 + os.getpid() % 300)
        size = str(int(one["gradient"]))
        ranks = [started("reducing", rank, port, size) for rank in ("0", "1")]
        took, _ = [result(rank) for rank in ranks]
        link = one["gradient"] * 8 / took["least"] / 1e9
        print(f"| {name} | {one['gradient'] / _MB:.1f} | {took['median']:.3f} | {took['least']:.3f} | {link:.1f} |")
    print(f"\nEfficiency of a ring, calculated: {PER_RANK} pictures per rank and step; nothing hides the sum, or")
    print(f"{BACKWARD:.0%} of the step's computing does. Pictures/s of a rank: 8 cores as measured, GPUs assumed.\n")
    heads("network", "rank, pictures/s", "ranks", "10 Gbit/s", "25 Gbit/s", "100 Gbit/s")
    for name, one in measured.items():
        for rate in (8 * one["training"], *GPU_RATES):
            compute = PER_RANK / rate
            for count in (8, 64):
                cells = []
                for gbit in (10, 25, 100):
                    took_ring = ring(one["gradient"], count, gbit)
                    plain = compute / (compute + took_ring)
                    hidden = compute / (compute + max(0.0, took_ring - BACKWARD * compute))
                    cells.append(f"{plain:.0%} to {hidden:.0%}")
                print(f"| {name} | {rate:,.0f} | {count} | {' | '.join(cells)} |")


def validation(measured: dict[str, dict[str, float]]) -> None:
    from metric import cohort

    lesions = 4_000_000
    y, s, patient = cohort(lesions, round(lesions * PREVALENCE), lesions // 385)
    held = np.flatnonzero(patient % 5 == 0)
    truth, whole = y[held].astype(np.int8), pauc(y[held], s[held])
    epoch = 4 * int(y[patient % 5 != 0].sum())  # Balanced sampling, three benign lesions for each malignant one.
    one = measured[NETWORKS[0]]
    interval = bootstrap_pauc(y[held], s[held], patient[held], replicates=20)
    print(f"\n4 million synthetic lesions, a fifth held out ({truth.sum():,} malignant): pAUC {whole:.4f}, patients'")
    print(f"own sampling about ±{(interval.high - interval.low) / 2:.4f} (20 replicates). An epoch draws {epoch:,}.\n")
    heads("looked at", "off by, 20 samples (sd)", "told error, 95 %", "share of the time, once an epoch")
    for limit in (1_024, 10_000, 100_000, 0):
        drawn = [sample(held, truth, limit, seed) for seed in range(20 if limit else 1)]
        scores = [s[one_.rows] for one_ in drawn]
        off = float(np.std([pauc(d.targets, values) - whole for d, values in zip(drawn, scores, strict=True)]))
        told = sampling_error(drawn[0].targets, scores[0], drawn[0].share)
        looking, training = len(drawn[0].rows) / one["scoring"], epoch / one["training"]
        share = looking / (looking + training)
        print(f"| {len(drawn[0].rows):,} | {off:.4f} | ±{told:.4f} | {share:.1%} |", flush=True)


def decode() -> None:
    real = Path(os.environ.get("LESIONFLOW_REAL_DATA", "../shared/data")) / "isic2024-images"
    with tempfile.TemporaryDirectory() as scratch:
        data = real
        if not real.exists():
            from lesionflow.data.synthetic import synthesize

            data = Path(scratch) / "data"
            synthesize(data, patients=50, lesions=2_000, progress=False)
        store = prepare(data, Path(scratch) / "store")
        loader = Lesions(store, PreprocessSpec(size=SIZE))
        rows = np.arange(min(2_000, len(store)))
        sampler = Sampler(rows, store.targets[rows], Sampling("shuffle"), epochs=1, batch_size=BATCH, seed=0)
        batches = [sampler.batch(step) for step in range(sampler.steps)]

        def load() -> None:
            for draws in batches:
                loader[draws]

        rate = len(rows) / cpu(load, 5)
        encoded = float(np.mean([len(store.jpeg(row)) for row in range(len(store))]))
        file = (store.path / "lesions.arrow").stat().st_size / len(store)
    cells = file - encoded
    kept = SIZE**2 * 3
    print(f"\n{data.name}: {rate:,.0f} pictures decoded per core and second at {SIZE} px. A lesion takes")
    print(f"{encoded:,.0f} bytes as JPEG, {kept:,} decoded; its {len(store.columns)} columns of metadata {cells:,.0f}.")
    print("The rest is calculated from these.\n")
    heads("lesions", "store", "decoded pictures", "to decode all once, core-hours", "one pass of one GPU, hours")
    for lesions in SIZES:
        hours = " / ".join(f"{lesions / gpu / 3600:,.1f}" for gpu in GPU_RATES)
        sizes = f"{lesions * file / 1e9:,.1f} GB | {lesions * kept / 1e9:,.0f} GB"
        print(f"| {lesions:,} | {sizes} | {lesions / rate / 3600:,.2f} | {hours} |")
    gpus = ", ".join(f"{gpu / rate:.1f} cores for a GPU of {gpu:,} pictures/s" for gpu in GPU_RATES)
    print(f"\nDecoding as it goes takes {gpus}.")


def opening() -> None:
    import memory

    lesions = 400_000
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch) / "run"
        memory.make_run(run, lesions, "balanced")
        store, folds = Store.open(run / "store"), Folds.load(run / "folds.parquet")
        parts = {
            "map the store": lambda: Store.open(run / "store"),
            "read the targets": lambda: Store.open(run / "store").targets,
            "read the folds, check their hash": lambda: Folds.load(run / "folds.parquet"),
            "ids and patients against the store's": lambda: folds.check(store),
        }
        print(f"\nCPU-seconds of a rank for a million lesions, on a synthetic store of {lesions:,}.\n")
        heads("what", "s")
        for name, what in parts.items():
            print(f"| {name} | {cpu(what, 3) / lesions * 1e6:.2f} |")


def evaluated(lesions: str, replicates: str) -> dict[str, float]:
    """CPU-seconds and peak memory of the exact pAUC, and of one replicate of its bootstrap."""
    from metric import cohort

    n = int(lesions)
    y, s, patient = cohort(n, round(n * PREVALENCE), n // 385)
    seconds, few = cpu(lambda: pauc(y, s), 3), int(replicates)
    some, more = (cpu(lambda k=k: bootstrap_pauc(y, s, patient, replicates=k), 1) for k in (few, 3 * few))
    each = (more - some) / (2 * few)
    held = {"mb": most(lambda: pauc(y, s)), "boot_mb": most(lambda: bootstrap_pauc(y, s, patient, replicates=few))}
    return {"pauc": seconds, "each": each, "once": max(0.0, some - few * each)} | held


def evaluation() -> None:
    print("\nSynthetic scores, as many malignant lesions and lesions per patient as in the competition. CPU-seconds,")
    print("and the most memory beyond the scores themselves; 2,000 replicates are calculated from fewer.\n")
    heads("lesions", "pAUC, s", "MB", "bootstrap: once, s", "a replicate, s", "2,000 of them, s", "MB")
    for lesions, replicates in ((400_000, 2_000), (1_000_000, 1_000), (4_000_000, 6)):
        one = apart("evaluated", str(lesions), str(replicates))
        whole = one["once"] + 2000 * one["each"]
        boot = f"{one['once']:.1f} | {one['each']:.4f} | {whole:,.0f} | {one['boot_mb']:,.0f}"
        print(f"| {lesions:,} | {one['pauc']:.2f} | {one['mb']:,.0f} | {boot} |", flush=True)


def started(function: str, *of: str) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--apart", function, *of]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def result(child: subprocess.Popen[str]) -> dict[str, Any]:
    output, _ = child.communicate()
    if child.returncode:
        sys.exit("a measurement failed")
    return dict(json.loads(output.splitlines()[-1]))


def apart(function: str, *of: str) -> dict[str, Any]:
    """A function's result, run in a process of its own."""
    return result(started(function, *of))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="networks,reduce,validation,decode,opening,evaluation")
    parser.add_argument("--apart", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.apart:
        functions = {"network": network, "reducing": reducing, "evaluated": evaluated}
        print(json.dumps(functions[options.apart[0]](*options.apart[1:])))
        return
    torch.set_num_threads(1)
    wanted = options.parts.split(",")
    measured = networks() if {"networks", "reduce", "validation"} & set(wanted) else {}
    for part in wanted:
        if part in ("reduce", "validation"):
            {"reduce": reduce, "validation": validation}[part](measured)
        elif part != "networks":
            {"decode": decode, "opening": opening, "evaluation": evaluation}[part]()


if __name__ == "__main__":
    main()
