"""Three merges as rows of cells, and bits per byte of several models as bars."""

import bz2
from collections import Counter, defaultdict
from math import log2

from nanovllm.cli.svg import picture, text
from nanovllm.learn.steps.step01_tokens.solution import (
    bigram_probabilities,
    bits_per_byte,
    encode,
    learn_merges,
)
from nanovllm.learn.texts import alice, grimm

_TEXT = "aaabdaaabac"
_WIDTH, _HEIGHT = 690, 466
_CELL, _LEFT, _BAR = 34, 130, 42.0  # pixels: a byte, where cells and bars begin, a bit
_MERGES = 50


def draw() -> str:
    """Return the picture."""
    merges = learn_merges(_TEXT, 3)
    spelled = [chr(byte) for byte in range(256)]
    for left, right in merges:
        spelled.append(spelled[left] + spelled[right])
    parts = []
    for count in range(len(merges) + 1):
        y = 60 + 42 * count
        ids = encode(_TEXT, merges[:count])
        name = "bytes" if count == 0 else f"{spelled[255 + count]} is {255 + count}"
        parts += [text(16, y + 20, name, "strong"), *_cells(y, ids, spelled)]
        parts.append(text(540, y + 20, f"{len(ids)} tokens", "note"))
    parts.append(text(16, 256, "bits per byte of two chapters of Alice in Wonderland", "strong"))
    for index, (name, bits) in enumerate(_models()):
        y = 270 + 27 * index
        kind = "bar ours" if name.startswith("bigram") else "bar"
        parts += [
            text(16, y + 15, name),
            f'<rect class="{kind}" x="220" y="{y}" width="{_BAR * bits:.1f}" height="20"/>',
            text(228 + _BAR * bits, y + 15, f"{bits:.2f}", "value"),
        ]
    note = "All but the first have read 30 KB of Grimm's tales before."
    return picture(
        "Byte-pair encoding and a bigram", _WIDTH, _HEIGHT, [*parts, text(16, 452, note, "note")]
    )


def _cells(y: float, ids: list[int], spelled: list[str]) -> list[str]:
    """Return a cell for each token, as wide as its bytes."""
    parts = []
    x = float(_LEFT)
    for token in ids:
        width = _CELL * len(spelled[token])
        opacity = 0.12 if token < 256 else 0.2 + 0.13 * (token - 255)
        parts.append(
            f'<rect class="bar ours" x="{x:g}" y="{y}" width="{width - 3}" height="30" '
            f'opacity="{opacity:.2f}"/>'
        )
        parts.append(text(x + width / 2 - 1.5, y + 20, spelled[token], "value", "middle"))
        x += width
    return parts


def _models() -> list[tuple[str, float]]:
    """Return names and bits per byte of models that learned from one text, on another one."""
    learned, judged = grimm(), alice()
    bits = [("all bytes equally likely", log2(256))]
    merges = learn_merges(learned, _MERGES)
    for count in (0, _MERGES):
        ids, other = encode(learned, merges[:count]), encode(judged, merges[:count])
        table = bigram_probabilities(ids, 256 + count, 0.1)
        name = "bigram of bytes" if count == 0 else f"bigram after {count} merges"
        bits.append((name, bits_per_byte(other, table, len(judged.encode()))))
    bits += [(f"table of the last {length} bytes", _table_bits(length)) for length in (3, 5)]
    both, first = bz2.compress((learned + judged).encode()), bz2.compress(learned.encode())
    return [*bits, ("bzip2", 8 * (len(both) - len(first)) / len(judged.encode()))]


def _table_bits(length: int) -> float:
    """Return bits per byte of tables of the last 0, 1, up to `length` bytes, mixed.

    A context that was seen n times, with k different bytes after it, gets the weight n / (n + k),
    the next shorter one the rest (Witten and Bell 1991, method C).
    """
    learned, judged = grimm().encode(), alice().encode()
    tables = [defaultdict[bytes, Counter[int]](Counter) for _ in range(length + 1)]
    for size, table in enumerate(tables):
        for at in range(size, len(learned)):
            table[learned[at - size : at]][learned[at]] += 1
    bits = 0.0
    for at, byte in enumerate(judged):
        p = 1 / 256
        for size, table in enumerate(tables[: at + 1]):
            counts = table.get(judged[at - size : at])
            if counts is not None:
                p = (counts[byte] + len(counts) * p) / (counts.total() + len(counts))
        bits -= log2(p)
    return bits / len(judged)
