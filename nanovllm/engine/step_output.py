"""StepOutput: what a step has changed, as values that other threads may read."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nanovllm.engine.metrics import StepStats
from nanovllm.engine.scheduling.request import FinishReason
from nanovllm.errors import NanovllmError
from nanovllm.model.sampling import TokenLogprobs
from nanovllm.outputs import RequestMetrics


@dataclass(frozen=True, slots=True)
class SequenceUpdate:
    """The changes of one sequence in a step.

    Attributes:
        token_ids: new tokens, currently at most one.
        logprobs: an entry for each new token, or empty if none are requested.
        metrics: times of the sequence; `finished_s` is None unless the engine has ended it.
        error: the exception to raise if `finish_reason` is ERROR.
        hidden: final hidden states [tokens, d_model] of a prompt that is embedded.
        time_s: end of the step.
        inter_token_latency_s: time since the previous token; None for the first token, and if there
            is no new one.
        num_preemptions: number of preemptions of the sequence.
        num_reused_tokens: prompt tokens that were cached, or computed by another choice.
    """

    request_id: str
    choice_index: int
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    num_cached_tokens: int = 0
    metrics: RequestMetrics | None = None
    error: NanovllmError | None = None
    hidden: npt.NDArray[np.float32] | None = None
    time_s: float = 0.0
    inter_token_latency_s: float | None = None
    num_preemptions: int = 0
    num_reused_tokens: int = 0


@dataclass(frozen=True, slots=True)
class StepOutput:
    """The output of a step; `fault` is the exception that ended its requests, if it raised one."""

    updates: tuple[SequenceUpdate, ...]
    stats: StepStats
    fault: Exception | None = None
