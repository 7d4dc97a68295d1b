"""AsyncEngine without HTTP: requests in every state, and ended in every way."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from pathlib import Path

import pytest

from nanovllm import LLM, SamplingParams
from nanovllm.deadlines import Deadline
from nanovllm.engine.admission import RequestSize
from nanovllm.engine.async_engine import AsyncEngine
from nanovllm.engine.generation_request import GenerationRequest
from nanovllm.engine.input_processor import InputProcessor
from nanovllm.engine.metrics import StepStats
from nanovllm.engine.request_handle import RequestHandle
from nanovllm.errors import (
    ContextLengthError,
    InvalidRequestError,
    QueueFullError,
    RequestTimeoutError,
)
from tests.support.async_engines import (
    LONG,
    SHORT,
    generate,
    output_of,
    run,
    started,
    stream,
    submit,
    until,
)
from tests.support.serving import ENGINE_SETTINGS, loader

pytestmark = pytest.mark.usefixtures("backend")


def test_answers_are_those_of_llm_whole_and_in_pieces(tiny_model: Path) -> None:
    params = SamplingParams(max_tokens=30, temperature=1.0, seed=3, n=2, logprobs=1, stop="q")
    expected = LLM(tiny_model, **ENGINE_SETTINGS).generate("in the end", params, use_tqdm=False)[0]

    async def test() -> None:
        async with started(loader(tiny_model)) as engine:
            whole = await generate(engine, "in the end", params)
            assert whole.outputs == expected.outputs
            texts, tokens = ["", ""], [0, 0]
            async for delta in stream(engine, "in the end", params):
                for answer in delta.outputs:
                    texts[answer.index] += answer.text
                    tokens[answer.index] += len(answer.token_ids)
            assert delta.finished
            assert texts == [answer.text for answer in expected.outputs]
            assert tokens == [len(answer.token_ids) for answer in expected.outputs]

    run(test)


def test_many_at_once_are_batched_and_each_gets_its_own(tiny_model: Path) -> None:
    prompts = [[i, i + 1, i + 2] for i in range(1, 41)]
    expected = LLM(tiny_model, **ENGINE_SETTINGS).generate([*prompts], SHORT, use_tqdm=False)
    sizes: list[int] = []

    async def test() -> None:
        async with started(
            loader(tiny_model), on_step=lambda stats: sizes.append(stats.num_decode_tokens)
        ) as engine:
            outputs = await asyncio.gather(*(generate(engine, prompt, SHORT) for prompt in prompts))
            assert [output.outputs for output in outputs] == [output.outputs for output in expected]

    run(test)
    assert max(sizes) > 8


@pytest.mark.parametrize("after_s", [0, 0.001, 0.01, 0.05])
def test_a_cancelled_generate_ends_its_request(tiny_model: Path, after_s: float) -> None:
    async def test() -> None:
        async with started(loader(tiny_model, step_s=0.01), max_queued_requests=1) as engine:
            task = asyncio.create_task(generate(engine, "the", LONG))
            await asyncio.sleep(after_s)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await until(lambda: not engine.engine.has_work)
            assert engine.stats().generation_tokens < 100
            assert (await generate(engine, "the", SHORT)).finished

    run(test)


def test_a_stream_that_is_closed_ends_its_request(tiny_model: Path) -> None:
    async def test() -> None:
        async with started(loader(tiny_model, step_s=0.01), max_queued_requests=1) as engine:
            async with aclosing(stream(engine, "the", LONG)) as pieces:
                await anext(pieces)
            await until(lambda: not engine.engine.has_work)
            assert engine.stats().generation_tokens < 100
            never_read = stream(engine, "the", LONG)
            await never_read.aclose()
            assert (await generate(engine, "the", SHORT)).finished

    run(test)


async def in_queue(engine: AsyncEngine, handle: RequestHandle) -> None:
    """Nothing: it has just been submitted."""


async def waiting(engine: AsyncEngine, handle: RequestHandle) -> None:
    """Known to the scheduler, but others run."""
    await until(lambda: engine.stats().num_requests_waiting > 0)


async def running(engine: AsyncEngine, handle: RequestHandle) -> None:
    """Some of the answer is there."""
    await until(lambda: len(output_of(handle).outputs[0].token_ids) > 2)


async def finished(engine: AsyncEngine, handle: RequestHandle) -> None:
    """All of the answer is there, and nobody has asked for it."""
    await until(lambda: handle.is_finished)


async def answered(engine: AsyncEngine, handle: RequestHandle) -> None:
    """The answer has been taken."""
    await handle.wait()
    assert output_of(handle).finished


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("state", [in_queue, waiting, running, finished, answered])
def test_leaving_is_harmless_in_every_state_and_twice(
    tiny_model: Path,
    state: Callable[[AsyncEngine, RequestHandle], Awaitable[None]],
    temperature: float,
) -> None:
    """Two answers, equal ones or not."""

    async def test() -> None:
        slots = 1 if state is waiting else 4
        async with started(
            loader(tiny_model, step_s=0.003, max_num_seqs=slots), max_queued_requests=3
        ) as engine:
            if state is waiting:
                first = submit(engine, "a", LONG)
            params = SamplingParams(
                **{**LONG.as_dict(), "n": 2, "max_tokens": 20, "temperature": temperature}
            )
            handle = submit(engine, "the", params)
            await state(engine, handle)
            handle.release()
            handle.end(0)
            if state is waiting:
                first.release()
            await until(lambda: not engine.engine.has_work)
            handle.release()
            outputs = await asyncio.gather(*(generate(engine, "the", SHORT) for _ in range(3)))
            assert all(output.finished for output in outputs), (
                "each handle gives back its places once and not more"
            )
            with pytest.raises(QueueFullError):
                await asyncio.gather(*(generate(engine, "the", SHORT) for _ in range(4)))

    run(test)


def test_a_stop_string_ends_the_sequence_in_the_engine(tiny_model: Path) -> None:
    async def test() -> None:
        reported: list[StepStats] = []
        async with started(loader(tiny_model, step_s=0.005), on_step=reported.append) as engine:
            params = SamplingParams(max_tokens=120, allowed_token_ids=[ord("k") - 33], stop="kkk")
            answer = (await generate(engine, "the", params)).outputs[0]
            assert (answer.text, answer.finish_reason, answer.stop_reason) == ("", "stop", "kkk")
            await until(lambda: any(stats.finished for stats in reported))
            (ended,) = (one for stats in reported for one in stats.finished)
            assert (ended.finish_reason, ended.prompt_tokens) == ("stop", 1)
            assert ended.generation_tokens == 3, (
                "what was computed after the stop string does not count"
            )
            assert engine.stats().generation_tokens == 3
            assert sum(len(stats.inter_token_latencies_s) for stats in reported) == 2
            assert ended.times.finished_s is not None
            assert ended.times.arrival_s < ended.times.finished_s

    run(test)


def test_all_prompts_of_a_request_are_queued_or_none(tiny_model: Path) -> None:
    async def test() -> None:
        async with started(loader(tiny_model, step_s=0.01), max_queued_requests=3) as engine:
            holding = submit(engine, "the", LONG)
            three = GenerationRequest(prompts=["a", "b", "c"], params=SHORT)
            with pytest.raises(QueueFullError, match="1 unfinished request and 3 more"):
                engine.generate(engine.prepare(three))
            with pytest.raises(QueueFullError):
                engine.admission.check(RequestSize(3))
            with pytest.raises(InvalidRequestError, match="4 choices at once, the limit is 3"):
                submit(engine, "a", SamplingParams(n=4))
            for params in (
                SamplingParams(n=3, temperature=0),
                SamplingParams(best_of=3),
                SamplingParams(best_of=3, temperature=0),
            ):
                with pytest.raises(QueueFullError, match="1 unfinished request and 3 more"):
                    submit(engine, "a", params)
            engine.admission.check(RequestSize(2))
            assert engine.engine.scheduler.num_waiting <= 1
            holding.release()
            assert (await generate(engine, "a", SamplingParams(n=3, max_tokens=1))).finished
            assert (
                await generate(
                    engine, "a", SamplingParams(n=2, best_of=3, max_tokens=1, temperature=0)
                )
            ).finished
            engine.admission.check(RequestSize(3))

    run(test)


def test_a_deadline_that_passes_while_a_delta_is_used_is_an_error(tiny_model: Path) -> None:
    async def test() -> None:
        async with started(loader(tiny_model, step_s=0.01)) as engine:
            request = GenerationRequest(prompts=["the"], params=LONG)
            deadline = Deadline.after(3600)
            with engine.generate(engine.prepare(request), deadline=deadline) as handle:
                async with aclosing(handle.deltas()) as deltas:
                    await anext(deltas)
                    engine._expire(deadline, handle)  # noqa: SLF001 - what the timer calls
                    with pytest.raises(RequestTimeoutError):
                        async for _ in deltas:
                            pass

    run(test)


def test_the_best_of_more_are_followed_in_one_piece(tiny_model: Path) -> None:
    async def test() -> None:
        async with started(loader(tiny_model)) as engine:
            params = SamplingParams(max_tokens=8, n=2, best_of=5, seed=1)
            whole = await generate(engine, "the", params)
            (piece,) = [delta async for delta in stream(engine, "the", params)]
            assert [(answer.index, answer.text) for answer in piece.outputs] == [
                (answer.index, answer.text) for answer in whole.outputs
            ]
            assert piece.finished

    run(test)


def test_wrong_requests_are_found_before_anything_is_queued(tiny_model: Path) -> None:
    async def test() -> None:
        async with started(loader(tiny_model)) as engine:
            for prompt in ("", [], [999], "a" * 500):
                with pytest.raises(InvalidRequestError):
                    await generate(engine, prompt, SHORT)
                with pytest.raises(InvalidRequestError):
                    await anext(stream(engine, prompt, SHORT))
            with pytest.raises(ContextLengthError):
                await generate(engine, [1] * 200, SHORT)
            assert engine.stats().generation_tokens == 0

    run(test)


def test_the_same_request_id_may_be_used_twice_at_once(tiny_model: Path) -> None:
    async def test() -> None:
        async with started(loader(tiny_model)) as engine:
            first, second = await asyncio.gather(
                *(generate(engine, "the", SHORT, request_id="same") for _ in range(2))
            )
            assert first.outputs == second.outputs

    run(test)


def test_an_id_that_is_in_use_is_refused_before_it_is_queued(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ids come from one counter. If two were equal, the second would be refused with no crash."""
    monkeypatch.setattr(InputProcessor, "new_request_id", lambda self, name: f"0-{name}")

    async def test() -> None:
        async with started(loader(tiny_model, step_s=0.005), max_queued_requests=2) as engine:
            first = asyncio.create_task(generate(engine, "the", LONG))
            await until(lambda: engine.stats().num_requests_running == 1)
            with pytest.raises(InvalidRequestError, match="'0-request' is in use"):
                await generate(engine, "a", SHORT)
            twice = GenerationRequest(prompts=["a", "a"], params=SHORT, request_id="twice")
            with pytest.raises(InvalidRequestError, match="'0-twice' is in use"):
                engine.generate(engine.prepare(twice))
            assert (await first).finished
            assert (await generate(engine, "a", SHORT)).finished
            assert engine.admission.stats().choices == 0

    run(test)


