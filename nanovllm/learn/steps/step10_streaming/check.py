"""What step 10 must do, and what goes wrong."""

import codecs
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np

from nanovllm.engine import detokenizer as engine
from nanovllm.learn.checking import Calls, Case, Mistake

_INCOMPLETE = {
    b"": 0, b"a": 0, b"a\xc3": 1, b"a\xc3\xa9": 0, b"a\xe2": 1, b"a\xe2\x82": 2,
    b"a\xe2\x82\xac": 0, b"a\xf0": 1, b"a\xf0\x9f": 2, b"a\xf0\x9f\x99": 3,
    b"a\xf0\x9f\x99\x82": 0, b"\xf0": 1, b"\x80\x80": 0, b"a\xff": 0, b"\xc0": 0,
}  # fmt: skip
_HELD = {
    ("a <", ("</s>",)): 1, ("a </", ("</s>",)): 2, ("a </s", ("</s>",)): 3, ("</b", ("</s>",)): 0,
    ("aaa", ("aab",)): 2, ("abc", ("cab", "bcd")): 2, ("text", ("t",)): 0,
    ("", ("ab",)): 0, ("end", ()): 0,
}  # fmt: skip
_TEXT = "Ünïcode: 10 € — naïve 日本語 🙂🚀 𝄞 end"


class _Python:
    """Python's own incremental decoder with the methods of Utf8Stream."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, data: bytes) -> str:
        return self._decoder.decode(data)

    def flush(self) -> str:
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


def _decode(stream: Any, pieces: Sequence[bytes]) -> Calls:
    """Push the pieces, then flush twice."""
    calls = Calls()
    for piece in pieces:
        calls.add(f"push({piece!r})", stream.push(piece))
    calls.add("flush()", stream.flush())
    calls.add("flush() again", stream.flush())
    return calls


def _bytes_case(name: str, *pieces: bytes, lesson: str = "") -> Case:
    return Case(
        name,
        lambda module: _decode(module.Utf8Stream(), pieces),
        lambda: _decode(_Python(), pieces),
        lesson,
    )


def _cut(data: bytes, seed: int) -> list[bytes]:
    """Cut at random places into pieces of 1 to 5 bytes."""
    random, pieces, start = np.random.default_rng(seed), [], 0
    while start < len(data):
        end = start + int(random.integers(1, 6))
        pieces.append(data[start:end])
        start = end
    return pieces


def _random_data() -> list[bytes]:
    """Return texts of nine bytes that are mostly not UTF-8."""
    random = np.random.default_rng(10)
    alphabet = np.frombuffer(b"a\x80\xbf\xc2\xe2\xed\xf0\xff", dtype=np.uint8)
    return [random.choice(alphabet, 9).tobytes() for _ in range(200)]


def _random_texts(module: ModuleType) -> object:
    """Decode each text in pieces."""
    texts: dict[str, str] = {}
    for data in _random_data():
        stream = module.Utf8Stream()
        pieces = [stream.push(piece) for piece in _cut(data, len(texts))]
        texts[f"the text of the bytes {data!r}"] = "".join([*pieces, stream.flush()])
    return texts


def _expected_texts() -> object:
    return {
        f"the text of the bytes {data!r}": data.decode(errors="replace") for data in _random_data()
    }


def _match(matcher: Any, pieces: Sequence[str], name: str = "") -> Calls:
    """Push the pieces until a stop string is complete, then flush twice."""
    calls = Calls()
    for piece in pieces:
        result = matcher.push(piece)
        calls.add(f"{name}push({piece!r})", result)
        if isinstance(result, tuple) and len(result) == 2 and result[1] is not None:
            break
    calls.add(f"{name}flush()", matcher.flush())
    calls.add(f"{name}flush() again", matcher.flush())
    return calls


def _stop_case(name: str, stops: Sequence[str], *pieces: str, lesson: str = "") -> Case:
    """Return a case whose results must be those of the engine's own stop strings."""
    name = f"{name}: {', '.join(map(repr, stops))}" if stops else name
    return Case(
        name,
        lambda module: _match(module.StopStrings(stops), pieces),
        lambda: _match(engine.StopStrings(stops), pieces),
        lesson,
    )


def _random_stops(stop_strings: Any) -> object:
    """Match random stop strings of "a" and "b" in random texts."""
    random, results = np.random.default_rng(10), []

    def draw(length: int) -> str:
        return "".join(random.choice(["a", "b"], length))

    for _ in range(150):
        stops = [draw(int(random.integers(2, 6))) for _ in range(int(random.integers(1, 4)))]
        pieces = [draw(int(random.integers(0, 4))) for _ in range(8)]
        results.append(_match(stop_strings(stops), pieces, f"StopStrings({stops})."))
    return results


