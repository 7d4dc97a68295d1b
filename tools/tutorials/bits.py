"""The numbers of docs/tutorials/same-question-same-bits.md.

Run: python tools/tutorials/bits.py

This asks the bundled model the same question alone and together with seven others, on each backend,
prints what differs and keeps it in bits.json. `python tools/make_tutorials.py` makes the page.
"""

import json
import sys
from collections.abc import Sequence
from decimal import Context, Decimal
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from nanovllm import LLM, SamplingParams
from nanovllm.cli.svg import picture, text
from nanovllm.config import EngineSettings
from nanovllm.model.philox import draw_keys, exponentials
from tools.tutorials.drawing import STYLE
from tools.tutorials.pages import Tutorial, code, table

Draw: TypeAlias = tuple[int, int, int]  # seed, choice, position
Tree: TypeAlias = Decimal | tuple["Tree", "Tree"]

PAGE = "same-question-same-bits.md"
RECORD = Path(__file__).with_suffix(".json")
QUESTION = "The old man looked at the sea and"
OTHERS = [f"{word}, {QUESTION}" for word in ("Then", "Now", "Once", "And", "So", "But", "Here")]
BACKENDS: dict[str, EngineSettings] = {
    "numpy": {"backend": "numpy", "enable_prefix_caching": False},
    "numpy, batch_invariant": {
        "backend": "numpy",
        "batch_invariant": True,
        "enable_prefix_caching": False,
    },
    "numba": {"backend": "numba", "enable_prefix_caching": False},
}
MAX_TOKENS = 64
_THREE_DIGITS = Context(prec=3)
_PROBABILITIES = {"sea": 0.45, "sky": 0.30, "door": 0.25}  # of the tokens 0, 1 and 2


def main() -> int:
    """Measure, print and write the record."""
    record = {name: measure(settings) for name, settings in BACKENDS.items()}
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(_measured(record))
    return 0


def measure(settings: EngineSettings, max_tokens: int = MAX_TOKENS) -> dict[str, Any]:
    """Return how many log-probabilities of an answer change in company, and by how much."""
    llm = LLM(**settings)
    params = SamplingParams(
        temperature=0.0, max_tokens=max_tokens, logprobs=1, ignore_eos=True, seed=0
    )
    rows = []
    for prompts in ([QUESTION], [QUESTION, *OTHERS]):
        (choice,) = llm.generate(prompts, params)[0].outputs
        assert choice.logprobs is not None
        rows.append(
            (
                list(choice.token_ids),
                [
                    position[token].logprob
                    for position, token in zip(choice.logprobs, choice.token_ids, strict=True)
                ],
            )
        )
    llm.close()
    (tokens, alone), (other_tokens, together) = rows
    differences = np.abs(np.subtract(alone, together))
    return {
        "tokens": max_tokens,
        "same_tokens": tokens == other_tokens,
        "different": int(np.count_nonzero(differences)),
        "largest": float(differences.max()),
    }


def tutorial() -> Tutorial:
    """Return the contents of the page."""
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    large, one = np.float32(2**24), np.float32(1)
    parts = {
        "float32": code(
            [
                f"(16777216 + 1) + 1  =  {(large + one) + one:.0f}",
                f"16777216 + (1 + 1)  =  {large + (one + one):.0f}",
            ]
        ),
        "measured": _measured(record),
        "draws": _draws(),
    }
    (sea, noise), (other, _) = _winner((7, 0, 12)), _winner((7, 1, 12))
    times = ", ".join(
        f"{number:.3f} / {p:.2f} = {number / p:.2f}"
        for number, p in zip(noise, _PROBABILITIES.values(), strict=True)
    )
    facts = (times, f"so *{sea}* comes next. For choice 1 it is *{other}*")
    return Tutorial(PAGE, parts, facts, {"sums.svg": _picture()})


def _measured(record: dict[str, Any]) -> str:
    rows = [
        [
            f"`{name}`",
            f"{one['different']} of {one['tokens']}",
            f"{one['largest']:.1e}" if one["largest"] else "0",
        ]
        for name, one in record.items()
    ]
    return table(["backend", "log-probabilities that differ", "largest difference"], rows)


def _noise(draw: Draw) -> list[float]:
    """Return the noise of the tokens."""
    seeds, choices, positions = (np.array([one]) for one in draw)
    key = draw_keys(seeds.astype(np.uint64), choices, positions)[0]
    return exponentials(key, len(_PROBABILITIES)).round(3).tolist()


def _draws() -> str:
    draws: list[Draw] = [
        (seed, choice, position)
        for seed, choice in ((7, 0), (7, 1), (8, 0))
        for position in (12, 13)
    ]
    rows = [[*map(str, draw), *(f"{number:.3f}" for number in _noise(draw))] for draw in draws]
    return table(["seed", "choice", "position", *_PROBABILITIES], rows)


def _winner(draw: Draw) -> tuple[str, list[float]]:
    """Return the token with the smallest noise / probability, and the noise."""
    noise = _noise(draw)
    times = {
        token: number / p for number, (token, p) in zip(noise, _PROBABILITIES.items(), strict=True)
    }
    return min(times, key=times.__getitem__), noise


def _sum(tree: Tree) -> Decimal:
    """Return the sum of a tree, with every node rounded to three digits."""
    if isinstance(tree, Decimal):
        return tree
    return _THREE_DIGITS.add(_sum(tree[0]), _sum(tree[1]))


def _picture() -> str:
    a, *small = (Decimal(number) for number in ("100", "0.4", "0.4", "0.4"))
    left: Tree = (((a, small[0]), small[1]), small[2])
    pairs: Tree = ((a, small[0]), (small[1], small[2]))
    parts: list[str] = []
    for x, title, tree in ((16, "one after another", left), (360, "in pairs", pairs)):
        parts.append(text(x, 56, f"{title}: {_sum(tree)}", "strong"))
        _draw_tree(tree, x, 320, 80, parts)
    title = "The same four numbers, each sum rounded to three digits"
    return picture(title, 700, 276, parts, STYLE)


def _draw_tree(tree: Tree, left: float, width: float, top: float, parts: list[str]) -> float:
    """Draw a tree from its root at the top; return the x of the root."""
    if isinstance(tree, Decimal):
        x = left + width / 2
        parts.append(text(x, top + 4, str(tree), "forward", "middle"))
        return x
    leaves = [_num_leaves(branch) for branch in tree]
    split = width * leaves[0] / sum(leaves)
    bounds: Sequence[tuple[float, float]] = ((left, split), (left + split, width - split))
    xs = [
        _draw_tree(branch, start, size, top + 56, parts)
        for branch, (start, size) in zip(tree, bounds, strict=True)
    ]
    x = sum(xs) / 2
    parts += [f'<path class="flow" d="M{x:g} {top + 10:g}L{end:g} {top + 42:g}"/>' for end in xs]
    parts.append(text(x, top + 4, str(_sum(tree)), "strong", "middle"))
    return x


def _num_leaves(tree: Tree) -> int:
    return 1 if isinstance(tree, Decimal) else sum(map(_num_leaves, tree))


if __name__ == "__main__":
    sys.exit(main())
