"""Bytes to batch and cache to batch: our loader, the original's, other libraries' and the floors under them.

    python benchmarks/loader.py [--data DIR] [--lesions 3968] [--others FOLDER]

Every side gives the same lesions in the same drawn order, 64 at a time with their targets, 128 px. Its first pass is
held against our pixels, and the largest difference in grey levels is printed. Each side is a process of its own;
they take turns over the rounds, so that what else the machine does meets all of them. A rate is images per second of
CPU time, all threads of a side's processes together: on a busy machine that says more than a clock. Files have been
read before, so this is memory, not a disk.

Other libraries are looked for in FOLDER (and then among what is installed):

    pip install --no-deps --target FOLDER webdataset braceexpand litdata obstore tifffile boto3 botocore s3transfer \\
        jmespath python-dateutil numba llvmlite fastargs terminaltables opencv-python-headless
    pip install --no-deps --target FOLDER ffcv      # is compiled; needs the headers of OpenCV and libturbojpeg

Their files hold the same JPEGs in the order in which they will be read, which is the best case for them; ours and the
original's are read at random.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from multiprocessing import get_context, set_start_method
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import h5py
import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.io import decode_jpeg
from torchvision.transforms import v2

from lesionflow.data import pixelcache
from lesionflow.data.augment import normalise
from lesionflow.data.images import PreprocessSpec
from lesionflow.data.lesions import Lesions, as_it_is
from lesionflow.data.sampler import Sampler, StepSampler
from lesionflow.data.store import Store, prepare
from lesionflow.data.synthetic import synthesize
from lesionflow.recipe import Sampling

BATCH, SIZE = 64, 128
SPEC = PreprocessSpec(size=SIZE)
LEAST = 0.4
"""CPU seconds that a measurement takes at least: a pass over the cache takes milliseconds."""
FILLED = 8
"""Batches that workers may have made before the clock starts."""
TICKS = os.sysconf("SC_CLK_TCK")
CONTEXT = get_context("forkserver")
# Imported once, not in every side's process; only what starts no threads.
CONTEXT.set_forkserver_preload(["torchvision.transforms.v2", "lesionflow.data.lesions", "lesionflow.data.synthetic"])

Batches = Iterator[tuple[Any, Any]]
"""Pixels and targets of one batch after another."""
Pass = Callable[[], Batches]
"""What goes once through all lesions."""


@dataclass(frozen=True)
class Given:
    """What every side reads."""

    data: Path
    store: Path
    scratch: Path
    others: Path | None
    lesions: int
    workers: int = 0

    def open(self) -> Store:
        return Store.open(self.store)

    def sampler(self) -> Sampler:
        rows = np.arange(self.lesions)
        return Sampler(rows, np.zeros(len(rows), np.int8), Sampling("shuffle"), epochs=1, batch_size=BATCH, seed=0)

    def rows(self) -> list[int]:
        """Rows of the store in the order in which they are shown."""
        return [row for draws in StepSampler(self.sampler(), 0, 0, 1) for row in draws.rows.tolist()]

    def load(self, dataset: Any, **options: Any) -> DataLoader[Any]:
        return DataLoader(dataset, num_workers=self.workers, **options)


def pairs(loader: Any) -> Pass:
    """For a loader whose batches are pairs already."""
    return lambda: iter(loader)


# Ours


def lesions_of(given: Given, cached: bool) -> Lesions:
    store = given.open()
    return Lesions(store, SPEC, pixelcache.find(store, SPEC) if cached else None)


def ours(given: Given, cached: bool, change: Callable[[Any], Any] = as_it_is) -> Pass:
    """As training makes it."""
    loader = given.load(
        lesions_of(given, cached), sampler=StepSampler(given.sampler(), 0, 0, 1), batch_size=None,
        collate_fn=as_it_is, multiprocessing_context="spawn" if given.workers else None,
    )  # fmt: skip
    return lambda: ((change(batch.image), batch.target) for batch in loader)


def decoding(given: Given) -> Pass:
    return ours(given, cached=False)


def cached(given: Given) -> Pass:
    return ours(given, cached=True)


def normalised(given: Given) -> Pass:
    return ours(given, cached=False, change=lambda pixels: normalise(pixels, SPEC))


def cached_alone(given: Given) -> Pass:
    """Without a DataLoader around it."""
    lesions, steps = lesions_of(given, cached=True), list(StepSampler(given.sampler(), 0, 0, 1))
    return lambda: ((batch.image, batch.target) for batch in map(lesions.__getitem__, steps))


# The original's way


class Original(Dataset[Any]):
    """An HDF5 item, Pillow, torchvision's transforms; float32, as ToTensor and Normalize leave it."""

    def __init__(self, given: Given, *change: Any) -> None:
        store = given.open()
        self.ids, self.targets = [store.ids[row] for row in given.rows()], store.targets[given.rows()]
        self.path, self.file = given.data / "train-image.hdf5", None
        self.change = transforms.Compose([transforms.Resize((SIZE, SIZE)), *change])

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, at: int) -> tuple[Any, int]:
        if self.file is None:  # In the process that reads.
            self.file = h5py.File(self.path)
        image = Image.open(io.BytesIO(self.file[self.ids[at]][()])).convert("RGB")
        return self.change(image), int(self.targets[at])


