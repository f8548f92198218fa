"""Memory of a training rank against the size of the store: 40 thousand, 400 thousand and 4 million lesions.

    python benchmarks/memory.py [--lesions 40000,400000,4000000] [--ranks 1,2] [--sampling balanced]

Stores are synthetic: a few JPEGs and one block of metadata, repeated, with a real store's columns, no cache. Each
training is the worker that `lesionflow train` starts (under torchrun for two ranks), with a tiny network, forty steps
and the scoring of one fold of twenty; a `shuffle` epoch is all lesions, so that training is stopped after its steps.

Every few milliseconds the kernel is asked what each rank holds. `own` is anonymous memory, which is the rank's alone;
`mapped` are pages of files, mostly the store's: page cache, which ranks share and the kernel drops where memory is
short. `Private_*` is of `smaps_rollup`, looked at twice a second; it counts mapped pages too that one rank alone has.

The last lines say how many bytes a lesion more costs a rank. From the second largest store to the largest the limit is
10 while it opens and trains; between small ones buffers fill up that are as large for any store. Scoring is told too,
but grows with what is scored: a fold.
"""

from __future__ import annotations

import argparse
import io
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
from PIL import Image

from lesionflow.data import schema
from lesionflow.data.folds import Folds
from lesionflow.keys import write_json
from lesionflow.recipe import Recipe

BATCH, FOLDS, MALIGNANT, STEPS = 4096, 20, 40, 40
LIMIT = 10
"""Bytes that a lesion may cost a rank."""
_MB = 2**20


