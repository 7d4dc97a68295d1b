"""Log-probabilities in responses: the text that each token adds, and finite numbers.

A character may be split over several tokens. As in vLLM, the earlier ones add no text and the last
one adds the whole character, so that the texts of all tokens join to the text of the choice.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from nanovllm.engine.detokenizer import IncrementalDecoder
from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.outputs import Logprob, PositionLogprobs
from nanovllm.server.openai.response_types import PromptLogprob

MINUS_INFINITY = -9999.0  # JSON has no infinity; OpenAI-compatible servers send this


class TokenTexts:
    """Shows the tokens of one text in order, each by the text that it adds or by its id.

    A special token that the text leaves out is shown by its name.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        skip_special_tokens: bool,
        as_token_ids: bool,
        prompt_token_ids: Sequence[int] = (),
    ) -> None:
        """Start with no tokens after a prompt; `as_token_ids` shows `token_id:123`, not texts."""
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset[int]()
        self._as_token_ids = as_token_ids
        self._decoder = IncrementalDecoder(
            tokenizer,
            skip_special_tokens=skip_special_tokens,
            follows_text=tokenizer.has_text(
                prompt_token_ids, skip_special_tokens=skip_special_tokens
            ),
        )

    def peek(self, token_id: int) -> str:
        """Return how a token would be shown if it came next."""
        if self._as_token_ids:
            return f"token_id:{token_id}"
        if token_id in self._skipped:
            return self._tokenizer.token_text(token_id)
        return self._decoder.peek(token_id)

    def push(self, token_id: int, *, is_last: bool) -> tuple[str, int]:
        """Add the next token. Return how it is shown, and the number of characters that it adds.

        An unfinished character at the end, U+FFFD, belongs to the last token.
        """
        shown = self.peek(token_id)
        added = self._decoder.push(token_id)
        if is_last and token_id not in self._skipped:
            rest = self._decoder.flush()
            return shown if self._as_token_ids else shown + rest, len(added) + len(rest)
        return shown, len(added)


class ShownPosition(NamedTuple):
    """A position of a text as a response shows it.

    Attributes:
        token_id: the token at the position.
        logprobs: the position's log-probabilities; None for the first token of a prompt.
        texts: how the token and each token of `logprobs` are shown, by id.
        num_added: number of characters that the token adds to the text.
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
    """Add tokens and yield their positions; `is_end`: the text ends with the last of them."""
    last = len(token_ids) - 1
    for index, (token_id, position) in enumerate(zip(token_ids, positions, strict=True)):
        shown = {other: texts.peek(other) for other in position or ()}
        shown[token_id], num_added = texts.push(token_id, is_last=is_end and index == last)
        yield ShownPosition(token_id, position, shown, num_added)


def finite(logprob: float) -> float:
    """Return a log-probability; -9999 for minus infinity and NaN."""
    return max(MINUS_INFINITY, logprob)  # in this order, which returns the first for NaN


def top(position: PositionLogprobs, count: int) -> list[tuple[int, Logprob]]:
    """Return the `count` most likely tokens of a position, the most likely first."""
    entries = sorted(position.items(), key=lambda item: item[1].rank)
    return [(token_id, entry) for token_id, entry in entries if entry.rank <= count]


def prompt_logprobs(
    positions: Sequence[PositionLogprobs | None] | None,
) -> list[dict[str, PromptLogprob] | None]:
    """Return a prompt's log-probabilities by token id, position by position."""
    return [None if position is None else _by_id(position) for position in positions or ()]


def _by_id(position: PositionLogprobs) -> dict[str, PromptLogprob]:
    return {
        str(i): {"logprob": finite(e.logprob), "rank": e.rank, "decoded_token": e.decoded_token}
        for i, e in position.items()
    }
