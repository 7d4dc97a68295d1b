"""Beam search over HTTP: `use_beam_search` of completions and chats.

The search itself is engine/beam_search.py; its beams are requests of one token. A request may have
many prompts with several beams each, and what they compute between two tokens runs on a worker
thread.
"""

from starlette.requests import Request

from nanovllm.engine.admission import RequestSize
from nanovllm.engine.async_engine import AsyncEngine
from nanovllm.engine.beam_search import BeamSearches
from nanovllm.engine.generation_request import BeamSearchParams
from nanovllm.errors import InvalidRequestError
from nanovllm.outputs import RequestOutput
from nanovllm.sampling_params import check_best_of
from nanovllm.server.http.deadlines import deadline_of
from nanovllm.server.http.event_stream import Write, unless_disconnected
from nanovllm.server.openai.chat_schemas import UnusedChatFields
from nanovllm.server.openai.schemas import SamplingBody

_BEAM_FIELDS = frozenset(
    {
        *("model", "prompt", "max_tokens", "n", "best_of", "use_beam_search", "length_penalty"),
        *("ignore_eos", "priority", "cache_salt", "request_id", "suffix"),
        *("messages", "max_completion_tokens", "add_generation_prompt", "continue_final_message"),
        *UnusedChatFields.model_fields,
    }
)
"""Fields that apply to a beam search; the others apply to sampling, or to streams."""


def check_beam_fields(body: SamplingBody) -> None:
    """Raise InvalidRequestError for a field that does not apply to a beam search."""
    for name in sorted(body.model_fields_set - _BEAM_FIELDS):
        value = getattr(body, name)
        is_default = value == type(body).model_fields[name].default
        if not is_default and (name, value) != ("temperature", 0):
            raise InvalidRequestError(
                f"{name} cannot be combined with use_beam_search; leave one of them out", param=name
            )
    check_best_of(body.best_of, body.n or 1)


def beam_search_params(body: SamplingBody, max_tokens: int) -> BeamSearchParams:
    """Return the settings of a beam search; raises InvalidRequestError."""
    return BeamSearchParams(
        beam_width=body.num_candidates,
        max_tokens=max_tokens,
        ignore_eos=body.ignore_eos,
        length_penalty=1.0 if body.length_penalty is None else body.length_penalty,
    )


async def run_searches(
    searches: BeamSearches, async_engine: AsyncEngine, request: Request, run: Write
) -> list[RequestOutput]:
    """Run the beam searches of a request, and return their outputs.

    `run` runs a call on a worker thread. Raises ClientDisconnectedError and what the engine raises.
    """
    # The room of the whole search is reserved first: it must not be refused half way.
    num_beams = searches.num_beams
    tokens = searches.num_prompt_tokens + num_beams * searches.params.max_tokens
    room = async_engine.admission.reserve([RequestSize(num_beams, tokens)], client=searches.client)
    rounds = searches.rounds(async_engine.engine.config.max_num_seqs)
    try:
        while (beams := await run(lambda: next(rounds, None))) is not None:
            deadline = deadline_of(request)
            with async_engine.generate(beams, deadline=deadline, reservation=room) as handle:
                await unless_disconnected(request, handle.wait())
    finally:
        room.release()
    outputs: list[RequestOutput] = await run(searches.outputs)
    return outputs
