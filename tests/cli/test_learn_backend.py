"""`--backend learn:DIR` of `nanovllm serve` and `generate`."""

import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nanovllm.cli.main import build_parser, main
from nanovllm.cli.options import engine_config
from nanovllm.cli.serve_options import ServeOptions
from nanovllm.engine.engine import Engine
from nanovllm.learn.folder import CourseFolder
from tests.support.serve_command import Serving

CLASSROOM = (
    "--num-blocks", "16", "--block-size", "8", "--max-num-batched-tokens", "24",
    "--max-num-seqs", "4",
)  # fmt: skip


def test_the_readers_code_serves_and_its_faults_are_answers(
    tiny_model: Path, tmp_path: Path
) -> None:
    CourseFolder.start(tmp_path / "gpt", has_solutions=True)
    file = tmp_path / "gpt" / "step09_scheduler.py"
    source = file.read_text(encoding="utf-8")
    fault = (
        "        assert sequence.prompt[0] != 9, 'no nine'\n        self.waiting.append(sequence)"
    )
    file.write_text(source.replace("        self.waiting.append(sequence)", fault), "utf-8")
    stubs = (tmp_path / "gpt" / "step10_streaming.py").read_text(encoding="utf-8")
    (tmp_path / "gpt" / "step10_streaming.py").write_text(
        stubs.replace("class StopStrings", "class OtherStopStrings"), "utf-8"
    )
    backend = ("--backend", f"learn:{tmp_path / 'gpt'}")
    with Serving("--model", str(tiny_model), *backend, *CLASSROOM) as serving:
        lines = "".join(serving.startup_lines)
        assert f"backend learn:{tmp_path / 'gpt'}" in lines
        assert "attention" in lines.partition("your code")[2].partition("\n")[0]
        assert lines.partition("project's")[2].partition("\n")[0].strip() == "stop strings"
        body = {"prompt": [[1, 2, 3]] * 6, "max_tokens": 20, "temperature": 0, "ignore_eos": True}
        path = "/v1/completions"
        status, answer = serving.ask(path, body)
        assert (status, len({choice["text"] for choice in answer["choices"]})) == (200, 1)
        status, refused = serving.ask(path, {**body, "prompt": [9]})
        message = refused["error"]["message"]
        assert status == 500
        assert "step09_scheduler.py, line" in message
        assert "in add: AssertionError: no nine" in message
        assert serving.ask(path, body)[1]["choices"] == answer["choices"]
        config = serving.ask("/v1/engine/state")[1]["config"]
        assert config["backend"] == f"learn:{tmp_path / 'gpt'}"
        owners = {one["part"]: one["is_readers"] for one in config["parts"]}
        assert owners["scheduler"]
        assert not owners["stop strings"]


def test_the_option_has_the_settings_of_numpy() -> None:
    parsed = build_parser().parse_args(["serve", "--backend", "learn:x", *CLASSROOM])
    options = ServeOptions.of(parsed)
    assert options.learn_folder == Path("x")
    assert options.engine == engine_config(parsed)
    assert (options.engine.backend, options.engine.num_blocks) == ("numpy", 16)
    assert ServeOptions.of(build_parser().parse_args(["serve"])).learn_folder is None


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("learn:", "learn: names no folder; learn:. is the current one"),
        ("lear", "'lear' must be numba, numpy or learn:DIR"),
    ],
)
def test_another_value_is_a_typing_error(
    capsys: pytest.CaptureFixture[str], backend: str, message: str
) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--backend", backend])
    assert message in capsys.readouterr().err


