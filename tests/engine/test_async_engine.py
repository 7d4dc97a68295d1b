"""AsyncEngine without HTTP: requests in every state, ended in every way, and an engine that stops, fails or never was ready."""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM, SamplingParams
from nanovllm.engine.async_engine import AsyncEngine, EngineState
from nanovllm.engine.engine import Engine
from nanovllm.engine.metrics import StepStats
from nanovllm.engine.reader import Reader
from nanovllm.errors import (
    CheckpointError,
    ContextLengthError,
    EngineFaultError,
    EngineNotReadyError,
    InvalidRequestError,
    QueueFullError,
)
from tests.support.serving import ENGINE_SETTINGS, loader

LONG = SamplingParams(max_tokens=100, temperature=0, ignore_eos=True)
SHORT = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)

pytestmark = pytest.mark.usefixtures("backend")


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
        inner.check_integrity()
        assert inner.blocks.num_used == 0
    finally:
        await engine.stop()


async def until(condition: Callable[[], bool]) -> None:
    """Wait until `condition` holds; fails when it does not come true in time."""
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.002)
    pytest.fail("it did not come true in time")


def run(test: Callable[[], Awaitable[None]]) -> None:
    """Run a test on an event loop of its own, and no longer than it may take."""

    async def limited() -> None:
        await asyncio.wait_for(test(), 30)

    asyncio.run(limited())


def engine_threads() -> int:
    return sum(thread.name == "nanovllm-engine" for thread in threading.enumerate())


def test_answers_are_those_of_llm_whole_and_in_pieces(tiny_model: Path) -> None:
    params = SamplingParams(max_tokens=30, temperature=1.0, seed=3, n=2, logprobs=1, stop="q")
    expected = LLM(tiny_model, **ENGINE_SETTINGS).generate("in the end", params, use_tqdm=False)[0]

    async def test() -> None:
        async with started(loader(tiny_model)) as engine:
            whole = await engine.generate("in the end", params)
            assert whole.outputs == expected.outputs
            texts, tokens = ["", ""], [0, 0]
            async for news in engine.stream("in the end", params):
                for answer in news.outputs:
                    texts[answer.index] += answer.text
                    tokens[answer.index] += len(answer.token_ids)
            assert news.finished
            assert texts == [answer.text for answer in expected.outputs]
            assert tokens == [len(answer.token_ids) for answer in expected.outputs]

    run(test)


def test_many_at_once_are_batched_and_each_gets_its_own(tiny_model: Path) -> None:
    prompts = [[i, i + 1, i + 2] for i in range(1, 41)]
    expected = LLM(tiny_model, **ENGINE_SETTINGS).generate([*prompts], SHORT, use_tqdm=False)
    sizes: list[int] = []

    async def test() -> None:
        async with started(loader(tiny_model), on_step=lambda stats: sizes.append(stats.num_decode_tokens)) as engine:
            outputs = await asyncio.gather(*(engine.generate(prompt, SHORT) for prompt in prompts))
            assert [output.outputs for output in outputs] == [output.outputs for output in expected]

    run(test)
    assert max(sizes) > 8


@pytest.mark.parametrize("after_s", [0, 0.001, 0.01, 0.05])
def test_a_cancelled_generate_ends_its_request(tiny_model: Path, after_s: float) -> None:
    async def test() -> None:
        async with started(loader(tiny_model, step_s=0.01), max_queued_requests=1) as engine:
            task = asyncio.create_task(engine.generate("the", LONG))
            await asyncio.sleep(after_s)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await until(lambda: not engine.engine.has_work)
            assert engine.stats().generation_tokens < 100
            assert (await engine.generate("the", SHORT)).finished

    run(test)


def test_a_stream_that_is_closed_ends_its_request(tiny_model: Path) -> None:
    async def test() -> None:
        async with started(loader(tiny_model, step_s=0.01), max_queued_requests=1) as engine:
            async with aclosing(engine.stream("the", LONG)) as pieces:
                await anext(pieces)
            await until(lambda: not engine.engine.has_work)
            assert engine.stats().generation_tokens < 100
            never_read = engine.stream("the", LONG)
            await never_read.aclose()
            assert (await engine.generate("the", SHORT)).finished

    run(test)


async def in_queue(engine: AsyncEngine, reader: Reader) -> None:
    """Nothing: it has just been submitted."""


async def waiting(engine: AsyncEngine, reader: Reader) -> None:
    """Known to the scheduler, but others run."""
    await until(lambda: engine.stats().num_requests_waiting > 0)


async def running(engine: AsyncEngine, reader: Reader) -> None:
    """Some of the answer is there."""
    await until(lambda: len(reader.assembler.output().outputs[0].token_ids) > 2)


async def finished(engine: AsyncEngine, reader: Reader) -> None:
    """All of the answer is there, and nobody has asked for it."""
    await until(lambda: reader.assembler.is_finished)


