"""Errors of LLM: told before anything runs, or by the outputs that they concern."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM, BeamSearchParams, SamplingParams
from nanovllm.config import BackendName
from nanovllm.engine.scheduling.request import Request
from nanovllm.errors import (
    CheckpointError,
    ContextLengthError,
    InvalidRequestError,
)
from nanovllm.prompts import Prompt

GREEDY = SamplingParams(temperature=0, max_tokens=12)


@pytest.fixture(scope="module")
def llm(tiny_model: Path, backend: BackendName) -> LLM:
    return LLM(
        tiny_model, backend=backend, kv_cache_memory="4MiB", block_size=8, batch_invariant=True
    )


@pytest.mark.parametrize("params", [{"temperature": 0}, [GREEDY, None], "greedy", 7])
def test_settings_of_another_kind_are_refused(llm: LLM, params: Any) -> None:
    with pytest.raises(
        InvalidRequestError,
        match=f"sampling_params is a {type(params).__name__} but must be a SamplingParams",
    ):
        llm.generate(["a", "b"], params)
    with pytest.raises(
        InvalidRequestError,
        match=f"params is a {type(params).__name__} but must be a BeamSearchParams",
    ):
        llm.beam_search("a", params)


def test_a_bad_prompt_is_told_before_anything_runs(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match="prompt 1: the prompt is empty"):
        llm.generate(["good", ""], GREEDY)
    with pytest.raises(
        ContextLengthError,
        match=r"the prompt has 500 tokens, which leaves no room for an answer in a context of 128",
    ):
        llm.generate({"prompt_token_ids": [1] * 500}, GREEDY)
    with pytest.raises(InvalidRequestError, match="outside the vocabulary"):
        llm.generate({"prompt_token_ids": [10**6]}, GREEDY)
    with pytest.raises(InvalidRequestError, match="must be text or a list of token ids"):
        llm.generate([3.5], GREEDY)  # type: ignore[list-item]
    assert not llm.engine.has_work
    assert llm.generate([], GREEDY) == []


def test_unknown_settings_are_refused(tiny_model: Path) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'gpu_memory_utilization'"):
        LLM(tiny_model, gpu_memory_utilization=0.9)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="unexpected keyword argument 'temprature'"):
        SamplingParams(temprature=0.5)  # type: ignore[call-arg]


def test_after_an_interruption_the_engine_is_empty_and_works(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = llm.generate("the", GREEDY, use_tqdm=False)[0].outputs[0].token_ids
    calls = 0
    real = llm.engine.step

    def interrupted() -> object:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return real()

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["the"] * 5, GREEDY, use_tqdm=False)
    assert not llm.engine.has_work
    llm.engine.check_integrity()
    assert llm.generate("the", GREEDY, use_tqdm=False)[0].outputs[0].token_ids == expected


def test_an_interrupted_step_leaves_nothing_in_the_prefix_cache(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the forward pass: the next request must not find blocks that were not computed."""
    prompt: Prompt = {"prompt_token_ids": [101, 102, 103, 104, 105] * 8}
    params = SamplingParams(temperature=0, max_tokens=4, logprobs=0, ignore_eos=True)

    def interrupt(batch: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine.runner.backend, "forward", interrupt)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(prompt, params, use_tqdm=False)
    llm.engine.check_integrity()
    after = llm.generate(prompt, params, use_tqdm=False)[0]
    assert after.num_cached_tokens == 0
    fresh = llm.engine
    fresh.blocks.reset_prefix_cache()
    assert llm.generate(prompt, params, use_tqdm=False)[0].outputs[0] == after.outputs[0]


def test_a_cache_that_cannot_be_had_is_told(tiny_model: Path, backend: BackendName) -> None:
    with pytest.raises(
        ValueError,
        match=r"the KV cache .*, but .* is .*, of which .* used; lower kv_cache_memory, or raise",
    ):
        LLM(tiny_model, backend=backend, kv_cache_memory="9000000GiB")


