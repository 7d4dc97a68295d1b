"""Limit the digits of numbers in JSON, which a grammar of the library does not.

A small model that has begun a number may write digits until max_tokens, and never close the object.
A bound in the schema would not do: the library has none for digits, and its ranges of integers do
not reach the ends of int64.
"""

from functools import cache
from typing import Any

MAX_DIGITS = 20
"""Maximum digits in a row: of the integer, of the fraction and of the exponent of a number. Every
64-bit integer and every float64 can be written. A token may exceed it by its own digits."""

_QUOTE, _BACKSLASH = b'"\\'
_DIGITS = frozenset(b"0123456789")


class DigitLimitedMatcher:
    """A matcher of the library for a grammar of JSON, with masks that end long numbers."""

    def __init__(self, matcher: Any, tokenizer: Any) -> None:
        """Wrap `matcher`, which has accepted no token yet; `tokenizer` is the library's."""
        self._matcher = matcher
        self._tokenizer = tokenizer
        self._num_digits = 0  # at the end of the text, outside of strings
        self._in_string = self._is_escaped = False

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
        for byte in self._tokenizer.decode_bytes(tokens):
            self._push(byte)

    def compute_bitmask(self) -> bytes:
        """Return the mask of the next token, without digits after MAX_DIGITS of them.

        A number that must have more, such as one of an enumeration, has them.
        """
        mask: bytes = self._matcher.compute_bitmask()
        if self._num_digits < MAX_DIGITS:
            return mask
        others = int.from_bytes(mask, "little") & ~_digit_tokens(self._tokenizer)
        return others.to_bytes(len(mask), "little") if others else mask

    def _push(self, byte: int) -> None:
        if self._is_escaped:
            self._is_escaped = False
        elif self._in_string:
            self._is_escaped = byte == _BACKSLASH
            self._in_string = byte != _QUOTE
        else:
            self._num_digits = self._num_digits + 1 if byte in _DIGITS else 0
            self._in_string = byte == _QUOTE


@cache
def _digit_tokens(tokenizer: Any) -> int:
    """Return the mask of the tokens that begin with a digit."""
    texts = (tokenizer.decode_bytes([token]) for token in range(tokenizer.vocab_size))
    return sum(1 << token for token, text in enumerate(texts) if text[:1].isdigit())
