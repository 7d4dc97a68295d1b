"""PromptRequest: one prompt of a request, from its sequences to its output.

A prompt has n choices. Each choice is one sequence, with two exceptions. Greedy choices are equal
and share one sequence. With `best_of` there are more sequences than choices, and the n best are
known only when all have ended. The engine runs the sequences (`requests`); their updates are added
here, on the thread that waits for the output.
"""

from collections.abc import Iterable, Sequence

from nanovllm.engine.admission import RequestSize
from nanovllm.engine.logprobs import LogprobList, logprobs_bytes
from nanovllm.engine.pooling import Pooler
from nanovllm.engine.scheduling.request import FinishReason, Request
from nanovllm.engine.scheduling.step_plan import SequenceUpdate
from nanovllm.engine.sequence_output import SequenceOutput
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


class PromptRequest:
    """A checked prompt: its sequences for the engine, and the output of their updates so far.

    Attributes:
        requests: its sequences, ordered by choice index.
        error: why the output is not complete; None where there is no error.
        metrics: times of the sequence that ended last; None before one has.
    """

    def __init__(
        self,
        request_id: str,
        prompt: str | None,
        requests: Sequence[Request],
        params: SamplingParams,
        outputs: Iterable[SequenceOutput],
        tokenizer: Tokenizer,
        pooler: Pooler | None = None,
    ) -> None:
        """Create a prompt without output.

        Args:
            request_id: the id in outputs.
            prompt: the prompt's text; None for a prompt of token ids.
            requests: its sequences, ordered by choice index.
            params: the settings of the caller.
            outputs: the outputs of the sequences, without tokens.
            tokenizer: the model's.
            pooler: None unless the prompt is embedded.
        """
        self.request_id = request_id
        self.requests = tuple(requests)
        self.error: NanovllmError | None = None
        self._prompt = prompt
        self._prompt_token_ids = list(requests[0].prompt_token_ids)
        self._params = params
        self._tokenizer = tokenizer
        self._pooler = pooler
        self._prompt_logprobs: list[TokenLogprobs | None] | None = (
            None if params.prompt_logprobs is None else [None]
        )
        self._num_cached_tokens = 0
        self.metrics: RequestMetrics | None = None
        self._sequences = list(outputs)

    @property
    def client(self) -> str:
        """Identity of who sent the request."""
        return self.requests[0].client

    @property
    def num_prompt_tokens(self) -> int:
        """Number of prompt tokens."""
        return len(self._prompt_token_ids)

    @property
    def has_grammar(self) -> bool:
        """Whether a grammar constrains the output, which may still prove invalid."""
        return self.requests[0].grammar is not None

    @property
    def size(self) -> RequestSize:
        """What the prompt and max_tokens of each choice may need.

        Choices include those that best_of drops and those that share a sequence.
        """
        first, num_choices = self.requests[0], self._params.num_candidates
        max_tokens = first.max_new_tokens
        return RequestSize(
            num_choices,
            first.num_prompt_tokens + num_choices * max_tokens,
            logprobs_bytes(first.num_prompt_tokens, first.sampling.prompt_logprobs)
            + logprobs_bytes(len(self.requests) * max_tokens, first.sampling.logprobs),
        )

    @property
    def is_finished(self) -> bool:
        """Whether every sequence has ended."""
        return all(sequence.finish_reason is not None for sequence in self._sequences)

    @property
    def is_refused(self) -> bool:
        """Whether the request ended with an error before it ran, such as an invalid grammar."""
        return self.error is not None and (
            self.metrics is not None and self.metrics.first_scheduled_s is None
        )

    @property
    def num_output_tokens(self) -> int:
        """Number of tokens of all choices so far; tokens of a shared sequence count n times."""
        return self._of_choices(sum(len(sequence.token_ids) for sequence in self._sequences))

    def _of_choices(self, computed: int) -> int:
        """Return the number of tokens of all choices, of which those of the sequences are given."""
        return computed * (self._params.num_candidates // len(self._sequences))

    @property
    def max_output_tokens(self) -> int:
        """Number of tokens of the longest sequence so far."""
        return max(len(sequence.token_ids) for sequence in self._sequences)

    def num_tokens(self, choice_index: int) -> int:
        """Return the number of tokens of a sequence so far."""
        return len(self._sequences[choice_index].token_ids)

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
        choice_index = update.request.choice_index
        sequence = self._sequences[choice_index]
        if sequence.finish_reason is not None:
            return False  # computed before the engine was told of a stop string
        if self._pooler is not None and update.hidden is not None:
            self._pooler.add(update.hidden)
        if choice_index == 0:
            if self._prompt_logprobs is not None:
                self._prompt_logprobs += update.prompt_logprobs
            # Only of the first choice: the others share its blocks.
            self._num_cached_tokens = update.num_cached_tokens
        found_stop = sequence.add(update)
        if not found_stop:
            self.error = self.error or update.error
        if sequence.finish_reason is not None:
            times = update.request.times
            self.metrics = RequestMetrics(
                times.arrival_s, times.first_scheduled_s, times.first_token_s, update.time_s
            )
        return found_stop and update.finish_reason is None

    def fail(self, error: NanovllmError) -> None:
        """End the unfinished sequences with an error."""
        self.error = self.error or error
        for sequence in self._sequences:
            sequence.finish_reason = sequence.finish_reason or FinishReason.ERROR

    def result(self) -> RequestOutput | EmbeddingRequestOutput:
        """Return the whole output with packed log-probabilities; raises the error that ended it."""
        output = self.output(packed=True) if self._pooler is None else self.embedding()
        if self.error is not None:
            raise self.error
        return output

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
        """Return the embedding of a prompt that has ended; after an error, an empty one with it."""
        assert self._pooler is not None
        vector = [] if self.error is not None else self._pooler.embedding()
        if vector is None:
            self.error = EngineFaultError(
                "the prompt has no embedding: the network's output is not a number"
            )
        return EmbeddingRequestOutput(
            self.request_id,
            self._prompt,
            self._prompt_token_ids,
            EmbeddingOutput(vector or []),
            True,
            self._num_cached_tokens,
            self.metrics,
            self._error_text,
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

    def _choices(self) -> list[SequenceOutput]:
        """Return the sequence of each of the n choices; with best_of, best first."""
        if self._params.ranks_choices:
            return sorted(
                self._sequences, key=lambda sequence: sequence.mean_logprob, reverse=True
            )[: self._params.n]
        return self._sequences * (self._params.n // len(self._sequences))

    @property
    def _error_text(self) -> str | None:
        """The error with its cause. For Python callers; a server hides the cause."""
        if self.error is None:
            return None
        cause = self.error.__cause__
        return str(self.error) + (f" ({type(cause).__name__}: {cause})" if cause else "")

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
        self, outputs: list[CompletionOutput], prompt_logprobs: list[TokenLogprobs | None] | None
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
            num_drafted_tokens=self._of_choices(sum(s.num_drafted for s in self._sequences)),
            num_accepted_tokens=self._of_choices(sum(s.num_accepted for s in self._sequences)),
            metrics=self.metrics,
            error=self._error_text,
        )

    def _completion(
        self, index: int, sequence: SequenceOutput, text_start: int, token_start: int
    ) -> CompletionOutput:
        has_logprobs, reason = self._params.logprobs is not None, sequence.finish_reason
        return CompletionOutput(
            index=index,
            text=sequence.text[text_start:],
            token_ids=sequence.token_ids[token_start:],
            cumulative_logprob=sequence.cumulative_logprob if has_logprobs else None,
            logprobs=self._unpacked(sequence.logprobs[token_start:]) if has_logprobs else None,
            finish_reason=None if reason is None else reason.value,
            stop_reason=sequence.stop_reason,
            drafted_token_ids=list(
                map(sequence.drafted.get, range(token_start, len(sequence.token_ids)))
            ),
        )

    def _unpacked(self, positions: Sequence[TokenLogprobs | None]) -> LogprobList:
        """Return the positions as a LogprobList with the tokens' texts."""
        return LogprobList(positions, self._tokenizer.token_text)
