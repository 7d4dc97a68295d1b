"""Step 10: text as it is generated: whole characters only, and nothing of a stop string."""

from collections.abc import Sequence


def num_incomplete(data: bytes) -> int:
    """Return the number of bytes at the end that begin a UTF-8 character and lack its rest.

    The first byte tells how many bytes a character has; every other one is from 0x80 to 0xBF.

        0x00 to 0x7F  1 byte
        0xC2 to 0xDF  2 bytes
        0xE0 to 0xEF  3 bytes
        0xF0 to 0xF4  4 bytes

    Returns:
        0 to 3; 0 where the last character is complete or can never become one.
    """
    for count in range(1, min(3, len(data)) + 1):
        first = data[-count]
        if not 0x80 <= first <= 0xBF:  # the last character, or what is left of it, begins here
            return count if count < _length(first) else 0
    return 0


def _length(first: int) -> int:
    """Return the bytes of a character by its first byte; 1 where it cannot be the first."""
    if 0xC2 <= first <= 0xDF:
        return 2
    if 0xE0 <= first <= 0xEF:
        return 3
    return 4 if 0xF0 <= first <= 0xF4 else 1


class Utf8Stream:
    """Turns the bytes of tokens into text, which it releases in whole characters.

    The pieces of `push` and `flush` together are `data.decode("utf-8", errors="replace")` of all
    bytes: what is not UTF-8 becomes U+FFFD.
    """

    def __init__(self) -> None:
        """Start without bytes."""
        self._pending = b""

    def push(self, data: bytes) -> str:
        """Return the text that these bytes complete; an incomplete character waits."""
        data = self._pending + data
        end = len(data) - num_incomplete(data)
        self._pending = data[end:]
        return data[:end].decode("utf-8", errors="replace")

    def flush(self) -> str:
        """Return the rest at the end of the text: U+FFFD for an incomplete character.

        Called again, it returns nothing.
        """
        pending, self._pending = self._pending, b""
        return pending.decode("utf-8", errors="replace")


def num_held(text: str, stops: Sequence[str]) -> int:
    """Return the length of the longest end of `text` with which a stop string begins.

    A whole stop string does not count: it has ended already.
    """
    return max(
        (
            length
            for stop in stops
            for length in range(1, len(stop))
            if text.endswith(stop[:length])
        ),
        default=0,
    )


class StopStrings:
    """Ends a text before the first stop string.

    The end of the text is held back while it may be the beginning of a stop string.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """Look for any of `stops`, none of them empty."""
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """Return the text that can be released, and the stop string if one is complete.

        Of several, it is the one that ends first, and the longest of those that end there. The
        released text ends before it; what follows it is dropped. `push` is not called again.
        """
        text = self._held + text
        ends = [
            (text.index(stop) + len(stop), -len(stop), stop) for stop in self._stops if stop in text
        ]
        if ends:
            end, _, stop = min(ends)
            self._held = ""
            return text[: end - len(stop)], stop
        released = len(text) - num_held(text, self._stops)
        self._held = text[released:]
        return text[:released], None

    def flush(self) -> str:
        """Return the held text at the end of the text.

        It returns nothing after a stop string, and nothing when it is called again.
        """
        held, self._held = self._held, ""
        return held
