"""Limits of a single request, checked before it is queued."""

from dataclasses import dataclass

from nanovllm.errors import (
    ContextLengthError,
    InvalidRequestError,
    counted,
    describe_value,
    setting,
)
from nanovllm.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of a request, which ensure that it can always run to its end.

    Attributes:
        max_model_len: maximum tokens of prompt and output together.
        cache_tokens: tokens that fit the KV cache.
        max_logprobs: maximum log-probabilities per position.
        has_priorities: whether a request may have a priority other than 0.
    """

    max_model_len: int
    cache_tokens: int
    max_logprobs: int
    has_priorities: bool = False

    def check_prompt_length(self, num_tokens: int) -> None:
        """Raise ContextLengthError if a prompt is longer than the context."""
        if num_tokens > self.max_model_len:
            raise ContextLengthError(
                f"the prompt has {num_tokens} tokens, the limit is {self.max_model_len}; "
                "shorten it",
                param="prompt",
            )

    def max_new_tokens(
        self, num_prompt_tokens: int, params: SamplingParams, *, must_fit: bool = False
    ) -> int:
        """Return the maximum number of tokens to generate; raises ContextLengthError.

        It is max_tokens, limited by the context, which is an error with `must_fit`. If max_tokens
        is None, the KV cache limits it too. Otherwise an output that does not fit the KV cache is
        an error.
        """
        limit = self.max_model_len
        room = limit - num_prompt_tokens
        if room < 0 or (room == 0 and params.max_tokens != 0):
            raise ContextLengthError(
                f"the prompt has {num_prompt_tokens} tokens, which leaves no room for an answer in "
                f"a context of {limit}; shorten it",
                param="prompt",
            )
        max_tokens = params.max_tokens
        total = num_prompt_tokens + (max_tokens or 0)
        if must_fit and total > limit:
            raise ContextLengthError(
                f"the prompt has {counted(num_prompt_tokens, 'token')} and "
                f"{setting('max_tokens')} is {max_tokens:,}, together {total:,}, more than "
                f"the context of {limit:,}; shorten the prompt or lower {setting('max_tokens')}",
                param="max_tokens",
            )
        if max_tokens is None:
            max_tokens = max(self.cache_tokens - num_prompt_tokens + 1, 1)
        max_new_tokens = min(max_tokens, room)
        # The last token is never an input, so its keys and values need no slot.
        needed = num_prompt_tokens + max(max_new_tokens - 1, 0)
        if needed > self.cache_tokens:
            raise ContextLengthError(
                f"a prompt of {counted(num_prompt_tokens, 'token')} and an answer of up to "
                f"{max_new_tokens:,} need {needed:,} tokens of KV cache, which has "
                f"{self.cache_tokens:,}; ask for less, or serve with a larger kv_cache_memory",
                param="max_tokens",
            )
        return max_new_tokens

    def truncation(self, params: SamplingParams) -> slice | None:
        """Return the slice of a prompt's tokens to keep; None for all of them."""
        count = params.truncate_prompt_tokens
        if count is None:
            return None
        limit = self.max_model_len
        if count > limit:
            raise InvalidRequestError(
                f"truncate_prompt_tokens is {count}, the limit is {limit} (the context); lower it, "
                "or send -1 for as many tokens as fit",
                param="truncate_prompt_tokens",
            )
        if count == -1:
            count = self._max_prompt_tokens(params)
        return slice(-count, None) if params.truncation_side == "left" else slice(count)

    def _max_prompt_tokens(self, params: SamplingParams) -> int:
        """Return the maximum prompt tokens that fit, with max_tokens, context and KV cache."""
        max_tokens = 1 if params.max_tokens is None else params.max_tokens
        count = min(self.max_model_len - max_tokens, self.cache_tokens - max(max_tokens - 1, 0))
        if count < 1:
            raise ContextLengthError(
                f"{setting('max_tokens')} is {max_tokens}, which leaves no room for a prompt in a "
                f"context of {self.max_model_len} tokens and a KV cache of {self.cache_tokens}",
                remedy="lower it",
                param="max_tokens",
            )
        return count

    def check_logprobs(self, params: SamplingParams) -> None:
        """Raise InvalidRequestError if more log-probabilities than the limit are requested."""
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(params, name)
            if count is not None and count > self.max_logprobs:
                raise InvalidRequestError(
                    f"{name} is {count}, the limit is {self.max_logprobs} (max_logprobs)",
                    param=name,
                )

    def check_priority(self, priority: int) -> None:
        """Raise InvalidRequestError if a priority is not an integer, or not allowed."""
        if isinstance(priority, bool) or not isinstance(priority, int):
            raise InvalidRequestError(
                f"priority is {describe_value(priority)} but must be an integer",
                param="priority",
            )
        if priority != 0 and not self.has_priorities:
            raise InvalidRequestError(
                f"priority is {priority}, but the order of requests does not depend on it; "
                "leave it out, or start with scheduling_policy='priority'",
                param="priority",
            )
