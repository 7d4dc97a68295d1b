"""Progress bars appear on terminals and in notebooks only."""

import io
import sys
from types import SimpleNamespace

import pytest

from nanovllm.progress import progress_bar, shows_progress


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
