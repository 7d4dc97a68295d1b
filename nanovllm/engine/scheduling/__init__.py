"""Scheduling: select the requests of each step and allocate their blocks of the KV cache.

In reading order:

request           a sequence and its states
token_rules       allowed, biased and banned tokens, and token counts for penalties
step_plan         the plan of a step, and what it changes of each sequence
observer          receives the events of a scheduler, for the inspector
scheduler         scheduling policy: plans a step and commits its results
leftover_budget   longer chunks and drafted tokens, from the budget that is left
fairness          queues of waiting requests, and the service that each client has received
siblings          the n choices of one prompt, and their forks
kv_cache_manager  block tables, prefix sharing, forks and copy-on-write
block_manager     block ids, reference counts and the prefix cache
batching          converts a plan to flat arrays, and the runner's output to updates
"""
