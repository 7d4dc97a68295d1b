"""Read large JSON in pieces: one long call of json.loads holds the GIL and stops the event loop.

NumPy scans the document once for brackets and commas outside of strings. That gives its depth and
its number of arrays and objects. Both are bounded, because they make parsing, validating and
freeing expensive. Then the document is cut at commas into pieces of at most PIECE_BYTES for
json.loads. Within these bounds, and for UTF-8, it accepts, refuses and returns the same as
json.loads.
"""

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

PIECE_BYTES = 1 << 16  # json.loads takes 2 to 5 ms for them
MAX_CONTAINERS = 1 << 16  # arrays and objects in a large document; 1,024 prompts are 1,024
MAX_DEPTH = 200  # of a large document

_BLOCK_BYTES = 1 << 18
_MAX_NAME_BYTES = 1 << 12  # of a field whose value is large
_QUOTE, _BACKSLASH, _COMMA = b'"\\,'
_IS_MARK = np.zeros(256, dtype=np.bool_)
_IS_MARK[list(b'"[]{},')] = True
_CHANGE = np.zeros(256, dtype=np.int8)  # of the number of open brackets
_CHANGE[list(b"[{")] = 1
_CHANGE[list(b"]}")] = -1
_PAIRS = {ord("["): ord("]"), ord("{"): ord("}")}
_SPACE = b" \t\n\r"
_ESCAPE = re.compile(rb"\\u[dD][89abAB].{2}\\u[dD][c-fC-F].{2}|\\u.{4}|\\.", re.DOTALL)
_ESCAPE_BYTES = 12  # of the longest, a pair
_NAME = re.compile(rb'("[^"\\]*(?:\\.[^"\\]*)*")[ \t\n\r]*:', re.DOTALL)


class MalformedJSONError(ValueError):
    """A document that is not JSON; `character` is the offset of the error, or None."""

    def __init__(self, message: str, character: int | None = None) -> None:
        super().__init__(message)
        self.character = character


def read_json(document: bytes) -> Any:
    """Return the value of a UTF-8 document; raises MalformedJSONError."""
    document = document.removeprefix(codecs.BOM_UTF8)
    if len(document) <= PIECE_BYTES:
        return _load(document, 0, len(document), document)
    return _Document.scan(document).value(*_strip(document, 0, len(document)), 0)


