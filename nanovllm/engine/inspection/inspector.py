"""Inspector: watches an engine from the event loop, pauses it and steps it.

Every question is a call that the engine's thread runs between two steps; the answer is frozen.
Steps are recorded only while somebody watches: a stream holds a `watch`, and a single question
counts as a watcher for LEASE_S. A pause ends when nobody has watched for LEASE_S, so an abandoned
page never stops a server, and after MAX_PAUSE_S whoever watches.
"""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Literal, TypeAlias

from nanovllm.engine.engine import Engine
from nanovllm.engine.engine_thread import EngineThread
from nanovllm.engine.inspection.recorder import StepRecorder
from nanovllm.engine.inspection.state import InspectedEngine, inspect_engine
from nanovllm.errors import QueueFullError

MAX_WATCHERS = 16
LEASE_S = 10.0
"""Time after the last watcher until recording and a pause end."""
MAX_PAUSE_S = 300.0
"""Time after which a pause ends; steps and commands during it do not extend it."""
Action: TypeAlias = Literal["pause", "resume", "step"]


class Inspector:
    """Inspects the engine of one EngineThread. Use it from the event loop."""

    def __init__(self, thread: EngineThread) -> None:
        """Inspect the engine of `thread`; nothing is recorded yet."""
        self.lease_s, self.max_pause_s = LEASE_S, MAX_PAUSE_S
        self._thread = thread
        self._watchers: dict[object, Callable[[], None]] = {}
        self._recorder: StepRecorder | None = None  # used on the engine's thread only
        self._is_recording = False
        self._lease: asyncio.TimerHandle | None = None
        self._pause_end: asyncio.TimerHandle | None = None

    @property
    def is_paused(self) -> bool:
        """Whether the engine is paused."""
        return self._thread.is_paused

    @property
    def num_watchers(self) -> int:
        """Number of open streams."""
        return len(self._watchers)

    @property
    def pause_left_s(self) -> float | None:
        """Time until the pause ends by itself; None while the engine runs."""
        if not self.is_paused or self._pause_end is None:
            return None
        return max(self._pause_end.when() - asyncio.get_running_loop().time(), 0.0)

    @property
    def version(self) -> object:
        """A value that differs from an earlier one if the state has changed since."""
        return self._thread.num_commands, self._thread.is_paused, self._thread.snapshot

    def watch(self, on_release: Callable[[], None]) -> Callable[[], None]:
        """Begin a watch, and return the function that ends it.

        `release` calls `on_release`, after which the watch should end. Raises QueueFullError if
        MAX_WATCHERS watch.
        """
        if len(self._watchers) >= MAX_WATCHERS:
            raise QueueFullError(
                f"{MAX_WATCHERS} streams of the engine's events are open, the limit; close one"
            )
        watcher = object()
        self._watchers[watcher] = on_release
        self._renew()

        def unwatch() -> None:
            del self._watchers[watcher]
            self._renew()

        return unwatch

    async def state(self, *, max_steps: int, shows_prompts: bool = False) -> InspectedEngine:
        """Return the state of the engine; raises EngineNotReadyError if it is stopped.

        Args:
            max_steps: maximum number of step records; at most MAX_RECORDS are kept.
            shows_prompts: include the prompts' token ids.
        """
        self._renew()
        return await self._thread.call(
            lambda engine: inspect_engine(
                engine,
                self._recorder,
                max_steps=max_steps,
                is_paused=self._thread.is_paused,
                shows_prompts=shows_prompts,
            )
        )

    async def control(self, action: Action) -> tuple[bool, int]:
        """Pause or resume the engine, or pause it and run one step.

        Returns whether the engine is paused, and the number of its last step. Commands are
        processed during a pause, so requests can be added and aborted. Raises EngineNotReadyError
        if the engine is stopped.
        """
        self._renew()
        thread = self._thread

        def run(engine: Engine) -> int:
            self._set_paused(is_paused=action != "resume")
            if action == "step":
                thread.step(engine)
            return engine.num_steps

        num_steps = await thread.call(run)
        if action == "resume":
            self._cancel_pause_end()
        elif self._pause_end is None:
            loop = asyncio.get_running_loop()
            self._pause_end = loop.call_later(self.max_pause_s, self.end_pause)
        return thread.is_paused, num_steps

    def release(self) -> None:
        """End all watches and a pause, so that connections close and requests finish."""
        self._end_lease()
        for on_release in list(self._watchers.values()):
            on_release()

    def end_pause(self) -> None:
        """Let the engine run again, if it is paused."""
        self._cancel_pause_end()
        self._thread.run(lambda _: self._set_paused(is_paused=False))

    def _cancel_pause_end(self) -> None:
        if self._pause_end is not None:
            self._pause_end.cancel()
            self._pause_end = None

    def _set_paused(self, *, is_paused: bool) -> None:
        """Pause the engine or let it run; runs on the engine's thread."""
        self._thread.is_paused = is_paused

    def _renew(self) -> None:
        """Begin recording if necessary, and the lease anew if no stream watches."""
        if self._lease is not None:
            self._lease.cancel()
            self._lease = None
        if not self._is_recording:
            self._is_recording = True
            self._thread.run(partial(self._record, is_recording=True))
        if not self._watchers:
            self._lease = asyncio.get_running_loop().call_later(self.lease_s, self._end_lease)

    def _end_lease(self) -> None:
        """Stop recording, and end a pause."""
        if self._lease is not None:
            self._lease.cancel()
            self._lease = None
        self._cancel_pause_end()
        if self._is_recording:
            self._is_recording = False
            self._thread.run(partial(self._record, is_recording=False))

    def _record(self, engine: Engine, *, is_recording: bool) -> None:
        """Begin or end recording; runs on the engine's thread."""
        if is_recording:
            self._recorder = StepRecorder(engine.scheduler, engine.num_steps)
        else:
            self._recorder = None
            self._set_paused(is_paused=False)
        engine.scheduler.observer = self._recorder
