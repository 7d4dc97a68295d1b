"""EngineReplica: one replica, which is the unchanged server without its socket."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from ray import serve
from starlette.types import Message

from nanovllm.cli.serving import load_server
from nanovllm.deploy.asgi import respond
from nanovllm.deploy.prefix_policy import NUM_BLOCKS
from nanovllm.deploy.settings import ModelSettings
from nanovllm.engine.async_engine import AsyncEngine, EngineState

WAITING_METRIC = "waiting_requests"


class EngineReplica:
    """Runs the application of `nanovllm serve` for requests that the ingress passes on."""

    async def __init__(self, model: ModelSettings) -> None:  # type: ignore[misc]
        """Load the model; returns once the engine has run a step.

        Raises:
            NanovllmError: the model cannot be loaded.
        """
        server = load_server(model.serve_options())
        self._app, self._engine, self._metrics = server.app, server.engine, server.metrics
        self._stream_interval_s = model.stream_interval_s
        await self._engine.start()
        await self._engine.wait_until_ready()

    async def respond(
        self, scope: dict[str, Any], body: bytes, prefix_hashes: Sequence[bytes] = ()
    ) -> AsyncGenerator[Message | bytes, None]:
        """Yield the response to a request, see asgi.py; `prefix_hashes` is for the router only."""
        pieces = respond(self._app, scope, body, self._stream_interval_s)
        try:
            async for piece in pieces:
                yield piece
        finally:
            await pieces.aclose()

    async def metrics(self) -> tuple[str, str]:
        """Return Ray Serve's id of this replica, and the text of /metrics."""
        return serve.get_replica_context().replica_id.unique_id, self._metrics.render().decode()

    def check_health(self) -> None:
        """Raise RuntimeError once the engine has failed; Ray Serve then replaces the replica."""
        if self._engine.state is not EngineState.READY:
            raise RuntimeError(self._engine.problem)

    def record_routing_stats(self) -> dict[str, int]:
        """Return the number of blocks of the KV cache; Ray Serve passes it to the routers."""
        return {NUM_BLOCKS: self._engine.engine.blocks.num_blocks}

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Return the admission controller's measure: the share of the queue's room that is taken.

        Ray Serve calls this; scaling.py uses it.
        """
        room = self._engine.admission.stats()
        share = room.choices / room.max_choices
        if room.max_tokens:
            share = max(share, room.tokens / room.max_tokens)
        return {
            WAITING_METRIC: float(self._engine.stats().num_requests_waiting),
            "queue_share": share,
        }

    async def __del__(self) -> None:
        """Stop the engine; Ray Serve awaits this when it stops the replica."""
        engine: AsyncEngine | None = getattr(self, "_engine", None)
        if engine is not None:
            await asyncio.wait_for(engine.stop(), 20)
