"""A server with the tokenizers of the families: bos, streamed text, log-probabilities, stops."""

from collections.abc import Iterator
from typing import Any

import pytest

from nanovllm.engine.chat.template import ChatTemplate
from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.model.token_spelling import Spelling
from tests.reference.chats import template_source
from tests.support.checkpoints import write_checkpoint, write_json
from tests.support.family_tokenizers import FAMILIES
from tests.support.serving import RunningServer, loader, read_events

SPARE = 21
"""Rows of the model's embedding without a token, of which Qwen has 271."""
TEMPLATES = {"llama2": "llama2", "mistral": "mistral", "qwen": "qwen2"}
MODEL_TYPES = {"llama2": "llama", "mistral": "mistral", "qwen": "qwen2"}
ANSWER = " world 🙂\n\n世"


@pytest.fixture(scope="module", params=TEMPLATES)
def family(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[RunningServer, Tokenizer]]:
    """A server of a random model of a family, with its tokenizer and template."""
    name = str(request.param)
    folder = FAMILIES[name]().write(tmp_path_factory.mktemp(name))
    (folder / "chat_template.jinja").write_text(template_source(TEMPLATES[name]), encoding="utf-8")
    tokenizer = Tokenizer.load(folder)
    vocab, special = tokenizer.vocab + SPARE, tokenizer.special_tokens
    ids = [special["<|im_end|>" if name == "qwen" else "</s>"], tokenizer.encode("X")[-1]]
    config = {"model_type": MODEL_TYPES[name], "vocab_size": vocab, "eos_token_id": None}
    write_checkpoint(folder, config=config, tied=False)
    write_json(folder / "generation_config.json", {"eos_token_id": ids})
    template = ChatTemplate.load(folder)
    with RunningServer(loader(folder, backend="numpy"), chat_template=template) as running:
        yield running, tokenizer


