"""Faults, planted in a training from outside: does it always finish, with the very weights of one without trouble?

    python tests/training/faults.py --count 300 --seed 1

A toy training is done by `lesionflow train` with two processes. Each fault is of a kind, on a rank, in a phase (as the
processes start, in training, as the end is scored) and at a step drawn from the seed, and must have really happened;
the command's exit code is held against the one that fits, every checkpoint must be readable, and then it is started
again. A training that ends must have the SHA-256 of one that nothing happened to.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lesionflow import keys, steps
from lesionflow.data.folds import Folds
from lesionflow.data.sampler import Sampler
from lesionflow.data.store import Store
from lesionflow.data.synthetic import synthesize
from lesionflow.recipe import Recipe
from lesionflow.training import resume

TOY = [
    "sampling.negatives=1", "training.batch_size=8", "training.epochs=20", "training.checkpoint_every=1",
    "training.checkpoint_cost=1", "model.backbone=mobilenetv3_small_050",
    "training.validate_every=0", "training.precision=fp32", "image.size=32", "model.weights=none", "folds.holdout=0",
]  # fmt: skip
HANG = 60.0
"""Seconds after which a training that neither ends nor goes on hangs."""
GRACE = 10.0
"""Seconds that a training may take to save and end, on a machine that does nothing else."""
LOADERS = "LESIONFLOW_LOADERS"


class Failed(AssertionError):
    """What was promised didn't hold."""


@dataclass
class Result:
    """What became of the faults."""

    faults: Counter[str] = field(default_factory=Counter)
    finished: int = 0
    """Trainings that ended, each with the weights of the one without trouble."""
    slowest: float = 0.0
    """Seconds from a fault to the end of the command."""


