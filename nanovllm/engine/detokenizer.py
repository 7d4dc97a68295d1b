"""Text of an answer as it grows: never half a character, nothing that may turn out to be a stop string.

Joining everything that was released always gives the text that decoding all tokens at once gives, cut at the stop string.
"""

import codecs
from collections.abc import Sequence

from nanovllm.engine.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"


class IncrementalDecoder:
    """Token by token decoding of one sequence."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        """Start with no tokens."""
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset[int]()
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._window: list[
            int
        ] = []  # only for tokenizers that are not byte-level: the tokens of the last text, then those still without
        self._window_text = ""  # what the window's first part says by itself
        self._pending = 0

    def push(self, token_id: int) -> str:
        """Characters that this token completes."""
        if token_id in self._skipped:
            return ""
        if self._tokenizer.is_byte_level:
            return self._utf8.decode(self._tokenizer.token_bytes(token_id))
        return self._push_by_difference(token_id)

    def flush(self) -> str:
        """What is left of an unfinished character at the end: U+FFFD."""
        if self._tokenizer.is_byte_level:
            return self._utf8.decode(b"", final=True)
        rest = self._tokenizer.decode(self._window, skip_special_tokens=False)[
            len(self._window_text) :
        ]
        self._window, self._window_text, self._pending = [], "", 0
        return rest

    def _push_by_difference(self, token_id: int) -> str:
        """Decode a few tokens with and without the new ones: what other tokenizers put between tokens depends on the neighbours.

        All tokens of the text released last stay in the window: a character may need several, and its last alone would be broken.
        """
        self._window.append(token_id)
        self._pending += 1
        text = self._tokenizer.decode(self._window, skip_special_tokens=False)
        if len(text) <= len(self._window_text) or text.endswith(_REPLACEMENT):
            return ""
        new = text[len(self._window_text) :]
        self._window, self._pending = self._window[-self._pending :], 0
        self._window_text = self._tokenizer.decode(self._window, skip_special_tokens=False)
        return new


class StopStrings:
    """Holds text back while its end may be the beginning of a stop string."""

    def __init__(self, stops: Sequence[str], *, include_in_output: bool = False) -> None:
        """Look for any of `stops`, none of them empty."""
        self._stops = tuple(stops)
        self._include = include_in_output
        self._held = ""

    def push(self, text: str, *, may_stop: bool = True) -> tuple[str, str | None]:
        """Text that is safe to release, and the stop string if one is complete: the first to end, the longest of those.

        With `may_stop=False` none is complete with this text, but one may begin in it. The held text is always shorter than the
        longest stop string, so that a push costs what the new text is long.
        """
        if not self._stops:
            return text, None
        held = len(self._held)
        text = self._held + text
        ends = [
            (end, -len(stop), stop)
            for stop in self._stops
            if (end := _first_end(text, stop, held)) is not None
        ]
        if ends and may_stop:
            end, _, stop = min(ends)
            self._held = ""
            return text[: end if self._include else end - len(stop)], stop
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None

    def flush(self) -> str:
        """Text still held when the answer ends otherwise."""
        held, self._held = self._held, ""
        return held


def _first_end(text: str, stop: str, already_seen: int) -> int | None:
    """Where the first occurrence of `stop` ends that is not wholly in the text seen before."""
    place = text.find(stop, max(0, already_seen - len(stop) + 1))
    return None if place < 0 else place + len(stop)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper beginning of `stop` that `text` ends with."""
    return next(
        (
            size
            for size in range(min(len(stop) - 1, len(text)), 0, -1)
            if text.endswith(stop[:size])
        ),
        0,
    )
