"""The read of memory by which its bandwidth is measured (nanovllm/cli/bench/machine.py).

entries   the compiled function
"""

STREAMS = 4
"""Neighbouring parts of memory that are read side by side."""
VECTORS = 2
"""Vectors of each stream that are read in turn."""
