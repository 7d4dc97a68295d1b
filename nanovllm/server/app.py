"""create_app(engine): the HTTP application around an AsyncEngine.

    GET  / /docs /health /version /metrics /load /v1/models /v1/models/{id} /tokenizer_info
    POST /v1/completions /v1/chat/completions /v1/embeddings /tokenize /detokenize

HEAD is answered where GET is.
The application starts the engine when it starts and stops it when it stops. While the model is loading it answers 503.
"""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import FastAPI, Path, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp

from nanovllm import __version__
from nanovllm.engine.async_engine import AsyncEngine, EngineState
from nanovllm.engine.chat.template import ChatTemplate
from nanovllm.server import openapi
from nanovllm.server.http import errors
from nanovllm.server.http.auth import ApiKeyMiddleware, TrustedHostMiddleware
from nanovllm.server.http.body import read_body
from nanovllm.server.http.body_limit import BodyLimitMiddleware
from nanovllm.server.http.cors import CORSMiddleware
from nanovllm.server.http.deadlines import deadline_of
from nanovllm.server.http.docs_page import add_docs_pages
from nanovllm.server.http.errors import error_response, served_name
from nanovllm.server.http.head import HeadMiddleware
from nanovllm.server.http.json_writer import write_json
from nanovllm.server.http.request_log import RequestLogMiddleware, record_of
from nanovllm.server.http.work import Work
from nanovllm.server.http_metrics import HttpMetricsMiddleware
from nanovllm.server.metrics import ServerMetrics
from nanovllm.server.openai.beams import beam_search_answer, completion_beams
from nanovllm.server.openai.chat import add_chat
from nanovllm.server.openai.chat_schemas import ChatRequest
from nanovllm.server.openai.completions import (
    completion_choices,
    completion_head,
    completion_usage,
    make_job,
)
from nanovllm.server.openai.embeddings import EmbeddingRequest, add_embeddings
from nanovllm.server.openai.grammars import wait_for_grammar
from nanovllm.server.openai.response_types import (
    ChatCompletionChunk,
    Completion,
    CompletionChunk,
    Detokenized,
    Health,
    Load,
    Model,
    ModelList,
    Tokenized,
    TokenizerInfo,
    Version,
)
from nanovllm.server.openai.responses import finish_all, json_response, whole_answer
from nanovllm.server.openai.schemas import CompletionRequest
from nanovllm.server.openai.streaming import EventStream, completion_events
from nanovllm.server.openai.tokenization import (
    DetokenizeRequest,
    TokenizeRequest,
    detokenize,
    tokenize,
    tokenizer_info,
)
from nanovllm.server.openapi import answers, request_body


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """How the application presents itself.

    Attributes:
        model_names: names that requests may use for the model; the first is the one in answers.
        api_keys: of which clients must send one as a bearer token; none for no check.
        allowed_hosts: names that requests may be for, beside addresses and localhost; None for any.
        allowed_origins: of web pages whose scripts may use the server, or `*` for all.
        max_body_bytes: largest request body.
        stalled_client_s: a client that reads nothing of its stream, or has not sent the whole of its request, for this long loses it.
        request_timeout_s: longest time from a request's arrival to the end of its answer; None for any.
        chat_template: what makes a prompt of messages; without one, chat is refused.
        log_requests: write a line of JSON about each request to the logger `nanovllm.requests`.
        log_prompts: have prompts in these lines.
    """

    model_names: tuple[str, ...]
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    allowed_hosts: tuple[str, ...] | None = None
    allowed_origins: tuple[str, ...] = ()
    max_body_bytes: int = 4 << 20
    stalled_client_s: float = 60.0
    request_timeout_s: float | None = None
    chat_template: ChatTemplate | None = None
    log_requests: bool = False
    log_prompts: bool = False


_DOCUMENTED = (
    CompletionRequest, CompletionChunk, ChatRequest, ChatCompletionChunk, EmbeddingRequest, TokenizeRequest, DetokenizeRequest,
)  # fmt: skip


def create_app(engine: AsyncEngine, settings: ServerSettings, metrics: ServerMetrics) -> ASGIApp:
    """The application with all its layers; `engine` must not be started yet, and feeds `metrics` by its `on_step`."""

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
    work = Work(engine)
    engine.when_stopped(work.close)
    app.add_middleware(
        BodyLimitMiddleware,
        max_body_bytes=settings.max_body_bytes,
        max_body_s=settings.stalled_client_s,
    )
    if settings.api_keys:
        app.add_middleware(ApiKeyMiddleware, api_keys=settings.api_keys)
    _add_status_routes(app, engine, metrics)
    _add_models(app, engine, settings)
    _add_completions(app, engine, settings, work)
    add_chat(
        app, engine, settings.model_names, settings.chat_template, settings.stalled_client_s, work
    )
    add_embeddings(app, engine, settings.model_names, settings.stalled_client_s, work)
    _add_tokenization(app, engine, settings, work)
    add_docs_pages(app)
    openapi.install(
        app,
        _DOCUMENTED,
        has_keys=bool(settings.api_keys),
        checks_host=settings.allowed_hosts is not None,
    )
    # These go around everything; added as above, they would not see the answer to a fault, which the framework gives outside of such layers.
    shared: ASGIApp = HeadMiddleware(app)
    if settings.allowed_origins:
        shared = CORSMiddleware(shared, settings.allowed_origins)
    if settings.allowed_hosts is not None:
        shared = TrustedHostMiddleware(shared, settings.allowed_hosts)
    named = RequestLogMiddleware(
        shared, log_requests=settings.log_requests, log_prompts=settings.log_prompts
    )
    return HttpMetricsMiddleware(named, app.routes, metrics)


