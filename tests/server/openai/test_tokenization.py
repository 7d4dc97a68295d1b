"""POST /tokenize and /detokenize: the ids of a completion, text and back again, and refusals."""

import importlib.util
import json
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, processors

from nanovllm import LLM
from nanovllm.engine.chat.prompts import prompt_end
from nanovllm.server.openai import tokenization
from nanovllm.server.openai.tokenization import MAX_TEXT_BYTES, MAX_TOKENS
from tests.support.chats import MESSAGES, TEMPLATE, prompt_of
from tests.support.chats import ask as chat
from tests.support.checkpoints import END_OF_TEXT, write_tiny_model
from tests.support.serving import MODEL, TIMEOUT_S, RunningServer, loader, read_error

LONGEST_ANSWER_BYTES = 6000
END = 266
TEXTS = [
    "the",
    "in the end, all was well",
    " leading and trailing ",
    "naïve 漢字 🎈\n\t\x00",
    f"a{END_OF_TEXT}b",
    "a" * 500,
]


def ask(server: RunningServer, path: str, **body: Any) -> dict[str, Any]:
    """The answer to a request that must succeed."""
    response = server.http.post(path, json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def embed(server: RunningServer, text: str, **body: Any) -> dict[str, Any]:
    return ask(server, "/v1/embeddings", input=text, **body)


def refused(server: RunningServer, path: str, body: Any, status: int = 400) -> dict[str, Any]:
    """The error object of a request that must be refused, in short."""
    response = server.http.post(
        path, content=json.dumps(body), headers={"content-type": "application/json"}
    )
    assert len(response.content) < LONGEST_ANSWER_BYTES
    return read_error(response, status)


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_becomes_the_tokens_of_the_models_tokenizer(
    server: RunningServer, llm: LLM, text: str
) -> None:
    expected = llm.tokenizer.encode(text)
    assert ask(server, "/tokenize", prompt=text) == {
        "count": len(expected),
        "max_model_len": 128,
        "tokens": expected,
        "token_strs": None,
    }


@pytest.mark.parametrize("text", TEXTS[:-1])
def test_the_tokens_are_those_that_a_completion_computes(server: RunningServer, text: str) -> None:
    found = ask(server, "/tokenize", prompt=text)
    settings = {"max_tokens": 6, "temperature": 0, "ignore_eos": True}
    from_text, from_ids = (
        server.complete(text, **settings),
        server.complete(found["tokens"], **settings),
    )
    assert from_text["choices"] == from_ids["choices"]
    assert from_text["usage"]["prompt_tokens"] == found["count"]
    assert END not in found["tokens"], "text was read as a special token"


def test_token_strs_are_spelt_as_in_the_vocabulary(server: RunningServer, tiny_model: Path) -> None:
    vocab = json.loads((tiny_model / "tokenizer.json").read_text(encoding="utf-8"))["model"][
        "vocab"
    ]
    found = ask(server, "/tokenize", prompt="in the é", return_token_strs=True)
    assert [vocab[name] for name in found["token_strs"]] == found["tokens"]
    assert found["token_strs"] == ["in", "Ġthe", "Ġ", "Ã", "©"]
    back = ask(server, "/detokenize", tokens=found["tokens"], return_token_strs=True)
    assert back == {"prompt": "in the é", "token_strs": found["token_strs"]}


def test_a_long_text_is_not_made_of_few_tokens(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenization, "MAX_DETOKENIZED_CHARACTERS", 9)
    assert ask(server, "/detokenize", tokens=[1] * 9)["prompt"]
    error = refused(server, "/detokenize", {"tokens": [1] * 10})
    assert error["param"] == "tokens"
    assert "more than 9 characters" in error["message"]


@pytest.mark.parametrize("text", TEXTS)
def test_detokenize_is_the_way_back(server: RunningServer, text: str) -> None:
    assert ask(server, "/detokenize", tokens=ask(server, "/tokenize", prompt=text)["tokens"]) == {
        "prompt": text
    }


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
@settings(max_examples=50)
def test_any_text_comes_back(server: RunningServer, text: str) -> None:
    assert ask(server, "/detokenize", tokens=ask(server, "/tokenize", prompt=text)["tokens"]) == {
        "prompt": text
    }


def test_special_tokens_and_parts_of_characters_are_shown(server: RunningServer, llm: LLM) -> None:
    first_byte = llm.tokenizer.encode("漢")[0]
    assert ask(server, "/detokenize", tokens=[END, first_byte, END]) == {
        "prompt": f"{END_OF_TEXT}\ufffd{END_OF_TEXT}"
    }


def test_nothing_is_nothing(server: RunningServer) -> None:
    assert ask(server, "/tokenize", prompt="", return_token_strs=True) == {
        "count": 0,
        "max_model_len": 128,
        "tokens": [],
        "token_strs": [],
    }
    assert ask(server, "/detokenize", tokens=[]) == {"prompt": ""}


@pytest.mark.parametrize("name", [None, "alias", MODEL])
def test_a_served_name_may_be_given(server: RunningServer, name: str | None) -> None:
    assert ask(server, "/tokenize", prompt="the", model=name)["count"] == 1
    assert ask(server, "/detokenize", tokens=[END], model=name)["prompt"] == END_OF_TEXT


def test_what_the_tokenizer_puts_around_a_text_may_be_left_out(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path)
    library = Tokenizer.from_file(str(folder / "tokenizer.json"))
    library.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, END)]
    )
    library.save(str(folder / "tokenizer.json"))
    with RunningServer(loader(folder), chat_template=TEMPLATE) as running:
        assert ask(running, "/tokenize", prompt="the")["tokens"][0] == END
        assert (
            END not in ask(running, "/tokenize", prompt="the", add_special_tokens=False)["tokens"]
        )
        assert (
            running.complete("the", max_tokens=1)["usage"]["prompt_tokens"]
            == ask(running, "/tokenize", prompt="the")["count"]
            == 2
        )
        assert embed(running, "the")["usage"]["prompt_tokens"] == 2
        assert embed(running, "the", add_special_tokens=False)["usage"]["prompt_tokens"] == 1
        if importlib.util.find_spec("jinja2") is None:
            return
        plain = ask(running, "/tokenize", messages=MESSAGES)["tokens"]
        assert plain[0] != END
        for added in (False, True):
            found = ask(running, "/tokenize", messages=MESSAGES, add_special_tokens=added)["tokens"]
            assert found == [END] * added + plain
            settings = {"add_special_tokens": added, "max_tokens": 1, "return_token_ids": True}
            assert chat(running, **settings)["prompt_token_ids"] == found


