"""`nanovllm run-batch` with grammars that crash a worker: each gets an error once."""

from pathlib import Path

import pytest

from tests.support.batch_files import read_answers, request_line, run_batch, write_requests
from tests.support.grammars import DEEP_RULES


def test_a_line_that_ends_its_worker_is_answered(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bodies = {
        "deep": {"prompt": "the", "structured_outputs": DEEP_RULES},
        "panic": {"prompt": "the", "structured_outputs": {"json": {"multipleOf": 0}}},
        **{
            f"good {i}": {"prompt": "the", "structured_outputs": {"regex": f"[ab]{{{i}}}"}}
            for i in range(1, 40)
        },
        "plain": {"prompt": "the"},
    }
    lines = [request_line(custom_id, body) for custom_id, body in bodies.items()]
    requests = write_requests(tmp_path / "requests.jsonl", lines)
    answers = tmp_path / "answers.jsonl"
    for _ in range(2):
        assert run_batch(tiny_model, requests, answers) == 0
    responses = {name: answer["response"] for name, answer in read_answers(answers).items()}
    assert responses.keys() == bodies.keys()
    refused = {name for name, response in responses.items() if response["status_code"] == 400}
    assert refused == {"deep", "panic"}
    assert "nested too deeply" in responses["deep"]["body"]["error"]["message"]
    for i in range(1, 16):
        assert len(responses[f"good {i}"]["body"]["choices"][0]["text"]) == i
    assert "nothing is left to do" in capsys.readouterr().err
