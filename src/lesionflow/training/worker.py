# ruff: noqa: E402
"""A training process: from its arguments to its exit code.

python -m lesionflow.training.worker RUN --folds 0,1
"""

from __future__ import annotations

import gc

gc.disable()  # Looking for garbage while thousands of modules are made takes a quarter of the start.

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lesionflow.errors import LesionflowError, Preempted
from lesionflow.training.lost import lost_loader, lost_peer
from lesionflow.training.run import LOADERS, train_folds
from lesionflow.training.status import report

gc.freeze()
gc.enable()


def main(argv: Sequence[str] | None = None) -> int:
    """Worker entry: exit code as in `lesionflow.errors`, reported to the parent through `status`."""
    parser = argparse.ArgumentParser(prog="lesionflow.training.worker", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--folds", required=True, type=lambda text: [int(k) for k in text.split(",")])
    parser.add_argument("--anew", action="store_true")
    options = parser.parse_args(argv)
    try:
        train_folds(options.run, options.folds, anew=options.anew)
    except LesionflowError as error:
        # A loader process hands its error over as a text that ends with the original message.
        message = str(error).rsplit(f"{type(error).__name__}: ", 1)[-1].strip()
        print(f"error: {message}", file=sys.stderr)  # noqa: T201 - the worker's own log
        report(error.exit_code, message)
        return error.exit_code
    except BaseException as error:
        if lost_peer(error):
            print(f"lost another rank: {error}", file=sys.stderr)  # noqa: T201
            report(Preempted.exit_code, "lost another rank; start again to go on from the last checkpoint")
            return Preempted.exit_code
        if lost_loader(error):
            message = (
                f"a loader process was killed, is memory short? start again to go on, with fewer of them by {LOADERS}"
            )
            print(f"error: {message}", file=sys.stderr)  # noqa: T201
            report(Preempted.exit_code, message)
            return Preempted.exit_code
        report(1, f"{type(error).__name__}: {error}")
        raise
    report(0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
