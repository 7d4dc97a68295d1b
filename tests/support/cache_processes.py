"""Work for processes that share a kernel cache. The tests' own imports would take each a second."""

import time
from pathlib import Path

from nanovllm.model.kernels.build.object_cache import ObjectCache

KEY = "0" * 64


def save_and_load(folder: str, number: int) -> bool:
    """Overwrite other processes' entries for half a second. Return whether all found were whole."""
    store, images = ObjectCache(Path(folder)), {bytes([first]) * 100_000 for first in range(4)}
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        store.save(KEY, bytes([number]) * 100_000)
        if store.load(KEY) not in images:
            return False
    return True


def compile_unless_there(folder: str, key: str) -> bool:
    """Do as one that compiles for a third of a second does; whether it had to."""
    store = ObjectCache(Path(folder))
    with store.exclusive(key):
        if store.load(key) is not None:
            return False
        time.sleep(0.3)
        store.save(key, b"code")
        return True
