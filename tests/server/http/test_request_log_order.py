"""The order of ASGI events tells whether a client has left."""

import asyncio

import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanovllm.server.http.request_log import RequestLogMiddleware
from tests.support.log_lines import LogLines


async def start(send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})


async def answers(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers in two pieces and then receives, as servers report there that the client has left."""
    await start(send)
    await send({"type": "http.response.body", "body": b"a", "more_body": True})
    await send({"type": "http.response.body", "body": b"b"})
    await receive()


async def gives_up(scope: Scope, receive: Receive, send: Send) -> None:
    """Ends without having answered, as a stream does whose client reads nothing."""
    await start(send)
    await send({"type": "http.response.body", "body": b"a", "more_body": True})


async def finds_nobody(scope: Scope, receive: Receive, send: Send) -> None:
    await receive()
    await start(send)
    await send({"type": "http.response.body", "body": b""})


async def breaks(scope: Scope, receive: Receive, send: Send) -> None:
    await start(send)
    raise LookupError("planted")


@pytest.mark.parametrize(
    ("app", "client_gone"),
    [(answers, False), (gives_up, True), (finds_nobody, True), (breaks, False)],
)
def test_client_gone_depends_on_the_order_of_events(
    log: LogLines, app: ASGIApp, *, client_gone: bool
) -> None:
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    async def run() -> None:
        scope = {
            "type": "http",
            "method": "GET",
            "path": "/",
            "headers": [(b"x-request-id", b"order")],
        }
        await RequestLogMiddleware(app, log_requests=True)(scope, receive, send)

    if app is breaks:
        with pytest.raises(LookupError, match="planted"):
            asyncio.run(run())
    else:
        asyncio.run(run())
    line = log.about("order")
    assert (line["status"], line["client_gone"]) == (200, client_gone)
    assert sent[0]["headers"] == [(b"x-request-id", b"order")]
