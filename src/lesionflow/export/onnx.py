"""Torch models in, a bundle out; refused if the two don't say the same.

The K models become one ONNX graph that takes uint8 pixels: it normalises, mirrors if asked to, runs
every model and averages the logits. The graph then answers for stored lesions through the very
class that serves it, and torch answers through a separate path; a difference above the tolerance
refuses the export. So does a class-activation map whose mean isn't the logit, or that isn't the map that torch finds
by the gradient. The bundle grows in a temporary folder beside its place and is renamed once it
is complete, so a refused or interrupted export leaves what was there before.
"""

from __future__ import annotations

import copy
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from lesionflow import __version__
from lesionflow.bundle import ANSWERS, CARD, FORMAT, GRAPH, INFO, MANIFEST, NOTICE, Bundle, check_info, write_manifest
from lesionflow.data.images import PreprocessSpec, to_pixels
from lesionflow.errors import GateRefused, UsageError
from lesionflow.export.graph import OPSET, graph_bytes, map_shape, networks
from lesionflow.keys import atomic, write_json, write_text
from lesionflow.serving.explain import cams
from lesionflow.serving.predictor import Predictor

if TYPE_CHECKING:
    import polars as pl

MAP_LESIONS = 8
"""Parity lesions on which maps are compared: by the gradient they cost three times what logits do."""

_REFERENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.(png|jpg|jpeg)")


