"""POST /v1/chat/completions: messages through the checkpoint's chat template into a prompt, and its completion in OpenAI's chat form.

Below the template a chat is a completion of token ids: the same settings, the same checks, the same engine.
"""

import time
import uuid
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import Response

from nanovllm.engine.async_engine import AsyncEngine
from nanovllm.engine.chat_template import ChatTemplate
from nanovllm.engine.engine import Engine
from nanovllm.engine.intake import Submission
from nanovllm.engine.reader import Reader
from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.errors import CheckpointError, ContextLengthError, InvalidRequestError
from nanovllm.outputs import CompletionOutput, Logprob, RequestOutput
from nanovllm.server.answers import (
    AssistantMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatLogprobs,
    ChatTokenLogprob,
    TokenLogprob,
    Usage,
)
from nanovllm.server.body import read_body
from nanovllm.server.chat_schemas import ChatRequest
from nanovllm.server.completions import MINUS_INFINITY, check_context, sampling_params, usage
from nanovllm.server.deadlines import deadline_of
from nanovllm.server.errors import served_name
from nanovllm.server.grammars import wait_for_grammar
from nanovllm.server.openapi import answers, request_body
from nanovllm.server.request_log import record_of
from nanovllm.server.schemas import CompletionRequest, SamplingBody
from nanovllm.server.streaming import EventStream, Write, answer_events, merge
from nanovllm.server.structured import in_sent_fields
from nanovllm.server.whole import finish_all, whole_answer
from nanovllm.server.work import Work

_REMEDY = "send a prompt to /v1/completions instead, or give --chat-template FILE at the start"


@dataclass(frozen=True, slots=True)
class ChatJob:
    """A checked request, and what the answer needs to know of it."""

    id: str
    created: int
    model: str
    body: ChatRequest
    submission: Submission
    tokenizer: Tokenizer


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
        engine.check_room(body.n or 1)  # before time is spent on its text
        loaded = engine.engine
        job = await work.read(
            request,
            num_bytes,
            lambda: make_chat_job(body, template, loaded, model),
            is_guarded=True,
        )
        record.answer_id = job.id
        record.note_submissions([job.submission])
        record.held.append(engine.hold_logprobs([job.submission]))
        await wait_for_grammar(request, [job.submission], body.structured_outputs)
        if body.stream:
            (reader,) = engine.submit_all([job.submission], deadline=deadline_of(request))

            def leave() -> None:
                engine.leave([reader])
                record.note_answers([job.submission])

            return EventStream(
                chat_events(job, engine, reader, work.writer(request)),
                on_close=leave,
                stalled_after_s=stalled_client_s,
            )
        try:
            (output,) = await finish_all(engine, request, [job.submission])
        finally:
            record.note_answers([job.submission])
        return await whole_answer(
            chat_head(job),
            chat_choices(job, output),
            _usage(output),
            [output],
            work.writer(request),
            stalled_client_s,
        )


