"""AsyncLLM: what asyncio code makes of a model, with real engines on the tiny model."""

import asyncio
import gc
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from nanovllm import (
    LLM,
    AsyncLLM,
    CheckpointError,
    EngineNotReadyError,
    InvalidRequestError,
    RequestTimeoutError,
    SamplingParams,
    StructuredOutputs,
)
from tests.support.async_engines import engine_threads, run, until

LONG = SamplingParams(max_tokens=30, temperature=0, ignore_eos=True)
SETTINGS: dict[str, Any] = {"backend": "numpy", "kv_cache_memory": "4MiB", "block_size": 8}


@asynccontextmanager
async def opened(folder: Path) -> AsyncIterator[AsyncLLM]:
    async with AsyncLLM(folder, **SETTINGS) as llm:
        yield llm


def test_it_gives_what_llm_gives_whole_and_in_pieces(tiny_model: Path) -> None:
    params = SamplingParams(n=2, seed=5, max_tokens=15, logprobs=1, stop="e")
    before = engine_threads()
    with LLM(tiny_model, **SETTINGS) as llm:
        (expected,) = llm.generate("the hen", params, use_tqdm=False)
        (default,) = llm.generate("the", SamplingParams(seed=1), use_tqdm=False)

    async def test() -> None:
        llm = AsyncLLM(tiny_model, **SETTINGS)  # loaded by the first request
        outputs = [output async for output in llm.generate("the hen", params, "my-name")]
        assert outputs[-1].outputs == expected.outputs
        assert outputs[-1].finished
        assert "my-name" in outputs[-1].request_id
        lengths = [sum(len(one.text) for one in output.outputs) for output in outputs]
        assert lengths == sorted(lengths), "each output is the whole answer so far"
        whole = await llm.complete("the hen", params)
        assert whole.outputs == expected.outputs
        pieces = ["", ""]
        async for output in llm.stream("the hen", params):
            for one in output.outputs:
                pieces[one.index] += one.text
        assert pieces == [one.text for one in expected.outputs]
        assert await llm.default_sampling_params() == SamplingParams()
        with pytest.raises(InvalidRequestError, match="is a dict but must be a SamplingParams"):
            await llm.complete("the", {"max_tokens": 4})  # type: ignore[arg-type]
        short = await llm.complete("the", SamplingParams(seed=1))
        assert len(short.outputs[0].token_ids) == len(default.outputs[0].token_ids)
        assert (await llm.get_tokenizer()).decode(whole.prompt_token_ids) == "the hen"
        await llm.close()
        await llm.close()
        assert "closed" in repr(llm)
        with pytest.raises(EngineNotReadyError, match="this AsyncLLM is closed; make another one"):
            await llm.complete("the", params)

    run(test)
    assert engine_threads() <= before


def test_tasks_share_a_batch_and_leaving_a_loop_aborts_its_request(tiny_model: Path) -> None:
    async def test() -> None:
        async with opened(tiny_model) as llm:
            alone = await llm.complete("the", LONG)
            together = await asyncio.gather(*(llm.complete("the", LONG) for _ in range(3)))
            assert all(one.outputs == alone.outputs for one in together)
            async with aclosing(llm.generate("the", LONG)) as outputs:
                async for _ in outputs:
                    break
            async with aclosing(llm.stream("the", LONG)) as outputs:
                async for _ in outputs:
                    break
            engine = llm._engine.engine  # noqa: SLF001 - whether it is idle
            await until(lambda: not engine.has_work)
            with pytest.raises(RequestTimeoutError):
                await llm.complete("the", LONG, timeout_s=1e-9)
            with pytest.raises(InvalidRequestError, match="the prompt is empty"):
                await llm.complete("")
            wrong = SamplingParams(structured_outputs=StructuredOutputs(regex="("))
            with pytest.raises(InvalidRequestError, match="regex"):
                await llm.complete("the", wrong)

    run(test)


def test_masks_that_arrive_while_steps_are_planned_end_no_engine(tiny_model: Path) -> None:
    """The first mask of a new grammar frees all of its choices at once, on another thread."""

    async def test() -> None:
        async with opened(tiny_model) as llm:
            for turn in range(4):
                params = SamplingParams(
                    n=32,
                    max_tokens=2,
                    structured_outputs=StructuredOutputs(regex=f"(a|the) {turn}[ab]*"),
                )
                answers = await asyncio.gather(*(llm.complete("the", params) for _ in range(8)))
                assert {len(answer.outputs) for answer in answers} == {32}

    run(test)


def test_a_model_that_cannot_be_loaded_is_told(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"folder without config\.json"):
        AsyncLLM(tmp_path)
    with pytest.raises(ValueError, match="max_model_len is 4096"):
        AsyncLLM(tiny_model, max_model_len=4096)
    for path in tiny_model.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"")

    async def test() -> None:
        llm = AsyncLLM(tmp_path, **SETTINGS)
        for _ in range(2):
            with pytest.raises(CheckpointError, match="damaged or incomplete"):
                await llm.complete("the")

    run(test)


def test_another_event_loop_is_refused_and_an_abandoned_one_ends_its_thread(
    tiny_model: Path,
) -> None:
    before = engine_threads()
    llm = AsyncLLM(tiny_model, **SETTINGS)
    assert "loading" in repr(llm)

    async def use() -> None:
        await llm.complete("the", SamplingParams(max_tokens=1))

    run(use)
    (thread,) = engine_threads() - before
    with pytest.raises(EngineNotReadyError, match="belongs to the event loop that used it first"):
        run(use)
    del llm, use
    gc.collect()

    async def ended() -> None:
        await until(lambda: not thread.is_alive())

    run(ended)
