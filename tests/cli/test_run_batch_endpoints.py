"""`nanovllm run-batch`: chats, responses and embeddings beside completions."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nanovllm.engine.chat.template import ChatTemplate
from tests.support.batch_files import (
    lasting,
    lasting_body,
    read_answers,
    request_line,
    run_batch,
    write_requests,
)
from tests.support.serving import RunningServer, loader

TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}{{ eos_token }}\n"
    "{% endfor %}assistant:"
)
NAMES = ("--served-model-name", "tiny", "--served-model-name", "alias")
MESSAGES = [{"role": "system", "content": "in"}, {"role": "user", "content": "the end"}]
CHAT, EMBEDDINGS, COMPLETIONS = "/v1/chat/completions", "/v1/embeddings", "/v1/completions"
RESPONSES = "/v1/responses"

GOOD: dict[str, tuple[str, Any]] = {
    "greedy chat": (CHAT, {"messages": MESSAGES, "temperature": 0, "max_tokens": 12}),
    "seeded chats": (
        CHAT,
        {
            "messages": MESSAGES,
            "seed": 5,
            "n": 3,
            "max_completion_tokens": 20,
            "logprobs": True,
            "top_logprobs": 2,
        },
    ),
    "chat that fills the context": (
        CHAT,
        {"messages": MESSAGES[1:], "seed": 6, "ignore_eos": True, "model": "alias"},
    ),
    "response": (
        RESPONSES,
        {"input": "the end", "temperature": 0, "max_output_tokens": 12, "store": False},
    ),
    "embedding": (EMBEDDINGS, {"input": "the well"}),
    "embeddings": (
        EMBEDDINGS,
        {"input": ["the", "in the end", "a"], "pooling": "mean", "encoding_format": "base64"},
    ),
    "embedding of ids": (EMBEDDINGS, {"input": [[5, 6, 7], [8]]}),
    "completion": (COMPLETIONS, {"prompt": "the", "seed": 7, "max_tokens": 30}),
}
BAD: dict[str, tuple[str, Any]] = {
    "streamed chat": (CHAT, {"messages": MESSAGES, "stream": True}),
    "streamed response": (RESPONSES, {"input": "the", "stream": True}),
    "no messages": (CHAT, {"messages": []}),
    "a prompt for a chat": (CHAT, {"prompt": "the"}),
    "tools": (CHAT, {"messages": MESSAGES, "tools": [{"type": "function"}]}),
    "a long message": (CHAT, {"messages": [{"role": "user", "content": "x" * 500}]}),
    "chat of another model": (CHAT, {"messages": MESSAGES, "model": "gpt-7"}),
    "no input": (EMBEDDINGS, {"input": []}),
    "dimensions": (EMBEDDINGS, {"input": "the", "dimensions": 4}),
    "an id that is none": (EMBEDDINGS, {"input": [[1], [999]]}),
    "too many inputs": (EMBEDDINGS, {"input": ["the"] * 1025}),
    "no body": (EMBEDDINGS, None),
}


@pytest.fixture(scope="module")
def server(tiny_model: Path) -> Iterator[RunningServer]:
    """A server of the same model and template."""
    with RunningServer(loader(tiny_model), chat_template=ChatTemplate(TEMPLATE, "test")) as running:
        yield running


@pytest.fixture
def template(tmp_path: Path) -> Path:
    file = tmp_path / "template.jinja"
    file.write_text(TEMPLATE, encoding="utf-8")
    return file


def lines(requests: dict[str, tuple[str, Any]]) -> list[dict[str, Any]]:
    return [request_line(name, body, url=url) for name, (url, body) in requests.items()]


def test_answers_are_those_of_the_server(
    server: RunningServer, tiny_model: Path, template: Path, tmp_path: Path
) -> None:
    asked = {**GOOD, **BAD}
    requests = write_requests(tmp_path / "in.jsonl", lines(asked))
    assert (
        run_batch(
            tiny_model, requests, tmp_path / "out.jsonl", "--chat-template", str(template), *NAMES
        )
        == 0
    )
    answers = read_answers(tmp_path / "out.jsonl")
    assert answers.keys() == asked.keys()
    for name, (url, body) in asked.items():
        if name in ("streamed chat", "streamed response"):
            assert answers[name]["response"]["body"]["error"]["param"] == "stream"
            continue
        served = server.http.post(url, json=body)
        assert lasting(answers[name]) == (served.status_code, lasting_body(served.json())), name
        assert (served.status_code == 200) is (name in GOOD)
    assert answers["greedy chat"]["response"]["body"]["object"] == "chat.completion"
    assert len(answers["embeddings"]["response"]["body"]["data"]) == 3


def test_wherever_it_ended_it_goes_on(tiny_model: Path, template: Path, tmp_path: Path) -> None:
    requests, output = write_requests(tmp_path / "in.jsonl", lines(GOOD)), tmp_path / "out.jsonl"
    flags = ("--chat-template", str(template), *NAMES)
    assert run_batch(tiny_model, requests, output, *flags) == 0
    whole = {name: lasting(answer) for name, answer in read_answers(output).items()}
    written = output.read_bytes().splitlines(keepends=True)
    for count in range(0, len(written), 3):
        before = b"".join(written[:count])
        output.write_bytes(before + written[count][:40])
        assert run_batch(tiny_model, requests, output, *flags) == 0
        assert output.read_bytes().startswith(before)
        assert {name: lasting(answer) for name, answer in read_answers(output).items()} == whole


def test_draws_of_chats_follow_from_the_flag_and_the_id(
    tiny_model: Path, template: Path, tmp_path: Path
) -> None:
    body = {"messages": MESSAGES, "max_tokens": 20, "ignore_eos": True}
    requests = write_requests(
        tmp_path / "in.jsonl", [request_line(str(i), body, url=CHAT) for i in range(4)]
    )

    def texts(name: str) -> dict[str, str]:
        assert (
            run_batch(
                tiny_model,
                requests,
                tmp_path / name,
                "--chat-template",
                str(template),
                "--seed",
                "5",
            )
            == 0
        )
        return {
            i: answer["response"]["body"]["choices"][0]["message"]["content"]
            for i, answer in read_answers(tmp_path / name).items()
        }

    first = texts("first")
    assert len(set(first.values())) == 4
    (tmp_path / "resumed").write_bytes(
        b"".join((tmp_path / "first").read_bytes().splitlines(keepends=True)[:1])
    )
    assert texts("resumed") == first


def test_without_a_template_chats_are_errors_and_the_others_run(
    tiny_model: Path, tmp_path: Path
) -> None:
    requests = write_requests(tmp_path / "in.jsonl", lines(GOOD))
    assert run_batch(tiny_model, requests, tmp_path / "out.jsonl", *NAMES) == 0
    for name, answer in read_answers(tmp_path / "out.jsonl").items():
        assert answer["response"]["status_code"] == (400 if GOOD[name][0] == CHAT else 200)
        if GOOD[name][0] == CHAT:
            assert "has no chat template" in answer["response"]["body"]["error"]["message"]
            assert "--chat-template plain" in answer["response"]["body"]["error"]["message"]


def test_an_invalid_template_is_an_error_before_any_request(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "template.jinja"
    file.write_text("{% if %}")
    requests = write_requests(tmp_path / "in.jsonl", lines(GOOD))
    assert (
        run_batch(tiny_model, requests, tmp_path / "out.jsonl", "--chat-template", str(file)) == 1
    )
    assert "template.jinja is not valid" in capsys.readouterr().err
    assert (tmp_path / "out.jsonl").read_bytes() == b""
