"""A lock on the output folder, so that one process at a time writes a run."""

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nanovllm.errors import TrainingError

LOCK_FILE = ".lock"
OWNER_FILE = ".lock-owner"


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Create a folder and lock it against other runs.

    The lock is one of the operating system's, which also ends with a process that is killed.

    Raises:
        TrainingError: another run has the lock, or the folder cannot be written.
    """
    from filelock import FileLock, Timeout  # noqa: PLC0415 - slow to import

    lock, owner = FileLock(folder / LOCK_FILE, timeout=0), folder / OWNER_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        owner.unlink(missing_ok=True)
        owner.write_text(f"process {os.getpid()} on {platform.node()}", encoding="utf-8")
    except Timeout:
        raise TrainingError(
            f"{folder} is in use by another run{_read_owner(owner)}: wait until it ends, or stop "
            "it with Ctrl-C, which saves its state; or choose another --output"
        ) from None
    except OSError as error:
        lock.release()
        raise TrainingError(f"{folder} cannot be written: {error.strerror or error}") from None
    try:
        yield
    finally:
        with suppress(OSError):
            owner.unlink()
        lock.release()


def check_is_idle(folder: Path) -> None:
    """Raise TrainingError if a process is writing to the folder."""
    if (folder / LOCK_FILE).exists():
        with lock_folder(folder):
            pass


def _read_owner(file: Path) -> str:
    with suppress(OSError, ValueError):
        return f" ({file.read_text(encoding='utf-8')})"
    return ""
