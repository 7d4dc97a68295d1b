"""An AsyncEngine that stops, fails or never was ready, and what becomes of its requests."""

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from nanovllm import SamplingParams
from nanovllm.engine.async_engine import AsyncEngine, EngineState
from nanovllm.engine.engine import Engine
from nanovllm.engine.generation_request import GenerationRequest
from nanovllm.errors import (
    CheckpointError,
    EngineFaultError,
    EngineNotReadyError,
    InvalidRequestError,
)
from tests.support.async_engines import (
    LONG,
    SHORT,
    engine_threads,
    generate,
    output_of,
    run,
    started,
    stream,
    submit,
    until,
)
from tests.support.serving import loader

pytestmark = pytest.mark.usefixtures("backend")


def test_stopping_wakes_everybody(tiny_model: Path) -> None:
    async def test() -> None:
        before = engine_threads()
        engine = AsyncEngine(loader(tiny_model, step_s=0.01, max_num_seqs=2))
        await engine.start()
        await engine.wait_until_ready()
        assert len(engine_threads() - before) == 1

        async def read() -> None:
            async for _ in stream(engine, "the", LONG):
                pass

        tasks = [
            asyncio.ensure_future(work)
            for work in (*(generate(engine, "the", LONG) for _ in range(3)), read(), read())
        ]
        await until(lambda: engine.stats().generation_tokens > 3)
        inner = engine.engine
        await asyncio.gather(engine.stop(), engine.stop())
        assert not inner.has_work
        inner.check_integrity()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(result, EngineNotReadyError)
            assert "stopped" in str(result)
        await engine.stop()
        assert engine.state is EngineState.STOPPED
        assert engine_threads() <= before
        with pytest.raises(EngineNotReadyError, match="stopped"):
            await generate(engine, "the", SHORT)

    run(test)


def test_a_paused_engine_stops(tiny_model: Path) -> None:
    async def test() -> None:
        engine = AsyncEngine(loader(tiny_model))
        await engine.start()
        await engine.wait_until_ready()
        inspector = engine.inspector
        assert await inspector.control("pause") == (True, 0)
        request = asyncio.ensure_future(generate(engine, "the", LONG))
        await until(lambda: engine.stats().num_requests_waiting == 1)
        assert await inspector.control("step") == (True, 1)
        asked = asyncio.ensure_future(inspector.state(max_steps=1))
        stopping = asyncio.ensure_future(engine.stop())
        with pytest.raises(EngineNotReadyError, match="stopped"):
            await request
        await stopping
        await asyncio.gather(asked, return_exceptions=True)  # it was answered, or refused
        with pytest.raises(EngineNotReadyError, match="stopped"):
            _ = engine.inspector

    run(test)


def test_a_pause_is_released_for_the_end_of_a_server(tiny_model: Path) -> None:
    async def test() -> None:
        async with started(loader(tiny_model)) as engine:
            inspector, ended = engine.inspector, list[str]()
            unwatch = inspector.watch(lambda: ended.append("stream"))
            await inspector.control("pause")
            request = asyncio.ensure_future(generate(engine, "the", SHORT))
            await until(lambda: engine.stats().num_requests_waiting == 1)
            inspector.release()
            await request
            assert ended == ["stream"]
            assert not inspector.is_paused
            unwatch()

    run(test)


def test_an_error_in_a_call_is_raised_to_its_caller_only(tiny_model: Path) -> None:
    async def test() -> None:
        async with started(loader(tiny_model)) as engine:

            def fail(_: Engine) -> None:
                raise ValueError("of the call")

            with pytest.raises(ValueError, match="of the call"):
                await engine._thread.call(fail)  # noqa: SLF001
            await generate(engine, "the", SHORT)

    run(test)


def test_a_request_that_was_checked_before_the_stop_is_refused_after_it(tiny_model: Path) -> None:
    async def test() -> None:
        engine = AsyncEngine(loader(tiny_model))
        await engine.start()
        await engine.wait_until_ready()
        prepared = engine.prepare(GenerationRequest(prompts=["the"], params=SHORT))
        await engine.stop()
        with pytest.raises(EngineNotReadyError, match="stopped"):
            engine.generate(prepared)

    run(test)


def test_an_engine_that_loads_is_stopped_at_once(tiny_model: Path) -> None:
    may_load = threading.Event()

    def load() -> Engine:
        assert may_load.wait(30)
        return loader(tiny_model)()

    async def test() -> None:
        before = engine_threads()
        engine = AsyncEngine(load)
        await engine.start()
        with pytest.raises(EngineNotReadyError, match="loading"):
            engine.stats()
        with pytest.raises(EngineNotReadyError, match="loading"):
            await generate(engine, "the", SHORT)
        waiters = [asyncio.create_task(engine.wait_until_ready()) for _ in range(2)]
        await asyncio.sleep(0)
        await asyncio.wait_for(engine.stop(), 20)
        await asyncio.wait_for(engine.stop(), 20)  # does not wait for the loading thread either
        for waiter in waiters:
            with pytest.raises(EngineNotReadyError, match="stopped while it was loading"):
                await waiter
        assert len(engine_threads() - before) == 1
        may_load.set()
        await until(lambda: engine_threads() <= before)
        assert engine.state is EngineState.STOPPED

    run(test)


def test_an_engine_may_be_stopped_that_never_started(tiny_model: Path) -> None:
    async def test() -> None:
        engine = AsyncEngine(loader(tiny_model))
        await engine.stop()
        assert engine.state is EngineState.STOPPED

    run(test)


