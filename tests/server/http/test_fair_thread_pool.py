"""FairThreadPool: clients take turns, cancelled calls never begin, closing waits for no thread."""

import asyncio
import gc
import threading
import weakref
from collections.abc import Callable
from functools import partial

import pytest
from starlette.requests import Request

from nanovllm.errors import (
    EngineFaultError,
    EngineNotReadyError,
    InvalidRequestError,
    QueueFullError,
    RequestTimeoutError,
)
from nanovllm.server.http.event_stream import unless_disconnected
from nanovllm.server.http.worker_pools import FairThreadPool
from tests.support.serving import TIMEOUT_S


class Held:
    """A pool whose only thread is blocked until `let_go`; other calls wait."""

    def __init__(self, max_waiting: int = 100) -> None:
        self.pool = FairThreadPool("test", 1, max_waiting)
        self.begun: list[str] = []
        self._go = threading.Event()
        self._is_busy = asyncio.Event()

    async def __aenter__(self) -> "Held":
        loop = asyncio.get_running_loop()

        def be_busy() -> None:
            loop.call_soon_threadsafe(self._is_busy.set)
            self._go.wait(TIMEOUT_S)

        self.first = self.submit("busy", "first", be_busy)
        await self._is_busy.wait()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.let_go()
        await asyncio.gather(self.first, return_exceptions=True)
        self.pool.close()

    def let_go(self) -> None:
        """Let the busy thread go on."""
        self._go.set()

    def submit(
        self, client: str, name: str, call: Callable[[], object] = lambda: None
    ) -> "asyncio.Task[object]":
        """Submit a client's call, which records that it has begun."""

        def noted() -> object:
            self.begun.append(name)
            return call()

        return asyncio.ensure_future(self.pool.run(client, noted))


def test_clients_take_turns() -> None:
    async def run() -> list[str]:
        async with Held() as held:
            tasks = [held.submit("many", f"many {i}") for i in range(5)]
            tasks += [held.submit("few", f"few {i}") for i in range(2)]
            await asyncio.sleep(0)
            held.let_go()
            await asyncio.gather(*tasks)
            return held.begun[1:]

    assert asyncio.run(run()) == [
        "many 0",
        "few 0",
        "many 1",
        "few 1",
        "many 2",
        "many 3",
        "many 4",
    ]


def test_a_cancelled_call_never_begins() -> None:
    async def run() -> list[str]:
        async with Held(max_waiting=2) as held:
            gone, kept = held.submit("a", "gone"), held.submit("a", "kept")
            await asyncio.sleep(0)
            gone.cancel()
            await asyncio.gather(gone, return_exceptions=True)
            later = held.submit("a", "later")  # takes the cancelled call's room
            await asyncio.sleep(0)
            held.let_go()
            await asyncio.gather(kept, later)
            return held.begun[1:]

    assert asyncio.run(run()) == ["kept", "later"]


def test_calls_beyond_the_limit_are_refused() -> None:
    async def run() -> None:
        async with Held(max_waiting=2) as held:
            tasks = [held.submit("a", f"{i}") for i in range(2)]
            await asyncio.sleep(0)
            with pytest.raises(QueueFullError, match="2 requests wait"):
                await held.submit("a", "one more")
            held.let_go()
            await asyncio.gather(*tasks)

    asyncio.run(run())


def test_a_newcomer_displaces_the_newest_call_of_the_client_with_most() -> None:
    async def run() -> list[str]:
        async with Held(max_waiting=4) as held:
            tasks = [held.submit("a", f"a{i}") for i in range(3)] + [held.submit("b", "b0")]
            await asyncio.sleep(0)
            tasks.append(held.submit("c", "c0"))
            with pytest.raises(QueueFullError, match="4 requests wait"):
                await tasks[2]
            with pytest.raises(QueueFullError, match="4 requests wait"):
                await held.submit("a", "a3")
            held.let_go()
            await asyncio.gather(*tasks, return_exceptions=True)
            return held.begun[1:]

    assert asyncio.run(run()) == ["a0", "b0", "c0", "a1"]


def test_a_deadline_holds_while_a_call_waits_and_while_it_runs() -> None:
    late = partial(RequestTimeoutError, "late", has_begun=False)

    async def run() -> None:
        async with Held() as held:
            deadline_s = asyncio.get_running_loop().time() + 0.02
            waiting = held.pool.run(
                "a", lambda: held.begun.append("never"), deadline_s=deadline_s, timeout_error=late
            )
            with pytest.raises(RequestTimeoutError):
                await asyncio.wait_for(waiting, TIMEOUT_S)
            held.let_go()
            await held.submit("a", "next")
            assert held.begun[1:] == ["next"]

    asyncio.run(run())


def test_closing_fails_waiting_and_running_calls_at_once() -> None:
    """A running call may take minutes; the server must still end."""

    async def run() -> None:
        async with Held() as held:
            waiting = held.submit("a", "waiting")
            await asyncio.sleep(0)
            held.pool.close()
            for task in (waiting, held.first):
                with pytest.raises(EngineNotReadyError, match="stopping"):
                    await asyncio.wait_for(task, TIMEOUT_S)
            with pytest.raises(EngineNotReadyError, match="stopping"):
                await held.submit("a", "too late")
            assert held.begun == ["first"]

    asyncio.run(run())


class Body:
    """What a call reads."""


def test_nothing_of_a_failed_call_waits_for_the_garbage_collector() -> None:
    """Dozens of bodies of megabytes would stay, in the frames of their errors' tracebacks."""
    kept: list[weakref.ref[Body]] = []

    def fail() -> None:
        body = Body()
        kept.append(weakref.ref(body))
        raise InvalidRequestError("wrong")

    async def answer(pool: FairThreadPool) -> str:
        request = Request({"type": "http"}, receive=asyncio.Event().wait)  # type: ignore[arg-type]
        try:
            await unless_disconnected(request, pool.run("a", fail))
        except InvalidRequestError as error:
            return str(error)
        return "no error"

    async def run() -> None:
        pool = FairThreadPool("test", 1, 10)
        gc.disable()
        try:
            assert await answer(pool) == "wrong"
            for _ in range(1000):
                if kept[0]() is None:
                    return
                await asyncio.sleep(0.001)  # the thread is at its last lines
            raise AssertionError("the body is still there")
        finally:
            gc.enable()
            pool.close()

    asyncio.run(run())


class Panic(BaseException):
    """A BaseException, as Rust libraries raise it."""


def test_a_panic_is_an_exception_and_the_thread_goes_on() -> None:
    def panic() -> None:
        raise Panic("inner words")

    async def run() -> None:
        pool = FairThreadPool("test", 1, 10)
        with pytest.raises(EngineFaultError) as caught:
            await pool.run("a", panic)
        assert "inner words" not in str(caught.value)
        assert await pool.run("a", lambda: 5) == 5
        pool.close()

    asyncio.run(run())
