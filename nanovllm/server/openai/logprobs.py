"""Log-probabilities as answers show them: the text that each token adds, and numbers that JSON has.

A character may be split over several tokens. As in vLLM, the earlier ones add no text and the last
one adds the whole character, so that the texts of all tokens join to the text of the answer.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from nanovllm.engine.detokenizer import IncrementalDecoder
from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.outputs import Logprob, PositionLogprobs
from nanovllm.server.openai.response_types import PromptLogprob

MINUS_INFINITY = -9999.0  # what OpenAI-compatible servers send for it: JSON has no infinity


class TokenTexts:
    """What stands for each token of one text, in order: the text that it adds, or its id.

    A special token that the text leaves out is shown by its name.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, skip_special_tokens: bool, as_token_ids: bool
    ) -> None:
        """Start with no tokens; `as_token_ids` shows `token_id:123` in place of texts."""
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset[int]()
        self._as_token_ids = as_token_ids
        self._decoder = IncrementalDecoder(tokenizer, skip_special_tokens=skip_special_tokens)

    def peek(self, token_id: int) -> str:
        """Return what would stand for a token if it came next."""
        if self._as_token_ids:
            return f"token_id:{token_id}"
        if token_id in self._skipped:
            return self._tokenizer.token_text(token_id)
        return self._decoder.peek(token_id)

    def push(self, token_id: int, *, is_last: bool) -> tuple[str, int]:
        """Take the next token. Return what stands for it, and the number of characters that it adds.

        What is left of an unfinished character at the end, U+FFFD, belongs to the last token.
        """
        shown = self.peek(token_id)
        added = self._decoder.push(token_id)
        if is_last and token_id not in self._skipped:
            rest = self._decoder.flush()
            return shown if self._as_token_ids else shown + rest, len(added) + len(rest)
        return shown, len(added)


class ShownPosition(NamedTuple):
    """A position as it is shown.

    Attributes:
        token_id: the token that stands there.
        logprobs: those of the position; None for the first token of a prompt.
        texts: what stands for the token, and for each token that `logprobs` has.
        num_added: characters that the token adds to the text.
    """

    token_id: int
    logprobs: PositionLogprobs | None
    texts: dict[int, str]
    num_added: int


def push_all(
    texts: TokenTexts,
    token_ids: Sequence[int],
    positions: Sequence[PositionLogprobs | None],
    *,
    is_end: bool,
) -> Iterator[ShownPosition]:
    """Push tokens and yield their positions; `is_end` says that the text ends with the last of them."""
    last = len(token_ids) - 1
    for place, (token_id, position) in enumerate(zip(token_ids, positions, strict=True)):
        shown = {other: texts.peek(other) for other in position or ()}
        shown[token_id], num_added = texts.push(token_id, is_last=is_end and place == last)
        yield ShownPosition(token_id, position, shown, num_added)


def finite(logprob: float) -> float:
    """Return what JSON can say: minus infinity, and what is not a number, as -9999."""
    return max(
        MINUS_INFINITY, logprob
    )  # in this order: nothing is larger than NaN, nor NaN than anything


def likeliest(position: PositionLogprobs, count: int) -> list[tuple[int, Logprob]]:
    """Return the `count` most likely tokens of a position, the most likely first."""
    entries = sorted(position.items(), key=lambda item: item[1].rank)
    return [(token_id, entry) for token_id, entry in entries if entry.rank <= count]


def prompt_logprobs(
    positions: Sequence[PositionLogprobs | None] | None,
) -> list[dict[str, PromptLogprob] | None]:
    """Return log-probabilities of a prompt's tokens, by token id; null where there is none."""
    return [None if position is None else _by_id(position) for position in positions or ()]


def _by_id(position: PositionLogprobs) -> dict[str, PromptLogprob]:
    return {
        str(i): {"logprob": finite(e.logprob), "rank": e.rank, "decoded_token": e.decoded_token}
        for i, e in position.items()
    }
