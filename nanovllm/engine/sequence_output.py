"""SequenceOutput: what the engine's updates make of one sequence: text, tokens, log-probabilities.

Detokenization runs on the thread that calls `add`. Unread deltas merge into one, so memory grows
only with the output.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from nanovllm.engine.detokenizer import IncrementalDecoder, StopStrings
from nanovllm.engine.scheduling.request import FinishReason
from nanovllm.engine.scheduling.step_plan import SequenceUpdate
from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.model.sampling import TokenLogprobs
from nanovllm.sampling_params import SamplingParams


@dataclass(slots=True)
class SequenceOutput:
    """Output of one sequence so far; `text_sent` and `tokens_sent` are the lengths already sent.

    Tokens were `num_drafted` for it, of which it contains `num_accepted`. `drafted` has those in
    whose place it has a token, by their index.
    """

    params: SamplingParams
    decoder: IncrementalDecoder
    stops: StopStrings
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    text_sent: int = 0
    tokens_sent: int = 0
    has_begun: bool = False
    finish_sent: bool = False
    num_drafted: int = 0
    num_accepted: int = 0
    drafted: dict[int, int] = field(default_factory=dict)

    @classmethod
    def begin(
        cls, params: SamplingParams, tokenizer: Tokenizer, prompt_token_ids: Sequence[int] = ()
    ) -> "SequenceOutput":
        """Return the output of a sequence without tokens, which continues a prompt."""
        skips = params.skip_special_tokens
        return cls(
            params,
            IncrementalDecoder(
                tokenizer,
                skip_special_tokens=skips,
                follows_text=tokenizer.has_text(prompt_token_ids, skip_special_tokens=skips),
            ),
            StopStrings(params.stop_strings, include_in_output=params.include_stop_str_in_output),
        )

    @property
    def has_delta(self) -> bool:
        """Whether there is output that no delta has contained."""
        has_ended = self.finish_reason is not None and not self.finish_sent
        return (
            has_ended or len(self.token_ids) > self.tokens_sent or len(self.text) > self.text_sent
        )

    @property
    def mean_logprob(self) -> float:
        """Mean log-probability per token, by which best_of ranks.

        It is minus infinity instead of NaN, and for a sequence that ended with an error.
        """
        if self.finish_reason is FinishReason.ERROR:
            return -math.inf
        mean = self.cumulative_logprob / max(len(self.token_ids), 1)
        return -math.inf if math.isnan(mean) else mean

    def mark_sent(self) -> None:
        """Record that deltas have contained all output so far."""
        self.has_begun = True
        self.text_sent, self.tokens_sent, self.finish_sent = (
            len(self.text),
            len(self.token_ids),
            self.finish_reason is not None,
        )

    def add(self, update: SequenceUpdate) -> bool:
        """Add an update; return whether a stop string ends the sequence."""
        before = len(self.token_ids)
        found_stop = self._add_tokens(update)
        if update.drafted:
            self.num_drafted += len(update.drafted)
            self.num_accepted += update.num_accepted(len(self.token_ids) - before)
            shown = update.drafted[: update.num_accepted() if update.hides_rejected else None]
            places = range(before, len(self.token_ids))
            self.drafted.update(zip(places, shown, strict=False))
        return found_stop

    def _add_tokens(self, update: SequenceUpdate) -> bool:
        for index, token_id in enumerate(update.token_ids):
            is_last = index == len(update.token_ids) - 1
            logprobs = update.logprobs[index] if update.logprobs else None
            stop = self._add_token(token_id, logprobs, update.finish_reason if is_last else None)
            if stop is not None:
                self.finish_reason, self.stop_reason = FinishReason.STOP, stop
                return True
        if update.finish_reason is not None:
            if not update.token_ids:
                released, _ = self.stops.push(self.decoder.flush(), may_stop=False)
                self.text += released
            self.text += self.stops.flush()
            self.finish_reason, self.stop_reason = update.finish_reason, update.stop_reason
        return False

    def _add_token(
        self, token_id: int, logprobs: TokenLogprobs | None, finish_reason: FinishReason | None
    ) -> str | None:
        """Append a token and the text that it releases; return the stop string that it completes.

        `finish_reason` is set if the engine ended the sequence with this token. The text of a stop
        token is omitted, unless include_stop_str_in_output is set.
        """
        params = self.params
        self.token_ids.append(token_id)
        if logprobs is not None:
            self.cumulative_logprob += logprobs.logprobs[0]
            if params.logprobs is not None:
                self.logprobs.append(logprobs)
        is_left_out = finish_reason is FinishReason.STOP and not params.include_stop_str_in_output
        text = "" if is_left_out else self.decoder.push(token_id)
        if finish_reason is not None:
            text += self.decoder.flush()
        may_stop = len(self.token_ids) > params.min_tokens
        released, stop = self.stops.push(text, may_stop=may_stop)
        self.text += released
        return stop
