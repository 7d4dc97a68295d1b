"""HTTP transfers from the hub with size limits, and retries with exponential backoff.

The hub, or the mirror in HF_ENDPOINT, is not trusted: an endless response must fill neither memory
nor disk. huggingface-hub's transfers have no such limit, so only its session and its errors are
used here.
"""

import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from huggingface_hub import constants, errors, get_session
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # not marked as exported
    build_hf_headers,
    hf_raise_for_status,
    tqdm,
)

from nanovllm.errors import printable
from nanovllm.progress import shows_progress

MAX_TRIES = 6  # consecutive ones with less than PROGRESS_BYTES
PROGRESS_BYTES = 1 << 20
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0
ANSWER_TIMEOUT_S = 20.0
"""Timeout for the list of files, without which a dropped packet blocks forever."""
_MAX_ERROR_BYTES = 1 << 16
_TRANSIENT_STATUSES = frozenset({408, 429, 500, 502, 503, 504})
_ERROR_HEADERS = ("x-error-code", "x-error-message", "content-type")
# HTTPError of the library below huggingface-hub: httpx under its version 1, httpx2 under version 2.
HTTP_ERROR = cast(
    "type[Exception]", next(kind for kind in errors.HfHubHTTPError.__bases__ if kind is not OSError)
)


class TooLargeError(Exception):
    """A response that is larger than its limit."""


class IncompleteError(OSError):
    """A file that ended before its declared size."""


def read(url: str, limit_bytes: int, *, token: str | None, params: Mapping[str, str]) -> bytes:
    """Return the body of a GET request.

    Raises:
        TooLargeError: it has more than `limit_bytes` bytes.
        HfHubHTTPError: the hub answers with an error; other HTTP_ERROR: no connection.
    """
    parts: list[bytes] = []
    received = 0
    with _opened(url, token, params=params, timeout_s=ANSWER_TIMEOUT_S) as response:
        for part in response.iter_bytes(chunk_size=1 << 16):
            received += len(part)
            if received > limit_bytes:
                raise TooLargeError
            parts.append(part)
    return b"".join(parts)


@dataclass(frozen=True, slots=True)
class Transfer:
    """A file to fetch.

    Attributes:
        limit_bytes: of the whole file.
        size_bytes: the declared size, if known.
        name: title of the progress bar, which is shown on terminals only.
    """

    url: str
    limit_bytes: int
    token: str | None
    size_bytes: int | None
    name: str

    def append_to(self, sink: BinaryIO) -> None:
        """Append the rest of the file to `sink`; retry transient errors.

        Raises:
            TooLargeError: the file has more than `limit_bytes` bytes.
            IncompleteError: it ended early in every try.
            HfHubHTTPError: the hub answers with an error; other HTTP_ERROR: no connection.
        """
        pauses = pauses_s()
        done = sink.seek(0, 2)
        while True:
            try:
                self._append_rest(sink)
                return
            except (HTTP_ERROR, IncompleteError) as error:
                if not is_transient(error):
                    raise
                if sink.tell() - done >= PROGRESS_BYTES:
                    pauses, done = pauses_s(), sink.tell()
                pause_s = next(pauses, None)
                if pause_s is None:
                    raise
                time.sleep(pause_s)

    def _append_rest(self, sink: BinaryIO) -> None:
        start = sink.seek(0, 2)
        if start == self.size_bytes and start:
            return
        headers = {"Range": f"bytes={start}-"} if start else {}
        timeout_s = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with _opened(self.url, self.token, headers=headers, timeout_s=timeout_s) as response:
            if start and response.status_code != 206:  # the server ignored the range
                start = sink.seek(0)
                sink.truncate()
            with self._progress_bar(start) as progress:
                for part in response.iter_bytes(chunk_size=constants.DOWNLOAD_CHUNK_SIZE):
                    start += len(part)
                    if start > self.limit_bytes:
                        raise TooLargeError
                    sink.write(part)
                    progress.update(len(part))
        if self.size_bytes is not None and start < self.size_bytes:
            raise IncompleteError(f"{self.name} ended after {start:,} of {self.size_bytes:,} bytes")

    def _progress_bar(self, start: int) -> Any:
        options = {"unit": "B", "unit_scale": True, "total": self.size_bytes, "initial": start}
        options |= {"desc": printable(self.name, 40), "disable": not shows_progress()}
        return tqdm(**options)  # type: ignore[no-untyped-call]


def pauses_s(draw: Callable[[float, float], float] = random.uniform) -> Iterator[float]:
    """Yield the pause before each retry: exponential backoff, half of it random."""
    for turn in range(MAX_TRIES - 1):
        pause_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**turn)
        yield draw(pause_s / 2, pause_s)


def is_transient(error: Exception) -> bool:
    """Return whether a retry may succeed."""
    if isinstance(error, errors.HfHubHTTPError):
        return error.response.status_code in _TRANSIENT_STATUSES
    return True


@contextmanager
def _opened(
    url: str,
    token: str | None,
    *,
    timeout_s: float,
    params: Mapping[str, str] | None = None,
    headers: Mapping[str, str] | None = None,
) -> Iterator[Any]:
    """Open a GET request and yield its response; raises HfHubHTTPError."""
    all_headers = {**build_hf_headers(token=token), **(headers or {})}
    with get_session().stream(
        "GET",
        url,
        headers=all_headers,
        params=dict(params) if params else None,
        timeout=timeout_s,
        follow_redirects=True,
    ) as response:
        if response.status_code >= 400:
            hf_raise_for_status(_bounded_error(response))
        yield response


def _bounded_error(response: Any) -> Any:
    """Return an error response with a truncated body and only _ERROR_HEADERS."""
    content = b""
    for part in response.iter_bytes(chunk_size=_MAX_ERROR_BYTES):
        content += part
        if len(content) >= _MAX_ERROR_BYTES:
            break
    headers = {name: response.headers[name] for name in _ERROR_HEADERS if name in response.headers}
    return type(response)(
        response.status_code,
        headers=headers,
        content=content[:_MAX_ERROR_BYTES],
        request=response.request,
    )
