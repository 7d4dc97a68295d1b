"""RequestTracker: times, deadlines and token counts of the sequences of an engine."""

from nanovllm.engine.metrics import RequestTimes
from nanovllm.engine.scheduling.request import FinishReason, Request
from nanovllm.engine.scheduling.step_plan import SequenceResult
from nanovllm.engine.step_output import SequenceUpdate
from nanovllm.errors import EngineFaultError, InvalidRequestError, NanovllmError

STEP_FAILED = "a step of the engine failed; the log has the reason"
_ALL_FORBIDDEN = (
    "every token is forbidden by the request's settings together, so none can come next; "
    "loosen one of them"
)
_NOT_A_NUMBER = "the network's output is not a number; is the checkpoint sound?"


class RequestTracker:
    """Records what a step does to each unfinished sequence. For the engine's thread.

    Attributes:
        times: times of the unfinished sequences, by id.
        deadlines: those of the sequences that have one, by id.
        structured: the sequences that have a grammar, by id.
        prompt_tokens, prompt_tokens_cached, prompt_tokens_computed, generation_tokens: the counters
            of EngineSnapshot.
    """

    def __init__(self) -> None:
        """Start with no sequences."""
        self.times: dict[str, RequestTimes] = {}
        self.deadlines: dict[str, float] = {}
        self.structured: dict[str, Request] = {}
        self.prompt_tokens = 0
        self.prompt_tokens_cached = 0
        self.prompt_tokens_computed = 0
        self.generation_tokens = 0

    def add(self, request: Request, arrival_s: float, deadline_s: float | None) -> None:
        """Add a sequence."""
        self.times[request.request_id] = RequestTimes(arrival_s)
        if deadline_s is not None:
            self.deadlines[request.request_id] = deadline_s
        if request.grammar is not None:
            self.structured[request.request_id] = request
            request.grammar.open()

    def pop(self, request_id: str) -> RequestTimes:
        """Remove a sequence that has ended; return its times."""
        self.deadlines.pop(request_id, None)
        self.structured.pop(request_id, None)
        return self.times.pop(request_id)

    def to_update(
        self, result: SequenceResult, now: float, fault: Exception | None
    ) -> SequenceUpdate:
        """Record a result at the time `now`; return it as values that other threads may read.

        `fault` is the exception that the step raised, or None.
        """
        request = result.request
        times = self.times[request.request_id]
        inter_token_latency_s = None
        if result.token_ids:
            self.generation_tokens += len(result.token_ids)
            if times.last_token_s is None:
                self._count_prompt(request)
                times.first_token_s = now
            else:
                inter_token_latency_s = now - times.last_token_s
            times.last_token_s = now
        finish_reason = request.finish_reason
        if finish_reason is not None:
            if times.first_token_s is None and finish_reason is not FinishReason.ERROR:
                self._count_prompt(request)
            self.pop(request.request_id)
        return SequenceUpdate(
            request_id=request.request_id,
            choice_index=request.choice_index,
            token_ids=result.token_ids,
            logprobs=result.logprobs,
            prompt_logprobs=tuple(result.prompt_logprobs),
            finish_reason=finish_reason,
            stop_reason=request.stop_reason,
            num_cached_tokens=request.num_cached_tokens or 0,
            metrics=times.summary(None if finish_reason is None else now),
            error=_error_of(result, fault) if finish_reason is FinishReason.ERROR else None,
            hidden=result.hidden,
            time_s=now,
            inter_token_latency_s=inter_token_latency_s,
            num_preemptions=request.num_preemptions,
            num_reused_tokens=request.num_reused_tokens,
        )

    def _count_prompt(self, request: Request) -> None:
        """Count a prompt that has been computed to its end for the first time."""
        self.prompt_tokens += request.num_prompt_tokens
        self.prompt_tokens_cached += request.num_reused_tokens


def _error_of(result: SequenceResult, fault: Exception | None) -> NanovllmError:
    """Return the error of a request that a step ended; a server hides its `__cause__`."""
    cause = fault or result.error
    if cause is not None:
        error = EngineFaultError(STEP_FAILED)
        error.__cause__ = cause
        return error
    if result.is_finite:
        return InvalidRequestError(_ALL_FORBIDDEN)
    return EngineFaultError(_NOT_A_NUMBER)
