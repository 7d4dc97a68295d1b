"""Engine: real steps on a tiny model. Batched, chunked, cached, preempted = alone."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.config import BACKENDS, EngineConfig
from nanovllm.engine.engine import Engine
from nanovllm.engine.scheduling.request import FinishReason
from nanovllm.outputs import RequestOutput
from nanovllm.sampling_params import SamplingParams
from nanovllm.speculative_config import SpeculativeConfig
from tests.support.checkpoints import write_tiny_model
from tests.support.processing import process
from tests.support.scheduling import uncached_free_blocks
from tests.support.speculation import draft_always


@dataclass(frozen=True)
class Job:
    """A prompt and its settings, for running alone or in company."""

    prompt: tuple[int, ...]
    params: SamplingParams


def run(
    engine: Engine,
    jobs: Sequence[Job],
    *,
    poison: bool = False,
    aborts: dict[int, int] | None = None,
) -> list[RequestOutput]:
    """Run all jobs at once; with `poison`, fill free uncached blocks with NaN before every step.

    `aborts` are numbers of steps, and the indices of the jobs that are aborted before them.
    """
    prepared_requests = [
        process(engine.input_processor, f"job{i}", job.prompt, job.params)
        for i, job in enumerate(jobs)
    ]
    for prepared in prepared_requests:
        for request in prepared.requests:
            engine.add_request(request)
    owner = {
        request.request_id: prepared
        for prepared in prepared_requests
        for request in prepared.requests
    }
    backends = [engine.runner.backend]
    if engine.speculator is not None and engine.speculator.draft_model is not None:
        backends.append(engine.speculator.draft_model.runner.backend)
    while engine.has_work:
        aborted = (aborts or {}).get(engine.num_steps)
        for request in [] if aborted is None else prepared_requests[aborted].requests:
            engine.finish_request(request.request_id, FinishReason.ABORT)
        if poison:
            for backend in backends:
                backend.fill_blocks(uncached_free_blocks(engine.blocks), np.nan)
        output = engine.step()
        assert output.fault is None, output.fault
        for update in output.updates:
            owner[update.request_id].add_update(update)
        engine.check_integrity()
    assert engine.blocks.num_used == 0
    return [prepared.output() for prepared in prepared_requests]


def bits(output: RequestOutput) -> object:
    """What must not depend on the batch: tokens, and log-probabilities to the last bit."""
    return (
        output.prompt_logprobs,
        [
            (
                answer.token_ids,
                answer.logprobs,
                answer.cumulative_logprob,
                answer.finish_reason,
                answer.text,
            )
            for answer in output.outputs
        ],
    )


def closeness(one: RequestOutput, other: RequestOutput) -> float:
    """Largest difference of the log-probabilities of equal tokens."""
    worst = 0.0
    for a, b in zip(one.outputs, other.outputs, strict=True):
        assert a.token_ids == b.token_ids
        for left, right, token in zip(a.logprobs or [], b.logprobs or [], a.token_ids, strict=True):
            worst = max(worst, abs(left[token].logprob - right[token].logprob))
    return worst


def prompt(seed: int, length: int, vocab: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(1, vocab, length).tolist())


@pytest.fixture(scope="module")
def jobs(exact: EngineConfig, tiny_model: Path) -> list[Job]:
    """Greedy and sampled, short and long, with penalties, filters and log-probabilities."""
    vocab = Engine.load(tiny_model, exact).model.vocab
    common = prompt(99, 24, vocab)
    base = SamplingParams(max_tokens=12, temperature=0.9, seed=5, logprobs=3, ignore_eos=True)
    changes: list[dict[str, object]] = [
        {"temperature": 0.0},
        {},
        {"seed": 6, "top_p": 0.8},
        {"top_k": 5, "presence_penalty": 0.5},
        {"repetition_penalty": 1.3, "min_p": 0.02},
        {"prompt_logprobs": 2},
        {"temperature": 0.0, "frequency_penalty": 0.3},
        {"n": 2},
    ]
    prompts = [
        prompt(1, 1, vocab),
        prompt(2, 7, vocab),
        prompt(3, 8, vocab),
        prompt(4, 33, vocab),
        common,
        (*common, 7),
        prompt(5, 60, vocab),
        common[:16],
    ]
    return [
        Job(p, SamplingParams(**{**base.as_dict(), **change}))
        for p, change in zip(prompts, changes, strict=True)
    ]


@pytest.fixture(scope="module")
def alone(exact: EngineConfig, tiny_model: Path, jobs: list[Job]) -> list[object]:
    """Each job's bits when nothing else runs, in a fresh engine without a prefix cache."""
    config = replace(exact, enable_prefix_caching=False)
    return [bits(run(Engine.load(tiny_model, config), [job])[0]) for job in jobs]


