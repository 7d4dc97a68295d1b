"""backend="numba": the compiled forward pass of kernels/ behind the protocol of backend.py.

Weights are packed into panels while loading; the cache is laid out as attention reads it. A row's bits do not depend on what else is in
the batch, on how a prompt is cut, or on the number of threads.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int64

from nanovllm.model.activation import ACTIVATIONS
from nanovllm.model.batch import ForwardBatch
from nanovllm.model.checkpoint import load_weights
from nanovllm.model.config import GPT2Config
from nanovllm.model.kernels.layout import F32_BYTES, LINE_BYTES
from nanovllm.model.kernels.library import load_library
from nanovllm.model.kernels.machine import host_lanes, panel_width
from nanovllm.model.kernels.packing import aligned_zeros, pack_panels, pack_rows, round_up
from nanovllm.model.kernels.parameters import ACTIVATION_NAMES, ITEM_FIELDS, PARAMETERS, QUERY_TILE, ROW_BLOCK, WORK_COUNTERS_PER_LAYER
from nanovllm.model.kernels.pool import ThreadPool
from nanovllm.model.kernels.processors import default_threads
from nanovllm.model.weights import GPT2Weights

_SHARED_PRODUCTS = 300_000  # fewer multiply-adds than this are done sooner by one thread than by several that wait for each other
_DECODE_ROWS = 32  # rows of logits to have room for from the beginning; more are made room for when they are first asked for


@dataclass(slots=True)
class _Memory:
    """Arrays whose addresses the record holds, by the names that they have there; what is replaced here is freed."""

    arrays: dict[str, np.ndarray] = field(default_factory=dict)

    def place(self, record: np.ndarray, **arrays: np.ndarray) -> None:
        """Keep arrays and write down where they are."""
        for name, array in arrays.items():
            assert array.flags.c_contiguous, name
            self.arrays[name] = array
            record[name] = array.ctypes.data


class NumbaBackend:
    """Packed weights, a packed cache, and threads that run the compiled forward pass."""

    def __init__(self, config: GPT2Config, weights: GPT2Weights, *, num_threads: int | None = None, lanes: int | None = None) -> None:
        """Pack the weights, and compile if nobody has on this machine.

        Args:
            num_threads: by default one for each core that this process may use.
            lanes: float32 in a vector: 16, 8 or 4; by default what the machine has.
        """
        self._config = config
        self._lanes = lanes or host_lanes()
        self._width = panel_width(self._lanes)
        self._memory = _Memory()
        self._record = np.zeros(1, dtype=PARAMETERS)
        self._library = load_library(self._lanes)
        self._pool = ThreadPool(num_threads or default_threads(), self._library)
        self._capacity = 0
        self._logit_capacity = 0
        self._place_sizes()
        self._place_weights(weights)
        self.allocate_cache(0, 1)

    @classmethod
    def load(cls, folder: Path, *, dtype: str = "float32", batch_invariant: bool = False, num_threads: int | None = None) -> "NumbaBackend":
        """Load a model folder; raises CheckpointError when it cannot be used. It is batch-invariant in any case."""
        if dtype != "float32":
            raise ValueError(f"dtype is {dtype!r}, but backend='numba' computes in float32 only")
        config = GPT2Config.load(folder)
        return cls(config, load_weights(folder, config), num_threads=num_threads)

    @property
    def config(self) -> GPT2Config:
        """Sizes of the network."""
        return self._config

    def block_bytes(self, block_size: int) -> int:
        """Bytes of one block: keys and values of every layer."""
        config = self._config
        keys = config.head_dim * round_up(block_size, self._lanes)
        values = block_size * round_up(config.head_dim, self._lanes)
        return F32_BYTES * config.layers * config.heads * (keys + values)

    def allocate_cache(self, blocks: int, block_size: int) -> None:
        """Make an empty cache in place of the one before."""
        config, record = self._config, self._record
        columns, head_columns = round_up(block_size, self._lanes), round_up(config.head_dim, self._lanes)
        record["blocks"], record["block_size"], record["block_columns"], record["head_columns"] = blocks, block_size, columns, head_columns
        key_size, value_size = config.head_dim * columns, block_size * head_columns
        record["key_bytes"], record["value_bytes"] = key_size * F32_BYTES, value_size * F32_BYTES
        cached = config.layers * blocks * config.heads
        rows, heads, threads = max(QUERY_TILE, config.heads), config.heads, self._pool.threads
        scores = round_up(rows * (config.max_positions // block_size + 1) * columns, 16)
        scratch = round_up(max(ROW_BLOCK * self._width, max(QUERY_TILE, heads) * head_columns), 16)
        record["scores_bytes"], record["scratch_bytes"] = scores * F32_BYTES, scratch * F32_BYTES
        self._memory.place(
            record,
            keys=aligned_zeros(cached * key_size).reshape(config.layers, blocks, -1 if cached else 0),
            values=aligned_zeros(cached * value_size).reshape(config.layers, blocks, -1 if cached else 0),
            scores=aligned_zeros(threads * scores),
            scratch=aligned_zeros(threads * scratch),
        )

    def forward(self, batch: ForwardBatch) -> Float32[np.ndarray, "rows d_model"]:
        """Compute a batch; returns the final hidden state of its `logit_rows`."""
        record = self._record
        blocks, block_size = int(record["blocks"][0]), int(record["block_size"][0])
        batch.check(vocab=self._config.vocab, max_positions=self._config.max_positions, blocks=blocks, block_size=block_size)
        self._reserve(batch.tokens)
        decodes, chunks = _attention_items(batch)
        rows = batch.logit_rows.shape[0]
        record["tokens"], record["rows"], record["max_blocks"] = batch.tokens, rows, batch.block_tables.shape[1]
        record["decodes"], record["chunks"] = len(decodes), len(chunks)
        self._memory.place(
            record,
            token_ids=np.ascontiguousarray(batch.token_ids),
            positions=np.ascontiguousarray(batch.positions),
            slots=np.ascontiguousarray(batch.slots),
            logit_rows=np.ascontiguousarray(batch.logit_rows),
            block_tables=np.ascontiguousarray(batch.block_tables),
            decode_items=decodes,
            chunk_items=chunks,
        )
        self._run("forward", batch.tokens * self._config.parameters)
        return self._memory.arrays["normed"][:rows, : self._config.d_model].copy()

    def logits(self, hidden: Float32[np.ndarray, "rows d_model"]) -> Float32[np.ndarray, "rows vocab"]:
        """Each word's score at rows of final hidden states; a view that the next call overwrites."""
        rows = hidden.shape[0]
        self._reserve(rows)
        self._reserve_logits(rows)
        self._memory.arrays["normed"][:rows, : self._config.d_model] = hidden
        self._record["rows"] = rows
        self._run("logits", rows * self._config.vocab * self._config.d_model)
        return self._memory.arrays["logits"][:rows, : self._config.vocab]

    def fill_blocks(self, block_ids: list[int], value: float) -> None:
        """Overwrite whole blocks of the cache."""
        self._memory.arrays["keys"][:, block_ids] = value
        self._memory.arrays["values"][:, block_ids] = value

    def close(self) -> None:
        """End the helper threads."""
        self._pool.close()

    def _run(self, function: str, products: int) -> None:
        """Enter a compiled function with as many threads as its work is worth; their number changes no bit."""
        threads = self._pool.threads if products >= _SHARED_PRODUCTS else 1
        self._record["threads"] = threads
        self._memory.arrays["work"][:] = 0
        self._pool.run(self._library.addresses[function], self._record.ctypes.data, threads)

    def _place_sizes(self) -> None:
        config, record = self._config, self._record
        sizes = {
            "layers": config.layers,
            "d_model": config.d_model,
            "d_ff": config.d_ff,
            "heads": config.heads,
            "head_dim": config.head_dim,
            "vocab": config.vocab,
            "activation": ACTIVATION_NAMES.index(ACTIVATIONS[config.activation].__name__),
            "hidden_stride": round_up(config.d_model, self._width) * F32_BYTES,
            "qkv_stride": round_up(3 * config.d_model, self._width) * F32_BYTES,
            "middle_stride": round_up(config.d_ff, self._width) * F32_BYTES,
            "logits_stride": round_up(config.vocab, self._width) * F32_BYTES,
            "arrived": self._pool.arrived,
        }
        for name, value in sizes.items():
            record[name] = value
        line = LINE_BYTES // 8
        self._memory.place(
            record,
            work=np.zeros(config.layers * WORK_COUNTERS_PER_LAYER * line, dtype=np.int64),
            epsilon=np.array([config.epsilon], dtype=np.float32),
            scales=np.array([config.attention_scale(layer) for layer in range(config.layers)], dtype=np.float32),
            zeros=aligned_zeros(round_up(config.vocab, self._width)),
        )

    def _place_weights(self, weights: GPT2Weights) -> None:
        layers, width = weights.layers, self._width
        rows: dict[str, list[np.ndarray]] = {
            "attention_gain": [layer.attention_norm.gain for layer in layers],
            "attention_bias": [layer.attention_norm.bias for layer in layers],
            "ffn_gain": [layer.ffn_norm.gain for layer in layers],
            "ffn_bias": [layer.ffn_norm.bias for layer in layers],
            "qkv_bias": [layer.attention.qkv.bias for layer in layers],
            "out_bias": [layer.attention.out.bias for layer in layers],
            "up_bias": [layer.ffn.up.bias for layer in layers],
            "down_bias": [layer.ffn.down.bias for layer in layers],
            "final_gain": [weights.final_norm.gain],
            "final_bias": [weights.final_norm.bias],
        }
        panels: dict[str, list[np.ndarray]] = {
            "qkv_weight": [layer.attention.qkv.weight for layer in layers],
            "out_weight": [layer.attention.out.weight for layer in layers],
            "up_weight": [layer.ffn.up.weight for layer in layers],
            "down_weight": [layer.ffn.down.weight for layer in layers],
            "head_weight": [weights.head.T],
        }
        self._memory.place(self._record, **{name: pack_rows(values, width) for name, values in rows.items()})
        self._memory.place(self._record, **{name: pack_panels(values, width) for name, values in panels.items()})
        self._memory.place(
            self._record,
            token_embedding=np.ascontiguousarray(weights.token_embedding),
            position_embedding=np.ascontiguousarray(weights.position_embedding),
        )

    def _reserve(self, tokens: int) -> None:
        """Make room for the intermediate results of so many tokens."""
        if tokens <= self._capacity:
            return
        self._capacity = round_up(tokens, 64)
        strides = {"hidden": "hidden", "normed": "hidden", "mixed": "hidden", "qkv": "qkv", "middle": "middle"}
        for name, stride in strides.items():
            columns = int(self._record[f"{stride}_stride"][0]) // F32_BYTES
            self._memory.place(self._record, **{name: aligned_zeros(self._capacity * columns).reshape(self._capacity, columns)})

    def _reserve_logits(self, rows: int) -> None:
        if rows > self._logit_capacity:
            self._logit_capacity = max(rows, _DECODE_ROWS)
            columns = int(self._record["logits_stride"][0]) // F32_BYTES
            self._memory.place(self._record, logits=aligned_zeros(self._logit_capacity * columns).reshape(self._logit_capacity, columns))


def _attention_items(batch: ForwardBatch) -> tuple[Int64[np.ndarray, "decodes fields"], Int64[np.ndarray, "chunks fields"]]:
    """Sequences of one new token, and pieces of up to QUERY_TILE tokens of the others: (sequence, first token, tokens, position)."""
    counts = np.diff(batch.query_starts)
    starts = batch.query_starts[:-1]
    single = np.flatnonzero(counts == 1)
    decodes = np.stack([single, starts[single], counts[single], batch.context_lens[single] - 1], axis=1)
    pieces = [
        (seq, starts[seq] + done, min(QUERY_TILE, counts[seq] - done), batch.context_lens[seq] - counts[seq] + done)
        for seq in np.flatnonzero(counts > 1).tolist()
        for done in range(0, int(counts[seq]), QUERY_TILE)
    ]
    return np.ascontiguousarray(decodes, dtype=np.int64), np.array(pieces, dtype=np.int64).reshape(-1, ITEM_FIELDS)
