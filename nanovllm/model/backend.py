"""The interface between the engine and an implementation of the forward pass.

The interface is the whole forward pass: a backend owns how weights are packed and how the cache is
laid out, and nothing above it reads either.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float32, Int64

from nanovllm.model.ablation import Part
from nanovllm.model.batch import ForwardBatch
from nanovllm.model.config import ModelConfig
from nanovllm.model.sampling import Sampler


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """How a backend loads a model folder.

    Attributes:
        dtype: type of the weights; of the token embedding alone where the others are quantized.
        quantization: "int8", or None for weights of type `dtype`.
        kv_cache_dtype: type of keys and values; "auto" chooses it by the weights' type.
        batch_invariant: a sequence's bits do not depend on the others in its batch.
        num_threads: None for the backend's default.
        without: parts of the network that are switched off.
        beside: a loaded network that computes by turns with this one. A compiled one with at least
            as many layers lends its threads.
    """

    dtype: str = "float32"
    quantization: str | None = None
    kv_cache_dtype: str = "auto"
    batch_invariant: bool = False
    num_threads: int | None = None
    without: tuple[Part, ...] = ()
    beside: "Backend | None" = None

    @property
    def types(self) -> tuple[str, str | None, str]:
        """`dtype`, `quantization` and `kv_cache_dtype`."""
        return self.dtype, self.quantization, self.kv_cache_dtype

    def describe_types(self) -> str:
        """Return the types as text for an error message."""
        return "dtype={!r}, quantization={!r}, kv_cache_dtype={!r}".format(*self.types)


@runtime_checkable
class Backend(Protocol):
    """A loaded network with its KV cache; for one thread at a time."""

    @property
    def config(self) -> ModelConfig:
        """Sizes of the network."""
        ...

    @property
    def weight_dtype(self) -> str:
        """Type of the weights in memory and in products."""
        ...

    @property
    def cache_dtype(self) -> str:
        """Type of keys and values."""
        ...

    @property
    def num_threads(self) -> int:
        """Threads that compute a large step."""
        ...

    @property
    def sampler(self) -> Sampler:
        """What turns the logits into tokens."""
        ...

    def block_bytes(self, block_size: int) -> int:
        """Return the bytes of one block of the KV cache, all layers together."""
        ...

    def working_bytes(self, max_tokens: int, max_rows: int, block_size: int) -> int:
        """Return the bytes that a step allocates beside weights and cache, at most.

        Args:
            max_tokens: tokens of its batch.
            max_rows: rows of logits at once.
            block_size: tokens of a block of the cache.
        """
        ...

    def allocate_cache(self, blocks: int, block_size: int) -> None:
        """Replace the KV cache by an empty one of `blocks` blocks of `block_size` tokens."""
        ...

    def forward(self, batch: ForwardBatch) -> Float32[np.ndarray, "rows d_model"]:
        """Compute a batch; return the final hidden states of its `logit_rows`.

        The result may be a view that the next call of any method overwrites. ValueError if an index
        is outside the model or the cache.
        """
        ...

    def unscale_hidden(
        self, hidden: Float32[np.ndarray, "rows d_model"]
    ) -> Float32[np.ndarray, "rows d_model"]:
        """Undo the scaling of channels that `forward` may have applied for a quantized head."""
        ...

    def logits(
        self, hidden: Float32[np.ndarray, "rows d_model"]
    ) -> Float32[np.ndarray, "rows vocab"]:
        """Return the score of every token at rows that `forward` returned.

        A row is 4 * vocab bytes: pass few rows at a time. The result may be a view that the next
        call overwrites.
        """
        ...

    def greedy(
        self, hidden: Float32[np.ndarray, "rows d_model"]
    ) -> tuple[Int64[np.ndarray, " rows"], Bool[np.ndarray, " rows"]]:
        """Return the argmax token of each row, the lowest id on ties, and whether the row has one.

        A row whose maximum is not finite has none (one NaN is enough): its token id means nothing.
        """
        ...

    def greedy_steps(
        self, batch: ForwardBatch, steps: int
    ) -> tuple[Int64[np.ndarray, "steps seqs"], Bool[np.ndarray, "steps seqs"]]:
        """Compute a batch of one token for each sequence, then the argmax after it, and so on.

        Returns the tokens of one to `steps` steps, and whether there is one, as `greedy` does.
        After a row without a token, those of its sequence mean nothing. The block tables have the
        blocks of all steps; ValueError if an index is outside the model or the cache.
        """
        ...

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks of the cache, each (from, to), no two with the same `to`.

        All sources are read as they were before the call.
        """
        ...

    def fill_blocks(self, block_ids: list[int], value: float) -> None:
        """Overwrite whole blocks of the cache; tests show by it that free blocks are not read."""
        ...


BackendLoader = Callable[[Path, LoadOptions], Backend]
"""Returns a model folder's network, without a cache.

It raises CheckpointError if the folder cannot be used, and ValueError if the backend cannot compute
in these types.
"""
