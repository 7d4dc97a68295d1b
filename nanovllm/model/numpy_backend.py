"""backend="numpy": a family's forward pass in NumPy, behind the protocol of backend.py."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int64
from threadpoolctl import ThreadpoolController

from nanovllm.model.ablation import without
from nanovllm.model.backend import LoadOptions
from nanovllm.model.batch import ForwardBatch
from nanovllm.model.checkpoint import load_weights
from nanovllm.model.config import ModelConfig
from nanovllm.model.families.forward import forward
from nanovllm.model.families.registry import load_config
from nanovllm.model.kv_cache import KVCache
from nanovllm.model.layers import logits
from nanovllm.model.machine import return_freed_memory
from nanovllm.model.numpy_sampler import NumpySampler
from nanovllm.model.weights import ModelWeights


class NumpyBackend:
    """Weights and KV cache in float32; NumPy's BLAS computes the matrix products.

    BLAS chooses its kernel by the number of rows, so the last bits of a row may depend on the rows
    beside it. A batch-invariant backend computes one token at a time: the operations for a token
    are then the same in any batch.

    Attributes:
        config: sizes of the network.
        weight_dtype, cache_dtype: float32, whatever type the checkpoint stores.
        sampler: sampling in NumPy.
    """

    weight_dtype = cache_dtype = "float32"

    def __init__(
        self,
        config: ModelConfig,
        weights: ModelWeights,
        *,
        batch_invariant: bool = False,
        num_threads: int | None = None,
    ) -> None:
        """Wrap loaded weights; `num_threads` limits BLAS in the whole process, None does not."""
        self.config = config
        self.sampler = NumpySampler()
        self._weights = weights
        self._batch_invariant = batch_invariant
        self.allocate_cache(0, 1)
        if num_threads is not None:
            ThreadpoolController().limit(limits=num_threads, user_api="blas")

    @classmethod
    def load(
        cls, folder: Path, options: LoadOptions | None = None, **others: Any
    ) -> "NumpyBackend":
        """Load a model folder; raise CheckpointError if it cannot be used.

        `others` are further arguments of a subclass.
        """
        options = options or LoadOptions()
        if options.types not in {("float32", None, "auto"), ("float32", None, "float32")}:
            raise ValueError(
                f"backend='numpy' computes in float32 only; it cannot use "
                f"{options.describe_types()}; use backend='numba'"
            )
        config = load_config(folder)
        weights = without(load_weights(folder, config), config, options.without)
        return cls(
            config,
            replace(weights, layers=tuple(weights.layers)),  # each ablated block is made once
            batch_invariant=options.batch_invariant,
            num_threads=options.num_threads,
            **others,
        )

    @property
    def num_threads(self) -> int:
        """Threads of BLAS."""
        pools = ThreadpoolController().select(user_api="blas").info()
        return max((pool["num_threads"] for pool in pools), default=1)

    def block_bytes(self, block_size: int) -> int:
        """Return the bytes of one block: keys and values of every layer in float32."""
        return 2 * 4 * self.config.layers * block_size * self.config.keys_width

    def working_bytes(self, max_tokens: int, max_rows: int, block_size: int) -> int:
        """Return the bytes of a step's arrays: rows of tokens, attention scores, logits."""
        config = self.config
        tokens = max_tokens * (8 * config.d_model + 3 * config.d_ff)
        scores = 2 * config.heads * max_tokens * config.max_positions  # and the mask
        return 4 * (tokens + scores + 4 * max_rows * config.vocab)  # the sampler copies logits

    def allocate_cache(self, blocks: int, block_size: int) -> None:
        """Replace the cache by an empty one."""
        self._cache = KVCache.allocate(self.config, blocks=blocks, block_size=block_size)

    def forward(self, batch: ForwardBatch) -> Float32[np.ndarray, "rows d_model"]:
        """Compute a batch; return the final hidden states of its `logit_rows`."""
        blocks, block_size = self._cache.keys.shape[1:3]
        batch.check(
            vocab=self.config.vocab,
            max_positions=self.config.max_positions,
            blocks=blocks,
            block_size=block_size,
        )
        if not self._batch_invariant:
            return self._compute(batch)
        final_hidden = np.empty((len(batch.logit_rows), self.config.d_model), dtype=np.float32)
        for token, one in enumerate(batch.one_token_batches()):
            hidden = self._compute(one)
            final_hidden[batch.logit_rows == token] = hidden  # no row, unless it is a logit row
        return final_hidden

    def _compute(self, batch: ForwardBatch) -> Float32[np.ndarray, "rows d_model"]:
        return forward(self.config, self._weights, batch, self._cache)

    def unscale_hidden(
        self, hidden: Float32[np.ndarray, "rows d_model"]
    ) -> Float32[np.ndarray, "rows d_model"]:
        """Return the rows themselves: `forward` does not scale them."""
        return hidden

    def logits(
        self, hidden: Float32[np.ndarray, "rows d_model"]
    ) -> Float32[np.ndarray, "rows vocab"]:
        """Return the score of every token at rows of final hidden states."""
        if not self._batch_invariant:
            return self._project(hidden)
        scores = np.empty((hidden.shape[0], self.config.vocab), dtype=np.float32)
        for row in range(hidden.shape[0]):
            scores[row] = self._project(hidden[row : row + 1])
        return scores

    def _project(
        self, hidden: Float32[np.ndarray, "rows d_model"]
    ) -> Float32[np.ndarray, "rows vocab"]:
        return logits(self._weights, hidden)

    def greedy(
        self, hidden: Float32[np.ndarray, "rows d_model"]
    ) -> tuple[Int64[np.ndarray, " rows"], Bool[np.ndarray, " rows"]]:
        """Return the argmax token of each row, and whether the row has one."""
        scores = self.logits(hidden)
        return scores.argmax(axis=1), np.isfinite(scores.max(axis=1))

    def greedy_steps(
        self, batch: ForwardBatch, steps: int
    ) -> tuple[Int64[np.ndarray, "steps seqs"], Bool[np.ndarray, "steps seqs"]]:
        """Compute a token of each sequence, then its argmax as the next one, and so on."""
        chosen = [self.greedy(self.forward(batch))]
        while len(chosen) < steps:
            token_ids, has_token = chosen[-1]
            batch = batch.following(np.where(has_token, token_ids, 0), self._cache.keys.shape[2])
            chosen.append(self.greedy(self.forward(batch)))
        token_ids, has_token = (np.stack(each) for each in zip(*chosen, strict=True))
        return token_ids, has_token

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks of the cache, each (from, to)."""
        sources, targets = (list(blocks) for blocks in zip(*copies, strict=True))
        for array in (self._cache.keys, self._cache.values):
            array[:, targets] = array[:, sources]

    def fill_blocks(self, block_ids: list[int], value: float) -> None:
        """Overwrite whole blocks of the cache."""
        self._cache.keys[:, block_ids] = value
        self._cache.values[:, block_ids] = value

    def __del__(self) -> None:
        """Return the memory of weights and cache to the operating system."""
        if "_weights" in self.__dict__:  # otherwise __init__ has failed
            del self._weights, self._cache
            return_freed_memory()
