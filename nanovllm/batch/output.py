"""Write OpenAI's batch output file: a line {"id", "custom_id", "response", "error"} per request.

Lines are in the order of completion. Only whole lines are appended, so an interruption leaves valid
lines and at most one partial line. The next run truncates that one, reads which custom_ids have a
response, and resumes with the others.
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
_MAX_LINE_BYTES = 1 << 32  # of a line that is read; -o may name any file
_SYNC_INTERVAL_S = 1.0


@dataclass(frozen=True, slots=True)
class Answer:
    """One line of the output; `status` is None if the request reached no endpoint."""

    custom_id: str
    status: int | None
    line: bytes

    @classmethod
    def response(cls, custom_id: str, status: int, body: Mapping[str, Any]) -> "Answer":
        """Return a line with an endpoint's response."""
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
        """Return a line with the error of a request that reached no endpoint."""
        return cls(custom_id, None, _line(custom_id, None, {"code": code, "message": message}))


def _line(custom_id: str, response: dict[str, Any] | None, error: dict[str, Any] | None) -> bytes:
    """Return a line in ASCII, which has no other line separators."""
    entry = {
        "id": f"{_ID_PREFIX}{uuid.uuid4().hex}",
        "custom_id": custom_id,
        "response": response,
        "error": error,
    }
    return json.dumps(entry, allow_nan=False).encode() + b"\n"


class AnswerFile:
    """A file to which responses are appended."""

    def __init__(
        self,
        path: Path,
        file: RawIOBase,
        *,
        can_resume: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Append to `file`, which must be unbuffered.

        Without `can_resume`, `path` is for messages only.
        """
        self._path = path
        self._file = file
        self._clock = clock
        self._is_regular = can_resume and is_regular(path)
        self._whole_bytes = path.stat().st_size if self._is_regular else 0
        self._is_dirty = False
        self._synced_s = clock()

    def append(self, line: bytes) -> None:
        """Write a whole line; on failure truncate the partial line and raise OSError."""
        remaining = memoryview(line)
        try:
            while remaining:
                remaining = remaining[self._file.write(remaining) or 0 :]
        except OSError as error:
            if self._is_regular:
                with suppress(OSError):  # the next run truncates it too
                    self._file.truncate(self._whole_bytes)
            raise self._unwritable(error) from error
        self._whole_bytes += len(line)
        self._is_dirty = True

    def sync(self, *, only_if_due: bool = False) -> None:
        """Flush the file to disk; with `only_if_due`, at most once a second."""
        if not self._is_dirty or (
            only_if_due and self._clock() - self._synced_s < _SYNC_INTERVAL_S
        ):
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
            "; its responses are kept: fix that and run the same command again to resume"
            if self._is_regular
            else ""
        )
        return OSError(error.errno, f"{self._path} cannot be written ({reason}){kept}")


def is_regular(path: Path) -> bool:
    """Return whether a path is a regular file, neither a device nor a pipe."""
    return stat.S_ISREG(path.stat().st_mode)


@contextmanager
def open_answers(path: Path, ids: CustomIds, *, overwrite: bool = False) -> Iterator[AnswerFile]:
    """Open or create and lock the output at `path`, and take the custom_ids of its responses.

    Args:
        overwrite: discard its responses instead of resuming.

    Raises:
        ValueError: the file is no output of this batch, or another run writes to it.
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
    """Write the responses to standard output, which messages call `name`."""
    with open(sys.stdout.fileno(), "ab", buffering=0, closefd=False) as file:
        yield AnswerFile(name, file, can_resume=False)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Lock the output against a second run, which would truncate lines being written."""
    from filelock import FileLock, Timeout  # noqa: PLC0415 - slow to import

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
    """Take the custom_ids of a file's responses and return the length of its whole lines.

    Raises ValueError for a line that is no response to this batch.
    """
    remedy = "choose another output, or give --overwrite to discard its lines"
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
                    f"line {number} of {path} answers {name}, which the input does not have; "
                    f"{remedy}"
                ) from None
            whole_bytes += len(line)
    return whole_bytes


def _answered_id(line: bytes) -> str | None:
    """Return the custom_id of a response; None if the line is none."""
    try:
        answer = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if (
        not isinstance(answer, dict)
        or not {"id", "custom_id", "response", "error"} <= answer.keys()
    ):
        return None
    custom_id = answer["custom_id"]
    return custom_id if isinstance(custom_id, str) else None
