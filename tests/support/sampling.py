"""SamplingBatches from one description per row."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from nanovllm.runner.sampling_batch import LogitEdits, PromptRows, SamplingBatch, TokenHistory

NO_PROMPT: tuple[Sequence[int], Sequence[int], Sequence[int]] = ((), (), ())


@dataclass(frozen=True, kw_only=True)
class Row:
    """The sampling settings of one row, with its tokens in `prompt` and `output`."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    prompt: Sequence[int] = ()
    output: Sequence[int] = ()
    bias: Mapping[int, float] = field(default_factory=dict)
    allowed: Sequence[int] | None = None
    seed: int = 0
    choice: int = 0
    position: int = 0
    logprobs: int | None = None

    @property
    def has_penalties(self) -> bool:
        """Whether sampling depends on the previous tokens."""
        return (self.repetition, self.presence, self.frequency) != (1.0, 0.0, 0.0)


def make_sampling(
    rows: Sequence[Row],
    *,
    places: Sequence[int] | None = None,
    prompt: tuple[Sequence[int], Sequence[int], Sequence[int]] = NO_PROMPT,
) -> SamplingBatch:
    """Return the batch of these rows.

    `places` are their logit rows, by default in order; `prompt` is (logit rows, token ids, counts).
    """
    seen = [
        (place, token)
        for place, row in enumerate(rows)
        if row.has_penalties
        for token in dict.fromkeys([*row.prompt, *row.output])
    ]
    edits = [
        (place, token, value) for place, row in enumerate(rows) for token, value in row.bias.items()
    ]
    return SamplingBatch(
        rows=_ints(range(len(rows)) if places is None else places),
        temperature=_floats([row.temperature for row in rows]),
        top_k=_ints([row.top_k for row in rows]),
        top_p=_floats([row.top_p for row in rows]),
        min_p=_floats([row.min_p for row in rows]),
        repetition_penalty=_floats([row.repetition for row in rows]),
        presence_penalty=_floats([row.presence for row in rows]),
        frequency_penalty=_floats([row.frequency for row in rows]),
        wants_logprobs=np.array([row.logprobs is not None for row in rows], dtype=np.bool_),
        num_logprobs=_ints([row.logprobs or 0 for row in rows]),
        seeds=np.array([row.seed for row in rows], dtype=np.uint64),
        choices=_ints([row.choice for row in rows]),
        positions=_ints([row.position for row in rows]),
        history=TokenHistory(
            _ints([place for place, _ in seen]),
            _ints([token for _, token in seen]),
            _ints([list(rows[place].output).count(token) for place, token in seen]),
        ),
        edits=LogitEdits(
            _ints([edit[0] for edit in edits]),
            _ints([edit[1] for edit in edits]),
            _floats([edit[2] for edit in edits]),
        ),
        allowed={
            place: _ints(row.allowed) for place, row in enumerate(rows) if row.allowed is not None
        },
        prompt=PromptRows(*map(_ints, prompt)),
    )


def _ints(values: Sequence[int]) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def _floats(values: Sequence[float]) -> np.ndarray:
    return np.array(values, dtype=np.float32)
