"""One package a step: solution.py, check.py (CASES and MISTAKES), page.md and hints.md.

step01_tokens      bytes, byte-pair encoding and a bigram
step02_logits      embedding, logits, softmax and cross-entropy
step03_layer_norm  layer normalization
step04_attention   one head, a causal mask, many heads
step06_sampling    temperature, top-k, top-p and a draw
step08_blocks      paged blocks, reference counts and prefix sharing
step09_scheduler   continuous batching, chunked prefill and preemption
"""
