"""Compiled sampling behind the protocol of nanovllm/model/sampling.py, on the backend's threads."""

from array import array

import numpy as np
from jaxtyping import Float32, Int64

from nanovllm.model.kernels.build.bounds import watch
from nanovllm.model.kernels.build.codegen import Library
from nanovllm.model.kernels.build.layout import WORD_BYTES
from nanovllm.model.kernels.build.packing import aligned_zeros
from nanovllm.model.kernels.build.target import KernelTarget
from nanovllm.model.kernels.record import KernelMemory
from nanovllm.model.kernels.sampling.record import (
    SAMPLING_DTYPES,
    SAMPLING_RECORD,
    scratch_layout,
)
from nanovllm.model.kernels.threads.pool import ThreadPool
from nanovllm.model.sampling import (
    ROW_SETTINGS,
    SampledTokens,
    SamplingSettings,
    TokenLists,
    TokenLogprobs,
)

_SHARED_SCORES = 100_000
"""Below this one thread is done before another one has woken up."""
_MIN_ROWS = 32
_COLUMNS = (
    *(ROW_SETTINGS.names or ()),
    *("log_min_p", "positions", "tokens", "has_token", "num_top", "ranks"),
)


class CompiledRowSampler:
    """Samples rows of one vocabulary on a pool of threads; for one caller at a time."""

    def __init__(
        self, vocab: int, pool: ThreadPool, library: Library, target: KernelTarget
    ) -> None:
        """Run code for `target` on `pool`, which the forward pass may use too."""
        self._pool = pool
        self._target = target
        self._function = library.addresses["sample_rows"]
        self._memory = KernelMemory(SAMPLING_RECORD, SAMPLING_DTYPES)
        layout = scratch_layout(vocab, target.lanes)
        self._memory.set(vocab=vocab, **layout)
        self._memory.bind(
            work=np.zeros(1, dtype=np.int64),
            scratch=aligned_zeros(pool.threads * layout["scratch_bytes"] // WORD_BYTES),
        )
        self._columns: dict[str, np.ndarray] = {}
        self._reserve(_MIN_ROWS)

    def sample(
        self, logits: Float32[np.ndarray, "rows vocab"], settings: SamplingSettings
    ) -> SampledTokens:
        """Return a token for each row; `logits` are not changed."""
        rows = logits.shape[0]
        self._reserve(rows)
        with np.errstate(divide="ignore"):
            log_min_p = np.log(settings.min_p, dtype=np.float64)
        columns = {name: getattr(settings, name) for name in ROW_SETTINGS.names or ()}
        self._fill(rows, log_min_p=log_min_p, positions=settings.positions, **columns)
        lists: dict[str, TokenLists] = {
            "allowed": settings.allowed,
            "edit": settings.edits,
            "history": settings.history,
        }
        arrays = {
            f"{name}_{part}": getattr(of, field)
            for name, of in lists.items()
            for part, field in (("starts", "starts"), ("ids", "token_ids"))
        }
        arrays |= {"edit_values": settings.edit_values, "history_counts": settings.history_counts}
        top = self._run(logits, settings.num_logprobs, sampling=True, **arrays)
        return SampledTokens(
            self._columns["tokens"][:rows].copy(),
            self._columns["has_token"][:rows] != 0,
            [
                self._token_logprobs(row, *top) if count >= 0 else None
                for row, count in enumerate(settings.num_logprobs.tolist())
            ],
        )

    def logprobs(
        self,
        logits: Float32[np.ndarray, "rows vocab"],
        token_ids: Int64[np.ndarray, " rows"],
        num_logprobs: Int64[np.ndarray, " rows"],
    ) -> list[TokenLogprobs]:
        """Return the log-probabilities of each row's token and its top `num_logprobs`."""
        rows = logits.shape[0]
        self._reserve(rows)
        self._fill(rows, tokens=token_ids)
        top = self._run(logits, num_logprobs, sampling=False)
        return [self._token_logprobs(row, *top) for row in range(rows)]

    def _token_logprobs(self, row: int, top_ids: np.ndarray, logprobs: np.ndarray) -> TokenLogprobs:
        """Return what the last run reported of a row."""
        columns, count = self._columns, int(self._columns["num_top"][row])
        token_ids = columns["tokens"][row : row + 1].tobytes() + top_ids[row, :count].tobytes()
        return TokenLogprobs(
            array("q", token_ids),
            array("f", logprobs[row, : count + 1].tobytes()),
            int(columns["ranks"][row]),
        )

    def _run(
        self, logits: np.ndarray, num_logprobs: np.ndarray, *, sampling: bool, **arrays: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Run the kernel; return the top ids and log-probabilities of each row."""
        rows, vocab = logits.shape
        assert vocab == self._memory["vocab"]
        if logits.dtype != np.float32 or logits.strides[1] != WORD_BYTES:
            raise TypeError(f"logits are {logits.dtype} with strides {logits.strides}")
        max_logprobs = max(int(num_logprobs.max(initial=0)), 0)
        top_ids = np.empty((rows, max_logprobs), dtype=np.int64)
        logprobs = np.empty((rows, max_logprobs + 1), dtype=np.float32)
        self._fill(rows, num_logprobs=num_logprobs)
        memory = self._memory
        memory.bind(top_ids=top_ids, logprobs=logprobs, **arrays)
        memory.set(logits=logits.ctypes.data, logits_stride=logits.strides[0])
        is_shared = rows * vocab >= _SHARED_SCORES
        threads = self._pool.choose_threads("sample_rows", rows * vocab) if is_shared else 1
        memory.set(rows=rows, max_logprobs=max_logprobs, sampling=sampling, threads=threads)
        memory.arrays["work"][0] = 0
        with watch(self._target, "sample_rows", [*memory.all_arrays(), ("logits", logits)]):
            self._pool.run(self._function, memory.address, threads, phases=0)
        return top_ids, logprobs

    def _reserve(self, rows: int) -> None:
        """Make room for the columns of `rows` rows."""
        if not self._columns or rows > self._columns["tokens"].shape[0]:
            self._columns = {
                name: np.zeros(rows, dtype=SAMPLING_DTYPES[name][0]) for name in _COLUMNS
            }
            self._memory.bind(**self._columns)

    def _fill(self, rows: int, **columns: np.ndarray) -> None:
        for name, values in columns.items():
            self._columns[name][:rows] = values
