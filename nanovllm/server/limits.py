"""What is checked before a request is read: its key, and how large it may be. Plain ASGI, so that nothing is buffered on the way."""

import hmac
from collections.abc import Awaitable, Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanovllm.server.errors import error_response

OPEN_PATHS = frozenset({"/health"})


class ApiKeyMiddleware:
    """Lets requests pass that carry `Authorization: Bearer KEY`; /health needs none."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        """Guard `app` by one key."""
        self._app = app
        self._expected = api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, or answer 401."""
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS and scope["method"] != "OPTIONS":
            scheme, _, given = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self._expected):
                message = "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'"
                await error_response(401, message, headers={"www-authenticate": "Bearer"})(scope, receive, send)
                return
        await self._app(scope, receive, send)


class BodyLimitMiddleware:
    """Refuses bodies over a limit with 413, by their declared length or, where none is declared, while they arrive."""

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        """Let bodies of up to `max_body_bytes` pass."""
        self._app = app
        self._limit = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, or answer 413."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"")
        if declared.isdigit() and int(declared[:20]) > self._limit:
            await self._refuse(scope, receive, send)
            return
        try:
            await self._app(scope, self._counting(receive), send)
        except _BodyTooLargeError:
            await self._refuse(scope, receive, send)

    def _counting(self, receive: Receive) -> Callable[[], Awaitable[Message]]:
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._limit:
                raise _BodyTooLargeError
            return message

        return counted

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        message = f"the request's body is larger than the limit of {self._limit} bytes; send less at once"
        await error_response(413, message)(scope, receive, send)  # closing at once could cost the client the answer: it is still sending


class _BodyTooLargeError(BaseException):
    """Passes through the application, which answers every Exception itself."""
