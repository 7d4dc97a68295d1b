"""backend="numba": the compiled forward pass behind the protocol of nanovllm/model/backend.py.

Weights are packed into panels while loading, and the KV cache is laid out as attention reads it. A
row's bits do not depend on the rest of the batch, on how a prompt is chunked, or on the number of
threads.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float32, Int64

from nanovllm.model.ablation import without
from nanovllm.model.backend import LoadOptions
from nanovllm.model.batch import ForwardBatch
from nanovllm.model.checkpoint import open_weights
from nanovllm.model.config import ModelConfig
from nanovllm.model.families.registry import load_config
from nanovllm.model.kernels.build.bounds import watch
from nanovllm.model.kernels.build.layout import MOMENTS
from nanovllm.model.kernels.build.packing import to_bfloat16
from nanovllm.model.kernels.build.target import (
    CACHE_TYPES,
    DTYPES,
    QUANTIZATIONS,
    Spec,
    host_spec,
)
from nanovllm.model.kernels.library import load_library
from nanovllm.model.kernels.packed_weights import PackedWeights
from nanovllm.model.kernels.sampler import CompiledRowSampler
from nanovllm.model.kernels.step_memory import StepMemory
from nanovllm.model.kernels.step_record import (
    ITEM_FIELDS,
    MAX_PHASES_PER_LAYER,
    MAX_PHASES_PER_STEP,
    MAX_STEPS,
    NO_TOKEN,
)
from nanovllm.model.kernels.threads.pool import ThreadPool
from nanovllm.model.machine import default_threads, return_freed_memory
from nanovllm.model.weights import ModelWeights

_SHARED_MULTIPLY_ADDS = 300_000
"""Below this one thread is faster than several that wait for each other."""
_AUTO_CACHE = {"float32": "float32", "bfloat16": "bfloat16", "int8": "bfloat16"}
"""What kv_cache_dtype="auto" means for each type of weights. An int8 cache is less precise than
bfloat16 and was measured slower."""
Observer = Callable[[str, Int64[np.ndarray, "phases threads moments"]], None]
"""Called after a run with its compiled function and the nanoseconds of its phases."""


class NumbaBackend:
    """Packed weights, a packed KV cache, and the threads that run the compiled forward pass.

    Attributes:
        config: sizes of the network.
        weight_dtype: type of the weights in memory.
        input_dtype: type of the input rows of matmuls.
        cache_dtype: type of keys and values.
        num_threads: threads that compute a large step; one of them computes a small step.
        pool: the threads, which another network may share.
        sampler: compiled sampling on the threads of the forward pass.
        memory: the arguments of compiled code.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: ModelWeights,
        *,
        spec: Spec | None = None,
        narrow_embedding: bool = False,
        num_threads: int | None = None,
        pool: ThreadPool | None = None,
    ) -> None:
        """Pack the weights and compile.

        Args:
            spec: target and types of weights and cache; the default is float32 on this machine.
            narrow_embedding: keep the token embedding in bfloat16.
            num_threads: the default is one for each core that this process may use.
            pool: the threads, by default `num_threads` new ones; those of a network with at least
                as many layers. Networks that compute by turns share them: idle threads poll for a
                while, and those of one network would take the cores from those of another.
        """
        self.config = config
        self._spec = spec or host_spec()
        self.weight_dtype, self.cache_dtype = self._spec.weights, self._spec.cache
        self.input_dtype = self._spec.inputs
        self._library = load_library(self._spec)
        self._step_phases = config.layers * MAX_PHASES_PER_LAYER + MAX_PHASES_PER_STEP
        self._observer: Observer | None = None
        self._times: np.ndarray | None = None
        self.pool = pool or ThreadPool(
            num_threads or default_threads(), self._library, phases=MAX_STEPS * self._step_phases
        )
        self.num_threads = self.pool.threads
        self.sampler = CompiledRowSampler(config.vocab, self.pool, self._library, self._spec.target)
        self.memory = StepMemory(config, self._spec, self.pool.threads)
        self._weights = PackedWeights(
            config, weights, self._spec, narrow_embedding=narrow_embedding
        )
        self.memory.bind(**self._weights.arrays)
        self.memory.set(
            job=self.pool.job,
            phases=self.pool.phases,
            activation=self._weights.activation,
            embedding_is_bfloat16=narrow_embedding,
            embedding_stride_bytes=self._weights.arrays["token_embedding"].strides[0],
        )

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
        config = load_config(folder)
        weights = options.quantization or options.dtype
        cache, beside = options.kv_cache_dtype, options.beside
        pool = None
        if isinstance(beside, NumbaBackend) and beside.config.layers >= config.layers:
            pool = beside.pool
        backend = cls(
            config,
            without(open_weights(folder, config), config, options.without),
            spec=host_spec(weights, _AUTO_CACHE[weights] if cache == "auto" else cache),
            narrow_embedding=options.dtype == "bfloat16",
            num_threads=options.num_threads,
            pool=pool,
        )
        return_freed_memory()  # of layers in float32
        return backend

    def block_bytes(self, block_size: int) -> int:
        """Return the bytes of one block: keys and values of every layer, and their scales."""
        return self.memory.block_bytes(block_size)

    def working_bytes(self, max_tokens: int, max_rows: int, block_size: int) -> int:
        """Return the bytes of activations, logits and the threads' own arrays."""
        return self.memory.working_bytes(max_tokens, max_rows, block_size)

    def allocate_cache(self, blocks: int, block_size: int) -> None:
        """Replace the cache by an empty one."""
        self.memory.allocate_cache(blocks, block_size)

    def forward(self, batch: ForwardBatch) -> Float32[np.ndarray, "rows d_model"]:
        """Compute a batch; return the final hidden states of its `logit_rows`.

        The result is a view that the next call of any method may overwrite.
        """
        self._place(batch)
        with watch(self._spec.target, "prepare_attention", self._arrays()):
            self._library.functions["prepare_attention"](self.memory.address, 0)
        if self.memory["is_refused"]:
            self._refuse(batch)
        self._run("forward", batch.tokens * self.config.num_parameters)
        return self.memory.arrays["final"][: len(batch.logit_rows), : self.config.d_model]

    def greedy_steps(
        self, batch: ForwardBatch, steps: int
    ) -> tuple[Int64[np.ndarray, "steps seqs"], Bool[np.ndarray, "steps seqs"]]:
        """Compute a token of each sequence, then its argmax as the next one, and so on."""
        memory, seqs, steps = self.memory, batch.seqs, min(steps, MAX_STEPS)
        self._place(batch)
        memory.set(steps=steps)
        memory.reserve("drafted", steps * seqs)
        multiply_adds = self.config.num_parameters + self.config.vocab * self.config.d_model
        self._run("greedy_steps", steps * seqs * multiply_adds, steps)
        if memory["is_refused"]:
            self._refuse(batch, steps)
        tokens = memory.arrays["drafted"][: steps * seqs].reshape(steps, seqs).copy()
        return tokens, tokens != NO_TOKEN

    def _refuse(self, batch: ForwardBatch, steps: int = 1) -> None:
        """Raise the error of a batch that compiled code has refused, in one of several steps."""
        memory = self.memory
        sizes = {"blocks": memory["blocks"], "block_size": memory["block_size"]}
        batch.check(vocab=self.config.vocab, max_positions=self.config.max_positions, **sizes)
        if steps > 1:
            raise ValueError(
                f"{steps} steps after {batch.context_lens.tolist()} tokens need more than the "
                f"{self.config.max_positions} positions or the blocks in block_tables"
            )
        raise AssertionError("prepare_attention refused a batch that passes ForwardBatch.check")

    def _place(self, batch: ForwardBatch) -> None:
        """Write the arguments of a step."""
        memory = self.memory
        batch.check_lengths()
        rows = batch.logit_rows.shape[0]
        memory.reserve_tokens(max(batch.tokens, rows))
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
        chunks = batch.tokens // memory["chunk_tokens"] + batch.seqs
        memory.reserve("chunk_items", chunks * ITEM_FIELDS)

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
        self.memory.reserve_logits(rows)
        self._run("logits", rows * self.config.vocab * self.config.d_model)
        return self.memory.arrays["logits"][:rows, : self.config.vocab]

    def greedy(
        self, hidden: Float32[np.ndarray, "rows d_model"]
    ) -> tuple[Int64[np.ndarray, " rows"], Bool[np.ndarray, " rows"]]:
        """Return the argmax token of each row of final hidden states, and whether it has one."""
        rows = hidden.shape[0]
        self._place_final(hidden)
        self._run("greedy", rows * self.config.vocab * self.config.d_model)
        tokens = self.memory.arrays["argmax_tokens"][:rows].copy()
        return tokens, tokens != NO_TOKEN

    def _place_final(self, hidden: Float32[np.ndarray, "rows d_model"]) -> None:
        """Make rows the input of the head; the result of the last `forward` is that already."""
        rows = hidden.shape[0]
        self.memory.reserve_tokens(rows)
        final = self.memory.arrays["final"][:rows, : self.config.d_model]
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

    def time_runs(self, observer: Observer | None) -> None:
        """Call observer(function, moments) after each run from now on, or nothing if None.

        `moments` has the times of the run's phases (build/layout.py); the next run overwrites it.
        """
        self._observer = observer
        shape = (MAX_STEPS * self._step_phases, self.num_threads, MOMENTS)
        self._times = None if observer is None else np.zeros(shape, dtype=np.int64)

    def close(self) -> None:
        """End the helper threads; the next run would start them again."""
        self.pool.close()

    def __del__(self) -> None:
        """End the helper threads; return the memory of weights and cache to the system."""
        if "_weights" in self.__dict__:  # otherwise __init__ has failed
            self.close()  # no helper may read the record later
            self.memory.arrays.clear()
            del self._weights
            return_freed_memory()

    def _run(self, function: str, multiply_adds: int, steps: int = 1) -> None:
        """Run a compiled function on as many threads as its work is worth."""
        moments = self.pool.times = self._times
        if moments is not None:
            moments[:] = 0
        is_shared = moments is not None or multiply_adds >= _SHARED_MULTIPLY_ADDS
        kind = f"{function} {self.config.num_parameters}"  # another network's runs tell nothing
        threads = self.pool.choose_threads(kind, multiply_adds) if is_shared else 1
        self.memory.set(threads=threads)
        with watch(self._spec.target, function, self._arrays()):
            address, phases = self._library.addresses[function], steps * self._step_phases
            self.pool.run(address, self.memory.address, threads, phases)
        if self._observer is not None and moments is not None:
            self._observer(function, moments)

    def _arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield all memory that compiled code may touch."""
        yield from self.memory.all_arrays()
        yield from self._weights.held
