"""A PromptRequest for tests, and updates as from steps of the engine."""

from collections.abc import Iterable, Sequence

from nanovllm.engine.prompt_request import PromptRequest
from nanovllm.engine.scheduling.request import FinishReason, Request, RequestTimes
from nanovllm.engine.scheduling.step_plan import SequenceUpdate
from nanovllm.engine.sequence_output import SequenceOutput
from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.errors import NanovllmError
from nanovllm.model.sampling import TokenLogprobs
from nanovllm.outputs import CompletionOutput, RequestMetrics
from nanovllm.sampling_params import SamplingParams
from tests.support.checkpoints import MERGES

END = 256 + len(MERGES)
PROMPT = [1, 2, 3]
METRICS = RequestMetrics(arrival_s=1.0, first_scheduled_s=2.0, first_token_s=3.0, finished_s=4.0)


def make_choice(choice: int, params: SamplingParams) -> Request:
    return Request(
        request_id=f"r-{choice}",
        prompt_token_ids=tuple(PROMPT),
        sampling=params,
        max_new_tokens=params.max_tokens or 1,
        seed=0,
        choice_index=choice,
        times=RequestTimes(arrival_s=1.0, first_scheduled_s=2.0, first_token_s=3.0),
    )


def make(tokenizer: Tokenizer, **settings: object) -> PromptRequest:
    params = SamplingParams(**settings)  # type: ignore[arg-type]
    choices = range(params.num_sequences)
    requests = [make_choice(choice, params) for choice in choices]
    outputs = [SequenceOutput.begin(params, tokenizer) for _ in choices]
    return PromptRequest("r", "prompt", requests, params, outputs, tokenizer)


def update(
    token_id: int | None,
    finish: FinishReason | None = None,
    *,
    choice: int = 0,
    logprobs: TokenLogprobs | None = None,
    prompt_logprobs: Iterable[TokenLogprobs] = (),
    stop_reason: int | None = None,
    error: NanovllmError | None = None,
) -> SequenceUpdate:
    return SequenceUpdate(
        make_choice(choice, SamplingParams()),
        () if token_id is None else (token_id,),
        () if logprobs is None else (logprobs,),
        tuple(prompt_logprobs),
        finish_reason=finish,
        stop_reason=stop_reason,
        error=error,
        time_s=4.0,
    )


def feed(
    prompt: PromptRequest,
    tokenizer: Tokenizer,
    text: str,
    finish: FinishReason | None = None,
    *,
    choice: int = 0,
) -> list[bool]:
    """Add each byte of `text` as a token, the last with `finish`; return all results."""
    byte_of = {tokenizer.token_bytes(token_id): token_id for token_id in range(256)}
    tokens = [byte_of[bytes([byte])] for byte in text.encode()]
    reasons = [None] * (len(tokens) - 1) + [finish]
    return [
        prompt.add_update(update(token, reason, choice=choice))
        for token, reason in zip(tokens, reasons, strict=True)
    ]


def answer(prompt: PromptRequest, choice: int = 0) -> CompletionOutput:
    return prompt.output().outputs[choice]


def positions(token_ids: Sequence[int]) -> list[TokenLogprobs]:
    return [TokenLogprobs([token_id], [-0.5], 1) for token_id in token_ids]