def original(given: Given) -> Pass:
    change = transforms.ToTensor(), transforms.Normalize(SPEC.mean, SPEC.std)
    return pairs(given.load(Original(given, *change), batch_size=BATCH))


def original_uint8(given: Given) -> Pass:
    return pairs(given.load(Original(given, transforms.PILToTensor()), batch_size=BATCH))


# Other libraries


class Torchvision(Dataset[Any]):
    """Our store's bytes, torchvision's decoder and its resize of tensors."""

    def __init__(self, given: Given) -> None:
        self.store, self.shown = given.open(), given.rows()
        self.targets = self.store.targets
        self.resize = v2.Resize((SIZE, SIZE), antialias=True)

    def __len__(self) -> int:
        return len(self.shown)

    def __getitem__(self, at: int) -> tuple[Any, int]:
        row = self.shown[at]
        return self.resize(decode_jpeg(_tensor(self.store.jpeg(row)))), int(self.targets[row])


def _tensor(data: bytes) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(data, np.uint8))


def torchvision(given: Given) -> Pass:
    return pairs(given.load(Torchvision(given), batch_size=BATCH))


def webdataset(given: Given) -> Pass:
    """Tar files, their Pillow decoder, torchvision's resize."""
    import webdataset as wds

    pattern, store = given.scratch / "shards" / "%02d.tar", given.open()
    if not pattern.parent.exists():
        pattern.parent.mkdir()
        with wds.ShardWriter(str(pattern), maxcount=1024, verbose=0) as writer:
            for at, row in enumerate(given.rows()):
                writer.write({"__key__": f"{at:06}", "jpg": store.jpeg(row), "cls": int(store.targets[row])})
    change = transforms.Compose([transforms.Resize((SIZE, SIZE)), transforms.PILToTensor()])
    shards = sorted(map(str, pattern.parent.glob("*.tar")))
    dataset = wds.WebDataset(shards, shardshuffle=False, empty_check=False).decode("pil").to_tuple("jpg", "cls")
    return pairs(wds.WebLoader(dataset.map_tuple(change, int).batched(BATCH, collation_fn=_stack),
                               batch_size=None, num_workers=given.workers))  # fmt: skip


