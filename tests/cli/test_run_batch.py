"""`nanovllm run-batch`: the server's responses, errors of single lines, and resuming."""

import io
import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from nanovllm.batch.input import BatchRequest
from nanovllm.batch.output import Answer
from nanovllm.batch.runner import BatchRunner
from nanovllm.engine.engine import Engine
from nanovllm.errors import EngineFaultError
from tests.support.batch_files import (
    lasting,
    lasting_body,
    read_answers,
    request_line,
    run_batch,
    write_requests,
)
from tests.support.serving import RunningServer, loader

NAMES = ("--served-model-name", "tiny", "--served-model-name", "alias")

GOOD_BODIES: dict[str, Any] = {
    "greedy": {"prompt": "the", "temperature": 0, "max_tokens": 20},
    "seeded": {
        "prompt": "in the",
        "seed": 7,
        "max_tokens": 30,
        "ignore_eos": True,
        "model": "alias",
    },
    "filtered": {
        "prompt": "on",
        "seed": 8,
        "top_k": 9,
        "top_p": 0.9,
        "min_p": 0.01,
        "repetition_penalty": 1.2,
        "max_tokens": 12,
    },
    "several answers": {"prompt": "the", "seed": 9, "n": 3, "max_tokens": 12},
    "several prompts": {"prompt": ["the", "in", "on a"], "seed": 10, "n": 2, "max_tokens": 8},
    "token ids": {"prompt": [[5, 6, 7], [8]], "temperature": 0, "max_tokens": 6, "user": "me"},
    "logprobs": {
        "prompt": "ball",
        "temperature": 0,
        "logprobs": 3,
        "prompt_logprobs": 2,
        "max_tokens": 5,
    },
    "scoring": {"prompt": "the well", "echo": True, "logprobs": 1, "max_tokens": 0},
    "stop": {
        "prompt": "the",
        "temperature": 0,
        "stop": ["e", "t", "a"],
        "max_tokens": 40,
        "ignore_eos": True,
    },
    "bias": {
        "prompt": "the",
        "temperature": 0,
        "logit_bias": {"20": 100},
        "presence_penalty": 1.5,
        "max_tokens": 6,
    },
    "defaults left out": {"prompt": "the", "temperature": 0, "max_tokens": None, "stream": False},
}
BAD_BODIES: dict[str, Any] = {
    "no prompt": {},
    "unknown field": {"prompt": "the", "tempreature": 1},
    "a field called body": {"prompt": "the", "body": 1},
    "two faults": {"prompt": "", "n": 0},
    "not allowed together": {"prompt": "the", "max_tokens": 0},
    "too long": {"prompt": "the", "max_tokens": 4000},
    "too many answers": {"prompt": ["the"] * 1025},
    "another model": {"prompt": "the", "model": "gpt-7"},
    "a list": [1, 2],
    "a text": "the",
    "null": None,
}


@pytest.fixture(scope="module")
def server(tiny_model: Path, backend: str) -> Iterator[RunningServer]:
    """A server of the same model."""
    with RunningServer(loader(tiny_model)) as running:
        yield running


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Engine:
    """An engine for tests that leave it idle."""
    return loader(tiny_model, max_num_seqs=4)()


def test_answers_are_those_of_the_server(
    server: RunningServer, tiny_model: Path, tmp_path: Path
) -> None:
    bodies = {**GOOD_BODIES, **BAD_BODIES}
    requests = write_requests(
        tmp_path / "in.jsonl", [request_line(name, body) for name, body in bodies.items()]
    )
    assert run_batch(tiny_model, requests, tmp_path / "out.jsonl", *NAMES) == 0
    answers = read_answers(tmp_path / "out.jsonl")
    assert answers.keys() == bodies.keys()
    for name, body in bodies.items():
        served = server.post(body)
        assert lasting(answers[name]) == (served.status_code, lasting_body(served.json())), name
        assert (served.status_code == 200) is (name in GOOD_BODIES)


def test_half_a_character_costs_one_line_only(tiny_model: Path, tmp_path: Path) -> None:
    """Python reads what the server's parser of JSON refuses with the whole body."""
    lines = [request_line("half", {"prompt": "a\ud800"}), request_line("whole")]
    requests = write_requests(tmp_path / "in.jsonl", lines)
    assert run_batch(tiny_model, requests, tmp_path / "out.jsonl", *NAMES) == 0
    answers = read_answers(tmp_path / "out.jsonl")
    assert answers["half"]["response"]["status_code"] == 400
    assert "surrogate" in answers["half"]["response"]["body"]["error"]["message"]
    assert answers["whole"]["response"]["status_code"] == 200