def test_metrics_say_stop_where_the_answer_does_on_the_last_token(tiny_model: Path) -> None:
    """The last allowed token completes the stop string. The engine itself sees only the length."""
    reported: list[StepStats] = []

    async def test() -> None:
        async with started(loader(tiny_model), on_step=reported.append) as engine:
            params = SamplingParams(max_tokens=3, allowed_token_ids=[ord("k") - 33], stop="kkk")
            answer = (await generate(engine, "the", params)).outputs[0]
            assert (answer.finish_reason, len(answer.token_ids)) == ("stop", 3)
            other = (await generate(engine, "the", SHORT)).outputs[0]
            assert other.finish_reason == "length"

    run(test)
    ended = [one for stats in reported for one in stats.finished]
    assert [(one.finish_reason, one.generation_tokens) for one in ended] == [
        ("stop", 3),
        ("length", 3),
    ]


def test_a_preempted_sequence_counts_its_prompt_once(tiny_model: Path) -> None:
    """What was computed of it counts twice."""
    reported: list[StepStats] = []

    async def test() -> None:
        load = loader(tiny_model, num_blocks=6, block_size=8)
        async with started(load, on_step=reported.append) as engine:
            params = SamplingParams(max_tokens=24, ignore_eos=True)
            await asyncio.gather(*(generate(engine, [token] * 16, params) for token in (1, 2)))
            stats = engine.stats()
            assert stats.num_preemptions > 0
            assert (stats.prompt_tokens, stats.prompt_tokens_cached) == (32, 0)
            assert stats.prompt_tokens_computed > 32
            ended = [one for step in reported for one in step.finished]
            assert sum(one.num_preemptions for one in ended) == stats.num_preemptions
            assert [one.max_tokens for one in ended] == [24, 24]

    run(test)


