"""What a service is started with: to a worker and back as JSON, and its limits as a command line gives them."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lesionflow.data.images import Limits
from lesionflow.errors import UsageError
from lesionflow.serving.protocol import ServiceLimits
from lesionflow.serving.remote import TIMEOUT


@dataclass(frozen=True)
class Settings:
    """Of one process that serves."""

    bundle: Path
    limits: ServiceLimits = field(default_factory=ServiceLimits)
    threads: int | None = None
    name: str | None = None
    token: str | None = None
    grace: float = 30.0
    """Seconds that requests which have begun may take after the signal to end."""
    linger: float = 1.0
    """Seconds in which requests on open connections are still answered after it."""
    predictor_host: str | None = None
    predictor_tls: bool = False
    predictor_timeout: float = TIMEOUT
    public_key: Path | None = None
    """Whose signature the bundle must bear; None: anybody's, or nobody's."""
    signature: Path | None = None
    """Where that is; None: beside the bundle."""

    def to_json(self) -> str:
        """With the token: for a pipe, never for a command line, a log or a file."""
        return json.dumps(dataclasses.asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> Settings:
        found = json.loads(text)
        limits = found.pop("limits")
        limits["image"] = Limits(**limits["image"])
        paths = {name: found[name] and Path(found[name]) for name in ("bundle", "public_key", "signature")}
        return cls(**found | paths | {"limits": ServiceLimits(**limits)})

    def __repr__(self) -> str:
        return f"Settings({self.bundle})"  # The token must not come out through a traceback.


def named(limits: ServiceLimits) -> Iterator[tuple[str, int | float]]:
    """(name, value) of every limit, those of a picture as `image.bytes` and so on."""
    for one in dataclasses.fields(limits):
        value = getattr(limits, one.name)
        if isinstance(value, Limits):
            yield from ((f"image.{own.name}", getattr(value, own.name)) for own in dataclasses.fields(value))
        else:
            yield one.name, value


def with_limits(settings: Sequence[str], limits: ServiceLimits | None = None) -> ServiceLimits:
    """`name=value` each, over `limits` (the usual ones by default). Raises `UsageError` naming the limit."""
    limits = limits or ServiceLimits()
    known = dict(named(limits))
    image: dict[str, Any] = {}
    own: dict[str, Any] = {}
    for setting in settings:
        name, _, text = setting.partition("=")
        name = name.strip().replace("-", "_")
        if name not in known:
            raise UsageError(f"--limit {setting}: no limit {name!r}; there are {', '.join(known)}")
        whole = isinstance(known[name], int)
        try:
            value = int(text.strip().replace("_", "")) if whole else float(text)
        except ValueError:
            value = -1
        if not (value > 0 and math.isfinite(value)):
            kind = "a whole number above 0" if whole else "a number of seconds above 0"
            raise UsageError(f"--limit {setting}: {name} takes {kind}, such as {name}={known[name]}")
        (image if name.startswith("image.") else own)[name.removeprefix("image.")] = value
    return dataclasses.replace(limits, **own, image=dataclasses.replace(limits.image, **image))
