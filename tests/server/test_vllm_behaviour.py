"""What the tests of vLLM's own server assert of a client's view, where nanovllm once answered otherwise.

The cases are those of its tests of metrics, chats, embeddings, truncation, tokenization and streams.
"""

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from openai import BadRequestError, OpenAI

from nanovllm import LLM
from nanovllm.engine.chat_template import ChatTemplate
from tests.support.serving import (
    MODEL,
    RunningServer,
    loader,
    read_error,
    read_events,
    wait_until,
)

TEMPLATE = ChatTemplate(
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}",
    "the test's",
)
MESSAGES: list[Any] = [
    {"role": "system", "content": "be short"},
    {"role": "user", "content": "hi 🐱"},
]
PROMPT_IDS = [5, 9, 3, 17, 8, 44, 2, 30, 21]
CONTEXT = 128


@pytest.fixture(scope="module")
def chat_server(tiny_model: Path, backend: str) -> Iterator[RunningServer]:
    """A server with a chat template that ends as vLLM's do."""
    with RunningServer(loader(tiny_model), chat_template=TEMPLATE) as running:
        yield running


def growth(server: RunningServer, requests: int, **body: Any) -> dict[str, float]:
    """Return by how much each series grows by requests that are sent one after another."""
    wait_until(server.is_idle)
    before = server.samples()
    for _ in range(requests):
        server.complete(PROMPT_IDS, **body)
    count = "e2e_request_latency_seconds_count"
    wait_until(lambda: server.samples()[count] - before[count] == requests)
    wait_until(server.is_idle)
    after = server.samples()
    return {name: value - before.get(name, 0.0) for name, value in after.items()}


def test_the_counts_of_metrics_are_those_of_vllm(server: RunningServer) -> None:
    requests, tokens = 10, 10
    grown = growth(server, requests, max_tokens=tokens, ignore_eos=True)
    prompt = requests * len(PROMPT_IDS)
    generated = requests * tokens
    once_a_request = (
        "time_to_first_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds",
        "request_inference_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds",
        "request_prompt_tokens", "request_generation_tokens", "request_params_n", "request_params_max_tokens",
        "request_time_per_output_token_seconds", "request_max_num_generation_tokens",
    )  # fmt: skip
    expected = {
        **{f"{name}_count": requests for name in once_a_request},
        "inter_token_latency_seconds_count": generated - requests,
        "request_prompt_tokens_sum": prompt,
        "request_generation_tokens_sum": generated,
        "request_params_n_sum": requests,
        "request_params_max_tokens_sum": generated,
        "iteration_tokens_total_sum": prompt + generated,
        "iteration_tokens_total_count": generated,
        "prompt_tokens_total": prompt,
        "generation_tokens_total": generated,
        "request_success_total{finished_reason=length}": requests,
    }
    assert {name: grown.get(name) for name in expected} == expected


def test_prompt_tokens_that_the_cache_had_are_counted(server: RunningServer) -> None:
    body = {"max_tokens": 1, "cache_salt": "of this test"}
    prompt = [7] * 40  # two blocks of 16 and a rest
    server.complete(prompt, **body)
    wait_until(server.is_idle)
    before = server.samples()
    server.complete(prompt, **body)
    wait_until(lambda: server.samples()["prompt_tokens_total"] > before["prompt_tokens_total"])
    after = server.samples()
    names = ("prompt_tokens_total", "prompt_tokens_cached_total", "prefix_cache_hits_total")
    assert [after[name] - before[name] for name in names] == [40, 32, 32]


