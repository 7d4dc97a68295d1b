"""The seam between the runner and an implementation of sampling beside the forward pass: rows of logits in, tokens and reports out.

A backend may have one (`Backend.row_sampler`); where it has none, the runner samples with NumPy, which is also the specification.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float32, Int64, UInt64


@dataclass(frozen=True, slots=True)
class RowLists:
    """Tokens of some rows: those of row i are token_ids[starts[i] : starts[i + 1]]; no row has a token twice."""

    starts: Int64[np.ndarray, " rows_and_end"]
    token_ids: Int64[np.ndarray, " items"]

    @classmethod
    def of_rows(
        cls, rows: Int64[np.ndarray, " items"], token_ids: Int64[np.ndarray, " items"], count: int
    ) -> "RowLists":
        """From the row of each token, in ascending order, for `count` rows."""
        return cls(np.searchsorted(rows, np.arange(count + 1, dtype=np.int64)), token_ids)


@dataclass(frozen=True, slots=True)
class RowSettings:
    """What is done to each row of logits, in the order of the attributes.

    Attributes:
        allowed: the only tokens of a row; none for all of them.
        edits: tokens whose logit has `edit_values` added.
        history: tokens that are penalised, each `history_counts` times in the answer so far.
        temperature: 0 for the most likely token.
        top_k: 0 for no limit.
        seeds, choices, positions: the key of each row's draw.
        num_logprobs: how many of the most likely tokens to report besides the one drawn; -1 for no report.
    """

    allowed: RowLists
    edits: RowLists
    edit_values: Float32[np.ndarray, " edits"]
    history: RowLists
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

    @classmethod
    def plain(cls, rows: int) -> "RowSettings":
        """The most likely token of each row, and nothing else."""
        none = np.zeros(0, dtype=np.int64)
        lists = RowLists(np.zeros(rows + 1, dtype=np.int64), none)
        zeros, ones = np.zeros(rows, dtype=np.float32), np.ones(rows, dtype=np.float32)
        whole = np.zeros(rows, dtype=np.int64)
        return cls(
            allowed=lists, edits=lists, edit_values=zeros[:0], history=lists, history_counts=none, repetition_penalty=ones,
            presence_penalty=zeros, frequency_penalty=zeros, temperature=zeros, min_p=zeros, top_k=whole, top_p=ones,
            seeds=whole.astype(np.uint64), choices=whole, positions=whole, num_logprobs=whole - 1,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class RowReports:
    """Log-probabilities of rows, before all settings.

    Attributes:
        ranks: of each row's token, from 1.
        found: how many likely tokens the row has in `likely_ids`; 0 where its logits are not finite.
        logprobs: of the row's token, and then of its likely ones.
    """

    ranks: Int64[np.ndarray, " rows"]
    found: Int64[np.ndarray, " rows"]
    likely_ids: Int64[np.ndarray, "rows most"]
    logprobs: Float32[np.ndarray, "rows most_and_own"]


@dataclass(frozen=True, slots=True)
class SampledRows:
    """A token a row; where `has_token` is False there was none to give, and its entry means nothing."""

    token_ids: Int64[np.ndarray, " rows"]
    has_token: Bool[np.ndarray, " rows"]
    reports: RowReports


@runtime_checkable
class RowSampler(Protocol):
    """Samples rows of logits; a row's result does not depend on the rows beside it. Arrays that it returns are the caller's."""

    def sample(
        self, logits: Float32[np.ndarray, "rows vocab"], settings: RowSettings
    ) -> SampledRows:
        """A token for each row, and reports where asked for; `logits` are not changed."""
        ...

    def report(
        self,
        logits: Float32[np.ndarray, "rows vocab"],
        token_ids: Int64[np.ndarray, " rows"],
        num_logprobs: Int64[np.ndarray, " rows"],
    ) -> RowReports:
        """Log-probability and rank of each row's token, and its most likely tokens."""
        ...
