"""From token updates to what the caller sees: text, token ids and log-probabilities of each answer, whole or as news.

One output_processor belongs to one prompt and its n answers. Each is a sequence of its own; but greedy answers are equal and one sequence, and
with `best_of` they are the n best of more sequences, which are known once all have ended. It holds the decoders, so detokenising happens
on the caller's thread and not on the engine's. It grows with the answers and with nothing else: news that nobody fetches merge into one.
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
    """What a step changed for one sequence; plain values that may cross to another thread.

    Attributes:
        metrics: the sequence's times; `finished_s` is None unless the engine has ended it.
        error: what to raise where `finish_reason` is "error".
        hidden: final hidden states [tokens, d_model] of a prompt that is embedded.
        time_s: when the step ended.
        inter_token_latency_s: time since the token before; None for the first token, and without a token.
        num_preemptions: how often it was set back.
        num_reused_tokens: prompt tokens that were not computed for it.
    """

    request_id: str
    choice_index: int
    token_id: int | None
    logprobs: TokenLogprobs | None
    prompt_logprobs: tuple[TokenLogprobs, ...]
    finish_reason: FinishReason | None
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
    """What was generated so far; `text_sent` and `tokens_sent` say how much of it was fetched as news."""

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
        """Whether there is more of it than was fetched."""
        has_ended = self.finish_reason is not None and not self.finish_sent
        return (
            has_ended or len(self.token_ids) > self.tokens_sent or len(self.text) > self.text_sent
        )

    @property
    def mean_logprob(self) -> float:
        """What best_of ranks by: longer answers are not worse for being longer.

        What is not a number counts as minus infinity, and so does an answer that ended with an error.
        """
        if self.finish_reason is FinishReason.ERROR:
            return -math.inf
        mean = self.cumulative_logprob / max(len(self.token_ids), 1)
        return -math.inf if math.isnan(mean) else mean

    def mark_sent(self) -> None:
        """All of it has been fetched."""
        self.has_begun = True
        self.text_sent, self.tokens_sent, self.finish_sent = (
            len(self.text),
            len(self.token_ids),
            self.finish_reason is not None,
        )


def describe_error(error: NanovllmError) -> str:
    """What an output says of an error: its message, and the exception behind it, which a server keeps to itself."""
    cause = error.__cause__
    return str(error) if cause is None else f"{error} ({type(cause).__name__}: {cause})"


class OutputProcessor:
    """Collects the updates of one prompt's sequences."""

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
        """Expect updates for `sequence_ids`, `params.num_sequences` of them by choice index; `pooler` is for a prompt that is embedded."""
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
        """Ids of all its sequences."""
        return [sequence.request_id for sequence in self._sequences]

    @property
    def unfinished_ids(self) -> list[str]:
        """Sequences that the engine may still be working on."""
        return [
            sequence.request_id for sequence in self._sequences if sequence.finish_reason is None
        ]

    @property
    def num_output_tokens(self) -> int:
        """Tokens of all answers so far, as `usage` counts them: greedy answers that are computed once count n times."""
        computed = sum(len(sequence.token_ids) for sequence in self._sequences)
        return computed * (self._params.num_candidates // len(self._sequences))

    @property
    def max_output_tokens(self) -> int:
        """Tokens of the longest answer so far."""
        return max(len(sequence.token_ids) for sequence in self._sequences)

    def ended(self, choice_index: int) -> tuple[FinishReason, int] | None:
        """Why a sequence has ended and how many tokens its answer has; None while it goes on."""
        sequence = self._sequences[choice_index]
        if sequence.finish_reason is None:
            return None
        return sequence.finish_reason, len(sequence.token_ids)

    def add_update(self, update: SequenceUpdate) -> bool:
        """Take in an update; True when a stop string ended the answer, so that the engine must be told to end the sequence."""
        sequence = self._sequences[update.choice_index]
        if sequence.finish_reason is not None:
            return False  # steps that were under way when a stop string was found
        if self._pooler is not None and update.hidden is not None:
            self._pooler.add(update.hidden)
        if update.choice_index == 0:
            if self._prompt_logprobs is not None:
                self._prompt_logprobs += map(PackedLogprobs.pack, update.prompt_logprobs)
            self._num_cached_tokens = (
                update.num_cached_tokens
            )  # the others find the blocks of the first
        text = "" if update.token_id is None else self._add_token(sequence, update.token_id, update)
        if update.finish_reason is not None:
            text += sequence.decoder.flush()
        may_stop = update.token_id is not None and len(sequence.token_ids) > self._params.min_tokens
        released, stop = sequence.stops.push(text, may_stop=may_stop)
        sequence.text += released
        metrics = update.metrics
        if stop is not None:
            sequence.finish_reason, sequence.stop_reason = FinishReason.STOP, stop
            metrics = None if metrics is None else replace(metrics, finished_s=update.time_s)
        elif update.finish_reason is not None:
            sequence.text += sequence.stops.flush()
            sequence.finish_reason, sequence.stop_reason = update.finish_reason, update.stop_reason
            self.error = self.error or update.error
        if sequence.finish_reason is not None and metrics is not None:
            self._metrics = metrics
        return stop is not None and update.finish_reason is None

    def _add_token(self, sequence: _Sequence, token_id: int, update: SequenceUpdate) -> str:
        """Append a token; the characters that it completes, none for a token that ends the answer unless such are to be kept."""
        sequence.token_ids.append(token_id)
        if update.logprobs is not None:
            sequence.cumulative_logprob += update.logprobs.logprobs[0]
            if self._shows_logprobs:
                sequence.logprobs.append(PackedLogprobs.pack(update.logprobs))
        is_left_out = (
            update.finish_reason is FinishReason.STOP
            and not self._params.include_stop_str_in_output
        )
        return "" if is_left_out else sequence.decoder.push(token_id)

    def output(self, *, packed: bool = False) -> RequestOutput:
        """Everything so far; which answers are the best of more is known once all sequences have ended.

        With `packed` log-probabilities are unpacked when they are read, and not before; otherwise they are lists.
        """
        answers = [
            self._completion(index, sequence, 0, 0)
            for index, sequence in enumerate(self._answers())
        ]
        output = self._output(answers, self._prompt_logprobs)
        if not packed:
            for answer in output.outputs:
                answer.logprobs = None if answer.logprobs is None else list(answer.logprobs)
            if output.prompt_logprobs is not None:
                output.prompt_logprobs = list(output.prompt_logprobs)
        return output

    def embedding(self) -> EmbeddingRequestOutput:
        """The embedding of a prompt that has been read to its end; raises what ended it, or EngineFaultError where it is not a number."""
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
        """The embedding, or an empty one with the error that there is in its place."""
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
        """What has come since the last call: choices with news only, each with its new text and tokens; None where nothing has.

        Prompt log-probabilities come with every choice's first news, which waits until they are complete. Answers that are the best of
        more are no news before all sequences have ended.
        """
        if self._prompt_logprobs_pending or (self._params.ranks_choices and not self.is_finished):
            return None
        fresh = [
            (index, sequence)
            for index, sequence in enumerate(self._answers())
            if sequence.has_delta
        ]
        if not fresh:
            return None
        news = [
            self._completion(index, sequence, sequence.text_sent, sequence.tokens_sent)
            for index, sequence in fresh
        ]
        begins = any(not sequence.has_begun for _, sequence in fresh)
        for _, sequence in fresh:
            sequence.mark_sent()
        return self._output(news, self._prompt_logprobs if begins else None)

    def _answers(self) -> list[_Sequence]:
        """The sequence of each of the n answers: its own, the only one, or the next best; of equals the first."""
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
        """Whether the first sequence, which reports them, still has some to come; another may be ahead of it, its prompt cached."""
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
        """Positions with the tokens' texts, for whoever reads them."""
        return LogprobList(positions, self._tokenizer.token_text)
