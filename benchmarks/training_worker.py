"""A contender's process in training.py: train on random tokens, and report the time of each step.

    out   {"ready": {...}}, or {"missing": reason} without its package, or {"failed": reason}
    in    {"seconds": 5.0}
    out   {"step_s": [...], "loss": 4.2, "peak_bytes": 123}

This file needs the standard library alone.

Run one by hand: python -m benchmarks.peers.train_torch small '{"bfloat16": true}' --threads 2
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.worker import peak_bytes, serve_requests

LEARNING_RATE = 1e-3
BETAS = (0.9, 0.99)
WEIGHT_DECAY = 0.1
GRAD_CLIP = 1.0
_FIRST_STEPS = 3  # of a process


@dataclass(frozen=True, slots=True)
class Setting:
    """Sizes of a network with a tied head and of its batches."""

    layers: int
    heads: int
    width: int
    context: int
    batch: int
    vocab: int

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.batch * self.context

    @property
    def operations(self) -> int:
        """Operations of a step: 6 N a token, and attention to the earlier tokens.

        N is the number of elements of all matrices that multiply activations: 12 width^2 a layer
        and the head. The forward pass has a multiplication and an addition for each, the backward
        pass twice as many (dX and dW). A query has (context + 1) / 2 keys on average. A key costs 4
        width operations a layer in the forward pass (scores, and the sum of values) and 8 in the
        backward pass. What a program computes twice counts once.
        """
        matrices = 12 * self.layers * self.width**2 + self.vocab * self.width
        attention = 6 * self.layers * self.width * (self.context + 1)
        return self.tokens * (6 * matrices + attention)


SETTINGS = {
    "nanogpt-cpu": Setting(layers=4, heads=4, width=128, context=64, batch=12, vocab=65),
    "small": Setting(layers=6, heads=6, width=384, context=256, batch=12, vocab=65),
    "bpe": Setting(layers=4, heads=4, width=256, context=256, batch=16, vocab=4096),
}
"""nanogpt-cpu and small are those of nanoGPT (config/train_shakespeare_char.py and its README)."""

Step = Callable[[], tuple[float, float]]
"""step() updates the network once; it returns the seconds that this took, and the loss.

The time includes the forward and the backward pass, clipping and AdamW; not drawing the tokens.
"""
Load = Callable[[Setting, dict[str, Any], int, int], tuple[Step, dict[str, Any]]]
"""load(setting, options, threads, seed) returns a Step, and details such as versions."""


def serve(load: Load) -> None:
    """Run the worker of the command line until the input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("setting", choices=SETTINGS)
    parser.add_argument("options", type=json.loads)
    parser.add_argument("--threads", type=int, required=True)
    parsed = parser.parse_args()

    def start() -> tuple[Callable[..., dict[str, Any]], dict[str, Any]]:
        options = dict(parsed.options)
        seed = options.pop("seed", 0)
        step, about = load(SETTINGS[parsed.setting], options, parsed.threads, seed)
        for _ in range(_FIRST_STEPS):
            step()
        return lambda seconds: measure(step, seconds), about

    serve_requests(start, parsed.threads)


def measure(
    step: Step, seconds: float, clock: Callable[[], float] = time.perf_counter
) -> dict[str, Any]:
    """Take a step, then others for some seconds; return their times, loss and peak memory.

    The first step is not timed: the other contenders have used the caches since the last turn.
    """
    step()
    times: list[float] = []
    end = clock() + seconds
    while not times or clock() < end:
        step_s, loss = step()
        times.append(step_s)
    return {"step_s": times, "loss": loss, "peak_bytes": peak_bytes()}
