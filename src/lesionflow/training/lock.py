"""Only one training writes into a fold at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

from lesionflow.errors import Preempted, UsageError
from lesionflow.training.ranks import rank
from lesionflow.training.status import OPERATED

LOCK_PATIENCE = 120.0
"""Seconds a file server may hold a lock of a node that is gone."""

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a fold; the kernel frees the lock of a killed one."""
    folder.mkdir(parents=True, exist_ok=True)
    if rank() != 0:
        yield
        return
    operated = OPERATED in os.environ
    deadline = time.monotonic() + (LOCK_PATIENCE if operated else 0)
    with (folder / ".lock").open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() < deadline:
                    time.sleep(1)
                elif operated:
                    raise Preempted(f"{folder}: still locked by a node that is gone; start again to go on") from None
                else:
                    raise UsageError(f"{folder}: another process is training here; wait for it, or stop it") from None
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                    raise
                logger.warning("%s: this volume has no locks; see that nothing else trains here", folder)
                break
        yield
