"""UpdateRouter: the one loop that takes the updates of an engine's steps to their prompts.

The server, AsyncLLM, LLM and run-batch each have a router, on the thread that waits for outputs. An
owner, such as a call or a handle, gets the prompts that a step has changed.
"""

import logging
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from nanovllm.engine.metrics import FinishedPrompt, FinishedRequest, StepStats
from nanovllm.engine.prompt_request import PromptRequest
from nanovllm.engine.scheduling.request import FinishReason
from nanovllm.engine.scheduling.step_plan import SequenceUpdate
from nanovllm.engine.step_output import StepOutput
from nanovllm.errors import EngineFaultError, InvalidRequestError

logger = logging.getLogger(__name__)

OwnerT = TypeVar("OwnerT")
_ANSWER_FAILED = "the answer could not be put together; the log has the reason"


class UpdateRouter(Generic[OwnerT]):
    """The prompts with unfinished sequences, and their owners."""

    def __init__(self, finish: Callable[[str, FinishReason], object]) -> None:
        """Start without prompts; `finish` ends a sequence in the engine, if it still runs there."""
        self._finish = finish
        self._prompts: dict[str, tuple[PromptRequest, OwnerT]] = {}  # by id of a sequence

    def __len__(self) -> int:
        """Return the number of unfinished sequences."""
        return len(self._prompts)

    @property
    def owners(self) -> set[OwnerT]:
        """The owners of unfinished prompts."""
        return {owner for _, owner in self._prompts.values()}

    def check_ids(self, prompts: Iterable[PromptRequest]) -> None:
        """Raise InvalidRequestError if two sequences would have the same id."""
        seen: set[str] = set()
        for request in (request for prompt in prompts for request in prompt.requests):
            if request.request_id in self._prompts or request.request_id in seen:
                raise InvalidRequestError(
                    f"the request id {request.request_id!r} is in use by an unfinished request",
                    param="request_id",
                )
            seen.add(request.request_id)

    def add(self, prompts: Iterable[PromptRequest], owner: OwnerT) -> None:
        """Add the prompts of an owner; raises as `check_ids`."""
        self.check_ids(prompts)
        for prompt in prompts:
            for request in prompt.requests:
                self._prompts[request.request_id] = prompt, owner

    def remove(self, prompt: PromptRequest) -> None:
        """Remove a prompt, and abort its unfinished sequences. A second call has no effect."""
        for request in prompt.requests:
            unfinished, _ = self._prompts.get(request.request_id, (None, None))
            if unfinished is prompt:
                del self._prompts[request.request_id]
                self._finish(request.request_id, FinishReason.ABORT)

    def add_updates(self, output: StepOutput) -> list[tuple[PromptRequest, OwnerT]]:
        """Add a step's updates to their prompts; return each changed prompt once, with its owner.

        A sequence whose text has a stop string is finished in the engine. What that computes until
        then is dropped, and not part of the statistics.
        """
        changed: dict[PromptRequest, OwnerT] = {}
        for update in output.updates:
            if update.request_id not in self._prompts:
                continue  # computed after a stop string, or after the prompt was removed
            prompt, owner = self._prompts[update.request_id]
            changed[prompt] = owner
            try:
                before = prompt.num_tokens(update.request.choice_index)
                found_stop = prompt.add_update(update)
                _count(output.stats, prompt, update, before)
            except Exception as error:  # the other updates of the step must reach their prompts
                logger.exception("the answer to %s could not be put together", update.request_id)
                if isinstance(error, EngineFaultError):
                    prompt.fail(error)
                else:
                    fault = EngineFaultError(_ANSWER_FAILED)
                    fault.__cause__ = error
                    prompt.fail(fault)
                self.remove(prompt)
                continue
            if found_stop:
                self._finish(update.request_id, FinishReason.STOP)
            if found_stop or update.finish_reason is not None:
                del self._prompts[update.request_id]
        return list(changed.items())


def _count(stats: StepStats, prompt: PromptRequest, update: SequenceUpdate, before: int) -> None:
    """Add an update to the statistics of its step, after the prompt has it.

    The sequence had `before` tokens. Tokens that come together divide the time since those before.
    """
    request = update.request
    count, latency_s = prompt.num_tokens(request.choice_index) - before, 0.0
    if update.drafted:
        stats.drafts.append((len(update.drafted), update.num_accepted(count)))
    if count and update.inter_token_latency_s is None:
        stats.times_to_first_token_s.append(update.time_s - request.times.arrival_s)
        count -= 1
    elif count:
        latency_s = (update.inter_token_latency_s or 0.0) / count
    stats.inter_token_latencies_s += [latency_s] * count
    ended = prompt.ended(request.choice_index)
    if ended is None or prompt.metrics is None:
        return
    reason, num_tokens = ended
    stats.finished.append(
        FinishedRequest(
            reason.value,
            request.num_prompt_tokens,
            num_tokens,
            request.max_new_tokens,
            update.num_reused_tokens,
            update.num_preemptions,
            prompt.metrics,
        )
    )
    if prompt.is_finished:
        stats.finished_prompts.append(FinishedPrompt(request.sampling.n, prompt.max_output_tokens))
