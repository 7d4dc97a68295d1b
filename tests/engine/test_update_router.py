"""UpdateRouter: every update reaches its prompt, and what ended or left gets no more."""

import pytest

from nanovllm.engine.metrics import StepStats
from nanovllm.engine.prompt_request import PromptRequest
from nanovllm.engine.scheduling.request import FinishReason
from nanovllm.engine.scheduling.step_plan import SequenceUpdate
from nanovllm.engine.step_output import StepOutput
from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.engine.update_router import UpdateRouter
from nanovllm.errors import EngineFaultError, InvalidRequestError
from tests.support.assembling import make, update


class Finished:
    """The sequences that the router ends in the engine."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, FinishReason]] = []

    def __call__(self, request_id: str, reason: FinishReason) -> None:
        self.calls.append((request_id, reason))


def step(*updates: SequenceUpdate) -> StepOutput:
    return StepOutput(updates, StepStats(1, 0, 1, 0.1))


def routed(
    tokenizer: Tokenizer, **settings: object
) -> tuple[UpdateRouter[str], Finished, PromptRequest]:
    finished = Finished()
    router: UpdateRouter[str] = UpdateRouter(finished)
    prompt = make(tokenizer, **settings)
    router.add([prompt], "owner")
    return router, finished, prompt


def test_a_changed_prompt_is_returned_once_with_its_owner(tokenizer: Tokenizer) -> None:
    router, finished, prompt = routed(tokenizer, n=2, temperature=1.0)
    assert (len(router), router.owners) == (2, {"owner"})
    assert router.add_updates(step(update(1), update(2, choice=1))) == [(prompt, "owner")]
    assert router.add_updates(step()) == []
    router.add_updates(step(update(3, FinishReason.LENGTH), update(4, choice=1)))
    assert len(router) == 1
    router.add_updates(step(update(5, FinishReason.LENGTH, choice=1)))
    assert (len(router), router.owners, finished.calls) == (0, set(), [])
    assert [choice.token_ids for choice in prompt.output().outputs] == [[1, 3], [2, 4, 5]]


def test_after_a_stop_string_the_engine_is_told_and_the_rest_is_dropped(
    tokenizer: Tokenizer,
) -> None:
    router, finished, prompt = routed(tokenizer, stop="a", max_tokens=9)
    letter = tokenizer.encode("a")[0]
    stopped, late = step(update(letter)), step(update(letter))
    assert router.add_updates(stopped) == [(prompt, "owner")]
    assert finished.calls == [("r-0", FinishReason.STOP)]
    assert router.add_updates(late) == []
    assert prompt.is_finished
    assert late.stats.num_generated_tokens == 0, "what is dropped does not count"


def test_a_removed_prompt_is_aborted_once(tokenizer: Tokenizer) -> None:
    router, finished, prompt = routed(tokenizer, n=2, temperature=1.0)
    router.add_updates(step(update(3, FinishReason.LENGTH)))
    router.remove(prompt)
    router.remove(prompt)
    assert finished.calls == [("r-1", FinishReason.ABORT)]
    assert router.add_updates(step(update(1, choice=1))) == []


def test_an_id_in_use_adds_nothing(tokenizer: Tokenizer) -> None:
    router, finished, prompt = routed(tokenizer)
    other = make(tokenizer, n=2, temperature=1.0)
    with pytest.raises(InvalidRequestError, match="'r-0' is in use"):
        router.add([other], "another")
    router.remove(other)
    assert (router.owners, finished.calls) == ({"owner"}, [])
    assert router.add_updates(step(update(1))) == [(prompt, "owner")]


def test_an_update_that_cannot_be_added_ends_its_prompt_only(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    router, finished, prompt = routed(tokenizer, n=2, temperature=1.0)

    def failing(token_id: int) -> bytes:
        raise LookupError(token_id)

    monkeypatch.setattr(tokenizer, "token_bytes", failing)
    assert router.add_updates(step(update(1), update(1, choice=1))) == [(prompt, "owner")]
    assert isinstance(prompt.error, EngineFaultError)
    assert prompt.is_finished
    assert sorted(finished.calls) == [("r-0", FinishReason.ABORT), ("r-1", FinishReason.ABORT)]
    assert len(router) == 0


def several(tokenizer: Tokenizer, text: str, drafted: str, latency_s: float) -> SequenceUpdate:
    """Return the update of a step that has verified the tokens of `drafted`."""
    found = update(None)
    found.token_ids, found.drafted = tuple(tokenizer.encode(text)), tuple(tokenizer.encode(drafted))
    found.inter_token_latency_s = latency_s
    return found


def test_tokens_that_come_together_divide_the_time(tokenizer: Tokenizer) -> None:
    router, _, prompt = routed(tokenizer, max_tokens=9)
    first, verified = step(update(1)), step(several(tokenizer, "xyz", "xyq", 0.75))
    router.add_updates(first)
    router.add_updates(verified)
    assert (len(first.stats.times_to_first_token_s), first.stats.inter_token_latencies_s) == (1, [])
    assert verified.stats.inter_token_latencies_s == [0.25] * 3
    output = prompt.output()
    assert (output.num_drafted_tokens, output.num_accepted_tokens) == (3, 2)
    assert output.outputs[0].drafted_token_ids == [None, *tokenizer.encode("xyq")]


def test_tokens_after_a_stop_string_do_not_count(tokenizer: Tokenizer) -> None:
    router, finished, prompt = routed(tokenizer, stop="y", max_tokens=9)
    router.add_updates(step(update(1)))
    verified = step(several(tokenizer, "xyzz", "xyz", 0.5))
    router.add_updates(verified)
    assert verified.stats.inter_token_latencies_s == [0.25] * 2
    assert finished.calls == [("r-0", FinishReason.STOP)]
    output = prompt.output()
    assert output.num_generated_tokens == 3
    assert (output.num_drafted_tokens, output.num_accepted_tokens) == (3, 2)
    assert output.outputs[0].drafted_token_ids == [None, *tokenizer.encode("xy")]
