"""The plan of an engine's memory: it shrinks a default cache, and refuses what cannot fit."""

import asyncio
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanovllm.config import BackendName, EngineConfig
from nanovllm.engine.admission import MAX_LOGPROBS_BYTES
from nanovllm.engine.async_engine import AsyncEngine
from nanovllm.engine.engine import Engine
from nanovllm.engine.generation_request import GenerationRequest
from nanovllm.engine.memory import RESERVE_BYTES, check_sizes, plan_memory
from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.errors import InvalidRequestError
from nanovllm.model.backend import Backend, LoadOptions
from nanovllm.model.batch import ForwardBatch
from nanovllm.model.config import ModelConfig
from nanovllm.model.kernels.backend import NumbaBackend
from nanovllm.model.machine import MemoryLimit
from nanovllm.model.numpy_backend import NumpyBackend
from nanovllm.runner.native_model_runner import NativeModelRunner
from nanovllm.sampling_params import SamplingParams

MIB = 1 << 20
POSITIONS = 128  # of the tiny model


@pytest.fixture(scope="module")
def numpy_backend(tiny_model: Path) -> NumpyBackend:
    return NumpyBackend.load(tiny_model)


def limit_with(free_bytes: int) -> MemoryLimit:
    """Return a limit that leaves so much beside the process and the reserve."""
    used = 100 * MIB
    return MemoryLimit("memory.max", used + RESERVE_BYTES + free_bytes, used)


def make_engine(folder: Path, free_bytes: int, **settings: Any) -> Engine:
    config = EngineConfig(backend="numpy", **settings)
    runner = NativeModelRunner.load(folder, "numpy", LoadOptions())
    working = runner.backend.working_bytes(512, 32, config.block_size)
    return Engine(
        config, runner, Tokenizer.load(folder), memory_limit=limit_with(working + free_bytes)
    )


