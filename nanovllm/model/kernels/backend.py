"""backend="numba": the compiled forward pass behind the protocol of nanovllm/model/backend.py.

Weights are packed into panels while loading, and the KV cache is laid out as attention reads it. A
row's bits do not depend on the rest of the batch, on how a prompt is chunked, or on the number of
threads.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float32, Int64

from nanovllm.model.backend import LoadOptions
from nanovllm.model.batch import ForwardBatch
from nanovllm.model.checkpoint import open_weights
from nanovllm.model.config import GPT2Config
from nanovllm.model.cores import default_threads
from nanovllm.model.free_memory import return_freed_memory
from nanovllm.model.kernels.build.bounds import watch
from nanovllm.model.kernels.build.layout import LINE_BYTES, WORD_BYTES
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
    MAX_PHASES_PER_LAYER,
    MAX_PHASES_PER_STEP,
    NO_TOKEN,
    PREFILL_QUERIES,
    ROW_BLOCK,
    ROW_QUANT_BYTES,
    STEP_DTYPES,
    STEP_RECORD,
    best_bytes,
)
from nanovllm.model.kernels.threads.pool import ThreadPool
from nanovllm.model.weights import GPT2Weights

_SHARED_MULTIPLY_ADDS = 300_000
"""Below this one thread is faster than several that wait for each other."""
_AUTO_CACHE = {"float32": "float32", "bfloat16": "bfloat16", "int8": "bfloat16"}
"""What kv_cache_dtype="auto" means for each type of weights. An int8 cache is less precise than
bfloat16 and was measured slower."""
_MIN_LOGIT_ROWS = 32
_CAPACITY_STEP = 64  # tokens
_QUERY_COLUMNS = 16
_ACTIVATIONS = {
    "hidden": "hidden",
    "final": "hidden",
    "attn_out": "hidden",
    "inputs": "inputs",
    "qkv": "qkv",
    "ffn_hidden": "ffn_hidden",
}
"""Arrays with a row for each token, and the name of their stride."""


class NumbaBackend:
    """Packed weights, a packed KV cache, and the threads that run the compiled forward pass.

    Attributes:
        memory: the arguments of compiled code.
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
            spec: target and types of weights and cache; the default is float32 on this machine.
            narrow_embedding: keep the token embedding in bfloat16.
            num_threads: the default is one for each core that this process may use.
        """
        self._config = config
        self._spec = spec or Spec(host_target())
        self._lanes, self._width = self._spec.target.lanes, self._spec.target.panel_width
        self.memory = KernelMemory(STEP_RECORD, STEP_DTYPES)
        self._library = load_library(self._spec)
        phases = config.layers * MAX_PHASES_PER_LAYER + MAX_PHASES_PER_STEP
        self._pool = ThreadPool(num_threads or default_threads(), self._library, phases=phases)
        self._sampler = CompiledRowSampler(
            config.vocab, self._pool, self._library, self._spec.target
        )
        self._capacity = 0
        self._logit_capacity = 0
        self._set_sizes()
        self._weights = PackedWeights(
            config, weights, self._spec, narrow_embedding=narrow_embedding
        )
        self.memory.bind(**self._weights.arrays)
        self.memory.set(
            activation=self._weights.activation,
            embedding_is_bfloat16=narrow_embedding,
            embedding_stride_bytes=self._weights.arrays["token_embedding"].strides[0],
        )
        self.allocate_cache(0, 1)

    @classmethod
    def load(cls, folder: Path, options: LoadOptions | None = None) -> "NumbaBackend":
        """Load a model folder; raise CheckpointError if it cannot be used.

        The backend is batch-invariant whatever `options.batch_invariant` says.
        """
        options = options or LoadOptions()
        known: list[set[str | None]] = [
            {*DTYPES},
            {None, *QUANTIZATIONS},
            {"auto", *CACHE_TYPES},
        ]
        if any(name not in names for name, names in zip(options.types, known, strict=True)):
            raise ValueError(
                f"backend='numba' takes dtype {' or '.join(DTYPES)}, quantization "
                f"{' or '.join(QUANTIZATIONS)} or None, and kv_cache_dtype auto, "
                f"{', '.join(CACHE_TYPES)}; it cannot use {options.describe_types()}"
            )
        config = GPT2Config.load(folder)
        weights = options.quantization or options.dtype
        cache = options.kv_cache_dtype
        backend = cls(
            config,
            open_weights(folder, config),
            spec=Spec(host_target(), weights, _AUTO_CACHE[weights] if cache == "auto" else cache),
            narrow_embedding=options.dtype == "bfloat16",
            num_threads=options.num_threads,
        )
        return_freed_memory()  # of layers in float32
        return backend

    @property
    def config(self) -> GPT2Config:
        """Sizes of the network."""
        return self._config

    @property
    def weight_dtype(self) -> str:
        """Type of the weights in memory and in matmuls."""
        return self._spec.weights

    @property
    def cache_dtype(self) -> str:
        """Type of keys and values."""
        return self._spec.cache

    @property
    def num_threads(self) -> int:
        """Threads that compute a large step; one of them computes a small step."""
        return self._pool.threads

    @property
    def sampler(self) -> CompiledRowSampler:
        """Compiled sampling on the threads of the forward pass."""
        return self._sampler

    def block_bytes(self, block_size: int) -> int:
        """Return the bytes of one block: keys and values of every layer, and their scales."""
        words, scales = self._block_sizes(block_size)
        return WORD_BYTES * self._config.layers * self._config.heads * (sum(words) + 2 * scales)

    def working_bytes(self, max_tokens: int, max_rows: int, block_size: int) -> int:
        """Return the bytes of activations, logits and the threads' own arrays."""
        capacity = round_up(max(max_tokens, max_rows), _CAPACITY_STEP)
        strides = sum(self.memory[f"{stride}_stride_bytes"] for stride in _ACTIVATIONS.values())
        best = self._pool.threads * best_bytes(self._lanes)
        token_bytes = strides + ROW_QUANT_BYTES + best + np.dtype(np.int64).itemsize
        logits_bytes = max(max_rows, _MIN_LOGIT_ROWS) * self.memory["logits_stride_bytes"]
        thread_bytes = sum(self._thread_words(block_size).values()) * WORD_BYTES
        return capacity * token_bytes + logits_bytes + self._pool.threads * thread_bytes

    def allocate_cache(self, blocks: int, block_size: int) -> None:
        """Replace the cache by an empty one."""
        config, per_word = self._config, PER_WORD[self._spec.cache]
        (key_words, value_words), scales = self._block_sizes(block_size)
        thread_words = self._thread_words(block_size)
        self.memory.set(
            blocks=blocks,
            block_size=block_size,
            block_columns=round_up(block_size, self._lanes),
            head_columns=round_up(config.head_dim, self._lanes),
            key_steps=panel_steps(config.head_dim, per_word),
            key_block_bytes=key_words * WORD_BYTES,
            value_block_bytes=value_words * WORD_BYTES,
            query_stride_bytes=round_up(config.head_dim, _QUERY_COLUMNS) * WORD_BYTES,
            **{f"{name}_bytes": words * WORD_BYTES for name, words in thread_words.items()},
        )
        shape = (config.layers, blocks, config.heads)
        self.memory.bind(
            keys=_zeros(*shape, key_words),
            values=_zeros(*shape, value_words),
            key_scales=_zeros(*shape, scales),
            value_scales=_zeros(*shape, scales),
            **{name: _zeros(self._pool.threads, words) for name, words in thread_words.items()},
        )

    def _thread_words(self, block_size: int) -> dict[str, int]:
        """Return the words of each array that a thread has for itself."""
        config = self._config
        head_columns = round_up(config.head_dim, self._lanes)
        rows = max(PREFILL_QUERIES, config.heads)
        blocks = config.max_positions // block_size + 1
        words = {
            "scores": rows * blocks * round_up(block_size, self._lanes),
            "scratch": max(ROW_BLOCK * self._width, (rows + 1) * head_columns),
            "queries": rows * round_up(config.head_dim, _QUERY_COLUMNS),
            "row": max(round_up(config.d_model, self._width), head_columns),
        }
        return {name: round_up(count, 16) for name, count in words.items()}

    def _block_sizes(self, block_size: int) -> tuple[tuple[int, int], int]:
        """Return the words of one head's keys and values in a block, and the scales of each."""
        per_word, head_dim = PER_WORD[self._spec.cache], self._config.head_dim
        columns = round_up(block_size, self._lanes)
        words = (
            panel_steps(head_dim, per_word) * columns,
            panel_steps(block_size, per_word) * round_up(head_dim, self._lanes),
        )
        return words, columns if self._spec.cache == "int8" else 0

    def forward(self, batch: ForwardBatch) -> Float32[np.ndarray, "rows d_model"]:
        """Compute a batch; return the final hidden states of its `logit_rows`.

        The result is a view that the next call of any method may overwrite.
        """
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
        memory.reserve("chunk_items", (batch.tokens // PREFILL_QUERIES + batch.seqs) * ITEM_FIELDS)
        with watch(self._spec.target, "prepare_attention", self._arrays()):
            self._library.functions["prepare_attention"](memory.address, 0)
        if memory["is_refused"]:
            sizes = {"blocks": memory["blocks"], "block_size": memory["block_size"]}
            batch.check(vocab=self._config.vocab, max_positions=self._config.max_positions, **sizes)
            raise AssertionError("prepare_attention refused a batch that passes ForwardBatch.check")
        self._run("forward", batch.tokens * self._config.num_parameters)
        return memory.arrays["final"][:rows, : self._config.d_model]

    def unscale_hidden(
        self, hidden: Float32[np.ndarray, "rows d_model"]
    ) -> Float32[np.ndarray, "rows d_model"]:
        """Undo the scaling of channels that `forward` applied for a quantized head."""
        multipliers = self._weights.head_multipliers
        return hidden if multipliers is None else hidden / multipliers

    def logits(
        self, hidden: Float32[np.ndarray, "rows d_model"]
    ) -> Float32[np.ndarray, "rows vocab"]:
        """Return every token's score at rows of final hidden states, as a view.

        The next call overwrites it.
        """
        rows = hidden.shape[0]
        self._place_final(hidden)
        self._reserve_logits(rows)
        self._run("logits", rows * self._config.vocab * self._config.d_model)
        return self.memory.arrays["logits"][:rows, : self._config.vocab]

    def greedy(
        self, hidden: Float32[np.ndarray, "rows d_model"]
    ) -> tuple[Int64[np.ndarray, " rows"], Bool[np.ndarray, " rows"]]:
        """Return the argmax token of each row of final hidden states, and whether it has one."""
        rows = hidden.shape[0]
        self._place_final(hidden)
        self._run("greedy", rows * self._config.vocab * self._config.d_model)
        tokens = self.memory.arrays["argmax_tokens"][:rows].copy()
        return tokens, tokens != NO_TOKEN

    def _place_final(self, hidden: Float32[np.ndarray, "rows d_model"]) -> None:
        """Make rows the input of the head; the result of the last `forward` is that already."""
        rows = hidden.shape[0]
        self._reserve(rows)
        final = self.memory.arrays["final"][:rows, : self._config.d_model]
        if hidden.ctypes.data != final.ctypes.data or hidden.strides != final.strides:
            final[:] = hidden
        self.memory.set(rows=rows)

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks of the cache, each (from, to), with their scales."""
        sources, destinations = (list(blocks) for blocks in zip(*copies, strict=True))
        for name in ("keys", "values", "key_scales", "value_scales"):
            array = self.memory.arrays[name]
            array[:, destinations] = array[:, sources]

    def fill_blocks(self, block_ids: list[int], value: float) -> None:
        """Overwrite whole blocks of the cache."""
        arrays = self.memory.arrays
        bfloat16 = int(to_bfloat16(np.array([value], dtype=np.float32))[0])
        word = {
            "float32": np.array(value, dtype=np.float32),
            "bfloat16": np.array(bfloat16 << 16 | bfloat16, dtype=np.uint32).view(np.float32),
            "int8": np.array(0x7F7F7F7F, dtype=np.uint32).view(np.float32),
        }[self._spec.cache]
        for name in ("keys", "values"):
            arrays[name][:, block_ids] = word
            arrays[f"{name[:-1]}_scales"][:, block_ids] = value

    def close(self) -> None:
        """End the helper threads."""
        self._pool.close()

    def __del__(self) -> None:
        """End the helper threads; return the memory of weights and cache to the system."""
        if "_weights" in self.__dict__:  # otherwise __init__ has failed
            self.close()
            self.memory.arrays.clear()
            del self._weights
            return_freed_memory()

    def _run(self, function: str, multiply_adds: int) -> None:
        """Run a compiled function on as many threads as its work is worth."""
        is_shared = multiply_adds >= _SHARED_MULTIPLY_ADDS
        threads = self._pool.choose_threads(function, multiply_adds) if is_shared else 1
        self.memory.set(threads=threads)
        with watch(self._spec.target, function, self._arrays()):
            self._pool.run(self._library.addresses[function], self.memory.address, threads)

    def _arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield all memory that compiled code may touch."""
        yield from self.memory.all_arrays()
        yield from self._weights.held

    def _set_sizes(self) -> None:
        """Write the sizes of the model and the strides of its activations."""
        config, per_word = self._config, PER_WORD[self._spec.weights]
        d_in = max(config.d_model, config.d_ff if self._spec.weights == "int8" else 0)
        hidden, ffn, qkv, inputs, logits = (
            round_up(columns, self._width) * WORD_BYTES
            for columns in (config.d_model, config.d_ff, 3 * config.d_model, d_in, config.vocab)
        )
        self.memory.set(
            layers=config.layers,
            d_model=config.d_model,
            d_ff=config.d_ff,
            heads=config.heads,
            head_dim=config.head_dim,
            vocab=config.vocab,
            max_positions=config.max_positions,
            hidden_stride_bytes=hidden,
            # One line more than needed: with a stride that is a multiple of 4 KiB, one column of
            # all rows would fall into a single set of the first-level cache.
            qkv_stride_bytes=qkv + LINE_BYTES,
            ffn_hidden_stride_bytes=ffn + LINE_BYTES,
            inputs_stride_bytes=inputs // per_word,
            logits_stride_bytes=logits,
            job=self._pool.job,
            phases=self._pool.phases,
        )
        scales = [config.attention_scale(layer) for layer in range(config.layers)]
        self.memory.bind(
            epsilon=np.array([config.epsilon], dtype=np.float32),
            attention_scales=np.array(scales, dtype=np.float32),
        )

    def _reserve(self, tokens: int) -> None:
        """Make room for the activations of `tokens` tokens."""
        if tokens <= self._capacity:
            return
        self._capacity = round_up(tokens, _CAPACITY_STEP)
        for name, stride in _ACTIVATIONS.items():
            columns = self.memory[f"{stride}_stride_bytes"] // WORD_BYTES
            self.memory.bind(**{name: _zeros(self._capacity, columns)})
        self.memory.bind(
            row_quant=_zeros(self._capacity, ROW_QUANT_BYTES // WORD_BYTES),
            best=_zeros(self._pool.threads, self._capacity, best_bytes(self._lanes) // WORD_BYTES),
            argmax_tokens=np.zeros(self._capacity, dtype=np.int64),
        )

    def _reserve_logits(self, rows: int) -> None:
        if rows > self._logit_capacity:
            self._logit_capacity = max(rows, _MIN_LOGIT_ROWS)
            columns = self.memory["logits_stride_bytes"] // WORD_BYTES
            self.memory.bind(logits=_zeros(self._logit_capacity, columns))


def _zeros(*shape: int) -> np.ndarray:
    return aligned_zeros(math.prod(shape)).reshape(shape)
