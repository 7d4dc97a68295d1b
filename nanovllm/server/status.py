"""GET /health and its other name /ping, /version, /metrics and /load."""

from typing import Annotated, Literal

from fastapi import FastAPI
from pydantic import Field
from starlette.responses import JSONResponse, PlainTextResponse, Response
from typing_extensions import TypedDict

from nanovllm import __version__
from nanovllm.engine.async_engine import EngineState
from nanovllm.server.http.errors import error_response
from nanovllm.server.metrics import METRICS_MEDIA_TYPE
from nanovllm.server.openapi import operation
from nanovllm.server.service import Service


class Health(TypedDict):
    """The response of GET /health: the engine is ready."""

    status: Literal["ready"]


class Version(TypedDict):
    """The server's version."""

    version: str


class Load(TypedDict):
    """The load of the server."""

    server_load: Annotated[int, Field(ge=0, description="sequences that run or wait")]
    queued_requests: Annotated[int, Field(ge=0, description="unfinished choices")]
    max_queued_requests: Annotated[int, Field(ge=1, description="maximum of queued_requests")]
    queued_tokens: Annotated[
        int, Field(ge=0, description="prompt and max_tokens of all unfinished requests")
    ]
    max_queued_tokens: Annotated[int, Field(ge=0, description="maximum of queued_tokens")]


def add_status_routes(app: FastAPI, service: Service) -> None:
    """Add the routes; only /load needs an engine that is ready."""
    engine = service.engine

    @app.get("/ping", include_in_schema=False)
    @app.get("/health", **operation(503, response=Health))
    async def health() -> Response:
        """200 once the model is loaded and a step has run, 503 before, after and while draining."""
        if service.control.is_draining:
            return error_response(503, "the server is about to stop; send requests to another")
        if engine.state is EngineState.READY:
            return JSONResponse(Health(status="ready"))
        return error_response(503, engine.problem)

    @app.get("/version", **operation(response=Version))
    async def version() -> Response:
        """The version of the server."""
        return JSONResponse(Version(version=__version__))

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics_page() -> Response:
        """Metrics in Prometheus's text format."""
        return Response(service.metrics.render(), media_type=METRICS_MEDIA_TYPE)

    @app.get("/load", **operation(503, response=Load))
    async def load() -> Response:
        """Number of running and waiting sequences, and the queue's room, for load balancers."""
        stats, room = engine.stats(), engine.admission.stats()
        return JSONResponse(
            Load(
                server_load=stats.num_requests_running + stats.num_requests_waiting,
                queued_requests=room.choices,
                max_queued_requests=room.max_choices,
                queued_tokens=room.tokens,
                max_queued_tokens=room.max_tokens or 0,
            )
        )