def test_bits_do_not_depend_on_the_batch(
    exact: EngineConfig, tiny_model: Path, jobs: list[Job], alone: list[object]
) -> None:
    engine = Engine.load(
        tiny_model,
        replace(exact, enable_prefix_caching=False, max_num_seqs=16, max_num_batched_tokens=512),
    )
    assert [bits(output) for output in run(engine, jobs)] == alone
    assert [bits(output) for output in run(engine, jobs[::-1])] == alone[::-1]


@pytest.mark.parametrize("budget", [8, 9, 13, 17, 64])
def test_bits_do_not_depend_on_chunking(
    exact: EngineConfig, tiny_model: Path, jobs: list[Job], alone: list[object], budget: int
) -> None:
    engine = Engine.load(tiny_model, replace(exact, max_num_batched_tokens=budget))
    assert [bits(output) for output in run(engine, jobs)] == alone


def test_bits_do_not_depend_on_prefix_cache_hits(
    exact: EngineConfig, tiny_model: Path, jobs: list[Job], alone: list[object]
) -> None:
    engine = Engine.load(tiny_model, replace(exact, num_blocks=256))
    assert [bits(output) for output in run(engine, jobs)] == alone
    again = run(engine, jobs)
    assert [bits(output) for output in again] == alone
    hits = [output.num_cached_tokens for output in again]
    assert [hits[i] for i in (3, 4, 5, 6, 7)] == [32, 16, 0, 56, 8], (
        "prompts seen before are found, except where their log-probabilities are asked for"
    )


@pytest.mark.parametrize("caching", [True, False])
def test_bits_do_not_depend_on_preemption(
    exact: EngineConfig, tiny_model: Path, jobs: list[Job], alone: list[object], caching: bool
) -> None:
    engine = Engine.load(
        tiny_model,
        replace(exact, num_blocks=11, max_num_batched_tokens=24, enable_prefix_caching=caching),
    )
    assert [bits(output) for output in run(engine, jobs)] == alone
    assert engine.scheduler.num_preemptions > 0


@pytest.mark.parametrize("caching", [True, False])
def test_what_free_blocks_hold_changes_nothing(
    exact: EngineConfig, tiny_model: Path, jobs: list[Job], caching: bool
) -> None:
    for batch_invariant in [True, False] if exact.backend == "numpy" else [True]:
        config = replace(
            exact, num_blocks=16, enable_prefix_caching=caching, batch_invariant=batch_invariant
        )
        clean = run(Engine.load(tiny_model, config), jobs)
        poisoned = run(Engine.load(tiny_model, config), jobs, poison=True)
        assert list(map(bits, poisoned)) == list(map(bits, clean))
        assert not any(
            np.isnan(answer.cumulative_logprob or 0)
            for output in poisoned
            for answer in output.outputs
        )