@dataclass(frozen=True, slots=True)
class _Document:
    """A document and its marks, the brackets and commas outside of strings, in order.

    Attributes:
        offsets: [marks] their byte offsets.
        kinds: [marks] their bytes.
        depths: [marks] the number of open brackets after them.
    """

    content: bytes
    offsets: npt.NDArray[np.int64]
    kinds: npt.NDArray[np.uint8]
    depths: npt.NDArray[np.int32]

    @classmethod
    def scan(cls, content: bytes) -> "_Document":
        """Find the marks; raises MalformedJSONError for too many or too deep brackets."""
        scanner = _Scanner()
        blocks = [
            scanner.scan(content, begin, begin + _BLOCK_BYTES)
            for begin in range(0, len(content), _BLOCK_BYTES)
        ]
        return cls(content, *map(np.concatenate, zip(*blocks, strict=True)))

    def value(self, start: int, end: int, depth: int) -> Any:
        """Return the value of content[start:end], inside of `depth` brackets."""
        first_byte = self.content[start] if end > start else None
        if end - start > PIECE_BYTES and first_byte == _QUOTE == self.content[end - 1]:
            return _long_string(self.content, start + 1, end - 1)
        closing = None if first_byte is None else _PAIRS.get(first_byte)
        if end - start <= PIECE_BYTES or closing is None:  # a single number, if longer
            return _load(self.content, start, end, self.content[start:end])
        first, last = np.searchsorted(self.offsets, (start, end - 1))
        inner_depths = self.depths[first:last]
        if (
            self.content[end - 1] != closing
            or last == self.offsets.size
            or self.depths[last] != depth
            or inner_depths.min() <= depth
        ):
            raise MalformedJSONError(
                "Expecting one value whose brackets match", _characters(self.content, start)
            )
        if self.content[start] == ord("["):
            return self._array(start + 1, end - 1, depth + 1)
        return self._object(start + 1, end - 1, depth + 1)

    def _array(self, start: int, end: int, depth: int) -> list[Any]:
        items: list[Any] = []
        for begin, cut in self._pieces(start, end, depth):
            if cut - begin > PIECE_BYTES:
                items.append(self.value(*_strip(self.content, begin, cut), depth))
            else:
                items += _load(self.content, begin, cut, b"[" + self.content[begin:cut] + b"]")
        return items

    def _object(self, start: int, end: int, depth: int) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        for begin, cut in self._pieces(start, end, depth):
            if cut - begin > PIECE_BYTES:
                name, value_start = self._name(begin, cut)
                fields[name] = self.value(*_strip(self.content, value_start, cut), depth)
            else:
                piece = b"{" + self.content[begin:cut] + b"}"
                fields.update(_load(self.content, begin, cut, piece))
        return fields

    def _pieces(self, start: int, end: int, depth: int) -> Iterator[tuple[int, int]]:
        """Yield spans between commas at this depth, of up to PIECE_BYTES or one item.

        Raises MalformedJSONError for an empty item.
        """
        begin, content_end = start, _strip(self.content, start, end)[1]
        if begin >= content_end:
            return  # an empty array or object
        while begin <= end:
            cut = end if end - begin <= PIECE_BYTES else self._cut(begin, end, depth)
            if _strip(self.content, begin, cut)[0] >= cut:
                raise MalformedJSONError("Expecting value", _characters(self.content, begin))
            yield begin, cut
            begin = cut + 1

    def _cut(self, begin: int, end: int, depth: int) -> int:
        """Return the last comma at this depth within PIECE_BYTES, else the next one, else `end`."""
        first = int(np.searchsorted(self.offsets, begin))
        near = int(np.searchsorted(self.offsets, begin + PIECE_BYTES, side="right"))
        commas = self._commas(first, near, depth)
        if commas.size:
            return int(commas[-1])
        last = int(np.searchsorted(self.offsets, end))
        for window in range(near, last, PIECE_BYTES):
            commas = self._commas(window, min(window + PIECE_BYTES, last), depth)
            if commas.size:
                return int(commas[0])
        return end

    def _commas(self, first: int, last: int, depth: int) -> npt.NDArray[np.int64]:
        """Return the offsets of the commas at this depth among these marks."""
        is_comma = (self.kinds[first:last] == _COMMA) & (self.depths[first:last] == depth)
        commas: npt.NDArray[np.int64] = self.offsets[first:last][is_comma]
        return commas

    def _name(self, begin: int, end: int) -> tuple[str, int]:
        """Return a field's name and the offset of its value."""
        begin, _ = _strip(self.content, begin, end)
        name = _NAME.match(self.content, begin, min(end, begin + _MAX_NAME_BYTES))
        if name is None:
            raise MalformedJSONError(
                "Expecting a name in double quotes, and ':'", _characters(self.content, begin)
            )
        return _load(self.content, begin, name.end(1), name[1]), name.end()


