"""What the logit rows of a ForwardBatch are used for. The engine fills it (engine/batching.py)."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64


@dataclass(frozen=True, slots=True)
class PromptRows:
    """Logit rows whose prompt log-probabilities are wanted.

    Attributes:
        rows: indices into the batch's logit rows.
        token_ids: the prompt's next token, whose log-probability is reported.
        num_logprobs: how many of the most likely tokens are reported besides it.
    """

    rows: Int64[np.ndarray, " prompt_rows"]
    token_ids: Int64[np.ndarray, " prompt_rows"]
    num_logprobs: Int64[np.ndarray, " prompt_rows"]


@dataclass(frozen=True, slots=True)
class LogitRows:
    """Indices into a batch's logit rows by use; an index may appear more than once.

    Attributes:
        sampled: rows that get a token, in the order of the SamplingSettings.
        hidden: rows whose final hidden state is returned.
    """

    sampled: Int64[np.ndarray, " seqs"]
    prompt: PromptRows
    hidden: Int64[np.ndarray, " hidden_rows"]


_NONE = np.empty(0, dtype=np.int64)
NO_PROMPT_ROWS = PromptRows(_NONE, _NONE, _NONE)
