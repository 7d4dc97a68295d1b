"""Request deadlines: the server's timeout, or the client's if that is shorter.

The client sends a header, which every POST route reads and the official clients can set
(`extra_headers`). GET routes have no deadline.
"""

import re

from starlette.requests import Request

from nanovllm.deadlines import Deadline
from nanovllm.errors import InvalidRequestError
from nanovllm.server.http.errors import shorten
from nanovllm.server.http.request_log import record_of

TIMEOUT_HEADER = "x-request-timeout-s"
MAX_TIMEOUT_S = 86_400.0  # a day
_NUMBER = re.compile(r"\d{1,6}(\.\d{1,6})?", re.ASCII)


def deadline_of(request: Request) -> Deadline | None:
    """Return a request's deadline, counted from its arrival, or None; raises InvalidRequestError.

    All parts of a request share one Deadline.
    """
    state = request.scope["state"]
    if "deadline" not in state:
        server_s: float | None = request.app.state.request_timeout_s
        client_s = _client_timeout_s(request.headers.getlist(TIMEOUT_HEADER))
        timeouts = [timeout_s for timeout_s in (server_s, client_s) if timeout_s is not None]
        arrived_s = record_of(request).arrived_s
        state["deadline"] = Deadline.after(min(timeouts), arrived_s) if timeouts else None
    deadline: Deadline | None = state["deadline"]
    return deadline


def _client_timeout_s(values: list[str]) -> float | None:
    if not values:
        return None
    timeout_s = float(values[0]) if len(values) == 1 and _NUMBER.fullmatch(values[0]) else 0.0
    if not 0 < timeout_s <= MAX_TIMEOUT_S:
        raise InvalidRequestError(
            f"{TIMEOUT_HEADER} is {shorten(', '.join(values), 40)!r} but must be one number of "
            f"seconds above 0 and up to {MAX_TIMEOUT_S:g}, such as 30 or 2.5",
            param=TIMEOUT_HEADER,
        )
    return timeout_s
