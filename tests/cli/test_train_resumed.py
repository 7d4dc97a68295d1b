"""Training that ends early, by Ctrl-C, a fault or a kill, and resumes to the same bits."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nanovllm import trainer as trainer_module
from nanovllm.cli.main import main
from nanovllm.trainer import Trainer
from nanovllm.training.metrics import Evaluation
from nanovllm.training.run.checkpoint import RESUME_FILE
from tests.support.train_command import TIMEOUT_S, flags, refuse, start, state, steps
from tests.support.training_runs import TEXT, assert_same_weights


def test_a_stopped_run_is_resumed_to_the_same_bits(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    text: Path,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    whole, parts = Path("whole"), Path("parts")
    assert main(flags(text, whole)) == 0
    assert "serve:  nanovllm serve ./whole\n" in capsys.readouterr().out
    assert main(flags(text, parts, stop_after=3)) == 0
    assert "continue with: nanovllm train --resume parts\n" in capsys.readouterr().out
    assert state(parts) == "stopped"
    message = refuse(capsys, ["train", "--resume", "parts", "--beta1", "0.5", "--lr", "0.5"])
    assert "beta1 is 0.9, lr is 0.001 in the run in parts" in message
    assert "--init-from ./parts" in message
    assert main(["train", "--resume", "parts", "--output", f"{parts}/"]) == 0
    assert "continues at step 3 of 8\n" in capsys.readouterr().out
    assert_same_weights(whole, parts)
    assert steps(parts) == steps(whole) == [0, 4, 8]
    assert main(["train", "--resume", "parts"]) == 0
    assert "begin a new run with --init-from ./parts" in capsys.readouterr().out


def test_damaged_states_and_other_data_are_refused_when_resuming(
    capsys: pytest.CaptureFixture[str], text: Path, tmp_path: Path
) -> None:
    folder, other = tmp_path / "run", tmp_path / "other.txt"
    assert main(flags(text, folder, stop_after=2)) == 0
    resume = ["train", "--resume", str(folder)]
    other.write_text(TEXT.replace("sea", "see"), encoding="utf-8")
    assert "the data is not that of the run" in refuse(capsys, [*resume, "--data", str(other)])
    message = refuse(capsys, [*resume, "--output", str(tmp_path / "new"), "--lr", "1"])
    assert "lr is 0.001" in message
    assert "output is" in message
    assert "cannot change when it is resumed" in message
    file = folder / RESUME_FILE
    content = file.read_bytes()
    for damaged in (content[:-100], content[:5], b"", b"\xff" * 64):
        file.write_bytes(damaged)
        assert "resume.safetensors is damaged" in refuse(capsys, resume)
    file.write_bytes(content)
    other.write_text(TEXT, encoding="utf-8")
    text.unlink()
    assert "needs the data that it began with, or its new path" in refuse(capsys, resume)
    assert main([*resume, "--data", str(other)]) == 0, "a moved file has the same data"
    assert main([*resume, "--data", str(other), "--stop-after", "1"]) == 0, "it is beyond this step"


def test_a_full_disk_is_a_message_and_the_run_can_be_resumed(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    text: Path,
    tmp_path: Path,
) -> None:
    def no_room(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    folder, whole = tmp_path / "run", tmp_path / "whole"
    with monkeypatch.context() as full:
        full.setattr("nanovllm.training.run.checkpoint.save_file", no_room)
        assert "resume.safetensors cannot be written" in refuse(capsys, flags(text, folder))
    assert not (folder / "run.json").exists(), "the same command may be repeated"
    with monkeypatch.context() as full:
        full.setattr(Evaluation, "FILE", "missing/metrics.jsonl")
        assert "metrics.jsonl cannot be written" in refuse(capsys, flags(text, folder))
    assert state(folder) == "failed"
    resume = ["train", "--resume", str(folder)]
    report = folder / "report.html"
    report.unlink()
    report.mkdir()
    assert "report.html cannot be written" in refuse(capsys, resume)
    report.rmdir()
    assert main(resume) == 0
    assert main(flags(text, whole)) == 0
    assert_same_weights(whole, folder)
    assert steps(folder) == [0, 4, 8]


def fail_at(number: int, function: Callable[..., Any], error: BaseException) -> Callable[..., Any]:
    """Return the function, which raises the error in its call of this number."""
    calls = iter(range(number))

    def call(*args: Any, **kwargs: Any) -> Any:
        if next(calls, None) is None:
            raise error
        return function(*args, **kwargs)

    return call


@pytest.mark.parametrize("error", [RuntimeError("a kernel failed"), KeyboardInterrupt()])
@pytest.mark.parametrize(
    ("owner", "name", "number"),
    [(trainer_module, "batch_loss", 20), (Trainer, "validation_loss", 1)],
)
def test_any_other_error_saves_the_state(
    monkeypatch: pytest.MonkeyPatch,
    text: Path,
    tmp_path: Path,
    error: BaseException,
    owner: Any,
    name: str,
    number: int,
) -> None:
    """A second Ctrl-C is a KeyboardInterrupt."""
    folder, whole = tmp_path / "run", tmp_path / "whole"
    assert main(flags(text, whole)) == 0
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail_at(number, getattr(owner, name), error))
        if isinstance(error, KeyboardInterrupt):
            assert main(flags(text, folder)) == 130
        else:
            with pytest.raises(RuntimeError, match="a kernel failed"):
                main(flags(text, folder))
    assert state(folder) == ("stopped" if isinstance(error, KeyboardInterrupt) else "failed")
    assert main(["train", "--resume", str(folder)]) == 0
    assert state(folder) == "finished"
    assert_same_weights(whole, folder)
    assert steps(folder) == [0, 4, 8]


def wait_for(condition: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    """Wait until the condition holds, or the process has ended."""
    deadline_s = time.monotonic() + TIMEOUT_S
    while process.poll() is None and not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


@pytest.mark.skipif(sys.platform == "win32", reason="signals are those of POSIX")
def test_interrupted_and_killed_processes_resume_to_the_same_bits(
    capsys: pytest.CaptureFixture[str], text: Path, tmp_path: Path
) -> None:
    """Ctrl-C once, then kill -9 at moments that no test chooses."""
    folder, whole = tmp_path / "run", tmp_path / "whole"
    changes = {"steps": 40, "eval_every": 5, "sample_tokens": 0}
    process = start(flags(text, folder, **changes), stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        line = ""
        while not line.startswith("step"):  # a pipe has it at once
            line = process.stdout.readline()
            assert line, "the process has ended"
        for arguments in (["train", "--resume", str(folder)], flags(text, folder)):
            message = refuse(capsys, arguments)
            assert f"in use by another run (process {process.pid} on" in message
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=TIMEOUT_S)
    finally:
        process.kill()
    assert process.returncode == 130
    assert f"continue with: nanovllm train --resume {folder}" in rest
    assert state(folder) == "stopped"
    metrics = folder / "metrics.jsonl"
    for more_bytes in (1, 400):
        enough = metrics.stat().st_size + more_bytes
        process = start(["train", "--resume", str(folder)], stdout=subprocess.DEVNULL)
        try:
            wait_for(lambda enough=enough: metrics.stat().st_size >= enough, process)  # type: ignore[misc]
        finally:
            process.kill()
            process.wait()
    assert main(["train", "--resume", str(folder)]) == 0
    assert main(flags(text, whole, **changes)) == 0
    assert_same_weights(whole, folder)
    assert steps(folder) == list(range(0, 41, 5))
