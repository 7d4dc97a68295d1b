"""POST /v1/chat/completions: messages through the checkpoint's chat template into a prompt, and its completion in OpenAI's chat form.

Below the template a chat is a completion of token ids: the same settings, the same checks, the same engine.
"""

import time
import uuid
from collections import defaultdict
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import Response

from nanovllm.engine.async_engine import AsyncEngine
from nanovllm.engine.chat.template import ChatTemplate
from nanovllm.engine.engine import Engine
from nanovllm.engine.input_processor import PreparedRequest
from nanovllm.engine.request_handle import RequestHandle
from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.errors import ContextLengthError, InvalidRequestError
from nanovllm.outputs import CompletionOutput, Logprob, RequestOutput
from nanovllm.prompts import Prompt
from nanovllm.sampling_params import SamplingParams
from nanovllm.server.http.body import read_body
from nanovllm.server.http.deadlines import deadline_of
from nanovllm.server.http.errors import served_name
from nanovllm.server.http.request_log import record_of
from nanovllm.server.http.work import Work
from nanovllm.server.openai.beams import BeamForm, beam_search_answer
from nanovllm.server.openai.chat_prompt import encode_messages
from nanovllm.server.openai.chat_schemas import ChatRequest
from nanovllm.server.openai.completions import (
    answer_head,
    check_context,
    completion_usage,
    refuse_beams,
    sampling_params,
)
from nanovllm.server.openai.grammars import wait_for_grammar
from nanovllm.server.openai.logprobs import TokenTexts, finite, likeliest, prompt_logprobs, push_all
from nanovllm.server.openai.response_types import (
    AssistantMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatLogprobs,
    ChatPrompt,
    ChatTokenLogprob,
    TokenLogprob,
)
from nanovllm.server.openai.responses import finish_all, whole_answer
from nanovllm.server.openai.streaming import EventStream, Write, answer_events, merge
from nanovllm.server.openai.structured import in_sent_fields
from nanovllm.server.openapi import answers, request_body


@dataclass(frozen=True, slots=True)
class ChatCall:
    """A checked request, and what the answer needs to know of it."""

    id: str
    created: int
    model: str
    body: ChatRequest
    prepared: PreparedRequest
    tokenizer: Tokenizer

    def token_texts(self) -> TokenTexts:
        """Return what shows the tokens of one choice."""
        return TokenTexts(
            self.tokenizer,
            skip_special_tokens=self.body.skip_special_tokens,
            as_token_ids=bool(self.body.return_tokens_as_token_ids),
        )


def add_chat(
    app: FastAPI,
    engine: AsyncEngine,
    model_names: Sequence[str],
    template: ChatTemplate | None,
    stalled_client_s: float,
    work: Work,
) -> None:
    """Add the route to an application; without a `template` it says what to do instead."""

    @app.post(
        "/v1/chat/completions",
        responses=answers(400, 404, 429, 503, 504, whole=ChatCompletion, chunk=ChatCompletionChunk),
        openapi_extra=request_body(ChatRequest),
    )
    async def chat_completions(request: Request) -> Response:
        """Answer a conversation."""
        body, num_bytes = await read_body(request, ChatRequest, work)
        model = served_name(body.model, model_names)
        record = record_of(request)
        record.note_prompts([message.content for message in body.messages])
        engine.check_room(body.num_candidates)  # before time is spent on its text
        loaded = engine.engine
        if body.use_beam_search:
            form = chat_beams(body, template, loaded)
            return await beam_search_answer(body, form, engine, request, model, work, num_bytes)
        job = await work.read(
            request,
            num_bytes,
            lambda: make_chat_job(body, template, loaded, model),
            is_guarded=True,
        )
        record.answer_id = job.id
        record.note_submissions([job.prepared])
        record.held.append(engine.hold_logprobs([job.prepared]))
        await wait_for_grammar(request, [job.prepared], body.structured_outputs)
        if body.stream:
            (handle,) = engine.submit_all([job.prepared], deadline=deadline_of(request))

            def leave() -> None:
                engine.leave([handle])
                record.note_answers([job.prepared])

            return EventStream(
                chat_events(job, engine, handle, work.writer(request)),
                on_close=leave,
                stalled_after_s=stalled_client_s,
            )
        try:
            (output,) = await finish_all(engine, request, [job.prepared])
        finally:
            record.note_answers([job.prepared])
        return await whole_answer(
            chat_head(job),
            chat_choices(job, output),
            completion_usage([output]),
            [output],
            work.writer(request),
            stalled_client_s,
            prompt_fields=lambda: prompt_fields(body, output),
        )


