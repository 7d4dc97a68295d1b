"""Find tokens that may come next in a grammar, and the mask after each of them.

A grammar often forces the next bytes, such as the keys of a JSON object. Mostly its mask allows
only one token then. At the end of these bytes it also allows tokens that go beyond them; the guess
is the token that the tokenizer gives for the bytes. Where nothing is forced, n-grams count: what
followed the last tokens, forced ones included, where they occurred before in the prompt or the
output.
"""

import time
from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

from nanovllm.engine.ngram import NgramIndex

_MAX_FORCED = 32  # bytes that are tokenized
_STOP_S = 0.002  # processor time after which a path ends where it is
_FREE_S, _FREE_S_PER_PATH = 0.1, 0.001


class PathRequest(NamedTuple):
    """A request for a path.

    Attributes:
        limit: maximum number of its tokens.
        ngram: lengths of the shortest and the longest n-gram that is looked up; empty for none.
        prompt: tokens before those of the sequence. Only the first request of a sequence has them.
    """

    limit: int
    ngram: Sequence[int] = ()
    prompt: Sequence[int] = ()


class Path(NamedTuple):
    """Tokens that may come next.

    Attributes:
        tokens: the tokens.
        masks: the mask after each.
        num_forced: how many of the first tokens spell forced bytes.
        is_lost: whether the matcher has failed, and must be replaced.
    """

    tokens: Sequence[int] = ()
    masks: Sequence[bytes] = ()
    num_forced: int = 0
    is_lost: bool = False


class PathFinder:
    """Finds the paths of one sequence, in a budget of processor time; that of masks is apart.

    Attributes:
        tokens: those of the prompt, from the first request on, and those that are accepted.
    """

    def __init__(self) -> None:
        """Start with the time for many paths, because the first ones take longer."""
        self.tokens = array("q")
        self._ngrams: NgramIndex | None = None
        self._left_s = _FREE_S

    def find(self, matcher: Any, mask: bytes, tokenizer: Any, request: PathRequest) -> Path:
        """Return a path, which is empty while the budget is spent.

        The matcher, whose next mask is `mask`, stays where it is, unless it is lost.
        """
        if self._ngrams is None and request.ngram:
            self.tokens[:0] = array("q", request.prompt)
            self._ngrams = NgramIndex(*request.ngram)
        self._left_s += _FREE_S_PER_PATH
        if self._left_s < 0.0:
            return Path()
        started_s = time.thread_time()
        path = self._find(matcher, mask, tokenizer, request.limit, started_s + _STOP_S)
        self._left_s -= time.thread_time() - started_s
        return path

    def _find(self, matcher: Any, mask: bytes, tokenizer: Any, limit: int, end_s: float) -> Path:
        """Follow a path until `end_s` by `time.thread_time()`, and go back."""
        tokens: list[int] = []
        masks: list[bytes] = []
        expected: list[int] = []
        num_forced = 0
        try:
            while len(tokens) < limit and time.thread_time() < end_s:
                forced = matcher.compute_ff_bytes()
                if forced:
                    token = _guess(mask, forced, tokenizer)
                else:
                    expected = self._look_up(tokens, expected, limit)
                    if len(expected) == len(tokens):
                        break
                    token = expected[len(tokens)]
                if not _allows(mask, token):
                    break
                num_forced += bool(forced) and num_forced == len(tokens)
                matcher.consume_tokens([token])
                tokens.append(token)
                mask = b"" if matcher.is_error() else matcher.compute_bitmask()
                if matcher.is_error():
                    break
                masks.append(mask)
            is_lost = matcher.is_error() or not matcher.rollback(len(tokens))
        except MemoryError:
            raise
        except BaseException:  # noqa: BLE001 - a panic of the library is no Exception
            is_lost = True
        return Path(tokens[: len(masks)], masks, min(num_forced, len(masks)), is_lost)

    def _look_up(self, path: list[int], expected: list[int], limit: int) -> list[int]:
        """Return a path with what may follow it: `expected`, as long as the path is as expected."""
        size = len(path)
        if self._ngrams is None:
            return path
        if len(expected) > size and expected[:size] == path:
            return expected
        num_known = len(self.tokens)
        self.tokens.extend(path)  # a copy of all would make long texts slow
        try:
            return [*path, *self._ngrams.draft(self.tokens, limit - size, size)]
        finally:
            del self.tokens[num_known:]


def _guess(mask: bytes, forced: bytes, tokenizer: Any) -> int:
    """Return the token that probably begins to spell forced bytes."""
    allowed = int.from_bytes(mask, "little")
    if allowed & (allowed - 1) == 0:
        return allowed.bit_length() - 1
    first: int = tokenizer.tokenize_bytes(forced[:_MAX_FORCED])[0]
    return first


def _allows(mask: bytes, token: int) -> bool:
    return token >> 3 < len(mask) and bool(mask[token >> 3] >> (token & 7) & 1)