@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize("add_special_tokens", [False, True])
@pytest.mark.parametrize("continue_final_message", [False, True])
def test_vllm_tokenize_chat(
    server: RunningServer,
    llm: LLM,
    *,
    add_generation_prompt: bool,
    add_special_tokens: bool,
    continue_final_message: bool,
) -> None:
    if add_generation_prompt and continue_final_message:
        return  # refused, see BAD_BODIES
    messages = [
        {"role": "user", "content": "Hi there!"},
        {"role": "assistant", "content": "Nice to meet you!"},
        {"role": "user", "content": "Can I ask a question? vllm1"},
        *([{"role": "assistant", "content": "Sure,"}] if continue_final_message else []),
    ]
    ends = {
        "add_generation_prompt": add_generation_prompt,
        "continue_final_message": continue_final_message,
    }
    tokens = prompt_of(llm, messages, end=prompt_end(**ends))
    body = {"messages": messages, "add_special_tokens": add_special_tokens, **ends}
    assert ask(server, "/tokenize", model=MODEL, **body) == {
        "count": len(tokens),
        "max_model_len": 128,
        "tokens": tokens,
        "token_strs": None,
    }


def test_messages_become_the_tokens_that_a_chat_computes(server: RunningServer) -> None:
    found = ask(server, "/tokenize", messages=MESSAGES, return_token_strs=True)
    answer = chat(server, max_tokens=1, return_token_ids=True)
    assert answer["prompt_token_ids"] == found["tokens"]
    assert found["token_strs"][-1] == ":"
    assert len(found["token_strs"]) == found["count"]
    long = [{"role": "user", "content": "x" * 1000}]
    assert ask(server, "/tokenize", messages=long)["count"] > 1000


