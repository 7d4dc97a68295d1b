"""`nanovllm train` as a user runs it: settings, output and errors."""

import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nanovllm import trainer as trainer_module
from nanovllm.cli.main import main
from nanovllm.model.activation import ACTIVATIONS
from tests.support.checkpoints import write_tiny_model
from tests.support.train_command import SIZES, TIMEOUT_S, flags, refuse, start
from tests.support.training_runs import TEXT


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
    (source / "config.json").write_text('{"model_type": "gptj"}')
    assert "those that can be loaded have" in refuse(capsys, [*arguments, str(source)])
    (tmp_path / "folder").mkdir()
    assert "folder" in refuse(capsys, [*arguments, str(tmp_path / "folder")])
    assert not (tmp_path / "run").exists()


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
