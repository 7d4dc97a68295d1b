"""Log-probabilities over HTTP: parallel arrays, text offsets, echoed prompts, and LLM's scores."""

import json
from itertools import pairwise
from typing import Any

import pytest
from openai import OpenAI

from nanovllm import LLM, SamplingParams
from tests.support.serving import MODEL, Answer, RunningServer, join_choices, whole_choices

pytestmark = pytest.mark.both_backends

MIXED = "in the café: 漢字 🙂🙃 ü"


def byte_ids(llm: LLM, data: bytes) -> list[int]:
    """The ids of the tokens that are these single bytes."""
    by_bytes = {llm.tokenizer.token_bytes(i): i for i in range(256)}
    return [by_bytes[bytes([byte])] for byte in data]


def logprobs_of(body: dict[str, Any], place: int = 0) -> dict[str, list[Any]]:
    """The four arrays of a choice, which must be parallel."""
    arrays: dict[str, list[Any]] = body["choices"][place]["logprobs"]
    assert arrays.keys() == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
    assert len({len(array) for array in arrays.values()}) == 1
    return arrays


def offsets_of(llm: LLM, token_ids: list[int]) -> list[int]:
    """Where each token's text begins: the number of whole characters of the tokens before it."""
    offsets = []
    for count in range(len(token_ids)):
        data = b"".join(map(llm.tokenizer.token_bytes, token_ids[:count]))
        text = data.decode(errors="replace")
        unfinished = next(
            (size for size in (3, 2, 1) if size <= len(data) and is_begun(data[-size:])), 0
        )
        offsets.append(len(text) - (1 if unfinished else 0))
    return offsets


def shown_of(llm: LLM, token_ids: list[int]) -> list[str]:
    """Each token's text from its offset to the next one; for special tokens their names."""
    text = llm.tokenizer.decode(token_ids, skip_special_tokens=False)
    offsets = [*offsets_of(llm, token_ids), len(text)]
    return [text[start:end] for start, end in pairwise(offsets)]


def is_begun(data: bytes) -> bool:
    """Whether `data` is the beginning of one character that further bytes complete."""
    for byte in (0x80, 0x90, 0xA0):
        for missing in (1, 2, 3):
            try:
                if len((data + bytes([byte]) * missing).decode()) == 1:
                    return True
            except UnicodeDecodeError:
                continue
    return False


def test_arrays_are_parallel_and_hold_the_sampled_token(server: RunningServer) -> None:
    body = server.complete(
        "in the end", max_tokens=20, temperature=1.5, seed=1, logprobs=3, ignore_eos=True
    )
    arrays = logprobs_of(body)
    assert len(arrays["tokens"]) == 20
    for token, logprob, top in zip(
        arrays["tokens"], arrays["token_logprobs"], arrays["top_logprobs"], strict=True
    ):
        assert token in top
        assert -9999 <= logprob <= 0
        assert len(top) <= 4
        assert list(top.values()) == sorted(top.values(), reverse=True)
        if not {"", "\ufffd"} & top.keys():  # for each of which several tokens may stand
            assert len(top) in (3, 4)
            assert top[token] == logprob


def test_logprobs_0_reports_the_sampled_token_alone(server: RunningServer) -> None:
    arrays = logprobs_of(server.complete("the", max_tokens=8, temperature=1.0, seed=1, logprobs=0))
    tops = [
        {token: logprob}
        for token, logprob in zip(arrays["tokens"], arrays["token_logprobs"], strict=True)
    ]
    assert arrays["top_logprobs"] == tops


def test_without_logprobs_there_are_none(server: RunningServer) -> None:
    assert server.complete("the", max_tokens=3)["choices"][0]["logprobs"] is None
    assert server.complete("the", max_tokens=3, echo=True)["choices"][0]["logprobs"] is None


def test_values_are_those_of_the_engine(server: RunningServer, llm: LLM) -> None:
    settings: dict[str, Any] = {"max_tokens": 12, "temperature": 1.0, "seed": 9, "logprobs": 5}
    arrays = logprobs_of(server.complete("a cat", **settings))
    answer = llm.generate("a cat", SamplingParams(**settings), use_tqdm=False)[0].outputs[0]
    assert answer.logprobs is not None
    expected = [
        position[token].logprob
        for position, token in zip(answer.logprobs, answer.token_ids, strict=True)
    ]
    assert arrays["token_logprobs"] == pytest.approx(expected, abs=1e-4)
    assert arrays["tokens"] == shown_of(llm, answer.token_ids)


