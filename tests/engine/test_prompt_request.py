"""PromptRequest: text, tokens and log-probabilities that agree, whole or as deltas."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.engine.scheduling.request import FinishReason
from nanovllm.engine.scheduling.step_plan import SequenceUpdate
from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.errors import EngineFaultError
from nanovllm.model.sampling import TokenLogprobs
from nanovllm.outputs import CompletionOutput, RequestOutput
from tests.support.assembling import END, METRICS, PROMPT, answer, feed, make, update
from tests.support.checkpoints import END_OF_TEXT

BROKEN = EngineFaultError("broken")


def test_an_answer_grows_and_ends(tokenizer: Tokenizer) -> None:
    prompt = make(tokenizer)
    assert answer(prompt) == CompletionOutput(0, "", [], None, None)
    assert feed(prompt, tokenizer, "hey") == [False] * 3
    assert not prompt.is_finished
    assert feed(prompt, tokenizer, "!", FinishReason.LENGTH) == [False]
    output = prompt.output()
    assert output == RequestOutput(
        "r",
        "prompt",
        PROMPT,
        None,
        [answer(prompt)],
        finished=True,
        num_generated_tokens=4,
        metrics=METRICS,
    )
    assert (
        output.outputs[0].text,
        output.outputs[0].finish_reason,
        len(output.outputs[0].token_ids),
    ) == ("hey!", "length", 4)
    assert prompt.is_finished


def test_an_unfinished_character_shows_at_the_end(tokenizer: Tokenizer) -> None:
    prompt = make(tokenizer)
    half = tokenizer.encode("é")[0]
    prompt.add_update(update(half))
    assert answer(prompt).text == ""
    prompt.add_update(update(half, FinishReason.LENGTH))
    assert answer(prompt).text == "\ufffd\ufffd"


@pytest.mark.parametrize("finish", [FinishReason.ABORT, FinishReason.ERROR])
def test_an_answer_that_is_broken_off_keeps_all_of_its_text(
    tokenizer: Tokenizer, finish: FinishReason
) -> None:
    prompt = make(tokenizer, stop="xyz")
    feed(prompt, tokenizer, "abxy")
    prompt.add_update(update(tokenizer.encode("é")[0]))
    assert answer(prompt).text == "abxy"[:2]
    assert not prompt.add_update(
        update(None, finish, error=BROKEN if finish is FinishReason.ERROR else None)
    )
    assert answer(prompt).text == "abxy\ufffd" == tokenizer.decode(answer(prompt).token_ids)
    assert answer(prompt).finish_reason == finish.value
    assert prompt.error is (BROKEN if finish is FinishReason.ERROR else None)
    assert prompt.is_finished


def test_the_first_error_is_kept(tokenizer: Tokenizer) -> None:
    prompt = make(tokenizer, n=2)
    prompt.add_update(update(None, FinishReason.ERROR, choice=1, error=BROKEN))
    prompt.add_update(update(None, FinishReason.ERROR, choice=0, error=EngineFaultError("second")))
    assert prompt.error is BROKEN


# What ends an answer ------------------------------------------------------------------------------


def test_end_of_text_is_a_token_but_no_text(tokenizer: Tokenizer) -> None:
    for settings in ({}, {"include_stop_str_in_output": True}, {"skip_special_tokens": False}):
        prompt = make(tokenizer, **settings)
        feed(prompt, tokenizer, "hi")
        prompt.add_update(update(END, FinishReason.STOP))
        assert answer(prompt).text == "hi"
        assert answer(prompt).token_ids[-1] == END
        assert (answer(prompt).finish_reason, answer(prompt).stop_reason) == (
            "stop",
            None,
        )


def test_end_of_text_that_is_kept_and_not_skipped_is_written_out(tokenizer: Tokenizer) -> None:
    prompt = make(tokenizer, include_stop_str_in_output=True, skip_special_tokens=False)
    feed(prompt, tokenizer, "hi")
    prompt.add_update(update(END, FinishReason.STOP))
    assert answer(prompt).text == "hi" + END_OF_TEXT


def test_end_of_text_that_is_ignored_is_skipped_or_written_out(tokenizer: Tokenizer) -> None:
    for skip in (True, False):
        prompt = make(tokenizer, ignore_eos=True, skip_special_tokens=skip)
        feed(prompt, tokenizer, "hi")
        prompt.add_update(update(END))
        feed(prompt, tokenizer, "ho", FinishReason.LENGTH)
        assert answer(prompt).text == ("hiho" if skip else f"hi{END_OF_TEXT}ho")


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_token_is_text_only_where_it_is_asked_for(
    tokenizer: Tokenizer, include: bool
) -> None:
    prompt = make(tokenizer, include_stop_str_in_output=include)
    feed(prompt, tokenizer, "hi")
    stop = tokenizer.encode("!")[0]
    prompt.add_update(update(stop, FinishReason.STOP, stop_reason=stop))
    assert answer(prompt).text == ("hi!" if include else "hi")
    assert answer(prompt).token_ids[-1] == stop
    assert answer(prompt).stop_reason == stop


def test_text_held_for_a_stop_string_comes_out_when_a_token_ends_the_answer(
    tokenizer: Tokenizer,
) -> None:
    prompt = make(tokenizer, stop="\n\n")
    feed(prompt, tokenizer, "line\n")
    assert answer(prompt).text == "line"
    prompt.add_update(update(END, FinishReason.STOP))
    assert answer(prompt).text == "line\n"
    assert answer(prompt).stop_reason is None


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_ends_the_answer_and_the_engine_is_told(
    tokenizer: Tokenizer, include: bool
) -> None:
    prompt = make(tokenizer, stop=["never", "stop"], include_stop_str_in_output=include)
    assert feed(prompt, tokenizer, "do stop") == [False] * 6 + [True]
    assert answer(prompt).text == ("do stop" if include else "do ")
    assert (answer(prompt).finish_reason, answer(prompt).stop_reason) == (
        "stop",
        "stop",
    )
    assert prompt.is_finished
    before = prompt.output()
    assert feed(prompt, tokenizer, " now", FinishReason.LENGTH) == [False] * 4, (
        "steps that were under way"
    )
    assert prompt.output() == before


def test_a_stop_string_in_the_last_token_wins_over_the_length(tokenizer: Tokenizer) -> None:
    prompt = make(tokenizer, stop="stop")
    assert feed(prompt, tokenizer, "stop", FinishReason.LENGTH) == [False] * 4, (
        "the engine has ended it already"
    )
    assert (
        answer(prompt).text,
        answer(prompt).finish_reason,
        answer(prompt).stop_reason,
    ) == ("", "stop", "stop")


def test_a_broken_off_answer_has_no_stop_reason_of_its_last_characters(
    tokenizer: Tokenizer,
) -> None:
    prompt = make(tokenizer, stop="\ufffd")
    prompt.add_update(update(tokenizer.encode("é")[0]))
    prompt.add_update(update(None, FinishReason.ABORT))
    assert (
        answer(prompt).text,
        answer(prompt).finish_reason,
        answer(prompt).stop_reason,
    ) == ("\ufffd", "abort", None)


@pytest.mark.parametrize(
    ("min_tokens", "text"),
    [(0, ""), (1, ""), (2, "ab"), (3, "ab"), (4, "abab"), (5, "abab"), (6, "ababab!")],
)
def test_a_stop_string_counts_once_min_tokens_are_there(
    tokenizer: Tokenizer, min_tokens: int, text: str
) -> None:
    """It may begin before: what matters is the token that completes it."""
    prompt = make(tokenizer, stop="ab", min_tokens=min_tokens)
    feed(prompt, tokenizer, "ababab!", FinishReason.LENGTH)
    assert answer(prompt).text == text
    assert answer(prompt).stop_reason == ("ab" if min_tokens < 6 else None)


def test_text_held_when_the_answer_is_shorter_than_min_tokens_comes_out(
    tokenizer: Tokenizer,
) -> None:
    prompt = make(tokenizer, stop="ab", min_tokens=9)
    feed(prompt, tokenizer, "aba", FinishReason.LENGTH)
    assert answer(prompt).text == "aba"


# News ---------------------------------------------------------------------------------------------


@given(
    texts=st.lists(st.text(alphabet="abé🙂", min_size=1, max_size=6), min_size=1, max_size=3),
    order=st.lists(st.integers(0, 2), max_size=60),
    stops=st.lists(st.text(alphabet="abé", min_size=1, max_size=3), max_size=2),
    fetches=st.lists(st.booleans(), min_size=60, max_size=60),
    min_tokens=st.integers(0, 4),
)
def test_pieces_join_to_the_whole(
    tokenizer: Tokenizer,
    texts: list[str],
    order: list[int],
    stops: list[str],
    fetches: list[bool],
    min_tokens: int,
) -> None:
    """In whatever order choices get their tokens and however often news are fetched."""
    prompt = make(
        tokenizer, n=len(texts), stop=stops, min_tokens=min_tokens, max_tokens=99, logprobs=1
    )
    queues = [[*text.encode()] for text in texts]
    byte_of = {tokenizer.token_bytes(token_id): token_id for token_id in range(256)}
    news: list[RequestOutput] = []
    turns = [choice for choice in order if choice < len(texts)] + [
        choice for choice, queue in enumerate(queues) for _ in queue
    ]
    for turn, choice in enumerate(turns):
        if queues[choice]:
            token_id = byte_of[bytes([queues[choice].pop(0)])]
            finish = None if queues[choice] else FinishReason.LENGTH
            prompt.add_update(
                update(
                    token_id,
                    finish,
                    choice=choice,
                    logprobs=TokenLogprobs([token_id], [-float(token_id)], 7),
                )
            )
        if fetches[turn % len(fetches)] and (piece := prompt.take_delta()) is not None:
            news.append(piece)
    if (piece := prompt.take_delta()) is not None:
        news.append(piece)
    assert prompt.take_delta() is None
    whole = prompt.output()
    assert whole.finished
    assert [piece.finished for piece in news] == [False] * (len(news) - 1) + [True]
    for choice, final in enumerate(whole.outputs):
        parts = [part for piece in news for part in piece.outputs if part.index == choice]
        assert "".join(part.text for part in parts) == final.text
        assert [token for part in parts for token in part.token_ids] == final.token_ids
        assert [position for part in parts for position in part.logprobs or []] == final.logprobs
        assert [part.finish_reason for part in parts] == [None] * (len(parts) - 1) + [
            final.finish_reason
        ]
        assert (parts[-1].stop_reason, parts[-1].cumulative_logprob) == (
            final.stop_reason,
            final.cumulative_logprob,
        )
        assert len(final.logprobs or []) == len(final.token_ids)


def test_there_are_no_news_without_a_change(tokenizer: Tokenizer) -> None:
    prompt = make(tokenizer, stop="ab")
    assert prompt.take_delta() is None
    prompt.add_update(update(None))
    assert prompt.take_delta() is None
    feed(prompt, tokenizer, "a")
    held = prompt.take_delta()
    assert held is not None, "a token is news even while its text is held"
    assert (held.outputs[0].text, len(held.outputs[0].token_ids)) == ("", 1)
    assert prompt.take_delta() is None


def test_unread_news_merge_into_one(tokenizer: Tokenizer) -> None:
    prompt = make(tokenizer)
    feed(prompt, tokenizer, "one two")
    feed(prompt, tokenizer, "!", FinishReason.LENGTH)
    news = prompt.take_delta()
    assert news is not None
    assert (
        news.outputs[0].text,
        len(news.outputs[0].token_ids),
        news.outputs[0].finish_reason,
    ) == ("one two!", 8, "length")
    assert news.finished


def test_an_end_without_a_token_is_news(tokenizer: Tokenizer) -> None:
    prompt = make(tokenizer)
    feed(prompt, tokenizer, "hi")
    prompt.take_delta()
    prompt.add_update(update(None, FinishReason.ABORT))
    news = prompt.take_delta()
    assert news is not None
    assert (
        news.outputs[0].text,
        news.outputs[0].token_ids,
        news.outputs[0].finish_reason,
        news.finished,
    ) == ("", [], "abort", True)
    assert prompt.take_delta() is None


def test_only_choices_with_news_are_in_them(tokenizer: Tokenizer) -> None:
    prompt = make(tokenizer, n=3)
    feed(prompt, tokenizer, "x", choice=2)
    feed(prompt, tokenizer, "y", choice=0)
    news = prompt.take_delta()
    assert news is not None
    assert [(part.index, part.text) for part in news.outputs] == [(0, "y"), (2, "x")]
    assert [part.index for part in prompt.output().outputs] == [0, 1, 2]


def test_several_tokens_of_one_update_end_at_a_stop_string(tokenizer: Tokenizer) -> None:
    prompt = make(tokenizer, stop=["bc"], max_tokens=9)
    byte_of = {tokenizer.token_bytes(token_id): token_id for token_id in range(256)}
    tokens = tuple(byte_of[bytes([byte])] for byte in b"abcd")
    assert prompt.add_update(SequenceUpdate(prompt.requests[0], tokens))
    assert answer(prompt).text == "a"
    assert answer(prompt).token_ids == list(tokens[:3])
    assert answer(prompt).stop_reason == "bc"
