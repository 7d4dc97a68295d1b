"""What step 5 must do, and what goes wrong."""

from functools import cache
from types import ModuleType
from typing import Any

import numpy as np

from nanovllm.learn.checking import Case, Mistake
from nanovllm.learn.tiny_model import LOGPROBS, PROMPT, TINY_CONFIG, tiny_weights
from nanovllm.model import gpt2
from nanovllm.model.activation import gelu_new
from nanovllm.model.batch import ForwardBatch
from nanovllm.model.kv_cache import KVCache
from nanovllm.model.logprobs import log_softmax
from nanovllm.model.observer import ignore
from nanovllm.model.weights import Linear

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
    hidden = gpt2.forward(TINY_CONFIG, tiny_weights(), batch, cache, observe)
    return {**seen, "logits": gpt2.logits(tiny_weights(), hidden)}


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
            _engine()["embeddings"], tiny_weights().layers[0].up, tiny_weights().layers[0].down
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

_ATTENTION = "hidden = hidden + self_attention(normed, layer.qkv, layer.out, heads)"
_SECOND = (
    "normed = layer_norm(hidden, layer.ffn_norm.gain, layer.ffn_norm.bias, epsilon)\n    return"
)
_FEED_FORWARD = "return hidden + feed_forward(normed, layer.up, layer.down)"
_FIRST_NORM = "layer_norm(hidden, layer.attention_norm.gain, layer.attention_norm.bias, epsilon)"
_SECOND_NORM = "layer_norm(hidden, layer.ffn_norm.gain, layer.ffn_norm.bias, epsilon)"
_GELU = "return (np.tanh(inner) + 1.0) * rows * 0.5"
_INNER = "math.sqrt(2.0 / math.pi) * (rows + 0.044715 * rows * rows * rows)"
_FINAL = "layer_norm(hidden, norm.gain, norm.bias, epsilon)"
_LOOP = "    for layer in weights.layers:\n"

