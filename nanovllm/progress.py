"""Progress bars on terminals and in notebooks, and lines of progress in logs.

tqdm's own check (disable=None) disables the bar in notebooks, whose standard error is not a
terminal.
"""

import sys
import time
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from tqdm import tqdm
from typing_extensions import Self


def shows_progress() -> bool:
    """Return whether standard error is a terminal, or this process is a notebook."""
    is_terminal = sys.stderr is not None and sys.stderr.isatty()
    return is_terminal or is_notebook()


def is_notebook() -> bool:
    """Return whether this process is the kernel of a notebook."""
    get_ipython = getattr(sys.modules.get("IPython"), "get_ipython", None)
    shell = None if get_ipython is None else get_ipython()
    return shell is not None and "IPKernelApp" in getattr(shell, "config", {})


def progress_bar(*, is_wanted: bool = True, **options: Any) -> "tqdm[Any]":
    """Return a tqdm bar with these options; in a notebook a widget if ipywidgets is installed."""
    kind: type[tqdm[Any]] = tqdm
    if is_notebook() and find_spec("ipywidgets") is not None:
        from tqdm.notebook import tqdm as kind  # noqa: PLC0415 - needs a notebook
    return kind(disable=not (is_wanted and shows_progress()), **options)


def step_progress(*, total: int, initial: int, unit: str) -> "tqdm[Any] | ProgressLines":
    """Return a progress bar, or where there is no terminal, as in a log, a line each minute."""
    if shows_progress():
        return progress_bar(total=total, initial=initial, unit=unit)
    return ProgressLines(total=total, initial=initial, unit=unit, every_s=60.0)


class ProgressLines:
    """Prints a line of progress to standard error at intervals; used like a tqdm bar."""

    def __init__(self, *, total: int, initial: int, unit: str, every_s: float) -> None:
        self._total, self._initial, self._n, self._unit = total, initial, initial, unit
        self._every_s = every_s
        self._started_s = self._printed_s = time.monotonic()
        self._postfix: Mapping[str, str] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def set_postfix(self, values: Mapping[str, str], *, refresh: bool = True) -> None:
        """Set the values that the next line shows."""
        self._postfix = values

    def update(self) -> None:
        """Count one more; print a line if the last is `every_s` ago."""
        self._n += 1
        now_s = time.monotonic()
        if now_s - self._printed_s < self._every_s or sys.stderr is None:
            return
        self._printed_s = now_s
        each_s = (now_s - self._started_s) / (self._n - self._initial)
        left = tqdm.format_interval(each_s * (self._total - self._n))
        values = "".join(f"  {name} {value}" for name, value in self._postfix.items())
        line = f"{self._unit} {self._n:>6} of {self._total}{values}  {left} left"
        print(line, file=sys.stderr, flush=True)
