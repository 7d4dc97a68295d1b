"""Progress bars on terminals and in notebooks, and lines of progress in logs.

tqdm's own check (disable=None) disables the bar in notebooks, whose standard error is not a
terminal.
"""

import os
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
    if not is_notebook():
        options = {**_size_without_one(), **options}
    if is_notebook() and find_spec("ipywidgets") is not None:
        from tqdm.notebook import tqdm as kind  # noqa: PLC0415 - needs a notebook
    return kind(disable=not (is_wanted and shows_progress()), **options)


def _size_without_one() -> dict[str, int]:
    """Return a size for a terminal of 0 rows or columns, as under `script`: tqdm shows no bar."""
    try:
        columns, rows = os.get_terminal_size(sys.stderr.fileno())
    except (OSError, ValueError, AttributeError):
        return {}
    return {} if columns and rows else {"ncols": columns or 80, "nrows": rows or 24}


def step_progress(*, total: int, initial: int, unit: str) -> "ProgressBar | ProgressLines":
    """Return a progress bar, or where there is no terminal, as in a log, a line each minute."""
    if shows_progress():
        return ProgressBar(total=total, initial=initial)
    return ProgressLines(total=total, initial=initial, unit=unit, every_s=60.0)


class ProgressBar:
    """A bar of steps with named values; on a narrow terminal the bar itself gives way."""

    def __init__(self, *, total: int, initial: int) -> None:
        self._bar = progress_bar(
            total=total,
            initial=initial,
            bar_format="{n_fmt}/{total_fmt} {remaining} left{desc} {bar}",
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def show(self, values: Mapping[str, str]) -> None:
        """Set the values that the bar shows."""
        text = "".join(f" {name} {value}" for name, value in values.items())
        self._bar.set_description_str(text, refresh=False)

    def update(self) -> None:
        """Count one more."""
        self._bar.update()


class ProgressLines:
    """Prints a line of progress to standard error at intervals; used like a ProgressBar."""

    def __init__(self, *, total: int, initial: int, unit: str, every_s: float) -> None:
        self._total, self._initial, self._n, self._unit = total, initial, initial, unit
        self._every_s = every_s
        self._started_s = self._printed_s = time.monotonic()
        self._values: Mapping[str, str] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def show(self, values: Mapping[str, str]) -> None:
        """Set the values that the next line shows."""
        self._values = values

    def update(self) -> None:
        """Count one more; print a line if the last is `every_s` ago."""
        self._n += 1
        now_s = time.monotonic()
        if now_s - self._printed_s < self._every_s or sys.stderr is None:
            return
        self._printed_s = now_s
        each_s = (now_s - self._started_s) / (self._n - self._initial)
        left = tqdm.format_interval(each_s * (self._total - self._n))
        values = "".join(f"  {name} {value}" for name, value in self._values.items())
        line = f"{self._unit} {self._n:>6} of {self._total}{values}  {left} left"
        print(line, file=sys.stderr, flush=True)
