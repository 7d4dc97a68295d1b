"""Name a pause in every response that starts during it: `x-nanovllm-engine: paused`.

A paused engine keeps its clients waiting, and nothing else tells them why.
"""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanovllm.engine.async_engine import AsyncEngine, EngineState

HEADER = b"x-nanovllm-engine"


class PausedHeaderMiddleware:
    """Add the header while the engine is paused. Plain ASGI, so that nothing is buffered."""

    def __init__(self, app: ASGIApp, engine: AsyncEngine) -> None:
        """Watch `engine`, which need not be ready yet."""
        self._app = app
        self._engine = engine

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and complete the head of its response."""

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start" and self._is_paused():
                headers = [*message.get("headers", ()), (HEADER, b"paused")]
                message = {**message, "headers": headers}
            await send(message)

        await self._app(scope, receive, send_named if scope["type"] == "http" else send)

    def _is_paused(self) -> bool:
        return self._engine.state is EngineState.READY and self._engine.inspector.is_paused
