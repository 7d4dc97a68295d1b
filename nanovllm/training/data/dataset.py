"""Dataset: the tokens of one split, drawn as batches without padding.

An epoch begins at a random offset below `context` and cuts the tokens into windows of
`context + 1`. The inputs of a window are all but its last token, the targets all but its first, so
neighbouring windows share one token and each target is predicted once. The windows are shuffled.

    offset 1, context 3      tokens  0 [1 2 3 4] 5 6 7 8
                                     0 1 2 3 [4 5 6 7] 8

Offset and order of an epoch depend on (seed, epoch) alone, and a batch on its number: a resumed run
needs no other state to draw the batches of an uninterrupted one.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Bool, Int64, Integer

from nanovllm.training.network.operations import IGNORED


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences of one length.

    Each target is the token after the input at its place, or IGNORED.
    """

    inputs: Int64[np.ndarray, "batch context"]
    targets: Int64[np.ndarray, "batch context"]

    @property
    def num_targets(self) -> int:
        """Number of targets that are not ignored."""
        return int((self.targets != IGNORED).sum())


class Dataset:
    """The tokens of one split. Every window lies within it."""

    def __init__(
        self,
        tokens: Integer[np.ndarray, " tokens"],
        context: int,
        has_loss: Bool[np.ndarray, " tokens"] | None = None,
    ) -> None:
        """Keep the tokens as they are; they may be a memory-mapped file.

        As targets, tokens without a loss are ignored; None for a loss of every token.
        """
        self.tokens = np.asarray(tokens)
        self.context = context
        self.has_loss = has_loss
        self._epoch = lru_cache(maxsize=2)(self._draw_epoch)

    @property
    def windows(self) -> int:
        """Number of windows in an epoch; fewer than 2 * context tokens are in none of them."""
        return max(1, len(self.tokens) // self.context - 1)

    @property
    def num_targets(self) -> int:
        """Number of tokens that have a loss."""
        return len(self.tokens) if self.has_loss is None else int(self.has_loss.sum())

    def prompt(self, tokens: int) -> Integer[np.ndarray, " prompt"]:
        """Return the first tokens; where a part has no loss, the first such part, or its end."""
        if self.has_loss is None:
            return self.tokens[:tokens]
        end = max(1, int(self.has_loss.argmax()))
        return self.tokens[max(0, end - self.context // 2) : end]

    def batch(self, number: int, batch_size: int, seed: int) -> Batch:
        """Return a training batch; it depends on nothing but the arguments.

        Batches follow each other through the epochs: a batch at the end of an epoch is completed
        from the next epoch.

        Args:
            number: of the batch in the run, from 0.
            batch_size: number of windows.
            seed: of the run, at least 0.
        """
        assert len(self.tokens) > self.context, "prepare_data refuses a text without a window"
        numbers = range(number * batch_size, (number + 1) * batch_size)
        epochs = (divmod(one, self.windows) for one in numbers)
        starts = [self._epoch(seed, epoch)[window] for epoch, window in epochs]
        return self._gather(np.array(starts, np.int64), self.context)

    def validation_batches(self, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
        """Yield the whole split in order: each token but the first is a target once.

        The last batch of full windows may have fewer than `batch_size`; a shorter window at the end
        of the split is a batch of its own.

        Args:
            batch_size: maximum number of windows in a batch.
            limit: maximum number of batches, spread evenly over the split.
        """
        predictions = max(0, len(self.tokens) - 1)
        full, rest = divmod(predictions, self.context)
        starts = np.arange(0, full * self.context, self.context, dtype=np.int64)
        cut = [(starts[at : at + batch_size], self.context) for at in range(0, full, batch_size)]
        if rest:
            cut.append((np.array([full * self.context], np.int64), rest))
        if self.has_loss is not None:
            cut = [one for one in cut if self._gather(*one).num_targets]
        drawn = len(cut) if limit is None else min(limit, len(cut))
        for i in range(drawn):
            yield self._gather(*cut[i * len(cut) // drawn])

    def _draw_epoch(self, seed: int, epoch: int) -> Int64[np.ndarray, " windows"]:
        """Return the first token of each window of an epoch, in the order of training.

        Windows without a loss are left out; the first others take their places.
        """
        generator = np.random.default_rng((seed, epoch))
        span = self.windows * self.context
        offset = generator.integers(min(self.context, len(self.tokens) - span))
        starts = offset + self.context * generator.permutation(self.windows)
        if self.has_loss is None:
            return starts
        counts = np.append(0, np.cumsum(self.has_loss))
        kept = starts[counts[starts + self.context + 1] > counts[starts + 1]]
        return np.resize(kept, len(starts)) if kept.size else starts

    def _gather(self, starts: Int64[np.ndarray, " batch"], length: int) -> Batch:
        indices = starts[:, None] + np.arange(length)
        inputs, targets = self.tokens[indices], self.tokens[indices + 1]
        targets = targets.astype(np.int64)
        if self.has_loss is not None:
            targets[~self.has_loss[indices + 1]] = IGNORED
        return Batch(inputs.astype(np.int64), targets)
