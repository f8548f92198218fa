"""Where in a crop the logit comes from: the graph's class-activation maps. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lesionflow.data.images import Pixels
from lesionflow.errors import UsageError
from lesionflow.serving.graph import Floats, Graph

if TYPE_CHECKING:
    from lesionflow.serving.remote import Remote


def cams(graph: Graph | Remote, pixels: Pixels) -> Floats:
    """uint8 [B, S, S, 3] to class-activation maps float32 [B, h, w], in logits; a map's mean is the lesion's logit.

    Raises `UsageError` for a graph that gives none, or that runs elsewhere.
    """
    if not isinstance(graph, Graph):
        raise UsageError("class-activation maps come from the bundle's own graph: ask without --predictor-host")
    return graph.explained(pixels)[2]
