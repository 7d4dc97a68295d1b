"""Progress bars for terminals and notebooks; nothing is shown where standard error goes elsewhere."""

import sys
from typing import Any

from tqdm import tqdm


def progress_bar(*, total: int, desc: str, unit: str, is_wanted: bool = True) -> "tqdm[Any]":
    """Return a bar on standard error, or in the cell of a notebook; hidden elsewhere."""
    make: type[tqdm[Any]] = tqdm
    in_notebook = is_notebook()
    if is_wanted and in_notebook:
        from tqdm.auto import tqdm as notebook_tqdm  # noqa: PLC0415 - imports asyncio and IPython

        make = notebook_tqdm
    is_visible = is_wanted and (in_notebook or _is_terminal())
    return make(total=total, desc=desc, unit=unit, disable=not is_visible)


def is_notebook() -> bool:
    """Return whether this process is the kernel of a notebook."""
    get_ipython = getattr(sys.modules.get("IPython"), "get_ipython", None)
    shell = get_ipython() if callable(get_ipython) else None
    return shell is not None and "IPKernelApp" in shell.config


def _is_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()
