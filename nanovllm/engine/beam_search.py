"""Beam search: find the most probable sequences.

    beams    token ids and the sum of their log-probabilities; at most `width`, of one length
    step     continue each beam by its top 2 * width tokens; the end of text completes a sequence,
             the `width` best others stay beams
    result   completed sequences, and beams with max_tokens tokens, by sum / length ** penalty

The width is doubled because one continuation of a beam may be its end. Beams are requests of one
token with log-probabilities: the engine batches them with other requests, and the prefix cache has
what they share. The search itself is arithmetic, without an engine or threads.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from nanovllm.engine.input_processor import InputProcessor, Limits
from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.errors import ContextLengthError, InvalidRequestError
from nanovllm.outputs import CompletionOutput, PositionLogprobs, RequestOutput
from nanovllm.prompts import Prompt
from nanovllm.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class BeamSearchParams:
    """Settings of a search; raises InvalidRequestError naming the value and the limit.

    Attributes:
        beam_width: number of beams.
        max_tokens: maximum tokens of an answer.
        ignore_eos: treat the end of text as a token like others.
        length_penalty: the power of the length by which a score is divided; above 1 favours long
            answers, below 1 short ones.
    """

    beam_width: int
    max_tokens: int = 16
    ignore_eos: bool = False
    length_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name in ("beam_width", "max_tokens"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InvalidRequestError(
                    f"{name} is {value!r} but must be a whole number, at least 1", param=name
                )
        penalty = self.length_penalty
        if (
            isinstance(penalty, bool)
            or not isinstance(penalty, int | float)
            or not -10 <= penalty <= 10
        ):
            raise InvalidRequestError(
                f"length_penalty is {penalty!r} but must be a number, from -10 to 10",
                param="length_penalty",
            )

    @property
    def step_params(self) -> SamplingParams:
        """The settings of the request that continues a beam."""
        return SamplingParams(
            max_tokens=1,
            temperature=0.0,
            logprobs=2 * self.beam_width,
            ignore_eos=True,
            skip_special_tokens=False,
        )


@dataclass(frozen=True, slots=True)
class Beam:
    """An answer so far, or a completed one, whose last token may be the end of text."""

    token_ids: tuple[int, ...]
    cumulative_logprob: float
    has_ended: bool = False


class BeamSearch:
    """The search for answers to one prompt."""

    def __init__(
        self,
        prompt_token_ids: Sequence[int],
        params: BeamSearchParams,
        eos_token_ids: Iterable[int],
        *,
        prompt: str | None = None,
    ) -> None:
        """Start with the prompt as the only beam; `prompt` is its text, if it came as text."""
        self.prompt_token_ids = list(prompt_token_ids)
        self._prompt = prompt
        self.params = params
        self._eos = frozenset() if params.ignore_eos else frozenset(eos_token_ids)
        self._beams = [Beam((), 0.0)]
        self._completed: list[Beam] = []
        self.error: str | None = None

    def fail(self, error: str) -> None:
        """End the search without answers: one of its beams had an error."""
        self.error = error
        self._beams, self._completed = [], []

    @property
    def is_finished(self) -> bool:
        """Whether no beam is to be continued."""
        return not self._beams

    def prompts(self) -> list[list[int]]:
        """Return the prompt with each beam, of which one more token is requested."""
        return [[*self.prompt_token_ids, *beam.token_ids] for beam in self._beams]

    @property
    def num_beams(self) -> int:
        """Number of beams that are to be continued."""
        return len(self._beams)

    def take(self, continuations: Sequence[PositionLogprobs]) -> None:
        """Continue the beams by the log-probabilities of their next tokens, in their order."""
        count = 2 * self.params.beam_width
        candidates: list[tuple[float, Beam, int]] = []
        for beam, position in zip(self._beams, continuations, strict=True):
            top = sorted(position.items(), key=lambda item: item[1].rank)[:count]
            candidates += [
                (beam.cumulative_logprob + entry.logprob, beam, token_id) for token_id, entry in top
            ]
        candidates.sort(key=lambda candidate: -candidate[0])
        best = [
            Beam((*beam.token_ids, token_id), cumulative_logprob, token_id in self._eos)
            for cumulative_logprob, beam, token_id in candidates[:count]
        ]
        self._completed += [beam for beam in best[: self.params.beam_width] if beam.has_ended]
        self._beams = [beam for beam in best if not beam.has_ended][: self.params.beam_width]
        if self._beams and len(self._beams[0].token_ids) == self.params.max_tokens:
            self._completed += self._beams
            self._beams = []

    def best(self, count: int) -> list[Beam]:
        """Return the best `count` answers, the best first."""
        return sorted(self._completed, key=lambda beam: -self.score(beam))[:count]

    def output(self, request_id: str, tokenizer: Tokenizer, count: int) -> RequestOutput:
        """Return the best `count` answers as a RequestOutput; texts are without the end of text."""
        choices = [
            CompletionOutput(
                index=index,
                text=tokenizer.decode(beam.token_ids[: len(beam.token_ids) - beam.has_ended]),
                token_ids=list(beam.token_ids),
                cumulative_logprob=beam.cumulative_logprob,
                logprobs=None,
                finish_reason="stop" if beam.has_ended else "length",
            )
            for index, beam in enumerate(self.best(count))
        ]
        return RequestOutput(
            request_id,
            self._prompt,
            self.prompt_token_ids,
            None,
            choices,
            finished=True,
            num_generated_tokens=sum(len(choice.token_ids) for choice in choices),
            error=self.error,
        )

    def score(self, beam: Beam) -> float:
        """Return the score by which answers are ranked; the end of text has no length."""
        length = max(len(beam.token_ids) - beam.has_ended, 1)
        return float(beam.cumulative_logprob / length**self.params.length_penalty)


def begin_searches(
    prompts: Iterable[Prompt],
    params: BeamSearchParams,
    input_processor: InputProcessor,
) -> list[BeamSearch]:
    """Return a search for each prompt; raises InvalidRequestError where one could not end."""
    read = [input_processor.read_prompt(prompt) for prompt in prompts]
    for _, token_ids in read:
        _check_beams(len(token_ids), params, input_processor.limits)
    return [
        BeamSearch(token_ids, params, input_processor.model.eos_token_ids, prompt=text)
        for text, token_ids in read
    ]


def only_position(output: RequestOutput) -> PositionLogprobs:
    """Return the log-probabilities of a beam's request, which has one token."""
    (answer,) = output.outputs
    assert answer.logprobs is not None
    return answer.logprobs[0]


def _check_beams(prompt_tokens: int, params: BeamSearchParams, limits: Limits) -> None:
    widest = limits.max_logprobs // 2
    if params.beam_width > widest:
        raise InvalidRequestError(
            f"beam_width is {params.beam_width}, the limit is {widest} (half of max_logprobs); "
            "lower it, or raise max_logprobs",
            param="beam_width",
        )
    longest = min(limits.max_model_len, limits.cache_tokens)
    total = prompt_tokens + params.max_tokens
    if total > longest:
        raise ContextLengthError(
            f"the prompt has {prompt_tokens} tokens and max_tokens is {params.max_tokens}, "
            f"together {total}, more than the {longest} that there is room for; lower max_tokens",
            param="max_tokens",
        )
