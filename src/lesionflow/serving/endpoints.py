"""The service's addresses: a bundle's answers on the Open Inference Protocol v2.

    GET  /v2                                  what this server is
    GET  /v2/health/live   /v2/health/ready   ready: verified, and the reference lesions reproduced
    GET  /v2/models/NAME   .../ready          inputs and outputs
    POST /v2/models/NAME/infer                `image` (BYTES: JPEG or PNG; or UINT8 pixels) to logits and probability
    GET  /v1/model   POST /v1/triage          a patient's visit: see `serving.triage`

`/versions/1` may follow NAME, which is the bundle's own name or the one it is served under. Decoding and
the model run in threads, so health answers under load.
Images are held in memory for the length of their request and appear in no log and no file.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from lesionflow import __version__
from lesionflow.bundle import NOTICE
from lesionflow.errors import ClusterError, LesionflowError
from lesionflow.serving import pages, triage
from lesionflow.serving.access import Access
from lesionflow.serving.admission import read_body
from lesionflow.serving.graph import Graph
from lesionflow.serving.protocol import OUTPUTS, RequestError, render
from lesionflow.serving.service import VERSION, Service

RETRY_SECONDS = 2.0
"""Between two checks while a remote predictor isn't there yet."""
RECHECK_SECONDS = 30.0
"""Between two checks of a remote predictor that was: another model may have taken its place."""
_log = logging.getLogger("lesionflow.serving")


def application(service: Service, *, token: str | None = None) -> Starlette:
    """The ASGI application of a service, which it checks in a thread as it starts (a remote predictor ever again).

    With a `token` requests must bring it: see `access.Access`.
    """

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        stop = asyncio.Event()
        checking = asyncio.create_task(_check(service, stop))
        yield
        stop.set()
        await checking
        service.close()

    app = Starlette(
        routes=_routes(),
        middleware=[Middleware(Access, token=token)],
        lifespan=lifespan,
        exception_handlers={
            RequestError: _request_error,
            ClusterError: _cluster_error,
            HTTPException: _http_error,
        },
    )
    app.state.service = service
    return app


def _routes() -> list[BaseRoute]:
    models = ("/v2/models/{name}", "/v2/models/{name}/versions/{version}")
    routes: list[BaseRoute] = [
        # First, as a request goes through them in order.
        *(Route(f"{model}/infer", _infer, methods=["POST"]) for model in models),
        Route("/v2", _server),
        Route("/v2/health/live", _live),
        Route("/v2/health/ready", _ready),
        Route("/v2/repository/index", _index, methods=["POST"]),
        *triage.routes(),
        *pages.routes(),
    ]
    for model in models:
        routes += [Route(model, _metadata), Route(f"{model}/ready", _model_ready)]
    return routes


async def _check(service: Service, stop: asyncio.Event) -> None:
    if service.reason is None:
        return
    remote = not isinstance(service.predictor.graph, Graph)
    while not stop.is_set():
        before = service.reason
        try:
            await service.in_thread(service.check)
        except LesionflowError as error:
            if str(error) != before:
                _log.error("not ready: %s", error)
        if not remote:
            return
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), RECHECK_SECONDS if service.reason is None else RETRY_SECONDS)


async def _server(request: Request) -> Response:
    return JSONResponse({"name": "lesionflow", "version": __version__, "extensions": ["binary_tensor_data"]})


async def _live(request: Request) -> Response:
    return JSONResponse({"live": True})


async def _ready(request: Request) -> Response:
    return _readiness(_service(request), {})


async def _model_ready(request: Request) -> Response:
    return _readiness(_model(request), {"name": request.path_params["name"]})


async def _index(request: Request) -> Response:
    """The models here, as in the protocol's repository extension."""
    service = _service(request)
    state = {"state": "READY"} if service.reason is None else {"state": "UNAVAILABLE", "reason": service.reason}
    return JSONResponse([{"name": service.name, "version": VERSION, **state}])


async def _metadata(request: Request) -> Response:
    service = _model(request)
    bundle = service.predictor.bundle
    size = bundle.spec.size
    shapes = {"fold_logits": [-1, bundle.models]}
    return JSONResponse(
        {
            "name": request.path_params["name"],
            "versions": [VERSION],
            "platform": "lesionflow",
            "inputs": [{"name": "image", "datatype": "BYTES", "shape": [-1]}],
            "outputs": [
                {"name": name, "datatype": kind, "shape": shapes.get(name, [-1])} for name, kind in OUTPUTS.items()
            ],
            "parameters": {
                "notice": NOTICE,
                "bundle": bundle.version,
                "created": bundle.info["created"],
                "pixels": {"name": "image", "datatype": "UINT8", "shape": [-1, size, size, 3]},
                "max_images": service.limits.images,
                "max_body_bytes": service.limits.body,
            },
        }
    )


async def _infer(request: Request) -> Response:
    service = _model(request)
    with service.admitted() as place:
        body = await read_body(request, place, service.limits.body, "body")
        async with service.in_time():
            asked = await service.read(body, request.headers.get("inference-header-content-length"))
            answers = await service.answers(asked, place)
            place.answered()
            service.answered([answer.band for answer in answers])
            request.state.lesions = len(answers)
            answer, json_length = render(asked, answers, request.path_params["name"], VERSION)
    if json_length is None:
        return Response(answer, media_type="application/json")
    headers = {"Inference-Header-Content-Length": str(json_length)}
    return Response(answer, media_type="application/octet-stream", headers=headers)


def _service(request: Request) -> Service:
    return request.app.state.service  # type: ignore[no-any-return]


def _model(request: Request) -> Service:
    service = _service(request)
    name, version = request.path_params["name"], request.path_params.get("version", VERSION)
    if name not in (service.name, service.predictor.bundle.name) or version != VERSION:
        raise RequestError(
            f"no model {name[:64]!r} version {version[:16]!r}: this server has {service.name!r}, version {VERSION}",
            status=404,
        )
    return service


def _readiness(service: Service, extra: dict[str, Any]) -> Response:
    if service.reason is None:
        return JSONResponse({**extra, "ready": True})
    return JSONResponse({**extra, "ready": False, "error": f"not ready: {service.reason}"}, 503)


async def _request_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    request.state.limit = error.limit
    content = error.to_dict() | {"request_id": request.state.request_id}
    return JSONResponse(content, error.http_status, error.headers)


async def _cluster_error(request: Request, error: Exception) -> Response:
    """The predictor behind this service failed: the caller may ask again, and is told who failed."""
    assert isinstance(error, ClusterError)
    headers = {"Retry-After": "1"} if error.http_status == 503 else None
    return JSONResponse({"error": str(error)}, error.http_status, headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    content = {"error": f"{error.detail}: the service is under /v1 and /v2", "request_id": request.state.request_id}
    return JSONResponse(content, error.status_code, error.headers)
