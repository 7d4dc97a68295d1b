"""SamplingBatch: what the sampler needs to know, one row a sequence that gets a token, as arrays.

The engine fills it (engine/scheduling/batching.py) from the settings of each request; requests with different settings share one batch.
"""

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float32, Int64, UInt64


@dataclass(frozen=True, slots=True)
class LogitEdits:
    """Changes to single logits: logits[rows, token_ids] += values; minus infinity forbids a token.

    No pair appears twice, and rows ascend.
    """

    rows: Int64[np.ndarray, " edits"]
    token_ids: Int64[np.ndarray, " edits"]
    values: Float32[np.ndarray, " edits"]


@dataclass(frozen=True, slots=True)
class TokenHistory:
    """The distinct tokens of the rows that have penalties; no (row, token) pair appears twice, and rows ascend.

    Attributes:
        output_counts: how often the token stands in the answer so far; 0 for one that only the prompt has.
    """

    rows: Int64[np.ndarray, " seen"]
    token_ids: Int64[np.ndarray, " seen"]
    output_counts: Int64[np.ndarray, " seen"]


@dataclass(frozen=True, slots=True)
class PromptRows:
    """Prompt positions whose log-probabilities are wanted.

    Attributes:
        rows: places among the batch's logit rows.
        token_ids: the token that stands at the next position, whose log-probability it is.
        num_logprobs: how many of the most likely tokens to report beside it.
    """

    rows: Int64[np.ndarray, " prompt_rows"]
    token_ids: Int64[np.ndarray, " prompt_rows"]
    num_logprobs: Int64[np.ndarray, " prompt_rows"]


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """Settings of each sampled row.

    Attributes:
        rows: each sampled row's place among the batch's logit rows.
        temperature: 0 for the most likely token.
        top_k: 0 for no limit.
        wants_logprobs: whether to report log-probabilities, `num_logprobs` how many besides the chosen token's.
        allowed: {sampled row: the only tokens it may get, at least one}.
        seeds, choices, positions: the key of each row's draw.
        hidden_rows: places among the batch's logit rows whose hidden state itself is wanted.
    """

    rows: Int64[np.ndarray, " seqs"]
    temperature: Float32[np.ndarray, " seqs"]
    top_k: Int64[np.ndarray, " seqs"]
    top_p: Float32[np.ndarray, " seqs"]
    min_p: Float32[np.ndarray, " seqs"]
    repetition_penalty: Float32[np.ndarray, " seqs"]
    presence_penalty: Float32[np.ndarray, " seqs"]
    frequency_penalty: Float32[np.ndarray, " seqs"]
    wants_logprobs: Bool[np.ndarray, " seqs"]
    num_logprobs: Int64[np.ndarray, " seqs"]
    seeds: UInt64[np.ndarray, " seqs"]
    choices: Int64[np.ndarray, " seqs"]
    positions: Int64[np.ndarray, " seqs"]
    history: TokenHistory
    edits: LogitEdits
    allowed: dict[int, Int64[np.ndarray, " allowed"]]
    prompt: PromptRows
    hidden_rows: Int64[np.ndarray, " hidden_rows"] = field(
        default_factory=lambda: np.empty(0, dtype=np.int64)
    )

    @property
    def is_plain_greedy(self) -> bool:
        """Whether every row takes the most likely token as it is, with nothing to change before and nothing to report."""
        changes = self.edits.rows.size or self.history.rows.size or self.allowed
        return not (changes or self.temperature.any() or self.wants_logprobs.any())
