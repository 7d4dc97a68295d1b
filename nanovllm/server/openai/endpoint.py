"""Endpoints that run the model, and all that they share between parser and renderer.

    body -> parse -> GenerationRequest -> AsyncEngine.generate -> outputs -> renderer -> response

An endpoint parses its body into a GenerationRequest and renders outputs in its form. Everything
between is here: preparing on a worker thread, the queue, deadlines, disconnects, streams and the
request log. run-batch uses `prepare` and the renderers of its endpoints without the server.

A new endpoint is a module with a body (GenerationBody), a parser, a Renderer and an Endpoint of
them, listed in endpoints.py. responses.py is an example that shares no fields with
completions.
"""

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, aclosing, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, TypeVar

from fastapi import FastAPI, Request
from starlette.responses import Response

from nanovllm.engine.admission import RequestSize
from nanovllm.engine.beam_search import BeamSearches
from nanovllm.engine.chat.template import ChatTemplate
from nanovllm.engine.engine import Engine
from nanovllm.engine.generation_request import BeamSearchParams, GenerationRequest
from nanovllm.engine.prompt_request import PromptRequest
from nanovllm.engine.request_handle import RequestHandle
from nanovllm.errors import InvalidRequestError
from nanovllm.outputs import RequestOutput
from nanovllm.sampling_params import SamplingParams
from nanovllm.server.http.body import read_body
from nanovllm.server.http.clients import client_of
from nanovllm.server.http.deadlines import deadline_of
from nanovllm.server.http.errors import problem_of, served_name
from nanovllm.server.http.event_stream import (
    MAX_WRITE_BYTES,
    EventStream,
    PieceResponse,
    Write,
    unless_disconnected,
)
from nanovllm.server.http.json_io import dump_json, json_pieces
from nanovllm.server.http.request_log import record_of
from nanovllm.server.openai.beams import run_searches
from nanovllm.server.openai.renderer import Renderer, ResponseContext, is_large
from nanovllm.server.openai.response_store import NOT_KEPT, ClientResponses, ResponseStore
from nanovllm.server.openai.schemas import GenerationBody
from nanovllm.server.openapi import operation
from nanovllm.server.service import Service

B = TypeVar("B", bound=GenerationBody)

logger = logging.getLogger(__name__)

