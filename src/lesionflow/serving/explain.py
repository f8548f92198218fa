"""Where in a crop the logit comes from: the graph's class-activation maps, and a test of them. No torch.

A map gives each place of a crop its share in logits; the mean over places is the lesion's logit, exactly. It shows
where the model found something, not what, and says nothing about whether the model is right.

The *deletion test* paints over the part of a crop that the map calls most suspicious and sees how far the logit falls,
beside the fall for a random connected region, for the least suspicious part, and for the part that the map of another
lesion points at. The last is the hard comparison: lesions lie in the middle, so any map that does too beats a random
region; only a map that follows its own lesion beats another's.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from lesionflow.bundle import NOTICE
from lesionflow.data.images import Pixels, to_pixels
from lesionflow.data.source import open_source
from lesionflow.errors import DataError, UsageError
from lesionflow.evaluation.intervals import Figure
from lesionflow.evaluation.rates import rate
from lesionflow.keys import atomic, write_json
from lesionflow.progress import track
from lesionflow.serving.graph import Floats, Graph, NoGraph
from lesionflow.serving.heat import LEGEND, OUTLINED, enlarged, highest, overlay
from lesionflow.serving.predictor import Predictor

if TYPE_CHECKING:
    from lesionflow.serving.remote import Remote

__all__ = ["cams", "deletion", "explain_files", "overlay"]

Mask = NDArray[np.bool_]

_BATCH = 32


def cams(graph: Graph | NoGraph | Remote, pixels: Pixels) -> Floats:
    """uint8 [B, S, S, 3] to class-activation maps float32 [B, h, w], in logits; a map's mean is the lesion's logit.

    Raises `UsageError` for a graph that gives none, or that runs elsewhere.
    """
    return _local(graph).explained(pixels)[2]


def deletion(
    graph: Graph | NoGraph | Remote,
    pixels: Pixels,
    *,
    groups: ArrayLike | None = None,
    malignant: int = 0,
    share: float = OUTLINED,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Any]:
    """How far the logit falls, on average over lesions, when a `share` of the crop is painted over; JSON-able.

    pixels: uint8 [N, S, S, 3], best of suspicious lesions that no model was trained on: only a raised logit can fall.
    groups [N]: the patient of each lesion, by default each its own. `malignant` goes into the intervals as it is.

    Gives `share`, `lesions` and figures (value with interval, as everywhere) in logits: the fall for the part that
    the map calls the most suspicious (`highest`), for a `random` connected region, for the `lowest` part and for the
    part that `another` lesion's map points at; then, paired by lesion, `difference` (highest minus random),
    `difference_lowest` and `difference_another`. The paint is the median colour of the crop's own border: skin.
    Raises `UsageError` for a graph without maps or a share outside 0..1.
    """
    if not 0 < share < 1:
        raise UsageError(f"share must be between 0 and 1, got {share}")
    local, count = _local(graph), len(pixels)
    if not count:
        missing = Figure.missing("no lesions to try the maps on", level=level).to_dict()
        return {"share": share, "lesions": 0, **dict.fromkeys(("highest", "random", "lowest", "difference"), missing)}
    rng = np.random.default_rng(seed)
    painted_pixels = max(1, round(share * pixels.shape[1] ** 2))
    _, logit, cam = local.explained(pixels)
    large = enlarged(cam, pixels.shape[1])
    pointed_at = highest(large, painted_pixels)
    ways = {
        "highest": pointed_at,
        "random": highest(_bumps(count, pixels.shape[1], rng), painted_pixels),
        "lowest": highest(-large, painted_pixels),
        # A shift by one pairs every lesion with another's map.
        "another": np.roll(pointed_at, 1, axis=0),
    }
    fall = {name: logit - local.logits(_painted(pixels, region))[1] for name, region in ways.items()}
    if count < 2:
        del fall["another"]
    compared = {"difference": "random", "difference_lowest": "lowest", "difference_another": "another"}
    fall |= {name: fall["highest"] - fall[other] for name, other in compared.items() if other in fall}
    owner = np.arange(count) if groups is None else np.asarray(groups)
    ones = np.ones(count)
    return {"share": share, "lesions": count} | {
        name: rate(
            values.astype(np.float64), ones, owner, kind="real", malignant=malignant, fewest=0, level=level
        ).to_dict()
        for name, values in fall.items()
    }


def explain_files(bundle: Path | Predictor, images: Path, out: Path, *, progress: bool = True) -> dict[str, Any]:
    """Draw the map of every lesion of a folder, HDF5 file or data set directory: `out/<id>.png` and `explain.json`.

    A picture shows the crop as the model gets it, and beside it the same with the map over it. `explain.json` holds
    `legend`, `count` and per lesion `isic_id`, `file`, `logit`, `probability`, `band`, `doubts` and the map itself as
    `cam` (rows of logits; their mean is the logit); it is written last. Returns it without the lesions.

    Raises `UsageError` if the bundle's graph gives no maps, `DataError` naming an image that can't be used.
    """
    predictor, out = bundle if isinstance(bundle, Predictor) else Predictor(bundle), Path(out)
    graph = _local(predictor.graph)
    graph.require_maps()
    out.mkdir(parents=True, exist_ok=True)
    lesions: list[dict[str, Any]] = []
    with open_source(images, "test") as source:
        ids = source.ids
        if not ids:
            raise DataError(f"{images}: no images: check the path")
        names = _file_names(ids)
        batches = (ids[start : start + _BATCH] for start in range(0, len(ids), _BATCH))

        def explained() -> Iterator[dict[str, Any]]:
            for batch in batches:
                pixels = np.stack([_pixels(source.read(one), predictor, one) for one in batch])
                fold_logits, logit, cam = graph.explained(pixels)
                answers = predictor.answers(pixels, fold_logits, logit)
                for one, crop, cells, answer in zip(batch, pixels, cam, answers, strict=True):
                    side = np.concatenate([crop, np.full((len(crop), 4, 3), 255, np.uint8), overlay(crop, cells)], 1)
                    with atomic(out / names[one]) as file:
                        file.write(_png(side))
                    yield {
                        "isic_id": one, "file": names[one], "logit": answer.logit, "probability": answer.probability,
                        "band": answer.band, "doubts": list(answer.doubts), "cam": cells.astype(float).tolist(),
                    }  # fmt: skip

        lesions.extend(track(explained(), "explain", total=len(ids), show=progress))
    summary = {
        "model": predictor.bundle.name, "bundle": predictor.bundle.version, "count": len(lesions),
        "legend": LEGEND, "notice": NOTICE,
    }  # fmt: skip
    write_json(out / "explain.json", summary | {"lesions": lesions})
    return summary


def _local(graph: Graph | NoGraph | Remote) -> Graph:
    if isinstance(graph, NoGraph):
        raise graph.no_maps()
    if not isinstance(graph, Graph):
        raise UsageError("class-activation maps come from the bundle's own graph: ask without --predictor-host")
    return graph


def _pixels(data: bytes, predictor: Predictor, isic_id: str) -> Pixels:
    try:
        return to_pixels(data, predictor.spec)
    except DataError as error:
        raise DataError(f"{isic_id}: {error}") from None


def _file_names(ids: list[str]) -> dict[str, str]:
    """A plain file name for each id, whatever characters an HDF5 file's ids have."""
    names: dict[str, str] = {}
    taken = {"explain.json"}
    for number, one in enumerate(ids):
        plain = "".join(c if c.isalnum() or c in "_-." else "_" for c in one).lstrip(".")[:100]
        name = f"{plain}.png"
        if not plain or name.lower() in taken:
            name = f"{plain}_{number}.png"
        taken.add(name.lower())
        names[one] = name
    return names


