"""NgramIndex: what followed the last tokens of a sequence where they occurred before.

The index is that of LZ77 as in zlib: a table from the last n tokens to their latest position, and
for each position the one before it with the same n tokens. Adding a token takes constant time, and
a look-up follows a bounded number of positions. The memory grows with the tokens of the sequence.

Prompt lookup decoding: Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding.
"""

from array import array
from collections.abc import Sequence

_MAX_CANDIDATES = 8


class NgramIndex:
    """Positions of the n-grams of one sequence.

    Attributes:
        matched: length of the n-gram that the last draft follows.
    """

    def __init__(self, shortest: int, longest: int) -> None:
        """Look up the last `shortest` to `longest` tokens."""
        self._shortest, self._longest = shortest, longest
        self.matched = 0
        self._latest: dict[tuple[int, ...], int] = {}  # of each n-gram, by the end of it
        self._earlier = array("q")  # for each position the end of the same n-gram before, or -1

    def draft(self, tokens: Sequence[int], count: int, num_guessed: int = 0) -> tuple[int, ...]:
        """Return at most `count` tokens that may follow `tokens`; none if nothing is found.

        `tokens` are those of the last call, and perhaps more; the last `num_guessed` are not added.
        The longest n-gram counts, and of equally long ones the latest.
        """
        self._add(tokens, len(tokens) - num_guessed)
        best, best_length = -1, 0
        end = self._latest.get(tuple(tokens[-self._shortest :]), -1)
        if end == len(tokens) - 1:
            end = self._earlier[end] if tokens else -1
        for _ in range(_MAX_CANDIDATES):
            if end < 0 or best_length == self._longest:
                break
            length = self._match(tokens, end)
            if length > best_length:
                best, best_length = end, length
            end = self._earlier[end]
        self.matched = best_length
        drafted: list[int] = []
        while best >= 0 and len(drafted) < count:  # a text that repeats goes on with the draft
            best += 1
            drafted.append(tokens[best] if best < len(tokens) else drafted[best - len(tokens)])
        return tuple(drafted)

    def _add(self, tokens: Sequence[int], count: int) -> None:
        """Add those of the first `count` tokens that are new."""
        size, earlier, latest = self._shortest, self._earlier, self._latest
        for end in range(len(earlier), count):
            if end + 1 < size:
                earlier.append(-1)
                continue
            ngram = tuple(tokens[end + 1 - size : end + 1])
            earlier.append(latest.get(ngram, -1))
            latest[ngram] = end

    def _match(self, tokens: Sequence[int], end: int) -> int:
        """Return how many tokens up to `end` are the last ones of `tokens`, at most `longest`."""
        last, length = len(tokens) - 1, self._shortest
        limit = min(self._longest, end + 1)
        while length < limit and tokens[end - length] == tokens[last - length]:
            length += 1
        return length
