"""The pictures of docs/tutorials/continuous-batching-film.md, from the recording in film.py."""

from collections.abc import Sequence

from nanovllm.cli.svg import picture, text
from tools.tutorials.drawing import STYLE, box
from tools.tutorials.film import BLOCK_SIZE, BUDGET, CLIENTS, NUM_BLOCKS, Frame, Part, record
from tools.tutorials.pages import Tutorial, table

PAGE = "continuous-batching-film.md"
STILLS = (2, 4, 26, 29)
_WIDTH, _HEIGHT, _LEFT = 720, 268, 16
_CELL, _BLOCK, _BLOCK_HEIGHT = 28, 82, 32  # pixels
_CELLS_Y, _BLOCKS_Y = 78, 154
_CACHE = f"{NUM_BLOCKS} blocks of {BLOCK_SIZE} tokens"
_FRAME_S = 1.5
_KINDS = dict(zip((client.name for client in CLIENTS), "abcd", strict=True))
_FILM_STYLE = """
  .frame {{ visibility: hidden; }}
  .frame:first-of-type {{ visibility: visible; }}
  @keyframes show {{ 0% {{ visibility: visible; }} {end:.3f}% {{ visibility: hidden; }} }}
  @media (prefers-reduced-motion: no-preference) {{
    .frame:first-of-type {{ visibility: hidden; }}
    .frame {{ animation: show {total:g}s step-end infinite; }}
  }}
"""


def tutorial() -> Tutorial:
    """Return the contents of the page."""
    frames = record()
    requests = [
        [client.name, str(client.arrives), str(len(client.prompt)), str(client.max_tokens)]
        for client in CLIENTS
    ]
    rows = [
        [str(frame.step), *(_cell(frame, client.name) for client in CLIENTS)] for frame in frames
    ]
    num_tokens = sum(part.count for frame in frames for part in frame.parts)
    prompt_tokens = sum(len(client.prompt) for client in CLIENTS)
    output_tokens = sum(client.max_tokens for client in CLIENTS)
    parts = {
        "requests": table(
            ["request", "arrives before step", "prompt tokens", "tokens to generate"], requests
        ),
        "steps": table(["step", *(client.name for client in CLIENTS)], rows[:5] + rows[23:32]),
    }
    facts = (
        f"{len(frames)} steps",
        f"{prompt_tokens} prompt tokens and generated {output_tokens}",
        f"computed {num_tokens} tokens",
        f"saved 64 tokens, while the preemption cost {num_tokens - _without_events() + 64}",
    )
    pictures = {f"batching-step-{step:02}.svg": still(frames[step - 1]) for step in STILLS} | {
        "batching-film.svg": film(frames)
    }
    return Tutorial(PAGE, parts, facts, pictures)


def _without_events() -> int:
    """Return the tokens to compute without a prefix cache and without preemption."""
    return sum(len(client.prompt) + client.max_tokens - 1 for client in CLIENTS)


def still(frame: Frame) -> str:
    """Return one step as a picture."""
    return picture(f"Step {frame.step}", _WIDTH, _HEIGHT, [*_background(), *_draw(frame)], STYLE)


def film(frames: Sequence[Frame]) -> str:
    """Return all steps as an animated picture, which begins again at its end."""
    total = _FRAME_S * len(frames)
    parts = _background()
    for index, frame in enumerate(frames):
        drawn = "".join([text(_LEFT + 210, 28, f"step {frame.step}", "title"), *_draw(frame)])
        parts.append(f'<g class="frame" style="animation-delay: {_FRAME_S * index:g}s">{drawn}</g>')
    style = STYLE + _FILM_STYLE.format(end=100 / len(frames), total=total)
    return picture("Continuous batching,", _WIDTH, _HEIGHT, parts, style)


def _cell(frame: Frame, name: str) -> str:
    for part in frame.parts:
        if part.name == name:
            return _range(part) + (", samples" if part.samples and part.count > 1 else "")
    return "waits" if name in frame.waiting else ""


def _range(part: Part) -> str:
    end = part.start + part.count - 1
    return f"{part.start}" if part.count == 1 else f"{part.start} to {end}"


def _background() -> list[str]:
    """Return what is the same in all frames."""
    parts = [
        text(_LEFT, _CELLS_Y - 8, f"tokens of this step, at most {BUDGET}", "note"),
        text(_LEFT, _BLOCKS_Y - 8, f"KV cache after it: {_CACHE}", "note"),
    ]
    parts += [
        box(_LEFT + _CELL * index, _CELLS_Y, _CELL - 3, 22, "", "empty") for index in range(BUDGET)
    ]
    parts += [
        box(*_block_corner(block), _BLOCK - 6, _BLOCK_HEIGHT, "", "empty")
        for block in range(NUM_BLOCKS)
    ]
    return parts


def _draw(frame: Frame) -> list[str]:
    """Return the events, cells, blocks and queues of one step."""
    parts = [text(_LEFT, 52, "; ".join(frame.events), "strong")] if frame.events else []
    x = float(_LEFT)
    for part in frame.parts:
        for _ in range(part.count):
            parts.append(box(x, _CELLS_Y, _CELL - 3, 22, part.name, _KINDS[part.name]))
            x += _CELL
        middle = x - _CELL * part.count / 2 - 1.5
        label = _range(part).replace(" to ", "-")
        parts.append(text(middle, _CELLS_Y + 36, label, "small note", "middle"))
    for number, block in enumerate(frame.blocks):
        left, top = _block_corner(number)
        width = (_BLOCK - 6) * block.num_tokens / BLOCK_SIZE
        height = _BLOCK_HEIGHT / max(len(block.holders), 1)
        for row, holder in enumerate(block.holders):
            parts.append(box(left, top + row * height, width, height, "", _KINDS[holder]))
        if block.num_tokens and not block.holders:
            parts.append(box(left, top, width, height, "", "box cached"))
        label = " ".join(block.holders) or ("cached" if block.num_tokens else "")
        parts.append(text(left + 6, top + 20, f"{number}"))
        parts.append(text(left + _BLOCK - 12, top + 20, label, "", "end"))
    for left, title, names in (
        (_LEFT, "running", frame.running),
        (_LEFT + 160, "waiting", frame.waiting),
    ):
        parts.append(text(left, _HEIGHT - 12, f"{title}: {' '.join(names) or 'none'}", "strong"))
    return parts


def _block_corner(block: int) -> tuple[float, float]:
    row, column = divmod(block, NUM_BLOCKS // 2)
    return _LEFT + _BLOCK * column, _BLOCKS_Y + (_BLOCK_HEIGHT + 6) * row
