"""SamplingSettings made by hand, one plain description a row."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from hypothesis import strategies as st

from nanovllm.model.philox import draw_keys, exponentials
from nanovllm.model.sampling import ROW_SETTINGS, SamplingSettings, TokenLists
from nanovllm.runner.logit_rows import LogitRows, PromptRows
from nanovllm.sampling_params import SamplingParams

_NAMES = {
    "seeds": "seed", "choices": "choice", "num_logprobs": "logprobs",
    "repetition_penalty": "repetition", "presence_penalty": "presence",
    "frequency_penalty": "frequency",
}  # fmt: skip
"""Names of a Row by those of SamplingSettings, where they differ."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """The settings of a sampled row; `prompt` and `output` are its tokens so far."""

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


EVERY_KIND = [
    Row(),
    Row(temperature=0.0),
    Row(top_k=2, top_p=0.5, min_p=0.1),
    Row(repetition=2.0, output=[0, 1]),
    Row(bias={1: -math.inf}),
]
"""A row of each kind of settings."""


def rows_of(
    vocab: int, *, max_tokens: int, max_bias: int, **more: Sequence[float | None]
) -> st.SearchStrategy[Row]:
    """Return rows of every setting; `more` has further values of some settings."""
    token = st.integers(0, vocab - 1)
    tokens = st.lists(token, max_size=max_tokens)
    values: dict[str, list[float | None]] = {
        "temperature": [0.0, 1e-5, 0.1, 0.7, 1.0, 1.5, 100.0],
        "top_k": [0, 0, 1, 2, 5, vocab - 1, vocab, vocab + 1, 10**6],
        "top_p": [1.0, 1.0, 1e-6, 0.3, 0.5, 0.9, 0.99],
        "min_p": [0.0, 0.0, 0.01, 0.3, 1.0],
        "repetition": [1.0, 1.0, 0.5, 1.3, 10.0],
        "presence": [0.0, 0.0, -2.0, 0.6, 2.0],
        "frequency": [0.0, 0.0, -2.0, 0.4, 2.0],
        "logprobs": [None],
    }
    chosen = {
        name: st.sampled_from([*first, *more.get(name, ())]) for name, first in values.items()
    }
    biases = st.sampled_from([-math.inf, -100.0, -1.5, 0.0, 2.25, 100.0])
    return st.builds(
        Row,
        prompt=tokens,
        output=tokens,
        bias=st.dictionaries(token, biases, max_size=max_bias),
        allowed=st.none() | st.none() | st.lists(token, min_size=1, unique=True),
        seed=st.integers(0, 2**64 - 1),
        choice=st.integers(0, 127),
        position=st.integers(0, 1023),
        **chosen,
    )


def noise_of(row: Row, vocab: int) -> np.ndarray:
    """Return the exponential random numbers of a row's tokens."""
    integers = ((row.seed, np.uint64), (row.choice, np.int64), (row.position, np.int64))
    (key,) = draw_keys(*(np.array([number], dtype=kind) for number, kind in integers))
    return exponentials(key, vocab)


def make_sampling(rows: Sequence[Row]) -> SamplingSettings:
    """Return the settings of these rows."""
    seen = [
        list(dict.fromkeys([*row.prompt, *row.output])) if row.has_penalties else [] for row in rows
    ]
    return SamplingSettings(
        allowed=_token_lists([row.allowed or () for row in rows]),
        edits=_token_lists([list(row.bias) for row in rows]),
        edit_values=_floats([value for row in rows for value in row.bias.values()]),
        history=_token_lists(seen),
        history_counts=_ints(
            [
                list(row.output).count(token)
                for row, tokens in zip(rows, seen, strict=True)
                for token in tokens
            ]
        ),
        positions=_ints([row.position for row in rows]),
        **{name: _column(rows, name) for name in ROW_SETTINGS.names or ()},
    )


def _column(rows: Sequence[Row], name: str) -> np.ndarray:
    """Return a setting of the rows; the default of SamplingParams where a Row has none."""
    default = getattr(SamplingParams(), name, None)
    values = [getattr(row, _NAMES.get(name, name), default) for row in rows]
    return np.array([-1 if value is None else value for value in values], ROW_SETTINGS[name])


def make_step(
    rows: Sequence[Row],
    *,
    sampled: Sequence[int] | None = None,
    prompt: tuple[Sequence[int], Sequence[int], Sequence[int]] = ((), (), ()),
) -> tuple[LogitRows, SamplingSettings]:
    """Return the use of a batch's logit rows, and the settings of the sampled ones.

    Args:
        sampled: the logit rows that are sampled, by default all in order.
        prompt: logit rows, token ids and numbers of log-probabilities of prompt rows.
    """
    places = _ints(range(len(rows)) if sampled is None else sampled)
    return LogitRows(places, PromptRows(*map(_ints, prompt)), _ints([])), make_sampling(rows)


def _token_lists(lists: Sequence[Sequence[int]]) -> TokenLists:
    starts = np.cumsum([0, *map(len, lists)], dtype=np.int64)
    return TokenLists(starts, _ints(list(itertools.chain(*lists))))


def _ints(values: Sequence[int]) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def _floats(values: Sequence[float]) -> np.ndarray:
    return np.array(values, dtype=np.float32)