def test_unsupported_lines_are_errors_and_the_others_run(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        request_line("good 1"),
        request_line("images", url="/v1/images"),
        request_line("a list for a url", url=["/v1/completions"]),
        request_line("get", method="GET"),
        request_line("no method", leave_out="method"),
        request_line("good 2"),
        request_line("field", priority=1),
        request_line("streamed", {"prompt": "the", "stream": True}),
        request_line("no body", leave_out="body"),
    ]
    requests = write_requests(tmp_path / "in.jsonl", lines)
    assert run_batch(tiny_model, requests, tmp_path / "out.jsonl") == 0
    answers = read_answers(tmp_path / "out.jsonl")
    statuses = {
        name: answer["response"] and answer["response"]["status_code"]
        for name, answer in answers.items()
    }
    assert statuses == {
        "good 1": 200, "good 2": 200, "streamed": 400, "no body": 400,
        "images": None, "a list for a url": None, "get": None, "no method": None, "field": None,
    }  # fmt: skip
    urls = "/v1/completions, /v1/chat/completions, /v1/responses, /v1/embeddings"
    assert answers["images"]["error"] == {
        "code": "unsupported_url",
        "message": f"url is \"/v1/images\", which a batch does not answer; it answers {urls}",
    }  # fmt: skip
    assert answers["get"]["error"] == {
        "code": "unsupported_method",
        "message": 'method is "GET" but must be "POST"',
    }
    assert answers["no method"]["error"]["message"] == 'method is null but must be "POST"'
    assert "'priority' is not supported" in answers["field"]["error"]["message"]
    assert answers["streamed"]["response"]["body"]["error"]["param"] == "stream"
    assert "9 requests answered, 7 of them an error" in capsys.readouterr().err


def test_an_empty_input_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    requests = write_requests(tmp_path / "in.jsonl", [])
    assert run_batch(tmp_path / "no model", requests, tmp_path / "out.jsonl") == 0
    assert "in.jsonl has no requests" in capsys.readouterr().err