CASES = (
    Case(
        "bytes that must wait",
        lambda m: {f"num_incomplete({data!r})": m.num_incomplete(data) for data in _INCOMPLETE},
        lambda: {f"num_incomplete({data!r})": count for data, count in _INCOMPLETE.items()},
        lesson="é has 2 bytes, C3 A9; € has 3, E2 82 AC; 🙂 has 4, F0 9F 99 82.",
    ),
    _bytes_case("plain letters are released at once", b"Hello", b", ", b"world"),
    _bytes_case("one byte at a time", *(bytes([byte]) for byte in "é€🙂!".encode())),
    _bytes_case("pieces of 1 to 5 bytes", *_cut(_TEXT.encode(), 10)),
    _bytes_case(
        "the text ends within a character", b"a", "🙂".encode()[:2],
        lesson="What is left becomes one U+FFFD, the replacement character.",
    ),
    _bytes_case(
        "bytes that are not UTF-8", b"a\xff", b"b\x80\x80", b"\xc3", b"c\xe2\x82", b"d", b"\xc0!",
        lesson='bytes.decode("utf-8", errors="replace") turns them into U+FFFD.',
    ),
    Case("the pieces together are the text of all bytes", _random_texts, _expected_texts),
    Case(
        "characters that must wait",
        lambda m: {f"num_held{one}": m.num_held(*one) for one in _HELD},
        lambda: {f"num_held{one}": count for one, count in _HELD.items()},
    ),
    _stop_case("nothing is held back without stop strings", (), "Hello", ", world"),
    _stop_case("the stop string in one piece", ("END",), "It is the ", "END of it"),
    _stop_case("the stop string in three pieces", ("</s>",), "text <", "/", "s> more"),
    _stop_case(
        "not every beginning becomes a stop string", ("</s>",), "a <", "/", "b> c", "<", "<", "/s"
    ),
    _stop_case("the text ends while its end is held back", ("</s>",), "text </s"),
    _stop_case("the first of two stop strings", ("two", "one"), "zero one two"),
    _stop_case("the stop string that ends first", ("ng", "long tale"), "a lo", "ng tale"),
    _stop_case("the longest of those that end at one place", ("ng", "long"), "a lo", "ng tale"),
    Case(
        "150 random texts",
        lambda module: _random_stops(module.StopStrings),
        lambda: _random_stops(engine.StopStrings),
    ),
)  # fmt: skip

_COUNTS = "range(1, min(3, len(data)) + 1)"
_DECODED = 'return data[:end].decode("utf-8", errors="replace")'
_FLUSH = '        pending, self._pending = self._pending, b""\n'
_ENDS = """        ends = [
            (text.index(stop) + len(stop), -len(stop), stop) for stop in self._stops if stop in text
        ]
"""
_RELEASED = "released = len(text) - num_held(text, self._stops)"
_LENGTHS = "for length in range(1, len(stop))"
_CUT = "return text[: end - len(stop)], stop"

