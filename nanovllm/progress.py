"""Progress bars: on a terminal and in a notebook, silent elsewhere.

tqdm's own test, disable=None, takes a notebook for a pipe: its standard error is no terminal.
"""

import sys
from importlib.util import find_spec
from typing import Any

from tqdm import tqdm


def shows_progress() -> bool:
    """Whether somebody sees a bar: standard error is a terminal, or this is a notebook."""
    is_terminal = sys.stderr is not None and sys.stderr.isatty()
    return is_terminal or is_notebook()


def is_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    get_ipython = getattr(sys.modules.get("IPython"), "get_ipython", None)
    shell = None if get_ipython is None else get_ipython()
    return shell is not None and "IPKernelApp" in getattr(shell, "config", {})


def progress_bar(*, is_wanted: bool = True, **options: Any) -> "tqdm[Any]":
    """Make a bar with these options of tqdm; in a notebook a widget, or text without widgets."""
    kind: type[tqdm[Any]] = tqdm
    if is_notebook() and find_spec("ipywidgets") is not None:
        from tqdm.notebook import tqdm as kind  # noqa: PLC0415 - needs a notebook
    return kind(disable=not (is_wanted and shows_progress()), **options)
