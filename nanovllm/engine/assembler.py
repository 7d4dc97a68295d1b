"""From token updates to what the caller sees: text, token ids and log-probabilities of each answer, whole or as news.

One assembler belongs to one prompt and its n answers. It holds the decoders, so detokenising happens on the caller's thread and not
on the engine's. It grows with the answer and with nothing else: news that nobody fetches merge into one.
"""

from dataclasses import dataclass, field

from nanovllm.engine.detokenizer import IncrementalDecoder, StopStrings
from nanovllm.engine.request import FinishReason
from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.outputs import CompletionOutput, Logprob, PositionLogprobs, RequestMetrics, RequestOutput
from nanovllm.runner.logprobs import TokenLogprobs
from nanovllm.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class SequenceUpdate:
    """What a step changed for one sequence; plain values that may cross to another thread.

    `error` says why where `finish_reason` is "error".
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
    error: str | None = None


@dataclass(slots=True)
class _Choice:
    """One answer so far; `text_sent` and `tokens_sent` say how much of it was fetched as news."""

    request_id: str
    decoder: IncrementalDecoder
    stops: StopStrings
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[PositionLogprobs] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    text_sent: int = 0
    tokens_sent: int = 0
    has_begun: bool = False
    finish_sent: bool = False


class Assembler:
    """Collects the updates of one prompt's sequences."""

    def __init__(
        self, request_id: str, prompt: str | None, prompt_token_ids: list[int], params: SamplingParams, tokenizer: Tokenizer, sequence_ids: list[str]
    ) -> None:
        """Expect updates for `sequence_ids`, one an answer in the order of their choice indices."""
        self.request_id = request_id
        self.error: str | None = None
        self._prompt = prompt
        self._prompt_token_ids = prompt_token_ids
        self._params = params
        self._tokenizer = tokenizer
        self._prompt_logprobs: list[PositionLogprobs | None] | None = None if params.prompt_logprobs is None else [None]
        self._num_cached_tokens = 0
        self._metrics: RequestMetrics | None = None
        self._choices = [
            _Choice(
                sequence_id,
                IncrementalDecoder(tokenizer, skip_special_tokens=params.skip_special_tokens),
                StopStrings(params.stop_strings, include_in_output=params.include_stop_str_in_output),
            )
            for sequence_id in sequence_ids
        ]

    @property
    def is_finished(self) -> bool:
        """Whether every answer has ended."""
        return all(choice.finish_reason is not None for choice in self._choices)

    @property
    def sequence_ids(self) -> list[str]:
        """Ids of all its sequences."""
        return [choice.request_id for choice in self._choices]

    @property
    def unfinished_ids(self) -> list[str]:
        """Sequences that the engine may still be working on."""
        return [choice.request_id for choice in self._choices if choice.finish_reason is None]

    @property
    def num_output_tokens(self) -> int:
        """Tokens of all answers so far."""
        return sum(len(choice.token_ids) for choice in self._choices)

    def absorb(self, update: SequenceUpdate) -> bool:
        """Take in an update; True when a stop string ended the answer, so that the engine must be told to end the sequence."""
        choice = self._choices[update.choice_index]
        if choice.finish_reason is not None:
            return False  # steps that were under way when a stop string was found
        if update.choice_index == 0 and self._prompt_logprobs is not None:
            self._prompt_logprobs += map(self._position, update.prompt_logprobs)
        self._num_cached_tokens = max(self._num_cached_tokens, update.num_cached_tokens)
        text = "" if update.token_id is None else self._add_token(choice, update.token_id, update)
        if update.finish_reason is not None:
            text += choice.decoder.flush()
        may_stop = update.token_id is not None and len(choice.token_ids) > self._params.min_tokens
        released, stop = choice.stops.push(text, may_stop=may_stop)
        choice.text += released
        if stop is not None:
            choice.finish_reason, choice.stop_reason = FinishReason.STOP, stop
        elif update.finish_reason is not None:
            choice.text += choice.stops.flush()
            choice.finish_reason, choice.stop_reason = update.finish_reason, update.stop_reason
            self.error = self.error or update.error
        if update.metrics is not None:
            self._metrics = update.metrics
        return stop is not None and update.finish_reason is None

    def _add_token(self, choice: _Choice, token_id: int, update: SequenceUpdate) -> str:
        """Append a token; the characters that it completes, none for a token that ends the answer unless such are to be kept."""
        choice.token_ids.append(token_id)
        if update.logprobs is not None:
            choice.logprobs.append(self._position(update.logprobs))
            choice.cumulative_logprob += update.logprobs.logprobs[0]
        is_left_out = update.finish_reason is FinishReason.STOP and not self._params.include_stop_str_in_output
        return "" if is_left_out else choice.decoder.push(token_id)

    def output(self) -> RequestOutput:
        """Everything so far."""
        return self._output([self._completion(index, 0, 0) for index in range(len(self._choices))], self._prompt_logprobs)

    def take_news(self) -> RequestOutput | None:
        """What has come since the last call: choices with news only, each with its new text and tokens; None where nothing has.

        Prompt log-probabilities come with every choice's first news, which waits until they are complete.
        """
        if self._prompt_logprobs_pending:
            return None
        news = []
        begins = False
        for index, choice in enumerate(self._choices):
            has_ended = choice.finish_reason is not None and not choice.finish_sent
            if has_ended or len(choice.token_ids) > choice.tokens_sent or len(choice.text) > choice.text_sent:
                news.append(self._completion(index, choice.text_sent, choice.tokens_sent))
                begins = begins or not choice.has_begun
                choice.has_begun = True
                choice.text_sent, choice.tokens_sent, choice.finish_sent = len(choice.text), len(choice.token_ids), has_ended
        if not news:
            return None
        return self._output(news, self._prompt_logprobs if begins else None)

    @property
    def _prompt_logprobs_pending(self) -> bool:
        """Whether the first choice, which reports them, still has some to come; another may be ahead of it, its prompt cached."""
        reported = self._prompt_logprobs
        return reported is not None and len(reported) < len(self._prompt_token_ids) and self._choices[0].finish_reason is None

    def _output(self, outputs: list[CompletionOutput], prompt_logprobs: list[PositionLogprobs | None] | None) -> RequestOutput:
        return RequestOutput(
            self.request_id, self._prompt, self._prompt_token_ids, prompt_logprobs, outputs, self.is_finished, self._num_cached_tokens, self._metrics
        )

    def _completion(self, index: int, text_start: int, token_start: int) -> CompletionOutput:
        choice = self._choices[index]
        wants_logprobs = self._params.logprobs is not None
        return CompletionOutput(
            index=index,
            text=choice.text[text_start:],
            token_ids=choice.token_ids[token_start:],
            cumulative_logprob=choice.cumulative_logprob if wants_logprobs else None,
            logprobs=choice.logprobs[token_start:] if wants_logprobs else None,
            finish_reason=choice.finish_reason.value if choice.finish_reason is not None else None,
            stop_reason=choice.stop_reason,
        )

    def _position(self, found: TokenLogprobs) -> PositionLogprobs:
        """The runner's report of a position with the tokens' texts."""
        return {
            token_id: Logprob(logprob, rank, self._tokenizer.token_text(token_id))
            for token_id, logprob, rank in zip(found.token_ids, found.logprobs, found.ranks, strict=True)
        }
