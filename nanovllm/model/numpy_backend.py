"""backend="numpy": the readable forward pass of gpt2.py behind the protocol of backend.py."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float32, Int64
from threadpoolctl import ThreadpoolController

from nanovllm.model.batch import ForwardBatch
from nanovllm.model.checkpoint import load_weights
from nanovllm.model.config import GPT2Config
from nanovllm.model.free_memory import return_freed_memory
from nanovllm.model.gpt2 import BATCH_INVARIANT, FAST, Arithmetic, forward, logits
from nanovllm.model.kv_cache import KVCache
from nanovllm.model.weights import GPT2Weights


class NumpyBackend:
    """Weights in float32, a KVCache in float32, products by whatever BLAS NumPy was built with."""

    def __init__(
        self,
        config: GPT2Config,
        weights: GPT2Weights,
        *,
        batch_invariant: bool = False,
        num_threads: int | None = None,
    ) -> None:
        """Wrap loaded weights; `num_threads` limits BLAS in the whole process, None leaves it alone."""
        self._config = config
        self._weights = weights
        self._arithmetic: Arithmetic = BATCH_INVARIANT if batch_invariant else FAST
        self._cache = KVCache.allocate(
            layers=config.layers,
            blocks=0,
            block_size=1,
            heads=config.heads,
            head_dim=config.head_dim,
        )
        if num_threads is not None:
            ThreadpoolController().limit(limits=num_threads, user_api="blas")

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        dtype: str = "float32",
        quantization: str | None = None,
        kv_cache_dtype: str = "auto",
        batch_invariant: bool = False,
        num_threads: int | None = None,
    ) -> "NumpyBackend":
        """Load a model folder; raises CheckpointError when it cannot be used."""
        if (dtype, quantization) != ("float32", None) or kv_cache_dtype not in {"auto", "float32"}:
            asked = (
                f"dtype={dtype!r}, quantization={quantization!r}, kv_cache_dtype={kv_cache_dtype!r}"
            )
            raise ValueError(
                f"{asked} was asked for, but backend='numpy' computes in float32 only; take backend='numba'"
            )
        config = GPT2Config.load(folder)
        return cls(
            config,
            load_weights(folder, config),
            batch_invariant=batch_invariant,
            num_threads=num_threads,
        )

    @property
    def config(self) -> GPT2Config:
        """Sizes of the network."""
        return self._config

    @property
    def weight_dtype(self) -> str:
        """Float32, whatever the file holds."""
        return "float32"

    @property
    def cache_dtype(self) -> str:
        """Float32."""
        return "float32"

    @property
    def num_threads(self) -> int:
        """Threads of BLAS, which computes the products."""
        pools = ThreadpoolController().select(user_api="blas").info()
        return max((pool["num_threads"] for pool in pools), default=1)

    @property
    def row_sampler(self) -> None:
        """The runner samples, with NumPy too."""
        return

    def block_bytes(self, block_size: int) -> int:
        """Bytes of one block: keys and values of every layer in float32."""
        return 2 * 4 * self._config.layers * block_size * self._config.d_model

    def allocate_cache(self, blocks: int, block_size: int) -> None:
        """Make an empty cache in place of the one before."""
        config = self._config
        self._cache = KVCache.allocate(
            layers=config.layers,
            blocks=blocks,
            block_size=block_size,
            heads=config.heads,
            head_dim=config.head_dim,
        )

    def forward(self, batch: ForwardBatch) -> Float32[np.ndarray, "rows d_model"]:
        """Compute a batch; returns the final hidden state of its `logit_rows`."""
        blocks, block_size = self._cache.keys.shape[1:3]
        batch.check(
            vocab=self._config.vocab,
            max_positions=self._config.max_positions,
            blocks=blocks,
            block_size=block_size,
        )
        return forward(self._config, self._weights, batch, self._cache, self._arithmetic)

    def states(
        self, hidden: Float32[np.ndarray, "rows d_model"]
    ) -> Float32[np.ndarray, "rows d_model"]:
        """The final hidden state at rows that `forward` has given: those rows."""
        return hidden

    def logits(
        self, hidden: Float32[np.ndarray, "rows d_model"]
    ) -> Float32[np.ndarray, "rows vocab"]:
        """Each word's score at rows of final hidden states."""
        return logits(self._weights, hidden, self._arithmetic)

    def greedy(
        self, hidden: Float32[np.ndarray, "rows d_model"]
    ) -> tuple[Int64[np.ndarray, " rows"], Bool[np.ndarray, " rows"]]:
        """The most likely word at rows of final hidden states, and whether the row has any."""
        scores = self.logits(hidden)
        return scores.argmax(axis=1), np.isfinite(scores.max(axis=1))

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks of the cache, each (from, to)."""
        sources, targets = (list(blocks) for blocks in zip(*copies, strict=True))
        for array in (self._cache.keys, self._cache.values):
            array[:, targets] = array[:, sources]

    def __del__(self) -> None:
        """Give the memory of weights and cache back."""
        if "_weights" in self.__dict__:  # otherwise it was never complete
            del self._weights, self._cache
            return_freed_memory()

    def fill_blocks(self, block_ids: list[int], value: float) -> None:
        """Overwrite whole blocks of the cache."""
        self._cache.keys[:, block_ids] = value
        self._cache.values[:, block_ids] = value
