"""The input of a batch: OpenAI's batch file, one {"custom_id", "method", "url", "body"} a line.

A file may have millions of lines. It is read twice, one line at a time: before any work, to find what would spoil the whole batch, and
while the requests run. What stays in memory is 17 bytes a line, a digest of its custom_id and whether that is taken.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from nanovllm.server.http.errors import shorten
from nanovllm.server.http.problems import MAX_PROBLEMS

MAX_CUSTOM_ID_CHARACTERS = 512
_FIELDS = ("custom_id", "method", "url", "body")
_DIGEST_BYTES = 16
_SKIPPED_BYTES = 1 << 20  # read at a time of what is too long to be kept


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """One line. Only `custom_id` is checked: whatever is wrong with the rest is told by the line's own answer.

    Attributes:
        unknown: the line's fields that a batch does not have.
    """

    custom_id: str
    method: object
    url: object
    body: object
    unknown: tuple[str, ...] = ()


class CustomIds:
    """The custom_ids of a batch, each of which may be taken once: by an answer in the output, or by the request that runs."""

    def __init__(self, digests: bytes | bytearray) -> None:
        """Know the ids whose `digest_of` these are, one after the other."""
        self._sorted = np.sort(np.frombuffer(digests, dtype=f"S{_DIGEST_BYTES}"))
        self._taken = np.zeros(len(self._sorted), dtype=np.bool_)

    def __len__(self) -> int:
        return len(self._sorted)

    @property
    def num_taken(self) -> int:
        """How many are taken."""
        return int(np.count_nonzero(self._taken))

    @property
    def repeated(self) -> set[bytes]:
        """Digests of the first few ids that came more than once."""
        found = self._sorted[1:][self._sorted[1:] == self._sorted[:-1]]
        return set(np.unique(found)[:MAX_PROBLEMS].tolist())

    def take(self, custom_id: str) -> bool:
        """Take an id; False where it was taken before. Raises KeyError for one that the batch does not have."""
        digest = digest_of(custom_id)
        place = int(np.searchsorted(self._sorted, digest))
        if place == len(self._sorted) or self._sorted[place] != digest:
            raise KeyError(custom_id)
        was_free = not self._taken[place]
        self._taken[place] = True
        return was_free


def digest_of(custom_id: str) -> bytes:
    """16 bytes that stand for the id; the last is no zero, because NumPy takes zeros at the end of a text for padding."""
    return (
        hashlib.blake2b(
            custom_id.encode(errors="surrogatepass"), digest_size=_DIGEST_BYTES - 1
        ).digest()
        + b"."
    )


class BatchInput:
    """An open input file."""

    def __init__(self, path: Path, file: BinaryIO, max_line_bytes: int) -> None:
        """Read `file`, which must be one that can be read twice; `path` is for messages."""
        self._path = path
        self._file = file
        self._max_line_bytes = max_line_bytes

    def check(self) -> CustomIds:
        """Read every line; raises ValueError listing the first that are no request, and custom_ids that come more than once."""
        problems: list[str] = []
        digests = bytearray()
        for number, line in self._lines():
            try:
                digests += digest_of(self._parse(line).custom_id)
            except ValueError as error:
                problems.append(f"line {number} {error}")
                if len(problems) == MAX_PROBLEMS:
                    break
        ids = CustomIds(digests)
        problems += self._repetitions(ids.repeated)[: MAX_PROBLEMS - len(problems)]
        if problems:
            listed = "\n  ".join(problems)
            raise ValueError(
                f"{self._path} cannot be run as it is; nothing was run. Mend or remove:\n  {listed}"
            )
        return ids

    def requests(self, ids: CustomIds) -> Iterator[BatchRequest]:
        """The requests whose id is free, taken as they are read; raises ValueError where the file is not what was checked."""
        changed = f"{self._path} was changed while it was read; run the same command again"
        for _, line in self._lines():
            try:
                request = self._parse(line)
                is_free = ids.take(request.custom_id)
            except (ValueError, KeyError) as error:
                raise ValueError(changed) from error
            if is_free:
                yield request
        if ids.num_taken < len(ids):
            raise ValueError(changed)

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        """Numbers and contents of the lines that are not blank, from the beginning; of one that is too long, a byte more than is allowed."""
        self._file.seek(0)
        number = 0
        while line := self._file.readline(self._max_line_bytes + 1):
            number += 1
            rest = line
            while rest and not rest.endswith(b"\n"):
                rest = self._file.readline(_SKIPPED_BYTES)
            if line.strip() or self._is_too_long(line):
                yield number, line

    def _is_too_long(self, line: bytes) -> bool:
        return len(line) > self._max_line_bytes and not line.endswith(b"\n")

    def _parse(self, line: bytes) -> BatchRequest:
        """A line's request; raises ValueError with what is wrong with the line, to follow its name."""
        if self._is_too_long(line):
            raise ValueError(
                f"is longer than the limit of {self._max_line_bytes} bytes; split it, or raise --max-line-bytes"
            )
        try:
            found = json.loads(line)
        except RecursionError as error:
            raise ValueError("cannot be read as JSON: it is nested too deeply") from error
        except ValueError as error:
            raise ValueError(f"cannot be read as JSON: {shorten(str(error))}") from error
        if not isinstance(found, dict):
            raise ValueError(
                'is not an object {"custom_id": ..., "method": ..., "url": ..., "body": ...}'
            )
        custom_id = found.get("custom_id")
        if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_CUSTOM_ID_CHARACTERS:
            given = (
                f"has the custom_id {shorten(repr(custom_id))}"
                if "custom_id" in found
                else "has no custom_id"
            )
            raise ValueError(
                f"{given}; give it a text of 1 to {MAX_CUSTOM_ID_CHARACTERS} characters that no other line has"
            )
        unknown = tuple(name for name in found if name not in _FIELDS)
        return BatchRequest(
            custom_id, found.get("method"), found.get("url"), found.get("body"), unknown
        )

    def _repetitions(self, repeated: set[bytes]) -> list[str]:
        """For each line that repeats one of these custom_ids: its number, and that of the first which has it."""
        first: dict[bytes, int] = {}
        found: list[str] = []
        for number, line in self._lines() if repeated else ():
            try:
                custom_id = self._parse(line).custom_id
            except ValueError:
                continue  # is listed already
            digest = digest_of(custom_id)
            if digest in repeated and first.setdefault(digest, number) != number:
                found.append(
                    f"line {number} has the custom_id {shorten(repr(custom_id))} of line {first[digest]}; each must be another"
                )
                if len(found) == MAX_PROBLEMS:
                    break
        return found
