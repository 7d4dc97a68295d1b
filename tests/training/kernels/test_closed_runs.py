"""A helper that was waiting at a barrier when its run ended touches no more of the run's memory."""

import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, mmap
import numpy as np
from nanovllm.model.kernels.build.layout import ENTERED, GENERATION, NEXT, THREAD_BYTES, THREADS
from nanovllm.model.kernels.build.target import host_spec
from nanovllm.model.kernels.record import KernelMemory
from nanovllm.model.kernels.threads.pool import ThreadPool
from nanovllm.training.kernels.library import load_operations
from nanovllm.training.kernels.records import DTYPES, OPERATIONS, RECORDS, RUN_CALLS

library = load_operations(host_spec().target)
pool = ThreadPool(2, library, phases=4)  # its helper waits for a run; the caller plays thread 1

def integer(address):
    return ctypes.c_int64.from_address(address)

values, sums = np.ones(16, dtype=np.float32), np.zeros(16, dtype=np.float64)
first = KernelMemory(RECORDS["sum_of_squares"], DTYPES)
first.bind(values=values)
first.point("partial_sums", sums.ctypes.data)
first.set(count=16, job=pool.job, phases=pool.phases, threads=2)

page = mmap.PAGESIZE
memory = mmap.mmap(-1, 2 * page)
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
protect = ctypes.CDLL(None).mprotect
protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
assert protect(address + page, page, 0) == 0
calls = np.frombuffer(memory, dtype=np.int64)[page // 8 - 2 : page // 8]
calls[:] = OPERATIONS.index("sum_of_squares"), first.address

run = KernelMemory(RECORDS[RUN_CALLS], DTYPES)
run.point("calls", calls.ctypes.data)
run.set(count=2, job=pool.job, phases=pool.phases, threads=2)
integer(pool.phases + NEXT).value = 1  # the only item is handed out, and not computed yet
integer(pool.job + THREADS + THREAD_BYTES + ENTERED).value = 1
integer(pool.job + GENERATION).value = 2  # the run of generation 1 is closed
print("begins", flush=True)
library.functions[RUN_CALLS](run.address, 1)
print("returned")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="protects a page of memory by mprotect")
def test_a_helper_reads_no_calls_behind_a_closed_run() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.split() == ["begins", "returned"], done.stderr
    assert done.returncode == 0
