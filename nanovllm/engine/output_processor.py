"""OutputProcessor: convert the engine's updates to text, token ids and log-probabilities.

An OutputProcessor belongs to one prompt and its n choices. Each choice is one sequence, with two
exceptions. Greedy choices are equal and share one sequence. With `best_of` there are more sequences
than choices, and the n best are known only when all have ended. Detokenization runs on the thread
that calls `add_update`. Unread deltas merge into one, so memory grows only with the output.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from nanovllm.engine.detokenizer import IncrementalDecoder, StopStrings
from nanovllm.engine.logprobs import LogprobList, PackedLogprobs
from nanovllm.engine.pooling import Pooler
from nanovllm.engine.scheduling.request import FinishReason
from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.errors import EngineFaultError, NanovllmError
from nanovllm.model.sampling import TokenLogprobs
from nanovllm.outputs import (
    CompletionOutput,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    RequestMetrics,
    RequestOutput,
)
from nanovllm.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class SequenceUpdate:
    """The changes of one sequence in a step, as plain values that another thread may read.

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


@dataclass(slots=True)
class _Sequence:
    """Output of one sequence so far; `text_sent` and `tokens_sent` are the lengths already sent."""

    request_id: str
    decoder: IncrementalDecoder
    stops: StopStrings
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[PackedLogprobs] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    text_sent: int = 0
    tokens_sent: int = 0
    has_begun: bool = False
    finish_sent: bool = False

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


def describe_error(error: NanovllmError) -> str:
    """Return an error's message with its cause. For Python callers; a server hides the cause."""
    cause = error.__cause__
    return str(error) if cause is None else f"{error} ({type(cause).__name__}: {cause})"


