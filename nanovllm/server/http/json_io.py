"""Read and write JSON without stopping the event loop for long.

A call of a JSON library holds the GIL. pydantic-core reads 4 MB, the default limit of a body, in
about 20 ms, unless it has to make very many arrays and objects, whose number is therefore bounded.
Responses may be much larger, and are written in pieces.
"""

import codecs
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from pydantic_core import from_json

MAX_CONTAINERS = 1 << 16
"""Arrays, objects and their fields in a document; 1,024 prompts of token ids are 1,024."""
PIECE_ITEMS = 64
"""List items in a piece; a piece of log-probabilities takes 2 to 5 ms."""
_NESTED = 4  # levels of objects and lists that are split; deeper ones are small
_CONTAINERS = b"[{:"
_BLOCK_BYTES = 1 << 18
_EXPLANATIONS = {
    "recursion limit exceeded": "it may be nested 200 levels deep",
    "number out of range": "an integer may have 4300 digits",
    "hex escape": "half of a surrogate pair is not a character; send valid Unicode",
}
"""What the parser's message leaves open, by a part of it."""


def read_json(document: bytes) -> Any:
    """Return the value of a UTF-8 document; raises ValueError that says what is wrong.

    NaN and infinity are accepted, because the fields that have them are named when they are
    checked. Of equal fields of an object the last one counts.
    """
    if _count_marks(document) > MAX_CONTAINERS and _has_many_containers(document):
        raise ValueError(f"it has more than {MAX_CONTAINERS} arrays, objects and fields")
    try:
        return from_json(document.removeprefix(codecs.BOM_UTF8), cache_strings="none")
    except ValueError as error:
        message = str(error)
        notes = [note for part, note in _EXPLANATIONS.items() if part in message]
        raise ValueError("; ".join([message, *notes])) from error


def _count_marks(text: bytes) -> int:
    return sum(text.count(mark) for mark in _CONTAINERS)


def _has_many_containers(document: bytes) -> bool:
    """Return whether there are too many arrays, objects and fields, without marks in strings."""
    num_containers, num_quotes, start = 0, 0, 0
    while start < len(document) and num_containers <= MAX_CONTAINERS:
        block = document[start : start + _BLOCK_BYTES]
        if (len(block) - len(block.rstrip(b"\\"))) % 2:  # its last backslash escapes the next byte
            block = document[start : start + len(block) + 1]
        start += len(block)
        text = np.frombuffer(block.replace(rb"\\", b"").replace(rb"\"", b""), dtype=np.uint8)
        quotes = np.cumsum(text == ord('"'), dtype=np.int32) + num_quotes
        num_containers += _count_marks(text[quotes % 2 == 0].tobytes())
        num_quotes = int(quotes[-1]) if quotes.size else num_quotes
    return num_containers > MAX_CONTAINERS


def dump_json(value: Any) -> bytes:
    """Return the JSON of a value without spaces; raises ValueError for NaN and infinity."""
    return json.dumps(
        value, ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=list
    ).encode()


def write_json(value: Any) -> bytes:
    """Return the JSON of a large value; other threads can run between the pieces."""
    return b"".join(json_pieces(value))


def json_pieces(value: Any, nested: int = _NESTED) -> Iterator[bytes]:
    """Yield the JSON of a value piece by piece; raises ValueError for NaN and infinity.

    An iterator is written as a list, whose items are made one at a time.
    """
    if nested > 0 and isinstance(value, Mapping):
        separator = b"{"
        for name, item in value.items():
            yield separator + dump_json(name) + b":"
            yield from json_pieces(item, nested - 1)
            separator = b","
        yield b"}" if value else b"{}"
    elif isinstance(value, Iterator) or (nested > 1 and _is_deep(value)):
        separator = b"["
        for item in value:
            yield separator
            yield from json_pieces(item, nested - 1)
            separator = b","
        yield b"[]" if separator == b"[" else b"]"
    elif isinstance(value, list) and len(value) > PIECE_ITEMS:
        separator = b"["
        for start in range(0, len(value), PIECE_ITEMS):
            yield separator + dump_json(value[start : start + PIECE_ITEMS])[1:-1]
            separator = b","
        yield b"]"
    else:
        yield dump_json(value)


def _is_deep(value: Any) -> bool:
    """Return whether a value is a list of objects or lists."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping | list)