def make_store(path: Path, lesions: int) -> None:
    """A synthetic store with every column of the competition, written batch by batch."""
    path.mkdir(parents=True)
    rng = np.random.default_rng(0)
    patients = max(FOLDS, lesions // 385)  # As many lesions each as the competition's patients have.
    patient = rng.integers(0, patients, lesions, np.int32)
    ill = np.concatenate([rng.choice(np.flatnonzero(patient % FOLDS == k), MALIGNANT // FOLDS) for k in range(FOLDS)])
    block = {c.name: _cells(c, rng) for c in schema.COLUMNS}
    pictures = [_jpeg(rng) for _ in range(64)]
    block["image"] = pa.array([pictures[i % 64] for i in range(BATCH)], pa.large_binary())
    columns = pa.schema([(name, cells.type) for name, cells in block.items()])
    with pa.ipc.new_file(path / "lesions.arrow", columns) as writer:
        for start in range(0, lesions, BATCH):
            count = min(BATCH, lesions - start)
            target = np.zeros(count, np.int8)
            target[ill[(ill >= start) & (ill < start + count)] - start] = 1
            own = {
                "isic_id": pa.array([f"ISIC_{row:07d}" for row in range(start, start + count)], pa.large_string()),
                "patient_id": pa.array([f"IP_{p:07d}" for p in patient[start : start + count]], pa.large_string()),
                "target": pa.array(target),
            }
            cells = [own.get(name, whole.slice(0, count)) for name, whole in block.items()]
            writer.write_batch(pa.record_batch(cells, schema=columns))
    info = {"format": 1, "hash": f"{lesions:064x}", "lesions": lesions, "pictures": True, "skipped": []}
    write_json(path / "store.json", info)


def _cells(column: schema.Column, rng: np.random.Generator) -> pa.Array:
    if column.kind == "number":
        return pa.array(rng.normal(size=BATCH))
    if column.kind == "label":
        return pa.array(np.zeros(BATCH, np.int8))
    words = column.values or (f"any {column.name}",)
    return pa.array([words[i % len(words)] for i in range(BATCH)], pa.large_string())


def _jpeg(rng: np.random.Generator) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(120, 200, (40, 40, 3), np.uint8)).save(buffer, "JPEG", quality=40)
    return buffer.getvalue()


def make_run(run: Path, lesions: int, sampling: str) -> None:
    """What `lesionflow train` finds: recipe, store, folds, keys."""
    make_store(run / "store", lesions)
    with pa.memory_map(str(run / "store" / "lesions.arrow")) as file:
        table = pl.DataFrame(pa.ipc.open_file(file).read_all().select(["isic_id", "patient_id"]))
    fold = (table["patient_id"].str.slice(3).cast(pl.Int64) % FOLDS).cast(pl.Int8).to_numpy()
    Folds(table["isic_id"].to_list(), fold, f"{lesions:064x}", 0).save(run / "folds.parquet")
    settings = [
        "model.backbone=test_resnet", "model.weights=none", "image.size=32", "training.batch_size=32",
        f"training.epochs={STEPS // 5}", "training.cache=off", "training.validate_every=0",
        f"sampling.kind={sampling}",
    ]  # fmt: skip
    (run / "recipe.toml").write_text(Recipe.load("quick", settings).to_toml())
    write_json(run / "run.json", {"keys": {"train": "0" * 32}})


class Watch:
    """The most that any rank held of each kind of memory, by phase: opening, training, scoring."""

    def __init__(self, run: Path, root: int) -> None:
        self.run, self.root = run, root
        self.peaks: dict[str, dict[str, int]] = {}
        self._ranks: list[int] = []
        self._looks = 0

    def look(self) -> None:
        model = self.run / "fold-0" / "model-0"
        phase = "open"
        if (model / "metrics.csv").exists():
            phase = "score" if (model / "weights.safetensors").exists() else "train"
        for pid in self._ranks or self._found():
            try:
                held = _counted(pid, "status")
                found = {"own": held["RssAnon"], "mapped": held["RssFile"] + held["RssShmem"], "all": held["VmRSS"]}
                if self._looks % 100 == 0:  # It walks through all pages, and the rank waits meanwhile.
                    held = _counted(pid, "smaps_rollup")
                    found["private"] = held["Private_Clean"] + held["Private_Dirty"]
            except (OSError, KeyError):
                self._ranks = []
                continue
            peaks = self.peaks.setdefault(phase, dict.fromkeys(("own", "mapped", "all", "private"), 0))
            for name, size in found.items():
                peaks[name] = max(peaks[name], size * 1024)
        self._looks += 1

    def _found(self) -> list[int]:
        ranks = [pid for pid in _below(self.root) if _is_rank(pid)]
        if self.run.joinpath("fold-0").exists():
            self._ranks = ranks  # All are there.
        return ranks


def _counted(pid: int, file: str) -> dict[str, int]:
    """What the kernel counts of a process, kilobytes."""
    lines = [line.split() for line in Path(f"/proc/{pid}/{file}").read_text().splitlines()]
    return {words[0].rstrip(":"): int(words[1]) for words in lines if len(words) == 3 and words[2] == "kB"}


def _below(pid: int) -> Iterator[int]:
    yield pid
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return
    for child in children:
        yield from _below(int(child))


def _is_rank(pid: int) -> bool:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return b"lesionflow.training.worker" in command and b"torch.distributed.run" not in command


def trained(run: Path, ranks: int, sampling: str) -> Watch:
    """Train one fold of a run with so many ranks; returns what was seen."""
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"] if ranks > 1 else []
    command = [sys.executable, "-m", *launcher, "lesionflow.training.worker", str(run), "--folds", "0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (run / "log.txt").open("w") as log:
        child = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        watch = Watch(run, child.pid)
        curve, asked = run / "fold-0" / "model-0" / "metrics.csv", False
        while child.poll() is None:
            watch.look()
            if sampling == "shuffle" and not asked and curve.exists() and len(curve.read_text().splitlines()) > STEPS:
                asked = True
                for pid in filter(_is_rank, _below(child.pid)):
                    os.kill(pid, signal.SIGTERM)
            time.sleep(0.005)
    if child.returncode and not asked:
        sys.exit(f"training failed:\n{(run / 'log.txt').read_text()[-3000:]}")
    return watch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lesions", default="40000,400000,4000000")
    parser.add_argument("--ranks", default="1,2")
    parser.add_argument("--sampling", default="balanced,shuffle")
    parser.add_argument("--folder", type=Path, help="where the stores are made and removed again; 5 GB for the largest")
    options = parser.parse_args()
    sizes = [int(n) for n in options.lesions.split(",")]
    ways = [(s, int(r)) for s in options.sampling.split(",") for r in options.ranks.split(",")]
    seen: dict[tuple[str, int, int], Watch] = {}
    print("Synthetic stores. Most that any rank held, MB: of its own also by phase, then what else it maps, and all.\n")
    print("| lesions | store, MB | sampling | ranks | own | opening | training | scoring | mapped | Rss | Private_* |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for lesions in sizes:
        with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
            first = Path(scratch) / "first"
            make_run(first, lesions, "balanced")
            size = sum(file.stat().st_size for file in first.rglob("*") if file.is_file()) / _MB
            for number, (sampling, ranks) in enumerate(ways):
                run = Path(scratch) / f"run-{number}"
                run.mkdir()
                for name in ("store", "folds.parquet", "run.json"):
                    (run / name).symlink_to(first / name)
                recipe = Recipe.load(first / "recipe.toml", [f"sampling.kind={sampling}"])
                (run / "recipe.toml").write_text(recipe.to_toml())
                watch = seen[sampling, ranks, lesions] = trained(run, ranks, sampling)
                most = {kind: max(p[kind] for p in watch.peaks.values()) / _MB for kind in watch.peaks["open"]}
                phases = [watch.peaks.get(phase, {}).get("own", 0) / _MB for phase in ("open", "train", "score")]
                shown = [most["own"], *phases, most["mapped"], most["all"], most["private"]]
                cells = " | ".join(f"{value:.0f}" if value else "" for value in shown)
                print(f"| {lesions:,} | {size:,.0f} | {sampling} | {ranks} | {cells} |", flush=True)
    print()
    over = []
    for small, large in pairwise(sizes):
        for sampling, ranks in ways:
            less, more = (seen[sampling, ranks, lesions].peaks for lesions in (small, large))
            costs = {phase: (more[phase]["own"] - less[phase]["own"]) / (large - small) for phase in more}
            told = ", ".join(f"{phase} {cost:.1f}" for phase, cost in costs.items())
            print(f"bytes for a lesion more, {small:,} to {large:,}: {sampling}, {ranks} ranks: {told}")
            over += [told] if large == sizes[-1] and max(costs["open"], costs["train"]) > LIMIT else []
    if over:
        sys.exit(f"more than {LIMIT} bytes")


if __name__ == "__main__":
    main()
