"""The worked example of the scheduler: the tokens of each step, and the blocks after its plan."""

from nanovllm.cli.svg import picture, text
from nanovllm.learn.steps.step08_blocks.solution import BlockManager
from nanovllm.learn.steps.step09_scheduler.solution import Chunk, Scheduler, Sequence
from tools.course.step08_blocks import STYLE

_BUDGET, _BLOCKS = 8, 6
_TOP, _ROW, _CELL, _POOL = 96, 34, 38, 430


def draw() -> str:
    """Return the picture."""
    scheduler = Scheduler(BlockManager(_BLOCKS, 4), max_tokens=_BUDGET, max_sequences=4)
    scheduler.add(Sequence("a", list(range(6)), 6))
    scheduler.add(Sequence("b", list(range(20, 31)), 4))
    parts = [
        STYLE,
        text(72, 60, "tokens of the step: at most 8", "strong"),
        text(72, 80, "a number is a position; a framed one samples", "note"),
        text(_POOL, 60, "the 6 blocks after its plan", "strong"),
    ]
    seen: set[int] = set()
    number = 0
    while chunks := scheduler.schedule():
        y = _TOP + number * _ROW
        number += 1
        parts.append(text(16, y + 18, f"step {number}", "note"))
        parts += _tokens(chunks, y)
        parts += _pool(scheduler, seen, y)
        parts.append(text(_POOL + 182, y + 18, _remark(scheduler), "note"))
        scheduler.commit(chunks, [7 for chunk in chunks if chunk.samples])
    height = _TOP + number * _ROW + 40
    note = "A grey block is free, and what is in it can still be found."
    parts.append(text(72, height - 20, note, "note"))
    return picture("Two sequences, a budget of 8 tokens and 6 blocks of 4", 720, height, parts)


def _tokens(chunks: list[Chunk], y: int) -> list[str]:
    """Return the tokens of a step, side by side."""
    parts, x = [], 72
    for chunk in chunks:
        name = chunk.sequence.name
        last = chunk.start + chunk.count - 1
        for position in range(chunk.start, last + 1):
            parts.append(
                f'<rect class="bar {name}" x="{x}" y="{y}" width="{_CELL - 4}" height="26"/>'
            )
            if chunk.samples and position == last:
                parts.append(
                    f'<rect x="{x + 1}" y="{y + 1}" width="{_CELL - 6}" height="24" '
                    'fill="none" stroke="#8c959f" stroke-width="2"/>'
                )
            parts.append(text(x + 17, y + 18, f"{name} {position}", "value", "middle"))
            x += _CELL
    return parts


def _pool(scheduler: Scheduler, seen: set[int], y: int) -> list[str]:
    """Return the blocks; `seen` has those that were held in an earlier step."""
    holders = {block: one.name for one in scheduler.running for block in one.block_ids}
    seen |= set(holders)
    parts = []
    for block in range(_BLOCKS):
        kind = holders.get(block, "cached" if block in seen else "empty")
        x = _POOL + block * 29
        parts.append(f'<rect class="bar {kind}" x="{x}" y="{y}" width="26" height="26"/>')
        parts.append(text(x + 13, y + 18, holders.get(block, ""), "value", "middle"))
    return parts


def _remark(scheduler: Scheduler) -> str:
    """Return what is special about a step."""
    if scheduler.waiting:
        return f"{scheduler.waiting[0].name} waits"
    return "no block is free" if scheduler.blocks.num_free == 0 else ""
