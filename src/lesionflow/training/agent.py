"""torchrun, which also tells how its ranks ended.

    python -m lesionflow.training.agent --standalone --nproc-per-node=2 -m lesionflow.training.worker RUN --folds 0

A rank that was killed leaves no report, and torchrun itself ends with 1 whatever happened. So this process runs it and
leaves the report for such a rank: killed from outside is a preemption, a crash is a bug.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from torch.distributed.elastic.agent.server.api import SignalException  # type: ignore[attr-defined]
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from lesionflow.errors import Preempted
from lesionflow.training.status import report_seen


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 where all ranks ended well, 143 where this process was told to stop, else 1."""
    try:
        run(parse_args(argv))  # type: ignore[no-untyped-call]
    except SignalException:
        return Preempted.exit_code
    except ChildFailedError as error:
        for rank, failure in error.failures.items():
            report_seen(rank, failure.exitcode)
        print(error, file=sys.stderr)  # noqa: T201 - the launcher's own log
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
