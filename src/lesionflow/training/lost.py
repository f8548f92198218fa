"""Which failures of a rank have their cause elsewhere, so that training can be started again."""

from __future__ import annotations

import os

import torch


def lost_peer(error: BaseException) -> bool:
    """Whether a collective operation failed because another rank is gone: its own end is the cause, not ours.

    The backends have no common error for it, so their texts decide (gloo, NCCL, the rendezvous store).
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not isinstance(error, RuntimeError):
        return False
    signs = ("Connection closed by peer", "Connection reset by peer", "Connection refused", "Broken pipe",
             "Timed out waiting", "Application timeout", "remote process exited", "NCCL", "Socket Timeout")  # fmt: skip
    return isinstance(error, torch.distributed.DistError) or any(sign in str(error) for sign in signs)


def lost_loader(error: BaseException) -> bool:
    """Whether a loader process was killed from outside, as the kernel does where memory is short."""
    signs = ("exited unexpectedly", "killed by signal")
    return isinstance(error, RuntimeError) and "DataLoader worker" in str(error) and any(s in str(error) for s in signs)
