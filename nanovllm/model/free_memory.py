"""Freed memory, given back to the operating system.

glibc keeps what is freed for later, and a model's arrays leave hundreds of megabytes behind: its
threshold for mapping an allocation of its own grows with every large one that is freed.
"""

import ctypes
import sys


def return_freed_memory() -> None:
    """Give back what the C library keeps of freed memory, where it has a function for that (glibc)."""
    if sys.platform != "linux" or sys.is_finalizing():
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))
