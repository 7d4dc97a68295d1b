"""JSON of megabytes, read in pieces: json.loads is one call that keeps the interpreter, and stops the event loop for as long.

A body is scanned once with NumPy for brackets and commas outside of texts. That gives its depth and how many arrays and objects it has,
which are bounded: they are what makes reading, checking and freeing expensive. Then it is cut at commas into pieces of at most
PIECE_BYTES, each of which json.loads reads. What it accepts, what it refuses and what it gives is what json.loads would.
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
    """A document that is not JSON; `character` is where that shows, None where it is about the whole."""

    def __init__(self, message: str, character: int | None = None) -> None:
        super().__init__(message)
        self.character = character


def read_json(document: bytes) -> Any:
    """The value of a document in UTF-8; raises MalformedJSONError."""
    document = document.removeprefix(codecs.BOM_UTF8)
    if len(document) <= PIECE_BYTES:
        return _load(document, 0, len(document), document)
    return _Document.scan(document).value(*_strip(document, 0, len(document)), 0)


@dataclass(frozen=True, slots=True)
class _Document:
    """A document with the brackets and commas that are not part of a text, in order.

    Attributes:
        offsets: [marks] where they stand.
        kinds: [marks] which bytes they are.
        depths: [marks] how many brackets are open after them.
    """

    content: bytes
    offsets: npt.NDArray[np.int64]
    kinds: npt.NDArray[np.uint8]
    depths: npt.NDArray[np.int32]

    @classmethod
    def scan(cls, content: bytes) -> "_Document":
        """Find the marks; raises MalformedJSONError where there are too many brackets or they are too deep."""
        scanner = _Scanner()
        blocks = [
            scanner.scan(content, begin, begin + _BLOCK_BYTES)
            for begin in range(0, len(content), _BLOCK_BYTES)
        ]
        return cls(content, *map(np.concatenate, zip(*blocks, strict=True)))

    def value(self, start: int, end: int, depth: int) -> Any:
        """The value of content[start:end], which `depth` brackets enclose."""
        first_byte = self.content[start] if end > start else None
        if end - start > PIECE_BYTES and first_byte == _QUOTE == self.content[end - 1]:
            return _long_text(self.content, start + 1, end - 1)
        closing = None if first_byte is None else _PAIRS.get(first_byte)
        if end - start <= PIECE_BYTES or closing is None:  # a single number, if longer
            return _load(self.content, start, end, self.content[start:end])
        first, last = np.searchsorted(self.offsets, (start, end - 1))
        inside = self.depths[first:last]
        if (
            self.content[end - 1] != closing
            or last == self.offsets.size
            or self.depths[last] != depth
            or inside.min() <= depth
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
                name, value_at = self._name(begin, cut)
                fields[name] = self.value(*_strip(self.content, value_at, cut), depth)
            else:
                piece = b"{" + self.content[begin:cut] + b"}"
                fields.update(_load(self.content, begin, cut, piece))
        return fields

    def _pieces(self, start: int, end: int, depth: int) -> Iterator[tuple[int, int]]:
        """Spans between the commas at this depth, as many neighbours in one as fit into PIECE_BYTES; raises where one is blank."""
        begin, end_of_text = start, _strip(self.content, start, end)[1]
        if begin >= end_of_text:
            return  # an array or object of nothing
        while begin <= end:
            cut = end if end - begin <= PIECE_BYTES else self._cut(begin, end, depth)
            if _strip(self.content, begin, cut)[0] >= cut:
                raise MalformedJSONError("Expecting value", _characters(self.content, begin))
            yield begin, cut
            begin = cut + 1

    def _cut(self, begin: int, end: int, depth: int) -> int:
        """The last comma at this depth within PIECE_BYTES, otherwise the next one, otherwise `end`."""
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
        """Where among these marks the commas at this depth stand."""
        is_comma = (self.kinds[first:last] == _COMMA) & (self.depths[first:last] == depth)
        commas: npt.NDArray[np.int64] = self.offsets[first:last][is_comma]
        return commas

    def _name(self, begin: int, end: int) -> tuple[str, int]:
        """A field's name, and where its value begins."""
        begin, _ = _strip(self.content, begin, end)
        name = _NAME.match(self.content, begin, min(end, begin + _MAX_NAME_BYTES))
        if name is None:
            raise MalformedJSONError(
                "Expecting a name in double quotes, and ':'", _characters(self.content, begin)
            )
        return _load(self.content, begin, name.end(1), name[1]), name.end()


class _Scanner:
    """Finds marks block by block, since a long NumPy call would keep the interpreter too."""

    def __init__(self) -> None:
        """Start outside of any text, at no depth."""
        self._is_in_text = False
        self._num_backslashes = 0  # directly before the next block
        self._num_containers = 0
        self._depth = 0

    def scan(
        self, content: bytes, begin: int, end: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8], npt.NDArray[np.int32]]:
        """Offsets, kinds and depths of the marks in content[begin:end], which follows what was scanned before."""
        block = np.frombuffer(content[begin:end], dtype=np.uint8)
        offsets = np.flatnonzero(_IS_MARK[block])
        kinds = block[offsets]
        is_quote = kinds == _QUOTE
        if self._num_backslashes or b"\\" in content[begin:end]:
            is_quote[is_quote] = ~self._is_escaped(block, offsets[is_quote])
        in_text = (np.cumsum(is_quote, dtype=np.int32) + self._is_in_text) % 2 == 1
        self._is_in_text = bool(in_text[-1]) if in_text.size else self._is_in_text
        kept = ~in_text & (kinds != _QUOTE)
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
        """Whether an odd number of backslashes stands directly before each quote."""
        others = np.flatnonzero(block != _BACKSLASH)
        rank = np.searchsorted(others, quotes) - 1  # of the last byte before that is none
        before = np.where(rank >= 0, others[rank], -1 - self._num_backslashes)
        last = int(others[-1]) if others.size else -1 - self._num_backslashes
        self._num_backslashes = block.size - 1 - last
        escaped: npt.NDArray[np.bool_] = (quotes - before) % 2 == 0
        return escaped


def _strip(content: bytes, start: int, end: int) -> tuple[int, int]:
    """content[start:end] without white space around it, which may be megabytes."""
    while start < end and content[start] in _SPACE:
        step = content[start : min(end, start + _BLOCK_BYTES)]
        start += len(step) - len(step.lstrip(_SPACE))
    while end > start and content[end - 1] in _SPACE:
        step = content[max(start, end - _BLOCK_BYTES) : end]
        end -= len(step) - len(step.rstrip(_SPACE))
    return start, end


def _long_text(content: bytes, start: int, end: int) -> str:
    """Return the text whose JSON form, without its quotes, is content[start:end]."""
    parts = []
    while start < end:
        cut = min(_text_cut(content, start, start + PIECE_BYTES), end)
        parts.append(_load(content, start, cut, b'"' + content[start:cut] + b'"'))
        start = cut
    return "".join(parts)


def _text_cut(content: bytes, start: int, cut: int) -> int:
    """Return the first place from `cut` on where a text that begins at `start` can be divided.

    It is neither within a character of UTF-8 or an escape nor between two halves of a pair.
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
    """Return whether an even number of backslashes stands before this one."""
    before = content[start:backslash]
    return (len(before) - len(before.rstrip(b"\\"))) % 2 == 0


def _load(content: bytes, start: int, end: int, piece: bytes) -> Any:
    """The value of `piece`, which is content[start:end], perhaps in brackets; an error says where in the whole content it is."""
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
    """How many characters stand before a byte."""
    return len(content[:offset].decode(errors="replace"))
