"""/health of the application: the running replicas of each model, now or as last known.

The controller of Ray Serve knows them. It needs Ray's head, while the ingress and the replicas
answer requests without it. A controller that does not answer is therefore no reason for a balancer
to take the application out of service; `/health?deep=1` reports it.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence

from starlette.responses import JSONResponse, Response

from nanovllm.server.http.errors import error_response

logger = logging.getLogger(__name__)

_CONTROLLER_TIMEOUT_S = 3.0
_FRESH_S = 0.5
"""Time that an answer waits for the controller if an earlier state is known."""


class ReplicaHealth:
    """Answers /health from the numbers of running replicas."""

    def __init__(self, count_running: Callable[[], Sequence[int]]) -> None:
        """Ask `count_running`, which may block, for the running replicas of each model."""
        self._count_running = count_running
        self._asked: asyncio.Future[bool] | None = None
        self._counts: Sequence[int] | None = None

    async def response(self, *, is_deep: bool) -> Response:
        """Return 200 while each model has a running replica, otherwise 503.

        Args:
            is_deep: return 503 also if the controller does not answer within 3 s. Otherwise the
                last known numbers decide, if there are any.
        """
        if self._asked is None or self._asked.done():  # one thread at most waits for an answer
            self._asked = asyncio.ensure_future(self._ask())
        asked = self._asked
        needs_answer = is_deep or self._counts is None
        await asyncio.wait({asked}, timeout=_CONTROLLER_TIMEOUT_S if needs_answer else _FRESH_S)
        is_answered = asked.done() and asked.result()
        if self._counts is None or (is_deep and not is_answered):
            return error_response(503, "Ray Serve's controller does not answer")
        if all(self._counts):
            return JSONResponse({"status": "ready"})
        return error_response(503, "a model has no running replica")

    async def _ask(self) -> bool:
        """Ask the controller for the numbers; return whether it has answered."""
        try:
            self._counts = await asyncio.to_thread(self._count_running)
        except Exception as error:  # noqa: BLE001 - of Ray's control plane, of any kind
            logger.warning("Ray Serve's controller does not answer: %s", error)
            return False
        return True
