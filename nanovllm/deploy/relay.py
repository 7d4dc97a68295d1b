"""Pass an HTTP request to a replica, and its response back as it comes.

A client gets exactly one response. If the replica dies before the response has begun, the client
gets 503 with Retry-After, which the official clients retry. If it dies in the middle of a stream,
the stream ends with an error event.
"""

import json
import logging
from collections.abc import Sequence
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from nanovllm.deploy.asgi import passed_on
from nanovllm.server.http.errors import error_body, error_response

logger = logging.getLogger(__name__)

_DIED = "the replica that computed this request has ended; send the request again"


async def relay(
    handle: DeploymentHandle,
    scope: Scope,
    body: bytes,
    hashes: Sequence[bytes],
    receive: Receive,
    send: Send,
) -> None:
    """Send the response of one replica; close the call if the client disconnects."""
    arguments: dict[str, Any] = {"prefix_hashes": tuple(hashes)} if hashes else {}
    start: Message | None = None
    response = None
    try:
        response = handle.options(stream=True).respond.remote(passed_on(scope), body, **arguments)
        async for part in response:
            if isinstance(part, bytes):
                await send({"type": "http.response.body", "body": part, "more_body": True})
            else:
                start = part
                await send(part)
        await send({"type": "http.response.body", "body": b"", "more_body": False})
    except (RayError, RayServeException) as error:
        if start is None:
            await failure_response(error)(scope, receive, send)
        else:
            await _end_stream(start, send)
    finally:
        if response is not None:
            response.cancel()  # has no effect on a response that is complete


async def _end_stream(start: Message, send: Send) -> None:
    """Report the end of a replica in the middle of its response, as far as its form allows."""
    headers = {name.lower(): value for name, value in start["headers"]}
    if not headers.get(b"content-type", b"").startswith(b"text/event-stream"):
        raise ConnectionAbortedError(_DIED)  # the client sees an incomplete body
    event = b"\n\ndata: " + json.dumps(error_body(503, _DIED)).encode() + b"\n\n"
    await send({"type": "http.response.body", "body": event, "more_body": False})


async def ask(handle: DeploymentHandle, scope: Scope) -> Response:
    """Return the whole response of one replica to a request without a body."""
    start: Message = {"status": 503, "headers": []}
    chunks: list[bytes] = []
    try:
        async for part in handle.options(stream=True).respond.remote(passed_on(scope), b""):
            if isinstance(part, bytes):
                chunks.append(part)
            else:
                start = part
    except (RayError, RayServeException) as error:
        return failure_response(error)
    response = Response(b"".join(chunks), start["status"])
    response.raw_headers = list(start["headers"])
    return response


def failure_response(error: Exception) -> Response:
    """Return the response for a request that no replica has answered."""
    if isinstance(error, BackPressureError):
        return error_response(
            429,
            "every replica is full and so is the queue before them; retry later, or raise "
            "max_queued_requests or the number of replicas",
        )
    logger.warning("a replica ended in the middle of a request: %s", type(error).__name__)
    return error_response(503, _DIED)
