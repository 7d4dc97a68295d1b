"""Embeddings of the engine: equal bits alone, in any batch or chunks, cached or preempted."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from nanovllm.config import BACKENDS, BackendName, EngineConfig
from nanovllm.engine.engine import Engine
from nanovllm.engine.prompt_request import PromptRequest
from nanovllm.engine.scheduling.request import FinishReason, Pooling
from nanovllm.errors import ContextLengthError, EngineFaultError, InvalidRequestError
from nanovllm.model.backend import LoadOptions
from nanovllm.model.numpy_backend import NumpyBackend
from nanovllm.outputs import EmbeddingRequestOutput
from nanovllm.sampling_params import SamplingParams
from tests.support.batches import make_batch
from tests.support.processing import embed, process
from tests.support.scheduling import uncached_free_blocks

BLOCK_SIZE = 8


KINDS: dict[str, dict[str, str]] = {
    **{backend: {"backend": backend} for backend in BACKENDS},
    "int8": {"quantization": "int8", "kv_cache_dtype": "int8"},
}


@pytest.fixture(scope="module", params=KINDS)
def exact(request: pytest.FixtureRequest) -> EngineConfig:
    """Settings under which bits never depend on company, for each backend."""
    config = EngineConfig(
        batch_invariant=True,
        block_size=BLOCK_SIZE,
        num_blocks=64,
        max_num_batched_tokens=64,
        max_num_seqs=8,
    )
    return replace(config, **KINDS[request.param])  # type: ignore[arg-type]


@dataclass(frozen=True)
class Job:
    """A prompt that is to be embedded."""

    prompt: tuple[int, ...]
    pooling: Pooling
    normalize: bool = True


def prompt_of(seed: int, length: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(1, 256, length).tolist())


COMMON = prompt_of(99, 24)
JOBS = [
    Job(prompt, pooling)
    for prompt in (
        prompt_of(1, 1),
        prompt_of(2, 7),
        prompt_of(3, 8),
        prompt_of(4, 33),
        COMMON,
        (*COMMON, 7),
        prompt_of(5, 128),
    )
    for pooling in ("last", "mean")
]


def run(engine: Engine, jobs: Sequence[Job], *, writing: int = 0) -> list[EmbeddingRequestOutput]:
    """Embed all jobs beside `writing` requests that generate; free blocks of the cache hold NaN."""
    params = SamplingParams(
        max_tokens=30, temperature=0.9, seed=5, prompt_logprobs=1, ignore_eos=True
    )
    others = [
        process(engine.input_processor, f"other{i}", prompt_of(50 + i, 11 + i), params)
        for i in range(writing)
    ]
    own = [
        embed(
            engine.input_processor,
            f"job{i}",
            job.prompt,
            pooling=job.pooling,
            normalize=job.normalize,
        )
        for i, job in enumerate(jobs)
    ]
    mixed: list[PromptRequest] = [*own, *others]
    random.Random(3).shuffle(mixed)
    for _ in engine.run(mixed):
        engine.check_integrity()
        engine.runner.backend.fill_blocks(uncached_free_blocks(engine.blocks), np.nan)
    assert engine.blocks.num_used == 0
    assert all(len(other.output().outputs[0].token_ids) == 30 for other in others)
    return [prepared.embedding() for prepared in own]


def vectors(outputs: Sequence[EmbeddingRequestOutput]) -> list[list[float]]:
    return [output.outputs.embedding for output in outputs]


@pytest.fixture(scope="module")
def alone(exact: EngineConfig, tiny_model: Path) -> list[list[float]]:
    """Each job's vector when nothing else runs, its prompt in one piece, without a prefix cache."""
    config = replace(exact, enable_prefix_caching=False, max_num_batched_tokens=128)
    return [vectors(run(Engine.load(tiny_model, config), [job]))[0] for job in JOBS]


def test_an_embedding_is_the_final_hidden_state(exact: EngineConfig, tiny_model: Path) -> None:
    backend = NumpyBackend.load(tiny_model, LoadOptions(batch_invariant=True))
    backend.allocate_cache(40, BLOCK_SIZE)
    engine = Engine.load(tiny_model, exact)
    for job in JOBS:
        states = np.array(
            backend.forward(make_batch([list(job.prompt)], block_size=BLOCK_SIZE, all_rows=True))
        )
        expected = states[-1] if job.pooling == "last" else states.mean(axis=0)
        raw, scaled = vectors(run(engine, [replace(job, normalize=False), job]))
        assert len(raw) == engine.model.d_model
        if exact.quantization is None:
            np.testing.assert_allclose(raw, expected, rtol=0, atol=1e-4)
        assert np.dot(raw, expected) / np.linalg.norm(expected) ** 2 == pytest.approx(1.0, abs=0.1)
        assert np.dot(scaled, expected) / np.linalg.norm(expected) > 0.98
        np.testing.assert_allclose(scaled, np.array(raw) / np.linalg.norm(raw), rtol=1e-6)
        assert math.fsum(x * x for x in scaled) == pytest.approx(1.0, abs=1e-6)
        assert [float(np.float32(x)) for x in scaled] == scaled, "each number is a float32"


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_last_state_is_the_one_that_the_next_token_comes_from(
    tiny_model: Path, backend: BackendName
) -> None:
    engine = Engine.load(
        tiny_model, EngineConfig(backend=backend, block_size=BLOCK_SIZE, num_blocks=64)
    )
    (raw,) = vectors(run(engine, [Job(COMMON, "last", normalize=False)]))
    logits = engine.runner.backend.logits(np.array([raw], dtype=np.float32))[0]
    prepared = process(
        engine.input_processor,
        "next",
        COMMON,
        SamplingParams(max_tokens=1, temperature=0, ignore_eos=True),
    )
    for _ in engine.run([prepared]):
        pass
    assert prepared.output().outputs[0].token_ids == [int(logits.argmax())]


