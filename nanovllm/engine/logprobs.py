"""Log-probabilities as they are kept: packed into arrays, and unpacked position by position when somebody reads them.

A position with 20 tokens beside its own takes 0.7 KB packed, and 5 KB as a dictionary of numbers and texts. An answer can have hundreds
of thousands of positions, and most are read once, to be written as JSON.
"""

from array import array
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from nanovllm.model.sampling import TokenLogprobs
from nanovllm.outputs import Logprob, PositionLogprobs

POSITION_BYTES = 512
"""What a position takes packed, whatever it has."""
ENTRY_BYTES = 24
"""What each token of a position takes beside that."""


class PackedLogprobs(NamedTuple):
    """TokenLogprobs in arrays."""

    token_ids: "array[int]"
    logprobs: "array[float]"
    ranks: "array[int]"

    @classmethod
    def pack(cls, found: TokenLogprobs) -> "PackedLogprobs":
        """The runner's report of a position, packed."""
        return cls(array("q", found.token_ids), array("d", found.logprobs), array("q", found.ranks))


class LogprobList(Sequence[Any]):
    """Positions as {token id: Logprob}, each made when it is asked for; equal to a list of them. None where there is none."""

    __slots__ = ("_positions", "_text_of")

    def __init__(
        self, positions: Sequence[PackedLogprobs | None], text_of: Callable[[int], str]
    ) -> None:
        """Unpack `positions`, with the texts that `text_of` gives tokens."""
        self._positions = positions
        self._text_of = text_of

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return LogprobList(self._positions[index], self._text_of)
        packed = self._positions[index]
        return None if packed is None else self._unpack(packed)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LogprobList | list):
            return NotImplemented
        return list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(list(self))

    def _unpack(self, packed: PackedLogprobs) -> PositionLogprobs:
        text_of = self._text_of
        return {
            token_id: Logprob(logprob, rank, text_of(token_id))
            for token_id, logprob, rank in zip(*packed, strict=True)
        }
