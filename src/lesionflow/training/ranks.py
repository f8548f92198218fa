"""The processes of one training, and what they tell each other."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from lesionflow.training.status import tell_joined


def rank() -> int:
    """This process's place among all of the training's, 0 if it is alone."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Processes that have joined; 1 before that, and for one that is alone."""
    return dist.get_world_size() if dist.is_initialized() else 1


def device() -> torch.device:
    """This rank's GPU, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


@contextmanager
def joined() -> Iterator[None]:
    """Have the ranks find each other, if there are several, before the first thing that they must agree on.

    Lightning does that as a training starts and then finds it done; but a fold may have no training left, only scores.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        with _signals_end_it():
            if torch.cuda.is_available():
                torch.cuda.set_device(device())
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
            barrier()
    tell_joined()
    yield
    # Only where all went well: with a rank that is gone it could wait for ever.
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def _signals_end_it() -> Iterator[None]:
    """Python hears of no signal while it waits for a rank that may never come; and there is nothing to save yet."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def any_rank(flag: bool) -> bool:
    """Whether the flag is up on any rank; the same answer on all."""
    return True in everyone(flag)


def any_rank_at(where: torch.device, flag: bool) -> bool:
    """`any_rank` as a tensor on the ranks' device, for what is asked at every batch."""
    if not dist.is_initialized():
        return flag
    shared = torch.tensor(float(flag), device=where)
    dist.all_reduce(shared)
    return shared.item() > 0


def everyone(value: Any) -> set[Any]:
    """The values that the ranks have, the same set on all."""
    return set(gathered(value))


def by_rank_0(value: bool) -> bool:
    """What rank 0 says, who also writes: others may see a shared volume as it was a minute ago."""
    return bool(gathered(value)[0])


def share(network: torch.nn.Module) -> None:
    """Give all ranks rank 0's weights and buffers, in place."""
    if dist.is_initialized():
        for tensor in network.state_dict().values():
            dist.broadcast(tensor, 0)


def gathered(value: Any) -> list[Any]:
    """Each rank's value, in their order, on all."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
