"""What is checked before a request is read: its key, how large it may be and how long it may take, and which web pages it may come from.

HEAD becomes GET here too. Plain ASGI, so that nothing is buffered on the way.
"""

import asyncio
import hashlib
import hmac
from collections.abc import Awaitable, Callable, Sequence

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanovllm.server.docs_page import PUBLIC_PATHS
from nanovllm.server.errors import error_response

OPEN_PATHS = PUBLIC_PATHS | {"/health"}
"""Paths that need no API key."""
MAX_BODIES_BYTES = 256 << 20
"""Memory for the bodies of all requests together, without the first FREE_BODY_BYTES of each."""
FREE_BODY_BYTES = 1 << 16
_BODIES_RETRY_S = 5


class ApiKeyMiddleware:
    """Lets requests pass that carry `Authorization: Bearer KEY` with one of the keys; OPEN_PATHS need none."""

    def __init__(self, app: ASGIApp, api_keys: Sequence[str]) -> None:
        """Guard `app` by any number of keys."""
        self._app = app
        self._digests = [_digest(key.encode()) for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, or answer 401."""
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            scheme, _, key = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not self._is_known(key.strip()):
                message = "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'"
                await error_response(401, message, headers={"www-authenticate": "Bearer"})(
                    scope, receive, send
                )
                return
            scope["state"]["record"].client = _digest(key.strip()).hex()
        await self._app(scope, receive, send)

    def _is_known(self, given: bytes) -> bool:
        """Whether it is one of the keys; how long this takes says neither which nor how much of one was right, nor how long they are."""
        digest = _digest(given)
        matches = [
            hmac.compare_digest(digest, known) for known in self._digests
        ]  # all of them, also after one that matches
        return any(matches)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class HeadMiddleware:
    """Answers HEAD as GET is answered, without the content (RFC 9110, section 9.3.2).

    Load balancers and uptime checks send it.
    """

    def __init__(self, app: ASGIApp) -> None:
        """Answer for `app`, whose routes know GET only."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on; of an answer to HEAD only the head."""
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        async def send_head(message: Message) -> None:
            if message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        await self._app({**scope, "method": "GET"}, receive, send_head)


class CrossOriginMiddleware(CORSMiddleware):
    """Tells browsers which web pages may read answers (CORS, https://fetch.spec.whatwg.org/#http-cors-protocol).

    Browsers ask first, by a request of their own that carries no key; so this has to come before the check of the key.
    """

    def __init__(self, app: ASGIApp, allowed_origins: Sequence[str]) -> None:
        """Allow these origins, all of them where one is `*`. Keys come in a header and not as cookies, so no credentials are allowed."""
        exposed = ("x-request-id", "retry-after")
        super().__init__(
            app,
            allowed_origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            expose_headers=exposed,
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        """The answer to a browser that asks first; a refusal in the one form of all errors."""
        response = super().preflight_response(request_headers)
        if response.status_code == 200:
            return response
        kept = {
            name: value
            for name, value in response.headers.items()
            if name not in ("content-length", "content-type")
        }
        return error_response(
            response.status_code,
            f"the request of a web page is refused: {bytes(response.body).decode()}",
            headers=kept,
        )


class BodyLimitMiddleware:
    """Refuses bodies over a limit with 413, by their declared length or, where none is declared, while they arrive; and slow ones with 408.

    A request holds its body until its answer has ended. Where all bodies together are too large, one more is refused with 429; small
    bodies do not count, and are always read.
    """

    def __init__(
        self,
        app: ASGIApp,
        max_body_bytes: int,
        max_body_s: float,
        max_bodies_bytes: int = MAX_BODIES_BYTES,
    ) -> None:
        """Let bodies of up to `max_body_bytes` pass that are there within `max_body_s` of their head."""
        self._app = app
        self._limit = max_body_bytes
        self._limit_s = max_body_s
        self._max_held_bytes = max(max_bodies_bytes, max_body_bytes)
        self._held_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, or answer 413, 408 or 429."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"")
        if declared.isdigit() and int(declared[:20]) > self._limit:
            await self._refuse_large(scope, receive, send)
            return
        body = _HeldBody()
        try:
            await self._app(scope, self._watched(receive, body), send)
        except _BodyTooLargeError:
            await self._refuse_large(scope, receive, send)
        except _BodiesTooLargeError:
            message = (
                f"the bodies of unfinished requests have more than {self._max_held_bytes} bytes together, the limit; "
                f"try again in {_BODIES_RETRY_S} s"
            )
            await error_response(429, message, headers={"retry-after": str(_BODIES_RETRY_S)})(
                scope, receive, send
            )
        except _BodyTooSlowError:
            message = f"the request's body was not complete after {self._limit_s:g} s; send it faster, or less at once"
            await error_response(408, message, headers={"connection": "close"})(
                scope, receive, send
            )
        finally:
            self._held_bytes -= body.num_bytes

    def _watched(self, receive: Receive, body: "_HeldBody") -> Callable[[], Awaitable[Message]]:
        seen, is_complete = 0, False
        deadline_s = asyncio.get_running_loop().time() + self._limit_s

        async def watched() -> Message:
            nonlocal seen, is_complete
            if is_complete:
                return await receive()  # which waits for the client to go
            try:
                message = await asyncio.wait_for(
                    receive(), deadline_s - asyncio.get_running_loop().time()
                )
            except asyncio.TimeoutError as error:
                raise _BodyTooSlowError from error
            is_complete = not message.get("more_body", False)
            seen += len(message.get("body", b""))
            if seen > self._limit:
                raise _BodyTooLargeError
            self._hold(body, seen - FREE_BODY_BYTES)
            return message

        return watched

    def _hold(self, body: "_HeldBody", num_bytes: int) -> None:
        """Count a body that has so many bytes by now; raises _BodiesTooLargeError."""
        more = num_bytes - body.num_bytes
        if num_bytes <= 0 or more <= 0:
            return
        if self._held_bytes + more > self._max_held_bytes:
            raise _BodiesTooLargeError
        self._held_bytes += more
        body.num_bytes = num_bytes

    async def _refuse_large(self, scope: Scope, receive: Receive, send: Send) -> None:
        message = (
            f"the request's body is larger than the limit of {self._limit} bytes; send less at once"
        )
        await error_response(413, message)(
            scope, receive, send
        )  # closing at once could cost the client the answer: it is still sending


class _HeldBody:
    """Bytes of one body that count."""

    __slots__ = ("num_bytes",)

    def __init__(self) -> None:
        self.num_bytes = 0


class _BodyTooLargeError(BaseException):
    """Passes through the application, which answers every Exception itself."""


class _BodyTooSlowError(BaseException):
    """Passes as _BodyTooLargeError does."""


class _BodiesTooLargeError(BaseException):
    """Passes as _BodyTooLargeError does."""
