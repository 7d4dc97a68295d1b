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

    def peek(self, token_id: int) -> str:
        """Return what `push` would return for this token, which is not pushed."""
        if token_id in self._skipped:
            return ""
        if self._tokenizer.is_byte_level:
            pending, _ = self._utf8.getstate()
            data = pending + self._tokenizer.token_bytes(token_id)
            return codecs.utf_8_decode(data, "replace", False)[0]
        text = self._tokenizer.decode([*self._window, token_id], skip_special_tokens=False)
        return "" if self._is_unfinished(text) else text[len(self._window_text) :]

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
        if self._is_unfinished(text):
            return ""
        new = text[len(self._window_text) :]
        self._window, self._pending = self._window[-self._pending :], 0
        self._window_text = self._tokenizer.decode(self._window, skip_special_tokens=False)
        return new

    def _is_unfinished(self, text: str) -> bool:
        """Whether the window's text has grown by no whole character."""
        return len(text) <= len(self._window_text) or text.endswith(_REPLACEMENT)


class StopStrings:
    """Holds text back while its end may be the beginning of a stop string.

    Each stop string is searched for as in Knuth, Morris, Pratt (1977): a character costs the same however long the stop strings are and
    however much is held back.
    """

    def __init__(
        self,
        stops: Sequence[str],
        *,
        include_in_output: bool = False,
        borders: Sequence[Sequence[int]] | None = None,
    ) -> None:
        """Look for any of `stops`, none of them empty; `borders` are theirs, where they are known."""
        self._stops = tuple(stops)
        self._borders = tuple(map(_borders, self._stops)) if borders is None else borders
        self._matched = [0] * len(self._stops)  # characters of each that the text ends with
        self._include = include_in_output
        self._held = ""

    def copy(self) -> "StopStrings":
        """One for another text, which has seen nothing of it."""
        return StopStrings(self._stops, include_in_output=self._include, borders=self._borders)

    def push(self, text: str, *, may_stop: bool = True) -> tuple[str, str | None]:
        """Text that is safe to release, and the stop string if one is complete: the first to end, the longest of those.

        With `may_stop=False` none is complete with this text, but one may begin in it. The held text is always shorter than the
        longest stop string.
        """
        if not self._stops:
            return text, None
        ends = [
            (end, -len(stop), stop)
            for index, stop in enumerate(self._stops)
            if (end := self._first_end(index, text)) is not None
        ]
        held = len(self._held)
        text = self._held + text
        if ends and may_stop:
            end, _, stop = min(ends)
            self._held = ""
            return text[: held + end if self._include else held + end - len(stop)], stop
        released = len(text) - max(self._matched)
        self._held = text[released:]
        return text[:released], None

    def _first_end(self, index: int, text: str) -> int | None:
        """Where in the new text a stop string ends for the first time; notes how much of it the text ends with."""
        stop, borders, matched = self._stops[index], self._borders[index], self._matched[index]
        found = None
        if matched or stop[0] in text:
            for place, character in enumerate(text, start=1):
                while matched and stop[matched] != character:
                    matched = borders[matched - 1]
                matched += stop[matched] == character
                if matched == len(stop):
                    found = place if found is None else found
                    matched = borders[-1]
        self._matched[index] = matched
        return found

    def flush(self) -> str:
        """Text still held when the answer ends otherwise."""
        held, self._held = self._held, ""
        return held


def _borders(stop: str) -> list[int]:
    """For each beginning of `stop`, the length of its longest proper beginning that it also ends with."""
    borders, length = [0], 0
    for character in stop[1:]:
        while length and stop[length] != character:
            length = borders[length - 1]
        length += stop[length] == character
        borders.append(length)
    return borders
