"""Strings that track which of their characters were written by a template.

The template's strings are `Text` that is marked completely. Text from messages is an ordinary
string without marks. The operations below propagate marks, and all others return ordinary strings.
So no operation of a template can mark text that came from a message.
"""

from collections.abc import Iterable
from itertools import pairwise
from typing import Any, SupportsIndex

Spans = tuple[tuple[int, int], ...]
"""Ranges of characters, ordered and disjoint."""


class Text(str):
    """A string with the ranges of its characters that a template wrote."""

    __slots__ = ("_spans",)
    _spans: Spans

    def __new__(cls, value: object = "", spans: Spans = ()) -> "Text":
        """Create a text of which `spans` were written by the template."""
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
        selected = super().__getitem__(key)
        if not isinstance(key, slice):
            start = key.__index__() % len(self)
            return self._cut(start, start + 1)
        start, _, step = key.indices(len(self))
        return self._cut(start, start + len(selected)) if step == 1 else selected

    def join(self, parts: Iterable[str]) -> str:
        """See str."""
        listed = list(parts)
        separated: list[str] = [self] * (2 * len(listed) - 1)
        separated[::2] = listed
        return joined(separated)

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
        begin, num_left = 0, count.__index__()
        while num_left and (index := self.find(old, begin)) >= 0:
            parts += (self._cut(begin, index), new)
            begin, num_left = index + len(old), num_left - 1
        return joined([*parts, self._cut(begin, len(self))])

    def _cut(self, start: int, end: int) -> "Text":
        """Return the characters of a range, with their marks."""
        spans = ((max(start, low), min(end, high)) for low, high in self._spans)
        return Text(
            super().__getitem__(slice(start, end)),
            tuple((low - start, high - start) for low, high in spans if low < high),
        )

    def _mapped(self, function: Any) -> list[str]:
        """Apply `function` to the marked and unmarked parts of the text, and return them."""
        edges = [0, *(edge for span in self._spans for edge in span), len(self)]
        parts: list[str] = []
        for index, (start, end) in enumerate(pairwise(edges)):
            part = function(str.__getitem__(self, slice(start, end)))
            parts.append(written(part) if index % 2 else part)
        return parts


def written(text: str) -> Text:
    """Return a text that the template wrote completely."""
    return Text(text, ((0, len(text)),) if text else ())


def spans_of(text: str) -> Spans:
    """Return the ranges of characters that the template wrote."""
    return text._spans if isinstance(text, Text) else ()  # noqa: SLF001 - read only


def joined(parts: Iterable[str]) -> Text:
    """Return the concatenation of the parts; adjacent ranges are merged."""
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