def export_bundle(
    models: Sequence[torch.nn.Module],
    out: Path,
    *,
    spec: PreprocessSpec,
    info: Mapping[str, Any],
    parity_images: NDArray[np.uint8],
    tolerance: float,
    reference: Sequence[tuple[str, bytes]],
    card: str | None = None,
    tta: str = "none",
    evaluated: NDArray[np.float64] | None = None,
    files: Mapping[str, bytes] | None = None,
    visit: pl.DataFrame | None = None,
    check: Callable[[Predictor], dict[str, float]] | None = None,
) -> dict[str, Any]:
    """Write the bundle `out` and return its parity figures, size and timing.

    `models` map float32 NCHW [B, 3, S, S], normalised with `spec`, to logits [B] or [B, 1]; they are
    copied, so the caller's stay as they are. `info` holds what only the run knows: name, thresholds,
    metrics, recipe, data_hash, fold_hash, data_licence, synthetic (see `bundle.check_info`).
    `parity_images` is uint8 [N, S, S, 3]. `reference` are (file name, PNG or JPEG bytes) of synthetic
    lesions, kept in the bundle with the answers. `tta` "flips" averages over four mirror images.
    `evaluated` are the logits that the first so many parity images had when thresholds were chosen.

    Where `info` has a `visit`, `files` (by name) are the trees it needs, `visit` the metadata of the reference
    lesions, in their order, and `check` compares the finished bundle's answers with what was evaluated: its figures
    join those of parity, and it raises `GateRefused` if they are too far apart. With a `visit` there may be no
    `models` at all; `info` then says how many folds (`models`) there are.

    Where the models' class-activation maps are exact (`graph.map_shape`) the graph gives them as `cam`, and
    `graph.outputs` in bundle.json lists it; for other networks there is none.

    Raises `GateRefused`, and leaves what `out` was before, if the graph differs by more than `tolerance` from
    torch in any logit or map, or from what was evaluated, or says NaN; `UsageError` for models that can't be exported.
    """
    out = Path(out)
    _check_arguments(models, out, spec, parity_images, reference, tta, graphless="visit" in info)
    members = [copy.deepcopy(model).cpu().float().eval() for model in models]
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        work.chmod(0o755)
        started = time.perf_counter()
        maps = map_shape(members, _normalised(parity_images[:MAP_LESIONS], spec)) if members else None
        if members:
            with atomic(work / GRAPH) as file:
                file.write(graph_bytes(members, spec, tta, maps=maps is not None))
        seconds = time.perf_counter() - started
        content = _content(info, spec, len(members), tta, maps)
        write_json(work / INFO, content)
        for name, data in (files or {}).items():
            with atomic(work / name) as file:
                file.write(data)
        predictor = Predictor(Bundle.open(work, verify=False))
        parity = _parity(members, predictor, parity_images, tolerance, spec, tta, evaluated) if members else {}
        if maps:
            parity["cam_max_abs"] = _map_parity(members, predictor, parity_images[:MAP_LESIONS], tolerance, spec, tta)
        if check is not None:
            parity |= check(predictor)
        content["parity"] = parity
        write_json(work / INFO, content)
        write_text(work / CARD, card if card is not None else _plain_card(content))
        _write_reference(work, predictor, reference, visit)
        write_manifest(work)
        bundle = Bundle.open(work)
        _replace(work, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    size = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    return {
        "path": str(out),
        "name": bundle.name,
        "version": Bundle.open(out, verify=False).version,
        "models": len(members),
        "parity": parity,
        "bytes": size,
        "graph_seconds": round(seconds, 3),
    }


def _parity(
    models: Sequence[torch.nn.Module],
    predictor: Predictor,
    images: NDArray[np.uint8],
    tolerance: float,
    spec: PreprocessSpec,
    tta: str,
    evaluated: NDArray[np.float64] | None,
) -> dict[str, Any]:
    """Figures of torch against the predictor on `images`; raises `GateRefused` if they are too far apart."""
    fold_logits, logit = predictor.logits(images)
    expected = _torch_logits(models, images, spec, tta)
    off = np.abs(logit.astype(np.float64) - expected.mean(axis=1))
    fold_off = np.abs(fold_logits.astype(np.float64) - expected)
    worst = max(float(off.max()), float(fold_off.max()))
    figures = {
        "max_abs": worst,
        "mean_abs": float(off.mean()),
        "logit_max_abs": float(off.max()),
        "count": len(images),
        "tolerance": tolerance,
    }
    if not worst <= tolerance:  # Nor is NaN.
        raise GateRefused(
            f"parity: on {len(images)} lesions the exported graph's logits are up to {worst:.3g} off torch's, and "
            f"{tolerance:g} is allowed: nothing was exported; raise gate.parity only if you know why they differ"
        )
    if evaluated is not None and len(evaluated):
        figures["evaluated_max_abs"] = gap = float(np.abs(logit[: len(evaluated)] - evaluated).max())
        if not gap <= tolerance:
            raise GateRefused(
                f"parity: the exported graph's logits are up to {gap:.3g} off those that the thresholds were chosen "
                f"on, and {tolerance:g} is allowed: nothing was exported; train and evaluate again on this machine"
            )
    return figures


def _map_parity(
    models: Sequence[torch.nn.Module],
    predictor: Predictor,
    images: NDArray[np.uint8],
    tolerance: float,
    spec: PreprocessSpec,
    tta: str,
) -> float:
    """Largest difference of the graph's maps to torch's, and of their means to the logits; `GateRefused` if too large.

    `tolerance` is relative to the maps' largest value, because a place's share can be far larger than the logit.
    """
    found, (_, logit) = cams(predictor.graph, images).astype(np.float64), predictor.logits(images)
    expected = _torch_maps(models, images, spec, tta)
    worst = max(float(np.abs(found - expected).max()), float(np.abs(found.mean((1, 2)) - logit).max()))
    if not worst <= tolerance * max(1.0, float(np.abs(expected).max())):  # Nor is NaN.
        raise GateRefused(
            f"parity: on {len(images)} lesions the exported graph's class-activation maps are up to {worst:.3g} off "
            f"torch's or their mean off the logit, and {tolerance:g} of their largest value is allowed: nothing was "
            "exported; raise gate.parity only if you know why they differ"
        )
    return worst


def _normalised(images: NDArray[np.uint8], spec: PreprocessSpec) -> torch.Tensor:
    """uint8 [N, S, S, 3] to float32 [N, 3, S, S], written apart from `export.graph` so that its mistakes show."""
    unit = torch.from_numpy(images.astype(np.float32) / 255.0)
    # In memory still channels last: faster.
    return ((unit - torch.tensor(spec.mean)) / torch.tensor(spec.std)).movedim(3, 1)


def _mirrors(tta: str) -> list[list[int]]:
    return [[], [3], [2], [2, 3]] if tta == "flips" else [[]]


def _torch_logits(
    models: Sequence[torch.nn.Module], images: NDArray[np.uint8], spec: PreprocessSpec, tta: str
) -> NDArray[np.float64]:
    """float64 [N, K] by torch."""
    rows = []
    for start in range(0, len(images), 16):
        x = _normalised(images[start : start + 16], spec)
        with torch.inference_mode():
            views = [[model(torch.flip(x, axes)).flatten() for model in models] for axes in _mirrors(tta)]
        rows.append(np.mean([torch.stack(view, dim=1).double().numpy() for view in views], axis=0))
    return np.concatenate(rows)


def _torch_maps(
    models: Sequence[torch.nn.Module], images: NDArray[np.uint8], spec: PreprocessSpec, tta: str
) -> NDArray[np.float64]:
    """float64 [N, h, w] by torch, from the gradient: what a place's features add to the logit, times the places.

    The part of the logit that no feature adds, the bias, belongs to every place alike.
    """
    x, maps = _normalised(images, spec), []
    for model in models:
        for axes in _mirrors(tta):
            for network in networks(model):
                with torch.no_grad():
                    features = network.forward_features(torch.flip(x, axes))
                features = features.requires_grad_()
                logit = network.forward_head(features).flatten()
                (gradient,) = torch.autograd.grad(logit.sum(), features)
                share = (gradient * features).sum(1)
                rest = (logit - share.sum((1, 2)))[:, None, None]
                cam = share * share[0].numel() + rest
                weight = 1 / (len(models) * len(_mirrors(tta)) * len(networks(model)))
                maps.append(torch.flip(cam, [axis - 1 for axis in axes]).detach().double() * weight)
    return np.asarray(torch.stack(maps).sum(0).numpy())


def _write_reference(
    work: Path, predictor: Predictor, reference: Sequence[tuple[str, bytes]], visit: pl.DataFrame | None
) -> None:
    """The reference lesions and the predictor's answers about them, of each by its picture and of all as a visit."""
    answers: list[dict[str, Any]] = []
    for name, data in reference:
        with atomic(work / "reference" / name) as file:
            file.write(data)
        if not predictor.bundle.pictures:
            answers.append({"file": name})
            continue
        fold_logits, logit = predictor.logits(to_pixels(data, predictor.spec)[None])
        if not np.isfinite(logit).all():
            raise GateRefused(f"reference/{name}: the model's answer is not a number: nothing was exported")
        answers.append({"file": name, "logit": float(logit[0]), "fold_logits": fold_logits[0].tolist()})
    stored: dict[str, Any] = {"answers": answers, "notice": NOTICE}
    if visit is not None:
        from lesionflow.serving.visit import Visits

        pictures = [data if predictor.bundle.pictures else None for _, data in reference]
        given = Visits(predictor).predict(pictures, visit, with_reasons=False)
        for entry, answer in zip(answers, given, strict=True):
            entry |= {"visit_mode": answer.mode, "visit_fold_logits": list(answer.fold_logits)}
        stored["visit"] = visit.to_dicts()
    write_json(work / ANSWERS, stored)


def _content(
    info: Mapping[str, Any], spec: PreprocessSpec, models: int, tta: str, maps: tuple[int, int] | None
) -> dict[str, Any]:
    batch_of = [-1, spec.size, spec.size, 3]
    outputs = [
        {"name": "fold_logits", "datatype": "FP32", "shape": [-1, models]},
        {"name": "logit", "datatype": "FP32", "shape": [-1]},
    ]
    if maps:
        outputs.append({"name": "cam", "datatype": "FP32", "shape": [-1, *maps]})
    graph = {
        "file": GRAPH,
        "opset": OPSET,
        "inputs": [{"name": "image", "datatype": "UINT8", "shape": batch_of}],
        "outputs": outputs,
    }
    content = {
        "name": "lesionflow",
        "calibration": {"kind": "identity", "a": 1.0, "b": 0.0},
        "thresholds": {},
        **info,
        "format": FORMAT,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "lesionflow": __version__,
        "preprocess": spec.to_dict(),
        "models": models or info.get("models"),
        "tta": tta,
        "graph": graph if models else {"file": None},
        "notice": NOTICE,
    }
    return check_info(content, "export_bundle(info=...)")


def _plain_card(content: Mapping[str, Any]) -> str:
    return (
        f"# {content['name']}\n\n{NOTICE}\n\n{content['models']} image models, {content['preprocess']['size']} pixels, "
        f"exported {content['created']} by lesionflow {content['lesionflow']}.\nWhat is known about it is in {INFO}.\n"
    )


def _check_arguments(
    models: Sequence[torch.nn.Module],
    out: Path,
    spec: PreprocessSpec,
    images: NDArray[np.uint8],
    reference: Sequence[tuple[str, bytes]],
    tta: str,
    *,
    graphless: bool,
) -> None:
    if not models and not graphless:
        raise UsageError("nothing to export: give at least one model")
    if tta not in ("none", "flips"):
        raise UsageError(f"tta must be one of none, flips, got {tta!r}")
    shaped = images.dtype == np.uint8 and images.ndim == 4 and images.shape[1:] == (spec.size, spec.size, 3)
    if models and not (shaped and len(images)):
        raise UsageError(
            f"parity images must be uint8 [N, {spec.size}, {spec.size}, 3] with N at least 1, "
            f"got {images.dtype} {list(images.shape)}"
        )
    names = [name for name, _ in reference]
    if not names or len(set(names)) != len(names) or not all(map(_REFERENCE.fullmatch, names)):
        raise UsageError(f"reference lesions need distinct .png, .jpg or .jpeg names without folders, got {names}")
    if out.exists() and not (out / MANIFEST).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out}: exists and is not a bundle: choose another folder, or remove it")


def _replace(new: Path, out: Path) -> None:
    """Put a complete folder in place of the old one, which comes back if that fails."""
    if not out.exists():
        new.rename(out)
        return
    old = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.old."))
    out.rename(old / "bundle")
    try:
        new.rename(out)
    except OSError:
        (old / "bundle").rename(out)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)
