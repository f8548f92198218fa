"""Starting training: in this process, as folds side by side, or under torchrun; and its exit code.

On a CPU, folds in parallel single-thread processes use the cores better than one process with many
threads, so that is what several folds do by default. More than one process per fold, or several
nodes, means torchrun. It is run as a child: it turns every failure into exit code 1, while the
container's first process must end with ours (`errors`), which the workers leave in status files.

"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from lesionflow.errors import LesionflowError, Preempted, UsageError, from_exit_code
from lesionflow.training import status
from lesionflow.training.nodes import Nodes
from lesionflow.training.peers import Peers

logger = logging.getLogger(__name__)

GRACE_SECONDS = 60.0
"""How long children may take to save and end once they were told to stop."""

RENDEZVOUS_ATTEMPTS = 5
"""How often nodes that don't find each other try again before the job is given up."""

AGENT = "lesionflow.training.agent"
"""Module that runs torchrun."""

_POLL_SECONDS = 0.2
# What torchrun would read from the operator; children get it as options, and only once.
_OPERATOR = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


class NotJoined(LesionflowError):
    """The nodes of a job didn't find each other."""


def train(
    run: Path,
    folds: Sequence[int],
    *,
    processes: int = 1,
    jobs: int = 0,
    anew: bool = False,
    show: Callable[[status.Progress], None] | None = None,
) -> None:
    """Train folds of a prepared run and return when all are done.

    `processes` per node make one fold faster (torchrun); otherwise up to `jobs` folds run side by
    side (0: one per core, or one per GPU). Raises the error the workers ended with.
    """
    nodes = Nodes.from_environment(os.environ)
    if processes > 1 or nodes.count > 1:
        worker = [str(run), "--folds", ",".join(map(str, folds)), *(["--anew"] if anew else [])]
        gpus = _gpus()
        if 0 < gpus < processes:
            logger.warning("%d processes for %d GPUs: training on the CPU; use --processes %d", processes, gpus, gpus)
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        threads = _threads(processes)
        command = _torchrun(worker, processes, nodes)
        with _stop_flag() as stop_asked:
            for attempt in range(RENDEZVOUS_ATTEMPTS):
                if stop_asked():
                    raise Preempted("stopped before training began; run again to go on")
                # Of an elastic job torchrun itself keeps track of who is there.
                peers = Peers(run, nodes.count, nodes.rank) if nodes.count > 1 and not nodes.elastic else None
                try:
                    run_children(
                        [command], run, folds, at_once=1, threads=threads, show=None if nodes.rank else show,
                        log=not nodes.operated, peers=peers,
                    )  # fmt: skip
                    return
                except NotJoined:
                    # The first node may just have been replaced; nothing was trained yet, so nothing is lost.
                    if attempt + 1 == RENDEZVOUS_ATTEMPTS:
                        raise
                    time.sleep(2)
        return
    gpus = _gpus()
    # One fold per GPU where there are any, else one per core.
    jobs = min(jobs or gpus or _cores(), gpus or len(folds), len(folds))
    if jobs == 1:
        from lesionflow.training.run import train_folds

        train_folds(run, folds, anew=anew, show=show)
        return
    worker = [sys.executable, "-m", "lesionflow.training.worker", str(run), *(["--anew"] if anew else [])]
    commands = [[*worker, "--folds", str(fold)] for fold in folds]
    run_children(commands, run, folds, at_once=jobs, threads=_threads(jobs), gpu_each=gpus > 0, show=show)


def _gpus() -> int:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0  # Without a driver there is no GPU, and this process needs no torch to know.
    import torch

    return torch.cuda.device_count()


