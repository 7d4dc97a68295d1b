"""`use_beam_search` of /v1/completions: the search of engine/beam_search.py, whose beams run among everybody's requests."""

import time
import uuid

from starlette.requests import Request

from nanovllm.engine.async_engine import AsyncEngine
from nanovllm.engine.beam_search import BeamSearch, BeamSearchParams, begin_searches, only_position
from nanovllm.engine.engine import Engine
from nanovllm.engine.intake import Submission
from nanovllm.errors import InvalidRequestError
from nanovllm.sampling_params import check_best_of
from nanovllm.server.answers import Completion, CompletionChoice
from nanovllm.server.completions import usage
from nanovllm.server.request_log import record_of
from nanovllm.server.schemas import DEFAULT_MAX_TOKENS, CompletionRequest
from nanovllm.server.whole import finish_all
from nanovllm.server.work import Work

_MEANT = frozenset(
    {
        *("model", "prompt", "max_tokens", "n", "best_of", "use_beam_search", "length_penalty"),
        *("ignore_eos", "priority", "cache_salt", "request_id", "user"),
    }
)
"""Fields that say something about a search; the others are about single tokens, or about answers as they grow."""


async def beam_search_body(
    body: CompletionRequest,
    engine: AsyncEngine,
    request: Request,
    model: str,
    work: Work,
    num_bytes: int,
) -> Completion:
    """The whole answer; raises InvalidRequestError, ClientGoneError and what the engine raises."""
    loaded = engine.engine
    record = record_of(request)
    record.answer_id = f"cmpl-{body.request_id or uuid.uuid4().hex}"
    searches = await work.read(request, num_bytes, lambda: _begin(body, loaded))
    prompt_tokens = record.prompt_tokens = sum(len(search.prompt_token_ids) for search in searches)
    record.completion_tokens = 0  # a search that does not come to its end has given nothing
    tokens = prompt_tokens + sum(
        search.params.beam_width * search.params.max_tokens for search in searches
    )
    room = engine.reserve(
        len(searches) * body.num_candidates, tokens
    )  # for the whole search, which must not be refused half way
    try:
        while going := [search for search in searches if not search.is_finished]:
            asked = [_continue(search, body, loaded) for search in going]
            outputs = iter(
                await finish_all(
                    engine,
                    request,
                    [submission for beams in asked for submission in beams],
                    within=room,
                )
            )
            for search, beams in zip(going, asked, strict=True):
                search.take([only_position(next(outputs)) for _ in beams])
    finally:
        room.release()
    count = body.n or 1
    answers = [
        answer
        for search in searches
        for answer in search.output("", loaded.tokenizer, count).outputs
    ]
    choices: list[CompletionChoice] = [
        {
            "index": index,
            "text": answer.text,
            "logprobs": None,
            "finish_reason": answer.finish_reason,
            "stop_reason": None,
        }
        for index, answer in enumerate(answers)
    ]
    record.completion_tokens = sum(len(answer.token_ids) for answer in answers)
    return {
        "id": record.answer_id, "object": "text_completion", "created": int(time.time()), "model": model,
        "choices": choices, "usage": usage(prompt_tokens, record.completion_tokens, 0),
    }  # fmt: skip


def _begin(body: CompletionRequest, engine: Engine) -> list[BeamSearch]:
    for name in sorted(body.model_fields_set - _MEANT):
        if getattr(body, name) != type(body).model_fields[name].default and (
            name,
            getattr(body, name),
        ) != ("temperature", 0):
            raise InvalidRequestError(
                f"{name} cannot be combined with use_beam_search; leave one of them out", param=name
            )
    check_best_of(body.best_of, body.n or 1)
    params = BeamSearchParams(
        beam_width=body.num_candidates,
        max_tokens=DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens,
        ignore_eos=body.ignore_eos,
        length_penalty=1.0 if body.length_penalty is None else body.length_penalty,
    )
    return begin_searches(body.prompts, params, engine.intake)


def _continue(search: BeamSearch, body: CompletionRequest, engine: Engine) -> list[Submission]:
    """A request of one token for each beam."""
    return [
        engine.intake.submit(
            f"beam-{uuid.uuid4().hex}",
            ids,
            search.params.step_params,
            priority=body.priority,
            cache_salt=body.cache_salt or "",
        )
        for ids in search.prompts()
    ]
