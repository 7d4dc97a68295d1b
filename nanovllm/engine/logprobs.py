"""Log-probabilities in arrays, unpacked position by position on access.

A position with 20 top tokens takes 0.7 KB packed, and 5 KB as a dictionary of numbers and texts. An
output may have hundreds of thousands of positions, and most are read only once, to write JSON.
"""

from collections.abc import Callable, Sequence
from typing import Any

from nanovllm.model.sampling import TokenLogprobs
from nanovllm.outputs import Logprob, PositionLogprobs

POSITION_BYTES = 512
"""Memory of a packed position without its tokens, in bytes."""
ENTRY_BYTES = 24
"""Memory of each token of a packed position, in bytes."""


def logprobs_bytes(num_positions: int, count: int | None) -> int:
    """Return the maximum memory of packed positions with `count` top tokens each, in bytes."""
    return 0 if count is None else num_positions * (POSITION_BYTES + ENTRY_BYTES * (count + 1))


class LogprobList(Sequence[Any]):
    """A sequence of {token id: Logprob} or None, unpacked on access; equal to such a list."""

    __slots__ = ("_positions", "_token_text")

    def __init__(
        self, positions: Sequence[TokenLogprobs | None], token_text: Callable[[int], str]
    ) -> None:
        """Wrap `positions`; `token_text` returns the text of a token id."""
        self._positions = positions
        self._token_text = token_text

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return LogprobList(self._positions[index], self._token_text)
        packed = self._positions[index]
        return None if packed is None else self._unpack(packed)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LogprobList | list):
            return NotImplemented
        return list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(list(self))

    def _unpack(self, packed: TokenLogprobs) -> PositionLogprobs:
        token_text = self._token_text
        ranks = (packed.rank, *range(1, len(packed.token_ids)))
        return {
            token_id: Logprob(logprob, rank, token_text(token_id))
            for token_id, logprob, rank in zip(
                packed.token_ids, packed.logprobs, ranks, strict=True
            )
        }
