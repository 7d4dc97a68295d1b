"""Asynchronous engines for tests, and a limited time for each test."""

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from nanovllm.deadlines import Deadline
from nanovllm.engine.async_engine import AsyncEngine
from nanovllm.engine.engine import Engine
from nanovllm.engine.generation_request import GenerationRequest
from nanovllm.engine.request_handle import RequestHandle
from nanovllm.outputs import RequestOutput
from nanovllm.prompts import Prompt
from nanovllm.sampling_params import SamplingParams
from tests.support.serving import START_TIMEOUT_S, TIMEOUT_S

LONG = SamplingParams(max_tokens=100, temperature=0, ignore_eos=True)
SHORT = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)


@asynccontextmanager
async def started(load: Callable[[], Engine], **settings: Any) -> AsyncIterator[AsyncEngine]:
    """An engine that is ready, and stopped in the end; its books must balance by then."""
    engine = AsyncEngine(load, **settings)
    await engine.start()
    await engine.wait_until_ready()
    try:
        yield engine
        inner = engine.engine
        await until(lambda: not inner.has_work)
    finally:
        await engine.stop()
    # The thread may free blocks after the last request. It has ended here.
    inner.check_integrity()
    assert inner.blocks.num_used == 0


def submit(
    engine: AsyncEngine,
    prompt: Prompt,
    params: SamplingParams,
    *,
    request_id: str = "request",
    timeout_s: float | None = None,
) -> RequestHandle:
    """Queue a request of one prompt."""
    request = GenerationRequest(prompts=[prompt], params=params, request_id=request_id)
    deadline = None if timeout_s is None else Deadline.after(timeout_s)
    return engine.generate(engine.prepare(request), deadline=deadline)


def output_of(handle: RequestHandle) -> RequestOutput:
    """Return the output so far of a request of one prompt."""
    return handle.prompts[0].output()


async def generate(
    engine: AsyncEngine, prompt: Prompt, params: SamplingParams, **options: Any
) -> RequestOutput:
    """Return the whole output of one prompt."""
    with submit(engine, prompt, params, **options) as handle:
        await handle.wait()
        return output_of(handle)


async def stream(
    engine: AsyncEngine, prompt: Prompt, params: SamplingParams, **options: Any
) -> AsyncGenerator[RequestOutput, None]:
    """Yield the output of one prompt as it grows."""
    with submit(engine, prompt, params, **options) as handle:
        async for _, delta in handle.deltas():
            yield delta


async def until(condition: Callable[[], bool]) -> None:
    """Wait on the event loop until `condition` holds. Fail where it does not come true in time."""
    deadline_s = time.monotonic() + 2 * TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline_s, "it did not come true in time"
        await asyncio.sleep(0.002)


def run(test: Callable[[], Awaitable[None]]) -> None:
    """Run a test on an event loop of its own, and no longer than it may take."""

    async def limited() -> None:
        await asyncio.wait_for(test(), START_TIMEOUT_S)

    asyncio.run(limited())


def engine_threads() -> set[threading.Thread]:
    """Return the threads of all engines, also those of other tests' servers that still run."""
    return {thread for thread in threading.enumerate() if thread.name == "nanovllm-engine"}