class Training:
    """`lesionflow train` on a prepared run, as a process that is looked at from outside."""

    def __init__(self, run: Path, loaders: int) -> None:
        self.run, self.model = run, run / "fold-0" / "model-0"
        command = [sys.executable, "-m", "lesionflow", "train", "--out", str(run), "--fold", "0", "--processes", "2"]
        self.process = subprocess.Popen(
            [*command, "--quiet"], env={**os.environ, "OMP_NUM_THREADS": "1", LOADERS: str(loaders)}, text=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip

    def steps(self) -> int:
        """Steps that the curve tells of; what a killed training did after its last checkpoint is told twice."""
        with contextlib.suppress(OSError, ValueError, IndexError):
            return int((self.model / "metrics.csv").read_text().splitlines()[-1].split(",")[3])
        return 0

    def ranks(self) -> dict[int, int]:
        """Process ids by rank."""
        found = {}
        for child in below(self.process.pid):
            with contextlib.suppress(OSError, StopIteration):
                variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
                command = Path(f"/proc/{child}/cmdline").read_bytes()
                if b"lesionflow.training.worker" in command and b"training.agent" not in command:
                    found[int(next(v for v in variables if v.startswith(b"RANK=")).removeprefix(b"RANK="))] = child
        return found

    def until(self, reached: Callable[[], bool]) -> bool:
        """Wait for it; False if the training ended before. Raises `Failed` if it hangs."""
        seen, since = -1, time.monotonic()
        while not reached():
            if self.process.poll() is not None:
                return False
            if (now := self.steps()) != seen:
                seen, since = now, time.monotonic()
            if time.monotonic() - since > HANG:
                self.end()
                raise Failed(f"hangs at step {seen}")
            time.sleep(0.002)
        return True

    def ended(self) -> tuple[int, str]:
        """Exit code and what was said, once it has ended. Raises `Failed` if it hangs."""
        self.until(lambda: False)
        try:
            _, errors = self.process.communicate(timeout=HANG)
        except subprocess.TimeoutExpired:
            self.end()
            raise Failed(f"didn't end within {HANG:g} s") from None
        return self.process.returncode, errors

    def end(self) -> None:
        """Whatever is left of it, by force."""
        for child in (*below(self.process.pid), self.process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        self.process.wait()


def below(pid: int) -> list[int]:
    """All processes that a process began, directly or not."""
    try:
        own = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return [*own, *(grandchild for child in own for grandchild in below(child))]


Plant = Callable[[Training, random.Random], int | None]
"""Plants its fault, and says with which code the command has to end; None if it didn't happen."""


def kill_a_rank(training: Training, draw: random.Random) -> int | None:
    return _signal(training, [training.ranks().get(draw.randrange(2))], signal.SIGKILL)


def stop_a_rank(training: Training, draw: random.Random) -> int | None:
    return _signal(training, [training.ranks().get(draw.randrange(2))], signal.SIGTERM)


def stop_all(training: Training, draw: random.Random) -> int | None:
    return _signal(training, [*training.ranks().values(), training.process.pid], signal.SIGTERM)


def kill_a_loader(training: Training, draw: random.Random) -> int | None:
    rank = training.ranks().get(draw.randrange(2))
    loaders = [pid for pid in below(rank or 0) if b"spawn_main" in _command(pid)]
    return _signal(training, [draw.choice(loaders) if loaders else None], signal.SIGKILL)


def kill_during_a_write(training: Training, draw: random.Random) -> int | None:
    """Rank 0, while a checkpoint is written: its unfinished file shows it."""
    writer = training.ranks().get(0)

    def begun() -> bool:
        with contextlib.suppress(OSError), os.scandir(training.model) as entries:
            return any(entry.name.startswith(".step-") for entry in entries)
        return False

    while training.process.poll() is None:
        if begun():
            code = _signal(training, [writer], signal.SIGKILL)
            return code if begun() else None
    return None


def fill_the_disk(training: Training, draw: random.Random) -> int | None:
    """Rank 0 can write no whole checkpoint for some epochs; the kernel says so in the middle of one."""
    writer, before = training.ranks().get(0), resume.checkpoints(training.model)
    if writer is None or not before:
        return None
    try:
        resource.prlimit(writer, resource.RLIMIT_FSIZE, (before[0].stat().st_size // 2, resource.RLIM_INFINITY))
        until = training.steps() + 3 * steps_per_save(training.run)
        if not training.until(lambda: training.steps() >= until):
            return None
        refused = resume.checkpoints(training.model)[0] == before[0]
        resource.prlimit(writer, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    except (ProcessLookupError, FileNotFoundError):
        return None
    return 0 if refused else None


ANYWHERE = (kill_a_rank, stop_a_rank, stop_all)
"""What can happen in every phase; the others need a training that makes checkpoints."""
KINDS = (*ANYWHERE, kill_a_loader, kill_during_a_write, fill_the_disk)
PHASES = {"start": 1, "training": 6, "end": 1}
"""How often each is drawn."""


def _command(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def _signal(training: Training, pids: list[int | None], number: int) -> int | None:
    """143 if all of the processes were there to be hit."""
    try:
        for pid in pids:
            if pid is None:
                return None
            os.kill(pid, number)
    except ProcessLookupError:
        return None
    return 143


def steps_per_save(run: Path) -> int:
    """Steps between two checkpoints of the toy."""
    recipe, store, folds = (
        Recipe.load(run / "recipe.toml"),
        Store.open(run / "store"),
        Folds.load(run / "folds.parquet"),
    )
    rows, options = folds.train_rows(0), recipe.training
    sampler = Sampler(rows, store.targets[rows], recipe.sampling, epochs=1, batch_size=options.batch_size, seed=0)
    return round(sampler.steps_per_epoch * options.checkpoint_every)


def make_toy(folder: Path) -> Path:
    """A prepared run whose training takes a few hundred steps of some milliseconds."""
    synthesize(folder / "data", patients=12, lesions=240, seed=3, prevalence=0.2, progress=False)
    recipe = Recipe.load("quick", [*TOY])
    run = folder / "toy"
    planned = steps.begin(run, recipe, folder / "data")
    steps.prepare(run, folder / "data", planned["prepare"], progress=False)
    steps.split(run, planned["split"])
    return run


def inject(folder: Path, count: int, seed: int, tell: Callable[[str], None] = print) -> Result:
    """Plant `count` faults. Raises `Failed` at the first promise that doesn't hold, naming seed, fault and step."""
    clean = make_toy(folder)
    whole = Training(clean, 0)
    code, errors = whole.ended()
    if code != 0:
        raise Failed(f"the training without trouble ended with {code}: {errors}")
    weights = Path("fold-0") / "model-0" / "weights.safetensors"
    expected = keys.file_hash(clean / weights)
    total = whole.steps()
    result, run, number, tries = Result(), folder / "run", 0, 0
    while number < count or run.exists():
        if not run.exists():
            shutil.copytree(clean, run, ignore=shutil.ignore_patterns("fold-*", "events", "log-*"))
        draw, tries = random.Random(f"{seed}-{tries}"), tries + 1
        (phase,) = draw.choices(list(PHASES), list(PHASES.values()))
        plant = draw.choice(KINDS if phase == "training" else ANYWHERE) if number < count else None
        training = Training(run, loaders=1 if plant is kill_a_loader else 0)
        try:
            happened = _one(training, plant, phase, draw, total, result)
            _check_files(run)
        except Failed as failure:
            what = f"{plant.__name__}, {phase}" if plant else "nothing"
            raise Failed(f"seed {seed}, fault {number} ({what}), step {training.steps()}: {failure}") from None
        finally:
            training.end()
        if happened:
            number += 1
            if number % 10 == 0:
                ended = f"{result.finished} trainings ended, slowest end {result.slowest:.1f} s"
                tell(f"{number} of {count} faults, {ended}")
        if (run / "fold-0" / "oof.parquet").exists():
            if (found := keys.file_hash(run / weights)) != expected:
                raise Failed(f"seed {seed}, fault {number}: weights {found[:12]}, without trouble {expected[:12]}")
            result.finished += 1
            shutil.rmtree(run)
    return result


def _one(training: Training, plant: Plant | None, phase: str, draw: random.Random, total: int, result: Result) -> bool:
    """One life of a training with at most one fault; whether that really happened. Raises `Failed`."""
    expected: int | None = None
    if plant is not None and training.until(_moment(training, phase, draw, total)):
        expected = plant(training, draw)
    began = time.monotonic()
    code, errors = training.ended()
    if "Traceback" in errors:
        raise Failed(f"a traceback: {errors}")
    # A fault that comes when all is done changes nothing; one that was aimed at a process that was gone may have hit
    # another one.
    if code not in {0, expected, 143 if plant is not None else 0}:
        raise Failed(f"exit code {code}, not {expected}: {errors}")
    if code == 0 and not (training.run / "fold-0" / "oof.parquet").exists():
        raise Failed(f"exit code 0, but the training isn't done: {errors}")
    if expected is None or code != expected:
        return False
    assert plant is not None
    result.faults[f"{plant.__name__}, {phase}"] += 1
    result.slowest = max(result.slowest, time.monotonic() - began if code == 143 else 0.0)
    return True


def _moment(training: Training, phase: str, draw: random.Random, total: int) -> Callable[[], bool]:
    """When a fault is due."""
    if phase == "start":
        due = time.monotonic() + draw.uniform(0.5, 6)
        return lambda: len(training.ranks()) == 2 and time.monotonic() > due
    if phase == "end":
        return lambda: training.steps() >= total and bool(training.ranks())
    before, ahead = training.steps(), draw.randrange(max(1, total // 4))
    # What the curve tells at first is of an earlier life, and may lie after the checkpoint.
    began: list[int] = []

    def reached() -> bool:
        now = training.steps()
        if not began and (now != before or not before):
            began.append(now)
        return bool(began) and now >= min(began[0] + ahead, total - 1)

    return reached


def _check_files(run: Path) -> None:
    """No checkpoint may be unreadable, whatever happened as it was written."""
    for path in resume.checkpoints(run / "fold-0" / "model-0"):
        try:
            resume.read(path)
        except resume.Damaged as damage:
            raise Failed(f"{path.name}: {damage}") from None


@contextlib.contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep
        return
    with tempfile.TemporaryDirectory(prefix="faults-") as scratch:
        yield Path(scratch)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="folder for the trainings, which is left as it is")
    options = parser.parse_args()
    began = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # The trainings must not outlive this process.
    with _folder(options.keep) as folder:
        try:
            result = inject(folder, options.count, options.seed, lambda text: print(text, flush=True))
        except Failed as failure:
            print(f"FAILED {failure}")
            return 1
    for kind, count in sorted(result.faults.items()):
        print(f"{kind:20} {count:4}")
    print(
        f"{sum(result.faults.values())} faults in {time.monotonic() - began:.0f} s, seed {options.seed}: all finished "
        f"({result.finished} trainings), weights equal, slowest end {result.slowest:.1f} s"
    )
    if result.slowest > GRACE:
        print(f"FAILED an end took more than {GRACE:g} s")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