def test_every_metric_that_vllm_promises_is_there(server: RunningServer) -> None:
    server.complete("the", max_tokens=2)
    text = server.http.get("/metrics").text
    names = [
        "num_requests_running", "num_requests_waiting", "num_requests_waiting_by_reason", "kv_cache_usage_perc",
        "prefix_cache_queries_total", "prefix_cache_hits_total", "num_preemptions_total", "prompt_tokens_total",
        "prompt_tokens_cached_total", "generation_tokens_total", "cache_config_info", "request_success_total",
    ]  # fmt: skip
    histograms = [
        "iteration_tokens_total", "request_prompt_tokens", "request_generation_tokens", "request_params_n",
        "request_params_max_tokens", "time_to_first_token_seconds", "inter_token_latency_seconds",
        "request_time_per_output_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds",
        "request_inference_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds",
        "request_max_num_generation_tokens", "request_num_preemptions",
    ]  # fmt: skip
    names += [f"{name}_{part}" for name, part in product(histograms, ("sum", "bucket", "count"))]
    assert [name for name in names if f"\nnanovllm:{name}{{" not in text] == []


def test_a_chat_gives_its_token_ids(chat_client: OpenAI, llm: LLM) -> None:
    settings: dict[str, Any] = {
        "model": MODEL, "messages": MESSAGES, "max_tokens": 10, "temperature": 0, "logprobs": True,
    }  # fmt: skip
    ids: dict[str, Any] = {"return_token_ids": True, "return_tokens_as_token_ids": True}
    answer: Any = chat_client.chat.completions.create(**settings, extra_body=ids)
    (choice,) = answer.choices
    assert "be short\nuser: hi 🐱" in llm.tokenizer.decode(answer.prompt_token_ids)
    assert llm.tokenizer.decode(choice.token_ids) == choice.message.content
    tokens = [entry.token for entry in choice.logprobs.content]
    assert tokens == [f"token_id:{token_id}" for token_id in choice.token_ids]
    plain: Any = chat_client.chat.completions.create(
        **settings, extra_body={"return_token_ids": False}
    )
    assert (plain.prompt_token_ids, plain.choices[0].token_ids) == (None, None)

    first, *others = chat_client.chat.completions.create(**settings, stream=True, extra_body=ids)
    assert first.prompt_token_ids == answer.prompt_token_ids
    assert all(chunk.model_dump().get("prompt_token_ids") is None for chunk in others)
    streamed: list[int] = []
    for chunk in (first, *others):
        streamed += chunk.choices[0].model_dump().get("token_ids") or []
    assert streamed == choice.token_ids


@pytest.mark.parametrize("echo", [True, False])
def test_a_chat_continues_its_last_message(chat_client: OpenAI, echo: bool) -> None:
    saying = "an apple a day, keeps"
    more = {"echo": echo, "continue_final_message": True, "add_generation_prompt": False}
    answer = chat_client.chat.completions.create(
        model=MODEL, messages=[*MESSAGES, {"role": "assistant", "content": saying}], extra_body=more,
        max_tokens=5,
    )  # fmt: skip
    (choice,) = answer.choices
    assert choice.finish_reason in ("stop", "length")
    assert choice.message.role == "assistant"
    assert (saying in (choice.message.content or "")) == echo


@pytest.mark.parametrize("count", [None, 0, 1, 2])
def test_a_chat_gives_log_probabilities_of_its_prompt(
    chat_client: OpenAI, count: int | None
) -> None:
    more = {} if count is None else {"prompt_logprobs": count}
    answer: Any = chat_client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=2, extra_body=more
    )
    if count is None:
        assert answer.prompt_logprobs is None
        return
    assert len(answer.prompt_logprobs) == answer.usage.prompt_tokens
    first, *others = answer.prompt_logprobs
    assert first is None
    for position in others:
        assert sum(entry["rank"] <= count for entry in position.values()) == count
        assert count <= len(position) <= count + 1


def test_a_negative_number_of_prompt_logprobs_is_refused(chat_client: OpenAI) -> None:
    with pytest.raises(BadRequestError, match="prompt_logprobs"):
        chat_client.chat.completions.create(
            model=MODEL, messages=MESSAGES, extra_body={"prompt_logprobs": -1}
        )


def test_a_chat_may_be_truncated(chat_client: OpenAI) -> None:
    answer = chat_client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=2,
        extra_body={"truncate_prompt_tokens": 7, "add_special_tokens": False},
    )  # fmt: skip
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 7


