"""GenerationRequest: prompts and settings, the same for endpoints, run-batch, LLM and AsyncLLM."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, TypeAlias

from annotated_types import Interval

from nanovllm.checked_fields import check_fields
from nanovllm.engine.scheduling.request import Pooling
from nanovllm.prompts import Prompt
from nanovllm.sampling_params import SamplingParams, TruncatedLength, TruncationSide

LengthPenalty: TypeAlias = Annotated[float, Interval(ge=-10, le=10)]


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolingParams:
    """Settings of an embedding.

    An invalid setting raises InvalidRequestError with the value and the limit.

    Attributes:
        pooling: "last" for the state of the last token, "mean" for the mean of all.
        normalize: scale to length 1.
        add_special_tokens: as in SamplingParams.
        truncate_prompt_tokens: as in SamplingParams.
        truncation_side: as in SamplingParams, except that truncation keeps the first tokens by
            default.
    """

    pooling: Pooling = "last"
    normalize: bool = True
    add_special_tokens: bool = True
    truncate_prompt_tokens: TruncatedLength | None = None
    truncation_side: TruncationSide = "right"

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def prompt_params(self) -> SamplingParams:
        """Settings of the request that computes the prompt."""
        return SamplingParams(
            max_tokens=0,
            add_special_tokens=self.add_special_tokens,
            truncate_prompt_tokens=self.truncate_prompt_tokens,
            truncation_side=self.truncation_side,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class BeamSearchParams:
    """Settings of a beam search.

    An invalid setting raises InvalidRequestError with the value and the limit.

    Attributes:
        beam_width: number of beams.
        max_tokens: maximum number of tokens to generate.
        ignore_eos: treat the end-of-text token like any other.
        length_penalty: exponent of the length by which a score is divided. Above 1 favours long
            outputs, below 1 short ones.
    """

    beam_width: Annotated[int, Interval(ge=1)]
    max_tokens: Annotated[int, Interval(ge=1)] = 16
    ignore_eos: bool = False
    length_penalty: LengthPenalty = 1.0

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def step_params(self) -> SamplingParams:
        """Settings of the request that extends a beam."""
        return SamplingParams(
            max_tokens=1,
            temperature=0.0,
            logprobs=2 * self.beam_width,
            ignore_eos=True,
            skip_special_tokens=False,
        )


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