def _png(pixels: Pixels) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _bumps(count: int, size: int, rng: np.random.Generator) -> Floats:
    """One hill a map, float32 [count, size, size]: its highest places are a connected region, an ellipse cut by the
    crop's edge, wherever and however it lies."""
    y, x = (np.mgrid[0:size, 0:size] + 0.5)[:, None] / size
    centre_x, centre_y, angle = rng.uniform(0, [1, 1, math.pi], (count, 3)).T[..., None, None]
    longer = np.exp(rng.uniform(0, math.log(2), (count, 1, 1)))
    across = (x - centre_x) * np.cos(angle) + (y - centre_y) * np.sin(angle)
    along = (y - centre_y) * np.cos(angle) - (x - centre_x) * np.sin(angle)
    return np.asarray(-((across * longer) ** 2) - along**2, dtype=np.float32)


def _painted(pixels: Pixels, region: Mask) -> Pixels:
    """The crops with `region` [B, S, S] in the median colour of each crop's border."""
    size = pixels.shape[1]
    edge = np.zeros((size, size), dtype=bool)
    width = max(1, size // 16)
    edge[:width], edge[-width:], edge[:, :width], edge[:, -width:] = True, True, True, True
    colour = np.rint(np.median(pixels[:, edge], axis=1)).astype(np.uint8)
    return np.where(region[..., None], colour[:, None, None], pixels)
