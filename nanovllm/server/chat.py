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

from fastapi import FastAPI, Request
from starlette.responses import Response

from nanovllm.engine.async_engine import AsyncEngine
from nanovllm.engine.chat_template import ChatTemplate
from nanovllm.engine.engine import Engine
from nanovllm.engine.intake import Prompt, Submission
from nanovllm.engine.reader import Reader
from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.errors import ContextLengthError, InvalidRequestError
from nanovllm.outputs import CompletionOutput, Logprob, RequestOutput
from nanovllm.sampling_params import SamplingParams
from nanovllm.server.answers import (
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
from nanovllm.server.beams import BeamForm, beam_search_answer
from nanovllm.server.body import read_body
from nanovllm.server.chat_prompt import encode_messages
from nanovllm.server.chat_schemas import ChatRequest
from nanovllm.server.completions import (
    check_context,
    completion_usage,
    refuse_beams,
    sampling_params,
)
from nanovllm.server.deadlines import deadline_of
from nanovllm.server.errors import served_name
from nanovllm.server.grammars import wait_for_grammar
from nanovllm.server.logprobs import TokenTexts, finite, likeliest, prompt_logprobs, push_all
from nanovllm.server.openapi import answers, request_body
from nanovllm.server.request_log import record_of
from nanovllm.server.streaming import EventStream, Write, answer_events, merge
from nanovllm.server.structured import blamed_field
from nanovllm.server.whole import finish_all, whole_answer
from nanovllm.server.work import Work


@dataclass(frozen=True, slots=True)
class ChatJob:
    """A checked request, and what the answer needs to know of it."""

    id: str
    created: int
    model: str
    body: ChatRequest
    submission: Submission
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
        head = {
            "id": job.id,
            "object": "chat.completion",
            "created": job.created,
            "model": job.model,
        }
        return await whole_answer(
            head,
            chat_choices(job, output),
            completion_usage([output]),
            [output],
            work.writer(request),
            stalled_client_s,
            prompt_fields=lambda: prompt_fields(body, output),
        )


def make_chat_job(
    body: ChatRequest, template: ChatTemplate | None, engine: Engine, model: str
) -> ChatJob:
    """Render and check a body; raises InvalidRequestError before anything is queued, also where there is no template to render it by."""
    refuse_beams(body)
    job_id = f"chatcmpl-{body.request_id or uuid.uuid4().hex}"
    with _naming_fields(body):
        prompt = _encode(body, template, engine)
        params = _chat_params(body, template, engine)
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
    return ChatJob(job_id, int(time.time()), model, body, submission, engine.tokenizer)


def chat_beams(body: ChatRequest, template: ChatTemplate | None, engine: Engine) -> BeamForm:
    """Return what a chat has of its own in a beam search."""

    def read() -> tuple[list[Prompt], int]:
        with _naming_fields(body):
            prompt = _encode(body, template, engine)
            limits = engine.intake.limits
            room = min(limits.max_model_len, limits.cache_tokens) - len(prompt)
            if room < 1:
                raise ContextLengthError(
                    f"the messages have {len(prompt)} tokens, which leaves no room for an answer; shorten them",
                    param="messages",
                )
            return [prompt], room if body.most_tokens is None else body.most_tokens

    def choice(index: int, answer: CompletionOutput) -> ChatChoice:
        return {
            "index": index, "message": {"role": body.role, "content": answer.text, "refusal": None},
            "logprobs": None, "finish_reason": answer.finish_reason, "stop_reason": None,
        }  # fmt: skip

    return BeamForm(
        "chatcmpl",
        "chat.completion",
        read,
        choice,
        is_guarded=True,
        max_tokens_field=body.max_tokens_field,
    )


@contextmanager
def _naming_fields(body: ChatRequest) -> Iterator[None]:
    """Let errors name the fields by which the client of a chat sent what is wrong."""
    try:
        yield
    except InvalidRequestError as error:
        param = {"prompt": "messages", "max_tokens": body.max_tokens_field}.get(
            error.param or ""
        ) or blamed_field(error.param, body.structured_outputs)
        raise type(error)(str(error), param=param) from error


def _encode(body: ChatRequest, template: ChatTemplate | None, engine: Engine) -> list[int]:
    """Return the token ids of the prompt, before truncation."""
    is_truncated = body.truncate_prompt_tokens is not None
    check_text = partial(engine.intake.check_text, is_truncated=is_truncated)
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
    limit = engine.intake.limits.max_logprobs
    if (body.top_logprobs or 0) > limit:
        raise InvalidRequestError(
            f"top_logprobs is {body.top_logprobs}, the limit is {limit} (max_logprobs)",
            param="top_logprobs",
        )
    assert template is not None  # the messages were rendered by it
    end = engine.tokenizer.special_tokens.get(
        template.special_tokens["eos_token"]
    )  # templates end a turn with it, whatever config.json says
    ends = [end] if end is not None and end < engine.model.vocab and not body.ignore_eos else []
    return sampling_params(
        body,
        engine,
        max_tokens=body.most_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        stop_token_ids=[*(body.stop_token_ids or ()), *ends],
    )


def prompt_fields(body: ChatRequest, output: RequestOutput) -> ChatPrompt:
    """Return the fields about the prompt that the request asks for."""
    fields: ChatPrompt = {}
    if body.prompt_logprobs is not None:
        fields["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs)
    if body.return_token_ids:
        fields["prompt_token_ids"] = output.prompt_token_ids
    return fields


def chat_body(job: ChatJob, output: RequestOutput) -> ChatCompletion:
    """The whole answer."""
    return {
        "id": job.id, "object": "chat.completion", "created": job.created, "model": job.model,
        "choices": list(chat_choices(job, output)), "usage": completion_usage([output]),
        **prompt_fields(job.body, output),
    }  # fmt: skip


def chat_choices(job: ChatJob, output: RequestOutput) -> Iterator[ChatChoice]:
    """The whole answer's choices, one by one."""
    body = job.body
    for answer in output.outputs:
        text = body.echoed_text + answer.text
        choice: ChatChoice = {
            "index": answer.index, "message": {"role": body.role, "content": text, "refusal": None},
            "logprobs": chat_logprobs(job, answer, job.token_texts()), "finish_reason": answer.finish_reason, "stop_reason": answer.stop_reason,
        }  # fmt: skip
        if body.return_token_ids:
            choice["token_ids"] = answer.token_ids
        yield choice


def chat_events(
    job: ChatJob, engine: AsyncEngine, reader: Reader, write: Write
) -> AsyncGenerator[bytes, None]:
    """The events of a streamed answer."""
    begun: set[int] = set()
    texts: defaultdict[int, TokenTexts] = defaultdict(job.token_texts)

    def choices_of(_place: int, output: RequestOutput) -> list[ChatChunkChoice]:
        return [
            chunk
            for answer in output.outputs
            if (chunk := _chunk(job, answer, begun, texts[answer.index])) is not None
        ]

    head = {
        "id": job.id,
        "object": "chat.completion.chunk",
        "created": job.created,
        "model": job.model,
    }
    return answer_events(
        head,
        job.body.stream_options,
        [job.submission],
        merge(engine, [reader]),
        choices_of,
        write,
        prompt_fields=lambda output: prompt_fields(job.body, output),
    )


def _chunk(
    job: ChatJob, answer: CompletionOutput, begun: set[int], texts: TokenTexts
) -> ChatChunkChoice | None:
    """A piece of an answer as a chunk's choice, the first with the role; None where it has nothing to show."""
    body, is_first = job.body, answer.index not in begun
    text = (body.echoed_text if is_first else "") + answer.text
    delta: ChatDelta = {"content": text} if text else {}
    logprobs = chat_logprobs(job, answer, texts)
    has_more = body.return_token_ids or (is_first and body.prompt_logprobs is not None)
    if not (delta or answer.finish_reason or has_more or (logprobs and logprobs["content"])):
        return None
    if is_first:
        begun.add(answer.index)
        delta = {"role": body.role, "content": text}
    chunk: ChatChunkChoice = {
        "index": answer.index, "delta": delta, "logprobs": logprobs, "finish_reason": answer.finish_reason, "stop_reason": answer.stop_reason,
    }  # fmt: skip
    if body.return_token_ids:
        chunk["token_ids"] = answer.token_ids
    return chunk


def chat_logprobs(job: ChatJob, answer: CompletionOutput, texts: TokenTexts) -> ChatLogprobs | None:
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