MISTAKES = (
    Mistake(
        "half characters",
        "Each piece is decoded alone, so a character over two pieces becomes two U+FFFD. Keep the "
        "bytes of an incomplete character for the next call.",
        "end = len(data) - num_incomplete(data)",
        "end = len(data)",
    ),
    Mistake(
        "half characters dropped",
        "The bytes of an incomplete character are dropped. Keep them for the next call.",
        "        self._pending = data[end:]\n",
        "",
    ),
    Mistake(
        "wrong order",
        "The pending bytes come before the new ones.",
        "data = self._pending + data",
        "data = data + self._pending",
    ),
    Mistake(
        "only the last byte",
        "Only the last byte is examined. Of a character of 4 bytes, 1, 2 or 3 may have arrived.",
        _COUNTS,
        "range(1, min(1, len(data)) + 1)",
    ),
    Mistake(
        "only the last two bytes",
        "Only the last two bytes are examined. Of a character of 4 bytes, 3 may have arrived.",
        _COUNTS,
        "range(1, min(2, len(data)) + 1)",
    ),
    Mistake(
        "one character behind",
        "A complete character waits for the next one. It can be released when its last byte "
        "arrives.",
        "return count if count < _length(first) else 0",
        "return count if count <= _length(first) > 1 else 0",
    ),
    Mistake(
        "everything behind the first incomplete character",
        "All bytes are kept until they are UTF-8 as a whole. Complete characters before an "
        "incomplete one can be released.",
        "end = len(data) - num_incomplete(data)",
        "end = 0 if num_incomplete(data) else len(data)",
    ),
    Mistake(
        "flush loses bytes",
        "`flush` drops an incomplete character at the end; it becomes U+FFFD.",
        '        return pending.decode("utf-8", errors="replace")',
        '        return ""',
    ),
    Mistake(
        "flush repeats",
        "`flush` keeps the pending bytes, so a second call returns them again.",
        _FLUSH,
        "        pending = self._pending\n",
    ),
    Mistake(
        "errors raise",
        "Bytes that are not UTF-8 raise an exception. A model may generate any bytes: decode with "
        'errors="replace".',
        _DECODED,
        "return data[:end].decode()",
    ),
    Mistake(
        "errors ignored",
        'Bytes that are not UTF-8 vanish (errors="ignore"). They become U+FFFD.',
        _DECODED,
        'return data[:end].decode("utf-8", errors="ignore")',
    ),
    Mistake(
        "waits for what never comes",
        "A byte that cannot begin a character is kept as if its rest could follow: 0xC0, 0xC1 and "
        "0xF5 to 0xFF are never the first byte.",
        "return 4 if 0xF0 <= first <= 0xF4 else 1",
        "return 4 if 0xF0 <= first else 1",
    ),
    Mistake(
        "nothing held back",
        "The text is released at once, so the beginning of a stop string is shown before its end "
        "arrives. Hold back what may become one.",
        _RELEASED,
        "released = len(text)",
    ),
    Mistake(
        "held back without end",
        "All text is held back until the end. Release what cannot be the beginning of a stop "
        "string.",
        _RELEASED,
        "released = 0",
    ),
    Mistake(
        "too much held back",
        "As many characters are held back as the longest stop string has, less one. Hold back only "
        "an end of the text with which a stop string begins.",
        _RELEASED,
        "released = max(0, len(text) - max(map(len, self._stops), default=1) + 1)",
    ),
    Mistake(
        "one character held back",
        "Only the first character of a stop string is held back. It may be there up to its last "
        "character but one.",
        _LENGTHS,
        "for length in range(1, min(2, len(stop)))",
    ),
    Mistake(
        "shortest beginning",
        "The shortest end of the text with which a stop string begins is held back; it is the "
        "longest that matters.",
        "    return max(\n",
        "    return min(\n",
    ),
    Mistake(
        "one character too few",
        "A stop string that lacks only its last character is not held back.",
        _LENGTHS,
        "for length in range(1, len(stop) - 1)",
    ),
    Mistake(
        "stop string over two pieces",
        "A stop string is searched in the new piece alone. It may have begun in an earlier one.",
        f"        text = self._held + text\n{_ENDS}",
        _ENDS + "        text = self._held + text\n",
    ),
    Mistake(
        "held text lost",
        "Held text that does not become a stop string is lost. Put it before the new text.",
        "text = self._held + text",
        "text = text",
    ),
    Mistake(
        "held and released",
        "Held text is released too, and again with the next piece.",
        "return text[:released], None",
        "return text, None",
    ),
    Mistake(
        "stop string released",
        "The stop string is part of the released text. The text ends before it.",
        _CUT,
        "return text[:end], stop",
    ),
    Mistake(
        "text behind the stop string",
        "What follows the stop string is kept and returned by `flush`. It is dropped.",
        f'            self._held = ""\n            {_CUT}',
        f"            self._held = text[end:]\n            {_CUT}",
    ),
    Mistake(
        "held text behind the stop string",
        "The held text stays after a stop string, and `flush` returns it.",
        f'            self._held = ""\n            {_CUT}',
        f"            {_CUT}",
    ),
    Mistake(
        "first of the list",
        "The first stop string of the list is taken, although another ends before it in the text.",
        "end, _, stop = min(ends)",
        "end, _, stop = ends[0]",
    ),
    Mistake(
        "the one that begins first",
        "The stop string that begins first is taken. Take the one that ends first: with text that "
        "arrives in other pieces the other would not be complete yet.",
        "end, _, stop = min(ends)",
        "end, _, stop = min(ends, key=lambda one: (one[0] + one[1], one[1]))",
    ),
    Mistake(
        "shortest of those that end there",
        "Of the stop strings that end at one place the shortest is taken. Take the longest: its "
        "beginning would be shown otherwise.",
        "end, _, stop = min(ends)",
        "end, _, stop = min(ends, key=lambda one: (one[0], -one[1]))",
    ),
    Mistake(
        "last occurrence",
        "The last occurrence of a stop string is taken (rindex); the text ends at the first.",
        "text.index(stop) + len(stop)",
        "text.rindex(stop) + len(stop)",
    ),
    Mistake(
        "flush loses the held text",
        "`flush` returns nothing. Text that was held back and did not become a stop string belongs "
        "to the answer.",
        "        return held\n",
        '        return ""\n',
    ),
    Mistake(
        "flush repeats the held text",
        "`flush` keeps the held text, so a second call returns it again.",
        '        held, self._held = self._held, ""\n',
        "        held = self._held\n",
    ),
)
