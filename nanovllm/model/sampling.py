"""From logits to tokens: the settings of each row, and the protocol of a sampler.

There are two samplers: NumPy's, which is the specification (numpy_sampler.py), and the compiled one
of backend="numba", which uses the backend's threads. They draw the same tokens, except where a draw
is within rounding error of the boundary between two.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float32, Int64, UInt64

ROW_SETTINGS = np.dtype(
    [
        ("temperature", np.float32),
        ("top_p", np.float32),
        ("min_p", np.float32),
        ("repetition_penalty", np.float32),
        ("presence_penalty", np.float32),
        ("frequency_penalty", np.float32),
        ("top_k", np.int64),
        ("num_logprobs", np.int64),
        ("choices", np.int64),
        ("seeds", np.uint64),
    ]
)
"""Settings of a row that are the same at every step; those of SamplingParams have its names."""


@dataclass(frozen=True, slots=True)
class TokenLists:
    """A list of distinct tokens for each row: row i has token_ids[starts[i] : starts[i + 1]]."""

    starts: Int64[np.ndarray, " rows_and_end"]
    token_ids: Int64[np.ndarray, " items"]

    @property
    def rows(self) -> Int64[np.ndarray, " items"]:
        """The row of each token."""
        counts = np.diff(self.starts)
        return np.repeat(np.arange(len(counts), dtype=np.int64), counts)


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """How each row's token is chosen. A sampler applies the settings in this order.

    Attributes:
        allowed: the only tokens that a row may get; an empty list allows all.
        edits: tokens whose logits are changed by adding `edit_values`; minus infinity bans a token.
        history: tokens that are penalized, with their number in the output so far; 0 for a token
            that only the prompt has.
        temperature: 0 for the argmax.
        top_k: 0 for no limit.
        seeds, choices, positions: the key of each row's random draw.
        num_logprobs: how many of the most likely tokens are reported besides the sampled one;
            -1 for no report.
    """

    allowed: TokenLists
    edits: TokenLists
    edit_values: Float32[np.ndarray, " edits"]
    history: TokenLists
    history_counts: Int64[np.ndarray, " seen"]
    repetition_penalty: Float32[np.ndarray, " rows"]
    presence_penalty: Float32[np.ndarray, " rows"]
    frequency_penalty: Float32[np.ndarray, " rows"]
    temperature: Float32[np.ndarray, " rows"]
    min_p: Float32[np.ndarray, " rows"]
    top_k: Int64[np.ndarray, " rows"]
    top_p: Float32[np.ndarray, " rows"]
    seeds: UInt64[np.ndarray, " rows"]
    choices: Int64[np.ndarray, " rows"]
    positions: Int64[np.ndarray, " rows"]
    num_logprobs: Int64[np.ndarray, " rows"]

    @property
    def has_lists(self) -> bool:
        """Whether any row has allowed, changed or penalized tokens."""
        return any(each.token_ids.size for each in (self.edits, self.history, self.allowed))

    @property
    def is_plain_greedy(self) -> bool:
        """Whether every row takes the argmax of unchanged logits and reports nothing."""
        return not (self.has_lists or self.temperature.any() or (self.num_logprobs >= 0).any())


class TokenLogprobs(NamedTuple):
    """Log-probabilities at one position: of the chosen token, then of the most likely in order.

    They are those of the model itself, before all settings, as vLLM and transformers report them.
    Ranks count from 1 and follow the logits, on ties the lower id first: where no setting changes
    the logits, the greedy token has rank 1. Samplers return `array.array`s, which take a tenth of
    the memory of lists.

    Attributes:
        rank: rank of the chosen token; those of the others are 1, 2 and so on.
    """

    token_ids: Sequence[int]
    logprobs: Sequence[float]
    rank: int


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """A token for each row; where `has_token` is False there is none, and the id means nothing.

    A row has no token if all of its tokens are banned or a logit is NaN or infinity. `logprobs` are
    None for rows without a report.
    """

    token_ids: Int64[np.ndarray, " rows"]
    has_token: Bool[np.ndarray, " rows"]
    logprobs: list[TokenLogprobs | None]


@runtime_checkable
class Sampler(Protocol):
    """Chooses tokens; a row's result does not depend on the rows beside it."""

    def sample(
        self, logits: Float32[np.ndarray, "rows vocab"], settings: SamplingSettings
    ) -> SampledTokens:
        """Return a token for each row; `logits` may be overwritten."""
        ...

    def logprobs(
        self,
        logits: Float32[np.ndarray, "rows vocab"],
        token_ids: Int64[np.ndarray, " rows"],
        num_logprobs: Int64[np.ndarray, " rows"],
    ) -> list[TokenLogprobs]:
        """Return the log-probabilities of each row's token and its top `num_logprobs`."""
        ...
