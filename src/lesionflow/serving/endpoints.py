"""The service's addresses: a bundle's answers on the Open Inference Protocol v2.

    GET  /v2                                  what this server is
    GET  /v2/health/live   /v2/health/ready   ready: verified, and the reference lesions reproduced
    GET  /v2/models/NAME   .../ready          inputs and outputs
    POST /v2/models/NAME/infer                `image` (BYTES: JPEG or PNG; or UINT8 pixels) to logits and probability

`/versions/1` may follow NAME, which is the bundle's own name or the one it is served under. Decoding and
the model run in threads, so health answers under load.
Images are held in memory for the length of their request and appear in no log and no file.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from lesionflow import __version__
from lesionflow.bundle import NOTICE
from lesionflow.data.images import Pixels, to_pixels
from lesionflow.errors import ClusterError, ImageError, LesionflowError
from lesionflow.serving.graph import Graph
from lesionflow.serving.predictor import Predictor
from lesionflow.serving.protocol import OUTPUTS, InferRequest, RequestError, ServiceLimits, parse, render

VERSION = "1"
RETRY_SECONDS = 2.0
"""Between two checks while a remote predictor isn't there yet."""
RECHECK_SECONDS = 30.0
"""Between two checks of a remote predictor that was: another model may have taken its place."""
_log = logging.getLogger("lesionflow.serving")


class Service:
    """A predictor with its limits, and whether it may be asked."""

    def __init__(self, predictor: Predictor, limits: ServiceLimits, name: str | None = None) -> None:
        self.predictor = predictor
        self.limits = limits
        self.name = name or predictor.bundle.name
        """What the model is served as; the bundle's own name is answered too."""
        self.reason: str | None = "the reference lesions haven't been checked yet"
        """Why the service isn't ready; None once it is."""
        self.pending = 0
        # One request is decoded while others are in the model.
        self._pool = ThreadPoolExecutor(predictor.graph.parallel + 1, "infer")
        self._model = threading.BoundedSemaphore(predictor.graph.parallel)

    def check(self) -> None:
        """Become ready if the reference lesions are reproduced, else raise and be unready with the reason."""
        try:
            self.predictor.smoke()
        except LesionflowError as error:
            self.reason = str(error)
            raise
        self.reason = None

    async def in_thread(self, work: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work, *arguments)

    def infer(self, body: bytes, header_length: str | None, name: str) -> tuple[bytes, int | None]:
        """A request's body to the response's, for the model as `name`: see `protocol.parse` and `protocol.render`."""
        request = parse(body, header_length, self.predictor.spec.size, self.limits)
        pixels = self._decode(request)
        with self._model:
            outputs = self.predictor.logits(pixels)
        return render(request, self.predictor.answers(pixels, *outputs), name, VERSION)

    def close(self) -> None:
        self._pool.shutdown()

    def _decode(self, request: InferRequest) -> Pixels:
        if request.pixels is not None:
            return request.pixels
        import numpy as np

        images, size = request.images or [], self.predictor.spec.size
        pixels = np.empty((len(images), size, size, 3), dtype=np.uint8)
        for position, data in enumerate(images):
            try:
                pixels[position] = to_pixels(data, self.predictor.spec, self.limits.image)
            except ImageError as error:
                where = f"image {position + 1} of {len(images)}"
                limit = f"image.{error.limit}" if error.limit else None
                raise RequestError(f"{where}: {error}", status=422, limit=limit, image=position) from None
        return pixels


def application(service: Service) -> Starlette:
    """The ASGI application of a service, which it checks in a thread as it starts (a remote predictor ever again)."""

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
        lifespan=lifespan,
        exception_handlers={RequestError: _request_error, ClusterError: _cluster_error, HTTPException: _http_error},
    )
    app.state.service = service
    return app


def _routes() -> list[BaseRoute]:
    routes: list[BaseRoute] = [
        Route("/v2", _server),
        Route("/v2/health/live", _live),
        Route("/v2/health/ready", _ready),
        Route("/v2/repository/index", _index, methods=["POST"]),
    ]
    for model in ("/v2/models/{name}", "/v2/models/{name}/versions/{version}"):
        routes += [
            Route(model, _metadata),
            Route(f"{model}/ready", _model_ready),
            Route(f"{model}/infer", _infer, methods=["POST"]),
        ]
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
    if service.reason is not None:
        raise RequestError(f"not ready: {service.reason}", status=503)
    if service.pending >= service.limits.requests:
        error = RequestError(
            f"busy, {service.pending} requests are waiting: try again in a second", status=503, limit="requests"
        )
        return JSONResponse(error.to_dict(), 503, {"Retry-After": "1"})
    service.pending += 1
    try:
        body = await _body(request, service.limits.body)
        header_length = request.headers.get("inference-header-content-length")
        name = request.path_params["name"]
        answer, json_length = await service.in_thread(service.infer, body, header_length, name)
    except ClientDisconnect:
        return Response(status_code=400)
    except LesionflowError:
        raise
    except Exception as error:
        # Only the kind of error is logged: its text might quote the request.
        _log.error("a request failed with %s", type(error).__name__)
        return JSONResponse({"error": "internal error: please report it"}, 500)
    finally:
        service.pending -= 1
    if json_length is None:
        return Response(answer, media_type="application/json")
    headers = {"Inference-Header-Content-Length": str(json_length)}
    return Response(answer, media_type="application/octet-stream", headers=headers)


async def _body(request: Request, limit: int) -> bytes:
    """The body, refused as soon as it is known to be too large."""
    if request.headers.get("content-encoding", "identity") != "identity":
        raise RequestError("compressed bodies aren't read: send it plain, images are compressed already", status=415)
    too_large = RequestError(
        f"the body is larger than the limit of {limit:,} bytes: send fewer images at a time", status=413, limit="body"
    )
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced[:20]) > limit:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise too_large
    return bytes(body)


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
    return JSONResponse(error.to_dict(), error.http_status)


async def _cluster_error(request: Request, error: Exception) -> Response:
    """The predictor behind this service failed: the caller may ask again, and is told who failed."""
    assert isinstance(error, ClusterError)
    headers = {"Retry-After": "1"} if error.http_status == 503 else None
    return JSONResponse({"error": str(error)}, error.http_status, headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": f"{error.detail}: the service is under /v2"}, error.status_code, error.headers)