def test_a_folder_that_cannot_be_used_is_told(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generate", "--model", str(tiny_model), "--backend", f"learn:{tmp_path}", "x"]
    assert main(arguments) == 1
    assert "has no course.json; `nanovllm learn start" in capsys.readouterr().err
    CourseFolder.start(tmp_path / "gpt")
    (tmp_path / "gpt" / "step04_attention.py").write_text("import nothing_at_all\n", "utf-8")
    arguments[4] = f"learn:{tmp_path / 'gpt'}"
    assert main(arguments) == 1
    assert "step04_attention.py, line 1: ModuleNotFoundError" in capsys.readouterr().err


def test_the_readers_code_generates(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    CourseFolder.start(tmp_path / "gpt", has_solutions=True)
    arguments = ["--model", str(tiny_model), "--seed", "1", "--max-tokens", "9", "Once"]
    texts = []
    for backend in ("numpy", f"learn:{tmp_path / 'gpt'}"):
        assert main(["generate", "--backend", backend, *arguments]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != ""


def test_the_course_s_scheduler_takes_no_drafts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--backend", "learn:x", "--speculative-config", "{}"]) == 1
    assert "the course's scheduler plans no drafted tokens; leave it out" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["serve", "generate"])
def test_an_order_that_the_course_does_not_have_is_refused_before_anything_starts(
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
) -> None:
    monkeypatch.setattr("nanovllm.cli.serving.bind", None)  # no port is opened
    monkeypatch.setattr(Engine, "load", None)
    CourseFolder.start(tmp_path / "gpt")
    options = ("--backend", f"learn:{tmp_path / 'gpt'}", "--scheduling-policy", "fair")
    prompt = ["x"] if command == "generate" else []
    assert main([command, "--model", str(tiny_model), *options, *prompt]) == 1
    assert "scheduling_policy is 'fair', but the course's scheduler" in capsys.readouterr().err


@contextmanager
def stuck_command(
    model: Path, folder: Path, call: str, *, step_s: float = 60.0, text_s: float = 60.0
) -> Iterator[subprocess.Popen[str]]:
    """Run `nanovllm generate` with these limits; its scheduler makes a call that does not end."""
    CourseFolder.start(folder, has_solutions=True)
    file = folder / "step09_scheduler.py"
    start = "        chunks: list[Chunk] = []"
    added = f"        import hashlib, time\n        print('begun', flush=True)\n        {call}\n"
    file.write_text(file.read_text("utf-8").replace(start, added + start), "utf-8")
    program = (
        "import sys\nfrom nanovllm.learn import guard, scheduler\n"
        f"guard.STEP_S, guard.GRACE_S, scheduler.TEXT_S = {step_s}, 0.3, {text_s}\n"
        "from nanovllm.cli.main import main\nsys.exit(main(sys.argv[1:]))"
    )
    options = ("--model", str(model), "--backend", f"learn:{folder}", "Once")
    with subprocess.Popen(
        [sys.executable, "-c", program, "generate", *options],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as command:  # fmt: skip
        try:
            yield command
        finally:
            command.kill()


def test_a_call_that_never_ends_ends_the_command(tiny_model: Path, tmp_path: Path) -> None:
    with stuck_command(tiny_model, tmp_path / "gpt", "time.sleep(1e6)", text_s=0.3) as command:
        _, errors = command.communicate(timeout=60)
    assert re.search(
        r"step09_scheduler\.py, line \d+, in schedule: it did not end within 0\.3 s, and cannot be "
        r"interrupted: it waits for a library \(the line: time\.sleep\(1e6\)",
        errors,
    )
    assert command.returncode == 1


def test_a_call_that_stops_all_threads_ends_the_command(tiny_model: Path, tmp_path: Path) -> None:
    call = "sum(range(10**15))"  # holds the interpreter's lock
    with stuck_command(tiny_model, tmp_path / "gpt", call, step_s=0.5) as command:
        _, errors = command.communicate(timeout=60)
    assert re.search(r'File ".*step09_scheduler\.py", line \d+ in schedule', errors)
    assert command.returncode == 1


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_a_second_interrupt_ends_what_the_first_cannot(tiny_model: Path, tmp_path: Path) -> None:
    call = "hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"  # does not look for signals
    with stuck_command(tiny_model, tmp_path / "gpt", call) as command:
        assert command.stdout is not None
        assert command.stdout.readline() == "Oncebegun\n"
        for _ in range(2):
            time.sleep(0.1)
            command.send_signal(signal.SIGINT)
        command.communicate(timeout=60)
    assert command.returncode == 130
