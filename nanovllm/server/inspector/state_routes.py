"""Routes of the engine's state: see it, follow it, pause it and step it."""

import asyncio
import hashlib

from fastapi import FastAPI, Request
from pydantic import Field
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from nanovllm.engine.inspection.recorder import MAX_RECORDS
from nanovllm.model.token_spelling import byte_level_spelling
from nanovllm.server.http.body import check_query, read_body
from nanovllm.server.http.bounded_model import BoundedModel
from nanovllm.server.http.event_stream import EventStream, json_response
from nanovllm.server.http.json_io import write_json
from nanovllm.server.inspector import response_types as types
from nanovllm.server.inspector.documents import StateDescriber, step_document
from nanovllm.server.inspector.state_feed import StateFeed
from nanovllm.server.openapi import operation
from nanovllm.server.service import Service

MAX_FRAMES = 1_000_000
_KEEP_ALIVE_S = 10.0
"""Time after which a stream without an event sends blank lines, which keep a proxy from closing it
and reveal a watcher that has gone. Only watchers of events read it, never load tools."""
_FIRST_RATES_S = 0.1
"""Time between the two states of which the first response has its rates."""


class EventsQuery(BoundedModel):
    """The query of GET /v1/engine/events."""

    frames: int | None = Field(
        None,
        ge=1,
        le=MAX_FRAMES,
        description="end the stream after this many events (default: never)",
    )


class StepsQuery(BoundedModel):
    """The query of GET /v1/engine/steps."""

    last: int = Field(
        MAX_RECORDS,
        ge=1,
        le=MAX_RECORDS,
        description="maximum number of steps (default: all that are recorded)",
    )


def add_state_routes(app: FastAPI, service: Service) -> None:
    """Add the routes under /v1/engine."""
    _add_watch_routes(app, service)
    _add_step_routes(app, service)
    _add_vocabulary_route(app, service)


def _add_watch_routes(app: FastAPI, service: Service) -> None:
    """Add /v1/engine/state and /v1/engine/events."""
    describer = StateDescriber(service)
    feed = StateFeed(service, describer)

    @app.get("/v1/engine/state", **operation(403, 503, response=types.EngineStateEvent))
    async def state() -> Response:
        """The requests, blocks and statistics of the engine between two steps."""
        inspector = service.engine.inspector
        if not describer.sample(await inspector.state(max_steps=0)):
            await asyncio.sleep(_FIRST_RATES_S)
        inspected = await inspector.state(
            max_steps=1, shows_prompts=service.settings.inspector_shows_prompts
        )
        return JSONResponse(describer.describe(inspected))

    @app.get(
        "/v1/engine/events",
        status_code=200,  # which the framework would look for in the response's class
        response_class=EventStream,
        **operation(
            400, 403, 429, 503, query=EventsQuery, event=types.EngineStateEvent, event_name="state"
        ),
    )
    async def events(request: Request) -> Response:
        """A stream of states, at most ten a second, whenever the state has changed."""
        count = check_query(request, EventsQuery).frames
        if request.scope.get("is_head"):
            count = 0
        return EventStream(*feed.open(count), _KEEP_ALIVE_S)


def _add_step_routes(app: FastAPI, service: Service) -> None:
    """Add /v1/engine/steps and /v1/engine/control."""

    @app.get(
        "/v1/engine/steps", **operation(400, 403, 503, response=types.StepList, query=StepsQuery)
    )
    async def steps(request: Request) -> Response:
        """The last steps, recorded while somebody watches and for 10 s after that."""
        count = check_query(request, StepsQuery).last
        inspected = await service.engine.inspector.state(max_steps=count)
        documents = [step_document(record, inspected.started_s) for record in inspected.steps]
        return JSONResponse(types.StepList(steps=documents))

    @app.post(
        "/v1/engine/control",
        **operation(400, 403, 503, response=types.ControlResult, body=types.ControlRequest),
    )
    async def control(request: Request) -> Response:
        """Pause or resume the engine, or pause it and run one step."""
        body, _ = await read_body(request, types.ControlRequest, service.work)
        if not service.settings.inspector_controls:
            raise HTTPException(
                403,
                "pause and step are off; start the server with --inspector-controls, or on a "
                "loopback address without API keys",
            )
        is_paused, step = await service.engine.inspector.control(body.action)
        return JSONResponse(types.ControlResult(is_paused=is_paused, step=step))


def _add_vocabulary_route(app: FastAPI, service: Service) -> None:
    """Add /v1/engine/vocabulary, which a browser keeps and asks for again by its digest."""
    engine = service.engine
    written: list[bytes] = []  # the response, once it is computed

    def write() -> bytes:
        loaded = engine.engine
        tokens = map(loaded.tokenizer.token_bytes, range(loaded.model.vocab))
        spelled = list(map(byte_level_spelling, tokens))
        return write_json(types.VocabularyTokens(tokens=spelled))

    @app.get("/v1/engine/vocabulary", **operation(403, 503, response=types.VocabularyTokens))
    async def vocabulary(request: Request) -> Response:
        """All tokens of the model; with `if-none-match` 304 where they are the same."""
        if not written:
            written.append(await service.work.read(request, engine.engine.model.vocab, write))
        tag = f'"{hashlib.sha256(written[0]).hexdigest()[:32]}"'
        headers = {"etag": tag, "cache-control": "private, no-cache"}
        if request.headers.get("if-none-match", "").removeprefix("W/") == tag:
            return Response(status_code=304, headers=headers)
        return json_response(written[0], headers)
