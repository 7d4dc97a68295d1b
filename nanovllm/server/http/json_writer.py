"""JSON of megabytes, written in pieces: json.dumps is one call that keeps the interpreter, and stops the event loop for as long."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

PIECE_ITEMS = 64
"""Items of a list in one piece: of log-probabilities, a piece takes 2 to 5 ms."""
_NESTED = 4  # levels of objects and lists that are taken apart; below them all is small


def write_json(value: Any) -> bytes:
    """The JSON of a value; takes its time with a large one, and lets other threads run meanwhile."""
    return b"".join(json_pieces(value))


def json_pieces(value: Any, nested: int = _NESTED) -> Iterator[bytes]:
    """Yield the JSON of a value piece by piece; raises ValueError for NaN and infinity.

    An iterator is written as a list, whose items are made one at a time.
    """
    if nested and isinstance(value, Mapping):
        separator = b"{"
        for name, item in value.items():
            yield separator + _dumps(name) + b":"
            yield from json_pieces(item, nested - 1)
            separator = b","
        yield b"}" if value else b"{}"
    elif nested > 1 and isinstance(value, list) and value and isinstance(value[0], Mapping | list):
        separator = b"["
        for item in value:
            yield separator
            yield from json_pieces(item, nested - 1)
            separator = b","
        yield b"]"
    elif isinstance(value, list) and len(value) > PIECE_ITEMS:
        separator = b"["
        for start in range(0, len(value), PIECE_ITEMS):
            yield separator + _dumps(value[start : start + PIECE_ITEMS])[1:-1]
            separator = b","
        yield b"]"
    elif isinstance(value, Iterator):
        separator = b"["
        for item in value:
            yield separator
            yield from json_pieces(item)
            separator = b","
        yield b"[]" if separator == b"[" else b"]"
    else:
        yield _dumps(value)


def _dumps(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