def _add_status_routes(app: FastAPI, engine: AsyncEngine, metrics: ServerMetrics) -> None:
    @app.get("/health", responses=answers(503, whole=Health))
    async def health() -> Response:
        """200 once the model is loaded and a step has run, 503 before and after."""
        if engine.state is EngineState.READY:
            return JSONResponse(Health(status="ready"))
        return error_response(503, f"the engine is {engine.state.value}")

    @app.get("/version", responses=answers(whole=Version))
    async def version() -> Response:
        """The version of the server."""
        return JSONResponse(Version(version=__version__))

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics_page() -> Response:
        """Metrics in Prometheus's text format."""
        return Response(metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/load", responses=answers(503, whole=Load))
    async def load() -> Response:
        """Sequences that run or wait, for whoever spreads requests over several servers, and what unfinished requests have reserved of how much."""
        stats, room = engine.stats(), engine.admission_stats()
        return JSONResponse(
            Load(
                server_load=stats.num_requests_running + stats.num_requests_waiting,
                queued_requests=room.answers, max_queued_requests=room.max_answers,
                queued_tokens=room.tokens, max_queued_tokens=room.max_tokens or 0,
            )
        )  # fmt: skip


def _add_models(app: FastAPI, engine: AsyncEngine, settings: ServerSettings) -> None:
    created = int(time.time())

    def describe(name: str) -> Model:
        return {
            "id": name, "object": "model", "created": created, "owned_by": "nanovllm", "root": settings.model_names[0],
            "max_model_len": engine.engine.max_model_len,
        }  # fmt: skip

    @app.get("/v1/models", responses=answers(503, whole=ModelList))
    async def models() -> Response:
        """The served model, under each of its names."""
        return JSONResponse(
            ModelList(object="list", data=[describe(name) for name in settings.model_names])
        )

    @app.get("/v1/models/{model_id:path}", responses=answers(404, 503, whole=Model))
    async def model(
        model_id: Annotated[str, Path(examples=list(settings.model_names))],
    ) -> Response:
        """The served model under one of its names, which may have slashes."""
        return JSONResponse(describe(served_name(model_id, settings.model_names)))


def _add_completions(
    app: FastAPI, engine: AsyncEngine, settings: ServerSettings, work: Work
) -> None:
    @app.post(
        "/v1/completions",
        responses=answers(400, 404, 429, 503, 504, whole=Completion, chunk=CompletionChunk),
        openapi_extra=request_body(CompletionRequest),
    )
    async def completions(request: Request) -> Response:
        """Complete one or several prompts."""
        body, num_bytes = await read_body(request, CompletionRequest, work)
        model = served_name(body.model, settings.model_names)
        record = record_of(request)
        prompts = body.prompts
        record.note_prompts(prompts)
        engine.check_room(len(prompts) * body.num_candidates)  # before time is spent on their text
        if body.use_beam_search:
            form = completion_beams(body)
            return await beam_search_answer(body, form, engine, request, model, work, num_bytes)
        loaded = engine.engine
        job = await work.read(
            request,
            num_bytes,
            lambda: make_job(body, loaded, model),
            is_guarded=body.has_structure,
        )
        record.answer_id = job.id
        record.note_submissions(job.prepared_requests)
        record.held.append(engine.hold_logprobs(job.prepared_requests))
        await wait_for_grammar(request, job.prepared_requests, body.structured_outputs)
        if body.stream:
            readers = engine.submit_all(job.prepared_requests, deadline=deadline_of(request))

            def leave() -> None:
                engine.leave(readers)
                record.note_answers(job.prepared_requests)

            return EventStream(
                completion_events(job, engine, readers, work.writer(request)),
                on_close=leave,
                stalled_after_s=settings.stalled_client_s,
            )
        try:
            outputs = await finish_all(engine, request, job.prepared_requests)
            return await whole_answer(
                completion_head(job),
                completion_choices(job, outputs),
                completion_usage(outputs),
                outputs,
                work.writer(request),
                settings.stalled_client_s,
            )
        finally:
            record.note_answers(job.prepared_requests)


def _add_tokenization(
    app: FastAPI, engine: AsyncEngine, settings: ServerSettings, work: Work
) -> None:
    """Both answers are made, and written as JSON, beside the event loop: long ones would hold up everybody's stream."""

    @app.post(
        "/tokenize",
        responses=answers(400, 404, 503, whole=Tokenized),
        openapi_extra=request_body(TokenizeRequest),
    )
    async def tokenize_text(request: Request) -> Response:
        """Token ids of a text or of messages."""
        body, num_bytes = await read_body(request, TokenizeRequest, work)
        served_name(body.model, settings.model_names)
        loaded, template = engine.engine, settings.chat_template
        content = await work.read(
            request,
            num_bytes,
            lambda: write_json(tokenize(body, loaded, template)),
            is_guarded=body.messages is not None,
        )
        return json_response(content, settings.stalled_client_s)

    @app.post(
        "/detokenize",
        responses=answers(400, 404, 503, whole=Detokenized),
        openapi_extra=request_body(DetokenizeRequest),
    )
    async def detokenize_ids(request: Request) -> Response:
        """The text of token ids."""
        body, num_bytes = await read_body(request, DetokenizeRequest, work)
        served_name(body.model, settings.model_names)
        loaded = engine.engine
        content = await work.read(request, num_bytes, lambda: write_json(detokenize(body, loaded)))
        return json_response(content, settings.stalled_client_s)

    @app.get("/tokenizer_info", responses=answers(503, whole=TokenizerInfo))
    async def tokenizer_facts() -> Response:
        """Special tokens and sizes, for programs that let the server tokenise."""
        return JSONResponse(tokenizer_info(engine.engine))
