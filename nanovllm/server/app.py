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
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Annotated, Any

from fastapi import FastAPI, Path
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from nanovllm import __version__
from nanovllm.engine.async_engine import AsyncEngine, EngineState
from nanovllm.engine.chat.template import ChatTemplate
from nanovllm.inspection.worker_process import InspectionWorker
from nanovllm.sampling_params import MODEL_DEFAULTS, SamplingParams
from nanovllm.server import openapi
from nanovllm.server.control import ServerControl
from nanovllm.server.http import errors
from nanovllm.server.http.auth import OPEN_PATHS, ApiKeyMiddleware, TrustedHostMiddleware
from nanovllm.server.http.body_limit import BodyLimitMiddleware
from nanovllm.server.http.cors import CORSMiddleware
from nanovllm.server.http.docs_page import add_docs_pages
from nanovllm.server.http.errors import served_name
from nanovllm.server.http.request_line import HeadMiddleware, TrailingSlashMiddleware
from nanovllm.server.http.request_log import Headers, RequestLogMiddleware
from nanovllm.server.inspector import page
from nanovllm.server.inspector.documents import StateDescriber
from nanovllm.server.inspector.inspect_routes import add_inspect_routes
from nanovllm.server.inspector.same_origin import SameOriginMiddleware
from nanovllm.server.inspector.state_routes import add_state_routes
from nanovllm.server.metrics import RequestCounter, ServerMetrics
from nanovllm.server.openai.chat import CHAT
from nanovllm.server.openai.completions import COMPLETIONS
from nanovllm.server.openai.embeddings import EMBEDDINGS
from nanovllm.server.openai.endpoint import Endpoint, ModelService, add_endpoint
from nanovllm.server.openai.response_store import ResponseStore, add_store_routes
from nanovllm.server.openai.response_types import Model, ModelList
from nanovllm.server.openai.responses import RESPONSES
from nanovllm.server.openai.tokenization import add_tokenization_routes
from nanovllm.server.openapi import operation
from nanovllm.server.status import add_status_routes


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Settings of the application.

    Attributes:
        model_names: names that requests may use for the model; responses have the first by default.
        api_keys: clients must send one of them as a bearer token; empty for no check.
        allowed_hosts: accepted host names, beside addresses and localhost; None for any.
        allowed_origins: origins of web pages whose scripts may use the server, or `*` for all.
        max_body_bytes: largest request body.
        stalled_client_s: time after which a client that stops reading its response, or sending its
            request, is disconnected.
        keep_alive_s: time after which a stream without an event sends blank lines; None for never.
        request_timeout_s: maximum time from a request's arrival to the end of its response; None
            for no limit.
        chat_template: renders messages as a prompt; without one, chats are refused.
        has_response_store: keep the responses of /v1/responses for later requests.
        log_requests: log a line of JSON about each request to the logger `nanovllm.requests`.
        log_prompts: include prompts in these lines.
        has_inspector: serve the inspector's page at `/`, and its endpoints.
        inspected_folder: the model's folder, for /v1/inspect; None to leave these routes out.
        inspector_shows_prompts: include prompts in the state of the engine.
        inspector_controls: allow all clients, with a key where there are some, to pause and step
            the engine.
    """

    model_names: tuple[str, ...]
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    allowed_hosts: tuple[str, ...] | None = None
    allowed_origins: tuple[str, ...] = ()
    max_body_bytes: int = 4 << 20
    stalled_client_s: float = 60.0
    keep_alive_s: float | None = None
    request_timeout_s: float | None = None
    chat_template: ChatTemplate | None = None
    has_response_store: bool = True
    log_requests: bool = False
    log_prompts: bool = False
    inspected_folder: FilePath | None = None
    has_inspector: bool = True
    inspector_shows_prompts: bool = False
    inspector_controls: bool = False


ENDPOINTS: tuple[Endpoint[Any], ...] = (COMPLETIONS, CHAT, RESPONSES, EMBEDDINGS)


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
        description="GPT-2 over an OpenAI-compatible API. HEAD is answered where GET is.",
        redirect_slashes=False,
        docs_url=None,  # the framework's pages load their scripts from another host
        redoc_url=None,
    )
    app.state.request_timeout_s = settings.request_timeout_s
    metrics.watch(engine)
    errors.install(app)
    service = ModelService(
        engine,
        settings.model_names,
        settings.chat_template,
        ResponseStore() if settings.has_response_store else None,
        settings.keep_alive_s,
        control.work,
    )
    add_status_routes(app, engine, metrics, control)
    _add_models(app, engine, settings)
    for endpoint in ENDPOINTS:
        add_endpoint(app, endpoint, service)
    if service.response_store is not None:
        add_store_routes(app, service.response_store)
    add_tokenization_routes(app, service)
    if settings.has_inspector:
        _add_inspector(app, service, settings, metrics)
    add_docs_pages(app, has_index=not settings.has_inspector)
    openapi.install(
        app, has_keys=bool(settings.api_keys), checks_host=settings.allowed_hosts is not None
    )
    _add_middleware(app, engine, settings, control)
    return _with_outer_middleware(app, engine, settings, metrics)


def _add_middleware(
    app: FastAPI, engine: AsyncEngine, settings: ServerSettings, control: ServerControl
) -> None:
    """Add the middleware whose errors the framework's handlers answer, the innermost first."""

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
        app.add_middleware(ApiKeyMiddleware, api_keys=control.api_keys, open_paths=open_paths)


def _with_outer_middleware(
    app: FastAPI, engine: AsyncEngine, settings: ServerSettings, metrics: ServerMetrics
) -> ASGIApp:
    """Return the application with the middleware that also sees the framework's own responses.

    The framework answers a fault outside of the middleware that `add_middleware` adds.
    """

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
        count=RequestCounter(app.routes, metrics),
        headers=pause_header,
    )
    return TrailingSlashMiddleware(logged)


def _add_inspector(
    app: FastAPI, service: ModelService, settings: ServerSettings, metrics: ServerMetrics
) -> None:
    """Add the page, /v1/engine, and /v1/inspect if the model's folder is known."""
    engine, work = service.async_engine, service.work
    describer = StateDescriber(
        engine,
        metrics,
        settings.model_names[0],
        can_control=settings.inspector_controls,
        shows_prompts=settings.inspector_shows_prompts,
    )
    add_state_routes(app, engine, describer, work)
    if settings.inspected_folder is not None:
        add_inspect_routes(app, engine, InspectionWorker(settings.inspected_folder), work)
    page.add_page(app)


def _add_models(app: FastAPI, engine: AsyncEngine, settings: ServerSettings) -> None:
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
