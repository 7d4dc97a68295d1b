"""An engine of the course's solutions gives the bits of backend="numpy", whatever it schedules."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nanovllm.config import EngineConfig
from nanovllm.engine.beam_search import BeamSearches
from nanovllm.engine.engine import Engine
from nanovllm.engine.engine_parts import OWN_PARTS, EngineParts, make_scheduler
from nanovllm.engine.generation_request import (
    BeamSearchParams,
    GenerationRequest,
    PoolingParams,
)
from nanovllm.engine.input_processor import InputProcessor
from nanovllm.engine.prompt_request import PromptRequest
from nanovllm.engine.scheduling.request import FinishReason
from nanovllm.errors import InvalidRequestError
from nanovllm.learn.engine import engine_parts_of, learn_parts
from nanovllm.learn.folder import CourseFolder
from nanovllm.learn.parts import load_parts
from nanovllm.sampling_params import SamplingParams
from nanovllm.structured_outputs import StructuredOutputs

CLASSROOM: dict[str, Any] = {
    "backend": "numpy", "num_blocks": 16, "block_size": 8, "max_num_batched_tokens": 24,
    "max_num_seqs": 4, "seed": 1, "batch_invariant": True,
}  # fmt: skip
REQUESTS: tuple[tuple[str | list[int], dict[str, Any]], ...] = (
    ("The first prompt is longer than one block of the cache", {"max_tokens": 40}),
    ("The first prompt is longer than one block of the cache, too", {"temperature": 0.0}),
    ("n", {"n": 3, "max_tokens": 20}),
    ("draws", {"top_k": 20, "top_p": 0.9, "logprobs": 3, "frequency_penalty": 0.5}),
    ("prompt", {"prompt_logprobs": 2, "max_tokens": 0, "temperature": 0.0}),
    ([7] * 40, {"min_p": 0.02, "min_tokens": 12, "ignore_eos": True, "max_tokens": 60}),
    ("stops", {"stop": ["e", "th"], "ignore_eos": True, "max_tokens": 50}),
    ("stops", {"stop": ["e"], "include_stop_str_in_output": True, "stop_token_ids": [9]}),
)


@pytest.fixture(scope="module")
def parts() -> EngineParts:
    """The parts of an engine that runs the solutions."""
    return engine_parts_of(load_parts(None), Path())


def complete(engine: Engine, requests: Sequence[tuple[Any, dict[str, Any]]] = REQUESTS) -> Any:
    """Return the outputs of all requests, which the engine gets at once."""
    prompts: list[PromptRequest] = []
    for seed, (prompt, settings) in enumerate(requests):
        params = SamplingParams(seed=seed, **{"max_tokens": 30, **settings})
        request = GenerationRequest(prompts=[prompt], params=params, request_id="test")
        prompts += engine.input_processor.process(request)
    for _ in engine.run(prompts):
        engine.check_integrity()
    return [output_of(prompt.output()) for prompt in prompts]


def output_of(output: Any) -> Any:
    """Return what must be equal of an output."""
    choices = [
        (one.text, one.token_ids, one.logprobs, one.finish_reason, one.stop_reason)
        for one in output.outputs
    ]
    return choices, output.prompt_logprobs, output.error


@pytest.fixture(scope="module")
def expected(tiny_model: Path) -> Any:
    """The outputs of backend="numpy"."""
    return complete(Engine.load(tiny_model, EngineConfig(**CLASSROOM)))


def test_the_classroom_gives_the_bits_of_numpy(
    tiny_model: Path, parts: EngineParts, expected: Any
) -> None:
    engine = Engine.load(tiny_model, EngineConfig(**CLASSROOM), parts)
    assert complete(engine) == expected
    stats = engine.stats()
    assert stats.num_preemptions > 0
    assert stats.prefix_cache_hits > 0
    assert stats.kv_cache_usage == 0.0
    assert stats.prompt_tokens_computed > stats.prompt_tokens - stats.prompt_tokens_cached


def test_the_network_alone_gives_the_bits_of_numpy_in_batches(
    tiny_model: Path, parts: EngineParts
) -> None:
    config = EngineConfig(**{**CLASSROOM, "batch_invariant": False})
    network = replace(parts, make_scheduler=make_scheduler, input_processor=InputProcessor)
    assert complete(Engine.load(tiny_model, config, network)) == complete(
        Engine.load(tiny_model, config, OWN_PARTS)
    )


def test_without_prefix_cache_nothing_is_found(tiny_model: Path, parts: EngineParts) -> None:
    config = EngineConfig(**CLASSROOM, enable_prefix_caching=False)
    engine = Engine.load(tiny_model, config, parts)
    complete(engine, [([5] * 20, {}), ([5] * 20, {})])
    assert engine.stats().prefix_cache_hits == 0


def test_embeddings_and_prompt_scores_compute_every_token(
    tiny_model: Path, parts: EngineParts
) -> None:
    def answers(engine: Engine) -> Iterator[object]:
        for _ in range(2):  # the second time all blocks are cached
            request = GenerationRequest(
                prompts=[[3] * 30], params=PoolingParams(pooling="mean"), request_id="test"
            )
            prompts = engine.input_processor.process(request)
            for _ in engine.run(prompts):
                pass
            yield prompts[0].embedding().outputs.embedding
            yield complete(engine, [([3] * 30, {"prompt_logprobs": 1, "max_tokens": 2})])

    own = Engine.load(tiny_model, EngineConfig(**CLASSROOM))
    learn = Engine.load(tiny_model, EngineConfig(**CLASSROOM), parts)
    assert list(answers(learn)) == list(answers(own))


def test_beams_and_deadlines_work(tiny_model: Path, parts: EngineParts) -> None:
    def beams(engine: Engine) -> object:
        params = BeamSearchParams(beam_width=3, max_tokens=6)
        request = GenerationRequest(prompts=[[4] * 12], params=params, request_id="test")
        searches = BeamSearches(request, engine.input_processor)
        for prompts in searches.rounds(engine.config.max_num_seqs):
            for _ in engine.run(prompts):
                engine.check_integrity()
        return [one.token_ids for one in searches.outputs()[0].outputs]

    learn = Engine.load(tiny_model, EngineConfig(**CLASSROOM), parts)
    assert beams(learn) == beams(Engine.load(tiny_model, EngineConfig(**CLASSROOM)))
    request = GenerationRequest(
        prompts=["late", "aborted", "x"], params=SamplingParams(), request_id="test"
    )
    late, aborted, other = (one.requests[0] for one in learn.input_processor.process(request))
    learn.add_request(late, deadline_s=0.0)
    learn.add_request(aborted)
    learn.add_request(other)
    learn.step()
    assert learn.scheduler.running == [aborted, other]
    learn.finish_request(aborted.request_id, FinishReason.ABORT)
    learn.step()
    assert learn.scheduler.running == [other]
    learn.check_integrity()


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"structured_outputs": StructuredOutputs(regex="a+")}, "structured_outputs"),
        ({}, "cache_salt"),
        ({}, "priority"),
    ],
)
def test_what_the_course_cannot_do_is_refused(
    tiny_model: Path, parts: EngineParts, settings: dict[str, Any], field: str
) -> None:
    engine = Engine.load(tiny_model, EngineConfig(**CLASSROOM), parts)
    fields: dict[str, Any] = {"cache_salt": "salt", "priority": 1}
    others = {field: fields[field]} if field in fields else {}
    request = GenerationRequest(
        prompts=["x"], params=SamplingParams(**settings), request_id="test", **others
    )
    with pytest.raises(InvalidRequestError, match=f"{field} cannot be used with backend 'learn'"):
        engine.input_processor.process(request)


def test_another_order_than_that_of_arrival_is_refused(
    tiny_model: Path, parts: EngineParts
) -> None:
    config = EngineConfig(**CLASSROOM, scheduling_policy="fair")
    with pytest.raises(ValueError, match="scheduling_policy is 'fair', but the course's"):
        Engine.load(tiny_model, config, parts)


def test_a_folder_of_stubs_runs_on_the_projects_code(
    tiny_model: Path, tmp_path: Path, expected: Any
) -> None:
    CourseFolder.start(tmp_path / "gpt")
    engine = Engine.load(tiny_model, EngineConfig(**CLASSROOM), learn_parts(tmp_path / "gpt"))
    assert not any(owner.is_readers for owner in engine.parts.owners)
    assert complete(engine) == expected


def test_a_folder_of_solutions_is_the_readers(
    tiny_model: Path, tmp_path: Path, expected: Any
) -> None:
    CourseFolder.start(tmp_path / "gpt", has_solutions=True)
    engine = Engine.load(tiny_model, EngineConfig(**CLASSROOM), learn_parts(tmp_path / "gpt"))
    assert all(owner.is_readers for owner in engine.parts.owners)
    assert engine.parts.name == f"learn:{tmp_path / 'gpt'}"
    assert complete(engine) == expected


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match=r"has no course\.json; `nanovllm learn start"):
        learn_parts(tmp_path)
