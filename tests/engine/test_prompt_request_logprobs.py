"""PromptRequest: log-probabilities of tokens and prompts, and best_of."""

import itertools
import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.engine.prompt_request import PromptRequest
from nanovllm.engine.scheduling.request import FinishReason
from nanovllm.engine.scheduling.step_plan import SequenceUpdate
from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.model.sampling import TokenLogprobs
from nanovllm.outputs import Logprob
from tests.support.assembling import PROMPT, answer, feed, make, positions, update

# Log-probabilities --------------------------------------------------------------------------------


def test_log_probabilities_belong_to_their_tokens(tokenizer: Tokenizer) -> None:
    prompt = make(tokenizer, logprobs=2)
    a, b, half = tokenizer.encode("a")[0], tokenizer.encode("b")[0], tokenizer.encode("é")[0]
    prompt.add_update(update(a, logprobs=TokenLogprobs([a, b, a], [-2.0, -1.0, -2.0], 2)))
    prompt.add_update(
        update(
            half,
            FinishReason.LENGTH,
            logprobs=TokenLogprobs([half, a, b], [-9.0, -0.5, -1.5], 40),
        )
    )
    assert answer(prompt).logprobs == [
        {a: Logprob(-2.0, 2, "a"), b: Logprob(-1.0, 1, "b")},
        {half: Logprob(-9.0, 40, "\ufffd"), a: Logprob(-0.5, 1, "a"), b: Logprob(-1.5, 2, "b")},
    ]
    assert answer(prompt).cumulative_logprob == -11.0


def test_tokens_past_a_stop_string_have_no_log_probabilities(tokenizer: Tokenizer) -> None:
    prompt = make(tokenizer, logprobs=0, stop="b")
    for text in "abab":
        token_id = tokenizer.encode(text)[0]
        prompt.add_update(update(token_id, logprobs=TokenLogprobs([token_id], [-1.0], 1)))
    assert len(answer(prompt).token_ids) == len(answer(prompt).logprobs or []) == 2
    assert answer(prompt).cumulative_logprob == -2.0


def test_prompt_log_probabilities_have_none_for_the_first_token_and_come_once(
    tokenizer: Tokenizer,
) -> None:
    prompt = make(tokenizer, prompt_logprobs=0)
    prompt.add_update(update(None, prompt_logprobs=positions([2])))
    assert prompt.take_delta() is None
    prompt.add_update(update(5, prompt_logprobs=positions([3])))
    complete = [
        None,
        {2: Logprob(-0.5, 1, tokenizer.token_text(2))},
        {3: Logprob(-0.5, 1, tokenizer.token_text(3))},
    ]
    news = prompt.take_delta()
    assert news is not None
    assert news.prompt_logprobs == complete
    prompt.add_update(update(6, FinishReason.LENGTH))
    news = prompt.take_delta()
    assert news is not None
    assert news.prompt_logprobs is None
    assert prompt.output().prompt_logprobs == complete


def test_without_a_token_prompt_log_probabilities_come_with_the_end(tokenizer: Tokenizer) -> None:
    prompt = make(tokenizer, prompt_logprobs=0, max_tokens=0)
    prompt.add_update(update(None, FinishReason.LENGTH, prompt_logprobs=positions([2, 3])))
    news = prompt.take_delta()
    assert news is not None
    assert news.finished
    assert len(news.prompt_logprobs or []) == len(PROMPT)


def test_news_of_a_choice_that_is_ahead_wait_for_the_prompt_log_probabilities(
    tokenizer: Tokenizer,
) -> None:
    """Only the first choice reports them; the others may find the prompt in the prefix cache."""
    prompt = make(tokenizer, prompt_logprobs=0, n=2)
    feed(prompt, tokenizer, "ahead", choice=1)
    prompt.add_update(update(None, prompt_logprobs=positions([2])))
    assert prompt.take_delta() is None
    prompt.add_update(update(None, prompt_logprobs=positions([3])))
    news = prompt.take_delta()
    assert news is not None
    assert [part.text for part in news.outputs] == ["ahead"]
    assert len(news.prompt_logprobs or []) == len(PROMPT)
    feed(prompt, tokenizer, "first")
    news = prompt.take_delta()
    assert news is not None
    assert len(news.prompt_logprobs or []) == len(PROMPT), "every choice's first news have them"


def test_an_end_before_the_prompt_was_read_is_not_held_back(tokenizer: Tokenizer) -> None:
    prompt = make(tokenizer, prompt_logprobs=0)
    prompt.add_update(update(None, prompt_logprobs=positions([2])))
    prompt.add_update(update(None, FinishReason.ABORT))
    news = prompt.take_delta()
    assert news is not None
    assert news.finished
    assert news.outputs[0].finish_reason == "abort"