def post(server: RunningServer, path: str, **body: Any) -> dict[str, Any]:
    response = server.http.post(path, json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def complete(server: RunningServer, **body: Any) -> dict[str, Any]:
    defaults = {"prompt": "Hello", "max_tokens": 40, "structured_outputs": {"choice": [ANSWER]}}
    return post(server, "/v1/completions", **{**defaults, **body})


def test_a_prompt_has_the_bos_token_once(family: tuple[RunningServer, Tokenizer]) -> None:
    server, tokenizer = family
    bos = tokenizer.tokens_around_text[0]
    plain = tokenizer.encode("Hello", add_special_tokens=False)
    for options, expected in (
        ({}, [*bos, *plain]),
        ({"add_special_tokens": True}, [*bos, *plain]),
        ({"add_special_tokens": False}, plain),
    ):
        assert post(server, "/tokenize", prompt="Hello", **options)["tokens"] == expected
        answer = complete(server, return_token_ids=True, **options)
        assert answer["choices"][0]["prompt_token_ids"] == expected
    messages = [{"role": "user", "content": "Hello"}]
    (chat,) = (
        post(
            server, "/v1/chat/completions", messages=messages, max_tokens=1, return_token_ids=True
        )["prompt_token_ids"],
    )
    assert chat == post(server, "/tokenize", messages=messages)["tokens"]
    assert [i for i in chat if i in bos] == bos, "the template writes it"
    assert chat[: len(bos)] == bos


@pytest.mark.parametrize("echo", [False, True])
def test_a_continuation_is_exact_streamed_or_whole(
    family: tuple[RunningServer, Tokenizer], echo: bool
) -> None:
    server, tokenizer = family
    prompt = "Hello" if echo else ""
    options = {"logprobs": 3, "echo": echo, "seed": 1, "return_token_ids": True}
    (whole,) = complete(server, **options)["choices"]
    assert whole["text"] == prompt + ANSWER
    body = {"prompt": "Hello", "max_tokens": 40, "structured_outputs": {"choice": [ANSWER]}}
    response = server.http.post("/v1/completions", json={**body, **options, "stream": True})
    pieces = [event["choices"][0] for event in read_events(response.content)]
    assert "".join(piece["text"] for piece in pieces) == whole["text"]
    assert all("\ufffd" not in piece["text"] for piece in pieces)
    logprobs = whole["logprobs"]
    for field in ("tokens", "text_offset"):
        joined = [one for piece in pieces for one in piece["logprobs"][field]]
        assert joined == logprobs[field], field
    ids = (whole["prompt_token_ids"] if echo else []) + whole["token_ids"]
    unseen = {*tokenizer.special_token_ids, *server.engine.engine.model.eos_token_ids}
    texts = zip(logprobs["tokens"], logprobs["text_offset"], ids, strict=True)
    for text, offset, token_id in texts:
        assert token_id in unseen or whole["text"][offset:].startswith(text)


def test_the_bytes_of_a_chats_tokens_join_to_its_text(
    family: tuple[RunningServer, Tokenizer],
) -> None:
    server, _ = family
    body = {
        "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 40, "logprobs": True,
        "top_logprobs": 2, "structured_outputs": {"choice": [ANSWER]},
    }  # fmt: skip
    (choice,) = post(server, "/v1/chat/completions", **body)["choices"]
    assert choice["message"]["content"] == ANSWER
    content = choice["logprobs"]["content"][:-1]  # without the token that ends the turn
    assert b"".join(bytes(entry["bytes"]) for entry in content) == ANSWER.encode()
    assert "".join(entry["token"] for entry in content) == ANSWER
    response = server.http.post("/v1/chat/completions", json={**body, "stream": True})
    deltas = [event["choices"][0]["delta"] for event in read_events(response.content)]
    assert "".join(delta.get("content") or "" for delta in deltas) == ANSWER


def test_a_stop_string_ends_the_text_within_byte_tokens(
    family: tuple[RunningServer, Tokenizer],
) -> None:
    server, _ = family
    (choice,) = complete(server, stop=["🙂\n"])["choices"]
    assert (choice["text"], choice["stop_reason"]) == (" world ", "🙂\n")


def test_every_end_token_of_the_generation_config_ends_an_output(
    family: tuple[RunningServer, Tokenizer],
) -> None:
    server, tokenizer = family
    for end in server.engine.engine.model.eos_token_ids:
        answer = complete(server, structured_outputs=None, allowed_token_ids=[end])
        (choice,) = answer["choices"]
        assert (choice["text"], choice["finish_reason"]) == ("", "stop")
        assert answer["usage"]["completion_tokens"] == 1
    assert len(server.engine.engine.model.eos_token_ids) == 2
    assert tokenizer.vocab < server.engine.engine.model.vocab


def test_an_id_without_a_token_adds_nothing(family: tuple[RunningServer, Tokenizer]) -> None:
    server, tokenizer = family
    spare = tokenizer.vocab + SPARE - 1
    options = {"structured_outputs": None, "allowed_token_ids": [spare], "logprobs": 2}
    (choice,) = complete(server, max_tokens=3, **options)["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("", "length")
    assert choice["logprobs"]["text_offset"] == [0, 0, 0]
    assert post(server, "/detokenize", tokens=[spare])["prompt"] == ""
    tokens = tokenizer.encode("Hello", add_special_tokens=False)
    assert post(server, "/detokenize", tokens=[*tokens, spare])["prompt"] == "Hello"


def test_the_inspector_has_the_bytes_of_all_tokens(
    family: tuple[RunningServer, Tokenizer],
) -> None:
    server, tokenizer = family
    tokens = server.http.get("/v1/engine/vocabulary").json()["tokens"]
    data = [Spelling().bytes_of(token) for token in tokens]
    assert data[: tokenizer.vocab] == [tokenizer.token_bytes(i) for i in range(tokenizer.vocab)]
    assert data[tokenizer.vocab :] == [b""] * SPARE
    assert b" world" in data
