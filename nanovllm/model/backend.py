"""The seam between the engine and an implementation of the forward pass.

The seam is the whole forward pass: a backend owns how weights are packed and how the cache is laid out, and nothing above it reads
either. One is chosen when the runner is made.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float32, Int64

from nanovllm.model.batch import ForwardBatch
from nanovllm.model.config import GPT2Config
from nanovllm.model.rows import RowSampler


@runtime_checkable
class Backend(Protocol):
    """A loaded network with its KV cache. Not for use by two threads at once."""

    @property
    def config(self) -> GPT2Config:
        """Sizes of the network."""
        ...

    @property
    def weight_dtype(self) -> str:
        """The type that weights are kept and multiplied in."""
        ...

    @property
    def cache_dtype(self) -> str:
        """The type of keys and values."""
        ...

    @property
    def num_threads(self) -> int:
        """Threads that compute a large step."""
        ...

    @property
    def row_sampler(self) -> RowSampler | None:
        """Sampling beside the forward pass; None where the runner is to sample by itself."""
        ...

    def block_bytes(self, block_size: int) -> int:
        """Bytes that one block of the KV cache takes, all layers together."""
        ...

    def allocate_cache(self, blocks: int, block_size: int) -> None:
        """Make a KV cache of `blocks` blocks of `block_size` tokens, in place of the one before."""
        ...

    def forward(self, batch: ForwardBatch) -> Float32[np.ndarray, "rows d_model"]:
        """Compute a batch and return the final hidden state of its `logit_rows`; ValueError when an index lies outside.

        It may be a view that the next call of any of these functions overwrites.
        """
        ...

    def states(
        self, hidden: Float32[np.ndarray, "rows d_model"]
    ) -> Float32[np.ndarray, "rows d_model"]:
        """The network's final hidden state, after the last layer norm, at rows that `forward` has given and that may be scaled for the head."""
        ...

    def logits(
        self, hidden: Float32[np.ndarray, "rows d_model"]
    ) -> Float32[np.ndarray, "rows vocab"]:
        """Each word's score at rows of final hidden states. Ask for few rows at a time: one is vocab * 4 bytes."""
        ...

    def greedy(
        self, hidden: Float32[np.ndarray, "rows d_model"]
    ) -> tuple[Int64[np.ndarray, " rows"], Bool[np.ndarray, " rows"]]:
        """The most likely word at rows of final hidden states, of equals the lowest id, and whether the row has any.

        A row with a score that is NaN or infinite, or with none above minus infinity, has none: its entry means nothing.
        """
        ...

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks of the cache, each (from, to), as they were before any of them is copied; no two have the same `to`."""
        ...

    def fill_blocks(self, block_ids: list[int], value: float) -> None:
        """Overwrite whole blocks of the cache; for tests that show that what a free block holds is never read."""
        ...


class BackendLoader(Protocol):
    """Loads a model folder; raises CheckpointError when it cannot be used."""

    def __call__(
        self,
        folder: Path,
        *,
        dtype: str,
        quantization: str | None,
        kv_cache_dtype: str,
        batch_invariant: bool,
        num_threads: int | None,
    ) -> Backend:
        """The folder's network, ready but for its cache; ValueError for types that it cannot compute in."""
        ...
