"""What step 10 must do, and what goes wrong."""

import codecs
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np

from nanovllm.engine import detokenizer as engine
from nanovllm.learn.checking import Calls, Case
from nanovllm.learn.steps.step10_streaming.mistakes import MISTAKES

__all__ = ("CASES", "MISTAKES")

_INCOMPLETE = {
    b"": 0, b"a": 0, b"a\xc3": 1, b"a\xc3\xa9": 0, b"a\xe2": 1, b"a\xe2\x82": 2,
    b"a\xe2\x82\xac": 0, b"a\xf0": 1, b"a\xf0\x9f": 2, b"a\xf0\x9f\x99": 3,
    b"a\xf0\x9f\x99\x82": 0, b"\xf0": 1, b"\xc3c\xe2\x82": 2, b"\x80\x80": 0, b"a\xff": 0,
    b"\xc0": 0,
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
    _stop_case("the longest of those that end at one place", ("ale", "tale"), "a long t", "ale"),
    Case(
        "150 random texts",
        lambda module: _random_stops(module.StopStrings),
        lambda: _random_stops(engine.StopStrings),
    ),
)  # fmt: skip