def _cores(quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Cores this process may use: its affinity, and no more than a container's quota grants."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        granted, period = quota.read_text().split()
        cores = min(cores, max(1, int(granted) // int(period)))
    return cores


def _threads(processes: int) -> int:
    """Threads for each of several processes: an even share of the cores, or what OMP_NUM_THREADS asks for."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdigit() and int(asked) > 0 else max(1, _cores() // processes)


def _torchrun(worker: Sequence[str], processes: int, nodes: Nodes) -> list[str]:
    where = ["--standalone"]
    if nodes.elastic:
        where = nodes.elastic.options(nodes.count)
    elif nodes.count > 1:
        if not nodes.address:
            raise UsageError("several nodes, but neither MASTER_ADDR nor PET_MASTER_ADDR says where the first one is")
        where = [
            f"--nnodes={nodes.count}",
            f"--node-rank={nodes.rank}",
            f"--master-addr={nodes.address}",
            f"--master-port={nodes.port}",
        ]
    launcher = [sys.executable, "-m", AGENT, *where, f"--nproc-per-node={processes}"]
    if nodes.operated and processes > 1:
        launcher += ["--tee=3", "--role=rank"]  # In a pod's log every line says whose it is: [rank0]: ...
    return [*launcher, "-m", "lesionflow.training.worker", *worker]


def run_children(
    commands: Sequence[Sequence[str]],
    run: Path,
    folds: Sequence[int],
    *,
    at_once: int,
    threads: int,
    gpu_each: bool = False,
    show: Callable[[status.Progress], None] | None = None,
    log: bool = True,
    peers: Peers | None = None,
) -> None:
    """Run commands, a few at a time; stop all when one fails, and raise what it ended with.

    `gpu_each` shows every child one GPU of its own, `at_once` being their number. Output goes to
    `log-<fold>.txt` in the run, or without `log` to this process's own. A node of `peers` that is lost
    ends the children at once: what they could save, they have saved. SIGTERM and Ctrl-C are passed
    on as SIGTERM, so that the children save first.
    """
    for fold in folds if show else ():
        (run / f"fold-{fold}" / "progress.json").unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="lesionflow-") as scratch, _stop_flag() as stop_asked:
        waiting = list(enumerate(commands))
        running: dict[int, tuple[subprocess.Popen[bytes], int]] = {}
        free = list(range(at_once))
        outcomes: dict[int, status.Outcome] = {}
        has_joined = False
        while waiting or running:
            stopping = stop_asked() or any(o.code for o in outcomes.values())
            while waiting and free and not stopping:
                (number, command), slot = waiting.pop(0), free.pop(0)
                output = run / f"log-{folds[number]}.txt" if log else None
                status_dir, gpu = Path(scratch) / str(number), slot if gpu_each else None
                running[number] = _start(command, output, status_dir, threads, gpu), slot
            if stopping:
                waiting.clear()
                # Ranks that still wait for each other have nothing to save, and hear no signal.
                end = _kill if peers and not has_joined else _terminate
                end([child for child, _ in running.values()])
            for number, (child, slot) in list(running.items()):
                if (code := child.poll()) is not None:
                    outcomes[number] = status.collect(Path(scratch) / str(number), code, told=stopping)
                    del running[number]
                    free.append(slot)
            _show(run, folds, show)
            if peers:
                peers.beat()
                if has_joined := (Path(scratch) / "0" / status.JOINED).exists():
                    peers.joined()
                if has_joined and (why := peers.lost()):
                    _kill([child for child, _ in running.values()])
                    raise Preempted(f"{why}; start again to go on from the last checkpoint")
            time.sleep(_POLL_SECONDS)
        silent = any(o.code == 1 and not o.message for o in outcomes.values())
        if peers and silent and not has_joined and not stop_asked():
            raise NotJoined("the nodes of this job didn't find each other; see the log above")
        _raise_outcome(outcomes, run, folds, interrupted=stop_asked(), log=log)


def _start(
    command: Sequence[str], log: Path | None, status_dir: Path, threads: int, gpu: int | None
) -> subprocess.Popen[bytes]:
    status_dir.mkdir()
    environment = {k: v for k, v in os.environ.items() if k not in _OPERATOR and not k.startswith("PET_")}
    environment |= {status.VARIABLE: str(status_dir), "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    nodes = Nodes.from_environment(os.environ)
    if nodes.operated:
        environment[status.OPERATED] = "1"
    if nodes.elastic:
        # Sharing its store, torchrun 2.15 tells a node that comes later no address, and both wait for ever.
        environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    if gpu is not None:
        # Only some of the machine's GPUs may be ours: the children share what this process sees.
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[gpu] if visible else str(gpu)
    with log.open("ab") if log else contextlib.nullcontext() as output:
        return subprocess.Popen(
            list(command),
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT if log else None,
            stdin=subprocess.DEVNULL,
            # Ctrl-C reaches this process alone, which then tells the children in its own way ...
            start_new_session=True,
            # ... and should this process be killed, the kernel tells them.
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )


def _die_with_parent() -> None:
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def _terminate(children: Sequence[subprocess.Popen[bytes]]) -> None:
    for child in children:
        # torchrun itself would give its ranks 30 s; told directly, they take the time that a save needs. Where it may
        # restart them it has to know that they were asked to leave.
        command = str(child.args)
        ranks = _children(child.pid) if AGENT in command and "--max-restarts" not in command else []
        for pid in ranks or [child.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_SECONDS
    for child in children:
        try:
            child.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            _kill([child])


def _kill(children: Sequence[subprocess.Popen[bytes]]) -> None:
    """End children and all that they started, at once."""
    for child in children:
        below = _descendants(child.pid)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        # torchrun gives its workers sessions of their own.
        for pid in below:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        child.wait()


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _descendants(pid: int) -> list[int]:
    children = _children(pid)
    return [*children, *(p for c in children for p in _descendants(c))]


@contextlib.contextmanager
def _stop_flag() -> Iterator[Callable[[], bool]]:
    """Turn SIGTERM and SIGINT into a question that can be asked, for as long as the context lasts."""
    asked: list[int] = []
    previous = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        for number in previous:
            signal.signal(number, lambda signum, frame: asked.append(signum))
    except ValueError:  # Not the main thread: the caller's own handlers stay in charge.
        previous = {}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _show(run: Path, folds: Sequence[int], show: Callable[[status.Progress], None] | None) -> None:
    if show is None:
        return
    for fold in folds:
        if found := status.read_progress(run / f"fold-{fold}" / "progress.json"):
            show(status.Progress(**found))


def _raise_outcome(
    outcomes: Mapping[int, status.Outcome], run: Path, folds: Sequence[int], *, interrupted: bool, log: bool
) -> None:
    # Children that were stopped because another failed say 143: they aren't the cause.
    failed = {n: o for n, o in outcomes.items() if o.code not in (0, Preempted.exit_code)}
    for outcome in failed.values():
        error = from_exit_code(outcome.code, outcome.message)
        if outcome.message and type(error) is not LesionflowError:
            raise error
    saved = [o.message for o in outcomes.values() if o.code == Preempted.exit_code and o.message]
    if interrupted:
        raise Preempted(saved[0] if saved else "stopped before training began; run again to go on")
    for number, outcome in failed.items():
        what = outcome.message
        if log:
            output = run / f"log-{folds[number]}.txt"
            what = f"{what or _tail(output)}; see {output}"
        raise LesionflowError(f"training failed with exit code {outcome.code}: {what or 'see the log above'}")
    if saved:
        raise Preempted(saved[0])


def _tail(log: Path, lines: int = 5) -> str:
    text = log.read_text(errors="replace").strip().splitlines()
    return " | ".join(text[-lines:])