async def answered(engine: AsyncEngine, reader: Reader) -> None:
    """The answer has been taken."""
    assert (await engine.finish(reader)).finished


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("state", [in_queue, waiting, running, finished, answered])
def test_leaving_is_harmless_in_every_state_and_twice(
    tiny_model: Path, state: Callable[[AsyncEngine, Reader], Awaitable[None]], temperature: float
) -> None:
    """Two answers, equal ones or not."""

    async def test() -> None:
        seats = 1 if state is waiting else 4
        async with started(loader(tiny_model, step_s=0.003, max_num_seqs=seats), max_queued_requests=3) as engine:
            if state is waiting:
                first = engine.submit(engine.check("a", LONG))
            reader = engine.submit(engine.check("the", SamplingParams(**{**LONG.as_dict(), "n": 2, "max_tokens": 20, "temperature": temperature})))
            await state(engine, reader)
            engine.leave([reader])
            engine.leave([reader, reader])
            if state is waiting:
                engine.leave([first])
            await until(lambda: not engine.engine.has_work)
            engine.leave([reader])
            outputs = await asyncio.gather(*(engine.generate("the", SHORT) for _ in range(3)))
            assert all(output.finished for output in outputs), "each reader gives back its places once and not more"
            with pytest.raises(QueueFullError):
                await asyncio.gather(*(engine.generate("the", SHORT) for _ in range(4)))

    run(test)


def test_a_stop_string_ends_the_sequence_in_the_engine(tiny_model: Path) -> None:
    async def test() -> None:
        reported: list[StepStats] = []
        async with started(loader(tiny_model, step_s=0.005), on_step=reported.append) as engine:
            params = SamplingParams(max_tokens=120, allowed_token_ids=[ord("k") - 33], stop="kkk")
            answer = (await engine.generate("the", params)).outputs[0]
            assert (answer.text, answer.finish_reason, answer.stop_reason) == ("", "stop", "kkk")
            await until(lambda: any(stats.finished for stats in reported))
            (ended,) = (one for stats in reported for one in stats.finished)
            assert (ended.finish_reason, ended.prompt_tokens) == ("stop", 1)
            assert 3 <= ended.generation_tokens < 120
            assert ended.times.arrival_s < ended.finished_s

    run(test)


def test_all_prompts_of_a_request_are_queued_or_none(tiny_model: Path) -> None:
    async def test() -> None:
        async with started(loader(tiny_model, step_s=0.01), max_queued_requests=3) as engine:
            holding = engine.submit(engine.check("the", LONG))
            with pytest.raises(QueueFullError, match="1 requests are unfinished and 3 more"):
                engine.submit_all([engine.check("a", SHORT), engine.check("b", SamplingParams(n=2))])
            with pytest.raises(QueueFullError):
                engine.check_room(3)
            with pytest.raises(InvalidRequestError, match="4 answers at once, the limit is 3"):
                engine.submit(engine.check("a", SamplingParams(n=4)))
            for params in (SamplingParams(n=3, temperature=0), SamplingParams(best_of=3), SamplingParams(best_of=3, temperature=0)):
                with pytest.raises(QueueFullError, match="1 requests are unfinished and 3 more"):
                    engine.submit(engine.check("a", params))
            engine.check_room(2)
            assert engine.engine.scheduler.num_waiting <= 1
            engine.leave([holding])
            assert (await engine.generate("a", SamplingParams(n=3, max_tokens=1))).finished
            assert (await engine.generate("a", SamplingParams(n=2, best_of=3, max_tokens=1, temperature=0))).finished
            engine.check_room(3)

    run(test)


def test_the_best_of_more_are_followed_in_one_piece(tiny_model: Path) -> None:
    async def test() -> None:
        async with started(loader(tiny_model)) as engine:
            params = SamplingParams(max_tokens=8, n=2, best_of=5, seed=1)
            whole = await engine.generate("the", params)
            (piece,) = [news async for news in engine.stream("the", params)]
            assert [(answer.index, answer.text) for answer in piece.outputs] == [(answer.index, answer.text) for answer in whole.outputs]
            assert piece.finished

    run(test)


def test_wrong_requests_are_found_before_anything_is_queued(tiny_model: Path) -> None:
    async def test() -> None:
        async with started(loader(tiny_model)) as engine:
            for prompt in ("", [], [999], "a" * 500):
                with pytest.raises(InvalidRequestError):
                    await engine.generate(prompt, SHORT)
                with pytest.raises(InvalidRequestError):
                    await anext(engine.stream(prompt, SHORT))
            with pytest.raises(ContextLengthError):
                await engine.generate([1] * 200, SHORT)
            assert engine.stats().generation_tokens == 0

    run(test)


def test_the_same_request_id_may_be_used_twice_at_once(tiny_model: Path) -> None:
    async def test() -> None:
        async with started(loader(tiny_model)) as engine:
            first, second = await asyncio.gather(*(engine.generate("the", SHORT, request_id="same") for _ in range(2)))
            assert first.outputs == second.outputs

    run(test)