MISTAKES = (
    Mistake("no bias in linear", "The bias is not added.", " + layer.bias", ""),
    Mistake(
        "weight transposed",
        "The weight is transposed. GPT-2 stores it as [d_in, d_out]: rows @ weight. (PyTorch's "
        "nn.Linear stores [d_out, d_in].)",
        "rows @ layer.weight + layer.bias",
        "rows @ layer.weight.T + layer.bias",
    ),
    Mistake(
        "gelu without the cube",
        "The term 0.044715 x^3 is missing or has another power.",
        "0.044715 * rows * rows * rows",
        "0.044715 * rows * rows",
    ),
    Mistake(
        "root of the two alone",
        "The factor is sqrt(2 / pi), the root of the quotient, not sqrt(2) / pi.",
        "math.sqrt(2.0 / math.pi)",
        "math.sqrt(2.0) / math.pi",
    ),
    Mistake(
        "no root",
        "The factor is sqrt(2 / pi); the root is missing.",
        "math.sqrt(2.0 / math.pi)",
        "(2.0 / math.pi)",
    ),
    Mistake("no half", "The factor 0.5 is missing.", "* rows * 0.5", "* rows"),
    Mistake(
        "one not added",
        "1 must be added to the tanh, so that large x is kept whole and large -x becomes 0.",
        "(np.tanh(inner) + 1.0)",
        "np.tanh(inner)",
    ),
    Mistake(
        "tanh alone",
        "The result is not multiplied by x: 0.5 (1 + tanh) only says which share of x is kept.",
        "(np.tanh(inner) + 1.0) * rows * 0.5",
        "(np.tanh(inner) + 1.0) * 0.5",
    ),
    Mistake(
        "exact gelu",
        "This is the exact gelu, x Phi(x), by the error function. GPT-2 was trained with the tanh "
        "approximation of the docstring, which differs by up to 0.0005.",
        _GELU,
        "erf = np.vectorize(math.erf)(rows / math.sqrt(2)).astype(np.float32)\n"
        "    return (erf + 1.0) * rows * 0.5",
    ),
    Mistake("relu", "This is relu, max(x, 0).", _GELU, "return np.maximum(rows, 0)"),
    Mistake(
        "sigmoid gelu",
        "This is x sigmoid(1.702 x), another approximation of gelu.",
        _GELU,
        "return rows / (1 + np.exp(-1.702 * rows))",
    ),
    Mistake(
        "no activation",
        "There is no gelu between the two linear layers. Without it they are one linear layer.",
        "linear(gelu(linear(hidden, up)), down)",
        "linear(linear(hidden, up), down)",
    ),
    Mistake(
        "gelu at the end",
        "The gelu belongs between the two linear layers, not behind them.",
        "linear(gelu(linear(hidden, up)), down)",
        "gelu(linear(linear(hidden, up), down))",
    ),
    Mistake(
        "no residual around attention",
        "The attention's result replaces the hidden states. It is added to them.",
        _ATTENTION,
        _ATTENTION.replace("hidden + ", ""),
    ),
    Mistake(
        "no residual around the feed-forward network",
        "The feed-forward network's result replaces the hidden states. It is added to them.",
        _FEED_FORWARD,
        _FEED_FORWARD.replace("hidden + ", ""),
    ),
    Mistake(
        "no residuals",
        "Attention and feed-forward network replace the hidden states. Both are added to them.",
        f"{_ATTENTION}\n    {_SECOND} hidden + feed_forward",
        f"{_ATTENTION.replace('hidden + ', '')}\n    {_SECOND} feed_forward",
    ),
    Mistake(
        "residual of the normalized rows",
        "The results are added to the normalized rows. Add them to the rows before the "
        "normalization, which must pass through a block unchanged.",
        f"{_ATTENTION}\n    {_SECOND} hidden + feed_forward",
        f"{_ATTENTION.replace('hidden + ', 'normed + ')}\n    {_SECOND} normed + feed_forward",
    ),
    Mistake(
        "no first normalization",
        "Attention reads the hidden states themselves. It reads them through attention_norm.",
        _FIRST_NORM,
        "hidden",
    ),
    Mistake(
        "no second normalization",
        "The feed-forward network reads the hidden states themselves. It reads them through "
        "ffn_norm.",
        _SECOND_NORM,
        "hidden",
    ),
    Mistake(
        "one normalization for both",
        "The feed-forward network reads what attention reads, so it does not see what attention "
        "has added. Normalize again after the first addition.",
        _SECOND_NORM,
        "normed",
    ),
    Mistake(
        "attention_norm twice",
        "attention_norm is used in both places. The feed-forward network has ffn_norm.",
        _SECOND_NORM,
        _FIRST_NORM,
    ),
    Mistake(
        "normalization behind",
        "The sum is normalized behind each addition, as in the first transformer of 2017. GPT-2 "
        "normalizes what attention and the feed-forward network read, and adds to the rows as "
        "they are.",
        f"    normed = {_FIRST_NORM}\n    {_ATTENTION}\n    {_SECOND} hidden + "
        "feed_forward(normed, layer.up, layer.down)",
        f"    {_ATTENTION.replace('normed', 'hidden')}\n    hidden = {_FIRST_NORM}\n    hidden = "
        f"hidden + feed_forward(hidden, layer.up, layer.down)\n    return {_SECOND_NORM}",
    ),
    Mistake(
        "parallel block",
        "Attention and feed-forward network both read the block's input. In GPT-2 the feed-forward "
        "network reads the hidden states to which attention has been added.",
        f"{_ATTENTION}\n    {_SECOND}",
        f"before = hidden\n    {_ATTENTION}\n    "
        f"{_SECOND.replace('layer_norm(hidden', 'layer_norm(before')}",
    ),
    Mistake(
        "block in place",
        "`hidden += ...` changes the array of the caller. Write hidden = hidden + ...",
        _ATTENTION,
        _ATTENTION.replace("hidden = hidden +", "hidden +="),
    ),
    Mistake(
        "gelu in place",
        "gelu changes the array that it is given. Compute a new one.",
        _GELU,
        "rows *= (np.tanh(inner) + 1.0) * 0.5\n    return rows",
    ),
    Mistake(
        "no positions",
        "The position embedding is not added: the model cannot tell the order of the tokens.",
        "embed(token_ids, positions, weights.token_embedding, weights.position_embedding)",
        "weights.token_embedding[token_ids]",
    ),
    Mistake(
        "positions from one",
        "The first token has the position 0, not 1.",
        "np.arange(len(token_ids))",
        "1 + np.arange(len(token_ids))",
    ),
    Mistake(
        "first layer for all",
        "Every block has the weights of the first layer.",
        _LOOP,
        "    for layer in [weights.layers[0]] * len(weights.layers):\n",
    ),
    Mistake(
        "one layer left out",
        "The last layer is left out.",
        _LOOP,
        "    for layer in weights.layers[:-1]:\n",
    ),
    Mistake(
        "layers reversed",
        "The layers are applied from the last to the first.",
        _LOOP,
        "    for layer in weights.layers[::-1]:\n",
    ),
    Mistake(
        "no final normalization",
        "The hidden states go to the head without final_norm.",
        _FINAL,
        "hidden",
    ),
    Mistake(
        "token embedding as head",
        "The token embedding is used as the head. Many GPT-2 have the same array in both places, "
        "this one has not: use weights.head.",
        "weights.head)",
        "weights.token_embedding)",
    ),
    Mistake(
        "last row only",
        "Only the logits of the last token are returned. Return a row for every token.",
        f"return logits({_FINAL}, weights.head)",
        f"return logits({_FINAL}, weights.head)[-1:]",
    ),
    Mistake(
        "probabilities",
        "The rows are log-probabilities. Return the logits; step 6 divides them by a temperature.",
        f"return logits({_FINAL}, weights.head)",
        f"rows = logits({_FINAL}, weights.head)\n"
        "    return rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))",
    ),
)
