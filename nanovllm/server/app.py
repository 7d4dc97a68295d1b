"""create_app(engine): the HTTP application around an AsyncEngine.

    GET  / /docs /openapi.json /health /ping /version /metrics /load /v1/models /v1/models/{id}
         /tokenizer_info
         /v1/engine/state /v1/engine/events /v1/engine/steps /v1/engine/vocabulary
    POST /v1/completions /v1/chat/completions /v1/responses /v1/embeddings /tokenize /detokenize
         /v1/engine/control
    GET, DELETE /v1/responses/{id}

and the inspector's routes under /v1/inspect.

HEAD is answered where GET is. The application starts and stops the engine, and answers 503 while
the model is loading.
"""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import FastAPI, Path
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from nanovllm import __version__
from nanovllm.engine.async_engine import AsyncEngine, EngineState
from nanovllm.inspection.worker_process import InspectionWorker
from nanovllm.sampling_params import MODEL_DEFAULTS, SamplingParams
from nanovllm.server import openapi
from nanovllm.server.http import errors
from nanovllm.server.http.auth import OPEN_PATHS, ApiKeyMiddleware, TrustedHostMiddleware
from nanovllm.server.http.body_limit import BodyLimitMiddleware
from nanovllm.server.http.cors import CORSMiddleware
from nanovllm.server.http.docs_page import add_docs_pages
from nanovllm.server.http.errors import served_name
from nanovllm.server.http.request_line import HeadMiddleware, TrailingSlashMiddleware
from nanovllm.server.http.request_log import Headers, RequestLogMiddleware
from nanovllm.server.inspector import page
from nanovllm.server.inspector.inspect_routes import add_inspect_routes
from nanovllm.server.inspector.same_origin import SameOriginMiddleware
from nanovllm.server.inspector.state_routes import add_state_routes
from nanovllm.server.metrics import RequestCounter, ServerMetrics
from nanovllm.server.openai.endpoint import add_endpoint
from nanovllm.server.openai.endpoints import ENDPOINTS
from nanovllm.server.openai.response_store import ResponseStore, add_store_routes
from nanovllm.server.openai.response_types import Model, ModelList
from nanovllm.server.openai.tokenization import add_tokenization_routes
from nanovllm.server.openapi import operation
from nanovllm.server.service import ServerControl, ServerSettings, Service
from nanovllm.server.status import add_status_routes


def create_app(
    engine: AsyncEngine,
    settings: ServerSettings,
    metrics: ServerMetrics,
    control: ServerControl | None = None,
) -> ASGIApp:
    """Return the application with its middleware.

    `engine` must not be started yet; its `on_step` feeds `metrics`. `control` has the keys of the
    settings and changes the application while it runs.
    """
    control = control or ServerControl(engine, settings.api_keys)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await engine.start()
        try:
            yield
        finally:
            await engine.stop()

    app = FastAPI(
        title="nanovllm",
        version=__version__,
        lifespan=lifespan,
        description="Language models over an OpenAI-compatible API. HEAD is answered where GET is.",
        redirect_slashes=False,
        docs_url=None,  # the framework's pages load their scripts from another host
        redoc_url=None,
    )
    app.state.request_timeout_s = settings.request_timeout_s
    metrics.watch(engine)
    errors.install(app)
    service = Service(engine, settings, metrics, control)
    store = ResponseStore() if settings.has_response_store else None
    add_status_routes(app, service)
    _add_models(app, service)
    for endpoint in ENDPOINTS:
        add_endpoint(app, endpoint, service, store)
    if store is not None:
        add_store_routes(app, store)
    add_tokenization_routes(app, service)
    if settings.has_inspector:
        add_state_routes(app, service)
        if settings.inspected_folder is not None:
            add_inspect_routes(app, service, InspectionWorker(settings.inspected_folder))
        page.add_page(app)
    add_docs_pages(app, has_index=not settings.has_inspector)
    openapi.install(
        app, has_keys=bool(settings.api_keys), checks_host=settings.allowed_hosts is not None
    )
    _add_middleware(app, service)
    return _with_outer_middleware(app, service)


def _add_middleware(app: FastAPI, service: Service) -> None:
    """Add the middleware whose errors the framework's handlers answer, the innermost first."""
    engine, settings = service.engine, service.settings

    def free_bytes() -> int | None:
        """Return half of the memory that the cache leaves; log-probabilities have the other."""
        memory = engine.engine.memory if engine.state is EngineState.READY else None
        return memory.free_bytes // 2 if memory and memory.free_bytes is not None else None

    app.add_middleware(
        BodyLimitMiddleware,
        max_body_bytes=settings.max_body_bytes,
        max_body_s=settings.stalled_client_s,
        free_bytes=free_bytes,
    )
    if settings.has_inspector:
        app.add_middleware(SameOriginMiddleware, allowed_origins=settings.allowed_origins)
    if settings.api_keys:
        open_paths = OPEN_PATHS | (page.public_paths() if settings.has_inspector else frozenset())
        app.add_middleware(
            ApiKeyMiddleware, api_keys=service.control.api_keys, open_paths=open_paths
        )


def _with_outer_middleware(app: FastAPI, service: Service) -> ASGIApp:
    """Return the application with the middleware that also sees the framework's own responses.

    The framework answers a fault outside of the middleware that `add_middleware` adds.
    """
    engine, settings = service.engine, service.settings

    def pause_header() -> Headers:
        """Name a pause, which keeps clients waiting and which nothing else tells them."""
        is_ready = settings.inspector_controls and engine.state is EngineState.READY
        return (
            [(b"x-nanovllm-engine", b"paused")] if is_ready and engine.inspector.is_paused else []
        )

    shared: ASGIApp = HeadMiddleware(app)
    if settings.allowed_origins:
        shared = CORSMiddleware(shared, settings.allowed_origins)
    if settings.allowed_hosts is not None:
        shared = TrustedHostMiddleware(shared, settings.allowed_hosts)
    logged = RequestLogMiddleware(
        shared,
        log_requests=settings.log_requests,
        log_prompts=settings.log_prompts,
        count=RequestCounter(app.routes, service.metrics),
        headers=pause_header,
    )
    return TrailingSlashMiddleware(logged)


def _add_models(app: FastAPI, service: Service) -> None:
    engine, settings = service.engine, service.settings
    created = int(time.time())

    def describe(name: str) -> Model:
        params = SamplingParams(**engine.engine.sampling_defaults)
        return {
            "id": name, "object": "model", "created": created, "owned_by": "nanovllm",
            "root": settings.model_names[0], "max_model_len": engine.engine.max_model_len,
            "has_chat_template": settings.chat_template is not None,
            "sampling_defaults": {name: getattr(params, name) for name in MODEL_DEFAULTS},
        }  # fmt: skip

    @app.get("/v1/models", **operation(503, response=ModelList))
    async def models() -> Response:
        """The served model, under each of its names."""
        return JSONResponse(
            ModelList(object="list", data=[describe(name) for name in settings.model_names])
        )

    @app.get("/v1/models/{model_id:path}", **operation(404, 503, response=Model))
    async def model(
        model_id: Annotated[str, Path(examples=list(settings.model_names))],
    ) -> Response:
        """The served model under one of its names, which may have slashes."""
        return JSONResponse(describe(served_name(model_id, settings.model_names)))
