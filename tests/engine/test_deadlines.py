"""Deadlines without HTTP: nothing overdue begins, and readers are told what happens first."""

import time
from pathlib import Path

import pytest

from nanovllm.config import EngineConfig
from nanovllm.deadlines import Deadline
from nanovllm.engine.engine import Engine
from nanovllm.engine.generation_request import GenerationRequest
from nanovllm.engine.scheduling.request import FinishReason
from nanovllm.errors import RequestTimeoutError
from nanovllm.sampling_params import SamplingParams
from tests.support.async_engines import generate, run, started, stream, submit
from tests.support.processing import process
from tests.support.serving import loader

LONG = SamplingParams(max_tokens=100, temperature=1.0, ignore_eos=True, n=2)


def test_the_engine_ends_what_is_overdue_before_a_step(tiny_model: Path) -> None:
    engine = Engine.load(tiny_model, EngineConfig(backend="numpy", kv_cache_memory="4MiB"))
    late, in_time = (
        process(engine.input_processor, name, [1, 2, 3], LONG).requests
        for name in ("late", "in time")
    )
    now = time.monotonic()
    for requests, deadline_s in ((late, now - 1), (in_time, now + 1000)):
        for request in requests:
            engine.add_request(request, now, deadline_s)
    output = engine.step()
    assert {update.request_id for update in output.updates} == {"in time-0", "in time-1"}
    engine.check_integrity()
    engine._deadlines["in time-1"] = 0.0  # noqa: SLF001 - in place of waiting
    engine.step()
    assert engine.scheduler.request_ids == {"in time-0"}
    engine.finish_request("in time-0", FinishReason.ABORT)
    engine.check_integrity()
    assert (engine.has_work, engine.blocks.num_used) == (False, 0)


def test_a_reader_is_told_while_the_engine_is_in_a_long_step(tiny_model: Path) -> None:
    async def test() -> None:
        async with started(loader(tiny_model, backend="numpy", step_s=0.6)) as engine:
            with pytest.raises(
                RequestTimeoutError, match=r"was given 0\.1 s .* waiting for its turn"
            ) as caught:
                await generate(engine, "the", LONG, timeout_s=0.1)
            assert not caught.value.has_begun
            with pytest.raises(RequestTimeoutError):
                async for _ in stream(engine, "the", LONG, timeout_s=0.1):
                    pass
            assert (engine.timeouts, engine.admission.stats().tokens) == (
                {"queued": 2, "running": 0},
                0,
            )

    run(test)


def test_what_is_over_before_it_is_queued_takes_no_room(tiny_model: Path) -> None:
    async def test() -> None:
        async with started(loader(tiny_model, backend="numpy"), max_queued_requests=2) as engine:
            with pytest.raises(RequestTimeoutError):
                submit(engine, "the", LONG, timeout_s=0.0)
            assert engine.admission.stats().choices == 0

    run(test)


def test_the_clock_stops_with_the_last_part_of_a_request(tiny_model: Path) -> None:
    async def test() -> None:
        async with started(loader(tiny_model, backend="numpy")) as engine:
            deadline = Deadline.after(1000.0)
            short = SamplingParams(max_tokens=1)
            request = GenerationRequest(prompts=["the", "a"], params=short)
            handle = engine.generate(engine.prepare(request), deadline=deadline)
            assert handle.timer is not None
            handle.end(0)
            assert not handle.timer.cancelled()
            handle.release()
            assert handle.timer.cancelled()
            assert not deadline.has_passed

    run(test)
