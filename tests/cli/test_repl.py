"""The interactive prompt of `nanovllm generate`: commands, settings, history, Ctrl-C."""

import os
import re
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from nanovllm.cli.repl import Repl, history_path
from nanovllm.cli.writer import Writer
from nanovllm.errors import InvalidRequestError

TIMEOUT_S = 120.0


class SilentWriter(Writer):
    """Answers nothing, and remembers what it was asked."""

    def __init__(self) -> None:
        self.settings: dict[str, Any] = {"max_tokens": 128, "temperature": 0.7}
        self.num_tokens, self.duration_s = 10, 2.0
        self.prompts: list[str] = []

    def answer(self, prompt: str) -> None:
        if prompt == "too long":
            raise InvalidRequestError("the prompt has no room")
        if prompt == "interrupted":
            raise KeyboardInterrupt
        self.prompts.append(prompt)

    def retry(self) -> None:
        self.prompts.append("retried")

    def extend(self) -> None:
        self.prompts.append("extended")

    def clear(self) -> None:
        self.prompts.append("cleared")


@pytest.fixture
def writer() -> SilentWriter:
    return SilentWriter()


@pytest.mark.parametrize(
    ("line", "setting", "value"),
    [
        ("/set temperature 0.8", "temperature", 0.8),
        ("/set max-tokens 5", "max_tokens", 5),
        ("/set ignore_eos yes", "ignore_eos", True),
        ("/set stop a\\nb c", "stop", "a\nb c"),
        ("/set seed 7", "seed", 7),
        ("/set   temperature   0", "temperature", 0),
    ],
)
def test_settings_are_changed_and_reset(
    writer: SilentWriter, capsys: pytest.CaptureFixture[str], line: str, setting: str, value: object
) -> None:
    repl = Repl(writer)
    before = dict(writer.settings)
    assert repl.run_command(line)
    assert writer.settings == {**before, setting: value}
    assert capsys.readouterr().out.startswith(f"{setting} ")
    assert repl.run_command(f"/set {setting} default")
    assert writer.settings == before


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/set temperature hot", "temperature is 'hot' but must be a number"),
        ("/set temperature 900", "temperature is 900"),
        ("/set temprature 1", "there is no setting temprature; did you mean temperature?"),
        ("/set zzz 1", "there is no setting zzz; /set shows them"),
        ("/set logprobs 1", "there is no setting logprobs"),
        ("/hlep", "there is no command /hlep; did you mean /help?"),
        ("/nothing", "there is no command /nothing; /help lists the commands"),
        (
            "/temperature 0.5",
            "there is no command /temperature; did you mean /set temperature 0.5?",
        ),
        ("/top-p", "did you mean /set top_p?"),
    ],
)
def test_an_invalid_setting_is_an_error_and_changes_nothing(
    writer: SilentWriter, capsys: pytest.CaptureFixture[str], line: str, message: str
) -> None:
    before = dict(writer.settings)
    assert Repl(writer).run_command(line)
    assert message in capsys.readouterr().err
    assert writer.settings == before


def test_set_and_help_list_everything(
    writer: SilentWriter, capsys: pytest.CaptureFixture[str]
) -> None:
    assert Repl(writer).run_command("/set")
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert (rows["temperature"], rows["max_tokens"], rows["top_p"]) == ("0.7", "128", "1.0")
    assert (rows["seed"], rows["stop"], rows["ignore_eos"]) == ("none", "none", "false")
    assert Repl(writer).run_command("/set top_p")
    assert capsys.readouterr().out == "top_p 1.0\n"
    assert Repl(writer).run_command("/?")
    text = capsys.readouterr().out
    commands = ("/set", "/help", "/exit", "/retry", "/continue", "/clear", '"""')
    assert all(command in text for command in commands)


