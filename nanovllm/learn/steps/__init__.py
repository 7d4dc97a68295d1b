"""One package a step: solution.py, check.py (CASES and MISTAKES), page.md and hints.md.

step03_layer_norm  layer normalization
step04_attention   one head, a causal mask, many heads
step08_blocks      paged blocks, reference counts and prefix sharing
step09_scheduler   continuous batching, chunked prefill and preemption
"""