def make_chat_job(
    body: ChatRequest, template: ChatTemplate | None, engine: Engine, model: str
) -> ChatCall:
    """Render and check a body; raises InvalidRequestError before anything is queued, also where there is no template to render it by."""
    refuse_beams(body)
    job_id = f"chatcmpl-{body.request_id or uuid.uuid4().hex}"
    with _naming_fields(body):
        prompt = _encode(body, template, engine)
        params = _chat_params(body, template, engine)
        prepared = engine.input_processor.submit(
            engine.input_processor.new_request_id(job_id),
            prompt,
            params,
            priority=body.priority,
            cache_salt=body.cache_salt or "",
            check_length=partial(
                check_context,
                params=params,
                max_model_len=engine.max_model_len,
                max_tokens_field=body.max_tokens_field,
            ),
        )
    return ChatCall(job_id, int(time.time()), model, body, prepared, engine.tokenizer)


def chat_beams(body: ChatRequest, template: ChatTemplate | None, engine: Engine) -> BeamForm:
    """Return what a chat has of its own in a beam search."""

    def read() -> tuple[list[Prompt], int]:
        with _naming_fields(body):
            prompt = _encode(body, template, engine)
            limits = engine.input_processor.limits
            room = min(limits.max_model_len, limits.cache_tokens) - len(prompt)
            if room < 1:
                raise ContextLengthError(
                    f"the messages have {len(prompt)} tokens, which leaves no room for an answer; shorten them",
                    param="messages",
                )
            return [prompt], room if body.most_tokens is None else body.most_tokens

    return BeamForm(
        "chatcmpl",
        "chat.completion",
        read,
        partial(_choice, body),
        is_guarded=True,
        max_tokens_field=body.max_tokens_field,
        null_fields=tuple(ChatPrompt.__annotations__),
    )


@contextmanager
def _naming_fields(body: ChatRequest) -> Iterator[None]:
    """Let errors name the fields by which the client of a chat sent what is wrong."""
    try:
        yield
    except InvalidRequestError as error:
        sent = in_sent_fields(error, body.structured_outputs, max_tokens=body.max_tokens_field)
        if sent.param == "prompt":
            sent.param = "messages"
        raise sent from error


def _encode(body: ChatRequest, template: ChatTemplate | None, engine: Engine) -> list[int]:
    """Return the token ids of the prompt, before truncation."""
    is_truncated = body.truncate_prompt_tokens is not None
    check_text = partial(engine.input_processor.check_text, is_truncated=is_truncated)
    return encode_messages(
        body.messages,
        body,
        template,
        engine.tokenizer,
        check_text,
        add_special_tokens=body.add_special_tokens,
    )


def _chat_params(
    body: ChatRequest, template: ChatTemplate | None, engine: Engine
) -> SamplingParams:
    """Return the settings of the completion that a chat is once its messages are tokens."""
    limit = engine.input_processor.limits.max_logprobs
    if (body.top_logprobs or 0) > limit:
        raise InvalidRequestError(
            f"top_logprobs is {body.top_logprobs}, the limit is {limit} (max_logprobs)",
            param="top_logprobs",
        )
    assert template is not None  # the messages were rendered by it
    end = template.end_of_turn_id(engine.tokenizer)
    ends = [end] if end is not None and end < engine.model.vocab and not body.ignore_eos else []
    return sampling_params(
        body,
        engine,
        max_tokens=body.most_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        stop_token_ids=[*(body.stop_token_ids or ()), *ends],
    )


def chat_head(job: ChatCall) -> dict[str, Any]:
    """Return the fields before the choices of the whole answer."""
    return answer_head(job.id, "chat.completion", job.created, job.model)


def prompt_fields(body: ChatRequest, output: RequestOutput) -> ChatPrompt:
    """Return the fields about the prompt, null where the request does not ask for them."""
    has_logprobs = body.prompt_logprobs is not None
    return {
        "prompt_logprobs": prompt_logprobs(output.prompt_logprobs) if has_logprobs else None,
        "prompt_token_ids": output.prompt_token_ids if body.return_token_ids else None,
    }


def chat_body(job: ChatCall, output: RequestOutput) -> dict[str, Any]:
    """Return the whole answer."""
    choices = list(chat_choices(job, output))
    rest = {"choices": choices, "usage": completion_usage([output])}
    return {**chat_head(job), **rest, **prompt_fields(job.body, output)}


def chat_choices(job: ChatCall, output: RequestOutput) -> Iterator[ChatChoice]:
    """Yield the whole answer's choices."""
    for answer in output.outputs:
        logprobs = chat_logprobs(job, answer, job.token_texts())
        yield _choice(job.body, answer.index, answer, logprobs)