@pytest.mark.parametrize("exact", BACKENDS, indirect=True)
def test_without_batch_invariance_answers_agree_to_1e_5(
    exact: EngineConfig, tiny_model: Path, jobs: list[Job]
) -> None:
    fast = replace(exact, batch_invariant=False)
    together = run(Engine.load(tiny_model, fast), jobs)
    single = [
        run(Engine.load(tiny_model, replace(fast, enable_prefix_caching=False)), [job])[0]
        for job in jobs
    ]
    exactly = run(Engine.load(tiny_model, exact), jobs)
    assert max(closeness(a, b) for a, b in zip(together, single, strict=True)) < 1e-5
    assert max(closeness(a, b) for a, b in zip(together, exactly, strict=True)) < 1e-5


def speculation(
    drafts: str | None, model: Path, another: Path, count: int
) -> SpeculativeConfig | None:
    """Settings that draft by n-grams, by the model itself, which is right, or by another one."""
    if drafts is None:
        return None
    return SpeculativeConfig(
        method="ngram" if drafts in ("ngram", "both") else "draft_model",
        model={"the model": str(model), "both": str(model), "another model": str(another)}.get(
            drafts
        ),
        num_speculative_tokens=count,
        prompt_lookup_min=1 if drafts in ("ngram", "both") else 2,
    )


