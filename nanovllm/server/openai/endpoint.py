"""Endpoints that run the model, and all that they share between parser and renderer.

    body -> parse -> GenerationRequest -> AsyncEngine.generate -> outputs -> renderer -> response

An endpoint parses its body into a GenerationRequest and renders outputs in its form. Everything
between is here: preparing on a worker thread, the queue, grammars, deadlines, disconnects, streams
and the request log. run-batch uses `prepare_call` and the renderers of its endpoints without the
server.

A new endpoint is a module with a body (GenerationBody), a parser, a Renderer and an Endpoint of
them, which app.py lists in ENDPOINTS. responses.py is an example that shares no fields with
completions.
"""

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, TypeVar

from fastapi import FastAPI, Request
from starlette.responses import Response

from nanovllm.engine.async_engine import AsyncEngine
from nanovllm.engine.beam_search import BeamSearch, BeamSearchParams, begin_searches
from nanovllm.engine.chat.template import ChatTemplate
from nanovllm.engine.engine import Engine
from nanovllm.engine.generation_request import (
    GenerationRequest,
    PoolingParams,
    prepare_requests,
)
from nanovllm.engine.grammar.grammar import Grammar
from nanovllm.engine.input_processor import PreparedRequest
from nanovllm.engine.request_handle import RequestHandle
from nanovllm.errors import InvalidRequestError
from nanovllm.outputs import RequestOutput
from nanovllm.sampling_params import SamplingParams
from nanovllm.server.http.body import read_body
from nanovllm.server.http.deadlines import deadline_of
from nanovllm.server.http.errors import served_name, status_of
from nanovllm.server.http.event_stream import (
    MAX_WRITE_BYTES,
    EventStream,
    PieceResponse,
    Write,
    json_response,
    unless_disconnected,
)
from nanovllm.server.http.json_io import dump_json, json_pieces, write_json
from nanovllm.server.http.request_log import record_of
from nanovllm.server.http.worker_pools import WorkerPools
from nanovllm.server.openai.beams import run_searches
from nanovllm.server.openai.renderer import Renderer, ResponseContext, is_large
from nanovllm.server.openai.response_store import NOT_KEPT, ClientResponses, ResponseStore
from nanovllm.server.openai.schemas import GenerationBody
from nanovllm.server.openai.structured import rename_fields
from nanovllm.server.openapi import operation

B = TypeVar("B", bound=GenerationBody)

logger = logging.getLogger(__name__)
_GRAMMAR_POLL_S = 0.002


@dataclass(frozen=True, slots=True)
class Endpoint(Generic[B]):
    """An endpoint: its parser and its renderer, and what the OpenAPI document says of it.

    Attributes:
        path: of its URL.
        name: of its route.
        description: what it does.
        id_prefix: begins the `id` of responses.
        has_secret_ids: whether an `id` gives access to a response. Then the engine's requests have
            other ids, because the inspector shows those to everybody.
        body: the type of its bodies.
        resolve: returns a body with the stored responses that it refers to, called before parse.
        parse: returns the request of a body; called on a worker thread; may raise
            InvalidRequestError in the engine's names of fields.
        renderer: returns a new renderer for one response, whole or streamed.
        response: the type of a whole response.
        event: the type of an event's data in a stream; None if its bodies have no field `stream`.
        ends_with_done: whether a stream ends with [DONE], with any error as the event before it;
            otherwise its events have names, and the last one reports an error.
        is_guarded: whether parsing a body waits for a process, such as a template's.
    """

    path: str
    name: str
    description: str
    id_prefix: str
    body: type[B]
    parse: Callable[[B, Engine, ChatTemplate | None], GenerationRequest]
    renderer: Callable[[ResponseContext, B], Renderer[Any]]
    response: Any
    event: Any = None
    resolve: Callable[[B, ClientResponses], B] = lambda body, _: body
    ends_with_done: bool = True
    has_secret_ids: bool = False
    is_guarded: Callable[[B], bool] = lambda _: False


@dataclass(frozen=True, slots=True)
class ModelService:
    """What the endpoints of one server share.

    Attributes:
        async_engine: runs the model.
        model_names: names that requests may use for the model.
        chat_template: renders messages; None where the model has none.
        response_store: keeps responses; None for no store.
        keep_alive_s: time after which a stream without an event sends blank lines; None for never.
        work: the worker threads.
    """

    async_engine: AsyncEngine
    model_names: Sequence[str]
    chat_template: ChatTemplate | None
    response_store: ResponseStore | None
    keep_alive_s: float | None
    work: WorkerPools


