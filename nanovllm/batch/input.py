"""Read OpenAI's batch input file: a line {"custom_id", "method", "url", "body"} for each request.

A file may have millions of lines. It is read twice, line by line: to check it before any request
runs, and while the requests run. In memory a line takes 17 bytes: the digest of its custom_id, and
whether it has a response.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from nanovllm.server.http.errors import shorten
from nanovllm.server.http.validation_errors import MAX_PROBLEMS

MAX_CUSTOM_ID_CHARACTERS = 512
_FIELDS = ("custom_id", "method", "url", "body")
_DIGEST_BYTES = 16
_SKIPPED_BYTES = 1 << 20  # chunk in which the rest of a line that is too long is skipped


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """One line, of which only `custom_id` is checked; other errors are in the line's response.

    Attributes:
        unknown: names of the line's unknown fields.
    """

    custom_id: str
    method: object
    url: object
    body: object
    unknown: tuple[str, ...] = ()


class CustomIds:
    """The custom_ids of a batch; each is taken once, by a response or by a running request."""

    def __init__(self, digests: bytes | bytearray) -> None:
        """Create the set from the ids' concatenated `digest_of`."""
        self._sorted = np.sort(np.frombuffer(digests, dtype=f"S{_DIGEST_BYTES}"))
        self._taken = np.zeros(len(self._sorted), dtype=np.bool_)

    def __len__(self) -> int:
        return len(self._sorted)

    @property
    def num_taken(self) -> int:
        """Return the number of taken ids."""
        return int(np.count_nonzero(self._taken))

    @property
    def repeated(self) -> set[bytes]:
        """Return the digests of the first MAX_PROBLEMS duplicate ids."""
        duplicates = self._sorted[1:][self._sorted[1:] == self._sorted[:-1]]
        return set(np.unique(duplicates)[:MAX_PROBLEMS].tolist())

    def take(self, custom_id: str) -> bool:
        """Take an id and return whether it was free; raises KeyError for an unknown one."""
        digest = digest_of(custom_id)
        index = int(np.searchsorted(self._sorted, digest))
        if index == len(self._sorted) or self._sorted[index] != digest:
            raise KeyError(custom_id)
        was_free = not self._taken[index]
        self._taken[index] = True
        return was_free


def digest_of(custom_id: str) -> bytes:
    """Return an id's 16-byte digest; the last byte is ".", because NumPy strips trailing zeros."""
    content = custom_id.encode(errors="surrogatepass")
    return hashlib.blake2b(content, digest_size=_DIGEST_BYTES - 1).digest() + b"."


class BatchInput:
    """An open input file."""

    def __init__(self, path: Path, file: BinaryIO, max_line_bytes: int) -> None:
        """Read `file`, which must be seekable; `path` is for messages."""
        self._path = path
        self._file = file
        self._max_line_bytes = max_line_bytes

    def check(self) -> CustomIds:
        """Check every line; raises ValueError that lists malformed lines and duplicate ids."""
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
        problems += self._duplicates(ids.repeated)[: MAX_PROBLEMS - len(problems)]
        if problems:
            listed = "\n  ".join(problems)
            raise ValueError(
                f"{self._path} cannot be run as it is; nothing was run. Fix or remove:\n  {listed}"
            )
        return ids

    def requests(self, ids: CustomIds) -> Iterator[BatchRequest]:
        """Yield the requests whose id is free and take it; raises ValueError for a changed file."""
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
        """Yield numbers and contents of all non-blank lines, truncated one byte above the limit."""
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
        """Parse a line; raises ValueError, whose message follows the line's number."""
        if self._is_too_long(line):
            raise ValueError(
                f"is longer than the limit of {self._max_line_bytes} bytes; split it, "
                "or raise --max-line-bytes"
            )
        try:
            fields = json.loads(line)
        except RecursionError as error:
            raise ValueError("cannot be read as JSON: it is nested too deeply") from error
        except ValueError as error:
            raise ValueError(f"cannot be read as JSON: {shorten(str(error))}") from error
        if not isinstance(fields, dict):
            raise ValueError(
                'is not an object {"custom_id": ..., "method": ..., "url": ..., "body": ...}'
            )
        custom_id = fields.get("custom_id")
        if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_CUSTOM_ID_CHARACTERS:
            problem = (
                f"has the custom_id {shorten(repr(custom_id))}"
                if "custom_id" in fields
                else "has no custom_id"
            )
            raise ValueError(
                f"{problem}; give it a text of 1 to {MAX_CUSTOM_ID_CHARACTERS} characters that is "
                "unique"
            )
        unknown = tuple(name for name in fields if name not in _FIELDS)
        return BatchRequest(
            custom_id, fields.get("method"), fields.get("url"), fields.get("body"), unknown
        )

    def _duplicates(self, repeated: set[bytes]) -> list[str]:
        """Return a message for each line that repeats one of these custom_ids."""
        first: dict[bytes, int] = {}
        problems: list[str] = []
        for number, line in self._lines() if repeated else ():
            try:
                custom_id = self._parse(line).custom_id
            except ValueError:
                continue  # already listed
            digest = digest_of(custom_id)
            if digest in repeated and first.setdefault(digest, number) != number:
                problems.append(
                    f"line {number} has the custom_id {shorten(repr(custom_id))} of line "
                    f"{first[digest]}; each must be unique"
                )
                if len(problems) == MAX_PROBLEMS:
                    break
        return problems
