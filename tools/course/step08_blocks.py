"""The worked example of paged blocks: two block tables, and the order of the free blocks."""

from nanovllm.cli.svg import picture, text
from nanovllm.learn.steps.step08_blocks.solution import BlockManager

_FIRST, _SECOND = [1, 2, 3, 4, 5, 6, 7, 8, 9], [1, 2, 3, 4, 5, 6, 7, 8, 20]
_LEFT, _WIDTH, _CELL = 76, 106, 24
STYLE = """<style>
  .bar.a { fill: #0969da; opacity: 0.35; }
  .bar.b { fill: #bc4c00; opacity: 0.35; }
  .bar.both { fill: #8250df; opacity: 0.35; }
  .bar.cached { opacity: 0.45; }
  .bar.empty { opacity: 0.15; }
  @media (prefers-color-scheme: dark) {
    .bar.a { fill: #4493f8; opacity: 0.45; }
    .bar.b { fill: #db6d28; opacity: 0.45; }
    .bar.both { fill: #ab7df8; opacity: 0.45; }
  }
</style>"""
"""Colours of the blocks and tokens of sequences."""


def draw() -> str:
    """Return the picture."""
    manager = BlockManager(6, 4)
    first = manager.allocate(3)
    manager.register_prefix(first, _FIRST)
    shared = manager.find_prefix(_SECOND)
    for block in shared:
        manager.share(block)
    second = shared + manager.allocate(1)
    tokens = _contents(first, _FIRST) | _contents(second, _SECOND)
    parts = [STYLE, text(16, 60, "a: 1 2 3 4 5 6 7 8 9", "strong")]
    parts += _table(first, 76, 132, "a")
    parts += [text(16, 268, "b: 1 2 3 4 5 6 7 8 20", "strong")]
    parts += _table(second, 230, 208, "b")
    for block in range(6):
        holders = [name for name, ids in (("a", first), ("b", second)) if block in ids]
        parts += _block(block, tokens.get(block, []), holders)
    manager.free(first)
    manager.free(second)
    order = [manager.allocate(1)[0] for _ in range(6)]
    parts += [
        text(16, 312, "Both have ended. The free blocks, in the order of their next use:", "strong")
    ]
    for index, block in enumerate(order):
        is_cached = block in shared
        x = _LEFT + index * _WIDTH
        kind = "both" if is_cached else "empty"
        parts += [
            f'<rect class="bar {kind}" x="{x}" y="326" width="96" height="30"/>',
            text(x + 48, 346, f"block {block}", "value", "middle"),
            text(x + 48, 374, "can be found" if is_cached else "empty", "note", "middle"),
        ]
    return picture("Two sequences in a pool of six blocks of four tokens", 720, 392, parts)


def _contents(block_ids: list[int], tokens: list[int]) -> dict[int, list[int]]:
    """Return the tokens in each block."""
    return {block: tokens[4 * index : 4 * index + 4] for index, block in enumerate(block_ids)}


def _table(block_ids: list[int], y: int, end: int, kind: str) -> list[str]:
    """Return a block table with lines to the blocks; `end` is the edge of the pool beside it."""
    parts = [text(16, y + 16, "its blocks", "note")]
    near = y + 24 if end > y else y
    for index, block in enumerate(block_ids):
        x, target = 100 + index * 40, _LEFT + block * _WIDTH + 48
        parts += [
            f'<line x1="{x + 16}" y1="{near}" x2="{target}" y2="{end}"/>',
            f'<rect class="bar {kind}" x="{x}" y="{y}" width="32" height="24"/>',
            text(x + 16, y + 16, str(block), "value", "middle"),
        ]
    return parts


def _block(block: int, tokens: list[int], holders: list[str]) -> list[str]:
    """Return a block of the pool with its tokens, and who holds it."""
    left = _LEFT + block * _WIDTH
    kind = "both" if len(holders) == 2 else holders[0] if holders else "empty"
    parts = [text(left + 48, 146, f"block {block}", "note", "middle")]
    for offset in range(4):
        x = left + offset * _CELL
        is_filled = offset < len(tokens)
        parts.append(
            f'<rect class="bar {kind if is_filled else "empty"}" x="{x}" y="154" width="22" '
            'height="26"/>'
        )
        if is_filled:
            parts.append(text(x + 11, 171, str(tokens[offset]), "value", "middle"))
    held = f"held by {len(holders)}" if holders else "free"
    parts.append(text(left + 48, 200, held, "note", "middle"))
    return parts
