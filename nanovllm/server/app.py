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

from fastapi import FastAPI, Path, Request
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
from nanovllm.server.http.body import read_body
from nanovllm.server.http.body_limit import BodyLimitMiddleware
from nanovllm.server.http.cors import CORSMiddleware
from nanovllm.server.http.docs_page import add_docs_pages
from nanovllm.server.http.errors import served_name
from nanovllm.server.http.event_stream import json_response
from nanovllm.server.http.head_requests import HeadMiddleware
from nanovllm.server.http.json_io import write_json
from nanovllm.server.http.request_log import RequestLogMiddleware
from nanovllm.server.http.trailing_slash import TrailingSlashMiddleware
from nanovllm.server.inspector import page
from nanovllm.server.inspector.documents import StateDescriber
from nanovllm.server.inspector.inspect_routes import add_inspect_routes
from nanovllm.server.inspector.paused_header import PausedHeaderMiddleware
from nanovllm.server.inspector.same_origin import SameOriginMiddleware
from nanovllm.server.inspector.state_routes import add_state_routes
from nanovllm.server.metrics import RequestCounter, ServerMetrics
from nanovllm.server.openai.chat import CHAT
from nanovllm.server.openai.completions import COMPLETIONS
from nanovllm.server.openai.embeddings import EMBEDDINGS
from nanovllm.server.openai.endpoint import Endpoint, ModelService, add_endpoint
from nanovllm.server.openai.response_store import ResponseStore, add_store_routes
from nanovllm.server.openai.response_types import (
    Detokenized,
    Model,
    ModelList,
    Tokenized,
    TokenizerInfo,
)
from nanovllm.server.openai.responses import RESPONSES
from nanovllm.server.openai.tokenization import (
    DetokenizeRequest,
    TokenizeRequest,
    detokenize,
    tokenize,
    tokenizer_info,
)
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
    _add_tokenization(app, service)
    if settings.has_inspector:
        _add_inspector(app, service, settings, metrics)
    add_docs_pages(app, has_index=not settings.has_inspector)
    openapi.install(
        app, has_keys=bool(settings.api_keys), checks_host=settings.allowed_hosts is not None
    )
    _add_middleware(app, engine, settings, control)
    return _with_outer_middleware(app, settings, metrics)


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
    if settings.has_inspector and settings.inspector_controls:
        app.add_middleware(PausedHeaderMiddleware, engine=engine)
    if settings.api_keys:
        open_paths = OPEN_PATHS | (page.public_paths() if settings.has_inspector else frozenset())
        app.add_middleware(ApiKeyMiddleware, api_keys=control.api_keys, open_paths=open_paths)


def _with_outer_middleware(
    app: FastAPI, settings: ServerSettings, metrics: ServerMetrics
) -> ASGIApp:
    """Return the application with the middleware that also sees the framework's own responses.

    The framework answers a fault outside of the middleware that `add_middleware` adds.
    """
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


def _add_tokenization(app: FastAPI, service: ModelService) -> None:
    """Add the routes of texts and token ids, which are computed on worker threads."""
    async_engine, work = service.async_engine, service.work

    @app.post("/tokenize", **operation(400, 404, 503, response=Tokenized, body=TokenizeRequest))
    async def tokenize_text(request: Request) -> Response:
        """Token ids of a text or of messages."""
        body, num_bytes = await read_body(request, TokenizeRequest, work)
        served_name(body.model, service.model_names)
        engine, template = async_engine.engine, service.chat_template
        content = await work.read(
            request,
            num_bytes,
            lambda: write_json(tokenize(body, engine, template)),
            is_guarded=body.messages is not None,
        )
        return json_response(content)

    @app.post(
        "/detokenize", **operation(400, 404, 503, response=Detokenized, body=DetokenizeRequest)
    )
    async def detokenize_ids(request: Request) -> Response:
        """The text of token ids."""
        body, num_bytes = await read_body(request, DetokenizeRequest, work)
        served_name(body.model, service.model_names)
        engine = async_engine.engine
        content = await work.read(request, num_bytes, lambda: write_json(detokenize(body, engine)))
        return json_response(content)

    @app.get("/tokenizer_info", **operation(503, response=TokenizerInfo))
    async def tokenizer_facts() -> Response:
        """Special tokens and sizes, for programs that let the server tokenize."""
        return JSONResponse(tokenizer_info(async_engine.engine))
