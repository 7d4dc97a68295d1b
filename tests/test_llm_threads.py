"""One LLM used by several threads at once: every call gets its own outputs."""

import _thread
import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM, BeamSearchParams, RequestOutput, SamplingParams
from nanovllm.engine.prompt_request import PromptRequest
from nanovllm.engine.step_output import StepOutput
from nanovllm.prompts import Prompt
from tests.support.serving import run_threads, wait_until

GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
SAMPLED = SamplingParams(n=2, seed=7, max_tokens=15, ignore_eos=True, logprobs=1)
BEAMS = BeamSearchParams(beam_width=3, max_tokens=5)


@pytest.fixture(scope="module")
def llm(tiny_model: Path, backend: str) -> LLM:
    settings = {"kv_cache_memory": "8MiB", "block_size": 8, "batch_invariant": True}
    return LLM(tiny_model, backend=backend, num_threads=1, **settings)  # type: ignore[arg-type]


def prompts_of(caller: int) -> list[Prompt]:
    return [[caller + 1, place + 1, 30] * (place + 1) for place in range(4)]


def answers(outputs: list[RequestOutput]) -> list[object]:
    return [(output.prompt_token_ids, output.outputs, output.error) for output in outputs]


def calls(llm: LLM) -> list[Callable[[], object]]:
    """Calls of all kinds, with prompts of their own."""
    return [
        *(
            lambda caller=caller: answers(llm.generate(prompts_of(caller), GREEDY, use_tqdm=False))
            for caller in range(4)
        ),
        lambda: answers(llm.generate(prompts_of(5), SAMPLED, use_tqdm=False)),
        lambda: answers(llm.beam_search(prompts_of(6), BEAMS, use_tqdm=False)),
        lambda: [one.outputs for one in llm.embed(prompts_of(7), "mean", use_tqdm=False)],
    ]


def workers() -> int:
    return sum(thread.name == "nanovllm-llm" for thread in threading.enumerate())


def test_threads_get_the_answers_that_they_get_alone(llm: LLM) -> None:
    alone = [call() for call in calls(llm)]
    for _ in range(2):
        assert run_threads(calls(llm)) == alone
    wait_until(lambda: workers() == 0)
    assert not llm.engine.has_work
    llm.engine.check_integrity()


def test_asyncio_to_thread_gets_the_answers_that_it_gets_alone(llm: LLM) -> None:
    alone = [call() for call in calls(llm)]

    async def together() -> list[object]:
        return await asyncio.gather(*(asyncio.to_thread(call) for call in calls(llm)))

    assert asyncio.run(together()) == alone


def test_calls_share_a_batch(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    step, sizes = llm.engine.step, []

    def counting() -> StepOutput:
        output = step()
        sizes.append(output.stats.num_decode_tokens)
        return output

    monkeypatch.setattr(llm.engine, "step", counting)
    run_threads([lambda: llm.generate("the", LONG, use_tqdm=False)] * 4)
    assert max(sizes) > 1


def test_an_interrupted_call_ends_its_own_requests_alone(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C comes while all of them run; the main thread, which waits, gets the exception."""
    expected = answers(llm.generate("the", LONG, use_tqdm=False))
    step, concurrent = llm.engine.step, []
    interrupted: list[bool] = []

    def interrupting() -> StepOutput:
        output = step()
        if llm.engine.stats().num_requests_running == 4 and not interrupted:
            interrupted.append(True)
            _thread.interrupt_main()
        return output

    monkeypatch.setattr(llm.engine, "step", interrupting)
    other = threading.Thread(
        target=lambda: concurrent.append(answers(llm.generate("the", LONG, use_tqdm=False)))
    )
    other.start()
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["a", "b", "c"], LONG, use_tqdm=False)
    other.join(30)
    assert concurrent == [expected]
    assert not llm.engine.has_work
    llm.engine.check_integrity()


def test_an_answer_that_cannot_be_put_together_costs_the_others_nothing(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = answers(llm.generate([1, 2, 3], GREEDY, use_tqdm=False))
    add_update = PromptRequest.add_update

    def failing(self: PromptRequest, update: Any) -> bool:
        if self.output().prompt_token_ids == [9, 9]:
            raise LookupError("no such token")
        return add_update(self, update)

    monkeypatch.setattr(PromptRequest, "add_update", failing)

    def broken() -> object:
        first, second = llm.generate([[9, 9], [4, 5]], GREEDY, use_tqdm=False)
        assert "no such token" in (first.error or "")
        assert second.error is None
        return None

    def whole() -> object:
        return answers(llm.generate([1, 2, 3], GREEDY, use_tqdm=False))

    assert run_threads([whole, broken, whole]) == [expected, None, expected]
    llm.engine.check_integrity()


def test_an_engine_that_raises_ends_every_call_and_can_be_used_again(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> object:
        with pytest.raises(AssertionError, match="do not balance"):
            llm.generate(["the"] * 3, GREEDY, use_tqdm=False)
        return None

    def step() -> StepOutput:
        raise AssertionError("the books do not balance")

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine, "step", step)
        run_threads([broken] * 3)
    assert not llm.engine.has_work
    assert llm.generate("the", GREEDY, use_tqdm=False)[0].error is None


def test_where_no_thread_can_be_had_the_caller_does_the_work(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = answers(llm.generate("the", GREEDY, use_tqdm=False))

    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert answers(llm.generate("the", GREEDY, use_tqdm=False)) == expected