def test_the_longest_text_that_is_allowed_is_read(server: RunningServer) -> None:
    """One word of it, and many: neither is more than the server can take."""
    for text in ("é" * (MAX_TEXT_BYTES // 2), "the " * (MAX_TEXT_BYTES // 4)):
        found = ask(server, "/tokenize", prompt=text, return_token_strs=True)
        assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
        assert ask(server, "/detokenize", tokens=found["tokens"]) == {"prompt": text}
        error = refused(server, "/tokenize", {"prompt": text + "a"})
        assert error["param"] == "prompt"
        assert str(MAX_TEXT_BYTES) in error["message"]
        assert str(MAX_TEXT_BYTES + 1) in error["message"]


@pytest.mark.parametrize(
    ("path", "method", "body"),
    [("/tokenize", "encode", {"prompt": "the"}), ("/detokenize", "decode", {"tokens": [1]})],
)
def test_others_are_answered_meanwhile(
    server: RunningServer,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    method: str,
    body: dict[str, Any],
) -> None:
    """The event loop answers another request while the tokenizer is busy."""
    begun, may_go_on = threading.Event(), threading.Event()
    tokenizer = server.engine.engine.tokenizer
    whole = getattr(tokenizer, method)

    def slow(*arguments: Any, **options: Any) -> Any:
        begun.set()
        assert may_go_on.wait(TIMEOUT_S / 2)
        return whole(*arguments, **options)

    expected = ask(server, path, **body)
    monkeypatch.setattr(tokenizer, method, slow)
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.append(ask(server, path, **body)))
    thread.start()
    assert begun.wait(TIMEOUT_S / 2)
    assert server.http.get("/health").status_code == 200
    may_go_on.set()
    thread.join(TIMEOUT_S)
    assert answers == [expected]


TWO_ENDS = {"add_generation_prompt": True, "continue_final_message": True}
BAD_BODIES: dict[str, tuple[str, Any, str | None, str]] = {
    "no text": ("/tokenize", {}, "prompt", "required"),
    "text null": ("/tokenize", {"prompt": None}, "prompt", "required"),
    "several texts": ("/tokenize", {"prompt": ["a", "b"]}, "prompt", "a list of 2"),
    "a number": ("/tokenize", {"prompt": 5}, "prompt", "5"),
    "half a character": ("/tokenize", {"prompt": "ab\ud800"}, None, "surrogate"),
    "a text and messages": (
        "/tokenize", {"prompt": "a", "messages": MESSAGES}, "messages", "leave one of them out",
    ),
    "no messages": ("/tokenize", {"messages": []}, "messages", "at least 1"),
    "two ends": (
        "/tokenize", {"messages": MESSAGES, **TWO_ENDS}, "continue_final_message", "both true",
    ),
    "an end of a text": (
        "/tokenize", {"prompt": "a", "continue_final_message": True}, "continue_final_message",
        "about messages",
    ),
    "a template": (
        "/tokenize", {"messages": MESSAGES, "chat_template": "x"}, "chat_template", "not supported",
    ),
    "an unknown field": (
        "/tokenize", {"prompt": "a", "add_special": True}, "add_special", "not supported",
    ),
    "add_special_tokens a text": (
        "/tokenize", {"prompt": "a", "add_special_tokens": "yes"}, "add_special_tokens", '"yes"',
    ),
    "return_token_strs a text": (
        "/tokenize", {"prompt": "a", "return_token_strs": "yes"}, "return_token_strs", "yes",
    ),
    "model a number": ("/tokenize", {"prompt": "a", "model": 5}, "model", "5"),
    "a list": ("/tokenize", ["a"], None, "JSON object"),
    "many unknown fields": (
        "/tokenize", {f"k{i}": 0 for i in range(60_000)}, None, "60000 fields",
    ),
    "no ids": ("/detokenize", {}, "tokens", "required"),
    "ids null": ("/detokenize", {"tokens": None}, "tokens", "null"),
    "one id": ("/detokenize", {"tokens": 5}, "tokens", "5"),
    "a text for ids": ("/detokenize", {"tokens": "12"}, "tokens", '"12"'),
    "a text among ids": ("/detokenize", {"tokens": [1, "2"]}, "tokens", '"2"'),
    "a truth value among ids": ("/detokenize", {"tokens": [True]}, "tokens", "true"),
    "a fraction among ids": ("/detokenize", {"tokens": [1.5]}, "tokens", "1.5"),
    "an id above the vocabulary": (
        "/detokenize", {"tokens": [1, 267]}, "tokens", "267 but the vocabulary goes from 0 to 266",
    ),
    "an id below 0": ("/detokenize", {"tokens": [-1]}, "tokens", "-1"),
    "an id of thousands of digits": ("/detokenize", {"tokens": [10**4000]}, "tokens", "10000"),
    "ids in a list": ("/detokenize", {"tokens": [[1]]}, "tokens", "a list of 1"),
    "too many ids": ("/detokenize", {"tokens": [1] * (MAX_TOKENS + 1)}, "tokens", str(MAX_TOKENS)),
    "many texts for ids": ("/detokenize", {"tokens": ["x"] * 400_000}, "tokens", '"x"'),
    "another unknown field": (
        "/detokenize", {"tokens": [1], "skip_special_tokens": True}, "skip_special_tokens",
        "not supported",
    ),
    "many other unknown fields": (
        "/detokenize", {f"k{i}": 0 for i in range(60_000)}, None, "60000 fields",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_BODIES)
def test_a_bad_body_is_refused_by_what_is_wrong_with_it(server: RunningServer, name: str) -> None:
    path, body, param, part = BAD_BODIES[name]
    error = refused(server, path, body)
    assert (error["type"], error["param"]) == ("BadRequestError", param)
    assert part in error["message"]


BAD_MESSAGES = {
    "refused by the template": ("refuse me", "refuses the messages: no"),
    "too long": ("a" * MAX_TEXT_BYTES, str(MAX_TEXT_BYTES)),
}


@pytest.mark.parametrize("name", BAD_MESSAGES)
def test_bad_messages_are_refused(server: RunningServer, name: str) -> None:
    content, part = BAD_MESSAGES[name]
    error = refused(server, "/tokenize", {"messages": [{"role": "user", "content": content}]})
    assert error["param"] == "messages"
    assert part in error["message"]


@pytest.mark.parametrize(
    ("path", "body"), [("/tokenize", {"prompt": "the"}), ("/detokenize", {"tokens": [1]})]
)
def test_an_unknown_model_is_not_found(
    server: RunningServer, path: str, body: dict[str, Any]
) -> None:
    for name in ("gpt-5", "", "x" * 100_000):
        error = refused(server, path, {**body, "model": name}, 404)
        assert error["type"] == "NotFoundError"
        assert MODEL in error["message"]


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
def test_they_are_asked_by_post(server: RunningServer, path: str) -> None:
    for method in ("GET", "PUT", "DELETE"):
        response = server.http.request(method, path)
        error = read_error(response, 405)
        assert (error["type"], error["message"]) == (
            "MethodNotAllowedError",
            f"{method} {path}: Method Not Allowed, use POST",
        )
        assert response.headers["allow"] == "POST"
