"""What step 2 must do, and what goes wrong."""

from types import ModuleType

import numpy as np

from nanovllm.learn.checking import Case, Mistake
from nanovllm.model import gpt2, logprobs
from nanovllm.model.attention import softmax
from nanovllm.model.weights import GPT2Weights, LayerNorm
from nanovllm.training.network.numpy_operations import NumpyOperations


def _random(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


_VOCAB, _POSITIONS, _D_MODEL = 7, 9, 4
_TOKENS, _PLACES, _HEAD = _random(_VOCAB, 4), _random(_POSITIONS, 4), _random(_VOCAB, _D_MODEL)
_NORM = LayerNorm(np.ones(4, dtype=np.float32), np.zeros(4, dtype=np.float32))
_WEIGHTS = GPT2Weights(_TOKENS, _PLACES, (), _NORM, _HEAD)
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
        lambda: gpt2.logits(_WEIGHTS, _HIDDEN),
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

_EMBED = "return token_embedding[token_ids] + position_embedding[positions]"
_SUM = "weights = np.exp(logits - logits.max(axis=1, keepdims=True))"
_SHARE = "return weights / weights.sum(axis=1, keepdims=True)"
_SHIFTED = "shifted = logits - logits.max(axis=1, keepdims=True)"
_PICKED = "log_softmax(logits)[np.arange(len(targets)), targets]"
_MEAN = "return float(-logprobs.mean(dtype=np.float64))"

MISTAKES = (
    Mistake(
        "no positions",
        "The embedding of the position is not added. Without it a token looks the same wherever "
        "it stands.",
        _EMBED,
        "return token_embedding[token_ids]",
    ),
    Mistake(
        "positions restart",
        "Row 0 gets position 0, whatever `positions` says.",
        "position_embedding[positions]",
        "position_embedding[: len(positions)]",
    ),
    Mistake(
        "position of the token id",
        "The position table is looked up with the token ids; it needs `positions`.",
        "position_embedding[positions]",
        "position_embedding[token_ids]",
    ),
    Mistake(
        "embeddings multiplied",
        "Token and position are multiplied; add them.",
        "token_embedding[token_ids] + position_embedding[positions]",
        "token_embedding[token_ids] * position_embedding[positions]",
    ),
    Mistake(
        "head not transposed",
        "The head is [vocab, d_model], a row for each token. A row of hidden states times the "
        "transposed head gives a dot product with each of them.",
        "return hidden @ head.T",
        "return hidden @ head",
    ),
    Mistake(
        "not divided by the sum",
        "The exponentials are not divided by their sum, so they are no probabilities.",
        _SHARE,
        "return weights",
    ),
    Mistake(
        "one sum of all rows",
        "The sum runs over all rows. Each row is a distribution of its own: axis=1.",
        _SHARE,
        "return weights / weights.sum()",
    ),
    Mistake(
        "softmax over the rows",
        "The softmax runs over axis 0, the rows. The probabilities of all tokens at one row sum "
        "to 1: axis 1.",
        f"    {_SUM}\n    {_SHARE}",
        f"    {_SUM}\n    {_SHARE}".replace("axis=1", "axis=0"),
    ),
    Mistake(
        "maximum not subtracted",
        "The largest logit is not subtracted before np.exp. Large logits overflow to inf, small "
        "ones all become 0, and inf / inf and 0 / 0 are NaN.",
        _SUM,
        "weights = np.exp(logits)",
    ),
    Mistake(
        "one maximum for all rows",
        "The largest logit of all rows is subtracted. Where a row lies far below it, all its "
        "exponentials are 0, and 0 / 0 is NaN. Take the maximum of each row.",
        _SUM,
        "weights = np.exp(logits - logits.max())",
    ),
    Mistake(
        "logarithm of the softmax",
        "np.log(softmax(logits)) is -inf where the probability rounds to 0. Use log p = x - max - "
        "log(sum of exp(x - max)).",
        f"{_SHIFTED}\n    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))",
        "return np.log(softmax(logits))",
    ),
    Mistake(
        "maximum not subtracted in log-softmax",
        "The softmax subtracts the largest logit, log_softmax does not: the sum of the "
        "exponentials overflows or is 0.",
        _SHIFTED,
        "shifted = logits",
    ),
    Mistake(
        "logarithm to base 2",
        "np.log2 is used. The natural logarithm, np.log, is the inverse of np.exp; a loss in bits "
        "is the loss in nats divided by ln 2.",
        "np.log(np.exp(shifted)",
        "np.log2(np.exp(shifted)",
    ),
    Mistake(
        "no sign",
        "The mean of log p is negative. The loss is its opposite, 0 for a model that is always "
        "right and sure.",
        "float(-logprobs",
        "float(logprobs",
    ),
    Mistake(
        "sum instead of mean",
        "The losses are summed. The mean does not depend on how many tokens there are, so texts "
        "and batches of any length can be compared.",
        _MEAN,
        "return float(-logprobs.sum(dtype=np.float64))",
    ),
    Mistake(
        "logarithm of the mean",
        "The mean is taken of the probabilities, and then the logarithm. Each token's own "
        "logarithm counts: -log 0.01 weighs much more than its share of the mean.",
        _MEAN,
        "return float(-np.log(np.exp(logprobs).mean(dtype=np.float64)))",
    ),
    Mistake(
        "every target at every row",
        "`[:, targets]` picks all targets at each row: [rows, rows] numbers. Pick one number a row "
        "with [np.arange(rows), targets].",
        _PICKED,
        "log_softmax(logits)[:, targets]",
    ),
    Mistake(
        "loss of the most likely token",
        "The loss is that of the largest logit. It must be that of the target, whatever the model "
        "prefers.",
        _PICKED,
        "log_softmax(logits)[np.arange(len(targets)), logits.argmax(axis=1)]",
    ),
    Mistake(
        "targets shifted again",
        "Row i is compared with target i + 1. `targets` already has the token that follows row i.",
        _PICKED,
        "log_softmax(logits)[np.arange(len(targets) - 1), targets[1:]]",
    ),
    Mistake(
        "logits changed in place",
        "The logits themselves are changed (by -= or by out=logits). Compute a new array.",
        _SHIFTED,
        "logits -= logits.max(axis=1, keepdims=True)\n    shifted = logits",
    ),
)