def test_a_failing_step_is_told_by_its_outputs_and_leaves_the_engine_usable(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("the kernel fell over")

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine.runner, "run", fail)
        output = llm.generate("the", GREEDY, use_tqdm=False)[0]
        vector = llm.embed("the", use_tqdm=False)[0]
        search = llm.beam_search("the", BeamSearchParams(beam_width=2), use_tqdm=False)[0]
    assert (output.outputs[0].finish_reason, output.outputs[0].text) == ("error", "")
    assert (vector.outputs.embedding, search.outputs) == ([], [])
    for error in (output.error, vector.error, search.error):
        assert error is not None
        assert "(RuntimeError: the kernel fell over)" in error
    assert len(llm.generate("the", GREEDY, use_tqdm=False)[0].outputs[0].token_ids) == 12


def test_impossible_defaults_of_a_model_are_told_when_it_is_loaded(
    tmp_path: Path, tiny_model: Path
) -> None:
    for path in tiny_model.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    for value, shown in (("-3", "-3"), ('"hot"', "'hot'"), ("true", "True")):
        (tmp_path / "generation_config.json").write_text(f'{{"temperature": {value}}}')
        with pytest.raises(
            CheckpointError, match=rf"generation_config.json .*temperature is {shown}.*delete it"
        ):
            LLM(tmp_path, kv_cache_memory="1MiB")


def test_what_cannot_be_embedded_is_told_before_anything_runs(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InvalidRequestError, match="prompt 1: the prompt is empty"):
        llm.embed(["good", ""])
    with pytest.raises(ContextLengthError, match="the prompt has 129 tokens, the limit is 128"):
        llm.embed([5] * 129)
    with pytest.raises(InvalidRequestError, match="pooling is 'max' but must be 'last' or 'mean'"):
        llm.embed("the", pooling="max")  # type: ignore[call-overload]
    assert not llm.engine.has_work
    real = llm.engine.runner.backend.forward
    with monkeypatch.context() as patch:
        patch.setattr(
            llm.engine.runner.backend, "forward", lambda batch: real(batch) * float("nan")
        )
        for output in llm.embed(["the", "a"], use_tqdm=False):
            assert output.outputs.embedding == []
            assert output.error == "the network's output is not a number; is the checkpoint sound?"
    assert llm.embed("the", use_tqdm=False)[0].error is None


def test_an_error_of_one_prompt_costs_the_others_nothing(llm: LLM) -> None:
    """Its settings together forbid every token, which is found when its answer is begun."""
    blocked = SamplingParams(allowed_token_ids=[5], stop_token_ids=[5], min_tokens=2)
    outputs = llm.generate(["the", "a", "in"], [GREEDY, blocked, GREEDY], use_tqdm=False)
    expected = llm.generate(["the", "in"], GREEDY, use_tqdm=False)
    assert [output.outputs for output in (outputs[0], outputs[2])] == [
        output.outputs for output in expected
    ]
    assert [output.error is None for output in outputs] == [True, False, True]
    assert "every token is forbidden" in str(outputs[1].error)
    assert outputs[1].outputs[0].finish_reason == "error"


def test_the_others_of_n_answers_are_kept_and_an_error_is_never_the_best(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = Request.append

    def failing(self: Request, token_ids: Sequence[int]) -> int:
        if self.choice_index == 1:
            raise LookupError("lost its place")
        return append(self, token_ids)

    params = SamplingParams(n=2, best_of=3, max_tokens=4, seed=1, ignore_eos=True)
    with monkeypatch.context() as patch:
        patch.setattr(Request, "append", failing)
        (output,) = llm.generate("the", params, use_tqdm=False)
    assert output.error is not None
    assert "lost its place" in output.error
    assert [answer.finish_reason for answer in output.outputs] == ["length", "length"]
    llm.engine.check_integrity()


def test_blocks_of_an_answer_that_is_not_finite_are_computed_again(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt: Prompt = {"prompt_token_ids": [111, 112, 113, 114, 115] * 8}
    backend = llm.engine.runner.backend
    real = backend.forward
    with monkeypatch.context() as patch:
        patch.setattr(backend, "forward", lambda batch: real(batch) * float("nan"))
        (failed,) = llm.generate(prompt, GREEDY, use_tqdm=False)
        (vector,) = llm.embed(prompt, use_tqdm=False)
    assert failed.error == vector.error
    assert llm.generate(prompt, GREEDY, use_tqdm=False)[0].num_cached_tokens == 0
    assert llm.generate(prompt, GREEDY, use_tqdm=False)[0].num_cached_tokens > 0
