"""Refused requests: one error format, never 422.

Messages name the field, the value and the limit, and are short.
"""

import threading
from typing import Any

import openai
import pytest
from openai import OpenAI

from nanovllm.server.http.errors import MAX_INPUT_CHARACTERS
from nanovllm.server.http.validation_errors import MAX_PROBLEMS
from tests.support.serving import MODEL, RunningServer, read_error, read_events

LONGEST_ANSWER_BYTES = 6000
BAD_FIELDS: dict[str, tuple[dict[str, Any], str | None, str]] = {
    "unknown field": (
        {"tempreature": 1}, "tempreature", "not supported; did you mean temperature?",
    ),
    "unknown field in capitals": ({"maxTokens": 1}, "maxTokens", "did you mean max_tokens?"),
    "a field of chats": (
        {"max_completion_tokens": 1}, "max_completion_tokens", "did you mean max_tokens?",
    ),
    "a field of llama.cpp": ({"n_predict": 1}, "n_predict", "did you mean max_tokens?"),
    "a field of old vLLM": (
        {"guided_choice": ["a"]}, "guided_choice", "did you mean structured_outputs?",
    ),
    "unknown field a little like others": (
        {"cache_prompt": True}, "cache_prompt", "cache_prompt: not supported (given: true)",
    ),
    "unknown field like no other": ({"zzz": 1}, "zzz", "zzz: not supported (given: 1)"),
    "suffix": ({"suffix": "x"}, "suffix", "not supported"),
    "best_of below n": ({"best_of": 2, "n": 3}, "best_of", "3"),
    "best_of too large": ({"best_of": 21}, "best_of", "20"),
    "best_of 0": ({"best_of": 0}, "best_of", "1"),
    "best_of above n in a stream": ({"best_of": 3, "n": 2, "stream": True}, "best_of", "stream"),
    "a greedy best_of in a stream": (
        {"best_of": 3, "temperature": 0, "stream": True}, "best_of", "stream",
    ),
    "n too small": ({"n": 0}, "n", "must be at least 1 (given: 0)"),
    "n too large": ({"n": 129}, "n", "128"),
    "n of another type": ({"n": "2"}, "n", 'n: must be an integer (given: "2")'),
    "n with a fraction": ({"n": 1.5}, "n", "1.5"),
    "n a truth value": ({"n": True}, "n", "must be an integer (given: true)"),
    "n not a number": ({"n": float("nan")}, "n", "must be an integer (given: NaN)"),
    "temperature too high": ({"temperature": 2.1}, "temperature", "2"),
    "temperature below 0": ({"temperature": -0.1}, "temperature", "0"),
    "temperature a text": (
        {"temperature": "hot"}, "temperature", 'must be a number (given: "hot")',
    ),
    "top_p 0": ({"top_p": 0}, "top_p", "greater than 0"),
    "top_p too large": ({"top_p": 1.1}, "top_p", "1"),
    "top_k": ({"top_k": -2}, "top_k", "-1"),
    "min_p": ({"min_p": 1.5}, "min_p", "1"),
    "repetition_penalty": ({"repetition_penalty": 0}, "repetition_penalty", "0"),
    "presence_penalty": ({"presence_penalty": 2.5}, "presence_penalty", "2"),
    "frequency_penalty": ({"frequency_penalty": -2.5}, "frequency_penalty", "-2"),
    "max_tokens below 0": ({"max_tokens": -1}, "max_tokens", "0"),
    "max_tokens 0 without echo": ({"max_tokens": 0}, "max_tokens", "echo"),
    "max_tokens a list": (
        {"max_tokens": [1]}, "max_tokens", "must be an integer (given: a list of 1)",
    ),
    "min_tokens above max_tokens": ({"min_tokens": 9, "max_tokens": 8}, "min_tokens", "9"),
    "too many logprobs": ({"logprobs": 21}, "logprobs", "20"),
    "logprobs a truth value": (
        {"logprobs": True}, "logprobs", "must be an integer (given: true)",
    ),
    "too many prompt_logprobs": ({"prompt_logprobs": 21}, "prompt_logprobs", "20"),
    "truncate_prompt_tokens 0": ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "-1"),
    "truncate_prompt_tokens below -1": (
        {"truncate_prompt_tokens": -2}, "truncate_prompt_tokens", "-2",
    ),
    "truncate_prompt_tokens too large": (
        {"truncate_prompt_tokens": 2**31}, "truncate_prompt_tokens", str(2**31 - 1),
    ),
    "truncate_prompt_tokens a text": (
        {"truncate_prompt_tokens": "5"}, "truncate_prompt_tokens", 'given: "5"',
    ),
    "no room for a truncated prompt": (
        {"truncate_prompt_tokens": -1, "max_tokens": 128}, "max_tokens", "128",
    ),
    "return_token_ids a number": (
        {"return_token_ids": 1}, "return_token_ids", "must be true or false (given: 1)",
    ),
    "return_drafted_token_ids without return_token_ids": (
        {"return_drafted_token_ids": True}, "return_drafted_token_ids", "return_token_ids",
    ),
    "return_tokens_as_token_ids a text": (
        {"return_tokens_as_token_ids": "yes", "logprobs": 1}, "return_tokens_as_token_ids",
        'given: "yes"',
    ),
    "return_tokens_as_token_ids without logprobs": (
        {"return_tokens_as_token_ids": True}, "return_tokens_as_token_ids", "logprobs",
    ),
    "seed of more than 64 bits": ({"seed": 2**63}, "seed", str(2**63 - 1)),
    "seed of thousands of digits": ({"seed": 10**4000}, "seed", "more than 300 digits"),
    "stop a number": ({"stop": 5}, "stop", "5"),
    "stop with a number": ({"stop": ["a", 5]}, "stop", "5"),
    "an empty stop": ({"stop": ["a", ""]}, "stop", "not empty"),
    "too many stops": ({"stop": ["a"] * 17}, "stop", "16"),
    "stop token outside the vocabulary": (
        {"stop_token_ids": [1, 267]}, "stop_token_ids", "0 to 266",
    ),
    "stop token a text": (
        {"stop_token_ids": ["a"]}, "stop_token_ids",
        'stop_token_ids.0: must be an integer (given: "a")',
    ),
    "stop token with a fraction": (
        {"stop_token_ids": [5.0, 5.5]}, "stop_token_ids",
        "stop_token_ids.1: must be an integer (given: 5.5)",
    ),
    "stop tokens a number": ({"stop_token_ids": 3}, "stop_token_ids", "list"),
    "logit_bias a list": (
        {"logit_bias": [1]}, "logit_bias", "must be an object (given: a list of 1)",
    ),
    "logit_bias for a word": ({"logit_bias": {"the": 1}}, "logit_bias", '"the"'),
    "logit_bias for two words": (
        {"logit_bias": {"the": 1, "3": 1, "": 1}}, "logit_bias", '"the", ""',
    ),
    "logit_bias for many words": (
        {"logit_bias": {f"w{n}": 1 for n in range(11)}}, "logit_bias", '"w8", "w9", ...',
    ),
    "logit_bias below 0": ({"logit_bias": {"-1": 1}}, "logit_bias", '"-1"'),
    "logit_bias outside the vocabulary": (
        {"logit_bias": {str(token): 1 for token in range(266, 273)}}, "logit_bias",
        "0 to 266: 267, 268, 269, 270, 271, 272",
    ),
    "logit_bias for a very large id": ({"logit_bias": {"9" * 400: 1}}, "logit_bias", "99999"),
    "logit_bias of digits of another script": ({"logit_bias": {"٣": 1}}, "logit_bias", "token ids"),
    "logit_bias too large": (
        {"logit_bias": {"1": 101}}, "logit_bias",
        "logit_bias of token 1 is 101.0 but must be a number, from -100 to 100",
    ),
    "logit_bias a text": (
        {"logit_bias": {"1": "x"}}, "logit_bias", 'logit_bias.1: must be a number (given: "x")',
    ),
    "logit_bias too large for a float": (
        {"logit_bias": {"1": 10**400}}, "logit_bias", "more than 300 digits",
    ),
    "too much logit_bias": ({"logit_bias": {str(i): 0 for i in range(5000)}}, "logit_bias", "1024"),
    "allowed token outside the vocabulary": (
        {"allowed_token_ids": [-1]}, "allowed_token_ids", "-1",
    ),
    "no token allowed": ({"allowed_token_ids": []}, "allowed_token_ids", "empty"),
    "max_tokens of thousands of digits": ({"max_tokens": 10**4299}, "max_tokens", str(2**31 - 1)),
    "min_tokens of thousands of digits": ({"min_tokens": 10**4299}, "min_tokens", str(2**31 - 1)),
    "logprobs of thousands of digits": ({"logprobs": 10**4299}, "logprobs", str(2**31 - 1)),
    "a long bad word": (
        {"bad_words": ["a", "b" * 1001]}, "bad_words", "1001 characters, the limit is 1000",
    ),
    "many long bad words": (
        {"bad_words": ["b" * 1000] * 66}, "bad_words", "66000 characters in total",
    ),
    "too many bad words": ({"bad_words": ["b"] * 1025}, "bad_words", "1024"),
    "too many allowed tokens": ({"allowed_token_ids": [1] * 262145}, "allowed_token_ids", "262144"),
    "a long user": ({"user": "u" * 1025}, "user", "1024"),
    "long texts to be truncated": (
        {"prompt": ["a " * 50000] * 11, "truncate_prompt_tokens": 5}, "prompt", "1048576",
    ),
    "an empty bad word": ({"bad_words": [""]}, "bad_words", "not empty"),
    "echo a text": ({"echo": "yes"}, "echo", 'must be true or false (given: "yes")'),
    "stream a number": ({"stream": 1}, "stream", "1"),
    "stream_options without stream": (
        {"stream_options": {"include_usage": True}}, "stream_options", "stream",
    ),
    "stream_options with another field": (
        {"stream": True, "stream_options": {"usge": 1}}, "stream_options",
        "usge: not supported (given: 1)",
    ),
    "a misspelt field of stream_options": (
        {"stream": True, "stream_options": {"include_usge": 1}}, "stream_options",
        "did you mean include_usage?",
    ),
    "stream_options of another type": (
        {"stream": True, "stream_options": True}, "stream_options",
        "must be an object (given: true)",
    ),
    "include_usage of another type": (
        {"stream": True, "stream_options": {"include_usage": 1}}, "stream_options", "include_usage",
    ),
    "a tier of its own": (
        {"service_tier": "priority"}, "service_tier",
        'must be "auto" or "default" (given: "priority")',
    ),
    "metadata a text": ({"metadata": "a"}, "metadata", "must be an object"),
    "an empty salt": (
        {"cache_salt": ""}, "cache_salt", 'must be text that is not empty (given: "")',
    ),
    "ignore_eos with a form": (
        {"response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos",
        "with response_format",
    ),
    "a schema that is a number": (
        {"structured_outputs": {"json": 5}}, "structured_outputs",
        "structured_outputs.json: must be a JSON schema",
    ),
    "priority": ({"priority": 2**31}, "priority", str(2**31)),
    "a priority without the policy": ({"priority": -1}, "priority", "scheduling_policy='priority'"),
    "request_id with a line break": ({"request_id": "a\nb"}, "request_id", "pattern"),
    "user a number": ({"user": 5}, "user", "must be text (given: 5)"),
    "model a number": ({"model": 5}, "model", "5"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FIELDS)
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_field_is_named_with_its_value_and_limit(
    server: RunningServer, name: str, *, stream: bool
) -> None:
    fields, param, part = BAD_FIELDS[name]
    error = server.error(
        {
            "prompt": "the",
            "max_tokens": 8,
            **({"stream": True} if stream and "without stream" not in name else {}),
            **fields,
        }
    )
    assert (error["type"], error["param"]) == ("BadRequestError", param)
    assert part in error["message"]
    assert param is None or param in error["message"]


BAD_PROMPTS: dict[str, tuple[Any, str]] = {
    "empty text": ("", "empty"),
    "empty list": ([], "empty"),
    "list of an empty list": ([[]], "empty"),
    "list of an empty text": ([""], "empty"),
    "an empty one among others": (["a", ""], "empty"),
    "an empty list among others": ([[1], []], "empty"),
    "null": (None, "list"),
    "a number": (5, "given: 5"),
    "a truth value": (True, "given: true"),
    "truth values": ([True], "entry 0 of the list is true"),
    "an object": ({"prompt": "a"}, "object of 1"),
    "list of null": ([None], "custom_prefix_token_id"),
    "null among ids as lm-eval sends it": (
        [[None, 5]], "entry 0 of list 0 is null, which is no token id; lm-eval sends null",
    ),
    "fractions": ([1.0, 1.5], "entry 1 of the list is 1.5, which is no token id"),
    "text and ids": (["a", "b", 1], 'entry 0 is "a" and entry 2 is 1'),
    "ids and lists of ids": ([1, [2]], "entry 0 is 1 and entry 1 is a list of 1"),
    "lists of texts": ([[1], ["a"]], 'entry 0 of list 1 is "a"'),
    "nested too deeply": ([[[1]]], "entry 0 of list 0 is a list of 1"),
    "an id outside the vocabulary": ([1, 267], "0 to 266"),
    "an id below 0": ([[1], [-1]], "-1"),
    "an id of thousands of digits": ([10**4000], "0 to 266"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_PROMPTS)
def test_a_bad_prompt_is_refused(server: RunningServer, name: str) -> None:
    prompt, part = BAD_PROMPTS[name]
    error = server.error({"prompt": prompt})
    assert (error["type"], error["param"]) == ("BadRequestError", "prompt")
    assert part in error["message"]


def test_a_missing_prompt_is_named(server: RunningServer) -> None:
    error = server.error({"max_tokens": 5})
    assert error["param"] == "prompt"
    assert "required" in error["message"]


def test_more_than_the_context_is_refused_with_both_numbers_and_the_limit(
    server: RunningServer,
) -> None:
    error = server.error({"prompt": [1] * 101, "max_tokens": 28})
    assert error["param"] == "max_tokens"
    for number in ("101", "28", "129", "128"):
        assert number in error["message"]
    for prompt in ([1] * 128, [1] * 300, "a" * 150):
        error = server.error({"prompt": prompt, "max_tokens": 1})
        assert error["param"] == "prompt"
        assert str(len(prompt)) in error["message"]
        assert "128" in error["message"]
    server.complete([1] * 128, max_tokens=0, echo=True)
    assert "129" in server.error({"prompt": [1] * 129, "max_tokens": 0, "echo": True})["message"]


def test_an_unknown_model_is_not_found(server: RunningServer) -> None:
    error = server.error({"prompt": "a", "model": "gpt-5"}, 404)
    assert error["param"] == "model"
    assert error["type"] == "NotFoundError"
    assert "'gpt-5'" in error["message"]
    assert MODEL in error["message"]


@pytest.mark.parametrize(
    "path",
    ["/nope", "/v1", "/v1/completion", "/v1/completions/x", "/%ff%00", "/" + "x" * 5000],
)
def test_an_unknown_path_is_not_found(server: RunningServer, path: str) -> None:
    response = server.http.get(path)
    assert read_error(response, 404)["type"] == "NotFoundError"
    assert "there is no such path; " in response.text
    assert len(response.content) < LONGEST_ANSWER_BYTES


@pytest.mark.parametrize("path", ["/completions", "/v1/v1/completions", "/v1/completions//"])
def test_the_path_that_a_wrong_base_url_misses_is_named(server: RunningServer, path: str) -> None:
    error = read_error(server.http.post(path, json={"prompt": "a"}), 404)
    assert error["message"].endswith("did you mean /v1/completions?")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/completions"),
        ("DELETE", "/v1/completions"),
        ("POST", "/health"),
        ("PUT", "/metrics"),
    ],
)
def test_another_method_is_not_allowed(server: RunningServer, method: str, path: str) -> None:
    response = server.http.request(method, path)
    assert read_error(response, 405)["type"] == "MethodNotAllowedError"
    assert response.headers["allow"] == ("POST" if path == "/v1/completions" else "GET, HEAD")


