"""One patient's visit: pictures and metadata of the lesions in, a ranked and explained list out.

    POST /v1/triage    multipart/form-data (`images`, `metadata`, `options`) or JSON (`lesions`, `options`)
    GET  /v1/model     what the answers rest on, and what may be sent

All lesions of a request are one patient's. A picture that can't be used is named in `errors` and the others are
answered; a lesion without a usable picture is scored by its metadata where the bundle knows any.
"""

from __future__ import annotations

import base64
import io
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from lesionflow.bundle import NOTICE, probability_interval
from lesionflow.data.images import Pixels
from lesionflow.data.schema import TEST_COLUMNS
from lesionflow.errors import ImageError
from lesionflow.serving.admission import Place, read_body
from lesionflow.serving.graph import Floats
from lesionflow.serving.predictor import Answer
from lesionflow.serving.protocol import RequestError, ServiceLimits
from lesionflow.serving.service import Service
from lesionflow.serving.visitrequest import WITHHELD, Asked, of_form, of_json

if TYPE_CHECKING:
    from lesionflow.serving.visit import VisitAnswer

PATIENT = "this visit"


def routes() -> list[BaseRoute]:
    return [Route("/v1/model", _model), Route("/v1/triage", _triage, methods=["POST"])]


async def _model(request: Request) -> Response:
    service: Service = request.app.state.service
    bundle, limits = service.predictor.bundle, service.limits
    visit = bundle.info.get("visit") or {}
    modes = visit.get("modes", {"image": bundle.info})
    served = modes[visit.get("served", "image")]
    metrics = bundle.info.get("metrics") or {}
    worth = {
        mode: {part: of.get(part) for part in ("out_of_fold", "holdout")} for mode, of in visit.get("modes", {}).items()
    }
    return JSONResponse(
        {
            "model": service.name, "bundle": bundle.version, "notice": NOTICE, "created": bundle.info.get("created"),
            "served": visit.get("served", "image"), "modes": list(modes),
            "worth": worth or {"image": {"out_of_fold": {"pauc": metrics.get("pauc", {}).get("rank_pooled")}}},
            "bands": {name: mode["thresholds"] for name, mode in modes.items()},
            "prevalence": served["calibration"].get("prevalence"),
            "synthetic": bundle.info.get("synthetic"), "licence": bundle.info.get("data_licence"),
            "size": bundle.spec.size, "maps": service.predictor.graph.has_cam, "pictures": bundle.pictures,
            "metadata_columns": [name for name in TEST_COLUMNS if name not in WITHHELD] if service.visits else [],
            "limits": {
                "visit": limits.visit, "visit_body": limits.visit_body, "heatmaps": limits.heatmaps,
                "image.bytes": limits.image.bytes, "image.pixels": limits.image.pixels,
            },
        }
    )  # fmt: skip


async def _triage(request: Request) -> Response:
    service: Service = request.app.state.service
    started = time.perf_counter()
    with service.admitted() as place:
        kind, body = await _received(request, service, place)
        async with service.in_time():
            asked = await service.in_thread(_asked, kind, body, service.limits)
            place.decoded()
            answer = await _answer(service, asked, place)
    answer["request_id"] = request.state.request_id
    request.state.lesions = len(answer["lesions"])
    answer["summary"]["seconds"] = round(time.perf_counter() - started, 3)
    body = await service.in_thread(_body, answer)
    return Response(body, media_type="application/json")


def _body(answer: dict[str, Any]) -> bytes:
    return json.dumps(answer, allow_nan=False, separators=(",", ":")).encode()


async def _received(request: Request, service: Service, place: Place) -> tuple[str, bytes]:
    """The Content-Type, one that is read here, and the body."""
    kind = request.headers.get("content-type", "")
    if _plain(kind) not in ("multipart/form-data", "application/json"):
        raise RequestError("Content-Type must be multipart/form-data or application/json", status=415)
    return kind, await read_body(request, place, service.limits.visit_body, "visit_body")


def _plain(kind: str) -> str:
    return kind.partition(";")[0].strip().lower()


def _asked(kind: str, body: bytes, limits: ServiceLimits) -> Asked:
    return of_json(body, limits) if _plain(kind) == "application/json" else of_form(body, kind, limits)


