"""HTTP transfers from the hub with size limits, and retries with exponential backoff.

The hub, or the mirror in HF_ENDPOINT, is not trusted: an endless response must fill neither memory
nor disk. huggingface-hub's transfers have no such limit, so only its session and its errors are
used here.
"""

import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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


def fetch(
    url: str,
    into: BinaryIO,
    limit_bytes: int,
    *,
    token: str | None,
    size_bytes: int | None = None,
    name: str = "",
) -> None:
    """Append the rest of a file to `into`; retry transient errors.

    Args:
        limit_bytes: of the whole file.
        size_bytes: the declared size, if known.
        name: title of the progress bar, which is shown on terminals only.

    Raises:
        TooLargeError: the file has more than `limit_bytes` bytes.
        IncompleteError: it ended early in every try.
        HfHubHTTPError: the hub answers with an error; other HTTP_ERROR: no connection.
    """
    pauses = pauses_s()
    done = into.seek(0, 2)
    while True:
        try:
            _fetch_rest(url, into, limit_bytes, token=token, size_bytes=size_bytes, name=name)
            return
        except (HTTP_ERROR, IncompleteError) as error:
            if not is_transient(error):
                raise
            if into.tell() - done >= PROGRESS_BYTES:
                pauses, done = pauses_s(), into.tell()
            pause_s = next(pauses, None)
            if pause_s is None:
                raise
            time.sleep(pause_s)


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


def _fetch_rest(
    url: str,
    into: BinaryIO,
    limit_bytes: int,
    *,
    token: str | None,
    size_bytes: int | None,
    name: str,
) -> None:
    start = into.seek(0, 2)
    if size_bytes is not None and start == size_bytes > 0:
        return
    headers = {"Range": f"bytes={start}-"} if start else {}
    with _opened(
        url, token, headers=headers, timeout_s=constants.HF_HUB_DOWNLOAD_TIMEOUT
    ) as response:
        if start and response.status_code != 206:  # the server ignored the range
            start = into.seek(0)
            into.truncate()
        with _progress_bar(name, size_bytes, start) as progress:
            for part in response.iter_bytes(chunk_size=constants.DOWNLOAD_CHUNK_SIZE):
                start += len(part)
                if start > limit_bytes:
                    raise TooLargeError
                into.write(part)
                progress.update(len(part))
    if size_bytes is not None and start < size_bytes:
        raise IncompleteError(f"{name} ended after {start:,} of {size_bytes:,} bytes")


def _progress_bar(name: str, size_bytes: int | None, start: int) -> Any:
    options = {"unit": "B", "unit_scale": True, "total": size_bytes, "initial": start}
    options |= {"desc": printable(name, 40), "disable": not shows_progress()}
    return tqdm(**options)  # type: ignore[no-untyped-call]


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
