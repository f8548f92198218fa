"""K torch models to one ONNX graph, from uint8 pixels to logits."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from lesionflow.data.images import PreprocessSpec
from lesionflow.errors import UsageError, missing_extra

OPSET = 18
"""Highest opset that the inference servers still in use (ONNX Runtime 1.14 and later) run."""
IR_VERSION = 8
"""The file format of that opset's time."""


class _Whole(torch.nn.Module):
    """uint8 NHWC pixels to (fold_logits [B, K], logit [B]), all models in one graph."""

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, models: Sequence[torch.nn.Module], spec: PreprocessSpec, tta: str) -> None:
        super().__init__()
        self.models = torch.nn.ModuleList(models)
        self.flips = tta == "flips"
        mean, std = (torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1) * 255 for v in (spec.mean, spec.std))
        self.register_buffer("scale", (1 / std).float())
        self.register_buffer("shift", (-mean / std).float())

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = image.permute(0, 3, 1, 2).to(torch.float32) * self.scale + self.shift
        views = [x, x.flip(3), x.flip(2), x.flip(2, 3)] if self.flips else [x]
        x = torch.cat(views) if self.flips else x
        columns = [model(x).reshape(len(views), -1).mean(0) for model in self.models]
        fold_logits = torch.stack(columns, dim=1)
        return fold_logits, fold_logits.mean(1)


def graph_bytes(models: Sequence[torch.nn.Module], spec: PreprocessSpec, tta: str) -> bytes:
    """The ONNX file: `image` uint8 [B, S, S, 3] to `fold_logits` [B, K] and `logit` [B], with B dynamic.

    Raises `UsageError` if torch can't export the models.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401  # Named here, because torch's own error for it is a traceback.
    except ImportError as error:
        raise missing_extra(error.name or "onnx", "train") from None
    example = torch.zeros(2, spec.size, spec.size, 3, dtype=torch.uint8)
    try:
        with _quiet():
            program = torch.onnx.export(
                _Whole(models, spec, tta).eval(),
                (example,),
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                input_names=["image"],
                output_names=["fold_logits", "logit"],
                opset_version=OPSET,
                verbose=False,
            )
            assert program is not None
            proto = program.model_proto
            _strip(proto.graph)
            del proto.metadata_props[:]
            proto.ir_version = IR_VERSION
            onnx.checker.check_model(proto)
            return bytes(proto.SerializeToString(deterministic=True))
    except Exception as error:  # Whatever the exporter stumbles over, it is this model that it can't do.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(f"this model can't be exported to ONNX ({reason}): choose another backbone") from error


def _strip(graph: Any) -> None:
    """Drop what only debuggers read: source paths and stack traces of the machine that exported."""
    del graph.metadata_props[:]
    del graph.value_info[:]
    for part in (*graph.node, *graph.input, *graph.output, *graph.initializer):
        del part.metadata_props[:]
        part.doc_string = ""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter, which speaks to stdout, stderr, warnings and loggers alike."""
    noisy = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir", "torch")]
    levels = [logger.level for logger in noisy]
    heard = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(heard), contextlib.redirect_stderr(heard):
        warnings.simplefilter("ignore")
        for logger in noisy:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(noisy, levels, strict=True):
                logger.setLevel(level)