@pytest.mark.parametrize("first", [0, 2])
def test_cached_tokens_are_those_of_the_first_sequence(tokenizer: Tokenizer, first: int) -> None:
    """The others find in the cache what the first has computed, however new the prompt is."""
    prompt = make(tokenizer, n=3)
    for choice, cached in ((0, first), (1, 3), (2, 1)):
        prompt.add_update(SequenceUpdate(prompt.requests[choice], (5,), num_cached_tokens=cached))
        assert prompt.output().num_cached_tokens == first


# Equal answers, and the best of more --------------------------------------------------------------


def end_with(
    prompt: PromptRequest, choice: int, logprobs: Sequence[float], token_id: int = 1
) -> None:
    """Give a sequence tokens of these log-probabilities, of which the last ends it."""
    for place, logprob in enumerate(logprobs):
        finish = FinishReason.LENGTH if place == len(logprobs) - 1 else None
        prompt.add_update(
            update(
                token_id, finish, choice=choice, logprobs=TokenLogprobs([token_id], [logprob], 1)
            )
        )


def test_greedy_answers_are_one_sequence(tokenizer: Tokenizer) -> None:
    prompt = make(tokenizer, n=3, temperature=0, logprobs=0)
    assert len(prompt.requests) == 1
    end_with(prompt, 0, [-1.0])
    answers = prompt.output().outputs
    assert prompt.is_finished
    assert [one.index for one in answers] == [0, 1, 2]
    assert [(one.text, one.token_ids, one.logprobs) for one in answers] == [
        (answers[0].text, [1], answers[0].logprobs)
    ] * 3
    assert answers[0].token_ids is not answers[1].token_ids, (
        "what a caller does to one does not change another"
    )
    assert prompt.output().num_generated_tokens == 3


def test_news_of_greedy_answers_are_news_of_each(tokenizer: Tokenizer) -> None:
    prompt = make(tokenizer, n=2, temperature=0, prompt_logprobs=0)
    prompt.add_update(update(1, prompt_logprobs=positions([2, 3])))
    for text, reason in (("a", None), ("b", FinishReason.LENGTH)):
        feed(prompt, tokenizer, text, reason)
    news = prompt.take_delta()
    assert news is not None
    assert [(part.index, part.text, part.finish_reason) for part in news.outputs] == [
        (i, tokenizer.token_text(1) + "ab", "length") for i in (0, 1)
    ]
    assert len(news.prompt_logprobs or []) == len(PROMPT)
    assert prompt.take_delta() is None


NUMBERS = st.one_of(st.floats(-50, 0), st.just(-math.inf), st.just(math.nan))


@given(
    scores=st.lists(st.lists(NUMBERS, min_size=1, max_size=4), min_size=2, max_size=6),
    n=st.integers(1, 5),
    shown=st.booleans(),
)
def test_the_best_answers_come_in_order_of_their_mean(
    tokenizer: Tokenizer, scores: list[list[float]], n: int, shown: bool
) -> None:
    n = min(n, len(scores) - 1)
    prompt = make(tokenizer, n=n, best_of=len(scores), logprobs=0 if shown else None)
    for choice in reversed(range(len(scores))):
        assert prompt.take_delta() is None
        assert not prompt.is_finished
        end_with(prompt, choice, scores[choice], token_id=choice)
    output = prompt.output()
    assert [one.index for one in output.outputs] == list(range(n))
    assert output.num_generated_tokens == sum(map(len, scores))

    def mean(choice: int) -> float:
        actual = sum(scores[choice]) / len(scores[choice])
        return -math.inf if math.isnan(actual) else actual

    chosen = [one.token_ids[0] for one in output.outputs]
    assert len(set(chosen)) == n
    left_out = [mean(choice) for choice in range(len(scores)) if choice not in chosen]
    ranked = [*map(mean, chosen), max(left_out)]
    assert all(
        better >= worse or better == pytest.approx(worse)
        for better, worse in itertools.pairwise(ranked)
    )
    assert all(
        (one.logprobs is not None) == (one.cumulative_logprob is not None) == shown
        for one in output.outputs
    )
    news = prompt.take_delta()
    assert news is not None
    assert [one.token_ids for one in news.outputs] == [one.token_ids for one in output.outputs]
    assert prompt.take_delta() is None


def test_of_equally_good_answers_the_first_is_the_best(tokenizer: Tokenizer) -> None:
    prompt = make(tokenizer, n=2, best_of=3)
    for choice in (2, 1, 0):
        end_with(prompt, choice, [-1.0], token_id=choice)
    assert [one.token_ids for one in prompt.output().outputs] == [[0], [1]]
