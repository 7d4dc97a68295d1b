"""Write large JSON in pieces: a long call of json.dumps holds the GIL and stops the event loop."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

PIECE_ITEMS = 64
"""List items in a piece; a piece of log-probabilities takes 2 to 5 ms."""
_NESTED = 4  # levels of objects and lists that are split; deeper ones are small


def write_json(value: Any) -> bytes:
    """Return the JSON of a value; other threads can run between the pieces."""
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
