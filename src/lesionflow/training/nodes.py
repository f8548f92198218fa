"""Where this process stands among the nodes of a job, as an operator's environment says.

Both are understood: Trainer v2 sets PET_*, the Training Operator MASTER_ADDR, MASTER_PORT, WORLD_SIZE (nodes, or all
processes) and RANK (the node), and PET_RDZV_* where nodes may come and go.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Elastic:
    """A job whose nodes may come and go while it trains, as far as torchrun's rendezvous lets them."""

    least: int
    endpoint: str
    backend: str
    id: str
    settings: str
    restarts: int

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Elastic | None:
        """Read what the Training Operator sets for an `elasticPolicy`; None for a job of a fixed size."""
        least, colon, _ = environment.get("PET_NNODES", "").partition(":")
        if not colon or not (endpoint := environment.get("PET_RDZV_ENDPOINT")):
            return None
        return cls(
            int(least),
            endpoint,
            environment.get("PET_RDZV_BACKEND", "c10d"),
            environment.get("PET_RDZV_ID", "lesionflow"),
            environment.get("PET_RDZV_CONF", ""),
            int(environment.get("PET_MAX_RESTARTS", "100")),
        )

    def options(self, most: int) -> list[str]:
        """Of torchrun."""
        settings = [f"--rdzv-conf={self.settings}"] if self.settings else []
        return [
            f"--nnodes={self.least}:{most}", f"--rdzv-backend={self.backend}", f"--rdzv-endpoint={self.endpoint}",
            f"--rdzv-id={self.id}", f"--max-restarts={self.restarts}", *settings,
        ]  # fmt: skip


@dataclass(frozen=True)
class Nodes:
    """Where this process stands among the job's nodes."""

    count: int = 1
    rank: int = 0
    address: str = ""
    port: int = 29500
    operated: bool = False
    """An operator started this process: its output is the pod's log."""
    elastic: Elastic | None = None
    """Nodes may come and go; `count` is then how many there may be."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Nodes:
        """Read Trainer v2's (PET_*) or the Training Operator's variables; one node without either."""
        address = environment.get("PET_MASTER_ADDR") or environment.get("MASTER_ADDR", "")
        port = int(environment.get("PET_MASTER_PORT") or environment.get("MASTER_PORT") or 29500)
        if "PET_NNODES" in environment:
            count = int(environment["PET_NNODES"].partition(":")[2] or environment["PET_NNODES"])
            elastic = Elastic.from_environment(environment)
            return cls(count, int(environment.get("PET_NODE_RANK", "0")), address, port, True, elastic)
        if "WORLD_SIZE" in environment and "TORCHELASTIC_RUN_ID" not in environment:
            # The Training Operator counts processes here once the job names their number per node.
            each = environment.get("PET_NPROC_PER_NODE", "1")
            count = max(1, int(environment["WORLD_SIZE"]) // (int(each) if each.isdigit() else 1))
            return cls(count, int(environment.get("RANK", "0")), address, port, True)
        return cls()
