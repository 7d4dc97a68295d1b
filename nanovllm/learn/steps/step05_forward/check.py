"""What step 5 must do, and what goes wrong."""

from functools import cache
from types import ModuleType
from typing import Any

import numpy as np

from nanovllm.learn.checking import Case
from nanovllm.learn.steps.step05_forward.mistakes import MISTAKES
from nanovllm.learn.tiny_model import LOGPROBS, PROMPT, TINY_CONFIG, tiny_weights
from nanovllm.model.activation import gelu_new
from nanovllm.model.batch import ForwardBatch
from nanovllm.model.families.forward import forward
from nanovllm.model.families.gpt2 import network as gpt2
from nanovllm.model.kv_cache import KVCache
from nanovllm.model.layers import logits
from nanovllm.model.logprobs import log_softmax
from nanovllm.model.observer import ignore
from nanovllm.model.weights import Linear

__all__ = ("CASES", "MISTAKES")

_HEADS, _EPSILON = TINY_CONFIG.heads, TINY_CONFIG.epsilon
_TOKENS = np.array(PROMPT)
_VALUES = np.linspace(-3, 3, 25, dtype=np.float32).reshape(5, 5)
_ROWS = np.array([[1, 2], [3, 4]], dtype=np.float32)
_LAYER = Linear(
    np.array([[1, 0, 2], [0, 1, -1]], dtype=np.float32), np.array([10, 20, 30], dtype=np.float32)
)


@cache
def _engine() -> dict[str, np.ndarray]:
    """Return the engine's hidden states and logits of the prompt."""
    seen: dict[str, np.ndarray] = {}

    def observe(name: str, layer: int | None, values: np.ndarray) -> None:
        seen[name if layer is None else f"{name} {layer}"] = values.copy()

    batch = ForwardBatch.single(PROMPT, all_rows=True)
    cache = KVCache.allocate(TINY_CONFIG, blocks=1, block_size=len(PROMPT))
    hidden = forward(TINY_CONFIG, tiny_weights(), batch, cache, observe)
    return {**seen, "logits": logits(tiny_weights(), hidden)}


def _block(module: ModuleType, index: int) -> object:
    """Return a block's output for the hidden states that the engine gives it."""
    before = "embeddings" if index == 0 else f"hidden_after_ffn {index - 1}"
    layer = tiny_weights().layers[index]
    return module.block(_engine()[before].copy(), layer, _HEADS, _EPSILON)


def _keeps_rows(module: ModuleType) -> object:
    hidden, layer = _engine()["embeddings"].copy(), tiny_weights().layers[0]
    module.block(hidden, layer, _HEADS, _EPSILON)
    rows = _VALUES.copy()
    module.gelu(rows)
    return {"the input of the block": hidden, "the input of gelu": rows}


def _forward(module: ModuleType, tokens: int) -> Any:
    """Return the logits of the first tokens of the prompt."""
    return module.forward(_TOKENS[:tokens], tiny_weights(), _HEADS, _EPSILON)


def _logprobs(module: ModuleType) -> object:
    """Return the log-probability of each token of the prompt but the first."""
    logprobs = log_softmax(_forward(module, len(PROMPT)))
    return logprobs[np.arange(len(PROMPT) - 1), _TOKENS[1:]]


CASES = (
    Case(
        "a linear layer on paper",
        lambda module: module.linear(_ROWS, _LAYER),
        lambda: np.array([[11, 22, 30], [13, 24, 32]], dtype=np.float32),
        "Row 1, 2 times the columns 1, 0 and 0, 1 and 2, -1, plus the bias 10, 20, 30.",
    ),
    Case(
        "gelu from -3 to 3", lambda module: module.gelu(_VALUES.copy()), lambda: gelu_new(_VALUES)
    ),
    Case(
        "the feed-forward network",
        lambda m: m.feed_forward(
            _engine()["embeddings"].copy(),
            tiny_weights().layers[0].up,
            tiny_weights().layers[0].down,
        ),
        lambda: gpt2.feed_forward(
            TINY_CONFIG, tiny_weights().layers[0], 0, _engine()["embeddings"], ignore
        ),
    ),
    Case("the first block", lambda m: _block(m, 0), lambda: _engine()["hidden_after_ffn 0"]),
    Case("the second block", lambda m: _block(m, 1), lambda: _engine()["hidden_after_ffn 1"]),
    Case(
        "inputs are not changed",
        _keeps_rows,
        lesson="`x += y` changes the array that the caller has; `x = x + y` makes a new one.",
    ),
    Case("logits of one token", lambda m: _forward(m, 1), lambda: _engine()["logits"][:1]),
    Case("logits of five tokens", lambda m: _forward(m, 5), lambda: _engine()["logits"][:5]),
    Case(
        "log-probabilities of 30 tokens equal those of transformers",
        _logprobs,
        lambda: np.array(LOGPROBS, dtype=np.float32),
    ),
)