@pytest.mark.parametrize("error", [CheckpointError("cut off"), MemoryError("too large")])
def test_what_loading_raises_reaches_everybody_who_waits(error: Exception) -> None:
    def load() -> Engine:
        raise error

    async def test() -> None:
        engine = AsyncEngine(load)
        await engine.start()
        for result in await asyncio.gather(
            *(engine.wait_until_ready() for _ in range(2)), return_exceptions=True
        ):
            assert result is error
        assert (engine.state, engine.failure) == (EngineState.FAILED, error)
        with pytest.raises(EngineNotReadyError, match="failed"):
            engine.generate([])
        await engine.stop()
        assert engine.state is EngineState.FAILED

    run(test)


def test_a_step_that_fails_ends_its_requests_and_not_the_engine(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        async with started(loader(tiny_model)) as engine:

            def fail(*_: Any) -> Any:
                raise FloatingPointError("overflow")

            expected = await generate(engine, "the", SHORT)
            with monkeypatch.context() as patch:
                patch.setattr(engine.engine.runner, "run", fail)
                with pytest.raises(EngineFaultError, match="the log has the reason"):
                    await generate(engine, "the", SHORT)
                with pytest.raises(EngineFaultError, match="the log has the reason"):
                    await anext(stream(engine, "the", SamplingParams(n=3)))
            assert (await generate(engine, "the", SHORT)).outputs == expected.outputs

    run(test)


def test_a_thread_that_breaks_down_wakes_everybody(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        engine = AsyncEngine(loader(tiny_model, step_s=0.005))
        await engine.start()
        await engine.wait_until_ready()
        tasks = [asyncio.create_task(generate(engine, "the", LONG)) for _ in range(3)]
        await until(lambda: engine.stats().generation_tokens > 3)
        monkeypatch.setattr(engine.engine, "step", lambda on_planned: 1 / 0)
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(result, EngineFaultError)
            assert "broken down" in str(result)
        assert engine.state is EngineState.FAILED
        assert isinstance(engine.failure, ZeroDivisionError)
        with pytest.raises(EngineNotReadyError, match="failed"):
            await generate(engine, "the", SHORT)
        await engine.stop()

    run(test)


def test_results_that_come_after_the_event_loop_is_closed_are_dropped(tiny_model: Path) -> None:
    """The thread must not raise where a program ends without stopping its engine."""
    engines: list[AsyncEngine] = []

    async def begin() -> None:
        engine = AsyncEngine(loader(tiny_model, step_s=0.005))
        engines.append(engine)
        await engine.start()
        await engine.wait_until_ready()
        submit(engine, "the", LONG)
        await until(lambda: engine.stats().generation_tokens > 3)

    asyncio.run(begin())
    engine = engines[0].engine

    async def end() -> None:
        await until(lambda: not engine.has_work)
        assert engine.stats().generation_tokens == 100
        await engines[0].stop()

    asyncio.run(end())


@pytest.mark.parametrize("end", ["stop", "break down"])
def test_a_complete_answer_survives_the_end_of_the_engine(tiny_model: Path, end: str) -> None:
    """The last update has come, and the engine ends before the task that waits for it has run."""

    async def test() -> None:
        engine = AsyncEngine(loader(tiny_model))
        await engine.start()
        await engine.wait_until_ready()
        ending: list[asyncio.Future[None]] = []
        real = engine._deliver  # noqa: SLF001 - what the engine's thread calls

        def deliver_and_end(output: Any) -> None:
            real(output)
            if handle.is_finished and not ending:
                if end == "break down":
                    engine._fail(RuntimeError("it broke"))  # noqa: SLF001
                else:  # what stop() does before it waits for the thread
                    handle.fail(EngineNotReadyError("the engine was stopped"))
                ending.append(asyncio.ensure_future(engine.stop()))

        engine._thread._on_output = deliver_and_end  # noqa: SLF001
        handle = submit(engine, "the", SHORT)
        task = asyncio.create_task(handle.wait())
        await task
        output = output_of(handle)
        assert (output.finished, len(output.outputs[0].token_ids)) == (True, 3)
        await ending[0]

    run(test)


def test_the_first_part_that_fails_ends_the_whole_request(tiny_model: Path) -> None:
    """The second of three prompts fails. Nobody waits for the first one's hundred tokens."""

    async def test() -> None:
        async with started(loader(tiny_model, step_s=0.02)) as engine:
            blocked = SamplingParams(allowed_token_ids=[5], stop_token_ids=[5], min_tokens=2)
            prepared = [
                *engine.prepare(GenerationRequest(prompts=["the"], params=LONG)),
                *engine.prepare(GenerationRequest(prompts=["a"], params=blocked)),
                *engine.prepare(GenerationRequest(prompts=["in"], params=LONG)),
            ]
            with engine.generate(prepared) as handle:
                with pytest.raises(InvalidRequestError, match="every token is forbidden"):
                    await handle.wait()
                assert engine.stats().generation_tokens < 100

    run(test)


def test_what_clients_are_told_does_not_tell_what_went_wrong(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        async with started(loader(tiny_model)) as engine:

            def fail(*_: Any) -> Any:
                raise OSError("/secret/folder")

            with monkeypatch.context() as patch:
                patch.setattr(engine.engine.runner, "run", fail)
                with pytest.raises(EngineFaultError) as caught:
                    await generate(engine, "the", SHORT)
            assert "secret" not in str(caught.value)

    run(test)
    assert "/secret/folder" in caplog.text
    assert "Traceback" in caplog.text
