"""What step 2 must do, and what goes wrong."""

from types import ModuleType

import numpy as np

from nanovllm.learn.checking import Case
from nanovllm.learn.steps.step02_logits.mistakes import MISTAKES
from nanovllm.model import logprobs
from nanovllm.model.attention import softmax
from nanovllm.model.families.gpt2 import network as gpt2
from nanovllm.model.layers import logits
from nanovllm.model.weights import LayerNorm, ModelWeights
from nanovllm.training.network.numpy_operations import NumpyOperations

__all__ = ("CASES", "MISTAKES")


def _random(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


_VOCAB, _POSITIONS, _D_MODEL = 7, 9, 4
_TOKENS, _PLACES, _HEAD = _random(_VOCAB, 4), _random(_POSITIONS, 4), _random(_VOCAB, _D_MODEL)
_NORM = LayerNorm(np.ones(4, dtype=np.float32), np.zeros(4, dtype=np.float32))
_WEIGHTS = ModelWeights(_TOKENS, _PLACES, (), _NORM, _HEAD)
_IDS, _LATER = np.array([2, 0, 2, 5, 6]), np.array([3, 4, 5, 6, 7])
_HIDDEN = _random(5, _D_MODEL)
_LOGITS = 3 * _random(5, _VOCAB)
_TARGETS = np.array([3, 0, 6, 1, 3])
_PAPER = np.log(np.array([[1, 2, 5], [3, 3, 2]], dtype=np.float32))
_LARGE = np.array([[0, 100, 99], [-300, -301, -302]], dtype=np.float32)


def _embed(module: ModuleType, positions: np.ndarray) -> object:
    return module.embed(_IDS, positions, _TOKENS, _PLACES)


def _loss() -> float:
    """Return the loss of training, with logits as the hidden states of an identity head."""
    head = np.eye(_VOCAB, dtype=np.float32)
    return NumpyOperations().cross_entropy(_LOGITS, head, _TARGETS)[0] / len(_TARGETS)


def _keeps_input(module: ModuleType) -> object:
    rows = _LOGITS.copy()
    module.softmax(rows)
    module.log_softmax(rows)
    module.cross_entropy(rows, _TARGETS)
    return {"the logits after the calls": rows}


CASES = (
    Case(
        "the embedding of five tokens",
        lambda module: _embed(module, np.arange(5)),
        lambda: gpt2.embed(_WEIGHTS, _IDS, np.arange(5)),
        "Token 2 stands at the positions 0 and 2: its two rows differ by their positions only.",
    ),
    Case(
        "tokens at the positions 3 to 7",
        lambda module: _embed(module, _LATER),
        lambda: gpt2.embed(_WEIGHTS, _IDS, _LATER),
        "With a KV cache only the new tokens are computed, and they do not stand at 0.",
    ),
    Case(
        "logits of five rows",
        lambda module: module.logits(_HIDDEN, _HEAD),
        lambda: logits(_WEIGHTS, _HIDDEN),
    ),
    Case(
        "softmax of the logarithms of 1, 2, 5",
        lambda module: module.softmax(_PAPER.copy()),
        lambda: np.array([[1, 2, 5], [3, 3, 2]], dtype=np.float32) / 8,
        "The exponentials are 1, 2 and 5; their sum is 8.",
    ),
    Case(
        "softmax of five rows",
        lambda module: module.softmax(_LOGITS.copy()),
        lambda: softmax(_LOGITS[None])[0],
    ),
    Case(
        "softmax of large logits and of small ones",
        lambda module: module.softmax(_LARGE.copy()),
        lambda: softmax(_LARGE[None])[0],
        "exp(89) is more than float32 can hold, and exp(-104) is 0.",
    ),
    Case(
        "log-softmax of five rows",
        lambda module: module.log_softmax(_LOGITS.copy()),
        lambda: logprobs.log_softmax(_LOGITS),
    ),
    Case(
        "log-softmax of large logits and of small ones",
        lambda module: module.log_softmax(5 * _LARGE),
        lambda: logprobs.log_softmax(5 * _LARGE),
        "The logarithm of a probability that rounds to 0 is still a number, such as -500.",
    ),
    Case(
        "the loss of a model that knows nothing",
        lambda module: module.cross_entropy(np.zeros((6, 2048), dtype=np.float32), np.arange(6)),
        lambda: float(np.log(2048)),
        "Every token has the probability 1 / 2048.",
    ),
    Case("the loss of five rows", lambda m: m.cross_entropy(_LOGITS.copy(), _TARGETS), _loss),
    Case("the logits are not changed", _keeps_input, lesson="The caller may need them again."),
)