async def _answer(service: Service, asked: Asked, place: Place) -> dict[str, Any]:
    predictor = service.predictor
    rows = [row for row, image in enumerate(asked.images) if image is not None]
    if rows and not predictor.bundle.pictures:
        raise RequestError("this bundle knows metadata alone: leave the images out", status=422)
    failed, pixels, raw, logit = await service.usable([asked.images[row] or b"" for row in rows], place)
    seen = [row for place, row in enumerate(rows) if place not in failed]
    errors = [_error(asked, rows[place], error) for place, error in failed.items()]
    lesions = await service.in_thread(_scored, service, asked, seen, pixels, raw, logit)
    unscored = [one for one in lesions if one["mode"] is None]
    named, places = {error["id"] for error in errors}, {name: row for row, name in enumerate(asked.ids)}
    errors += [
        {"id": one["id"], "file": one["file"], "error": "neither a picture nor metadata to score it by", "limit": None,
         "position": places[one["id"]]}
        for one in unscored
        if one["id"] not in named
    ]  # fmt: skip
    if len(unscored) == len(lesions):
        raise RequestError("nothing can be scored: see errors", status=422, details={"errors": errors})
    if asked.heatmaps is not False:
        await service.in_thread(_draw, service, asked, lesions, seen, pixels)
    bands = Counter(one["band"] or "none" for one in lesions)
    judged = sum(one["mode"] is not None and one["band"] != "cannot judge" for one in lesions)
    if asked.count:
        service.answered([one["band"] for one in lesions])
    visit = predictor.bundle.info.get("visit") or {}
    served = visit.get("served", "image")
    calibration = visit["modes"][served]["calibration"] if visit else predictor.bundle.info["calibration"]
    return {
        "model": service.name, "bundle": predictor.bundle.version, "request_id": None, "notice": NOTICE,
        "served": served, "context": _context(service, asked, lesions) | {"notes": list(asked.notes)},
        "summary": {
            "lesions": len(lesions), "judged": judged,
            "bands": {name: bands[name] for name in ("refer", "routine", "low", "cannot judge", "none")},
            "modes": dict(Counter(one["mode"] for one in lesions if one["mode"])),
            "prevalence": calibration.get("prevalence"),
        },
        "lesions": lesions, "errors": errors,
    }  # fmt: skip


def _scored(
    service: Service, asked: Asked, seen: list[int], pixels: Pixels, raw: Floats, logit: Floats
) -> list[dict[str, Any]]:
    """Every lesion's answer, ranked."""
    predictor, visits, count = service.predictor, service.visits, len(asked.ids)
    lesions: list[dict[str, Any]]
    looks = predictor.look(pixels) if service.looks else None
    if visits is None:
        answers: list[Answer | None] = [None] * count
        for row, answer in zip(seen, predictor.answers(pixels, raw, logit, looks), strict=True):
            answers[row] = answer
        image = np.full(count, np.nan)
        image[seen] = logit
        _drift(service, asked, seen, looks, {"image": image}, [one.band if one else None for one in answers])
        calibration = predictor.bundle.info["calibration"]
        lesions = [_picture(asked, row, one, calibration) for row, one in enumerate(answers)]
        return _ranked(lesions)
    fold_logits = np.full((count, predictor.bundle.models), np.nan)
    fold_logits[seen] = raw
    from lesionflow.serving.visit import NO_PICTURE

    doubts: list[tuple[str, ...]] = [(NO_PICTURE,) if predictor.bundle.pictures else ()] * count
    for row, doubt in zip(seen, predictor.doubts(pixels, raw, looks), strict=True):
        doubts[row] = tuple(doubt)
    described = visits.describe(asked.table.with_columns(patient_id=pl.lit(PATIENT)))
    scores = visits.score(fold_logits, described)
    found = [visits.answer(name, scores, row, doubts[row], ()) for row, name in enumerate(asked.ids)]
    _drift(service, asked, seen, looks, scores.by_mode, [one.band for one in found])
    lesions = [_visit(asked, row, one, visits.modes) for row, one in enumerate(found)]
    ranked = _ranked(lesions)
    place = {name: row for row, name in enumerate(asked.ids)}
    told = ranked[: asked.reasons]
    if told:
        chosen = [place[one["id"]] for one in told]
        for one, words in zip(told, visits.explain(described, chosen), strict=True):
            one["reasons"] = list(words)
    return ranked


def _drift(
    service: Service,
    asked: Asked,
    seen: list[int],
    looks: Mapping[str, NDArray[np.float64]] | None,
    logits: Mapping[str, NDArray[np.float64]],
    bands: list[str | None],
) -> None:
    """Let the visit count in what is held against the hold-out."""
    if service.drift is None or not asked.count:
        return
    places = {}
    for name, values in (looks or {}).items():
        places[name] = np.full(len(asked.ids), np.nan)
        places[name][seen] = values
    table, institution = asked.table if asked.described else None, None
    if table is not None and "attribution" in table.columns:
        named = table["attribution"].drop_nulls().unique().to_list()
        institution = named[0] if len(named) == 1 else None
    service.observe(places or None, logits, bands=bands, table=table, institution=institution)


