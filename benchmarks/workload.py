"""The three workloads: random token ids, drawn from a seed so that nothing can be prepared.

    decode1      decode 128 tokens of one sequence after a prompt of 16; the first does not count
    prefill512   one prompt of 512 tokens, one token out
    serve32      32 requests of 32 to 256 tokens in and 32 to 128 out, submitted at once

All decode greedily past the end-of-text token, so that each output has its full length.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

WORKLOADS = ("decode1", "prefill512", "serve32")
DEFAULT_SEED = 7

Answer = dict[str, Any]
Run = Callable[[list[list[int]], list[int]], Answer]
"""run(prompts, lengths) returns {"seconds": ..., "token_ids": [[...]], ...}."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests, and the tokens that count: decoded, prompt or output tokens."""

    name: str
    prompts: list[list[int]]
    lengths: list[int]

    @property
    def tokens(self) -> int:
        """Return the number of counted tokens."""
        if self.name == "decode1":
            return self.lengths[0] - 1
        return sum(map(len, self.prompts)) if self.name == "prefill512" else sum(self.lengths)

    def run(self, run: Run) -> tuple[float, Answer]:
        """Return the seconds of the counted tokens (decode1 without prefill), and the outputs."""
        answer = run(self.prompts, self.lengths)
        if self.name != "decode1":
            return answer["seconds"], answer
        first = run(self.prompts, [1])
        return answer["seconds"] - first["seconds"], answer


def make_workloads(vocab: int, seed: int = DEFAULT_SEED, scale: int = 1) -> dict[str, Workload]:
    """Return the workloads; a `scale` above 1 divides lengths and the number of requests."""
    rng = np.random.default_rng(seed)

    def draw(tokens: int) -> list[int]:
        drawn: list[int] = rng.integers(0, vocab, tokens).tolist()
        return drawn

    def between(low: int, high: int) -> int:
        return int(rng.integers(low // scale, high // scale + 1))

    decode = Workload("decode1", [draw(max(1, 16 // scale))], [128 // scale + 1])
    prefill = Workload("prefill512", [draw(512 // scale)], [1])
    requests = [(draw(between(32, 256)), between(32, 128)) for _ in range(max(1, 32 // scale))]
    serve = Workload(
        "serve32", [prompt for prompt, _ in requests], [length for _, length in requests]
    )
    return {workload.name: workload for workload in (decode, prefill, serve)}
