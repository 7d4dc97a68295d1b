"""Incremental detokenization: release complete characters only, and no part of a stop string.

The concatenation of the released pieces equals the text of all tokens decoded at once, cut at the
stop string.
"""

from collections.abc import Sequence
from functools import lru_cache

from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.model.token_spelling import Spelling, strip_prefix
from nanovllm.sampling_params import MAX_STOP_STRINGS

_REPLACEMENT = "\ufffd"


class IncrementalDecoder:
    """Decodes one sequence token by token."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        skip_special_tokens: bool = True,
        follows_text: bool = False,
    ) -> None:
        """Start with no tokens; `follows_text` is that of `Tokenizer.decode`."""
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset[int]()
        self._spelling = spelling = tokenizer.spelling
        self._utf8 = (spelling or Spelling()).utf8_decoder()
        self._num_prefix_spaces = (
            0 if spelling is None or follows_text else spelling.num_prefix_spaces
        )
        # Used only if tokens have no bytes: the tokens of the last released text, followed by
        # pending tokens, whose text is incomplete.
        self._window: list[int] = []
        self._window_text = ""  # text of the window without its pending tokens
        self._num_pending = 0

    def push(self, token_id: int) -> str:
        """Return the characters that this token completes."""
        if token_id in self._skipped:
            return ""
        if self._spelling is None:
            return self._push_by_difference(token_id)
        text = self._utf8.decode(self._tokenizer.token_bytes(token_id))
        if self._num_prefix_spaces:
            text, self._num_prefix_spaces = strip_prefix(text, self._num_prefix_spaces)
        return text

    def peek(self, token_id: int) -> str:
        """Return what `push` would return for this token, without pushing it."""
        if token_id in self._skipped:
            return ""
        if self._spelling is not None:
            pending, _ = self._utf8.getstate()
            data = pending + self._tokenizer.token_bytes(token_id)
            text = self._spelling.decode(data, is_whole=False)
            num_spaces = self._num_prefix_spaces
            return strip_prefix(text, num_spaces)[0] if num_spaces else text
        text = self._tokenizer.decode([*self._window, token_id], skip_special_tokens=False)
        return "" if self._is_unfinished(text) else text[len(self._window_text) :]

    def flush(self) -> str:
        """Return the remaining text; an incomplete character at the end becomes U+FFFD."""
        if self._spelling is not None:
            return self._utf8.decode(b"", final=True)
        text = self._tokenizer.decode(self._window, skip_special_tokens=False)
        rest = text[len(self._window_text) :]
        self._window, self._window_text, self._num_pending = [], "", 0
        return rest

    def _push_by_difference(self, token_id: int) -> str:
        """Return what the pending tokens add to the text of the window.

        Tokenizers whose tokens have no bytes may insert characters between tokens, depending on the
        neighbours. The window contains all tokens of the last released text, because a character
        may span several tokens, and its last token alone cannot be decoded.
        """
        self._window.append(token_id)
        self._num_pending += 1
        text = self._tokenizer.decode(self._window, skip_special_tokens=False)
        if self._is_unfinished(text):
            return ""
        new = text[len(self._window_text) :]
        self._window, self._num_pending = self._window[-self._num_pending :], 0
        self._window_text = self._tokenizer.decode(self._window, skip_special_tokens=False)
        return new

    def _is_unfinished(self, text: str) -> bool:
        """Return whether the window's text has no new complete character."""
        return len(text) <= len(self._window_text) or text.endswith(_REPLACEMENT)


class StopStrings:
    """Holds back the end of a text while it may be the beginning of a stop string.

    Each stop string is matched as in Knuth, Morris and Pratt (1977): the cost of a character does
    not depend on the length of the stop strings or of the held text.
    """

    def __init__(self, stops: Sequence[str], *, include_in_output: bool = False) -> None:
        """Match any of `stops`, none of them empty."""
        self._stops = tuple(stops)
        self._failures = tuple(map(_failure, self._stops))
        self._matched = [0] * len(self._stops)  # length of the prefix that ends the text
        self._include = include_in_output
        self._held = ""

    def push(self, text: str, *, may_stop: bool = True) -> tuple[str, str | None]:
        """Return the text that can be released, and the stop string if one is complete.

        If several are complete, the stop string that ends first is returned, and the longest of
        those that end there. With `may_stop=False`, stop strings that end in `text` are ignored,
        but one may begin in it. The held text is always shorter than the longest stop string.
        """
        if not self._stops:
            return text, None
        ends = [
            (end, -len(stop), stop)
            for index, stop in enumerate(self._stops)
            if (end := self._first_end(index, text)) is not None
        ]
        num_held = len(self._held)
        text = self._held + text
        if ends and may_stop:
            end, _, stop = min(ends)
            self._held = ""
            return text[: num_held + end if self._include else num_held + end - len(stop)], stop
        released = len(text) - max(self._matched)
        self._held = text[released:]
        return text[:released], None

    def _first_end(self, index: int, text: str) -> int | None:
        """Return where a stop string first ends in the new text, and update its matched prefix."""
        stop, failure, matched = self._stops[index], self._failures[index], self._matched[index]
        first_end = None
        if matched or stop[0] in text:
            for end, character in enumerate(text, start=1):
                while matched and stop[matched] != character:
                    matched = failure[matched - 1]
                matched += stop[matched] == character
                if matched == len(stop):
                    first_end = end if first_end is None else first_end
                    matched = failure[-1]
        self._matched[index] = matched
        return first_end

    def flush(self) -> str:
        """Return the held text when the output ends without a stop string."""
        held, self._held = self._held, ""
        return held


@lru_cache(8 * MAX_STOP_STRINGS)  # all choices of a request have the same ones
def _failure(stop: str) -> Sequence[int]:
    """Return the length of the longest border of each prefix of `stop`.

    A border is a proper prefix that is also a suffix.
    """
    borders, length = [0], 0
    for character in stop[1:]:
        while length and stop[length] != character:
            length = borders[length - 1]
        length += stop[length] == character
        borders.append(length)
    return borders
