"""A helper that was waiting at a barrier when its run ended touches no more of the run's memory."""

import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, mmap, threading, time
import numpy as np
from nanovllm.model.kernels.build.layout import (
    ASLEEP, ENTERED, GENERATION, NEXT, THREAD_BYTES, THREADS
)
from nanovllm.model.kernels.build.target import host_spec
from nanovllm.model.kernels.record import KernelMemory
from nanovllm.model.kernels.threads.pool import ThreadPool
from nanovllm.training.kernels.library import load_operations
from nanovllm.training.kernels.records import DTYPES, OPERATIONS, RECORDS, RUN_CALLS

library = load_operations(host_spec().target)
pool = ThreadPool(2, library, phases=4)  # its helper waits for a run; a Python thread plays it

def integer(address):
    return ctypes.c_int64.from_address(address)

memory = mmap.mmap(-1, mmap.PAGESIZE)
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
places = np.frombuffer(memory, dtype=np.int64)
values, sums = np.ones(16, dtype=np.float32), np.zeros(16, dtype=np.float64)
first, run = (KernelMemory(RECORDS[name], DTYPES) for name in ("sum_of_squares", RUN_CALLS))
first.bind(values=values)
first.point("partial_sums", sums.ctypes.data)
first.set(count=16, job=pool.job, phases=pool.phases, threads=2)
run.point("calls", address)
run.set(count=2, job=pool.job, phases=pool.phases, threads=2)
places[:4] = (OPERATIONS.index("sum_of_squares"), address + 1024) * 2
for place, record in ((1024, first), (2048, run)):
    (_, integers), *_ = record.all_arrays()
    places[place // 8 : place // 8 + integers.size] = integers

integer(pool.phases + NEXT).value = 1  # the only item is handed out, and not computed yet
integer(pool.job + THREADS + THREAD_BYTES + ENTERED).value = 1
integer(pool.job + GENERATION).value = 1
late = threading.Thread(target=library.functions[RUN_CALLS], args=(address + 2048, 1), daemon=True)
late.start()
while integer(pool.job + ASLEEP).value == 0:
    time.sleep(0.001)
print("waits", flush=True)
protect = ctypes.CDLL(None).mprotect
protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
assert protect(address, mmap.PAGESIZE, 0) == 0  # the records and the list of calls are gone
integer(pool.job + GENERATION).value = 2  # the run is closed
library.functions["wake_helpers"](pool.job, 0)
late.join(timeout=30)
print("returned" if not late.is_alive() else "still waits")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="protects a page of memory by mprotect")
def test_a_helper_reads_nothing_of_a_closed_run() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.split() == ["waits", "returned"], done.stderr
    assert done.returncode == 0