def _stack(samples: list[tuple[torch.Tensor, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    pixels, targets = zip(*samples, strict=True)
    return torch.stack(pixels), torch.tensor(targets)


def litdata(given: Given) -> Pass:
    """Its chunks of bytes, torchvision's decoder and resize of tensors."""
    import litdata as ld
    from litdata.streaming.writer import BinaryWriter

    folder, store = given.scratch / "chunks", given.open()
    if not folder.exists():
        folder.mkdir()
        writer = BinaryWriter(str(folder), chunk_bytes="4MB")
        for at, row in enumerate(given.rows()):
            writer.add_item(at, {"jpeg": store.jpeg(row), "target": int(store.targets[row])})
        writer.done()
        writer.merge()
    resize = v2.Resize((SIZE, SIZE), antialias=True)

    class Chunks(ld.StreamingDataset):
        def __getitem__(self, index: Any) -> tuple[torch.Tensor, int]:
            item = super().__getitem__(index)
            return resize(decode_jpeg(_tensor(item["jpeg"]))), item["target"]

    dataset = Chunks(str(folder), shuffle=False)
    return pairs(ld.StreamingDataLoader(dataset, batch_size=BATCH, num_workers=given.workers))


def ffcv(given: Given) -> Pass:
    """Its file of JPEGs, its decoder with OpenCV's resize; its threads are its workers, and one is the least."""
    import ffcv.fields.rgb_image as rgb
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.decoders import CenterCropRGBImageDecoder, IntDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.writer import DatasetWriter

    class Encoded(RGBImageField):
        """Keeps the JPEG as it is: the library's own field would compress it once more."""

        def encode(self, destination: Any, image: bytes, malloc: Any) -> None:
            height, width, *_ = simplejpeg.decode_jpeg_header(image)
            destination["mode"], destination["height"], destination["width"] = rgb.IMAGE_MODES["jpg"], height, width
            destination["data_ptr"], storage = malloc(len(image))
            storage[:] = np.frombuffer(image, np.uint8)

    file, store, shown = given.scratch / "lesions.beton", given.open(), given.rows()
    if not file.exists():
        items = [(store.jpeg(row), int(store.targets[row])) for row in shown]
        writer = DatasetWriter(str(file), {"image": Encoded(), "target": IntField()}, num_workers=1)
        writer.from_indexed_dataset(items)
    # All crops are square, and of a square this "crop" is everything.
    pipelines = {"image": [CenterCropRGBImageDecoder((SIZE, SIZE), ratio=1)], "target": [IntDecoder()]}
    loader = Loader(str(file), batch_size=BATCH, num_workers=max(given.workers, 1), order=OrderOption.SEQUENTIAL,
                    pipelines=pipelines, custom_fields={"image": Encoded}, os_cache=True)  # fmt: skip
    return lambda: ((pixels, targets[:, 0]) for pixels, targets in loader)


# The floors: no batch, no target, or nothing but a copy


def jpeg_alone(given: Given) -> Pass:
    store = given.open()
    data, buffer = [store.jpeg(row) for row in given.rows()], np.empty(4096 * 4096 * 3, np.uint8)
    return lambda: ((simplejpeg.decode_jpeg(one, buffer=buffer), None) for one in data)


def floor(given: Given) -> Pass:
    store = given.open()
    data, size, bilinear = [store.jpeg(row) for row in given.rows()], (SIZE, SIZE), Image.Resampling.BILINEAR

    def small(one: bytes) -> bytes:
        pixels = simplejpeg.decode_jpeg(one)
        image = Image.frombuffer("RGB", pixels.shape[1::-1], pixels, "raw", "RGB", 0, 1)
        return image.resize(size, bilinear).tobytes()

    return lambda: ((small(one), None) for one in data)


def copy(given: Given) -> Pass:
    """Each batch from an array of its own to a new one."""
    made = [pixels.numpy().copy() for pixels, _ in cached_alone(given)()]
    return lambda: ((pixels.copy(), None) for pixels in made)


def copy_in_a_row(given: Given) -> Pass:
    """All batches lie one after another in one array, and each goes to the same place: as quick as memory gets."""
    made = np.concatenate([pixels.numpy() for pixels, _ in cached_alone(given)()])
    target = np.empty_like(made[:BATCH])
    return lambda: ((np.copyto(target, made[at : at + BATCH]), None) for at in range(0, len(made), BATCH))


# Measuring


@dataclass(frozen=True)
class Side:
    text: str
    make: Callable[[Given], Pass]
    against: str | None = None
    """The side that its rate is divided by."""
    compared: bool = True


FLOORS = {
    "jpeg": Side("libjpeg-turbo: decoding alone", jpeg_alone, compared=False),
    "floor": Side("decode + resize alone", floor, compared=False),
    "copy": Side("plain copy of the same batches", copy, compared=False),
    "row": Side("the quickest copy: in a row, to one place", copy_in_a_row, compared=False),
}
LOADERS = {
    "decoding": Side("ours, decoding", decoding, "floor"),
    "cached": Side("ours, from the cache", cached, "copy"),
    "original": Side("original: h5py, Pillow, torchvision", original_uint8, "decoding"),
    "torchvision": Side("torchvision's decoder and resize", torchvision, "decoding"),
    "webdataset": Side("webdataset, Pillow", webdataset, "decoding"),
    "litdata": Side("litdata, torchvision", litdata, "decoding"),
    "ffcv": Side("ffcv", ffcv, "decoding"),
}
NATIVE = {
    "alone": Side("ours, from the cache, without DataLoader", cached_alone, "copy"),
    "normalised": Side("ours, decoding, normalised", normalised, "floor"),
    "native": Side("original, normalised as it does", original, "normalised"),
}
SIDES = FLOORS | LOADERS | NATIVE


def grey_levels(pixels: Any) -> np.ndarray:
    """A side's batch, whatever its layout, as float32 [B, S, S, 3] in 0..255."""
    found = torch.as_tensor(pixels)
    if found.shape[1] == 3:
        found = found.permute(0, 2, 3, 1)
    if found.dtype == torch.float32:
        found = (found * torch.tensor(SPEC.std) + torch.tensor(SPEC.mean)) * 255
    return found.to(torch.float32).numpy()


def check(given: Given, batches: Batches) -> float:
    """The largest difference to our pixels; targets and order must be the same."""
    store, shown, at, worst = given.open(), given.rows(), 0, 0.0
    for (wanted, _), (pixels, targets) in zip(cached_alone(given)(), batches, strict=True):
        rows = shown[at : at + len(wanted)]
        assert np.asarray(targets).tolist() == store.targets[rows].tolist(), "other lesions, or in another order"
        worst, at = max(worst, float(np.abs(grey_levels(pixels) - wanted.numpy()).max())), at + len(wanted)
    assert at == given.lesions, f"{at} lesions of {given.lesions}"
    return worst


def cpu_seconds(pid: int) -> float:
    """Of a process and its descendants, those that live and those it has waited for."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return 0.0
    return sum(map(int, fields[11:15])) / TICKS + sum(cpu_seconds(int(child)) for child in children)


@dataclass(frozen=True)
class Rate:
    """Images per second."""

    cpu: float
    clock: float


def rate(given: Given, once: Pass) -> Rate:
    """Of as many passes as it takes to last; with workers, of one pass once they are at work."""
    if given.workers:
        batches = iter(once())
        for _ in range(FILLED):
            next(batches)
        left = given.lesions // BATCH - FILLED
        started, before = time.perf_counter(), cpu_seconds(os.getpid())
        for _ in range(left):
            next(batches)
        # Before the end: workers that end count too, and so would those that begin.
        found = Rate(left * BATCH / (cpu_seconds(os.getpid()) - before), left * BATCH / (time.perf_counter() - started))
        for _ in batches:
            pass
        return found
    images, started, before = 0, time.perf_counter(), time.process_time()
    while time.process_time() - before < LEAST:
        for _ in once():
            pass
        images += given.lesions
    return Rate(images / (time.process_time() - before), images / (time.perf_counter() - started))


def serve(connection: Connection, name: str, given: Given, core: int | None) -> None:
    """A side's process: says how far its pixels are off, then measures whenever it is asked."""
    warnings.simplefilter("ignore")
    set_start_method("fork", force=True)  # As usual where these libraries are used; ours asks for another.
    torch.set_num_threads(1)
    if core is not None:
        os.sched_setaffinity(0, {core})
    # Not this folder: a script in it may have the name of a package that a library looks for.
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent]
    if given.others is not None:
        sys.path.append(str(given.others.resolve()))
    try:
        # Without workers: between them, some libraries deal the lesions out in another order.
        off = check(given, SIDES[name].make(replace(given, workers=0))()) if SIDES[name].compared else None
        once = SIDES[name].make(given)
        connection.send(off)
    except ImportError as error:
        connection.send(f"not installed: {error}")
    except Exception as error:
        connection.send(f"doesn't work here: {type(error).__name__}: {error}".splitlines()[0][:200])
    else:
        while connection.recv():
            connection.send(rate(given, once))
    connection.close()
    os._exit(0)  # Not the usual end: some libraries have threads that would never stop.


class Running:
    """A side in a process of its own."""

    def __init__(self, name: str, given: Given, core: int | None) -> None:
        self.side, self.rates = SIDES[name], list[Rate]()
        self._connection, theirs = CONTEXT.Pipe()
        self._process = CONTEXT.Process(target=serve, args=(theirs, name, given, core))
        self._process.start()
        theirs.close()
        self.off: float | str | None = self._answer()

    def _answer(self) -> Any:
        try:
            return self._connection.recv()
        except EOFError:
            self._process.join()
            return f"its process died with {self._process.exitcode}"

    @property
    def works(self) -> bool:
        return not isinstance(self.off, str)

    def measure(self) -> None:
        self._connection.send(True)
        found = self._answer()
        if isinstance(found, Rate):
            self.rates.append(found)
        else:
            self.off = found

    def end(self) -> None:
        if self.works:
            self._connection.send(False)
        self._process.join()


def measure(sides: dict[str, Side], given: Given, rounds: int, core: int | None) -> dict[str, Running]:
    """All sides in turn, `rounds` times."""
    running = {}
    for name in sides:
        running[name] = Running(name, given, core)
        print(f"{name}: {'ready' if running[name].works else running[name].off}", file=sys.stderr)
    for number in range(rounds):
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
        for side in running.values():
            if side.works:
                side.measure()
    for side in running.values():
        side.end()
    return running


def ratio(one: Running, other: Running) -> float:
    """Round by round."""
    return median(a.cpu / b.cpu for a, b in zip(one.rates, other.rates, strict=True))


def table(running: dict[str, Running], title: str) -> None:
    print(f"\n{title}\n{'':44}{'images/s of CPU':>16}{'by the clock':>14}  {'ratio':23}largest difference")
    for side in running.values():
        if not side.works:
            print(f"{side.side.text:44}{side.off}")
            continue
        against = running.get(side.side.against or "")
        shown = f"{ratio(side, against):.2f} of {against.side.text}" if against and against.works else ""
        off = "" if side.off is None else f"{side.off:.2g}"
        cpu, clock = (median(getattr(r, kind) for r in side.rates) for kind in ("cpu", "clock"))
        print(f"{side.side.text:44}{cpu:16,.0f}{clock:14,.0f}  {shown:33.33}{off:>8}")


def ready(options: argparse.Namespace, scratch: Path) -> Given:
    """The store and its cache, made and read once."""
    data = options.data
    if not data.exists():
        data = scratch / "synthetic"
        synthesize(data, patients=50, lesions=options.lesions, progress=False)
    store = prepare(data, scratch / "run" / "store")
    lesions = min(options.lesions, len(store)) // BATCH * BATCH
    started = time.perf_counter()
    pixelcache.build(store, SPEC)
    print(f"{lesions} lesions of {data.name}, {SIZE} px, batches of {BATCH}; medians of {options.rounds} rounds")
    print(f"the cache of all {len(store)} lesions was built in {time.perf_counter() - started:.1f} s")
    return Given(data, store.path, scratch, options.others, lesions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    real = Path(os.environ.get("LESIONFLOW_REAL_DATA", "../shared/data")) / "isic2024-images"
    parser.add_argument("--data", type=Path, default=real, help="data set directory; synthetic if it isn't there")
    parser.add_argument("--lesions", type=int, default=3968)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2, help="of the second table; 0: leave it out")
    parser.add_argument("--others", type=Path, help="folder of other libraries, see above")
    options = parser.parse_args()
    os.environ["TQDM_DISABLE"] = "1"  # For the processes that are started.
    core = max(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    with tempfile.TemporaryDirectory() as scratch:
        given = ready(options, Path(scratch))
        alone = measure(SIDES, given, options.rounds, core)
        table(alone, "One core, one process:")
        bytes_copied = median(r.cpu for r in alone["row"].rates) * SIZE**2 * 3
        print(f"memory: {bytes_copied / 1e9:.1f} GB/s are read and as many written by the quickest copy")
        print(f"from the cache / the quickest copy: {ratio(alone['cached'], alone['row']):.2f}", end=", ")
        print(f"without DataLoader {ratio(alone['alone'], alone['row']):.2f}")
        if options.workers:
            given = replace(given, workers=options.workers)
            table(measure(LOADERS, given, options.rounds, None), f"{options.workers} loader workers:")


if __name__ == "__main__":
    main()
