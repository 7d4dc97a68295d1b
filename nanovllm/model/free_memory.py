"""Return freed memory to the operating system.

glibc keeps freed memory for later allocations. After a model is freed that is hundreds of
megabytes, because glibc raises its mmap threshold with every large block that is freed.
"""

import ctypes
import sys


def return_freed_memory() -> None:
    """Return the C library's freed memory to the operating system; only glibc can."""
    if sys.platform != "linux" or sys.is_finalizing():
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))