def test_at_most_ten_problems_are_listed_each_cut_short(server: RunningServer) -> None:
    error = server.error(
        {"prompt": "a", **{f"field{i:03}{'y' * 500}": "z" * 5000 for i in range(25)}}
    )
    assert error["message"].count("not supported") == MAX_PROBLEMS
    assert error["message"].endswith("and 15 more")
    assert "z" * (MAX_INPUT_CHARACTERS + 1) not in error["message"]
    assert "y" * (MAX_INPUT_CHARACTERS + 1) not in error["message"]
    assert error["param"] is not None
    assert len(error["param"]) <= MAX_INPUT_CHARACTERS


def test_several_problems_are_listed_at_once(server: RunningServer) -> None:
    error = server.error({"prompt": "", "n": 0, "wrong": 1})
    assert all(part in error["message"] for part in ("prompt", "n:", "wrong"))


@pytest.mark.parametrize("stream", [False, True])
def test_settings_that_leave_no_token_are_the_requests_fault(
    server: RunningServer, *, stream: bool
) -> None:
    """Bad words of several tokens show only while the answer grows."""
    body = {
        "prompt": [1],
        "allowed_token_ids": [5],
        "bad_words": [server.http.post("/detokenize", json={"tokens": [5, 5]}).json()["prompt"]],
    }
    response = server.post({**body, "max_tokens": 4, "ignore_eos": True, "stream": stream})
    error = read_events(response.content)[-1]["error"] if stream else response.json()["error"]
    assert response.status_code == (200 if stream else 400)
    assert (error["code"], error["type"]) == (400, "BadRequestError")
    assert "every token is forbidden" in error["message"]


