"""Commands that messages name: a user can paste them."""

import os
import shlex
import sys
from pathlib import Path


def model_argument(folder: str | Path) -> str:
    """Return a folder as a MODEL argument: "./NAME", because NAME may be a bundled model's."""
    path = str(folder)
    is_name = not (Path(path).is_absolute() or "/" in path or os.sep in path or path == ".")
    return quoted(f"./{path}" if is_name else path)


def resume_command(folder: str | Path) -> str:
    """Return the command that continues a run."""
    return f"nanovllm train --resume {quoted(folder)}"


def quoted(path: str | Path) -> str:
    """Return a path as one argument of a shell."""
    text = str(path)
    if sys.platform == "win32":
        return f'"{text}"' if " " in text else text
    return shlex.quote(text)
