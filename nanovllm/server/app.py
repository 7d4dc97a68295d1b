"""create_app(engine): the HTTP application around an AsyncEngine.

    GET  /health /version /metrics /v1/models
    POST /v1/completions /v1/chat/completions /v1/embeddings

The application starts the engine when it starts and stops it when it stops. While the model is loading it answers 503.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response

from nanovllm import __version__
from nanovllm.engine.async_engine import AsyncEngine, EngineState
from nanovllm.engine.chat_template import ChatTemplate
from nanovllm.server import errors
from nanovllm.server.chat import add_chat
from nanovllm.server.completions import completion_body, make_job
from nanovllm.server.embeddings import add_embeddings
from nanovllm.server.errors import error_response, served_name
from nanovllm.server.limits import ApiKeyMiddleware, BodyLimitMiddleware
from nanovllm.server.metrics import ServerMetrics
from nanovllm.server.schemas import CompletionRequest
from nanovllm.server.streaming import ClientGoneError, EventStream, completion_events
from nanovllm.server.whole import client_gone, finish_all


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """How the application presents itself.

    Attributes:
        model_names: names that requests may use for the model; the first is the one in answers.
        api_key: what clients must send as a bearer token; None for no check.
        max_body_bytes: largest request body.
        stalled_client_s: a client that reads nothing of its stream for this long loses it.
        chat_template: what makes a prompt of messages; without one, chat is refused.
    """

    model_names: tuple[str, ...]
    api_key: str | None = None
    max_body_bytes: int = 4 << 20
    stalled_client_s: float = 60.0
    chat_template: ChatTemplate | None = None


def create_app(engine: AsyncEngine, settings: ServerSettings, metrics: ServerMetrics) -> FastAPI:
    """The application; `engine` must not be started yet, and feeds `metrics` by its `on_step`."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await engine.start()
        try:
            yield
        finally:
            await engine.stop()

    app = FastAPI(title="nanovllm", version=__version__, lifespan=lifespan, description="GPT-2 over an OpenAI-compatible API.")
    metrics.watch(engine)
    errors.install(app)
    app.add_middleware(BodyLimitMiddleware, max_body_bytes=settings.max_body_bytes)
    if settings.api_key is not None:
        app.add_middleware(ApiKeyMiddleware, api_key=settings.api_key)
    _add_status_routes(app, engine, settings, metrics)
    _add_completions(app, engine, settings)
    add_chat(app, engine, settings.model_names, settings.chat_template, settings.stalled_client_s)
    add_embeddings(app, engine, settings.model_names)
    return app


def _add_status_routes(app: FastAPI, engine: AsyncEngine, settings: ServerSettings, metrics: ServerMetrics) -> None:
    created = int(time.time())

    @app.get("/health")
    async def health() -> Response:
        """200 once the model is loaded and a step has run, 503 before and after."""
        if engine.state is EngineState.READY:
            return JSONResponse({"status": "ready"})
        return error_response(503, f"the engine is {engine.state.value}")

    @app.get("/version")
    async def version() -> dict[str, str]:
        """The version of the server."""
        return {"version": __version__}

    @app.get("/metrics")
    async def metrics_page() -> Response:
        """Metrics in Prometheus's text format."""
        return Response(metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The served model, under each of its names."""
        max_model_len = engine.engine.max_model_len
        root = settings.model_names[0]
        return {
            "object": "list",
            "data": [
                {"id": name, "object": "model", "created": created, "owned_by": "nanovllm", "root": root, "max_model_len": max_model_len}
                for name in settings.model_names
            ],
        }


def _add_completions(app: FastAPI, engine: AsyncEngine, settings: ServerSettings) -> None:
    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Complete one or several prompts."""
        model = served_name(body.model, settings.model_names)
        engine.check_room(len(body.prompts) * body.num_candidates)  # before time is spent on their text
        job = await asyncio.to_thread(make_job, body, engine.engine, model)  # tokenising long prompts would hold up everybody's stream
        if body.stream:
            readers = engine.submit_all(job.submissions)
            events = completion_events(job, engine, readers)
            return EventStream(events, on_close=lambda: engine.leave(readers), stalled_after_s=settings.stalled_client_s)
        try:
            return JSONResponse(completion_body(job, await finish_all(engine, request, job.submissions)))
        except ClientGoneError:
            return client_gone()
