"""`nanovllm train` as a user runs it: settings, errors, interruption and resuming."""

import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nanovllm import trainer as trainer_module
from nanovllm.cli.main import main
from nanovllm.model.activation import ACTIVATIONS
from nanovllm.trainer import Trainer
from nanovllm.training.metrics import Evaluation
from nanovllm.training.run.checkpoint import RESUME_FILE
from tests.support.checkpoints import write_tiny_model
from tests.support.training_runs import assert_same_weights

TEXT = "she sells sea shells on the sea shore. " * 60
SIZES = {
    "layers": 1,
    "heads": 2,
    "width": 16,
    "context": 16,
    "batch-size": 2,
    "steps": 8,
    "eval-every": 4,
    "tokenizer": "char",
    "sample-tokens": 4,
    "backend": "numpy",
}
TIMEOUT_S = 120.0


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def flags(text: Path, folder: Path, **changes: Any) -> list[str]:
    """Return the command line of a small run; a change of None leaves a flag out."""
    settings: dict[str, Any] = {"data": text, "output": folder, **SIZES}
    settings |= {name.replace("_", "-"): value for name, value in changes.items()}
    given = {name: value for name, value in settings.items() if value is not None}
    return ["train", *(part for name in given for part in (f"--{name}", str(given[name])))]


