"""Progress bars appear on terminals and in notebooks only."""

import io
import os
import struct
import sys
from types import SimpleNamespace

import pytest

from nanovllm.progress import ProgressLines, progress_bar, shows_progress, step_progress


class Terminal(io.StringIO):
    """Standard error as a terminal."""

    def isatty(self) -> bool:
        return True


def make_notebook(monkeypatch: pytest.MonkeyPatch, **config: object) -> None:
    shell = SimpleNamespace(config=config)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))


def show_one(
    stream: io.StringIO, monkeypatch: pytest.MonkeyPatch, *, is_wanted: bool = True
) -> str:
    monkeypatch.setattr(sys, "stderr", stream)
    with progress_bar(is_wanted=is_wanted, total=1, desc="Prompts", mininterval=0) as bar:
        bar.update()
    return stream.getvalue()


def test_a_pipe_gets_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    assert show_one(io.StringIO(), monkeypatch) == ""
    make_notebook(monkeypatch)  # of IPython on a terminal whose output goes to a file
    assert not shows_progress()


def test_a_terminal_and_a_notebook_get_one_unless_it_is_not_wanted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert "Prompts: 100%" in show_one(Terminal(), monkeypatch)
    assert show_one(Terminal(), monkeypatch, is_wanted=False) == ""
    monkeypatch.setattr("nanovllm.progress.find_spec", lambda name: None)  # without ipywidgets
    make_notebook(monkeypatch, IPKernelApp={})
    assert "Prompts: 100%" in show_one(io.StringIO(), monkeypatch)


def test_without_standard_error_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)  # as in pythonw
    assert not shows_progress()


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals")
@pytest.mark.parametrize("size", [(0, 0), (40, 80)])
def test_all_values_are_visible_whatever_size_the_terminal_tells(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]
) -> None:
    """`script` makes terminals of 0 rows and columns."""
    import fcntl
    import termios

    leader, follower = os.openpty()
    values = {"loss": "3.123", "best": "3.456", "lr": "1.0e-3", "norm": "0.52", "tok/s": "17.8k"}
    with os.fdopen(leader, "rb", buffering=0) as shown, os.fdopen(follower, "w") as stderr:
        fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
        monkeypatch.setattr(sys, "stderr", stderr)
        with step_progress(total=2000, initial=1999, unit="step") as line:
            line.show(values)
            line.update()
        text = b""
        while not text.endswith(b"\n"):  # which the bar prints when it closes
            text += shown.read(4096)
    last = text.decode().split("\r")[-2]
    assert last.startswith("2000/2000 00:00 left loss 3.123 best 3.456 lr 1.0e-3 norm 0.52 tok/s")
    assert "17.8k" in last
    assert len(last) <= 80


def test_a_log_gets_a_line_at_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    clock = iter([0.0, 30.0, 60.0, 90.0, 125.0])
    monkeypatch.setattr("nanovllm.progress.time.monotonic", lambda: next(clock))
    with ProgressLines(total=50, initial=10, unit="step", every_s=60.0) as lines:
        for loss in ("4.0", "3.5", "3.4", "3.3"):
            lines.show({"loss": loss})
            lines.update()
    assert log.getvalue().splitlines() == [
        "step     12 of 50  loss 3.5  19:00 left",
        "step     14 of 50  loss 3.3  18:45 left",
    ]
