"""StateFeed: one stream of states for all watchers.

A frame is made at most ten times a second, and only after a change. It is made once for all
watchers. While requests run, making frames takes at most MAX_SHARE of the processor time of the
server; beyond that they become rarer, down to one a second. Each watcher has room for one frame:
one that reads slowly misses frames, and memory does not grow.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable

from nanovllm.engine.inspection.state import InspectedEngine
from nanovllm.errors import EngineNotReadyError
from nanovllm.server.http.json_io import dump_json
from nanovllm.server.inspector.documents import StateDescriber, step_document
from nanovllm.server.inspector.response_types import EngineStateEvent
from nanovllm.server.service import Service

MIN_INTERVAL_S, MAX_INTERVAL_S = 0.1, 1.0
MAX_SHARE = 0.002
"""Maximum processor time of making frames, as a fraction of that of the process.

Sending them and recording the steps takes about as much again."""
MAX_STEPS = 16
_LARGE = 4096
"""Items from which a frame is written on a worker thread."""
_CLIENT = "inspector"  # the feed's queue among those of the clients

logger = logging.getLogger(__name__)


class StateFeed:
    """Sends the states of one engine to its watchers. For the event loop."""

    def __init__(self, service: Service, describer: StateDescriber) -> None:
        """Make no frame before the first watcher."""
        self._engine = service.engine
        self._describer = describer
        self._work = service.work
        self._shows_prompts = service.settings.inspector_shows_prompts
        self._watchers: set[asyncio.Queue[bytes | None]] = set()
        self._task: asyncio.Task[None] | None = None
        self._version: object = None
        self._last_step: int | None = None
        self._is_active = self._is_busy = False

    def open(self, count: int | None) -> tuple[AsyncGenerator[bytes, None], Callable[[], None]]:
        """Return a stream of at most `count` frames, the first one at once, and what closes it.

        Raises QueueFullError if too many watch, and EngineNotReadyError.
        """
        queue: asyncio.Queue[bytes | None] = asyncio.Queue(maxsize=1)
        unwatch = self._engine.inspector.watch(lambda: _put(queue, None))

        def close() -> None:
            if queue in self._watchers:
                self._watchers.discard(queue)
                unwatch()

        self._watchers.add(queue)
        self._version = None
        if self._task is None:
            self._last_step = None
            self._task = asyncio.create_task(self._run())
        return _frames(queue, count), close

    async def _run(self) -> None:
        """Make frames while there are watchers."""
        try:
            paid_s = late_s = 0.0  # when the last frame is paid, in processor time; or else
            while self._watchers:
                inspector = self._engine.inspector
                version = inspector.version
                is_paid = time.process_time() >= paid_s or time.monotonic() >= late_s
                if (is_paid or inspector.is_paused) and (
                    version != self._version or self._is_active
                ):
                    self._version = version
                    cost_s = await self._send()
                    paid_s = time.process_time() + cost_s / MAX_SHARE
                    late_s = time.monotonic() + (MAX_INTERVAL_S if self._is_busy else 0.0)
                await asyncio.sleep(MIN_INTERVAL_S)
        except EngineNotReadyError:
            pass
        except Exception:
            logger.exception("the stream of the engine's states has failed")
        finally:
            self._task = None
            for queue in self._watchers:
                _put(queue, None)

    async def _send(self) -> float:
        """Send a frame to all watchers; return the processor time that it has taken."""
        state = await self._engine.inspector.state(
            max_steps=MAX_STEPS, shows_prompts=self._shows_prompts
        )
        began_s = time.thread_time()
        after = state.num_steps if self._last_step is None else self._last_step
        self._last_step = state.num_steps
        document = self._describer.describe(state)
        self._is_active = any(document["rates"].values())
        self._is_busy = state.stats.num_requests_running > 0 and not state.is_paused
        if _num_items(state) >= _LARGE:
            frame, write_s = await self._work.write(
                _CLIENT, lambda: _timed_frame(document, state, after)
            )
        else:
            frame, write_s = _frame(document, state, after), 0.0
        for queue in self._watchers:
            _put(queue, frame)
        return state.build_s + time.thread_time() - began_s + write_s


async def _frames(
    queue: "asyncio.Queue[bytes | None]", count: int | None = None
) -> AsyncGenerator[bytes, None]:
    """Yield at most `count` frames, until the engine is stopped."""
    while count is None or count > 0:
        frame = await queue.get()
        if frame is None:
            return
        yield frame
        count = None if count is None else count - 1


def _timed_frame(
    document: EngineStateEvent, state: InspectedEngine, after_step: int
) -> tuple[bytes, float]:
    """Return a frame, and the processor time of writing it."""
    began_s = time.thread_time()
    frame = _frame(document, state, after_step)
    return frame, time.thread_time() - began_s


def _frame(document: EngineStateEvent, state: InspectedEngine, after_step: int) -> bytes:
    """Return the server-sent event of a document, with the steps after `after_step`."""
    records = [record for record in state.steps if record.step > after_step]
    document["steps"] = [step_document(record, state.started_s) for record in records]
    document["steps_omitted"] = state.num_steps - after_step - len(records)
    return b"event: state\ndata: %s\n\n" % dump_json(document)


def _num_items(state: InspectedEngine) -> int:
    sequences = sum(len(record.sequences) for record in state.steps)
    return 15 * len(state.requests) + 2 * len(state.blocks.cells) + 5 * sequences


def _put(queue: "asyncio.Queue[bytes | None]", frame: bytes | None) -> None:
    """Put a frame into a watcher's queue; it replaces one that was not taken, except the end."""
    if queue.full() and queue.get_nowait() is None:
        frame = None
    queue.put_nowait(frame)
