"""Which requests run in the next step, and in which blocks of the KV cache.

request        a sequence and its states
scheduler      plans a step, and commits its results
block_manager  ownership of blocks, and the prefix cache
step_plan      the plan of a step, and its results
batching       from a plan to flat arrays, and back
"""