def make_chat_job(
    body: ChatRequest, template: ChatTemplate | None, engine: Engine, model: str
) -> ChatJob:
    """Render and check a body; raises InvalidRequestError before anything is queued, also where there is no template to render it by."""
    if template is None:
        raise InvalidRequestError(
            f"{model} has no chat template, so its messages cannot be put together; {_REMEDY}",
            param="messages",
        )
    messages = [message.model_dump(exclude_none=True) for message in body.messages]
    job_id = f"chatcmpl-{body.request_id or uuid.uuid4().hex}"
    try:
        prompt = template.encode(messages, engine.tokenizer, engine.intake.check_text)
        params = sampling_params(_as_completion(body, prompt, template, engine), engine)
        submission = engine.intake.submit(
            engine.intake.new_request_id(job_id),
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
    except CheckpointError as error:
        raise InvalidRequestError(f"{error}; {_REMEDY}", param="messages") from error
    except InvalidRequestError as error:
        sent = in_sent_fields(error, body.structured_outputs, max_tokens=body.max_tokens_field)
        if sent.param == "prompt":
            sent.param = "messages"
        raise sent from error
    return ChatJob(job_id, int(time.time()), model, body, submission, engine.tokenizer)


def _as_completion(
    body: ChatRequest, prompt: list[int], template: ChatTemplate, engine: Engine
) -> CompletionRequest:
    """The completion that a chat is once its messages are tokens; every value has been checked."""
    limits = engine.intake.limits
    if len(prompt) >= limits.max_model_len:
        raise ContextLengthError(
            f"the messages have {len(prompt)} tokens, which leaves no room for an answer in a context of {limits.max_model_len}; shorten them",
            param="messages",
        )
    if (body.top_logprobs or 0) > limits.max_logprobs:
        raise InvalidRequestError(
            f"top_logprobs is {body.top_logprobs}, the limit is {limits.max_logprobs} (max_logprobs)",
            param="top_logprobs",
        )
    room = min(limits.max_model_len - len(prompt), max(limits.cache_tokens - len(prompt) + 1, 1))
    shared = SamplingBody.model_fields.keys() - {"stop_token_ids"}
    end = template.end_of_turn_id(engine.tokenizer)
    ends = [end] if end is not None and end < engine.model.vocab and not body.ignore_eos else []
    return CompletionRequest.model_construct(
        prompt=prompt,
        max_tokens=room if body.most_tokens is None else body.most_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        stop_token_ids=[*(body.stop_token_ids or ()), *ends],
        **{name: getattr(body, name) for name in shared},
    )


def chat_head(job: ChatJob) -> dict[str, Any]:
    """Return the fields before the choices of the whole answer."""
    return {
        "id": job.id, "object": "chat.completion", "created": job.created, "model": job.model,
        "service_tier": None, "system_fingerprint": None,
        "prompt_logprobs": None, "prompt_token_ids": None,
    }  # fmt: skip


def chat_body(job: ChatJob, output: RequestOutput) -> ChatCompletion:
    """Return the whole answer."""
    return {
        "id": job.id, "object": "chat.completion", "created": job.created, "model": job.model,
        "service_tier": None, "system_fingerprint": None,
        "prompt_logprobs": None, "prompt_token_ids": None,
        "choices": list(chat_choices(job, output)), "usage": _usage(output),
    }  # fmt: skip


def _usage(output: RequestOutput) -> Usage:
    return usage(
        len(output.prompt_token_ids),
        sum(len(answer.token_ids) for answer in output.outputs),
        output.num_cached_tokens,
    )


def chat_choices(job: ChatJob, output: RequestOutput) -> Iterator[ChatChoice]:
    """Yield the whole answer's choices."""
    for answer in output.outputs:
        message: AssistantMessage = {
            "role": "assistant", "content": answer.text, "refusal": None, "annotations": None,
            "audio": None, "function_call": None, "reasoning": None,
        }  # fmt: skip
        yield {
            "index": answer.index, "message": message, "logprobs": chat_logprobs(job, answer),
            "finish_reason": answer.finish_reason, "stop_reason": answer.stop_reason,
            "token_ids": None,
        }  # fmt: skip


def chat_events(
    job: ChatJob, engine: AsyncEngine, reader: Reader, write: Write
) -> AsyncGenerator[bytes, None]:
    """Return the events of a streamed answer.

    The first chunk of a choice has the role and no text, as OpenAI and vLLM send it. It is sent
    together with the choice's first piece, so that clients measure the time to the first token.
    """
    begun: set[int] = set()

    def choices_of(_place: int, output: RequestOutput) -> list[ChatChunkChoice]:
        chunks: list[ChatChunkChoice] = []
        for answer in output.outputs:
            chunk = _chunk(job, answer)
            if chunk is None:
                continue
            if answer.index not in begun:
                begun.add(answer.index)
                chunks.append(_role_chunk(answer.index))
            chunks.append(chunk)
        return chunks

    head = {
        "id": job.id,
        "object": "chat.completion.chunk",
        "created": job.created,
        "model": job.model,
    }
    return answer_events(
        head, job.body.stream_options, [job.submission], merge(engine, [reader]), choices_of, write
    )


def _role_chunk(index: int) -> ChatChunkChoice:
    """Return the first chunk of a choice."""
    return {
        "index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None,
        "finish_reason": None, "stop_reason": None, "token_ids": None,
    }  # fmt: skip


def _chunk(job: ChatJob, answer: CompletionOutput) -> ChatChunkChoice | None:
    """Return a piece of an answer as a chunk's choice, or None if it has nothing to show."""
    delta: ChatDelta = {"content": answer.text} if answer.text else {}
    logprobs = chat_logprobs(job, answer)
    if not delta and not answer.finish_reason and not (logprobs and logprobs["content"]):
        return None
    return {
        "index": answer.index, "delta": delta, "logprobs": logprobs,
        "finish_reason": answer.finish_reason, "stop_reason": answer.stop_reason,
        "token_ids": None,
    }  # fmt: skip


def chat_logprobs(job: ChatJob, answer: CompletionOutput) -> ChatLogprobs | None:
    """Log-probabilities in the chat form: one entry a token, with its bytes, and the most likely ones beside it."""
    if answer.logprobs is None:
        return None
    count = job.body.top_logprobs or 0
    content: list[ChatTokenLogprob] = []
    for token_id, position in zip(answer.token_ids, answer.logprobs, strict=True):
        likely = sorted(
            (item for item in position.items() if item[1].rank <= count),
            key=lambda item: item[1].rank,
        )
        tops = [_entry(job.tokenizer, other, found) for other, found in likely[:count]]
        content.append(
            {**_entry(job.tokenizer, token_id, position[token_id]), "top_logprobs": tops}
        )
    return {"content": content, "refusal": None}


def _entry(tokenizer: Tokenizer, token_id: int, found: Logprob) -> TokenLogprob:
    data = (
        tokenizer.token_bytes(token_id) if tokenizer.is_byte_level else found.decoded_token.encode()
    )
    return {
        "token": found.decoded_token,
        "logprob": max(MINUS_INFINITY, found.logprob),
        "bytes": list(data),
    }
