"""`use_beam_search` of completions and chats: the search of engine/beam_search.py, whose beams run among everybody's requests.

A request may have many prompts with several beams each. Only as many searches go on at once as fill a step, so that neither the
queue nor the event loop gets all of them at once; what they need between two tokens is computed beside the event loop.
"""

import json
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from typing_extensions import TypedDict

from nanovllm.engine.async_engine import AsyncEngine
from nanovllm.engine.beam_search import BeamSearch, BeamSearchParams, begin_searches, only_position
from nanovllm.engine.engine import Engine
from nanovllm.engine.input_processor import PreparedRequest
from nanovllm.errors import InvalidRequestError
from nanovllm.outputs import CompletionOutput, RequestOutput
from nanovllm.prompts import Prompt
from nanovllm.sampling_params import check_best_of
from nanovllm.server.http.request_log import record_of
from nanovllm.server.http.work import Work
from nanovllm.server.openai.chat_schemas import UnusedChatFields
from nanovllm.server.openai.completions import answer_head, usage
from nanovllm.server.openai.response_types import CompletionChoice, Usage
from nanovllm.server.openai.responses import finish_all
from nanovllm.server.openai.schemas import DEFAULT_MAX_TOKENS, CompletionRequest, SamplingBody

_MEANT = frozenset(
    {
        *("model", "prompt", "max_tokens", "n", "best_of", "use_beam_search", "length_penalty"),
        *("ignore_eos", "priority", "cache_salt", "request_id"),
        *("messages", "max_completion_tokens", "add_generation_prompt", "continue_final_message"),
        *UnusedChatFields.model_fields,
    }
)
"""Fields that say something about a search; the others are about single tokens, or about answers as they grow."""


@dataclass(frozen=True, slots=True)
class BeamForm:
    """What an endpoint has of its own in a search.

    Attributes:
        id_prefix: begins the `id` of the answer.
        kind: the type of the answer.
        read: makes the prompts and max_tokens, beside the event loop.
        choice: makes a choice of its index and its answer.
        is_guarded: `read` waits for a process with limits of its own.
        max_tokens_field: the field by which the client sent max_tokens.
        null_fields: the fields beside the choices that a search leaves null.
    """

    id_prefix: str
    kind: str
    read: Callable[[], tuple[Sequence[Prompt], int]]
    choice: Callable[[int, CompletionOutput], Mapping[str, Any]]
    is_guarded: bool = False
    max_tokens_field: str = "max_tokens"
    null_fields: Sequence[str] = ()


def completion_beams(body: CompletionRequest) -> BeamForm:
    """Return what a completion has of its own in a search."""

    def read() -> tuple[Sequence[Prompt], int]:
        return body.prompts, DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens

    def choice(index: int, answer: CompletionOutput) -> CompletionChoice:
        return {
            "index": index, "text": answer.text, "logprobs": None,
            "finish_reason": answer.finish_reason, "stop_reason": None,
            "prompt_logprobs": None, "prompt_token_ids": None, "token_ids": None,
        }  # fmt: skip

    return BeamForm("cmpl", "text_completion", read, choice)


async def beam_search_answer(
    body: SamplingBody,
    form: BeamForm,
    engine: AsyncEngine,
    request: Request,
    model: str,
    work: Work,
    num_bytes: int,
) -> Response:
    """The whole answer; raises InvalidRequestError, ClientDisconnectedError and what the engine raises."""
    loaded = engine.engine
    record = record_of(request)
    record.answer_id = f"{form.id_prefix}-{body.request_id or uuid.uuid4().hex}"
    searches = await work.read(
        request, num_bytes, lambda: _begin(body, form, loaded), is_guarded=form.is_guarded
    )
    prompt_tokens = record.prompt_tokens = sum(len(search.prompt_token_ids) for search in searches)
    record.completion_tokens = 0  # a search that does not come to its end has given nothing
    tokens = prompt_tokens + sum(
        search.params.beam_width * search.params.max_tokens for search in searches
    )
    room = engine.reserve(
        len(searches) * body.num_candidates, tokens
    )  # for the whole search, which must not be refused half way
    compute = work.writer(request)
    at_once = max(loaded.config.max_num_seqs // body.num_candidates, 1)
    try:
        for start in range(0, len(searches), at_once):
            group = searches[start : start + at_once]
            while going := [search for search in group if not search.is_finished]:
                beams = await compute(partial(_continue, going, body, loaded))
                outputs = await finish_all(engine, request, beams, within=room)
                await compute(partial(_take, going, outputs))
    finally:
        room.release()
    answer = await compute(lambda: _answer(searches, body.n or 1, form, loaded))
    record.completion_tokens = answer["usage"]["completion_tokens"]
    head = answer_head(record.answer_id, form.kind, int(time.time()), model)
    whole = {**head, **answer, **dict.fromkeys(form.null_fields)}
    content = await compute(
        lambda: json.dumps(whole, ensure_ascii=False, separators=(",", ":")).encode()
    )
    return Response(content, media_type="application/json")


class _Answer(TypedDict):
    """The fields of an answer that the searches give."""

    choices: list[Mapping[str, Any]]
    usage: Usage


def _answer(searches: Sequence[BeamSearch], count: int, form: BeamForm, engine: Engine) -> _Answer:
    """The best `count` answers of each search."""
    answers = [
        answer
        for search in searches
        for answer in search.output("", engine.tokenizer, count).outputs
    ]
    choices = [form.choice(index, answer) for index, answer in enumerate(answers)]
    prompt_tokens = sum(len(search.prompt_token_ids) for search in searches)
    completion_tokens = sum(len(answer.token_ids) for answer in answers)
    return {"choices": choices, "usage": usage(prompt_tokens, completion_tokens, 0)}


def _begin(body: SamplingBody, form: BeamForm, engine: Engine) -> list[BeamSearch]:
    for name in sorted(body.model_fields_set - _MEANT):
        if getattr(body, name) != type(body).model_fields[name].default and (
            name,
            getattr(body, name),
        ) != ("temperature", 0):
            raise InvalidRequestError(
                f"{name} cannot be combined with use_beam_search; leave one of them out", param=name
            )
    check_best_of(body.best_of, body.n or 1)
    prompts, max_tokens = form.read()
    params = BeamSearchParams(
        beam_width=body.num_candidates,
        max_tokens=max_tokens,
        ignore_eos=body.ignore_eos,
        length_penalty=1.0 if body.length_penalty is None else body.length_penalty,
    )
    width_field = "n" if body.best_of is None else "best_of"
    return begin_searches(
        prompts,
        params,
        engine.input_processor,
        width_field=width_field,
        max_tokens_field=form.max_tokens_field,
    )


def _continue(
    searches: Sequence[BeamSearch], body: SamplingBody, engine: Engine
) -> list[PreparedRequest]:
    """A request of one token for each beam of each search."""
    return [
        engine.input_processor.submit(
            engine.input_processor.new_request_id("beam"),
            ids,
            search.params.step_params,
            priority=body.priority,
            cache_salt=body.cache_salt or "",
        )
        for search in searches
        for ids in search.prompts()
    ]


def _take(searches: Sequence[BeamSearch], outputs: Sequence[RequestOutput]) -> None:
    """Let the searches go on by the tokens of their beams, which come in the order of `_continue`."""
    found = iter(outputs)
    for search in searches:
        search.advance([only_position(next(found)) for _ in range(search.num_beams)])