def test_the_default_cache_shrinks_to_the_limit_and_says_so(
    tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        engine = make_engine(tiny_model, 8 * MIB)
    plan = engine.memory
    assert plan.limit is not None
    assert 5 * MIB < plan.cache_bytes <= 6 * MIB  # three quarters
    assert plan.free_bytes == plan.limit.num_bytes - plan.other_bytes - plan.cache_bytes
    assert plan.free_bytes >= 2 * MIB
    assert engine.blocks.num_blocks == plan.num_blocks
    (record,) = caplog.records
    message = record.getMessage()
    assert message.startswith("the KV cache has 6.0 MiB instead of 1.0 GiB, because memory.max is ")
    assert "of which model and process need " in message
    engine.close()


def test_the_default_cache_is_a_gibibyte_where_memory_is_plenty(
    numpy_backend: NumpyBackend, caplog: pytest.LogCaptureFixture
) -> None:
    config = EngineConfig(backend="numpy")
    for limit in (None, limit_with(4096 * MIB)):
        for max_model_len in (POSITIONS, 1 << 30):  # the second has requests of 1 GiB at most
            plan = plan_memory(config, [numpy_backend], max_model_len, limit)
            assert plan.cache_bytes == 1024 * MIB
            assert (plan.free_bytes is None) == (limit is None)
    assert not caplog.records


@pytest.mark.parametrize("size", [{"kv_cache_memory": "8MiB"}, {"num_blocks": 256}])
def test_a_chosen_cache_is_allocated_whole_or_refused(
    numpy_backend: NumpyBackend, size: dict[str, Any]
) -> None:
    config = EngineConfig(backend="numpy", block_size=32, **size)
    cache_bytes = 8 * MIB if "num_blocks" not in size else 256 * numpy_backend.block_bytes(32)
    working = numpy_backend.working_bytes(512, 32, 32)
    plan = plan_memory(config, [numpy_backend], POSITIONS, limit_with(working + cache_bytes))
    assert plan.cache_bytes == cache_bytes
    with pytest.raises(ValueError, match=r"memory\.max is .* and the KV cache .*lower kv_cache_m"):
        plan_memory(config, [numpy_backend], POSITIONS, limit_with(working + cache_bytes - 1))


def test_a_start_without_room_for_one_request_is_refused(numpy_backend: NumpyBackend) -> None:
    config = EngineConfig(backend="numpy", block_size=32)
    working = numpy_backend.working_bytes(512, 32, 32)
    needed = POSITIONS // 32 * numpy_backend.block_bytes(32)
    for free in (-10 * MIB, needed):  # log-probabilities have a quarter
        with pytest.raises(ValueError, match=r"and one request .*lower max_model_len, max_num"):
            plan_memory(config, [numpy_backend], POSITIONS, limit_with(working + free))
    plan = plan_memory(config, [numpy_backend], POSITIONS, limit_with(working + 2 * needed))
    assert plan.num_blocks >= POSITIONS // 32


def test_weights_above_the_limit_are_refused_before_they_are_read() -> None:
    model = ModelConfig(
        vocab=50257, max_positions=1024, d_model=768, layers=12, heads=12, d_ff=3072
    )
    limit = MemoryLimit("memory.max", 400 * MIB, 50 * MIB)
    with pytest.raises(
        ValueError, match=r"the weights need 475 MiB in float32, but memory\.max is 400 MiB, of wh"
    ):
        check_sizes(EngineConfig(), model, limit)
    for dtype in ("bfloat16", "auto"):
        check_sizes(EngineConfig(dtype=dtype), model, limit)
    with pytest.raises(ValueError, match="need 119 MiB in int8"):
        check_sizes(EngineConfig(quantization="int8"), model, replace(limit, num_bytes=160 * MIB))
    with pytest.raises(
        ValueError, match=r"and the KV cache 900 GiB, but .*; lower kv_cache_memory"
    ):
        check_sizes(EngineConfig(dtype="auto", kv_cache_memory="900GiB"), model, limit)


@pytest.mark.parametrize("kind", [NumpyBackend, NumbaBackend])
def test_a_step_allocates_no_more_than_the_working_memory(
    tiny_model: Path, kind: type[NumbaBackend]
) -> None:
    """The arrays that appear with the largest step, in the compiled backend all that it keeps."""
    backend: Backend = kind.load(tiny_model, LoadOptions(num_threads=2))
    backend.allocate_cache(8, 32)
    before = kept_bytes(backend)
    batch = ForwardBatch.single(np.arange(POSITIONS) % 90, all_rows=True)
    batch = replace(
        batch,
        block_tables=np.arange(POSITIONS // 32, dtype=np.int64)[None],
    )
    backend.logits(backend.forward(batch)[:40])
    working = backend.working_bytes(POSITIONS, 40, 32)
    assert 0 <= kept_bytes(backend) - before <= working
    if isinstance(backend, NumbaBackend):
        assert kept_bytes(backend) - before > working / 4


def kept_bytes(backend: Backend) -> int:
    if not isinstance(backend, NumbaBackend):
        return 0
    return sum(array.nbytes for array in backend.memory.arrays.values())


def test_log_probabilities_have_half_of_what_the_cache_leaves(tiny_model: Path) -> None:
    async def hold() -> None:
        engine = AsyncEngine(lambda: make_engine(tiny_model, 8 * MIB))
        await engine.start()
        await engine.wait_until_ready()
        free_bytes = engine.engine.memory.free_bytes
        params = SamplingParams(logprobs=20, max_tokens=100, ignore_eos=True)
        prepared = engine.prepare(GenerationRequest(prompts=[[1]] * 64, params=params))
        needed = sum(one.size.logprobs_bytes for one in prepared)
        try:
            assert free_bytes is not None
            assert 2 * MIB <= free_bytes < needed < MAX_LOGPROBS_BYTES
            with pytest.raises(InvalidRequestError, match=f"limit is {free_bytes // 2 * 4 // 5} "):
                engine.generate(prepared)
        finally:
            await engine.stop()

    asyncio.run(hold())


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_memory_that_the_system_refuses_is_told(tiny_model: Path, backend: BackendName) -> None:
    """With overcommit, an allocation fails for its address space alone."""
    runner = NativeModelRunner.load(tiny_model, backend, LoadOptions())
    config = EngineConfig(backend=backend, kv_cache_memory="9000000GiB")
    limit = MemoryLimit("memory.max", 1 << 80, 0)
    with pytest.raises(ValueError, match=r"the operating system cannot provide .*lower kv_cache"):
        Engine(config, runner, Tokenizer.load(tiny_model), memory_limit=limit)
