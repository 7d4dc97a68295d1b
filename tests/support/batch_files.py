"""Input and output files of `nanovllm run-batch`."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nanovllm.cli.main import main
from tests.support.serving import ENGINE_SETTINGS

BODY = {"prompt": "the"}


def request_line(
    custom_id: str, body: Any = BODY, *, leave_out: str = "", **changes: Any
) -> dict[str, Any]:
    """Return an input line with these changes, or without a field."""
    line = {
        "custom_id": custom_id,
        "method": "POST",
        "url": "/v1/completions",
        "body": body,
        **changes,
    }
    return {name: value for name, value in line.items() if name != leave_out}


def write_requests(path: Path, lines: Iterable[dict[str, Any]]) -> Path:
    """Write an input file."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def read_answers(path: Path) -> dict[str, dict[str, Any]]:
    """Read an output file: valid lines by custom_id, each once."""
    content = path.read_bytes()
    assert not content or content.endswith(b"\n")
    answers: dict[str, dict[str, Any]] = {}
    for line in content.split(b"\n")[:-1]:
        answer = json.loads(line)
        assert list(answer) == ["id", "custom_id", "response", "error"]
        assert answer["id"].startswith("batch_req_")
        assert (answer["response"] is None) is not (answer["error"] is None)
        if answer["response"] is not None:
            assert list(answer["response"]) == ["status_code", "request_id", "body"]
        assert answer["custom_id"] not in answers, "it was done twice"
        answers[answer["custom_id"]] = answer
    assert len({answer["id"] for answer in answers.values()}) == len(answers)
    return answers


def lasting(answer: dict[str, Any]) -> tuple[int, Any]:
    """Return a response without ids, times and cache hits, which differ between runs."""
    return answer["response"]["status_code"], lasting_body(answer["response"]["body"])


def lasting_body(body: dict[str, Any]) -> dict[str, Any]:
    """Return a body without what differs between runs."""
    changing = ("id", "created", "created_at", "prompt_tokens_details", "input_tokens_details")
    kept = {name: value for name, value in body.items() if name not in changing}
    if "usage" in kept:
        kept["usage"] = lasting_body(kept["usage"])
    if "output" in kept:
        kept["output"] = [lasting_body(item) for item in kept["output"]]
    return kept


def arguments(model: Path, requests: Path, answers: Path, *more: str) -> list[str]:
    """Return the command line, with ENGINE_SETTINGS."""
    flags: list[str] = []
    for name, value in ENGINE_SETTINGS.items():
        flags += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return [
        "run-batch",
        "-i",
        str(requests),
        "-o",
        str(answers),
        "--model",
        str(model),
        *flags,
        *more,
    ]


def run_batch(model: Path, requests: Path, answers: Path, *more: str) -> int:
    """Run the command in this process."""
    return main(arguments(model, requests, answers, *more))
