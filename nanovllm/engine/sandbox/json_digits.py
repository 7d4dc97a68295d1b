"""Limit the digits of numbers in JSON, which a grammar of the library does not.

A small model that has begun a number may write digits until max_tokens, and never close the object.
A bound in the schema would not do: the library has none for digits, and its ranges of integers do
not reach the ends of int64.
"""

import functools
from collections import deque
from typing import Any, NamedTuple

MAX_DIGITS = 20
"""Maximum digits in a row: of the integer, of the fraction and of the exponent of a number. Every
64-bit integer and every float64 can be written. A token may exceed it by its own digits."""
MAX_ROLLBACK = 64
"""Maximum tokens that a matcher can forget."""

_QUOTE, _BACKSLASH = b'"\\'
_DIGITS = frozenset(b"0123456789")


class _Text(NamedTuple):
    """What is known of the text so far.

    Attributes:
        num_digits: digits at its end, outside of strings.
        in_string, is_escaped: whether it ends inside a string, and after a backslash there.
    """

    num_digits: int = 0
    in_string: bool = False
    is_escaped: bool = False

    def add(self, byte: int) -> "_Text":
        if self.is_escaped:
            return _Text(in_string=True)
        if self.in_string:
            return _Text(in_string=byte != _QUOTE, is_escaped=byte == _BACKSLASH)
        return _Text(self.num_digits + 1 if byte in _DIGITS else 0, byte == _QUOTE)


class DigitLimitedMatcher:
    """A matcher of the library for a grammar of JSON, with masks that end long numbers."""

    def __init__(self, matcher: Any, tokenizer: Any) -> None:
        """Wrap `matcher`, which has accepted no token yet; `tokenizer` is the library's."""
        self._matcher = matcher
        self._tokenizer = tokenizer
        self._texts = deque([_Text()], MAX_ROLLBACK + 1)  # after the last tokens

    def deep_copy(self) -> "DigitLimitedMatcher":
        """Return a matcher for another sequence, which has accepted no token yet."""
        return DigitLimitedMatcher(self._matcher.deep_copy(), self._tokenizer)

    def is_error(self) -> bool:
        """Return whether the matcher has failed."""
        return bool(self._matcher.is_error())

    def get_error(self) -> str:
        """Return why."""
        return str(self._matcher.get_error())

    def consume_tokens(self, tokens: list[int]) -> None:
        """Accept tokens."""
        self._matcher.consume_tokens(tokens)
        for token in tokens:
            after = functools.reduce(
                _Text.add, self._tokenizer.decode_bytes([token]), self._texts[-1]
            )
            self._texts.append(after)

    def rollback(self, num_tokens: int) -> bool:
        """Forget the last tokens, at most MAX_ROLLBACK; return whether that is possible."""
        for _ in range(num_tokens):
            self._texts.pop()
        return bool(self._matcher.rollback(num_tokens))

    def compute_ff_bytes(self) -> bytes:
        """Return the text that must follow."""
        forced: bytes = self._matcher.compute_ff_bytes()
        return forced

    def compute_bitmask(self) -> bytes:
        """Return the mask of the next token, without digits after MAX_DIGITS of them.

        A number that must have more, such as one of an enumeration, has them.
        """
        mask: bytes = self._matcher.compute_bitmask()
        if self._texts[-1].num_digits < MAX_DIGITS:
            return mask
        others = int.from_bytes(mask, "little") & ~_digit_tokens(self._tokenizer)
        return others.to_bytes(len(mask), "little") if others else mask


@functools.cache
def _digit_tokens(tokenizer: Any) -> int:
    """Return the mask of the tokens that begin with a digit."""
    texts = (tokenizer.decode_bytes([token]) for token in range(tokenizer.vocab_size))
    return sum(1 << token for token, text in enumerate(texts) if text[:1].isdigit())