@pytest.fixture(scope="module")
def another_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with the same tokenizer and somewhat other weights."""
    folder = tmp_path_factory.mktemp("another")
    return write_tiny_model(folder, scales={"mlp.c_proj.weight": 0.7})


@pytest.mark.parametrize("drafts", ["ngram", "the model", "another model", "both"])
def test_drafted_tokens_change_no_bit(
    exact: EngineConfig,
    tiny_model: Path,
    another_model: Path,
    jobs: list[Job],
    alone: list[object],
    drafts: str,
) -> None:
    settings = speculation(drafts, tiny_model, another_model, 4)
    engine = Engine.load(tiny_model, replace(exact, speculative_config=settings))
    draft_always(engine)
    assert [bits(output) for output in run(engine, jobs)] == alone
    assert engine.speculator is not None
    counts = engine.speculator.counts
    assert counts.drafted > 0
    is_sure = drafts in ("the model", "both")  # the n-grams must not take the model's place
    assert 0 < counts.accepted < counts.drafted or is_sure
    if is_sure:  # the last token that it drafts is often beyond the end
        assert counts.accepted > 0.9 * counts.drafted
        assert engine.num_steps < 12


@settings(max_examples=25)
@given(
    data=st.data(),
    block_size=st.sampled_from([4, 8, 32]),
    budget=st.integers(4, 80),
    blocks=st.integers(12, 60),
    caching=st.booleans(),
    drafts=st.sampled_from([None, "ngram", "the model", "another model", "both"]),
    max_drafted=st.integers(1, 5),
)
def test_bits_in_any_schedule(
    exact: EngineConfig,
    tiny_model: Path,
    jobs: list[Job],
    alone: list[object],
    data: st.DataObject,
    block_size: int,
    budget: int,
    blocks: int,
    caching: bool,
    drafts: str | None,
    max_drafted: int,
    another_model: Path,
) -> None:
    """In any batch, order, block size, budget, pool, with any drafts and beside aborted jobs."""
    if exact.backend == "numba":
        # The kernels sum the softmax of a block lane by lane: another block size is another order.
        block_size = 8
    chosen = data.draw(st.lists(st.integers(0, len(jobs) - 1), min_size=1, max_size=6))
    config = replace(
        exact,
        block_size=block_size,
        num_blocks=max(blocks, 96 // block_size),
        max_num_batched_tokens=budget,
        max_num_seqs=4,
        enable_prefix_caching=caching,
        speculative_config=speculation(drafts, tiny_model, another_model, max_drafted),
    )
    engine = Engine.load(tiny_model, config)
    draft_always(engine)
    indices = st.integers(0, len(chosen) - 1)
    aborts = data.draw(st.dictionaries(st.integers(0, 20), indices, max_size=2))
    outputs = run(engine, [jobs[i] for i in chosen], poison=True, aborts=aborts)
    for index, (output, job) in enumerate(zip(outputs, chosen, strict=True)):
        assert bits(output) == alone[job] or index in aborts.values()


def test_a_seed_gives_the_same_answer_and_another_seed_another(
    exact: EngineConfig, tiny_model: Path, jobs: list[Job]
) -> None:
    engine = Engine.load(tiny_model, exact)
    job = jobs[1]
    other = Job(job.prompt, SamplingParams(**{**job.params.as_dict(), "seed": 1234}))
    first, second, third = run(engine, [job, job, other])
    assert bits(first) == bits(second)
    assert first.outputs[0].token_ids != third.outputs[0].token_ids
    several = run(engine, [Job(job.prompt, SamplingParams(**{**job.params.as_dict(), "n": 3}))])[0]
    assert several.outputs[0].token_ids == first.outputs[0].token_ids
    assert len({tuple(answer.token_ids) for answer in several.outputs}) == 3, (
        "each of n answers has draws of its own"
    )


def test_an_engine_seed_makes_unseeded_requests_repeatable(
    exact: EngineConfig, tiny_model: Path
) -> None:
    job = Job((5, 6, 7), SamplingParams(max_tokens=8, ignore_eos=True))
    with_seed = [
        [
            o.outputs[0].token_ids
            for o in run(Engine.load(tiny_model, replace(exact, seed=3)), [job, job])
        ]
        for _ in range(2)
    ]
    assert with_seed[0] == with_seed[1]
    assert with_seed[0][0] != with_seed[0][1], "two requests do not share their draws"
    assert with_seed[0] != [
        o.outputs[0].token_ids for o in run(Engine.load(tiny_model, exact), [job, job])
    ]


def test_prompt_logprobs_are_those_of_teacher_forcing(
    exact: EngineConfig, tiny_model: Path
) -> None:
    """Scoring a text gives each token the log-probability that generating it reported."""
    engine = Engine.load(tiny_model, exact)
    written = run(
        engine,
        [
            Job(
                (3, 1, 4),
                SamplingParams(max_tokens=20, temperature=0.7, seed=1, logprobs=0, ignore_eos=True),
            )
        ],
    )[0].outputs[0]
    whole = (3, 1, 4, *written.token_ids)
    scored = run(engine, [Job(whole, SamplingParams(max_tokens=0, prompt_logprobs=0))])[0]
    assert scored.prompt_logprobs is not None
    assert scored.prompt_logprobs[0] is None
    assert scored.outputs[0].token_ids == []
    positions = scored.prompt_logprobs[3:]
    assert [p[t] for p, t in zip(positions, written.token_ids, strict=True) if p] == [
        p[t] for p, t in zip(written.logprobs or [], written.token_ids, strict=True)
    ]


def test_counters_and_times(exact: EngineConfig, tiny_model: Path) -> None:
    engine = Engine.load(tiny_model, replace(exact, num_blocks=256))
    engine.warm_up()
    assert engine.stats().prompt_tokens == 0, "the warm-up does not count"
    job = Job(tuple(range(1, 21)), SamplingParams(max_tokens=5, temperature=0, ignore_eos=True))
    output = run(engine, [job])[0]
    run(engine, [job])
    stats = engine.stats()
    assert (stats.prompt_tokens, stats.generation_tokens) == (20 + 20, 10)
    assert (stats.prompt_tokens_computed, stats.prompt_tokens_cached) == (20 + 4, 16), (
        "cached tokens are not computed again"
    )
    assert (
        stats.prefix_cache_hits,
        stats.num_requests_running,
        stats.num_requests_waiting,
        stats.kv_cache_usage,
    ) == (16, 0, 0, 0.0)
    assert output.metrics is not None
    times = (
        output.metrics.arrival_s,
        output.metrics.first_scheduled_s,
        output.metrics.first_token_s,
        output.metrics.finished_s,
    )
    assert list(times) == sorted(times)  # type: ignore[type-var]
