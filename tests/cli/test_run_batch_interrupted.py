"""`nanovllm run-batch` as an interrupted process: the next run resumes it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.batch_files import (
    arguments,
    lasting,
    read_answers,
    request_line,
    run_batch,
    write_requests,
)

TIMEOUT_S = 60.0
START_TIMEOUT_S = 180.0  # where the kernels were never compiled before
REQUESTS = 60

if sys.platform == "win32":
    pytest.skip("signals and limits are those of POSIX", allow_module_level=True)

LIMITED = """
import resource, sys
from nanovllm.cli.main import main
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def requests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Greedy and seeded requests that take some seconds, with outputs of different lengths."""
    bodies = [
        {
            "prompt": "the"[: i % 3 + 1],
            "max_tokens": 15 + i % 30,
            "ignore_eos": True,
            **({"temperature": 0} if i % 2 else {"seed": i}),
        }
        for i in range(REQUESTS)
    ]
    return write_requests(
        tmp_path_factory.mktemp("batch") / "in.jsonl",
        [request_line(f"request-{i}", body) for i, body in enumerate(bodies)],
    )


@pytest.fixture(scope="module")
def uninterrupted(requests: Path, tiny_model: Path) -> dict[str, Any]:
    """What the answers are."""
    output = requests.with_name("uninterrupted.jsonl")
    assert run_batch(tiny_model, requests, output) == 0
    return {name: lasting(answer) for name, answer in read_answers(output).items()}


def started(tiny_model: Path, requests: Path, output: Path) -> "subprocess.Popen[str]":
    """The command as a process, whose engine works on two sequences at once."""
    command = [
        sys.executable,
        "-m",
        "nanovllm.cli.main",
        *arguments(tiny_model, requests, output, "--max-num-seqs", "2"),
    ]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path.cwd())},
    )


def wait_for_lines(process: "subprocess.Popen[str]", output: Path, count: int) -> None:
    """Wait until the output has so many lines."""
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while not output.exists() or output.read_bytes().count(b"\n") < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline_s
        time.sleep(0.005)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_after_a_signal_it_goes_on_where_it_was(
    number: signal.Signals,
    code: int,
    tiny_model: Path,
    requests: Path,
    uninterrupted: dict[str, Any],
    tmp_path: Path,
) -> None:
    output = tmp_path / "out.jsonl"
    process = started(tiny_model, requests, output)
    wait_for_lines(process, output, 12)
    process.send_signal(number)
    errors = process.communicate(timeout=TIMEOUT_S)[1]
    assert process.returncode == code, errors
    before = output.read_bytes()
    answered = before.count(b"\n")
    assert 12 <= answered < REQUESTS
    assert f"{answered} requests answered" in errors
    assert (
        f"ended by {number.name}; run the same command again to answer the "
        f"{REQUESTS - answered} that are left"
    ) in errors
    assert "Traceback" not in errors
    assert len(read_answers(output)) == answered, "no line is half"
    assert run_batch(tiny_model, requests, output) == 0
    assert output.read_bytes().startswith(before)
    assert {name: lasting(answer) for name, answer in read_answers(output).items()} == uninterrupted


def test_killed_again_and_again_it_still_comes_to_its_end(
    tiny_model: Path, requests: Path, uninterrupted: dict[str, Any], tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    for lines in (1, 19, 46):
        process = started(tiny_model, requests, output)
        wait_for_lines(process, output, lines)
        process.kill()
        process.communicate(timeout=TIMEOUT_S)
        before = output.read_bytes()
        with output.open("ab") as file:
            file.write(b'{"id": "batch_req_')  # as where the kill came in the middle of a write
    assert lines <= before.count(b"\n") < REQUESTS
    assert run_batch(tiny_model, requests, output) == 0
    assert output.read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    assert {name: lasting(answer) for name, answer in read_answers(output).items()} == uninterrupted


def test_a_disk_without_room_ends_it_and_with_room_it_goes_on(
    tiny_model: Path, requests: Path, uninterrupted: dict[str, Any], tmp_path: Path
) -> None:
    """The system refuses files over 10,000 bytes, in the middle of a line."""
    output = tmp_path / "out.jsonl"
    command = [
        sys.executable,
        "-c",
        LIMITED,
        *arguments(tiny_model, requests, output, "--backend", "numpy"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=START_TIMEOUT_S,
        check=False,
        env=environment,
    )
    assert done.returncode == 1
    assert (
        f"{output} cannot be written (File too large); its responses are kept: fix that and run "
        "the same command again to resume" in done.stderr
    )
    assert "Traceback" not in done.stderr
    answered = read_answers(output)
    assert 0 < len(answered) < REQUESTS
    assert 8_000 < output.stat().st_size < 10_000
    assert run_batch(tiny_model, requests, output, "--backend", "numpy") == 0
    again = read_answers(output)
    assert again.keys() == uninterrupted.keys()
    assert {name: again[name] for name in answered} == answered