@pytest.mark.parametrize("writing", [0, 4])
def test_bits_do_not_depend_on_the_batch(
    exact: EngineConfig, tiny_model: Path, alone: list[list[float]], writing: int
) -> None:
    engine = Engine.load(
        tiny_model,
        replace(
            exact,
            enable_prefix_caching=False,
            num_blocks=256,
            max_num_seqs=32,
            max_num_batched_tokens=1024,
        ),
    )
    assert vectors(run(engine, JOBS, writing=writing)) == alone
    assert vectors(run(engine, JOBS[::-1], writing=writing)) == alone[::-1]


@pytest.mark.parametrize("budget", [8, 9, 13, 17, 64])
def test_bits_do_not_depend_on_chunking(
    exact: EngineConfig, tiny_model: Path, alone: list[list[float]], budget: int
) -> None:
    engine = Engine.load(tiny_model, replace(exact, max_num_batched_tokens=budget))
    assert vectors(run(engine, JOBS, writing=2)) == alone


def test_bits_do_not_depend_on_the_prefix_cache_which_serves_the_last_state_alone(
    exact: EngineConfig, tiny_model: Path, alone: list[list[float]]
) -> None:
    engine = Engine.load(tiny_model, replace(exact, num_blocks=256))
    run(engine, JOBS)
    again = run(engine, JOBS)
    assert vectors(again) == alone
    hits = {job: output.num_cached_tokens for job, output in zip(JOBS, again, strict=True)}
    assert [hits[job] for job in JOBS if job.pooling == "mean"] == [0] * 7
    assert [hits[job] for job in JOBS if job.pooling == "last"] == [0, 0, 0, 32, 16, 24, 120]


@pytest.mark.parametrize("caching", [True, False])
def test_bits_do_not_depend_on_preemption(
    exact: EngineConfig, tiny_model: Path, alone: list[list[float]], caching: bool
) -> None:
    """Requests of higher priority outgrow the pool while a long prompt is read in chunks."""
    config = replace(
        exact,
        num_blocks=20,
        max_num_batched_tokens=8,
        enable_prefix_caching=caching,
        scheduling_policy="priority",
    )
    for job, expected in zip(JOBS[-2:], alone[-2:], strict=True):
        engine = Engine.load(tiny_model, config)
        params = SamplingParams(max_tokens=60, temperature=0, ignore_eos=True)
        writers = [
            process(engine.input_processor, f"writer{i}", prompt_of(60 + i, 2), params, priority=-1)
            for i in range(2)
        ]
        own = embed(engine.input_processor, "own", job.prompt, pooling=job.pooling)
        for _ in engine.run([own, *writers]):
            engine.check_integrity()
        assert engine.scheduler.num_preemptions > 0
        assert own.requests[0].num_preemptions > 0
        assert own.embedding().outputs.embedding == expected


def test_prompts_fill_the_context_and_no_more(exact: EngineConfig, tiny_model: Path) -> None:
    engine = Engine.load(tiny_model, exact)
    assert (
        len(run(engine, [Job(prompt_of(1, 128), "mean")])[0].prompt_token_ids)
        == engine.max_model_len
    )
    with pytest.raises(ContextLengthError, match="the prompt has 129 tokens, the limit is 128"):
        embed(engine.input_processor, "long", prompt_of(1, 129))
    small = Engine.load(tiny_model, replace(exact, num_blocks=2))
    with pytest.raises(ContextLengthError, match="need 17 tokens of KV cache, which has 16"):
        embed(small.input_processor, "long", prompt_of(1, 17))


@pytest.mark.parametrize(
    "settings",
    [
        {"pooling": "max"},
        {"pooling": None},
        {"normalize": 1},
        {"priority": "high"},
        {"cache_salt": 5},
        {"client": 5},
    ],
)
def test_a_wrong_setting_is_told(tiny_model: Path, settings: dict[str, object]) -> None:
    engine = Engine.load(tiny_model, EngineConfig(kv_cache_memory="1MiB"))
    with pytest.raises(InvalidRequestError, match=next(iter(settings))):
        embed(engine.input_processor, "r", "the", **settings)


def test_an_embedding_can_be_aborted_and_may_fail(
    exact: EngineConfig, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine.load(tiny_model, replace(exact, max_num_batched_tokens=8))
    first, second = (
        embed(engine.input_processor, name, prompt_of(5, 40), pooling="mean")
        for name in ("first", "second")
    )
    engine.add_request(first.requests[0])
    engine.step()
    ended = engine.finish_request("first", FinishReason.ABORT)
    assert ended is not None
    assert ended.finish_reason is FinishReason.ABORT
    engine.check_integrity()
    monkeypatch.setattr(
        engine.runner, "run", lambda *_: (_ for _ in ()).throw(RuntimeError("the kernel fell over"))
    )
    with pytest.raises(EngineFaultError, match="the log has the reason") as caught:
        list(engine.run([second]))
    assert "fell over" in str(caught.value.__cause__)
    assert not engine.has_work
    engine.check_integrity()