def test_the_times_of_an_answer_that_a_stop_string_ended_are_complete(tiny_model: Path) -> None:
    async def test() -> None:
        async with started(loader(tiny_model)) as engine:
            params = SamplingParams(max_tokens=30, allowed_token_ids=[ord("k") - 33], stop="kkk")
            times = (await generate(engine, "the", params)).metrics
            assert times is not None
            assert times.finished_s is not None
            assert times.first_token_s is not None
            assert times.arrival_s <= times.first_token_s <= times.finished_s

    run(test)


def test_what_stats_say_is_one_moment_and_never_negative(tiny_model: Path) -> None:
    """They are read while requests come, run, are aborted and end."""

    async def test() -> None:
        async with started(loader(tiny_model, max_num_seqs=2)) as engine:
            tasks = [asyncio.create_task(generate(engine, [i + 1], SHORT)) for i in range(30)]
            for task in tasks[::3]:
                await asyncio.sleep(0)
                task.cancel()
            while not all(task.done() for task in tasks):
                stats = engine.stats()
                assert 0 <= stats.num_requests_running <= 2
                assert stats.num_requests_waiting >= 0
                await asyncio.sleep(0)
            await asyncio.gather(*tasks, return_exceptions=True)
            await until(lambda: engine.stats().num_requests_waiting == 0)
            assert engine.stats().num_requests_running == 0

    run(test)


def test_wait_releases_a_prompt_when_it_ends_whatever_its_index(tiny_model: Path) -> None:
    async def test() -> None:
        async with started(loader(tiny_model, step_s=0.01)) as engine:
            prepared = [
                *engine.prepare(GenerationRequest(prompts=["the"], params=LONG)),
                *engine.prepare(GenerationRequest(prompts=["a"], params=SHORT)),
            ]
            with engine.generate(prepared) as handle:
                task = asyncio.create_task(handle.wait())
                await until(lambda: handle.unfinished == [0])
                await until(lambda: engine.admission.stats().choices == 1)
                task.cancel()

    run(test)
