"""Score token ids with a loaded network: the cross-entropy and the argmax at every position.

A text of N tokens t[0], ..., t[N-1] has N - 1 predictions: each token but the first is predicted
once, from at most `context` tokens before it. A window of inputs t[b], ..., t[e-1] predicts
t[b+1], ..., t[e], as in training: neighbouring windows share one token.

- Without overlap (stride = context) windows begin at 0, context, 2 * context, ...: the first
  prediction of a window sees one token, the last sees `context` tokens.
- With stride < context windows begin at 0, stride, 2 * stride, ... From the second on, only the
  predictions that no earlier window made are scored. Each of them sees at least
  context - stride + 1 tokens. This is the sliding window of Hugging Face's guide to perplexity
  (https://huggingface.co/docs/transformers/perplexity) with max_length = context + 1.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Float64, Int64

from nanovllm.model.backend import Backend
from nanovllm.model.batch import ForwardBatch

_BLOCK_SIZE = 32  # tokens per block of the KV cache
_BATCH_TOKENS = 1024
"""Tokens of one forward pass, unless a single window is longer."""
_ROWS_AT_ONCE = 32
"""Rows of logits at once: 6 MB with a vocabulary of 50,257."""


@dataclass(frozen=True, slots=True)
class Window:
    """The inputs of one sequence, and the tokens that follow the last `len(targets)` of them."""

    inputs: Int64[np.ndarray, " tokens"]
    targets: Int64[np.ndarray, " targets"]


@dataclass(frozen=True, slots=True)
class TokenScores:
    """The scores of all targets, in the order of the windows.

    Attributes:
        losses: -log p(target | its context) in nats.
        argmax_tokens: the most probable token at each position, the lowest id on ties.
    """

    losses: Float64[np.ndarray, " targets"]
    argmax_tokens: Int64[np.ndarray, " targets"]


def cut_windows(
    token_ids: Int64[np.ndarray, " tokens"], context: int, stride: int
) -> Iterator[Window]:
    """Yield the windows of one text, as views; a text of fewer than two tokens has none.

    Args:
        context: maximum number of inputs of a window, at least 1.
        stride: distance between the starts of windows, from 1 to `context`.
    """
    assert 1 <= stride <= context
    start, scored = 0, 1
    while scored < len(token_ids):
        stop = min(start + context + 1, len(token_ids))
        yield Window(token_ids[start : stop - 1], token_ids[scored:stop])
        start, scored = start + stride, stop


def score_windows(
    backend: Backend,
    windows: Iterable[Window],
    on_progress: Callable[[int], object] = lambda _: None,
) -> TokenScores:
    """Score the targets of all windows; replaces the backend's KV cache.

    Logits are float32. Their softmax is summed in float64. A loss that is not finite stays NaN or
    infinity.

    Args:
        on_progress: called after every forward pass with its number of targets.

    Raises:
        ValueError: a token id is outside the vocabulary, or a window exceeds the positions.
    """
    losses, argmax_tokens = [np.empty(0, np.float64)], [np.empty(0, np.int64)]
    allocated = 0
    for group in _groups(windows):
        batch, blocks = _make_batch(group)
        if blocks > allocated:
            backend.allocate_cache(blocks, _BLOCK_SIZE)
            allocated = blocks
        hidden = backend.forward(batch).copy()  # `logits` overwrites the view
        targets = np.concatenate([window.targets for window in group])
        for first in range(0, len(targets), _ROWS_AT_ONCE):
            rows = slice(first, first + _ROWS_AT_ONCE)
            logits = backend.logits(hidden[rows])
            losses.append(cross_entropy(logits, targets[rows]))
            argmax_tokens.append(logits.argmax(axis=1).astype(np.int64))
        on_progress(len(targets))
    return TokenScores(np.concatenate(losses), np.concatenate(argmax_tokens))


def cross_entropy(
    logits: Float32[np.ndarray, "rows vocab"], targets: Int64[np.ndarray, " rows"]
) -> Float64[np.ndarray, " rows"]:
    """Return log(sum(exp(logits))) - logits[target] of each row, in nats."""
    with np.errstate(invalid="ignore"):
        largest = logits.max(axis=1, keepdims=True)
        sums = np.exp(logits - largest).sum(axis=1, dtype=np.float64)
        chosen = logits[np.arange(len(targets)), targets].astype(np.float64)
        loss: np.ndarray = np.log(sums) + largest[:, 0].astype(np.float64) - chosen
    return loss


def _groups(windows: Iterable[Window]) -> Iterator[list[Window]]:
    """Yield consecutive windows with at most `_BATCH_TOKENS` inputs together, or a longer one."""
    group: list[Window] = []
    tokens = 0
    for window in windows:
        if group and tokens + len(window.inputs) > _BATCH_TOKENS:
            yield group
            group, tokens = [], 0
        group.append(window)
        tokens += len(window.inputs)
    if group:
        yield group


def _make_batch(windows: Sequence[Window]) -> tuple[ForwardBatch, int]:
    """Return the windows as sequences of one batch, and the number of blocks that it uses."""
    lengths = np.array([len(window.inputs) for window in windows], dtype=np.int64)
    ends = np.cumsum(lengths)
    positions = np.arange(ends[-1], dtype=np.int64) - np.repeat(ends - lengths, lengths)
    blocks = -(-lengths // _BLOCK_SIZE)
    num_blocks = int(blocks.sum())
    first_blocks = np.cumsum(blocks) - blocks
    tables = first_blocks[:, None] + np.arange(blocks.max(), dtype=np.int64)
    is_scored = [
        np.arange(len(one.inputs)) >= len(one.inputs) - len(one.targets) for one in windows
    ]
    batch = ForwardBatch(
        token_ids=np.concatenate([window.inputs for window in windows]),
        positions=positions,
        query_starts=np.append(np.int64(0), ends),
        context_lens=lengths,
        block_tables=np.minimum(tables, num_blocks - 1),  # entries past a context are not read
        slots=np.repeat(first_blocks * _BLOCK_SIZE, lengths) + positions,
        logit_rows=np.flatnonzero(np.concatenate(is_scored)),
    )
    return batch, num_blocks