@dataclass(frozen=True, slots=True)
class PreparedCall:
    """A checked body: its request, and the renderer of its outputs.

    `searches` are the beam searches of the prompts; `prepared_requests` the prompts otherwise.
    """

    response_id: str
    request: GenerationRequest
    renderer: Renderer[Any]
    prompt_tokens: int
    prepared_requests: tuple[PreparedRequest, ...] = ()
    searches: tuple[BeamSearch, ...] = ()

    @property
    def is_embedding(self) -> bool:
        """Whether the outputs are embeddings."""
        return isinstance(self.request.params, PoolingParams)

    def outputs(self) -> list[Any]:
        """Return the outputs, once every prompt has ended without an error."""
        processors = [prepared.output_processor for prepared in self.prepared_requests]
        if self.is_embedding:
            return [processor.embedding() for processor in processors]
        return [processor.output(packed=True) for processor in processors]


def sampling_params(engine: Engine, *, max_tokens: int | None, **fields: Any) -> SamplingParams:
    """Return the settings of a request; raises InvalidRequestError.

    Args:
        max_tokens: maximum tokens to generate; None for what the context has room for.
        fields: other settings by name; those that are None are the model's defaults, from its
            generation_config.json.
    """
    sent = {name: value for name, value in fields.items() if value is not None}
    settings: dict[str, Any] = {**engine.sampling_defaults, **sent, "max_tokens": max_tokens}
    return SamplingParams(**settings)


def prepare_call(
    endpoint: Endpoint[B],
    body: B,
    engine: Engine,
    chat_template: ChatTemplate | None,
    model: str,
    client: str = "",
    stored: ClientResponses = NOT_KEPT,
) -> PreparedCall:
    """Parse and check a body; raises InvalidRequestError in the client's names of fields.

    `client` is the identity of who sent it, and `stored` its stored responses.
    """
    searches: tuple[BeamSearch, ...] = ()
    prepared: tuple[PreparedRequest, ...] = ()
    with client_field_names(body):
        body = endpoint.resolve(body, stored)
        request = endpoint.parse(body, engine, chat_template)
        response_id = endpoint.id_prefix + (body.requested_id or uuid.uuid4().hex)
        is_secret = endpoint.has_secret_ids
        request_id = f"{endpoint.name}-{uuid.uuid4().hex}" if is_secret else response_id
        request = replace(request, request_id=request_id, client=client)
        if isinstance(request.params, BeamSearchParams):
            processor = engine.input_processor
            searches = tuple(begin_searches(request.prompts, request.params, processor))
            prompt_tokens = sum(len(search.prompt_token_ids) for search in searches)
        else:
            prepared = prepare_requests(request, engine.input_processor)
            prompt_tokens = sum(len(one.requests[0].prompt_token_ids) for one in prepared)
    now = int(time.time())
    context = ResponseContext(response_id, now, model, prompt_tokens, engine.tokenizer, stored)
    renderer = endpoint.renderer(context, body)
    return PreparedCall(response_id, request, renderer, prompt_tokens, prepared, searches)


@contextmanager
def client_field_names(body: GenerationBody) -> Iterator[None]:
    """Make errors name the fields that the client sent."""
    try:
        yield
    except InvalidRequestError as error:
        raise rename_fields(error, body.field_names, body.prompt_field) from error.__cause__


def add_endpoint(app: FastAPI, endpoint: Endpoint[B], service: ModelService) -> None:
    """Add the route of an endpoint to an application."""

    async def respond(request: Request) -> Response:
        return await _respond(endpoint, request, service)

    errors = (400, 404, 429, 503, 504)
    described = operation(
        *errors,
        response=endpoint.response,
        body=endpoint.body,
        event=endpoint.event,
        ends_with_done=endpoint.ends_with_done,
    )
    app.post(endpoint.path, name=endpoint.name, description=endpoint.description, **described)(
        respond
    )


