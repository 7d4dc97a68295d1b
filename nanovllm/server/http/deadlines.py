"""How long a request may take: what the server allows, or what its client allows it where that is less.

The client says so by a header, which every route understands alike and the official clients can send (`extra_headers`).
"""

import re

from starlette.requests import Request

from nanovllm.engine.request_handle import Deadline
from nanovllm.errors import InvalidRequestError
from nanovllm.server.http.errors import shorten
from nanovllm.server.http.request_log import record_of

TIMEOUT_HEADER = "x-request-timeout-s"
MAX_TIMEOUT_S = 86_400.0  # a day
_NUMBER = re.compile(r"\d{1,6}(\.\d{1,6})?", re.ASCII)


def deadline_of(request: Request) -> Deadline | None:
    """When the answer to a request is due, counted from its arrival; None where nobody said. Raises InvalidRequestError.

    One object a request, however often it is asked for: its parts may be submitted one after the other.
    """
    record = record_of(request)
    if record.deadline is not None:
        return record.deadline
    limits = [
        limit
        for limit in (
            request.app.state.request_timeout_s,
            _asked(request.headers.getlist(TIMEOUT_HEADER)),
        )
        if limit is not None
    ]
    record.deadline = Deadline.after(min(limits), record.arrived_s) if limits else None
    return record.deadline


def _asked(values: list[str]) -> float | None:
    if not values:
        return None
    timeout_s = float(values[0]) if len(values) == 1 and _NUMBER.fullmatch(values[0]) else 0.0
    if not 0 < timeout_s <= MAX_TIMEOUT_S:
        given = shorten(", ".join(values), 40)
        raise InvalidRequestError(
            f"{TIMEOUT_HEADER} is {given!r} but must be one number of seconds above 0 and up to {MAX_TIMEOUT_S:g}, such as 30 or 2.5",
            param=TIMEOUT_HEADER,
        )
    return timeout_s