MANY_PROMPTS = 32  # whose outputs are put together on a worker thread


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
        uses_process: whether parsing a body waits for the process of the chat template.
    """

    path: str
    name: str
    description: str
    id_prefix: str
    body: type[B]
    parse: Callable[[B, Engine, ChatTemplate | None], GenerationRequest]
    renderer: Callable[[ResponseContext, B], Renderer[Any, Any]]
    response: Any
    event: Any = None
    resolve: Callable[[B, ClientResponses], B] = lambda body, _: body
    ends_with_done: bool = True
    has_secret_ids: bool = False
    uses_process: bool = False


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


def prepare(
    endpoint: Endpoint[B],
    body: B,
    engine: Engine,
    chat_template: ChatTemplate | None,
    model: str,
    client: str = "",
    stored: ClientResponses = NOT_KEPT,
) -> tuple[Renderer[Any, Any], Sequence[PromptRequest] | BeamSearches]:
    """Parse and check a body; return the renderer of its outputs, and its prompts for the engine.

    Args:
        model: the name that the client used for the model.
        client: identity of who sent it.
        stored: the client's stored responses.

    Raises:
        InvalidRequestError: the body is invalid; in the client's names of fields.
    """
    prompts: Sequence[PromptRequest] | BeamSearches
    with client_field_names(body):
        body = endpoint.resolve(body, stored)
        request = endpoint.parse(body, engine, chat_template)
        response_id = endpoint.id_prefix + (body.requested_id or uuid.uuid4().hex)
        is_secret = endpoint.has_secret_ids
        request_id = f"{endpoint.name}-{uuid.uuid4().hex}" if is_secret else response_id
        request = replace(request, request_id=request_id, client=client)
        if isinstance(request.params, BeamSearchParams):
            prompts = BeamSearches(request, engine.input_processor)
            prompt_tokens = prompts.num_prompt_tokens
        else:
            prompts = engine.input_processor.process(request)
            prompt_tokens = sum(prompt.num_prompt_tokens for prompt in prompts)
    now = int(time.time())
    has_drafts = engine.config.speculation is not None
    context = ResponseContext(
        response_id, now, model, prompt_tokens, engine.tokenizer, stored, has_drafts
    )
    return endpoint.renderer(context, body), prompts


@contextmanager
def client_field_names(body: GenerationBody) -> Iterator[None]:
    """Make errors name the fields that the client sent."""
    try:
        yield
    except InvalidRequestError as error:
        raise error.named(body.field_names) from error.__cause__


def add_endpoint(
    app: FastAPI, endpoint: Endpoint[B], service: Service, store: ResponseStore | None
) -> None:
    """Add the route of an endpoint to an application."""

    async def respond(request: Request) -> Response:
        return await _respond(endpoint, request, service, store)

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


async def _respond(
    endpoint: Endpoint[B], request: Request, service: Service, store: ResponseStore | None
) -> Response:
    async_engine, work, settings = service.engine, service.work, service.settings
    body, num_bytes = await read_body(request, endpoint.body, work)
    model = served_name(body.model, settings.model_names)
    record, client = record_of(request), client_of(request)
    record.note_prompts(body.logged_prompts)
    # Before time is spent on the prompts.
    async_engine.admission.check(RequestSize(body.num_choices), client=client.name)
    stored = ClientResponses(store, client.key_digest)
    engine, template = async_engine.engine, settings.chat_template
    renderer, prompts = await work.read(
        request,
        num_bytes,
        lambda: prepare(endpoint, body, engine, template, model, client.name, stored),
        uses_process=endpoint.uses_process,
    )
    record.answer_id = renderer.context.id
    record.prompt_tokens = renderer.context.prompt_tokens
    write = work.writer(request)
    if isinstance(prompts, BeamSearches):
        record.completion_tokens = 0  # unless the searches come to their end
        with client_field_names(body):
            searched = await run_searches(prompts, async_engine, request, write)
        record.completion_tokens = sum(output.num_generated_tokens for output in searched)
        return await _whole_response(renderer, searched, write)
    with client_field_names(body), ExitStack() as on_close:
        handle = async_engine.generate(prompts, deadline=deadline_of(request))

        def release() -> None:
            handle.release()
            record.completion_tokens = handle.num_output_tokens

        on_close.callback(release)
        response = await _generate(renderer, handle, request, write, settings.keep_alive_s)
        if isinstance(response, PieceResponse):
            response.on_close = on_close.pop_all().close
        return response


async def _generate(
    renderer: Renderer[Any, Any],
    handle: RequestHandle,
    request: Request,
    write: Write,
    keep_alive_s: float | None,
) -> Response:
    """Return the response of a queued request: whole once it has ended, or a stream.

    The head of a stream with a grammar waits for its first output, or until the stream must be kept
    alive, so that the error of an invalid grammar has a status.
    """
    if renderer.request.is_streamed:
        if handle.prompts[0].has_grammar:
            with suppress(asyncio.TimeoutError):
                update = asyncio.wait_for(handle.wait_for_update(), keep_alive_s)
                await unless_disconnected(request, update)
        return EventStream(_events(renderer, handle, write), keep_alive_s=keep_alive_s)
    await unless_disconnected(request, handle.wait())

    def results() -> list[Any]:
        return [prompt.result() for prompt in handle.prompts]

    outputs = await write(results) if len(handle.prompts) > MANY_PROMPTS else results()
    return await _whole_response(renderer, outputs, write)


async def _events(
    renderer: Renderer[Any, Any], handle: RequestHandle, write: Write
) -> AsyncGenerator[bytes, None]:
    """Yield the events of a stream; large ones are written on a worker thread."""
    try:
        if opening := renderer.begin():
            yield opening
        with client_field_names(renderer.request):
            async with aclosing(handle.deltas()) as deltas:
                async for index, delta in deltas:
                    for part in _parts(delta):
                        render = partial(renderer.delta, index, part)
                        events = await write(render) if is_large([part]) else render()
                        if events:
                            yield events
        yield renderer.end()
    except Exception as error:  # the status line is sent already
        if problem_of(error).status == 500:
            logger.error("%s ended with an error", renderer.context.id, exc_info=error)
        yield renderer.error(error)


def _parts(delta: RequestOutput) -> list[RequestOutput]:
    """Split a large delta into its choices."""
    if len(delta.outputs) == 1 or not is_large([delta]):
        return [delta]
    return [replace(delta, outputs=[choice]) for choice in delta.outputs]


async def _whole_response(
    renderer: Renderer[Any, Any], outputs: Sequence[Any], write: Write
) -> Response:
    """Return the response with these outputs.

    A large one is written on a worker thread, piece by piece as the client takes it. Only the JSON
    of one choice is in memory at a time.
    """
    if not renderer.is_large(outputs):
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
