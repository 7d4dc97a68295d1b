"""Record how GPT-2 splits some texts, and the small part of its tokenizer that suffices for them.

    python tests/data/gpt2_subset/record.py FOLDER

FOLDER has the vocab.json and merges.txt of the published gpt2. The reference is the algorithm of
GPT-2's own encoder.py, written out below. It needs the `regex` package and nothing of this project.
A merge is kept when a text has what it makes. No other merge can be applied to these texts, so the
part gives the same ids as the whole.
"""

import itertools
import json
import sys
from pathlib import Path

import regex  # type: ignore[import-untyped]

FOLDER = Path(__file__).parent
PATTERN = regex.compile(
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
)
END_OF_TEXT = "<|endoftext|>"
TEXTS = (
    "Hello world, I am GPT-2",
    "a b  c   d    e",
    "trailing spaces   ",
    "   leading spaces",
    " ",
    "  ",
    "\n",
    "\n\n",
    "one\ntwo\n\nthree\n\n\nfour",
    "end of line  \n  begin of line \n",
    "\ttabs\t\tand  \t mixed\r\n",
    "def f(x):\n    if x:\n        return x\n",
    "I'm sure they've said we'll see; he'd know what's what, don't you're? I'M SURE",
    "1 22 333 4444 3.14159 (2+2)=4!?",
    "naïve café, façade; Ünïcödé",
    "“quotes” — and … dots",
    "你好、世界 こんにちは Привет мир",
    "🙂 👩‍👩‍👧 e\u0301\u0323",
    "no-break\u00a0space, ideographic\u3000space, line\u2028separator \u00a0 x",
    "<|endoftext|>",
    "Once upon a time<|endoftext|> there was <|endoftext|>",
    "\x00\x01\x7f control",
)


def byte_characters() -> dict[int, str]:
    """encoder.py's bytes_to_unicode."""
    visible = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    characters = {byte: chr(byte) for byte in visible}
    for byte in range(256):
        characters.setdefault(byte, chr(256 + len(characters) - len(visible)))
    return characters


def split(text: str) -> list[str]:
    """Words in the byte alphabet."""
    characters = byte_characters()
    return ["".join(characters[byte] for byte in word.encode()) for word in PATTERN.findall(text)]


def bpe(word: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    """Merge the neighbours with the lowest rank, everywhere, until none are left to merge."""
    parts = list(word)
    while len(parts) > 1:
        best = min(itertools.pairwise(parts), key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            break
        merged: list[str] = []
        while parts:
            width = 2 if tuple(parts[:2]) == best else 1
            merged.append("".join(parts[:width]))
            parts = parts[width:]
        parts = merged
    return parts


def main() -> None:
    """Read the whole tokenizer, write the part and the ids."""
    source = Path(sys.argv[1])
    vocab = json.loads((source / "vocab.json").read_text(encoding="utf-8"))
    merges = [
        tuple(line.split(" "))
        for line in (source / "merges.txt").read_text(encoding="utf-8").splitlines()
        if not line.startswith("#version")
    ]
    ranks = {(left, right): rank for rank, (left, right) in enumerate(merges)}
    words = {word for text in TEXTS for word in split(text)}
    kept = [pair for pair in ranks if any("".join(pair) in word for word in words)]
    names = [*byte_characters().values(), *map("".join, kept), END_OF_TEXT]
    part = dict(sorted(((name, vocab[name]) for name in names), key=lambda item: item[1]))
    expected = [
        {"text": text, "ids": [vocab[token] for word in split(text) for token in bpe(word, ranks)]}
        for text in TEXTS
    ]
    (FOLDER / "vocab.json").write_text(
        json.dumps(part, ensure_ascii=True, indent=0) + "\n", encoding="utf-8"
    )
    (FOLDER / "merges.txt").write_text(
        "\n".join(["#version: 0.2", *map(" ".join, kept), ""]), encoding="utf-8"
    )
    lines = ",\n".join(json.dumps(entry, ensure_ascii=True) for entry in expected)
    (FOLDER / "expected.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