def refuse(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """Run a command that fails, and return its message."""
    assert main(arguments) == 1
    message = capsys.readouterr().err
    assert message.startswith("nanovllm: ")
    assert "Traceback" not in message
    return message


def reject(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """Run an invalid command line, and return what it prints."""
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    assert raised.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("usage: nanovllm train --data PATH... --output DIR [options]\n")
    return message


def test_the_help_names_activation_functions_that_exist(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    names = text.partition("--activation ACTIVATION ")[2].partition(" or another")[0]
    assert "gelu_new" in names
    assert set(names.split(", ")) <= set(ACTIVATIONS)
    documented = (Path(__file__).parents[2] / "docs" / "reference" / "training.md").read_text(
        encoding="utf-8"
    )
    assert all(f"`{name}`" in documented for name in ACTIVATIONS)


def state(folder: Path) -> str:
    return str(json.loads((folder / "run.json").read_text(encoding="utf-8"))["state"])


def steps(folder: Path) -> list[int]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["step"] for line in lines]


def test_a_run_prints_its_evaluations_and_where_its_files_are(
    capsys: pytest.CaptureFixture[str], text: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    assert main(flags(text, folder)) == 0
    printed, errors = capsys.readouterr()
    lines = printed.splitlines()
    assert "1 layer, 2 heads, width 16, context 16" in lines[0]
    assert "8 steps of 32 tokens" in lines[1]
    assert [line.split()[:2] for line in lines[2:5]] == [
        ["step", "0"],
        ["step", "4"],
        ["step", "8"],
    ]
    assert "validation" in lines[2]
    assert "train" in lines[3]
    assert "finished: all 8 steps" in lines
    assert f"serve:  nanovllm serve {folder}" in lines
    assert errors == ""  # no progress bar without a terminal


def test_a_file_has_the_settings_and_flags_override_it(
    capsys: pytest.CaptureFixture[str], text: Path, tmp_path: Path
) -> None:
    folder, file = tmp_path / "run", tmp_path / "run.toml"
    settings = {**SIZES, "data": str(text), "output": str(folder), "lr": 0.25}
    file.write_text("".join(f"{name} = {json.dumps(settings[name])}\n" for name in settings))
    assert main(["train", "--config", str(file), "--steps", "2", "--seed", "3"]) == 0
    config = json.loads((folder / "run.json").read_text(encoding="utf-8"))["config"]
    assert (config["lr"], config["width"], config["steps"], config["seed"]) == (0.25, 16, 2, 3)
    capsys.readouterr()
    resume = ["train", "--config", str(file), "--resume", str(folder)]
    assert main([*resume, "--steps", "2", "--seed", "3"]) == 0, "equal settings may be repeated"
    printed = capsys.readouterr().out
    assert "nothing to do: the run is finished, at step 2 of 2" in printed
    assert f"--init-from {folder}" in printed


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "empty.txt"}, "there is no text"),
        ({"data": "binary.txt"}, "binary data: byte 1 is zero"),
        ({"data": "missing.txt"}, "does not exist"),
        ({"data": "folder"}, "has no file that matches '*.txt'"),
        ({"context": 10_000}, "a context of 10,000 needs at least 10,001"),
        ({"tokenizer": "bpe", "vocab-size": 5000}, "vocab_size is 5,000, but the tokenizer has"),
        ({"output": "text.txt"}, "is a file; --output needs a folder"),
        ({"output": "text.txt/run"}, "text.txt is a file"),
        ({"data": os.devnull}, "is a pipe or a device"),
        ({"tokenizer": "text.txt", "data": "pipe.npy"}, "cannot be read"),
        ({"data": "text.txt", "validation-data": "text.txt"}, "is validation data; give other"),
        ({"config": os.devnull}, "cannot be read: it is not a regular file"),
        ({"resume": "run", "output": None}, "to resume from"),
        ({"config": "wrong.toml"}, "there is no setting 'layer'; did you mean layers?"),
        ({"config": "broken.toml"}, "broken.toml cannot be read"),
    ],
)
def test_bad_input_is_one_clear_message(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    text: Path,
    tmp_path: Path,
    changes: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").touch()
    Path("binary.txt").write_bytes(b"a\0b")
    Path("folder").mkdir()
    Path("wrong.toml").write_text("layer = 4")
    Path("broken.toml").write_text("layers = ")
    assert message in refuse(capsys, flags(text, Path("run"), **changes))
    assert not Path("run").exists()
    assert text.read_text(encoding="utf-8") == TEXT


def test_an_interrupt_before_the_first_step_says_that_nothing_was_saved(
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer_module, "Trainer", interrupted)
    assert main(["train", "--data", str(text), "--output", str(tmp_path / "out")]) == 130
    assert "stopped before the first step; nothing was saved" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 3}, "width is 16, which 3 heads do not divide"),
        ({"layers": 10**6}, "layers is 1000000 but must be an integer, from 1 to 1024"),
        ({"output": None}, "output is missing: a new folder for the run (--output)"),
        ({"data": None}, "data is missing"),
        ({"data": None, "output": None, "heads": 3}, "(--data)\n  output is missing"),
        ({"config": "types.toml", "layers": None}, "layers is '4' but must be an integer"),
        ({"lr": -1}, "lr is -1.0 but must be a number"),
        ({"positions": "rope"}, "positions is 'rope' but must be one of learned, sinusoidal"),
        ({"preset": "gpt3"}, "preset is 'gpt3'"),
        ({"backend": "torch"}, "backend is 'torch'"),
        ({"steps": 0}, "steps is 0"),
        ({"stop-after": 9}, "stop_after is 9 but must be at most the 8 steps"),
    ],
)
def test_settings_that_cannot_be_used_print_the_usage(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    text: Path,
    tmp_path: Path,
    changes: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("types.toml").write_text('layers = "4"\ndata = 3')
    assert message in reject(capsys, flags(text, Path("run"), **changes))
    assert not Path("run").exists()


def test_a_checkpoint_that_cannot_be_fine_tuned_is_refused(
    capsys: pytest.CaptureFixture[str], text: Path, tmp_path: Path
) -> None:
    source = write_tiny_model(tmp_path / "model")
    arguments = ["train", "--data", str(text), "--output", str(tmp_path / "run")]
    arguments += ["--backend", "numpy", "--init-from"]
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "model.safetensors" in refuse(capsys, [*arguments, str(source)])
    (source / "config.json").write_text('{"model_type": "llama"}')
    assert "only the gpt2 architecture" in refuse(capsys, [*arguments, str(source)])
    (tmp_path / "folder").mkdir()
    assert "folder" in refuse(capsys, [*arguments, str(tmp_path / "folder")])
    assert not (tmp_path / "run").exists()


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


def test_files_that_were_skipped_are_named_on_standard_error(
    capsys: pytest.CaptureFixture[str], text: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    text.rename(folder / "a.txt")
    (folder / "b.txt").write_bytes(b"\0")
    assert main(flags(folder, tmp_path / "run", steps=1)) == 0
    printed, errors = capsys.readouterr()
    assert "skipped 1 of 2 files" in errors
    assert "skipped 1" not in printed
    assert printed.startswith("1 file, 2.3 kB\n")
    assert "1 step of 32 tokens\n" in printed
    assert "finished: 1 step\n" in printed
    message = refuse(capsys, flags(folder, tmp_path / "other", context=5000))
    assert message.index("skipped 1 of 2 files") < message.index("a context of 5,000 needs")


def start(arguments: list[str], **options: Any) -> "subprocess.Popen[str]":
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "nanovllm", *arguments]
    return subprocess.Popen(command, text=True, env=environment, **options)


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


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals")
def test_a_terminal_shows_a_progress_bar(text: Path, tmp_path: Path) -> None:
    import fcntl
    import pty
    import termios

    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 80, 0, 0))
    process = start(flags(text, tmp_path / "run"), stderr=follower, stdout=subprocess.PIPE)
    os.close(follower)
    shown = b""
    try:
        while chunk := os.read(leader, 4096):
            shown += chunk
    except OSError:  # Linux's end of a terminal
        pass
    finally:
        os.close(leader)
        printed, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0
    last = shown.decode().split("\r")[-2]
    best = min(float(line.split()[5]) for line in printed.splitlines() if " train " in line)
    assert re.fullmatch(
        rf"8/8 00:00 left loss \S+ best {best:.3f} lr \S+ norm \S+ tok/s \S+ \S+ *", last
    ), last
    assert "norm" not in printed
