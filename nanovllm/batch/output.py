"""The output of a batch: OpenAI's file of answers, one {"id", "custom_id", "response", "error"} a line, in the order in which they end.

Only whole lines are appended, so whatever ends the process leaves valid lines and at most a torn one behind them. The next run cuts that
off, reads which custom_ids have their answer, and goes on with the others.
"""

import json
import os
import stat
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from typing import Any

from nanovllm.batch.input import CustomIds
from nanovllm.server.http.errors import shorten

_ID_PREFIX = "batch_req_"
_LINE_BEGINS = f'{{"id": "{_ID_PREFIX}'.encode()
_MAX_LINE_BYTES = (
    1 << 32
)  # read of a line at most: no answer is that long, but -o may name any file
_SYNC_EVERY_S = 1.0


@dataclass(frozen=True, slots=True)
class Answer:
    """One line of the output; `status` is None where no endpoint could be asked."""

    custom_id: str
    status: int | None
    line: bytes

    @classmethod
    def response(cls, custom_id: str, status: int, body: Mapping[str, Any]) -> "Answer":
        """What the server would have answered."""
        return cls(
            custom_id,
            status,
            _line(
                custom_id,
                {"status_code": status, "request_id": f"req_{uuid.uuid4().hex}", "body": body},
                None,
            ),
        )

    @classmethod
    def refusal(cls, custom_id: str, code: str, message: str) -> "Answer":
        """Why no endpoint was asked."""
        return cls(custom_id, None, _line(custom_id, None, {"code": code, "message": message}))


def _line(custom_id: str, response: dict[str, Any] | None, error: dict[str, Any] | None) -> bytes:
    """In ASCII, so that no reader takes a character for the end of a line."""
    entry = {
        "id": f"{_ID_PREFIX}{uuid.uuid4().hex}",
        "custom_id": custom_id,
        "response": response,
        "error": error,
    }
    return json.dumps(entry, allow_nan=False).encode() + b"\n"


class AnswerFile:
    """A file that answers are appended to."""

    def __init__(
        self,
        path: Path,
        file: RawIOBase,
        *,
        can_resume: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Append to `file`, which has no buffer of its own.

        Without `can_resume` the next run cannot continue it, and `path` is for messages only.
        """
        self._path = path
        self._file = file
        self._clock = clock
        self._is_regular = can_resume and is_regular(path)
        self._whole_bytes = path.stat().st_size if self._is_regular else 0
        self._is_dirty = False
        self._synced_s = clock()

    def append(self, line: bytes) -> None:
        """Write a whole line. Raises OSError where that fails, and takes back what was written of the line."""
        left = memoryview(line)
        try:
            while left:
                left = left[self._file.write(left) or 0 :]
        except OSError as error:
            if self._is_regular:
                with suppress(OSError):  # the next run would cut it off too
                    self._file.truncate(self._whole_bytes)
            raise self._unwritable(error) from error
        self._whole_bytes += len(line)
        self._is_dirty = True

    def sync(self, *, only_if_due: bool = False) -> None:
        """Have the operating system bring what was written to the disk; `only_if_due`: unless it did within the last second."""
        if not self._is_dirty or (only_if_due and self._clock() - self._synced_s < _SYNC_EVERY_S):
            return
        try:
            if self._is_regular:
                os.fsync(self._file.fileno())
        except OSError as error:
            raise self._unwritable(error) from error
        self._is_dirty = False
        self._synced_s = self._clock()

    def _unwritable(self, error: OSError) -> OSError:
        reason = error.strerror or str(error)
        kept = (
            "; the answers in it are kept: mend that and run the same command again to go on"
            if self._is_regular
            else ""
        )
        return OSError(error.errno, f"{self._path} cannot be written ({reason}){kept}")


def is_regular(path: Path) -> bool:
    """Whether it is an ordinary file, which can be read again; a device or a pipe cannot."""
    return stat.S_ISREG(path.stat().st_mode)


@contextmanager
def open_answers(path: Path, ids: CustomIds, *, overwrite: bool = False) -> Iterator[AnswerFile]:
    """Open or create the output at `path`, with the custom_ids taken that it answers; nobody else may write to it meanwhile.

    Args:
        overwrite: drop what the file has, instead of going on with it.

    Raises:
        ValueError: it holds something else than answers to this batch, or another run writes to it.
        OSError: it cannot be read or written.
    """
    if path.exists() and not is_regular(path):
        with path.open("ab", buffering=0) as device:
            yield AnswerFile(path, device)
        return
    with _locked(path), path.open("ab", buffering=0) as file:
        file.truncate(0 if overwrite else _take_answered(path, ids))
        answers = AnswerFile(path, file)
        try:
            yield answers
        finally:
            answers.sync()


@contextmanager
def write_answers(name: Path) -> Iterator[AnswerFile]:
    """Write the answers to standard output, which messages call `name`."""
    with open(sys.stdout.fileno(), "ab", buffering=0, closefd=False) as file:
        yield AnswerFile(name, file, can_resume=False)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keep a second run out: both would answer the same requests, and each would cut off the line that the other writes."""
    from filelock import FileLock, Timeout  # noqa: PLC0415  # slow to import, and no other command needs it

    lock = path.with_name(f"{path.name}.lock")
    try:
        with FileLock(lock, timeout=0):
            try:
                yield
            finally:
                with suppress(OSError):
                    lock.unlink()
    except Timeout as error:
        raise ValueError(
            f"another run writes to {path}; wait for it, or choose another output"
        ) from error


def _take_answered(path: Path, ids: CustomIds) -> int:
    """Take the custom_ids that the file answers; the length of its whole lines. Raises ValueError where a line answers none of them."""
    remedy = "choose another output, or give --overwrite to lose what it has"
    whole_bytes = 0
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(_MAX_LINE_BYTES), b""), start=1):
            if not line.endswith(b"\n"):
                is_ours = (
                    whole_bytes > 0
                    or line.startswith(_LINE_BEGINS)
                    or _LINE_BEGINS.startswith(line)
                )
                if not is_ours or len(line) == _MAX_LINE_BYTES:
                    raise ValueError(f"{path} is no output of a batch; {remedy}")
                break
            custom_id = _answered_id(line)
            if custom_id is None:
                raise ValueError(
                    f"line {number} of {path} is no answer to a request of a batch; {remedy}"
                )
            name = shorten(repr(custom_id))
            try:
                if not ids.take(custom_id):
                    raise ValueError(
                        f"line {number} of {path} answers {name} a second time; {remedy}"
                    )
            except KeyError:
                raise ValueError(
                    f"line {number} of {path} answers {name}, which the input does not have; {remedy}"
                ) from None
            whole_bytes += len(line)
    return whole_bytes


def _answered_id(line: bytes) -> str | None:
    """The custom_id of an answer; None where the line is none."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not {"id", "custom_id", "response", "error"} <= found.keys():
        return None
    custom_id = found["custom_id"]
    return custom_id if isinstance(custom_id, str) else None