def _choice(
    body: ChatRequest, index: int, answer: CompletionOutput, logprobs: ChatLogprobs | None = None
) -> ChatChoice:
    message: AssistantMessage = {
        "role": body.role, "content": body.echoed_text + answer.text, "refusal": None,
        "annotations": None, "audio": None, "function_call": None, "reasoning": None,
    }  # fmt: skip
    return {
        "index": index, "message": message, "logprobs": logprobs,
        "finish_reason": answer.finish_reason, "stop_reason": answer.stop_reason,
        "token_ids": answer.token_ids if body.return_token_ids else None,
    }  # fmt: skip


def chat_events(
    job: ChatCall, engine: AsyncEngine, handle: RequestHandle, write: Write
) -> AsyncGenerator[bytes, None]:
    """Return the events of a streamed answer.

    The first chunk of a choice has the role and no text, as OpenAI and vLLM send it. It is sent
    together with the choice's first piece, so that clients measure the time to the first token.
    """
    begun: set[int] = set()
    texts: defaultdict[int, TokenTexts] = defaultdict(job.token_texts)

    def choices_of(_place: int, output: RequestOutput) -> list[ChatChunkChoice]:
        chunks: list[ChatChunkChoice] = []
        for answer in output.outputs:
            is_first = answer.index not in begun
            chunk = _chunk(job, answer, texts[answer.index], is_first=is_first)
            if chunk is None:
                continue
            if is_first:
                begun.add(answer.index)
                chunks.append(_role_chunk(job.body, answer.index))
            chunks.append(chunk)
        return chunks

    def first_fields(output: RequestOutput) -> dict[str, Any]:
        fields = prompt_fields(job.body, output)
        return {name: value for name, value in fields.items() if value is not None}

    head = {
        "id": job.id,
        "object": "chat.completion.chunk",
        "created": job.created,
        "model": job.model,
    }
    return answer_events(
        head,
        job.body.stream_options,
        [job.prepared],
        merge(engine, [handle]),
        choices_of,
        write,
        prompt_fields=first_fields,
    )


def _role_chunk(body: ChatRequest, index: int) -> ChatChunkChoice:
    """Return the first chunk of a choice."""
    return {
        "index": index, "delta": {"role": body.role, "content": ""}, "logprobs": None,
        "finish_reason": None, "stop_reason": None,
        "token_ids": [] if body.return_token_ids else None,
    }  # fmt: skip


def _chunk(
    job: ChatCall, answer: CompletionOutput, texts: TokenTexts, *, is_first: bool
) -> ChatChunkChoice | None:
    """Return a piece of an answer as a chunk's choice, or None if it has nothing to show."""
    body = job.body
    text = (body.echoed_text if is_first else "") + answer.text
    delta: ChatDelta = {"content": text} if text else {}
    logprobs = chat_logprobs(job, answer, texts)
    has_more = body.return_token_ids or (is_first and body.prompt_logprobs is not None)
    if not (delta or answer.finish_reason or has_more or (logprobs and logprobs["content"])):
        return None
    return {
        "index": answer.index, "delta": delta, "logprobs": logprobs,
        "finish_reason": answer.finish_reason, "stop_reason": answer.stop_reason,
        "token_ids": answer.token_ids if body.return_token_ids else None,
    }  # fmt: skip


def chat_logprobs(
    job: ChatCall, answer: CompletionOutput, texts: TokenTexts
) -> ChatLogprobs | None:
    """Return log-probabilities in the chat form: one entry a token, with its bytes, and the most likely ones beside it.

    `texts` has seen the tokens of the choice that came before.
    """
    if answer.logprobs is None:
        return None
    count = job.body.top_logprobs or 0
    content: list[ChatTokenLogprob] = []
    is_end = answer.finish_reason is not None
    for shown in push_all(texts, answer.token_ids, answer.logprobs, is_end=is_end):
        position = shown.logprobs or {}
        tops = [
            _entry(job.tokenizer, other, found, shown.texts[other])
            for other, found in likeliest(position, count)[:count]
        ]
        token_id = shown.token_id
        entry = _entry(job.tokenizer, token_id, position[token_id], shown.texts[token_id])
        content.append({**entry, "top_logprobs": tops})
    return {"content": content, "refusal": None}


def _entry(tokenizer: Tokenizer, token_id: int, found: Logprob, text: str) -> TokenLogprob:
    """Return an entry whose `bytes` are the token's own, also where it is a part of a character."""
    data = (
        tokenizer.token_bytes(token_id) if tokenizer.is_byte_level else found.decoded_token.encode()
    )
    return {"token": text, "logprob": finite(found.logprob), "bytes": list(data)}