class OutputProcessor:
    """Collects the updates of one prompt's sequences into its output."""

    def __init__(
        self,
        request_id: str,
        prompt: str | None,
        prompt_token_ids: list[int],
        params: SamplingParams,
        tokenizer: Tokenizer,
        sequence_ids: list[str],
        pooler: Pooler | None = None,
    ) -> None:
        """Create the outputs of `sequence_ids`, which are ordered by choice index.

        `pooler` is None unless the prompt is embedded.
        """
        self.request_id = request_id
        self.error: NanovllmError | None = None
        self._prompt = prompt
        self._prompt_token_ids = prompt_token_ids
        self._params = params
        self._tokenizer = tokenizer
        self._pooler = pooler
        self._prompt_logprobs: list[PackedLogprobs | None] | None = (
            None if params.prompt_logprobs is None else [None]
        )
        self._num_cached_tokens = 0
        self._metrics: RequestMetrics | None = None
        stops = StopStrings(
            params.stop_strings, include_in_output=params.include_stop_str_in_output
        )
        self._sequences = [
            _Sequence(
                sequence_id,
                IncrementalDecoder(tokenizer, skip_special_tokens=params.skip_special_tokens),
                stops.copy(),
            )
            for sequence_id in sequence_ids
        ]

    @property
    def is_finished(self) -> bool:
        """Whether every sequence has ended."""
        return all(sequence.finish_reason is not None for sequence in self._sequences)

    @property
    def sequence_ids(self) -> list[str]:
        """Ids of all sequences."""
        return [sequence.request_id for sequence in self._sequences]

    @property
    def unfinished_ids(self) -> list[str]:
        """Ids of the sequences that have not ended."""
        return [
            sequence.request_id for sequence in self._sequences if sequence.finish_reason is None
        ]

    @property
    def num_output_tokens(self) -> int:
        """Number of tokens of all choices so far; tokens of a shared sequence count n times."""
        computed = sum(len(sequence.token_ids) for sequence in self._sequences)
        return computed * (self._params.num_candidates // len(self._sequences))

    @property
    def max_output_tokens(self) -> int:
        """Number of tokens of the longest sequence so far."""
        return max(len(sequence.token_ids) for sequence in self._sequences)

    def ended(self, choice_index: int) -> tuple[FinishReason, int] | None:
        """Return the finish reason and the number of tokens of a sequence, or None."""
        sequence = self._sequences[choice_index]
        if sequence.finish_reason is None:
            return None
        return sequence.finish_reason, len(sequence.token_ids)

    def add_update(self, update: SequenceUpdate) -> bool:
        """Add an update; return True if a stop string ends a sequence that the engine still runs.

        The caller must then finish the sequence in the engine.
        """
        sequence = self._sequences[update.choice_index]
        if sequence.finish_reason is not None:
            return False  # computed before the engine was told of a stop string
        if self._pooler is not None and update.hidden is not None:
            self._pooler.add(update.hidden)
        if update.choice_index == 0:
            if self._prompt_logprobs is not None:
                self._prompt_logprobs += map(PackedLogprobs.pack, update.prompt_logprobs)
            # Only of the first choice: the others share its blocks.
            self._num_cached_tokens = update.num_cached_tokens
        stop = None
        for index, token_id in enumerate(update.token_ids):
            is_last = index == len(update.token_ids) - 1
            logprobs = update.logprobs[index] if update.logprobs else None
            stop = self._add_token(
                sequence, token_id, logprobs, update.finish_reason if is_last else None
            )
            if stop is not None:
                break
        metrics = update.metrics
        if stop is not None:
            sequence.finish_reason, sequence.stop_reason = FinishReason.STOP, stop
            metrics = None if metrics is None else replace(metrics, finished_s=update.time_s)
        elif update.finish_reason is not None:
            if not update.token_ids:
                released, _ = sequence.stops.push(sequence.decoder.flush(), may_stop=False)
                sequence.text += released
            sequence.text += sequence.stops.flush()
            sequence.finish_reason, sequence.stop_reason = update.finish_reason, update.stop_reason
            self.error = self.error or update.error
        if sequence.finish_reason is not None and metrics is not None:
            self._metrics = metrics
        return stop is not None and update.finish_reason is None

    def _add_token(
        self,
        sequence: _Sequence,
        token_id: int,
        logprobs: TokenLogprobs | None,
        finish_reason: FinishReason | None,
    ) -> str | None:
        """Append a token and the text that it releases; return the stop string that it completes.

        `finish_reason` is set if the engine ended the sequence with this token. The text of a stop
        token is omitted, unless include_stop_str_in_output is set.
        """
        params = self._params
        sequence.token_ids.append(token_id)
        if logprobs is not None:
            sequence.cumulative_logprob += logprobs.logprobs[0]
            if self._shows_logprobs:
                sequence.logprobs.append(PackedLogprobs.pack(logprobs))
        is_left_out = finish_reason is FinishReason.STOP and not params.include_stop_str_in_output
        text = "" if is_left_out else sequence.decoder.push(token_id)
        if finish_reason is not None:
            text += sequence.decoder.flush()
        may_stop = len(sequence.token_ids) > params.min_tokens
        released, stop = sequence.stops.push(text, may_stop=may_stop)
        sequence.text += released
        return stop

    def output(self, *, packed: bool = False) -> RequestOutput:
        """Return the output so far; with best_of the choices may change until all sequences end.

        Log-probabilities are lists, or with `packed` LogprobLists, which unpack on access.
        """
        choices = [
            self._completion(index, sequence, 0, 0)
            for index, sequence in enumerate(self._choices())
        ]
        output = self._output(choices, self._prompt_logprobs)
        if not packed:
            for choice in output.outputs:
                choice.logprobs = None if choice.logprobs is None else list(choice.logprobs)
            if output.prompt_logprobs is not None:
                output.prompt_logprobs = list(output.prompt_logprobs)
        return output

    def embedding(self) -> EmbeddingRequestOutput:
        """Return the embedding of a prompt that is completely computed.

        Raises the error that ended the request, or EngineFaultError if a value is not finite.
        """
        assert self._pooler is not None
        if self.error is not None:
            raise self.error
        vector = self._pooler.embedding()
        if vector is None:
            raise EngineFaultError(
                "the prompt has no embedding: the network's output is not a number"
            )
        return self._embedding_output(vector, None)

    def embedding_or_error(self) -> EmbeddingRequestOutput:
        """Return the embedding; after an error, return an empty one with the error's message."""
        try:
            return self.embedding()
        except NanovllmError as error:
            return self._embedding_output([], describe_error(error))

    def _embedding_output(self, vector: list[float], error: str | None) -> EmbeddingRequestOutput:
        return EmbeddingRequestOutput(
            self.request_id,
            self._prompt,
            self._prompt_token_ids,
            EmbeddingOutput(vector),
            True,
            self._num_cached_tokens,
            self._metrics,
            error,
        )

    def take_delta(self) -> RequestOutput | None:
        """Return the choices that have new output, with that output; None if there are none.

        There is no delta before the prompt log-probabilities are complete. The first delta of a
        choice contains them. With best_of there is no delta before all sequences have ended.
        """
        if self._prompt_logprobs_pending or (self._params.ranks_choices and not self.is_finished):
            return None
        changed = [
            (index, sequence)
            for index, sequence in enumerate(self._choices())
            if sequence.has_delta
        ]
        if not changed:
            return None
        deltas = [
            self._completion(index, sequence, sequence.text_sent, sequence.tokens_sent)
            for index, sequence in changed
        ]
        is_first = any(not sequence.has_begun for _, sequence in changed)
        for _, sequence in changed:
            sequence.mark_sent()
        return self._output(deltas, self._prompt_logprobs if is_first else None)

    def _choices(self) -> list[_Sequence]:
        """Return the sequence of each of the n choices; with best_of, best first."""
        if self._params.ranks_choices:
            return sorted(
                self._sequences, key=lambda sequence: sequence.mean_logprob, reverse=True
            )[: self._params.n]
        return self._sequences * (self._params.n // len(self._sequences))

    @property
    def _shows_logprobs(self) -> bool:
        return self._params.logprobs is not None

    @property
    def _prompt_logprobs_pending(self) -> bool:
        """Whether the first sequence still has prompt log-probabilities to report."""
        reported = self._prompt_logprobs
        return (
            reported is not None
            and len(reported) < len(self._prompt_token_ids)
            and self._sequences[0].finish_reason is None
        )

    def _output(
        self, outputs: list[CompletionOutput], prompt_logprobs: list[PackedLogprobs | None] | None
    ) -> RequestOutput:
        return RequestOutput(
            request_id=self.request_id,
            prompt=self._prompt,
            prompt_token_ids=self._prompt_token_ids,
            prompt_logprobs=None if prompt_logprobs is None else self._unpacked(prompt_logprobs),
            outputs=outputs,
            finished=self.is_finished,
            num_cached_tokens=self._num_cached_tokens,
            num_generated_tokens=self.num_output_tokens,
            metrics=self._metrics,
            error=None if self.error is None else describe_error(self.error),
        )

    def _completion(
        self, index: int, sequence: _Sequence, text_start: int, token_start: int
    ) -> CompletionOutput:
        return CompletionOutput(
            index=index,
            text=sequence.text[text_start:],
            token_ids=sequence.token_ids[token_start:],
            cumulative_logprob=sequence.cumulative_logprob if self._shows_logprobs else None,
            logprobs=self._unpacked(sequence.logprobs[token_start:])
            if self._shows_logprobs
            else None,
            finish_reason=sequence.finish_reason.value
            if sequence.finish_reason is not None
            else None,
            stop_reason=sequence.stop_reason,
        )

    def _unpacked(self, positions: Sequence[PackedLogprobs | None]) -> LogprobList:
        """Return the positions as a LogprobList with the tokens' texts."""
        return LogprobList(positions, self._tokenizer.token_text)
