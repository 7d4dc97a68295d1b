"""Which tokens each call of `forward` computes, without and with a cache."""

from nanovllm.cli.svg import picture, text

_PROMPT, _NEW = ["The", "old", "man", "said"], ["that", "he", "was"]
_WIDTH, _ROW, _TOP = 42, 40, 104


def draw() -> str:
    """Return the picture."""
    words = [*_PROMPT, *_NEW]
    ends = range(len(_PROMPT), len(words) + 1)
    whole = [(0, end) for end in ends]
    cached = [(0 if end == len(_PROMPT) else end - 1, end) for end in ends]
    note_y = _TOP + len(ends) * _ROW + 24
    parts = [
        *_grid(66, "without a cache", words, whole),
        *_grid(416, "with a cache", words, cached),
        *(text(16, _TOP + row * _ROW + 22, f"call {row + 1}") for row in range(len(ends))),
        f'<rect class="bar ours" x="66" y="{note_y - 11}" width="14" height="14"/>',
        text(86, note_y, "computed"),
        f'<rect class="bar" x="166" y="{note_y - 11}" width="14" height="14" opacity="0.5"/>',
        text(186, note_y, "its keys and values are read from the cache"),
    ]
    return picture("Four calls of forward", 732, note_y + 18, parts)


def _grid(x: float, title: str, words: list[str], computed: list[tuple[int, int]]) -> list[str]:
    """Return a row for each call: the tokens that it computes, and those of the cache."""
    total = sum(end - start for start, end in computed)
    parts = [text(x, 60, f"{title}: {total} tokens computed", "strong")]
    parts += [
        text(x + (column + 0.5) * _WIDTH - 2, 90, word, "note", "middle")
        for column, word in enumerate(words)
    ]
    for row, (start, end) in enumerate(computed):
        for column in range(end):
            kind = 'class="bar ours"' if column >= start else 'class="bar" opacity="0.5"'
            parts.append(
                f'<rect {kind} x="{x + column * _WIDTH}" y="{_TOP + row * _ROW}" '
                f'width="{_WIDTH - 4}" height="{_ROW - 8}"/>'
            )
    return parts
