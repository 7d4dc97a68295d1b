"""A contender's process: valid and invalid answers, and SIGSTOP while others run."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.contenders import CLASSES, OURS, PEERS, ROOT, Contender, Entry, WorkerError, entries

pytestmark = pytest.mark.skipif(os.name == "nt", reason="a script is no program there")

ANSWER = """
request = json.loads(line)
tell({"seconds": 0.5, "token_ids": [[1] * length for length in request["lengths"]]})
"""
Start = Callable[..., Contender]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """start(answer, ready) runs a script that says `ready`, then runs `answer` for each line."""
    running = []

    def begin(
        answer: str = ANSWER,
        ready: str = '{"ready": {"versions": {"fake": "1"}}}',
        timeout_s: float = 30.0,
    ) -> Contender:
        script = tmp_path / f"worker{len(list(tmp_path.iterdir()))}"
        body = answer.strip().replace("\n", "\n    ")
        tell = "def tell(message): print(json.dumps(message), flush=True)"
        script.write_text(
            f"#!{sys.executable}\nimport json, sys\n{tell}\nprint('{ready}', flush=True)\n"
            f"for line in sys.stdin:\n    {body}\n"
        )
        script.chmod(0o755)
        running.append(
            Contender.start(Entry("fake", "fake", "any", str(script)), tmp_path, 1, timeout_s)
        )
        return running[-1]

    yield begin
    for contender in running:
        contender.close()


def test_a_worker_answers(start: Start) -> None:
    contender = start()
    assert contender.about == {"versions": {"fake": "1"}}
    for _ in range(2):
        assert contender.ask([[1, 2], [3]], [2, 3], 30.0)["token_ids"] == [[1, 1], [1, 1, 1]]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux to tell")
def test_a_worker_is_stopped_between_its_turns(start: Start) -> None:
    contender = start()
    status = Path(f"/proc/{contender.process.pid}/status")
    for _ in range(2):
        deadline_s = time.monotonic() + 10
        while "State:\tT" not in status.read_text() and time.monotonic() < deadline_s:
            time.sleep(0.01)
        assert "State:\tT" in status.read_text()
        contender.ask([[1]], [1], 30.0)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            'tell({"seconds": 0.5, "token_ids": [[1, 1]]})',
            r"other work: \[2\] tokens instead of \[3\]",
        ),
        (
            'tell({"seconds": 0.5, "token_ids": [[1, 1, 1]], "cached_tokens": 32})',
            "32 tokens came from a cache",
        ),
        ('tell({"failed": "RuntimeError: no memory"})', "RuntimeError: no memory"),
        ('sys.exit("out of luck")', "it ended: out of luck"),
        ("pass", "no answer within 0.5 s"),
    ],
)
def test_worker_errors_are_reported(start: Start, answer: str, message: str) -> None:
    contender = start(answer)
    with pytest.raises(WorkerError, match=message):
        contender.ask([[1]], [3], 0.5 if answer == "pass" else 30.0)


def test_a_missing_package_is_reported(start: Start) -> None:
    with pytest.raises(WorkerError, match="not installed: No module named 'llama_cpp'"):
        start(ready='{"missing": "No module named \\\'llama_cpp\\\'"}')
    with pytest.raises(WorkerError, match="cannot be run"):
        Contender.start(Entry("fake", "fake", "any", "/nowhere/python"), Path(), 1, 1.0)


def test_a_closed_worker_is_gone(start: Start) -> None:
    contender = start()
    contender.close()
    assert contender.process.returncode == -signal.SIGKILL


def test_every_contender_has_a_file() -> None:
    pythons = dict.fromkeys([OURS, *PEERS], sys.executable)
    for kind in CLASSES:
        listed = entries(kind, list(PEERS), pythons, {})
        assert listed[0].name == OURS
        assert len({entry.name for entry in listed}) == len(listed) > 3
        for entry in listed:
            assert (ROOT / "benchmarks" / "peers" / f"{entry.module}.py").is_file()
