"""NativeModelRunner: a batch of arrays in, sampled tokens and log-probabilities out."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int64

from nanovllm.model.backend import Backend, BackendLoader
from nanovllm.model.batch import ForwardBatch
from nanovllm.model.config import GPT2Config
from nanovllm.model.numpy_backend import NumpyBackend
from nanovllm.runner.logprobs import TokenLogprobs
from nanovllm.runner.row_samplers import report_rows, sample_rows
from nanovllm.runner.sampling_batch import PromptRows, SamplingBatch

PROMPT_ROWS_AT_ONCE = (
    32  # prompt log-probabilities need [rows, vocab] floats: 6 MB a slice at 50,257 words
)


def _load_numba(
    folder: Path,
    *,
    dtype: str,
    quantization: str | None,
    kv_cache_dtype: str,
    batch_invariant: bool,
    num_threads: int | None,
) -> Backend:
    from nanovllm.model.numba_backend import NumbaBackend  # noqa: PLC0415 - only this backend needs what it imports

    return NumbaBackend.load(
        folder,
        dtype=dtype,
        quantization=quantization,
        kv_cache_dtype=kv_cache_dtype,
        batch_invariant=batch_invariant,
        num_threads=num_threads,
    )


_LOADERS: dict[str, BackendLoader] = {"numba": _load_numba, "numpy": NumpyBackend.load}


@dataclass(frozen=True, slots=True)
class RunnerOutput:
    """What a step gives back, in the order of the sampling batch's rows.

    Attributes:
        token_ids: the token of each sampled row, or None where no token was possible (all forbidden, or logits not finite).
        logprobs: for the rows that asked, None for the others.
        prompt_logprobs: one entry a prompt row.
        hidden: final hidden states of the hidden rows, None where there are none.
    """

    token_ids: list[int | None]
    logprobs: list[TokenLogprobs | None]
    prompt_logprobs: list[TokenLogprobs]
    hidden: Float32[np.ndarray, "hidden_rows d_model"] | None = None


class NativeModelRunner:
    """A loaded network, its KV cache and the sampler."""

    def __init__(self, backend: Backend) -> None:
        """Run on `backend`, which has its cache allocated or gets it by `allocate_cache`."""
        self._backend = backend

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        backend: str = "numba",
        dtype: str = "float32",
        quantization: str | None = None,
        kv_cache_dtype: str = "auto",
        batch_invariant: bool = False,
        num_threads: int | None = None,
    ) -> "NativeModelRunner":
        """Load a model folder with the backend of that name.

        Raises:
            CheckpointError: the folder cannot be used.
            ValueError: there is no backend of that name, or it cannot compute in these types.
        """
        if backend not in _LOADERS:
            raise ValueError(f"backend is {backend!r}; it must be one of {', '.join(_LOADERS)}")
        load = _LOADERS[backend]
        return cls(
            load(
                folder,
                dtype=dtype,
                quantization=quantization,
                kv_cache_dtype=kv_cache_dtype,
                batch_invariant=batch_invariant,
                num_threads=num_threads,
            )
        )

    @property
    def config(self) -> GPT2Config:
        """Sizes of the network."""
        return self._backend.config

    @property
    def backend(self) -> Backend:
        """The implementation that runs the forward pass."""
        return self._backend

    def run(self, batch: ForwardBatch, sampling: SamplingBatch) -> RunnerOutput:
        """Compute the batch and sample: one forward pass, logits only for the rows that need them.

        Where every row is greedy and asks for nothing else, the backend finds the words itself. In a mixed step greedy rows share the logits
        of the others: the head is read once.
        """
        hidden = self._backend.forward(batch)
        kept = (
            self._backend.states(hidden[sampling.hidden_rows])
            if sampling.hidden_rows.size
            else None
        )  # of a copy: `hidden` is overwritten
        wanted = hidden
        if sampling.prompt.rows.size or not _are_all_rows(sampling.rows, hidden.shape[0]):
            wanted = hidden[sampling.rows]  # a copy, which prompt log-probabilities do not change
        prompt_logprobs = (
            self._prompt_logprobs(hidden[sampling.prompt.rows], sampling.prompt)
            if sampling.prompt.rows.size
            else []
        )
        if not sampling.rows.size:
            return RunnerOutput([], [], prompt_logprobs, kept)
        logprobs: list[TokenLogprobs | None] = [None] * wanted.shape[0]
        if sampling.is_plain_greedy:
            tokens, has_token = self._backend.greedy(wanted)
        else:
            tokens, has_token, logprobs = sample_rows(
                self._backend.row_sampler, self._backend.logits(wanted), sampling
            )
        token_ids = [
            token if ok else None
            for token, ok in zip(tokens.tolist(), has_token.tolist(), strict=True)
        ]
        return RunnerOutput(token_ids, logprobs, prompt_logprobs, kept)

    def _prompt_logprobs(self, hidden: np.ndarray, prompt: PromptRows) -> list[TokenLogprobs]:
        found: list[TokenLogprobs] = []
        for start in range(0, prompt.rows.size, PROMPT_ROWS_AT_ONCE):
            part = slice(start, start + PROMPT_ROWS_AT_ONCE)
            logits = self._backend.logits(hidden[part])
            found += report_rows(
                self._backend.row_sampler, logits, prompt.token_ids[part], prompt.num_logprobs[part]
            )
        return found


def _are_all_rows(rows: Int64[np.ndarray, " seqs"], count: int) -> bool:
    """Whether these are all of `count` rows in their order."""
    return np.array_equal(rows, np.arange(count, dtype=np.int64))
