"""Which requests run in the next step, and in which blocks of the KV cache.

In reading order:

request           a sequence and its states
token_rules       a request's settings about single tokens
step_plan         the plan of a step, and its results
scheduler         policy: plans a step and commits its results
kv_cache_manager  block tables, prefix sharing, forks and copy-on-write
block_manager     block ids, reference counts and the prefix cache
batching          from a plan to flat arrays, and from the runner's output to results
"""