def test_answered_requests_do_not_run_again(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.jsonl"
    requests = write_requests(tmp_path / "in.jsonl", [request_line(str(i)) for i in range(3)])
    assert run_batch(tiny_model, requests, output) == 0
    before = output.read_bytes()
    assert run_batch(tiny_model, requests, output, "--model", "./not/there") == 0
    assert "has 3 of 3 answers; nothing is left to do" in capsys.readouterr().err
    assert output.read_bytes() == before
    write_requests(requests, [request_line(str(i)) for i in range(5)])
    assert run_batch(tiny_model, requests, output) == 0
    assert output.read_bytes().startswith(before)
    assert read_answers(output).keys() == set("01234")
    assert "has 3 of 5 answers; resuming" in capsys.readouterr().err
    assert run_batch(tiny_model, requests, output, "--overwrite") == 0
    assert not output.read_bytes().startswith(before)
    assert read_answers(output).keys() == set("01234")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_draws_without_a_seed_are_fresh_and_with_the_flag_follow_from_the_id(
    tiny_model: Path, tmp_path: Path
) -> None:
    requests = write_requests(
        tmp_path / "in.jsonl",
        [
            request_line(str(i), {"prompt": ["the", "the"], "max_tokens": 20, "ignore_eos": True})
            for i in range(6)
        ],
    )

    def texts(name: str, *flags: str) -> dict[str, list[str]]:
        assert run_batch(tiny_model, requests, tmp_path / name, *flags) == 0
        answers = read_answers(tmp_path / name)
        return {
            custom_id: [choice["text"] for choice in answer["response"]["body"]["choices"]]
            for custom_id, answer in answers.items()
        }

    assert texts("fresh 1") != texts("fresh 2")
    seeded = texts("seeded", "--seed", "5")
    assert seeded != texts("another", "--seed", "6")
    assert len({text for pair in seeded.values() for text in pair}) == 12, (
        "each prompt has draws of its own"
    )
    lines = (tmp_path / "seeded").read_bytes().splitlines(keepends=True)
    (tmp_path / "resumed").write_bytes(b"".join(lines[:2]))
    assert texts("resumed", "--seed", "5") == seeded, (
        "an answer does not depend on what was answered in the same run"
    )


@pytest.mark.parametrize("content", [b"", b"\n  \n\r\n"])
def test_a_file_without_requests_has_no_answers(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(content)
    assert run_batch(Path("./not/there"), tmp_path / "in.jsonl", tmp_path / "out.jsonl") == 0
    assert (tmp_path / "out.jsonl").read_bytes() == b""


def test_the_bar_is_for_terminals_only(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    requests = write_requests(tmp_path / "in.jsonl", [request_line(str(i)) for i in range(3)])
    assert run_batch(tiny_model, requests, tmp_path / "plain") == 0
    assert "Requests:" not in capsys.readouterr().err
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    assert run_batch(tiny_model, requests, tmp_path / "shown") == 0
    assert "Requests: 100%" in terminal.getvalue()
    assert "tok/s" in terminal.getvalue()


def endless(taken: list[str], body: dict[str, Any]) -> Iterator[BatchRequest]:
    """Requests for as long as somebody asks; `taken` gets the id of each."""
    while True:
        taken.append(str(len(taken)))
        yield BatchRequest(taken[-1], "POST", "/v1/completions", body)


def test_requests_are_taken_as_there_is_room(engine: Engine) -> None:
    taken: list[str] = []
    answered: list[Answer] = []
    most_running = 0
    body = {"prompt": "the", "n": 2, "seed": 1, "ignore_eos": True, "max_tokens": 4}
    with closing(BatchRunner(engine, ["tiny"]).run(endless(taken, body))) as steps:
        for answers in steps:
            answered += answers
            running = len(taken) - len(answered)
            assert running <= 4, "of two answers each, for an engine that works on 4 at once"
            most_running = max(most_running, engine.stats().num_requests_running)
            if len(answered) > 40:
                break
    assert most_running == 4
    assert not engine.has_work, "what was unfinished is given up"
    engine.check_integrity()


def test_lines_that_are_refused_do_not_hold_up_the_others(engine: Engine) -> None:
    """However many there are: after a few the engine has its next step."""
    taken: list[str] = []
    with closing(BatchRunner(engine, ["tiny"]).run(endless(taken, {"prompt": ""}))) as steps:
        assert len(next(steps)) == len(taken) == 8


def test_a_step_that_fails_ends_its_requests_and_the_others_go_on(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    works = engine.runner.run
    calls = 0

    def fails_once(*arrays: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("boom")
        return works(*arrays)

    monkeypatch.setattr(engine.runner, "run", fails_once)
    requests = iter(
        [
            BatchRequest(
                str(i),
                "POST",
                "/v1/completions",
                {"prompt": "the", "max_tokens": 6, "ignore_eos": True},
            )
            for i in range(10)
        ]
    )
    answers = [answer for step in BatchRunner(engine, ["tiny"]).run(requests) for answer in step]
    assert sorted(int(answer.custom_id) for answer in answers) == list(range(10))
    assert {answer.custom_id: answer.status for answer in answers} == {
        str(i): 500 if i < 4 else 200 for i in range(10)
    }
    failed = next(json.loads(answer.line) for answer in answers if answer.status == 500)
    expected = {
        "message": "a step of the engine failed; the log has the reason",
        "type": "InternalServerError",
        "param": None,
        "code": 500,
    }
    assert failed["response"]["body"] == {"error": expected}
    engine.check_integrity()


def test_an_engine_that_fails_again_and_again_ends_it(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arrays: Any) -> Any:
        raise RuntimeError("boom")

    monkeypatch.setattr(engine.runner, "run", fails)
    steps = BatchRunner(engine, ["tiny"]).run(endless([], {"prompt": "the"}))
    assert len(next(steps)) + len(next(steps)) == 8
    with pytest.raises(
        EngineFaultError, match="3 steps failed one after the other, the last with: boom"
    ):
        next(steps)
    assert not engine.has_work


def test_an_answer_that_cannot_be_put_together_is_a_500(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*given: Any) -> Any:
        raise RuntimeError("boom")

    monkeypatch.setattr("nanovllm.engine.prompt_request.PromptRequest.add_update", breaks)
    requests = iter(
        [
            BatchRequest(
                "a", "POST", "/v1/completions", {"prompt": ["the", "in"], "n": 2, "max_tokens": 30}
            )
        ]
    )
    [answer] = [answer for step in BatchRunner(engine, ["tiny"]).run(requests) for answer in step]
    assert answer.status == 500
    assert not engine.has_work
    engine.check_integrity()