@pytest.mark.parametrize("side", ["left", "right", None])
def test_a_prompt_is_truncated_on_either_side(server: RunningServer, side: str | None) -> None:
    fields: dict[str, Any] = {"truncate_prompt_tokens": 4, "return_token_ids": True}
    if side is not None:
        fields["truncation_side"] = side
    (choice,) = server.complete(PROMPT_IDS, max_tokens=1, **fields)["choices"]
    kept = PROMPT_IDS[:4] if side == "right" else PROMPT_IDS[-4:]
    assert choice["prompt_token_ids"] == kept


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("truncate_prompt_tokens", CONTEXT + 1),
        ("truncation_side", "middle"),
        ("cache_salt", ""),
        ("cache_salt", 100),
    ],
)
def test_values_that_vllm_refuses_are_refused(
    server: RunningServer, field: str, value: object
) -> None:
    body = {"prompt": PROMPT_IDS, "truncate_prompt_tokens": 4, field: value}
    assert server.error(body)["param"] == field


@pytest.mark.parametrize("source", ["how will models be developed in the end?", list(range(1, 30))])
def test_what_is_embedded_may_be_truncated(
    client: OpenAI, server: RunningServer, source: Any
) -> None:
    more = {"truncate_prompt_tokens": 10, "add_special_tokens": False}
    answer = client.embeddings.create(model=MODEL, input=source, extra_body=more)
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (10, 10)
    tokens = (
        server.http.post("/tokenize", json={"prompt": source}).json()["tokens"]
        if isinstance(source, str)
        else source
    )
    begun = client.embeddings.create(model=MODEL, input=tokens[:10])
    assert answer.data[0].embedding == begun.data[0].embedding


def test_what_is_embedded_cannot_be_truncated_to_more_than_the_context(client: OpenAI) -> None:
    with pytest.raises(BadRequestError, match="truncate_prompt_tokens"):
        client.embeddings.create(
            model=MODEL, input="a", extra_body={"truncate_prompt_tokens": CONTEXT + 1}
        )


@pytest.mark.parametrize(
    ("generation_prompt", "continues"), [(True, False), (False, False), (False, True)]
)
@pytest.mark.parametrize("special", [True, False])
def test_a_chat_is_tokenized(
    chat_server: RunningServer, llm: LLM, generation_prompt: bool, continues: bool, special: bool
) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "Sure,"}]
    body = {
        "model": MODEL, "messages": messages, "add_generation_prompt": generation_prompt,
        "continue_final_message": continues, "add_special_tokens": special,
    }  # fmt: skip
    answer = chat_server.http.post("/tokenize", json=body)
    assert answer.status_code == 200, answer.text
    end = "" if continues else "\nassistant:" if generation_prompt else "\n"
    expected = llm.tokenizer.encode(f"system: be short\nuser: hi 🐱\nassistant: Sure,{end}")
    assert answer.json() == {
        "count": len(expected), "max_model_len": CONTEXT, "tokens": expected, "token_strs": None,
    }  # fmt: skip


def test_a_message_cannot_both_go_on_and_be_answered(chat_server: RunningServer) -> None:
    body = {"messages": MESSAGES, "add_generation_prompt": True, "continue_final_message": True}
    for path in ("/tokenize", "/v1/chat/completions"):
        read_error(chat_server.http.post(path, json=body), 400)


def test_usage_is_continuous_only_with_include_usage(chat_server: RunningServer) -> None:
    for path, prompt in (
        ("/v1/completions", {"prompt": "the"}),
        ("/v1/chat/completions", {"messages": MESSAGES}),
    ):
        for include in (False, True):
            options = {"include_usage": include, "continuous_usage_stats": True}
            body = {**prompt, "max_tokens": 5, "stream": True, "stream_options": options}
            answer = chat_server.http.post(path, json=body)
            assert answer.status_code == 200, answer.text
            has_usage = [event.get("usage") is not None for event in read_events(answer.content)]
            assert set(has_usage) == {include}