async def _respond(endpoint: Endpoint[B], request: Request, service: ModelService) -> Response:
    async_engine, work = service.async_engine, service.work
    body, num_bytes = await read_body(request, endpoint.body, work)
    model = served_name(body.model, service.model_names)
    record = record_of(request)
    record.note_prompts(body.logged_prompts)
    # Before time is spent on the prompts.
    async_engine.check_room(body.num_choices, client=record.client)
    stored = ClientResponses(service.response_store, record.api_key_digest)
    prepare = partial(
        prepare_call,
        endpoint,
        body,
        async_engine.engine,
        service.chat_template,
        model,
        record.client,
        stored,
    )
    call = await work.read(request, num_bytes, prepare, is_guarded=endpoint.is_guarded(body))
    record.answer_id = call.response_id
    record.prompt_tokens = call.prompt_tokens
    write = work.writer(request)
    if call.searches:
        record.completion_tokens = 0  # unless the searches come to their end
        with client_field_names(body):
            outputs = await run_searches(call.searches, call.request, async_engine, request, write)
        record.completion_tokens = sum(output.num_generated_tokens for output in outputs)
        return await _whole_response(call.renderer, outputs, write)
    with client_field_names(body):
        record.held.append(async_engine.hold_logprobs(call.prepared_requests))
        await _wait_for_grammar(request, call.prepared_requests)
        handle = async_engine.generate(call.prepared_requests, deadline=deadline_of(request))

    def release() -> None:
        handle.release()
        record.note_answers(call.prepared_requests)

    if body.is_streamed:
        events = _events(call, body, handle, write)
        return EventStream(events, release, service.keep_alive_s)
    try:
        with client_field_names(body):
            await unless_disconnected(request, handle.wait())
    finally:
        release()
    if call.is_embedding:  # which may have a million numbers
        content = await write(lambda: write_json(call.renderer.body(call.outputs())))
        return json_response(content)
    return await _whole_response(call.renderer, call.outputs(), write)


async def _wait_for_grammar(request: Request, prepared_requests: Sequence[PreparedRequest]) -> None:
    """Wait until the grammar of a request is compiled, so that its errors have a status.

    Compiling ends where the client disconnects or the deadline passes. Raises
    ClientDisconnectedError, InvalidRequestError for a wrong grammar, QueueFullError.
    """
    grammar = prepared_requests[0].grammar
    if grammar is None:
        return
    deadline = deadline_of(request)
    timeout_s = None if deadline is None else deadline.at_s - time.monotonic()
    first = grammar.start()
    try:
        compiled = _compiled(first, grammar.grammars.poll)
        await unless_disconnected(request, asyncio.wait_for(compiled, timeout_s))
    except asyncio.TimeoutError:
        return  # AsyncEngine.generate raises the error
    finally:
        first.close()
    if first.error is not None:
        raise first.error


async def _compiled(grammar: Grammar, poll: Callable[[], None]) -> None:
    """Wait until a grammar is compiled or has failed."""
    grammar.open()
    while grammar.error is None and grammar.pooled is not None and not grammar.pooled.is_settled:
        poll()
        await asyncio.sleep(_GRAMMAR_POLL_S)


async def _events(
    call: PreparedCall, body: GenerationBody, handle: RequestHandle, write: Write
) -> AsyncGenerator[bytes, None]:
    """Yield the events of a stream; large ones are written on a worker thread."""
    renderer = call.renderer
    try:
        if opening := renderer.begin():
            yield opening
        with client_field_names(body):
            async with aclosing(handle.deltas()) as deltas:
                async for index, delta in deltas:
                    for part in _parts(delta):
                        render = partial(renderer.delta, index, part)
                        events = await write(render) if is_large([part]) else render()
                        if events:
                            yield events
        yield renderer.end()
    except Exception as error:  # the status line is sent already
        if status_of(error) == 500:
            logger.error("%s ended with an error", call.response_id, exc_info=error)
        yield renderer.error(error)


def _parts(delta: RequestOutput) -> list[RequestOutput]:
    """Split a large delta into its choices."""
    if len(delta.outputs) == 1 or not is_large([delta]):
        return [delta]
    return [replace(delta, outputs=[choice]) for choice in delta.outputs]


async def _whole_response(
    renderer: Renderer[Any], outputs: Sequence[RequestOutput], write: Write
) -> Response:
    """Return the response with these outputs.

    A large one is written on a worker thread, piece by piece as the client takes it. Only the JSON
    of one choice is in memory at a time.
    """
    if not is_large(outputs):
        return Response(dump_json(renderer.body(outputs)), media_type="application/json")
    body = await write(partial(renderer.body, outputs))
    return PieceResponse(_pieces(body, write))


async def _pieces(body: Mapping[str, Any], write: Write) -> AsyncGenerator[bytes, None]:
    """Yield the JSON of a body in pieces of about MAX_WRITE_BYTES."""
    pieces = json_pieces(body)

    def next_piece() -> bytes:
        content = bytearray()
        for piece in pieces:
            content += piece
            if len(content) >= MAX_WRITE_BYTES:
                break
        return bytes(content)

    while content := await write(next_piece):
        yield content
