"""Routes of the engine's state: see it, follow it, pause it and step it."""

import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from fastapi import Depends, FastAPI, Request, params
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from nanovllm.engine.async_engine import AsyncEngine
from nanovllm.engine.inspection.recorder import MAX_RECORDS
from nanovllm.errors import InvalidRequestError
from nanovllm.server.http.body import read_body
from nanovllm.server.http.errors import shorten
from nanovllm.server.http.event_stream import EventStream, json_response
from nanovllm.server.http.json_writer import write_json
from nanovllm.server.http.work import Work
from nanovllm.server.inspector.documents import StateDescriber, step_document
from nanovllm.server.inspector.event_stream import StateFeed
from nanovllm.server.inspector.response_types import (
    ControlRequest,
    ControlResult,
    EngineStateEvent,
    StepList,
    VocabularyTokens,
)
from nanovllm.server.inspector.same_origin import same_origin_check
from nanovllm.server.metrics import ServerMetrics
from nanovllm.server.openapi import event_responses, query_parameter, request_body, responses

MAX_FRAMES = 1_000_000
_KEEP_ALIVE_S = 10.0
"""Time after which a stream without an event sends blank lines, which keep a proxy from closing it
and reveal a watcher that has gone. Only watchers of events read it, never load tools."""
_FIRST_RATES_S = 0.1
"""Time between the two states of which the first response has its rates."""


@dataclass(frozen=True, slots=True)
class InspectorSettings:
    """Settings of the inspector.

    Attributes:
        model_name: name of the model in responses.
        shows_prompts: whether responses contain prompts.
        can_control: whether clients may pause and step the engine.
        allowed_origins: origins of other web pages that may use it, or `*` for all.
        stalled_client_s: time after which a watcher that reads nothing is disconnected.
    """

    model_name: str
    shows_prompts: bool
    can_control: bool
    allowed_origins: Sequence[str]
    stalled_client_s: float


def add_state_routes(
    app: FastAPI,
    engine: AsyncEngine,
    metrics: ServerMetrics,
    settings: InspectorSettings,
    work: Work,
) -> None:
    """Add the routes under /v1/engine."""
    dependencies = [Depends(same_origin_check(settings.allowed_origins))]
    _add_watch_routes(app, engine, metrics, settings, work, dependencies)
    _add_step_routes(app, engine, settings, work, dependencies)
    _add_vocabulary_route(app, engine, settings, work, dependencies)


def _add_watch_routes(
    app: FastAPI,
    engine: AsyncEngine,
    metrics: ServerMetrics,
    settings: InspectorSettings,
    work: Work,
    dependencies: Sequence[params.Depends],
) -> None:
    """Add /v1/engine/state and /v1/engine/events."""
    describer = StateDescriber(
        engine,
        metrics,
        settings.model_name,
        can_control=settings.can_control,
        shows_prompts=settings.shows_prompts,
    )
    feed = StateFeed(engine, describer, work)

    @app.get(
        "/v1/engine/state",
        dependencies=dependencies,
        responses=responses(403, 503, whole=EngineStateEvent),
    )
    async def state() -> Response:
        """The requests, blocks and statistics of the engine between two steps."""
        inspector = engine.inspector
        if not describer.has_recent(await inspector.state(max_steps=0)):
            await asyncio.sleep(_FIRST_RATES_S)
        inspected = await inspector.state(max_steps=1, shows_prompts=settings.shows_prompts)
        return JSONResponse(describer.describe(inspected))

    @app.get(
        "/v1/engine/events",
        dependencies=dependencies,
        responses=event_responses(400, 403, 429, 503, name="state", event=EngineStateEvent),
        openapi_extra=query_parameter(
            "frames", MAX_FRAMES, "end the stream after this many events (default: never)"
        ),
    )
    async def events(request: Request) -> Response:
        """A stream of states, at most ten a second, whenever the state has changed."""
        count = _number(request, "frames", MAX_FRAMES)
        if request.scope.get("is_head"):
            count = 0
        reader = feed.open()
        return EventStream(
            reader.frames(count), reader.close, settings.stalled_client_s, _KEEP_ALIVE_S
        )


def _add_step_routes(
    app: FastAPI,
    engine: AsyncEngine,
    settings: InspectorSettings,
    work: Work,
    dependencies: Sequence[params.Depends],
) -> None:
    """Add /v1/engine/steps and /v1/engine/control."""

    @app.get(
        "/v1/engine/steps",
        dependencies=dependencies,
        responses=responses(400, 403, 503, whole=StepList),
        openapi_extra=query_parameter(
            "last", MAX_RECORDS, "maximum number of steps (default: all that are recorded)"
        ),
    )
    async def steps(request: Request) -> Response:
        """The last steps, recorded while somebody watches and for 10 s after that."""
        count = _number(request, "last", MAX_RECORDS) or MAX_RECORDS
        inspected = await engine.inspector.state(max_steps=count)
        documents = [step_document(record, inspected.started_s) for record in inspected.steps]
        return JSONResponse(StepList(steps=documents))

    @app.post(
        "/v1/engine/control",
        dependencies=dependencies,
        responses=responses(400, 403, 503, whole=ControlResult),
        openapi_extra=request_body(ControlRequest),
    )
    async def control(request: Request) -> Response:
        """Pause or resume the engine, or pause it and run one step."""
        body, _ = await read_body(request, ControlRequest, work)
        if not settings.can_control:
            raise HTTPException(
                403,
                "pause and step are off; start the server with --inspector-controls, or on a "
                "loopback address without API keys",
            )
        is_paused, step = await engine.inspector.control(body.action)
        return JSONResponse(ControlResult(is_paused=is_paused, step=step))


def _add_vocabulary_route(
    app: FastAPI,
    engine: AsyncEngine,
    settings: InspectorSettings,
    work: Work,
    dependencies: Sequence[params.Depends],
) -> None:
    """Add /v1/engine/vocabulary, which a browser keeps and asks for again by its digest."""
    written: list[bytes] = []  # the response, once it is computed

    def write() -> bytes:
        loaded = engine.engine
        names = [loaded.tokenizer.token_name(token_id) for token_id in range(loaded.model.vocab)]
        return write_json(VocabularyTokens(tokens=names))

    @app.get(
        "/v1/engine/vocabulary",
        dependencies=dependencies,
        responses=responses(403, 503, whole=VocabularyTokens),
    )
    async def vocabulary(request: Request) -> Response:
        """All tokens of the model; with `if-none-match` 304 where they are the same."""
        if not written:
            written.append(await work.read(request, engine.engine.model.vocab, write))
        tag = f'"{hashlib.sha256(written[0]).hexdigest()[:32]}"'
        headers = {"etag": tag, "cache-control": "private, no-cache"}
        if request.headers.get("if-none-match", "").removeprefix("W/") == tag:
            return Response(status_code=304, headers=headers)
        return json_response(written[0], settings.stalled_client_s, headers)


def _number(request: Request, name: str, limit: int) -> int | None:
    """Return a query parameter from 1 to `limit`, None without it; raises InvalidRequestError."""
    text = request.query_params.get(name)
    if text is None:
        return None
    value = int(text) if text.isascii() and text.isdigit() and len(text) <= 9 else 0
    if not 1 <= value <= limit:
        raise InvalidRequestError(
            f"{name} is {shorten(text)!r} but must be an integer from 1 to {limit}", param=name
        )
    return value