class _Scanner:
    """Finds marks block by block, because a long NumPy call would hold the GIL too."""

    def __init__(self) -> None:
        """Start outside of strings, at depth 0."""
        self._is_in_string = False
        self._num_backslashes = 0  # directly before the next block
        self._num_containers = 0
        self._depth = 0

    def scan(
        self, content: bytes, begin: int, end: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8], npt.NDArray[np.int32]]:
        """Return offsets, kinds and depths of the marks in the next block, content[begin:end]."""
        block = np.frombuffer(content[begin:end], dtype=np.uint8)
        offsets = np.flatnonzero(_IS_MARK[block])
        kinds = block[offsets]
        is_quote = kinds == _QUOTE
        if self._num_backslashes or b"\\" in content[begin:end]:
            is_quote[is_quote] = ~self._is_escaped(block, offsets[is_quote])
        in_string = (np.cumsum(is_quote, dtype=np.int32) + self._is_in_string) % 2 == 1
        self._is_in_string = bool(in_string[-1]) if in_string.size else self._is_in_string
        kept = ~in_string & (kinds != _QUOTE)
        offsets, kinds = offsets[kept], kinds[kept]
        change = _CHANGE[kinds]
        depths = np.cumsum(change, dtype=np.int32) + np.int32(self._depth)
        self._num_containers += int(np.count_nonzero(change == 1))
        if self._num_containers > MAX_CONTAINERS:
            raise MalformedJSONError(f"it has more than {MAX_CONTAINERS} arrays and objects")
        if depths.size:
            self._depth = int(depths[-1])
            if depths.max() > MAX_DEPTH:
                raise MalformedJSONError(f"it is nested more than {MAX_DEPTH} levels deep")
        return offsets + begin, kinds, depths

    def _is_escaped(
        self, block: npt.NDArray[np.uint8], quotes: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.bool_]:
        """Return whether an odd number of backslashes precedes each quote."""
        others = np.flatnonzero(block != _BACKSLASH)
        rank = np.searchsorted(others, quotes) - 1  # of the last other byte before it
        before = np.where(rank >= 0, others[rank], -1 - self._num_backslashes)
        last = int(others[-1]) if others.size else -1 - self._num_backslashes
        self._num_backslashes = block.size - 1 - last
        escaped: npt.NDArray[np.bool_] = (quotes - before) % 2 == 0
        return escaped


def _strip(content: bytes, start: int, end: int) -> tuple[int, int]:
    """Return the span without surrounding white space, which may be megabytes."""
    while start < end and content[start] in _SPACE:
        step = content[start : min(end, start + _BLOCK_BYTES)]
        start += len(step) - len(step.lstrip(_SPACE))
    while end > start and content[end - 1] in _SPACE:
        step = content[max(start, end - _BLOCK_BYTES) : end]
        end -= len(step) - len(step.rstrip(_SPACE))
    return start, end


def _long_string(content: bytes, start: int, end: int) -> str:
    """Return the string whose JSON form, without quotes, is content[start:end]."""
    parts = []
    while start < end:
        cut = min(_string_cut(content, start, start + PIECE_BYTES), end)
        parts.append(_load(content, start, cut, b'"' + content[start:cut] + b'"'))
        start = cut
    return "".join(parts)


def _string_cut(content: bytes, start: int, cut: int) -> int:
    """Return the first offset from `cut` on at which a string from `start` can be divided.

    It is not inside of a UTF-8 sequence, an escape or a surrogate pair.
    """
    for back in range(min(cut - start, _ESCAPE_BYTES - 1) + 1):
        escape = _ESCAPE.match(content, cut - back)
        if escape is not None and escape.end() > cut and _begins_escape(content, start, cut - back):
            cut = escape.end()
            break
    while cut < len(content) and content[cut] & 0xC0 == 0x80:
        cut += 1
    return cut


def _begins_escape(content: bytes, start: int, backslash: int) -> bool:
    """Return whether an even number of backslashes precedes this one."""
    before = content[start:backslash]
    return (len(before) - len(before.rstrip(b"\\"))) % 2 == 0


def _load(content: bytes, start: int, end: int, piece: bytes) -> Any:
    """Parse `piece`, which is content[start:end] or that in brackets.

    Errors give offsets in the whole content.
    """
    try:
        return json.loads(piece.decode())
    except UnicodeDecodeError as error:
        raise MalformedJSONError(str(error)) from error
    except RecursionError as error:
        raise MalformedJSONError("it is nested too deeply") from error
    except json.JSONDecodeError as error:
        in_piece = error.pos - (len(piece) > end - start)
        raise MalformedJSONError(error.msg, _characters(content, start) + in_piece) from error
    except ValueError as error:  # a number of thousands of digits
        raise MalformedJSONError(str(error)) from error


def _characters(content: bytes, offset: int) -> int:
    """Return the number of characters before a byte offset."""
    return len(content[:offset].decode(errors="replace"))
