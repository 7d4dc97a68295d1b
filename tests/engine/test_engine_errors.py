"""Errors of the engine: settings that do not fit, a failing step, and no token to sample."""

from dataclasses import replace
from pathlib import Path

import pytest

from nanovllm.config import EngineConfig
from nanovllm.engine.engine import Engine
from nanovllm.engine.scheduling.request import FinishReason
from nanovllm.errors import InvalidRequestError
from nanovllm.sampling_params import SamplingParams
from tests.support.processing import process


def test_a_failing_step_ends_its_requests_and_the_engine_goes_on(
    exact: EngineConfig, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine.load(tiny_model, replace(exact, max_num_seqs=1))
    params = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)
    failing, waiting = (
        process(engine.input_processor, name, [1, 2, 3], params).requests[0]
        for name in ("failing", "waiting")
    )
    engine.add_request(failing)
    engine.add_request(waiting)
    real = engine.runner.backend.forward
    with monkeypatch.context() as patch:
        patch.setattr(
            engine.runner.backend,
            "forward",
            lambda batch: (_ for _ in ()).throw(RuntimeError("the kernel fell over")),
        )
        output = engine.step()
    assert engine.runner.backend.forward == real
    assert isinstance(output.fault, RuntimeError)
    assert [
        (update.request_id, update.finish_reason, str(update.error)) for update in output.updates
    ] == [("failing", FinishReason.ERROR, "a step of the engine failed; the log has the reason")], (
        "clients read it, so it does not tell what went wrong"
    )
    assert [str(update.error.__cause__) for update in output.updates if update.error] == [
        "the kernel fell over"
    ]
    engine.check_integrity()
    while engine.has_work:
        assert engine.step().fault is None
    assert waiting.finish_reason is FinishReason.LENGTH


def test_forbidding_every_token_is_an_error_of_that_request_alone(
    exact: EngineConfig, tiny_model: Path
) -> None:
    engine = Engine.load(tiny_model, exact)
    blocked = SamplingParams(max_tokens=4, allowed_token_ids=[5], stop_token_ids=[5], min_tokens=2)
    fine = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
    prepared_requests = [
        process(engine.input_processor, "blocked", [1, 2], blocked),
        process(engine.input_processor, "fine", [1, 2], fine),
    ]
    for prepared in prepared_requests:
        engine.add_request(prepared.requests[0])
    while engine.has_work:
        for update in engine.step().updates:
            next(s for s in prepared_requests if s.request_id == update.request_id).add_update(
                update
            )
    assert isinstance(prepared_requests[0].error, InvalidRequestError)
    assert "every token is forbidden" in str(prepared_requests[0].error)
    assert prepared_requests[1].output().outputs[0].finish_reason == "length"


def test_settings_that_do_not_fit_the_model_are_told(tiny_model: Path) -> None:
    with pytest.raises(
        ValueError, match=r"max_model_len is 100000, but the model has only \d+ positions"
    ):
        Engine.load(tiny_model, EngineConfig(max_model_len=100_000))
    with pytest.raises(
        ValueError, match=r"kv_cache_memory is 100 bytes, less than one block of 32 tokens"
    ):
        Engine.load(tiny_model, EngineConfig(kv_cache_memory=100))
