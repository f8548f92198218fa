"""What can go wrong, and what the outside sees of it: one table of exit and HTTP codes.

An error's message says what happened, where (id, column, field) and what to do about it.
The command line prints that message alone and exits with the code; `--debug` adds the traceback.

| exit | meaning                              | class             |
|------|--------------------------------------|-------------------|
| 0    | done                                 |                   |
| 2    | usage, or a recipe that can't be     | UsageError        |
| 3    | bad data                             | DataError         |
| 4    | the gate refused                     | GateRefused       |
| 5    | the cluster said no                  | ClusterError      |
| 143  | preempted after a clean save         | Preempted         |

Anything else is a bug.
"""

from __future__ import annotations


class LesionflowError(Exception):
    """Base of every error a user is expected to meet."""

    exit_code = 1
    http_status = 500


class UsageError(LesionflowError):
    """A wrong option, path, recipe field or a missing extra."""

    exit_code = 2
    http_status = 400


class DataError(LesionflowError):
    """Data that can't be used as it is: names the id or column and the remedy."""

    exit_code = 3
    http_status = 400


class ImageError(DataError):
    """One image that can't be turned into pixels; `limit` names the bound it broke, if any."""

    http_status = 422

    def __init__(self, message: str, *, limit: str | None = None) -> None:
        super().__init__(message)
        self.limit = limit


class GateRefused(LesionflowError):
    """The model was not good enough, or not provably the same after export."""

    exit_code = 4
    http_status = 409


class ClusterError(LesionflowError):
    """The cluster, a remote service or the network refused or vanished."""

    exit_code = 5
    http_status = 502


class Preempted(LesionflowError):
    """Training was asked to stop and saved its state first: run again to go on."""

    exit_code = 143
    http_status = 503


def from_exit_code(code: int, message: str) -> LesionflowError:
    """The error that a child process meant when it ended with `code`; the base class for what isn't in the table."""
    for kind in (UsageError, DataError, GateRefused, ClusterError, Preempted):
        if kind.exit_code == code:
            return kind(message)
    return LesionflowError(message)


_EXTRAS = {
    "cluster": ("kfp", "kubernetes"),
    "sign": ("model_signing", "OpenSSL"),
    "serve": ("httptools", "lightgbm", "onnxruntime", "prometheus_client", "python_multipart", "starlette", "uvicorn"),
    "train": (
        "jinja2",
        "kagglesdk",
        "lightning",
        "onnx",
        "onnxscript",
        "pyarrow",
        "safetensors",
        "tensorboard",
        "timm",
        "torch",
    ),
}


def explain_missing(error: ModuleNotFoundError) -> LesionflowError | None:
    """The user's side of a failed import: which extra to install; None for a module that no extra brings."""
    package = (error.name or "").partition(".")[0]
    return next((missing_extra(package, extra) for extra, names in _EXTRAS.items() if package in names), None)


def missing_extra(package: str, extra: str) -> UsageError:
    """The error for a feature whose optional dependency isn't installed."""
    return UsageError(f"this needs the package {package!r}: pip install 'lesionflow[{extra}]'")
