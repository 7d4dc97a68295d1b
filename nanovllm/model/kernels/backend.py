"""backend="numba": the compiled forward pass of kernels/ behind the protocol of backend.py.

Weights are packed into panels while loading; the cache is laid out as attention reads it. A row's bits do not depend on what else is in
the batch, on how a prompt is cut, or on the number of threads.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float32, Int64

from nanovllm.model.batch import ForwardBatch
from nanovllm.model.checkpoint import open_weights
from nanovllm.model.config import GPT2Config
from nanovllm.model.free_memory import return_freed_memory
from nanovllm.model.kernels.build.bounds import watch
from nanovllm.model.kernels.build.layout import LINE_BYTES
from nanovllm.model.kernels.build.packing import aligned_zeros, panel_steps, round_up, to_bfloat16
from nanovllm.model.kernels.build.target import (
    CACHE_TYPES,
    DTYPES,
    PER_WORD,
    QUANTIZATIONS,
    Spec,
    host_target,
)
from nanovllm.model.kernels.library import load_library
from nanovllm.model.kernels.packed_weights import PackedWeights
from nanovllm.model.kernels.record import KernelMemory
from nanovllm.model.kernels.sampler import CompiledRowSampler
from nanovllm.model.kernels.step_record import (
    ITEM_FIELDS,
    NO_WORD,
    NOTES_BYTES,
    PHASES_PER_LAYER,
    PHASES_PER_STEP,
    QUERY_TILE,
    ROW_BLOCK,
    WORD_BYTES,
    best_bytes,
)
from nanovllm.model.kernels.threads.cores import default_threads
from nanovllm.model.kernels.threads.pool import ThreadPool
from nanovllm.model.weights import GPT2Weights

_SHARED_PRODUCTS = 300_000  # fewer multiply-adds than this are done sooner by one thread than by several that wait for each other
_AUTO_CACHE = {"float32": "float32", "bfloat16": "bfloat16", "int8": "bfloat16"}
"""What kv_cache_dtype="auto" means beside each type of weights; bytes in the cache are coarser than bfloat16 and were measured slower."""
_DECODE_ROWS = 32  # rows of logits to have room for from the beginning; more are made room for when they are first asked for


class NumbaBackend:
    """Packed weights, a packed cache, and threads that run the compiled forward pass.

    Attributes:
        memory: all that compiled code is given.
    """

    def __init__(
        self,
        config: GPT2Config,
        weights: GPT2Weights,
        *,
        spec: Spec | None = None,
        narrow_embedding: bool = False,
        num_threads: int | None = None,
    ) -> None:
        """Pack the weights and compile.

        Args:
            spec: types of weights and cache and what the processor can do; by default float32 on this machine.
            narrow_embedding: keep the token embedding in bfloat16.
            num_threads: by default one for each core that this process may use.
        """
        self._config = config
        self._spec = spec or Spec(host_target())
        self._lanes, self._width = self._spec.target.lanes, self._spec.target.panel_width
        self.memory = KernelMemory()
        self._library = load_library(self._spec)
        phases = config.layers * PHASES_PER_LAYER + PHASES_PER_STEP
        self._pool = ThreadPool(num_threads or default_threads(), self._library, phases=phases)
        self._row_sampler = CompiledRowSampler(
            config.vocab, self._pool, self._library, self._spec.target
        )
        self._capacity = 0
        self._logit_capacity = 0
        self._place_sizes()
        self._weights = PackedWeights(
            config, weights, self._spec, narrow_embedding=narrow_embedding
        )
        self.memory.place(**self._weights.arrays)
        self.memory.set(
            embedding_is_narrow=narrow_embedding,
            embedding_bytes=self._weights.arrays["token_embedding"].strides[0],
        )
        self.allocate_cache(0, 1)

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
    ) -> "NumbaBackend":
        """Load a model folder; raises CheckpointError when it cannot be used. It is batch-invariant in any case."""
        is_known = (
            dtype in DTYPES
            and quantization in {None, *QUANTIZATIONS}
            and kv_cache_dtype in {"auto", *CACHE_TYPES}
        )
        if not is_known:
            asked = (
                f"dtype={dtype!r}, quantization={quantization!r}, kv_cache_dtype={kv_cache_dtype!r}"
            )
            raise ValueError(
                f"{asked} was asked for, but backend='numba' takes dtype {' or '.join(DTYPES)}, quantization "
                f"{' or '.join(QUANTIZATIONS)} or none, and kv_cache_dtype auto, {', '.join(CACHE_TYPES)}"
            )
        config = GPT2Config.load(folder)
        weights = quantization or dtype
        cache = _AUTO_CACHE[weights] if kv_cache_dtype == "auto" else kv_cache_dtype
        spec = Spec(host_target(), weights, cache)
        backend = cls(
            config,
            open_weights(folder, config),
            spec=spec,
            narrow_embedding=dtype == "bfloat16",
            num_threads=num_threads,
        )
        return_freed_memory()  # of layers in float32
        return backend

    @property
    def config(self) -> GPT2Config:
        """Sizes of the network."""
        return self._config

    @property
    def weight_dtype(self) -> str:
        """The type that weights are kept and multiplied in."""
        return self._spec.weights

    @property
    def cache_dtype(self) -> str:
        """The type of keys and values."""
        return self._spec.cache

    @property
    def num_threads(self) -> int:
        """Threads that compute a large step; a small one is done by one of them."""
        return self._pool.threads

    @property
    def row_sampler(self) -> CompiledRowSampler:
        """Compiled sampling on the threads of the forward pass."""
        return self._row_sampler

    def block_bytes(self, block_size: int) -> int:
        """Bytes of one block: keys and values of every layer, and their scales."""
        words, scales = self._block_sizes(block_size)
        return WORD_BYTES * self._config.layers * self._config.heads * (sum(words) + 2 * scales)

    def allocate_cache(self, blocks: int, block_size: int) -> None:
        """Make an empty cache in place of the one before."""
        config, memory, per_word = self._config, self.memory, PER_WORD[self._spec.cache]
        columns, head_columns = (
            round_up(block_size, self._lanes),
            round_up(config.head_dim, self._lanes),
        )
        (key_words, value_words), scales = self._block_sizes(block_size)
        memory.set(
            blocks=blocks, block_size=block_size, block_columns=columns, head_columns=head_columns
        )
        memory.set(
            key_steps=panel_steps(config.head_dim, per_word),
            key_bytes=key_words * WORD_BYTES,
            value_bytes=value_words * WORD_BYTES,
        )
        rows, threads = max(QUERY_TILE, config.heads), self._pool.threads
        own = {
            "scores": rows * (config.max_positions // block_size + 1) * columns,
            "scratch": max(ROW_BLOCK * self._width, (rows + 1) * head_columns),
            "queries": rows * round_up(config.head_dim, 16),
            "row": max(round_up(config.d_model, self._width), head_columns),
        }
        memory.set(query_stride=round_up(config.head_dim, 16) * WORD_BYTES)
        memory.set(
            **{f"{name}_bytes": round_up(words, 16) * WORD_BYTES for name, words in own.items()}
        )
        places = (config.layers, blocks, config.heads)
        memory.place(
            keys=_zeros(*places, key_words),
            values=_zeros(*places, value_words),
            key_scales=_zeros(*places, scales),
            value_scales=_zeros(*places, scales),
            **{name: aligned_zeros(threads * round_up(words, 16)) for name, words in own.items()},
        )

    def _block_sizes(self, block_size: int) -> tuple[tuple[int, int], int]:
        """Words of one head's keys and of its values in a block, and the scales of each."""
        per_word, head_dim = PER_WORD[self._spec.cache], self._config.head_dim
        columns = round_up(block_size, self._lanes)
        words = (
            panel_steps(head_dim, per_word) * columns,
            panel_steps(block_size, per_word) * round_up(head_dim, self._lanes),
        )
        return words, columns if self._spec.cache == "int8" else 0

    def forward(self, batch: ForwardBatch) -> Float32[np.ndarray, "rows d_model"]:
        """Compute a batch; the final hidden state of its `logit_rows`, a view that the next call of anything here may overwrite."""
        memory = self.memory
        batch.check_lengths()
        rows = batch.logit_rows.shape[0]
        self._reserve(max(batch.tokens, rows))
        memory.set(
            tokens=batch.tokens, seqs=batch.seqs, rows=rows, max_blocks=batch.block_tables.shape[1]
        )
        memory.fill(
            token_ids=batch.token_ids,
            positions=batch.positions,
            slots=batch.slots,
            logit_rows=batch.logit_rows,
        )
        memory.fill(
            query_starts=batch.query_starts,
            context_lens=batch.context_lens,
            block_tables=batch.block_tables,
        )
        memory.reserve("decode_items", batch.seqs * ITEM_FIELDS)
        memory.reserve("chunk_items", (batch.tokens // QUERY_TILE + batch.seqs) * ITEM_FIELDS)
        with watch(self._spec.target, "plan_step", self._arrays()):
            self._library.functions["plan_step"](memory.address, 0)
        if memory["refused"]:
            sizes = {"blocks": memory["blocks"], "block_size": memory["block_size"]}
            batch.check(vocab=self._config.vocab, max_positions=self._config.max_positions, **sizes)
            raise AssertionError("a batch was refused that ForwardBatch.check finds sound")
        self._run("forward", batch.tokens * self._config.parameters)
        return memory.arrays["final"][:rows, : self._config.d_model]

    def states(
        self, hidden: Float32[np.ndarray, "rows d_model"]
    ) -> Float32[np.ndarray, "rows d_model"]:
        """The network's final hidden state at rows that `forward` has given; a quantized head takes them multiplied channel by channel."""
        multipliers = self._weights.head_multipliers
        return hidden if multipliers is None else hidden / multipliers

    def logits(
        self, hidden: Float32[np.ndarray, "rows d_model"]
    ) -> Float32[np.ndarray, "rows vocab"]:
        """Each word's score at rows of final hidden states; a view that the next call overwrites."""
        rows = hidden.shape[0]
        self._place_final(hidden)
        self._reserve_logits(rows)
        self._run("logits", rows * self._config.vocab * self._config.d_model)
        return self.memory.arrays["logits"][:rows, : self._config.vocab]

    def greedy(
        self, hidden: Float32[np.ndarray, "rows d_model"]
    ) -> tuple[Int64[np.ndarray, " rows"], Bool[np.ndarray, " rows"]]:
        """The most likely word at rows of final hidden states, and whether the row has any."""
        rows = hidden.shape[0]
        self._place_final(hidden)
        self._run("greedy", rows * self._config.vocab * self._config.d_model)
        words = self.memory.arrays["words"][:rows].copy()
        return words, words != NO_WORD

    def _place_final(self, hidden: Float32[np.ndarray, "rows d_model"]) -> None:
        """Make rows the head's input; those that `forward` has just given are it already."""
        rows = hidden.shape[0]
        self._reserve(rows)
        final = self.memory.arrays["final"][:rows, : self._config.d_model]
        if hidden.ctypes.data != final.ctypes.data or hidden.strides != final.strides:
            final[:] = hidden
        self.memory.set(rows=rows)

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks of the cache, each (from, to), with their scales."""
        sources, targets = (list(blocks) for blocks in zip(*copies, strict=True))
        for name in ("keys", "values", "key_scales", "value_scales"):
            array = self.memory.arrays[name]
            array[:, targets] = array[:, sources]

    def fill_blocks(self, block_ids: list[int], value: float) -> None:
        """Overwrite whole blocks of the cache."""
        arrays = self.memory.arrays
        narrow = int(to_bfloat16(np.array([value], dtype=np.float32))[0])
        filling = {
            "float32": np.array(value, dtype=np.float32),
            "bfloat16": np.array(narrow << 16 | narrow, dtype=np.uint32).view(np.float32),
            "int8": np.array(0x7F7F7F7F, dtype=np.uint32).view(np.float32),
        }
        for name in ("keys", "values"):
            arrays[name][:, block_ids] = filling[self._spec.cache]
            arrays[f"{name[:-1]}_scales"][:, block_ids] = value

    def close(self) -> None:
        """End the helper threads."""
        self._pool.close()

    def __del__(self) -> None:
        """End the helper threads, and give the memory of weights and cache back."""
        if "_weights" in self.__dict__:  # otherwise it was never complete
            self.close()
            self.memory.arrays.clear()
            del self._weights
            return_freed_memory()

    def _run(self, function: str, products: int) -> None:
        """Enter a compiled function with as many threads as its work is worth; their number changes no bit."""
        is_shared = products >= _SHARED_PRODUCTS
        threads = self._pool.choose_threads(function, products) if is_shared else 1
        self.memory.set(threads=threads)
        with watch(self._spec.target, function, self._arrays()):
            self._pool.run(self._library.addresses[function], self.memory.address, threads)

    def _arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        """All that compiled code may touch."""
        yield from self.memory.all_arrays()
        yield from self._weights.held

    def _place_sizes(self) -> None:
        config = self._config
        per_word = PER_WORD[self._spec.weights]
        sizes = {
            "layers": config.layers,
            "d_model": config.d_model,
            "d_ff": config.d_ff,
            "heads": config.heads,
            "head_dim": config.head_dim,
            "vocab": config.vocab,
            "max_positions": config.max_positions,
            "hidden_stride": round_up(config.d_model, self._width) * WORD_BYTES,
            # a line longer than needed: were rows a multiple of 4 KiB, a column of all rows would fall into one set of the first-level cache
            "qkv_stride": round_up(3 * config.d_model, self._width) * WORD_BYTES + LINE_BYTES,
            "input_stride": round_up(
                max(config.d_model, config.d_ff if self._spec.weights == "int8" else 0), self._width
            )
            * WORD_BYTES
            // per_word,
            "middle_stride": round_up(config.d_ff, self._width) * WORD_BYTES + LINE_BYTES,
            "logits_stride": round_up(config.vocab, self._width) * WORD_BYTES,
        }
        self.memory.set(**sizes, job=self._pool.job, phases=self._pool.phases)
        self.memory.place(
            epsilon=np.array([config.epsilon], dtype=np.float32),
            scales=np.array(
                [config.attention_scale(layer) for layer in range(config.layers)], dtype=np.float32
            ),
        )

    def _reserve(self, tokens: int) -> None:
        """Make room for the intermediate results of so many tokens."""
        if tokens <= self._capacity:
            return
        self._capacity = round_up(tokens, 64)
        strides = {
            "hidden": "hidden",
            "final": "hidden",
            "mixed": "hidden",
            "inputs": "input",
            "qkv": "qkv",
            "middle": "middle",
        }
        for name, stride in strides.items():
            columns = self.memory[f"{stride}_stride"] // WORD_BYTES
            self.memory.place(
                **{name: aligned_zeros(self._capacity * columns).reshape(self._capacity, columns)}
            )
        self.memory.place(
            input_notes=aligned_zeros(self._capacity * NOTES_BYTES // WORD_BYTES),
            best=aligned_zeros(
                self._pool.threads * self._capacity * best_bytes(self._lanes) // WORD_BYTES
            ),
            words=np.zeros(self._capacity, dtype=np.int64),
        )

    def _reserve_logits(self, rows: int) -> None:
        if rows > self._logit_capacity:
            self._logit_capacity = max(rows, _DECODE_ROWS)
            columns = self.memory["logits_stride"] // WORD_BYTES
            self.memory.place(
                logits=aligned_zeros(self._logit_capacity * columns).reshape(
                    self._logit_capacity, columns
                )
            )


def _zeros(*shape: int) -> np.ndarray:
    return aligned_zeros(math.prod(shape)).reshape(shape)
