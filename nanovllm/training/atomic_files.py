"""Files that are written to a temporary name and then renamed.

A reader sees the old contents or the new ones. A process that is killed at any moment leaves the
last complete file.
"""

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError

from nanovllm.errors import TrainingError


def write_atomically(
    path: Path, write: Callable[[Path], object], *, has_other_writers: bool = False
) -> None:
    """Call `write` with a temporary path beside `path`, then rename that to `path`.

    Args:
        path: file to replace; its folder is created if it is missing.
        write: writes the contents to the path that it is called with.
        has_other_writers: other processes may write the file at the same time. If this process is
            killed, the temporary file then stays; otherwise the next write replaces it.

    Raises:
        TrainingError: the file cannot be written, as on a full disk; `path` is as it was.
    """
    process = f".{os.getpid()}" if has_other_writers else ""
    temporary = path.with_name(f".{path.name}{process}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)  # a link would be followed
        temporary.touch()
        mode = temporary.stat().st_mode  # safetensors writes files that nobody else may read
        write(temporary)
        temporary.chmod(mode)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            temporary.unlink()
        kept = f"; the {path.name} from before is kept" if path.is_file() else ""
        raise TrainingError(f"{path} cannot be written: {error}{kept}") from None


def write_bytes(path: Path, data: bytes) -> None:
    """Write bytes; raise as `write_atomically`."""
    write_atomically(path, lambda temporary: temporary.write_bytes(data))


def write_json(path: Path, value: object) -> None:
    """Write JSON; raise as `write_atomically`."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_bytes(path, text.encode())
