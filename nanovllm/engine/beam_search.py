"""Beam search: maximize the probability of the whole output instead of that of each token.

    beam      tokens so far and their cumulative log-probability; there are at most `beam_width`
              beams, all of the same length
    advance   extend each beam by each of its 2 * beam_width most likely tokens; the end-of-text
              token completes a beam, and the best `beam_width` of the others continue
    result    completed beams, and those that reached max_tokens, ordered by
              cumulative log-probability / length ** length_penalty

Twice `beam_width` candidates suffice, because one continuation of each beam may be the end-of-text
token. A beam is extended by a request for one token with the log-probabilities of the most likely
tokens. The engine batches it with other requests and finds common prefixes of beams in its prefix
cache. The search itself is arithmetic on the results and depends on neither engine nor threads.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from nanovllm.engine.generation_request import BeamSearchParams, GenerationRequest
from nanovllm.engine.input_processor import InputProcessor
from nanovllm.engine.prompt_request import PromptRequest
from nanovllm.engine.request_limits import Limits
from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.errors import ContextLengthError, InvalidRequestError, counted, setting
from nanovllm.outputs import CompletionOutput, PositionLogprobs, RequestOutput


@dataclass(frozen=True, slots=True)
class Beam:
    """A partial or complete output; the last token of a complete one may be end-of-text."""

    token_ids: tuple[int, ...]
    cumulative_logprob: float
    has_ended: bool = False


class BeamSearch:
    """The beam search of one prompt."""

    def __init__(
        self,
        prompt_token_ids: Sequence[int],
        params: BeamSearchParams,
        eos_token_ids: Iterable[int],
        *,
        prompt: str | None = None,
    ) -> None:
        """Start with one empty beam. `prompt` is the prompt's text; None for token ids."""
        self.prompt_token_ids = list(prompt_token_ids)
        self._prompt = prompt
        self.params = params
        self._eos = frozenset() if params.ignore_eos else frozenset(eos_token_ids)
        self._beams = [Beam((), 0.0)]
        self._completed: list[Beam] = []
        self.error: str | None = None

    @property
    def is_finished(self) -> bool:
        """Whether there is no beam to continue."""
        return not self._beams

    def prompts(self) -> list[list[int]]:
        """Return the prompt plus the tokens of each beam, as the prompts of the next requests."""
        return [[*self.prompt_token_ids, *beam.token_ids] for beam in self._beams]

    @property
    def num_beams(self) -> int:
        """Number of beams to continue."""
        return len(self._beams)

    def advance(self, logprobs: Sequence[PositionLogprobs]) -> None:
        """Extend the beams by one token.

        `logprobs` has the most likely next tokens of each beam, in the order of `prompts`.
        """
        num_candidates = 2 * self.params.beam_width
        candidates: list[tuple[float, Beam, int]] = []
        for beam, position in zip(self._beams, logprobs, strict=True):
            top = sorted(position.items(), key=lambda item: item[1].rank)[:num_candidates]
            candidates += [
                (beam.cumulative_logprob + entry.logprob, beam, token_id) for token_id, entry in top
            ]
        candidates.sort(key=lambda candidate: -candidate[0])
        best = [
            Beam((*beam.token_ids, token_id), cumulative_logprob, token_id in self._eos)
            for cumulative_logprob, beam, token_id in candidates[:num_candidates]
        ]
        self._completed += [beam for beam in best[: self.params.beam_width] if beam.has_ended]
        self._beams = [beam for beam in best if not beam.has_ended][: self.params.beam_width]
        if self._beams and len(self._beams[0].token_ids) == self.params.max_tokens:
            self._completed += self._beams
            self._beams = []

    def advance_by(self, outputs: Sequence[RequestOutput]) -> None:
        """Extend the beams by one token, by the outputs of their requests; fail if one failed."""
        self.error = next((output.error for output in outputs if output.error), None)
        if self.error is not None:
            self._beams, self._completed = [], []
            return
        positions = [output.outputs[0].logprobs for output in outputs]
        self.advance([position[0] for position in positions if position])

    def best(self, count: int) -> list[Beam]:
        """Return the `count` best outputs in descending order."""
        return sorted(self._completed, key=lambda beam: -self.score(beam))[:count]

    def output(self, request_id: str, tokenizer: Tokenizer, count: int) -> RequestOutput:
        """Return the `count` best outputs; their text excludes the end-of-text token."""
        follows_text = tokenizer.has_text(self.prompt_token_ids)
        outputs = [
            CompletionOutput(
                index=index,
                text=tokenizer.decode(
                    beam.token_ids[: len(beam.token_ids) - beam.has_ended],
                    follows_text=follows_text,
                ),
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
            outputs,
            finished=True,
            num_generated_tokens=sum(len(output.token_ids) for output in outputs),
            error=self.error,
        )

    def score(self, beam: Beam) -> float:
        """Return a beam's length-normalized score; the length excludes the end-of-text token."""
        length = max(len(beam.token_ids) - beam.has_ended, 1)
        return float(beam.cumulative_logprob / length**self.params.length_penalty)


class BeamSearches:
    """The searches of all prompts of a request."""

    def __init__(self, request: GenerationRequest, input_processor: InputProcessor) -> None:
        """Check every prompt, and begin its search.

        Raises InvalidRequestError if a prompt is invalid, or its search does not fit the limits.
        """
        assert isinstance(request.params, BeamSearchParams)
        self.params: BeamSearchParams = request.params
        self._request = request
        self._input_processor = input_processor
        read = [input_processor.reader.read(prompt) for prompt in request.prompts]
        for _, token_ids in read:
            _check_beams(len(token_ids), self.params, input_processor.limits)
        eos_token_ids = input_processor.model.eos_token_ids
        self._searches = [
            BeamSearch(token_ids, self.params, eos_token_ids, prompt=text)
            for text, token_ids in read
        ]

    @property
    def client(self) -> str:
        """Identity of who sent the request."""
        return self._request.client

    @property
    def num_prompt_tokens(self) -> int:
        """Total number of tokens of the prompts."""
        return sum(len(search.prompt_token_ids) for search in self._searches)

    @property
    def num_beams(self) -> int:
        """Total number of beams of all prompts."""
        return len(self._searches) * self.params.beam_width

    def rounds(self, max_num_seqs: int) -> Iterator[tuple[PromptRequest, ...]]:
        """Yield the requests of one token that extend the beams, round by round.

        The caller runs each round to its end before it takes the next one. Only as many searches
        proceed at once as fill a step of `max_num_seqs` sequences.
        """
        group_size = max(max_num_seqs // self.params.beam_width, 1)
        for start in range(0, len(self._searches), group_size):
            group = self._searches[start : start + group_size]
            while unfinished := [search for search in group if not search.is_finished]:
                prompts = [token_ids for search in unfinished for token_ids in search.prompts()]
                step_params = self.params.step_params
                beams = self._input_processor.process(
                    replace(self._request, prompts=prompts, params=step_params, must_fit=False)
                )
                yield beams
                outputs = iter([beam.output() for beam in beams])
                for search in unfinished:
                    search.advance_by([next(outputs) for _ in range(search.num_beams)])

    def outputs(self) -> list[RequestOutput]:
        """Return the output of each search, the best of its beams, once all have ended."""
        processor, count = self._input_processor, self._request.n or self.params.beam_width
        return [
            search.output(
                processor.new_request_id(self._request.request_id), processor.tokenizer, count
            )
            for search in self._searches
        ]


def _check_beams(prompt_tokens: int, params: BeamSearchParams, limits: Limits) -> None:
    max_width = limits.max_logprobs // 2
    if params.beam_width > max_width:
        raise InvalidRequestError(
            f"{setting('beam_width')} is {params.beam_width}, the limit is {max_width} (half of "
            "max_logprobs); lower it, or raise max_logprobs",
            param="beam_width",
        )
    max_len = min(limits.max_model_len, limits.cache_tokens)
    num_tokens = prompt_tokens + params.max_tokens
    if num_tokens > max_len:
        raise ContextLengthError(
            f"the prompt has {counted(prompt_tokens, 'token')} and {setting('max_tokens')} is "
            f"{params.max_tokens:,}, together {num_tokens:,}, more than the limit of "
            f"{max_len:,}; lower {setting('max_tokens')}",
            param="max_tokens",
        )
