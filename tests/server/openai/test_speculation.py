"""Speculative decoding over HTTP: the same answers, with counts of drafted tokens beside them."""

import operator
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nanovllm.server.metrics import DRAFT_COUNTERS
from tests.support.chats import TEMPLATE, post
from tests.support.serving import RunningServer, loader, read_events
from tests.support.speculation import draft_always

BODY: dict[str, Any] = {"prompt": "the the a the the", "max_tokens": 20, "ignore_eos": True}
USAGE = {"stream_options": {"include_usage": True}}


@pytest.fixture(scope="module")
def drafting(tiny_model: Path) -> Iterator[RunningServer]:
    """A server whose draft model is the model itself; one of four drafted tokens is beyond."""
    load = loader(
        tiny_model,
        backend="numpy",
        speculative_config={"model": str(tiny_model), "num_speculative_tokens": 4},
    )
    with RunningServer(lambda: draft_always(load()), chat_template=TEMPLATE) as running:
        yield running


def details_of(answer: dict[str, Any]) -> dict[str, int]:
    details: dict[str, int] = answer["usage"].pop("completion_tokens_details")
    return details


@pytest.mark.parametrize("more", [{"temperature": 0}, {"temperature": 1, "seed": 5, "logprobs": 2}])
def test_answers_are_the_same_and_usage_has_more(
    drafting: RunningServer, more: dict[str, Any]
) -> None:
    drafted, plain = (drafting.complete(**BODY, **more, speculative=on) for on in (True, False))
    details, none = details_of(drafted), details_of(plain)
    assert none == {"accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0}
    assert details.keys() == none.keys()
    assert 8 < details["accepted_prediction_tokens"] < 20
    assert (drafted["choices"], drafted["usage"]) == (plain["choices"], plain["usage"])


def test_streams_end_with_the_counts(drafting: RunningServer) -> None:
    events = drafting.stream(**BODY, temperature=0, **USAGE)
    details = details_of(events[-1])
    assert details == details_of(drafting.complete(**BODY, temperature=0))
    text = "".join(event["choices"][0]["text"] for event in events[:-1])
    assert text == drafting.complete(**BODY, temperature=0)["choices"][0]["text"]
    response = post(drafting, max_tokens=20, ignore_eos=True, temperature=0, stream=True, **USAGE)
    assert details_of(read_events(response.content)[-1])["accepted_prediction_tokens"] > 8


@pytest.mark.parametrize("chat", [False, True])
def test_streams_are_those_without_drafts(drafting: RunningServer, chat: bool) -> None:
    """Text, tokens, log-probabilities and the end, put together from the chunks."""
    body = {"temperature": 1, "seed": 5, "return_token_ids": True, "stream": True, **USAGE}
    more = {"logprobs": True, "top_logprobs": 2} if chat else {"logprobs": 2}

    def streamed(*, speculative: bool) -> tuple[dict[str, list[Any]], int]:
        settings = {**BODY, **body, **more, "speculative": speculative}
        if chat:
            del settings["prompt"]
            events = read_events(post(drafting, **settings).content)
        else:
            events = drafting.stream(**settings)
        accepted = details_of(events[-1])["accepted_prediction_tokens"]
        pieces = [choice for event in events for choice in event["choices"]]
        whole: dict[str, list[Any]] = {"end": [piece["finish_reason"] for piece in pieces[-1:]]}
        whole["usage"] = [events[-1]["usage"]]
        for piece in pieces:
            text = piece["delta"].get("content") if chat else piece["text"]
            whole.setdefault("text", []).extend(text or "")
            whole.setdefault("ids", []).extend(piece.get("token_ids") or [])
            for name, values in (piece.get("logprobs") or {}).items():
                whole.setdefault(name, []).extend(values or [])
        return whole, accepted

    (drafted, accepted), (plain, none) = (streamed(speculative=on) for on in (True, False))
    assert accepted > 8 > none == 0
    assert drafted == plain
    assert len(plain["ids"]) == 20
    assert {"content"} <= plain.keys() if chat else {"token_logprobs"} <= plain.keys()


def test_drafted_tokens_are_beside_the_tokens(drafting: RunningServer) -> None:
    body = {"return_token_ids": True, "return_drafted_token_ids": True, "temperature": 0}
    whole = drafting.complete(**BODY, **body)
    (choice,) = whole["choices"]
    ids, drafts = choice["token_ids"], choice["drafted_token_ids"]
    assert len(drafts) == len(ids) == 20
    accepted = details_of(whole)["accepted_prediction_tokens"]
    assert sum(map(operator.eq, ids, drafts)) == accepted
    assert drafts[0] is None, "of the prompt's step"
    events = drafting.stream(**BODY, **body)
    assert [each for event in events for each in event["choices"][0]["drafted_token_ids"]] == drafts
    chat = {"max_tokens": 20, "ignore_eos": True, **body}
    (answer,) = post(drafting, **chat).json()["choices"]
    pieces = [
        event["choices"][0] for event in read_events(post(drafting, stream=True, **chat).content)
    ]
    for name in ("token_ids", "drafted_token_ids"):
        assert [each for piece in pieces for each in piece.get(name, ())] == answer[name]
    assert answer["drafted_token_ids"] != [None] * 20


@pytest.mark.parametrize("stops", [False, True])
def test_metrics_have_the_names_of_vllm(drafting: RunningServer, stops: bool) -> None:
    """Drafted tokens after a stop string are accepted by neither usage nor metrics."""
    text = drafting.complete(**BODY, temperature=0)["choices"][0]["text"]
    before = drafting.samples()
    # The first draft is for the second to fifth token, each of a character.
    answer = drafting.complete(**BODY, temperature=0, stop=text[2:4] if stops else None)
    details, size = details_of(answer), answer["usage"]["completion_tokens"]
    now = drafting.samples()
    counted = {
        name.removeprefix("spec_decode_num_"): int(value - before[name])
        for name, value in now.items()
        if name.startswith("spec_decode_num_")
    }
    assert {f"spec_decode_num_{name}".partition("_total")[0] for name in counted} == {
        *DRAFT_COUNTERS
    }
    accepted = details["accepted_prediction_tokens"]
    assert counted["accepted_tokens_total"] == accepted
    assert counted["draft_tokens_total"] == accepted + details["rejected_prediction_tokens"]
    by_position = [
        counted[f"accepted_tokens_per_pos_total{{position={index}}}"] for index in range(4)
    ]
    assert sum(by_position) == accepted
    assert counted["drafts_total"] >= by_position[0] >= by_position[3]
    tokens = now["generation_tokens_total"] - before["generation_tokens_total"]
    gaps = "inter_token_latency_seconds_count"
    assert (tokens, now[gaps] - before[gaps]) == (size, size - 1)
    assert size == (4 if stops else 20)
    if stops:
        assert details == {"accepted_prediction_tokens": 3, "rejected_prediction_tokens": 1}


def test_without_drafts_nothing_is_added(server: RunningServer) -> None:
    assert "completion_tokens_details" not in server.complete(**BODY)["usage"]
    body = {**BODY, "return_token_ids": True, "return_drafted_token_ids": True}
    assert server.complete(**body)["choices"][0]["drafted_token_ids"] is None
    assert not [name for name in server.samples() if "spec_decode" in name]
    assert (
        server.complete(**BODY, seed=3, speculative=False)["choices"]
        == (server.complete(**BODY, seed=3)["choices"])
    )
    error = server.error({**BODY, "speculative": "no"})
    assert error["param"] == "speculative"
