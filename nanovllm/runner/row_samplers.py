"""The two ways from a step's logits to tokens and reports: with NumPy, and by a sampler that the backend brings.

They give the same tokens but where a draw falls within rounding of the boundary between two, and the same log-probabilities to rounding.
"""

import numpy as np
from jaxtyping import Bool, Float32, Int64

from nanovllm.model.rows import RowLists, RowReports, RowSampler, RowSettings
from nanovllm.runner.logprobs import TokenLogprobs, token_logprobs
from nanovllm.runner.sampler import sample
from nanovllm.runner.sampling_batch import SamplingBatch


def sample_rows(
    sampler: RowSampler | None, logits: Float32[np.ndarray, "seqs vocab"], batch: SamplingBatch
) -> tuple[Int64[np.ndarray, " seqs"], Bool[np.ndarray, " seqs"], list[TokenLogprobs | None]]:
    """A token a row, whether the row had any, and the reports of those that asked; `logits` may be changed."""
    reports: list[TokenLogprobs | None] = [None] * logits.shape[0]
    asked = np.flatnonzero(batch.wants_logprobs)
    if sampler is not None:
        sampled = sampler.sample(logits, row_settings(batch))
        tokens, has_token = sampled.token_ids, sampled.has_token
        found = _as_token_logprobs(sampled.reports, tokens, asked)
    else:
        original = logits[
            asked
        ]  # a copy: sampling changes the logits, the report is of what the network said
        tokens, has_token = sample(logits, batch)
        found = (
            token_logprobs(original, tokens[asked], batch.num_logprobs[asked]) if asked.size else []
        )
    for row, report in zip(asked.tolist(), found, strict=True):
        reports[row] = report
    return tokens, has_token, reports


def report_rows(
    sampler: RowSampler | None,
    logits: Float32[np.ndarray, "rows vocab"],
    token_ids: Int64[np.ndarray, " rows"],
    num_logprobs: Int64[np.ndarray, " rows"],
) -> list[TokenLogprobs]:
    """For each row the log-probability and rank of its token, and of its `num_logprobs` most likely tokens."""
    if sampler is None:
        return token_logprobs(logits, token_ids, num_logprobs)
    return _as_token_logprobs(
        sampler.report(logits, token_ids, num_logprobs),
        token_ids,
        np.arange(logits.shape[0], dtype=np.int64),
    )


def row_settings(batch: SamplingBatch) -> RowSettings:
    """The batch's settings for a sampler of the model room."""
    rows = batch.rows.shape[0]
    none = np.zeros(0, dtype=np.int64)
    allowed = [batch.allowed.get(row, none) for row in range(rows)] if batch.allowed else []
    return RowSettings(
        allowed=RowLists(
            np.cumsum([0, *map(len, allowed)], dtype=np.int64), np.concatenate(allowed)
        )
        if allowed
        else RowLists(np.zeros(rows + 1, dtype=np.int64), none),
        edits=RowLists.of_rows(batch.edits.rows, batch.edits.token_ids, rows),
        edit_values=batch.edits.values,
        history=RowLists.of_rows(batch.history.rows, batch.history.token_ids, rows),
        history_counts=batch.history.output_counts,
        repetition_penalty=batch.repetition_penalty,
        presence_penalty=batch.presence_penalty,
        frequency_penalty=batch.frequency_penalty,
        temperature=batch.temperature,
        min_p=batch.min_p,
        top_k=batch.top_k,
        top_p=batch.top_p,
        seeds=batch.seeds,
        choices=batch.choices,
        positions=batch.positions,
        num_logprobs=np.where(batch.wants_logprobs, batch.num_logprobs, -1),
    )


def _as_token_logprobs(
    reports: RowReports, token_ids: np.ndarray, rows: np.ndarray
) -> list[TokenLogprobs]:
    """The reports of some rows as plain numbers."""
    ranks, counts, tokens = reports.ranks.tolist(), reports.found.tolist(), token_ids.tolist()
    found = []
    for row in rows.tolist():
        count = counts[row]
        ids = [tokens[row], *reports.likely_ids[row, :count].tolist()]
        found.append(
            TokenLogprobs(
                ids, reports.logprobs[row, : count + 1].tolist(), [ranks[row], *range(1, count + 1)]
            )
        )
    return found