@pytest.mark.parametrize("end", ["/exit", "/quit", "/bye", None])
def test_lines_are_prompts_and_commands(
    writer: SilentWriter,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    end: str | None,
) -> None:
    lines = iter(
        ["Once", "", "//usr", "too long", "interrupted", "/set temperature 1", "again", end]
    )

    def type_line(prompt: str) -> str:
        line = next(lines)
        if line is None:
            raise EOFError
        return line

    monkeypatch.setattr("builtins.input", type_line)
    monkeypatch.setitem(sys.modules, "readline", None)  # as on Windows
    Repl(writer).run()
    assert writer.prompts == ["Once", "/usr", "again"]
    assert writer.settings["temperature"] == 1
    told = capsys.readouterr().err
    assert "the prompt has no room" in told
    assert told.count("[10 tokens in 2.00 s, 5 tokens/s]") == 4, "also after an interrupt"


def test_lines_between_quotes_are_one_prompt_and_commands_repeat_it(
    writer: SilentWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed: list[str | type[BaseException]] = [
        '"""One', "", 'two"""', "/retry", '"""', "/three", '"""', '"""four"""', "/continue",
        '"""lost', KeyboardInterrupt, "/clear", '"""open', EOFError, EOFError,
    ]  # fmt: skip
    lines = iter(typed)

    def type_line(prompt: str) -> str:
        line = next(lines)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", type_line)
    monkeypatch.setitem(sys.modules, "readline", None)
    Repl(writer).run()
    expected = ["One\n\ntwo", "retried", "/three", "four", "extended", "cleared", "open"]
    assert writer.prompts == expected


def test_the_history_is_a_file_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NANOVLLM_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("NANOVLLM_HISTORY", raising=False)
    assert history_path() == tmp_path / "history"
    monkeypatch.setenv("NANOVLLM_HISTORY", str(tmp_path / "other"))
    assert history_path() == tmp_path / "other"
    monkeypatch.setenv("NANOVLLM_HISTORY", "")
    assert history_path() is None


def type_keys(arguments: list[str], keys: list[tuple[bytes, bytes]], history: Path) -> str:
    """Run `nanovllm` on a terminal; type keys, and wait for the text that follows them."""
    import pty

    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "nanovllm", *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "NANOVLLM_HISTORY": str(history),
            "TERM": "dumb",
        },
    )
    os.close(theirs)
    shown, begin, end_s = b"", 0, time.monotonic() + TIMEOUT_S
    try:
        for typed, awaited in [(b"", b"> "), *keys]:
            os.write(ours, typed)
            while awaited not in shown[begin:]:
                assert time.monotonic() < end_s, shown
                if select.select([ours], [], [], 0.1)[0]:
                    shown += os.read(ours, 4096)
            begin = len(shown)
        assert process.wait(TIMEOUT_S) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    return shown.decode(errors="replace")


@pytest.mark.skipif(sys.platform == "win32", reason="needs pseudo-terminals")
def test_on_a_terminal_lines_are_edited_and_remembered(tiny_model: Path, tmp_path: Path) -> None:
    readline = pytest.importorskip("readline")
    if "libedit" in (readline.__doc__ or ""):
        pytest.skip("libedit writes the history in a form of its own")
    flags = ["generate", "--model", str(tiny_model), "--max-tokens", "4", "--temperature", "0"]
    keys = [
        (b"the hen\x01old \r", b"tokens/s]\r\n> "),  # Ctrl-A goes to the start of the line
        (b"\x10\r", b"tokens/s]\r\n> "),  # Ctrl-P: the line before
        (b"/exit\r", b"/exit"),
    ]
    shown = type_keys([*flags, "--num-threads", "1", "--backend", "numpy"], keys, tmp_path / "h")
    assert shown.count("\nold the hen") == 2, "twice as the beginning of an answer"
    assert len(re.findall(r"\[4 tokens in [0-9.]+ s, [0-9,]+ tokens/s\]", shown)) == 2
    remembered = (tmp_path / "h").read_text().splitlines()
    assert (remembered[-1], remembered[-2]) == ("/exit", "old the hen")
    assert (tmp_path / "h").stat().st_mode & 0o077 == 0
