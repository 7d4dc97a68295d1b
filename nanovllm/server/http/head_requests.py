"""HEAD for load balancers and uptime checks (RFC 9110, section 9.3.2)."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send


class HeadMiddleware:
    """Answer HEAD as GET, without the response body."""

    def __init__(self, app: ASGIApp) -> None:
        """Wrap `app`, whose routes know GET only."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run HEAD as GET and empty its body."""
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        async def send_headers(message: Message) -> None:
            if message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        # A route whose stream does not end by itself ends it for HEAD.
        await self._app({**scope, "method": "GET", "is_head": True}, receive, send_headers)
