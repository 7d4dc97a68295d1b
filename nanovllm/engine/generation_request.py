"""GenerationRequest: prompts and settings, the same for all endpoints, run-batch and AsyncLLM."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from nanovllm.engine.beam_search import BeamSearchParams
from nanovllm.engine.input_processor import InputProcessor, PreparedRequest, naming_prompt
from nanovllm.engine.scheduling.request import Pooling
from nanovllm.errors import ContextLengthError, NanovllmError
from nanovllm.prompts import Prompt
from nanovllm.sampling_params import SamplingParams, TruncationSide


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolingParams:
    """Settings of an embedding.

    The last three are as in SamplingParams, except that truncation keeps the first tokens by
    default.
    """

    pooling: Pooling = "last"
    normalize: bool = True
    add_special_tokens: bool = True
    truncate_prompt_tokens: int | None = None
    truncation_side: TruncationSide = "right"


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One or several prompts with common settings.

    Attributes:
        prompts: the prompts.
        params: settings of sampling, beam search or embedding; their type selects the operation.
        n: number of beams to return from a beam search; None for all. Sampling uses `params.n`.
        request_id: part of the ids of the sequences, which are unique without it.
        priority: lower runs first.
        cache_salt: requests share cached prefixes only with requests of the same salt.
        client: identity of who sent the request, for fair scheduling; empty for one caller.
        must_fit: refuse a prompt whose tokens plus max_tokens exceed the context, instead of
            generating fewer tokens.
    """

    prompts: Sequence[Prompt]
    params: SamplingParams | BeamSearchParams | PoolingParams
    n: int | None = None
    request_id: str = "request"
    priority: int = 0
    cache_salt: str = ""
    client: str = ""
    must_fit: bool = False


def prepare_requests(
    request: GenerationRequest, input_processor: InputProcessor
) -> tuple[PreparedRequest, ...]:
    """Check and tokenize every prompt of a request that samples or embeds.

    Raises InvalidRequestError, which contains the index of the prompt if there are several.
    """
    prepared: list[PreparedRequest] = []
    try:
        for index, prompt in enumerate(request.prompts):
            with naming_prompt(index, len(request.prompts)):
                prepared.append(prepare_prompt(prompt, request, input_processor))
    except NanovllmError:
        prepared.clear()  # the traceback keeps `prepared`, whose grammars would go on compiling
        raise
    return tuple(prepared)


def prepare_prompt(
    prompt: Prompt, request: GenerationRequest, input_processor: InputProcessor
) -> PreparedRequest:
    """Check and tokenize one prompt under the settings of `request`; raises InvalidRequestError.

    With BeamSearchParams, the prompt is that of one beam, and generates one token.
    """
    params = request.params
    sequence_id = input_processor.new_request_id(request.request_id)
    placement: dict[str, Any] = {
        "priority": request.priority,
        "cache_salt": request.cache_salt,
        "client": request.client,
    }
    if isinstance(params, PoolingParams):
        return input_processor.embed(sequence_id, prompt, **asdict(params), **placement)
    if isinstance(params, BeamSearchParams):
        return input_processor.submit(sequence_id, prompt, params.step_params, **placement)
    check_length = partial(_check_context, params.max_tokens, input_processor.limits.max_model_len)
    return input_processor.submit(
        sequence_id,
        prompt,
        params,
        check_length=check_length if request.must_fit else None,
        **placement,
    )


def _check_context(max_tokens: int | None, max_model_len: int, prompt_tokens: int) -> None:
    total = prompt_tokens + (max_tokens or 0)
    if total > max_model_len:
        raise ContextLengthError(
            f"the prompt has {prompt_tokens} tokens and max_tokens is {max_tokens or 0}, together "
            f"{total}, more than the context of {max_model_len}; shorten the prompt or lower "
            "max_tokens",
            param="max_tokens",
        )