def test_a_bad_request_does_not_disturb_others(slow_server: RunningServer) -> None:
    settings = {"max_tokens": 60, "temperature": 0, "ignore_eos": True}
    alone = slow_server.complete("in the end", **settings)["choices"]
    found: list[Any] = []
    thread = threading.Thread(
        target=lambda: found.append(slow_server.complete("in the end", **settings)["choices"])
    )
    thread.start()
    while thread.is_alive():
        for fields, _, _ in list(BAD_FIELDS.values())[:20]:
            slow_server.error({"prompt": "the", "max_tokens": 8, **fields})
    thread.join()
    assert found == [alone]


def test_the_official_client_raises_its_own_exceptions(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature") as caught:
        client.completions.create(model=MODEL, prompt="a", temperature=9)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="128"):
        client.completions.create(model=MODEL, prompt="a", max_tokens=500)
    with pytest.raises(openai.NotFoundError, match="served here"):
        client.completions.create(model="other", prompt="a")
    with pytest.raises(openai.BadRequestError, match="suffix"):
        client.completions.create(model=MODEL, prompt="a", suffix="b", stream=True)


def test_of_several_prompts_the_one_at_fault_is_named(server: RunningServer) -> None:
    assert server.error({"prompt": [[1], [1] * 1000]})["message"].startswith(
        "prompt 1: the prompt has 1000 tokens"
    )
    assert server.error({"prompt": [[1] * 1000]})["message"].startswith(
        "the prompt has 1000 tokens"
    )