def _ranked(lesions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Most suspicious first; those that nothing is known of last. Equals keep the order they came in."""
    known = sorted((one for one in lesions if one["mode"]), key=lambda one: (-one["probability"], -one["logit"]))
    ranked = known + [one for one in lesions if not one["mode"]]
    return [{"rank": rank, **one} for rank, one in enumerate(ranked, 1)]


def _lesion(asked: Asked, row: int) -> dict[str, Any]:
    def cell(name: str) -> Any:
        return asked.table[name][row] if name in asked.table.columns else None

    x, y, z = (cell(f"tbp_lv_{axis}") for axis in "xyz")
    known = None not in (x, y, z)
    return {
        "id": asked.ids[row], "file": asked.files[row], "mode": None, "band": None, "probability": None,
        "interval": None, "logit": None, "scores": {}, "reasons": [], "doubts": [],
        "site": cell("anatom_site_general"), "position": {"x": x, "y": y, "z": z} if known else None,
        "size_mm": cell("clin_size_long_diam_mm"), "heatmap": None,
    }  # fmt: skip


def _picture(asked: Asked, row: int, one: Answer | None, calibration: dict[str, Any]) -> dict[str, Any]:
    lesion = _lesion(asked, row)
    if one is None:
        return lesion | {"band": "cannot judge", "doubts": ["no picture that can be judged"]}
    return lesion | {
        "mode": "image", "band": one.band, "probability": one.probability, "logit": one.logit,
        "interval": _interval(one.logit, calibration), "scores": {"image": one.probability}, "doubts": list(one.doubts),
    }  # fmt: skip


def _visit(asked: Asked, row: int, one: VisitAnswer, modes: dict[str, Any]) -> dict[str, Any]:
    lesion = _lesion(asked, row) | {"band": one.band, "doubts": list(one.doubts)}
    if not one.mode:
        return lesion
    return lesion | {
        "mode": one.mode, "probability": one.probability, "logit": one.logit, "scores": one.scores,
        "interval": _interval(one.logit, modes[one.mode]["calibration"]),
    }  # fmt: skip


def _interval(logit: float, calibration: dict[str, Any]) -> dict[str, Any] | None:
    if (found := probability_interval(logit, calibration)) is None:
        return None
    return {"low": found[0], "high": found[1], "level": 0.95, "of": "the calibration, over patients"}


def _context(service: Service, asked: Asked, lesions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How many lesions could be compared with each other, and what was left out of the scores."""
    if service.visits is None:
        note = "this bundle knows pictures alone: the metadata was not used" if asked.described else None
        return {"lesions": 0, "note": note}
    compared = sum(one["mode"] in ("visit", "image_visit") for one in lesions)
    if not asked.described:
        return {"lesions": 0, "note": "without metadata the pictures alone were scored, without comparison"}
    return {"lesions": compared, "note": None if compared else "no two lesions with metadata: none were compared"}


def _draw(service: Service, asked: Asked, lesions: list[dict[str, Any]], seen: list[int], pixels: Pixels) -> None:
    """Put the heat maps that were asked for into the answer."""
    from PIL import Image

    from lesionflow.serving.explain import cams
    from lesionflow.serving.heat import overlay

    if not service.predictor.graph.has_cam:
        raise RequestError("this bundle's graph gives no heat maps: ask without them", status=422)
    where = {asked.ids[row]: place for place, row in enumerate(seen)}
    wanted = [one for one in lesions if asked.heatmaps is True or one["id"] in _ids(asked.heatmaps)]
    drawn = [one for one in wanted if one["id"] in where][: service.limits.heatmaps]
    crops = pixels[[where[one["id"]] for one in drawn]]
    for one, crop, cells in zip(drawn, crops, cams(service.predictor.graph, crops), strict=True):
        buffer = io.BytesIO()
        Image.fromarray(overlay(crop, cells)).save(buffer, "PNG")
        one["heatmap"] = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _ids(heatmaps: frozenset[str] | bool) -> frozenset[str]:
    return heatmaps if isinstance(heatmaps, frozenset) else frozenset()


def _error(asked: Asked, row: int, error: ImageError) -> dict[str, Any]:
    limit = f"image.{error.limit}" if error.limit else None
    return {"id": asked.ids[row], "file": asked.files[row], "error": str(error), "limit": limit, "position": row}
