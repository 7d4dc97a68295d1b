"""NativeModelRunner: a batch of arrays in, sampled tokens and log-probabilities out."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
from jaxtyping import Float32, Int64

from nanovllm.model.backend import Backend, BackendLoader, LoadOptions
from nanovllm.model.batch import ForwardBatch
from nanovllm.model.config import ModelConfig
from nanovllm.model.numpy_backend import NumpyBackend
from nanovllm.model.sampling import SamplingSettings, TokenLogprobs
from nanovllm.runner.logit_rows import LogitRows, PromptRows

PROMPT_ROWS_AT_ONCE = 32
"""Rows of prompt log-probabilities in one slice: 6 MB of logits with a vocabulary of 50,257."""


def _load_numba(folder: Path, options: LoadOptions) -> Backend:
    from nanovllm.model.kernels.backend import NumbaBackend  # noqa: PLC0415 - imports Numba

    return NumbaBackend.load(folder, options)


_LOADERS: Mapping[str, BackendLoader] = MappingProxyType(
    {"numba": _load_numba, "numpy": NumpyBackend.load}
)


@dataclass(frozen=True, slots=True)
class RunnerOutput:
    """The results of a step, in the order of its LogitRows.

    Attributes:
        token_ids: the token of each sampled row; None if all tokens were banned or the logits were
            not finite.
        logprobs: of each sampled row; None if it asked for none.
        prompt_logprobs: of each prompt row.
        hidden: final hidden states of the hidden rows; None if there are none.
    """

    token_ids: list[int | None]
    logprobs: list[TokenLogprobs | None]
    prompt_logprobs: list[TokenLogprobs]
    hidden: Float32[np.ndarray, "hidden_rows d_model"] | None = None


class NativeModelRunner:
    """A loaded network, its KV cache and a sampler."""

    def __init__(self, backend: Backend) -> None:
        """Run on `backend`; allocate its cache before the first step."""
        self._backend = backend
        self._sampler = backend.sampler

    @classmethod
    def load(
        cls, folder: Path, backend: str = "numba", options: LoadOptions | None = None
    ) -> "NativeModelRunner":
        """Load a model folder with the backend of that name.

        Raises:
            CheckpointError: the folder cannot be used.
            ValueError: there is no such backend, or it cannot compute in these types.
        """
        if backend not in _LOADERS:
            raise ValueError(f"backend is {backend!r}; it must be one of {', '.join(_LOADERS)}")
        return cls(_LOADERS[backend](folder, options or LoadOptions()))

    @property
    def config(self) -> ModelConfig:
        """Sizes of the network."""
        return self._backend.config

    @property
    def backend(self) -> Backend:
        """The implementation of the forward pass."""
        return self._backend

    def run(self, batch: ForwardBatch, rows: LogitRows, settings: SamplingSettings) -> RunnerOutput:
        """Run the forward pass and sample; `settings` has a row for each of `rows.sampled`.

        Logits are computed only for rows that need them. A plain greedy step uses the backend's
        argmax. In a mixed step greedy rows share the others' logits: the head is read once.
        """
        final_hidden = self._backend.forward(batch)  # may be a view: rows to keep are copied
        hidden = None
        if rows.hidden.size:
            hidden = self._backend.unscale_hidden(final_hidden[rows.hidden])
        sampled = final_hidden
        if rows.prompt.rows.size or not _is_all(rows.sampled, len(final_hidden)):
            sampled = final_hidden[rows.sampled]
        prompt_logprobs = self._prompt_logprobs(final_hidden, rows.prompt)
        if not rows.sampled.size:
            return RunnerOutput([], [], prompt_logprobs, hidden)
        logprobs: list[TokenLogprobs | None] = [None] * len(sampled)
        if settings.is_plain_greedy:
            token_ids, has_token = self._backend.greedy(sampled)
        else:
            samples = self._sampler.sample(self._backend.logits(sampled), settings)
            token_ids, has_token, logprobs = samples.token_ids, samples.has_token, samples.logprobs
        pairs = zip(token_ids.tolist(), has_token.tolist(), strict=True)
        tokens = [token if has else None for token, has in pairs]
        return RunnerOutput(tokens, logprobs, prompt_logprobs, hidden)

    def draw(
        self, batch: ForwardBatch, rows: LogitRows, settings: SamplingSettings, steps: int
    ) -> list[list[int | None]]:
        """Run a step, and return its tokens; with `steps` above 1 those of up to so many steps.

        Then each sequence of the batch has one token and takes the argmax, and a step computes the
        tokens of the step before. A sequence without a token has none in later steps.
        """
        if steps == 1:
            return [self.run(batch, rows, settings).token_ids]
        token_ids, has_token = self._backend.greedy_steps(batch, steps)
        has_token = np.logical_and.accumulate(has_token)
        return [
            [token if has else None for token, has in zip(*row, strict=True)]
            for row in zip(token_ids.tolist(), has_token.tolist(), strict=True)
        ]

    def _prompt_logprobs(self, final_hidden: np.ndarray, prompt: PromptRows) -> list[TokenLogprobs]:
        logprobs: list[TokenLogprobs] = []
        if not prompt.rows.size:
            return logprobs
        hidden = final_hidden[prompt.rows]
        for start in range(0, len(hidden), PROMPT_ROWS_AT_ONCE):
            part = slice(start, start + PROMPT_ROWS_AT_ONCE)
            logprobs += self._sampler.logprobs(
                self._backend.logits(hidden[part]),
                prompt.token_ids[part],
                prompt.num_logprobs[part],
            )
        return logprobs


def _is_all(rows: Int64[np.ndarray, " seqs"], count: int) -> bool:
    """Whether `rows` are all of `count` rows in order."""
    return np.array_equal(rows, np.arange(count, dtype=np.int64))
