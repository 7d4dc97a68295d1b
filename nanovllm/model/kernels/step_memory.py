"""The record of a step and the arrays that it points to: sizes, KV cache, activations."""

import math

import numpy as np

from nanovllm.model.config import ModelConfig
from nanovllm.model.kernels.build.layout import LINE_BYTES, WORD_BYTES
from nanovllm.model.kernels.build.packing import aligned_zeros, panel_steps, round_up
from nanovllm.model.kernels.build.target import INPUTS_PER_WORD, PER_WORD, Spec
from nanovllm.model.kernels.record import KernelMemory
from nanovllm.model.kernels.step_record import (
    PIECE_WORDS,
    PREFILL_QUERIES,
    ROW_QUANT_BYTES,
    STEP_DTYPES,
    STEP_RECORD,
    best_bytes,
)

_MIN_LOGIT_ROWS = 32
_CAPACITY_STEP = 64  # tokens
_QUERY_COLUMNS = 16
_ACTIVATIONS = {
    "hidden": "hidden",
    "final": "hidden",
    "attn_out": "attn_out",
    "inputs": "inputs",
    "qkv": "qkv",
    "ffn_hidden": "ffn_hidden",
}
"""Arrays with a row for each token, and the name of their stride."""


class StepMemory(KernelMemory):
    """The memory of a network's steps on some threads; the weights are bound by its owner."""

    def __init__(self, config: ModelConfig, spec: Spec, threads: int) -> None:
        """Write the sizes of the network; the cache has no blocks yet."""
        super().__init__(STEP_RECORD, STEP_DTYPES)
        self._config, self._spec, self._threads = config, spec, threads
        self._lanes, self._width = spec.target.lanes, spec.target.panel_width
        self._capacity = 0
        self._logit_capacity = 0
        self._set_sizes()
        self.allocate_cache(0, 1)

    def block_bytes(self, block_size: int) -> int:
        """Return the bytes of one block: keys and values of every layer, and their scales."""
        words, scales = self._block_sizes(block_size)
        return WORD_BYTES * self._config.layers * self._config.kv_heads * (sum(words) + 2 * scales)

    def working_bytes(self, max_tokens: int, max_rows: int, block_size: int) -> int:
        """Return the bytes of activations, logits and the threads' own arrays."""
        capacity = round_up(max(max_tokens, max_rows), _CAPACITY_STEP)
        strides = sum(self[f"{stride}_stride_bytes"] for stride in _ACTIVATIONS.values())
        best = self._threads * best_bytes(self._lanes)
        token_bytes = strides + ROW_QUANT_BYTES + best + np.dtype(np.int64).itemsize
        logits_bytes = max(max_rows, _MIN_LOGIT_ROWS) * self["logits_stride_bytes"]
        thread_bytes = sum(self._thread_words(block_size).values()) * WORD_BYTES
        return capacity * token_bytes + logits_bytes + self._threads * thread_bytes

    def allocate_cache(self, blocks: int, block_size: int) -> None:
        """Replace the cache by an empty one."""
        config, per_word = self._config, PER_WORD[self._spec.cache]
        (key_words, value_words), scales = self._block_sizes(block_size)
        thread_words = self._thread_words(block_size)
        self.set(
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
        shape = (config.layers, blocks, config.kv_heads)
        self.bind(
            keys=_zeros(*shape, key_words),
            values=_zeros(*shape, value_words),
            key_scales=_zeros(*shape, scales),
            value_scales=_zeros(*shape, scales),
            **{name: _zeros(self._threads, words) for name, words in thread_words.items()},
        )

    def _thread_words(self, block_size: int) -> dict[str, int]:
        """Return the words of each array that a thread has for itself."""
        config = self._config
        head_columns = round_up(config.head_dim, self._lanes)
        rows = max(PREFILL_QUERIES, config.heads)
        blocks = config.max_positions // block_size + 1
        row_block = self._spec.target.row_block(self._spec.weights)
        words = {
            "scores": rows * blocks * round_up(block_size, self._lanes),
            "scratch": max(row_block * self._width, (rows + 1) * head_columns),
            "queries": rows * round_up(config.head_dim, _QUERY_COLUMNS),
            "row": max(round_up(config.d_model, self._width), head_columns),
            "wide": PIECE_WORDS * self._width,
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

    def reserve_tokens(self, tokens: int) -> None:
        """Make room for the activations of `tokens` tokens."""
        if tokens <= self._capacity:
            return
        self._capacity = round_up(tokens, _CAPACITY_STEP)
        for name, stride in _ACTIVATIONS.items():
            columns = self[f"{stride}_stride_bytes"] // WORD_BYTES
            self.bind(**{name: _zeros(self._capacity, columns)})
        self.bind(
            row_quant=_zeros(self._capacity, ROW_QUANT_BYTES // WORD_BYTES),
            best=_zeros(self._threads, self._capacity, best_bytes(self._lanes) // WORD_BYTES),
            argmax_tokens=np.zeros(self._capacity, dtype=np.int64),
        )

    def reserve_logits(self, rows: int) -> None:
        """Make room for `rows` rows of logits."""
        if rows > self._logit_capacity:
            self._logit_capacity = max(rows, _MIN_LOGIT_ROWS)
            columns = self["logits_stride_bytes"] // WORD_BYTES
            self.bind(logits=_zeros(self._logit_capacity, columns))

    def _set_sizes(self) -> None:
        """Write the sizes of the model and the strides of its activations."""
        config, per_word = self._config, INPUTS_PER_WORD[self._spec.inputs]
        d_model, attn_out, d_ff = config.d_model, config.queries_width, config.d_ff
        d_in = max(d_model, attn_out, d_ff) if self._spec.weights == "int8" else d_model
        hidden, attn_out, ffn, qkv, inputs, logits = (
            round_up(columns, self._width) * WORD_BYTES
            for columns in (d_model, attn_out, d_ff, config.qkv_width, d_in, config.vocab)
        )
        sharing = config.heads // config.kv_heads
        self.set(
            layers=config.layers,
            d_model=config.d_model,
            d_ff=config.d_ff,
            heads=config.heads,
            kv_heads=config.kv_heads,
            sharing=sharing,
            head_dim=config.head_dim,
            queries_width=config.queries_width,
            window=min(config.window or config.max_positions, config.max_positions),
            chunk_tokens=max(1, PREFILL_QUERIES // sharing),
            is_rms=config.norm == "rms",
            vocab=config.vocab,
            max_positions=config.max_positions,
            hidden_stride_bytes=hidden,
            attn_out_stride_bytes=attn_out,
            # One line more than needed: with a stride that is a multiple of 4 KiB, one column of
            # all rows would fall into a single set of the first-level cache.
            qkv_stride_bytes=qkv + LINE_BYTES,
            ffn_hidden_stride_bytes=ffn + LINE_BYTES,
            inputs_stride_bytes=round_up(inputs // per_word, LINE_BYTES),  # a row of a tile
            logits_stride_bytes=logits,
        )
        scales = [config.attention_scale(layer) for layer in range(config.layers)]
        self.bind(
            epsilon=np.array([config.epsilon], dtype=np.float32),
            attention_scales=np.array(scales, dtype=np.float32),
        )


def _zeros(*shape: int) -> np.ndarray:
    return aligned_zeros(math.prod(shape)).reshape(shape)