def test_stopping_wakes_everybody(tiny_model: Path) -> None:
    async def test() -> None:
        engine = AsyncEngine(loader(tiny_model, step_s=0.01, max_num_seqs=2))
        await engine.start()
        await engine.wait_until_ready()
        before = engine_threads()

        async def read() -> None:
            async for _ in engine.stream("the", LONG):
                pass

        tasks = [asyncio.ensure_future(work) for work in (*(engine.generate("the", LONG) for _ in range(3)), read(), read())]
        await until(lambda: engine.stats().generation_tokens > 3)
        await asyncio.gather(engine.stop(), engine.stop())
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(result, EngineNotReadyError)
            assert "stopped" in str(result)
        await engine.stop()
        assert engine.state is EngineState.STOPPED
        assert engine_threads() == before - 1
        with pytest.raises(EngineNotReadyError, match="stopped"):
            await engine.generate("the", SHORT)

    run(test)


def test_a_request_that_was_checked_before_the_stop_is_refused_after_it(tiny_model: Path) -> None:
    async def test() -> None:
        engine = AsyncEngine(loader(tiny_model))
        await engine.start()
        await engine.wait_until_ready()
        submission = engine.check("the", SHORT)
        await engine.stop()
        with pytest.raises(EngineNotReadyError, match="stopped"):
            engine.submit(submission)

    run(test)


def test_an_engine_that_loads_is_stopped_at_once(tiny_model: Path) -> None:
    may_load = threading.Event()

    def load() -> Engine:
        assert may_load.wait(30)
        return loader(tiny_model)()

    async def test() -> None:
        engine = AsyncEngine(load)
        await engine.start()
        with pytest.raises(EngineNotReadyError, match="loading"):
            engine.stats()
        with pytest.raises(EngineNotReadyError, match="loading"):
            await engine.generate("the", SHORT)
        waiters = [asyncio.create_task(engine.wait_until_ready()) for _ in range(2)]
        await asyncio.sleep(0)
        await asyncio.wait_for(engine.stop(), 2)
        for waiter in waiters:
            with pytest.raises(EngineNotReadyError, match="stopped while it was loading"):
                await waiter
        before = engine_threads()
        may_load.set()
        await until(lambda: engine_threads() == before - 1)
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
        for result in await asyncio.gather(*(engine.wait_until_ready() for _ in range(2)), return_exceptions=True):
            assert result is error
        assert (engine.state, engine.failure) == (EngineState.FAILED, error)
        with pytest.raises(EngineNotReadyError, match="failed"):
            engine.submit_all([])
        await engine.stop()
        assert engine.state is EngineState.FAILED

    run(test)


def test_a_step_that_fails_ends_its_requests_and_not_the_engine(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with started(loader(tiny_model)) as engine:

            def fail(*_: Any) -> Any:
                raise FloatingPointError("overflow")

            expected = await engine.generate("the", SHORT)
            with monkeypatch.context() as patch:
                patch.setattr(engine.engine.runner, "run", fail)
                with pytest.raises(EngineFaultError, match="overflow"):
                    await engine.generate("the", SHORT)
                with pytest.raises(EngineFaultError, match="overflow"):
                    await anext(engine.stream("the", SamplingParams(n=3)))
            assert (await engine.generate("the", SHORT)).outputs == expected.outputs

    run(test)


def test_a_thread_that_breaks_down_wakes_everybody(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        engine = AsyncEngine(loader(tiny_model, step_s=0.005))
        await engine.start()
        await engine.wait_until_ready()
        tasks = [asyncio.create_task(engine.generate("the", LONG)) for _ in range(3)]
        await until(lambda: engine.stats().generation_tokens > 3)
        monkeypatch.setattr(engine.engine, "step", lambda: 1 / 0)
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(result, EngineFaultError)
            assert "broken down" in str(result)
        assert engine.state is EngineState.FAILED
        assert isinstance(engine.failure, ZeroDivisionError)
        with pytest.raises(EngineNotReadyError, match="failed"):
            await engine.generate("the", SHORT)
        await engine.stop()

    run(test)


def test_results_that_come_after_the_event_loop_is_closed_are_dropped(tiny_model: Path) -> None:
    """A program that ends without stopping its engine: the thread has nobody to tell and must not raise, which would be an error here."""
    engines: list[AsyncEngine] = []

    async def begin() -> None:
        engine = AsyncEngine(loader(tiny_model, step_s=0.005))
        engines.append(engine)
        await engine.start()
        await engine.wait_until_ready()
        engine.submit(engine.check("the", LONG))
        await until(lambda: engine.stats().generation_tokens > 3)

    asyncio.run(begin())
    engine = engines[0].engine

    async def end() -> None:
        await until(lambda: not engine.has_work)
        assert engine.stats().generation_tokens == 100
        await engines[0].stop()

    asyncio.run(end())
