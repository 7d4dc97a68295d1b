"""Reading JSON in pieces agrees with json.loads, without holding the GIL for long."""

import json
import random
from typing import Any

import pytest

from nanovllm.server.http import json_reader
from nanovllm.server.http.json_reader import MalformedJSONError, read_json

PARTS = (
    "[", "]", "{", "}", ",", ":", '"', "\\", "1", "a", " ", '"a":', "[1,2]", '{"b":3}',
    '"x\\"y"', "\\\\", "null", "é",
)  # fmt: skip
LEAVES: tuple[Any, ...] = (1, -2.5, "a,b", 'q"]\\', "", None, True, 'é\\"[{', 10**40)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents of some bytes are cut as those of megabytes are."""
    monkeypatch.setattr(json_reader, "PIECE_BYTES", 8)
    monkeypatch.setattr(json_reader, "_BLOCK_BYTES", 5)


def value(draw: random.Random, depth: int) -> Any:
    kind = draw.random()
    if depth == 0 or kind < 0.4:
        return draw.choice(LEAVES)
    if kind < 0.7:
        return [value(draw, depth - 1) for _ in range(draw.randrange(4))]
    names = ("a", "b", 'c"', "d\\", "e,:")
    return {draw.choice(names): value(draw, depth - 1) for _ in range(draw.randrange(4))}


def outcome(read: Any, document: bytes) -> tuple[Any, ...]:
    try:
        return "read", read(document)
    except ValueError:
        return ("refused",)


@pytest.mark.usefixtures("small_pieces")
def test_it_agrees_with_json_loads() -> None:
    draw = random.Random(7)
    for _ in range(1500):
        text = json.dumps(
            value(draw, 4), indent=draw.choice((None, 1)), ensure_ascii=draw.random() < 0.5
        )
        at = draw.randrange(len(text))
        damaged = text[:at] + draw.choice(PARTS) + text[at + draw.randrange(2) :]
        noise = "".join(draw.choice(PARTS) for _ in range(draw.randrange(40)))
        for document in (text.encode(), damaged.encode(), noise.encode()):
            assert outcome(read_json, document) == outcome(json.loads, document), document


@pytest.mark.usefixtures("small_pieces")
def test_a_long_string_agrees_with_json_loads() -> None:
    draw = random.Random(7)
    parts = (
        "a", "u0041", "é", "😀", "\\\\", "\\n", '\\"', "\\u00e9", "\\ud83d\\ude00", "\\ud83d",
        "\\ude00", "\\ud83d\\u0041", '"', "\\", "\\u12",
    )  # fmt: skip
    for _ in range(800):
        num_kinds = draw.choice((12, len(parts)))
        text = "".join(draw.choice(parts[:num_kinds]) for _ in range(draw.randrange(1, 20)))
        document = f'"{text}"'.encode()
        assert outcome(read_json, document) == outcome(json.loads, document), document


@pytest.mark.usefixtures("small_pieces")
def test_a_fault_is_found_at_its_character() -> None:
    for text in (
        '["é", "é", "é", "é", nul, 1]',
        '{"a": 1, "b": "é", "cccc": 2, "d": tru }',
        "[1,2,3,4,5,6,7,8,,9]",
    ):
        with pytest.raises(json.JSONDecodeError) as expected:
            json.loads(text)
        with pytest.raises(MalformedJSONError) as found:
            read_json(text.encode())
        assert found.value.character is not None
        assert abs(found.value.character - expected.value.pos) <= 1


def test_arrays_objects_and_levels_are_counted_outside_of_texts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(json_reader, "MAX_CONTAINERS", 1000)
    filling = '"' + "[{" * 70_000 + '"'
    assert read_json(f"[{'[],' * 998}{filling}]".encode())[-1] == filling[1:-1]
    with pytest.raises(MalformedJSONError, match="more than 1000 arrays"):
        read_json(f"[{'{},' * 1000}{filling}]".encode())
    assert read_json(f"{'[' * 200}{filling}{']' * 200}".encode())
    with pytest.raises(MalformedJSONError, match="more than 200 levels"):
        read_json(f"{'[' * 201}{filling}{']' * 201}".encode())


def test_no_call_reads_more_than_a_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """One call of json.loads keeps the interpreter, and with it the event loop."""
    sizes: list[int] = []
    loads = json.loads

    def note(text: str) -> Any:
        sizes.append(len(text))
        return loads(text)

    prompts = [[i % 50000 for i in range(512)]] * 256
    document = json.dumps({"prompt": prompts, "user": "\n" * (1 << 18)}).encode()
    expected = loads(document)
    monkeypatch.setattr(json, "loads", note)
    assert read_json(document) == expected
    assert max(sizes) <= json_reader.PIECE_BYTES + 14
    for malformed in (document + b" x", document[:-1], b"[" + document):
        with pytest.raises(MalformedJSONError):
            read_json(malformed)
    assert max(sizes) <= json_reader.PIECE_BYTES + 14


def test_white_space_of_megabytes_is_skipped_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    document, spaced = (
        b'{"a": [1' + space + b"]" + space + b"}" + space
        for space in (b" \t\n\r" * 300_000, b" \t\n\r" * 300)
    )
    size = 1_200_000
    rounds = 0

    class Content(bytes):
        """Counts what is looked at."""

        def __getitem__(self, key: Any) -> Any:
            nonlocal rounds
            rounds += 1
            return super().__getitem__(key)

    assert json_reader._strip(Content(document), 8, 8 + size) == (8 + size,) * 2  # noqa: SLF001
    assert rounds < 50
    assert read_json(document) == {"a": [1]}
    monkeypatch.setattr(json_reader, "_BLOCK_BYTES", 7)
    assert json_reader._strip(b" " * 20 + b"x y" + b"\n" * 20, 0, 43) == (20, 23)  # noqa: SLF001
    assert read_json(spaced) == {"a": [1]}
