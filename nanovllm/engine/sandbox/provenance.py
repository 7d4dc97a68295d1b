"""Text that knows which of its characters a template wrote itself.

Strings of the template are `Text` whose characters are all its own; what messages bring are ordinary strings, none of whose characters
are. The operations below keep account; all others give ordinary strings. So whatever a template does with the text of a message,
none of it ever counts as the template's.
"""

from collections.abc import Iterable
from itertools import pairwise
from typing import Any, SupportsIndex

Spans = tuple[tuple[int, int], ...]
"""Ranges of characters, in order and apart from each other."""


class Text(str):
    """A string some of whose characters a template wrote; `Text(value)` has none."""

    __slots__ = ("_spans",)
    _spans: Spans

    def __new__(cls, value: object = "", spans: Spans = ()) -> "Text":
        """Make a text of `value` whose `spans` are the template's."""
        text = super().__new__(cls, value)
        text._spans = spans
        return text

    def __str__(self) -> str:
        return self

    def __add__(self, other: object) -> str:
        return joined((self, other)) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: object) -> str:
        return joined((other, self)) if isinstance(other, str) else NotImplemented

    def __mul__(self, times: SupportsIndex) -> str:
        repeated = super().__mul__(times)
        if self._spans == ((0, len(self)),):
            return written(repeated)
        return joined([self] * times.__index__()) if self._spans else repeated

    __rmul__ = __mul__

    def __getitem__(self, key: Any) -> str:
        found = super().__getitem__(key)
        if not isinstance(key, slice):
            start = key.__index__() % len(self)
            return self._cut(start, start + 1)
        start, _, step = key.indices(len(self))
        return self._cut(start, start + len(found)) if step == 1 else found

    def join(self, parts: Iterable[str]) -> str:
        """See str."""
        listed = list(parts)
        between: list[str] = [self] * (2 * len(listed) - 1)
        between[::2] = listed
        return joined(between)

    def lower(self) -> str:
        """See str."""
        return joined(self._mapped(str.lower))

    def upper(self) -> str:
        """See str."""
        return joined(self._mapped(str.upper))

    def strip(self, characters: str | None = None) -> str:
        """See str."""
        start = len(self) - len(super().lstrip(characters))
        return self._cut(start, start + len(super().strip(characters)))

    def lstrip(self, characters: str | None = None) -> str:
        """See str."""
        return self._cut(len(self) - len(super().lstrip(characters)), len(self))

    def rstrip(self, characters: str | None = None) -> str:
        """See str."""
        return self._cut(0, len(super().rstrip(characters)))

    def removeprefix(self, prefix: str) -> str:
        """See str."""
        return self._cut(len(prefix) if self.startswith(prefix) else 0, len(self))

    def removesuffix(self, suffix: str) -> str:
        """See str."""
        end = len(self) - (len(suffix) if self.endswith(suffix) else 0)
        return self._cut(0, end)

    def replace(self, old: str, new: str, count: SupportsIndex = -1) -> str:
        """See str."""
        if not old:
            return super().replace(old, new, count)
        parts: list[str] = []
        begin, left = 0, count.__index__()
        while left and (found := self.find(old, begin)) >= 0:
            parts += (self._cut(begin, found), new)
            begin, left = found + len(old), left - 1
        return joined([*parts, self._cut(begin, len(self))])

    def _cut(self, start: int, end: int) -> "Text":
        """Return the characters of a range."""
        spans = ((max(start, low), min(end, high)) for low, high in self._spans)
        return Text(
            super().__getitem__(slice(start, end)),
            tuple((low - start, high - start) for low, high in spans if low < high),
        )

    def _mapped(self, function: Any) -> list[str]:
        """Return the text in parts that are the template's or not, with `function` applied to each."""
        edges = [0, *(edge for span in self._spans for edge in span), len(self)]
        parts: list[str] = []
        for place, (start, end) in enumerate(pairwise(edges)):
            part = function(str.__getitem__(self, slice(start, end)))
            parts.append(written(part) if place % 2 else part)
        return parts


def written(text: str) -> Text:
    """Return a text that the template has written."""
    return Text(text, ((0, len(text)),) if text else ())


def spans_of(text: str) -> Spans:
    """Return the ranges of characters that the template has written."""
    return text._spans if isinstance(text, Text) else ()  # noqa: SLF001 - read only


def joined(parts: Iterable[str]) -> Text:
    """Return the parts as one text; ranges that touch become one."""
    listed = list(parts)
    spans: list[tuple[int, int]] = []
    offset = 0
    for part in listed:
        for start, end in spans_of(part):
            low = start + offset
            if spans and spans[-1][1] == low:
                low = spans.pop()[0]
            spans.append((low, end + offset))
        offset += len(part)
    return Text("".join(listed), tuple(spans))
