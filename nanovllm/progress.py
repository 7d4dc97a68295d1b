"""Progress bars on terminals and in notebooks only.

tqdm's own check (disable=None) disables the bar in notebooks, whose standard error is not a
terminal.
"""

import sys
from importlib.util import find_spec
from typing import Any

from tqdm import tqdm


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