def test_offsets_point_into_a_text_of_multi_byte_characters(
    server: RunningServer, llm: LLM
) -> None:
    allowed = byte_ids(llm, b"\xc3\xa9 \xe6\xbc\xa2a")
    settings = {
        "max_tokens": 60,
        "temperature": 2.0,
        "seed": 2,
        "logprobs": 1,
        "allowed_token_ids": allowed,
        "top_k": 0,
    }
    body = server.complete("the", **settings)
    arrays = logprobs_of(body)
    (answer,) = llm.generate("the", SamplingParams(**settings), use_tqdm=False)[0].outputs  # type: ignore[arg-type]
    assert body["choices"][0]["text"] == answer.text
    assert any(character > "\x7f" and character != "\ufffd" for character in answer.text), (
        "no bytes came together"
    )
    assert arrays["text_offset"] == offsets_of(llm, answer.token_ids)
    assert arrays["tokens"] == shown_of(llm, answer.token_ids)
    assert "".join(arrays["tokens"]) == answer.text
    assert "" in arrays["tokens"], "the first bytes of a character add no text"
    assert all(
        token in top for token, top in zip(arrays["tokens"], arrays["top_logprobs"], strict=True)
    )


def test_offsets_leave_out_special_tokens_that_the_text_leaves_out(
    server: RunningServer, llm: LLM
) -> None:
    eos = llm.engine.model.eos_token_ids[0]
    letters = byte_ids(llm, b"ab")
    settings = {
        "max_tokens": 20,
        "temperature": 2.0,
        "seed": 3,
        "logprobs": 1,
        "ignore_eos": True,
        "allowed_token_ids": [eos, *letters],
    }
    for skip in (True, False):
        body = server.complete("the", skip_special_tokens=skip, **settings)
        text, arrays = body["choices"][0]["text"], logprobs_of(body)
        assert "<|endoftext|>" in arrays["tokens"]
        ends = [*arrays["text_offset"][1:], len(text)]
        shown = ["" if skip and token == "<|endoftext|>" else token for token in arrays["tokens"]]
        assert [
            text[start:end] for start, end in zip(arrays["text_offset"], ends, strict=True)
        ] == shown


def test_an_echo_puts_the_prompt_in_front(server: RunningServer, llm: LLM) -> None:
    settings = {"max_tokens": 10, "temperature": 0, "logprobs": 2}
    alone = server.complete(MIXED, **settings)
    echoed = server.complete(MIXED, echo=True, **settings)
    assert echoed["choices"][0]["text"] == MIXED + alone["choices"][0]["text"]
    arrays, own = logprobs_of(echoed), logprobs_of(alone)
    prompt_ids = llm.tokenizer.encode(MIXED)
    count = len(prompt_ids)
    assert arrays["tokens"][:count] == shown_of(llm, prompt_ids)
    assert {"漢", "字", "🙂", "🙃", "ü"} <= set(arrays["tokens"][:count])
    assert (arrays["token_logprobs"][0], arrays["top_logprobs"][0]) == (None, None)
    assert all(logprob is not None for logprob in arrays["token_logprobs"][1:])
    assert all(
        token in top
        for token, top in zip(arrays["tokens"][1:], arrays["top_logprobs"][1:], strict=True)
    )
    assert arrays["token_logprobs"][count:] == own["token_logprobs"]
    assert arrays["text_offset"][:count] == offsets_of(llm, prompt_ids)
    assert arrays["text_offset"][count:] == [len(MIXED) + offset for offset in own["text_offset"]]
    assert echoed["usage"] == {
        **alone["usage"],
        "prompt_tokens_details": echoed["usage"]["prompt_tokens_details"],
    }


def test_an_echo_of_half_a_character_is_shown_as_such(server: RunningServer, llm: LLM) -> None:
    body = server.complete(
        byte_ids(llm, b"a\xc3"),
        echo=True,
        max_tokens=1,
        logprobs=0,
        logit_bias={str(byte_ids(llm, b"b")[0]): 100},
    )
    assert body["choices"][0]["text"] == "a\ufffdb"
    assert logprobs_of(body)["text_offset"] == [0, 1, 2]
    assert logprobs_of(body)["tokens"] == ["a", "\ufffd", "b"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["in the end, all was well", MIXED, "t", [5, 260, 7, 266, 80]])
