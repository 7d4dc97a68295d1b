"""A pool of threads that run one compiled function together.

pool        the Python side: starts the threads and runs a function
phase       an operation whose items several threads share, and the barrier at its end
worker      the compiled side of a helper thread
barrier     work counters, barriers, and waiting for a run
atomics     atomic operations on int64
os_wait     sleeping and waking, and a monotonic clock
contention  the number of threads to use while other programs take cores
"""
