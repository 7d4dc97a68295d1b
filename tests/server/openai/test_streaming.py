"""Streams: the fields of every chunk, their sum being the unstreamed answer, and usage."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from nanovllm import LLM
from nanovllm.server.http.event_stream import KEEP_ALIVE
from tests.support.load_tools import READERS
from tests.support.serving import (
    MODEL,
    RunningServer,
    join_choices,
    loader,
    read_events,
    whole_choices,
)

FORCED = {"ignore_eos": True}
OPTIONAL = {"prompt_logprobs", "prompt_token_ids", "token_ids"}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "greedy": {"temperature": 0},
    "n": {"n": 3},
    "as many as the best_of": {"n": 3, "best_of": 3},
    "greedy n": {
        "n": 3,
        "temperature": 0,
        "prompt": ["the", "a cat"],
        "logprobs": 1,
        "echo": True,
        "prompt_logprobs": 0,
    },
    "truncated": {
        "prompt": ["in the end, all was well", "漢字"],
        "truncate_prompt_tokens": 2,
        "echo": True,
        "logprobs": 1,
    },
    "prompts": {"prompt": ["the", "a cat in the end", "x"]},
    "prompts and n": {"prompt": [[1, 2, 3], [4]], "n": 2},
    "echo": {"echo": True},
    "echo, n, prompts": {"echo": True, "n": 2, "prompt": ["é", "漢字"]},
    "logprobs": {"logprobs": 2},
    "logprobs, echo": {"logprobs": 2, "echo": True},
    "prompt logprobs": {"prompt_logprobs": 1, "n": 2},
    "scoring": {"echo": True, "max_tokens": 0, "logprobs": 1},
    "stop": {"stop": ["W", "\ufffd\ufffd"], "prompt": ["the", "a cat"]},
    "stop in the text": {"stop": ["W", "\ufffd\ufffd"], "include_stop_str_in_output": True},
    "one token": {"max_tokens": 1},
    "special tokens": {"logit_bias": {"266": 5}, "ignore_eos": True, "skip_special_tokens": False},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_stream_adds_up_to_the_answer_that_is_not_streamed(
    server: RunningServer, name: str
) -> None:
    body = {
        "prompt": "in the end",
        "max_tokens": 24,
        "temperature": 1.0,
        "seed": 12,
        **SETTINGS[name],
    }
    whole = server.complete(**body)
    events = server.stream(**body)
    assert join_choices(events) == whole_choices(whole)
    prompt_logprobs = {
        choice["index"]: choice.get("prompt_logprobs") for choice in whole["choices"]
    }
    streamed = {
        choice["index"]: choice["prompt_logprobs"]
        for event in events
        for choice in event["choices"]
        if choice["prompt_logprobs"] is not None
    }
    assert streamed == {
        index: found for index, found in prompt_logprobs.items() if found is not None
    }


def test_every_chunk_says_what_it_is_part_of(server: RunningServer) -> None:
    response = server.post(
        {
            "prompt": ["the", "a"],
            "n": 2,
            "stream": True,
            "max_tokens": 6,
            "stream_options": {"include_usage": True},
        }
    )
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    events = server.stream(
        ["the", "a"], n=2, max_tokens=6, stream_options={"include_usage": True}, model="alias"
    )
    heads = {(event["id"], event["object"], event["created"], event["model"]) for event in events}
    ((job_id, kind, created, model),) = heads
    assert job_id.startswith("cmpl-")
    assert (kind, model) == ("text_completion", "alias")
    assert created > 1_600_000_000
    keys = {"index", "text", "logprobs", "finish_reason", "stop_reason", *OPTIONAL}
    assert all(choice.keys() == keys for event in events for choice in event["choices"])


def test_text_comes_in_pieces(slow_server: RunningServer) -> None:
    letters = [ord(letter) - 33 for letter in "abcdefghijklmnopqrstuvwxyz"]
    events = slow_server.stream(
        "the", max_tokens=40, temperature=1.0, seed=1, allowed_token_ids=letters
    )
    assert sum(bool(event["choices"][0]["text"]) for event in events) > 10


def test_half_a_character_is_held_back(slow_server: RunningServer, llm: LLM) -> None:
    """The bytes E6 BC A2 can make a 漢. A part is not sent while it can still become whole."""
    settings = {
        "max_tokens": 60,
        "temperature": 2.0,
        "seed": 2,
        "allowed_token_ids": [llm.tokenizer.encode("漢")[i] for i in range(3)],
    }
    whole = slow_server.complete("the", **settings)["choices"][0]["text"]
    pieces = [
        choice["text"]
        for event in slow_server.stream("the", **settings)
        for choice in event["choices"]
    ]
    assert "".join(pieces) == whole
    assert len(pieces) > 10
    assert set(whole) > {"\ufffd"}


@pytest.mark.parametrize(("options", "has_usage_chunk", "usage_in_chunks"), [
    (None, False, "absent"),
    ({}, False, "absent"),
    ({"include_usage": False}, False, "absent"),
    ({"include_usage": True}, True, "null"),
    ({"continuous_usage_stats": True}, False, "absent"),
    ({"include_obfuscation": False}, False, "absent"),
    ({"include_usage": True, "continuous_usage_stats": True}, True, "counts"),
])  # fmt: skip
def test_usage_comes_where_it_is_asked_for(
    server: RunningServer, options: Any, *, has_usage_chunk: bool, usage_in_chunks: str
) -> None:
    body: dict[str, Any] = {
        "prompt": ["the", "a cat"],
        "n": 2,
        "max_tokens": 10,
        "ignore_eos": True,
        "cache_salt": "none",
        "return_token_ids": True,
    }
    events = server.stream(**body, **({"stream_options": options} if options is not None else {}))
    chunks = [event for event in events if event["choices"]]
    assert [event for event in events if not event["choices"]] == (
        events[-1:] if has_usage_chunk else []
    )
    assert all(len(event["choices"]) == 1 for event in chunks), (
        "programs look at the first choice of a chunk alone"
    )
    whole = server.complete(**body)
    prompt_tokens = whole["usage"]["prompt_tokens"]
    expected = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": 40,
        "total_tokens": prompt_tokens + 40,
    }
    if has_usage_chunk:
        assert events[-1]["usage"].items() >= expected.items()
    if usage_in_chunks == "absent":
        assert all("usage" not in event for event in chunks)
    elif usage_in_chunks == "null":
        assert all(event["usage"] is None for event in chunks)
    else:
        counts: Counter[int] = Counter()
        own_prompt_tokens = [len(choice["prompt_token_ids"]) for choice in whole["choices"]]
        for event in chunks:
            index, usage = event["choices"][0]["index"], event["usage"]
            counts[index] += len(event["choices"][0]["token_ids"])
            assert usage["completion_tokens"] == counts[index], "of another choice"
            assert usage["prompt_tokens"] == own_prompt_tokens[index]
            assert usage["total_tokens"] == usage["prompt_tokens"] + counts[index]
        assert counts == dict.fromkeys(range(4), 10)


def test_the_official_client_reads_streamed_usage(client: OpenAI) -> None:
    with client.completions.create(
        model=MODEL, prompt="the", max_tokens=5, stream=True, stream_options={"include_usage": True}
    ) as stream:
        chunks = list(stream)
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens <= 5


def test_the_official_client_streams_logprobs_of_several_prompts(client: OpenAI) -> None:
    settings: dict[str, Any] = {
        "model": MODEL,
        "prompt": ["the", "a cat"],
        "max_tokens": 8,
        "temperature": 0,
        "logprobs": 1,
    }
    whole = client.completions.create(**settings)
    streamed: dict[int, list[float]] = {0: [], 1: []}
    with client.completions.create(**settings, stream=True) as stream:
        for chunk in stream:
            for choice in chunk.choices:
                assert choice.logprobs is not None
                streamed[choice.index] += choice.logprobs.token_logprobs or []
    assert list(streamed.values()) == [
        choice.logprobs.token_logprobs for choice in whole.choices if choice.logprobs
    ]


def test_choices_of_several_prompts_take_turns(slow_server: RunningServer) -> None:
    events = slow_server.stream(
        ["the", "a", "x"], max_tokens=40, temperature=0, ignore_eos=True, logprobs=0
    )
    order = [choice["index"] for event in events for choice in event["choices"]]
    assert {0, 1, 2} <= set(order[: len(order) // 2]), "one prompt was answered after the other"


def test_what_was_not_asked_for_is_null_for_the_official_client(client: OpenAI) -> None:
    """An attribute that is missing would be an AttributeError, as it is not with vLLM."""
    settings: dict[str, Any] = {"model": MODEL, "prompt": "the", "max_tokens": 3}
    whole = client.completions.create(**settings)
    beams = client.completions.create(**settings, extra_body={"use_beam_search": True})
    with client.completions.create(**settings, stream=True) as stream:
        chunks = list(stream)
    for choice in (answer.choices[0] for answer in [whole, beams, *chunks]):
        found = choice.model_dump()
        assert {name: found.get(name, "missing") for name in OPTIONAL} == dict.fromkeys(OPTIONAL)
    for answer in (whole, beams):
        sent = answer.model_dump(exclude_unset=True)
        assert (sent["service_tier"], sent["system_fingerprint"]) == (None, None)


@pytest.fixture(scope="module")
def blank_line_server(tiny_model: Path, backend: str) -> Iterator[RunningServer]:
    """A server that sends a blank line after each millisecond without an event."""
    with RunningServer(loader(tiny_model, step_s=0.005), keep_alive_s=0.001) as running:
        yield running


def test_blank_lines_keep_a_stream_alive_that_has_nothing_to_send(
    slow_server: RunningServer, blank_line_server: RunningServer
) -> None:
    """A step takes 5 ms here, and a request in the queue waits as one between two steps."""
    settings: dict[str, Any] = {"max_tokens": 10, "temperature": 0, **FORCED}
    quiet = slow_server.post({"prompt": "the", "stream": True, **settings}).content
    assert b"\n\n\n" not in quiet
    text = join_choices(read_events(quiet))[0].text
    with blank_line_server.http.stream(
        "POST", "/v1/completions", json={"prompt": "the", "stream": True, **settings}
    ) as response:
        reads = list(response.iter_raw())
    kept = b"".join(reads)
    assert KEEP_ALIVE * 2 in kept
    assert join_choices(read_events(kept)) == join_choices(read_events(quiet))
    assert [read(reads) for read in READERS] == [text, text]
    with (
        OpenAI(base_url=f"{blank_line_server.url}/v1", api_key="none", max_retries=0) as opened,
        opened.completions.create(
            model=MODEL, prompt="the", stream=True, max_tokens=10, temperature=0, extra_body=FORCED
        ) as stream,
    ):
        assert "".join(chunk.choices[0].text for chunk in stream) == text


def test_a_stream_may_be_asked_for_with_false(server: RunningServer) -> None:
    assert (
        server.post({"prompt": "the", "stream": False, "max_tokens": 1}).headers["content-type"]
        == "application/json"
    )