def test_scoring_a_prompt_is_what_llm_says_of_it(
    server: RunningServer, llm: LLM, prompt: Any, *, stream: bool
) -> None:
    settings = {"echo": True, "max_tokens": 0, "logprobs": 3}
    if stream:
        events = server.stream(prompt, stream_options={"include_usage": True}, **settings)
        choice, usage = join_choices(events)[0], events[-1]["usage"]
    else:
        body = server.complete(prompt, **settings)
        choice, usage = whole_choices(body)[0], body["usage"]
    output = llm.generate(
        [prompt], SamplingParams(max_tokens=0, prompt_logprobs=3), use_tqdm=False
    )[0]
    assert choice.text == llm.tokenizer.decode(output.prompt_token_ids, skip_special_tokens=False)
    assert choice.finish_reason == "length"
    assert (usage["completion_tokens"], usage["prompt_tokens"]) == (0, len(output.prompt_token_ids))
    assert choice.logprobs is not None
    assert output.prompt_logprobs is not None
    expected = [
        position[token].logprob
        for position, token in zip(
            output.prompt_logprobs[1:], output.prompt_token_ids[1:], strict=True
        )
        if position
    ]
    assert choice.logprobs["token_logprobs"][0] is None
    assert choice.logprobs["token_logprobs"][1:] == pytest.approx(expected, abs=1e-4)
    for top, position in zip(
        choice.logprobs["top_logprobs"][1:], output.prompt_logprobs[1:], strict=True
    ):
        assert position is not None
        assert max(top.values()) == pytest.approx(
            max(entry.logprob for entry in position.values()), abs=1e-4
        )


def test_the_official_client_scores_a_prompt(client: OpenAI) -> None:
    (choice,) = client.completions.create(
        model=MODEL, prompt="the end", echo=True, max_tokens=0, logprobs=1
    ).choices
    assert choice.text == "the end"
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs is not None
    assert choice.logprobs.tokens == ["the", " ", "e", "n", "d"]
    assert choice.logprobs.text_offset == [0, 3, 4, 5, 6]


def test_several_prompts_are_scored_each_for_itself(server: RunningServer) -> None:
    prompts = ["the end", "a cat", "x"]
    together = server.complete(prompts, echo=True, max_tokens=0, logprobs=1)
    alone = [server.complete(prompt, echo=True, max_tokens=0, logprobs=1) for prompt in prompts]
    assert [logprobs_of(together, place) for place in range(3)] == [
        logprobs_of(body) for body in alone
    ]


def test_n_answers_each_carry_the_prompts_logprobs(server: RunningServer) -> None:
    body = server.complete(
        "the end", echo=True, n=2, max_tokens=2, logprobs=1, temperature=1.0, seed=1
    )
    first, second = logprobs_of(body, 0), logprobs_of(body, 1)
    assert first["token_logprobs"][:5] == second["token_logprobs"][:5]
    assert len(first["tokens"]) == len(second["tokens"]) == 7


def test_minus_infinity_is_a_number(
    server: RunningServer, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """JSON has no infinity; a token that the network itself rules out is reported as -9999."""
    backend = server.engine.engine.runner.backend
    compute = backend.logits

    def without_k(hidden: Any) -> Any:
        logits = compute(hidden)
        logits[:, byte_ids(llm, b"k")[0]] = float("-inf")
        return logits

    monkeypatch.setattr(backend, "logits", without_k)
    response = server.post({"prompt": "ak", "echo": True, "max_tokens": 0, "logprobs": 1})
    assert json.loads(response.text, parse_constant=pytest.fail)["choices"][0]["logprobs"][
        "token_logprobs"
    ] == [None, -9999.0]
    event = server.stream("ak", echo=True, max_tokens=0, logprobs=1, prompt_logprobs=0)[0]
    assert event["choices"][0]["logprobs"]["token_logprobs"] == [None, -9999.0]
    assert (
        event["choices"][0]["prompt_logprobs"][1][str(byte_ids(llm, b"k")[0])]["logprob"] == -9999.0
    )


def test_what_is_not_a_number_is_one_in_the_answer(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = server.engine.engine.runner.backend
    compute = backend.logits
    monkeypatch.setattr(backend, "logits", lambda hidden: compute(hidden) * float("nan"))
    response = server.post({"prompt": "ak", "echo": True, "max_tokens": 0, "logprobs": 1})
    assert json.loads(response.text, parse_constant=pytest.fail)["choices"][0]["logprobs"][
        "token_logprobs"
    ] == [None, -9999.0]


def test_prompt_logprobs_come_by_token_id(server: RunningServer, llm: LLM) -> None:
    choice = server.complete("the end", prompt_logprobs=2, max_tokens=2)["choices"][0]
    ids = llm.tokenizer.encode("the end")
    assert choice["logprobs"] is None
    assert choice["prompt_logprobs"][0] is None
    for token, position in zip(ids[1:], choice["prompt_logprobs"][1:], strict=True):
        assert position[str(token)]["decoded_token"] == llm.tokenizer.token_text(token)
        assert position[str(token)]["rank"] >= 1
        assert len(position) in (2, 3)


def test_streamed_logprobs_add_up_to_the_whole(server: RunningServer) -> None:
    settings = {
        "max_tokens": 25,
        "temperature": 1.2,
        "seed": 6,
        "logprobs": 4,
        "echo": True,
        "n": 2,
    }
    whole: dict[int, Answer] = whole_choices(server.complete([MIXED, "the"], **settings))
    assert join_choices(server.stream([MIXED, "the"], **settings)) == whole
