"""What is counted of drafts: by the engine, in its steps, for a request, and in their record."""

from dataclasses import replace
from pathlib import Path

import pytest

from nanovllm import EngineConfig, RequestOutput, SamplingParams
from nanovllm.engine.engine import Engine
from nanovllm.engine.generation_request import GenerationRequest
from nanovllm.engine.inspection.recorder import StepRecorder
from nanovllm.engine.metrics import StepStats, TokenRates
from tests.support.scheduling import draft, make_request, make_scheduler, record_step
from tests.support.speculation import draft_always

PROMPT = "the the a the the a the the"
PARAMS = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True, logprobs=2)


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Engine:
    config = EngineConfig(
        backend="numpy", batch_invariant=True, kv_cache_memory="4MiB",
        speculative_config={"model": str(tiny_model), "num_speculative_tokens": 4},
    )  # fmt: skip
    return draft_always(Engine.load(tiny_model, config))


def run(engine: Engine, params: SamplingParams) -> tuple[RequestOutput, list[StepStats]]:
    request = GenerationRequest(prompts=[PROMPT], params=params, request_id="r")
    (prompt,) = engine.input_processor.process(request)
    steps = [step.stats for step in engine.run([prompt])]
    return prompt.output(), steps


def delivered(steps: list[StepStats]) -> tuple[int, int]:
    """Return drafted and accepted tokens, as a server's metrics count them."""
    drafts = [draft for stats in steps for draft in stats.drafts]
    return sum(drafted for drafted, _ in drafts), sum(accepted for _, accepted in drafts)


def test_all_counts_agree(engine: Engine) -> None:
    before = engine.stats()
    output, steps = run(engine, PARAMS)
    after = engine.stats()
    drafted = after.num_draft_tokens - before.num_draft_tokens
    accepted = after.num_accepted_tokens - before.num_accepted_tokens
    assert (output.num_drafted_tokens, output.num_accepted_tokens) == (drafted, accepted)
    assert 0 < accepted <= drafted
    assert len(after.num_accepted_tokens_per_pos) == 4
    assert sum(after.num_accepted_tokens_per_pos) == after.num_accepted_tokens
    assert after.generation_tokens - before.generation_tokens == 24
    assert len(steps) < 24
    assert sum(stats.num_prompt_tokens for stats in steps) == len(output.prompt_token_ids)
    assert sum(stats.num_decode_tokens for stats in steps) == 23  # the prompt gives the first
    assert sum(stats.num_generated_tokens for stats in steps) == 24
    assert sum(stats.num_tokens - stats.num_prompt_tokens for stats in steps) == (
        len(steps) - 1 + drafted
    )
    assert delivered(steps) == (drafted, accepted)


def test_drafted_tokens_after_a_stop_string_are_not_accepted(engine: Engine) -> None:
    text = run(engine, PARAMS)[0].outputs[0].text
    output, steps = run(engine, replace(PARAMS, stop=text[2:4]))  # of the first draft's middle
    assert len(output.outputs[0].token_ids) == 4
    assert (output.num_drafted_tokens, output.num_accepted_tokens) == delivered(steps) == (4, 3)


def test_a_request_without_drafts_has_the_same_bits(engine: Engine) -> None:
    before = engine.stats().num_drafts
    output, steps = run(engine, replace(PARAMS, speculative=False))
    assert engine.stats().num_drafts == before
    assert (len(steps), output.num_drafted_tokens, output.num_accepted_tokens) == (24, 0, 0)
    assert output.outputs == run(engine, PARAMS)[0].outputs


def test_drafts_from_the_text_of_another_request_are_shown_only_where_they_are_accepted(
    tiny_model: Path,
) -> None:
    config = EngineConfig(
        backend="numpy", batch_invariant=True, kv_cache_memory="4MiB", block_size=8,
        speculative_config={"method": "ngram", "prompt_lookup_min": 16, "prompt_lookup_max": 16},
    )  # fmt: skip
    engine = draft_always(Engine.load(tiny_model, config))
    sampled = replace(PARAMS, temperature=1.0, seed=1)
    first, steps = run(engine, sampled)
    assert (first.num_drafted_tokens, len(steps)) == (0, 24)
    again, steps = run(engine, sampled)
    assert again.outputs == first.outputs
    assert again.num_drafted_tokens == again.num_accepted_tokens > 10
    assert len(steps) == 24 - again.num_accepted_tokens
    others = [run(engine, replace(sampled, seed=seed))[0] for seed in range(2, 12)]
    assert any(each.num_drafted_tokens > each.num_accepted_tokens for each in others)
    for (output,) in (each.outputs for each in others):
        pairs = zip(output.drafted_token_ids, output.token_ids, strict=True)
        assert all(drafted in (None, token) for drafted, token in pairs)
    salted = GenerationRequest(prompts=[PROMPT], params=sampled, request_id="s", cache_salt="x")
    (prompt,) = engine.input_processor.process(salted)
    list(engine.run([prompt]))
    assert (prompt.output().num_drafted_tokens, prompt.output().outputs) == (0, first.outputs)


def test_the_rate_of_decoding_is_that_of_tokens_not_of_rows() -> None:
    rates = TokenRates()
    rates.add(StepStats(5, 0, 3, 0.5))
    rates.add(StepStats(10, 5, 4, 1.0))
    assert str(rates) == "prefill 10 tok/s, decode 7 tok/s"


@pytest.mark.parametrize(("wrong", "accepted"), [(0, 0), (1, 1), (9, 3)])
def test_a_record_has_the_drafts(wrong: int, accepted: int) -> None:
    scheduler = make_scheduler()
    recorder = scheduler.observer = StepRecorder(scheduler, 0)
    request = make_request("r", 5, 9)
    scheduler.add(request)
    record_step(scheduler, recorder)
    draft(request, 3, wrong)
    record_step(scheduler, recorder)
    record_step(scheduler, recorder)
    _, verified, plain = recorder.last(3)
    (sequence,) = verified.sequences
    assert (sequence.kind, sequence.num_tokens) == ("decode", 4)
    assert (sequence.num_drafted, sequence.num_accepted) == (3, accepted)
    assert (verified.num_tokens, verified.num_prompt_tokens) == (4, 0)
    assert verified.num_decode_tokens == 1 + accepted
    assert [each.num_drafted for each in plain.sequences] == [0]
    assert plain.decoding
