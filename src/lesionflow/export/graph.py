"""K torch models to one ONNX graph, from uint8 pixels to logits and, where they are exact, class-activation maps.

A network that ends in global average pooling and one linear layer gives its logit as the mean over places of
weights x features + bias. Before the mean this is a map that says which places the logit comes from: the
class-activation map of Zhou et al. (2016), here with the bias, so that its mean *is* the logit. For any other head the
map would be a guess, and the graph has none.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.nn import functional

from lesionflow.data.images import PreprocessSpec
from lesionflow.errors import UsageError, missing_extra

OPSET = 18
"""Highest opset that the inference servers still in use (ONNX Runtime 1.14 and later) run."""
IR_VERSION = 8
"""The file format of that opset's time."""


EXACT = 1e-4
"""Largest difference between a network's logit and the mean of its map, relative to the map's largest value."""


def networks(model: torch.nn.Module) -> list[Any]:
    """The networks whose logits `model` averages: those of `models.image.Members`, else itself."""
    members = getattr(model, "networks", None)
    return list(members) if isinstance(members, torch.nn.ModuleList) else [model]


def map_shape(models: Sequence[torch.nn.Module], x: torch.Tensor) -> tuple[int, int] | None:
    """Height and width of the class-activation maps, None unless every network's is exact on `x`.

    x: float32 [B, 3, S, S], normalised pixels.
    """
    shapes = set()
    for network in (one for model in models for one in networks(model)):
        linear = network.get_classifier() if hasattr(network, "get_classifier") else None
        if not isinstance(linear, torch.nn.Linear) or not hasattr(network, "forward_features"):
            return None
        with torch.inference_mode():
            features, expected = network.forward_features(x), network(x).flatten()
            if features.ndim != 4 or features.shape[1] != linear.in_features or linear.out_features != 1:
                return None
            # What a head does beside pooling and the linear layer would show as a difference here.
            cam = _map(network, features)
            off = (cam.mean((1, 2)) - expected).abs().max()
            if not off <= EXACT * cam.abs().max().clamp(min=1.0):
                return None
            shapes.add((int(cam.shape[1]), int(cam.shape[2])))
    # One place alone is no map: it would say the logit again.
    return shapes.pop() if len(shapes) == 1 and shapes != {(1, 1)} else None


def _map(network: Any, features: torch.Tensor) -> torch.Tensor:
    """Features [B, C, h, w] to the class-activation map [B, h, w]."""
    linear = network.get_classifier()
    cam: torch.Tensor = functional.conv2d(features, linear.weight[:, :, None, None], linear.bias)[:, 0]
    return cam


class _Whole(torch.nn.Module):
    """uint8 NHWC pixels to (fold_logits [B, K], logit [B]) and with `maps` cam [B, h, w], all models in one graph."""

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, models: Sequence[torch.nn.Module], spec: PreprocessSpec, tta: str, maps: bool) -> None:
        super().__init__()
        self.models, self.maps = torch.nn.ModuleList(models), maps
        self.flips = tta == "flips"
        mean, std = (torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1) * 255 for v in (spec.mean, spec.std))
        self.register_buffer("scale", (1 / std).float())
        self.register_buffer("shift", (-mean / std).float())

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = image.permute(0, 3, 1, 2).to(torch.float32) * self.scale + self.shift
        views = [x, x.flip(3), x.flip(2), x.flip(2, 3)] if self.flips else [x]
        x = torch.cat(views) if self.flips else x
        answers = [self._answer(model, x) for model in self.models]
        fold_logits = torch.stack([logit.reshape(len(views), -1).mean(0) for logit, *_ in answers], dim=1)
        outputs = fold_logits, fold_logits.mean(1)
        if not self.maps:
            return outputs
        cam = torch.stack([maps for _, maps in answers]).mean(0)
        if self.flips:
            plain, across, down, both = cam.reshape(len(views), -1, *cam.shape[1:]).unbind(0)
            cam = torch.stack([plain, across.flip(2), down.flip(1), both.flip(1, 2)]).mean(0)
        return *outputs, cam

    def _answer(self, model: torch.nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The model's logits, and with `maps` its map."""
        if not self.maps:
            return (model(x),)
        found = []
        for network in networks(model):
            features = network.forward_features(x)
            found.append((network.forward_head(features).flatten(), _map(network, features)))
        return tuple(torch.stack(parts).mean(0) for parts in zip(*found, strict=True))


def graph_bytes(models: Sequence[torch.nn.Module], spec: PreprocessSpec, tta: str, *, maps: bool = False) -> bytes:
    """The ONNX file: `image` uint8 [B, S, S, 3] to `fold_logits` [B, K] and `logit` [B], with B dynamic.

    With `maps`, which takes models that have a `map_shape`, it also gives `cam` [B, h, w], the mean of the models'
    class-activation maps. Mirrored views' maps are mirrored back before they are averaged.

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
                _Whole(models, spec, tta, maps).eval(),
                (example,),
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                input_names=["image"],
                output_names=["fold_logits", "logit", *(["cam"] if maps else [])],
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
